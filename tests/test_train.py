"""train.py: what a run leaves behind, evaluation, order of the data, NaN, exit codes."""
import json
import math
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import HOME, TINY, last, losses, refusal
from torch.nn import functional as F

import prune
import train
from model import GPT
from support.rundir import load_checkpoint, read_metrics
from support.shards import open_data, window_order


def summary(folder):
    return json.loads((folder / 'summary.json').read_text())


def text_log(folder):
    return (folder / 'train.log').read_text()


def validation_losses(folder):
    """{step: validation loss} of a run directory."""
    records = read_metrics(folder / 'metrics.jsonl')
    return {record['step']: record['val_loss'] for record in records if 'val_loss' in record}


# --- what a run leaves behind ---------------------------------------------------------------------

STEPS = 40
LONGER = dict(max_iters=STEPS, lr_decay_iters=80, log_interval=5, eval_interval=10)


@pytest.fixture(scope='module')
def finished(tiny_data, tmp_path_factory):
    """Folder of a finished run of 40 steps."""
    folder = tmp_path_factory.mktemp('finished') / 'run'
    told = {**TINY, **LONGER, 'data_dir': tiny_data, 'out_dir': folder}
    assert train.main([f'--{key}={value}' for key, value in told.items()]) == 0
    return folder


def test_run_leaves_the_documented_files(finished):
    assert {f.name for f in finished.iterdir()} == {
        'config.json', 'train.log', 'metrics.jsonl', 'last.pt', 'previous.pt', 'best.pt',
        'summary.json'}


def test_metrics_have_the_documented_keys_at_the_documented_steps(finished):
    records = read_metrics(finished / 'metrics.jsonl')
    trained = [record for record in records if 'loss' in record]
    evaluated = [record for record in records if 'val_loss' in record]
    assert len(trained) + len(evaluated) == len(records)
    for record in trained:
        assert list(record) == '''step tokens loss grad_norm lr tokens_per_second milliseconds mfu
            peak_memory_bytes peak_reserved_bytes sparsity spikes seconds'''.split()
        assert record['tokens'] == record['step'] * 4 * 32
        assert record['tokens_per_second'] > 0 and record['peak_memory_bytes'] > 2**20
    for record in evaluated:
        assert list(record) == 'step val_loss val_ppl val_bits_per_byte sparsity'.split()
        assert record['val_ppl'] == pytest.approx(math.exp(record['val_loss']))
        bits = record['val_loss'] / math.log(2)  # of each document one token ends it
        assert bits < record['val_bits_per_byte'] < 1.002 * bits
    assert [record['step'] for record in trained] == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    assert [record['step'] for record in evaluated] == [0, 10, 20, 30, 40]


def test_learning_rate_warms_up_and_follows_the_cosine(finished):
    for record in read_metrics(finished / 'metrics.jsonl'):
        if 'lr' not in record:
            continue
        t = record['step'] - 1  # updates done before this one
        share = (t - 2) / (80 - 2)
        expected = 1e-3 + (1e-2 - 1e-3) * (1 + math.cos(math.pi * share)) / 2
        if t < 2:
            expected = 1e-2 * (t + 1) / (2 + 1)
        assert record['lr'] == pytest.approx(expected), t


def test_run_learns_and_its_summary_says_how_well(finished):
    told = summary(finished)
    assert set(told) == set('''steps tokens val_loss val_ppl best_val_loss sparsity sparsity_all
        sparsity_by_layer tokens_per_second milliseconds mfu peak_memory_bytes peak_reserved_bytes
        mean_memory_bytes mean_reserved_bytes compile_peak_bytes
        compiled_graphs graph_breaks rung rung_label effective_batch parameters dataset fingerprint
        seconds exit_reason'''.split())
    assert (told['steps'], told['tokens'], told['effective_batch']) == (STEPS, STEPS * 128, 4)
    assert (told['exit_reason'], told['dataset'], told['rung']) == ('finished', 'tiny', 0)
    by_step = validation_losses(finished)
    assert told['val_loss'] == by_step[STEPS] < 3.2 < by_step[0]
    assert told['best_val_loss'] == min(by_step.values())
    assert abs(by_step[0] - math.log(257)) < 0.5  # an untrained model knows nothing


