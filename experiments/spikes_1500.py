"""Does AdamWSPAM train at rates that AdamW cannot? 1,500 steps, one seed."""
base = 'config/vanilla_baseline.py'
common = dict(
    dataset='standin', seed=1337, max_iters=1500, warmup_iters=150,
    eval_interval=250, eval_tokens=1_048_576, log_interval=20, save_interval=1500)
_optimizers = {
    'adamw': {},
    'paper': dict(optimizer='adamwspam', spam_mode='paper'),
    'stable': dict(optimizer='adamwspam', spam_mode='stable'),
}
varied = ['optimizer', 'spam_mode', 'learning_rate', 'min_lr']
runs = {}
for _rate in (4.0e-3, 2.4e-3, 6.0e-3):
    for _name, _told in _optimizers.items():
        runs[f'{_name}_{_rate}'] = dict(_told, learning_rate=_rate, min_lr=_rate / 10)
