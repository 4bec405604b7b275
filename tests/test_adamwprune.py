"""AdamWPrune: masks that are never violated, sparsity to the letter of the schedule, and state that survives everything."""
import math

import pytest
import torch
from conftest import train  # noqa: F401  (puts the repository on the path)

import prune
from model import GPT, GPTConfig
from flat import accumulate, flatten, load_named_state, named_state
from optim import AdamWPrune, build_optimizer
from rundir import checksum, to_cpu

CONFIG = GPTConfig(vocab_size=60, block_size=8, n_layer=2, n_head=2, n_embd=16, bias=True)
RAMP = dict(start=4, end=20, interval=3)
SPAM = dict(base='adamwspam', spam_interval=9, spam_warmup=4, spam_grace=2, spam_theta=50.0)


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in ((12, 16), (9,), (8, 4, 8))]


def gradients(params, step):
    draw = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)


def weights_and_masks(optimizer, params):
    return [(p.detach(), optimizer.state[p]['mask']) for p in params if 'mask' in optimizer.state[p]]


def pruned(optimizer, params):
    return sum(int((~mask).sum()) for _, mask in weights_and_masks(optimizer, params))


def options(score, **more):
    return dict(score=score, target_sparsity=0.5, allow_extra_memory=score == 'bitter10', **{**RAMP, **more})


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('regrow, srste', [(False, 0.0), (True, 0.0), (True, 2e-2)])
@pytest.mark.parametrize('schedule', prune.SCHEDULES)
def test_masks_hold_and_follow_the_schedule_at_every_step(dtype, regrow, srste, schedule):
    params = parameters(dtype)
    optimizer = AdamWPrune(params, lr=5e-2, weight_decay=0.1, regrow=regrow, srste=srste, **options('bitter7', schedule=schedule))
    n, before, came_back = 12 * 16 + 8 * 32, None, [0, 0]
    for step in range(1, 31):
        gradients(params, step)
        optimizer.step()
        expected = round(prune.sparsity_at(step, schedule, 0.5, **RAMP) * n)
        assert pruned(optimizer, params) == expected and optimizer.sparsity == expected / n
        now = [mask.clone() for _, mask in weights_and_masks(optimizer, params)]
        for weight, mask in weights_and_masks(optimizer, params):
            assert (weight[~mask] == 0).all() and (weight[mask] != 0).all()
        if before:
            came_back[step > RAMP['end']] += sum(int((b & ~a).sum()) for a, b in zip(before, now))
        before = now
        for p in params:
            master = optimizer.state[p].get('master')
            if master is not None:
                mask = optimizer.state[p].get('mask', torch.ones_like(p, dtype=torch.bool))
                assert torch.equal(torch.where(mask, master, 0).to(dtype), p)
                if (not regrow or step >= RAMP['end']) and p.dim() > 1:
                    assert (master[~mask] == 0).all()
    assert optimizer.frozen and came_back[1] == 0 and (came_back[0] > 0) == regrow
    assert 'mask' not in optimizer.state[params[1]]  # a vector


@pytest.mark.parametrize('score', prune.SCORES)
@pytest.mark.parametrize('base', ['adamw', 'adamwspam'])
def test_every_score_prunes_exactly_and_for_good(score, base):
    params = parameters()
    optimizer = AdamWPrune(params, lr=5e-2, **options(score, interval=1), **(SPAM if base == 'adamwspam' else {}))
    masks = None
    for step in range(1, 26):
        gradients(params, step)
        optimizer.step()
        now = [mask.clone() for _, mask in weights_and_masks(optimizer, params)]
        assert all((weight[~mask] == 0).all() for weight, mask in weights_and_masks(optimizer, params))
        assert masks is None or not any((b & ~a).any() for a, b in zip(masks, now))
        assert pruned(optimizer, params) == round(optimizer.sparsity * 448)
        if base == 'adamw':
            assert optimizer.sparsity == round(prune.sparsity_at(step, 'zhu_gupta', 0.5, 4, 20, 1) * 448) / 448
        masks = now
    assert optimizer.sparsity == 0.5


