"""Train GPT-2.

    python train.py config/vanilla_baseline.py --batch_size=16
    torchrun --nproc_per_node=8 train.py config/vanilla_baseline.py
    python train.py --help

Exit codes: 0 finished, 1 failed, 2 refused (the message says why), 3 diverged or NaN, 130 after Ctrl-C and 143 after
SIGTERM, both saved at a step boundary. A run is continued with --init_from=resume.
"""
import contextlib
import gc
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch._functorch.config
import torch.distributed as dist
from torch._dynamo.utils import counters

from export import starting_weights
from files import write_json
from flat import accumulate, add_each, clear, flatten, gradient_norm, load_named_state, named_state
from memory import ladder, peak_memory, ran_out
from model import GPT, model_config
from optim import build_optimizer, learning_rate_at
from preflight import checkpoint_to_resume, effective_batch, is_finished, optimizer_options, preflight, table
from prune import masked, pack_weights, sparsity_report
from rundir import RunLog, clock, provenance, save_checkpoint
from settings import Refused, Settings, check, help_text, parse
from shards import window_order


@dataclass
class Progress:
    """What a run knows besides its tensors; saved in last.pt."""
    step: int = 0  # updates done
    seconds: float = 0.0  # of training, evaluation and saving, over all sessions
    rung: int = 0  # of the out-of-memory ladder
    val_loss: float = math.inf  # latest
    best_val_loss: float = math.inf
    lowest_loss: float = math.inf  # running best of the logged training losses
    above_since: int = -1  # first step of the present stretch far above lowest_loss; -1: none


@dataclass
class Run:
    """Everything the functions below share."""
    settings: Settings  # as asked
    active: Settings  # in force: differs only by the out-of-memory ladder
    machine: Any  # preflight.Machine
    data: Any  # prepare.Data
    log: RunLog
    model: GPT
    flats: list
    optimizer: Any
    progress: Progress
    add_each: Any = None  # flat.add_each, compiled or not
    bad_step: Any = None  # 0-dim int64 on the device: first step without finite gradients, -1: none
    stop_signal: int = 0
    graphs: tuple = (0, 0)  # (compiled graphs, graph breaks) when last looked at
    graphs_before: tuple = (0, 0)  # of this process, before this model was compiled
    mark: float = 0.0  # time of the last log step, moved on by what evaluation and saving took
    mark_step: int = 0
    start_step: int = 0  # where this session began
    began: float = field(default_factory=time.monotonic)
    speed: dict = field(default_factory=dict)  # latest tokens_per_second, mfu


class Stop(Exception):
    """Ends the run early. reason is a word for the summary, code the exit code."""

    def __init__(self, reason, code, message):
        super().__init__(message)
        self.reason, self.code = reason, code


# --- the loop ----------------------------------------------------------------------------------------


def train(run):
    """From run.progress.step to max_iters; raises Stop if it must end before."""
    s, p = run.settings, run.progress
    while True:
        if p.step % s.eval_interval == 0 or p.step == s.max_iters:
            evaluate_and_keep_best(run)
        if p.step == s.max_iters:
            break
        loss, norm = one_step(run)
        if p.step % s.log_interval == 0 or p.step == run.start_step + 1 or p.step == s.max_iters:
            log_step(run, loss, norm)
        if p.step % s.save_interval == 0:
            save(run)
        stop_if_signalled(run)
    save(run)


def one_step(run):
    """One update from one effective batch: (loss, gradient norm) as tensors on the device, nothing waited for."""
    s, p = run.settings, run.progress
    loss = within_memory(run, local_gradients)
    if run.machine.world > 1:
        for tensor in [flat.parameter.main_grad for flat in run.flats] + [loss]:
            dist.all_reduce(tensor)  # every term is already divided by the micro-batches of all ranks
    norm = gradient_norm(run.flats)
    finite = norm.isfinite() & loss.isfinite()
    run.bad_step = torch.where((run.bad_step < 0) & ~finite, p.step, run.bad_step)
    for group in run.optimizer.param_groups:
        group['lr'] = learning_rate_at(p.step, s.learning_rate, s.min_lr, s.warmup_iters, s.lr_decay_iters or s.max_iters)
    clip = (s.grad_clip / (norm + 1e-6)).clamp(max=1.0) if s.grad_clip else None  # as torch's clip_grad_norm_
    run.optimizer.step(clip=clip, finite=run.bad_step < 0, norm=norm)  # from a bad step on nothing changes, until it is noticed
    p.step += 1
    return loss, norm


