"""Settings: the one typed list of what a run can be told, and the one check that all of it goes through.

Config files and --key=value end up in the same dataclass. Whatever is unknown, of the wrong type or
impossible becomes one line that names the culprit, its value and the fix. All problems are collected
before anything is said, and no value is ever clamped, ignored or replaced.
"""
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import types
from dataclasses import dataclass
from typing import Literal, get_args, get_origin


PruneScore = Literal['none', 'magnitude', 'movement', 'bitter0', 'bitter1', 'bitter2', 'bitter3', 'bitter4', 'bitter5', 'bitter6',
                     'bitter7', 'bitter8', 'bitter9', 'bitter10', 'bitter10z']


@dataclass
class Settings:
    # --- run -----------------------------------------------------------------------------------------
    out_dir: str = 'out/run'  # run directory: config, log, metrics, checkpoints, summary
    init_from: Literal['scratch', 'resume', 'auto', 'hf:PATH'] = 'scratch'  # auto: resume or scratch; hf: a GPT-2, folder or hub name
    seed: int = 1337  # decides weights, data order and dropout (nanoGPT's value)
    device: str = 'auto'  # auto, cpu, cuda or cuda:N (ROCm's devices are called cuda too); auto: GPU if there is one
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the matrices at work; auto: bfloat16 on a GPU, else float32
    compile: bool = True  # torch.compile; proven after the first steps, an error if nothing was compiled
    activation_budget: float = 1.0  # share of a compiled model's activations kept for the backward, the rest is computed again
    deterministic: bool = False  # bit-identical repetition on a GPU, slower; on a CPU it always is
    oom: Literal['fallback', 'fail'] = 'fallback'  # out of memory: step down a ladder that keeps the effective batch, or stop
    allow_math_attention: bool = False  # let a GPU run attention unfused: O(block_size^2) memory
    tracker: Literal['none', 'wandb', 'trackio', 'tensorboard'] = 'none'  # besides metrics.jsonl; its failure never stops a run
    # --- data ----------------------------------------------------------------------------------------
    dataset: str = 'fineweb_edu'  # name in the data's meta.json; 'unlabelled' for shards that have none
    data_dir: str = ''  # folder of the token shards; empty: data/<dataset>
    batch_size: int = 32  # sequences a micro-batch
    gradient_accumulation_steps: int = 4  # micro-batches an update, all ranks together
    block_size: int = 1024  # tokens a sequence (GPT-2)
    # --- model (defaults: GPT-2 124M) ----------------------------------------------------------------
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads a block
    n_embd: int = 768  # width
    dropout: float = 0.0  # probability; 0 for pre-training (nanoGPT), 0.1 in the GPT-2 paper's code
    bias: bool = False  # in linear layers and LayerNorms; True is GPT-2, False is nanoGPT's default
    loss_chunk_tokens: int = 8192  # tokens whose logits exist at the same time: memory is this x vocabulary
    fp8: bool = False  # training multiplies in float8 in the MLP and the head (arXiv 2209.05433); H100-class GPUs only
    # --- attention (formulas and sources: attention.py, reciprocal.py) -------------------------------------
    attention: Literal['mha', 'mla'] = 'mha'  # multi-head (GPT-2), or latent (DeepSeek-V2, arXiv 2405.04434)
    latent_dim: int = 128  # mla: width of the two latents a token that keys and values are made of
    per_head_q_latent: bool = True  # mla: each head has a matrix of its own from latent to key; False: all share one
    per_head_v_up: bool = True  # mla: the same from latent to value
    latent_norm: bool = True  # mla: RMSNorm of the latents; False is the reference's
    latent_scale: bool = False  # mla: logits over sqrt(latent_dim), as in the reference; False: over sqrt(head width)
    latent_rotary: int = 0  # mla: numbers of each head's width that are rotary, their keys shared and cached (DeepSeek-V2, 2.1.3)
    ra_alpha: float = 0.0  # weight of the reciprocal logits, of key and query with their parts exchanged; 0: none
    ra_window: int = 64  # tokens back that they reach; 0: a token's own alone, -1: all
    ra_learned: bool = False  # a learned weight a head, which starts at ra_alpha
    # --- optimizer (nanoGPT's GPT-2 values, after GPT-3, arXiv 2005.14165 appendix B) -----------------
    optimizer: Literal['adamw', 'adamwspam', 'adamwprune'] = 'adamw'  # adamwprune prunes by its own state
    learning_rate: float = 6e-4  # peak
    min_lr: float = 6e-5  # at the end of the cosine; a tenth of the peak (Chinchilla, arXiv 2203.15556)
    warmup_iters: int = 2000  # updates of linear warm-up
    lr_decay_iters: int = 0  # update at which min_lr is reached; 0: max_iters
    max_iters: int = 50_000  # updates
    weight_decay: float = 0.1  # a unit of learning rate, on matrices only
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to sqrt(v): PyTorch's AdamW
    grad_clip: float = 1.0  # global gradient norm; 0: no clipping
    # --- gradient spikes: optimizer=adamwspam, or adamwprune_base=adamwspam --------------------------------
    adamwprune_base: Literal['adamw', 'adamwspam'] = 'adamw'  # what adamwprune is underneath
    spam_mode: Literal['paper', 'reference', 'stable'] = 'paper'  # arXiv 2501.06842, the runs of 2025, arXiv 2502.17055
    spam_interval: int = 500  # updates between resets of the moments; 0: none
    spam_warmup: int = 150  # updates of held-back learning rate after a reset
    spam_theta: float = 0.0  # a gradient element is cut where g^2 > theta v; 0: the mode's own, 5000 (paper) or 50 (reference)
    spam_grace: int = 20  # paper: updates after the start or a reset without cutting
    spam_step_twice: bool = False  # defect of the reference: its clock ran twice as fast, an interval of 1000 meant 500
    spam_lr_sticks: bool = False  # defect of the reference: each warm-up scaled what the last had left of the learning rate
    spam_decay_lost: bool = False  # defect of the reference: weight decay was not passed on
    # --- pruning (defaults: from 30% to 95% of 50,000 updates) ---------------------------------------------
    prune_score: PruneScore = 'none'  # what a weight is worth, see prune.py; none: no pruning
    target_sparsity: float = 0.5  # share of the scope's weights that is pruned in the end
    prune_scope: Literal['blocks', 'blocks+embedding'] = 'blocks'  # linear weights of the blocks; with the tied embedding
    prune_allocation: Literal['global', 'layer'] = 'global'  # one threshold for the scope, or each matrix pruned alike
    prune_lr_power: float = 0.0  # learning rate of pruned matrices over density^this; 1: sparse muP, arXiv 2405.15743; 0: off
    prune_schedule: Literal['linear', 'zhu_gupta', 'cubic_late'] = 'zhu_gupta'  # arXiv 1710.01878: fast first, slow at the end
    prune_start: int = 15_000  # update at which the ramp begins
    prune_end: int = 47_500  # update at which it ends and the masks are frozen
    prune_interval: int = 100  # updates between masks
    prune_regrow: bool = False  # pruned weights live on in the masters and may come back before prune_end
    prune_srste: float = 0.0  # with prune_regrow: decay of the pruned (SR-STE, arXiv 2102.04010); 0: plain straight-through
    prune_pattern: Literal['unstructured', '2:4'] = 'unstructured'  # 2:4: two of four inputs, all at prune_start
    allow_extra_memory: bool = False  # permits bitter10, three more float32 numbers a weight
    # --- evaluation, logging, safety -----------------------------------------------------------------
    eval_interval: int = 500  # updates between evaluations
    eval_tokens: int = 1_048_576  # first tokens of the validation split that are scored; 0: all
    log_interval: int = 10  # updates between log lines, the only points where the host waits for the device
    save_interval: int = 1000  # updates between last.pt checkpoints
    diverge_nats: float = 1.0  # a loss this far above its running best ...
    diverge_steps: int = 200  # ... for this many updates stops the run with exit code 3


