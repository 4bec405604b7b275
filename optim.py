"""The optimizers, the learning rate, and how training lays parameters out in memory.

Working weights are what the model reads (bfloat16 on a GPU); masters, moments and accumulated
gradients are float32. All lie in a few flat tensors, so that an update is one kernel each, and the
optimizer is given views of the masters.
"""
import functools
import math
from typing import NamedTuple

import torch
import torch.nn as nn

import prune

# --- learning rate --------------------------------------------------------------------------------

LR_SCHEDULES = {  # share of the way down that is left at t, the share of the decay that is done
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
    """Move the model's parameters into flat tensors and return these, a list of Flat.

    The model's parameters become views of the working weights: matrices in `dtype`, vectors in the
    masters' type. accumulate() moves their gradients to `grads` after each backward.
    """
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
    groups = []
    for flat in flats:
        decay = 0.0 if flat.kind == 'vectors' else weight_decay
        chosen = {True: [], False: []}
        for name, p in flat.parameters.items():
            prunable = p.dim() >= 2 and name.startswith(PRUNE_SCOPES[prune_scope])
            chosen[prunable].append((name, p))
        for prunable, named in chosen.items():
            if named:
                groups.append(dict(params=named, weight_decay=decay, prune=prunable))
    return groups


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


class Part:
    """What is updated in one go: a parameter, or neighbours in a flat tensor that share a group."""

    def __init__(self, p, flat):
        self.parameters = [p]
        self.flat = flat  # or None
        self.master = None  # float32, of a parameter of less
        self.moments = []  # each like weight()

    def span(self):
        """Where it lies in its flat tensor, padding included."""
        last = self.parameters[-1]
        end = last.storage_offset() + padded(last.numel())
        return slice(self.parameters[0].storage_offset(), end)

    def weight(self):
        """What is updated, float32 or more."""
        if self.flat:
            return self.flat.masters[self.span()]
        return (self.parameters[0] if self.master is None else self.master).detach()

    def gradient(self, copy=False):
        """Of the type of weight(). In a flat it is ours to change, else only a copy is."""
        if self.flat:
            return self.flat.grads[self.span()]
        return self.parameters[0].grad.to(self.weight().dtype, copy=copy)

    def views(self, tensor):
        """Each parameter's share of a tensor like weight()."""
        if not self.flat:
            return [tensor]
        starts = [p.storage_offset() - self.span().start for p in self.parameters]
        return [tensor[i:i + p.numel()].view_as(p) for i, p in zip(starts, self.parameters)]


def parts_of(group, flats):
    """[Part] of one group of an optimizer."""
    homes = {}
    for flat in flats:
        homes.update(dict.fromkeys(flat.parameters.values(), flat))
    parts = []
    for p in group['params']:
        flat = homes.get(p)
        last = parts[-1] if parts else None
        if flat and last and last.flat is flat and last.span().stop == p.storage_offset():
            last.parameters.append(p)
        else:
            parts.append(Part(p, flat))
    return parts


class AdamW(torch.optim.Optimizer):
    """Drop-in for torch.optim.AdamW with the same defaults. ValueError: a value out of range.

    state[p] has `step`, `exp_avg`, `exp_avg_sq`, and below float32 a float32 `master`. Parameters
    of `flats` are updated in one go, with compiled=True by one kernel; a deepcopy has no flats.
    """
    moment_names = ('exp_avg', 'exp_avg_sq')

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *,
                 flats=(), compiled=False):
        for name, value in (('lr', lr), ('eps', eps), ('weight_decay', weight_decay)):
            self.require(value >= 0, f'{name}={value} must not be negative')
        in_range = all(0 <= beta < 1 for beta in betas)
        self.require(in_range, f'betas={betas} must be at least 0 and below 1')
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.compiled = compiled
        self._flats = flats
        self._parts = []  # parts_of each group

    def require(self, condition, message):
        if not condition:
            raise ValueError(f'{type(self).__name__}: {message}')

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups[len(self._parts):]:
            self._parts.append(parts_of(group, self._flats))
        todo = []
        for group, parts in zip(self.param_groups, self._parts):
            for part in parts:
                if part.flat or part.parameters[0].grad is not None:
                    self.advance(part)
                    todo.append((group, part))
        if todo:
            self.update_all(todo)
        return loss

    def advance(self, part):
        """Count a step. The first makes the moments, from loaded ones if there are any, and leaves
        views of them in the state."""
        first = self.state[part.parameters[0]]
        if not part.moments and part.weight().dtype.itemsize < 4:
            part.master = first.setdefault('master', part.weight().float())
        for name in self.moment_names[len(part.moments):]:
            moment = torch.zeros_like(part.weight())
            part.moments.append(moment)
            for p, view in zip(part.parameters, part.views(moment)):
                if name in self.state[p]:
                    view.copy_(self.state[p][name])
                self.state[p][name] = view
        for p in part.parameters:
            self.state[p]['step'] = int(self.state[p].get('step', 0)) + 1

    def update_all(self, todo):
        """Update [(group, part)], whose steps are counted."""
        for group, part in todo:
            self.update(group, part, part.gradient(), self.numbers(group, part, group['lr']))

    def numbers(self, group, part, lr):
        """(step_size, root_correction, keep, eps) of adamw_update."""
        step = self.state[part.parameters[0]]['step']
        beta1, beta2 = group['betas']
        root_correction = math.sqrt(1 - beta2 ** step)
        keep = 1 - lr * group['weight_decay']
        return lr / (1 - beta1 ** step), root_correction, keep, group['eps']

    def update(self, group, part, grad, numbers):
        """adamw_update of one part."""
        weight = part.weight()
        exp_avg, exp_avg_sq, *highest = part.moments
        function = self.function_for(part, adamw_update)
        if function is not adamw_update:
            numbers = [torch.full((), x, dtype=weight.dtype, device=weight.device) for x in numbers]
        function(weight, grad, exp_avg, exp_avg_sq, *numbers, *group['betas'], *highest)
        if part.master is not None:
            part.parameters[0].copy_(part.master)

    def function_for(self, part, function):
        """`function`, compiled where that pays: single parameters have too many shapes."""
        return compiled(function) if self.compiled and part.flat else function

    def load_state_dict(self, state_dict):
        """As in torch, except that every tensor keeps the type it was saved in."""
        super().load_state_dict({**state_dict, 'state': {}})  # torch would cast the state
        parameters = []
        for group in self.param_groups:
            parameters += group['params']
        for number, state in state_dict['state'].items():
            p = parameters[number]
            self.state[p] = prune.copied(state, p.device)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if not key.startswith('_')}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._flats = self.__dict__.get('_flats', ())
        self._parts = []


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


