"""Preflight: everything that can be known to go wrong before the first step, and one table of what will happen."""
import os
import re
import shutil
from typing import NamedTuple

import torch

import fp8
import prune
from attention import attention_backend, is_reciprocal
from export import problems_of, read_gpt2
from files import read_json
from flat import flatten
from memory import predicted_memory, size
from model import GPT, model_config
from optim import build_optimizer
from rundir import load_checkpoint
from settings import Refused, Settings
from shards import VOCABULARY, open_data

# Dense bfloat16 FLOP/s by a part of the device's name, from the vendors' data sheets; the first match counts.
PEAK_FLOPS = {
    'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'GH200': 989e12, 'A100': 312e12, 'L40S': 362e12,
    'L40': 181e12, 'L4': 121e12, 'A10G': 70e12, 'RTX 5090': 210e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12, 'MI355X': 2500e12,
    'MI325X': 1307e12, 'MI300X': 1307e12, 'MI250': 181e12, 'W7900': 123e12, '7900 XTX': 123e12}

# A resumed run may change these; everything else is what makes it the same run.
FREE_ON_RESUME = set('''out_dir init_from device compile oom allow_math_attention tracker data_dir batch_size
    gradient_accumulation_steps loss_chunk_tokens activation_budget lr_decay_iters max_iters eval_interval eval_tokens log_interval
    save_interval diverge_nats diverge_steps deterministic'''.split())


class Machine(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of the matrices at work
    rank: int
    world: int  # processes; torchrun sets rank and world
    name: str
    peak_flops: float | None


def find_machine(asked, dtype):
    """(Machine, problems) for the settings device and dtype; ranks come from torchrun's environment."""
    problems, gpu = [], torch.cuda.is_available()
    if not re.fullmatch(r'auto|cpu|cuda(:\d+)?', asked):
        problems, asked = [f'device={asked!r}: must be auto, cpu, cuda or cuda:N'], 'cpu'
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    kind = ('cuda' if gpu else 'cpu') if asked == 'auto' else asked
    if kind.startswith('cuda') and not gpu:
        problems.append(f"device='{asked}': this PyTorch ({torch.__version__}) sees no GPU; use --device=cpu or install "
                        'a build for your GPU (CUDA or ROCm)')
        kind = 'cpu'
    if kind == 'cuda':
        kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if kind.startswith('cuda:') and int(kind[5:]) >= torch.cuda.device_count():
        problems.append(f"device='{kind}': there are {torch.cuda.device_count()} GPUs, numbered from 0")
        kind = 'cuda:0'
    device = torch.device(kind)
    numbers = {'auto': torch.bfloat16 if device.type == 'cuda' else torch.float32,
               'float32': torch.float32, 'bfloat16': torch.bfloat16}[dtype]
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None) if device.type == 'cuda' else None
    return Machine(device, numbers, rank, world, name, peak), problems


def preflight(s, problems):
    """(machine, data) for these settings, or Refused with every problem at once, those in `problems` included."""
    machine, more = find_machine(s.device, s.dtype)
    problems, data, needed = problems + more + (check_fp8(machine) if s.fp8 else []), None, 0
    if s.gradient_accumulation_steps % machine.world:
        problems.append(f'gradient_accumulation_steps={s.gradient_accumulation_steps}: counts the micro-batches of all ranks, '
                        f'so it must be a multiple of the {machine.world} processes')
    try:
        data = open_data(s.data_dir or os.path.join('data', s.dataset), s.dataset)
        problems += check_data(s, data)
    except Refused as refused:
        problems += refused.problems
    problems += check_pretrained(s, data)
    if data and not problems:
        with torch.device('meta'):
            model = GPT(model_config(s, data.vocab_size))
            problems += check_with_model(s, model)
        needed = model.parameter_count() * 4 * (3 + 1) * 2  # last.pt and best.pt in float32, each beside the one it replaces
    problems += check_out_dir(s, needed)
    if problems:
        raise Refused(problems)
    return machine, data


def check_fp8(machine):
    """Problems of fp8=True with this machine."""
    if machine.device.type != 'cuda' or not torch.version.cuda or not fp8.triton:
        return [f'fp8=True: needs an NVIDIA GPU with CUDA and Triton, this is {machine.name}; leave it out']
    capability = torch.cuda.get_device_capability(machine.device)
    if capability < (9, 0):
        return [f'fp8=True: needs compute capability 9.0 (H100) or more, {machine.name} has {".".join(map(str, capability))}; leave it out']
    if machine.dtype != torch.bfloat16:
        return [f'fp8=True: its products end in bfloat16, dtype is {str(machine.dtype)[6:]}; set --dtype=bfloat16']
    return []