def local_gradients(run):
    """This rank's share of the mean loss and its gradients: micro-batches rank, rank + world, ..."""
    s, p = run.active, run.progress
    total = torch.zeros((), device=run.machine.device)
    run.model.train()
    clear(run.flats)
    for micro in range(run.machine.rank, s.gradient_accumulation_steps, run.machine.world):
        first = p.step * effective_batch(s) + micro * s.batch_size
        order = window_order(range(first, first + s.batch_size), run.data.train.windows(s.block_size), s.seed)
        idx, targets = inputs_and_targets(run.machine.device, run.data.train, order, s.block_size)  # each (B, T)
        # Dropout is a function of (seed, step, micro-batch), so it needs no state to resume and no rank to be the same.
        torch.manual_seed(s.seed + 1_000_003 * (1 + p.step * s.gradient_accumulation_steps + micro))
        loss = run.model(idx, targets) / s.gradient_accumulation_steps
        loss.backward()
        accumulate(run.flats, run.add_each)
        total += loss.detach()
    return total


def inputs_and_targets(device, stream, windows, T):
    """Numbers of B windows -> their tokens (B, T) and the successors of these (B, T), int64 on the device."""
    tokens = torch.from_numpy(stream.read([w * T for w in windows], T + 1))  # (B, T + 1)
    if device.type == 'cuda':
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# --- evaluation --------------------------------------------------------------------------------------


def evaluate(run):
    """Mean loss over the first eval_tokens of the validation split, every rank its share: a 0-dim float64 tensor."""
    s, m, stream = run.active, run.machine, run.data.val
    windows = s.eval_tokens // s.block_size or stream.windows(s.block_size)
    total = within_memory(run, lambda run: local_validation_loss(run, range(m.rank, windows, m.world)))
    if m.world > 1:
        dist.all_reduce(total)
    return total / windows


@torch.no_grad()
def local_validation_loss(run, windows):
    """Sum of the losses of these windows. The last batch is filled up with unscored rows: one shape, one graph."""
    s, stream = run.active, run.data.val
    total = torch.zeros((), dtype=torch.float64, device=run.machine.device)
    run.model.eval()
    for i in range(0, len(windows), s.batch_size):
        chosen = list(windows[i:i + s.batch_size])
        filled = chosen + [chosen[-1]] * (s.batch_size - len(chosen))
        idx, targets = inputs_and_targets(run.machine.device, stream, filled, s.block_size)
        targets[len(chosen):] = -1
        total += run.model(idx, targets).double() * len(chosen)
    return total


def evaluate_and_keep_best(run):
    """Evaluate, record it, and keep the weights in best.pt if they are the best so far."""
    s, p = run.settings, run.progress
    with paused(run):
        stop_if_bad(run)
        p.val_loss = evaluate(run).item()
        record = dict(step=p.step, val_loss=p.val_loss, val_ppl=perplexity(p.val_loss), sparsity=sparsity(run)[0])
        run.log.say(f'step {p.step:>6}/{s.max_iters}  validation loss {p.val_loss:.4f}  perplexity {record["val_ppl"]:.2f}')
        run.log.measure(record)
        if p.val_loss < p.best_val_loss and getattr(run.optimizer, 'frozen', True):  # a best of half-pruned weights is of no use
            p.best_val_loss = p.val_loss
            if run.log.write and p.step > 0:
                content = {**identity(run), 'weights': weights_as_used(run), 'val_loss': p.val_loss, 'step': p.step}
                save_checkpoint(os.path.join(s.out_dir, 'best.pt'), content)


def weights_as_used(run):
    """For best.pt: float32 masters, or of a pruned run what the model reads, the pruned matrices as bits and kept values."""
    named = named_state(run.flats, run.optimizer)
    return pack_weights(masked(named['weights'], named['mask']), named['mask'], run.machine.dtype) if 'mask' in named else named['weights']


def sparsity(run):
    """(share of the scope's weights that is pruned, share of all parameters), known without asking the device."""
    return getattr(run.optimizer, 'sparsity', 0.0), run.optimizer.shared.get('pruned', 0) / run.model.parameter_count()


def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf


@contextlib.contextmanager
def paused(run):
    """Time spent inside does not count for tokens_per_second."""
    synchronize(run)
    start = time.monotonic()
    yield
    run.mark += time.monotonic() - start


