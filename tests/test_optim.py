"""optim.py: layout, AdamW over it, state, schedule. SPAM is in test_spam.py."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import get_total_norm

import optim
from optim import flatten, learning_rate_at, parameter_groups


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


def small_net(dtype=torch.float32):
    torch.manual_seed(0)
    net = Net()
    return net, flatten(net, dtype)


def tokens(seed):
    return torch.randint(20, (4, 5), generator=torch.Generator().manual_seed(seed))


SETTINGS = SimpleNamespace(learning_rate=1e-2, beta1=0.9, beta2=0.95, weight_decay=0.1)


def optimizer_of(flats, scope='blocks'):
    return optim.OPTIMIZERS['adamw'](parameter_groups(flats, 0.1, scope), SETTINGS)


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


def assert_same_state(a, b):
    """Of two optimizers over equal parameters, to the bit."""
    for ours, theirs in zip(a.param_groups, b.param_groups):
        for p, q in zip(ours['params'], theirs['params']):
            assert torch.equal(p, q) and a.state[p].keys() == b.state[q].keys()
            for key, value in a.state[p].items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(b.state[q][key])), key


# --- AdamW ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('scope', optim.PRUNE_SCOPES)
def test_flat_training_equals_adamw_as_its_paper_writes_it(scope):
    """As train.py does it, over 50 steps, against float64. eps is raised because rounding alone
    would make full steps."""
    net, flats = small_net()
    optimizer = optimizer_of(flats, scope)
    torch.manual_seed(0)
    plain = Net().double()
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in plain.parameters()}
    for step in range(50):
        rate = learning_rate_at(step, 1e-2, 1e-3, 5, 50)
        optim.clear(flats)
        plain.zero_grad()
        for micro in range(2):
            (net(tokens(step * 2 + micro)) / 2).backward()
            optim.accumulate(flats)
            (plain(tokens(step * 2 + micro)) / 2).backward()
        norm = get_total_norm([flat.grads for flat in flats])
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=1e-6)
        optim.scale_gradients(flats, (0.5 / (norm + 1e-6)).clamp(max=1.0), norm.isfinite())
        for group in optimizer.param_groups:
            group.update(lr=rate, eps=1e-4)
        optimizer.step()
        with torch.no_grad():
            for p, (m, v) in moments.items():
                m.mul_(0.9).add_(0.1 * p.grad)
                v.mul_(0.95).add_(0.05 * p.grad ** 2)
                m_hat = m / (1 - 0.9 ** (step + 1))
                v_hat = v / (1 - 0.95 ** (step + 1))
                decay = 0.1 if p.dim() >= 2 else 0.0  # the matrices only
                p.sub_(rate * (m_hat / (v_hat.sqrt() + 1e-4) + decay * p))
    for p, q in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(p.double(), q, atol=2e-6, rtol=1e-5)


def test_a_step_asks_the_device_nothing(monkeypatch):
    net, flats = small_net()
    optimizer = optimizer_of(flats)

    def asked(*arguments):
        raise AssertionError('a tensor was read on the host')

    for name in ('item', 'tolist', '__bool__', '__int__', '__float__', '__index__', 'numpy'):
        monkeypatch.setattr(torch.Tensor, name, asked)
    for _ in range(3):
        optim.clear(flats)
        norm = get_total_norm([flat.grads for flat in flats])
        optim.scale_gradients(flats, 1 / norm, norm.isfinite())
        optimizer.step()
        optim.refresh_working(flats)


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
    assert get_total_norm([flat.grads for flat in flats]) == 0


def test_gradients_that_are_not_finite_become_zero():
    _, flats = small_net()
    for bad in (math.nan, math.inf):
        for flat in flats:
            flat.grads.fill_(2.0)
        flats[0].grads[5] = bad
        norm = get_total_norm([flat.grads for flat in flats])
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


# --- state ----------------------------------------------------------------------------------------


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
def test_an_update_on_a_gpu_equals_that_of_a_cpu_without_waiting():
    results = []
    for device in ('cpu', 'cuda'):
        torch.manual_seed(0)
        flats = flatten(Net().to(device), torch.bfloat16)
        optimizer = optimizer_of(flats)
        for step in range(5):
            draw = torch.Generator().manual_seed(step)
            for flat in flats:
                flat.grads.copy_(torch.randn(flat.grads.shape, generator=draw))
            torch.cuda.set_sync_debug_mode('error' if step > 1 else 'default')
            try:
                optim.scale_gradients(flats, torch.full((), 0.5, device=device),
                                      torch.full((), True, device=device), device == 'cuda')
                optimizer.step()
                optim.refresh_working(flats)
            finally:
                torch.cuda.set_sync_debug_mode('default')
        results.append([flat.masters.cpu() for flat in flats])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
