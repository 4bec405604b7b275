"""Anatomy of one optimizer step: where its time and its memory go.

Steps of train.py run under torch.profiler, without any graph capture. A kernel's name does not tell which part of the step
it serves, but where it was launched does: every kernel gets its `chain`, the names of all ranges that were open on the
launching thread, outermost first, e.g. 'ChunkedCrossEntropy > Torch-Compiled Region: 1/0 > aten::mm > nvjet_...'. Operators,
autograd's nodes and Optimizer.step open ranges of their own, compiled or not, and the compiler names its kernels after what it
fused. On a CPU an operator is its own kernel and its time is its self time.
"""
import contextlib
import json
import os
import re
import time
from dataclasses import replace

import torch
import torch._inductor.config
from torch.profiler import ProfilerActivity, profile, record_function, schedule

import fp8
import train
from loss import ChunkedCrossEntropy
from memory import predicted_memory
from prune import prunable

STEPS = 3  # under the profiler
WINDOW, DATA, SUMS, NORM, HEAD, LOSS = *(f'anatomy: {word}' for word in 'steps data sums norm head'.split()), ChunkedCrossEntropy.__name__
# functions that are no operators
MARKED = {(train, 'inputs_and_targets'): DATA, (train, 'accumulate'): SUMS, (train, 'gradient_norm'): NORM, (fp8, 'head'): HEAD}

# (part, pattern in the chain): the first that is found counts. So the outermost purpose goes before the kind of kernel.
PATTERNS = [(part, re.compile(pattern)) for part, pattern in (
    ('optimizer', rf'Optimizer\.step|{NORM}'),  # the norm is for clipping
    ('data', rf'{DATA}|Memcpy HtoD'),
    ('head and loss', f'{LOSS}|{HEAD}'),
    # besides train.accumulate: the zeroing before it, and the sum of the tied embedding's two gradients
    ('gradient accumulation', rf'{SUMS}|AccumulateGrad|(CompiledFunction|Embedding)Backward\d* > aten::add|{WINDOW} > aten::zero_'),
    ('embedding', r'embedding|Embedding|SliceBackward'),
    ('attention', r'scaled_dot_product|ScaledDotProduct|attention|flash|fmha|sdpa|nanoprune::windowed'),
    ('matrix products', r'fp8_product|aten::(linear|matmul|mm|addmm|bmm)\b|\b(Mm|Addmm|T|UnsafeView)Backward|'
                        r'gemm|nvjet|cutlass|xmma|cublas|Cijk_|triton_tem'),
    ('normalisation and activation', r'(layer|rms)_norm|(Layer|RMS)Norm|gelu|Gelu|dropout|Dropout'),
    ('attention', r'unbind|Unbind|permute|Permute|transpose|Transpose|select_backward|clone|fused_cat'),  # its layout of q, k, v
    ('normalisation and activation', r'aten::(add|to|sum)\b|AddBackward|ToCopyBackward|triton_|cpp_fused|fp8_'),  # residual, casts
)]
PARTS = ('attention', 'matrix products', 'head and loss', 'normalisation and activation', 'embedding', 'gradient accumulation',
         'optimizer', 'data', 'other')  # other: scalars, views, the compiler's wrappers, what no pattern knows


def part_of(chain):
    """The part of the step that a kernel with this chain belongs to."""
    return next((part for part, pattern in PATTERNS if pattern.search(chain)), 'other')


# --- reading a trace ---------------------------------------------------------------------------------


def nanoseconds(event):
    """(start, end) of a trace's event, exact: its times are microseconds with three decimals."""
    start = round(event['ts'] * 1000)
    return start, start + round(event.get('dur', 0) * 1000)


def nested(events):
    """Yields (event, chain, self time in ns) of the host's ranges and of launches in them, thread by thread."""
    host = [e for e in events if e.get('ph') == 'X' and (e.get('cat') in ('cpu_op', 'user_annotation') or is_launch(e))]
    threads = {}
    for e in host:
        threads.setdefault((e['pid'], e['tid']), []).append((*nanoseconds(e), e))
    for ranges in threads.values():
        stack, found = [], []
        for start, end, e in sorted(ranges, key=lambda each: (each[0], -each[1])):
            while stack and stack[-1][0] <= start:
                stack.pop()
            entry = [end, f'{stack[-1][1]} > {e["name"]}' if stack else e['name'], end - start, e]
            if stack:
                stack[-1][2] -= end - start
            stack.append(entry)
            found.append(entry)
        yield from ((e, chain, self_time) for _, chain, self_time, e in found)


