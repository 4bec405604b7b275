"""The best rate of each arm, and how it should fall: 1,500 steps, one seed (docs/RESULTS.md)."""
base = 'config/vanilla_baseline.py'
common = dict(
    dataset='standin', seed=1337, max_iters=1500, warmup_iters=150,
    eval_interval=250, eval_tokens=1_048_576, log_interval=20, save_interval=1500)
_best = dict(prune_score='magnitude', prune_start=750, prune_end=1470, prune_interval=10,
             prune_lr_power=1)
_arms = {
    'dense': {},
    'best_50': dict(_best, target_sparsity=0.5),
    'best_75': dict(_best, target_sparsity=0.75),
    'spam': dict(optimizer='adamwspam'),
}
_ends = {  # share of the peak at the end
    'cosine_tenth': ('cosine', 0.1),
    'cosine_zero': ('cosine', 0.0),
    'linear_tenth': ('linear', 0.1),
    'linear_zero': ('linear', 0.0),
}
varied = ['learning_rate', 'min_lr', 'lr_schedule', 'optimizer', 'prune_score', 'target_sparsity']
runs = {}
for _rate in (2.4e-3, 1.6e-3, 3.2e-3):
    for _arm, _told in _arms.items():
        runs[f'{_arm}_{_rate}'] = dict(_told, learning_rate=_rate, min_lr=_rate / 10)
for _end, (_schedule, _share) in _ends.items():
    for _arm in ('dense', 'best_50', 'best_75'):
        runs[f'{_arm}_{_end}'] = dict(_arms[_arm], learning_rate=2.4e-3, lr_schedule=_schedule,
                                      min_lr=2.4e-3 * _share)