def test_the_first_choice_is_the_lowest_scores_of_the_whole_scope():
    params = parameters()
    optimizer = AdamWPrune(params, lr=1e-2, target_sparsity=0.4, start=2, end=3, score='bitter7')
    for step in range(1, 4):
        gradients(params, step)
        optimizer.step()
        if step == 2:
            assert optimizer.sparsity == 0
    twin = parameters()
    plain = torch.optim.AdamW(twin, lr=1e-2)
    for step in range(1, 4):
        gradients(twin, step)
        plain.step()
    flat = torch.cat([(p.detach().abs() * (plain.state[p]['exp_avg_sq'] + 1e-12) ** 0.25).flatten() for p in twin if p.dim() > 1])
    keep = torch.cat([mask.flatten() for _, mask in weights_and_masks(optimizer, params)])
    lowest = flat.argsort(stable=True)[:round(0.4 * len(flat))]
    assert not keep[lowest].any() and int((~keep).sum()) == len(lowest)


def test_no_masks_in_the_spike_warm_up():
    """Resets before updates 9, 18, 27 (from 0), warm-up to 13, 22: after 10 to 14 and 19 to 23 updates masks wait."""
    params = parameters()
    optimizer = AdamWPrune(params, lr=1e-2, **SPAM, **options('magnitude'))
    chosen = []
    for step in range(1, 31):
        gradients(params, step)
        before = optimizer.shared['masked_at']
        optimizer.step()
        if optimizer.shared['masked_at'] != before:
            chosen.append(step)
    assert chosen == [4, 7, 15, 16, 24] and optimizer.frozen  # due at 4, 7, 10 and 13, 16, 19 and 20


@pytest.mark.parametrize('kind', [dict(target_sparsity=0.0), dict(start=100, end=200)])
@pytest.mark.parametrize('regrow', [False, True])
def test_without_pruning_it_is_adamw(kind, regrow):
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    a = AdamWPrune(ours, lr=1e-2, regrow=regrow, srste=0.1 * regrow, **{**options('bitter7'), **kind})
    b = torch.optim.AdamW(theirs, lr=1e-2)
    for step in range(30):
        gradients(ours, step), gradients(theirs, step)
        a.step(), b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)
    assert a.sparsity == 0


def test_srste_pulls_pruned_masters_towards_zero():
    """With no other gradient, plain regrowth leaves a pruned master alone but for the decay and SR-STE shrinks it."""
    for srste in (0.0, 1e-2):
        p = torch.nn.Parameter(torch.arange(1.0, 21).view(4, 5))
        optimizer = AdamWPrune([p], lr=1e-2, weight_decay=0, regrow=True, srste=srste, score='magnitude', start=0, end=50, interval=1)
        for _ in range(40):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        master, mask = optimizer.state[p]['master'], optimizer.state[p]['mask']
        assert torch.equal(master[mask], torch.arange(1.0, 21).view(4, 5)[mask])
        assert (master < torch.arange(1.0, 21).view(4, 5))[~mask].all() == bool(srste)


def test_2_4_takes_two_of_four_at_once():
    params = parameters()
    optimizer = AdamWPrune(params, lr=1e-2, pattern='2:4', score='magnitude', start=0, end=20, interval=5)
    for step in range(1, 25):
        gradients(params, step)
        optimizer.step()
        assert optimizer.sparsity == 0.5 and optimizer.frozen and optimizer.shared['masked_at'] == 1  # chosen once
        for weight, mask in weights_and_masks(optimizer, params):
            assert (mask.view(-1, 4).sum(1) == 2).all() and (weight[~mask] == 0).all()
        if step == 1:
            first = [mask.clone() for _, mask in weights_and_masks(optimizer, params)]
    assert all(torch.equal(a, b) for a, (_, b) in zip(first, weights_and_masks(optimizer, params)))


