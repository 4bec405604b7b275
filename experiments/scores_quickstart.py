"""Scores at 90% of a small model, on a CPU: four seeds each, a minute a run.

    python sweep.py experiments/scores_quickstart.py --gpus=2    # that is, two at a time
"""
base = 'config/quickstart.py'
common = dict(target_sparsity=0.9, prune_start=250, prune_end=750, prune_interval=10,
              eval_interval=1000)
varied = ['prune_score']
runs = {}
for _seed in (1, 2, 3, 4):
    for _score in ('magnitude', 'bitter7', 'bitter0', 'bitter8', 'bitter3', 'movement'):
        runs[f'{_score}_{_seed}'] = dict(prune_score=_score, seed=_seed)
