"""Historical run of 2025-09: AdamWPrune with bitter1 to 50%. Published: perplexity 49.37 after
10,000 steps; bitter1 is plain magnitude.

A record, not a recommendation: that is best_50. Betas and weight decay are not in the published
record: ours are the defaults.
"""
out_dir = 'out/adamwprune_bitter1_state_50'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
dropout = 0.1  # those runs kept the dropout of the GPT-2 code
bias = True
max_iters = 10_000
optimizer = 'adamwprune'
prune_score = 'bitter1'
prune_scope = 'blocks+embedding'  # its pool held the tied embedding: 123.57M weights
prune_schedule = 'linear'
prune_start = 100
prune_end = 10_000  # the ramp never stops: no recovery