@pytest.mark.parametrize('name', ['last.pt', 'best.pt'])
def test_checkpoints_say_where_they_are_from(finished, name):
    saved = torch.load(finished / name, weights_only=True)
    assert saved['format'] == 'nanoprune 3'
    assert saved['settings']['max_iters'] == STEPS
    assert saved['model']['n_embd'] == 32 and saved['model']['vocab_size'] == 257
    assert saved['data'] == dict(name='tiny', tokenizer='bytes', vocab_size=257,
                                 train_tokens=saved['data']['train_tokens'])
    assert saved['fingerprint'] == summary(finished)['fingerprint']
    assert saved['val_loss'] == validation_losses(finished)[saved['step']]
    parameters = sum(w.numel() for w in saved['weights'].values())
    assert parameters == summary(finished)['parameters']
    assert ('optimizer' in saved) == ('progress' in saved) == (name == 'last.pt')


def test_log_lines_are_aligned_and_fit_110_columns(finished, tiny, tmp_path, capsys):
    pattern = re.compile(r'step +\d+  loss')
    lines = [line for line in text_log(finished).splitlines() if pattern.match(line)]
    assert len(lines) == 9
    words = ('loss', 'norm', 'lr', 'k tok/s', 'GiB', 'eta')
    assert len({tuple(line.index(word) for word in words) for line in lines}) == 1
    long = dict(max_iters=600_000, learning_rate=6e-4, min_lr=6e-5, out_dir=tmp_path / 'long')
    run = train.prepare_run(*train.read_settings(tiny(**long)))
    run.machine = run.machine._replace(peak_flops=1e10)
    run.progress.step = 1000
    run.mark = time.monotonic() - 200
    capsys.readouterr()
    train.log_step(run, torch.tensor(10.9876), torch.tensor(1.234))
    run.log.close()
    line = capsys.readouterr().out.rstrip('\n')
    assert 'mfu' in line and 'eta 33:16:' in line and len(line) < 110, line


def test_utilisation_is_of_the_peak_of_all_processes(tiny):
    run = train.prepare_run(*train.read_settings(tiny()))
    run.machine = run.machine._replace(peak_flops=1e10, world=2)
    for step in (10, 20):
        run.progress.step = step
        run.mark = time.monotonic() - 5.0  # 10 steps of 128 tokens
        train.log_step(run, torch.tensor(3.0), torch.tensor(1.0))
        assert run.speed['tokens_per_second'] == pytest.approx(256, rel=0.01)
        expected = 256 * run.model.flops_per_token() / 2e10
        assert run.speed['mfu'] == pytest.approx(expected, rel=0.01)
    run.log.close()


def test_speed_does_not_count_evaluation(tiny, tmp_path, monkeypatch):
    def slow(run):
        time.sleep(0.5)
        return torch.tensor(1.0)

    monkeypatch.setattr(train, 'evaluate', slow)
    train.main(tiny(max_iters=3, eval_interval=1))
    for record in read_metrics(tmp_path / 'run' / 'metrics.jsonl'):
        if 'loss' in record:  # a step of 128 tokens took less than an evaluation
            assert record['tokens_per_second'] > 128 / 0.5