def is_launch(event):
    return event.get('cat', '').endswith(('_runtime', '_driver')) and 'correlation' in event.get('args', {})


def window(events):
    """(start, end) in ns of the profiled steps."""
    return nanoseconds(next(e for e in events if e.get('cat') == 'user_annotation' and e['name'] == WINDOW))


def operators(events):
    """[(name, chain, ns it took, ns of the wall time)] of the host's ranges within the steps: what a CPU does."""
    return [(e['name'], chain, self_time, self_time) for e, chain, self_time in nested(events) if f'{WINDOW} > ' in chain]


def kernels(events):
    """[(name, chain, ns it took, ns of the wall time)] of a GPU's kernels, copies and fills within the steps.

    Of kernels that overlap, a moment counts for the one that started first, so that the last column adds up to the union.
    """
    if any('GraphLaunch' in e['name'] for e in events):
        raise RuntimeError('a captured graph hides what launched its kernels: profile the step without capture')
    chains = {e['args']['correlation']: chain for e, chain, _ in nested(events) if is_launch(e)}
    start, end = window(events)
    busy_until, found = start, []
    on_device = [(*nanoseconds(e), e) for e in events if e.get('cat') in ('kernel', 'gpu_memcpy', 'gpu_memset')]
    for begin, finish, e in sorted(on_device, key=lambda each: each[:2]):
        if start < finish and begin < end:
            launched = chains.get(e['args'].get('correlation'))
            chain = f'{launched} > {e["name"]}' if launched else e['name']
            until = min(finish, end)  # the two clocks may disagree by a microsecond at the window's edges
            found.append((e['name'], chain, finish - begin, max(0, until - max(begin, busy_until))))
            busy_until = max(busy_until, until)
    return found


def time_by_part(events, gpu, steps):
    """One step of a trace of `steps`: {'step_ms', 'parts': {part: ms}, 'kernels': [{name, part, ms, count}]}.

    The parts, of which `gaps` is the wall time in which nothing ran, add up to step_ms. Kernels are sorted by time, which
    counts overlaps fully.
    """
    start, end = window(events)
    spans = kernels(events) if gpu else operators(events)
    parts, each = dict.fromkeys(PARTS, 0), {}
    for name, chain, took, wall in spans:
        part = part_of(chain)
        parts[part] += wall
        each.setdefault((name, part), []).append(took)
    parts['gaps'] = end - start - sum(parts.values())
    listed = [dict(name=name, part=part, ms=sum(taken) / 1e6 / steps, count=len(taken) / steps) for (name, part), taken in each.items()]
    return dict(step_ms=(end - start) / 1e6 / steps, parts={part: ns / 1e6 / steps for part, ns in parts.items()},
                kernels=sorted(listed, key=lambda entry: -entry['ms']))


def memory_of_loss(events, gpu):
    """(bytes allocated since the start of a step when its loss begins, what the loss adds at most, most in the whole step).

    The first two are of the micro-batch whose loss reaches highest. Counts what the allocator of the device is asked for.
    """
    changes = sorted((e['ts'], e['args']['Total Allocated'], e['args']['Bytes']) for e in events
                     if e['name'] == '[memory]' and (e['args']['Device Type'] != 0) == gpu)
    at_start = changes[0][1] - changes[0][2]
    losses = [(e['ts'], e['ts'] + e['dur']) for e in events if e.get('cat') == 'cpu_op' and e['name'] == LOSS]
    found = []
    for begin, end in losses:
        before = [total for t, total, _ in changes if t <= begin][-1]
        found.append((max(total for t, total, _ in changes if begin <= t <= end), before))
    highest, before = max(found)
    return before - at_start, highest - before, max(total for _, total, _ in changes) - at_start


