"""The optimizers: one update in one pass over memory for all of them, and the learning-rate schedule.

Training keeps three kinds of numbers apart. Working weights are what the model reads (bfloat16 on a GPU), master
weights and moments are float32 and belong to the optimizer, and gradients accumulate in float32 over the
micro-batches. All of them live in a few flat tensors (flat.py).
"""
import math

import torch

import prune
import spam
from flat import views_of


def learning_rate_at(step, peak, minimum, warmup, decay):
    """Learning rate of update `step` (from 0): linear warm-up, cosine to `minimum` at `decay`, constant after it."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step >= decay:
        return minimum
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (decay - warmup)))


def adamw_update(weight, grad, exp_avg, exp_avg_sq, working, clip, finite, keep, step_size, root, *, beta1, beta2, eps, theta=None,
                 v_floor=0.0, clipped=None, carry=None, max_exp_avg_sq=None, mask=None, dense=False, srste=0.0):
    """AdamW (arXiv 1711.05101, algorithm 2) in place on tensors of one shape, float32 or float64; options that are off
    leave no trace in the compiled kernel.

    weight: master weights; working: what the model reads if that is another tensor, or None; grad: any float type.
    0-dimensional tensors, so that a new value compiles nothing anew: clip scales the gradient, finite = False leaves
    everything as it was, keep = 1 - lr * weight_decay, step_size = lr / (1 - beta1^t), root = sqrt(1 - beta2^t).
    theta (0-dim) bounds g^2 by theta * (exp_avg_sq + v_floor), where that is not 0 (SPAM, arXiv 2501.06842), and the
    elements it cut are added to `clipped` (0-dim int64). carry: two 0-dim factors of the moments, 0 at a reset.
    max_exp_avg_sq: AMSGrad's maximum of v. mask: bool, False = pruned. dense: the master stays as it is where pruned,
    only `working` is 0 there, and srste * weight is added to those gradients (SR-STE, arXiv 2102.04010).
    """
    g = grad.to(weight.dtype) * clip
    if theta is not None:
        usual = exp_avg_sq + v_floor
        limit = (theta * usual).sqrt()
        spike = (g.abs() > limit) & (usual > 0)  # an element without history would otherwise be frozen for ever
        clipped.add_(torch.where(finite, spike.sum(), 0))
        g = torch.where(spike, torch.copysign(limit, g), g)
    if srste:
        g = torch.where(mask, g, g + srste * weight)
    m, v = (exp_avg, exp_avg_sq) if carry is None else (exp_avg * carry[0], exp_avg_sq * carry[1])
    m = torch.lerp(m, g, 1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    highest = v if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq, v)
    w = weight * keep - step_size * m / (highest.sqrt() / root + eps)
    if mask is not None and not dense:
        w = torch.where(mask, w, 0)
    exp_avg.copy_(torch.where(finite, m, exp_avg))
    exp_avg_sq.copy_(torch.where(finite, v, exp_avg_sq))
    if max_exp_avg_sq is not None:
        max_exp_avg_sq.copy_(torch.where(finite, highest, max_exp_avg_sq))
    weight.copy_(torch.where(finite, w, weight))
    if working is not None:
        working.copy_(torch.where(mask, weight, 0) if dense else weight)


class AdamW(torch.optim.Optimizer):
    """Drop-in for torch.optim.AdamW with the same defaults; `step()` reads `p.main_grad` if there is one, else `p.grad`.

    A parameter of less than float32 gets float32 master weights and moments: `state[p]` has `step`, `exp_avg`,
    `exp_avg_sq` and, where needed, `master`. compiled=True fuses the update; meant for few, large parameters.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, compiled=False):
        for name, value, fine in (('lr', lr, lr >= 0), ('eps', eps, eps >= 0), ('weight_decay', weight_decay, weight_decay >= 0),
                                  ('betas', betas, all(0 <= beta < 1 for beta in betas))):
            if not fine:
                raise ValueError(f'{type(self).__name__}: {name}={value} is out of range')
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay))
        self.set_compiled(compiled)
        self.shared = {}  # state of the optimizer as a whole: 0-dim tensors and buffers on the device, ints on the host

    def set_compiled(self, compiled):
        self.update = torch.compile(adamw_update, fullgraph=True, dynamic=False) if compiled else adamw_update

    def state_of(self, p):
        """The state of parameter p, created at first use."""
        state = self.state[p]
        if not state:
            exact = torch.promote_types(p.dtype, torch.float32)
            state['step'] = 0
            state['exp_avg'] = torch.zeros_like(p, dtype=exact)
            state['exp_avg_sq'] = torch.zeros_like(p, dtype=exact)
            if exact != p.dtype:
                state['master'] = p.detach().to(exact)
        return state

    @torch.no_grad()
    def step(self, closure=None, clip=None, finite=None, norm=None):
        """One update. clip: 0-dim tensor that scales all gradients (default 1); finite: 0-dim bool tensor, False skips;
        norm: 0-dim tensor, the 2-norm of all gradients before clip, computed here if it is needed and not given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        todo = [(group, p, getattr(p, 'main_grad', p.grad)) for group in self.param_groups for p in group['params']]
        todo = [each for each in todo if each[2] is not None]
        if todo:
            device = todo[0][1].device
            now = self.before_update([grad for _, _, grad in todo], torch.ones((), device=device) if clip is None else clip, finite, norm)
            now.setdefault('finite', torch.full((), True, device=device) if finite is None else finite)
            for group, p, grad in todo:
                self._update_one(group, p, grad, now)
            self.after_update(now)
        return loss

    def before_update(self, grads, clip, finite, norm):
        """What all parameters of this step share: `clip`, `finite` if known, and what subclasses add (`lr_factor` scales the
        learning rate, `decay` = 0 turns weight decay off)."""
        return {'clip': clip, **({} if finite is None else {'finite': finite})}

    def after_update(self, now):
        """What subclasses do after the update of all parameters."""

    def options(self, group, p, grad, now):
        """(gradient, step of the bias correction, options of adamw_update; among them `clip` if it has changed, and `lr_factor`)."""
        return grad, self.state[p]['step'], {}

    def _update_one(self, group, p, grad, now):
        state = self.state_of(p)
        state['step'] += 1
        grad, step, options = self.options(group, p, grad, now)
        (beta1, beta2), lr = group['betas'], group['lr'] * now.get('lr_factor', 1.0) * options.pop('lr_factor', 1.0)
        exact = state['exp_avg'].dtype

        def scalar(value):
            return torch.full((), value, dtype=exact, device=p.device)

        self.update(
            state.get('master', p.detach()), grad, state['exp_avg'], state['exp_avg_sq'],
            p.detach() if 'master' in state else None, options.pop('clip', now['clip']).to(exact), now['finite'],
            scalar(1 - lr * group['weight_decay'] * now.get('decay', 1)), scalar(lr / (1 - beta1 ** step)),
            scalar(math.sqrt(1 - beta2 ** step)), beta1=beta1, beta2=beta2, eps=group['eps'], **options)

    def state_dict(self):
        """As in torch, with the shared state beside that of the parameters."""
        return {**super().state_dict(), **({'shared': dict(self.shared)} if self.shared else {})}

    def load_state_dict(self, state_dict):
        """As in torch, except that every tensor keeps the type it was saved in."""
        super().load_state_dict(state_dict)  # torch casts them to the parameter's type
        parameters = [p for group in self.param_groups for p in group['params']]
        for index, saved in state_dict['state'].items():
            self.state[parameters[index]] = copied(saved, parameters[index].device)
        self.load_shared(state_dict.get('shared', {}))

    def load_shared(self, saved):
        for key, value in copied(saved, None).items():
            if torch.is_tensor(self.shared.get(key)):
                self.shared[key].copy_(value)
            else:
                self.shared[key] = value


def copied(tree, device):
    """A tree of dicts with every tensor copied to `device` (None: where it is)."""
    if isinstance(tree, dict):
        return {key: copied(value, device) for key, value in tree.items()}
    return tree.detach().to(device or tree.device, copy=True) if torch.is_tensor(tree) else tree


def pieces(group, tensor):
    """name -> view of `tensor`, which is like the group's flat parameter; without a layout {'': tensor}."""
    return views_of(group['layout'], tensor) if 'layout' in group else {'': tensor}


