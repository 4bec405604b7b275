"""The optimizers, the learning rate, and how training lays parameters out in memory.

Working weights are what the model reads (bfloat16 on a GPU); masters, moments and accumulated
gradients are float32. All but the moments lie in a few flat tensors, so that what is done to all is
one kernel, and any optimizer is given views of the masters. AdamW is PyTorch's own.

In another project: copy optim.py and prune.py, which need nothing but torch.
"""
import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim import AdamW
from torch.optim.optimizer import ParamsT

import prune

# --- learning rate --------------------------------------------------------------------------------

LR_SCHEDULES = {  # t, the share of the decay that is done -> share of the way down that is left
    'cosine': lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    'linear': lambda t: 1 - t,
}


def learning_rate_at(step, peak, minimum, warmup, decay, schedule='cosine'):
    """Learning rate of update `step`, from 0: linear warm-up, then down to `minimum` at `decay`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step >= decay:
        return minimum
    return minimum + (peak - minimum) * LR_SCHEDULES[schedule]((step - warmup) / (decay - warmup))


# --- layout ---------------------------------------------------------------------------------------

PRUNE_SCOPES = {  # what the names of the matrices begin with that may be pruned
    'blocks': ('blocks.',),
    'blocks+embedding': ('blocks.', 'token_embedding.'),
}


class Flat(NamedTuple):
    """Parameters of one kind, end to end in memory."""
    kind: str  # 'blocks' (their matrices), 'embeddings' or 'vectors'
    masters: torch.Tensor  # (N,) float32, or float64 of a float64 model
    grads: torch.Tensor  # (N,) of the same type: the accumulated gradients
    working: torch.Tensor  # (N,) what the model reads; `masters` itself where the types are equal
    parameters: dict  # name -> Parameter for the optimizer: a view of masters, .grad one of grads
    members: list  # [(the model's parameter, a view of working; its part of grads)]


def padded(size):
    """Kernels want 128-byte aligned starts."""
    return -(-size // 64) * 64


def flatten(model, dtype):
    """Move the model's parameters into flat tensors, a list of Flat. They become views of the
    working weights: matrices in `dtype`, vectors in the masters' type."""
    kinds = {'blocks': [], 'embeddings': [], 'vectors': []}
    for name, p in model.named_parameters():
        kind = 'blocks' if name.startswith('blocks.') else 'embeddings'
        kinds['vectors' if p.dim() < 2 else kind].append((name, p))
    return [flatten_kind(kind, named, dtype) for kind, named in kinds.items() if named]


def flatten_kind(kind, named, dtype):
    """One Flat of [(name, parameter)], in this order; the gaps of the padding stay zero."""
    first = named[0][1]
    exact = torch.promote_types(torch.promote_types(first.dtype, dtype), torch.float32)
    size = sum(padded(p.numel()) for _, p in named)
    masters = torch.zeros(size, dtype=exact, device=first.device)
    working = masters
    if kind != 'vectors' and dtype != exact:
        working = torch.zeros_like(masters, dtype=dtype)
    flat = Flat(kind, masters, torch.zeros_like(masters), working, {}, [])
    start = 0
    for name, p in named:
        part = slice(start, start + p.numel())
        start += padded(p.numel())
        masters[part].view_as(p).copy_(p.data)
        flat.parameters[name] = nn.Parameter(masters[part].view_as(p))
        flat.parameters[name].grad = flat.grads[part].view_as(p)
        p.data = working[part].view_as(p)
        flat.members.append((p, flat.parameters[name].grad))
    refresh_working([flat])
    return flat


def parameter_groups(flats, weight_decay, prune_scope):
    """Groups for an optimizer, with names. Weight decay is for the matrices, as in GPT-2 and 3;
    prune=True marks what a prune.Pruner may prune."""
    groups = {}
    for flat in flats:
        matrices = flat.kind != 'vectors'
        decay = weight_decay if matrices else 0.0
        for name, p in flat.parameters.items():
            prunable = matrices and name.startswith(PRUNE_SCOPES[prune_scope])
            new = dict(params=[], weight_decay=decay, prune=prunable)
            groups.setdefault((flat.kind, prunable), new)['params'].append((name, p))
    return list(groups.values())


