"""Pruning as train.py runs it: schedule, metrics, best.pt, every score under every optimizer."""
import json
import os
import re

import pytest
import torch
from conftest import last, refusal

import export
import optim
import train
from support.pretrained import load_model
from support.rundir import load_checkpoint, read_metrics

PRUNED = dict(prune_score='bitter7', prune_start=2, prune_end=9, prune_interval=2, max_iters=12)


def summary(folder):
    return json.loads((folder / 'summary.json').read_text())


def matrices(folder):
    """{name: weight} of the block matrices in last.pt."""
    weights = last(folder)['weights']
    return {name: w for name, w in weights.items() if name.startswith('blocks.') and w.dim() == 2}


def scope_of(folder):
    """How many weights these matrices have."""
    return sum(w.numel() for w in matrices(folder).values())


def zeros(folder):
    """{name: share of zeros} of these matrices."""
    return {name: (w == 0).float().mean().item() for name, w in matrices(folder).items()}


def test_metrics_follow_the_schedule_and_the_summary_tells_all(tiny, tmp_path):
    train.main(tiny(**PRUNED, log_interval=1, eval_interval=3))
    scope = scope_of(tmp_path / 'run')
    for record in read_metrics(tmp_path / 'run' / 'metrics.jsonl'):
        chosen_at = max([step for step in (2, 4, 6, 8, 9) if step <= record['step']], default=2)
        done = (chosen_at - 2) / (9 - 2)
        expected = round(0.5 * (1 - (1 - done) ** 3) * scope) / scope
        assert record['sparsity'] == expected, record['step']
    told = summary(tmp_path / 'run')
    assert told['sparsity'] == 0.5
    assert told['sparsity_all'] == pytest.approx(0.5 * scope / told['parameters'])
    shares = zeros(tmp_path / 'run')
    assert told['sparsity_by_layer'] == pytest.approx(shares)
    assert min(shares.values()) != max(shares.values())  # one threshold for all


def test_dense_run_says_so(tiny, tmp_path):
    train.main(tiny(max_iters=4))
    told = summary(tmp_path / 'run')
    assert (told['sparsity'], told['sparsity_all'], told['sparsity_by_layer']) == (0.0, 0.0, {})
    assert last(tmp_path / 'run')['pruner'] is None


def test_embedding_is_pruned_where_the_scope_has_it(tiny, tmp_path):
    train.main(tiny(**PRUNED, prune_scope='blocks+embedding', prune_allocation='layer'))
    told = summary(tmp_path / 'run')['sparsity_by_layer']
    assert told.keys() == {*matrices(tmp_path / 'run'), 'token_embedding.weight'}
    assert all(share == pytest.approx(0.5, abs=1e-3) for share in told.values())


def test_counters_of_spikes_are_in_the_summary(tiny, tmp_path):
    told = dict(optimizer='adamwspam', spam_interval=4, spam_warmup=1, max_iters=9)
    train.main(tiny(**told))
    result = summary(tmp_path / 'run')
    assert (result['spikes'], result['clipped'], result['resets']) == (0, 0, 2)


def test_survivors_train_at_the_rate_over_density(tiny, monkeypatch):
    """Groups with pruned weights at rate / (1 - sparsity)^2, the others as told."""
    rates = []
    gradients = train.local_gradients

    def note(run):
        if run.progress.step == 11:
            for group in run.optimizer.param_groups:
                rates.append((group['prune'], group['lr']))
        return gradients(run)

    monkeypatch.setattr(train, 'local_gradients', note)
    train.main(tiny(**PRUNED, prune_lr_power=2.0, learning_rate=1e-3, min_lr=1e-3))
    assert {prunes for prunes, _ in rates} == {True, False}
    for prunes, rate in rates:  # of update 11, after the masks of step 9
        assert rate == pytest.approx(4e-3 if prunes else 1e-3)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_best_of_a_pruned_run_is_small_and_exact(tiny, tmp_path, dtype):
    told = dict(n_embd=64, dtype=dtype, eval_interval=12, loss_chunk_tokens=64)
    train.main(tiny(**{**PRUNED, **told}))
    blocks = scope_of(tmp_path / 'run')
    everything = summary(tmp_path / 'run')['parameters']
    element = 4 if dtype == 'float32' else 2
    expected = (everything - blocks) * element + blocks * (element / 2 + 1 / 8)
    names = 16_000  # bytes of names and zip headers
    assert os.path.getsize(tmp_path / 'run' / 'best.pt') < 1.15 * expected + names
    model, saved = load_model(str(tmp_path / 'run'), 'best')
    assert saved['step'] == 12
    named = dict(model.named_parameters())
    rounded = getattr(torch, dtype)
    for name, weight in last(tmp_path / 'run')['weights'].items():
        expected = weight.to(rounded).float() if weight.dim() >= 2 else weight
        assert torch.equal(named[name], expected), name  # the last evaluation is the best
    assert all(share > 0 for share in zeros(tmp_path / 'run').values())


