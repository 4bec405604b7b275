"""prune.py: scores against float64, selection against a stable sort, schedules, scopes, storage."""
import math
import pathlib
import sys

import numpy as np
import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import prune  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

BETAS, STEP, E = (0.9, 0.95), 7, 1e-12

# The table of scores, written out in float64. w, m, v, w0: numpy arrays.
ORACLE = {
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
    'bitter9': lambda w, m, v, w0: abs(w) * np.sqrt(abs(m) + E) - 0.1 * np.sign(w) * m / (np.sqrt(v) + E),
    'bitter10z': lambda w, m, v, w0: abs(w) * np.sqrt(abs(m) + E) * abs(m) / (np.sqrt(v) + E),
}


def adam_state(n=20_000, seed=0):
    """w, m, v, w0 (n,) float32: v spans 1e-16 ... 1, |m| is of the size of sqrt(v); zeros and denormals among all of them."""
    g = torch.Generator().manual_seed(seed)
    v = 10 ** (torch.rand(n, generator=g) * 16 - 16)
    m = torch.randn(n, generator=g) * v.sqrt() * torch.rand(n, generator=g)
    w, w0 = torch.randn(n, generator=g) * 0.02, torch.randn(n, generator=g) * 0.02
    for i, x in enumerate((w, m, v)):
        x[i * 10:100:7] = 0.0
        x[1000 + i * 10:1100:11] = 1e-40
    m[2000:2100] *= 1e-20 / m[2000:2100].abs()  # its square is no float32
    v[2050:2100] = 1e-42
    return w, m, v, w0


def scored(name, state, **more):
    w, m, v, w0 = state
    return prune.score(name, w, m, v, step=STEP, betas=BETAS, initial=w0, **more)


# --- scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ORACLE)
def test_score_is_the_formula(name):
    state = adam_state()
    w, m, v, w0 = exact = [x.double().numpy() for x in state]
    expected, got = ORACLE[name](*exact), scored(name, state)
    assert got.dtype == torch.float32 and got.isfinite().all()
    scale = abs(expected)
    if name in ('bitter5', 'bitter9'):  # differences: relative to the larger term
        scale = np.maximum(scale, (1 if name == 'bitter5' else 0.1) * abs(m) / (np.sqrt(v) + E))
    error = abs(got.double().numpy() - expected)
    assert (error <= 1e-6 * scale + 1e-44).all(), (name, (error / (scale + 1e-44)).max())  # 1e-44: denormals are that coarse


def test_every_name_of_the_table_has_a_score():
    assert set(prune.SCORES) == set(ORACLE) | {'bitter10'}


def test_bitter7_tells_second_moments_apart_around_1e_9():
    v = torch.tensor([0.9e-9, 1.0e-9, 1.1e-9])  # adding Adam's 1e-8 would leave 1% between them
    s = prune.score('bitter7', torch.full((3,), 0.02), torch.zeros(3), v, step=1, betas=BETAS)
    assert s[1] / s[0] > 1.02 and s[2] / s[1] > 1.02


def test_sign_of_zero_is_zero():
    s = prune.score('bitter5', torch.zeros(2), torch.tensor([1.0, -1.0]), torch.ones(2), step=1, betas=BETAS)
    assert s.tolist() == [0, 0]


def test_bitter5_prunes_weights_that_shrink():
    # Adam steps against m: a positive weight with a positive m shrinks.
    s = prune.score('bitter5', torch.full((2,), 0.5), torch.tensor([0.1, -0.1]), torch.full((2,), 0.01), step=1, betas=BETAS)
    assert s[0] < s[1]


