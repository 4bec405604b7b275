"""What sparsity costs a well-trained GPT-2 124M: 3,000 steps of 131,072 tokens.

Text: prepare it with `python prepare.py text --name=standin --input=... --val_input=...`; ours was
187M tokens of English prose (docs/RESULTS.md), so 3,000 steps are 2.1 epochs.
"""
base = 'config/vanilla_baseline.py'
common = dict(
    dataset='standin', max_iters=3000, warmup_iters=250, learning_rate=2.4e-3, min_lr=2.4e-4,
    eval_interval=250, eval_tokens=1_048_576, log_interval=20, save_interval=1000)
_pruned = dict(prune_score='magnitude', prune_start=1500, prune_end=2940, prune_interval=10,
               prune_lr_power=1)
varied = ['optimizer', 'prune_score', 'target_sparsity']
runs = {
    'dense_1337': dict(seed=1337),
    'best_50_1337': dict(seed=1337, target_sparsity=0.5, **_pruned),
    'best_75_1337': dict(seed=1337, target_sparsity=0.75, **_pruned),
    'best_90_1337': dict(seed=1337, target_sparsity=0.9, **_pruned),
}
