"""The optimizers, the learning rate, and how training lays parameters out in memory.

Working weights are what the model reads (bfloat16 on a GPU); masters, moments and accumulated
gradients are float32. All lie in a few flat tensors, so that an update is one kernel each, and the
optimizer is given views of the masters.

In another project: copy optim.py and prune.py, which need nothing but torch.
"""
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn as nn
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


def gradient_norm(flats):
    """Global 2-norm of the accumulated gradients, 0-dim on their device."""
    norms = [torch.linalg.vector_norm(flat.grads) for flat in flats]
    return torch.linalg.vector_norm(torch.stack(norms))


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


# --- AdamW ----------------------------------------------------------------------------------------


def adamw_update(weight, grad, exp_avg, exp_avg_sq, step_size, root_correction, keep, eps, beta1,
                 beta2, max_exp_avg_sq=None):
    """AdamW (arXiv 1711.05101), or with max_exp_avg_sq AMSGrad, in place on tensors of one shape.

    step_size = lr / (1 - beta1^t), root_correction = sqrt(1 - beta2^t), keep = 1 - lr *
    weight_decay and eps are numbers, or 0-dim tensors so that a new value compiles nothing anew.
    """
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).add_(grad * grad * (1 - beta2))
    usual = exp_avg_sq
    if max_exp_avg_sq is not None:
        usual = max_exp_avg_sq.copy_(torch.maximum(max_exp_avg_sq, exp_avg_sq))
    weight.mul_(keep).sub_(step_size * exp_avg / (usual.sqrt() / root_correction + eps))


@functools.cache
def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


@dataclass(eq=False)
class Part:
    """What is updated in one go: a parameter, or neighbours in a flat tensor that share a group."""
    parameters: list
    weight: torch.Tensor  # what is updated, float32 or more
    grads: torch.Tensor | None = None  # of a flat
    moments: list = field(default_factory=list)  # each like weight
    step: int = 0  # updates done

    def gradient(self):
        """Of the type of weight, and ours to change."""
        if self.grads is not None:
            return self.grads
        return self.parameters[0].grad.to(self.weight.dtype, copy=True)

    def views(self, tensor):
        """Each parameter's share of a tensor like weight."""
        if self.grads is None:
            return [tensor]
        starts = [p.storage_offset() - self.weight.storage_offset() for p in self.parameters]
        return [tensor[i:i + p.numel()].view_as(p) for i, p in zip(starts, self.parameters)]


def parts_of(group, flats):
    """[Part] of one group of an optimizer."""
    rest = set(group['params'])
    parts = []
    for flat in flats:
        for ours, run in itertools.groupby(flat.parameters.values(), rest.__contains__):
            if ours:
                run = list(run)
                start = run[0].storage_offset()
                end = run[-1].storage_offset() + padded(run[-1].numel())
                parts.append(Part(run, flat.masters[start:end], flat.grads[start:end]))
        rest -= set(flat.parameters.values())
    return parts + [Part([p], p) for p in group['params'] if p in rest]


NOT_OFFERED = ('amsgrad', 'maximize', 'foreach', 'capturable', 'differentiable', 'fused')