class Paper:
    """SPAM as in its authors' code (galore_torch/SPAM.py): eps joins sqrt(v) before the bias
    correction; weight decay comes after the step, and a warm-up does not scale it.

    Updates t are counted from 1. A mode's update_all(optimizer, todo, t) returns how many elements
    were cut (0-dim), and whether the norm of all gradients was a spike.
    """
    theta = 5000.0
    moment_names = AdamW.moment_names

    def __init__(self, interval, warmup, theta, grace):
        self.interval = interval  # updates between resets; 0: none
        self.warmup = warmup  # N: updates 0 ... N from a reset on are held back
        self.grace = grace  # updates after the start or a reset in which nothing is cut
        self.theta = self.theta if theta is None else theta

    def since_reset(self, t):
        return t % self.interval if self.interval else t

    def is_reset(self, t):
        return self.interval > 0 and t % self.interval == 0

    def recovering(self, t):
        """Whether update t lies in the N + 1 updates from a reset on."""
        return 0 < self.interval <= t and self.since_reset(t) <= self.warmup

    def update_all(self, optimizer, todo, t):
        cut = 0
        for group, part in todo:
            grad = part.gradient(copy=True)
            if self.is_reset(t):
                torch._foreach_zero_(part.moments)
            if self.since_reset(t) >= self.grace:
                cut += optimizer.clip(part, grad, self.theta)
            step_size, root, keep, eps = optimizer.numbers(group, part, group['lr'])
            numbers = (step_size * self.factor(t) * keep, root, keep, eps / root)
            optimizer.update(group, part, grad, numbers)
        return cut, False

    def factor(self, t):
        """Of the step, not of the decay."""
        done = self.since_reset(t) / (self.warmup + 1)
        return 1 - 0.99 * (1 + math.cos(math.pi * done)) / 2 if self.recovering(t) else 1.0


