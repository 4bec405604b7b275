"""The default model is GPT-2: transformers' GPT2LMHeadModel and the published sizes as oracle.

A change of the model that is meant to leave GPT-2 breaks these tests, test_export.py's, three of
test_pretrained.py and the two of float8's MLP, all marked gpt2, and no others.
"""
import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig

pytestmark = pytest.mark.gpt2

NAMES = {
    'token_embedding.': 'transformer.wte.', 'position_embedding.': 'transformer.wpe.',
    'blocks.': 'transformer.h.', '.norm_1.': '.ln_1.', '.norm_2.': '.ln_2.',
    '.attention.qkv.': '.attn.c_attn.', '.attention.proj.': '.attn.c_proj.',
    '.mlp.fc.': '.mlp.c_fc.', '.mlp.proj.': '.mlp.c_proj.',
}


def their_name(name):
    if name.startswith('norm.'):
        return f'transformer.ln_f.{name[5:]}'
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def as_theirs(name, tensor):
    """A matrix of a linear layer is stored transposed there."""
    linear = tensor.dim() == 2 and 'embedding' not in name
    return tensor.detach().t() if linear else tensor.detach()


@pytest.fixture(scope='module', params=[torch.float32, torch.float64], ids=str)
def both(request):
    """(our model, transformers' with the same weights, tolerance)."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=128, block_size=32, n_layer=2, n_head=4, n_embd=32, bias=True,
                       loss_chunk_tokens=24)
    model = GPT(config).to(request.param)
    with torch.no_grad():
        for p in model.parameters():  # biases and gains away from their special values
            p.add_(torch.randn_like(p) * 0.05)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)).to(request.param)
    state = {their_name(n): as_theirs(n, p) for n, p in model.named_parameters()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {'lm_head.weight'}  # which is tied
    return model, theirs, 1e-5 if request.param == torch.float32 else 1e-11


def batch(seed=1):
    """Tokens and targets, each (3, 32)."""
    return torch.randint(128, (2, 3, 32), generator=torch.Generator().manual_seed(seed))


def test_logits_match_transformers(both):
    model, theirs, tolerance = both
    idx, _ = batch()
    expected = theirs(idx).logits
    torch.testing.assert_close(model(idx), expected, atol=tolerance, rtol=tolerance)


def test_loss_and_gradients_match_transformers(both):
    model, theirs, tolerance = both
    idx, targets = batch()
    model.zero_grad()
    theirs.zero_grad()
    loss = model(idx, targets)
    expected = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=tolerance, rtol=tolerance)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            as_theirs(name, p.grad), gradients[their_name(name)], atol=tolerance, rtol=tolerance,
            msg=lambda message, name=name: f'{name}: {message}')


@pytest.mark.parametrize('n_layer, n_head, n_embd, millions', [
    (12, 12, 768, 124.44), (24, 16, 1024, 354.82), (36, 20, 1280, 774.03), (48, 25, 1600, 1557.61)])
def test_published_sizes(n_layer, n_head, n_embd, millions):
    """GPT-2 small, medium, large and XL, with biases and 50257 tokens."""
    with torch.device('meta'):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=True))
    padding = (50304 - 50257) * n_embd
    assert (model.parameter_count() - padding) / 1e6 == pytest.approx(millions, abs=0.01)


def test_initial_weights_are_gpt2s():
    """std 0.02, and 0.02 / sqrt(2 n_layer) of what is added to the residual stream."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=2, n_embd=128, bias=True)
    model = GPT(config)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.005 if name.endswith('proj.weight') else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
        else:
            assert (p == (0 if name.endswith('bias') else 1)).all(), name


def test_compiled_gelu_is_the_tanh_form():
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    from model import gelu  # which another activation may replace
    y = torch.compile(gelu, backend='eager', fullgraph=True)(x)
    expected = F.gelu(x, approximate='tanh')
    torch.testing.assert_close(y, expected, atol=1e-14, rtol=1e-12)
    found, = torch.autograd.grad(y.sum(), x)
    slope, = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(found, slope, atol=1e-13, rtol=1e-12)


def test_flops_per_token_of_gpt2():
    """6 a weight that multiplies (blocks, tied head, gains), 12 L C T of attention."""
    with torch.device('meta'):
        model = GPT(GPTConfig())
    weights = 12 * 12 * 768 ** 2 + 50304 * 768 + 25 * 768
    assert model.flops_per_token() == 6 * weights + 12 * 12 * 768 * 1024
