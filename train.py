"""Train GPT-2.

    python train.py config/vanilla_baseline.py --batch_size=16
    torchrun --nproc_per_node=8 train.py config/vanilla_baseline.py
    python train.py --help

Exit codes: 0 finished, 1 failed, 2 refused (the message says why), 3 diverged or NaN, 130, 143 and
129 after Ctrl-C, SIGTERM and SIGHUP, saved at a step boundary. SIGUSR1 saves and the run goes on.
--init_from=resume continues a run.
"""
import contextlib
import math
import os
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch.nn.utils import get_total_norm

import optim
import prune
from model import ATTENTIONS, GPT, POSITIONS, model_config
from support import guards, preflight, ranks
from support.checks import check
from support.files import write_json
from support.guards import Stop, stop_if_bad
from support.machine import find_machine, memory_figures, peak_memory
from support.memory import active_settings, set_up_model, within_memory
from support.preflight import effective_batch
from support.pretrained import pretrained_problems, starting_weights
from support.rundir import FORMAT, TRACKERS, RunLog, clock, pack_weights, save_checkpoint
from support.settings import Path, Refused, arguments, help_text, parse, run_command
from support.shards import bits_a_byte, window_order


@dataclass
class Settings:
    # --- run ----------------------------------------------------------------------------
    out_dir: Path = 'out/run'  # run directory: config, log, metrics, checkpoints, summary
    init_from: Literal['scratch', 'resume', 'auto', 'hf:PATH', 'run:PATH'] = 'scratch'  # where
    # auto: resume if there is a run, else scratch; hf: a GPT-2, in a folder or by its hub name
    # run: the weights of another run (prune_score=zeros keeps what is pruned in either)
    seed: int = 1337  # decides weights, data order and dropout (nanoGPT's value)
    device: str = 'auto'  # auto, cpu, cuda or cuda:N (ROCm's too); auto: GPU if there is one
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the matrices; auto: by device
    compile: bool = True  # torch.compile; proven after the first steps
    activation_budget: float = 1.0  # share of activations kept for the backward
    # the compiler computes the rest again
    dry_run: bool = False  # check everything, print the preflight table, write nothing
    deterministic: bool = False  # bit-identical repetition on a GPU, slower; on a CPU always
    tracker: Literal[*TRACKERS] = 'none'  # besides metrics.jsonl; its failure never stops a run
    # --- data ---------------------------------------------------------------------------
    dataset: str = 'fineweb_edu'  # name in the data's meta.json; 'unlabelled' if there is none
    data_dir: Path = ''  # folder of the token shards; empty: data/<dataset>
    batch_size: int = 32  # sequences a micro-batch
    gradient_accumulation_steps: int = 4  # micro-batches an update, all ranks together
    block_size: int = 1024  # tokens a sequence (GPT-2)
    # --- model (defaults: GPT-2 124M) ---------------------------------------------------
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads a block
    n_embd: int = 768  # width
    dropout: float = 0.0  # probability; 0.1 in the GPT-2 paper's code
    bias: bool = False  # in linear layers and LayerNorms; GPT-2 has them
    positions: Literal[*POSITIONS] = 'learned'  # learned (GPT-2) or rotary (arXiv 2104.09864)
    attention: Literal[*ATTENTIONS] = 'mha'  # multi-head (GPT-2) or latent (arXiv 2405.04434)
    n_kv_head: int = 0  # mha: key and value heads (grouped-query, arXiv 2305.13245); 0: n_head
    latent_dim: int = 128  # mla: width of the two latents a token
    ra_alpha: float = 0.0  # weight of the reciprocal logits; 0: none
    ra_window: int = 64  # tokens back that they reach; 0: a token's own, -1: all
    ra_learned: bool = False  # a learned weight a head, which starts at ra_alpha
    loss_chunk_tokens: int = 8192  # tokens whose logits exist at the same time
    fp8: bool = False  # float8 products in MLP and head (arXiv 2209.05433); H100-class GPUs
    # --- optimizer (nanoGPT's GPT-2 values, after GPT-3, arXiv 2005.14165 appendix B) ----
    optimizer: Literal[*optim.OPTIMIZERS] = 'adamw'  # prune_score prunes under any of them
    learning_rate: float = 6e-4  # peak
    min_lr: float = 6e-5  # at the end of the decay
    lr_schedule: Literal[*optim.LR_SCHEDULES] = 'cosine'  # from the peak to min_lr
    warmup_iters: int = 2000  # updates of linear warm-up
    lr_decay_iters: int = 0  # update at which min_lr is reached; 0: max_iters
    max_iters: int = 50_000  # updates
    weight_decay: float = 0.1  # a unit of learning rate, on matrices only
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    grad_clip: float = 1.0  # global gradient norm; 0: no clipping
    # --- gradient spikes: optimizer=adamwspam ---------------------------------------------
    spam_mode: Literal[*optim.SPAM_MODES] = 'paper'  # arXiv 2501.06842; runs of 2025; 2502.17055
    spam_interval: int = 500  # updates between resets of the moments; 0: none
    spam_warmup: int = 150  # updates of held-back steps after a reset
    # --- pruning (defaults: from 30% to 95% of 50,000 updates) ----------------------------
    prune_score: Literal['none', *prune.SCORES] = 'none'  # what a weight is worth (prune.py)
    target_sparsity: float = 0.5  # share of the scope's weights that is pruned in the end
    prune_scope: Literal[*optim.PRUNE_SCOPES] = 'blocks'  # their matrices; with the tied embedding
    prune_allocation: Literal['global', 'layer'] = 'global'  # one threshold; each matrix alike
    prune_lr_power: float = 0.0  # learning rate of the pruned over density^this
    # 1: sparse muP, arXiv 2405.15743
    prune_schedule: Literal[*prune.SCHEDULES] = 'zhu_gupta'  # fast first (arXiv 1710.01878)
    prune_start: int = 15_000  # update at which the ramp begins
    prune_end: int = 47_500  # update at which it ends and the masks are frozen
    prune_interval: int = 100  # updates between masks
    prune_regrow: float = -1.0  # decay of pruned weights that may come back before prune_end
    # (SR-STE, arXiv 2102.04010); 0: plain straight-through; -1: pruned for good
    prune_pattern: Literal['unstructured', '2:4'] = 'unstructured'  # 2:4: two of four inputs
    # --- evaluation and logging -----------------------------------------------------------
    eval_interval: int = 500  # updates between evaluations
    eval_tokens: int = 1_048_576  # first tokens of the validation split; 0: all
    log_interval: int = 10  # updates between log lines, where the host waits for the device
    save_interval: int = 1000  # updates between last.pt checkpoints


