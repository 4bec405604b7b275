"""prune.py: scores against float64, selection against a stable sort, layers, schedules."""
import math

import numpy as np
import pytest
import torch

import prune

BETAS, STEP, E = (0.9, 0.95), 7, 1e-12

ORACLE = {  # the table of scores, written out; w, m, v, w0: float64 numpy arrays
    'magnitude': lambda w, m, v, w0: abs(w),
    'bitter1': lambda w, m, v, w0: abs(w),
    'bitter2': lambda w, m, v, w0: abs(w),
    'movement': lambda w, m, v, w0: w * (w - w0),
    'bitter0': lambda w, m, v, w0: w ** 2 * abs(m) / (np.sqrt(v) + E),
    'bitter3': lambda w, m, v, w0: abs(w) * np.sqrt(abs(m) + E),
    'bitter4': lambda w, m, v, w0: abs(w) * np.sqrt(abs(m) + E),
    'bitter5': lambda w, m, v, w0: -np.sign(w) * m / (np.sqrt(v) + E) + 0.1 * abs(w),
    'bitter6': lambda w, m, v, w0: abs(w) * np.sqrt(abs(m) + E) * np.sqrt(m ** 2 / (v + E)),
    'bitter7': lambda w, m, v, w0: abs(w) * (v + E) ** 0.25,
    'bitter8': lambda w, m, v, w0: abs(w) * np.sqrt(abs(m / (1 - BETAS[0] ** STEP)) + E),
    'bitter9': lambda w, m, v, w0: (abs(w) * np.sqrt(abs(m) + E)
                                    - 0.1 * np.sign(w) * m / (np.sqrt(v) + E)),
    'bitter10z': lambda w, m, v, w0: abs(w) * np.sqrt(abs(m) + E) * abs(m) / (np.sqrt(v) + E),
    'zeros': lambda w, m, v, w0: 1.0 * (w0 != 0),
}


def adam_state(n=20_000):
    """w, m, v, w0 (n,) float32: v spans 1e-16 ... 1, |m| is of the size of sqrt(v); zeros and
    denormals among all of them."""
    g = torch.Generator().manual_seed(0)
    v = 10 ** (torch.rand(n, generator=g) * 16 - 16)
    m = torch.randn(n, generator=g) * v.sqrt() * torch.rand(n, generator=g)
    w = torch.randn(n, generator=g) * 0.02
    w0 = torch.randn(n, generator=g) * 0.02
    for i, x in enumerate((w, m, v)):
        x[i * 10:100:7] = 0.0
        x[1000 + i * 10:1100:11] = 1e-40
    m[2000:2100] *= 1e-20 / m[2000:2100].abs()  # its square is no float32
    v[2050:2100] = 1e-42
    return w, m, v, w0


def scored(name, state, **more):
    w, m, v, w0 = state
    return prune.score(name, w, m, v, step=STEP, betas=BETAS, initial=w0, **more)


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ORACLE)
def test_score_is_the_formula(name):
    state = adam_state()
    w, m, v, w0 = [x.double().numpy() for x in state]
    expected = ORACLE[name](w, m, v, w0)
    got = scored(name, state)
    assert got.dtype == torch.float32 and got.isfinite().all()
    scale = abs(expected)
    if name in ('bitter5', 'bitter9'):  # differences: relative to the larger term
        part = abs(m) / (np.sqrt(v) + E)
        scale = np.maximum(scale, part if name == 'bitter5' else 0.1 * part)
    error = abs(got.double().numpy() - expected)
    assert (error <= 1e-6 * scale + 1e-44).all()  # 1e-44: denormals are that coarse


def test_every_name_of_the_table_has_a_score():
    assert set(prune.SCORES) == set(ORACLE) | {'bitter10'}, 'a new score has its formula in ORACLE'


def test_scores_take_low_precision_and_leave_their_inputs_alone():
    state = [x[:64].bfloat16() for x in adam_state()]
    before = [x.clone() for x in state]
    for name in ORACLE:
        assert torch.equal(scored(name, state), scored(name, [x.float() for x in state]))
    assert all(torch.equal(x, was) for x, was in zip(state, before))


def test_bitter7_tells_second_moments_apart_around_1e_9():
    v = torch.tensor([0.9e-9, 1.0e-9, 1.1e-9])  # Adam's 1e-8 would leave 1% between them
    s = prune.score('bitter7', torch.full((3,), 0.02), None, v, step=1, betas=BETAS)
    assert s[1] / s[0] > 1.02 and s[2] / s[1] > 1.02


