"""fp8.py's plain twins against float64, a model and runs with them, and what is refused. The kernels: test_gpu.py."""
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_run, losses, refusal, train
from torch._dynamo.utils import counters
from torch.nn import functional as F

import fp8
import preflight
from memory import ladder, predicted_memory
from model import GPT, GPTConfig
from settings import Settings, check, parse

SMALL = dict(vocab_size=131, block_size=32, n_layer=2, n_head=4, n_embd=32, loss_chunk_tokens=64)
E4M3, E5M2 = 2 ** -4, 2 ** -3  # largest relative error of a rounded number


def drawn(*shape, scale=1.0, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def tokens(rows=4, seed=1):
    return torch.randint(131, (2, rows, 32), generator=torch.Generator().manual_seed(seed))  # (idx, targets)


def near(ours, exact, tolerance):
    assert (ours.double() - exact).norm() <= tolerance * exact.norm()


def same_bytes(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture
def on_a_cpu(monkeypatch):
    """The plain twins train where the kernels cannot."""
    monkeypatch.setattr(preflight, 'check_fp8', lambda machine: [])


# --- the operations against float64 --------------------------------------------------------------------


@pytest.mark.parametrize('scale', [1e-6, 1.0, 300.0])
def test_cast_rounds_and_keeps_what_is_within_the_bound(scale):
    x = drawn(48, 80, scale=scale)
    inverse = fp8.inverse_of(fp8.longest(x))
    x8, x8_t = fp8.cast_both(x, inverse)
    back = x8.double() * inverse.double()
    subnormal = inverse.double() * 2 ** -10  # half the smallest number
    assert ((back - x).abs() <= (x.abs().double() * E4M3).clamp(min=subnormal)).all()
    assert x8_t.is_contiguous() and same_bytes(x8_t, x8.t().contiguous())


def test_product_is_that_of_the_rounded_numbers():
    a, b, of_a, of_b = drawn(16, 48), drawn(32, 48, seed=1), torch.tensor(0.01), torch.tensor(0.02)
    a8, b8 = fp8.cast(a, of_a), fp8.cast(b, of_b)
    ours = fp8.product(a8, b8, of_a, of_b, torch.float32, False)
    near(ours, (a8.double() * of_a.double()) @ (b8.double() * of_b.double()).t(), 1e-6)
    near(ours, a.double() @ b.double().t(), 0.05)


def test_gelu_and_its_gradient_in_both_layouts():
    h, da = drawn(48, 80, scale=3), drawn(48, 80, scale=1e-6, seed=1)
    exact = h.double().requires_grad_()
    a = F.gelu(exact, approximate='tanh')
    expected, = torch.autograd.grad(a, exact, da.double())
    of_dh, of_a = torch.tensor(1e-8), torch.tensor(0.04)
    dh, dh_t, a_t = fp8.gelu_backward(h, da, of_dh, of_a)
    near(dh.double() * of_dh.double(), expected, 0.04)
    near(a_t.t().double() * of_a.double(), a.detach(), 0.04)
    assert same_bytes(dh_t, dh.t().contiguous()) and same_bytes(a_t.t().contiguous(), fp8.cast(a.detach().float(), of_a))
    steepest = torch.linspace(-6, 6, 100_001, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(F.gelu(steepest, approximate='tanh').sum(), steepest)
    assert slope.abs().max() < fp8.STEEPEST


def test_logit_gradient_is_softmax_minus_one_hot_of_what_is_scored():
    logits, targets = drawn(48, 256, scale=2), torch.randint(200, (48,), generator=torch.Generator().manual_seed(1))
    targets[::7], targets[1], targets[2] = -1, 0, 199
    scored = (targets >= 0).sum()
    exact = logits.double().requires_grad_()
    loss = F.cross_entropy(exact[:, :200], targets, ignore_index=-1)
    expected, = torch.autograd.grad(loss, exact)
    each = fp8.cross_entropy_plain(logits, targets, scored, 200)
    assert each.sum().item() == pytest.approx(loss.item(), rel=1e-6) and (each[::7] == 0).all()
    grad, grad_t = fp8.logit_gradient(logits, targets, each, scored, 200)
    exact_grad = expected * scored * fp8.ONE
    assert ((grad.double() - exact_grad).abs() <= (exact_grad.abs() * E5M2).clamp(min=2 ** -17)).all()
    assert same_bytes(grad_t, grad.t().contiguous())


# --- a model -------------------------------------------------------------------------------------------


def models(**changes):
    """A plain model and one in float8 with the same weights."""
    torch.manual_seed(0)
    plain, ours = (GPT(GPTConfig(**{**SMALL, **changes}, fp8=on)) for on in (False, True))
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize('told', [{}, dict(dropout=0.2), dict(attention='mla', latent_dim=16)])
def test_loss_and_gradients_are_near_those_without(told):
    (idx, targets), found = tokens(), []
    targets[1, 5:] = -1
    for model in models(**told):
        torch.manual_seed(7)  # the same dropout
        loss = model(idx, targets)
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    assert found[1][0] == pytest.approx(found[0][0], abs=2e-3) and found[1][0] != found[0][0]
    for name, exact in found[0][1].items():
        near(found[1][1][name], exact.double(), 0.12)


def test_no_number_reaches_its_bound(monkeypatch):
    """Also of weights and gains far from their start. Where it would, cast() would cut it off."""
    reached, cast = [], fp8.cast

    def seen(x, inverse):
        reached.append((x.abs().amax() / inverse).item())
        return cast(x, inverse)

    monkeypatch.setattr(fp8, 'cast', seen)
    _, model = models()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(5).view(-1)[3] = 4.0
    model(*tokens()).backward()
    assert len(reached) == 2 * (3 + 1 + 1 + 2) + 1 + 2 and 1 < max(reached) <= fp8.LARGEST * (1 + 1e-6)


def test_weights_that_are_all_zero_stay_finite():
    plain, ours = models()
    for model in (plain, ours):
        with torch.no_grad():
            model.blocks[0].mlp.fc.weight.zero_(), model.blocks[1].mlp.proj.weight.zero_(), model.blocks[1].norm_2.weight.zero_()
        model(*tokens()).backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())
    assert ours.blocks[0].mlp.fc.weight.grad.norm() > 0 and ours.blocks[0].mlp.proj.weight.grad.norm() == 0


def test_gradients_that_are_not_finite_show():
    _, model = models()
    (model(*tokens()) * math.inf).backward()
    assert not model.blocks[0].mlp.fc.weight.grad.isfinite().all()


def test_without_gradients_nothing_is_in_float8():
    plain, ours = models()
    idx, targets = tokens()
    with torch.no_grad():
        assert torch.equal(plain(idx, targets), ours(idx, targets)) and torch.equal(plain(idx), ours(idx))


def test_compiles_into_one_graph_with_the_same_gradients():
    _, model = models()
    model(*tokens()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.hidden = torch.compile(model.hidden, fullgraph=True, dynamic=False, backend='aot_eager')
    model(*tokens()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize('compiled, tolerance', [(True, 0.02), (False, 0.15)])
def test_what_a_block_keeps_is_predicted(compiled, tolerance):
    """The difference that float8 makes, in bytes, of two blocks in bfloat16."""
    differences = []
    for layers in (2, 4):
        kept, predicted = {}, {}
        for on in (False, True):
            torch._dynamo.reset()
            sizes = dict(n_layer=layers, n_head=2, n_embd=64, block_size=64, fp8=on)
            model = GPT(GPTConfig(vocab_size=131, **sizes)).bfloat16()
            if compiled:
                model.hidden = torch.compile(model.hidden, fullgraph=True, dynamic=False, backend='aot_eager_decomp_partition')
            saved = {}

            def keep(t, saved=saved):
                return saved.setdefault(t.untyped_storage().data_ptr(), t)

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                model.hidden(torch.zeros(16, 64, dtype=torch.int64))
            weights = {p.data_ptr() for p in model.parameters()}
            kept[on] = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in weights)
            s = Settings(batch_size=16, compile=compiled, **sizes)
            predicted[on] = predicted_memory(s, model.config, torch.bfloat16, 0, 0)['activations']
        differences.append((kept[True] - kept[False], predicted[True] - predicted[False]))
    measured, expected = (b - a for a, b in zip(*differences))
    assert measured == pytest.approx(expected, rel=tolerance)


# --- runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('told', [{}, dict(optimizer='adamwprune', prune_score='magnitude', prune_start=5, prune_end=40, prune_interval=5)])
def test_run_learns_as_well_as_without(tiny, tmp_path, on_a_cpu, told):
    for on in (False, True):
        assert train.main(tiny(**told, fp8=on, loss_chunk_tokens=64, max_iters=60, out_dir=tmp_path / str(on))) == 0
    noted = ['training multiplies in float8 in MLP and head' in (tmp_path / name / 'train.log').read_text() for name in ('False', 'True')]
    without, ours = losses(tmp_path / 'False'), losses(tmp_path / 'True')
    assert noted == [False, True] and without != ours and without[60] < without[1] - 1.5
    late = [step for step in ours if step > 40]
    assert abs(sum(ours[step] - without[step] for step in late)) / len(late) < 0.05  # nat


def test_compiled_run_takes_its_graphs_from_the_cache(tiny, tmp_path, on_a_cpu):
    """The compiler would not keep a graph with an autograd function in it, and each start would make it anew."""
    found = []
    for again in (False, True):
        torch._dynamo.reset()
        counters.clear()
        assert train.main(tiny(fp8=True, compile=True, loss_chunk_tokens=64, n_layer=1, max_iters=3, out_dir=tmp_path / str(again))) == 0
        found.append(counters['aot_autograd'])
    assert found[0]['autograd_cache_saved'] + found[0]['autograd_cache_hit'] == found[1]['autograd_cache_hit'] > 0
    assert not found[0]['autograd_cache_bypass'] and losses(tmp_path / 'False') == losses(tmp_path / 'True')


def test_resume_is_exact_and_keeps_the_choice(tiny, tmp_path, on_a_cpu):
    common = dict(fp8=True, loss_chunk_tokens=64, lr_decay_iters=8, deterministic=True)
    train.main(tiny(**common, max_iters=8, out_dir=tmp_path / 'straight'))
    train.main(tiny(**common, max_iters=4, out_dir=tmp_path / 'split'))
    again = dict(max_iters=8, out_dir=tmp_path / 'split', init_from='resume')
    assert 'fp8=False: the run' in refusal(train.main, tiny(**{**common, 'fp8': False}, **again))[0]
    train.main(tiny(**common, **again))
    torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / 'straight', tmp_path / 'split')


def test_off_it_is_never_reached(tiny, monkeypatch):
    for name in ('head', 'product', 'cast_both', 'Float8MLP'):
        monkeypatch.setattr(fp8, name, None)
    assert train.main(tiny()) == 0


# --- refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('changes, message', [
    (dict(bias=True), 'fp8=True bias=True: the products in float8 have no bias; set one of the two to False'),
    (dict(n_embd=40), 'fp8=True n_embd=40: the products in float8 want a multiple of 16'),
    (dict(block_size=24), 'fp8=True block_size=24: the products in float8 want a multiple of 16'),
    (dict(loss_chunk_tokens=48), 'fp8=True loss_chunk_tokens=48: the products in float8 want a multiple of 64')])
