"""The training loop: evaluation, logging, order of the data, guards, memory ladder, compile, trackers."""
import json
import re
import shutil
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import last, losses, refusal, train
from torch.nn import functional as F

import optim
import preflight as preflight_module
import rundir
from model import GPT
from preflight import preflight
from settings import Settings, check, parse
from shards import open_data, window_order


def built(argv):
    """A Run, ready to train."""
    s, problems = parse(Settings, argv)
    return train.build(s, *preflight(s, problems + check(s)), saved=None)


def summary(folder):
    return json.loads((folder / 'summary.json').read_text())


def text_log(folder):
    return (folder / 'train.log').read_text()


def step_to_losses(folder):
    return {r['step']: r['val_loss'] for r in rundir.read_metrics(folder / 'metrics.jsonl') if 'val_loss' in r}


# --- what a run leaves behind ------------------------------------------------------------------------


def test_run_learns_and_leaves_the_documented_files(tiny, tmp_path):
    folder = tmp_path / 'run'
    assert train.main(tiny(max_iters=40, lr_decay_iters=80, log_interval=5, eval_interval=10)) == 0
    assert {f.name for f in folder.iterdir()} == {
        'config.json', 'train.log', 'metrics.jsonl', 'last.pt', 'best.pt', 'summary.json'}
    records = rundir.read_metrics(folder / 'metrics.jsonl')
    trained, evaluated = ([r for r in records if key in r] for key in ('loss', 'val_loss'))
    assert len(trained) + len(evaluated) == len(records)
    for r in trained:
        assert list(r) == 'step tokens loss grad_norm lr tokens_per_second mfu peak_memory_bytes sparsity spikes seconds'.split()
        assert r['tokens'] == r['step'] * 4 * 32 and r['tokens_per_second'] > 0 and r['peak_memory_bytes'] > 2**20
    for r in evaluated:
        assert list(r) == 'step val_loss val_ppl sparsity'.split()
        assert r['val_ppl'] == pytest.approx(np.exp(r['val_loss']))
    assert [r['step'] for r in trained] == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    assert [r['step'] for r in evaluated] == [0, 10, 20, 30, 40]
    told = summary(folder)
    assert set('steps tokens val_loss val_ppl best_val_loss sparsity sparsity_all tokens_per_second mfu peak_memory_bytes '
               'compiled_graphs graph_breaks rung effective_batch parameters dataset fingerprint seconds exit_reason'.split()) <= set(told)
    assert (told['steps'], told['tokens'], told['effective_batch'], told['exit_reason']) == (40, 40 * 128, 4, 'finished')
    assert told['val_loss'] == evaluated[-1]['val_loss'] < 3.2 < evaluated[0]['val_loss']
    assert told['best_val_loss'] == min(r['val_loss'] for r in evaluated)
    for name in ('last.pt', 'best.pt'):
        saved = torch.load(folder / name, weights_only=True)
        assert saved['settings']['max_iters'] == 40 and saved['data'] == dict(name='tiny', tokenizer='bytes', vocab_size=257)
    assert sum(w.numel() for w in saved['weights'].values()) == told['parameters']
    config = json.loads((folder / 'config.json').read_text())
    assert config['settings']['n_layer'] == 2 and config['dtype'] == 'float32' and config['processes'] == 1


def test_log_lines_are_aligned_and_fit_100_columns(tiny, tmp_path, capsys):
    train.main(tiny(max_iters=12))
    lines = [line for line in text_log(tmp_path / 'run').splitlines() if re.match(r'step +\d+  loss', line)]
    assert len(lines) == 7
    columns = [[line.index(word) for word in ('loss', 'norm', 'lr', 'k tok/s', 'GiB', 'eta')] for line in lines]
    assert all(c == columns[0] for c in columns)
    run = built(tiny(max_iters=600_000, out_dir=tmp_path / 'long', learning_rate=6e-4, min_lr=6e-5))
    run.machine, run.progress.step, run.mark = run.machine._replace(peak_flops=1e10), 1000, time.monotonic() - 200
    capsys.readouterr()
    train.log_step(run, torch.tensor(10.9876), torch.tensor(1.234))
    line = capsys.readouterr().out.rstrip('\n')
    assert 'mfu' in line and 'eta 33:16:' in line and len(line) < 100, line