@dataclass
class Progress:
    """What a run knows besides its tensors; saved in last.pt."""
    step: int = 0  # updates done
    seconds: float = 0.0  # of training, evaluation and saving, over all sessions
    rung: int = 0  # of the out-of-memory ladder
    val_loss: float = math.inf  # latest
    best_val_loss: float = math.inf
    average_loss: float = 0.0  # of the logged training losses, moving
    lowest_average: float = math.inf
    above_since: int = -1  # first step of the present stretch far above lowest_average; -1: none


@dataclass
class Run:
    """Everything the functions below share."""
    settings: Settings  # as asked; see active_settings
    machine: Any  # support.machine.Machine
    data: Any  # support.shards.Data
    model: GPT
    flats: list  # optim.Flat
    optimizer: torch.optim.Optimizer
    pruner: prune.Pruner | None
    progress: Progress
    bad_step: torch.Tensor  # 0-dim int64 on the device: first step without finite gradients or -1
    fused: bool  # whether small passes over all parameters are compiled: no faster on a CPU
    log: RunLog = None
    stop_signal: int = 0  # that came, 0: none; heeded after the step (SIGUSR1 only saves)
    saved_sparsity: dict = field(default_factory=dict)  # what a summary says, of last.pt
    start_step: int = 0  # where this session began
    began: float = 0.0  # monotonic time of the beginning, as if all sessions were one
    mark_step: int = 0  # of the last log line
    mark: float = field(default_factory=time.monotonic)  # its time and what pauses took since
    graphs: tuple = (0, 0)  # (compiled graphs, graph breaks) when last looked at
    speed: dict = field(  # the latest
        default_factory=lambda: dict.fromkeys(('tokens_per_second', 'milliseconds', 'mfu')))
    peaks: list = field(default_factory=list)  # of memory, up to each log line


