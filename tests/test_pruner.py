"""prune.Pruner under any optimizer, and AdamWPrune: masks that are never violated, sparsity to the
letter of the schedule, parameters that are left alone, and state that survives everything."""
import copy
import math

import pytest
import torch
import torch.nn as nn

import prune
from optim import AdamW, AdamWPrune
from prune import Pruner

PRUNING = [name for name in prune.SCORES if name != 'zeros']  # it prunes nothing of a dense start

RAMP = dict(start=4, end=20, interval=3)
SPAM = dict(spam_interval=9, spam_warmup=4, spam_grace=2, spam_theta=50.0)
N = 12 * 16 + 8 * 32  # weights of the matrices below


class Lion(torch.optim.Optimizer):
    """arXiv 2302.06675, in its shortest form."""

    def __init__(self, params, lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault('momentum', torch.zeros_like(p))
                direction = (m * group['beta1'] + p.grad * (1 - group['beta1'])).sign()
                p.mul_(1 - group['lr'] * group['weight_decay']).add_(direction, alpha=-group['lr'])
                m.lerp_(p.grad, 1 - group['beta2'])


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal by Newton and Schulz's iteration."""

    def __init__(self, params, lr=0.02, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault('momentum', torch.zeros_like(p))
                m.mul_(group['momentum']).add_(p.grad)
                update = m if p.dim() < 2 else self.orthogonal(m.flatten(1)).view_as(p)
                p.add_(update, alpha=-group['lr'])

    def orthogonal(self, x):
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            x = 1.5 * x - 0.5 * x @ x.t() @ x
        return x


OTHERS = {
    'SGD': lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=1e-3),
    'torch AdamW': lambda params: torch.optim.AdamW(params, lr=1e-2),
    'Muon': Muon,
    'Lion': Lion,
}


def parameters(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    shapes = ((12, 16), (9,), (8, 4, 8))
    made = [torch.randn(shape, dtype=torch.float64, generator=draw) for shape in shapes]
    return [nn.Parameter(each.to(dtype)) for each in made]


def give_gradients(params, step):
    draw = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)


def ramp(score, **more):
    """Arguments of a Pruner."""
    extra = dict(allow_extra_memory=score == 'bitter10')
    return {**dict(score=score, target_sparsity=0.5), **RAMP, **extra, **more}


def run(optimizer, params, steps, first=0, pruner=None):
    for step in range(first, steps):
        give_gradients(params, step)
        optimizer.step()
        if pruner:
            pruner.step()


def pruned(masks):
    return sum(int((~mask).sum()) for mask in masks.values())


def assert_zero_where_pruned(pruner):
    for p, mask in pruner.masks.items():
        assert (p[~mask] == 0).all() and (p[mask] != 0).all()


def assert_same(a, b, path=''):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f'{path}.{key}')
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


# --- under other optimizers -----------------------------------------------------------------------