def synchronize(run):
    if run.machine.device.type == 'cuda':
        torch.cuda.synchronize(run.machine.device)


# --- logging and guards, at log steps only -----------------------------------------------------------


def log_step(run, loss, norm):
    """One line, one record; then everything that needs the device's numbers on the host."""
    s, p, m = run.settings, run.progress, run.machine
    loss, norm = loss.item(), norm.item()
    stop_if_bad(run)
    now, steps = time.monotonic(), p.step - run.mark_step
    seconds = (now - run.mark) / steps
    rate = effective_batch(s) * s.block_size / seconds
    mfu = rate * run.model.flops_per_token() / (m.peak_flops * m.world) if m.peak_flops else None
    run.speed, run.mark, run.mark_step = dict(tokens_per_second=rate, mfu=mfu), now, p.step
    lr, memory = run.optimizer.param_groups[0]['lr'], peak_memory(m.device)
    run.log.measure(dict(step=p.step, tokens=p.step * effective_batch(s) * s.block_size, loss=loss, grad_norm=norm, lr=lr,
                         **run.speed, peak_memory_bytes=memory, sparsity=sparsity(run)[0], spikes=spikes(run), seconds=elapsed(run)))
    run.log.say(f'step {p.step:>6}  loss {loss:7.4f}  norm {norm:5.2f}  lr {lr:.1e}  {rate / 1e3:6.1f}k tok/s  '
                + (f'mfu {mfu:5.1%}  ' if mfu else '') + f'{memory / 2**30:4.1f} GiB  eta {clock(seconds * (s.max_iters - p.step))}')
    report_graphs(run)
    if p.step % s.log_interval == 0:  # not at the odd first and last step of a session: where it is split must not matter
        guard_against_divergence(run, loss)


def spikes(run):
    """Updates so far on which the optimizer met a gradient spike."""
    return run.optimizer.counters()['spikes'] if hasattr(run.optimizer, 'counters') else 0


def elapsed(run):
    return run.progress.seconds + time.monotonic() - run.began


NOTHING_COMPILED = 'compile=True, but nothing was compiled; unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE, or use --compile=False'


def count_graphs():
    """(graphs compiled, graph breaks) in this process, as Dynamo counts them."""
    return counters['stats']['unique_graphs'], sum(counters['graph_break'].values())


def report_graphs(run):
    """Proof of compile: what was compiled is read back, not assumed."""
    now = tuple(a - b for a, b in zip(count_graphs(), run.graphs_before))
    if run.active.compile and now[0] == 0:
        raise Refused(NOTHING_COMPILED)
    if now != run.graphs:
        run.graphs = now
        run.log.say(f'compiled graphs {now[0]}, graph breaks {now[1]}')


def stop_if_bad(run):
    step = run.bad_step.item()
    if step >= 0:
        run.progress.step = step  # nothing was updated since
        raise Stop('nan', 3, f'step {step + 1}: the loss or its gradient is not finite; the run stopped before that update. Likely a '
                             'learning rate too high or a bad batch; the last checkpoint is from before it')


def guard_against_divergence(run, loss):
    """Stop once the loss has stayed diverge_nats above its running best for diverge_steps."""
    s, p = run.settings, run.progress
    p.lowest_loss = min(p.lowest_loss, loss)
    if loss <= p.lowest_loss + s.diverge_nats:
        p.above_since = -1
    elif p.above_since < 0:
        p.above_since = p.step
        run.log.say(f'WARNING: loss {loss:.3f} is more than {s.diverge_nats} nat above its best {p.lowest_loss:.3f}; nothing is '
                    'saved until it is back')
    elif p.step - p.above_since >= s.diverge_steps:
        cause = 'gradients are clipped off (grad_clip=0)' if s.grad_clip == 0 else f'learning_rate={s.learning_rate:g} is too high or ' \
            f'warmup_iters={s.warmup_iters} too short for this model'
        raise Stop('diverged', 3, f'step {p.step}: diverged, loss {loss:.3f} has been more than {s.diverge_nats} nat above its best '
                                  f'{p.lowest_loss:.3f} since step {p.above_since}. Likely cause: {cause}. The last good checkpoint stays')


# --- out-of-memory ladder ----------------------------------------------------------------------------


