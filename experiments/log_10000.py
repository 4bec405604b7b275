"""The matrix of the research log at its own length: 10,000 steps, 7 epochs of 187M tokens.

A run over four GPUs takes about 10 minutes: --gpus=4 --gpus_a_run=4.
"""
from support.settings import read_config

base = 'config/vanilla_baseline.py'
common = dict(
    dataset='standin', seed=1337, max_iters=10_000, eval_interval=500, eval_tokens=1_048_576,
    log_interval=50, save_interval=2000)
_tuned = dict(warmup_iters=250, learning_rate=2.4e-3, min_lr=2.4e-4)
_best_50 = dict(_tuned, prune_score='magnitude', target_sparsity=0.5, prune_start=5000,
                prune_end=9800, prune_lr_power=1)


def _as_it_was(preset):
    told = read_config(f'config/{preset}.py')
    return {key: value for key, value in told.items() if key not in ('out_dir', 'dataset')}


varied = list(_as_it_was('adamwspam_magnitude_50')) + list(_best_50)
runs = {
    'adamwspam_magnitude_50': _as_it_was('adamwspam_magnitude_50'),
    'dense_6e-4': {},
    'dense_tuned': _tuned,
    'best_50': _best_50,
    'best_50_pool': dict(_best_50, prune_scope='blocks+embedding'),
    'adamwprune_bitter0_state_50': _as_it_was('adamwprune_bitter0_state_50'),
}
