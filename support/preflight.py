"""Before the first step: what machine, data and run directory make impossible, and a table."""
import contextlib
import os
import pathlib
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import torch

from kernels import float8
from model import attention_backend
from support.checks import idle_settings, without_effect
from support.files import locked, remove, write_json
from support.guards import Stop
from support.rundir import exit_reason, load_checkpoint, provenance, share_of_zeros, size
from support.settings import Refused, changed, parse, separate
from support.shards import open_data

# A resumed run may change these; everything else is what makes it the same run.
FREE_ON_RESUME = set('''out_dir init_from dry_run device compile tracker data_dir batch_size
    gradient_accumulation_steps loss_chunk_tokens activation_budget lr_decay_iters max_iters
    eval_interval eval_tokens log_interval save_interval deterministic'''.split())
CHECKPOINTS = ('last.pt', 'previous.pt')  # that a run continues from, the newest first
CONTINUE = ('resume', 'auto')  # the init_from that do


def effective_batch(s):
    """Sequences an update, whatever the number of GPUs."""
    return s.batch_size * s.gradient_accumulation_steps


# --- problems -------------------------------------------------------------------------------------


def check_machine(s, machine):
    """Problems of the settings with the machine."""
    problems = []
    if s.gradient_accumulation_steps % machine.world:
        problems.append(
            f'gradient_accumulation_steps={s.gradient_accumulation_steps}: counts those of all '
            f'ranks, so it must be a multiple of the {machine.world} processes')
    nvidia = machine.device.type == 'cuda' and torch.version.cuda and float8.triton
    if s.fp8 and not (nvidia and torch.cuda.get_device_capability(machine.device) >= (9, 0)):
        problems.append('fp8=True: needs an NVIDIA GPU with CUDA and Triton, of compute capability '
                        f'9.0 (H100) or more, unlike {machine.name}; leave it out')
    elif s.fp8 and machine.dtype != torch.bfloat16:
        problems.append(f'fp8=True: its products end in bfloat16, dtype is {machine.dtype}; '
                        'set --dtype=bfloat16')
    return problems


def find_data(s):
    """(Data or None, problems) of the data set that the settings name."""
    try:
        data = open_data(s.data_dir, s.dataset)
    except Refused as refused:
        return None, refused.problems
    problems = [f'block_size={s.block_size}: the {stream.split} split of {data.name} has '
                f'{stream.tokens} tokens, too few for one sequence of {s.block_size} + 1; set a '
                'smaller one, or prepare more text, with a larger --val_fraction'
                for stream in (data.train, data.val) if stream.tokens <= s.block_size]
    if s.eval_tokens >= data.val.tokens:
        problems.append(
            f'eval_tokens={s.eval_tokens}: the validation split has {data.val.tokens} tokens, the '
            'last of which has nothing to predict; 0 scores all the others')
    return data, problems


def check_out_dir(s, bytes_needed=0):
    """Problems of the run directory: another run in it, no right to write, no room on the disk."""
    problems = []
    folder = pathlib.Path(s.out_dir).absolute()
    files = [folder / name for name in (*CHECKPOINTS, 'best.pt', 'summary.json')]
    there = list(filter(os.path.exists, files))
    if there and s.init_from not in CONTINUE:
        problems.append(f"out_dir='{s.out_dir}' holds another run; --init_from=auto continues it, "
                        'or begins it again if it has no checkpoint; or choose another --out_dir')
    if s.init_from == 'resume' and not any(map(os.path.exists, files[:2])):
        problems.append(f"init_from='resume': no checkpoint {s.out_dir}/last.pt; check the folder, "
                        'or start with --init_from=auto')
    parent = next(filter(os.path.exists, [folder, *folder.parents]))
    if not (os.path.isdir(parent) and os.access(parent, os.W_OK)):
        problems.append(f"out_dir='{s.out_dir}': {parent} is no folder that may be written to; "
                        'choose another --out_dir')
    free = shutil.disk_usage(parent).free + sum(map(os.path.getsize, there))  # which make way
    if free < bytes_needed:
        problems.append(f"out_dir='{s.out_dir}': the checkpoints need {size(bytes_needed)}, the "
                        f'disk has {size(free)} left; free some or choose another --out_dir')
    return problems


