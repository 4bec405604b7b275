"""model.py against float64 cross-entropy and what must hold of any language model."""
import math
from types import SimpleNamespace

import pytest
import torch
from models import MLA, SMALL, lively, text
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.loss import loss_chunk
from model import GPT, GPTConfig, attention_backend, model_config


def batch(config, rows=3):
    """Tokens and targets, each (rows, block_size)."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (2, rows, config.block_size), generator=draw)


# --- loss -----------------------------------------------------------------------------------------


def test_loss_is_the_cross_entropy_of_the_logits():
    model = lively().double()
    idx, targets = batch(model.config)
    targets[0, :5] = -1  # not scored
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(expected, parameters)
    loss = model(idx, targets)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss / 4, parameters), gradients):
        torch.testing.assert_close(4 * ours, theirs, atol=1e-12, rtol=1e-10)
    with torch.no_grad():
        assert torch.equal(model(idx, targets), loss)


@pytest.mark.parametrize('told', [{}, dict(attention='mla', latent_dim=32)])
def test_initial_weights_are_those_of_gpt2(told):
    """0.02, but what is added to the residual stream smaller by the root of its 2 n_layer terms."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=2, n_embd=128, **told))
    projections = 0
    for name, p in model.named_parameters():
        expected = 0.02
        if name.endswith(('attention.proj.weight', 'mlp.proj.weight')):
            expected = 0.02 / math.sqrt(2 * 8)
            projections += 1
        if p.dim() == 2 and not name.endswith('_up.weight'):  # the latent's, which GPT-2 lacks
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(p.mean().item()) < 0.05 * expected, name
    assert projections == 2 * 8


def test_the_logits_never_exist_at_once():
    """No tensor of tokens x vocabulary is made on the way to the loss and its gradients."""
    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if torch.is_tensor(tensor):
                    self.largest = max(self.largest, tensor.numel())
            return out

    model = GPT(GPTConfig(vocab_size=5000, block_size=64, n_layer=1, n_head=1, n_embd=16,
                          loss_chunk_tokens=32))
    idx, targets = batch(model.config, rows=8)
    with Watch() as watch:
        model(idx, targets).backward()
    assert 32 * 5000 <= watch.largest < 8 * 64 * 5000 / 4  # it does see the chunk's logits


@pytest.mark.parametrize('width', [32, 128])
def test_initial_loss_is_that_of_guessing(width):
    """ln(V) + C x 0.02^2 / 2: the tied embedding gives each logit a variance of C x 0.02^2."""
    torch.manual_seed(0)
    config = GPTConfig(**{**SMALL, 'n_embd': width, 'vocab_size': 1000})
    idx, targets = batch(config, rows=16)
    expected = math.log(1000) + width * 0.02 ** 2 / 2
    assert GPT(config)(idx, targets).item() == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize('told', [{}, dict(MLA, positions='rotary')], ids=['mha', 'mla, rotary'])
def test_overfits_one_batch(told):
    torch.manual_seed(0)
    config = GPTConfig(**SMALL, **told)
    model = GPT(config)
    idx, targets = batch(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(idx, targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_padded_tokens_get_no_logits_and_no_gradient():
    model = lively()  # 131 tokens, 256 rows
    idx, targets = batch(model.config)
    assert model(idx).shape[-1] == 131
    model(idx, targets).backward()
    assert (model.token_embedding.weight.grad[131:] == 0).all()


# --- layers and settings --------------------------------------------------------------------------


def test_vectors_in_float32_beside_bfloat16_matrices():
    """Working weights: the loss is near that of float32, and gradients have their weight's type."""
    model = lively(bias=True)
    idx, targets = batch(model.config)
    exact = model(idx, targets).item()
    for p in model.parameters():
        p.data = p.data.bfloat16() if p.dim() == 2 else p.data
    loss = model(idx, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=0.01)
    assert model.hidden(idx).dtype == torch.bfloat16
    assert all(p.grad.dtype == p.dtype for p in model.parameters())


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, dropout=0.5))
    idx, targets = batch(model.config)
    assert model(idx, targets) != model(idx, targets)
    model.eval()
    assert model(idx, targets) == model(idx, targets)