# --- the loop -------------------------------------------------------------------------------------


def train(run):
    """From run.progress.step to max_iters; raises Stop if it must end before."""
    s, p = run.settings, run.progress
    while True:
        if p.step % s.eval_interval == 0 or p.step >= s.max_iters:
            evaluate_and_keep_best(run)
        if p.step >= s.max_iters:
            break
        loss, norm = one_step(run)
        if p.step % s.log_interval == 0 or p.step in (run.start_step + 1, s.max_iters):
            log_step(run, loss, norm)
        if p.step % s.save_interval == 0 and p.step < s.max_iters:
            save(run)
        guards.stop_if_signalled(run, ranks.highest(run, run.stop_signal), save)
    if not save(run):
        raise Stop('unsaved', 3, f'step {p.step}: done, but not saved; the last good checkpoint '
                                 'stays. Likely a learning rate too high')
    run.log.say(f'finished: validation loss {p.val_loss:.4f}, perplexity '
                f'{perplexity_of(p.val_loss):.2f}, in {clock(elapsed(run))}; {s.out_dir}')


def one_step(run):
    """One update: (loss, gradient norm) as tensors on the device, nothing waited for."""
    loss = within_memory(run, local_gradients)
    ranks.combine(run, [*(flat.grads for flat in run.flats), loss])  # sums, of each rank's shares
    norm = get_total_norm([flat.grads for flat in run.flats])
    is_first_bad = (run.bad_step < 0) & ~(norm.isfinite() & loss.isfinite())
    run.bad_step = torch.where(is_first_bad, run.progress.step, run.bad_step)  # for stop_if_bad
    limit = run.settings.grad_clip or math.inf
    clip = (limit / (norm + 1e-6)).clamp(max=1.0)  # as in torch's clip_grad_norm_
    optim.scale_gradients(run.flats, clip, run.bad_step < 0, run.fused)
    set_learning_rate(run)
    run.optimizer.step()
    if run.pruner:
        prune_weights(run)
    optim.refresh_working(run.flats)
    run.progress.step += 1
    return loss, norm


def prune_weights(run):
    """The pruner's part of an update. Refused: the optimizer does not keep what the score needs."""
    try:
        run.pruner.step()
    except ValueError as error:
        raise Refused(str(error)) from None


def masks_wait(run):
    """Whether no masks are chosen: SPAM's moments are young, or a NaN is about to end the run."""
    young = isinstance(run.optimizer, optim.AdamWSPAM) and run.optimizer.recovering()
    return young or run.bad_step.item() >= 0 or not guards.weights_are_finite(run)


def local_gradients(run):
    """This rank's share of the mean loss and its gradients: micro-batches rank, rank + world ..."""
    s, p = active_settings(run), run.progress
    total = torch.zeros((), device=run.machine.device)
    run.model.train()
    optim.clear(run.flats)
    for micro in range(run.machine.rank, s.gradient_accumulation_steps, run.machine.world):
        idx, targets = training_batch(run, micro)  # (B, T) each
        # Dropout is a function of (seed, step, micro-batch), so it needs no state to resume.
        number = 1 + p.step * s.gradient_accumulation_steps + micro
        torch.manual_seed(s.seed + 1_000_003 * number)
        loss = run.model(idx, targets) / s.gradient_accumulation_steps
        loss.backward()
        optim.accumulate(run.flats, run.fused)
        total += loss.detach()
    return total