def clear(flats):
    """Set all gradients to 0, also what a backward that failed halfway has left behind."""
    for flat in flats:
        flat.grads.zero_()
        for p, _ in flat.members:
            p.grad = None


def add_each(sums, terms):
    """Add each of `terms` to its one of `sums`; compiled it is one kernel even for mixed types."""
    torch._foreach_add_(sums, terms)


def accumulate(flats, fused=False):
    """Add the gradients of the last backward to `grads` and free them. fused: by one kernel."""
    pairs = []
    for flat in flats:
        pairs += [(p, total) for p, total in flat.members if p.grad is not None]
    add = compiled(add_each) if fused else add_each
    add([total for _, total in pairs], [p.grad for p, _ in pairs])
    for p, _ in pairs:
        p.grad = None


def scale_each(grads, clip, finite):
    """Multiply each tensor by clip (0-dim), or make it 0 if finite (0-dim bool) is False."""
    for grad in grads:
        grad.mul_(clip).masked_fill_(~finite, 0)


def scale_gradients(flats, clip, finite, fused=False):
    """Clip the accumulated gradients, and make them 0 in a step that is not finite, because no NaN
    may reach weights or moments. Nothing waits for the device. fused: by one kernel."""
    scale = compiled(scale_each) if fused else scale_each
    scale([flat.grads for flat in flats], clip, finite)


@torch.no_grad()
def refresh_working(flats):
    """Round the masters to what the model reads."""
    for flat in flats:
        if flat.working is not flat.masters:
            flat.working.copy_(flat.masters)


# --- gradient spikes ------------------------------------------------------------------------------


@functools.cache
def compiled(function, dynamic=False):
    return torch.compile(function, fullgraph=True, dynamic=dynamic)


def clip_spikes(grad, exp_avg_sq, theta, least):
    """In place: where grad^2 > theta (exp_avg_sq + least), |grad| is cut to the root of that (SPAM,
    arXiv 2501.06842). Returns how many elements were cut, 0-dim.

    An element without history (0) is not cut, because it would be frozen for ever.
    """
    usual = exp_avg_sq + least
    limit = (theta * usual).sqrt()
    spike = (grad.abs() > limit) & (usual > 0)
    grad.copy_(torch.where(spike, torch.copysign(limit, grad), grad))
    return spike.sum()


def paper(optimizer, params):
    """SPAM as in its authors' code (galore_torch/SPAM.py): eps joins sqrt(v) before the bias
    correction; weight decay comes after the step, and a warm-up does not scale it."""
    spam = optimizer.spam
    since = optimizer.since_reset()
    factor = 1.0  # of the step
    if optimizer.recovering():
        factor -= 0.99 * (1 + math.cos(math.pi * since / (spam['warmup'] + 1))) / 2
    cut = 0
    if since == 0:
        optimizer.reset(params, 'exp_avg', 'exp_avg_sq')
    elif since >= spam['grace']:
        cut = optimizer.clip(params, 5000.0)
    for group in optimizer.param_groups:
        # PyTorch decays by lr * weight_decay, then steps by lr * m / (sqrt(v) / root + eps).
        root = math.sqrt(1 - group['betas'][1] ** spam['updates'])
        keep = (1 - group['lr'] * group['weight_decay']) or 1e-12  # which is divided by
        group['lr'] *= factor * keep
        group['weight_decay'] /= factor * keep
        group['eps'] /= root
    return cut, False


def reference(optimizer, params):
    """What the runs of 2025 did: a cut that leaves 1e-12 to elements without history, moments
    damped where the norm of all gradients is a spike, resets with a ramp from 0.001, AMSGrad."""
    spam = optimizer.spam
    since = optimizer.since_reset()
    if optimizer.recovering() and spam['warmup']:
        ramp = max(1e-3, (1 - math.cos(math.pi * since / spam['warmup'])) / 2)
        for group in optimizer.param_groups:
            group['lr'] *= ramp
    norms = torch._foreach_norm([p.grad for p in params])
    norm = torch.linalg.vector_norm(torch.stack(norms).double())
    fired = is_norm_spike(norm, spam['norms'])
    cut = optimizer.clip(params, 50.0, 1e-12)
    for state in optimizer.states(params):
        state['exp_avg'].mul_(1 - 0.5 * fired.double())
        state['exp_avg_sq'].mul_(1 - 0.1 * fired.double())
    if since == 0:
        optimizer.reset(params, 'exp_avg', 'exp_avg_sq')
    return cut, fired


