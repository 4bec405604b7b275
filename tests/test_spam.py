"""AdamWSPAM against step-by-step implementations of its three modes, written here from their descriptions."""
import math

import numpy as np
import pytest
import torch
from conftest import train  # noqa: F401  (puts the repository on the path)

import optim
from flat import flatten
import spam
from optim import AdamW, AdamWSPAM

B1, B2, EPS, LR, DECAY = 0.9, 0.99, 1e-8, 3e-3, 0.1
SHAPES = [(6, 5), (7,)]


def spiky_gradients(step, shapes=SHAPES, rate=40):
    """Gradients of all sizes, an element zero at first, and every `rate` steps a spike of 1000x in a few elements."""
    draw = np.random.default_rng(step)
    out = [draw.normal(size=s) * 10.0 ** (i - 2) for i, s in enumerate(shapes)]
    if step < 60:
        out[0][0, 0] = 0.0
    if step % rate == rate - 1:
        out[step // rate % len(out)].flat[::3] *= 1000
    return out


def adamw(w, m, v, g, t, lr, *, top=None, decay=DECAY):
    """AdamW's m, v, w as the paper writes them; t counts from 1. top: AMSGrad's maximum, updated."""
    m[:] = B1 * m + (1 - B1) * g
    v[:] = B2 * v + (1 - B2) * g ** 2
    if top is not None:
        top[:] = np.maximum(top, v)
    w[:] = w - lr * decay * w - lr * (m / (1 - B1 ** t)) / (np.sqrt((v if top is None else top) / (1 - B2 ** t)) + EPS)


def oracle_paper(weights, steps, clip, interval, N, theta, grace):
    m, v = ([np.zeros_like(w) for w in weights] for _ in range(2))
    told = dict(spikes=0, clipped=0, resets=0)
    since, resets = 0, 0
    for step in range(steps):
        if step and step % interval == 0:
            for each in m + v:
                each[:] = 0
            since, resets = 0, resets + 1
        factor = 1 - 0.99 * (1 + math.cos(math.pi * since / (N + 1))) / 2 if resets and since <= N else 1
        hits = 0
        for w, mi, vi, g in zip(weights, m, v, spiky_gradients(step)):
            g = g * clip
            if since >= grace:
                for i in np.ndindex(g.shape):
                    if vi[i] != 0 and g[i] ** 2 > theta * vi[i]:
                        g[i] = math.copysign(math.sqrt(theta * vi[i]), g[i])
                        hits += 1
            adamw(w, mi, vi, g, step + 1, LR * factor)
        told = dict(spikes=told['spikes'] + (hits > 0), clipped=told['clipped'] + hits, resets=resets)
        since += 1
    return told


def oracle_reference(weights, steps, clip, interval, N, theta, twice=False, sticks=False, lost=False):
    m, v, top = ([np.zeros_like(w) for w in weights] for _ in range(3))
    norms, told, clock, since, rate = [], dict(spikes=0, clipped=0, resets=0), 0, None, LR
    for step in range(steps):
        grads = spiky_gradients(step)
        norm, fired = math.sqrt(sum((g ** 2).sum() for g in grads)), False
        last = np.array(norms[-100:])
        if len(norms) >= 10 and last.std() > 0 and (norm - last.mean()) / last.std() > 2:
            fired = True
        norms.append(norm)
        reset = step > 0 and clock % interval == 0
        if reset:
            since, told['resets'] = 0, told['resets'] + 1
        factor = 1.0
        if since is not None and since < N:
            factor = max(1e-3, 0.5 * (1 - math.cos(math.pi * since / N)))
        rate = rate * factor if sticks else LR * factor
        hits = 0
        for w, mi, vi, ti, g in zip(weights, m, v, top, grads):
            g = g * clip
            limit = np.sqrt(theta * (vi + 1e-12))
            if step > 0:
                hits += (np.abs(g) > limit).sum()
                g = np.clip(g, -limit, limit)
            if fired:
                mi *= 0.5
                vi *= 0.9
            if reset:
                mi *= 0
                vi *= 0
            adamw(w, mi, vi, g, step + 1, rate, top=ti, decay=0.0 if lost else DECAY)
        told['spikes'] += bool(hits or fired)
        told['clipped'] += hits
        clock += 2 if twice else 1
        if since is not None:
            since += 2 if twice else 1
    return told


def oracle_stable(weights, steps, clip, interval):
    m, v = ([np.zeros_like(w) for w in weights] for _ in range(2))
    T, mean, square = ([0.0] * len(weights) for _ in range(3))
    told, t = dict(spikes=0, clipped=0, resets=0), 0
    for step in range(steps):
        t += 1
        if step and step % interval == 0:
            for each in m + v:
                each[:] = 0
            t, told['resets'] = 1, told['resets'] + 1
        hits = 0
        for i, (w, g) in enumerate(zip(weights, spiky_gradients(step))):
            g = g * clip
            g_max, n = np.abs(g).max(), step + 1
            T[i] = 0.999 * T[i] + (1 - 0.999) * g_max
            T_hat = T[i] / (1 - 0.999 ** n)
            above = np.abs(g) > T_hat
            hits += above.sum()
            g = np.where(above, g / g_max * T_hat, g)
            norm = np.sqrt((g ** 2).sum())
            mean[i] = 0.7 * mean[i] + 0.3 * norm
            square[i] = 0.9 * square[i] + 0.1 * norm ** 2
            g = g / norm * (mean[i] / (1 - 0.7 ** n)) / (np.sqrt(square[i] / (1 - 0.9 ** n)) + EPS)
            adamw(w, m[i], v[i], g, t, LR)
        told['clipped'] += hits
        told['spikes'] += bool(hits)
    return told


def run_ours(optimizer, parameters, steps, clip, first=0):
    for step in range(first, steps):
        for p, g in zip(parameters, spiky_gradients(step)):
            p.grad = torch.from_numpy(g).to(p.dtype)
        before = [p.grad.clone() for p in parameters]
        optimizer.step(clip=torch.tensor(clip, dtype=torch.float64))
        assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before))  # the gradients are the user's


