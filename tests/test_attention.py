"""attention.py and reciprocal.py against float64 oracles written from the formulas."""
import itertools
import math
import os

import pytest
import torch
from conftest import assert_same_run, last, refusal, train
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

import attention
import preflight
import prune
import reciprocal
import sample
from attention import attend
from memory import predicted_memory
from model import GPT, GPTConfig
from preflight import model_config
from reciprocal import dense_reciprocal, fused_runs, windowed
from rundir import save_checkpoint
from settings import Settings, check, parse
from shards import open_data

SMALL = dict(vocab_size=131, block_size=48, n_layer=2, n_head=4, n_embd=32)
MLA = dict(attention='mla', latent_dim=12)
RA = dict(ra_learned=True, ra_alpha=0.7, ra_window=5)
VARIANTS = {
    'mha': {},
    'mha, ra': RA,
    'mha, ra fixed, diagonal': dict(ra_alpha=-0.6, ra_window=0),
    'mha, ra everywhere': dict(RA, ra_window=-1),
    'mla': MLA,
    'mla, biases': dict(MLA, bias=True),
    'mla, shared, bare': dict(MLA, per_head_q_latent=False, per_head_v_up=False, latent_norm=False, latent_scale=True),
    'mla, ra': {**MLA, **RA},
    'mla, ra everywhere, keys shared': {**MLA, **RA, 'ra_window': -1, 'per_head_q_latent': False},
    'mla, rotary': dict(MLA, latent_rotary=6),
    'mla, rotary, shared, ra': {**MLA, **RA, 'latent_rotary': 2, 'per_head_q_latent': False},
    'mla, ra, reference scale': {**MLA, **RA, 'latent_scale': True, 'ra_window': 60},
}
variants = pytest.mark.parametrize('told', VARIANTS.values(), ids=VARIANTS)


