"""Two of each four inputs of the blocks' matrices, the pattern of sparse tensor cores.

At 3,000 steps it cost 2.7% of perplexity. Scaled to 50,000 steps; docs/RESULTS.md has what it was
chosen from.
"""
out_dir = 'out/best_2_4'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
prune_score = 'magnitude'
target_sparsity = 0.5
prune_pattern = '2:4'
prune_start = 25_000  # 50% of the run: all goes at once, and the other half recovers
prune_end = 49_000
prune_lr_power = 1.0  # survivors at twice the rate from then on
