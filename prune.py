"""Pruning: which weights to keep, and how many, while any optimizer trains them.

A score says what a weight is worth (higher = keep), a schedule how many may stay, a selection turns
both into masks (True = keep), and a Pruner does all of it beside an optimizer. Selection is exact,
and compares integers only, hence the masks are the same on every device and rank.
"""
import difflib
import inspect
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

EPSILON = 1e-12  # keeps divisions finite; Adam's usual 1e-8 would be as large as sqrt(v) itself
FLOOR = 0.01  # share of each matrix that always stays: an empty one cuts its block off
TINY = torch.finfo(torch.float32).tiny


def known(what, name, choices):
    """ValueError, with a guess at what was meant, if `name` is none of the choices."""
    if name not in choices:
        close = difflib.get_close_matches(str(name), choices, 1)
        hint = f"; did you mean '{close[0]}'?" if close else ''
        raise ValueError(f"{what}={name!r} is not one of {', '.join(choices)}{hint}")


# --- scores ---------------------------------------------------------------------------------------


def relative_step(m, v):
    """The step that Adam takes, in learning rates and up to sign and bias correction."""
    return m / (v.sqrt() + EPSILON)


def root(m):
    return (m.abs() + EPSILON).sqrt()


def bitter10(w, m, v, tracker):
    """bitter3 times a factor of the matrix as a whole; v is for what feeds the tracker."""
    steadiness = (1 - tracker['flip']) * tracker['cos_dir'] * cosine(m, w).abs()
    return w.abs() * root(m) * (steadiness / (1 + tracker['jitter']))


# One entry is all that a new score takes. Its arguments say what it needs: see INPUTS. Products are
# ordered so that nothing under- or overflows on the way to a result that does not: neither m^2 nor
# w^2 is formed, because a float32 square is 0 below 1e-19. Scores without a paper are those of the
# AdamWPrune experiments of 2025.
SCORES = {
    'magnitude': lambda w: w.abs(),
    'movement': lambda w, w0: w * (w - w0),  # arXiv 2005.07683
    'zeros': lambda w0: (w0 != 0).float(),  # for fine-tuning: what is 0 at the start stays 0
    'bitter0': lambda w, m, v: w.abs() * (w.abs() * relative_step(m, v).abs()),
    'bitter1': lambda w: w.abs(),
    'bitter2': lambda w: w.abs(),  # its preset trains 21% longer
    'bitter3': lambda w, m: w.abs() * root(m),
    'bitter4': lambda w, m: w.abs() * root(m),  # layer by layer: layer_factors
    'bitter5': lambda w, m, v: 0.1 * w.abs() - w.sign() * relative_step(m, v),
    'bitter6': lambda w, m, v: w.abs() * root(m) * (m.abs() / (v + EPSILON).sqrt()),
    'bitter7': lambda w, v: w.abs() * (v + EPSILON).sqrt().sqrt(),
    # bitter8 and bitter9 are those of October 2025. A month later their author gave the two names
    # to variants of bitter7 in half precision.
    'bitter8': lambda w, m_hat: w.abs() * root(m_hat),
    'bitter9': lambda w, m, v: w.abs() * root(m) - 0.1 * w.sign() * relative_step(m, v),
    'bitter10': bitter10,
    'bitter10z': lambda w, m, v: w.abs() * root(m) * relative_step(m, v).abs(),
}
INPUTS = {  # argument of a score -> that of score() which it is made of
    'w': 'weight',
    'm': 'exp_avg',
    'v': 'exp_avg_sq',
    'm_hat': 'exp_avg',  # with its bias corrected
    'w0': 'initial',  # the weight when the Pruner was made
    'tracker': 'tracker',  # see track
}


def inputs_of(name):
    """{argument of the score `name`: that of score() which it is made of}."""
    return {argument: INPUTS[argument] for argument in inspect.signature(SCORES[name]).parameters}


def score(name: str, weight: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, *,
          step: int, betas: tuple[float, float] | None, initial: Tensor | None = None,
          tracker: dict | None = None) -> Tensor:
    """What each weight of a matrix is worth, higher = keep: float32 of the shape of `weight`.

    exp_avg, exp_avg_sq: Adam's raw moments, None where the score uses none; step: updates done.
    ValueError: an unknown name, or what it needs is missing.
    """
    known('score', name, SCORES)
    given = dict(weight=weight, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, initial=initial,
                 tracker=tracker)
    inputs = {}
    for argument, source in inputs_of(name).items():
        value = given[source]
        if value is None:
            raise ValueError(f'score {name!r} needs {source}=')
        inputs[argument] = value.detach().float() if torch.is_tensor(value) else value
    if 'm_hat' in inputs:
        if step < 1:
            raise ValueError(f'score {name!r} corrects the bias of m: step={step} must be above 0')
        inputs['m_hat'] = inputs['m_hat'] / (1 - betas[0] ** step)
    return SCORES[name](**inputs)