def test_what_the_products_do_not_take_is_refused(tiny, on_a_cpu, changes, message):
    assert refusal(train.main, tiny(**{'loss_chunk_tokens': 64, **changes}, fp8=True)) == [message]
    s, _ = parse(Settings, tiny(**{'loss_chunk_tokens': 64, **changes}))
    assert not check(s)


def test_every_rung_of_the_ladder_has_sizes_that_the_products_take(tiny):
    s, _ = parse(Settings, tiny(fp8=True, compile=True, batch_size=6, loss_chunk_tokens=64))
    assert not check(s)
    for _, changes in ladder(s):
        now = {**vars(s), **changes}
        assert now['loss_chunk_tokens'] % 16 == now['batch_size'] * now['block_size'] % now['loss_chunk_tokens'] % 16 == 0


def test_cpu_is_refused(tiny):
    assert 'fp8=True: needs an NVIDIA GPU with CUDA and Triton, this is CPU' in refusal(train.main, tiny(fp8=True, loss_chunk_tokens=64))[0]


@pytest.mark.parametrize('capability, dtype, cuda, has_triton, message', [
    ((9, 0), torch.bfloat16, '12.8', True, None), ((10, 0), torch.bfloat16, '13.0', True, None),
    ((8, 9), torch.bfloat16, '12.8', True, 'needs compute capability 9.0 (H100) or more, this GPU has 8.9'),
    ((9, 0), torch.float32, '12.8', True, 'its products end in bfloat16, dtype is float32; set --dtype=bfloat16'),
    ((9, 4), torch.bfloat16, None, True, 'needs an NVIDIA GPU with CUDA and Triton'),  # ROCm
    ((9, 0), torch.bfloat16, '12.8', False, 'needs an NVIDIA GPU with CUDA and Triton')])
def test_which_gpus_will_do(monkeypatch, capability, dtype, cuda, has_triton, message):
    monkeypatch.setattr(torch.version, 'cuda', cuda)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(fp8, 'triton', has_triton or None)
    problems = preflight.check_fp8(SimpleNamespace(device=torch.device('cuda:0'), dtype=dtype, name='this GPU'))
    assert len(problems) == bool(message) and (not message or message in problems[0])