def test_best_weights_are_kept_even_if_later_ones_are_worse(tiny, tmp_path, monkeypatch):
    evaluate = train.evaluate
    monkeypatch.setattr(train, 'evaluate', lambda run: evaluate(run) + run.progress.step // 6)
    train.main(tiny(max_iters=8, eval_interval=2))  # worse by a nat from step 6 on
    by_step = validation_losses(tmp_path / 'run')
    best = load_checkpoint(tmp_path / 'run' / 'best.pt')
    told = summary(tmp_path / 'run')
    assert (best['step'], best['val_loss']) == (4, by_step[4])
    assert told['best_val_loss'] == by_step[4] < told['val_loss'] == by_step[8]


def test_untrained_weights_are_never_the_best(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'evaluate', lambda run: torch.tensor(1.0 + run.progress.step))
    train.main(tiny(max_iters=4))
    assert not (tmp_path / 'run' / 'best.pt').exists()
    assert summary(tmp_path / 'run')['best_val_loss'] == 1.0


def test_batch_of_one_is_used_as_given(tiny, tmp_path):
    assert train.main(tiny(batch_size=1, gradient_accumulation_steps=3, max_iters=3)) == 0
    assert last(tmp_path / 'run')['settings']['batch_size'] == 1
    log = text_log(tmp_path / 'run')
    assert '  effective batch    1 sequences x 3 micro-batches = 3 sequences\n' in log


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize('eval_tokens', [32 * 10, 32 * 17 + 5, 0])
def test_evaluation_is_the_mean_over_the_first_windows(tiny, tmp_path, tiny_data, eval_tokens):
    stream = open_data(str(tiny_data), 'tiny').val
    tokens = torch.from_numpy(stream.read([0], stream.tokens)[0])
    windows = eval_tokens // 32 or (stream.tokens - 1) // 32
    targets = tokens[1:windows * 32 + 1]
    for batch_size in (1, 3, 7):
        run = train.prepare_run(*train.read_settings(tiny(
            eval_tokens=eval_tokens, batch_size=batch_size, dropout=0.3,
            out_dir=tmp_path / f'{batch_size}')))
        run.log.close()
        with torch.no_grad():
            logits = run.model.eval()(tokens[:windows * 32].view(-1, 32))
        expected = F.cross_entropy(logits.double().flatten(0, 1), targets).item()
        first = train.evaluate(run).item()
        assert first == train.evaluate(run).item()  # no dropout
        assert abs(first - expected) < 1e-6


def test_compiled_evaluation_has_no_dropout(tiny):
    run = train.prepare_run(*train.read_settings(tiny(compile=True, n_layer=1, dropout=0.3)))
    run.log.close()
    try:
        train.one_step(run)
        compiled = train.evaluate(run).item()
    finally:
        torch._dynamo.reset()
    run.model.uncompile_parts()
    assert abs(compiled - train.evaluate(run).item()) < 1e-6


def test_very_last_token_can_be_scored(tiny, tiny_data, tmp_path):
    tokens = open_data(str(tiny_data), 'tiny').val.tokens
    block = next(b for b in range(32, tokens) if (tokens - 1) % b == 0)
    told = dict(block_size=block, eval_tokens=tokens - 1, batch_size=1, max_iters=3)
    assert train.main(tiny(**told)) == 0
    assert math.isfinite(summary(tmp_path / 'run')['val_loss'])


def test_evaluation_does_not_disturb_training(tiny, tmp_path):
    for name, interval in (('often', 1), ('rarely', 8)):
        train.main(tiny(dropout=0.2, eval_interval=interval, out_dir=tmp_path / name))
    often, rarely = (last(tmp_path / name)['weights'] for name in ('often', 'rarely'))
    assert all(torch.equal(often[name], rarely[name]) for name in rarely)


# --- the update -----------------------------------------------------------------------------------


@pytest.mark.parametrize('grad_clip', [0.5, 0.0])  # the norms are around 1
def test_training_is_that_of_a_plain_loop(tiny, tiny_data, tmp_path, grad_clip):
    """The same model under torch's AdamW and clip_grad_norm_, a whole batch at once."""
    told = dict(grad_clip=grad_clip, log_interval=1, beta1=0.8, beta2=0.9, weight_decay=0.3)
    run = train.prepare_run(*train.read_settings(tiny(**told, out_dir=tmp_path / 'initial')))
    run.log.close()
    model = GPT(run.model.config)
    model.load_state_dict(run.model.state_dict())
    assert train.main(tiny(**told)) == 0

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.3),
                                   dict(params=vectors, weight_decay=0.0)], betas=(0.8, 0.9))
    stream = open_data(str(tiny_data), 'tiny').train
    by_step = losses(tmp_path / 'run')
    for step in range(8):
        rate = 1e-3 + 9e-3 * (1 + math.cos(math.pi * (step - 2) / (8 - 2))) / 2
        if step < 2:
            rate = 1e-2 * (step + 1) / 3
        windows = window_order(range(4 * step, 4 * step + 4), stream.windows(32), 1337)
        tokens = torch.from_numpy(stream.read(windows * 32, 33))
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        for group in optimizer.param_groups:
            group['lr'] = rate
        optimizer.step()
        assert abs(loss.item() - by_step[step + 1]) < 2e-4, step
    weights = last(tmp_path / 'run')['weights']
    errors = [(p.detach() - weights[name]).abs().flatten() for name, p in model.named_parameters()]
    assert torch.cat(errors).mean() < 1e-5


