"""Out of memory is not the end: the same step in smaller micro-batches, with the same loss."""
import gc
import re
from dataclasses import replace

import torch
import torch._functorch.config
from torch._dynamo.utils import counters

from support.guards import NOTHING_COMPILED, Stop
from support.ranks import highest
from support.settings import MEMORY, Refused


def ladder(s):
    """[(batch_size, gradient_accumulation_steps)] from as configured down to single rows, all of
    the same effective batch, and with it the same loss."""
    rungs = [(s.batch_size, s.gradient_accumulation_steps)]
    while rungs[-1][0] > 1:
        batch, micro_batches = rungs[-1]
        factor = next(f for f in range(2, batch + 1) if batch % f == 0)
        rungs.append((batch // factor, micro_batches * factor))
    return rungs


def active_settings(run):
    """The settings in force: those asked for, on the rung that the run has come to."""
    batch_size, micro_batches = ladder(run.settings)[run.progress.rung]
    return replace(run.settings, batch_size=batch_size, gradient_accumulation_steps=micro_batches)


def within_memory(run, work):
    """work(run), one rung further down the ladder each time a rank's memory runs out."""
    while True:
        failure = None
        try:
            result = work(run)
        except (RuntimeError, MemoryError) as error:
            if 'found no compiled frames' in str(error):  # PyTorch with TORCH_COMPILE_DISABLE=1
                raise Refused(NOTHING_COMPILED) from None
            if not re.search(MEMORY, repr(error), re.IGNORECASE):  # a compiler's error tells of it
                raise
            told = str(error) or 'MemoryError'
            sentences = told.splitlines()[0].split('. ')  # the rest is about the allocator
            failure = '. '.join(sentences[:2]).rstrip('.')
        if not highest(run, failure is not None):
            return result
        # Not inside `except`, because the error keeps tensors of its frames alive.
        step_down(run, failure or 'another rank ran out of memory')


def step_down(run, failure):
    """The next rung of the ladder, or Stop."""
    p = run.progress
    last = len(ladder(run.settings)) - 1
    if p.rung == last:
        raise Stop('out of memory', 1, f'step {p.step + 1}: {failure}. Micro-batches of one row '
                                       'are the last rung; use a smaller model or block_size')
    p.rung += 1
    run.log.say(f'OUT OF MEMORY at step {p.step + 1} ({failure}). Rung {p.rung} of {last}: '
                f'micro-batches of {active_settings(run).batch_size}; the effective batch stays '
                'the same')
    set_up_model(run)


def set_up_model(run):
    """Give memory back and compile the model anew, if it is to be compiled."""
    torch._dynamo.reset()
    gc.collect()
    if run.machine.device.type == 'cuda':
        torch.cuda.empty_cache()
    run.model.uncompile_parts()
    if run.settings.compile:
        torch._functorch.config.activation_memory_budget = run.settings.activation_budget
        run.model.compile_parts()
    run.graphs = (0, 0)
    counters.clear()
