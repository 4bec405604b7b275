"""model.py against transformers' GPT-2, float64 cross-entropy, and what GPT-2's initialisation implies."""
import math
import os

import pytest
import torch
from conftest import train  # noqa: F401  (puts the repository on the path)
from torch.nn import functional as F

import loss
from attention import attention_backend
from loss import chunked_loss
from model import GPT, GPTConfig, gelu

SMALL = dict(vocab_size=131, block_size=32, n_layer=2, n_head=4, n_embd=32, loss_chunk_tokens=24)


def batch(config, rows=3, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (2, rows, config.block_size), generator=draw)  # tokens and targets, each (B, T)


def as_transformers(model):
    """transformers' GPT2LMHeadModel with the weights of `model`; its linear layers are stored transposed."""
    transformers = pytest.importorskip('transformers')
    c = model.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.padded_vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)).to(model.norm.weight.dtype)
    names = {'token_embedding': 'transformer.wte', 'position_embedding': 'transformer.wpe', 'norm.': 'transformer.ln_f.',
             'blocks.': 'transformer.h.', 'norm_1': 'ln_1', 'norm_2': 'ln_2', 'attention.qkv': 'attn.c_attn',
             'attention.proj': 'attn.c_proj', 'mlp.fc': 'mlp.c_fc', 'mlp.proj': 'mlp.c_proj'}
    state, pairs = {}, {}
    for name, p in model.named_parameters():
        theirs_name = name
        for ours, other in names.items():
            if ours in theirs_name and not (ours == 'norm.' and not name.startswith('norm.')):
                theirs_name = theirs_name.replace(ours, other)
        linear = p.dim() == 2 and 'embedding' not in name
        state[theirs_name], pairs[name] = (p.detach().t() if linear else p.detach()), (theirs_name, linear)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {'lm_head.weight'}
    return theirs, pairs


@pytest.fixture(scope='module', params=[torch.float32, torch.float64])
def both(request):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, 'vocab_size': 128}, bias=True)).to(request.param)
    with torch.no_grad():
        for p in model.parameters():  # biases and gains away from their special values
            p.add_(torch.randn_like(p) * 0.05)
    theirs, pairs = as_transformers(model)
    return model, theirs, pairs, 1e-5 if request.param == torch.float32 else 1e-11


def test_logits_match_transformers(both):
    model, theirs, _, tolerance = both
    idx, _ = batch(model.config)
    torch.testing.assert_close(model(idx), theirs(idx).logits, atol=tolerance, rtol=tolerance)


def test_loss_and_gradients_match_transformers(both):
    model, theirs, pairs, tolerance = both
    idx, targets = batch(model.config)
    model.zero_grad(), theirs.zero_grad()
    loss = model(idx, targets)
    expected = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
    loss.backward(), expected.backward()
    torch.testing.assert_close(loss, expected, atol=tolerance, rtol=tolerance)
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():
        their_name, linear = pairs[name]
        expected_grad = their_gradients[their_name].t() if linear else their_gradients[their_name]
        torch.testing.assert_close(p.grad, expected_grad, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f'{name}: {m}')


@pytest.mark.parametrize('chunk', [1, 7, 16, 50, 1000])
def test_chunked_loss_is_cross_entropy_in_float64(chunk):
    torch.manual_seed(0)
    x, weight = torch.randn(50, 12, dtype=torch.float64), torch.randn(128, 12, dtype=torch.float64)
    targets = torch.randint(100, (50,))
    targets[[3, 17]] = -1
    x.requires_grad_(), weight.requires_grad_()
    expected = F.cross_entropy((x @ weight.t())[:, :100], targets, ignore_index=-1)
    expected_grads = torch.autograd.grad(expected, (x, weight))
    grad_weight = torch.zeros_like(weight)
    loss, grad_x = chunked_loss(x.detach(), weight.detach(), targets, 100, chunk, grad_weight=grad_weight)
    for ours, theirs in ((loss, expected), (grad_x, expected_grads[0]), (grad_weight, expected_grads[1])):
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-10, rtol=1e-10)


def test_scaled_loss_scales_the_gradients():
    model = GPT(GPTConfig(**SMALL)).double()
    idx, targets = batch(model.config)
    (model(idx, targets) / 4).backward()
    quarter = model.token_embedding.weight.grad.clone()
    model.zero_grad()
    model(idx, targets).backward()
    torch.testing.assert_close(quarter * 4, model.token_embedding.weight.grad, atol=1e-12, rtol=1e-10)


def test_the_logits_never_exist_at_once(monkeypatch):
    """No tensor of tokens x vocabulary elements is made on the way to the loss and its gradients."""
    from torch.utils._python_dispatch import TorchDispatchMode
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if torch.is_tensor(tensor):
                    largest[0] = max(largest[0], tensor.numel())
            return out

    model = GPT(GPTConfig(vocab_size=5000, block_size=64, n_layer=1, n_head=1, n_embd=16, loss_chunk_tokens=32))
    idx, targets = batch(model.config, rows=8)
    with Watch():
        model(idx, targets).backward()
    assert largest[0] < 8 * 64 * 5000 / 4
    assert largest[0] >= 32 * 5000  # the watch does see the chunk's logits