class Reference(Paper):
    """What the runs of 2025 did: a cut that leaves 1e-12 to elements without history, moments
    damped where the norm of all gradients is a spike, resets with a ramp from 0.001, AMSGrad."""
    theta = 50.0
    moment_names = (*AdamW.moment_names, 'max_exp_avg_sq')

    def update_all(self, optimizer, todo, t):
        norms = [torch.linalg.vector_norm(part.gradient()) for _, part in todo]
        norm = torch.linalg.vector_norm(torch.stack(norms).double())
        fired = is_norm_spike(norm, optimizer.memory['norms'])
        cut = 0
        for group, part in todo:
            grad = part.gradient(copy=True)
            if t > 1:
                cut += optimizer.clip(part, grad, self.theta, 1e-12)
            part.moments[0].mul_(1 - 0.5 * fired.double())
            part.moments[1].mul_(1 - 0.1 * fired.double())
            if self.is_reset(t):
                torch._foreach_zero_(part.moments[:2])
            numbers = optimizer.numbers(group, part, group['lr'] * self.factor(t))
            optimizer.update(group, part, grad, numbers)
        return cut, fired

    def factor(self, t):
        """Of the learning rate."""
        if not self.recovering(t) or self.warmup == 0:
            return 1.0
        return max(1e-3, (1 - math.cos(math.pi * self.since_reset(t) / self.warmup)) / 2)


class Stable(Paper):
    """Stable-SPAM (arXiv 2502.17055): AdaClip and AdaGN on each tensor; a reset restarts the bias
    correction (`step`) instead of a warm-up. state[p] has `levels`, see stabilise, and `seen`, the
    updates that went into them."""

    def update_all(self, optimizer, todo, t):
        cut = 0
        for group, part in todo:
            grad = part.gradient(copy=True)
            states = [optimizer.state[p] for p in part.parameters]
            if self.is_reset(t):
                torch._foreach_zero_(part.moments)
            for state in states:
                if 'levels' not in state:
                    state.update(levels=grad.new_zeros(3), seen=0)
                state['seen'] += 1
                state['step'] = 1 if self.is_reset(t) else state['step']
            levels = [state['levels'] for state in states]
            cut += stabilise(part.views(grad), levels, states[0]['seen'], group['eps'])
            optimizer.update(group, part, grad, optimizer.numbers(group, part, group['lr']))
        return cut, False


