"""support/guards.py: divergence, signals, proof of compile."""
import json
import math
import os
import random
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import last, losses, refusal

import optim
import train
from support import guards
from support.guards import signals_noted
from support.rundir import load_checkpoint


def summary(folder):
    return json.loads((folder / 'summary.json').read_text())


def text_log(folder):
    return (folder / 'train.log').read_text()


# --- divergence -----------------------------------------------------------------------------------


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, 'DIVERGE_STEPS', 8)
    monkeypatch.setattr(guards, 'AVERAGED_LINES', 2)
    told = dict(learning_rate=10.0, weight_decay=0.0, min_lr=0.0, warmup_iters=40, max_iters=100,
                log_interval=1, save_interval=1, eval_interval=100)
    assert train.main(tiny(**told)) == 3
    result, by_step = summary(tmp_path / 'run'), losses(tmp_path / 'run')
    assert result['exit_reason'] == 'diverged'
    end = result['steps']
    found = re.fullmatch(
        rf'step {end}: diverged, loss {by_step[end]:.3f} is more than 1.0 nat above its lowest '
        rf'average (.*) since step {end - 8}. Likely causes: learning_rate=10 too high, '
        r'warmup_iters=40 too short, grad_clip=1 \(0: none\). The last good checkpoint stays',
        text_log(tmp_path / 'run').splitlines()[-1])
    limit = float(found[1]) + 1
    assert limit < 6 and all(by_step[step] > limit for step in range(end - 8, end + 1))
    good = last(tmp_path / 'run')['progress']['step']
    assert good < end - 8 and by_step[good] < limit


def test_spike_of_the_batch_hinders_no_save_and_one_of_the_weights_does(
        tiny, tmp_path, monkeypatch):
    gradients, ahead = train.local_gradients, train.losses_ahead
    saved_at = []
    save = train.save_checkpoint

    def spiked(run):
        return gradients(run) + (9 if run.progress.step in (4, 5, 6) else 0)

    def spiked_ahead(run):
        extra = [9, 9, 0, 9] if run.progress.step == 6 else [9] * 4
        spikes = extra if run.progress.step in (6, 9) else [0] * 4
        return [loss + spike for loss, spike in zip(ahead(run), spikes)]

    def noted(path, content, keep=None):
        if path.endswith('last.pt'):
            saved_at.append(content['step'])
            assert keep == 'previous.pt'
        save(path, content, keep)

    monkeypatch.setattr(train, 'local_gradients', spiked)
    monkeypatch.setattr(train, 'losses_ahead', spiked_ahead)
    monkeypatch.setattr(train, 'save_checkpoint', noted)
    assert train.main(tiny(max_iters=12, log_interval=1, save_interval=1, warmup_iters=1)) == 0
    log = text_log(tmp_path / 'run')
    assert log.count('WARNING: loss') == 1
    assert log.count('WARNING: step 9 is not saved, its loss is above ') == 1
    assert saved_at == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12]
    assert load_checkpoint(tmp_path / 'run' / 'previous.pt')['step'] == 11


def followed(losses, log_interval=10):
    """(step at which the guard stops or None, what was said) of a run that logs these losses."""
    said = []
    run = SimpleNamespace(settings=train.Settings(grad_clip=0.0, log_interval=log_interval),
                          log=SimpleNamespace(say=said.append), pruner=None,
                          progress=train.Progress())
    for line, loss in enumerate(losses):
        run.progress.step = (line + 1) * log_interval
        try:
            guards.guard_against_divergence(run, loss)
        except guards.Stop as stop:
            assert (stop.reason, stop.code) == ('diverged', 3)
            assert 'grad_clip=0 (0: none)' in str(stop)
            return run.progress.step, said
    return None, said


def learning(steps, draw):
    """Losses of a log line each ten steps: from 5.5 towards 2.6, with noise."""
    return [2.6 + 2.9 * 0.99 ** step + draw.gauss(0, 0.1) for step in range(0, steps, 10)]


@pytest.mark.parametrize('share', [0.025, 0.05])
def test_batches_that_are_easy_make_no_divergence_of_the_others(share):
    """Every 40th document is a thousand dashes: some batches are predicted to 0.02 nats."""
    for seed in range(5):
        draw = random.Random(seed)
        odd = [0.02 if draw.random() < share and line else loss
               for line, loss in enumerate(learning(100_000, draw))]
        assert min(odd) == 0.02
        end, _ = followed(odd)
        assert end is None


