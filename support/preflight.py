"""Before the first step: what the machine, the data and the run directory make impossible.

And one table of what will happen. What the settings alone make impossible is in checks.py.
"""
import os
import shutil
from dataclasses import asdict

import torch

from kernels import float8
from model import attention_backend
from support.checks import is_reciprocal, without_effect
from support.files import read_json, write_json
from support.rundir import load_checkpoint, provenance, size
from support.settings import Refused
from support.shards import open_data

# A resumed run may change these; everything else is what makes it the same run.
FREE_ON_RESUME = set('''out_dir init_from device compile tracker data_dir batch_size
    gradient_accumulation_steps loss_chunk_tokens activation_budget lr_decay_iters max_iters
    eval_interval eval_tokens log_interval save_interval deterministic'''.split())


def effective_batch(s):
    """Sequences an update, whatever the number of GPUs."""
    return s.batch_size * s.gradient_accumulation_steps


def starts_anew(s):
    """True if no run is to be continued: weights from the seed, or those of --init_from=hf:PATH."""
    return s.init_from not in ('resume', 'auto')


# --- problems -------------------------------------------------------------------------------------


def check_machine(s, machine):
    """Problems of the settings with the machine."""
    problems = []
    if s.gradient_accumulation_steps % machine.world:
        problems.append(
            f'gradient_accumulation_steps={s.gradient_accumulation_steps}: counts the '
            'micro-batches of all ranks, so it must be a multiple of the '
            f'{machine.world} processes')
    if not s.fp8:
        return problems
    if machine.device.type != 'cuda' or not torch.version.cuda or not float8.triton:
        problems.append(f'fp8=True: needs an NVIDIA GPU with CUDA and Triton, this is '
                        f'{machine.name}; leave it out')
        return problems
    capability = torch.cuda.get_device_capability(machine.device)
    if capability < (9, 0):
        told = '.'.join(map(str, capability))
        problems.append(f'fp8=True: needs compute capability 9.0 (H100) or more, {machine.name} '
                        f'has {told}; leave it out')
    if machine.dtype != torch.bfloat16:
        problems.append(f'fp8=True: its products end in bfloat16, dtype is {machine.dtype}; '
                        'set --dtype=bfloat16')
    return problems


def data_folder(s):
    return s.data_dir or os.path.join('data', s.dataset)


def find_data(s):
    """(Data or None, problems) of the data set that the settings name."""
    try:
        data = open_data(data_folder(s), s.dataset)
    except Refused as refused:
        return None, refused.problems
    problems = []
    for stream in (data.train, data.val):
        if s.block_size >= 1 > stream.windows(s.block_size):
            problems.append(
                f'block_size={s.block_size}: the {stream.split} split of {data.name} has '
                f'{stream.tokens} tokens, too few for one sequence of {s.block_size} + 1')
    if s.eval_tokens >= data.val.tokens:
        problems.append(
            f'eval_tokens={s.eval_tokens}: the validation split has {data.val.tokens} tokens, the '
            'last of which has nothing to predict; 0 scores all the others')
    return data, problems


def check_out_dir(s, bytes_needed):
    """Problems of the run directory: another run in it, nothing to resume, no room on the disk."""
    problems = []
    there = [f for f in ('last.pt', 'best.pt', 'summary.json')
             if os.path.exists(os.path.join(s.out_dir, f))]
    if starts_anew(s) and there:
        problems.append(f"out_dir='{s.out_dir}' holds another run; continue it with "
                        '--init_from=resume or choose another --out_dir')
    if s.init_from == 'resume' and 'last.pt' not in there:
        problems.append(f"init_from='resume': there is no last.pt in {s.out_dir}; check out_dir or "
                        'use --init_from=scratch')
    parent = os.path.abspath(s.out_dir)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        return problems + [f"out_dir='{s.out_dir}': {parent} is a file; choose another --out_dir"]
    if not os.access(parent, os.W_OK):
        problems.append(f"out_dir='{s.out_dir}': {parent} is not writable; choose another "
                        '--out_dir')
    free = shutil.disk_usage(parent).free
    if free < bytes_needed:
        problems.append(f"out_dir='{s.out_dir}': the checkpoints need {size(bytes_needed)}, the "
                        f'disk has {size(free)} left; free some or choose another --out_dir')
    return problems