@pytest.mark.parametrize('name', [n for n in prune.SCORES if n != 'bitter10'])
def test_scores_are_one_graph_for_low_precision_weights_too(name):
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters['stats']['unique_graphs']
    w, m, v, w0 = (x[:64].bfloat16() for x in adam_state())
    compiled = torch.compile(prune.score, fullgraph=True, backend='eager')
    for step in (1, 50, 100, 150):
        more = dict(step=step, betas=BETAS, initial=w0)
        assert torch.allclose(compiled(name, w, m, v, **more), prune.score(name, w, m, v, **more), rtol=1e-6, atol=0)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] - before <= 2  # later steps compile nothing anew


def test_what_a_score_lacks_is_named():
    state = adam_state(10)
    with pytest.raises(ValueError, match="did you mean 'bitter7'"):
        scored('biter7', state)
    for name, needed in (('movement', 'initial='), ('bitter10', 'tracker='), ('bitter8', 'step >= 1')):
        with pytest.raises(ValueError, match=needed):
            prune.score(name, *state[:3], step=0, betas=BETAS)


def test_bitter10_follows_the_updates():
    w, m, v, _ = adam_state(1000)
    base = scored('bitter3', (w, m, v, w))
    cos_mw = abs(float((w.double() @ m.double()) / w.double().norm() / m.double().norm()))
    u = torch.randn(1000) * 1e-20

    def factor(updates):
        tracker = prune.new_tracker(w)
        for update in updates:
            tracker = prune.track(tracker, update)
        return tracker, float((scored('bitter10', (w, m, v, w), tracker=tracker) / base).nanmean())

    first, steady = factor([u]), factor([u, u, u])
    for tracker, value in (first, steady):  # the same update again and again is perfect
        assert value == pytest.approx(cos_mw, rel=1e-4) and tracker['flip'] == 0 and tracker['jitter'] < 1e-5
    turned = u.clone()
    turned[:250] *= -1
    tracker, value = factor([u, turned])
    assert tracker['flip'] == 0.25 and 0.3 < tracker['cos_dir'] < 0.7 and value < 0.6 * cos_mw
    assert factor([u, -u])[1] == 0  # opposite to all before
    assert factor([u, 3 * u])[0]['jitter'] == pytest.approx(2, rel=1e-5)
    assert sum(x.numel() for x in tracker.values()) == 3 * 1000 + 4


# --- selection ---------------------------------------------------------------------------------------


def by_sorting(scores, count):
    """The masks a stable ascending sort gives; NaN below everything, and -0 = +0 as in any comparison."""
    flat = torch.cat([s.flatten() for s in scores]).double().numpy()
    order = np.lexsort((np.arange(len(flat)), np.where(np.isnan(flat), 0.0, flat), ~np.isnan(flat)))
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[torch.from_numpy(order[:count])] = False
    return [k.view(s.shape) for k, s in zip(keep.split([s.numel() for s in scores]), scores)]


def same(a, b):
    return len(a) == len(b) and all(x.dtype == torch.bool and torch.equal(x, y) for x, y in zip(a, b))


def pruned(masks):
    return sum(int((~mask).sum()) for mask in masks)


def awkward(kind, sizes=(1, 7, 40_001, (33, 35), 0, 2500)):
    """Score tensors of odd sizes, one of them longer than a block, of one awkward kind."""
    g = torch.Generator().manual_seed(len(kind))
    scores = [torch.randn(size, generator=g) for size in sizes]
    change = {
        'plain': lambda s: s * 0.02, 'positive': lambda s: s.abs(), 'equal': lambda s: s * 0 + 0.5,
        'tied': lambda s: (s * 3).round(), 'zeros': lambda s: torch.where(s > 0, 0.0, -0.0),
        'infinite': lambda s: torch.where(s > 1, torch.inf, torch.where(s < -1, -torch.inf, s)),
        'denormal': lambda s: s * 1e-43, 'nan': lambda s: torch.where(s.abs() > 1, s.sign() * torch.nan, s.round()),
        'close': lambda s: 1 + (s * 4).round() * 2 ** -23,  # they differ in the last bits only
    }[kind]
    return [change(s).float() for s in scores]