class AdamW(torch.optim.Optimizer):
    """Drop-in for torch.optim.AdamW with the same defaults. ValueError: what cannot be.

    state[p] has `step`, `exp_avg`, `exp_avg_sq`, and below float32 a float32 `master`. Parameters
    of `flats` are updated in one go, with compiled=True by one kernel; a deepcopy has no flats.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, *, flats: Sequence[Flat] = (),
                 compiled: bool = False, **others: Any):
        self.refuse_options(others)
        self.refuse_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f'{type(self).__name__}: betas={betas} must be at least 0 and below 1')
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.compiled = compiled
        self.flats = flats
        self.parts = []  # parts_of each group

    def refuse_negative(self, **values):
        for name, value in values.items():
            if not value >= 0:
                raise ValueError(f'{type(self).__name__}: {name}={value} must not be negative')

    def refuse_options(self, others):
        """ValueError: an option of torch.optim.AdamW that is on and not offered, or unknown."""
        for name, value in others.items():
            if value or name not in NOT_OFFERED:
                raise ValueError(f'{type(self).__name__}: {name}={value!r} is not offered; leave '
                                 'it out')

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]['params']):
            raise ValueError(f'{type(self).__name__}: complex parameters are not offered; keep '
                             'their torch.view_as_real as the parameters')

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns what the closure returns."""
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups[len(self.parts):]:
            self.parts.append(parts_of(group, self.flats))
        todo = []
        for group, parts in zip(self.param_groups, self.parts):
            for part in parts:
                if part.grads is not None or part.parameters[0].grad is not None:
                    self.count_step(part)
                    todo.append((group, part))
        if todo:
            self.update_all(todo)
        return loss

    def count_step(self, part):
        """Count an update; the first one makes what the part needs, or takes what was loaded."""
        first = self.state[part.parameters[0]]
        if not part.moments:
            if part.weight.dtype.itemsize < 4:
                part.weight = first.setdefault('master', part.weight.float())
            self.add_moment(part, 'exp_avg')
            self.add_moment(part, 'exp_avg_sq')
        part.step = int(first.get('step', 0)) + 1
        for p in part.parameters:
            self.state[p]['step'] = part.step

    def add_moment(self, part, name):
        """A tensor like weight, 0 or what was loaded, of which the state gets views."""
        moment = torch.zeros_like(part.weight)
        part.moments.append(moment)
        for p, view in zip(part.parameters, part.views(moment)):
            if name in self.state[p]:
                view.copy_(self.state[p][name])
            self.state[p][name] = view

    def update_all(self, todo):
        """Update [(group, part)], whose steps are counted."""
        for group, part in todo:
            numbers = self.numbers(group, part.step, group['lr'])
            self.update(group, part, part.gradient(), numbers)

    def numbers(self, group, step, lr):
        """(step_size, root_correction, keep, eps) of adamw_update."""
        beta1, beta2 = group['betas']
        root_correction = math.sqrt(1 - beta2 ** step)
        keep = 1 - lr * group['weight_decay']
        return lr / (1 - beta1 ** step), root_correction, keep, group['eps']

    def update(self, group, part, grad, numbers):
        """adamw_update of one part."""
        weight = part.weight
        exp_avg, exp_avg_sq, *highest = part.moments
        function = self.function_for(part, adamw_update)
        if function is not adamw_update:
            numbers = [torch.full((), x, dtype=weight.dtype, device=weight.device) for x in numbers]
        function(weight, grad, exp_avg, exp_avg_sq, *numbers, *group['betas'], *highest)
        if weight.dtype != part.parameters[0].dtype:
            part.parameters[0].copy_(weight)

    def function_for(self, part, function):
        """`function`, compiled where that pays: single parameters have too many shapes."""
        return compiled(function) if self.compiled and part.grads is not None else function

    def load_state_dict(self, state_dict):
        """As in torch, except that every tensor keeps the type it was saved in; AdamW takes the
        state of torch.optim.AdamW over. ValueError: the state of another optimizer."""
        groups = state_dict['param_groups']
        states = state_dict['state']
        missing = self.defaults.keys() - groups[0].keys()
        for state in states.values():
            missing |= {'exp_avg', 'exp_avg_sq'} - state.keys()
        if missing:
            raise ValueError(f'{type(self).__name__}: this state is of another optimizer, because '
                             f"it has no {', '.join(sorted(missing))}")
        for group in groups:
            self.refuse_options({key: group.get(key) for key in ('amsgrad', 'maximize')})
        super().load_state_dict({'state': {}, 'param_groups': groups})  # a state would be cast
        for saved, group in zip(groups, self.param_groups):
            for key, p in zip(saved['params'], group['params']):  # numbers, or the model's names
                if key in states:
                    self.state[p] = prune.copied(states[key], p.device)
        self.parts = []

    def __getstate__(self):
        """Of a copy: no hooks, as in torch, nor the step() that schedulers bind to the original."""
        kept = {key: value for key, value in self.__dict__.items() if not key.startswith('_')}
        kept.pop('step', None)
        return {**kept, 'flats': (), 'parts': []}


# --- gradient spikes ------------------------------------------------------------------------------


def clip_spikes(grad, exp_avg_sq, theta, least=0.0):
    """In place: where grad^2 > theta (exp_avg_sq + least), |grad| is cut to the root of that (SPAM,
    arXiv 2501.06842). Returns how many elements were cut, 0-dim.

    An element without history (0) is not cut, because it would be frozen for ever.
    """
    usual = exp_avg_sq + least
    limit = (theta * usual).sqrt()
    spike = (grad.abs() > limit) & (usual > 0)
    grad.copy_(torch.where(spike, torch.copysign(limit, grad), grad))
    return spike.sum()