def within_memory(run, work):
    """work(run), stepping down the ladder each time memory runs out."""
    while True:
        failure = None
        try:
            result = work(run)
        except RuntimeError as error:
            if 'found no compiled frames' in str(error):  # newer PyTorch with TORCH_COMPILE_DISABLE=1
                raise Refused(NOTHING_COMPILED) from None
            if not ran_out(error):
                raise
            failure = '. '.join(str(error).splitlines()[0].split('. ')[:2]).rstrip('.') + '.'  # torch goes on about the allocator
        if run.machine.world > 1 and run.progress.step == run.start_step:  # agreed on in the first step of a session only:
            failed = torch.tensor(float(failure is not None), device=run.machine.device)
            dist.all_reduce(failed)  # it waits for the device
            failure = (failure or 'another rank ran out of memory') if failed.item() else None
        if failure is None:
            return result
        step_down(run, failure)  # not inside `except`: the error keeps the tensors of its frames alive


def step_down(run, failure):
    s, p = run.settings, run.progress
    rungs = ladder(s)
    if s.oom == 'fail' or p.rung + 1 == len(rungs) or (run.machine.world > 1 and p.step > run.start_step):
        raise Stop('out of memory', 1, f'step {p.step + 1}: {failure} No further rung is allowed or left (oom={s.oom!r})')
    p.rung += 1
    label, changes = rungs[p.rung]
    run.active = replace(s, **changes)
    run.log.say(f'OUT OF MEMORY at step {p.step + 1} ({failure}) Rung {p.rung} of {len(rungs) - 1}: {label}; the effective batch stays '
                f'{effective_batch(run.active)}')
    set_up_model(run)


def set_up_model(run):
    """The model as run.active wants it: chunk size, compiled or not."""
    torch._dynamo.reset()
    gc.collect()
    if run.machine.device.type == 'cuda':
        torch.cuda.empty_cache()
    run.model.config.loss_chunk_tokens = run.active.loss_chunk_tokens
    run.model.uncompile_parts()
    run.optimizer.set_compiled(run.active.compile)
    fuse = run.active.compile and run.machine.device.type == 'cuda'  # on a CPU the compiled one is no faster
    run.add_each = torch.compile(add_each, fullgraph=True, dynamic=False) if fuse else add_each
    if run.active.compile:
        torch._functorch.config.activation_memory_budget = run.active.activation_budget
        run.model.compile_parts()
    run.graphs, run.graphs_before = (0, 0), count_graphs()


# --- saving and stopping -----------------------------------------------------------------------------


def identity(run):
    """What a checkpoint says of where it is from."""
    data = run.data
    return dict(format='nanoprune 1', settings=asdict(run.settings), fingerprint=data.fingerprint,
                data=dict(name=data.name, tokenizer=data.tokenizer, vocab_size=data.vocab_size))


def save(run):
    """Everything needed to continue, to last.pt; not while the loss is suspiciously high."""
    with paused(run):
        stop_if_bad(run)
        if run.log.write and run.progress.above_since < 0:
            content = {**identity(run), 'progress': asdict(replace(run.progress, seconds=elapsed(run)))}
            save_checkpoint(os.path.join(run.settings.out_dir, 'last.pt'), {**content, **named_state(run.flats, run.optimizer)})