def lively(**told):
    """A model whose tokens all matter to each other, without dropout."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **told})).eval()
    with torch.no_grad():
        for name, p in model.blocks.named_parameters():
            p.mul_(6 if p.dim() == 2 and 'mlp' not in name else 1).add_(0.1 * torch.randn_like(p))
    return model


def text(model, rows=3, T=None, seed=1):
    return torch.randint(model.config.vocab_size, (rows, T or model.config.block_size), generator=torch.Generator().manual_seed(seed))


# --- the formulas ------------------------------------------------------------------------------------


def oracle(q, k, v, alpha, window, scale):
    """S_ij + alpha 1[i - j <= W] S_ji, token by token, as it is written; q, k, v (B, H, T, D) float64, alpha (H,)."""
    rows = []
    for i in range(q.size(2)):
        logits = []
        for j in range(i + 1):
            s = (q[:, :, i] * k[:, :, j]).sum(-1)
            if window < 0 or i - j <= window:
                s = s + alpha * (q[:, :, j] * k[:, :, i]).sum(-1)
            logits.append(s * scale)
        rows.append(torch.einsum('jbh,bhjd->bhd', torch.stack(logits).softmax(0), v[:, :, :i + 1]))
    return torch.stack(rows, 2)


def qkv(T, D=8, H=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(2, H, T, D, dtype=torch.float64, generator=draw).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize('T, window', [(1, 0), (1, -1), (24, 0), (24, 1), (24, 7), (24, 22), (24, 23), (24, 24), (24, -1), (80, 64)])
def test_reciprocal_attention_and_its_gradients_are_the_formula(T, window):
    inputs = [*qkv(T), torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64, requires_grad=True)]
    expected = oracle(*inputs, window, 0.3)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad(expected, inputs, upstream)
    forms = [attend(*inputs, window, 0.3)] + ([dense_reciprocal(*inputs, window, 0.3)] if window >= 0 else [])
    for ours in forms:
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
        for mine, theirs in zip(torch.autograd.grad(ours, inputs, upstream), gradients):
            torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)
    assert T == 1 or gradients[3].abs().min() > 0  # alpha learns, in the head where it is 0 too


@pytest.mark.parametrize('told', [dict(ra_learned=True, ra_alpha=0.5), dict(MLA, ra_learned=True), dict(MLA, ra_alpha=0.5)])
@pytest.mark.parametrize('window', [0, 1, 64, 70])
def test_model_with_reciprocal_attention_is_the_formula(told, window, monkeypatch):
    model = lively(**told, ra_window=window, block_size=70).double()
    idx = text(model, rows=1)
    upstream = torch.randn(1, 70, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(9))

    def result():
        model.zero_grad()
        out = model.hidden(idx)
        out.backward(upstream)
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    ours = result()
    monkeypatch.setattr(attention, 'attend', lambda q, k, v, alpha, window, scale, dropout: oracle(q, k, v, alpha, window, 8 ** -0.5))
    for mine, theirs in zip(ours, result()):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('told', [{}, MLA], ids=['mha', 'mla'])
def test_alpha_of_zero_is_no_reciprocal_attention(told):
    plain, off, learned = (lively(**told, **ra) for ra in ({}, dict(ra_alpha=0.0, ra_window=5), dict(ra_learned=True)))
    learned.load_state_dict({**plain.state_dict(), **{n: p * 0 for n, p in learned.state_dict().items() if n.endswith('alpha')}})
    idx = text(plain)
    assert plain.state_dict().keys() == off.state_dict().keys()
    assert torch.equal(plain(idx), off(idx))  # to the bit: there is no term; a learned 0 has one
    torch.testing.assert_close(learned(idx), plain(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('window', [5, -1])
def test_fixed_alpha_is_a_learned_one_of_that_value(window):
    fixed, learned = lively(ra_alpha=-0.6, ra_window=window), lively(ra_learned=True, ra_window=window)
    learned.load_state_dict({**fixed.state_dict(), **{f'blocks.{n}.attention.alpha': torch.full((4,), -0.6) for n in range(2)}})
    torch.testing.assert_close(fixed(text(fixed)), learned(text(fixed)), atol=1e-6, rtol=1e-6)


def test_learned_alpha_starts_at_ra_alpha_and_learns():
    model = GPT(GPTConfig(**SMALL, ra_learned=True))
    assert all(torch.equal(block.attention.alpha, torch.zeros(4)) for block in model.blocks)
    assert torch.equal(GPT(GPTConfig(**SMALL, ra_learned=True, ra_alpha=0.25)).blocks[1].attention.alpha, torch.full((4,), 0.25))
    idx = text(model)
    model(idx[:, :-1], idx[:, 1:]).backward()
    assert all((block.attention.alpha.grad != 0).all() for block in model.blocks)


def test_latent_attention_as_wide_as_the_model_is_multi_head_attention():
    C = 32
    mha, mla = lively().double(), lively(attention='mla', latent_dim=C, latent_norm=False).double()
    state = dict(mha.state_dict())
    for n in range(2):
        name = f'blocks.{n}.attention.'
        state[name + 'down.weight'] = state.pop(name + 'qkv.weight')  # W_q, W_k, W_v
        state[name + 'key_up.weight'] = state[name + 'value_up.weight'] = torch.eye(C, dtype=torch.float64)
    mla.load_state_dict(state)
    torch.testing.assert_close(mla(text(mha)), mha(text(mha)), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize('per_head_q, per_head_v, latent_scale', list(itertools.product([True, False], repeat=3)))
def test_latent_attention_is_its_formula(per_head_q, per_head_v, latent_scale):
    """Head by head: softmax((q_h A_h) . c^K / sqrt(D)) (c^V U_h), the latents normalised; latent_scale: / sqrt(L)."""
    model = lively(**MLA, per_head_q_latent=per_head_q, per_head_v_up=per_head_v, latent_scale=latent_scale).double()
    part, H, D, L = model.blocks[0].attention, 4, 8, 12
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    w_q, w_dk, w_dv = part.down.weight.split([32, L, L])
    keys, values = (c * (c.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
                    for c, norm in ((x @ w_dk.t(), part.key_norm), (x @ w_dv.t(), part.value_norm)))
    heads = []
    for h in range(H):
        own = slice(h * D, h * D + D)
        A, U = part.key_up.weight[own if per_head_q else slice(D)], part.value_up.weight[own if per_head_v else slice(D)].t()
        logits = (x @ w_q[own].t() @ A) @ keys.mT / math.sqrt(L if latent_scale else D)
        heads.append(logits.masked_fill(torch.ones(10, 10).triu(1).bool(), -math.inf).softmax(-1) @ values @ U)
    torch.testing.assert_close(part(x), torch.cat(heads, -1) @ part.proj.weight.t(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('shared', [False, True])
def test_rotary_part_of_latent_attention_is_its_formula(shared):
    """The last R = 4 numbers of query i and of the one key j, as complex numbers times e^(i t 10^(-4 m / (R / 2)))."""
    part, (H, D, L, R) = lively(**MLA, latent_rotary=4, per_head_q_latent=not shared).double().blocks[0].attention, (4, 8, 12, 4)
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    w_q, w_dk, w_rotary, w_dv = part.down.weight.split([32, L, R, L])
    keys, values = (c * (c.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
                    for c, norm in ((x @ w_dk.t(), part.key_norm), (x @ w_dv.t(), part.value_norm)))
    turns = torch.exp(1j * torch.arange(10, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.01], dtype=torch.float64))  # (T, R / 2)

    def turned(y):
        return torch.complex(y[..., :R // 2], y[..., R // 2:]) * turns

    heads = []
    for h in range(H):
        q, A = x @ w_q[h * D:h * D + D].t(), part.key_up.weight[slice(D - R) if shared else slice(h * (D - R), (h + 1) * (D - R))]
        near = (turned(q[..., D - R:]) @ turned(x @ w_rotary.t()).mH).real  # of the difference of the positions alone
        logits = ((q[..., :D - R] @ A) @ keys.mT + near) / math.sqrt(D)
        heads.append(logits.masked_fill(torch.ones(10, 10).triu(1).bool(), -math.inf).softmax(-1)
                     @ values @ part.value_up.weight[h * D:h * D + D].t())
    torch.testing.assert_close(part(x), torch.cat(heads, -1) @ part.proj.weight.t(), atol=1e-12, rtol=1e-12)


@variants
def test_the_future_does_not_leak(told):
    model = lively(**told).double()
    idx = text(model)
    before, changed = model(idx), idx.clone()
    for t in (47, 20, 1):  # each change holds the one before
        changed[:, t:] = (idx[:, t:] + 1) % model.config.vocab_size
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t]) and (before[:, t:] != after[:, t:]).any(-1).all()


@pytest.mark.parametrize('told', [dict(latent_dim=128), dict(latent_dim=32), dict(latent_dim=128, latent_norm=False),
                                  dict(latent_dim=64, per_head_q_latent=False, per_head_v_up=False)])
def test_logits_and_values_start_with_the_spread_of_gpt2(told):
    def spreads(**told):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=2, n_head=6, n_embd=384, **told))
        seen, spread = [], []
        for block in model.blocks:
            block.attention.register_forward_pre_hook(lambda module, arguments: seen.append((module, arguments[0])))
        model.hidden(text(model, rows=4))
        for part, x in seen:
            q, k, v = part.expanded(*part.project(x), torch.arange(x.size(1)))
            spread += [(q @ k.mT / math.sqrt(64)).std().item(), v.std().item()]
        return spread

    for ours, theirs in zip(spreads(attention='mla', **told), spreads()):
        assert abs(ours / theirs - 1) < 0.2


# --- the fused form of the window --------------------------------------------------------------------


@pytest.mark.parametrize('T, window', [(2, 0), (24, 0), (24, 1), (24, 7), (24, 22), (80, 64)])
def test_the_fused_window_and_its_gradients_are_the_formula(T, window):
    """The operation that a GPU runs, with its kernels' plain twins: the shift beyond the window, the merging, both backwards."""
    inputs = [*qkv(T), torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64, requires_grad=True)]
    expected = oracle(*inputs, window, 0.3)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ours = windowed(*inputs, window, 0.3)[0].transpose(1, 2)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)