def track(tracker, update):
    """Take an update of a matrix, or anything proportional to it, into its tracker, {} at first:
    three float32 tensors of its shape and a few scalars, which the first update leaves neutral.

    flip: share of the weights whose update has another sign than the last one. cos_dir: cosine of
    the update and the exponential average of those before it, negative ones as 0. jitter: mean
    distance of |update| from its own exponential average, relative to the mean of that average.
    """
    u = update.float()
    if not tracker:
        tracker.update(count=0, last=u, average=torch.zeros_like(u), size=u.abs())
    distance = (u.abs() - tracker['size']).abs().mean()
    tracker['flip'] = (u.sign() * tracker['last'].sign() < 0).float().mean()
    tracker['cos_dir'] = cosine(u, tracker['average']).clamp(min=0)
    tracker['jitter'] = distance / tracker['size'].mean().clamp(min=TINY)
    tracker['count'] += 1
    rate = max(1 / tracker['count'], 0.1)  # at first a plain mean
    tracker['last'] = u
    tracker['average'].lerp_(u, rate)
    tracker['size'].lerp_(u.abs(), rate)


def cosine(a, b):
    """Of two tensors as vectors, 0-dim; 1, which changes no score, if one of them is zero."""
    a = a / a.abs().max().clamp(min=TINY)  # because squares of 1e-20 are 0
    b = b / b.abs().max().clamp(min=TINY)
    norms = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return torch.where(norms > 0, (a * b).sum() / norms.clamp(min=EPSILON), 1.0)


# --- selection ------------------------------------------------------------------------------------


def sort_keys(scores):
    """float32 -> int32 (n,) that compare alike: NaN < -inf < ... < -0 = +0 < ... < inf."""
    bits = scores.detach().float().reshape(-1).view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    keys = torch.where(bits < 0, -magnitude, magnitude)
    return keys.masked_fill_(magnitude > 0x7F800000, -0x7FFFFFFF)


def lowest(keys, count):
    """(n,) bool: the `count` lowest keys of (n,), among equal ones those at the lower position.

    The sort takes some 35 bytes a key on a GPU (int64 positions, scratch): 4 GiB for 124M keys.
    """
    order = keys.argsort(stable=True)
    return torch.zeros_like(keys, dtype=torch.bool).index_fill_(0, order[:count], True)


def most_that_can_go(sizes, sparsity, floor):
    """How many weights of each tensor the floor lets go. ValueError: too few for `sparsity`."""
    # Rounded, because 0.07 * 100 is a hair above 7.
    limits = [n - math.ceil(round(floor * n, 6)) for n in sizes]
    if not 0 <= sparsity <= 1 or round(sparsity * sum(sizes)) > sum(limits):
        raise ValueError(f'target_sparsity={sparsity} is out of reach: {sum(limits)} of '
                         f'{sum(sizes)} weights can go, because {floor:.0%} of each matrix stay')
    return limits


def select(scores: list[Tensor], sparsity: float, floor: float = 0.0) -> list[Tensor]:
    """Masks (True = keep) of a list of scores: the round(sparsity * n) lowest of all n go.

    floor: share of each tensor, rounded up, that stays whatever the others score: its highest. The
    total stays exact. NaN counts as the lowest score.
    """
    sizes = [s.numel() for s in scores]
    limits = most_that_can_go(sizes, sparsity, floor)
    keys = torch.cat([sort_keys(s) for s in scores])  # (n,)
    pruned = lowest(keys, round(sparsity * len(keys))).split(sizes)
    counts = torch.stack([each.sum() for each in pruned]).tolist()
    if any(count > limit for count, limit in zip(counts, limits)):
        for own, limit in zip(keys.split(sizes), limits):  # lift what the floor keeps out of reach
            own.masked_fill_(~lowest(own, limit), 0x7FFFFFFF)
        pruned = lowest(keys, round(sparsity * len(keys))).split(sizes)
    return [~each.view(s.shape) for each, s in zip(pruned, scores)]


