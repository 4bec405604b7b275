"""support/memory.py: out of memory, the same step goes on in smaller micro-batches."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import last, losses

import train
from model import GPT
from support.machine import Machine
from support.memory import active_settings, ladder, within_memory


def summary(folder):
    return json.loads((folder / 'summary.json').read_text())


def text_log(folder):
    return (folder / 'train.log').read_text()


@pytest.mark.parametrize('batch_size, micro_batches, rungs', [
    (1, 4, [(1, 4)]),
    (8, 3, [(8, 3), (4, 6), (2, 12), (1, 24)]),
    (15, 1, [(15, 1), (5, 3), (1, 15)]),
])
def test_ladder_halves_down_to_single_rows(batch_size, micro_batches, rungs):
    s = train.Settings(batch_size=batch_size, gradient_accumulation_steps=micro_batches)
    assert ladder(s) == rungs


@pytest.fixture
def memory_for(monkeypatch):
    """A function: from now on micro-batches above this many sequences run out of memory."""
    forward = GPT.forward

    def limit(sequences, error=torch.OutOfMemoryError):
        def limited(self, idx, targets=None):
            if idx.size(0) > sequences:
                raise error('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 3.')
            return forward(self, idx, targets)
        monkeypatch.setattr(GPT, 'forward', limited)
    return limit


@pytest.mark.parametrize('error', [torch.OutOfMemoryError, RuntimeError])
def test_ladder_keeps_the_effective_batch_and_the_result(tiny, tmp_path, memory_for, error):
    configured = dict(batch_size=2, gradient_accumulation_steps=4, out_dir=tmp_path / 'configured')
    train.main(tiny(**configured))
    memory_for(2, error)  # inside the compiler the error arrives as a RuntimeError
    assert train.main(tiny(batch_size=8, gradient_accumulation_steps=1)) == 0
    result = summary(tmp_path / 'run')
    assert (result['rung'], result['rung_label']) == (2, 'micro-batches of 2')
    assert result['effective_batch'] == 8
    assert losses(tmp_path / 'run') == losses(tmp_path / 'configured')
    weights, expected = (last(tmp_path / name)['weights'] for name in ('run', 'configured'))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    log = text_log(tmp_path / 'run')
    assert log.count('OUT OF MEMORY') == 2
    assert ('OUT OF MEMORY at step 1 (CUDA out of memory. Tried to allocate 2.00 GiB). Rung 2 of '
            '3: micro-batches of 2; the effective batch stays the same\n') in log


def runs_out_once(training_calls, in_backward):
    """A GPT.forward whose memory runs out at its so-many-th call in training."""
    forward = GPT.forward
    calls = []

    def run_out(grad):
        if len(calls) == training_calls:
            raise torch.OutOfMemoryError('out of memory')
        return grad

    def limited(self, idx, targets=None):
        if not self.training:
            return forward(self, idx, targets)
        calls.append(1)
        if len(calls) == training_calls and not in_backward:
            run_out(None)
        loss = forward(self, idx, targets)
        if len(calls) == training_calls:
            # The later blocks have their gradients when the first one's arrives.
            self.blocks[0].attention.proj.weight.register_hook(run_out)
        return loss

    return limited


@pytest.mark.parametrize('in_backward', [False, True])
def test_memory_that_runs_out_in_the_middle_of_a_step_loses_nothing(
        tiny, tmp_path, monkeypatch, in_backward):
    train.main(tiny(log_interval=1, out_dir=tmp_path / 'straight'))
    # call 8 is the second micro-batch of the fourth update
    monkeypatch.setattr(GPT, 'forward', runs_out_once(8, in_backward))
    assert train.main(tiny(log_interval=1)) == 0
    assert summary(tmp_path / 'run')['rung'] == 1
    assert 'OUT OF MEMORY at step 4 ' in text_log(tmp_path / 'run')
    straight, run = losses(tmp_path / 'straight'), losses(tmp_path / 'run')
    assert straight.keys() == run.keys() == set(range(1, 9))
    assert all(straight[step] == run[step] for step in (1, 2, 3))
    assert abs(straight[4] - run[4]) < 2e-6
    # The gradients of step 4 were the same too: Adam's first updates are nearly their signs, so
    # that rounding moves single weights, but a gradient counted twice would move the loss.
    assert abs(straight[5] - run[5]) < 1e-3


def test_evaluation_may_run_out_of_memory_too(tiny, tmp_path, monkeypatch):
    train.main(tiny(out_dir=tmp_path / 'straight'))
    forward = GPT.forward

    def limited(self, idx, targets=None):
        if not self.training and idx.size(0) > 1:
            raise torch.OutOfMemoryError('out of memory')
        return forward(self, idx, targets)

    monkeypatch.setattr(GPT, 'forward', limited)
    assert train.main(tiny()) == 0
    assert summary(tmp_path / 'run')['rung'] == 1
    straight, run = (summary(tmp_path / name)['val_loss'] for name in ('straight', 'run'))
    assert abs(straight - run) < 0.05


def test_ladder_ends(tiny, tmp_path, memory_for):
    memory_for(0)
    assert train.main(tiny(batch_size=4)) == 1
    assert text_log(tmp_path / 'run').endswith(
        'step 1: CUDA out of memory. Tried to allocate 2.00 GiB. Micro-batches of one row are the '
        'last rung; use a smaller model or block_size\n')
    result = summary(tmp_path / 'run')
    assert (result['exit_reason'], result['rung']) == ('out of memory', 2)


@pytest.mark.parametrize('error', [
    MemoryError(), MemoryError('Unable to allocate 3.81 GiB for an array'),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate "
                 'memory: you tried to allocate 4000000000000 bytes. Error code 12'),
    RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')])
def test_memory_runs_out_in_other_words(tiny, tmp_path, monkeypatch, error):
    forward = GPT.forward

    def limited(self, idx, targets=None):
        if self.training and idx.size(0) > 1:
            raise error
        return forward(self, idx, targets)

    monkeypatch.setattr(GPT, 'forward', limited)
    assert train.main(tiny(max_iters=4)) == 0
    assert summary(tmp_path / 'run')['rung'] == 1
    assert 'OUT OF MEMORY at step 1 (' in text_log(tmp_path / 'run')


def test_the_allocator_of_the_cpu_is_understood():
    """What PyTorch really says, of more bytes than any machine has."""
    def greedy(run):
        if run.progress.rung == 0:
            torch.empty(2**60, dtype=torch.uint8)
        return active_settings(run).batch_size

    run = SimpleNamespace(settings=train.Settings(batch_size=2, compile=False), start_step=0,
                          machine=Machine(torch.device('cpu'), torch.float32, 0, 1, 'CPU', None),
                          progress=train.Progress(), log=SimpleNamespace(say=print),
                          model=SimpleNamespace(uncompile_parts=lambda: None))
    assert within_memory(run, greedy) == 1


def test_other_errors_are_not_taken_for_lack_of_memory(tiny, tmp_path, monkeypatch):
    def broken(self, idx, targets=None):
        raise RuntimeError('shapes do not match')

    monkeypatch.setattr(GPT, 'forward', broken)
    with pytest.raises(RuntimeError, match='shapes do not match'):
        train.main(tiny())
    assert 'OUT OF MEMORY' not in text_log(tmp_path / 'run')


def test_resume_starts_on_the_rung_of_the_checkpoint_unless_the_batch_is_divided_anew(
        tiny, tmp_path, memory_for):
    told = dict(lr_decay_iters=8, init_from='auto')
    memory_for(2)
    train.main(tiny(**told, max_iters=3, batch_size=8, gradient_accumulation_steps=1))
    assert last(tmp_path / 'run')['progress']['rung'] == 2
    assert last(tmp_path / 'run')['settings']['batch_size'] == 8  # as asked
    train.main(tiny(**told, max_iters=5, batch_size=8, gradient_accumulation_steps=1))
    assert summary(tmp_path / 'run')['rung'] == 2
    assert text_log(tmp_path / 'run').count('OUT OF MEMORY') == 2  # both in the first session
    train.main(tiny(**told, max_iters=8, batch_size=1, gradient_accumulation_steps=8))
    assert summary(tmp_path / 'run')['rung'] == 0
    assert text_log(tmp_path / 'run').count('OUT OF MEMORY') == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_with_too_little_memory_keeps_the_effective_batch(tiny, tmp_path):
    big = dict(device='cuda', compile=True, dtype='bfloat16', n_layer=8, n_embd=512, n_head=8,
               block_size=256, batch_size=32, gradient_accumulation_steps=1, max_iters=6,
               log_interval=1, eval_tokens=2560, loss_chunk_tokens=4096)
    train.main(tiny(**big, out_dir=tmp_path / 'free'))
    free = summary(tmp_path / 'free')
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * free['peak_memory_bytes'] / total)
    try:
        assert train.main(tiny(**big, out_dir=tmp_path / 'capped')) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    capped = summary(tmp_path / 'capped')
    assert capped['rung'] >= 1
    assert capped['effective_batch'] == free['effective_batch'] == 32
    with_less = losses(tmp_path / 'capped')
    for step, value in losses(tmp_path / 'free').items():
        assert abs(value - with_less[step]) < 0.02
