"""Latent attention of width 128 on FineWeb-Edu, the reciprocal term off; all else is vanilla_baseline. 6.55e9 tokens."""
out_dir = 'out/ra_mla_baseline'
dataset = 'fineweb_edu'
batch_size = 32
gradient_accumulation_steps = 4  # 32 x 4 x 1024 = 131,072 tokens a step
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
dtype = 'bfloat16'
compile = True
attention = 'mla'
latent_dim = 128
per_head_q_latent = True
per_head_v_up = True
ra_alpha = 0.0  # off; with --ra_learned=True each head learns its own
ra_window = 64
optimizer = 'adamw'
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
max_iters = 50_000
weight_decay = 0.1
eval_interval = 500
