"""AdamWPrune, and optimizer and Pruner side by side as train.py has them: state that survives
everything, to the bit."""
import copy
import pickle

import pytest
import torch
import torch.nn as nn
from test_pruner import (
    SPAM,
    N,
    assert_same,
    give_gradients,
    parameters,
    pruned,
    ramp,
    run,
)
from torch.nn.utils import get_total_norm

import optim
import prune
from optim import AdamW, AdamWPrune, AdamWSPAM
from prune import Pruner

PRUNING = [name for name in prune.SCORES if name != 'zeros']  # it prunes nothing of a dense start


def test_learning_rate_of_pruned_groups_rises():
    """rate_factor by hand on a Pruner equals what AdamWPrune does by itself."""
    a = parameters()
    b = parameters()

    def groups(params):
        return [dict(params=[params[0], params[2]]), dict(params=[params[1]])]

    ours = AdamWPrune(groups(a), lr=1e-2, lr_power=2.0, **ramp('magnitude'))
    plain = AdamW(groups(b), lr=1e-2)
    pruner = Pruner(plain, lr_power=2.0, **ramp('magnitude'))
    for step in range(30):
        run(ours, a, step + 1, step)
        for group in plain.param_groups:
            group['lr'] = 1e-2 * pruner.rate_factor(group)
        run(plain, b, step + 1, step, pruner)
        assert ours.param_groups[0]['lr'] == 1e-2
    for p, q in zip(a, b):
        assert torch.equal(p, q)
    assert pruner.rate_factor(plain.param_groups[0]) == 4.0
    assert pruner.rate_factor(plain.param_groups[1]) == 1.0


def test_memory_is_one_boolean_a_weight():
    for score, extra in (('bitter7', 0), ('movement', 1), ('bitter10', 3)):
        params = parameters()
        optimizer = AdamWPrune(params, **ramp(score))
        run(optimizer, params, 15)  # before the masks are final
        keys = set(optimizer.state[params[0]])
        assert keys == {'step', 'exp_avg', 'exp_avg_sq', 'mask'}
        pruner = optimizer.pruner
        numbers = sum(each.numel() for each in pruner.initial.values())
        for tracker in pruner.trackers.values():
            numbers += sum(tracker[key].numel() for key in ('last', 'average', 'size'))
        assert numbers == extra * N and not pruner.dense
        assert optimizer.state[params[0]]['mask'] is pruner.masks[params[0]]


@pytest.mark.parametrize('score', PRUNING)
def test_steps_ask_the_device_nothing_but_where_masks_are_chosen(score, monkeypatch):
    params = parameters()
    optimizer = AdamWPrune(params, fused=True, **ramp(score))  # as in train.py
    run(optimizer, params, 5)  # the first choice was after 4

    def asked(*arguments):
        raise AssertionError('a tensor was read on the host')

    for step in (5, 7):
        give_gradients(params, step)
        with monkeypatch.context() as patched:
            for name in ('item', 'tolist', '__bool__', '__int__', '__float__', '__index__', 'cpu'):
                patched.setattr(torch.Tensor, name, asked)
            optimizer.step()
        run(optimizer, params, step + 2, step + 1)


@pytest.mark.parametrize('wrong, told', [
    (dict(base='sgd'), "AdamWPrune: base='sgd' is not one of adamw, adamwspam"),
    (dict(spam_interval=50), "AdamWPrune: spam_interval given, but base='adamw'"),
    (dict(lr=-1.0), 'Invalid learning rate: -1.0')])
def test_adamwprune_refuses_the_impossible(wrong, told):
    with pytest.raises(ValueError) as caught:
        AdamWPrune(parameters(), **{**ramp('magnitude'), **wrong})
    assert told in str(caught.value)


# --- saving ---------------------------------------------------------------------------------------

MODES = {
    'adamw': {},
    'paper': dict(base='adamwspam', spam_mode='paper', **SPAM),
    'reference': dict(base='adamwspam', spam_mode='reference', **SPAM),
    'stable': dict(base='adamwspam', spam_mode='stable', **SPAM),
}