def test_bitter5_prunes_weights_that_shrink():
    # Adam steps against m: a positive weight with a positive m shrinks.
    w = torch.tensor([0.5, 0.5, 0.0, 0.0])
    m = torch.tensor([0.1, -0.1, 1.0, -1.0])
    s = prune.score('bitter5', w, m, torch.full((4,), 0.01), step=1, betas=BETAS)
    assert s[0] < s[1] and s[2:].tolist() == [0, 0]  # the sign of zero is zero


def test_a_new_score_is_one_entry(monkeypatch):
    monkeypatch.setitem(prune.SCORES, 'mine', lambda w0, v: w0 + v)
    _, _, v, w0 = state = adam_state(10)
    assert torch.equal(scored('mine', state), w0 + v)


def test_what_a_score_lacks_is_named():
    w, m, v, _ = state = adam_state(10)
    with pytest.raises(ValueError, match="'biter7' is not one of .*did you mean 'bitter7'"):
        scored('biter7', state)
    for name, needed in (('movement', 'initial='), ('bitter10', 'tracker='), ('bitter8', 'step=0')):
        with pytest.raises(ValueError, match=needed):
            prune.score(name, w, m, v, step=0, betas=BETAS)
    with pytest.raises(ValueError, match='exp_avg_sq='):
        prune.score('bitter7', w, m, None, step=1, betas=BETAS)


def test_bitter10_follows_the_updates():
    w, m, v, _ = adam_state(1000)
    base = scored('bitter3', (w, m, v, w))
    exact_w = w.double()
    exact_m = m.double()
    cos_mw = abs(float((exact_w @ exact_m) / exact_w.norm() / exact_m.norm()))
    u = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-20

    def factor(updates):
        tracker = {}
        for update in updates:
            prune.track(tracker, update)
        return tracker, float((scored('bitter10', (w, m, v, w), tracker=tracker) / base).nanmean())

    for tracker, value in (factor([u]), factor([u, u, u])):  # the same again is perfect
        assert value == pytest.approx(cos_mw, rel=1e-4)
        assert tracker['flip'] == 0 and tracker['jitter'] < 1e-5
    turned = u.clone()
    turned[:250] *= -1
    tracker, value = factor([u, turned])
    cos_dir = float((u.double() @ turned.double()) / u.double().norm() ** 2)
    assert tracker['flip'] == 0.25 and float(tracker['cos_dir']) == pytest.approx(cos_dir, rel=1e-4)
    assert value == pytest.approx(0.75 * cos_dir * cos_mw, rel=1e-3)
    assert factor([u, -u])[1] == 0  # opposite to all before
    assert factor([u, 3 * u])[0]['jitter'] == pytest.approx(2, rel=1e-5)
    assert sum(torch.as_tensor(x).numel() for x in tracker.values()) == 3 * 1000 + 4


# --- selection ------------------------------------------------------------------------------------