def test_the_fused_window_in_bfloat16_is_near_the_formula():
    """Its twins and the unfused way beyond the window, which a GPU without a fused kernel runs."""
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in qkv(80))
    alpha = torch.tensor([0.5, -1.0, 0.0], requires_grad=True)
    out, lse = windowed(q, k, v, alpha, 20, 0.3)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and not lse.requires_grad
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, alpha)]
    expected, upstream = oracle(*exact, 20, 0.3), torch.randn(2, 3, 80, 8, dtype=torch.float64)
    ours = [out.transpose(1, 2), *torch.autograd.grad(out.transpose(1, 2), [q, k, v, alpha], upstream.bfloat16())]
    for mine, theirs in zip(ours, [expected, *torch.autograd.grad(expected, exact, upstream)]):
        assert (mine.double() - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.skipif(not reciprocal.triton or not os.environ.get('TRITON_INTERPRET'), reason='needs TRITON_INTERPRET=1 and Triton')
@pytest.mark.parametrize('T, D, window', [(40, 16, 0), (150, 64, 64), (150, 16, 20), (200, 32, 100), (100, 128, 98)])
def test_kernels_of_the_band_are_their_twins(T, D, window):
    """In Triton's interpreter, on a CPU. tests/test_gpu.py has the compiled ones."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, T, 3, 3, D, generator=draw).permute(2, 0, 3, 1, 4)
    alpha, R = torch.tensor([0.5, -1.0, 0.3]), T - window - 1
    far = reciprocal.far_forward(q[:, :, window + 1:], k[:, :, :R], v[:, :, :R], 0.3)
    ours = reciprocal.band_forward(q, k, v, alpha, *far, window, 0.3)
    expected = reciprocal.band_forward_plain(q, k, v, alpha, *far, window, 0.3)
    grad, far = torch.randn(2, T, 3, D, generator=draw), [torch.randn(2, R, 3, D, generator=draw) for _ in range(3)]
    ours += reciprocal.band_backward(grad, q, k, v, alpha, *expected, far, window, 0.3)
    expected += reciprocal.band_backward_plain(grad, q, k, v, alpha, *expected, far, window, 0.3)
    for mine, theirs in zip(ours, expected):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_fused_window_is_one_graph_with_the_model(monkeypatch):
    monkeypatch.setattr(attention, 'fused_runs', lambda *told: True)
    model = lively(**RA).double()
    idx = text(model)

    def result(run):
        model.zero_grad()
        y = run(idx)
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters())]

    compiled = result(torch.compile(model.hidden, fullgraph=True, dynamic=False, backend='aot_eager'))
    monkeypatch.undo()
    for mine, theirs in zip(compiled, result(model.hidden)):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


WIDTHS = {'mha': {}, 'mla': dict(attention='mla', latent_dim=16), 'ra': dict(ra_learned=True, ra_window=20),
          'ra everywhere': dict(ra_learned=True, ra_window=-1),
          'mla, rotary': dict(attention='mla', latent_dim=16, latent_rotary=8),
          'mla, ra': dict(attention='mla', latent_dim=16, ra_alpha=0.5, ra_window=20)}


@pytest.mark.parametrize('told', WIDTHS.values(), ids=WIDTHS)
def test_compiled_blocks_keep_what_is_predicted_for_the_backward(monkeypatch, told):
    """Bytes that one block more keeps, of the compiler's own choice."""
    monkeypatch.setattr(attention, 'fused_runs', lambda *told: True)
    sizes, kept, predicted = dict(vocab_size=200, block_size=256, n_head=2, n_embd=64, **told), {}, {}
    for layers in (2, 3):
        torch._dynamo.reset()
        model = GPT(GPTConfig(n_layer=layers, **sizes))
        hidden = torch.compile(model.hidden, fullgraph=True, dynamic=False, backend=aot_autograd(
            fw_compiler=lambda graph, inputs: graph.forward, partition_fn=min_cut_rematerialization_partition))
        saved = {}

        def keep(t, saved=saved):
            return saved.setdefault(t.untyped_storage().data_ptr(), t)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            hidden(torch.zeros(4, 256, dtype=torch.int64))
        weights = {p.data_ptr() for p in model.parameters()}
        kept[layers] = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in weights and t.is_floating_point())
        s = Settings(batch_size=4, n_layer=layers, compile=True, **{key: value for key, value in sizes.items() if key != 'vocab_size'})
        predicted[layers] = predicted_memory(s, model.config, torch.float32, 0, 0)['activations']
    assert kept[3] - kept[2] == pytest.approx(predicted[3] - predicted[2], rel=0.025)  # it leaves out two statistics a norm, one a head