class AdamWSPAM(AdamW):
    """AdamW that survives gradient spikes. Updates are counted from 0.

    spam_mode 'paper' (SPAM, arXiv 2501.06842): before update t > 0, if spam_interval divides t, m and v are zeroed; the
    bias correction goes on. Updates k = 0 ... spam_warmup from there have their learning rate (that of the decay too)
    scaled by 1 - 0.99 (1 + cos(pi k / (spam_warmup + 1))) / 2. Where g^2 > theta v, |g| becomes sqrt(theta v), but not in
    the first spam_grace updates after the start or a reset, nor where v = 0.
    'reference': what the runs of 2025 did: theta (v + 1e-12), from the second update on; if the gradient norm is more
    than 2 standard deviations above the mean of the last 100 (10 at least), m x 0.5 and v x 0.9; the resets, with a ramp
    (1 - cos(pi k / spam_warmup)) / 2 of at least 0.001; AMSGrad, whose maximum is not reset. Its defects are the last
    three settings, see spam.Cycle.
    'stable' (Stable-SPAM, arXiv 2502.17055): AdaClip and AdaGN (spam.stabilise) on each tensor, or each of a group's
    `layout`; the reset restarts the bias correction of m and v instead of warming up.

    spam_theta=None: 5000 in 'paper', 50 in 'reference', while 'stable' has none; spam_grace is for 'paper' alone.
    spam_interval=0: no resets. A gradient that is not finite skips the step; the clocks on the host count it. All
    parameters lie on one device. ValueError: a setting out of range.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, compiled=False, *, spam_mode='paper',
                 spam_interval=500, spam_warmup=150, spam_theta=None, spam_grace=20, spam_step_twice=False, spam_lr_sticks=False,
                 spam_decay_lost=False):
        super().__init__(params, lr, betas, eps, weight_decay, compiled)
        self.cycle = None
        if spam_mode is not None:  # AdamWPrune's base 'adamw'
            theta = spam.MODES.get(spam_mode) if spam_theta is None or spam_mode == 'stable' else spam_theta
            self.cycle = spam.Cycle(spam_mode, spam_interval, spam_warmup, theta, spam_grace, spam_step_twice, spam_lr_sticks,
                                    spam_decay_lost)
            spam.check_cycle(type(self).__name__, self.cycle, prune.known)
        device = self.param_groups[0]['params'][0].device
        self.shared = {'updates': 0, **{key: torch.zeros((), dtype=torch.int64, device=device) for key in ('spikes', 'clipped', 'resets')}}
        if spam_mode == 'reference':
            self.shared.update(spam.new_history(device))

    def state_of(self, p):
        new, state = not self.state[p], super().state_of(p)
        if new and self.cycle:
            state['restart'] = 0  # value of `step` from which the bias correction counts
            exact = state['exp_avg']
            if self.cycle.mode == 'reference':
                state['max_exp_avg_sq'] = torch.zeros_like(exact)
            if self.cycle.mode == 'stable':
                state.update({key: exact.new_zeros(len(self.group_of(p).get('layout', ('',)))) for key in spam.LEVELS})
        return state

    def group_of(self, p):
        return next(group for group in self.param_groups if any(p is q for q in group['params']))

    def before_update(self, grads, clip, finite, norm):
        """Adds where the cycle stands (`reset`, `theta`), whether 'reference' fires, and what the moments are multiplied by (`carry`)."""
        t = self.shared['updates']
        self.shared['updates'] += 1
        now = super().before_update(grads, clip, finite, norm)
        if self.cycle is None:
            return now
        if norm is None and (finite is None or self.cycle.mode == 'reference'):
            norms = [torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
            norm = torch.linalg.vector_norm(torch.stack([each.double() for each in norms]))
        if finite is None:
            now['finite'] = finite = norm.isfinite()
        now.update(reset=self.cycle.is_reset(t), lr_factor=self.cycle.lr_factor(t), decay=not self.cycle.decay_lost,
                   hits=torch.zeros_like(self.shared['clipped']), fired=torch.zeros_like(finite))
        if self.cycle.theta is not None:
            now['theta'] = torch.full((), self.cycle.threshold(t), dtype=torch.float32, device=clip.device)
        if self.cycle.mode == 'reference':
            now['fired'] = spam.z_score_fires(self.shared, norm, finite)
        rest = 0.0 if now['reset'] else 1.0
        now['carry'] = [torch.where(now['fired'], factor * rest, rest) for factor in spam.DAMPING]
        if now['reset']:
            self.shared['resets'].add_(finite)
        return now

    def options(self, group, p, grad, now):
        """Adds the handling of spikes; 'stable' makes another gradient, clipped by itself."""
        if self.cycle is None:
            return super().options(group, p, grad, now)
        state, exact = self.state[p], self.state[p]['exp_avg'].dtype
        options = {'carry': [factor.to(exact) for factor in now['carry']], 'max_exp_avg_sq': state.get('max_exp_avg_sq')}
        if 'theta' in now:
            v_floor = spam.V_FLOOR if self.cycle.mode == 'reference' else 0.0
            options.update(theta=now['theta'].to(exact), clipped=now['hits'], v_floor=v_floor)
        if self.cycle.mode == 'stable':
            if now['reset']:
                state['restart'] = state['step'] - 1
            out = grad if hasattr(p, 'main_grad') else torch.empty_like(grad, dtype=exact)  # main_grad is ours, p.grad the user's
            now['hits'].add_(spam.stabilise(list(pieces(group, grad).values()), list(pieces(group, out).values()), state,
                                            now['clip'].to(exact), now['finite'], state['step'], group['eps']))
            grad, options['clip'] = out, torch.ones_like(now['clip'])
        return grad, state['step'] - state['restart'], options

    def after_update(self, now):
        if self.cycle:
            self.shared['clipped'].add_(now['hits'])
            self.shared['spikes'].add_((now['hits'] > 0) | now['fired'])

    def restart_at(self, step):
        """Where the bias correction restarted last, `step` updates done."""
        if self.cycle is None or self.cycle.mode != 'stable' or step == 0:
            return 0
        return step - 1 - self.cycle.since_reset(step - 1)[1]

    def counters(self):
        """{'spikes': steps on which something was clipped or the norm's z-score fired, 'clipped': gradient elements,
        'resets'}; waits for the device once."""
        names = ('spikes', 'clipped', 'resets')
        return dict(zip(names, torch.stack([self.shared[name] for name in names]).tolist()))


class AdamWPrune(AdamWSPAM):
    """AdamW or AdamWSPAM (`base`) that prunes as it trains, by scores (prune.SCORES) from its own weights and moments.

    Pruned is every parameter of two dimensions or more, all of them one scope. A group whose one parameter is flat says
    what is in it by `layout` (name -> (offset, shape)) and what of that is pruned by `prunable` (names).
    After n updates, counted from 1, the scope's sparsity is prune.sparsity_at(n, schedule, target_sparsity, start, end,
    interval): the step() that completes update n = start + k * interval, or n = end, ends with a choice of masks. From `end`
    on they stay. Inside the spike warm-up after a reset no masks are chosen, but as soon as it is over. A step that is
    skipped (finite = False) still keeps to the schedule, choosing by the weights and moments as they are.

    regrow=False: a pruned weight stays 0. regrow=True: its master lives on, moved by the gradient at the masked weight
    and by srste * weight (SR-STE, arXiv 2102.04010; 0: plain straight-through), and may be chosen again before `end`;
    for float32 parameters this takes masters apart. pattern '2:4': two of each four inputs go, all at `start`.
    allocation 'layer': every matrix at the scope's sparsity, instead of one threshold. lr_power: the learning rate of pruned
    parameters, as wholes (the positions beside a pruned embedding), over (1 - sparsity)^lr_power; 1: sparse muP, arXiv 2405.15743.
    Memory beyond `base`: `state[p]['mask']`, one bool a weight (True = keep); movement needs `initial` besides, one more
    number a weight, bitter10 three, hence only with allow_extra_memory=True. ValueError: what cannot be done.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, compiled=False, *, start, end, interval=100,
                 base='adamw', score='bitter7', target_sparsity=0.5, schedule='zhu_gupta', regrow=False, srste=0.0,
                 pattern='unstructured', allocation='global', lr_power=0.0, allow_extra_memory=False, **spam_settings):
        prune.known('AdamWPrune: base', base, ('adamw', 'adamwspam'))
        if base == 'adamw' and spam_settings:
            raise ValueError(f"AdamWPrune: {', '.join(spam_settings)} given, but base='adamw'; use base='adamwspam'")
        super().__init__(params, lr, betas, eps, weight_decay, compiled, **({'spam_mode': None} if base == 'adamw' else spam_settings))
        self.score, self.target, self.start, self.end, self.interval = score, target_sparsity, start, end, interval
        self.schedule, self.regrow, self.srste, self.pattern = schedule, regrow, srste, pattern
        self.allocation, self.lr_power = allocation, lr_power
        self.last = start if pattern == '2:4' and not regrow else end  # updates after which the masks are final
        self.shared.update(masked_at=-1, pruned=0)  # updates done at the last choice of masks; weights pruned by it
        self.check(allow_extra_memory)

    def check(self, allow_extra_memory):
        """ValueError if the pruning settings, or the parameters with them, are impossible."""
        def require(condition, message):
            if not condition:
                raise ValueError(f'AdamWPrune: {message}')

        prune.known('AdamWPrune: score', self.score, prune.SCORES)
        prune.known('AdamWPrune: schedule', self.schedule, prune.SCHEDULES)
        prune.known('AdamWPrune: pattern', self.pattern, ('unstructured', '2:4'))
        prune.known('AdamWPrune: allocation', self.allocation, ('global', 'layer'))
        require(0 <= self.start < self.end and self.interval >= 1,
                f'start={self.start} end={self.end} interval={self.interval}: need 0 <= start < end and interval >= 1')
        require(0 <= self.target < 1, f'target_sparsity={self.target} must be at least 0 and below 1')
        require(self.lr_power >= 0, f'lr_power={self.lr_power} must not be negative')
        require(self.srste >= 0, f'srste={self.srste} must not be negative')
        require(self.regrow or not self.srste, f'srste={self.srste} acts on weights that may regrow; set regrow=True')
        require(self.score != 'bitter10' or allow_extra_memory, "score='bitter10' keeps three more numbers a weight; allow it by "
                "allow_extra_memory=True, or use 'bitter10z', which does without")
        c = self.cycle
        require(not c or not c.interval or c.warmup + c.step_twice < c.interval - 1, f'spam_interval={c and c.interval} spam_warmup='
                f'{c and c.warmup}: no masks are chosen in the warm-up, and it would never be over; lengthen the interval')
        shapes = [shape for *_, shape in self.scope()]
        require(shapes, 'no parameter has two dimensions or more, or is named in `prunable`: there is nothing to prune')
        if self.pattern == '2:4':
            require(self.target == 0.5, f"target_sparsity={self.target}: pattern='2:4' prunes exactly half; set 0.5")
            wrong = [tuple(shape) for shape in shapes if shape[-1] % 4]
            require(not wrong, f"pattern='2:4' needs a last dimension that is a multiple of 4, unlike {wrong}")
        else:
            limits = [n - prune.kept_at_least(n, prune.FLOOR) for n in map(math.prod, shapes)]
            total, counts = self.counts(self.target)
            require(total <= sum(limits) and all(a <= b for a, b in zip(counts or [], limits)),
                    f'target_sparsity={self.target} would prune {total} of {self.scope_size()} weights, but {prune.FLOOR:.0%} of each of '
                    f'{len(shapes)} matrices stay, so that at most {sum(limits)} can go')

    def scope(self):
        """[(group, parameter, name in the layout or '', shape)] of all that is pruned, in order."""
        return [(group, p, name, shape) for group in self.param_groups for p in group['params']
                if 'layout' in group or p.dim() >= 2 for name, (_, shape) in group.get('layout', {'': (0, p.shape)}).items()
                if 'layout' not in group or name in group.get('prunable', ())]

    def scoped_parameters(self):
        """[(group, parameter, names of its pieces that are pruned)], in order."""
        scope, found = self.scope(), {}
        for group, p, name, _ in scope:
            found.setdefault(id(p), (group, p, []))[2].append(name)
        return list(found.values())

    def scope_size(self):
        return sum(math.prod(shape) for *_, shape in self.scope())

    @property
    def sparsity(self):
        """Share of the scope's weights that is pruned, exact, known without asking the device."""
        return self.shared['pruned'] / self.scope_size()

    @property
    def frozen(self):
        return self.shared['masked_at'] >= self.last

    def state_of(self, p):
        new, state = not self.state[p], super().state_of(p)
        names = new and [name for _, q, name, _ in self.scope() if q is p]
        if names:
            state['mask'] = torch.ones_like(p, dtype=torch.bool)
            if self.regrow and 'master' not in state:
                state['master'] = p.detach().clone()
            if self.score == 'movement':
                state['initial'] = state.get('master', p.detach()).clone()
            if self.score == 'bitter10':
                views = pieces(self.group_of(p), state['exp_avg'])
                state['trackers'] = {name: prune.new_tracker(views[name]) for name in names}
        return state

    def options(self, group, p, grad, now):
        """Adds the mask, SR-STE while weights may regrow, and the learning rate of what is left."""
        grad, step, options = super().options(group, p, grad, now)
        if 'mask' in self.state[p]:
            dense = self.regrow and not self.frozen
            options.update(mask=self.state[p]['mask'], dense=dense, srste=self.srste if dense else 0.0,
                           lr_factor=(1 - self.sparsity) ** -self.lr_power)
        return grad, step, options

    def after_update(self, now):
        super().after_update(now)
        if self.score == 'bitter10' and not self.frozen:
            self.track(now['finite'])
        n = self.shared['updates']
        due = self.last if n >= self.last else n - (n - self.start) % self.interval  # the latest choice that should be
        if n >= self.start and due > self.shared['masked_at'] and not (self.cycle and self.cycle.recovering(n - 1)):
            self.choose_masks(n)

    def choose_masks(self, n):
        """New masks as of n updates, and the weights by them."""
        self.shared['masked_at'] = n
        sparsity = self.target if self.pattern == '2:4' else prune.sparsity_at(
            n, self.schedule, self.target, self.start, self.end, self.interval)
        total, counts = self.counts(sparsity)
        if total == 0:
            return
        self.shared.update(pruned=total, **({'counts': counts} if counts else {}))
        views, scores = [], []
        for group, p, names in self.scoped_parameters():
            state = self.state_of(p)
            views += [pieces(group, state['mask'])[name] for name in names]
            scores += self.scores_of(group, p, state, names)
        if self.pattern == '2:4':
            masks = prune.select_2_4(scores)
        elif counts:
            masks = prune.select_each(scores, [count / s.numel() for count, s in zip(counts, scores)])
        else:
            masks = prune.select(scores, sparsity, prune.FLOOR)
        torch._foreach_copy_(views, masks)
        self.apply_masks()

    def scores_of(self, group, p, state, names):
        """Scores of the named pieces of p; in one go over all of p where the score is element-wise, for launches are dear."""
        def score(name=None, **tracker):
            tensors = {key: state[key] for key in ('exp_avg', 'exp_avg_sq', 'mask', 'initial') if key in state}
            tensors['weight'] = state.get('master', p.detach())
            if name is not None:
                tensors = {key: pieces(group, tensor)[name] for key, tensor in tensors.items()}
            found = prune.score(self.score, tensors['weight'], tensors['exp_avg'], tensors['exp_avg_sq'], betas=group['betas'],
                                step=max(1, state['step'] - state.get('restart', 0)), initial=tensors.get('initial'), **tracker)
            # what is pruned for good goes first, so that masks only shrink
            return found if self.regrow else found.masked_fill_(~tensors['mask'], -math.inf)

        if self.score == 'bitter10':  # its factors are those of a matrix
            return [score(name, tracker=state['trackers'][name]) for name in names]
        found = pieces(group, score())
        return [found[name] for name in names]

    def apply_masks(self):
        for p, state in self.state.items():
            if 'mask' in state:
                gone = ~state['mask']
                if 'master' in state:
                    p.copy_(state['master'])
                    if self.frozen or not self.regrow:
                        state['master'].masked_fill_(gone, 0)
                p.masked_fill_(gone, 0)

    def counts(self, sparsity):
        """(weights to prune in all, how many of each matrix where that is decided beforehand, else None)."""
        sizes = [math.prod(shape) for *_, shape in self.scope()]
        if self.pattern == '2:4':
            return sum(sizes) // 2, None
        total = round(sparsity * sum(sizes))
        if self.score != 'bitter4' and self.allocation == 'global':
            return total, None
        names = [name for _, _, name, _ in self.scope()]
        layers = prune.depths(names) if any(names) else range(len(names))
        shares = prune.layer_sparsities(sizes, layers, sparsity, **({} if self.score == 'bitter4' else dict(first=1.0, last=1.0, cap=1.0)))
        counts = [round(share * size) for share, size in zip(shares, sizes)]
        before = self.shared.get('counts', [0] * len(counts))
        if not self.regrow:  # rounding may hand a matrix one weight less than before, which would have to regrow
            counts = [max(pair) for pair in zip(counts, before)]
            for i, count in enumerate(counts):
                counts[i] -= min(sum(counts) - total, max(0, count - before[i]))
        return total, counts

    def track(self, finite):
        """bitter10: the update just made, up to a factor and without the decay, goes into the trackers."""
        for group, p, name, _ in self.scope():
            state = self.state_of(p)
            if state['step'] == 0:
                continue
            m, v = (pieces(group, state[key])[name] for key in ('exp_avg', 'exp_avg_sq'))
            root = math.sqrt(1 - group['betas'][1] ** (state['step'] - state.get('restart', 0)))
            old = state['trackers'][name]
            new = prune.track(old, -m / (v.sqrt() / root + group['eps']))
            state['trackers'][name] = {key: torch.where(finite, value, old[key]) for key, value in new.items()}


def build_optimizer(flats, *, lr, betas, eps, weight_decay, compiled=False, optimizer='adamw', prunable=(), **options):
    """Optimizer over the tensors of flatten(); weight decay is for the matrices (GPT-2/3 practice, as in nanoGPT).

    optimizer: adamw, adamwspam or adamwprune; options: further arguments of that class. prunable: names of the matrices
    that AdamWPrune may prune. ValueError: a name that there is not.
    """
    *matrices, vectors = flats
    names = [name for flat in matrices for name in flat.layout]
    for name in prunable:
        prune.known('prunable', name, names)
    kinds = {'adamw': AdamW, 'adamwspam': AdamWSPAM, 'adamwprune': AdamWPrune}
    groups = [dict(params=[flat.parameter], weight_decay=0.0 if flat is vectors else weight_decay, layout=flat.layout,
                   prunable=set(prunable) & set(flat.layout)) for flat in flats]
    return kinds[prune.known('optimizer', optimizer, kinds)](groups, lr=lr, betas=betas, eps=eps, compiled=compiled, **options)
