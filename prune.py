"""Pruning: which weights to keep, and how many, while any optimizer trains them.

A score says what a weight is worth (higher = keep), a schedule says how many may stay, a selection
turns both into masks (True = keep), and a Pruner does all of it beside an optimizer. Selection is
exact: of n weights round(sparsity * n) go, and among equal scores those at the lower position. It
compares integers only, hence the masks are the same on every device and rank.
"""
import difflib
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch

EPSILON = 1e-12  # keeps divisions finite; Adam's usual 1e-8 would be as large as sqrt(v) itself
FLOOR = 0.01  # share of each matrix that a Pruner always keeps: an empty matrix cuts its block off
CAP = 0.95  # highest sparsity that bitter4's factors may give a matrix
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
    'bitter0': lambda w, m, v: w.abs() * (w.abs() * relative_step(m, v).abs()),
    'bitter1': lambda w: w.abs(),
    'bitter2': lambda w: w.abs(),  # its preset trains 21% longer
    'bitter3': lambda w, m: w.abs() * root(m),
    'bitter4': lambda w, m: w.abs() * root(m),  # layer by layer: layer_sparsities
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
    'tracker': 'tracker',  # see new_tracker
}


def inputs_of(name):
    """The arguments of score() that the score `name` is computed from."""
    return {INPUTS[argument] for argument in inspect.signature(SCORES[name]).parameters}


def score(name, weight, exp_avg, exp_avg_sq, *, step, betas, initial=None, tracker=None):
    """What each weight of a matrix is worth, higher = keep: float32 of the shape of `weight`.

    exp_avg, exp_avg_sq: Adam's raw moments; None will do where the score uses none. step: updates
    done, which with betas corrects the bias of bitter8's moment. ValueError: unknown name, or what
    it needs is missing.
    """
    known('score', name, SCORES)
    given = dict(weight=weight, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, initial=initial,
                 tracker=tracker)
    inputs = {}
    for argument in inspect.signature(SCORES[name]).parameters:
        value = given[INPUTS[argument]]
        if value is None:
            raise ValueError(f'score {name!r} needs {INPUTS[argument]}=')
        inputs[argument] = value.detach().float() if torch.is_tensor(value) else value
    if 'm_hat' in inputs:
        if step < 1:
            raise ValueError(f'score {name!r} corrects the bias of m: step={step} must be above 0')
        inputs['m_hat'] = inputs['m_hat'] / (1 - betas[0] ** step)
    return SCORES[name](**inputs)


def new_tracker(weight):
    """What bitter10 remembers of a matrix's updates: 3 float32 tensors of its shape, 4 scalars."""
    tracker = {}
    for key in ('last', 'average', 'size'):
        tracker[key] = torch.zeros_like(weight, dtype=torch.float32)
    for key, neutral in (('count', 0.0), ('flip', 0.0), ('cos_dir', 1.0), ('jitter', 0.0)):
        tracker[key] = torch.full((), neutral, device=weight.device)
    return tracker


def track(tracker, update, decay=0.9):
    """Take one more update of the matrix (or anything proportional to it) into its tracker.

    flip: share of the weights whose update has another sign than the last one. cos_dir: cosine of
    the update and the exponential average of those before it, negative ones as 0. jitter: mean
    distance of |update| from its own exponential average, relative to the mean of that average.
    The first update leaves all three neutral.
    """
    u = update.detach().float()
    usual = tracker['size'].mean()
    distance = (u.abs() - tracker['size']).abs().mean()
    tracker['flip'].copy_((u.sign() * tracker['last'].sign() < 0).float().mean())
    tracker['cos_dir'].copy_(cosine(u, tracker['average']).clamp(min=0))
    tracker['jitter'].copy_(torch.where(usual > 0, distance / usual.clamp(min=TINY), 0.0))
    rate = (1 / (tracker['count'] + 1)).clamp(min=1 - decay)  # at first a plain mean
    tracker['last'].copy_(u)
    tracker['average'].lerp_(u, rate)
    tracker['size'].lerp_(u.abs(), rate)
    tracker['count'].add_(1)


def cosine(a, b):
    """Of two tensors as vectors, 0-dim; 1, which changes no score, if one of them is zero."""
    a = a / a.abs().max().clamp(min=TINY)  # because squares of 1e-20 are 0
    b = b / b.abs().max().clamp(min=TINY)
    norms = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return torch.where(norms > 0, (a * b).sum() / norms.clamp(min=EPSILON), 1.0)


# --- selection ------------------------------------------------------------------------------------