@pytest.mark.parametrize('score', PRUNING)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('regrow', [False, True])
def test_state_dict_continues_to_the_bit(score, mode, regrow):
    dtype = torch.float32 if regrow else torch.bfloat16
    more = {**ramp(score, regrow=regrow, srste=1e-3 * regrow), **MODES[mode]}

    def fresh():
        params = parameters(dtype)
        return params, AdamWPrune(params, lr=5e-2, **more)

    a, straight = fresh()
    run(straight, a, 26)
    for split in (0, 3, 11):  # before masks; between two choices, one overdue in a warm-up
        b, first = fresh()
        run(first, b, split)
        saved = copy.deepcopy(first.state_dict())
        c, second = fresh()
        with torch.no_grad():
            for p, q in zip(c, b):
                p.copy_(q)
        second.load_state_dict(saved)
        run(second, c, 26, split)
        assert_same(straight.state_dict()['state'], second.state_dict()['state'])
        assert_same(straight.state_dict()['param_groups'][0],
                    second.state_dict()['param_groups'][0])
        for p, q in zip(a, c):
            assert torch.equal(p, q)
        for p, mask in second.pruner.masks.items():
            assert second.state[p]['mask'] is mask


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('regrow', [False, True])
@pytest.mark.parametrize('make', [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_continues_like_the_original(make, mode, regrow):
    params = parameters()
    more = dict(regrow=regrow, srste=1e-2 * regrow, **MODES[mode])
    optimizer = AdamWPrune(params, lr=5e-2, **ramp('bitter3', **more))
    run(optimizer, params, 8)
    twin_params, twin = make((params, optimizer))
    run(twin, twin_params, 26, 8)
    assert pruned(optimizer.pruner.masks) < N // 2  # nothing is shared
    run(optimizer, params, 26, 8)
    for p, q in zip(params, twin_params):
        assert torch.equal(p, q)
    assert_same(optimizer.state_dict()['param_groups'][0], twin.state_dict()['param_groups'][0])


# --- as training uses it --------------------------------------------------------------------------


class Settings:
    learning_rate = 1e-2
    beta1 = 0.9
    beta2 = 0.95
    weight_decay = 0.1
    spam_mode = 'paper'
    spam_interval = 9
    spam_warmup = 4
    compile = False


def small_run(optimizer, mode, score, dtype, regrow, weights=None):
    """(modules, flats, optimizer, pruner) as train.py has them."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
    net = nn.ModuleDict(dict(blocks=blocks, token_embedding=nn.Embedding(9, 12)))
    if weights:
        net.load_state_dict(weights)
    flats = optim.flatten(net, dtype)
    settings = Settings()
    settings.spam_mode = mode
    groups = optim.parameter_groups(flats, 0.1, 'blocks+embedding')
    built = optim.OPTIMIZERS[optimizer](groups, settings)
    hold = built.recovering if isinstance(built, AdamWSPAM) else None
    more = dict(regrow=regrow, srste=1e-3 * regrow, lr_power=1.0, hold=hold)
    return net, flats, built, Pruner(built, **ramp(score, **more))


def steps_of(everything, steps, first=0):
    net, flats, optimizer, pruner = everything
    for step in range(first, steps):
        draw = torch.Generator().manual_seed(step)
        for flat in flats:
            for _, grad in flat.members:
                grad.copy_(torch.randn(grad.shape, generator=draw))
        norm = get_total_norm([flat.grads for flat in flats])
        optim.scale_gradients(flats, 1 / norm, norm.isfinite())
        for group in optimizer.param_groups:
            group['lr'] = 1e-2 * pruner.rate_factor(group)
        optimizer.step()
        pruner.step()
        optim.refresh_working(flats)


KINDS = [  # optimizer, spam_mode, dtype, regrow
    ('adamw', 'paper', torch.float32, False),
    ('adamwprune', 'paper', torch.bfloat16, True),
    ('adamwspam', 'paper', torch.bfloat16, False),
    ('adamwspam', 'reference', torch.bfloat16, False),
    ('adamwspam', 'stable', torch.float32, True),
]


@pytest.mark.parametrize('score', PRUNING)
@pytest.mark.parametrize('optimizer, mode, dtype, regrow', KINDS)
def test_a_saved_run_continues_to_the_bit(optimizer, mode, dtype, regrow, score, tmp_path):
    straight = small_run(optimizer, mode, score, dtype, regrow)
    steps_of(straight, 26)
    first = small_run(optimizer, mode, score, dtype, regrow)
    steps_of(first, 11)
    weights = {}
    for flat in first[1]:
        weights.update({name: p.detach() for name, p in flat.parameters.items()})
    torch.save((weights, first[2].state_dict(), first[3].state_dict()), tmp_path / 'saved')
    weights, state, pruning = torch.load(tmp_path / 'saved', weights_only=True)
    second = small_run(optimizer, mode, score, dtype, regrow, weights)
    second[2].load_state_dict(state)
    second[3].load_state_dict(pruning)
    steps_of(second, 26, 11)
    assert_same(straight[2].state_dict()['state'], second[2].state_dict()['state'])
    assert_same(straight[3].state_dict(), second[3].state_dict())
    for p, q in zip(straight[0].parameters(), second[0].parameters()):
        assert torch.equal(p, q)
    pruner = second[3]
    assert pruner.sparsity == 0.5 and pruner.frozen
    zeros = sum(int((p == 0).sum()) for p in second[0].parameters() if p.dim() >= 2)
    assert zeros == pruner.pruned == pruned(pruner.masks)


def test_flat_and_apart_choose_the_same_masks():
    flat_run = small_run('adamw', 'paper', 'bitter7', torch.float32, False)
    torch.manual_seed(0)
    plain = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
    net, flats, optimizer, pruner = flat_run
    apart = AdamWPrune([linear.weight for linear in plain], 1e-2, (0.9, 0.95), weight_decay=0.1,
                       lr_power=1.0, **ramp('bitter7'))
    alone = Pruner(AdamW(optim.parameter_groups(flats, 0.1, 'blocks')), **ramp('bitter7'))
    assert list(alone.named) == [f'blocks.{i}.weight' for i in range(3)]
    for group in optimizer.param_groups:
        group['prune'] = group['param_names'][0] == 'blocks.0.weight'
    pruner = Pruner(optimizer, lr_power=1.0, **ramp('bitter7'))
    for step in range(25):
        steps_of((net, flats, optimizer, pruner), step + 1, step)
        for i, linear in enumerate(plain):
            linear.weight.grad = flats[0].parameters[f'blocks.{i}.weight'].grad.clone()
        apart.step()
    for i, linear in enumerate(plain):
        mask = pruner.masks[flats[0].parameters[f'blocks.{i}.weight']]
        assert torch.equal(mask, apart.state[linear.weight]['mask'])