KINDS = ('plain', 'positive', 'equal', 'tied', 'zeros', 'infinite', 'denormal', 'nan', 'close')


@pytest.mark.parametrize('kind', KINDS)
def test_select_is_a_stable_sort(kind):
    scores = awkward(kind)
    n = sum(s.numel() for s in scores)
    for sparsity in (0.0, 1 / n, 0.5, 0.9, 1 - 1 / n, 1.0):
        masks = prune.select(scores, sparsity)
        assert pruned(masks) == round(sparsity * n)
        assert same(masks, by_sorting(scores, round(sparsity * n))), sparsity


def test_select_random_sweep():
    draw = np.random.default_rng(0)
    for _ in range(60):
        sizes = draw.integers(1, 400, draw.integers(1, 6)).tolist()
        scale, digits = 10.0 ** draw.integers(-8, 10), draw.integers(0, 12)
        scores = [torch.from_numpy(draw.normal(0, scale, size).round(digits)).float() for size in sizes]
        sparsity = float(draw.random())
        assert same(prune.select(scores, sparsity), by_sorting(scores, round(sparsity * sum(sizes))))


def test_select_takes_views_that_are_not_contiguous_and_leaves_scores_alone():
    scores = [torch.randn(40, 30).t(), torch.randn(50)[::2]]
    before = [s.clone() for s in scores]
    assert same(prune.select(scores, 0.5), by_sorting(scores, round(0.5 * 1225)))
    assert all(torch.equal(a, b) for a, b in zip(scores, before))


def test_select_refuses_what_it_cannot_do():
    for sparsity in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match='sparsity='):
            prune.select([torch.randn(4)], sparsity)
    with pytest.raises(ValueError, match='float32'):
        prune.select([torch.randn(4).bfloat16()], 0.5)
    assert prune.select([], 0.5) == [] and prune.select([torch.zeros(0, 3)], 0.5)[0].shape == (0, 3)


def with_floor(scores, sparsity, floor):
    """Oracle: the highest ceil(floor * n_i) of each tensor are lifted out of reach, the rest is sorted."""
    lifted = []
    for s in scores:
        safe = by_sorting([s], s.numel() - math.ceil(round(floor * s.numel(), 6)))[0]
        lifted.append(torch.where(safe, 1e38, s.nan_to_num(nan=-1e37, posinf=1e37, neginf=-1e36)))
    return by_sorting(lifted, round(sparsity * sum(s.numel() for s in scores)))


