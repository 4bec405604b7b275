"""75% of the blocks' weights: best_50's recipe, which at 3,000 steps cost 3.4 ± 0.8% of perplexity.

Scaled to 50,000 steps; docs/RESULTS.md has what it was chosen from.
"""
out_dir = 'out/best_75'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
prune_score = 'magnitude'
target_sparsity = 0.75
prune_schedule = 'zhu_gupta'
prune_start = 25_000  # 50% of the run; from 25% on costs 2.5% more at 1,500 steps
prune_end = 49_000  # 98%: a little recovery
prune_interval = 100
prune_lr_power = 1.0  # survivors at four times the rate in the end