def is_finished(s):
    """True if out_dir already holds this run with all its updates done."""
    summary = read_json(os.path.join(s.out_dir, 'summary.json'))
    if not summary:
        return False
    return summary['exit_reason'] == 'finished' and summary['steps'] >= s.max_iters


def checkpoint_to_resume(s, data):
    """The content of last.pt if the run is to be continued, else None; Refused if it is another."""
    path = os.path.join(s.out_dir, 'last.pt')
    if starts_anew(s) or (s.init_from == 'auto' and not os.path.exists(path)):
        return None
    saved = load_checkpoint(path)
    if 'progress' not in saved:
        raise Refused(f'{path} holds weights only, like a best.pt: not enough to resume from; '
                      'restore the last.pt of this run')
    unknown = sorted(set(saved['settings']) - set(vars(s)))
    if unknown:
        print(f'note: {path} has settings that this version does not know: {", ".join(unknown)}')
    defaults = vars(type(s)())
    before = {**defaults, **saved['settings']}  # a setting newer than the run had its default
    now = {key: value for key, value in vars(s).items() if key not in FREE_ON_RESUME}
    then = {key: before[key] for key in now}
    for values, settings in ((now, vars(s)), (then, before)):
        batch = settings['batch_size'] * settings['gradient_accumulation_steps']
        values['batch_size x gradient_accumulation_steps'] = batch
        decay_iters = settings['lr_decay_iters'] or settings['max_iters']
        values['lr_decay_iters (0: max_iters)'] = decay_iters
    problems = [
        f'{key}={now[key]!r}: the run in {s.out_dir} has {key}={then[key]!r}; keep it, or start '
        'another run with another --out_dir'
        for key in now if now[key] != then[key]
    ]
    if saved['fingerprint'] != data.fingerprint:
        problems.append(
            f'data in {data_folder(s)} changed: fingerprint {data.fingerprint}, the run in '
            f"{s.out_dir} was trained on {saved['fingerprint']}; restore that data, or start "
            'another run with another --out_dir')
    if problems:
        raise Refused(problems)
    return saved


# --- the table ------------------------------------------------------------------------------------


def announce(run):
    """Say the preflight table and write config.json."""
    s, m = run.settings, run.machine
    notes = [('note', note) for note in notes_on(run)]
    lines = [f'  {name:<18s} {text}' for name, text in [*rows_of(run).items(), *notes]]
    run.log.say('\n'.join(['preflight', *lines]))
    if run.log.write:
        write_json(os.path.join(s.out_dir, 'config.json'), dict(
            settings=asdict(s), model=asdict(run.model.config), fingerprint=run.data.fingerprint,
            data=run.data.describe(), device=m.name, dtype=str(m.dtype).split('.')[-1],
            processes=m.world, **provenance()))


def epochs_of(run):
    s = run.settings
    windows = run.data.train.windows(s.block_size)
    return s.max_iters * effective_batch(s) / windows


def rows_of(run):
    """{name: text} of the table."""
    s, m, data = run.settings, run.machine, run.data
    tokens_a_step = effective_batch(s) * s.block_size
    ranks = f', on {m.world} processes' if m.world > 1 else ''
    peak = 'peak unknown, no MFU'
    if m.peak_flops:
        peak = f'{m.peak_flops / 1e12:.0f} TFLOP/s peak in bfloat16'
    float8_note = '; training multiplies in float8 in MLP and head' if s.fp8 else ''
    origin = f'; they start from {s.init_from}' if s.init_from.startswith('hf:') else ''
    pruned = ', pruned by a Pruner' if run.pruner else ''
    start = f', continued from step {run.start_step}' if run.start_step else ''
    memory = counted_memory(run)
    parts = ', '.join(f'{part} {size(n)}' for part, n in memory.items() if n)
    return {
        'effective batch': f'{s.batch_size} sequences x {s.gradient_accumulation_steps} '
                           f'micro-batches = {effective_batch(s)} sequences{ranks}',
        'tokens a step': f'{effective_batch(s)} x {s.block_size} = {tokens_a_step:,}',
        'tokens of the run': f'{s.max_iters:,} steps = {s.max_iters * tokens_a_step:,} = '
                             f'{epochs_of(run):.3g} epochs of {data.train.tokens:,}',
        'data': f'{data.name}, {data.tokenizer}, {data.vocab_size} tokens, '
                f'fingerprint {data.fingerprint}',
        'evaluation': f'{s.eval_tokens or data.val.tokens:,} of {data.val.tokens:,} tokens every '
                      f'{s.eval_interval} steps',
        'device': f'{m.name}, {peak}',
        'numbers': f'{str(m.dtype).split(".")[-1]} at work, float32 masters, moments and '
                   f'gradients{float8_note}',
        'compile': 'yes, proven after the first steps' if s.compile else 'no',
        'attention': attention_row(s, m, run.model.config),
        'memory, counted': f'{size(sum(memory.values()))} and activations: {parts}',
        'parameters': f'{run.model.parameter_count():,}{origin}',
        'optimizer': f'{type(run.optimizer).__name__}{pruned}',
        'pruning': pruning_row(s, run.pruner.scope_size) if run.pruner else 'none',
        'learning rate': f'{s.warmup_iters} warm-up, {s.learning_rate:g} -> {s.min_lr:g} at '
                         f'{s.lr_decay_iters or s.max_iters} ({s.lr_schedule})',
        'run directory': s.out_dir + start,
    }


