"""The attentions of model.py and kernels/reciprocal.py against float64 oracles of the formulas."""
import math

import pytest
import torch
from models import CACHED, MLA, RA, RECIPROCAL, SMALL, lively, text
from torch.nn import functional as F
from torch.nn.attention import flex_attention

from kernels import reciprocal
from kernels.reciprocal import reciprocal_attention
from model import GPT, GPTConfig, Places, attention_backend, rotary_angles


def places(T, R):
    """The Places of tokens 0 ... T - 1 in float64, R numbers of each head rotary."""
    return Places(*rotary_angles(torch.arange(T)[None], R, torch.float64)) if R else Places()


def softmax_attention(logits, values):
    """Causal attention by its formula: logits (..., T, T), values (..., T, D)."""
    T = logits.size(-1)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -math.inf).softmax(-1) @ values


def turned(x):
    """Rotary embedding (arXiv 2104.09864, equation 13) of (..., T, R) by complex numbers.

    Pair m of R / 2 turns by t 10000^(-2 m / R); its halves are m and m + R / 2.
    """
    T, R = x.shape[-2:]
    speed = torch.tensor([10_000 ** (-2 * m / R) for m in range(R // 2)], dtype=torch.float64)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * speed
    y = torch.complex(x[..., :R // 2], x[..., R // 2:]) * torch.exp(1j * angle)
    return torch.cat([y.real, y.imag], -1)


def normalised(latents, gain):
    return latents * (latents.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain


# --- multi-head, grouped-query, rotary ------------------------------------------------------------


@pytest.mark.parametrize('positions', ['learned', 'rotary'])
@pytest.mark.parametrize('key_heads', [4, 2, 1])
def test_attention_is_its_formula(key_heads, positions):
    """Head h reads the key head h K / H; all of q and k is rotary."""
    part = lively(n_kv_head=key_heads, positions=positions).double().blocks[0].attention
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    D = 8
    w_q, w_k, w_v = part.qkv.weight.split([32, key_heads * D, key_heads * D])
    heads = []
    for h in range(4):
        own = slice(h * D, h * D + D)
        key_head = h * key_heads // 4
        shared = slice(key_head * D, key_head * D + D)
        q = x @ w_q[own].t()
        k = x @ w_k[shared].t()
        if positions == 'rotary':
            q, k = turned(q), turned(k)
        heads.append(softmax_attention(q @ k.mT / math.sqrt(D), x @ w_v[shared].t()))
    expected = torch.cat(heads, -1) @ part.proj.weight.t()
    y = part(x, places(10, 8 if positions == 'rotary' else 0))
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)


def test_rotary_attention_depends_on_distances_alone():
    part = lively(positions='rotary').double().blocks[0].attention
    x = torch.randn(1, 10, 32, dtype=torch.float64)
    later = part(x, Places(*rotary_angles(torch.arange(100, 110)[None], 8, torch.float64)))
    torch.testing.assert_close(later, part(x, places(10, 8)), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('told', [*CACHED.values(), *RECIPROCAL.values()],
                         ids=[*CACHED, *RECIPROCAL])
def test_the_future_does_not_leak(told):
    model = lively(**told).double()
    idx = text(model)
    before = model(idx)
    changed = idx.clone()
    for t in (47, 20, 1):  # each change holds the one before
        changed[:, t:] = (idx[:, t:] + 1) % model.config.vocab_size
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any(-1).all()


# --- latent ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('positions, rotary', [('learned', 0), ('rotary', 4)])
def test_latent_attention_is_its_formula(positions, rotary):
    """Head by head: softmax((q_h A_h) . c^K / sqrt(D)) c^V U_h; the last R numbers are rotary."""
    model = lively(**MLA, positions=positions).double()
    part = model.blocks[0].attention
    D, L = 8, 12
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    w_q, w_dk, w_rotary, w_dv = part.down.weight.split([32, L, rotary, L])
    keys = normalised(x @ w_dk.t(), part.key_norm.weight)
    values = normalised(x @ w_dv.t(), part.value_norm.weight)
    heads = []
    for h in range(4):
        q = x @ w_q[h * D:h * D + D].t()
        content = D - rotary
        A = part.key_up.weight[h * content:h * content + content]
        U = part.value_up.weight[h * D:h * D + D].t()
        logits = (q[..., :content] @ A) @ keys.mT
        if rotary:
            logits = logits + turned(q[..., content:]) @ turned(x @ w_rotary.t()).mT
        heads.append(softmax_attention(logits / math.sqrt(D), values @ U))
    expected = torch.cat(heads, -1) @ part.proj.weight.t()
    torch.testing.assert_close(part(x, places(10, rotary)), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('told', [dict(latent_dim=128), dict(latent_dim=32)], ids=str)
def test_keys_and_values_start_with_the_spread_of_gpt2(told):
    torch.manual_seed(0)
    part = GPT(GPTConfig(n_layer=1, n_head=6, n_embd=384, attention='mla', **told))
    part = part.blocks[0].attention
    x = F.layer_norm(torch.randn(4, 64, 384), (384,))
    q, k, v = part.expanded(part.down(x), None, None)
    for tensor in (q, k, v):
        assert tensor.std().item() == pytest.approx(0.02 * math.sqrt(384), rel=0.1)


# --- reciprocal -----------------------------------------------------------------------------------


def oracle(q, k, v, alpha, window):
    """S_ij + alpha 1[i - j <= W] S_ji as it is written; q, k, v (B, H, T, D), alpha (H,)."""
    rows = []
    for i in range(q.size(2)):
        logits = []
        for j in range(i + 1):
            s = (q[:, :, i] * k[:, :, j]).sum(-1)
            if window < 0 or i - j <= window:
                s = s + alpha * (q[:, :, j] * k[:, :, i]).sum(-1)
            logits.append(s / math.sqrt(q.size(3)))
        shares = torch.stack(logits).softmax(0)
        rows.append(torch.einsum('jbh,bhjd->bhd', shares, v[:, :, :i + 1]))
    return torch.stack(rows, 2)


def qkv(T, D=8, dtype=torch.float64):
    """Queries, keys and values, each (2, 3, T, D), and alpha (3,)."""
    draw = torch.Generator().manual_seed(0)
    alpha = torch.tensor([0.5, -1.0, 0.0], dtype=dtype, requires_grad=True)
    inputs = [torch.randn(2, 3, T, D, dtype=dtype, generator=draw) for _ in range(3)]
    return *(tensor.requires_grad_() for tensor in inputs), alpha


@pytest.mark.parametrize('T, window', [
    (1, 0), (1, -1), (24, 0), (24, 1), (24, 7), (24, 22), (24, 23), (24, 24), (24, -1), (80, 64)])
def test_reciprocal_attention_and_its_gradients_are_the_formula(T, window):
    inputs = qkv(T)
    expected = oracle(*inputs, window)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, inputs, upstream)
    ours = reciprocal_attention(*inputs, window)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(ours, inputs, upstream), gradients):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)
    assert T == 1 or gradients[3].abs().min() > 0  # alpha learns, in the head where it is 0 too


@pytest.mark.filterwarnings('ignore:flex_attention called without')
@pytest.mark.parametrize('T, window', [(40, 0), (40, 7), (300, 64), (300, 298)])
def test_the_band_by_flex_attention_is_the_formula(T, window):
    """What a GPU runs, unfused as on a CPU: masks, widths, scale, merging. It has no gradients."""
    inputs = [tensor.detach() for tensor in qkv(T, D=16, dtype=torch.float32)]
    ours = reciprocal.banded(*inputs, window)
    expected = oracle(*(tensor.double() for tensor in inputs), window)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_band_is_one_graph_with_the_model_and_has_the_gradients_of_the_formula(monkeypatch):
    """Traced as on a GPU, forward and backward, here with no kernels of its own."""
    model = lively(**RA)
    idx = text(model)
    upstream = torch.randn(3, 48, 32, generator=torch.Generator().manual_seed(9))

    def result(hidden):
        model.zero_grad()
        y = hidden(idx)
        y.backward(upstream)
        return [y.detach(), *(p.grad for p in model.parameters())]

    expected = result(model.hidden)
    monkeypatch.setattr(reciprocal, 'flex_runs', lambda *told: True)
    monkeypatch.setattr(flex_attention, '_validate_device', lambda *tensors: None)  # no backward
    reciprocal.block_masks(48, 5, torch.device('cpu'))
    hidden = torch.compile(model.hidden, fullgraph=True, dynamic=False, backend='aot_eager')
    for ours, theirs in zip(result(hidden), expected):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_where_the_window_is_flex_attentions():
    assert reciprocal.flex_runs('cuda', torch.bfloat16, 64)
    assert not reciprocal.flex_runs('cpu', torch.bfloat16, 64)
    assert not reciprocal.flex_runs('cuda', torch.float64, 64)
    assert not reciprocal.flex_runs('cuda', torch.bfloat16, 8)


@pytest.mark.parametrize('told', [{}, MLA, dict(MLA, positions='rotary')],
                         ids=['mha', 'mla', 'mla, rotary'])
@pytest.mark.parametrize('window', [5, -1])
def test_models_with_the_reciprocal_term_have_it_in_each_layer(told, window, monkeypatch):
    model = lively(**told, ra_alpha=0.5, ra_window=window, block_size=16).double()
    idx = text(model, rows=1)
    ours = model.hidden(idx)
    monkeypatch.setattr('model.reciprocal_attention', lambda *inputs: oracle(*inputs[:-1]))
    torch.testing.assert_close(ours, model.hidden(idx), atol=1e-11, rtol=1e-11)
    monkeypatch.setattr('model.reciprocal_attention', lambda q, k, v, *_: q)
    assert (ours - model.hidden(idx)).abs().max() > 0.1  # it is what the model calls


@pytest.mark.parametrize('told', [{}, MLA], ids=['mha', 'mla'])
def test_alpha_of_zero_is_no_reciprocal_attention(told):
    plain = lively(**told)
    off = lively(**told, ra_alpha=0.0, ra_window=5)
    learned = lively(**told, ra_learned=True)
    zeros = {f'blocks.{n}.attention.alpha': torch.zeros(4) for n in range(2)}
    learned.load_state_dict({**plain.state_dict(), **zeros})
    idx = text(plain)
    assert torch.equal(plain(idx), off(idx))  # to the bit: there is no term; a learned 0 has one
    torch.testing.assert_close(learned(idx), plain(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('window', [5, -1])
def test_a_fixed_alpha_is_a_learned_one_of_that_value(window):
    fixed = lively(ra_alpha=-0.6, ra_window=window)
    learned = lively(ra_learned=True, ra_window=window)
    values = {f'blocks.{n}.attention.alpha': torch.full((4,), -0.6) for n in range(2)}
    learned.load_state_dict({**fixed.state_dict(), **values})
    idx = text(fixed)
    torch.testing.assert_close(fixed(idx), learned(idx), atol=1e-6, rtol=1e-6)


def test_learned_alpha_starts_at_ra_alpha_and_learns():
    model = GPT(GPTConfig(**SMALL, ra_learned=True, ra_alpha=0.25))
    idx = text(model)
    model(idx[:, :-1], idx[:, 1:]).backward()
    for block in model.blocks:
        assert torch.equal(block.attention.alpha, torch.full((4,), 0.25))
        assert (block.attention.alpha.grad != 0).all()


def test_what_the_reciprocal_term_cannot_have_is_an_error():
    model = GPT(GPTConfig(**SMALL, **RA, dropout=0.1))
    with pytest.raises(ValueError, match='the window of reciprocal attention has no dropout'):
        model.hidden(text(model))
    model.eval().hidden(text(model))
    with pytest.raises(ValueError, match='reciprocal attention has no cache'):
        model.new_cache(1)


# --- on a GPU -------------------------------------------------------------------------------------


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]


def gpu(test):
    for mark in on_gpu:
        test = mark(test)
    return test


@gpu
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 2e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize('B, H, T, D, window', [
    (2, 3, 1024, 64, 64), (2, 3, 1024, 64, 0), (1, 3, 300, 64, 64), (2, 1, 128, 16, 5),
    (2, 3, 200, 32, 1), (2, 3, 256, 64, -1)])
def test_reciprocal_attention_on_a_gpu_is_near_float64(B, H, T, D, window, dtype, tolerance):
    """Forward and gradients, alpha's too. Products of float32 may be TF32, hence the tolerance."""
    draw = torch.Generator('cuda').manual_seed(0)
    numbers = torch.randn(B, T, 4, H, D, device='cuda', dtype=torch.float64, generator=draw)
    rounded = numbers.to(dtype)
    results = []
    attention = torch.compile(reciprocal_attention, fullgraph=True, dynamic=False)
    torch._dynamo.reset()
    if window >= 0:
        reciprocal.block_masks(T, window, rounded.device)
    for kind in (dtype, torch.float64):  # float64 takes the dense formula, or one unfused call
        strided = rounded.to(kind).requires_grad_().permute(2, 0, 3, 1, 4)  # as a projection's
        q, k, v, upstream = strided
        alpha = torch.tensor([0.5, -1.0, 0.0], device='cuda')[:H]
        alpha = alpha.to(torch.promote_types(kind, torch.float32)).requires_grad_()
        y = attention(q, k, v, alpha, window)
        results.append([y, *torch.autograd.grad(y, [q, k, v, alpha], upstream.detach())])
    for name, ours, theirs in zip(('y', 'q', 'k', 'v', 'alpha'), *results):
        error = ((ours.double() - theirs).norm() / theirs.norm()).item()
        assert error < tolerance, (name, error)


@gpu
@pytest.mark.parametrize('told', [{}, *CACHED.values(), *RECIPROCAL.values()])
def test_compiled_bfloat16_gradients_are_near_float64(told):
    """Matrices in bfloat16 beside vectors in float32, one graph, kernels of a GPU."""
    torch._dynamo.reset()
    sizes = dict(block_size=256, n_head=4, n_embd=256)
    exact = lively(**{**sizes, **told, 'latent_dim': 64}).cuda().double()
    model = lively(**{**sizes, **told, 'latent_dim': 64}).cuda()
    for p in model.parameters():
        p.data = p.data.bfloat16() if p.dim() == 2 else p.data
    for p, rounded in zip(exact.parameters(), model.parameters()):
        p.data = rounded.data.double()
    idx = text(model).cuda()
    exact(idx, idx).backward()
    model.compile_parts()
    model(idx, idx).backward()
    for (name, p), expected in zip(model.named_parameters(), exact.parameters()):
        error = ((p.grad.double() - expected.grad).norm() / expected.grad.norm()).item()
        limit = 0.1 if p.dim() == 2 else 0.2  # a vector's gradient is a sum that nearly cancels
        assert error < limit, (name, error)


@gpu
@pytest.mark.parametrize('told', [{}, dict(n_kv_head=4), dict(positions='rotary'),
                                  dict(attention='mla'), dict(ra_learned=True, ra_window=-1)])
def test_attention_is_fused_on_a_gpu(told):
    name = attention_backend(GPTConfig(**told), 'cuda', torch.bfloat16)
    assert name in ('flash', 'cudnn', 'efficient')


@gpu
def test_memory_of_attention_grows_with_the_text_not_its_square():
    """Bytes that one windowed call and its backward take; all logits alone would be 1.6 GB."""
    assert attention_backend(GPTConfig(ra_learned=True), 'cuda', torch.bfloat16) == 'flex'
    reciprocal.block_masks(4096, 64, torch.device('cuda', torch.cuda.current_device()))
    shape = (4, 12, 4096, 64)
    inputs = [torch.randn(shape, device='cuda', dtype=torch.bfloat16, requires_grad=True)
              for _ in range(3)]
    alpha = torch.zeros(12, device='cuda', requires_grad=True)
    attention = torch.compile(reciprocal_attention, fullgraph=True, dynamic=False)
    attention(*inputs, alpha, 64).sum().backward()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention(*inputs, alpha, 64).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 30 * inputs[0].nbytes