@pytest.mark.parametrize('log_interval', [10, 100])
def test_batches_that_are_hard_are_no_divergence(log_interval):
    """Also where only three are logged in DIVERGE_STEPS."""
    for seed in range(5):
        draw = random.Random(seed)
        odd = [6.0 if draw.random() < 0.1 else loss for loss in learning(100_000, draw)]
        end, said = followed(odd, log_interval)
        assert end is None and len(said) < 200  # one alone is not even said


@pytest.mark.parametrize('jump, log_interval', [(1.3, 10), (2.0, 10), (4.0, 10), (4.0, 50)])
def test_divergence_is_found_soon(jump, log_interval):
    draw = random.Random(1)
    good = learning(1000, draw)
    bad = [2.6 + jump + draw.gauss(0, 0.1) for _ in range(100)]
    end, said = followed(good + bad, log_interval)
    begin = len(good) * log_interval
    assert begin + guards.DIVERGE_STEPS <= end <= begin + 310
    assert len(said) == 1 and said[0].startswith('WARNING: loss ')


def test_a_spike_that_passes_is_no_divergence():
    draw = random.Random(1)
    for steps in range(0, guards.DIVERGE_STEPS, 50):
        spike = [7.0] * (steps // 10)
        assert followed(learning(1000, draw) + spike + [2.6] * 100)[0] is None


def test_new_masks_set_the_yardstick_anew_unless_the_run_is_diverging():
    draw = random.Random(1)

    def run_of(pruned_every, losses):
        run = SimpleNamespace(settings=train.Settings(log_interval=10),
                              log=SimpleNamespace(say=lambda text: None),
                              pruner=SimpleNamespace(masked_at=-1), progress=train.Progress())
        for line, loss in enumerate(losses):
            run.progress.step = 10 * (line + 1)
            if pruned_every and run.progress.step % pruned_every == 0:
                run.pruner.masked_at = run.progress.step - 3
            guards.guard_against_divergence(run, loss)
    raised = [5.0 + draw.gauss(0, 0.1) for _ in range(60)]
    run_of(1010, learning(1000, draw) + raised)  # masks at once: dearer, but no divergence
    with pytest.raises(guards.Stop):
        run_of(100, learning(995, draw) + raised)  # as masks do not explain it


def test_a_weight_that_is_not_finite_is_never_saved_nor_pruned_away(tiny, tmp_path, monkeypatch):
    """One that the loss does not feel: a row of the embedding that no text has."""
    refresh = train.optim.refresh_working

    def spoiled(flats):
        for flat in flats:
            if flat.kind == 'embeddings':
                flat.parameters['token_embedding.weight'].data[250] = math.inf
        refresh(flats)

    told = dict(save_interval=2, log_interval=100, eval_interval=100, prune_score='magnitude',
                prune_scope='blocks+embedding', prune_start=3, prune_end=5, prune_interval=1)
    monkeypatch.setattr(train.optim, 'refresh_working', spoiled)
    assert train.main(tiny(**told)) == 3
    assert summary(tmp_path / 'run')['exit_reason'] == 'nan'
    assert 'a weight is not finite' in text_log(tmp_path / 'run')
    assert not (tmp_path / 'run' / 'last.pt').exists()


# --- signals --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """Under nohup, or in the background of a script, some are ignored."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_first_signal_is_noted_and_the_second_acts_at_once():
    run = SimpleNamespace(stop_signal=0)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with signals_noted(run):
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stop_signal == signal.SIGINT
        assert [signal.getsignal(number) for number in numbers[:2]] == before[:2]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pthread_sigmask(signal.SIG_BLOCK, [])  # lets Python handle it here
    with signals_noted(run):
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop_signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in numbers] == before


def test_terminal_that_closes_may_say_so_twice_and_nohup_is_respected():
    run = SimpleNamespace(stop_signal=0)
    with signals_noted(run):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert run.stop_signal == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_noted(run):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_request_to_save_does_not_hide_a_request_to_stop():
    run = SimpleNamespace(stop_signal=0)
    with signals_noted(run):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert run.stop_signal == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop_signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGUSR1)
        assert run.stop_signal == signal.SIGTERM


@pytest.mark.parametrize('number, code, steps', [
    (signal.SIGUSR1, 0, [3, 8]), (signal.SIGHUP, 129, [3]), (signal.SIGTERM, 143, [3])])
