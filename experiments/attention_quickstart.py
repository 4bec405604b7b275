"""Positions, grouped queries and latent attention in a small model, on a CPU: three seeds each.

    python sweep.py experiments/attention_quickstart.py --gpus=2    # that is, two at a time
"""
base = 'config/quickstart.py'
common = dict(prune_score='none', eval_interval=1000)
varied = ['attention', 'positions', 'n_kv_head', 'latent_dim', 'parameters']
_arms = {  # numbers in the cache, a token and layer
    'mha_learned': {},  # 256
    'mha_rotary': dict(positions='rotary'),  # 256
    'gqa_1_rotary': dict(positions='rotary', n_kv_head=1),  # 64
    'mla_24_rotary': dict(positions='rotary', attention='mla', latent_dim=24),  # 64
    'mla_64_rotary': dict(positions='rotary', attention='mla', latent_dim=64),  # 144
}
runs = {}
for _seed in (1, 2, 3):
    for _name, _told in _arms.items():
        runs[f'{_name}_{_seed}'] = dict(_told, seed=_seed)