def out_dir_locked(s, machine):
    """A context in which no other run works in out_dir; the first rank answers for all."""
    if machine.rank > 0 or s.dry_run:
        return contextlib.nullcontext()
    return locked(s.out_dir, f"out_dir='{s.out_dir}': another process trains there; wait for it, "
                             'or choose another --out_dir')


def newest_checkpoint(last, previous):
    """(content, []) of last.pt or, if it is damaged or missing, (that of previous.pt, [a note])."""
    try:
        return load_checkpoint(last), []
    except Refused as refused:
        if not os.path.exists(previous):
            raise
        saved = load_checkpoint(previous)
        reason = str(refused).split(';')[0]
        return saved, [f'{reason}; continuing from {previous}, step {saved["step"]}']


def checkpoint_to_resume(s, data):
    """What a run is to be continued from, and `notes` on it; None if it begins. Refused: it is
    another run, or has done more than is asked for; Stop: it is finished."""
    last, previous = (os.path.join(s.out_dir, name) for name in CHECKPOINTS)
    if s.init_from not in CONTINUE or not (os.path.exists(last) or os.path.exists(previous)):
        return None
    saved, notes = newest_checkpoint(last, previous)
    if 'progress' not in saved:
        raise Refused(f'{last} holds weights only, like a best.pt: not enough to resume from; '
                      'restore the last.pt of this run')
    settings = {**vars(type(s)()), **saved['settings']}  # a setting newer than the run: its default
    then = fixed_on_resume(settings, saved['fingerprint'])
    now = fixed_on_resume(vars(s), data.fingerprint)
    idle = idle_settings(s).keys() & idle_settings(SimpleNamespace(**settings)).keys()
    problems = [
        f'{key}={value!r}: the run in {s.out_dir} has {key}={then[key]!r}; keep it, or start '
        'another run with another --out_dir'
        for key, value in now.items() if value != then[key] and key not in idle
    ]
    if saved['step'] > s.max_iters:
        problems.append(f'max_iters={s.max_iters}: the run in {s.out_dir} has done {saved["step"]} '
                        'updates; ask for as many, or start another run with another --out_dir')
    if problems:
        raise Refused(problems)
    if saved['step'] == s.max_iters and exit_reason(s.out_dir) == 'finished':
        raise Stop('finished', 0, f'{s.out_dir} holds this run, finished; nothing to do')
    if notes and not s.dry_run:
        with contextlib.suppress(FileNotFoundError):
            os.replace(last, f'{last}.damaged')  # lest it become the next previous.pt
    if unknown := sorted(then.keys() - now.keys()):
        notes.append(f'the run has settings that this version does not know: {", ".join(unknown)}')
    return {**saved, 'notes': notes}


def fixed_on_resume(settings, fingerprint):
    """{name: value} of what makes a run the same run."""
    return {
        **{key: value for key, value in settings.items() if key not in FREE_ON_RESUME},
        'batch_size x gradient_accumulation_steps':
            settings['batch_size'] * settings['gradient_accumulation_steps'],
        'lr_decay_iters (0: max_iters)': settings['lr_decay_iters'] or settings['max_iters'],
        'fingerprint of the data': fingerprint,
    }


# --- the table ------------------------------------------------------------------------------------


def announce(run, argv=()):
    """Say the preflight table, with what differs from the presets in `argv`; write config.json."""
    s, m = run.settings, run.machine
    notes = [f'{key}={getattr(s, key)!r} has no effect: it acts only with {needs}'
             for key, needs in without_effect(s).items()]
    if s.prune_score == 'bitter10':
        notes.append('bitter10 keeps three more float32 numbers a prunable weight')
    begins_dense = s.init_from not in CONTINUE and s.prune_score != 'zeros'
    if begins_dense and (zeros := share_of_zeros(run.model.state_dict())) > 0.01:
        notes.append(f'{zeros:.1%} of the matrices in the blocks is 0 at the start, and is '
                     'trained; --prune_score=zeros keeps it 0')
    presets, _ = separate(type(s), argv)
    preset = parse(type(s), presets)[0]
    for key, value in vars(preset).items():
        if presets and value != getattr(s, key) and key != 'dry_run':
            notes.append(f'{key}={getattr(s, key)!r}, {presets[-1]} has {value!r}')
    lines = [f'  {name:<18s} {text}' for name, text in rows_of(run).items()]
    lines += [f'  note: {note}' for note in notes]
    run.log.say('\n'.join(['preflight', *lines]))
    if run.log.write:
        remove(os.path.join(s.out_dir, 'summary.json'))  # how an earlier session ended
        write_json(os.path.join(s.out_dir, 'config.json'), dict(
            settings=asdict(s), model=asdict(run.model.config), fingerprint=run.data.fingerprint,
            data=run.data.describe(), device=m.name, dtype=str(m.dtype).split('.')[-1],
            processes=m.world, **provenance()))