def test_evaluation_and_training_give_the_same_loss():
    model = GPT(GPTConfig(**SMALL))
    idx, targets = batch(model.config)
    with torch.no_grad():
        assert torch.equal(model(idx, targets), model(idx, targets).detach())
        quiet = model(idx, targets)
    assert torch.equal(quiet, model(idx, targets).detach())


def test_unscored_targets_do_not_count():
    model = GPT(GPTConfig(**SMALL))
    idx, targets = batch(model.config)
    filled = targets.clone()
    filled[1:] = -1
    torch.testing.assert_close(model(idx, filled), model(idx[:1], targets[:1]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('width, tolerance', [(32, 0.01), (128, 0.01)])
def test_initial_loss_is_that_of_guessing(width, tolerance):
    """ln(V) + C x 0.02^2 / 2: the tied embedding gives every logit a variance of C x 0.02^2 (1.4% of ln(V) at C = 768)."""
    torch.manual_seed(0)
    config = GPTConfig(**{**SMALL, 'n_embd': width, 'vocab_size': 1000})
    idx, targets = batch(config, rows=16)
    loss = GPT(config)(idx, targets).item()
    assert abs(loss - math.log(1000)) < tolerance * math.log(1000)
    assert abs(loss - math.log(1000) - width * 0.02 ** 2 / 2) < 0.005 * math.log(1000)


def test_overfits_one_batch():
    torch.manual_seed(0)
    config = GPTConfig(**SMALL)
    model, (idx, targets) = GPT(config), batch(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(idx, targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_the_future_does_not_leak():
    model = GPT(GPTConfig(**SMALL)).double()
    idx, _ = batch(model.config)
    changed = idx.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % model.config.vocab_size
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[:, 20:], after[:, 20:])


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, dropout=0.5))
    idx, targets = batch(model.config)
    assert model(idx, targets) != model(idx, targets)
    model.eval()
    assert model(idx, targets) == model(idx, targets)


def test_bias_option_adds_biases_everywhere_or_nowhere():
    for bias in (False, True):
        names = [n for n, _ in GPT(GPTConfig(**SMALL, bias=bias)).named_parameters() if n.endswith('bias')]
        assert len(names) == (2 * 6 + 1 if bias else 0)  # two norms and four linear layers a block, and the last norm


@pytest.mark.parametrize('n_layer, n_head, n_embd, millions', [(12, 12, 768, 124.44), (24, 16, 1024, 354.82), (36, 20, 1280, 774.03),
                                                              (48, 25, 1600, 1557.61)])
def test_published_sizes(n_layer, n_head, n_embd, millions):
    """GPT-2 small, medium, large, XL with biases and 50257 tokens."""
    with torch.device('meta'):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=True))
    assert (model.parameter_count() - (50304 - 50257) * n_embd) / 1e6 == pytest.approx(millions, abs=0.01)


def test_flops_per_token_of_gpt2():
    with torch.device('meta'):
        model = GPT(GPTConfig())
    matrices = 12 * 12 * 768 ** 2 + 50304 * 768 + 25 * 768  # blocks, tied head, gains
    assert model.flops_per_token() == 6 * matrices + 12 * 12 * 768 * 1024


def test_too_long_a_sequence_is_refused():
    model = GPT(GPTConfig(**SMALL))
    with pytest.raises(ValueError, match='33 tokens do not fit in block_size=32'):
        model(torch.zeros(1, 33, dtype=torch.long))


def test_padded_tokens_get_no_logits_and_no_gradient():
    model = GPT(GPTConfig(**SMALL))  # 131 tokens, 256 rows
    idx, targets = batch(model.config)
    assert model(idx).shape[-1] == 131
    model(idx, targets).backward()
    assert (model.token_embedding.weight.grad[131:] == 0).all()


def test_attention_backend_is_named():
    assert attention_backend(GPTConfig(**SMALL), 2, 'cpu', torch.float32) == 'flash'


def test_compiled_gelu_is_the_tanh_form():
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    y, expected = torch.compile(gelu, backend='eager', fullgraph=True)(x), F.gelu(x, approximate='tanh')
    torch.testing.assert_close(y, expected, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)), atol=1e-13, rtol=1e-12)


@pytest.mark.skipif(not loss.triton or not os.environ.get('TRITON_INTERPRET'), reason='needs TRITON_INTERPRET=1 and Triton')
@pytest.mark.parametrize('vocab_size', [5, 600, 4090, 4096, 9000])
def test_loss_kernel_is_its_twin(vocab_size):
    """In Triton's interpreter, on a CPU. tests/test_gpu.py has the compiled one."""
    draw, rows = torch.Generator().manual_seed(0), -(-vocab_size // 128) * 128
    x, weight = torch.randn(9, 16, generator=draw), torch.randn(rows, 16, generator=draw)
    targets = torch.randint(vocab_size, (9,), generator=draw)
    targets[2], targets[3], targets[4] = -1, 0, vocab_size - 1
    added = torch.zeros(rows, 16), torch.zeros(rows, 16, dtype=torch.float64)
    ours = loss.loss_chunk_fused(x, weight, targets, torch.tensor(8), vocab_size, added[0])
    exact = loss.loss_chunk(x.double(), weight.double(), targets, torch.tensor(8), vocab_size, added[1])
    for a, b in zip([*ours, added[0]], [*exact, added[1]]):
        assert (a - b).norm() <= 1e-5 * b.norm()