def optimizer_options(s, model):
    """Arguments of optim.build_optimizer that choose the optimizer, its spike handling and its pruning."""
    kind = s.optimizer if s.prune_score == 'none' else 'adamwprune'
    base = s.adamwprune_base if s.optimizer == 'adamwprune' else s.optimizer
    options = {'optimizer': kind}
    if base == 'adamwspam':
        options.update({key: getattr(s, key) for key in vars(s) if key.startswith('spam_')}, spam_theta=s.spam_theta or None)
    if kind == 'adamwprune':
        options.update(base=base, score=s.prune_score, target_sparsity=s.target_sparsity, schedule=s.prune_schedule, start=s.prune_start,
                       end=s.prune_end, interval=s.prune_interval, regrow=s.prune_regrow, srste=s.prune_srste, pattern=s.prune_pattern,
                       allocation=s.prune_allocation, lr_power=s.prune_lr_power, allow_extra_memory=s.allow_extra_memory,
                       prunable=prune.prunable(model.named_parameters(), s.prune_scope))
    return options


def check_with_model(s, model):
    """Problems that the optimizer itself finds in its settings, with the shapes of this model."""
    try:
        optimizer = build_optimizer(flatten(model, torch.float32), lr=s.learning_rate, betas=(s.beta1, s.beta2), eps=s.eps,
                                    weight_decay=s.weight_decay, **optimizer_options(s, model))
    except ValueError as error:
        return [str(error)]
    if s.prune_score == 'none' or not optimizer.cycle:
        return []
    last = optimizer.last  # of the choices of masks; later where that falls into the warm-up after a reset
    while optimizer.cycle.recovering(last - 1):
        last += 1
    if last <= s.max_iters:
        return []
    setting = 'prune_end' if optimizer.last == s.prune_end else 'prune_start'
    return [f'{setting}={optimizer.last} max_iters={s.max_iters} spam_interval={s.spam_interval} spam_warmup={s.spam_warmup}: no masks '
            f'are chosen in the warm-up after a reset, so target_sparsity is reached at {last} only; choose them before the reset, or '
            f'write --max_iters={last} or more']


def check_data(s, data):
    """Problems of the settings with this data set."""
    problems = []
    for split, stream in (('train', data.train), ('val', data.val)):
        if s.block_size >= 1 > stream.windows(s.block_size):
            problems.append(f'block_size={s.block_size}: the {split} split of {data.name} has {stream.tokens} tokens, '
                            f'too few for one sequence of {s.block_size} + 1')
    if s.eval_tokens >= data.val.tokens:
        problems.append(f'eval_tokens={s.eval_tokens}: the validation split has {data.val.tokens} tokens, the last of which has '
                        'nothing to predict; 0 scores all the others')
    return problems


def check_pretrained(s, data):
    """Problems of the settings with the model that --init_from=hf:PATH starts from; data is None where there is none."""
    if not s.init_from.startswith('hf:'):
        return []
    try:
        _, theirs = read_gpt2(s.init_from[3:])
    except Refused as refused:
        return refused.problems
    problems = problems_of(vars(s)) + [
        f'{key}={getattr(s, key)!r}: the model of {s.init_from} has {key}={getattr(theirs, key)!r}; write --{key}={getattr(theirs, key)!r}'
        for key in ('n_layer', 'n_head', 'n_embd', 'bias') if getattr(s, key) != getattr(theirs, key)]
    if s.block_size > theirs.block_size:
        problems.append(f'block_size={s.block_size}: the model of {s.init_from} has {theirs.block_size} positions; write '
                        f'--block_size={theirs.block_size} or less')
    if data and data.vocab_size != theirs.vocab_size:
        name = next((name for name, size in VOCABULARY.items() if size == theirs.vocab_size), None)
        problems.append(f'dataset={data.name!r} has the {data.vocab_size} tokens of {data.tokenizer!r}, the model of {s.init_from} '
                        f'{theirs.vocab_size}; ' + (f'use text prepared with --tokenizer={name}' if name else 'use another model'))
    return problems


def check_out_dir(s, free_bytes_needed):
    """Problems of the run directory: another run in it, nothing to resume, no disk space."""
    problems, last = [], os.path.join(s.out_dir, 'last.pt')
    holds_run = any(os.path.exists(os.path.join(s.out_dir, f)) for f in ('last.pt', 'best.pt', 'summary.json'))
    if starts_anew(s) and holds_run:
        problems.append(f"out_dir='{s.out_dir}' holds another run; continue it with --init_from=resume or choose another --out_dir")
    if s.init_from == 'resume' and not os.path.exists(last):
        problems.append(f"init_from='resume': there is no {last}; check out_dir or use --init_from=scratch")
    parent = os.path.abspath(s.out_dir)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        return problems + [f"out_dir='{s.out_dir}': {parent} is a file; choose another --out_dir"]
    if not os.access(parent, os.W_OK):
        problems.append(f"out_dir='{s.out_dir}': {parent} is not writable; choose another --out_dir")
    free = shutil.disk_usage(parent).free
    if free < free_bytes_needed:
        problems.append(f"out_dir='{s.out_dir}': the checkpoints need {size(free_bytes_needed)}, the disk has {size(free)} left; "
                        'free some or choose another --out_dir')
    return problems