def run_command(main):
    """Exit with the code that main(arguments) returns, or with 2 after printing what was refused."""
    try:
        code = main(sys.argv[1:])
    except Refused as refused:
        code = refused.report()
    sys.exit(code)


class Refused(Exception):
    """What was asked for cannot be done. `problems` lists every reason, one line each."""

    def __init__(self, problems):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__('\n'.join(self.problems))

    def report(self):
        """Print the problems; returns the exit code for them."""
        print('refused:\n' + '\n'.join(f'  - {problem}' for problem in self.problems), file=sys.stderr)
        return 2


def type_name(kind):
    return ' | '.join(get_args(kind)) if get_origin(kind) is Literal else kind.__name__


def convert(key, value, kind):
    """`value` as `kind`, or ValueError. Text comes from the command line, other types from a config file."""
    text = isinstance(value, str)
    if get_origin(kind) is Literal:
        begins = [choice[:-4] for choice in get_args(kind) if choice.endswith(':PATH')]  # 'hf:PATH' stands for hf: and any text
        if value in get_args(kind) or text and any(value.startswith(begin) and value != begin for begin in begins):
            return value
        close = difflib.get_close_matches(str(value), get_args(kind), 1)
        hint = f"; did you mean '{close[0]}'?" if close else ''
        raise ValueError(f"{key}={value!r} is not one of {', '.join(get_args(kind))}{hint}")
    if kind is str and text:
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        if text and value.lower() in ('true', 'false'):
            return value.lower() == 'true'
        raise ValueError(f'{key}={value!r} is not a bool: write True or False')
    if kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if text and re.fullmatch(r'[+-]?\d+(_\d+)*', value):
            return int(value)
        raise ValueError(f'{key}={value!r} is not an int')
    if kind is float:
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
        raise ValueError(f'{key}={value!r} is not a finite float')
    raise ValueError(f'{key}={value!r} is not a {type_name(kind)}')