# --- making a trace ----------------------------------------------------------------------------------


@contextlib.contextmanager
def marked():
    """Gives the functions of MARKED a range in the trace."""
    before = {place: getattr(*place) for place in MARKED}

    def in_range(function, label):
        def wrapped(*arguments):
            with record_function(label):
                return function(*arguments)
        return wrapped

    for place, label in MARKED.items():
        setattr(*place, in_range(before[place], label))
    try:
        yield
    finally:
        for place, function in before.items():
            setattr(*place, function)


def several_steps(run, steps):
    """These steps, done and waited for."""
    for _ in range(steps):
        train.one_step(run)
    train.synchronize(run)


def trace(run, steps, memory=False):
    """Events of the Chrome trace of `steps` optimizer steps; memory=True: with every allocation."""
    path = os.path.join(run.settings.out_dir, 'trace.json')
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # it reports every stage otherwise
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (run.machine.device.type == 'cuda')
    with marked(), profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=1, repeat=1), profile_memory=memory,
                                on_trace_ready=lambda done: done.export_chrome_trace(path)) as profiler:
        for _ in range(2):  # the profiler's own start-up falls into the first
            with record_function(WINDOW):
                several_steps(run, steps)
            profiler.step()
    with open(path) as f:
        return json.load(f)['traceEvents']


def measure(s, machine, data):
    """dict(time=..., memory=...) of the steps that these settings describe, run here; s.out_dir is for its files.

    time: as time_by_part, and `unprofiled_ms`, the same step without the profiler. memory: {'measured', 'predicted': {part:
    bytes}, 'peak': bytes}.
    """
    gpu = machine.device.type == 'cuda'
    named = {'cpp.enable_kernel_profile': True} if s.compile and not gpu else {}  # only then do compiled CPU kernels have ranges
    with torch._inductor.config.patch(named):
        run = train.build(replace(s, tracker='none'), machine, data, saved=None)
        several_steps(run, STEPS)
        start = time.perf_counter()
        several_steps(run, STEPS)
        unprofiled = (time.perf_counter() - start) / STEPS
        by_part = time_by_part(trace(run, STEPS), gpu, STEPS)
        memory = measured_memory(run, gpu)
    run.log.close()
    return dict(time=dict(by_part, unprofiled_ms=unprofiled * 1e3), memory=memory)


def measured_memory(run, gpu):
    """What measure() says of memory. Activations and logits are what the allocator gave out, the rest is what else there was
    at the peak: gradients in working precision, the backward's temporaries."""
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    activations, logits, highest = memory_of_loss(trace(run, 1, memory=True), gpu)
    parts = {**state_bytes(run), 'activations': activations, 'logits': logits}
    peak = torch.cuda.max_memory_allocated() if gpu else sum(state_bytes(run).values()) + highest
    parts['rest'] = peak - sum(parts.values())
    named = list(run.model.named_parameters())
    pruned = sum(p.numel() for name, p in named if name in prunable(named, run.settings.prune_scope))
    predicted = predicted_memory(run.active, run.model.config, run.machine.dtype, run.model.parameter_count(), pruned, gpu)
    return dict(measured=parts, predicted=predicted, peak=peak)


def state_bytes(run):
    """Bytes of the tensors that outlive a step, by the parts of predicted_memory."""
    found = dict.fromkeys(('working weights', 'master weights', 'moments', 'gradients', 'pruning'), 0)
    for flat in run.flats:
        state = run.optimizer.state_of(flat.parameter)
        found['working weights' if 'master' in state else 'master weights'] += flat.parameter.nbytes
        found['gradients'] += flat.parameter.main_grad.nbytes
        for key, value in state.items():
            kind = {'master': 'master weights', 'exp_avg': 'moments', 'exp_avg_sq': 'moments', 'max_exp_avg_sq': 'moments'}
            found[kind.get(key, 'pruning')] += tree_bytes(value)
    return found


def tree_bytes(tree):
    """Bytes of all tensors in a tree of dicts."""
    if isinstance(tree, dict):
        return sum(map(tree_bytes, tree.values()))
    return tree.nbytes if torch.is_tensor(tree) else 0