def initial_weights():
    return [np.random.default_rng(99 + i).normal(size=s) for i, s in enumerate(SHAPES)]


def parameters(dtype=torch.float64):
    return [torch.nn.Parameter(torch.from_numpy(w).to(dtype)) for w in initial_weights()]


CASES = {
    'paper': (dict(spam_interval=300, spam_warmup=50, spam_theta=500.0), lambda w, n, c: oracle_paper(w, n, c, 300, 50, 500.0, 20)),
    'paper as it comes': ({}, lambda w, n, c: oracle_paper(w, n, c, 500, 150, 5000.0, 20)),
    'paper, warm-up longer than the interval': (dict(spam_interval=30, spam_warmup=50, spam_theta=50.0, spam_grace=3),
                                                lambda w, n, c: oracle_paper(w, n, c, 30, 50, 50.0, 3)),
    'reference': (dict(spam_mode='reference', spam_interval=300, spam_warmup=50),
                  lambda w, n, c: oracle_reference(w, n, c, 300, 50, 50.0)),
    'reference with its defects': (
        dict(spam_mode='reference', spam_interval=1000, spam_warmup=6, spam_step_twice=True, spam_lr_sticks=True, spam_decay_lost=True),
        lambda w, n, c: oracle_reference(w, n, c, 1000, 6, 50.0, twice=True, sticks=True, lost=True)),
    'stable': (dict(spam_mode='stable', spam_interval=300), lambda w, n, c: oracle_stable(w, n, c, 300)),
}


@pytest.mark.parametrize('case', CASES)
def test_each_mode_equals_its_oracle_over_2000_steps_with_spikes(case):
    settings, oracle = CASES[case]
    steps, clip, weights, ours = 2000, 0.7, initial_weights(), parameters()
    told = oracle(weights, steps, clip)
    optimizer = AdamWSPAM(ours, lr=LR, betas=(B1, B2), eps=EPS, weight_decay=DECAY, **settings)
    run_ours(optimizer, ours, steps, clip)
    for p, w in zip(ours, weights):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-6, atol=1e-8)
    if case == 'stable':  # at the first step T is the maximum itself, but for rounding
        assert abs(optimizer.counters()['clipped'] - told['clipped']) <= 2
    else:
        assert optimizer.counters() == told
    assert told['resets'] >= 3 and told['spikes'] >= 20


def test_2025_defects_are_what_they_are_said_to_be():
    cycle = spam.Cycle('reference', 1000, 200, 50.0, 20, step_twice=True)
    assert [t for t in range(1, 2001) if cycle.is_reset(t)] == [500, 1000, 1500, 2000]
    sticky = cycle._replace(warmup=20, lr_sticks=True)
    assert sticky.lr_factor(499) == 1 and sticky.lr_factor(999) < 1e-3 and sticky.lr_factor(1999) < sticky.lr_factor(999) ** 2
    assert cycle.lr_factor(999) == 1


