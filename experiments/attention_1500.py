"""Positions, grouped queries and latent attention at the tuned rate: 1,500 steps, one seed."""
base = 'config/vanilla_baseline.py'
common = dict(
    dataset='standin', seed=1337, max_iters=1500, warmup_iters=150, learning_rate=2.4e-3,
    min_lr=2.4e-4, eval_interval=250, eval_tokens=1_048_576, log_interval=20, save_interval=1500)
varied = ['attention', 'positions', 'n_kv_head', 'latent_dim', 'parameters']
runs = {  # numbers in the cache, a token and layer
    'mha_learned': {},  # 1536
    'mha_rotary': dict(positions='rotary'),  # 1536
    'gqa_2_rotary': dict(positions='rotary', n_kv_head=2),  # 256
    'mla_128_rotary': dict(positions='rotary', attention='mla', latent_dim=128),  # 288
    'mla_64_rotary': dict(positions='rotary', attention='mla', latent_dim=64),  # 160
}