def test_compiled_gradients_are_those_of_the_plain_model():
    """With all that the compiled backward computes again: GELU, expanded keys and values, wide queries and keys."""
    model = lively(**MLA, ra_learned=True, ra_window=-1, n_layer=1)
    idx = torch.randint(131, (2, 48), generator=torch.Generator().manual_seed(3))
    model(idx, idx).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.compile_parts()
    model(idx, idx).backward()
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_backend_of_each_attention_is_named():
    def named(**told):
        return attention.attention_backend(GPTConfig(**SMALL, **told), 2, 'cpu', torch.float32)

    assert named(**MLA) == named(ra_alpha=1.0, ra_window=-1) == named(ra_alpha=1.0, ra_window=47) == named() == 'flash'
    assert named(ra_alpha=1.0, ra_window=46) == 'math'  # dense on a CPU
    assert fused_runs('cuda', torch.bfloat16, 64) == (reciprocal.triton is not None)
    assert not fused_runs('cuda', torch.float64, 64) and not fused_runs('cuda', torch.bfloat16, 8)


def test_floating_point_operations_of_each_attention():
    def flops(**told):
        with torch.device('meta'):
            return GPT(GPTConfig(**told)).flops_per_token()

    gpt2, attention_of = flops(), 12 * 12 * 768 * 1024
    assert flops(ra_alpha=1.0, ra_window=-1) - gpt2 == attention_of / 2  # one product more, of two
    assert flops(ra_alpha=1.0, ra_window=63) - gpt2 == attention_of / 2 / 16
    latent = 12 * (768 * 2 * 128 + 2 * 128 * 768 - 2 * 768 * 768 + 2 * 128)  # down, up, less W_k and W_v; gains
    assert flops(attention='mla') - gpt2 == 6 * latent