def read_config(path):
    """The settings a config file assigns. Names with a leading underscore and imports are its own business."""
    try:
        with open(path) as f:
            source = f.read()
    except (OSError, UnicodeError) as error:
        folder = os.path.dirname(path) or '.'
        there = sorted(f for f in os.listdir(folder) if f.endswith('.py')) if os.path.isdir(folder) else []
        close = difflib.get_close_matches(os.path.basename(path), there, 1)
        hint = f"; did you mean '{os.path.join(folder, close[0])}'?" if close else ''
        raise ValueError(f"config file '{path}' cannot be read: {getattr(error, 'strerror', error)}{hint}") from None
    names = {}
    try:
        exec(compile(source, path, 'exec'), {'__name__': 'config', '__file__': path}, names)
    except SyntaxError as error:
        raise ValueError(f"config file '{path}' line {error.lineno}: {error.msg}") from None
    except Exception as error:
        raise ValueError(f"config file '{path}': {type(error).__name__}: {error}") from None
    return {k: v for k, v in names.items() if not k.startswith('_') and not isinstance(v, types.ModuleType)}


def parse(cls, argv, config_files=True):
    """(instance of the dataclass `cls`, problems): config files and --key=value in order, later wins.

    A value that is refused leaves the setting as it was, so that the rest can still be checked.
    """
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    settings, problems = cls(), []

    def assign(where, key, value):
        if key not in kinds:
            close = difflib.get_close_matches(key.replace('-', '_').lower(), kinds, 1)
            hint = f"did you mean '{close[0]}'?" if close else '--help lists all settings'
            problems.append(f"{where}: unknown setting '{key}' (value {value!r}); {hint}")
            return
        try:
            setattr(settings, key, convert(key, value, kinds[key]))
        except ValueError as error:
            problems.append(f'{where}: {error}')

    for argument in argv:
        if argument.startswith('--'):
            key, equals, value = argument[2:].partition('=')
            if equals:
                assign('command line', key, value)
            else:
                problems.append(f"command line: '{argument}' has no value; write --{key}=VALUE")
        elif config_files and argument.endswith('.py'):
            try:
                for key, value in read_config(argument).items():
                    assign(argument, key, value)
            except ValueError as error:
                problems.append(str(error))
        else:
            forms = 'config/FILE.py or --key=value' if config_files else '--key=value'
            problems.append(f"command line: '{argument}' is not of the form {forms}")
    return settings, problems