def test_best_is_one_of_the_final_sparsity_even_if_denser_ones_were_better(
        tiny, tmp_path, monkeypatch):
    told = iter([5.0, 1.0, 2.0, 3.0, 2.5, 4.0, 2.75])  # at 0, 2 ... 12; final masks from 9 on
    monkeypatch.setattr(train, 'evaluate', lambda run: torch.tensor(next(told)))
    train.main(tiny(**PRUNED, eval_interval=2))
    best = load_checkpoint(tmp_path / 'run' / 'best.pt')
    assert (best['step'], best['val_loss']) == (12, 2.75)
    assert summary(tmp_path / 'run')['best_val_loss'] == 2.75
    packed = {name for name, part in best['weights'].items() if isinstance(part, dict)}
    assert packed == matrices(tmp_path / 'run').keys()


@pytest.mark.parametrize('which', ['last', 'best'])
def test_readers_of_a_regrowing_run_see_it_masked(tiny, tmp_path, which):
    train.main(tiny(**{**PRUNED, 'prune_regrow': 0.0, 'prune_end': 12}))
    model, _ = load_model(str(tmp_path / 'run'), which)
    names = zeros(tmp_path / 'run')
    weights = torch.cat([p.flatten() for name, p in model.named_parameters() if name in names])
    assert (weights == 0).float().mean() == 0.5


@pytest.mark.parametrize('regrow, back', [(-1.0, False), (0.0, True)])
def test_only_regrowing_weights_come_back(tiny, tmp_path, monkeypatch, regrow, back):
    masks = []
    gradients = train.local_gradients

    def note(run):
        now = zip(run.pruner.named, run.pruner.masks.values())  # none before the first update
        masks.append({name: mask.clone() for name, mask in now})
        return gradients(run)

    monkeypatch.setattr(train, 'local_gradients', note)
    train.main(tiny(**PRUNED, prune_regrow=regrow, prune_schedule='linear'))
    returned = 0
    for before, after in zip(masks, masks[1:]):
        returned += sum(int((after[name] & ~before[name]).sum()) for name in before)
    assert (returned > 0) == back
    assert masks[9].keys() == masks[11].keys() == matrices(tmp_path / 'run').keys()
    assert all(torch.equal(masks[9][name], masks[11][name]) for name in masks[9])  # frozen


def test_two_of_four_inputs_of_each_output_stay(tiny, tmp_path):
    train.main(tiny(**{**PRUNED, 'prune_interval': 100}, prune_pattern='2:4'))
    weights = last(tmp_path / 'run')['weights']
    for name in zeros(tmp_path / 'run'):
        kept = (weights[name] != 0).view(-1, 4).sum(1)  # (groups of four inputs,)
        assert (kept == 2).all(), name


def test_masks_that_a_spike_warm_up_held_back_come_when_it_is_over(tiny, tmp_path):
    """Resets at 4, 8, 12 with the two updates after each held back: the ramp ends at 13."""
    spam = dict(optimizer='adamwspam', spam_interval=4, spam_warmup=2)
    told = {**PRUNED, **spam, 'prune_end': 13, 'max_iters': 15, 'log_interval': 1}
    train.main(tiny(**told, eval_interval=15))
    assert summary(tmp_path / 'run')['sparsity'] == 0.5
    assert (tmp_path / 'run' / 'best.pt').exists()
    records = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    by_step = {record['step']: record['sparsity'] for record in records if 'loss' in record}
    for reset in (4, 8, 12):
        assert by_step[reset - 1] == by_step[reset] == by_step[reset + 2], reset
        assert by_step[reset + 3] > by_step[reset + 2]


def distance(a, b):
    """Mean difference of a weight of two {name: weights}."""
    return torch.cat([(a[name] - b[name]).abs().flatten() for name in a]).mean().item()


