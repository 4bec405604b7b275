"""Pruning and spike handling as train.py runs them: schedule, checkpoints, resume, reports, presets, refusals."""
import glob
import json
import os

import pytest
import torch
from conftest import HOME, assert_same_run, last, refusal, train

import prune
import sample
from preflight import find_machine
from rundir import load_checkpoint, read_metrics
from settings import Settings, check, convert, parse

PRUNED = dict(optimizer='adamwprune', prune_score='bitter7', prune_start=2, prune_end=9, prune_interval=2, max_iters=12, lr_decay_iters=12)
SPAM = dict(spam_interval=4, spam_warmup=1, spam_grace=1, spam_theta=2.0)
COMBINATIONS = {
    **{score: {**PRUNED, 'prune_score': score} for score in prune.SCORES if score != 'bitter10'},
    'bitter10': {**PRUNED, 'prune_score': 'bitter10', 'allow_extra_memory': True},
    'adamw and movement': {**PRUNED, 'optimizer': 'adamw', 'prune_score': 'movement'},
    'spam paper': {k: v for k, v in {**PRUNED, **SPAM, 'optimizer': 'adamwspam'}.items() if 'prune' not in k},
    'spam reference and magnitude': {**{k: v for k, v in {**PRUNED, **SPAM}.items() if k != 'spam_grace'}, 'optimizer': 'adamwspam',
                                     'prune_score': 'magnitude', 'spam_mode': 'reference'},
    'spam stable below bitter3': {**PRUNED, 'spam_interval': 4, 'adamwprune_base': 'adamwspam', 'prune_score': 'bitter3',
                                  'spam_mode': 'stable', 'spam_warmup': 1},
    'regrowth': {**PRUNED, 'prune_regrow': True, 'prune_srste': 0.01},
    'regrowth in bfloat16': {**PRUNED, 'prune_regrow': True, 'dtype': 'bfloat16'},
    'layers alike at a raised rate': {**PRUNED, 'prune_allocation': 'layer', 'prune_lr_power': 1.0},
    '2:4 of everything': {**{k: v for k, v in PRUNED.items() if k != 'prune_interval'}, 'prune_pattern': '2:4',
                          'prune_scope': 'blocks+embedding'},
    '2:4 with regrowth': {**PRUNED, 'prune_pattern': '2:4', 'prune_regrow': True},
}


def summary(folder):
    return json.loads((folder / 'summary.json').read_text())


@pytest.mark.parametrize('name', COMBINATIONS)
def test_resume_is_exact_and_the_mask_holds(tiny, tmp_path, name):
    told = {**COMBINATIONS[name], 'eval_interval': 6, 'n_layer': 1}
    assert train.main(tiny(**told, out_dir=tmp_path / 'straight')) == 0
    # max_iters=7 would cut the ramp short, so the first half is stopped at its step instead
    straight = train.train

    def stopped(run):
        run.settings.max_iters = 7
        try:
            straight(run)
        finally:
            run.settings.max_iters = 12

    train.train = stopped
    try:
        train.main(tiny(**told, out_dir=tmp_path / 'split'))
    finally:
        train.train = straight
    assert last(tmp_path / 'split')['progress']['step'] == 7
    assert train.main(tiny(**told, out_dir=tmp_path / 'split', init_from='resume')) == 0
    assert_same_run(tmp_path / 'straight', tmp_path / 'split')
    saved = last(tmp_path / 'straight')
    masks = saved.get('mask', {})
    assert bool(masks) == ('prune_score' in told)
    for key, mask in masks.items():
        assert (saved['weights'][key][~mask] == 0).all(), key
    if masks:
        total, pruned = sum(m.numel() for m in masks.values()), sum(int((~m).sum()) for m in masks.values())
        assert pruned == round(0.5 * total) and summary(tmp_path / 'straight')['sparsity'] == pruned / total


def test_metrics_follow_the_schedule_and_the_summary_tells_all(tiny, tmp_path):
    train.main(tiny(**PRUNED, log_interval=1, eval_interval=3))
    scope = sum(m.numel() for m in last(tmp_path / 'run')['mask'].values())
    for record in read_metrics(tmp_path / 'run' / 'metrics.jsonl'):
        expected = prune.sparsity_at(record['step'], 'zhu_gupta', 0.5, 2, 9, 2)
        assert record['sparsity'] == round(expected * scope) / scope, record['step']
    told = summary(tmp_path / 'run')
    assert told['sparsity'] == 0.5 and told['sparsity_all'] == pytest.approx(0.5 * scope / told['parameters'])
    assert set(told['sparsity_by_layer']) == set(last(tmp_path / 'run')['mask']) and (told['spikes'], told['resets']) == (0, 0)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_best_of_a_pruned_run_is_small_and_exact(tiny, tmp_path, dtype):
    told = dict(n_embd=64, dtype=dtype, eval_interval=12)
    train.main(tiny(**{**PRUNED, **told}))
    train.main(tiny(**told, max_iters=12, out_dir=tmp_path / 'dense'))
    pruned, dense = (os.path.getsize(tmp_path / name / 'best.pt') for name in ('run', 'dense'))
    blocks = 2 * 12 * 64 ** 2
    everything = summary(tmp_path / 'dense')['parameters']
    element = 4 if dtype == 'float32' else 2
    assert pruned < 1.15 * ((everything - blocks) * element + blocks * (element / 2 + 1 / 8)) + 16_000  # + names and zip headers
    saved = load_checkpoint(tmp_path / 'run' / 'best.pt')
    model, _ = sample.load_model(str(tmp_path / 'run'), 'best', find_machine('cpu', dtype)[0])
    named, masks = dict(model.named_parameters()), last(tmp_path / 'run')['mask']
    for key, w in last(tmp_path / 'run')['weights'].items():  # best is the last evaluation, made of the same weights
        expected = torch.where(masks[key], w, 0) if key in masks else w
        assert torch.equal(named[key].float(), expected.to(named[key].dtype).float()), key
    assert saved['step'] == 12
    assert sample.main([str(tmp_path / 'run'), '--max_new_tokens=5', '--device=cpu']) == 0