def paper(optimizer, todo):
    """SPAM as in its authors' code (galore_torch/SPAM.py): eps joins sqrt(v) before the bias
    correction; weight decay comes after the step, and a warm-up does not scale it."""
    theta = 5000.0 if optimizer.spam_theta is None else optimizer.spam_theta
    since = optimizer.since_reset()
    factor = 1.0  # of the step
    if optimizer.recovering():
        factor -= 0.99 * (1 + math.cos(math.pi * since / (optimizer.spam_warmup + 1))) / 2
    cut = 0
    for group, part in todo:
        grad = part.gradient()
        if since == 0:
            torch._foreach_zero_(part.moments)
        if since >= optimizer.spam_grace:
            clip = optimizer.function_for(part, clip_spikes)
            cut += clip(grad, part.moments[1], theta)
        step_size, root, keep, eps = optimizer.numbers(group, part.step, group['lr'])
        optimizer.update(group, part, grad, (step_size * factor * keep, root, keep, eps / root))
    return cut, False


def reference(optimizer, todo):
    """What the runs of 2025 did: a cut that leaves 1e-12 to elements without history, moments
    damped where the norm of all gradients is a spike, resets with a ramp from 0.001, AMSGrad."""
    theta = 50.0 if optimizer.spam_theta is None else optimizer.spam_theta
    since = optimizer.since_reset()
    factor = 1.0  # of the learning rate
    if optimizer.recovering() and optimizer.spam_warmup:
        factor = max(1e-3, (1 - math.cos(math.pi * since / optimizer.spam_warmup)) / 2)
    norms = [torch.linalg.vector_norm(part.gradient()) for _, part in todo]
    norm = torch.linalg.vector_norm(torch.stack(norms).double())
    fired = is_norm_spike(norm, optimizer.memory['norms'])
    cut = 0
    for group, part in todo:
        if len(part.moments) == 2:
            optimizer.add_moment(part, 'max_exp_avg_sq')
        exp_avg, exp_avg_sq, _ = part.moments
        grad = part.gradient()
        if optimizer.memory['updates'] > 1:
            clip = optimizer.function_for(part, clip_spikes)
            cut += clip(grad, exp_avg_sq, theta, 1e-12)
        exp_avg.mul_(1 - 0.5 * fired.double())
        exp_avg_sq.mul_(1 - 0.1 * fired.double())
        if since == 0:
            torch._foreach_zero_([exp_avg, exp_avg_sq])
        numbers = optimizer.numbers(group, part.step, group['lr'] * factor)
        optimizer.update(group, part, grad, numbers)
    return cut, fired


def stable(optimizer, todo):
    """Stable-SPAM (arXiv 2502.17055): AdaClip and AdaGN on each tensor, whose state has `levels`
    (see stabilise); a reset restarts the bias correction instead of a warm-up."""
    since = optimizer.since_reset()
    cut = 0
    for group, part in todo:
        grad = part.gradient()
        if since == 0:
            torch._foreach_zero_(part.moments)
        levels = [optimizer.state[p].setdefault('levels', grad.new_zeros(3))
                  for p in part.parameters]
        cut += stabilise(part.views(grad), levels, part.step, group['eps'])
        clock = min(part.step, since + 1)
        optimizer.update(group, part, grad, optimizer.numbers(group, clock, group['lr']))
    return cut, False


# Each updates all [(group, part)] and returns (elements cut, whether the norm was a spike), 0-dim.
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


def stabilise(grads, levels, seen, eps):
    """AdaClip and AdaGN (arXiv 2502.17055; gamma 0.7 and 0.9, theta 0.999) on S tensors, in place.

    levels: each tensor's usual maximum, norm and squared norm (3,), which take in nothing that is
    not finite; seen: updates in them, this one included. Elements above the usual maximum T are
    scaled by T / max, then a tensor gets its usual norm. Returns how many were above T, 0-dim.
    """
    before = torch.stack(levels)  # (S, 3)
    largest = torch.stack(torch._foreach_norm(grads, math.inf))  # (S,)
    level = 0.999 * before[:, 0] + (1 - 0.999) * largest
    usual = level / (1 - 0.999 ** seen)
    shrink = torch.where(largest > 0, usual / largest, 1.0)
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
    after = torch.stack([level, mean, square], 1)
    after = torch.where(norm.isfinite()[:, None], after, before)
    torch._foreach_copy_(levels, after.unbind())
    return torch.stack(counts).sum()


