"""optim.py: AdamW against torch.optim.AdamW, layout, state, schedule. SPAM is in test_spam.py."""
import copy
import math
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import optim
from optim import AdamW, flatten, learning_rate_at, parameter_groups

SHAPES = [(30, 7), (5,), (2, 3, 4)]


class Net(nn.Module):
    """The names and kinds of parameters that a GPT has, in small."""

    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(20, 12)
        self.position_embedding = nn.Embedding(5, 12)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.norm = nn.LayerNorm(12)

    def forward(self, idx):
        table = self.token_embedding.weight
        x = self.token_embedding(idx) + self.position_embedding(torch.arange(5))
        for block in self.blocks:
            x = x + F.linear(x, block.weight).tanh() + block.bias.to(x.dtype)
        x = self.norm(x.to(self.norm.weight.dtype))
        return F.cross_entropy((x @ table.t().to(x.dtype)).flatten(0, 1), idx.flatten().flip(0))


def small_net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    net = Net()
    return net, flatten(net, dtype)


def tokens(seed):
    return torch.randint(20, (4, 5), generator=torch.Generator().manual_seed(seed))


def optimizer_of(flats, scope='blocks', **more):
    return AdamW(parameter_groups(flats, 0.1, scope), 1e-2, (0.9, 0.95), flats=flats, **more)


def train(net, flats, optimizer, steps, first=0):
    for step in range(first, steps):
        optim.clear(flats)
        net(tokens(step)).backward()
        optim.accumulate(flats)
        optimizer.step()
        optim.refresh_working(flats)


def named_parameters(flats):
    found = {}
    for flat in flats:
        found.update(flat.parameters)
    return found


def parameters(dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES]
    return [nn.Parameter(each.to(dtype)) for each in made]


def give_gradients(params, step):
    draw = torch.Generator().manual_seed(1000 + step)
    for p in params:
        size = 10.0 ** (step % 5 - 2)
        p.grad = (torch.randn(p.shape, generator=draw, dtype=torch.float64) * size).to(p.dtype)


def run(optimizer, params, steps, first=0):
    for step in range(first, steps):
        give_gradients(params, step)
        optimizer.step()


def assert_same_state(a, b):
    """Of two optimizers over equal parameters, to the bit."""
    for ours, theirs in zip(a.param_groups, b.param_groups):
        for p, q in zip(ours['params'], theirs['params']):
            assert torch.equal(p, q) and a.state[p].keys() == b.state[q].keys()
            for key, value in a.state[p].items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(b.state[q][key])), key


# --- AdamW ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_drop_in_equals_torch_adamw_over_50_steps(dtype, tolerance):
    """float32: a few units in the last place of weights around 1."""
    pairs = []
    for kind in (AdamW, torch.optim.AdamW):
        params = parameters(dtype)
        groups = [dict(params=params[:1], weight_decay=0.3, betas=(0.7, 0.9)),
                  dict(params=params[1:], lr=1e-2)]
        optimizer = kind(groups, lr=3e-2, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        for step in range(50):
            give_gradients(params, step)
            optimizer.step()
            scheduler.step()
        pairs.append((params, optimizer))
    (ours, a), (theirs, b) = pairs
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=tolerance, rtol=tolerance)
        for key in ('exp_avg', 'exp_avg_sq'):
            expected = b.state[q][key]
            torch.testing.assert_close(a.state[p][key], expected, atol=0, rtol=50 * tolerance)
        assert a.state[p]['step'] == 50


@pytest.mark.parametrize('scope', optim.PRUNE_SCOPES)
def test_flat_training_equals_torch_adamw_over_50_steps(scope):
    """As train.py does it. eps is raised because rounding alone would make full steps."""
    net, flats = small_net()
    optimizer = AdamW(parameter_groups(flats, 0.1, scope), eps=1e-4, flats=flats)
    torch.manual_seed(0)
    plain = Net()
    groups = [dict(params=[p for p in plain.parameters() if p.dim() >= 2], weight_decay=0.1),
              dict(params=[p for p in plain.parameters() if p.dim() < 2], weight_decay=0.0)]
    theirs = torch.optim.AdamW(groups, eps=1e-4)
    for step in range(50):
        optim.clear(flats)
        theirs.zero_grad()
        for micro in range(2):
            (net(tokens(step * 2 + micro)) / 2).backward()
            optim.accumulate(flats)
            (plain(tokens(step * 2 + micro)) / 2).backward()
        norm = optim.gradient_norm(flats)
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=1e-6)
        optim.scale_gradients(flats, (0.5 / (norm + 1e-6)).clamp(max=1.0), norm.isfinite())
        for group in optimizer.param_groups + theirs.param_groups:
            group['lr'] = learning_rate_at(step, 1e-2, 1e-3, 5, 50)
        optimizer.step()
        theirs.step()
    for p, q in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, atol=2e-6, rtol=1e-5)


