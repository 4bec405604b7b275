"""Reciprocal attention, a weight a head learned from 0, on FineWeb-Edu; all else is vanilla_baseline. 6.55e9 tokens."""
out_dir = 'out/ra_learned'
dataset = 'fineweb_edu'
batch_size = 32
gradient_accumulation_steps = 4  # 32 x 4 x 1024 = 131,072 tokens a step
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
dtype = 'bfloat16'
compile = True
ra_learned = True
ra_window = 64
optimizer = 'adamw'
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
max_iters = 50_000
weight_decay = 0.1
eval_interval = 500