def stable(optimizer, params):
    """Stable-SPAM (arXiv 2502.17055): AdaClip and AdaGN on each tensor; a reset restarts the bias
    correction instead of a warm-up."""
    spam = optimizer.spam
    levels = [row for p, row in zip(optimizer.parameters(), spam['levels']) if p.grad is not None]
    cut = stabilise([p.grad for p in params], levels, optimizer.param_groups[0]['eps'])
    if optimizer.since_reset() == 0:
        optimizer.reset(params, 'exp_avg', 'exp_avg_sq', 'step')
    return cut, False


# Each changes gradients, moments and groups before an update; returns (elements cut, whether the
# norm was a spike), 0-dim.
SPAM_MODES = {'paper': paper, 'reference': reference, 'stable': stable}


def is_norm_spike(norm, norms):
    """Whether `norm` (0-dim) is more than 2 standard deviations above the mean of those before it,
    0-dim bool; not with fewer than 10, nor by rounding where clipping made all equal.

    norms: the last 100, -1 where there is none yet; `norm` joins them unless it is not finite.
    """
    before = torch.where(norms >= 0, norms, math.nan)
    mean = before.nanmean()
    deviation = (before - mean).square().nanmean().sqrt()
    is_above = norm - mean > torch.maximum(2 * deviation, 1e-5 * mean)
    fires = norm.isfinite() & is_above & ((norms >= 0).sum() >= 10)
    norms.copy_(torch.where(norm.isfinite(), torch.cat([norms[1:], norm[None]]), norms))
    return fires


def stabilise(grads, levels, eps):
    """AdaClip and AdaGN (arXiv 2502.17055; gamma 0.7 and 0.9, theta 0.999) on S tensors, in place.

    levels: each tensor's usual maximum, norm and squared norm, and the updates in them (4,), which
    take in nothing that is not finite. Elements above the usual maximum T are scaled by T / max,
    then a tensor gets its usual norm. Returns how many were above T, 0-dim.
    """
    before = torch.stack(levels)  # (S, 4)
    seen = before[:, 3] + 1  # this one included
    largest = torch.stack(torch._foreach_norm(grads, math.inf))  # (S,)
    level = 0.999 * before[:, 0] + (1 - 0.999) * largest
    usual = level / (1 - 0.999 ** seen)
    shrink = torch.where(largest > 0, usual / largest, 1.0).to(grads[0].dtype)
    counts = []
    for grad, limit, factor in zip(grads, usual, shrink):
        above = grad.abs() > limit
        counts.append(above.sum())
        grad.mul_(torch.where(above, factor, 1.0))
    norm = torch.stack(torch._foreach_norm(grads))  # (S,)
    mean = 0.7 * before[:, 1] + (1 - 0.7) * norm
    square = 0.9 * before[:, 2] + (1 - 0.9) * norm * norm
    wanted = mean / (1 - 0.7 ** seen) / ((square / (1 - 0.9 ** seen)).sqrt() + eps)
    torch._foreach_mul_(grads, torch.where(norm > 0, wanted / norm, 1.0).unbind())
    after = torch.stack([level, mean, square, seen], 1)
    after = torch.where(norm.isfinite()[:, None], after, before)
    torch._foreach_copy_(levels, after.unbind())
    return torch.stack(counts).sum()


@contextlib.contextmanager
def groups_kept(optimizer):
    """Afterwards the options of its groups are what they were, also when a step fails."""
    before = [dict(group) for group in optimizer.param_groups]
    try:
        yield
    finally:
        for group, options in zip(optimizer.param_groups, before):
            group.update(options)


