"""The plain twins of kernels/float8.py against float64, training with them, and what is refused.

On a GPU (-m gpu) the kernels against the twins.
"""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_run, losses, refusal
from torch.nn import functional as F

import train
from kernels import float8
from kernels.loss import ChunkedCrossEntropy, cross_entropy
from model import GPT, GPTConfig
from optim import accumulate, flatten
from support import preflight
from support.checks import check

ROUNDING_E4M3 = 2 ** -4  # largest relative error of a rounded number
ROUNDING_E5M2 = 2 ** -3
NAMES = ('x', 'w_fc', 'w_proj')
gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def drawn(*shape, scale=1.0, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def some_targets(tokens, vocab_size):
    """Targets of which some are not scored, and the first and the last token are among them."""
    targets = torch.randint(vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
    targets[::7] = -1
    targets[1] = 0
    targets[2] = vocab_size - 1
    return targets


def error(ours, exact):
    """Relative error, of norms."""
    return ((ours.double() - exact).norm() / exact.norm()).item()


def same_bytes(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# --- the operations against float64 ---------------------------------------------------------------


@pytest.mark.parametrize('scale', [1e-6, 1.0, 300.0])
def test_cast_rounds_and_keeps_what_is_within_the_bound(scale):
    x = drawn(48, 80, scale=scale)
    inverse = float8.inverse_of(float8.longest(x))
    x8, x8_t = float8.cast_both(x, inverse)
    back = x8.double() * inverse.double()
    subnormal = inverse.double() * 2 ** -10  # half the smallest number
    assert ((back - x).abs() <= (x.abs().double() * ROUNDING_E4M3).clamp(min=subnormal)).all()
    assert x8_t.is_contiguous() and same_bytes(x8_t, x8.t().contiguous())


def test_product_is_that_of_the_rounded_numbers():
    a = drawn(16, 48)
    b = drawn(32, 48, seed=1)
    inverse_a = torch.tensor(0.01)
    inverse_b = torch.tensor(0.02)
    a8 = float8.cast(a, inverse_a)
    b8 = float8.cast(b, inverse_b)
    ours = float8.product(a8, b8, inverse_a, inverse_b, torch.float32, False)
    rounded = (a8.double() * inverse_a.double()) @ (b8.double() * inverse_b.double()).t()
    assert error(ours, rounded) < 1e-6
    assert error(ours, a.double() @ b.double().t()) < 0.05


def test_gelu_and_its_gradient_in_both_layouts():
    h = drawn(48, 80, scale=3)
    da = drawn(48, 80, scale=1e-6, seed=1)
    exact = h.double().requires_grad_()
    a = F.gelu(exact, approximate='tanh')
    expected, = torch.autograd.grad(a, exact, da.double())
    inverse_dh = torch.tensor(1e-8)
    inverse_a = torch.tensor(0.04)
    dh, dh_t, a_t = float8.gelu_backward(h, da, inverse_dh, inverse_a)
    assert error(dh.double() * inverse_dh.double(), expected) < 0.04
    assert error(a_t.t().double() * inverse_a.double(), a.detach()) < 0.04
    assert same_bytes(dh_t, dh.t().contiguous())


def test_gelu_is_nowhere_steeper_than_its_bound():
    h = torch.linspace(-6, 6, 100_001, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(F.gelu(h, approximate='tanh').sum(), h)
    assert float8.STEEPEST - 0.01 < slope.abs().max() < float8.STEEPEST


def test_logit_gradient_is_softmax_minus_one_hot_of_what_is_scored():
    logits = drawn(48, 256, scale=2)
    targets = some_targets(48, 200)
    scored = (targets >= 0).sum()
    exact = logits.double().requires_grad_()
    mean = F.cross_entropy(exact[:, :200], targets, ignore_index=-1)
    expected, = torch.autograd.grad(mean, exact)
    each = float8.cross_entropy_plain(logits, targets, scored, 200)
    assert each.sum().item() == pytest.approx(mean.item(), rel=1e-6) and (each[::7] == 0).all()
    grad, grad_t = float8.logit_gradient(logits, targets, each, scored, 200)
    expected = expected * scored * float8.ONE
    allowed = (expected.abs() * ROUNDING_E5M2).clamp(min=2 ** -17)
    assert ((grad.double() - expected).abs() <= allowed).all()
    assert same_bytes(grad_t, grad.t().contiguous())


# --- the MLP and the head -------------------------------------------------------------------------


def mlp_inputs(outlier=1.0):
    """x (2, 16, 32), W_fc, W_proj; one number in each is `outlier`."""
    tensors = [drawn(2, 16, 32), drawn(128, 32, scale=0.1, seed=1), drawn(32, 128, seed=2)]
    for tensor in tensors:
        tensor.view(-1)[3] = outlier
    return [tensor.requires_grad_() for tensor in tensors]


def exact_mlp(x, w_fc, w_proj):
    return F.gelu(x @ w_fc.t(), approximate='tanh') @ w_proj.t()


def test_mlp_and_its_gradients_are_near_float64():
    ours = mlp_inputs()
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    dy = drawn(2, 16, 32, seed=3)
    y = float8.Float8MLP.apply(*ours)
    expected = exact_mlp(*exact)
    y.backward(dy)
    expected.backward(dy.double())
    assert 1e-3 < error(y, expected) < 0.08
    for name, tensor, other in zip(NAMES, ours, exact):
        assert 1e-3 < error(tensor.grad, other.grad) < 0.1, name


def head_loss(x, weight, targets, one_chunk):
    return ChunkedCrossEntropy.apply(x, weight, targets, 200, 16, one_chunk)


def test_head_and_its_gradients_are_near_float64():
    x = drawn(48, 32).requires_grad_()
    weight = drawn(256, 32, scale=0.2, seed=1).requires_grad_()
    targets = some_targets(48, 200)
    exact_x = x.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    expected = F.cross_entropy((exact_x @ exact_weight.t())[:, :200], targets, ignore_index=-1)
    ours = head_loss(x, weight, targets, float8.head(weight))
    (ours / 4).backward()
    (expected / 4).backward()
    assert 0 < abs(ours.item() - expected.item()) < 0.02
    assert error(x.grad, exact_x.grad) < 0.1 and error(weight.grad, exact_weight.grad) < 0.1
    assert (weight.grad[200:] == 0).all()


def test_no_number_reaches_its_bound(monkeypatch):
    """Whatever the weights: where one did, cast() would cut it off."""
    reached = []
    cast = float8.cast

    def watched(x, inverse):
        reached.append((x.abs().amax() / inverse).item())
        return cast(x, inverse)

    monkeypatch.setattr(float8, 'cast', watched)
    for outlier in (1.0, 40.0):
        float8.Float8MLP.apply(*mlp_inputs(outlier)).sum().backward()
        weight = mlp_inputs(outlier)[1].detach()
        grad_weight = torch.zeros_like(weight)
        float8.head(weight)(drawn(16, 32), weight, some_targets(16, 100), torch.tensor(13), 100,
                            grad_weight)
    assert len(reached) == 2 * (4 + 3 + 2)
    assert 100 < max(reached) <= float8.LARGEST * (1 + 1e-6)


@pytest.mark.parametrize('which', range(3))
def test_inputs_that_are_all_zero_stay_finite(which):
    tensors = mlp_inputs()
    with torch.no_grad():
        tensors[which].zero_()
    y = float8.Float8MLP.apply(*tensors)
    y.backward(drawn(2, 16, 32))
    assert y.count_nonzero() == 0
    assert all(tensor.grad.isfinite().all() for tensor in tensors)
    assert tensors[which].grad.norm() > 0


def test_gradients_that_are_not_finite_show():
    tensors = mlp_inputs()
    float8.Float8MLP.apply(*tensors).backward(torch.full((2, 16, 32), math.inf))
    assert not tensors[1].grad.isfinite().all()


def test_compiles_into_one_graph_with_the_same_gradients():
    found = []
    for compiled in (False, True):
        tensors = mlp_inputs()
        function = float8.Float8MLP.apply
        if compiled:
            function = torch.compile(lambda *inputs: float8.Float8MLP.apply(*inputs),
                                     fullgraph=True, dynamic=False, backend='aot_eager')
        function(*tensors).backward(drawn(2, 16, 32))
        found.append([tensor.grad for tensor in tensors])
    for plain, compiled in zip(*found):
        torch.testing.assert_close(plain, compiled, atol=1e-7, rtol=1e-5)


# --- a model and runs -----------------------------------------------------------------------------


@pytest.mark.gpt2  # the MLP in float8 is GPT-2's
def test_a_model_trains_in_float8_and_evaluates_without():
    sizes = dict(vocab_size=131, block_size=32, n_layer=2, n_head=4, n_embd=32,
                 loss_chunk_tokens=64)
    torch.manual_seed(0)
    plain = GPT(GPTConfig(**sizes))
    ours = GPT(GPTConfig(**sizes, fp8=True))
    ours.load_state_dict(plain.state_dict())
    idx, targets = torch.randint(131, (2, 4, 32), generator=torch.Generator().manual_seed(1))
    found = []
    for model in (plain, ours):
        loss = model(idx, targets)
        loss.backward()
        found.append(loss.item())
    assert found[0] != found[1] and found[0] == pytest.approx(found[1], abs=2e-3)
    for (name, p), other in zip(ours.named_parameters(), plain.parameters()):
        assert error(p.grad, other.grad.double()) < 0.12, name
    with torch.no_grad():
        assert torch.equal(plain(idx, targets), ours(idx, targets))
        assert torch.equal(plain(idx), ours(idx))


@pytest.fixture
def on_a_cpu(monkeypatch):
    """The plain twins train where the kernels cannot."""
    monkeypatch.setattr(preflight, 'check_machine', lambda s, machine: [])


PRUNED = dict(optimizer='adamwprune', prune_score='magnitude', prune_start=5, prune_end=40,
              prune_interval=5)


def test_a_pruned_run_learns_as_well_as_without(tiny, tmp_path, on_a_cpu):
    for name in ('plain', 'float8'):
        told = tiny(**PRUNED, fp8=name == 'float8', loss_chunk_tokens=64, max_iters=60,
                    out_dir=tmp_path / name)
        assert train.main(told) == 0
        log = (tmp_path / name / 'train.log').read_text()
        noted = 'training multiplies in float8 in MLP and head' in log
        assert noted == (name == 'float8')
    plain = losses(tmp_path / 'plain')
    ours = losses(tmp_path / 'float8')
    assert plain != ours and plain[60] < plain[1] - 1.5
    late = [ours[step] - plain[step] for step in ours if step > 40]
    assert abs(sum(late)) / len(late) < 0.05  # nat


def test_resume_is_exact_and_keeps_the_choice(tiny, tmp_path, on_a_cpu):
    common = dict(fp8=True, loss_chunk_tokens=64, lr_decay_iters=8)
    again = dict(max_iters=8, out_dir=tmp_path / 'split', init_from='resume')
    train.main(tiny(**common, max_iters=8, out_dir=tmp_path / 'straight'))
    train.main(tiny(**common, max_iters=4, out_dir=tmp_path / 'split'))
    problem, = refusal(train.main, tiny(**{**common, 'fp8': False}, **again))
    assert 'fp8=False: the run' in problem
    train.main(tiny(**common, **again))
    assert_same_run(tmp_path / 'straight', tmp_path / 'split')


def test_off_it_is_never_reached(tiny, monkeypatch):
    for name in ('head', 'product', 'cast_both', 'Float8MLP'):
        monkeypatch.setattr(float8, name, None)
    assert train.main(tiny(max_iters=4)) == 0


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize('changes, words', [
    (dict(bias=True), 'fp8=True bias=True: the products in float8 have no bias'),
    (dict(n_embd=40, n_head=2), 'fp8=True n_embd=40: the products in float8 need a multiple of 16'),
    (dict(block_size=24), 'fp8=True block_size=24: the products in float8 need a multiple of 16'),
    (dict(loss_chunk_tokens=48),
     'fp8=True loss_chunk_tokens=48: the products in float8 need a multiple of 64')])
def test_what_the_products_do_not_take_is_refused(changes, words):
    problem, = check(train.Settings(**changes, fp8=True))
    assert words in problem
    assert not check(train.Settings(**changes))


@pytest.mark.parametrize('capability, dtype, cuda, has_triton, words', [
    ((9, 0), torch.bfloat16, '12.8', True, ''),
    ((10, 0), torch.bfloat16, '13.0', True, ''),
    ((8, 9), torch.bfloat16, '12.8', True, 'capability 9.0 (H100) or more, unlike this GPU'),
    ((9, 0), torch.float32, '12.8', True, 'its products end in bfloat16, dtype is'),
    ((9, 4), torch.bfloat16, None, True, 'needs an NVIDIA GPU with CUDA and Triton'),  # ROCm
    ((9, 0), torch.bfloat16, '12.8', False, 'needs an NVIDIA GPU with CUDA and Triton')])
def test_which_gpus_will_do(monkeypatch, capability, dtype, cuda, has_triton, words):
    monkeypatch.setattr(torch.version, 'cuda', cuda)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(float8, 'triton', has_triton or None)
    machine = SimpleNamespace(device=torch.device('cuda:0'), dtype=dtype, name='this GPU', world=1)
    problems = preflight.check_machine(train.Settings(fp8=True), machine)
    assert len(problems) == bool(words) and (not words or words in problems[0])


def test_a_cpu_is_refused(tiny):
    problem, = refusal(train.main, tiny(fp8=True, loss_chunk_tokens=64))
    assert problem.startswith('fp8=True: needs an NVIDIA GPU with CUDA and Triton')
    assert 'unlike CPU' in problem


# --- the kernels, on a GPU ------------------------------------------------------------------------


ON_GPU = dict(device='cuda', compile=True, dtype='bfloat16', fp8=True, loss_chunk_tokens=512,
              n_embd=128, block_size=128, batch_size=8, eval_tokens=2560)


def float8_matrices(device, shape, vocab_size):
    """{name: what each kernel writes of one random matrix, as bytes}; on a CPU its twin writes."""
    x = drawn(*shape, scale=3).bfloat16().to(device)
    da = drawn(*shape, scale=1e-6, seed=1).bfloat16().to(device)
    targets = some_targets(shape[0], vocab_size)
    scored = (targets >= 0).sum()
    each = float8.cross_entropy_plain(x.cpu(), targets, scored, vocab_size)
    inverse = float8.inverse_of(float8.longest(x.cpu())).to(device)
    cast = float8.cast_both(x, inverse)
    dh, dh_t, a_t = float8.gelu_backward(x, da, inverse * 1e-6, inverse)
    grad = float8.logit_gradient(x, targets.to(device), each.to(device), scored.to(device),
                                 vocab_size)
    named = {'cast': cast[0], 'cast_t': cast[1], 'dh': dh, 'dh_t': dh_t, 'a_t': a_t,
             'grad': grad[0], 'grad_t': grad[1]}
    return {name: matrix.view(torch.uint8).cpu() for name, matrix in named.items()}


@gpu
@no_gpu
@pytest.mark.parametrize('shape, vocab_size', [
    ((16, 16), 9), ((48, 80), 77), ((208, 1040), 1000), ((4096, 768), 700), ((2048, 3072), 3000),
    ((256, 50304), 50257)])
def test_kernels_write_what_their_twins_write(shape, vocab_size):
    ours = float8_matrices('cuda', shape, vocab_size)
    twins = float8_matrices('cpu', shape, vocab_size)
    for name, matrix in ours.items():
        differing = (matrix != twins[name]).float().mean().item()
        allowed = 0 if 'cast' in name else 1e-3  # exp and sigmoid end in another last bit
        assert differing <= allowed, f'{name}: {differing:.1e} of the bytes are not the twin\'s'
    for name in ('cast', 'dh', 'grad'):
        assert torch.equal(ours[f'{name}_t'], ours[name].t()), name


@gpu
@no_gpu
@pytest.mark.parametrize('shape', [(32768, 768), (32768, 3072), (8192, 50304)])
def test_transposed_matrices_of_gpt2_are_right_to_the_byte(shape):
    x = torch.randn(shape, device='cuda', dtype=torch.bfloat16)
    inverse = torch.tensor(0.01, device='cuda')
    targets = torch.randint(shape[1], shape[:1], device='cuda')
    scored = torch.tensor(shape[0], device='cuda')
    each = cross_entropy(x, targets, scored, shape[1])
    pairs = (float8.cast_both(x, inverse), float8.gelu_backward(x, x, inverse, inverse)[:2],
             float8.logit_gradient(x, targets, each, scored, shape[1]))
    for straight, turned in pairs:
        straight = straight.view(torch.uint8)
        turned = turned.view(torch.uint8)
        for first in range(0, shape[0], 4096):
            rows = straight[first:first + 4096]
            assert torch.equal(turned[:, first:first + 4096], rows.t())


@gpu
@no_gpu
@pytest.mark.parametrize('fast, tolerance', [(True, 2e-2), (False, 4e-3)])
@pytest.mark.parametrize('m, n, k', [(32768, 3072, 768), (768, 3072, 32768), (8192, 50304, 768),
                                     (50304, 768, 8192), (16, 48, 32)])
def test_compiled_product_is_that_of_the_rounded_numbers(m, n, k, fast, tolerance):
    inverse_a = torch.tensor(0.01, device='cuda')
    inverse_b = torch.tensor(0.02, device='cuda')
    a8 = float8.cast(torch.randn(m, k, device='cuda'), inverse_a)
    b8 = float8.cast(torch.randn(n, k, device='cuda'), inverse_b)
    for left in (a8, (a8.float() * 64).to(float8.E5M2)):
        ours = float8.product(left, b8, inverse_a, inverse_b, torch.bfloat16, fast)[:512, :512]
        exact = left[:512].double() @ b8[:512].double().t() * 2e-4
        assert error(ours, exact) <= tolerance, left.dtype


@gpu
@no_gpu
@pytest.mark.gpt2
def test_gradients_in_bfloat16_and_float8_are_near_float64():
    torch.manual_seed(0)
    sizes = dict(vocab_size=50257, block_size=256, n_layer=2, n_head=4, n_embd=256,
                 loss_chunk_tokens=512)
    exact = GPT(GPTConfig(**sizes)).cuda().double()
    idx, targets = torch.randint(50257, (2, 6, 256), device='cuda')
    targets[0, ::5] = -1
    expected = exact(idx, targets)
    expected.backward()
    for fp8, compiled, tolerance in ((False, False, 3e-2), (True, False, 0.12), (True, True, 0.12)):
        model = GPT(GPTConfig(**sizes, fp8=fp8)).cuda()
        model.load_state_dict(exact.state_dict())
        flats = flatten(model, torch.bfloat16)
        if compiled:
            model.compile_parts()
        found = model(idx, targets)
        found.backward()
        accumulate(flats)
        assert abs(found.item() - expected.item()) < 5e-3
        named = {}
        for flat in flats:
            named.update(flat.parameters)
        for name, p in exact.named_parameters():
            assert error(named[name].grad, p.grad) < tolerance, name


@gpu
@no_gpu
@pytest.mark.parametrize('told', [{}, dict(dropout=0.1, activation_budget=0.9),
                                  dict(attention='mla', latent_dim=128)])
def test_compiles_without_breaks_and_learns(tiny, tmp_path, told):
    assert train.main(tiny(**ON_GPU, **told, max_iters=60)) == 0
    result = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert result['compiled_graphs'] > 0 and result['graph_breaks'] == 0
    assert result['val_loss'] < 4.0


@gpu
@no_gpu
@pytest.mark.parametrize('compiled', [False, True])
def test_run_repeats_and_resumes_to_the_bit(tiny, tmp_path, compiled):
    common = {**ON_GPU, 'compile': compiled, 'deterministic': True, 'lr_decay_iters': 12}
    train.main(tiny(**common, max_iters=12, out_dir=tmp_path / 'straight'))
    train.main(tiny(**common, max_iters=6, out_dir=tmp_path / 'split'))
    train.main(tiny(**common, max_iters=12, out_dir=tmp_path / 'split', init_from='resume'))
    torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / 'straight', tmp_path / 'split')
