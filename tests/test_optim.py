"""optim.py against torch.optim.AdamW and plain arithmetic."""
import math

import pytest
import torch
from conftest import train  # noqa: F401  (puts the repository on the path)

import optim
from flat import accumulate, flatten, gradient_norm, load_named_state, named_state
from model import GPT, GPTConfig
from optim import AdamW, build_optimizer, learning_rate_at

CONFIG = GPTConfig(vocab_size=100, block_size=16, n_layer=2, n_head=2, n_embd=24, bias=True)


def small_model(dtype=torch.float32, eps=1e-8):
    torch.manual_seed(0)
    model = GPT(CONFIG)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    flats = flatten(model, dtype)
    optimizer = build_optimizer(flats, lr=1e-2, betas=(0.9, 0.95), eps=eps, weight_decay=0.1, compiled=False)
    load_named_state(flats, optimizer, {'weights': weights})
    return model, flats, optimizer


def tokens(seed):
    return torch.randint(CONFIG.vocab_size, (2, 4, CONFIG.block_size), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_drop_in_equals_torch_adamw_over_50_steps(dtype):
    torch.manual_seed(0)
    shapes = [(30, 7), (5,), (2, 3, 4)]
    ours = [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = dict(lr=3e-2, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.2)
    a, b = AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for step in range(50):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p) * 10 ** (step % 5 - 2)
            q.grad = p.grad.clone()
        a.step(), b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=1e-6 if dtype == torch.float32 else 1e-14, rtol=1e-6)
        torch.testing.assert_close(a.state[p]['exp_avg'], b.state[q]['exp_avg'], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(a.state[p]['exp_avg_sq'], b.state[q]['exp_avg_sq'], atol=1e-6, rtol=1e-5)


def test_flat_training_equals_torch_adamw_over_50_steps():
    """The fused path as train.py uses it: accumulation, clipping, schedule, decay on matrices only.

    eps is raised because a key bias has no gradient but rounding, which Adam would blow up to full steps.
    """
    model, flats, optimizer = small_model(eps=1e-4)
    torch.manual_seed(0)
    plain = GPT(CONFIG)
    groups = [dict(params=[p for p in plain.parameters() if p.dim() >= 2], weight_decay=0.1),
              dict(params=[p for p in plain.parameters() if p.dim() < 2], weight_decay=0.0)]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-4)
    for step in range(50):
        for flat in flats:
            flat.parameter.main_grad.zero_()
        for micro in range(2):
            idx, targets = tokens(step * 2 + micro)
            (model(idx, targets) / 2).backward()
            accumulate(flats)
            (plain(idx, targets) / 2).backward()
        norm = gradient_norm(flats)
        expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=1e-6)
        for group in optimizer.param_groups + theirs.param_groups:
            group['lr'] = learning_rate_at(step, 1e-3, 1e-4, 5, 50)
        optimizer.step(clip=(0.5 / (norm + 1e-6)).clamp(max=1.0))
        theirs.step(), theirs.zero_grad()
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f'{name}: {m}')


def test_bfloat16_works_on_rounded_masters():
    """Small updates are not lost: the masters move although no bfloat16 weight would."""
    model, flats, optimizer = small_model(torch.bfloat16)
    before = {k: v.clone() for k, v in named_state(flats, optimizer)['weights'].items()}
    for group in optimizer.param_groups:
        group['lr'] = 1e-6
    model(*tokens(0)).backward()
    accumulate(flats)
    optimizer.step()
    weights = named_state(flats, optimizer)['weights']
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert any(not torch.equal(weights[n], before[n]) for n in weights)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.bfloat16 if p.dim() >= 2 else torch.float32)
        assert torch.equal(p.float(), weights[name].to(p.dtype).float())