def by_sorting(scores, count):
    """The masks of a stable ascending sort; NaN below everything, -0 = +0 as in any comparison."""
    flat = torch.cat([s.flatten() for s in scores]).double().numpy()
    is_nan = np.isnan(flat)
    order = np.lexsort((np.arange(len(flat)), np.where(is_nan, 0.0, flat), ~is_nan))
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[torch.from_numpy(order[:count])] = False
    sizes = [s.numel() for s in scores]
    return [k.view(s.shape) for k, s in zip(keep.split(sizes), scores)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.dtype == torch.bool and torch.equal(x, y)


def pruned(masks):
    return sum(int((~mask).sum()) for mask in masks)


def awkward(kind, sizes=(1, 7, 10_001, (33, 35), 0, 2500)):
    """Score tensors of odd sizes, of one awkward kind."""
    g = torch.Generator().manual_seed(len(kind))
    scores = [torch.randn(size, generator=g) for size in sizes]
    change = {
        'plain': lambda s: s * 0.02,
        'positive': lambda s: s.abs(),
        'equal': lambda s: s * 0 + 0.5,
        'tied': lambda s: (s * 3).round(),
        'zeros': lambda s: torch.where(s > 0, 0.0, -0.0),
        'infinite': lambda s: torch.where(s.abs() > 1, s.sign() * torch.inf, s),
        'denormal': lambda s: s * 1e-43,
        'nan': lambda s: torch.where(s.abs() > 1, s.sign() * torch.nan, s.round()),
        'nan and infinite': lambda s: torch.where(s > 0, torch.nan, -torch.inf),
        'close': lambda s: 1 + (s * 4).round() * 2 ** -23,  # they differ in the last bits only
    }[kind]
    return [change(s).float() for s in scores]


KINDS = ('plain', 'positive', 'equal', 'tied', 'zeros', 'infinite', 'denormal', 'nan',
         'nan and infinite', 'close')


@pytest.mark.parametrize('kind', KINDS)
def test_select_is_a_stable_sort(kind):
    scores = awkward(kind)
    n = sum(s.numel() for s in scores)
    for sparsity in (0.0, 1 / n, 0.5, 0.9, 1 - 1 / n, 1.0):
        masks = prune.select(scores, sparsity)
        assert pruned(masks) == round(sparsity * n)
        assert_same(masks, by_sorting(scores, round(sparsity * n)))


def test_select_random_sweep():
    draw = np.random.default_rng(0)
    for _ in range(60):
        sizes = draw.integers(1, 400, draw.integers(1, 6)).tolist()
        scale = 10.0 ** draw.integers(-8, 10)
        digits = draw.integers(0, 12)
        drawn = [draw.normal(0, scale, size).round(digits) for size in sizes]
        scores = [torch.from_numpy(each).float() for each in drawn]
        sparsity = float(draw.random())
        expected = by_sorting(scores, round(sparsity * sum(sizes)))
        assert_same(prune.select(scores, sparsity), expected)


def test_select_takes_views_that_are_not_contiguous_and_leaves_scores_alone():
    scores = [torch.randn(40, 30).t(), torch.randn(50)[::2]]
    before = [s.clone() for s in scores]
    assert_same(prune.select(scores, 0.5, 0.1), by_sorting(scores, round(0.5 * 1225)))
    assert all(torch.equal(a, b) for a, b in zip(scores, before))


def test_select_refuses_what_it_cannot_do():
    for sparsity in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match='sparsity='):
            prune.select([torch.randn(4)], sparsity)
    assert prune.select([torch.zeros(0, 3)], 0.5, 0.01)[0].shape == (0, 3)


def with_floor(scores, sparsity, floor):
    """Oracle: the highest ceil(floor * n_i) of each are lifted out of reach, the rest is sorted."""
    lifted = []
    for s in scores:
        safe = by_sorting([s], s.numel() - math.ceil(round(floor * s.numel(), 6)))[0]
        finite = s.nan_to_num(nan=-1e37, posinf=1e37, neginf=-1e36)
        lifted.append(torch.where(safe, 1e38, finite))
    return by_sorting(lifted, round(sparsity * sum(s.numel() for s in scores)))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('floor', (0.01, 0.3))