def test_signals_save_and_all_but_one_stop(tiny, tmp_path, monkeypatch, number, code, steps):
    gradients, save = train.local_gradients, train.save_checkpoint
    saved_at = []

    def signalled(run):
        if run.progress.step == 2:
            os.kill(os.getpid(), number)
        return gradients(run)

    def noted(path, content, keep=None):
        saved_at.append(content['step'])
        save(path, content, keep)

    monkeypatch.setattr(train, 'local_gradients', signalled)
    monkeypatch.setattr(train, 'save_checkpoint', noted)
    monkeypatch.setattr(train, 'save_best', lambda run: None)
    assert train.main(tiny(save_interval=100)) == code
    assert saved_at == steps
    ending = '; continue with --init_from=resume' if code else ''
    assert f'{number.name}: saved at step 3{ending}\n' in text_log(tmp_path / 'run')


# --- compile --------------------------------------------------------------------------------------

NOTHING = ('compile=True, but nothing was compiled; unset TORCHDYNAMO_DISABLE and '
           'TORCH_COMPILE_DISABLE, or use --compile=False')


@pytest.mark.parametrize('way', ['TORCH_COMPILE_DISABLE', 'TORCHDYNAMO_DISABLE'])
def test_compile_that_compiles_nothing_is_refused(tiny, tmp_path, monkeypatch, way):
    monkeypatch.setenv(way, '1')
    optim.compiled.cache_clear()  # a process keeps its functions, and has one way only
    try:
        with torch._dynamo.config.patch(disable=way == 'TORCH_COMPILE_DISABLE'):  # as at import
            assert refusal(train.main, tiny(compile=True)) == [NOTHING]
    finally:
        optim.compiled.cache_clear()
    assert summary(tmp_path / 'run')['exit_reason'] == 'refused'


def assert_all_graphs_came_with_the_first_step(folder):
    result = summary(folder)
    lines = text_log(folder).splitlines()
    assert result['compiled_graphs'] > 0 and result['graph_breaks'] == 0
    said = [i for i, line in enumerate(lines) if line.startswith('compiled graphs')]
    assert len(said) == 1
    assert lines[said[0]] == f"compiled graphs {result['compiled_graphs']}, graph breaks 0"
    assert lines[said[0] - 1].startswith('step      1  loss')


def test_compiled_run_has_all_its_graphs_after_the_first_step_and_no_breaks(tiny, tmp_path):
    told = dict(n_layer=1, max_iters=6, eval_interval=3, log_interval=1,
                eval_tokens=32 * 7)  # the last batch is not full
    train.main(tiny(**told, out_dir=tmp_path / 'plain'))
    try:
        assert train.main(tiny(**told, compile=True)) == 0
    finally:
        torch._dynamo.reset()
    assert_all_graphs_came_with_the_first_step(tmp_path / 'run')
    # One of the blocks for both; on a CPU of the loss, in training and in evaluation, one for each
    # of its two sizes of chunk.
    assert summary(tmp_path / 'run')['compiled_graphs'] == 5
    plain, compiled = losses(tmp_path / 'plain'), losses(tmp_path / 'run')
    assert all(abs(plain[step] - compiled[step]) < 1e-3 for step in plain)


ON_GPU = dict(device='cuda', compile=True, dtype='bfloat16', loss_chunk_tokens=512, n_embd=256,
              n_head=4, block_size=128, batch_size=8, eval_tokens=2560, max_iters=60,
              log_interval=1)
VARIANTS = {
    'mha': {},
    'grouped, rotary': dict(n_kv_head=2, positions='rotary'),
    'mla': dict(attention='mla'),
    'mla, rotary': dict(attention='mla', positions='rotary'),
    'ra': dict(ra_learned=True, ra_alpha=0.5),
    'ra everywhere': dict(ra_learned=True, ra_alpha=0.5, ra_window=-1),
    'mla, ra': dict(attention='mla', ra_alpha=0.5, ra_window=10),
    'pruned': dict(prune_score='bitter7', prune_start=10, prune_end=50, prune_interval=10),
    'spam': dict(optimizer='adamwspam', spam_interval=20, spam_warmup=5),
    'float8': dict(fp8=True, dropout=0.1, activation_budget=0.9),
    'float8, mla': dict(fp8=True, attention='mla'),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('told', VARIANTS.values(), ids=VARIANTS)
def test_gpu_run_compiles_without_breaks_and_learns(tiny, tmp_path, told):
    if 'fp8' in told and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip('float8 needs compute capability 9.0')
    assert train.main(tiny(**ON_GPU, **told)) == 0
    assert_all_graphs_came_with_the_first_step(tmp_path / 'run')
    result = summary(tmp_path / 'run')
    assert result['val_loss'] < 4.0 and result['rung'] == 0