# --- in a run ----------------------------------------------------------------------------------------

RUNS = {
    'mla': dict(attention='mla', latent_dim=8),
    'mla, rotary, ra': dict(attention='mla', latent_dim=8, latent_rotary=4, ra_learned=True, ra_window=4, dtype='bfloat16'),
    'ra everywhere, dropout': dict(ra_learned=True, ra_window=-1, dropout=0.1),
    'mla, pruned': dict(attention='mla', latent_dim=8, optimizer='adamwprune', prune_score='bitter7', prune_start=2, prune_end=7,
                        prune_interval=1),
}


@pytest.mark.parametrize('told', RUNS.values(), ids=RUNS)
def test_resume_is_exact(tiny, tmp_path, told):
    stopped = dict(lr_decay_iters=8, eval_interval=4)
    assert train.main(tiny(**told, **stopped, max_iters=8, out_dir=tmp_path / 'straight')) == 0
    for steps in (7, 8):
        assert train.main(tiny(**told, **stopped, max_iters=steps, out_dir=tmp_path / 'split', init_from='auto')) == 0
    assert_same_run(tmp_path / 'straight', tmp_path / 'split')
    saved = last(tmp_path / 'straight')
    if told.get('ra_learned'):
        assert all((saved['weights'][f'blocks.{n}.attention.alpha'] != 0).all() for n in range(2))
    if 'prune_score' in told:
        names = [f'blocks.{n}.attention.{part}.weight' for n in range(2) for part in ('down', 'key_up', 'value_up', 'proj')]
        assert set(names) < set(saved['mask'])
        assert all(0 < (~saved['mask'][name]).sum() == (saved['weights'][name] == 0).sum() for name in names)