def test_paper_schedule_step_by_step():
    cycle = spam.Cycle('paper', 500, 150, 5000.0, 20)
    assert all(cycle.lr_factor(t) == 1 for t in range(500)) and not cycle.is_reset(0) and cycle.is_reset(500)
    assert cycle.lr_factor(500) == pytest.approx(0.01)
    assert cycle.lr_factor(650) < 1 == cycle.lr_factor(651) and cycle.recovering(650) and not cycle.recovering(651)
    assert [cycle.threshold(t) for t in (0, 19, 20, 499, 500, 519, 520)] == [
        math.inf, math.inf, 5000, 5000, math.inf, math.inf, 5000]


def test_amsgrad_without_spikes_equals_torch():
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.ones(40, dtype=torch.float64)) for _ in range(2))
    ours = AdamWSPAM([a], lr=1e-2, spam_mode='reference', spam_interval=0, spam_theta=math.inf)
    theirs = torch.optim.AdamW([b], lr=1e-2, amsgrad=True)
    for step in range(60):
        a.grad = torch.randn(40, dtype=torch.float64)
        a.grad *= (5 - step / 20) / a.grad.norm()  # ever smaller norms never fire
        b.grad = a.grad.clone()
        ours.step(), theirs.step()
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert ours.counters() == dict(spikes=0, clipped=0, resets=0)


def regression_losses(kind, share, clip, steps=1200, seeds=5):
    """(seeds,) final loss of as many small networks, trained side by side on a smooth function of 8 inputs. Every 50th
    gradient has the elements hit (each with probability `share`) a thousandfold. clip: each network's gradient norm."""
    draw = torch.Generator().manual_seed(0)
    W, b, V = (torch.nn.Parameter(torch.randn(shape, generator=draw) / math.sqrt(shape[1]))
               for shape in ((seeds, 8, 24), (seeds, 1, 24), (seeds, 24, 1)))
    x = torch.randn(seeds, 256, 8, generator=draw)
    y = x[..., :3].sin().sum(-1, keepdim=True) + x[..., 3:4] * x[..., 4:5]

    def loss(rows):
        return (((x[:, rows] @ W + b).tanh() @ V - y[:, rows]) ** 2).mean((1, 2))

    optimizer = kind([W, b, V], lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = optim.learning_rate_at(step, 1e-2, 0.0, 0, steps)
        optimizer.zero_grad()
        loss(torch.randint(256, (64,), generator=draw)).sum().backward()
        if step % 50 == 49:
            for p in (W, b, V):
                p.grad[torch.rand(p.shape, generator=draw) < share] *= 1000
        norm = sum(p.grad.square().sum((1, 2)) for p in (W, b, V)).sqrt()
        for p in (W, b, V):
            p.grad *= (clip / norm).clamp(max=1)[:, None, None]
        optimizer.step()
    return loss(slice(None)).detach()


@pytest.mark.parametrize('share', [0.02, 1.0])
def test_spikes_hurt_adamwspam_less_than_clipped_adamw_over_five_seeds(share):
    """Spikes of a few elements and of whole gradients; both with the norm clipping that training has."""
    theirs, ours = (regression_losses(kind, share, 1.0) for kind in (AdamW, AdamWSPAM))
    print(share, theirs, ours)
    assert (ours < theirs).all()


@pytest.mark.parametrize('mode', spam.MODES)
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_no_trace(mode, bad):
    ours = parameters(torch.float32)
    optimizer = AdamWSPAM(ours, lr=LR, spam_mode=mode, spam_interval=30, spam_warmup=5)
    run_ours(optimizer, ours, 31, 1.0)  # the next is neither the first of a cycle ...

    def tensors():
        everything = {(i, key): value for i, p in enumerate(ours) for key, value in {**optimizer.state[p], 'weight': p.detach()}.items()}
        return {key: value.clone() for key, value in {**everything, **optimizer.shared}.items() if torch.is_tensor(value)}

    for at_reset in (False, True):
        before = tensors()
        for p in ours:
            p.grad = torch.ones_like(p)
        ours[0].grad[1, 1] = bad
        optimizer.step()
        for key, value in tensors().items():
            assert torch.equal(value, before[key]), key
        if not at_reset:
            run_ours(optimizer, ours, 60, 1.0, first=32)  # ... nor is this but one
            assert optimizer.cycle.is_reset(optimizer.shared['updates'])
    run_ours(optimizer, ours, 80, 1.0, first=61)
    assert all(p.isfinite().all() for p in ours)


@pytest.mark.parametrize('mode', spam.MODES)
def test_a_step_asks_the_device_nothing(mode, monkeypatch):
    ours = parameters(torch.float32)
    optimizer = AdamWSPAM(ours, lr=LR, spam_mode=mode, spam_interval=10, spam_warmup=4)

    def asked(*arguments):
        raise AssertionError('a tensor was read on the host')

    for step in range(25):
        for p, g in zip(ours, spiky_gradients(step)):
            p.grad = torch.from_numpy(g).float()
        with monkeypatch.context() as patched:
            for name in ('item', 'tolist', '__bool__', '__int__', '__float__', '__index__', 'cpu', 'numpy', 'nonzero'):
                patched.setattr(torch.Tensor, name, asked)
            optimizer.step()
    assert optimizer.counters()['resets'] == 2


@pytest.mark.parametrize('mode', spam.MODES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_state_dict_continues_to_the_bit(mode, dtype):
    def fresh():
        own = parameters(dtype)
        return own, AdamWSPAM(own, lr=LR, spam_mode=mode, spam_interval=30, spam_warmup=10, spam_theta=None)

    (a, straight), (b, first), (c, second) = fresh(), fresh(), fresh()
    run_ours(straight, a, 100, 0.7)
    run_ours(first, b, 47, 0.7)
    with torch.no_grad():
        for p, q in zip(c, b):
            p.copy_(q)
    second.load_state_dict(first.state_dict())
    run_ours(second, c, 100, 0.7, first=47)
    for p, q in zip(a, c):
        assert torch.equal(p, q)
        for key, value in straight.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second.state[q][key])), key
    assert straight.counters() == second.counters() and straight.counters()['resets'] == 3