def help_text(cls, usage):
    """Every setting with type, default and the comment that stands behind it in the source."""
    lines = [usage, '']
    for line in inspect.getsource(cls).splitlines():
        if found := re.match(r'    (\w+): .*?  # (.*)', line):
            field = cls.__dataclass_fields__[found[1]]
            default = f'{field.name}={field.default!r}'
            lines.append(f'  --{default:34s} {type_name(field.type)}\n        {found[2]}')
        elif found := re.match(r'    # -+ (.*?) -+$', line):
            lines.append(f'{found[1]}:')
    return '\n'.join(lines)


def check(s):
    """Problems of a Settings that need no look at the data or the machine: ranges and combinations."""
    problems = []

    def require(condition, *keys, must):
        if not condition:
            told = ' '.join(f'{k}={getattr(s, k)!r}' for k in keys)
            problems.append(f'{told}: {must}')

    for key in ('batch_size gradient_accumulation_steps block_size n_layer n_head n_embd loss_chunk_tokens '
                'latent_dim max_iters eval_interval log_interval save_interval diverge_steps').split():
        require(getattr(s, key) >= 1, key, must='must be at least 1')
    for key in 'seed warmup_iters lr_decay_iters eval_tokens learning_rate min_lr weight_decay grad_clip'.split():
        require(getattr(s, key) >= 0, key, must='must not be negative')
    require(s.seed < 2**63, 'seed', must='must be below 2^63, which PyTorch takes')
    for key in ('beta1', 'beta2', 'dropout'):
        require(0 <= getattr(s, key) < 1, key, must='must be at least 0 and below 1')
    for key in ('eps', 'diverge_nats'):
        require(getattr(s, key) > 0, key, must='must be above 0')
    if s.n_head >= 1:
        require(s.n_embd % s.n_head == 0, 'n_embd', 'n_head',
                must=f'the width must be a multiple of the heads, e.g. n_embd={max(1, s.n_embd // s.n_head) * s.n_head}')
    decay_iters = s.lr_decay_iters or s.max_iters
    require(s.warmup_iters < decay_iters, 'warmup_iters', 'max_iters', 'lr_decay_iters',
            must=f'the warm-up must end before the decay does ({decay_iters})')
    require(0 < s.activation_budget <= 1, 'activation_budget', must='must be above 0 and at most 1')
    require(s.activation_budget == 1 or s.compile, 'activation_budget', 'compile', must='only the compiler can compute activations again')
    require(s.min_lr <= s.learning_rate, 'min_lr', 'learning_rate', must='min_lr must not be above learning_rate')
    require(s.eval_tokens == 0 or s.eval_tokens >= s.block_size, 'eval_tokens', 'block_size',
            must='must hold at least one sequence; 0 scores the whole split')
    require(not (s.fp8 and s.bias), 'fp8', 'bias', must='the products in float8 have no bias; set one of the two to False')
    for key, unit in (('n_embd', 16), ('block_size', 16), ('loss_chunk_tokens', 64)):  # 64: out of memory it is quartered
        require(not s.fp8 or getattr(s, key) % unit == 0, 'fp8', key, must=f'the products in float8 want a multiple of {unit}')
    problems += check_attention(s) + check_optimizer(s)
    require(s.out_dir, 'out_dir', must='must name a folder')
    require(s.dataset, 'dataset', must='must name a data set')
    return problems


def unused(s, keys, condition):
    """Problems of settings that were changed and would act on nothing; condition: with what they would."""
    default = type(s)()
    return [f'{key}={getattr(s, key)!r}: acts only with {condition}; leave it out'
            for key in keys.split() if getattr(s, key) != getattr(default, key)]