def test_attention_is_part_of_what_makes_a_run(tiny, tmp_path):
    train.main(tiny(max_iters=4, lr_decay_iters=8))
    out = tmp_path / 'run'
    assert refusal(train.main, tiny(init_from='resume', lr_decay_iters=8, attention='mla', ra_learned=True)) == [
        f'{key}={value!r}: the run in {out} has {key}={before!r}; keep it, or start another run with another --out_dir'
        for key, value, before in (('attention', 'mla', 'mha'), ('ra_learned', True, False))]


def test_run_from_before_there_was_a_choice_of_attention_goes_on(tiny, tmp_path):
    for name in ('straight', 'split'):
        train.main(tiny(max_iters=4, lr_decay_iters=8, out_dir=tmp_path / name))
    saved = last(tmp_path / 'split')
    for key in ('attention latent_dim per_head_q_latent per_head_v_up latent_norm latent_scale latent_rotary ra_alpha ra_window '
                'ra_learned').split():
        del saved['settings'][key]
    save_checkpoint(str(tmp_path / 'split' / 'last.pt'), saved)
    for name in ('straight', 'split'):
        assert train.main(tiny(max_iters=8, lr_decay_iters=8, out_dir=tmp_path / name, init_from='resume')) == 0
    assert_same_run(tmp_path / 'straight', tmp_path / 'split')


def test_latent_run_from_before_there_was_a_rotary_part_goes_on_and_is_sampled(tiny, tmp_path, capsys):
    told = dict(attention='mla', latent_dim=8, lr_decay_iters=8)
    for name in ('straight', 'split'):
        train.main(tiny(**told, max_iters=4, out_dir=tmp_path / name))
    saved = last(tmp_path / 'split')
    del saved['settings']['latent_rotary']
    save_checkpoint(str(tmp_path / 'split' / 'last.pt'), saved)
    texts = []
    for name in ('straight', 'split'):
        capsys.readouterr()
        sample.main([str(tmp_path / name), '--checkpoint=last', '--device=cpu', '--max_new_tokens=20'])
        texts.append(capsys.readouterr().out)
        assert train.main(tiny(**told, max_iters=8, out_dir=tmp_path / name, init_from='resume')) == 0
    assert texts[0] == texts[1]
    assert_same_run(tmp_path / 'straight', tmp_path / 'split')


def test_preflight_tells_of_latents_and_of_a_fixed_alpha(tiny, capsys):
    train.main(tiny(attention='mla', latent_dim=32, latent_rotary=4, per_head_v_up=False, ra_alpha=0.5, ra_window=3, max_iters=3))
    out = capsys.readouterr().out
    assert ('  attention          latent, 2 x 32 wide and 4 rotary, values the same in all heads; reciprocal 3 tokens back, times 0.5; '
            'math\n') in out
    assert 'ra_alpha=0.5 for good: 0.5 cost 6.6% in perplexity' in out
    assert 'latent_dim=32 latent_rotary=4: the cache of sample.py is no smaller than that of attention=mha' in out