def test_best_is_one_of_the_final_sparsity_even_if_denser_ones_were_better(tiny, tmp_path, monkeypatch):
    losses = iter([5.0, 1.0, 2.0, 3.0, 2.5, 4.0, 2.75])
    monkeypatch.setattr(train, 'evaluate', lambda run: torch.tensor(next(losses)))
    train.main(tiny(**PRUNED, eval_interval=2))  # evaluated at 0, 2 ... 12; the masks are final from 9 on
    best = load_checkpoint(tmp_path / 'run' / 'best.pt')
    assert (best['step'], best['val_loss'], summary(tmp_path / 'run')['best_val_loss']) == (12, 2.75, 2.75)
    assert sum(1 for part in best['weights'].values() if isinstance(part, dict)) == len(last(tmp_path / 'run')['mask'])


def test_sampling_from_last_uses_the_masks(tiny, tmp_path):
    train.main(tiny(**{**PRUNED, 'prune_regrow': True, 'prune_end': 12}))
    for which in ('last', 'best'):
        model, _ = sample.load_model(str(tmp_path / 'run'), which, find_machine('cpu', 'float32')[0])
        weights = torch.cat([p.flatten() for n, p in model.named_parameters() if n in last(tmp_path / 'run')['mask']])
        assert (weights == 0).float().mean() == 0.5


@pytest.mark.parametrize('path', sorted(glob.glob(str(HOME / 'config' / '*.py'))), ids=os.path.basename)
def test_presets_are_accepted(path):
    settings, problems = parse(Settings, [path])
    assert problems + check(settings) == []
    assert settings.out_dir == 'out/' + os.path.basename(path)[:-3]


def test_settings_know_the_same_scores_as_prune():
    for score in prune.SCORES:
        assert convert('prune_score', score, Settings.__dataclass_fields__['prune_score'].type) == score


