"""support/guards.py: divergence, signals, proof of compile."""
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import last, losses, refusal

import train
from support import guards
from support.guards import signals_noted


def summary(folder):
    return json.loads((folder / 'summary.json').read_text())


def text_log(folder):
    return (folder / 'train.log').read_text()


# --- divergence -----------------------------------------------------------------------------------


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, 'DIVERGE_STEPS', 8)
    told = dict(learning_rate=10.0, min_lr=0.0, warmup_iters=40, max_iters=100, log_interval=1,
                save_interval=1, eval_interval=100)
    assert train.main(tiny(**told)) == 3
    result, by_step = summary(tmp_path / 'run'), losses(tmp_path / 'run')
    end, best = result['steps'], min(by_step.values())
    good = last(tmp_path / 'run')['progress']['step']
    assert good == end - 9 and by_step[good] <= best + 1 < 5
    assert all(by_step[step] > best + 1 for step in range(good + 1, end + 1))
    assert result['exit_reason'] == 'diverged'
    assert text_log(tmp_path / 'run').splitlines()[-1] == (
        f'step {end}: diverged, loss {by_step[end]:.3f} is more than 1.0 nat above its best '
        f'{best:.3f} since step {good + 1}. Likely causes: learning_rate=10 too high, '
        'warmup_iters=40 too short, grad_clip=1 (0: none). The last good checkpoint stays')


def test_spike_that_passes_does_not_stop(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, 'DIVERGE_STEPS', 3)
    gradients = train.local_gradients
    saved_at = []
    save = train.save_checkpoint

    def spiked(run):
        return gradients(run) + (3 if run.progress.step in (4, 5, 6) else 0)

    def noted(path, content):
        if path.endswith('last.pt'):
            saved_at.append(content['step'])
        save(path, content)

    monkeypatch.setattr(train, 'local_gradients', spiked)
    monkeypatch.setattr(train, 'save_checkpoint', noted)
    assert train.main(tiny(max_iters=12, log_interval=1, save_interval=1)) == 0
    log = text_log(tmp_path / 'run')
    assert log.count('WARNING: loss') == 1 and 'nothing is saved until it is back' in log
    assert saved_at == [1, 2, 3, 4, 8, 9, 10, 11, 12, 12]  # the last one again, at the end


def test_divergence_is_more_than_a_nat_for_so_many_steps():
    said = []
    run = SimpleNamespace(settings=train.Settings(grad_clip=0.0),
                          log=SimpleNamespace(say=said.append),
                          progress=train.Progress(step=10, lowest_loss=3.0))
    guards.guard_against_divergence(run, 4.0)  # exactly one nat is not above
    assert said == [] and run.progress.above_since == -1
    guards.guard_against_divergence(run, 4.1)
    assert len(said) == 1 and run.progress.above_since == 10
    run.progress.step = 10 + guards.DIVERGE_STEPS - 1
    guards.guard_against_divergence(run, 4.1)
    run.progress.step += 1
    with pytest.raises(guards.Stop, match=r'grad_clip=0 \(0: none\)') as stop:
        guards.guard_against_divergence(run, 4.1)
    assert (stop.value.reason, stop.value.code) == ('diverged', 3)


# --- signals --------------------------------------------------------------------------------------


def test_first_signal_is_noted_and_the_second_acts_at_once():
    run = SimpleNamespace(stop_signal=0)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with signals_noted(run):
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stop_signal == signal.SIGINT
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pthread_sigmask(signal.SIG_BLOCK, [])  # lets Python handle it here
    with signals_noted(run):
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop_signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# --- compile --------------------------------------------------------------------------------------

NOTHING = ('compile=True, but nothing was compiled; unset TORCHDYNAMO_DISABLE and '
           'TORCH_COMPILE_DISABLE, or use --compile=False')


def test_compile_that_compiles_nothing_is_refused(tiny, tmp_path, monkeypatch):
    with torch._dynamo.config.patch(disable=True):  # what TORCH_COMPILE_DISABLE=1 does at import
        assert refusal(train.main, tiny(compile=True, out_dir=tmp_path / 'a')) == [NOTHING]
    monkeypatch.setenv('TORCHDYNAMO_DISABLE', '1')
    assert refusal(train.main, tiny(compile=True, out_dir=tmp_path / 'b')) == [NOTHING]
    assert summary(tmp_path / 'b')['exit_reason'] == 'refused'


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