def test_scores_do_not_depend_on_the_name_of_the_optimizer(tiny, tmp_path):
    """adamwprune is AdamW; without resets AdamWSPAM is nearly: its epsilon is placed otherwise.

    Nearly: ten times nearer than another beta2, whatever the model amplifies.
    """
    runs = {'adamw': {}, 'adamwprune': dict(optimizer='adamwprune'), 'other': dict(beta2=0.99),
            'adamwspam': dict(optimizer='adamwspam', spam_interval=0)}
    weights = {}
    for name, told in runs.items():
        rates = dict(learning_rate=3e-4, min_lr=3e-5, beta2=0.999)
        train.main(tiny(**{**PRUNED, **rates, **told}, out_dir=tmp_path / name))
        weights[name] = last(tmp_path / name)['weights']
    adamw = weights['adamw']
    assert distance(weights['adamwprune'], adamw) == 0
    assert distance(weights['adamwspam'], adamw) < 0.1 * distance(weights['other'], adamw)
    for name, weight in weights['adamwspam'].items():
        assert ((weight == 0) == (adamw[name] == 0)).float().mean() > 0.99, name


def test_score_of_what_the_optimizer_does_not_keep_is_refused(tiny, monkeypatch):
    def build_sgd(groups, settings):
        return torch.optim.SGD(groups, settings.learning_rate, momentum=0.9)

    monkeypatch.setitem(optim.OPTIMIZERS, 'adamw', build_sgd)
    told = dict(prune_start=2, prune_end=6, prune_interval=2)
    problem, = refusal(train.main, tiny(**told, prune_score='bitter7'))
    assert 'needs exp_avg_sq, which SGD does not keep' in problem


def test_any_optimizer_of_pytorch_is_pruned(tiny, tmp_path, monkeypatch):
    def build_sgd(groups, settings):
        return torch.optim.SGD(groups, settings.learning_rate, momentum=0.9)

    monkeypatch.setitem(optim.OPTIMIZERS, 'adamw', build_sgd)
    told = dict(prune_start=2, prune_end=6, prune_interval=2, prune_score='magnitude')
    assert train.main(tiny(**told)) == 0
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert summary['sparsity'] == 0.5
    assert '  optimizer          SGD, ' in (tmp_path / 'run' / 'train.log').read_text()


@pytest.mark.parametrize('source', ['run', pytest.param('hf', marks=pytest.mark.gpt2)])
def test_fine_tuning_a_pruned_model_keeps_its_zeros(tiny, tmp_path, capsys, source):
    """Of a run, or of its export; all other weights move."""
    pruned = tmp_path / 'pruned'
    told = dict(bias=True, block_size=32)
    assert train.main(tiny(**PRUNED, **told, out_dir=pruned)) == 0
    if source == 'hf':
        pytest.importorskip('transformers')
        assert export.main([str(pruned), str(tmp_path / 'hf')]) == 0
    start = {'run': f'run:{pruned}', 'hf': f'hf:{tmp_path / "hf"}'}[source]
    tuned = tmp_path / 'tuned'
    assert train.main(tiny(init_from=start, **told, out_dir=tuned, dry_run=True)) == 0
    assert ' of the matrices in the blocks is 0 at the start, and' in capsys.readouterr().out
    assert train.main(tiny(init_from=start, prune_score='zeros', max_iters=6, min_lr=1e-3,
                           **told, out_dir=tuned)) == 0
    after = matrices(tuned)
    assert re.search(r'stays 0: [1-9][\d.]+% of the matrices', capsys.readouterr().out)
    assert zeros(tuned) == zeros(pruned)
    for name, before in matrices(pruned).items():
        assert torch.equal(before == 0, after[name] == 0)
        assert not torch.equal(before, after[name])
    assert summary(tuned)['sparsity'] == summary(pruned)['sparsity']
    assert train.main(tiny(init_from='resume', prune_score='zeros', max_iters=8, min_lr=1e-3,
                           lr_decay_iters=6, **told, out_dir=tuned)) == 0
    assert zeros(tuned) == zeros(pruned)


def test_zeros_of_a_fresh_start_are_refused(tiny):
    [problem] = refusal(train.main, tiny(prune_score='zeros'))
    assert "prune_score='zeros' init_from='scratch'" in problem
    [problem] = refusal(train.main, tiny(init_from='run:nowhere'))
    assert problem.startswith('no checkpoint nowhere/last.pt; check the folder, ')
    assert '(sample.py, export.py) use --checkpoint=last' in problem
