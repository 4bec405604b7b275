"""Historical run of 2025-09: AdamWPrune with bitter2 to 50%. Published: perplexity 45.87 after
12,100 steps (48.30 at 10,000); bitter2 is bitter1, trained 21% longer.

A record, not a recommendation: that is best_50. Betas and weight decay are not in the published
record: ours are the defaults.
"""
out_dir = 'out/adamwprune_bitter2_state_50'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
dropout = 0.1  # those runs kept the dropout of the GPT-2 code
bias = True
max_iters = 12_100
optimizer = 'adamwprune'
prune_score = 'bitter2'
prune_scope = 'blocks+embedding'  # its pool held the tied embedding: 123.57M weights
prune_schedule = 'linear'
prune_start = 100
prune_end = 10_000  # after it 2,100 steps of recovery
