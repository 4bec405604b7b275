"""Which schedule, ramp and rate suit 75% and 90%: 1,500 steps, one seed, one change at a time.

tenth, zero: the learning rate ends at a tenth by cosine, or at zero in a straight line. late,
early: when masks are chosen. half, more: the pruned's rate is over their density to the power 0.5
or 1.5, not 1. layer: each matrix alike. regrow: the pruned learn on, and may return until 80% of
the run.
"""
base = 'config/vanilla_baseline.py'
common = dict(
    dataset='standin', seed=1337, max_iters=1500, warmup_iters=150, learning_rate=2.4e-3,
    eval_interval=250, eval_tokens=1_048_576, log_interval=20, save_interval=1500)
_tenth = dict(min_lr=2.4e-4)
_zero = dict(min_lr=0, lr_schedule='linear')
_late = dict(prune_score='magnitude', prune_start=750, prune_end=1470, prune_interval=10,
             prune_lr_power=1)  # as config/best_50.py: 50% to 98% of the run
_early = {**_late, 'prune_start': 375, 'prune_end': 1125}  # 25% to 75%
_regrow = {**_late, 'prune_end': 1200, 'prune_regrow': 1e-4}
varied = ['min_lr', 'lr_schedule', 'prune_score', 'target_sparsity', 'prune_start', 'prune_end',
          'prune_lr_power', 'prune_pattern', 'prune_regrow', 'prune_allocation']
runs = {
    'dense_tenth': _tenth,
    'dense_zero': _zero,
    '90_zero_late': dict(target_sparsity=0.9, **_zero, **_late),
    '90_zero_early': dict(target_sparsity=0.9, **_zero, **_early),
    '75_zero_late': dict(target_sparsity=0.75, **_zero, **_late),
    '75_zero_early': dict(target_sparsity=0.75, **_zero, **_early),
    '90_tenth_late': dict(target_sparsity=0.9, **_tenth, **_late),
    '90_tenth_half': dict(target_sparsity=0.9, **_tenth, **{**_late, 'prune_lr_power': 0.5}),
    '90_tenth_more': dict(target_sparsity=0.9, **_tenth, **{**_late, 'prune_lr_power': 1.5}),
    '90_tenth_layer': dict(target_sparsity=0.9, prune_allocation='layer', **_tenth, **_late),
    '90_tenth_regrow': dict(target_sparsity=0.9, **_tenth, **_regrow),
    '2_4_tenth_late': dict(target_sparsity=0.5, prune_pattern='2:4', **_tenth, **_late),
    '2_4_tenth_regrow': dict(target_sparsity=0.5, prune_pattern='2:4', **_tenth, **_regrow),
}