class AdamWSPAM(AdamW):
    """AdamW, of whose arguments it takes all, that survives gradient spikes by one of SPAM_MODES.

    spam_interval: updates between resets of the moments, 0: none. spam_warmup: updates after one
    with a smaller step. spam_theta: g^2 may be theta v (None: 5000 in 'paper', 50 in 'reference').
    spam_grace: updates after the start or a reset in which 'paper' cuts nothing. All parameters lie
    on one device.
    """

    def __init__(self, params: ParamsT, *args: Any, spam_mode: str = 'paper',
                 spam_interval: int = 500, spam_warmup: int = 150,
                 spam_theta: float | None = None, spam_grace: int = 20, **others: Any):
        super().__init__(params, *args, **others)
        prune.known(f'{type(self).__name__}: spam_mode', spam_mode, SPAM_MODES)
        self.refuse_negative(spam_interval=spam_interval, spam_warmup=spam_warmup,
                             spam_theta=spam_theta or 0.0, spam_grace=spam_grace)
        self.spam_mode = spam_mode
        self.spam_interval = spam_interval
        self.spam_warmup = spam_warmup
        self.spam_theta = spam_theta
        self.spam_grace = spam_grace
        self.defaults['spam'] = None  # of groups but the first
        self.param_groups[0]['spam'] = {
            'updates': 0,
            'counts': torch.zeros(3, dtype=torch.int64),  # as in counters
            'norms': torch.full((100,), -1.0, dtype=torch.float64),
        }

    @property
    def memory(self):
        """What is remembered of all parameters together. The first group has it, because
        torch.distributed.checkpoint saves only groups and the state of single parameters."""
        return self.param_groups[0]['spam']

    def update_all(self, todo):
        for key in ('counts', 'norms'):  # new and loaded ones may lie on the CPU
            self.memory[key] = self.memory[key].to(todo[0][1].weight.device)
        self.memory['updates'] += 1
        cut, fired = SPAM_MODES[self.spam_mode](self, todo)
        self.memory['counts'][0].add_((cut > 0) | fired)
        self.memory['counts'][1].add_(cut)
        self.memory['counts'][2].add_(self.since_reset() == 0)

    def since_reset(self):
        """Updates since the last reset, or since the start; 0 in the update with a reset."""
        updates = self.memory['updates']
        return updates % self.spam_interval if self.spam_interval else updates

    def recovering(self):
        """Whether the last update lay in the warm-up after a reset, when moments say little: the
        one with the reset or the spam_warmup updates after it."""
        was_reset = 0 < self.spam_interval <= self.memory['updates']
        return was_reset and self.since_reset() <= self.spam_warmup

    def counters(self):
        """{'spikes': updates that cut something or met a spike of the norm, 'clipped': gradient
        elements, 'resets'}; waits for the device once."""
        return dict(zip(('spikes', 'clipped', 'resets'), self.memory['counts'].tolist()))


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

    def update_all(self, todo):
        self.pruner.put_back()
        raised = [({**group, 'lr': group['lr'] * self.pruner.rate_factor(group)}, part)
                  for group, part in todo]
        self.BASES[self.base].update_all(self, raised)
        self.pruner.step()
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


# --- by name --------------------------------------------------------------------------------------


def build_adamw(groups, s, flats, compiled):
    return AdamW(groups, s.learning_rate, (s.beta1, s.beta2), weight_decay=s.weight_decay,
                 flats=flats, compiled=compiled)


def build_adamwspam(groups, s, flats, compiled):
    return AdamWSPAM(groups, s.learning_rate, (s.beta1, s.beta2), weight_decay=s.weight_decay,
                     spam_mode=s.spam_mode, spam_interval=s.spam_interval,
                     spam_warmup=s.spam_warmup, flats=flats, compiled=compiled)


OPTIMIZERS = {  # name -> function (groups, settings, flats, compiled); one entry adds an optimizer
    'adamw': build_adamw,
    'adamwspam': build_adamwspam,
    'adamwprune': build_adamw,  # train.py has a prune.Pruner beside any optimizer
}