def stop_if_signalled(run):
    """After SIGTERM or Ctrl-C: save and stop. Several ranks agree at log steps, where they wait for each other anyway."""
    stop = run.stop_signal
    if run.machine.world > 1:
        if run.mark_step != run.progress.step:
            return
        shared = torch.tensor(stop, device=run.machine.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        stop = int(shared.item())
    if stop:
        save(run)
        if run.machine.world > 1:
            dist.barrier()  # torchrun kills the others as soon as one has ended
        name, step = signal.Signals(stop).name, run.progress.step
        told = f'saved at step {step}' if run.progress.above_since < 0 else f'not saved at step {step}, for its loss is too high'
        raise Stop(name.lower(), 128 + stop, f'{name}: {told}; continue with --init_from=resume')


@contextlib.contextmanager
def signals_noted(run):
    """SIGTERM and Ctrl-C are remembered for the next step boundary; a second one acts at once."""
    def note(number, frame):
        run.stop_signal = number
        for each in before:
            signal.signal(each, before[each])

    before = {each: signal.signal(each, note) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each in before:
            signal.signal(each, before[each])


def write_summary(run, reason):
    """summary.json, whatever way the run ended."""
    s, p = run.settings, run.progress
    in_scope, in_all = sparsity(run)
    layers = sparsity_report({}, named_state(run.flats, run.optimizer).get('mask', {}))['layers']
    if run.log.write:
        write_json(os.path.join(s.out_dir, 'summary.json'), dict(
            steps=p.step, tokens=p.step * effective_batch(s) * s.block_size, val_loss=p.val_loss, val_ppl=perplexity(p.val_loss),
            best_val_loss=p.best_val_loss, sparsity=in_scope, sparsity_all=in_all, sparsity_by_layer=layers,
            tokens_per_second=run.speed.get('tokens_per_second'), mfu=run.speed.get('mfu'),
            peak_memory_bytes=peak_memory(run.machine.device), compiled_graphs=run.graphs[0], graph_breaks=run.graphs[1],
            rung=p.rung, rung_label=ladder(s)[p.rung][0], effective_batch=effective_batch(s), parameters=run.model.parameter_count(),
            dataset=run.data.name, fingerprint=run.data.fingerprint, seconds=elapsed(run), exit_reason=reason,
            **getattr(run.optimizer, 'counters', dict)()))


# --- from settings to a run --------------------------------------------------------------------------


def build(s, machine, data, saved):
    """A Run ready to train, its weights from the seed or from the checkpoint `saved`."""
    torch.use_deterministic_algorithms(s.deterministic)
    torch.manual_seed(s.seed)
    model = GPT(model_config(s, data.vocab_size))  # on the CPU: the same weights for every device
    saved_or_new = saved or {'weights': starting_weights(s, model)}
    flats = flatten(model.to(machine.device), machine.dtype)
    progress = Progress(**saved['progress']) if saved else Progress()
    if saved and ladder(s) != ladder(Settings(**saved['settings'])):
        progress.rung = 0  # it counts on the old ladder
    active = replace(s, **ladder(s)[progress.rung][1])
    optimizer = build_optimizer(flats, lr=s.learning_rate, betas=(s.beta1, s.beta2), eps=s.eps, weight_decay=s.weight_decay,
                                **optimizer_options(s, model))
    load_named_state(flats, optimizer, saved_or_new, step=progress.step)
    log = RunLog(s.out_dir, s.tracker, asdict(s), keep_until=progress.step if saved else None, write=machine.rank == 0)
    bad_step = torch.full((), -1, dtype=torch.int64, device=machine.device)
    run = Run(s, active, machine, data, log, model, flats, optimizer, progress, bad_step=bad_step, mark_step=progress.step,
              start_step=progress.step)
    set_up_model(run)
    return run


def main(argv):
    """Train as told by the command line; returns the exit code."""
    if '--help' in argv:
        print(help_text(Settings, __doc__))
        return 0
    s, problems = parse(Settings, argv)
    machine, data = preflight(s, problems + check(s))
    if is_finished(s):
        print(f'{s.out_dir} holds this run, finished; nothing to do')
        return 0
    saved = checkpoint_to_resume(s, data)
    if s.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS repeats itself only with this
    if machine.device.type == 'cuda':
        torch.cuda.set_device(machine.device)
    if machine.world > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if machine.device.type == 'cuda' else 'gloo')
    run = build(s, machine, data, saved)
    run.log.say(table(s, machine, data, run.model, run.progress.step))
    if run.log.write:
        write_json(os.path.join(s.out_dir, 'config.json'), dict(
            settings=asdict(s), data=identity(run)['data'], fingerprint=data.fingerprint, device=machine.name,
            dtype=str(machine.dtype)[6:], processes=machine.world, **provenance()))
    return finish(run)


def finish(run):
    """Train to the end, whichever it is, and write the summary; returns the exit code."""
    reason, code = 'error', 1
    run.mark = time.monotonic()
    try:
        with signals_noted(run):
            train(run)
        reason, code = 'finished', 0
        run.log.say(f'finished: validation loss {run.progress.val_loss:.4f}, perplexity {perplexity(run.progress.val_loss):.2f}, '
                    f'in {clock(elapsed(run))}; {run.settings.out_dir}')
    except Stop as stop:
        reason, code = stop.reason, stop.code
        run.log.say(str(stop))
    except Refused as refused:
        reason = 'refused'
        run.log.say('stopped: ' + '; '.join(refused.problems))
        raise
    finally:
        write_summary(run, reason)
        run.log.close()
    return code


if __name__ == '__main__':
    try:
        exit_code = main(sys.argv[1:])
    except Refused as refused:
        exit_code = refused.report() if os.environ.get('RANK', '0') == '0' else 2
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(exit_code)