def test_preflight_knows_what_a_gpu_would_run(tiny, tiny_data, monkeypatch):
    """The kernel of the window, unless the heads are too narrow for it: then it is refused, as for any attention."""
    monkeypatch.setattr(preflight, 'notes', lambda *told: ())  # asks a real GPU for its memory
    monkeypatch.setattr(reciprocal, 'triton', True)
    shapes, fused = [], ['cudnn']
    monkeypatch.setattr(attention, 'kernel_name', lambda *shape: shapes.append(shape) or fused[0])
    data = open_data(str(tiny_data), 'tiny')
    gpu = preflight.Machine(torch.device('cuda:0'), torch.bfloat16, 0, 1, 'NVIDIA A100', None)

    def table(n_head):
        s, _ = parse(Settings, tiny(ra_learned=True, ra_window=4, n_head=n_head))
        return preflight.table(s, gpu, data, GPT(model_config(s, 257)), 0)

    assert '  attention          reciprocal 4 tokens back, learned from 0; windowed, cudnn\n' in table(2)
    assert shapes == [(2, 27, 2, 16, gpu.device, gpu.dtype, 0.0)]  # beyond the window
    assert refusal(table, 4)[0].startswith('attention would run unfused (math) on NVIDIA A100')
    fused[0] = 'math'
    assert refusal(table, 2)[0].startswith('attention would run unfused (math) on NVIDIA A100')


def test_dropout_that_the_window_cannot_have_is_an_error():
    model = GPT(GPTConfig(**SMALL, **RA, dropout=0.1))
    with pytest.raises(ValueError, match='dropout=0.1 window=5: the kernels of the window have no dropout'):
        model.hidden(text(model))
    model.eval().hidden(text(model))


def test_every_linear_weight_of_latent_attention_can_be_pruned():
    model = GPT(GPTConfig(**SMALL, **MLA, ra_learned=True))
    names = prune.prunable(model.named_parameters(), 'blocks')
    assert [n.removeprefix('blocks.0.') for n in names if n.startswith('blocks.0.attention')] == [
        'attention.down.weight', 'attention.key_up.weight', 'attention.value_up.weight', 'attention.proj.weight']


REFUSED = {
    'idle latents': (dict(latent_dim=64, latent_norm=False), ['latent_dim=64: acts only with attention=mla; leave it out',
                                                              'latent_norm=False: acts only with attention=mla; leave it out']),
    'idle window': (dict(ra_window=8), ['ra_window=8: acts only with ra_alpha or ra_learned; leave it out']),
    'window': (dict(ra_window=-2, ra_learned=True), ['ra_window=-2: must be at least 0, or -1 for all earlier tokens']),
    'rotary': (dict(latent_rotary=16, attention='mla'), [
        'latent_rotary=16: must be even, not negative and below the head width n_embd / n_head']),
    'odd rotary': (dict(latent_rotary=-3, attention='mla'), [
        'latent_rotary=-3: must be even, not negative and below the head width n_embd / n_head']),
    'latents': (dict(latent_dim=0, attention='mla'), ['latent_dim=0: must be at least 1']),
    'dropout': (dict(ra_learned=True, dropout=0.1, ra_window=8), [
        'dropout=0.1 ra_window=8: the kernels of the window have no dropout; set --dropout=0 or --ra_window=-1']),
}


@pytest.mark.parametrize('told, messages', REFUSED.values(), ids=REFUSED)
def test_impossible_or_idle_attention_is_refused(tiny, told, messages):
    assert refusal(train.main, tiny(**told)) == messages


@pytest.mark.parametrize('name, told', [('ra_mla_baseline', dict(attention='mla')), ('ra_learned', dict(ra_learned=True)),
                                        ('mla_rotary', dict(attention='mla', latent_rotary=32))])
def test_presets_differ_from_vanilla_by_their_attention_alone(name, told):
    (vanilla, _), (preset, problems) = (parse(Settings, [f'{train.__file__[:-8]}config/{n}.py']) for n in ('vanilla_baseline', name))
    assert problems + check(preset) == []
    assert {k: v for k, v in vars(preset).items() if v != getattr(vanilla, k)} == {**told, 'out_dir': f'out/{name}'}
    assert (model_config(preset, 50257).latent_dim, preset.ra_window, preset.ra_alpha) == (128, 64, 0.0)