def training_batch(run, micro):
    """Tokens (B, T) and their successors (B, T) of a micro-batch, a function of (seed, step)."""
    s = active_settings(run)
    stream = run.data.train
    first = run.progress.step * effective_batch(s) + micro * s.batch_size
    positions = range(first, first + s.batch_size)
    windows = window_order(positions, stream.windows(s.block_size), s.seed)
    return inputs_and_targets(run.machine.device, stream, windows, s.block_size)


def inputs_and_targets(device, stream, windows, T):
    """Numbers of B windows -> tokens (B, T) and their successors (B, T), int64 on the device."""
    tokens = torch.from_numpy(stream.read([w * T for w in windows], T + 1))  # (B, T + 1)
    if device.type == 'cuda':
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def learning_rate(s, step):
    """Learning rate of update `step`, counted from 0."""
    return optim.learning_rate_at(step, s.learning_rate, s.min_lr, s.warmup_iters,
                                  s.lr_decay_iters or s.max_iters, s.lr_schedule)


def set_learning_rate(run):
    rate = learning_rate(run.settings, run.progress.step)
    for group in run.optimizer.param_groups:
        group['lr'] = rate
        if run.pruner:
            group['lr'] *= run.pruner.rate_factor(group)


# --- evaluation -----------------------------------------------------------------------------------


def evaluate(run):
    """Mean loss over the first eval_tokens of the validation split: a 0-dim float64 tensor."""
    s = run.settings
    windows = s.eval_tokens // s.block_size or run.data.val.windows(s.block_size)
    return mean_loss(run, run.data.val, range(windows))


def losses_ahead(run):
    """Losses of the weights as they are, on the batches of the next few updates."""
    s, stream = run.settings, run.data.train
    for step in range(run.progress.step, run.progress.step + 4):
        batch = range(step * effective_batch(s), (step + 1) * effective_batch(s))
        windows = window_order(batch, stream.windows(s.block_size), s.seed)
        yield mean_loss(run, stream, windows).item()


def mean_loss(run, stream, windows):
    """Mean loss over these windows of a stream, divided among the ranks."""
    m = run.machine
    mine = windows[m.rank::m.world]
    total = within_memory(run, lambda run: local_loss(run, stream, mine))
    ranks.combine(run, [total])
    return total / len(windows)


@torch.no_grad()
def local_loss(run, stream, windows):
    """Sum of the losses of these windows; unscored rows fill up the last batch: one shape."""
    s = active_settings(run)
    total = torch.zeros((), dtype=torch.float64, device=run.machine.device)
    run.model.eval()
    for i in range(0, len(windows), s.batch_size):
        chosen = list(windows[i:i + s.batch_size])
        filled = chosen + [chosen[-1]] * (s.batch_size - len(chosen))
        idx, targets = inputs_and_targets(run.machine.device, stream, filled, s.block_size)
        targets[len(chosen):] = -1  # not scored
        total += run.model(idx, targets).double() * len(chosen)
    return total


def evaluate_and_keep_best(run):
    """Evaluate, record it, and keep the weights in best.pt if they are the best so far."""
    s, p = run.settings, run.progress
    with pause(run):
        run.data.check_unchanged()
        p.val_loss = evaluate(run).item()
        if not math.isfinite(p.val_loss):
            raise Stop('nan', 3, f'step {p.step}: the validation loss is {p.val_loss}; nothing of '
                                 'this step is saved. Likely a learning rate too high')
        perplexity = perplexity_of(p.val_loss)
        bits = None  # a byte of the text, where prepare.py has counted them
        if run.data.val_bytes:
            bits = bits_a_byte(p.val_loss * run.data.val.tokens, run.data.val_bytes)
        told = f'  {bits:.3f} bits a byte' if bits else ''
        run.log.say(f'step {p.step:>6}/{s.max_iters}  validation loss {p.val_loss:.4f}  '
                    f'perplexity {perplexity:.2f}{told}')
        run.log.measure(dict(step=p.step, val_loss=p.val_loss, val_ppl=perplexity,
                             val_bits_per_byte=bits, sparsity=sparsity(run)))
        half_pruned = run.pruner and not run.pruner.frozen  # a best of those is of no use
        if p.val_loss < p.best_val_loss and not half_pruned:
            p.best_val_loss = p.val_loss
            if p.step > 0 and run.log.write:
                save_best(run)