def test_bias_adds_biases_everywhere_or_nowhere():
    for bias in (False, True):
        model = GPT(GPTConfig(**SMALL, bias=bias))
        layers = [layer for layer in model.modules()
                  if isinstance(layer, (torch.nn.Linear, torch.nn.LayerNorm))]
        assert {layer.bias is not None for layer in layers} == {bias}
        names = [name for name, _ in model.named_parameters() if name.endswith('bias')]
        assert len(names) == (len(layers) if bias else 0)


def test_rotary_positions_need_no_embedding_and_see_order():
    learned = lively()
    rotary = lively(positions='rotary')
    names = learned.state_dict().keys() - rotary.state_dict().keys()
    assert names == {'position_embedding.weight'}
    assert learned.flops_per_token() == rotary.flops_per_token()
    idx = text(rotary, rows=1)
    swapped = idx.clone()
    swapped[:, :2] = idx[:, :2].flip(1)
    assert idx[0, 0] != idx[0, 1]
    assert (rotary(idx)[:, -1] - rotary(swapped)[:, -1]).abs().max() > 1e-3


def test_too_long_a_text_is_refused():
    model = GPT(GPTConfig(**SMALL))
    with pytest.raises(ValueError, match='49 tokens do not fit in block_size=48'):
        model(torch.zeros(1, 49, dtype=torch.int64))


@pytest.mark.parametrize('told, message', [
    (dict(positions='rotry'), "positions='rotry' is not one of learned, rotary"),
    (dict(attention='mqa'), "attention='mqa' is not one of mha, mla"),
    (dict(n_kv_head=3), 'n_embd=32 n_head=4 n_kv_head=3: each must be a multiple of the next'),
    (dict(n_head=5), 'n_embd=32 n_head=5 n_kv_head=0: each must be a multiple of the next')])
def test_what_is_no_model_is_refused(told, message):
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(**{**SMALL, **told}))


def test_model_config_takes_the_fields_that_settings_have():
    settings = SimpleNamespace(n_layer=3, bias=True, learning_rate=1.0)
    config = model_config(settings, 131)
    assert config == GPTConfig(vocab_size=131, n_layer=3, bias=True)


def test_attention_backend_is_named():
    def named(**told):
        return attention_backend(GPTConfig(**SMALL, **told), 'cpu', torch.float32)

    assert named() == named(**MLA) == named(ra_alpha=1.0, ra_window=-1) == 'flash'
    assert named(ra_alpha=1.0, ra_window=47) == 'flash'  # the window cuts nothing
    assert named(ra_alpha=1.0, ra_window=46) == 'math'  # dense on a CPU


def test_floating_point_operations_of_each_attention():
    def flops(**told):
        with torch.device('meta'):
            return GPT(GPTConfig(**told)).flops_per_token()

    gpt2 = flops()
    attended = 12 * 12 * 768 * 1024
    assert flops(ra_alpha=1.0, ra_window=-1) - gpt2 == attended / 2  # one product more, of two
    assert flops(ra_alpha=1.0, ra_window=63) - gpt2 == attended / 2 / 16
    # latents down and up and their gains, less W_k and W_v
    latent = 12 * (768 * 2 * 128 + 2 * 128 * 768 - 2 * 768 * 768 + 2 * 128)
    assert flops(attention='mla') - gpt2 == 6 * latent
    assert gpt2 - flops(n_kv_head=4) == 6 * 12 * 2 * 768 * 512  # two thirds of W_k and W_v


# --- compiled -------------------------------------------------------------------------------------


def test_compiled_gradients_are_those_of_the_plain_model():
    """With all that the compiled backward computes again."""
    model = lively(**MLA, ra_learned=True, ra_window=-1, n_layer=1, positions='rotary')
    idx = text(model, rows=2)
    model(idx, idx).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.compile_parts()
    model(idx, idx).backward()
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    model.uncompile_parts()
    assert model.loss_chunk is loss_chunk and model.hidden.__func__ is GPT.hidden
