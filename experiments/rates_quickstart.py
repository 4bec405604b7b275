"""What does sparsity cost at each arm's own best rate? A small model, a CPU, three seeds each.

    python sweep.py experiments/rates_quickstart.py --gpus=2    # that is, two at a time
"""
base = 'config/quickstart.py'
common = dict(prune_interval=10, eval_interval=1000)
_arms = {
    'dense': dict(prune_score='none'),
    '50': dict(prune_score='magnitude', target_sparsity=0.5, prune_start=500, prune_end=980),
    '75': dict(prune_score='magnitude', target_sparsity=0.75, prune_start=500, prune_end=980),
}
varied = ['learning_rate', 'min_lr', 'prune_score', 'target_sparsity']
runs = {}
for _seed in (1, 2, 3):
    for _rate in (2.5e-3, 5e-3, 1e-2, 2e-2):
        for _name, _told in _arms.items():
            _rates = dict(learning_rate=_rate, min_lr=_rate / 10)
            runs[f'{_name}_{_rate}_{_seed}'] = dict(_told, **_rates, seed=_seed)