REFUSED = [
    (dict(optimizer='adamwprune'), "optimizer='adamwprune' prune_score='none': it prunes by a score of its own state; set e.g. "
     '--prune_score=bitter7'),
    ({**PRUNED, 'optimizer': 'adamw'}, "optimizer='adamw' prune_score='bitter7': scores other than magnitude and movement are of the "
     "optimizer's own state; set --optimizer=adamwprune"),
    ({**PRUNED, 'prune_end': 13}, 'prune_start=2 prune_end=13 max_iters=12: the ramp must start before it ends and end within the run, '
     'e.g. --prune_start=3 --prune_end=11'),
    ({**PRUNED, 'prune_start': 9}, 'prune_start=9 prune_end=9 max_iters=12: the ramp must start before it ends and end within the run, '
     'e.g. --prune_start=3 --prune_end=11'),
    (dict(target_sparsity=0.7), 'target_sparsity=0.7: acts only with a prune_score; leave it out'),
    (dict(spam_theta=7.0), 'spam_theta=7.0: acts only with optimizer=adamwspam or adamwprune_base=adamwspam; leave it out'),
    (dict(optimizer='adamwspam', spam_mode='stable', spam_theta=7.0), 'spam_theta=7.0: acts only with spam_mode=paper or reference; '
     'leave it out'),
    (dict(optimizer='adamwspam', spam_mode='reference', spam_grace=7), 'spam_grace=7: acts only with spam_mode=paper; leave it out'),
    ({**PRUNED, 'allow_extra_memory': True}, 'allow_extra_memory=True: acts only with prune_score=bitter10; leave it out'),
    ({**PRUNED, 'prune_pattern': '2:4', 'prune_schedule': 'linear', 'prune_interval': 100},
     "prune_schedule='linear': acts only with prune_pattern=unstructured; leave it out"),
    ({**PRUNED, 'prune_pattern': '2:4'}, 'prune_interval=2: acts only with prune_regrow=True or prune_pattern=unstructured; leave it out'),
    ({**PRUNED, 'prune_pattern': '2:4', 'prune_allocation': 'layer', 'prune_interval': 100},
     "prune_allocation='layer': acts only with prune_pattern=unstructured; leave it out"),
    ({**PRUNED, 'prune_score': 'bitter4', 'prune_allocation': 'layer'}, "prune_allocation='layer': acts only with a prune_score other than "
     'bitter4, which has shares for the layers of its own; leave it out'),
    (dict(prune_lr_power=1.0), 'prune_lr_power=1.0: acts only with a prune_score; leave it out'),
    ({**PRUNED, 'prune_lr_power': -1.0}, 'AdamWPrune: lr_power=-1.0 must not be negative'),
    ({**PRUNED, 'target_sparsity': 1.0}, 'AdamWPrune: target_sparsity=1.0 must be at least 0 and below 1'),
    ({**PRUNED, 'prune_score': 'bitter10'}, "AdamWPrune: score='bitter10' keeps three more numbers a weight; allow it by "
     "allow_extra_memory=True, or use 'bitter10z', which does without"),
    ({**PRUNED, 'prune_pattern': '2:4', 'prune_interval': 100, 'target_sparsity': 0.6},
     "AdamWPrune: target_sparsity=0.6: pattern='2:4' prunes exactly half; set 0.5"),
    ({**PRUNED, **SPAM, 'adamwprune_base': 'adamwspam', 'spam_warmup': 2, 'prune_end': 13, 'max_iters': 15},
     'prune_end=13 max_iters=15 spam_interval=4 spam_warmup=2: no masks are chosen in the warm-up after a reset, so target_sparsity is '
     'reached at 16 only; choose them before the reset, or write --max_iters=16 or more'),
    ({**PRUNED, **SPAM, 'adamwprune_base': 'adamwspam', 'spam_warmup': 2, 'prune_pattern': '2:4', 'prune_interval': 100, 'prune_start': 13,
      'prune_end': 14, 'max_iters': 15},
     'prune_start=13 max_iters=15 spam_interval=4 spam_warmup=2: no masks are chosen in the warm-up after a reset, so target_sparsity is '
     'reached at 16 only; choose them before the reset, or write --max_iters=16 or more'),
    ({**PRUNED, 'prune_srste': 0.1}, 'AdamWPrune: srste=0.1 acts on weights that may regrow; set regrow=True'),
]


@pytest.mark.parametrize('told, message', REFUSED)
def test_impossible_pruning_is_refused_before_anything_is_written(tiny, tmp_path, told, message):
    assert refusal(train.main, tiny(**told)) == [message]
    assert not (tmp_path / 'run').exists()


def test_ramp_that_ends_in_a_warm_up_reaches_its_target_when_that_is_over(tiny, tmp_path):
    told = {**PRUNED, **SPAM, 'adamwprune_base': 'adamwspam', 'spam_warmup': 2, 'prune_end': 13, 'max_iters': 16, 'lr_decay_iters': 16}
    assert train.main(tiny(**told)) == 0
    assert summary(tmp_path / 'run')['sparsity'] == 0.5 and (tmp_path / 'run' / 'best.pt').exists()


def test_choice_for_good_before_a_reset_is_not_held_up_by_what_would_come_after(tiny, tmp_path):
    told = {**PRUNED, **SPAM, 'adamwprune_base': 'adamwspam', 'spam_warmup': 2, 'prune_pattern': '2:4', 'prune_interval': 100,
            'prune_end': 13, 'max_iters': 15, 'lr_decay_iters': 15}  # 2:4 for good: the masks are final at prune_start
    assert train.main(tiny(**told)) == 0
    assert summary(tmp_path / 'run')['sparsity'] == 0.5


PLANS = [
    (PRUNED, 'by bitter7, unstructured, for good; zhu_gupta from step 2 to 9 every 2, then 3 steps of recovery\n'),
    ({**PRUNED, 'prune_interval': 100, 'prune_pattern': '2:4'}, 'by bitter7, 2:4, for good; all at step 2, then 10 steps of recovery\n'),
    ({**PRUNED, 'prune_pattern': '2:4', 'prune_regrow': True},
     '2:4, regrowing until the end of the ramp; all at step 2, chosen again every 2 to 9, then 3 steps of recovery\n'),
    ({**PRUNED, 'prune_allocation': 'layer', 'prune_lr_power': 2.0},
     'each matrix alike, for good; zhu_gupta from step 2 to 9 every 2, then 3 steps of recovery; their learning rate over density^2, '
     'in the end x 4\n'),
]


@pytest.mark.parametrize('told, plan', PLANS)
def test_preflight_tells_what_pruning_will_do(tiny, capsys, told, plan):
    train.main(tiny(**told))
    assert plan in capsys.readouterr().out


def test_target_that_the_floor_forbids_is_refused(tiny):
    [problem] = refusal(train.main, tiny(**{**PRUNED, 'target_sparsity': 0.995}))
    assert problem.startswith('AdamWPrune: target_sparsity=0.995 would prune ') and '1% of each of 8 matrices stay' in problem
