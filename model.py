"""GPT-2: embeddings, blocks of attention (attention.py) and MLP, and the loss of loss.py.

Shapes: B batch, T time, C width (n_embd), H heads, D head width (C / H), N = B x T tokens, V padded vocabulary.
The matrices may be bfloat16 (working weights, see optim.py) while vectors stay float32; activations have the
matrices' type, and whatever a vector touches is computed in float32.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch._functorch.config
import torch.nn as nn
from torch.nn import functional as F

import fp8
from attention import Attention, LatentAttention, Linear, is_reciprocal, recomputed, up_std
from loss import ChunkedCrossEntropy, chunked_loss, fastest_chunk, loss_chunk


@dataclass
class GPTConfig:
    vocab_size: int = 50257  # tokens that exist; the embedding has padded_vocab_size rows
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    attention: str = 'mha'
    latent_dim: int = 128
    per_head_q_latent: bool = True
    per_head_v_up: bool = True
    latent_norm: bool = True
    latent_scale: bool = False
    latent_rotary: int = 0
    ra_alpha: float = 0.0
    ra_window: int = 64
    ra_learned: bool = False
    loss_chunk_tokens: int = 8192
    fp8: bool = False

    @property
    def padded_vocab_size(self):
        """A multiple of 128, so that the head's matrix products tile evenly (50257 -> 50304)."""
        return -(-self.vocab_size // 128) * 128


def model_config(s, vocab_size):
    """The model these Settings describe."""
    return GPTConfig(vocab_size=vocab_size, **{f.name: getattr(s, f.name) for f in fields(GPTConfig) if hasattr(s, f.name)})


class LayerNorm(nn.Module):
    """LayerNorm computed in its own (float32) precision, with an optional bias."""

    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.bias, 1e-5).to(x.dtype)


def gelu(x):
    """GPT-2's tanh form, x (1 + tanh u) / 2. Compiled as x sigmoid(2 u), the same function, for tanh is slow on a GPU."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate='tanh')
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return (exact * torch.sigmoid(math.sqrt(8 / math.pi) * exact * (1 + 0.044715 * exact * exact))).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout, self.fp8 = config.dropout, config.fp8
        self.fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):  # (B, T, C)
        if self.fp8 and torch.is_grad_enabled():  # evaluation and sampling are in the matrices' type
            y = fp8.Float8MLP.apply(x, self.fc.weight, self.proj.weight)
        else:
            y = self.proj(recomputed(gelu, self.fc(x)))  # again in the backward, in one kernel with its gradient
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1 = LayerNorm(config.n_embd, config.bias)
        self.attention = (LatentAttention if config.attention == 'mla' else Attention)(config)
        self.norm_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x, layer=None, step=None):  # (B, T, C); layer, step: of a cache
        x = x + self.attention(self.norm_1(x), layer, step)
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): pre-norm, learned positions, head tied to the token embedding."""

    def __init__(self, config):
        super().__init__()
        self.config, self.loss_chunk = config, loss_chunk
        self.token_embedding = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = LayerNorm(config.n_embd, config.bias)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # the residual stream is a sum of 2 x n_layer projections: keep its variance (GPT-2, section 2.3)
                residual = name.endswith('proj.weight')
                std = up_std(config) if name.endswith('_up.weight') else 0.02
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer) if residual else std)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def hidden(self, idx, cache=None, counts=None, step=None):
        """Tokens (B, T) -> the final normalised residual stream (B, T, C). T is at most block_size.

        With a cache (attention.new_cache) the tokens follow those it has read, and it reads them too. counts (B,) int64
        on the CPU: how many of each row are real, the rest being filling at its end whose output means nothing. step: from
        cache.step(), instead of cache.plan(); cache.lengths is then the caller's to advance.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f'{T} tokens do not fit in block_size={self.config.block_size}')
        if cache and not step:
            step = cache.plan(idx, counts)
        positions = self.position_embedding(step.positions) if cache else self.position_embedding.weight[:T]
        x = F.dropout(self.token_embedding(idx) + positions, self.config.dropout, self.training)  # (B, T, C)
        for block, layer in zip(self.blocks, cache.layers if cache else [None] * len(self.blocks)):
            x = block(x, layer, step)
        if cache and step.lengths is not None:
            cache.lengths = step.lengths
        return self.norm(x)

    def head(self, hidden):
        """(..., C) -> logits (..., vocab_size): the padded rows are left out, so they can never be sampled."""
        return (hidden @ self.token_embedding.weight.t())[..., :self.config.vocab_size]  # cut afterwards: GPUs like even sizes

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size), or with targets (B, T; -1 = not scored) the mean loss alone."""
        x = self.hidden(idx)
        if targets is None:
            return self.head(x)
        weight, training = self.token_embedding.weight, torch.is_grad_enabled()
        one_chunk = fp8.head(weight) if self.config.fp8 and training else fastest_chunk(x, self.loss_chunk)
        arguments = (x.flatten(0, 1), weight, targets.flatten(), self.config.vocab_size, self.config.loss_chunk_tokens, one_chunk)
        return ChunkedCrossEntropy.apply(*arguments) if training else chunked_loss(*arguments)[0]

    def compile_parts(self):
        """Compile the blocks and, where loss.py has no kernel for it, the loss of a chunk: each a graph of its own.

        In one graph the compiler schedules the head's matrix products of all chunks first and holds all logits.
        """
        # that of fp8 is traced whole, so nothing of it is missing in the key of the compile cache
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        self.hidden = torch.compile(self.hidden, fullgraph=True, dynamic=False)
        self.loss_chunk = torch.compile(loss_chunk, fullgraph=True, dynamic=False)

    def uncompile_parts(self):
        self.__dict__.pop('hidden', None)
        self.loss_chunk = loss_chunk

    def parameter_count(self):
        """All parameters, the padded rows of the embedding included, the tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Of forward and backward: 6 a weight that multiplies + 12 L C T for attention (PaLM, arXiv 2204.02311,
        appendix B), and 6 L C for each token in the window of RA. Position embeddings only add; the tied embedding
        multiplies as the head. MLA is counted as it trains, with its keys and values expanded."""
        c = self.config
        multiplying = self.parameter_count() - self.position_embedding.weight.numel()
        window = c.block_size if c.ra_window < 0 else min(c.ra_window + 1, c.block_size)
        keys = 12 * c.block_size + (6 * window if is_reciprocal(c) else 0)
        return 6 * multiplying + c.n_layer * c.n_embd * keys