def test_stable_works_on_each_matrix_of_a_flat_parameter():
    apart, together = parameters(torch.float32), parameters(torch.float32)
    flats = flatten(torch.nn.ParameterList(together), torch.float32)
    one = AdamWSPAM(apart, lr=LR, spam_mode='stable', weight_decay=0)
    other = optim.build_optimizer(flats, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, compiled=False, optimizer='adamwspam',
                                  spam_mode='stable')
    for step in range(90):
        for p, g in zip(apart, spiky_gradients(step)):
            p.grad = torch.from_numpy(g).float()
        for flat in flats:
            for name, view in flat.views(flat.parameter.main_grad).items():
                view.copy_(apart[int(name)].grad)
        one.step(), other.step()
    for p, q in zip(apart, together):
        assert torch.equal(p, q)
    assert one.counters() == other.counters()


def test_compiled_update_equals_its_plain_twin_with_everything_on():
    torch.manual_seed(0)
    start = [torch.randn(10_007) for _ in range(4)]
    scalars = [torch.tensor(x) for x in (0.7, True, 0.99, 1e-3, 0.2)]
    results = []
    for function in (optim.adamw_update, torch.compile(optim.adamw_update, fullgraph=True, dynamic=False)):
        w, g, m, v = (x.clone() for x in start)
        v = v.abs() * 1e-2
        working, top, clipped = w.bfloat16(), v * 1.01, torch.tensor(3)
        function(w, g, m, v, working, *scalars, beta1=0.9, beta2=0.95, eps=1e-8, theta=torch.tensor(50.0), v_floor=1e-12,
                 clipped=clipped, carry=[torch.tensor(0.5), torch.tensor(0.9)], max_exp_avg_sq=top, mask=start[0] > -0.3, dense=True,
                 srste=2e-4)
        results.append((w, m, v, top, clipped, working))
    assert results[0][4] > 100
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('wrong, told', [
    (dict(spam_mode='papr'), "spam_mode='papr' is not one of paper, reference, stable; did you mean 'paper'"),
    (dict(spam_interval=-1), 'spam_interval=-1 must not be negative'), (dict(spam_theta=0.0), 'spam_theta=0.0 must be above 0'),
    (dict(spam_step_twice=True), "spam_step_twice=True repeats a defect of spam_mode='reference'"),
    (dict(spam_mode='reference', spam_step_twice=True, spam_interval=501), 'spam_interval=501 must be even'),
    (dict(lr=-1.0), 'lr=-1.0 is out of range')])
def test_impossible_settings_are_refused(wrong, told):
    with pytest.raises(ValueError, match='AdamWSPAM: ') as caught:
        AdamWSPAM(parameters(), **wrong)
    assert told in str(caught.value)