def select_2_4(scores: Tensor) -> Tensor:
    """Mask of a matrix (..., inputs): the two highest of each four neighbours along the inputs,
    which sparse tensor cores want. Ties as in select."""
    order = sort_keys(scores).view(-1, 4).argsort(dim=1, stable=True)  # (n / 4, 4)
    keep = torch.ones_like(order, dtype=torch.bool).scatter_(1, order[:, :2], False)
    return keep.view(scores.shape)


def ranked(scores, factor):
    """Scores in the same order, even between 0 and 1 / factor, -inf as it is: of matrices ranked so
    select takes shares that are to each other as their factors."""
    ranks = sort_keys(scores).argsort(stable=True).argsort().double()  # (n,)
    even = ((ranks + 0.5) / (len(ranks) * factor)).float().view(scores.shape)
    return even.masked_fill_(scores == -math.inf, -math.inf)


def layer_factors(names):
    """Of bitter4: 0.7 in the first layer to 1.3 in the last. The layer is the number in a name, as
    in blocks.3.mlp; a name without one comes first, because it is mostly the embedding."""
    numbers = [re.search(r'\b\d+\b', name) for name in names]
    layers = [int(number[0]) if number else -1 for number in numbers]
    span = max(layers) - min(layers) or 1
    return [0.7 + 0.6 * (layer - min(layers)) / span for layer in layers]


# --- schedules ------------------------------------------------------------------------------------

SCHEDULES = {  # t, the share of the ramp that is done -> share of the target
    'linear': lambda t: t,
    'zhu_gupta': lambda t: 1 - (1 - t) ** 3,  # arXiv 1710.01878, equation 1, from 0
    'cubic_late': lambda t: t ** 3,
}


