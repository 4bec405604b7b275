"""GPT-2: embeddings, attention, MLP, and the loss of loss.py.

Shapes: B batch, T time, C width (n_embd), H heads, D head width (C / H), N = B x T tokens, V padded vocabulary.
The matrices may be bfloat16 (working weights, see optim.py) while vectors stay float32; activations have the
matrices' type, and whatever a vector touches is computed in float32.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from loss import ChunkedCrossEntropy, chunked_loss, loss_chunk


@dataclass
class GPTConfig:
    vocab_size: int = 50257  # tokens that exist; the embedding has padded_vocab_size rows
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    loss_chunk_tokens: int = 8192

    @property
    def padded_vocab_size(self):
        """A multiple of 128, so that the head's matrix products tile evenly (50257 -> 50304)."""
        return -(-self.vocab_size // 128) * 128


def model_config(s, vocab_size):
    """The model these Settings describe."""
    return GPTConfig(vocab_size=vocab_size, **{f.name: getattr(s, f.name) for f in fields(GPTConfig) if hasattr(s, f.name)})


class Linear(nn.Linear):
    """nn.Linear whose bias may be float32 beside a bfloat16 weight."""

    def forward(self, x):
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))


class LayerNorm(nn.Module):
    """LayerNorm computed in its own (float32) precision, with an optional bias."""

    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.bias, 1e-5).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):  # (B, T, C)
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        y = self.proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


def gelu(x):
    """GPT-2's tanh form, x (1 + tanh u) / 2. Compiled as x sigmoid(2 u), the same function, for tanh is slow on a GPU."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate='tanh')
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return (exact * torch.sigmoid(math.sqrt(8 / math.pi) * exact * (1 + 0.044715 * exact * exact))).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):  # (B, T, C)
        hidden = self.fc(x)  # (B, T, 4C)
        if torch.compiler.is_compiling():  # the backward computes the activation again, in one kernel with its gradient
            y = self.proj(checkpoint(gelu, hidden, use_reentrant=False, preserve_rng_state=False))
        else:
            y = self.proj(gelu(hidden))
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1 = LayerNorm(config.n_embd, config.bias)
        self.attention = Attention(config)
        self.norm_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x):  # (B, T, C)
        x = x + self.attention(self.norm_1(x))
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
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def hidden(self, idx):
        """Tokens (B, T) -> the final normalised residual stream (B, T, C). T is at most block_size."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f'{T} tokens do not fit in block_size={self.config.block_size}')
        x = self.token_embedding(idx) + self.position_embedding.weight[:T]  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def head(self, hidden):
        """(..., C) -> logits (..., vocab_size): the padded rows are left out, so they can never be sampled."""
        return hidden @ self.token_embedding.weight[:self.config.vocab_size].t()

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size), or with targets (B, T; -1 = not scored) the mean loss alone."""
        x = self.hidden(idx)
        if targets is None:
            return self.head(x)
        arguments = (x.flatten(0, 1), self.token_embedding.weight, targets.flatten(), self.config.vocab_size,
                     self.config.loss_chunk_tokens, self.loss_chunk)
        return ChunkedCrossEntropy.apply(*arguments) if torch.is_grad_enabled() else chunked_loss(*arguments)[0]

    def compile_parts(self):
        """Compile the blocks and, where loss.py has no kernel for it, the loss of a chunk: each a graph of its own.

        In one graph the compiler schedules the head's matrix products of all chunks first and holds all logits.
        """
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
        appendix B). Position embeddings only add; the tied embedding multiplies as the head."""
        c = self.config
        multiplying = self.parameter_count() - self.position_embedding.weight.numel()
        return 6 * multiplying + 12 * c.n_layer * c.n_embd * c.block_size


def attention_backend(config, batch_size, device, dtype):
    """Name of the kernel family that scaled_dot_product_attention picks for this model here, e.g. 'flash'.

    Asks PyTorch's own dispatcher with tensors of the real shapes, so it is what runs, not what was hoped for.
    """
    shape = (batch_size, config.block_size, 3, config.n_head, config.n_embd // config.n_head)
    qkv = torch.empty(shape, device=device, dtype=dtype, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    choice = torch._fused_sdp_choice(q, k, v, None, config.dropout, True)
    names = {0: 'math', 1: 'flash', 2: 'memory-efficient', 3: 'cudnn', 4: 'overrideable'}  # torch.nn.attention.SDPBackend
    return names.get(int(choice), f'unknown ({choice})')