def save_best(run):
    """best.pt: float32 weights, or pruned ones as the model reads them, stored sparse."""
    weights = weights_of(run)
    if run.pruner:
        masks = {name: run.pruner.masks[p] for name, p in run.pruner.named.items()}
        weights = pack_weights(weights, masks, run.machine.dtype)
    path = os.path.join(run.settings.out_dir, 'best.pt')
    save_checkpoint(path, {**identity(run), 'weights': weights})


def weights_of(run):
    """{name: float32 master} of all parameters, 0 where pruned."""
    weights = {}
    for flat in run.flats:
        weights.update({name: p.detach() for name, p in flat.parameters.items()})
    return weights


def sparsity(run):
    """Share of the scope's weights that is pruned, known without asking the device."""
    return run.pruner.sparsity if run.pruner else 0.0


def perplexity_of(loss):
    return math.exp(loss) if loss < 700 else math.inf


@contextlib.contextmanager
def pause(run):
    """Time for what does not count in tokens_per_second. Stop: the run is bad, or ranks differ."""
    stop_if_bad(run)  # waits for the device
    start = time.monotonic()
    ranks.check_same_run(run)
    yield
    run.mark += time.monotonic() - start


# --- logging and guards, at log steps only --------------------------------------------------------


def log_step(run, loss, norm):
    """One line, one record; then everything that needs the device's numbers on the host."""
    s, p, m = run.settings, run.progress, run.machine
    loss = loss.item()
    stop_if_bad(run)
    now = time.monotonic()
    seconds = max(1e-9, now - run.mark) / (p.step - run.mark_step)  # a step; clocks may stand
    run.mark, run.mark_step = now, p.step
    rate = effective_batch(s) * s.block_size / seconds
    flops = rate * run.model.flops_per_token() / m.world
    mfu = flops / m.peak_flops if m.peak_flops else None
    run.speed = dict(tokens_per_second=rate, milliseconds=1e3 * seconds, mfu=mfu)
    run.peaks.append(peak_memory(m.device))
    memory = run.peaks[-1]
    lr = learning_rate(s, p.step - 1)
    run.log.measure(dict(
        step=p.step, tokens=p.step * effective_batch(s) * s.block_size, loss=loss,
        grad_norm=norm.item(), lr=lr, **run.speed,
        peak_memory_bytes=memory['allocated'], peak_reserved_bytes=memory['reserved'],
        sparsity=sparsity(run), spikes=spikes(run).get('spikes', 0), seconds=elapsed(run)))
    told = f'mfu {mfu:5.1%}  ' if mfu else ''
    run.log.say(f'step {p.step:>6}  loss {loss:7.4f}  norm {norm.item():5.2f}  lr {lr:.1e}  '
                f'{1e3 * seconds:6.1f} ms {rate / 1e3:6.1f}k tok/s  {told}'
                f'{memory["allocated"] / 2**30:4.1f} GiB  '
                f'eta {clock(seconds * (s.max_iters - p.step))}')
    guards.report_graphs(run)
    if p.step % s.log_interval == 0 or p.step == 1:  # wherever a run is split into sessions
        guards.guard_against_divergence(run, loss)


def elapsed(run):
    return time.monotonic() - run.began


def spikes(run):
    """{'spikes', 'clipped', 'resets'} so far, of an optimizer that counts them."""
    return run.optimizer.counters() if isinstance(run.optimizer, optim.AdamWSPAM) else {}


# --- saving ---------------------------------------------------------------------------------------


def identity(run):
    """What a checkpoint says of where it is from. `model` is all that reading it needs."""
    return dict(
        format=FORMAT,
        model=asdict(run.model.config),
        settings=asdict(run.settings),
        data=run.data.describe(),
        fingerprint=run.data.fingerprint,
        step=run.progress.step,
        val_loss=run.progress.val_loss,
    )