def counted_memory(run):
    """{part: bytes} on one device, of what can be counted: activations are not."""
    s = run.settings
    parameters = run.model.parameter_count()
    element = run.machine.dtype.itemsize
    tokens = min(s.loss_chunk_tokens, s.batch_size * s.block_size)
    return {
        'working weights': parameters * element if element < 4 else 0,
        'master weights': parameters * 4,
        'moments': parameters * 8,
        'gradients': parameters * (4 + element),
        'logits': tokens * run.model.config.padded_vocab_size * element,
    }


def attention_row(s, machine, config):
    """What attention is, and the name of the kernels that run it."""
    parts = [f'{s.positions} positions']
    if s.attention == 'mla':
        parts.append(f'latent, 2 x {s.latent_dim} wide')
    elif s.n_kv_head:
        parts.append(f'{s.n_kv_head} key and value heads')
    if is_reciprocal(s):
        weight = 'learned from' if s.ra_learned else 'times'
        parts.append(f'reciprocal over ra_window={s.ra_window}, {weight} {s.ra_alpha:g}')
    kernel = attention_backend(config, s.batch_size, machine.device, machine.dtype)
    if kernel == 'math' and machine.device.type == 'cuda':
        kernel = 'math: UNFUSED, slow and O(block_size^2) memory; try bfloat16, another head width'
    return '; '.join([*parts, kernel])


def pruning_row(s, scope_size):
    """What pruning will do and when. scope_size: prunable weights."""
    when = f'{s.prune_schedule} from step {s.prune_start} to {s.prune_end} every {s.prune_interval}'
    if s.prune_pattern == '2:4':
        when = f'2:4 from step {s.prune_start}'
    good = 'for good' if s.prune_regrow < 0 else 'regrowing until prune_end'
    factor = (1 - s.target_sparsity) ** -s.prune_lr_power
    return (f'{s.target_sparsity:.1%} of the {scope_size:,} weights of {s.prune_scope} by '
            f'{s.prune_score} ({s.prune_allocation}), {when}, {good}; their learning rate x '
            f'{factor:.3g} in the end')


def notes_on(run):
    """What is allowed but has no effect, is costly or risky."""
    s, machine, epochs = run.settings, run.machine, epochs_of(run)
    for key, needs, _ in without_effect(s):
        yield f'{key}={getattr(s, key)!r} has no effect: it acts only with {needs}'
    if machine.device.type == 'cuda' and machine.dtype == torch.float32:
        yield 'float32 on a GPU: several times slower than bfloat16'
    if machine.device.type == 'cuda' and not s.compile:
        yield 'not compiled: slower and more memory'
    if epochs > 4:
        yield (f'{epochs:.1f} epochs: beyond about 4, repeated text teaches little '
               '(arXiv 2305.16264)')
    if s.prune_score == 'bitter10':
        yield 'bitter10 keeps three more float32 numbers a prunable weight'
    if s.ra_alpha != 0 and not s.ra_learned:
        yield (f'ra_alpha={s.ra_alpha:g} for good: 0.5 cost 6.6% in perplexity '
               '(docs/RESULTS.md); --ra_learned=True lets each head find its own')
    if s.grad_clip == 0:
        yield 'grad_clip=0: one bad batch can end the run'