def sort_keys(scores):
    """float32 -> int32 (n,) that compare alike: NaN < -inf < ... < -0 = +0 < ... < inf."""
    if scores.dtype != torch.float32:
        raise ValueError(f'scores must be float32, not {scores.dtype}')
    bits = scores.detach().reshape(-1).view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    keys = torch.where(bits < 0, -magnitude, magnitude)
    return keys.masked_fill_(magnitude > 0x7F800000, -0x7FFFFFFF)


def lowest(keys, count):
    """(n,) bool: the `count` lowest keys of (n,), among equal ones those at the lower position.

    The sort takes some 35 bytes a key on a GPU (int64 positions, scratch): 4 GiB for 124M keys.
    """
    order = keys.argsort(stable=True)
    return torch.zeros_like(keys, dtype=torch.bool).index_fill_(0, order[:count], True)


def most_that_can_go(n, floor):
    kept = math.ceil(round(floor * n, 6))  # rounded, because 0.07 * 100 is a hair above 7
    return n - kept


def select(scores, sparsity, floor=0.0):
    """Masks (True = keep) of a list of float32 scores: the round(sparsity * n) lowest of all n go.

    floor: share of each tensor, rounded up, that stays whatever the others score: its highest. The
    total stays exact. NaN counts as the lowest score. Waits for the device if there is a floor.
    ValueError: a sparsity out of reach.
    """
    if not 0 <= sparsity <= 1 or not 0 <= floor <= 1:
        raise ValueError(f'sparsity={sparsity} and floor={floor} must lie between 0 and 1')
    sizes = [s.numel() for s in scores]
    limits = [most_that_can_go(n, floor) for n in sizes]
    total = round(sparsity * sum(sizes))
    if total > sum(limits):
        raise ValueError(f'sparsity={sparsity} would prune {total} of {sum(sizes)} weights, but a '
                         f'floor of {floor} of each of {len(scores)} tensors lets {sum(limits)} go')
    if not scores:
        return []
    together = torch.cat([sort_keys(s) for s in scores])  # (n,)
    keys = together.split(sizes)
    while True:
        pruned = lowest(together, total).split(sizes)
        lost = torch.stack([each.sum() for each in pruned]).tolist() if floor else limits
        over = [i for i, limit in enumerate(limits) if lost[i] > limit]
        if not over:
            return [~each.view(s.shape) for each, s in zip(pruned, scores)]
        for i in over:  # what the floor keeps is lifted out of reach
            keys[i].masked_fill_(~lowest(keys[i], limits[i]), 0x7FFFFFFF)


def select_each(scores, counts):
    """As select, but tensor by tensor: the counts[i] lowest of scores[i] go."""
    return [~lowest(sort_keys(s), count).view(s.shape) for s, count in zip(scores, counts)]


def select_2_4(scores):
    """Masks of matrices (..., inputs): the two highest of each four neighbours along the inputs,
    which sparse tensor cores want. Ties as in select. ValueError: inputs no multiple of four."""
    masks = []
    for i, s in enumerate(scores):
        if s.dim() == 0 or s.size(-1) % 4:
            raise ValueError(f'tensor {i} of shape {tuple(s.shape)}: 2:4 needs an input dimension '
                             'that is a multiple of 4')
        order = sort_keys(s).view(-1, 4).argsort(dim=1, stable=True)  # (n / 4, 4)
        keep = torch.ones_like(order, dtype=torch.bool).scatter_(1, order[:, :2], False)
        masks.append(keep.view(s.shape))
    return masks


def layer_sparsities(sizes, layers, sparsity, first=0.7, last=1.3, cap=CAP):
    """Sparsity of each matrix: `first` of the target in the first layer, `last` in the last
    (bitter4: 0.7 and 1.3), linear between, at most `cap`, scaled so that the pruned weights
    (integers) sum to round(sparsity * sum(sizes)).

    sizes: weights of each matrix; layers: its depth, any numbers. A matrix passes `cap` by less
    than one weight. ValueError: a target above `cap`.
    """
    if not 0 <= sparsity <= cap:
        raise ValueError(f'sparsity={sparsity} must lie between 0 and {cap}, the cap of each layer')
    total = round(sparsity * sum(sizes))
    low = min(layers)
    span = max(layers) - low
    factors = [first + (last - first) * (layer - low) / span if span else 1.0 for layer in layers]
    capped = set()
    while True:  # a capped matrix passes on what it cannot take, which may cap the next
        free = [i for i in range(len(sizes)) if i not in capped]
        left = total - sum(cap * sizes[i] for i in capped)
        scale = left / (sum(sizes[i] * factors[i] for i in free) or 1)
        wanted = [cap if i in capped else scale * f for i, f in enumerate(factors)]
        over = {i for i in free if wanted[i] > cap}
        if not over:
            break
        capped |= over
    counts = [math.floor(share * size) for share, size in zip(wanted, sizes)]
    by_remainder = sorted(range(len(sizes)), key=lambda i: counts[i] - wanted[i] * sizes[i])
    for i in by_remainder[:total - sum(counts)]:
        counts[i] += 1
    return [count / size for count, size in zip(counts, sizes)]