def check_attention(s):
    """Problems of the latent and reciprocal settings."""
    problems, reciprocal = [], s.ra_learned or s.ra_alpha != 0
    if s.attention != 'mla':
        problems += unused(s, 'latent_dim per_head_q_latent per_head_v_up latent_norm latent_scale latent_rotary', 'attention=mla')
    elif s.latent_rotary % 2 or s.latent_rotary < 0 or (s.latent_rotary and s.latent_rotary * s.n_head >= s.n_embd):
        problems.append(f'latent_rotary={s.latent_rotary}: must be even, not negative and below the head width n_embd / n_head')
    if not reciprocal:
        problems += unused(s, 'ra_window', 'ra_alpha or ra_learned')
    if s.ra_window < -1:
        problems.append(f'ra_window={s.ra_window}: must be at least 0, or -1 for all earlier tokens')
    if reciprocal and s.dropout and 0 <= s.ra_window < s.block_size - 1:
        problems.append(f'dropout={s.dropout} ra_window={s.ra_window}: the kernels of the window have no dropout; set --dropout=0 or '
                        '--ra_window=-1')
    return problems


def check_optimizer(s):
    """Problems of the optimizer's and the pruning settings, among them settings that would act on nothing."""
    problems = []
    spam = s.optimizer == 'adamwspam' or (s.optimizer == 'adamwprune' and s.adamwprune_base == 'adamwspam')
    pruning = s.prune_score != 'none'

    if s.optimizer != 'adamwprune':
        problems += unused(s, 'adamwprune_base', 'optimizer=adamwprune')
    if not spam:
        problems += unused(s, 'spam_mode spam_interval spam_warmup spam_theta spam_grace spam_step_twice spam_lr_sticks spam_decay_lost',
                           'optimizer=adamwspam or adamwprune_base=adamwspam')
    if not pruning:
        problems += unused(s, 'target_sparsity prune_scope prune_allocation prune_lr_power prune_schedule prune_start prune_end '
                           'prune_interval prune_regrow prune_srste prune_pattern allow_extra_memory', 'a prune_score')
        if s.optimizer == 'adamwprune':
            problems.append("optimizer='adamwprune' prune_score='none': it prunes by a score of its own state; set e.g. "
                            '--prune_score=bitter7')
    elif s.optimizer != 'adamwprune' and s.prune_score not in ('magnitude', 'movement'):
        problems.append(f'optimizer={s.optimizer!r} prune_score={s.prune_score!r}: scores other than magnitude and movement are of '
                        'the optimizer\'s own state; set --optimizer=adamwprune')
    if spam and s.spam_mode == 'stable':
        problems += unused(s, 'spam_theta', 'spam_mode=paper or reference')
    if spam and s.spam_mode != 'paper':
        problems += unused(s, 'spam_grace', 'spam_mode=paper')
    if pruning and s.prune_score != 'bitter10':
        problems += unused(s, 'allow_extra_memory', 'prune_score=bitter10')
    if s.prune_score == 'bitter4':
        problems += unused(s, 'prune_allocation', 'a prune_score other than bitter4, which has shares for the layers of its own')
    if pruning and s.prune_pattern == '2:4':
        problems += unused(s, 'prune_schedule prune_allocation', 'prune_pattern=unstructured')
        if not s.prune_regrow:
            problems += unused(s, 'prune_interval', 'prune_regrow=True or prune_pattern=unstructured')
    if pruning and not 0 <= s.prune_start < s.prune_end <= s.max_iters:
        problems.append(f'prune_start={s.prune_start} prune_end={s.prune_end} max_iters={s.max_iters}: the ramp must start before it '
                        f'ends and end within the run, e.g. --prune_start={s.max_iters * 3 // 10} --prune_end={s.max_iters * 19 // 20}')
    if pruning and s.prune_interval < 1:
        problems.append(f'prune_interval={s.prune_interval}: must be at least 1')
    return problems
