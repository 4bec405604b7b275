"""What sparsity costs a well-trained GPT-2 124M: 3,000 steps of 131,072 tokens.

Text: prepare it with `python prepare.py text --name=standin --input=... --val_input=...`; ours was
187M tokens of English prose (docs/RESULTS.md), so 3,000 steps are 2.1 epochs.
"""
base = 'config/vanilla_baseline.py'
common = dict(
    dataset='standin', max_iters=3000, warmup_iters=250, learning_rate=2.4e-3, min_lr=2.4e-4,
    eval_interval=250, eval_tokens=1_048_576, log_interval=20, save_interval=1000)
_best = dict(prune_score='magnitude', prune_start=1500, prune_end=2940, prune_interval=10,
             prune_lr_power=1)  # as config/best_50.py: 50% to 98% of the run
_zero = dict(min_lr=0, lr_schedule='linear')  # as config/best_90.py
_half = dict(_best, target_sparsity=0.5)
varied = ['optimizer', 'prune_score', 'target_sparsity', 'prune_pattern', 'prune_lr_power',
          'n_layer', 'parameters', 'min_lr', 'lr_schedule']
runs = {
    'dense_1337': dict(seed=1337),
    'best_50_1337': dict(_half, seed=1337),
    'best_75_1337': dict(_best, target_sparsity=0.75, seed=1337),
    'best_90_1337': dict(_best, target_sparsity=0.9, seed=1337),
    '75_half_power_1337': dict(_best, target_sparsity=0.75, prune_lr_power=0.5, seed=1337),
    '75_zero_1337': dict(_best, target_sparsity=0.75, **_zero, seed=1337),
    '90_zero_1337': dict(_best, target_sparsity=0.9, **_zero, seed=1337),
    '2_4_1337': dict(_half, prune_pattern='2:4', seed=1337),
    'dense_6_layers_1337': dict(n_layer=6, seed=1337),  # the block weights that 50% leaves
    'dense_3_layers_1337': dict(n_layer=3, seed=1337),  # those that 75% leaves
    'bitter7_50_1337': dict(_half, prune_score='bitter7', seed=1337),
    'bitter0_50_1337': dict(_half, prune_score='bitter0', seed=1337),
    'movement_50_1337': dict(_half, prune_score='movement', seed=1337),
    'magnitude_50_1337': dict(_half, prune_lr_power=0, seed=1337),
}
for _seed in (1338, 1339):
    runs[f'dense_{_seed}'] = dict(seed=_seed)
    runs[f'best_50_{_seed}'] = dict(_half, seed=_seed)
    runs[f'best_75_{_seed}'] = dict(_best, target_sparsity=0.75, seed=_seed)
