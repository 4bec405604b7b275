"""Does AdamWSPAM train at rates that AdamW cannot? A small model, on a CPU: three seeds each.

    python sweep.py experiments/spikes_quickstart.py --gpus=2    # that is, two at a time
"""
base = 'config/quickstart.py'
common = dict(prune_score='none', eval_interval=1000)
_optimizers = {
    'adamw': dict(optimizer='adamw'),
    'paper': dict(optimizer='adamwspam', spam_mode='paper'),
    'stable': dict(optimizer='adamwspam', spam_mode='stable'),
}
varied = ['optimizer', 'spam_mode', 'learning_rate', 'min_lr']
runs = {}
for _seed in (1, 2, 3):
    for _rate in (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2):
        for _name, _told in _optimizers.items():
            _rates = dict(learning_rate=_rate, min_lr=_rate / 10)
            runs[f'{_name}_{_rate}_{_seed}'] = dict(_told, **_rates, seed=_seed)