# --- order of the data ----------------------------------------------------------------------------


@pytest.mark.parametrize('batch_size, micro_batches', [(6, 1), (1, 6), (2, 3)])
def test_an_epoch_holds_every_window_once_however_the_batch_is_divided(
        tiny, tiny_data, monkeypatch, batch_size, micro_batches):
    stream = open_data(str(tiny_data), 'tiny').train
    block = 1500
    windows = stream.windows(block)
    tokens = torch.from_numpy(stream.read([0], stream.tokens)[0])
    seen = []

    def note(self, idx, targets=None):
        if self.training:
            for row, successors in zip(idx, targets):
                number = next(w for w in range(windows)
                              if torch.equal(tokens[w * block:(w + 1) * block], row))
                seen.append(number)
                assert torch.equal(tokens[number * block + 1:(number + 1) * block + 1], successors)
        return self.token_embedding.weight.sum() * 0

    monkeypatch.setattr(GPT, 'forward', note)  # what it learns does not matter here
    steps = -(-2 * windows // 6)
    train.main(tiny(batch_size=batch_size, gradient_accumulation_steps=micro_batches,
                    block_size=block, eval_tokens=block, max_iters=steps, eval_interval=steps))
    assert len(seen) == steps * 6
    first, second = seen[:windows], seen[windows:2 * windows]
    assert sorted(first) == sorted(second) == list(range(windows)) and first != second
    assert seen == window_order(range(steps * 6), windows, 1337).tolist()


def test_dropout_differs_between_the_micro_batches_of_a_step(tiny, monkeypatch):
    """The same sequences in each: only dropout tells their losses apart."""
    run = train.prepare_run(*train.read_settings(tiny(
        dropout=0.5, batch_size=2, gradient_accumulation_steps=4)))
    run.log.close()
    batch = train.training_batch(run, 0)
    monkeypatch.setattr(train, 'training_batch', lambda run, micro: batch)
    forward = GPT.forward
    seen = []

    def noted(self, idx, targets=None):
        loss = forward(self, idx, targets)
        seen.append(loss.item())
        return loss

    monkeypatch.setattr(GPT, 'forward', noted)
    train.local_gradients(run)
    first = list(seen)
    train.local_gradients(run)  # a function of the step, so it is the same again
    run.progress.step += 1
    train.local_gradients(run)
    assert first == seen[4:8] and len(set(first + seen[8:])) == 8


# --- NaN ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('poison, log_interval, save_interval, eval_interval', [
    ('gradient', 2, 6, 30), ('loss', 2, 6, 30), ('loss', 10, 3, 30), ('gradient', 30, 6, 8)])