@pytest.mark.parametrize('score', ['magnitude', 'movement'])
@pytest.mark.parametrize('name', OTHERS)
def test_prunes_a_small_model_under_any_optimizer(name, score):
    """It learns, ends half zero, and every step keeps to the schedule."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = OTHERS[name](net.parameters())
    pruner = Pruner(optimizer, score=score, target_sparsity=0.5, start=20, end=200, interval=20)
    x = torch.randn(128, 8)
    y = x[:, :2].sin().sum(1, keepdim=True)
    losses = []
    for step in range(1, 301):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        pruner.step()
        losses.append(loss.item())
        expected = prune.sparsity_at(step, 'zhu_gupta', 0.5, 20, 200, 20)
        assert pruner.pruned == round(expected * pruner.scope_size)
    zeros = sum(int((p == 0).sum()) for p in net.parameters() if p.dim() >= 2)
    assert zeros == pruner.pruned == round(0.5 * (8 * 32 + 32 * 32 + 32)) and pruner.frozen
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize('name', OTHERS)
def test_frozen_unused_and_excluded_parameters_stay_to_the_bit(name):
    """A frozen base with trained adapters, a module that is never used, a group of prune=False."""
    torch.manual_seed(0)
    base = nn.Linear(16, 16).requires_grad_(False)
    down = nn.Linear(16, 4, bias=False)
    up = nn.Linear(4, 16, bias=False)
    head = nn.Linear(16, 3)
    unused = nn.Linear(16, 16)
    modules = nn.ModuleList([base, down, up, unused])
    groups = [dict(params=list(modules.parameters())),
              dict(params=list(head.parameters()), prune=False)]
    before = copy.deepcopy(modules.state_dict())
    optimizer = OTHERS[name](groups)
    pruner = Pruner(optimizer, score='magnitude', target_sparsity=0.5, start=1, end=6, interval=1)
    for _ in range(10):
        optimizer.zero_grad()
        x = torch.randn(32, 16)
        (head(base(x) + up(down(x))) - 1).square().mean().backward()
        optimizer.step()
        pruner.step()
    assert list(pruner.masks) == [down.weight, up.weight] and pruner.pruned == 64
    assert (down.weight == 0).sum() + (up.weight == 0).sum() == 64
    assert (head.weight != 0).all()
    for key, value in modules.state_dict().items():
        if key[0] in '03':
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize('name', ['SGD', 'Muon', 'Lion'])
def test_scores_of_moments_are_refused_where_there_are_none(name):
    params = parameters()
    optimizer = OTHERS[name](params)
    pruner = Pruner(optimizer, **ramp('bitter7'))
    told = f"score='bitter7' needs exp_avg_sq, which {type(optimizer).__name__} does not keep"
    with pytest.raises(ValueError, match=told):
        run(optimizer, params, 1, pruner=pruner)


@pytest.mark.parametrize('score', PRUNING)
def test_torch_adamw_and_ours_choose_the_same_masks(score):
    """Float32 differs in the last place: a few weights at the threshold may."""
    masks = []
    for kind in (torch.optim.AdamW, AdamW):
        params = parameters(torch.float64)
        optimizer = kind(params, lr=1e-2)
        pruner = Pruner(optimizer, **ramp(score))
        run(optimizer, params, 25, pruner=pruner)
        masks.append(torch.cat([mask.flatten() for mask in pruner.masks.values()]))
    assert (masks[0] != masks[1]).sum() <= 2 and (~masks[0]).sum() == N // 2


def test_step_without_gradients_is_refused():
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1)
    pruner = Pruner(optimizer, **ramp('magnitude'))
    with pytest.raises(ValueError, match='no matrix has a gradient; call step.. after'):
        pruner.step()


@pytest.mark.parametrize('name', ['SGD', 'Muon'])
@pytest.mark.parametrize('score, regrow', [('movement', False), ('magnitude', True)])
def test_pruner_continues_to_the_bit_beside_any_optimizer(name, score, regrow, tmp_path):
    results = []
    for split in (None, 2, 11):
        params = parameters()
        optimizer = OTHERS[name](params)
        more = dict(regrow=regrow, srste=1e-2 * regrow)
        pruner = Pruner(optimizer, **ramp(score, **more))
        if split:
            run(optimizer, params, split, pruner=pruner)
            saved = (params, optimizer.state_dict(), pruner.state_dict())
            torch.save(saved, tmp_path / 'saved')
            weights, first, second = torch.load(tmp_path / 'saved', weights_only=True)
            params = [nn.Parameter(p.detach()) for p in weights]
            optimizer = OTHERS[name](params)
            pruner = Pruner(optimizer, **ramp(score, **more))
            optimizer.load_state_dict(first)
            pruner.load_state_dict(second)
        run(optimizer, params, 26, split or 0, pruner)
        results.append((params, pruner.state_dict()))
    for params, state in results[1:]:
        assert_same(results[0][1], state)
        assert all(torch.equal(p, q) for p, q in zip(results[0][0], params))


def test_names_come_from_the_optimizer_where_it_has_them():
    params = parameters()
    named = torch.optim.SGD([('a.weight', params[0]), ('b.bias', params[1])], lr=0.1)
    assert list(Pruner(named, **ramp('magnitude')).named) == ['a.weight']
    plain = torch.optim.SGD([dict(params=params[:2]), dict(params=params[2:])], lr=0.1)
    assert list(Pruner(plain, **ramp('magnitude')).named) == ['0', '2']


# --- masks and schedule ---------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('regrow, srste', [(False, 0.0), (True, 0.0), (True, 2e-2)])
@pytest.mark.parametrize('schedule', prune.SCHEDULES)
def test_masks_hold_and_follow_the_schedule_at_every_step(dtype, regrow, srste, schedule):
    params = parameters(dtype)
    optimizer = AdamWPrune(params, lr=1e-1, weight_decay=0.1, regrow=regrow, srste=srste,
                           **ramp('bitter7', schedule=schedule))
    pruner = optimizer.pruner
    before = None
    came_back = [0, 0]
    for step in range(1, 31):
        run(optimizer, params, step, step - 1)
        expected = round(prune.sparsity_at(step, schedule, 0.5, **RAMP) * N)
        assert pruned(pruner.masks) == pruner.pruned == expected
        assert pruner.sparsity == expected / N
        assert_zero_where_pruned(pruner)
        now = [mask.clone() for mask in pruner.masks.values()]
        if before:
            back = sum(int((mask & ~was).sum()) for was, mask in zip(before, now))
            came_back[step > RAMP['end']] += back
        before = now
        for p in params:
            assert ('mask' in optimizer.state[p]) == (p.dim() >= 2)
    assert pruner.frozen and came_back[1] == 0 and (came_back[0] > 0) == regrow
    assert not pruner.dense


def test_climbing_is_descending_of_the_negative():
    results = []
    for sign in (1, -1):
        params = parameters()
        optimizer = torch.optim.SGD(params, 1e-2, maximize=sign < 0)
        pruner = Pruner(optimizer, **ramp('magnitude', regrow=True, srste=0.1))
        for step in range(25):
            give_gradients(params, step)
            for p in params:
                p.grad *= sign
            optimizer.step()
            pruner.step()
        results.append(params)
    for p, q in zip(*results):
        assert torch.equal(p, q)


@pytest.mark.parametrize('score', PRUNING)
@pytest.mark.parametrize('spam', [{}, dict(base='adamwspam', **SPAM)])
def test_every_score_prunes_exactly_and_for_good(score, spam):
    params = parameters()
    optimizer = AdamWPrune(params, lr=5e-2, **ramp(score, interval=1), **spam)
    pruner = optimizer.pruner
    masks = None
    for step in range(1, 26):
        run(optimizer, params, step, step - 1)
        now = [mask.clone() for mask in pruner.masks.values()]
        assert_zero_where_pruned(pruner)
        assert pruned(pruner.masks) == pruner.pruned
        if masks:
            assert not any((mask & ~was).any() for was, mask in zip(masks, now))
        if not spam:
            assert pruner.pruned == round(prune.sparsity_at(step, 'zhu_gupta', 0.5, 4, 20, 1) * N)
        masks = now
    assert pruner.sparsity == 0.5


@pytest.mark.parametrize('allocation', ['global', 'layer'])
def test_the_first_choice_is_the_lowest_scores(allocation):
    params = parameters()
    optimizer = AdamWPrune(params, lr=1e-2, target_sparsity=0.4, start=2, end=3, score='bitter7',
                           allocation=allocation)
    twin = parameters()
    plain = torch.optim.AdamW(twin, lr=1e-2)
    for step in range(3):
        run(optimizer, params, step + 1, step)
        run(plain, twin, step + 1, step)
        assert (optimizer.pruner.sparsity == 0) == (step < 2)
    scores = [p.detach().abs() * (plain.state[p]['exp_avg_sq'] + 1e-12) ** 0.25 for p in twin]
    scores = [s.flatten() for s in scores if s.dim() > 1]
    masks = [mask.flatten() for mask in optimizer.pruner.masks.values()]
    if allocation == 'global':
        scores = [torch.cat(scores)]
        masks = [torch.cat(masks)]
    for s, mask in zip(scores, masks):
        lowest = s.argsort(stable=True)[:round(0.4 * len(s))]
        assert not mask[lowest].any() and abs(int((~mask).sum()) - len(lowest)) <= 1
    assert pruned(optimizer.pruner.masks) == round(0.4 * N)


def test_bitter4_prunes_late_layers_more():
    for target, shares in ((0.5, (0.35, 0.5, 0.65)),
                           (0.8, (0.7 * 1.45 / 1.7, 1.45 / 1.7, 0.95))):  # the last is capped
        params = [nn.Parameter(torch.randn(20, 50)) for _ in range(3)]
        named = [(f'blocks.{i}.weight', p) for i, p in enumerate(params)]
        optimizer = AdamWPrune(named, start=1, end=2, score='bitter4', target_sparsity=target)
        run(optimizer, params, 2)
        found = optimizer.pruner.sparsity_by_name()
        assert list(found.values()) == pytest.approx(shares, abs=1e-3)
        assert optimizer.pruner.pruned == pruned(optimizer.pruner.masks) == target * 3000


def test_no_masks_in_the_spike_warm_up():
    """Resets at updates 9, 18, 27, warm-up to 13, 22, 31: there masks wait."""
    params = parameters()
    optimizer = AdamWPrune(params, lr=1e-2, base='adamwspam', **SPAM, **ramp('magnitude'))
    chosen = []
    for step in range(1, 31):
        before = optimizer.pruner.masked_at
        run(optimizer, params, step, step - 1)
        if optimizer.pruner.masked_at != before:
            chosen.append(step)
    assert chosen == [4, 7, 14, 16, 23] and optimizer.pruner.frozen  # due at 4, 7 ... 19 and 20


@pytest.mark.parametrize('never', [dict(target_sparsity=0.0), dict(start=100, end=200)])
@pytest.mark.parametrize('regrow', [False, True])
def test_without_pruning_it_is_adamw(never, regrow):
    ours = parameters(torch.float64)
    theirs = parameters(torch.float64)
    settings = {**ramp('bitter7'), **never}
    optimizer = AdamWPrune(ours, lr=1e-2, regrow=regrow, srste=0.1 * regrow, **settings)
    run(optimizer, ours, 30)
    run(torch.optim.AdamW(theirs, lr=1e-2), theirs, 30)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)
    assert optimizer.pruner.sparsity == 0


def test_regrowth_moves_dense_weights_by_the_gradient_at_the_masked_ones():
    """Straight-through with SR-STE, followed step by step under plain gradient descent."""
    start = torch.arange(1.0, 21).view(4, 5)
    p = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([p], lr=0.1)
    pruner = Pruner(optimizer, score='magnitude', target_sparsity=0.5, start=1, end=50, interval=1,
                    regrow=True, srste=0.2, schedule='linear')
    dense = start.clone()
    mask = torch.ones(4, 5, dtype=torch.bool)
    for step in range(1, 40):
        p.grad = 0.3 * p.detach()  # the loss sees masked weights
        dense = dense - 0.1 * (0.3 * torch.where(mask, dense, 0) + 0.2 * dense * ~mask)
        optimizer.step()
        pruner.step()
        count = round(prune.sparsity_at(step, 'linear', 0.5, 1, 50, 1) * 20)
        mask = torch.ones(20, dtype=torch.bool)
        mask[dense.abs().flatten().argsort(stable=True)[:count]] = False
        mask = mask.view(4, 5)
        torch.testing.assert_close(p.detach(), torch.where(mask, dense, 0))
        if count:
            torch.testing.assert_close(pruner.dense[p], dense)


def test_a_skipped_step_loses_no_dense_weights():
    """A GradScaler skips the optimizer's step where gradients overflow, but not the pruner's."""
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1)
    pruner = Pruner(optimizer, **ramp('magnitude', regrow=True))
    run(optimizer, params, 8, pruner=pruner)
    dense = {p: each.clone() for p, each in pruner.dense.items()}
    pruner.step()
    assert len(dense) == 2 and all(torch.equal(dense[p], pruner.dense[p]) for p in dense)
    assert_zero_where_pruned(pruner)


def test_2_4_takes_two_of_four_at_once():
    params = parameters()
    optimizer = AdamWPrune(params, lr=1e-2, pattern='2:4', score='magnitude', start=2, end=20,
                           interval=5)
    first = None
    for step in range(1, 25):
        run(optimizer, params, step, step - 1)
        pruner = optimizer.pruner
        if step < 2:
            assert pruner.sparsity == 0
            continue
        assert pruner.sparsity == 0.5 and pruner.frozen and pruner.masked_at == 2  # chosen once
        assert_zero_where_pruned(pruner)
        for mask in pruner.masks.values():
            assert (mask.view(-1, 4).sum(1) == 2).all()
        masks = torch.cat([mask.flatten() for mask in pruner.masks.values()])
        first = masks if first is None else first
        assert torch.equal(first, masks)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize('wrong, told', [
    (dict(start=20, end=20), 'start=20 end=20 interval=3: need 0 <= start < end'),
    (dict(interval=0), 'interval=0'),
    (dict(target_sparsity=1.0), 'target_sparsity=1.0 is out of reach'),
    (dict(target_sparsity=-0.1), 'target_sparsity=-0.1 is out of reach'),
    (dict(target_sparsity=math.nan), 'target_sparsity=nan is out of reach'),
    (dict(target_sparsity=0.995), 'target_sparsity=0.995 is out of reach: 443 of 448 weights can '
                                  'go, because 1% of each matrix stay'),
    (dict(score='biter7'), "score='biter7' is not one of"),
    (dict(schedule='cubic'), "schedule='cubic' is not one of"),
    (dict(pattern='4:8'), "pattern='4:8' is not one of"),
    (dict(allocation='row'), "allocation='row' is not one of"),
    (dict(score='bitter10'), 'allow_extra_memory=True'),
    (dict(score='bitter4', target_sparsity=0.97), '5% of each matrix stay'),
    (dict(pattern='2:4', target_sparsity=0.6), "pattern='2:4' prunes exactly half"),
    (dict(regrow=True, srste=-1.0), 'srste=-1.0 must not be negative'),
    (dict(lr_power=-1.0), 'lr_power=-1.0 must not be negative')])
def test_the_impossible_is_refused(wrong, told):
    with pytest.raises(ValueError) as caught:
        Pruner(torch.optim.SGD(parameters(), lr=0.1), **{**ramp('magnitude'), **wrong})
    assert told in str(caught.value)


def test_odd_shapes_and_nothing_to_prune_are_refused():
    with pytest.raises(ValueError, match=r'a multiple of 4, unlike \[\(4, 6\)\]'):
        AdamWPrune([nn.Parameter(torch.ones(4, 6))], pattern='2:4', **RAMP)
    for alone in (torch.ones(4), torch.ones(4, 4)):
        with pytest.raises(ValueError, match='nothing to prune'):
            AdamWPrune([nn.Parameter(alone, requires_grad=alone.dim() < 2)], **RAMP)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('regrow', [False, True])
def test_gpu_steps_wait_for_nothing_but_where_masks_are_chosen(regrow):
    params = [nn.Parameter(p.detach().cuda()) for p in parameters()]
    optimizer = AdamWPrune(params, regrow=regrow, srste=1e-3 * regrow, **ramp('bitter7'))
    for step in range(1, 26):
        for p in params:
            p.grad = torch.randn_like(p)
        chooses = step in (1, 4, 7, 10, 13, 16, 19, 20)
        torch.cuda.set_sync_debug_mode('default' if chooses else 'error')
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    assert optimizer.pruner.sparsity == 0.5
    assert_zero_where_pruned(optimizer.pruner)


@pytest.mark.parametrize('more', [{}, dict(allocation='layer'), dict(pattern='2:4'),
                                  dict(pattern='2:4', regrow=True)])
def test_zeros_keeps_what_is_zero_at_the_start_and_nothing_else(more):
    """Whatever else is asked for."""
    params = parameters(torch.float32)
    zero = [torch.zeros_like(p, dtype=torch.bool) for p in params]
    with torch.no_grad():
        for p, where in zip(params, zero):
            if p.dim() >= 2:
                where.view(-1)[::3] = True
                p.masked_fill_(where, 0)
    optimizer = torch.optim.SGD(params, lr=1e-2, momentum=0.9)
    pruner = Pruner(optimizer, score='zeros', target_sparsity=0.5, start=10, end=20, **more)
    run(optimizer, params, 3, pruner=pruner)
    for p, where in zip(params, zero):
        assert torch.equal(p == 0, where)
    assert pruner.frozen and pruner.pruned == sum(where.sum() for where in zero)