def save(run):
    """Everything needed to continue, to last.pt. False, and nothing, while the loss is too high."""
    with pause(run):
        limit = guards.highest_loss(run)
        if not any(loss < limit for loss in losses_ahead(run)):
            run.log.say(f'WARNING: step {run.progress.step} is not saved, its loss is above '
                        f'{limit:.3f}, which is too high')
            return False
        if run.log.write:
            run.log.sync()
            save_checkpoint(os.path.join(run.settings.out_dir, 'last.pt'), {
                **identity(run),
                'progress': asdict(replace(run.progress, seconds=elapsed(run))),
                'weights': weights_of(run),
                'optimizer': run.optimizer.state_dict(),
                'pruner': run.pruner.state_dict() if run.pruner else None,
            }, keep='previous.pt')
            run.saved_sparsity = sparsities(run)
    return True


def sparsities(run):
    """{name: value} of what the summary says of pruning."""
    if not run.pruner:
        return dict(sparsity=0.0, sparsity_all=0.0, sparsity_by_layer={})
    share = run.pruner.pruned / run.model.parameter_count()
    return dict(sparsity=run.pruner.sparsity, sparsity_all=share,
                sparsity_by_layer=run.pruner.sparsity_by_name())


def write_summary(run, reason):
    """summary.json, whatever way the run ended."""
    s, p = run.settings, run.progress
    if run.log.write:
        counted = {} if reason in ('error', ranks.LOST) else spikes(run)  # a GPU may not answer
        write_json(os.path.join(s.out_dir, 'summary.json'), dict(
            steps=p.step, tokens=p.step * effective_batch(s) * s.block_size,
            val_loss=p.val_loss, val_ppl=perplexity_of(p.val_loss),
            best_val_loss=p.best_val_loss, **run.saved_sparsity,
            **run.speed, **memory_figures([*run.peaks, peak_memory(run.machine.device)]),
            compiled_graphs=run.graphs[0], graph_breaks=run.graphs[1],
            rung=p.rung, rung_label=f'micro-batches of {active_settings(run).batch_size}',
            effective_batch=effective_batch(s), parameters=run.model.parameter_count(),
            dataset=run.data.name, fingerprint=run.data.fingerprint, seconds=elapsed(run),
            exit_reason=reason, **counted))


# --- from settings to a run -----------------------------------------------------------------------


def build_optimizer(s, flats):
    """(optimizer, pruner or None) over flattened parameters. ValueError: what they refuse."""
    groups = optim.parameter_groups(flats, s.weight_decay, s.prune_scope)
    optimizer = optim.OPTIMIZERS[s.optimizer](groups, s)
    if s.prune_score == 'none':
        return optimizer, None
    pruner = prune.Pruner(
        optimizer, score=s.prune_score, target_sparsity=s.target_sparsity, start=s.prune_start,
        end=s.prune_end, interval=s.prune_interval, schedule=s.prune_schedule,
        regrow=s.prune_regrow >= 0, srste=max(0.0, s.prune_regrow), pattern=s.prune_pattern,
        allocation=s.prune_allocation, lr_power=s.prune_lr_power,
        allow_extra_memory=True)  # the preflight table says what bitter10 takes
    return optimizer, pruner


def problems_when_built(s, data):
    """What building everything without memory finds, and whether the disk has room for it."""
    try:
        with torch.device('meta'):
            model = GPT(model_config(s, data.vocab_size))
            build_optimizer(s, optim.flatten(model, torch.float32))
    except (ValueError, RuntimeError) as error:  # RuntimeError: sizes beyond all bounds
        return [str(error)]
    # last.pt three times, for previous.pt and while it is written; best.pt twice
    return preflight.check_out_dir(s, model.parameter_count() * 4 * (3 * 3 + 2))