def test_best_weights_are_kept_even_if_later_ones_are_worse(tiny, tmp_path, monkeypatch):
    evaluate = train.evaluate
    monkeypatch.setattr(train, 'evaluate', lambda run: evaluate(run) + run.progress.step // 6)  # worse by a nat from step 6 on
    train.main(tiny(max_iters=8, eval_interval=2))
    by_step = step_to_losses(tmp_path / 'run')
    best = rundir.load_checkpoint(tmp_path / 'run' / 'best.pt')
    assert (best['step'], best['val_loss']) == (4, by_step[4]) and summary(tmp_path / 'run')['best_val_loss'] == by_step[4]
    assert summary(tmp_path / 'run')['val_loss'] == by_step[8] > by_step[4]


# --- evaluation --------------------------------------------------------------------------------------


@pytest.mark.parametrize('eval_tokens', [32 * 10, 32 * 17 + 5, 0])
def test_evaluation_is_the_mean_over_the_first_windows(tiny, tmp_path, tiny_data, eval_tokens):
    stream = open_data(str(tiny_data), 'tiny').val
    tokens = torch.from_numpy(stream.read([0], stream.tokens)[0])
    windows = eval_tokens // 32 or (stream.tokens - 1) // 32
    for batch_size in (1, 3, 7):
        run = built(tiny(eval_tokens=eval_tokens, batch_size=batch_size, dropout=0.3, out_dir=tmp_path / f'{batch_size}'))
        with torch.no_grad():
            logits = run.model.eval()(tokens[:windows * 32].view(-1, 32))
        expected = F.cross_entropy(logits.double().flatten(0, 1), tokens[1:windows * 32 + 1])
        first, again = train.evaluate(run).item(), train.evaluate(run).item()
        assert first == again
        assert abs(first - expected.item()) < 1e-6


def test_evaluation_does_not_disturb_training(tiny, tmp_path):
    for name, interval in (('often', 1), ('rarely', 8)):
        train.main(tiny(dropout=0.2, eval_interval=interval, out_dir=tmp_path / name))
    often, rarely = (last(tmp_path / name)['weights'] for name in ('often', 'rarely'))
    assert all(torch.equal(often[name], rarely[name]) for name in rarely)


# --- order of the data -------------------------------------------------------------------------------


@pytest.mark.parametrize('split', [dict(batch_size=6, gradient_accumulation_steps=1), dict(batch_size=1, gradient_accumulation_steps=6)])
def test_an_epoch_holds_every_window_once_however_the_batch_is_divided(tiny, tiny_data, monkeypatch, split):
    data = open_data(str(tiny_data), 'tiny')
    block = 1500
    windows, seen = data.train.windows(block), []
    fetch = train.inputs_and_targets

    def fetch_and_note(device, stream, chosen, T):
        idx, targets = fetch(device, stream, chosen, T)
        if stream.split == 'train':
            seen.extend(chosen)
            assert torch.equal(idx[0], torch.from_numpy(stream.read([chosen[0] * T], T)[0])) and torch.equal(idx[:, 1:], targets[:, :-1])
        return idx, targets

    monkeypatch.setattr(train, 'inputs_and_targets', fetch_and_note)
    monkeypatch.setattr(GPT, 'hidden', lambda self, idx: self.token_embedding(idx))  # what it learns does not matter here
    steps = -(-2 * windows // 6)
    train.main(tiny(**split, block_size=block, eval_tokens=block, max_iters=steps, eval_interval=steps, loss_chunk_tokens=9000))
    assert len(seen) == steps * 6
    first, second = seen[:windows], seen[windows:2 * windows]
    assert sorted(first) == sorted(second) == list(range(windows)) and first != second
    assert seen == window_order(range(steps * 6), windows, 1337).tolist()


# --- guards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('poison', ['gradient', 'loss'])
def test_nan_stops_before_the_update_wherever_it_falls_between_log_steps(tiny, tmp_path, monkeypatch, poison):
    gradients, runs, before = train.local_gradients, [], {}

    def poisoned(run):
        loss = gradients(run)
        if run.progress.step == 6:  # the seventh update
            runs.append(run)
            before.update({k: v.clone() for k, v in train.named_state(run.flats, run.optimizer)['weights'].items()})
            if poison == 'loss':
                return loss * torch.nan
            run.flats[1].parameter.main_grad[3] = torch.inf
        return loss

    monkeypatch.setattr(train, 'local_gradients', poisoned)
    assert train.main(tiny(max_iters=30, log_interval=10, save_interval=3, eval_interval=30)) == 3
    after = train.named_state(runs[0].flats, runs[0].optimizer)['weights']
    kept = last(tmp_path / 'run')
    assert kept['progress']['step'] == 6
    for name in before:
        assert torch.equal(after[name], before[name]) and torch.equal(kept['weights'][name], before[name]), name
    assert text_log(tmp_path / 'run').splitlines()[-1] == (
        'step 7: the loss or its gradient is not finite; the run stopped before that update. Likely a learning rate too high or a bad '
        'batch; the last checkpoint is from before it')
    assert (summary(tmp_path / 'run')['exit_reason'], summary(tmp_path / 'run')['steps']) == ('nan', 6)
    assert all(np.isfinite(loss) for loss in losses(tmp_path / 'run').values())


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path):
    told = dict(learning_rate=10.0, min_lr=0.0, warmup_iters=40, max_iters=100, log_interval=1, save_interval=1, eval_interval=100)
    assert train.main(tiny(**told, diverge_steps=8)) == 3
    end, by_step = summary(tmp_path / 'run')['steps'], losses(tmp_path / 'run')
    good, best = last(tmp_path / 'run')['progress']['step'], min(by_step.values())
    assert good == end - 9 and by_step[good] <= best + 1 < 5
    assert all(by_step[step] > best + 1 for step in range(good + 1, end + 1))
    assert summary(tmp_path / 'run')['exit_reason'] == 'diverged'
    assert text_log(tmp_path / 'run').splitlines()[-1] == (
        f'step {end}: diverged, loss {by_step[end]:.3f} has been more than 1.0 nat above its best {best:.3f} since step {good + 1}. '
        'Likely cause: learning_rate=10 is too high or warmup_iters=40 too short for this model. The last good checkpoint stays')


def test_spike_that_passes_does_not_stop(tiny, tmp_path, monkeypatch):
    gradients = train.local_gradients
    monkeypatch.setattr(train, 'local_gradients', lambda run: gradients(run) + (3 if run.progress.step in (4, 5, 6) else 0))
    assert train.main(tiny(max_iters=12, log_interval=1, save_interval=1, diverge_steps=3)) == 0
    assert last(tmp_path / 'run')['progress']['step'] == 12 and 'WARNING: loss' in text_log(tmp_path / 'run')


def test_token_outside_the_vocabulary_during_training_names_the_file(tiny, tiny_data, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_data, tmp_path / 'data')
    save = train.save

    def save_and_damage_the_data(run):
        save(run)
        for shard in folder.glob('train_*.bin'):
            tokens = np.memmap(shard, '<u2', 'r+', offset=1024)
            tokens[:] = 999
            tokens.flush()

    monkeypatch.setattr(train, 'save', save_and_damage_the_data)
    problem, = refusal(train.main, tiny(data_dir=folder))
    assert re.fullmatch(re.escape(f'{folder}/train_') + r'00000\d\.bin: token 999 at position \d+ is outside the vocabulary of 257; '
                        'the file is damaged or was made with another tokenizer', problem)
    assert last(tmp_path / 'run')['progress']['step'] == 4 and summary(tmp_path / 'run')['steps'] == 4


# --- out of memory -----------------------------------------------------------------------------------


@pytest.fixture
def memory_for(monkeypatch):
    """A function: from now on the model runs out of memory with micro-batches above this many sequences."""
    forward = GPT.forward

    def limit(sequences, error=torch.OutOfMemoryError):
        def limited(self, idx, targets=None):
            if idx.size(0) > sequences:
                raise error('CUDA out of memory. Tried to allocate 2.00 GiB.')
            return forward(self, idx, targets)
        monkeypatch.setattr(GPT, 'forward', limited)
    return limit


@pytest.mark.parametrize('error', [torch.OutOfMemoryError, RuntimeError])  # inside the compiler it arrives as the latter
def test_ladder_keeps_the_effective_batch_and_the_result(tiny, tmp_path, memory_for, error):
    train.main(tiny(batch_size=2, gradient_accumulation_steps=4, loss_chunk_tokens=12, out_dir=tmp_path / 'configured'))
    memory_for(2, error)
    assert train.main(tiny(batch_size=8, gradient_accumulation_steps=1)) == 0
    result = summary(tmp_path / 'run')
    assert (result['rung'], result['rung_label'], result['effective_batch']) == (3, 'micro-batches of 2, 4 of them', 8)
    assert losses(tmp_path / 'run') == losses(tmp_path / 'configured')
    weights, expected = (last(tmp_path / name)['weights'] for name in ('run', 'configured'))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    log = text_log(tmp_path / 'run')
    assert ('OUT OF MEMORY at step 1 (CUDA out of memory. Tried to allocate 2.00 GiB.) Rung 3 of 4: micro-batches of 2, 4 of them; '
            'the effective batch stays 8\n') in log and log.count('OUT OF MEMORY') == 3


def assert_one_rung_changes_no_loss(tiny, tmp_path, monkeypatch, fails_once):
    """fails_once: a GPT.forward whose memory runs out at step 4."""
    train.main(tiny(batch_size=2, eps=1e-3, out_dir=tmp_path / 'straight'))
    monkeypatch.setattr(GPT, 'forward', fails_once)
    assert train.main(tiny(batch_size=2, eps=1e-3)) == 0
    assert summary(tmp_path / 'run')['rung'] == 1 and 'OUT OF MEMORY at step 4 ' in text_log(tmp_path / 'run')
    straight, run = losses(tmp_path / 'straight'), losses(tmp_path / 'run')
    assert all(abs(straight[step] - run[step]) < 1e-5 for step in straight)


def test_memory_that_runs_out_in_the_middle_of_a_step_loses_nothing(tiny, tmp_path, monkeypatch):
    forward, calls = GPT.forward, []

    def fails_once(self, idx, targets=None):
        calls.append(self.training)
        if calls.count(True) == 8:  # the second micro-batch of the fourth update
            raise torch.OutOfMemoryError('out of memory')
        return forward(self, idx, targets)

    assert_one_rung_changes_no_loss(tiny, tmp_path, monkeypatch, fails_once)


def test_memory_that_runs_out_in_the_middle_of_a_backward_leaves_no_gradients_behind(tiny, tmp_path, monkeypatch):
    forward, calls = GPT.forward, []

    def runs_out(grad):
        raise torch.OutOfMemoryError('out of memory')

    def fails_once(self, idx, targets=None):
        calls.append(self.training)
        loss = forward(self, idx, targets)
        if self.training and calls.count(True) == 8:  # the later blocks have their gradients when the first one's arrives
            self.blocks[0].mlp.fc.weight.register_hook(lambda grad: runs_out(grad) if calls.count(True) == 8 else grad)
        return loss

    assert_one_rung_changes_no_loss(tiny, tmp_path, monkeypatch, fails_once)


def test_ladder_may_be_forbidden_and_may_end(tiny, tmp_path, memory_for):
    memory_for(0)
    assert train.main(tiny(oom='fail', out_dir=tmp_path / 'forbidden')) == 1
    assert train.main(tiny(batch_size=4, out_dir=tmp_path / 'ended')) == 1
    for name, oom, rung in (('forbidden', 'fail', 0), ('ended', 'fallback', 3)):
        assert text_log(tmp_path / name).endswith(
            f"step 1: CUDA out of memory. Tried to allocate 2.00 GiB. No further rung is allowed or left (oom='{oom}')\n")
        assert (summary(tmp_path / name)['exit_reason'], summary(tmp_path / name)['rung']) == ('out of memory', rung)


def test_other_errors_are_not_taken_for_lack_of_memory(tiny, monkeypatch):
    def broken(self, idx, targets=None):
        raise RuntimeError('shapes do not match')
    monkeypatch.setattr(GPT, 'forward', broken)
    with pytest.raises(RuntimeError, match='shapes do not match'):
        train.main(tiny())


def test_resume_starts_on_the_rung_of_the_checkpoint_unless_the_batch_is_divided_anew(tiny, tmp_path, memory_for):
    told = dict(lr_decay_iters=8, init_from='auto')
    memory_for(2)
    train.main(tiny(**told, max_iters=3, batch_size=4))
    assert last(tmp_path / 'run')['progress']['rung'] == 2
    train.main(tiny(**told, max_iters=5, batch_size=4))
    assert summary(tmp_path / 'run')['rung'] == 2
    assert text_log(tmp_path / 'run').count('OUT OF MEMORY') == 2  # both in the first session
    assert train.main(tiny(**told, max_iters=8, batch_size=1, gradient_accumulation_steps=8)) == 0
    assert summary(tmp_path / 'run')['rung'] == 0 and text_log(tmp_path / 'run').count('OUT OF MEMORY') == 2


# --- compile -----------------------------------------------------------------------------------------


def test_compile_that_compiles_nothing_is_refused(tiny, tmp_path, monkeypatch):
    message = 'compile=True, but nothing was compiled; unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE, or use --compile=False'
    with torch._dynamo.config.patch(disable=True):  # what TORCH_COMPILE_DISABLE=1 does at import
        assert refusal(train.main, tiny(compile=True, out_dir=tmp_path / 'a')) == [message]
    monkeypatch.setenv('TORCHDYNAMO_DISABLE', '1')
    assert refusal(train.main, tiny(compile=True, out_dir=tmp_path / 'b')) == [message]


def test_compiled_run_has_all_its_graphs_after_the_first_step_and_no_breaks(tiny, tmp_path):
    told = dict(n_layer=1, max_iters=6, eval_interval=3, log_interval=1, eval_tokens=32 * 7)  # the last batch is not full
    train.main(tiny(**told, out_dir=tmp_path / 'plain'))
    try:
        assert train.main(tiny(**told, compile=True)) == 0
    finally:
        torch._dynamo.reset()
    result, lines = summary(tmp_path / 'run'), text_log(tmp_path / 'run').splitlines()
    assert result['compiled_graphs'] > 0 and result['graph_breaks'] == 0
    said = [i for i, line in enumerate(lines) if line.startswith('compiled graphs')]
    assert len(said) == 1 and lines[said[0]] == f"compiled graphs {result['compiled_graphs']}, graph breaks 0"
    assert lines[said[0] - 1].startswith('step      1  loss')
    plain, compiled = losses(tmp_path / 'plain'), losses(tmp_path / 'run')
    assert all(abs(plain[step] - compiled[step]) < 1e-3 for step in plain)


# --- trackers ----------------------------------------------------------------------------------------


def test_missing_tracker_does_not_stop_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert train.main(tiny(tracker='wandb')) == 0
    assert 'WARNING: tracker=wandb is not available (ModuleNotFoundError: ' in text_log(tmp_path / 'run')
    assert 8 in losses(tmp_path / 'run')


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_tracker_gets_what_is_measured_until_it_fails_and_the_run_goes_on(tiny, tmp_path, monkeypatch, name):
    got = []

    def log(numbers, step=None):
        if len(got) == 3:
            raise ConnectionError('no network')
        got.append(numbers)

    package = types.ModuleType(name)
    package.init, package.log = lambda project, name, config: got.append((name, config['batch_size'])), log
    monkeypatch.setitem(sys.modules, name, package)
    assert train.main(tiny(tracker=name)) == 0
    by_step = step_to_losses(tmp_path / 'run')
    assert got[0] == ('run', 2) and got[1]['val_loss'] == by_step[0] and got[2]['loss'] == losses(tmp_path / 'run')[1]
    assert text_log(tmp_path / 'run').count('WARNING: the tracker failed (ConnectionError: no network); metrics.jsonl has it all') == 1
    assert summary(tmp_path / 'run')['exit_reason'] == 'finished' and 8 in losses(tmp_path / 'run')


def test_the_rung_without_compile_compiles_nothing(tiny):
    run = built(tiny(compile=True))
    assert run.optimizer.update is not optim.adamw_update
    train.step_down(run, 'no room.')
    train.step_down(run, 'no room.')
    assert run.progress.rung == 2 and not run.active.compile
    assert run.optimizer.update is optim.adamw_update and 'hidden' not in vars(run.model)
    train.step_down(run, 'no room.')
    assert run.active.compile and run.optimizer.update is not optim.adamw_update and 'hidden' in vars(run.model)


def test_unfused_attention_on_a_gpu_is_refused_unless_allowed(tiny, monkeypatch):
    run = built(tiny())
    monkeypatch.setattr(preflight_module, 'attention_backend', lambda *shape: 'math')
    monkeypatch.setattr(preflight_module, 'notes', lambda *told: ())  # asks a real GPU for its memory
    gpu = run.machine._replace(device=torch.device('cuda:0'), name='NVIDIA A100')
    problems = refusal(preflight_module.table, run.settings, gpu, run.data, run.model, 0)
    assert problems == ['attention would run unfused (math) on NVIDIA A100: O(block_size^2) memory and slow; use --dtype=bfloat16 and a '
                        'head width that fused kernels support, or permit it with --allow_math_attention=True']
    run.settings.allow_math_attention = True
    assert 'math (unfused, as allowed)' in preflight_module.table(run.settings, gpu, run.data, run.model, 0)
    run.settings.allow_math_attention = False
    assert 'math' in preflight_module.table(run.settings, run.machine, run.data, run.model, 0)  # on a CPU nothing else may exist