def sparsity_at(step, schedule, target, start, end, interval):
    """Share of pruned weights in force after `step` updates: 0 before start, the target from end
    on, constant between the choices at start + k * interval."""
    if step < start:
        return 0.0
    if step >= end:
        return target
    return target * SCHEDULES[schedule]((step - start) // interval * interval / (end - start))


# --- the pruner -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Pruner:
    """Prunes the matrices that any torch.optim.Optimizer trains: call step() after each of its
    steps, before zero_grad(). ValueError: what cannot be done.

    The scope is all parameters of two or more dimensions that have a gradient at the first step(),
    except in groups with prune=False. The step() that completes update n = start + k * interval, or
    n = end, chooses masks, so that after n updates the share sparsity_at(n, ...) of the scope is 0.
    From `end` on masks stay; '2:4' without regrow prunes all at `start`.
    """
    optimizer: torch.optim.Optimizer
    _: KW_ONLY
    score: str  # of SCORES
    target_sparsity: float  # of the scope, below 1
    start: int  # updates before the first choice of masks
    end: int  # updates before the last one
    interval: int = 100  # updates between choices
    schedule: str = 'zhu_gupta'  # of SCHEDULES
    regrow: bool = False  # pruned weights learn on in `dense` and may return; no step(closure)
    srste: float = 0.0  # their gradients grow by srste * weight (SR-STE, arXiv 2102.04010)
    pattern: str = 'unstructured'  # or '2:4': two of each four inputs go
    allocation: str = 'global'  # one threshold for the scope, or 'layer': each matrix its share
    lr_power: float = 0.0  # for rate_factor, by which the caller multiplies the learning rates
    allow_extra_memory: bool = False  # bitter10 needs it: it keeps three more numbers a weight
    hold: Callable | None = None  # while hold() is true no masks are chosen, but right after it
    hooked: bool = True  # False: the caller calls put_back() before each update

    def __post_init__(self):
        if self.score == 'zeros':  # the first step() chooses, and nothing else has a say in it
            self.start, self.end = 0, 1
        for_good = self.pattern == '2:4' and not self.regrow
        self.last = self.start if for_good else self.end  # updates to the final masks
        self.named = named_matrices(self.optimizer)  # {name: parameter}, see fix_scope
        self.floor = 0.05 if self.score == 'bitter4' else FLOOR
        self.check()
        if self.optimizer.defaults.get('maximize'):  # gradients are climbed, and SR-STE goes down
            self.srste = -self.srste
        self.updates = 0
        self.masked_at = -1  # updates done when masks were last chosen
        self.pruned = 0  # weights, known without asking the device
        self.masks = {}  # {parameter: bool tensor, True = keep}, as the next three
        self.dense = {}  # weights without mask, while they may regrow
        self.trackers = {}
        self.initial = {}
        if 'w0' in inputs_of(self.score):
            self.initial = {p: p.detach().clone() for p in self.named.values()}
        self.hook()

    def hook(self):
        if self.regrow and self.hooked:
            self.optimizer.register_step_pre_hook(self.put_back)

    def __setstate__(self, state):
        """Of a copy, in which optimizers have no hooks."""
        self.__dict__.update(state)
        self.hook()

    def check(self):
        """ValueError if the arguments, or the parameters with them, are impossible."""
        def require(condition, message):
            if not condition:
                raise ValueError(f'Pruner: {message}')

        known('Pruner: score', self.score, SCORES)
        known('Pruner: schedule', self.schedule, SCHEDULES)
        known('Pruner: pattern', self.pattern, ('unstructured', '2:4'))
        known('Pruner: allocation', self.allocation, ('global', 'layer'))
        require(0 <= self.start < self.end and self.interval >= 1,
                f'start={self.start} end={self.end} interval={self.interval}: need 0 <= start < '
                'end and interval >= 1')
        for name, value in (('lr_power', self.lr_power), ('srste', self.srste)):
            require(value >= 0, f'{name}={value} must not be negative')
        require(self.score != 'bitter10' or self.allow_extra_memory,
                "score='bitter10' keeps three more numbers a weight; allow it by "
                "allow_extra_memory=True, or use 'bitter10z', which does without")
        require(self.named, 'there is nothing to prune: no matrix requires a gradient and is in a '
                'group without prune=False')
        require(not any(p.is_complex() for p in self.named.values()),
                'complex parameters have no order; prune their torch.view_as_real')
        if self.pattern == 'unstructured':
            sizes = [p.numel() for p in self.named.values()]
            most_that_can_go(sizes, self.target_sparsity, self.floor)
            return
        require(self.target_sparsity == 0.5,
                f"target_sparsity={self.target_sparsity}: pattern='2:4' prunes exactly half")
        wrong = [tuple(p.shape) for p in self.named.values() if p.size(-1) % 4]
        require(not wrong,
                f"pattern='2:4' needs a last dimension that is a multiple of 4, unlike {wrong}")

    @property
    def scope_size(self):
        """Weights in the scope."""
        return sum(p.numel() for p in self.named.values())

    @property
    def sparsity(self) -> float:
        """Share of the scope that is pruned, exact, known without asking the device."""
        return self.pruned / self.scope_size

    @property
    def frozen(self):
        """Whether the masks are final."""
        return self.masked_at >= self.last

    def rate_factor(self, group):
        """(1 - sparsity) ** -lr_power for a group with pruned parameters, else 1.0. A power of 1 is
        sparse muP (arXiv 2405.15743)."""
        if any(p in self.masks for p in group['params']):
            return (1 - self.sparsity) ** -self.lr_power
        return 1.0

    def sparsity_by_name(self):
        """{name of a pruned matrix: its sparsity}; waits for the device once."""
        gone = [(~mask).sum() for mask in self.masks.values()]
        counts = torch.stack(gone).tolist() if gone else []
        return {name: n / p.numel() for n, (name, p) in zip(counts, self.named.items())}

    @torch.no_grad()
    def step(self) -> None:
        """Follow one optimizer.step(): choose masks if they are due, and zero what is pruned."""
        if not self.masks:
            self.fix_scope()
        self.updates += 1
        if not self.frozen:
            for p, tracker in self.trackers.items():
                state = self.state_of(p)
                track(tracker, relative_step(state['exp_avg'], state['exp_avg_sq']))
        if self.is_due() and not (self.hold and self.hold()):
            self.choose_masks()
        if self.pruned:
            self.apply_masks()

    def fix_scope(self):
        """Leave out what has no gradient. ValueError: nothing has one, or a moment is missing."""
        self.named = {name: p for name, p in self.named.items() if p.grad is not None}
        if not self.named:
            raise ValueError('Pruner: no matrix has a gradient; call step() after optimizer.step() '
                             'and before zero_grad()')
        needed = set(inputs_of(self.score).values())
        for p in self.named.values():
            missing = sorted(needed & {'exp_avg', 'exp_avg_sq'} - self.state_of(p).keys())
            if missing:
                raise ValueError(f"Pruner: score={self.score!r} needs {' and '.join(missing)}, "
                                 f'which {type(self.optimizer).__name__} does not keep; use '
                                 "'magnitude' or 'movement'")
            self.masks[p] = torch.ones_like(p, dtype=torch.bool)
            if 'tracker' in needed:
                self.trackers[p] = {}

    def state_of(self, p):
        return self.optimizer.state.get(p, {})

    def is_due(self):
        """Whether a choice of masks is due, or overdue because `hold` was true."""
        due = min(self.updates, self.last)
        if due < self.last:
            due -= (due - self.start) % self.interval
        return due >= self.start and due > self.masked_at

    def choose_masks(self):
        """New masks by the weights and moments as they are."""
        self.masked_at = self.updates
        if self.score == 'zeros':
            masks = [self.initial[p] != 0 for p in self.masks]
            self.pruned = sum((~mask).sum() for mask in masks).item()
            self.initial.clear()
        elif self.pattern == '2:4':
            masks = [select_2_4(s) for s in self.scores()]
            self.pruned = self.scope_size // 2
        else:
            sparsity = sparsity_at(self.updates, self.schedule, self.target_sparsity, self.start,
                                   self.end, self.interval)
            masks = select(self.scores(), sparsity, self.floor)
            self.pruned = round(sparsity * self.scope_size)
        torch._foreach_copy_(list(self.masks.values()), masks)

    def scores(self):
        """Of each matrix; what is pruned for good goes first, so that masks only shrink."""
        groups = {}
        for group in self.optimizer.param_groups:
            groups.update(dict.fromkeys(group['params'], group))
        found = []
        for p, mask in self.masks.items():
            state = self.state_of(p)
            s = score(self.score, p, state.get('exp_avg'), state.get('exp_avg_sq'),
                      step=int(state.get('step', 0)), betas=groups[p].get('betas'),
                      initial=self.initial.get(p), tracker=self.trackers.get(p))
            found.append(s if self.regrow else s.masked_fill(~mask, -math.inf))
        if self.score == 'bitter4':
            return [ranked(s, factor) for s, factor in zip(found, layer_factors(self.named))]
        return [ranked(s, 1.0) for s in found] if self.allocation == 'layer' else found

    def apply_masks(self):
        """Zero what is pruned; while it may regrow, keep the weights as they are in `dense`."""
        if self.regrow and not self.frozen:
            # Not again if a GradScaler skipped the step, because p is masked since then.
            self.dense = self.dense or {p: p.clone() for p in self.masks}
        for p, mask in self.masks.items():
            p.masked_fill_(~mask, 0)

    @torch.no_grad()
    def put_back(self, *of_hook):
        """Before an update: the dense weights return, SR-STE joins their gradients."""
        for p, dense in self.dense.items():
            p.copy_(dense)
            if self.srste and p.grad is not None:
                p.grad.add_((self.srste * dense).masked_fill_(self.masks[p], 0))
        self.dense = {}

    def state_dict(self) -> dict:
        """Numbers, and tensors by the parameters' names; not copied."""
        saved = {key: getattr(self, key) for key in ('updates', 'masked_at', 'pruned')}
        for key in ('masks', 'dense', 'initial', 'trackers'):
            kept = getattr(self, key)
            saved[key] = {name: kept[p] for name, p in self.named.items() if p in kept}
        return saved

    def load_state_dict(self, saved):
        """Continue where state_dict() was taken."""
        if saved['masks']:
            self.named = {name: self.named[name] for name in saved['masks']}
        for key in ('updates', 'masked_at', 'pruned'):
            setattr(self, key, saved[key])
        for key in ('masks', 'dense', 'initial', 'trackers'):
            tensors = {self.named[name]: value for name, value in saved[key].items()}
            setattr(self, key, {p: copied(value, p.device) for p, value in tensors.items()})
        if self.regrow and self.pruned and not self.frozen and not self.dense:
            raise ValueError('Pruner: this state lacks the dense weights, without which nothing '
                             'regrows; load all of it (torch.save and torch.load keep it)')


def copied(value, device):
    """A tensor, or a dict with tensors in it, copied to `device`; numbers as they are."""
    if isinstance(value, dict):
        return {key: copied(each, device) for key, each in value.items()}
    return value.detach().to(device, copy=True) if torch.is_tensor(value) else value


def named_matrices(optimizer):
    """{name: parameter} of all that may be pruned. Without names, positions are the names."""
    found = {}
    positions = itertools.count()
    for group in optimizer.param_groups:
        for p, name in zip(group['params'], group.get('param_names', positions)):
            if group.get('prune', True) and p.dim() >= 2 and p.requires_grad:
                found[str(name)] = p
    return found