def test_bfloat16_drop_in_works_on_a_float32_master():
    """It equals AdamW on the master, and moves although no bfloat16 weight would."""
    ours = [nn.Parameter(torch.ones(40, dtype=torch.bfloat16))]
    exact = [nn.Parameter(torch.ones(40))]
    a = AdamW(ours, lr=1e-4, weight_decay=0.0)
    b = torch.optim.AdamW(exact, lr=1e-4, weight_decay=0.0)
    for step in range(5):
        give_gradients(ours, step)
        exact[0].grad = ours[0].grad.float()
        a.step()
        b.step()
    assert (ours[0] == 1).all() and (exact[0] != 1).any()
    torch.testing.assert_close(a.state[ours[0]]['master'], exact[0].detach())
    assert a.state[ours[0]]['exp_avg'].dtype == torch.float32


def test_parameters_without_gradient_are_left_alone():
    params = parameters()
    optimizer = AdamW(params, lr=0.1)
    give_gradients(params, 0)
    params[1].grad = None
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert torch.equal(params[1], before[1]) and params[1] not in optimizer.state
    assert not torch.equal(params[0], before[0])


def test_closure_is_evaluated_with_gradients():
    p = nn.Parameter(torch.ones(1))
    optimizer = AdamW([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p ** 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0 and p.item() < 1.0


@pytest.mark.parametrize('wrong', [dict(lr=-1.0), dict(eps=-1e-8), dict(betas=(0.9, 1.0)),
                                   dict(weight_decay=-0.1)])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f'AdamW: {next(iter(wrong))}='):
        AdamW([nn.Parameter(torch.zeros(1))], **wrong)


def test_a_step_asks_the_device_nothing(monkeypatch):
    net, flats = small_net()
    optimizer = optimizer_of(flats)

    def asked(*arguments):
        raise AssertionError('a tensor was read on the host')

    for name in ('item', 'tolist', '__bool__', '__int__', '__float__', '__index__', 'numpy'):
        monkeypatch.setattr(torch.Tensor, name, asked)
    for _ in range(3):
        optim.clear(flats)
        norm = optim.gradient_norm(flats)
        optim.scale_gradients(flats, 1 / norm, norm.isfinite())
        optimizer.step()
        optim.refresh_working(flats)


def test_a_new_step_or_learning_rate_compiles_nothing_anew(monkeypatch):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    once = torch.compile(optim.adamw_update, fullgraph=True, dynamic=False, backend=count)
    monkeypatch.setattr(optim, 'compiled', lambda function: once)
    net, flats = small_net()
    plain_net, plain_flats = small_net()
    optimizer = optimizer_of(flats, compiled=True)
    plain = optimizer_of(plain_flats)
    for step in range(6):
        for group in optimizer.param_groups + plain.param_groups:
            group['lr'] = 1e-2 / (1 + step)
        train(net, flats, optimizer, step + 1, step)
        train(plain_net, plain_flats, plain, step + 1, step)
    assert len(graphs) == len(flats) == 3
    for ours, theirs in zip(flats, plain_flats):
        assert torch.equal(ours.masters, theirs.masters)


# --- layout ---------------------------------------------------------------------------------------


def test_parameters_are_aligned_views_that_do_not_overlap():
    net, flats = small_net(torch.bfloat16)
    assert [flat.kind for flat in flats] == ['blocks', 'embeddings', 'vectors']
    views = list(named_parameters(flats).values())
    for i, view in enumerate(views):
        assert view.storage_offset() % 64 == 0
        view.data.fill_(i)
    optim.refresh_working(flats)
    for name, p in net.named_parameters():
        number = list(named_parameters(flats)).index(name)
        assert (p == number).all()
        assert p.dtype == (torch.bfloat16 if p.dim() >= 2 else torch.float32)
    for flat in flats:
        assert flat.masters.dtype == flat.grads.dtype == torch.float32
        assert (flat.working is flat.masters) == (flat.kind == 'vectors')


def test_groups_decay_matrices_and_mark_what_may_be_pruned():
    _, flats = small_net()
    for scope in optim.PRUNE_SCOPES:
        pruned = set()
        for group in parameter_groups(flats, 0.1, scope):
            for name, p in group['params']:
                assert group['weight_decay'] == (0.1 if p.dim() >= 2 else 0.0)
                if group['prune']:
                    pruned.add(name)
        blocks = {'blocks.0.weight', 'blocks.1.weight'}
        embedding = {'token_embedding.weight'} if scope == 'blocks+embedding' else set()
        assert pruned == blocks | embedding


def test_bfloat16_weights_are_rounded_masters():
    """Small updates are not lost: the masters move although no bfloat16 weight would."""
    net, flats = small_net(torch.bfloat16)
    before = [flat.masters.clone() for flat in flats]
    optimizer = optimizer_of(flats)
    optimizer.param_groups[0]['lr'] = 1e-6
    train(net, flats, optimizer, 1)
    assert not torch.equal(flats[0].masters, before[0])
    for name, p in net.named_parameters():
        assert torch.equal(p, named_parameters(flats)[name].to(p.dtype))


def test_float64_models_train_in_float64():
    torch.manual_seed(0)
    flats = flatten(Net().double(), torch.float64)
    assert {flat.masters.dtype for flat in flats} == {torch.float64}
    assert all(flat.working is flat.masters for flat in flats)


def test_gradients_accumulate_in_float32_and_are_freed():
    net, flats = small_net(torch.bfloat16)
    total = {name: torch.zeros(p.shape) for name, p in net.named_parameters()}
    for seed in range(3):
        net(tokens(seed)).backward()
        for name, p in net.named_parameters():
            total[name] += p.grad
        optim.accumulate(flats)
    for name, p in net.named_parameters():
        assert p.grad is None
        torch.testing.assert_close(named_parameters(flats)[name].grad, total[name])
    optim.clear(flats)
    assert optim.gradient_norm(flats) == 0


def test_gradients_that_are_not_finite_become_zero():
    _, flats = small_net()
    for bad in (math.nan, math.inf):
        for flat in flats:
            flat.grads.fill_(2.0)
        flats[0].grads[5] = bad
        norm = optim.gradient_norm(flats)
        optim.scale_gradients(flats, 1 / norm, norm.isfinite())
        assert all((flat.grads == 0).all() for flat in flats)
    flats[0].grads.fill_(2.0)
    optim.scale_gradients(flats, torch.tensor(0.25), torch.tensor(True))
    assert (flats[0].grads == 0.5).all()


def test_any_optimizer_trains_the_flat_parameters():
    net, flats = small_net()
    torch.manual_seed(0)
    plain = Net()
    ours = torch.optim.SGD(parameter_groups(flats, 0.0, 'blocks'), 0.1, momentum=0.9)
    theirs = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    train(net, flats, ours, 5)
    for step in range(5):
        theirs.zero_grad()
        plain(tokens(step)).backward()
        theirs.step()
    for p, q in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q)