@pytest.mark.parametrize('kind', ('plain', 'positive', 'equal', 'tied', 'zeros', 'denormal'))
@pytest.mark.parametrize('floor', (0.01, 0.3))
def test_floor_holds_in_every_tensor_and_the_total_stays_exact(kind, floor):
    scores = awkward(kind, sizes=(5000, 7, 1, (40, 50), 333))
    for i, scale in enumerate((1, 1e-3, 1e3, 1e-3, 0.5)):
        scores[i] *= scale
    n = sum(s.numel() for s in scores)
    reachable = sum(s.numel() - math.ceil(round(floor * s.numel(), 6)) for s in scores)
    for count in (0, 1, n // 4, n // 2, int(0.65 * n), reachable - 1, reachable):
        masks = prune.select(scores, count / n, floor)
        assert pruned(masks) == count
        assert all(mask.sum() >= math.ceil(round(floor * mask.numel(), 6)) for mask in masks)
        assert same(masks, with_floor(scores, count / n, floor)), count
    with pytest.raises(ValueError, match=f'floor of {floor}'):
        prune.select(scores, (reachable + 1) / n, floor)


def test_floor_saves_a_tensor_of_low_scores():
    low, high = torch.rand(1000) * 1e-6, torch.rand(1000) + 1
    assert prune.select([low, high], 0.5)[0].sum() == 0
    masks = prune.select([low, high], 0.5, prune.FLOOR)
    assert masks[0].sum() == 10 and torch.equal(masks[0].nonzero()[:, 0], low.topk(10).indices.sort().values) and pruned(masks) == 1000


def test_select_each_is_select_one_by_one():
    scores, sparsities = awkward('tied'), (1.0, 0.4, 0.77, 0.0, 0.5, 0.123)
    expected = [prune.select([s], sparsity)[0] for s, sparsity in zip(scores, sparsities)]
    assert same(prune.select_each(scores, sparsities), expected)
    with pytest.raises(ValueError, match='tensor 1: sparsity=0.995'):
        prune.select_each([torch.rand(1000)] * 2, (0.99, 0.995), floor=0.01)
    with pytest.raises(ValueError, match='2 sparsities'):
        prune.select_each(scores, (0.5, 0.5))


def test_layer_sparsities_of_bitter4():
    sizes, layers = [100, 300, 100, 300, 101, 303], [0, 0, 1, 1, 2, 2]
    for sparsity in (0.0, 0.1, 0.5, 0.7, 0.8, 0.9, 0.95):
        shares = prune.layer_sparsities(sizes, layers, sparsity)
        counts = [share * size for share, size in zip(shares, sizes)]
        assert sum(map(round, counts)) == round(sparsity * sum(sizes)) and np.allclose(counts, np.round(counts), atol=1e-9)
        assert all(share <= prune.CAP + 1 / size for share, size in zip(shares, sizes))
        if 0 < sparsity <= 0.7:  # nothing is capped: the ratios are the table's
            assert shares[4] / shares[0] == pytest.approx(1.3 / 0.7, rel=0.1) and shares[2] / shares[0] == pytest.approx(1 / 0.7, rel=0.1)
    big = prune.layer_sparsities([10 ** 6] * 3, [0, 1, 2], 0.5)
    assert big == pytest.approx([0.35, 0.5, 0.65], abs=1e-6)
    assert prune.layer_sparsities([10 ** 6] * 3, [0, 1, 2], 0.8) == pytest.approx([0.7 * 1.45 / 1.7, 1.45 / 1.7, 0.95], abs=1e-6)
    assert prune.layer_sparsities([10], [4], 0.5) == [0.5]
    with pytest.raises(ValueError, match='0.95'):
        prune.layer_sparsities(sizes, layers, 0.96)


@pytest.mark.parametrize('kind', KINDS)
def test_2_4_keeps_the_two_highest_of_four(kind):
    scores = awkward(kind, sizes=((3, 8), (1030, 64), (0, 4), 4))
    for s, mask in zip(scores, prune.select_2_4(scores)):
        expected = [by_sorting([group], 2)[0] for group in s.reshape(-1, 4)[:300]]
        assert mask.shape == s.shape and mask.dtype == torch.bool and (mask.reshape(-1, 4).sum(1) == 2).all()
        assert not expected or torch.equal(mask.reshape(-1, 4)[:300], torch.stack(expected))


def test_2_4_refuses_other_widths():
    with pytest.raises(ValueError, match=r'tensor 1 of shape \(4, 6\)'):
        prune.select_2_4([torch.rand(4, 8), torch.rand(4, 6)])


# --- schedules, scopes, reports, storage -------------------------------------------------------------


@pytest.mark.parametrize('schedule, rise', [
    ('linear', lambda t: t), ('zhu_gupta', lambda t: 1 - (1 - t) ** 3), ('cubic_late', lambda t: t ** 3)])
@pytest.mark.parametrize('start, end, interval', [(10, 110, 20), (0, 50, 7), (5, 6, 100), (30, 30, 5)])
def test_schedule(schedule, rise, start, end, interval):
    updates = sorted({*range(start, end, interval), end})
    current = 0.0
    for step in range(end + 30):
        assert prune.is_update_step(step, start, end, interval) == (step in updates)
        if step in updates:
            current = 0.5 if step == end else 0.5 * rise((step - start) / (end - start))
        assert prune.sparsity_at(step, schedule, 0.5, start, end, interval) == pytest.approx(current, abs=1e-12)
    assert prune.sparsity_at(end, schedule, 0.3, start, end, interval) == 0.3


def test_schedule_refuses():
    with pytest.raises(ValueError, match="did you mean 'zhu_gupta'"):
        prune.sparsity_at(0, 'zhu-gupta', 0.5, 0, 10, 1)
    for ramp in ((10, 5, 1), (0, 10, 0), (-1, 10, 1)):
        with pytest.raises(ValueError, match='prune_start'):
            prune.is_update_step(0, *ramp)


def test_scope_and_report():
    model = GPT(GPTConfig(vocab_size=100, block_size=16, n_layer=2, n_head=2, n_embd=16, bias=True))
    named = dict(model.named_parameters())
    names = prune.prunable(named.items(), 'blocks')
    assert len(names) == 8 and sum(named[n].numel() for n in names) == 2 * 12 * 16 ** 2
    assert set(prune.prunable(named.items(), 'blocks+embedding')) == {*names, 'token_embedding.weight'}
    assert prune.depths(['token_embedding.weight', 'blocks.11.mlp.fc.weight']) == [-1, 11]
    with pytest.raises(ValueError, match="did you mean 'blocks'"):
        prune.prunable(named.items(), 'block')
    masks = dict(zip(names, prune.select([named[n].detach().abs() for n in names], 0.25)))
    report = prune.sparsity_report(named, masks)
    assert report['scope'] == 0.25 and report['all'] == pytest.approx(0.25 * 2 * 12 * 256 / model.parameter_count())
    assert set(report['layers']) == set(names)
    assert report['layers'][names[3]] == pytest.approx(1 - masks[names[3]].float().mean().item())
    assert prune.sparsity_report(named, {}) == {'layers': {}, 'scope': 0, 'all': 0}


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
@pytest.mark.parametrize('shape', ((37, 41), (5,), (0, 3), (64, 64)))
def test_storage_is_exact_and_small(dtype, shape):
    mask = prune.select([torch.rand(shape)], 0.5)[0]
    dense = torch.randn(shape).to(dtype).masked_fill(~mask, 0.0)
    packed = prune.pack(dense, mask)
    back = prune.unpack(packed)
    assert back.dtype == dtype and back.shape == dense.shape
    assert torch.equal(back.view(torch.uint8), dense.view(torch.uint8))
    assert isinstance(packed['shape'], list) and packed['bits'].dtype == torch.uint8
    if shape == (64, 64) and dtype == torch.float32:
        assert packed['bits'].nbytes + packed['values'].nbytes <= 0.54 * dense.nbytes


def test_storage_notices_what_does_not_fit():
    packed = prune.pack(torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool))
    for damage in ({'values': torch.ones(15)}, {'shape': [4, 40]}, {'bits': torch.zeros(2, dtype=torch.uint8)}):
        with pytest.raises(ValueError, match='do not fit'):
            prune.unpack({**packed, **damage})


# --- on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('kind', KINDS)
def test_gpu_selects_the_same_bits_without_waiting(kind):
    scores = awkward(kind)
    n = sum(s.numel() for s in scores)
    there = [s.cuda() for s in scores]
    prune.select(there, 0.5)  # compiles the kernels
    for sparsity, floor in ((0.0, 0.0), (1 / n, 0.0), (0.5, 0.0), (0.9, 0.01), (0.65, 0.3), (1.0, 0.0)):
        torch.cuda.set_sync_debug_mode('error')
        try:
            masks = prune.select(there, sparsity, floor)
        finally:
            torch.cuda.set_sync_debug_mode('default')
        assert same([mask.cpu() for mask in masks], prune.select(scores, sparsity, floor)), (sparsity, floor)
