"""Our best recipe at 50% of the blocks' weights so far, GPT-2 124M: docs/RESULTS.md has what it was chosen from."""
out_dir = 'out/best_50'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
optimizer = 'adamwprune'
prune_score = 'magnitude'
target_sparsity = 0.5
prune_schedule = 'zhu_gupta'
prune_start = 25_000  # 50% of the run: the later the ramp, the less is lost (docs/RESULTS.md)
prune_end = 49_000  # 98%: a little recovery
prune_interval = 100