class AdamWSPAM(AdamW):
    """AdamW that survives gradient spikes by one of SPAM_MODES. A step changes gradients, as
    torch's clip_grad_norm_ does, and counts on the host: a CUDA graph cannot repeat it.

    spam_interval: updates between resets of the moments, 0: none. spam_warmup: updates after one
    with a smaller step. spam_theta: g^2 may be theta v (None: 5000 in 'paper', 50 in 'reference').
    spam_grace: updates after the start or a reset in which 'paper' cuts nothing. compiled: cut by
    one kernel a parameter, which must be contiguous. All parameters lie on one device.
    """

    def __init__(self, params: ParamsT, lr: float | torch.Tensor = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, *, maximize: bool = False, foreach: bool | None = None,
                 fused: bool | None = None, spam_mode: str = 'paper', spam_interval: int = 500,
                 spam_warmup: int = 150, spam_theta: float | None = None, spam_grace: int = 20,
                 compiled: bool = False):
        who = type(self).__name__
        prune.known(f'{who}: spam_mode', spam_mode, SPAM_MODES)
        numbers = dict(interval=spam_interval, warmup=spam_warmup, theta=spam_theta,
                       grace=spam_grace)
        for name, value in numbers.items():
            if not (value or 0) >= 0:
                raise ValueError(f'{who}: spam_{name}={value} must not be negative')
        super().__init__(params, lr, betas, eps, weight_decay, spam_mode == 'reference',
                         maximize=maximize, foreach=foreach, fused=fused)
        self._step_supports_amp_scaling = False  # a GradScaler unscales before spikes are cut
        self.defaults.update(spam=None, compiled=compiled)  # spam: of groups but the first
        self.param_groups[0]['spam'] = {
            **numbers,
            'mode': spam_mode,
            'updates': 0,
            'counts': torch.zeros(3, dtype=torch.int64),  # as in counters
            'norms': torch.full((100,), -1.0, dtype=torch.float64),  # see is_norm_spike
            'levels': torch.zeros(0, 4, dtype=torch.float64),  # a row a parameter, see stabilise
        }

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]['params']):
            raise ValueError('AdamWSPAM: complex parameters are not offered; keep their '
                             'torch.view_as_real as the parameters')

    @property
    def spam(self):
        """Options, and what is remembered of all parameters together. The first group has it,
        because PyTorch's copies and checkpoints know only groups and the state of parameters."""
        return self.param_groups[0]['spam']

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One update; returns what the closure returns."""
        loss = torch.enable_grad()(closure)() if closure else None
        params = [p for p in self.parameters() if p.grad is not None]
        if not params:
            return loss
        spam = self.spam
        if missing := len(self.parameters()) - len(spam['levels']):
            spam['levels'] = F.pad(spam['levels'], (0, 0, 0, missing))
        for key in ('counts', 'norms', 'levels'):  # new and loaded ones may lie on the CPU
            spam[key] = spam[key].to(params[0].device)
        spam['updates'] += 1
        with groups_kept(self):
            for group in self.param_groups:
                group['lr'] = float(group['lr'])  # a tensor would be changed in place
            cut, fired = SPAM_MODES[spam['mode']](self, params)
            inspect.unwrap(AdamW.step)(self)  # without hooks, which are around this step()
        spam['counts'][0].add_((cut > 0) | fired)
        spam['counts'][1].add_(cut)
        spam['counts'][2].add_(self.since_reset() == 0)
        return loss

    def parameters(self):
        """Those of all groups."""
        return [*itertools.chain.from_iterable(group['params'] for group in self.param_groups)]

    def states(self, params):
        """The state of those that have had an update."""
        return [self.state[p] for p in params if self.state[p]]

    def reset(self, params, *keys):
        for state in self.states(params):
            torch._foreach_zero_([state[key] for key in keys])

    def clip(self, params, theta, least=0.0):
        """clip_spikes of what has a history, at spam_theta or else `theta`."""
        if self.spam['theta'] is not None:
            theta = self.spam['theta']
        cut = 0
        for p in params:
            if not self.state[p]:
                continue
            exp_avg_sq = self.state[p]['exp_avg_sq']
            if self.defaults['compiled']:  # of one shape but for the length, for one graph
                one_kernel = compiled(clip_spikes, dynamic=True)
                cut += one_kernel(p.grad.view(-1), exp_avg_sq.view(-1), theta, least)
            else:
                cut += clip_spikes(p.grad, exp_avg_sq, theta, least)
        return cut

    def load_state_dict(self, state_dict):
        """As in torch. ValueError: the state of another optimizer."""
        own = {'spam', 'pruner'} & self.defaults.keys()
        if missing := sorted(own - state_dict['param_groups'][0].keys()):
            raise ValueError(f'{type(self).__name__}: this state is of another optimizer, because '
                             f"it has no {', '.join(missing)}")
        super().load_state_dict(state_dict)

    def since_reset(self):
        """Updates since the last reset, or since the start; 0 in the update with a reset."""
        updates = self.spam['updates']
        return updates % self.spam['interval'] if self.spam['interval'] else updates

    def recovering(self):
        """Whether the last update lay in the warm-up after a reset, when moments say little: the
        one with the reset or the spam_warmup updates after it."""
        was_reset = 0 < self.spam['interval'] <= self.spam['updates']
        return was_reset and self.since_reset() <= self.spam['warmup']

    def counters(self):
        """{'spikes': updates that cut something or met a spike of the norm, 'clipped': gradient
        elements, 'resets'}; waits for the device once."""
        return dict(zip(('spikes', 'clipped', 'resets'), self.spam['counts'].tolist()))


# --- AdamW that prunes ----------------------------------------------------------------------------


class AdamWPrune(AdamWSPAM):
    """AdamW or AdamWSPAM (`base`) that prunes as it trains; state[p]['mask'] is True = keep.

    others: arguments of the base, and of prune.Pruner, at least start and end. The learning rate of
    groups with pruned parameters is multiplied by the pruner's rate_factor.
    """
    BASES = {'adamw': AdamW, 'adamwspam': AdamWSPAM}

    def __init__(self, params: ParamsT, *args: Any, base: str = 'adamw', score: str = 'bitter7',
                 target_sparsity: float = 0.5, **others: Any):
        prune.known('AdamWPrune: base', base, self.BASES)
        fields = prune.Pruner.__dataclass_fields__
        pruning = {key: others.pop(key) for key in fields if key in others}
        spam = [key for key in others if key.startswith('spam_')]
        if spam and base == 'adamw':
            raise ValueError(f"AdamWPrune: {', '.join(spam)} given, but base='adamw'")
        super().__init__(params, *args, **others)
        self.base = base
        self.pruner = prune.Pruner(self, score=score, target_sparsity=target_sparsity,
                                   hold=self.recovering, hooked=False, **pruning)
        self.defaults['pruner'] = self.param_groups[0]['pruner'] = None  # state_dict() fills it

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One update, then the pruner's part; returns what the closure returns."""
        loss = torch.enable_grad()(closure)() if closure else None
        self.pruner.put_back()
        with groups_kept(self):
            for group in self.param_groups:
                group['lr'] = group['lr'] * self.pruner.rate_factor(group)
            inspect.unwrap(self.BASES[self.base].step)(self)  # without hooks, as in AdamWSPAM
        self.pruner.step()
        self.show_masks()
        return loss

    def show_masks(self):
        for p, mask in self.pruner.masks.items():
            self.state[p]['mask'] = mask

    def state_dict(self):
        saved = super().state_dict()
        saved['param_groups'][0]['pruner'] = self.pruner.state_dict()
        return saved

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.pruner.load_state_dict(self.param_groups[0]['pruner'])
        self.param_groups[0]['pruner'] = None
        self.show_masks()  # PyTorch makes numbers of masks

    def __getstate__(self):
        return {**super().__getstate__(), 'base': self.base, 'pruner': self.pruner}


# --- by name --------------------------------------------------------------------------------------


def common(s):
    """Arguments of both, of the settings; fused: PyTorch's one kernel for all parameters."""
    return dict(lr=s.learning_rate, betas=(s.beta1, s.beta2), weight_decay=s.weight_decay,
                fused=True)


def build_adamw(groups, s):
    return AdamW(groups, **common(s))


def build_adamwspam(groups, s):
    return AdamWSPAM(groups, spam_mode=s.spam_mode, spam_interval=s.spam_interval,
                     spam_warmup=s.spam_warmup, compiled=s.compile, **common(s))


OPTIMIZERS = {  # name -> function (groups, settings); one entry adds an optimizer
    'adamw': build_adamw,
    'adamwspam': build_adamwspam,
    'adamwprune': build_adamw,  # train.py has a prune.Pruner beside any optimizer
}