def test_floor_holds_in_every_tensor_and_the_total_stays_exact(kind, floor):
    scores = awkward(kind, sizes=(3000, 7, 1, (40, 50), 333))
    for i, scale in enumerate((1, 1e-3, 1e3, 1e-3, 0.5)):
        scores[i] *= scale
    n = sum(s.numel() for s in scores)
    reachable = sum(s.numel() - math.ceil(round(floor * s.numel(), 6)) for s in scores)
    for count in (0, 1, n // 4, n // 2, int(0.65 * n), reachable - 1, reachable):
        masks = prune.select(scores, count / n, floor)
        assert pruned(masks) == count
        for mask in masks:
            assert mask.sum() >= math.ceil(round(floor * mask.numel(), 6))
        assert_same(masks, with_floor(scores, count / n, floor))
    with pytest.raises(ValueError, match=f'{floor:.0%} of each matrix stay'):
        prune.select(scores, (reachable + 1) / n, floor)


def test_floor_saves_a_tensor_of_low_scores():
    low = torch.rand(1000) * 1e-6
    high = torch.rand(1000) + 1
    assert prune.select([low, high], 0.5)[0].sum() == 0
    masks = prune.select([low, high], 0.5, prune.FLOOR)
    assert torch.equal(masks[0].nonzero()[:, 0], low.topk(10).indices.sort().values)
    assert pruned(masks) == 1000


@pytest.mark.parametrize('kind', KINDS)
def test_2_4_keeps_the_two_highest_of_four(kind):
    scores = awkward(kind, sizes=((3, 8), (130, 64), (0, 4), 4))
    for s in scores:
        mask = prune.select_2_4(s)
        assert mask.shape == s.shape and (mask.reshape(-1, 4).sum(1) == 2).all()
        for group, kept in zip(s.reshape(-1, 4)[:300], mask.reshape(-1, 4)):
            assert_same([kept], by_sorting([group], 2))


# --- layers and schedules -------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_ranked_scores_share_by_their_factors(kind):
    """In each tensor the lowest go, as many as its factor says."""
    scores = awkward(kind, sizes=(4000, (50, 60), 999))
    scores = [s.masked_fill(s == -math.inf, 0.0) for s in scores]
    if 'nan' not in kind:  # which would come first, but is not what a Pruner has
        scores[1][:5] = -math.inf
    factors = (0.7, 1.0, 1.3)
    ranked = [prune.ranked(s, factor) for s, factor in zip(scores, factors)]
    n = sum(s.numel() for s in scores)
    for sparsity in (0.1, 0.4, 0.6):
        masks = prune.select(ranked, sparsity)
        scale = sparsity * n / sum(f * s.numel() for f, s in zip(factors, scores))
        for s, factor, mask in zip(scores, factors, masks):
            count = pruned([mask])
            assert abs(count - scale * factor * s.numel()) <= 1
            assert_same([mask], by_sorting([s], count))
        assert pruned(masks) == round(sparsity * n)


def test_bitter4_takes_more_from_late_layers():
    names = ('token_embedding.weight', 'blocks.0.mlp', 'blocks.1.mlp', 'blocks.2.mlp')
    assert prune.layer_factors(names) == pytest.approx([0.7, 0.9, 1.1, 1.3])
    assert len(set(prune.layer_factors(names[:1] * 3))) == 1


def test_the_layer_is_the_number_in_a_name():
    names = ('norm2.weight', 'blocks.11.mlp2.4.weight', 'transformer.h.3.attn', '7')
    expected = [0.7 + 0.6 * (layer + 1) / 12 for layer in (-1, 11, 3, 7)]
    assert prune.layer_factors(names) == pytest.approx(expected)


@pytest.mark.parametrize('schedule, rise', [('linear', lambda t: t),
                                            ('zhu_gupta', lambda t: 1 - (1 - t) ** 3),
                                            ('cubic_late', lambda t: t ** 3)])
@pytest.mark.parametrize('ramp', [(10, 110, 20), (0, 50, 7), (5, 6, 100)])
def test_schedule(schedule, rise, ramp):
    start, end, interval = ramp
    updates = {*range(start, end, interval), end}
    current = 0.0
    for step in range(end + 30):
        if step in updates:
            current = 0.5 if step == end else 0.5 * rise((step - start) / (end - start))
        assert prune.sparsity_at(step, schedule, 0.5, *ramp) == pytest.approx(current, abs=1e-12)
    assert set(prune.SCHEDULES) == {'linear', 'zhu_gupta', 'cubic_late'}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('kind', KINDS)
def test_gpu_selects_the_same_masks(kind):
    scores = awkward(kind)
    there = [s.cuda() for s in scores]
    for sparsity, floor in ((0.0, 0.0), (0.5, 0.0), (0.9, 0.01), (0.65, 0.3), (1.0, 0.0)):
        masks = prune.select(there, sparsity, floor)
        assert_same([mask.cpu() for mask in masks], prune.select(scores, sparsity, floor))
    there = [s for s in there if s.dim() == 2 and s.size(1) % 4 == 0] + [there[-1]]
    masks = [prune.select_2_4(s).cpu() for s in there]
    assert_same(masks, [prune.select_2_4(s.cpu()) for s in there])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_selects_among_124M_scores_in_time_and_memory():
    scores = [torch.randn(124_000_000 // 48, device='cuda') for _ in range(48)]
    prune.select(scores, 0.5, prune.FLOOR)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    clock = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    clock[0].record()
    prune.select(scores, 0.5, prune.FLOOR)
    clock[1].record()
    torch.cuda.synchronize()
    memory = (torch.cuda.max_memory_allocated() - before) / 2 ** 30
    print(f'{clock[0].elapsed_time(clock[1]):.0f} ms, {memory:.1f} GiB')
    assert clock[0].elapsed_time(clock[1]) < 100 and memory < 5