def test_parameters_of_a_flat_may_be_split_over_groups():
    """Those that are no neighbours are updated apart; the numbers are the same."""
    results = []
    for parts in (1, 2):
        net, flats = small_net()
        params = list(named_parameters(flats).values())
        groups = [dict(params=params[i::parts]) for i in range(parts)]
        train(net, flats, AdamW(groups, 1e-2, flats=flats), 3)
        results.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*results))


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('split', [0, 7])
def test_state_dict_continues_to_the_bit(dtype, split):
    straight = AdamW(parameters(dtype), lr=1e-2)
    run(straight, straight.param_groups[0]['params'], 20)
    first = AdamW(parameters(dtype), lr=1e-2)
    params = first.param_groups[0]['params']
    run(first, params, split)
    saved = copy.deepcopy(first.state_dict())
    second = AdamW([nn.Parameter(p.detach().clone()) for p in params], lr=1.0)
    second.load_state_dict(saved)
    run(first, params, 9, split)  # what is saved is not touched by it
    run(second, second.param_groups[0]['params'], 20, split)
    assert_same_state(straight, second)


@pytest.mark.parametrize('split', [0, 7])
def test_flat_state_continues_to_the_bit_through_a_file(tmp_path, split):
    results = []
    for stop in (None, split):
        net, flats = small_net()
        optimizer = optimizer_of(flats)
        if stop is not None:
            train(net, flats, optimizer, stop)
            weights = {name: p.detach().clone() for name, p in net.named_parameters()}
            torch.save((weights, optimizer.state_dict()), tmp_path / 'saved')
            weights, state = torch.load(tmp_path / 'saved', weights_only=True)
            torch.manual_seed(1)
            net = Net()
            net.load_state_dict(weights)
            flats = flatten(net, torch.float32)
            optimizer = optimizer_of(flats)
            optimizer.load_state_dict(state)
        train(net, flats, optimizer, 20, stop or 0)
        results.append(optimizer)
    assert_same_state(*results)