def same(a, b, path=''):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f'{path}.{key}')
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.mark.parametrize('score', prune.SCORES)
@pytest.mark.parametrize('mode', ['adamw', 'paper', 'reference', 'stable'])
@pytest.mark.parametrize('regrow', [False, True])
def test_state_dict_continues_to_the_bit(score, mode, regrow):
    spam = {} if mode == 'adamw' else {**SPAM, 'spam_mode': mode}
    split = 11  # inside a warm-up, with a choice of masks overdue

    def fresh(dtype=torch.float32 if regrow else torch.bfloat16):
        params = parameters(dtype)
        return params, AdamWPrune(params, lr=5e-2, regrow=regrow, srste=1e-3 * regrow, **options(score), **spam)

    (a, straight), (b, first), (c, second) = fresh(), fresh(), fresh()
    for params, optimizer, steps in ((a, straight, range(26)), (b, first, range(split))):
        for step in steps:
            gradients(params, step)
            optimizer.step()
    with torch.no_grad():
        for p, q in zip(c, b):
            p.copy_(q)
    second.load_state_dict(first.state_dict())
    for step in range(split, 26):
        gradients(c, step)
        second.step()
    same(straight.state_dict()['state'], second.state_dict()['state'])
    same(straight.shared, second.shared)
    for p, q in zip(a, c):
        assert torch.equal(p, q)


# --- as training uses it ------------------------------------------------------------------------------


def small_run(dtype, regrow=False, score='bitter7', saved=None, step=0, **more):
    torch.manual_seed(0)
    model = GPT(CONFIG)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    scope = prune.prunable(model.named_parameters(), 'blocks')
    flats = flatten(model, dtype)
    optimizer = build_optimizer(flats, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, compiled=False, optimizer='adamwprune',
                                prunable=scope, regrow=regrow, **options(score, **more))
    load_named_state(flats, optimizer, saved or {'weights': weights}, step=step)
    return model, flats, optimizer


def one_step(run, step):
    model, flats, optimizer = run
    for flat in flats:
        flat.parameter.main_grad.zero_()
    model(*torch.randint(CONFIG.vocab_size, (2, 4, CONFIG.block_size), generator=torch.Generator().manual_seed(step))).backward()
    accumulate(flats)
    optimizer.step(clip=torch.tensor(0.9), finite=torch.tensor(True))


KINDS = [(torch.float32, False, 'adamw'), (torch.float32, True, 'stable'), (torch.bfloat16, False, 'reference'),
         (torch.bfloat16, True, 'paper')]


@pytest.mark.parametrize('score, dtype, regrow, mode', [(score, *KINDS[i % 4]) for i, score in enumerate(prune.SCORES)] + [
    (score, *kind) for score in ('movement', 'bitter10') for kind in KINDS])
def test_a_saved_run_continues_to_the_bit_with_its_masks(score, dtype, regrow, mode):
    more = {} if mode == 'adamw' else {**SPAM, 'spam_mode': mode}
    straight, split = small_run(dtype, regrow, score, **more), None
    for step in range(26):
        if step == 11:  # inside a warm-up, with a choice of masks overdue
            saved = to_cpu(named_state(*straight[1:]))
            checksum(saved)
            split = small_run(dtype, regrow, score, saved=saved, step=11, **more)
            same(to_cpu(named_state(*split[1:])), saved)
        for run in filter(None, (straight, split)):
            one_step(run, step)
            model, flats, optimizer = run
            masks, weights = named_state(flats, optimizer)['mask'], dict(model.named_parameters())
            assert set(masks) == {name for name in weights if name.startswith('blocks.') and weights[name].dim() == 2}
            assert all((weights[name][~mask] == 0).all() for name, mask in masks.items())
            assert prune.sparsity_report(weights, masks)['scope'] == optimizer.sparsity
    assert optimizer.sparsity == 0.5 and optimizer.frozen
    named = named_state(flats, optimizer)
    same(named_state(*straight[1:]), named)
    for (name, p), q in zip(straight[0].named_parameters(), split[0].parameters()):
        assert torch.equal(p, q)
        assert torch.equal(prune.masked(named['weights'], named['mask'])[name].to(p.dtype), p)


def test_flat_and_apart_choose_the_same_masks():
    model, flats, optimizer = small_run(torch.float32)
    torch.manual_seed(0)
    plain = GPT(CONFIG)
    names = prune.prunable(plain.named_parameters(), 'blocks')
    own = dict(plain.named_parameters())
    apart = AdamWPrune([own[name] for name in names], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **options('bitter7'))
    for step in range(25):
        one_step((model, flats, optimizer), step)
        gradient = flats[0].views(flats[0].parameter.main_grad)
        for name in names:
            own[name].grad = gradient[name].clone()
        apart.step(clip=torch.tensor(0.9))
    masks = named_state(flats, optimizer)['mask']
    assert all(torch.equal(masks[name], apart.state[own[name]]['mask']) for name in names)