def rows_of(run):
    """{name: text} of the table."""
    s, m, data = run.settings, run.machine, run.data
    tokens = effective_batch(s) * s.block_size  # a step
    ranks = f' on {m.world} processes' if m.world > 1 else ''
    epochs = s.max_iters * effective_batch(s) / data.train.windows(s.block_size)
    limit = '; repeated text teaches little beyond 4 (arXiv 2305.16264)' if epochs > 4 else ''
    peak = f'{m.peak_flops / 1e12:.0f} TFLOP/s peak' if m.peak_flops else 'peak unknown, no MFU'
    in_float8 = '; training multiplies in float8 in MLP and head' if s.fp8 else ''
    kernel = attention_backend(run.model.config, m.device, m.dtype)
    if kernel == 'math' and m.device.type == 'cuda':
        hint = 'try bfloat16, another head width'
        if torch.version.hip and not os.environ.get('TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL'):
            hint = 'set TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1'
        kernel = f'math: UNFUSED, slow and O(block_size^2) memory; {hint}'
    pruning = 'none'
    if s.prune_score == 'zeros':
        pruning = (f'what is 0 of the {run.pruner.scope_size:,} weights of {s.prune_scope} stays 0:'
                   f' {share_of_zeros(run.model.state_dict()):.1%} of the matrices in the blocks')
    elif run.pruner:
        factor = (1 - s.target_sparsity) ** -s.prune_lr_power
        pruning = (f'{s.target_sparsity:.1%} of the {run.pruner.scope_size:,} weights of '
                   f'{s.prune_scope} by {s.prune_score}, between step {s.prune_start} and '
                   f'{s.prune_end}; their learning rate x {factor:.3g} in the end')
    weights = 20 * run.model.parameter_count()  # bytes, in float32 as in bfloat16
    logits = min(s.loss_chunk_tokens, s.batch_size * s.block_size) * m.dtype.itemsize
    logits *= run.model.config.padded_vocab_size
    start = f', continued from step {run.start_step}' if run.start_step else ''
    return {
        'settings': ' '.join(f'{key}={value!r}' for key, value in changed(s).items()),
        'data': f'{data.name}, {data.tokenizer}, {data.vocab_size} tokens, '
                f'fingerprint {data.fingerprint}',
        'effective batch': f'{s.batch_size} sequences x {s.gradient_accumulation_steps} '
                           f'micro-batches = {effective_batch(s)} sequences{ranks}',
        'tokens': f'{tokens:,} a step x {s.max_iters:,} = {tokens * s.max_iters:,} = '
                  f'{epochs:.3g} epochs of {data.train.tokens:,}{limit}',
        'device': f'{m.name}, {peak}, {str(m.dtype).split(".")[-1]}{in_float8}',
        'model': f'{run.model.parameter_count():,} parameters, {s.attention} attention, '
                 f'{s.positions} positions; {kernel}',
        'optimizer': f'{type(run.optimizer).__name__}, {s.warmup_iters} warm-up, '
                     f'{s.learning_rate:g} -> {s.min_lr:g} at {s.lr_decay_iters or s.max_iters} '
                     f'({s.lr_schedule})',
        'memory, counted': f'{size(weights)} for weights, gradients and moments, '
                           f'{size(logits)} for logits; activations come on top',
        'pruning': pruning,
        'run directory': s.out_dir + start,
    }