def read_settings(argv):
    """(settings, machine, data) of a command line, or Refused with every problem at once."""
    s, problems, typed = parse(Settings, argv)
    problems += check(s, typed)
    machine, more = find_machine(s.device, s.dtype)
    problems += more + preflight.check_machine(s, machine)
    data, more = preflight.find_data(s)
    problems += more + pretrained_problems(s, data) + preflight.check_out_dir(s)
    problems = problems or problems_when_built(s, data)
    if problems and not argv:
        problems.append('no arguments mean GPT-2 124M on FineWeb-Edu; `make quickstart` needs no '
                        'download, config/ has presets, python train.py --help lists the settings')
    if problems:
        raise Refused(problems)
    return s, machine, data


def prepare_run(s, machine, data):
    """A Run ready to train, of what read_settings found. Refused: impossible; Stop: finished."""
    if problems := preflight.check_out_dir(s):  # again, because now it is locked
        raise Refused(problems)
    ranks.check_restart(s.out_dir)
    saved = preflight.checkpoint_to_resume(s, data)
    if s.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS repeats itself with it
    if machine.device.type == 'cuda':
        torch.cuda.set_device(machine.device)
    ranks.join(machine)
    return build(s, machine, data, saved)


def build(s, machine, data, saved):
    """A Run, its weights from the seed, from a GPT-2 or from the checkpoint `saved`."""
    torch.use_deterministic_algorithms(s.deterministic)
    torch.manual_seed(s.seed)
    model = GPT(model_config(s, data.vocab_size))  # on the CPU: the same weights for every device
    try:
        model.load_state_dict(saved['weights'] if saved else starting_weights(s, model))
    except RuntimeError as error:  # an edited model.py; the error names what differs
        raise Refused(f'init_from={s.init_from!r}: the weights are not those of this model.py; '
                      f'{" ".join(str(error).split())}') from None
    flats = optim.flatten(model.to(machine.device), machine.dtype)
    optimizer, pruner = build_optimizer(s, flats)
    progress = Progress()
    if saved:
        vars(progress).update(saved['progress'])  # a copied train.py may have saved more
        optimizer.load_state_dict(saved['optimizer'])
        if pruner:
            pruner.load_state_dict(saved['pruner'])
        if saved['settings']['batch_size'] != s.batch_size:
            progress.rung = 0  # it counts on the old ladder
    run = Run(s, machine, data, model, flats, optimizer, pruner, progress,
              bad_step=torch.tensor(-1, device=machine.device),
              fused=s.compile and machine.device.type == 'cuda',
              start_step=progress.step, mark_step=progress.step,
              began=time.monotonic() - progress.seconds)
    ranks.check_same_run(run)  # before anything is written
    first = machine.rank == 0
    run.log = RunLog(s.out_dir, s.tracker, asdict(s), progress.step if saved else None,
                     write=first and not s.dry_run, speak=first)
    for note in saved['notes'] if saved else []:
        run.log.say(f'note: {note}')
    if pruner:
        pruner.hold = lambda: masks_wait(run)
    run.saved_sparsity = sparsities(run)
    set_up_model(run)
    return run


def main(argv):
    """Train as told by the command line; returns the exit code."""
    if '--help' in arguments(Settings, argv):
        print(help_text(Settings, __doc__))
        return 0
    s, machine, data = read_settings(argv)
    with preflight.out_dir_locked(s, machine):
        try:
            run = prepare_run(s, machine, data)
        except Stop as stop:
            if machine.rank == 0:
                print(stop)
            return stop.code
        preflight.announce(run, argv)
        return 0 if s.dry_run else finish(run)


def finish(run):
    """Train to the end, whichever it is, and write the summary; returns the exit code."""
    reason, code = 'error', 1
    try:
        with guards.signals_noted(run):
            train(run)
        reason, code = 'finished', 0
    except Stop as stop:
        reason, code = stop.reason, stop.code
        run.log.say(str(stop))
    except Refused as refused:
        reason = 'refused'
        run.log.say('stopped: ' + '; '.join(refused.problems))
        raise
    finally:
        try:
            write_summary(run, reason)
        except OSError as error:  # a full disk; how the run ended is the greater news
            run.log.say(f'WARNING: {error}; no summary tells how this run ended')
            code = code or 1
        run.log.close()
    ranks.part(run, reason, code)
    return code


if __name__ == '__main__':
    run_command(main)
