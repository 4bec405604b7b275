"""Our best recipe at 50% of the blocks' weights so far, GPT-2 124M.

Found at 600 to 3,000 steps and scaled to 50,000: docs/RESULTS.md has what it was chosen from.
"""
out_dir = 'out/best_50'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
prune_score = 'magnitude'
target_sparsity = 0.5
prune_schedule = 'zhu_gupta'
prune_start = 25_000  # 50% of the run: late ramps lose less, later than this gains nothing
prune_end = 49_000  # 98%: a little recovery
prune_interval = 100
prune_lr_power = 1.0  # survivors at twice the rate in the end