def test_nan_stops_the_run_and_nothing_after_it_is_logged_or_saved(
        tiny, tmp_path, monkeypatch, poison, log_interval, save_interval, eval_interval):
    """At the next log step, save or evaluation after it, whichever comes first."""
    told = dict(log_interval=log_interval, save_interval=save_interval,
                eval_interval=eval_interval, lr_decay_iters=30)
    assert train.main(tiny(**told, max_iters=6, out_dir=tmp_path / 'good')) == 0
    gradients = train.local_gradients
    runs = []

    def poisoned(run):
        loss = gradients(run)
        if run.progress.step != 6:  # the seventh update is the bad one
            return loss
        runs.append(run)
        if poison == 'loss':
            return loss * torch.nan
        run.flats[0].grads[3] = torch.inf
        return loss

    monkeypatch.setattr(train, 'local_gradients', poisoned)
    assert train.main(tiny(**told, max_iters=30)) == 3
    kept = last(tmp_path / 'run')
    assert kept['progress']['step'] == 6
    good = last(tmp_path / 'good')['weights']
    assert all(torch.equal(kept['weights'][name], good[name]) for name in good)
    for flat in runs[0].flats:  # no NaN has reached weights or moments
        assert flat.masters.isfinite().all()
        for p in flat.parameters.values():
            assert all(value.isfinite().all() for value in runs[0].optimizer.state[p].values()
                       if torch.is_tensor(value))
    assert text_log(tmp_path / 'run').splitlines()[-1] == (
        'step 7: the loss or its gradient is not finite; the run stopped before that update. '
        'Likely a learning rate too high or a bad batch; the last checkpoint is from before it')
    told = summary(tmp_path / 'run')
    assert (told['exit_reason'], told['steps']) == ('nan', 6)
    assert list(losses(tmp_path / 'run')) == ([1, 2, 4, 6] if log_interval == 2 else [1])
    assert list(validation_losses(tmp_path / 'run')) == [0]


# --- ends -----------------------------------------------------------------------------------------


def test_damage_during_training_names_the_file(tiny, tiny_data, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_data, tmp_path / 'data')
    save = train.save

    def save_and_damage_the_data(run):
        save(run)
        for shard in folder.glob('train_*.bin'):
            tokens = np.memmap(shard, '<u2', 'r+', offset=1024)
            tokens[:] = 999
            tokens.flush()

    monkeypatch.setattr(train, 'save', save_and_damage_the_data)
    told = tiny(data_dir=folder, out_dir=tmp_path / 'evaluated')
    assert 'overwritten since it was opened' in refusal(train.main, told)[0]
    shutil.copytree(tiny_data, folder, dirs_exist_ok=True)
    [problem] = refusal(train.main, tiny(data_dir=folder, eval_interval=8))
    assert re.fullmatch(
        re.escape(f'{folder}/train_') + r'00000\d\.bin: token 999 at position \d+ is outside the '
        'vocabulary of 257; the file is damaged or was made with another tokenizer', problem)
    assert last(tmp_path / 'run')['progress']['step'] == 4
    told = summary(tmp_path / 'run')
    assert (told['steps'], told['exit_reason']) == (4, 'refused')
    assert text_log(tmp_path / 'run').endswith(f'stopped: {problem}\n')


def test_error_leaves_a_summary_and_its_traceback(tiny, tmp_path, monkeypatch):
    def broken(self, idx, targets=None):
        raise ValueError('broken')

    monkeypatch.setattr(GPT, 'forward', broken)
    with pytest.raises(ValueError, match='broken'):
        train.main(tiny())
    told = summary(tmp_path / 'run')
    assert (told['exit_reason'], told['steps'], told['val_loss']) == ('error', 0, None)


def test_refusal_is_exit_code_2_and_no_traceback(tiny, tmp_path):
    command = [sys.executable, HOME / 'train.py', *tiny(n_head=5), '--sede=3']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr == (
        'refused:\n'
        "  - command line: unknown setting 'sede' (value '3'); did you mean 'seed'?\n"
        '  - n_embd=32 n_head=5: the width must be a multiple of the heads, e.g. n_embd=30\n')


