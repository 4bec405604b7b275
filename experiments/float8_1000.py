"""Float8 beside bfloat16: 1,000 steps, three seeds."""
base = 'config/vanilla_baseline.py'
common = dict(
    dataset='standin', max_iters=1000, warmup_iters=150, learning_rate=2.4e-3, min_lr=2.4e-4,
    loss_chunk_tokens=4096, eval_interval=250, eval_tokens=1_048_576, log_interval=20,
    save_interval=1000)
varied = ['fp8']
runs = {}
for _seed in (1337, 1338, 1339):
    runs[f'bfloat16_{_seed}'] = dict(seed=_seed)
    runs[f'float8_{_seed}'] = dict(seed=_seed, fp8=True)