SPAM_MODES = {'paper': Paper, 'reference': Reference, 'stable': Stable}


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
    """AdamW that survives gradient spikes, in one of SPAM_MODES (None: plain AdamW).

    spam_interval: updates between resets of the moments, 0: none. spam_warmup: updates after one
    with a smaller step. spam_theta: g^2 may be theta v (None: 5000 in 'paper', 50 in 'reference').
    spam_grace: updates after the start or a reset in which 'paper' cuts nothing. All parameters lie
    on one device.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *,
                 spam_mode='paper', spam_interval=500, spam_warmup=150, spam_theta=None,
                 spam_grace=20, flats=(), compiled=False):
        super().__init__(params, lr, betas, eps, weight_decay, flats=flats, compiled=compiled)
        self.mode = None
        self.updates = 0
        device = self.param_groups[0]['params'][0].device
        self.memory = {  # what is remembered of all parameters together
            'counts': torch.zeros(3, dtype=torch.int64, device=device),  # as in counters
            'norms': torch.full((100,), -1.0, dtype=torch.float64, device=device),
        }
        if spam_mode is None:
            return
        prune.known(f'{type(self).__name__}: spam_mode', spam_mode, SPAM_MODES)
        whole = dict(interval=spam_interval, warmup=spam_warmup, grace=spam_grace)
        for name, value in whole.items():
            self.require(value >= 0, f'spam_{name}={value} must not be negative')
        self.require(spam_theta is None or spam_theta > 0,
                     f'spam_theta={spam_theta} must be above 0; math.inf cuts nothing')
        self.mode = SPAM_MODES[spam_mode](theta=spam_theta, **whole)
        self.moment_names = self.mode.moment_names

    def update_all(self, todo):
        self.updates += 1
        if self.mode is None:
            super().update_all(todo)
            return
        cut, fired = self.mode.update_all(self, todo, self.updates)
        self.memory['counts'][0].add_((cut > 0) | fired)
        self.memory['counts'][1].add_(cut)
        self.memory['counts'][2].add_(self.mode.is_reset(self.updates))

    def clip(self, part, grad, theta, least=0.0):
        """clip_spikes of one part."""
        return self.function_for(part, clip_spikes)(grad, part.moments[1], theta, least)

    def recovering(self):
        """Whether the last update lay in the warm-up after a reset, when moments say little."""
        return self.mode is not None and self.mode.recovering(self.updates)

    def counters(self):
        """{'spikes': updates that cut something or met a spike of the norm, 'clipped': gradient
        elements, 'resets'}; waits for the device once."""
        return dict(zip(('spikes', 'clipped', 'resets'), self.memory['counts'].tolist()))

    def state_dict(self):
        return {**super().state_dict(), 'spam': dict(updates=self.updates, **self.memory)}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.updates = state_dict['spam']['updates']
        for key, tensor in self.memory.items():
            tensor.copy_(state_dict['spam'][key])


# --- AdamW that prunes ----------------------------------------------------------------------------


class AdamWPrune(AdamWSPAM):
    """AdamW or AdamWSPAM (`base`) that prunes as it trains; state[p]['mask'] is True = keep.

    others: arguments of prune.Pruner, at least start and end; of AdamWSPAM if that is the base.
    The learning rate of groups with pruned parameters is multiplied by the pruner's rate_factor.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *,
                 base='adamw', score='bitter7', target_sparsity=0.5, flats=(), compiled=False,
                 **others):
        prune.known('AdamWPrune: base', base, ('adamw', 'adamwspam'))
        spam = {key: value for key, value in others.items() if key.startswith('spam_')}
        pruning = {key: value for key, value in others.items() if key not in spam}
        self.require(base == 'adamwspam' or not spam,
                     f"{', '.join(spam)} given, but base='adamw'; use base='adamwspam'")
        if base == 'adamw':
            spam = dict(spam_mode=None)
        super().__init__(params, lr, betas, eps, weight_decay, flats=flats, compiled=compiled,
                         **spam)
        endless = self.mode and 0 < self.mode.interval <= self.mode.warmup + 1
        self.require(not endless, 'no masks are chosen in the warm-up after a reset, which would '
                     'never be over; make spam_interval longer than spam_warmup + 1')
        self.pruner = prune.Pruner(self, score=score, target_sparsity=target_sparsity,
                                   hold=self.recovering, **pruning)

    def update_all(self, todo):
        raised = []
        for group, part in todo:
            lr = group['lr'] * self.pruner.rate_factor(group)
            raised.append(({**group, 'lr': lr}, part))
        super().update_all(raised)
        self.pruner.step()
        self.show_masks()

    def show_masks(self):
        for p, mask in self.pruner.masks.items():
            self.state[p]['mask'] = mask

    def state_dict(self):
        return {**super().state_dict(), 'pruner': self.pruner.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.pruner.load_state_dict(state_dict['pruner'])
        self.show_masks()

    def __setstate__(self, state):
        super().__setstate__(state)
        if 'pruner' in state and self.pruner.regrow:  # a copy has lost its hooks
            self.register_step_pre_hook(self.pruner.put_back)


# --- by name --------------------------------------------------------------------------------------


def build_adamw(groups, settings, flats, compiled):
    s = settings
    return AdamW(groups, s.learning_rate, (s.beta1, s.beta2), weight_decay=s.weight_decay,
                 flats=flats, compiled=compiled)


def build_adamwspam(groups, settings, flats, compiled):
    s = settings
    return AdamWSPAM(groups, s.learning_rate, (s.beta1, s.beta2), weight_decay=s.weight_decay,
                     spam_mode=s.spam_mode, spam_interval=s.spam_interval,
                     spam_warmup=s.spam_warmup, flats=flats, compiled=compiled)


OPTIMIZERS = {  # name -> function (groups, settings, flats, compiled); one entry adds an optimizer
    'adamw': build_adamw,
    'adamwspam': build_adamwspam,
    'adamwprune': build_adamw,  # train.py has a prune.Pruner beside any optimizer
}