def test_tracker_gets_what_is_measured(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert train.main(tiny(tracker='wandb', max_iters=4)) == 0
    assert 'WARNING: tracker=wandb is not available' in text_log(tmp_path / 'run')
    assert 4 in losses(tmp_path / 'run')


# --- the end --------------------------------------------------------------------------------------


@pytest.fixture
def blow_up(monkeypatch):
    """A function (update): from then on the weights are finite, but of no use."""
    one_step = train.one_step

    def at(update):
        def blown_up(run):
            result = one_step(run)
            if run.progress.step == update:
                for flat in run.flats:
                    flat.masters.mul_(-30)
            return result
        monkeypatch.setattr(train, 'one_step', blown_up)
    return at


def test_weights_that_blew_up_are_not_saved_whatever_the_intervals(tiny, tmp_path, blow_up):
    """Also by the very update before the save, and not as the end of the run."""
    blow_up(12)
    told = dict(max_iters=14, log_interval=10, save_interval=6, eval_interval=100)
    assert train.main(tiny(**told)) == 3
    assert last(tmp_path / 'run')['step'] == 6
    log = text_log(tmp_path / 'run').splitlines()
    assert [line for line in log if line.startswith('WARNING')][0].startswith(
        'WARNING: step 12 is not saved, its loss is above ')
    assert log[-1] == ('step 14: done, but not saved; the last good checkpoint stays. Likely a '
                       'learning rate too high')
    told = summary(tmp_path / 'run')
    assert (told['exit_reason'], told['steps']) == ('unsaved', 14)


def test_a_run_without_a_usable_end_is_not_finished_the_next_time(tiny, tmp_path, blow_up):
    blow_up(7)
    assert train.main(tiny(max_iters=8, save_interval=4)) == 3
    assert last(tmp_path / 'run')['step'] == 4
    blow_up(0)  # at no step
    assert train.main(tiny(max_iters=8, save_interval=4, init_from='auto')) == 0
    assert last(tmp_path / 'run')['step'] == 8


def test_an_odd_last_batch_does_not_keep_the_end_from_being_saved(tiny, tmp_path, monkeypatch):
    gradients = train.local_gradients
    monkeypatch.setattr(train, 'local_gradients', lambda run: gradients(run) + (
        5 if run.progress.step >= 7 else 0))
    assert train.main(tiny(max_iters=8, log_interval=1, save_interval=4)) == 0
    assert last(tmp_path / 'run')['step'] == 8


def test_pruning_that_costs_more_than_a_nat_is_saved(tiny, tmp_path, monkeypatch):
    """All at once, right before the end and between two log lines."""
    apply_masks = prune.Pruner.apply_masks

    def ruin(self):
        apply_masks(self)
        for p in self.masks:
            p.data.mul_(-30)

    monkeypatch.setattr(prune.Pruner, 'apply_masks', ruin)
    told = dict(prune_score='magnitude', prune_start=12, prune_end=13, prune_interval=1,
                max_iters=13, log_interval=10, save_interval=100, eval_interval=100)
    assert train.main(tiny(**told)) == 0
    assert last(tmp_path / 'run')['step'] == 13


def test_after_a_nan_no_masks_are_chosen_and_the_summary_tells_the_checkpoint(
        tiny, tmp_path, monkeypatch):
    gradients = train.local_gradients
    runs = []

    def poisoned(run):
        runs.append(run)
        return gradients(run) * (math.nan if run.progress.step == 9 else 1)

    monkeypatch.setattr(train, 'local_gradients', poisoned)
    told = dict(prune_score='magnitude', prune_start=2, prune_end=18, prune_interval=2,
                max_iters=20, log_interval=20, save_interval=5, eval_interval=13)
    assert train.main(tiny(**told)) == 3
    assert runs[0].pruner.masked_at == 8  # and not 10: the tenth update was the bad one
    saved = last(tmp_path / 'run')
    assert saved['step'] == 5
    told = summary(tmp_path / 'run')
    scope = {name: saved['weights'][name] for name in told['sparsity_by_layer']}
    zeros = sum(int((weight == 0).sum()) for weight in scope.values())
    assert 0 < told['sparsity'] == zeros / sum(weight.numel() for weight in scope.values())


def test_a_validation_loss_that_is_not_finite_ends_the_run_unsaved(tiny, tmp_path):
    told = tiny(learning_rate=1e20, weight_decay=0.0, min_lr=0, warmup_iters=0, max_iters=1)
    assert train.main(told) == 3
    assert not (tmp_path / 'run' / 'last.pt').exists()
    assert summary(tmp_path / 'run')['exit_reason'] == 'nan'