def test_bfloat16_drop_in_has_float32_moments_and_masters_through_its_state_dict():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40).bfloat16())
    a = AdamW([p], lr=1e-3)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        a.step()
    q = torch.nn.Parameter(p.detach().clone())
    b = AdamW([q], lr=1e-3)
    b.load_state_dict(a.state_dict())
    assert b.state[q]['step'] == 3
    for key in ('exp_avg', 'exp_avg_sq', 'master'):
        assert b.state[q][key].dtype == torch.float32 and torch.equal(a.state[p][key], b.state[q][key])
        assert a.state[p][key].data_ptr() != b.state[q][key].data_ptr()
    p.grad = q.grad = torch.randn_like(p)
    a.step(), b.step()
    assert torch.equal(a.state[p]['master'], b.state[q]['master'])


def test_gradients_accumulate_in_float32_and_are_freed():
    model, flats, _ = small_model(torch.bfloat16)
    gradients = {k: v for f in flats for k, v in f.views(f.parameter.main_grad).items()}
    total = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for seed in range(3):
        single, single_flats, _ = small_model(torch.bfloat16)
        single(*tokens(seed)).backward()
        accumulate(single_flats)
        for f in single_flats:
            for name, grad in f.views(f.parameter.main_grad).items():
                total[name] += grad
        model(*tokens(seed)).backward()
        accumulate(flats)
    for name, p in model.named_parameters():
        assert p.grad is None and gradients[name].dtype == torch.float32
        torch.testing.assert_close(gradients[name], total[name], atol=1e-7, rtol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing():
    model, flats, optimizer = small_model()
    model(*tokens(0)).backward()
    accumulate(flats)
    optimizer.step()
    before = {k: {n: t.clone() for n, t in v.items()} for k, v in named_state(flats, optimizer).items()}
    flats[0].parameter.main_grad[5] = math.nan
    optimizer.step(finite=gradient_norm(flats).isfinite())
    for key, named in named_state(flats, optimizer).items():
        for name, tensor in named.items():
            assert torch.equal(tensor, before[key][name])


def test_weight_decay_is_for_matrices_only():
    model, flats, optimizer = small_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()  # all gradients are zero: only the decay acts
    for name, p in model.named_parameters():
        expected = before[name] * (1 - 1e-2 * 0.1) if p.dim() >= 2 else before[name]
        torch.testing.assert_close(p.detach(), expected, atol=1e-8, rtol=1e-6)


def test_parameters_are_views_that_do_not_overlap():
    model, flats, _ = small_model()
    views = [view for flat in flats for view in flat.views(flat.parameter.data).values()]
    for flat in flats:
        flat.parameter.data.fill_(-1)
    for i, view in enumerate(views):
        assert (view == -1).all() and view.storage_offset() % 64 == 0
        view.fill_(i)
    assert sorted(p.flatten()[0].item() for p in model.parameters()) == list(range(len(views)))
    assert all((p == p.flatten()[0]).all() for p in model.parameters())


def test_schedule_warms_up_and_follows_the_cosine():
    rate = [learning_rate_at(step, 6e-4, 6e-5, 10, 100) for step in range(120)]
    assert rate[0] == pytest.approx(6e-4 / 11) and rate[9] == pytest.approx(6e-4 * 10 / 11)
    assert rate[10] == pytest.approx(6e-4) and rate[55] == pytest.approx((6e-4 + 6e-5) / 2)
    assert rate[100] == rate[119] == 6e-5
    assert all(a < b for a, b in zip(rate[:10], rate[1:11])) and all(a > b for a, b in zip(rate[10:100], rate[11:101]))


@pytest.mark.parametrize('wrong', [dict(lr=-1.0), dict(eps=-1e-8), dict(betas=(0.9, 1.0)), dict(weight_decay=-0.1)])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f'AdamW: {next(iter(wrong))}='):
        AdamW([torch.nn.Parameter(torch.zeros(1))], **wrong)


def test_closure_is_evaluated_with_gradients():
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = optim.AdamW([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p ** 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0 and p.item() < 1.0