def test_memory_is_one_boolean_a_weight():
    extra = {'bitter7': {'mask'}, 'movement': {'mask', 'initial'}, 'bitter10': {'mask', 'trackers'}}
    for score, keys in extra.items():
        params = parameters()
        optimizer = AdamWPrune(params, **options(score))
        gradients(params, 0)
        optimizer.step()
        assert set(optimizer.state[params[0]]) == {'step', 'exp_avg', 'exp_avg_sq'} | keys
    assert optimizer.state[params[0]]['mask'].dtype == torch.bool


def test_a_skipped_step_keeps_weights_of_the_mask_and_the_schedule():
    params = parameters()
    optimizer = AdamWPrune(params, lr=1e-2, **options('bitter7'))
    for step in range(1, 31):
        gradients(params, step)
        before = [p.detach().clone() for p in params]
        optimizer.step(finite=torch.tensor(step not in (5, 7)))
        if step == 5:
            assert all(torch.equal(p, q) for p, q in zip(params, before))
        if step == 7:
            assert all(((p == q) | (p == 0)).all() for p, q in zip(params, before))
        assert pruned(optimizer, params) == round(prune.sparsity_at(step, 'zhu_gupta', 0.5, **RAMP) * 448)


@pytest.mark.parametrize('wrong, told', [
    (dict(start=20, end=20), 'start=20 end=20 interval=3: need 0 <= start < end'), (dict(interval=0), 'interval=0'),
    (dict(target_sparsity=1.0), 'target_sparsity=1.0 must be at least 0 and below 1'),
    (dict(target_sparsity=-0.1), 'target_sparsity=-0.1 must be'), (dict(target_sparsity=math.nan), 'target_sparsity=nan must be'),
    (dict(target_sparsity=0.995), 'target_sparsity=0.995 would prune 446 of 448 weights, but 1% of each of 2 matrices stay'),
    (dict(score='biter7'), "score='biter7' is not one of"), (dict(schedule='cubic'), "schedule='cubic' is not one of"),
    (dict(pattern='4:8'), "pattern='4:8' is not one of"), (dict(base='sgd'), "base='sgd' is not one of"),
    (dict(score='bitter10'), 'allow_extra_memory=True'), (dict(score='bitter4', target_sparsity=0.97), '0.95'),
    (dict(pattern='2:4', target_sparsity=0.6), "target_sparsity=0.6: pattern='2:4' prunes exactly half; set 0.5"),
    (dict(srste=1e-4), 'set regrow=True'), (dict(spam_interval=50), "spam_interval given, but base='adamw'"),
    (dict(base='adamwspam', spam_interval=150), 'lengthen the interval')])
def test_the_impossible_is_refused(wrong, told):
    with pytest.raises(ValueError) as caught:
        AdamWPrune(parameters(), **{**options('bitter7'), **wrong})
    assert told in str(caught.value) and 'AdamWPrune' in str(caught.value) or '0.95' in told


def test_odd_shapes_and_nothing_to_prune_are_refused():
    with pytest.raises(ValueError, match=r"'2:4' needs a last dimension that is a multiple of 4, unlike \[\(4, 6\)\]"):
        AdamWPrune([torch.nn.Parameter(torch.ones(4, 6))], pattern='2:4', **RAMP)
    with pytest.raises(ValueError, match='nothing to prune'):
        AdamWPrune([torch.nn.Parameter(torch.ones(4))], **RAMP)
    flats = flatten(GPT(CONFIG), torch.float32)
    with pytest.raises(ValueError, match="prunable='blocks.0.mlp.fc.wieght' is not one of .*did you mean 'blocks.0.mlp.fc.weight'"):
        build_optimizer(flats, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, compiled=False, optimizer='adamwprune',
                        prunable=['blocks.0.mlp.fc.wieght'], **RAMP)