def test_older_state_may_be_loaded_at_any_time():
    params = parameters()
    optimizer = AdamW(params, lr=1e-2)
    empty = copy.deepcopy(optimizer.state_dict())
    run(optimizer, params, 3)
    optimizer.load_state_dict(empty)
    assert not optimizer.state
    with torch.no_grad():
        for p, q in zip(params, parameters()):
            p.copy_(q)
    fresh = AdamW(parameters(), lr=1e-2)
    run(optimizer, params, 5)
    run(fresh, fresh.param_groups[0]['params'], 5)
    assert_same_state(optimizer, fresh)


def test_state_of_torch_adamw_is_taken_over():
    params = parameters()
    theirs = torch.optim.AdamW(params, lr=1e-2)
    run(theirs, params, 5)
    ours = AdamW([nn.Parameter(p.detach().clone()) for p in params])
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    run(theirs, params, 10, 5)
    run(ours, ours.param_groups[0]['params'], 10, 5)
    for p, q in zip(params, ours.param_groups[0]['params']):
        torch.testing.assert_close(p, q)
        assert ours.state[q]['step'] == 10


@pytest.mark.parametrize('make', [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_continues_like_the_original(make):
    params = parameters(torch.bfloat16)
    optimizer = AdamW(params, lr=1e-2)
    run(optimizer, params, 3)
    twin_params, twin = make((params, optimizer))
    run(optimizer, params, 6, 3)
    run(twin, twin_params, 6, 3)
    assert_same_state(optimizer, twin)
    assert twin_params[0] is twin.param_groups[0]['params'][0] and twin_params[0] is not params[0]


def test_a_deepcopy_of_flat_training_no_longer_shares_anything():
    net, flats = small_net()
    optimizer = optimizer_of(flats)
    train(net, flats, optimizer, 2)
    twin = copy.deepcopy(optimizer)
    train(net, flats, optimizer, 4, 2)
    for step in (2, 3):
        fresh, fresh_flats = small_net()
        for group, theirs in zip(twin.param_groups, parameter_groups(fresh_flats, 0.1, 'blocks')):
            for p, (_, master) in zip(group['params'], theirs['params']):
                master.data.copy_(p)
        fresh(tokens(step)).backward()
        optim.accumulate(fresh_flats)
        for group, theirs in zip(twin.param_groups, parameter_groups(fresh_flats, 0.1, 'blocks')):
            for p, (_, master) in zip(group['params'], theirs['params']):
                p.grad = master.grad
        twin.step()
    assert_same_state(optimizer, twin)


def test_groups_may_be_added_later():
    params = parameters()
    optimizer = AdamW(params[:1], lr=1e-2)
    run(optimizer, params[:1], 2)
    optimizer.add_param_group(dict(params=params[1:], lr=1e-1))
    run(optimizer, params, 4, 2)
    assert [optimizer.state[p]['step'] for p in params] == [4, 2, 2]


# --- learning rate --------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_follows_the_cosine():
    rate = [learning_rate_at(step, 6e-4, 6e-5, 10, 100) for step in range(120)]
    assert rate[0] == pytest.approx(6e-4 / 11) and rate[9] == pytest.approx(6e-4 * 10 / 11)
    assert rate[10] == pytest.approx(6e-4) and rate[55] == pytest.approx((6e-4 + 6e-5) / 2)
    assert rate[25] == pytest.approx(6e-5 + 5.4e-4 * (1 + math.cos(math.pi / 6)) / 2)
    assert rate[100] == rate[119] == 6e-5
    assert all(a > b for a, b in zip(rate[10:100], rate[11:101]))


def test_learning_rate_may_fall_in_a_line():
    rate = [learning_rate_at(step, 1.0, 0.1, 10, 110, 'linear') for step in range(120)]
    assert rate[10] == 1.0 and rate[60] == pytest.approx(0.55) and rate[35] == pytest.approx(0.775)
    assert rate[110] == rate[119] == 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_compiled_update_equals_its_plain_twin_without_waiting():
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = Net().cuda()
        flats = flatten(net, torch.bfloat16)
        optimizer = optimizer_of(flats, compiled=compiled)
        for step in range(5):
            for flat in flats:
                draw = torch.Generator('cuda').manual_seed(step)
                flat.grads.normal_(generator=draw)
            torch.cuda.set_sync_debug_mode('error' if step > 1 else 'default')
            try:
                optim.scale_gradients(flats, torch.full((), 0.5, device='cuda'),
                                      torch.full((), True, device='cuda'))
                optimizer.step()
                optim.refresh_working(flats)
            finally:
                torch.cuda.set_sync_debug_mode('default')
        results.append([flat.masters for flat in flats])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