def never_fewer(counts, before):
    """`counts` with the same sum but none below `before`, because what is pruned stays pruned."""
    owed = sum(max(0, least - count) for count, least in zip(counts, before))
    found = []
    for count, least in zip(counts, before):
        given = min(owed, max(0, count - least))
        owed -= given
        found.append(max(count, least) - given)
    return found


def depth(name):
    """Number of the layer in a parameter's name, such as 3 in blocks.3.mlp; -1 without one,
    because what lies outside the layers is mostly the embedding, which comes first."""
    numbers = [int(part) for part in name.split('.') if part.isdigit()]
    return numbers[0] if numbers else -1


# --- schedules ------------------------------------------------------------------------------------

SCHEDULES = {  # share of the target at t, the share of the ramp that is done
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
    """Prunes the matrices that an optimizer trains: call step() after each optimizer.step(), before
    zero_grad(). Any torch.optim.Optimizer will do, as far as it keeps what the score needs.

    The scope is all parameters of two or more dimensions that require a gradient and have one at
    the first step(), except in groups with prune=False. The step() that completes update n =
    start + k * interval, or n = end, chooses masks, so that after n updates the share
    sparsity_at(n, ...) of the scope is 0. From `end` on masks stay; pattern '2:4' without regrow
    prunes all at `start`.

    Its state: `masks` {parameter: bool, True = keep}; `pruned`, how many weights, known without
    asking the device; `dense` {parameter: its weights without mask} while they may regrow;
    `updates` done; `masked_at`, updates done when masks were last chosen. ValueError: what cannot
    be done.
    """
    optimizer: torch.optim.Optimizer
    _: KW_ONLY
    score: str  # of SCORES
    target_sparsity: float  # of the scope, below 1
    start: int  # updates before the first choice of masks
    end: int  # updates before the last one
    interval: int = 100  # updates between choices
    schedule: str = 'zhu_gupta'  # of SCHEDULES
    regrow: bool = False  # pruned weights keep learning in `dense`, and until `end` may return
    srste: float = 0.0  # their gradients grow by srste * weight (SR-STE, arXiv 2102.04010)
    pattern: str = 'unstructured'  # or '2:4': two of each four inputs go
    allocation: str = 'global'  # one threshold for the scope, or 'layer': each matrix its share
    lr_power: float = 0.0  # for rate_factor, by which the caller multiplies the learning rates
    allow_extra_memory: bool = False  # bitter10 needs it: it keeps three more numbers a weight
    hold: Callable | None = None  # while hold() is true no masks are chosen, but right after it

    def __post_init__(self):
        known('Pruner: score', self.score, SCORES)
        known('Pruner: schedule', self.schedule, SCHEDULES)
        known('Pruner: pattern', self.pattern, ('unstructured', '2:4'))
        known('Pruner: allocation', self.allocation, ('global', 'layer'))
        for_good = self.pattern == '2:4' and not self.regrow
        self.last = self.start if for_good else self.end  # updates to the final masks
        self.named = named_matrices(self.optimizer)  # until the first step() all that may get masks
        self.updates = 0
        self.masked_at = -1
        self.pruned = 0
        self.counts = [0] * len(self.named)  # pruned weights of each matrix, where planned ahead
        self.check()
        self.masks = {}
        self.dense = {}
        self.trackers = {}
        self.initial = {}
        if 'initial' in inputs_of(self.score):
            self.initial = {p: p.detach().clone() for p in self.named.values()}
        if self.regrow:
            self.optimizer.register_step_pre_hook(self.put_back)

    def check(self):
        """ValueError if the settings, or the parameters with them, are impossible."""
        def require(condition, message):
            if not condition:
                raise ValueError(f'Pruner: {message}')

        target = self.target_sparsity
        require(0 <= self.start < self.end and self.interval >= 1,
                f'start={self.start} end={self.end} interval={self.interval}: need 0 <= start < '
                'end and interval >= 1')
        require(0 <= target < 1, f'target_sparsity={target} must be at least 0 and below 1')
        for name, value in (('lr_power', self.lr_power), ('srste', self.srste)):
            require(value >= 0, f'{name}={value} must not be negative')
        require(self.regrow or not self.srste,
                f'srste={self.srste} acts on weights that may regrow; set regrow=True')
        require('tracker' not in inputs_of(self.score) or self.allow_extra_memory,
                f'score={self.score!r} keeps three more numbers a weight; allow it by '
                "allow_extra_memory=True, or use 'bitter10z', which does without")
        require(self.named, 'no parameter has two dimensions or more, requires a gradient and is '
                'in a group without prune=False: there is nothing to prune')
        if self.pattern == '2:4':
            wrong = [tuple(p.shape) for p in self.named.values() if p.size(-1) % 4]
            require(target == 0.5,
                    f"target_sparsity={target}: pattern='2:4' prunes exactly half; set 0.5")
            require(not wrong,
                    f"pattern='2:4' needs a last dimension that is a multiple of 4, unlike {wrong}")
            return
        self.planned_counts(target)  # refuses what bitter4's cap forbids
        limits = [most_that_can_go(p.numel(), FLOOR) for p in self.named.values()]
        total = round(target * self.scope_size)
        require(total <= sum(limits),
                f'target_sparsity={target} would prune {total} of {self.scope_size} weights, but '
                f'{FLOOR:.0%} of each of {len(limits)} matrices stay, so that at most '
                f'{sum(limits)} can go')

    @property
    def scope_size(self):
        """Weights in the scope."""
        return sum(p.numel() for p in self.named.values())

    @property
    def sparsity(self):
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
    def step(self):
        """Follow one optimizer.step(): choose masks if they are due, and zero what is pruned."""
        if not self.masks:
            self.fix_scope()
        self.updates += 1
        if self.trackers and not self.frozen:
            self.track()
        if self.is_due() and not (self.hold and self.hold()):
            self.choose_masks()
        if self.pruned:
            self.apply_masks()

    def fix_scope(self):
        """Leave out what has no gradient. ValueError: nothing has one, or a moment is missing."""
        learning = [name for name, p in self.named.items() if p.grad is not None]
        if not learning:
            raise ValueError('Pruner: no matrix has a gradient; call step() after optimizer.step() '
                             'and before zero_grad()')
        self.begin(learning)
        needed = inputs_of(self.score) & {'exp_avg', 'exp_avg_sq'}
        for p in self.masks:
            missing = sorted(needed - self.state_of(p).keys())
            if missing:
                raise ValueError(f"Pruner: score={self.score!r} needs {' and '.join(missing)}, "
                                 f'which {type(self.optimizer).__name__} does not keep; use '
                                 "'magnitude' or 'movement'")

    def begin(self, names):
        """Make these matrices the scope, nothing of them pruned."""
        self.named = {name: self.named[name] for name in names}
        self.counts = [0] * len(names)
        self.masks = {p: torch.ones_like(p, dtype=torch.bool) for p in self.named.values()}
        if self.initial:
            self.initial = {p: self.initial[p] for p in self.masks}
        if 'tracker' in inputs_of(self.score):
            self.trackers = {p: new_tracker(p) for p in self.masks}

    def state_of(self, p):
        return self.optimizer.state.get(p, {})

    def weight_of(self, p):
        """What the optimizer updates: p, or the float32 master that it keeps of p."""
        return self.state_of(p).get('master', p).detach()

    def is_due(self):
        """Whether a choice of masks is due, or overdue because `hold` was true."""
        n = self.updates
        if n < self.start:
            return False
        due = self.last if n >= self.last else n - (n - self.start) % self.interval
        return due > self.masked_at

    def choose_masks(self):
        """New masks by the weights and moments as they are."""
        self.masked_at = self.updates
        sparsity = self.target_sparsity
        if self.pattern == 'unstructured':
            sparsity = sparsity_at(self.updates, self.schedule, sparsity, self.start, self.end,
                                   self.interval)
        self.pruned = round(sparsity * self.scope_size)
        if self.pruned == 0:
            return
        groups = group_of_each(self.optimizer)
        scores = [self.scores_of(p, groups[p]) for p in self.masks]
        counts = self.planned_counts(sparsity)
        if self.pattern == '2:4':
            masks = select_2_4(scores)
        elif counts:
            self.counts = counts
            masks = select_each(scores, counts)
        else:
            masks = select(scores, sparsity, FLOOR)
        torch._foreach_copy_(list(self.masks.values()), masks)

    def scores_of(self, p, group):
        """Scores of the matrix p; what is pruned for good goes first, so that masks only shrink."""
        state = self.state_of(p)
        found = score(self.score, self.weight_of(p), state.get('exp_avg'), state.get('exp_avg_sq'),
                      step=int(state.get('step', 0)), betas=group.get('betas'),
                      initial=self.initial.get(p), tracker=self.trackers.get(p))
        return found if self.regrow else found.masked_fill(~self.masks[p], -math.inf)

    def planned_counts(self, sparsity):
        """How many weights of each matrix go, where that does not depend on scores, else None."""
        if self.pattern == '2:4' or (self.score != 'bitter4' and self.allocation == 'global'):
            return None
        sizes = [p.numel() for p in self.named.values()]
        if self.score == 'bitter4':
            shares = layer_sparsities(sizes, [depth(name) for name in self.named], sparsity)
        else:
            shares = layer_sparsities(sizes, [0] * len(sizes), sparsity, cap=1.0)
        counts = [round(share * size) for share, size in zip(shares, sizes)]
        return counts if self.regrow else never_fewer(counts, self.counts)

    def apply_masks(self):
        """Zero what is pruned; while it may regrow, keep the weights as they are in `dense`."""
        if self.frozen:
            self.dense.clear()
        elif self.regrow:
            self.dense = self.dense or {p: torch.empty_like(self.weight_of(p)) for p in self.masks}
            for p, dense in self.dense.items():
                dense.copy_(self.weight_of(p))
        for p, mask in self.masks.items():
            gone = ~mask
            p.masked_fill_(gone, 0)
            if 'master' in self.state_of(p):
                self.weight_of(p).masked_fill_(gone, 0)

    @torch.no_grad()
    def put_back(self, optimizer, arguments, options):
        """Before optimizer.step(): the dense weights return, SR-STE joins their gradients."""
        if len(arguments) > 1 or options.get('closure'):
            raise ValueError('Pruner: regrow=True does not go with step(closure), which would take '
                             'the loss of the dense weights; call backward() before step()')
        for p, dense in self.dense.items():
            self.weight_of(p).copy_(dense)
            if self.srste and p.grad is not None:
                p.grad.add_((self.srste * dense).masked_fill_(self.masks[p], 0))

    def track(self):
        """bitter10: the update just made, up to a factor and without decay, goes into trackers."""
        groups = group_of_each(self.optimizer)
        for p, tracker in self.trackers.items():
            if p.grad is not None:
                state = self.state_of(p)
                root_correction = math.sqrt(1 - groups[p]['betas'][1] ** int(state['step']))
                usual = state['exp_avg_sq'].sqrt() / root_correction + groups[p]['eps']
                track(tracker, -state['exp_avg'] / usual)

    def state_dict(self):
        """Numbers, and tensors by the parameters' names; not copied."""
        saved = {key: getattr(self, key) for key in ('updates', 'masked_at', 'pruned', 'counts')}
        for key in ('masks', 'dense', 'initial', 'trackers'):
            kept = getattr(self, key)
            saved[key] = {name: kept[p] for name, p in self.named.items() if p in kept}
        return saved

    def load_state_dict(self, saved):
        """Continue where state_dict() was taken. ValueError: it is of other parameters."""
        for name in saved['masks'].keys() - self.named.keys():
            raise ValueError(f'Pruner: the saved state has a mask of {name!r}, which is not among '
                             f'the {len(self.named)} matrices here')
        if saved['masks']:
            self.begin(saved['masks'])
        for key in ('updates', 'masked_at', 'pruned', 'counts'):
            setattr(self, key, saved[key])
        for key in ('masks', 'dense', 'initial', 'trackers'):
            tensors = {self.named[name]: value for name, value in saved[key].items()}
            setattr(self, key, {p: copied(value, p.device) for p, value in tensors.items()})


def copied(value, device):
    """A tensor, or a dict with tensors in it, copied to `device`; numbers as they are."""
    if isinstance(value, dict):
        return {key: copied(each, device) for key, each in value.items()}
    return value.detach().to(device, copy=True) if torch.is_tensor(value) else value


def named_matrices(optimizer):
    """{name: parameter} of all that may be pruned. Without names, positions are the names."""
    found = {}
    position = 0
    for group in optimizer.param_groups:
        names = group.get('param_names', itertools.count(position))
        position += len(group['params'])
        for name, p in zip(names, group['params']):
            if group.get('prune', True) and p.dim() >= 2 and p.requires_grad:
                found[str(name)] = p
    return found


def group_of_each(optimizer):
    """{parameter: its group}."""
    found = {}
    for group in optimizer.param_groups:
        found.update(dict.fromkeys(group['params'], group))
    return found