def checkpoint_to_resume(s, data):
    """The content of last.pt if the run is to be continued, else None. Refused if it is not the same run."""
    path = os.path.join(s.out_dir, 'last.pt')
    if starts_anew(s) or (s.init_from == 'auto' and not os.path.exists(path)):
        return None
    saved = load_checkpoint(path)
    if 'progress' not in saved:
        raise Refused(f'{path} holds weights only, like a best.pt: not enough to resume from; restore the last.pt of this run')
    before, problems = {**vars(Settings()), **saved['settings']}, []  # a setting that is newer than the run had its default's meaning
    for key, value in vars(s).items():
        if key not in FREE_ON_RESUME and before.get(key) != value:
            problems.append(f'{key}={value!r}: the run in {s.out_dir} has {key}={before.get(key)!r}; keep it, or start another run '
                            'with another --out_dir')
    for what, now, then in (
            ('batch_size x gradient_accumulation_steps', effective_batch(s), before['batch_size'] * before['gradient_accumulation_steps']),
            ('lr_decay_iters (0: max_iters)', s.lr_decay_iters or s.max_iters, before['lr_decay_iters'] or before['max_iters'])):
        if now != then:
            problems.append(f'{what} = {now}: the run in {s.out_dir} has {then}; keep it, or start another run with another --out_dir')
    if saved['fingerprint'] != data.fingerprint:
        folder = s.data_dir or os.path.join('data', s.dataset)
        problems.append(f"data in {folder} changed: fingerprint {data.fingerprint}, the run in {s.out_dir} was trained on "
                        f"{saved['fingerprint']}; restore that data, or start another run with another --out_dir")
    if problems:
        raise Refused(problems)
    return saved


def is_finished(s):
    """True if out_dir already holds this run with all its updates done."""
    summary = read_json(os.path.join(s.out_dir, 'summary.json')) if not starts_anew(s) else None
    return bool(summary) and summary['exit_reason'] == 'finished' and summary['steps'] >= s.max_iters


def starts_anew(s):
    """True if no run is to be continued: weights from the seed, or those of --init_from=hf:PATH."""
    return s.init_from not in ('resume', 'auto')


def effective_batch(s):
    """Sequences an update, whatever the number of GPUs."""
    return s.batch_size * s.gradient_accumulation_steps


def table(s, machine, data, model, start_step):
    """The preflight table as text. Refused if a GPU would fall to math attention without permission."""
    tokens_a_step = effective_batch(s) * s.block_size
    epochs = s.max_iters * tokens_a_step / (data.train.windows(s.block_size) * s.block_size)
    backend = attention_backend(model.config, s.batch_size, machine.device, machine.dtype)
    if backend == 'math' and machine.device.type == 'cuda' and not s.allow_math_attention:
        raise Refused(f'attention would run unfused (math) on {machine.name}: O(block_size^2) memory and slow; use --dtype=bfloat16 '
                      'and a head width that fused kernels support, or permit it with --allow_math_attention=True')
    named = dict(model.named_parameters())
    prunable = sum(named[name].numel() for name in prune.prunable(named.items(), s.prune_scope))
    memory = predicted_memory(s, model.config, machine.dtype, model.parameter_count(), prunable, machine.device.type == 'cuda')
    peak = f'{machine.peak_flops / 1e12:.0f} TFLOP/s peak in bfloat16' if machine.peak_flops else 'peak unknown, no MFU'
    micro = s.gradient_accumulation_steps // machine.world
    rows = [
        ('effective batch', f'{s.batch_size} sequences x {s.gradient_accumulation_steps} micro-batches = {effective_batch(s)} sequences'
                            + (f' ({machine.world} processes, {micro} each)' if machine.world > 1 else '')),
        ('tokens a step', f'{effective_batch(s)} x {s.block_size} = {tokens_a_step:,}'),
        ('tokens of the run', f'{s.max_iters:,} steps = {s.max_iters * tokens_a_step:,} = {epochs:.3g} epochs of {data.train.tokens:,}'),
        ('data', f'{data.name}, {data.tokenizer}, {data.vocab_size} tokens, fingerprint {data.fingerprint[:16]}'),
        ('evaluation', f'{s.eval_tokens or data.val.tokens:,} of {data.val.tokens:,} tokens every {s.eval_interval} steps'),
        ('device', f'{machine.name}, {peak}'),
        ('numbers', f'{str(machine.dtype)[6:]} at work, float32 masters, moments and gradients'
                    + ('; training multiplies in float8 in MLP and head' if s.fp8 else '')),
        ('attention', attention_plan(s) + backend
                      + (' (unfused, as allowed)' if backend == 'math' and machine.device.type == 'cuda' else '')),
        ('compile', 'yes, proven after the first steps' if s.compile else 'no'),
        ('memory, predicted', f'{size(sum(memory.values()))}: ' + ', '.join(f'{part} {size(n)}' for part, n in memory.items() if n)),
        ('parameters', f'{model.parameter_count():,}, of them {prunable:,} prunable ({s.prune_scope})'
                       + (f'; they start from {s.init_from}' if s.init_from.startswith('hf:') else '')),
        ('optimizer', s.optimizer + (f' on {s.adamwprune_base}' if s.optimizer == 'adamwprune' else '')),
        ('pruning', pruning_plan(s, prunable)),
        ('learning rate', f'{s.warmup_iters} warm-up, {s.learning_rate:g} -> {s.min_lr:g} at {s.lr_decay_iters or s.max_iters}'),
        ('run directory', s.out_dir + (f', continued from step {start_step}' if start_step else '')),
    ]
    lines = ['preflight'] + [f'  {name:<18s} {text}' for name, text in rows]
    return '\n'.join(lines + [f'  {"note":<18s} {note}' for note in notes(s, machine, memory, epochs)])


