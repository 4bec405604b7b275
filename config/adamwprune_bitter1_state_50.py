"""Historical run of 2025-09: AdamWPrune with bitter1 to 50%. Published: perplexity 49.37; its score is the plain magnitude. A record, not a
recommendation: that is best_50."""
out_dir = 'out/adamwprune_bitter1_state_50'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
dropout = 0.1  # those runs kept the dropout of the GPT-2 code
bias = True
optimizer = 'adamwprune'
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
max_iters = 10_000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
eval_interval = 500
prune_score = 'bitter1'
target_sparsity = 0.5
prune_scope = 'blocks+embedding'  # its pool held the tied embedding: 123.57M weights
prune_schedule = 'linear'
prune_start = 100
prune_end = 10_000  # the ramp never stops: no recovery
prune_interval = 100