def attention_plan(s):
    """What attention is besides multi-head, as text in front of the name of its kernels."""
    parts = []
    if s.attention == 'mla':
        shared = [what for what, of_its_own in (('keys', s.per_head_q_latent), ('values', s.per_head_v_up)) if not of_its_own]
        rotary = f' and {s.latent_rotary} rotary' if s.latent_rotary else ''
        parts.append(f'latent, 2 x {s.latent_dim} wide{rotary}' + (f', {" and ".join(shared)} the same in all heads' if shared else ''))
    if is_reciprocal(s):
        reach = 'over all earlier tokens' if s.ra_window < 0 else f'{s.ra_window} tokens back'
        parts.append(f'reciprocal {reach}, ' + ('learned from ' if s.ra_learned else 'times ') + f'{s.ra_alpha:g}')
    return ''.join(f'{part}; ' for part in parts)


def pruning_plan(s, prunable):
    """What pruning will do and when, as text."""
    if s.prune_score == 'none':
        return 'none'
    how = (f'{s.prune_score}, {s.prune_pattern}, ' + ('each matrix alike, ' if s.prune_allocation == 'layer' else '')
           + ('regrowing until the end of the ramp' if s.prune_regrow else 'for good'))
    last, every = s.prune_end, f' every {s.prune_interval} to {s.prune_end}'
    when = f'{s.prune_schedule} from step {s.prune_start} to {s.prune_end} every {s.prune_interval}'
    if s.prune_pattern == '2:4':
        last = s.prune_end if s.prune_regrow else s.prune_start
        when = f'all at step {s.prune_start}' + (f', chosen again{every}' if s.prune_regrow else '')
    raised = f'; their learning rate over density^{s.prune_lr_power:g}, in the end x {(1 - s.target_sparsity) ** -s.prune_lr_power:.3g}'
    return (f'{s.target_sparsity:.1%} of the {prunable:,} weights of {s.prune_scope} by {how}; {when}, then {s.max_iters - last} steps of '
            'recovery' + (raised if s.prune_lr_power else ''))


def notes(s, machine, memory, epochs):
    """Choices that are allowed but costly or risky."""
    total = sum(memory.values())
    if machine.device.type == 'cuda':
        available = torch.cuda.get_device_properties(machine.device).total_memory
        if total > available:
            yield f'predicted memory {size(total)} is above the {size(available)} of the device; oom={s.oom!r} decides what happens'
        if machine.dtype == torch.float32:
            yield 'float32 on a GPU: several times slower than bfloat16'
        if not s.compile:
            yield 'not compiled: slower and more memory'
    if epochs > 4:
        yield f'{epochs:.1f} epochs: beyond about 4, repeated text teaches little (arXiv 2305.16264)'
    if s.prune_score == 'bitter10':
        yield 'bitter10 keeps three more float32 numbers a prunable weight'
    if s.ra_alpha != 0 and not s.ra_learned:
        yield (f'ra_alpha={s.ra_alpha:g} for good: 0.5 cost 6.6% in perplexity (docs/RESULTS.md); --ra_learned=True lets each head find '
               'its own')
    if s.attention == 'mla' and 2 * s.latent_dim + s.latent_rotary >= 2 * s.n_embd:
        rotary = f' latent_rotary={s.latent_rotary}' if s.latent_rotary else ''
        yield f'latent_dim={s.latent_dim}{rotary}: the cache of sample.py is no smaller than that of attention=mha'
    if s.grad_clip == 0:
        yield 'grad_clip=0: one bad batch can end the run'
