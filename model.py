"""GPT-2, its attentions, and the cache that texts are decoded from.

Shapes: B rows, T tokens, C width (n_embd), H heads, K key heads, D head width (C / H), L latent
width, R rotary numbers of a head, S places of a cache, V padded vocabulary. Matrices may be
bfloat16 beside vectors in float32: activations have the matrices' type, and whatever a vector
touches is computed in float32.
"""
import functools
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch._functorch.config
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from kernels import float8
from kernels.loss import ChunkedCrossEntropy, chunked_loss, fastest_chunk, loss_chunk
from kernels.reciprocal import block_masks, flex_runs, reciprocal_attention, recomputed

POSITIONS = ('learned', 'rotary')


@dataclass
class GPTConfig:
    vocab_size: int = 50257  # tokens that exist; the embedding has padded_vocab_size rows
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    attention: str = 'mha'  # a name of ATTENTIONS
    n_kv_head: int = 0  # of multi-head attention; 0: n_head
    positions: str = 'learned'
    latent_dim: int = 128  # of latent attention
    ra_alpha: float = 0.0
    ra_window: int = 64
    ra_learned: bool = False
    loss_chunk_tokens: int = 8192
    fp8: bool = False

    @property
    def padded_vocab_size(self):
        """A multiple of 128, so that the head's products tile evenly (50257 -> 50304)."""
        return -(-self.vocab_size // 128) * 128

    @property
    def head_width(self):
        return self.n_embd // self.n_head

    @property
    def rotary_width(self):
        """Numbers of each head's queries and keys that rotary embedding turns."""
        if self.positions == 'learned':
            return 0
        return self.head_width // 2 if self.attention == 'mla' else self.head_width

    @property
    def reciprocal(self):
        """Whether attention has a reciprocal term."""
        return self.ra_learned or self.ra_alpha != 0

    @property
    def windowed(self):
        """Whether the window of the reciprocal term cuts anything off."""
        return self.reciprocal and 0 <= self.ra_window < self.block_size - 1

    def check(self):
        """ValueError for what would be another model than asked for."""
        for name, choices in (('attention', ATTENTIONS), ('positions', POSITIONS)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
        if self.n_embd % self.n_head or self.n_head % (self.n_kv_head or self.n_head):
            raise ValueError(f'n_embd={self.n_embd} n_head={self.n_head} n_kv_head='
                             f'{self.n_kv_head}: each must be a multiple of the next')


def model_config(settings, vocab_size):
    """The GPTConfig that the settings describe, of the fields that they have."""
    told = {**vars(settings), 'vocab_size': vocab_size}
    return GPTConfig(**{f.name: told[f.name] for f in fields(GPTConfig) if f.name in told})


# --- layers ---------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """nn.Linear whose bias may be float32 beside a bfloat16 weight."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight, bias)


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in its own (float32) precision."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def gelu(x):
    """GPT-2's tanh form, x (1 + tanh u) / 2.

    Compiled as x sigmoid(2 u), the same function, because tanh is slow on a GPU.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate='tanh')
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    two_u = math.sqrt(8 / math.pi) * exact * (1 + 0.044715 * exact * exact)
    return (exact * torch.sigmoid(two_u)).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fp8 = config.fp8
        self.fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):  # (B, T, C)
        if self.fp8 and torch.is_grad_enabled():  # evaluation is in the matrices' own type
            return float8.Float8MLP.apply(x, self.fc.weight, self.proj.weight)
        return self.proj(recomputed(gelu, self.fc(x)))


# --- attention ------------------------------------------------------------------------------------


# An operation of its own: the compiler would move the cosines into the kernels that use them, which
# would compute them anew for each number of each head.
@torch.library.custom_op('nanoprune::rotary_angles', mutates_args=())
def rotary_angles(positions: Tensor, R: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, T, 1, R / 2), for `rotated` at positions (B, T)."""
    half = R // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=positions.device, dtype=dtype) / half)
    angle = positions[:, :, None, None] * frequency
    return angle.cos(), angle.sin()


@rotary_angles.register_fake
def _(positions, R, dtype):
    cos = positions.new_empty(*positions.shape, 1, R // 2, dtype=dtype)
    return cos, torch.empty_like(cos)


def rotated(x, cos, sin):
    """x (B, T, heads, D), its last R numbers turned by rotary embedding (arXiv 2104.09864)."""
    half = cos.size(-1)
    fixed, first, second = x.split([x.size(-1) - 2 * half, half, half], -1)
    first = first.to(cos.dtype)
    second = second.to(cos.dtype)
    turned_first = (first * cos - second * sin).to(x.dtype)
    turned_second = (first * sin + second * cos).to(x.dtype)
    return torch.cat([fixed, turned_first, turned_second], -1)


class Places(NamedTuple):
    """Where the tokens of a forward pass stand, the same for all layers."""
    cos: Tensor | None = None  # (B or 1, T, 1, R / 2) of the rotary angles; None: nothing turns
    sin: Tensor | None = None
    positions: Tensor | None = None  # (B, T) int64, places of a cache
    mask: Tensor | None = None  # (B, 1, H / K T, S), -inf where a token does not see a place


class Cache(NamedTuple):
    """What one layer has read of B texts. A place holds what was put there last."""
    keys: Tensor  # (B, heads, S, width)
    values: Tensor

    def part(self, rows, places):
        """A view of a slice of rows and of one of places."""
        return Cache(self.keys[rows, :, places], self.values[rows, :, places])


class CausalAttention(nn.Module):
    """What both attentions share: the softmax over a whole text, with its reciprocal term."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.window = config.ra_window
        self.alpha = config.ra_alpha or None  # weight of the reciprocal term; None: there is none
        if config.ra_learned:
            self.alpha = nn.Parameter(torch.full((config.n_head,), config.ra_alpha))

    def attend(self, q, k, v):
        """Causal attention of q (B, H, T, D) to k, v (B, K, T, D) -> (B, H, T, D)."""
        dropout = self.dropout if self.dropout and self.training else 0.0
        if self.alpha is not None:
            return reciprocal_attention(q, k, v, self.alpha, self.window, dropout)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True,
                                              enable_gqa=k.size(1) < q.size(1))


def attend_to_cache(q, k, v, cache, places, scale=None):
    """Attention of q (B, H, T, width) to a cache, with new k, v (B, K, T, width) -> as q.

    Heads that share a key head become more queries of it: nothing is copied for them.
    """
    place = places.positions[:, None, :, None]  # the same for all heads and numbers
    keys = cache.keys.scatter_(2, place.expand_as(k), k)  # (B, K, S, width)
    values = cache.values.scatter_(2, place.expand_as(v), v)
    queries = q.reshape(*k.shape[:2], -1, q.size(-1))  # (B, K, H / K T, width)
    y = F.scaled_dot_product_attention(queries, keys, values, places.mask, scale=scale)
    return y.reshape(*q.shape[:3], -1)


class Attention(CausalAttention):
    """Multi-head attention; with fewer key heads than heads, grouped-query (arXiv 2305.13245)."""

    def __init__(self, config):
        super().__init__(config)
        D = config.head_width
        K = config.n_kv_head or config.n_head
        self.head_width = D
        self.heads = [config.n_head, K, K]  # of q, k and v
        self.cached = (K, D, D)  # key heads, widths of keys and values
        self.qkv = Linear(config.n_embd, sum(self.heads) * D, bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, places, cache=None):
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_width)
        q, k, v = heads.split(self.heads, 2)  # (B, T, H, D), (B, T, K, D) twice
        if places.cos is not None:
            q = rotated(q, places.cos, places.sin)
            k = rotated(k, places.cos, places.sin)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, D), (B, K, T, D) twice
        if cache is None:
            y = self.attend(q, k, v)
        else:
            y = attend_to_cache(q, k, v, cache, places)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class LatentAttention(CausalAttention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    All heads share c^K = norm(x W_dk) and c^V = norm(x W_dv), each (T, L). Head h has keys
    c^K A_h^T and values c^V U_h, with A_h (D, L), U_h (L, D). Training expands them, so that fused
    kernels serve; decoding multiplies A and U from the other side, (q_h A_h) . c^K, so that the
    cache holds latents alone. With rotary positions (section 2.1.3) the last R numbers of queries
    and keys are rotary instead; the keys' come straight from x and are the same in all heads.
    """

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        D = config.head_width
        L = config.latent_dim
        R = config.rotary_width
        self.n_head = config.n_head
        self.rotary = R
        self.widths = [C, L, R, L]  # of queries, key latents, rotary keys, value latents
        self.cached = (1, L + R, L)
        self.down = Linear(C, sum(self.widths), bias=config.bias)  # one product is faster than four
        self.key_up = Linear(L, config.n_head * (D - R), bias=False)  # A
        self.value_up = Linear(L, config.n_head * D, bias=False)  # U
        self.key_norm = nn.RMSNorm(L, eps=1e-5)  # arXiv 1910.07467
        self.value_norm = nn.RMSNorm(L, eps=1e-5)
        self.proj = Linear(C, C, bias=config.bias)

    def latents(self, projected, cos, sin):
        """projected (B, T, C + L + R + L) -> q (B, T, H, D), and as the cache holds them, of one
        head: keys (B, T, 1, L + R), c^K and the rotary part, and values c^V (B, T, 1, L)."""
        q, key, rotary_key, value = projected.split(self.widths, -1)
        q = q.unflatten(-1, (self.n_head, -1))
        exact = self.key_norm.weight.dtype
        key = self.key_norm(key.to(exact)).to(q.dtype)[:, :, None]
        value = self.value_norm(value.to(exact)).to(q.dtype)[:, :, None]
        if self.rotary:
            q = rotated(q, cos, sin)
            key = rotated(torch.cat([key, rotary_key[:, :, None]], -1), cos, sin)
        return q, key, value

    def expanded(self, projected, cos, sin):
        """Queries, keys and values of all heads, each (B, H, T, D)."""
        q, key, value = self.latents(projected, cos, sin)
        latent, rotary_key = key.split([key.size(-1) - self.rotary, self.rotary], -1)
        keys = self.key_up(latent).view(*q.shape[:3], -1)
        values = self.value_up(value).view(q.shape)
        if self.rotary:
            keys = torch.cat([keys, rotary_key.expand(*q.shape[:3], -1)], -1)
        return q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)

    def forward(self, x, places, cache=None):
        B, T, C = x.shape
        projected = self.down(x)
        if cache is None:
            # Expanding again in the backward is cheap; what it makes is larger than the latents.
            y = self.attend(*recomputed(self.expanded, projected, places.cos, places.sin))
        else:
            q, key, value = self.latents(projected, places.cos, places.sin)
            A = self.key_up.weight.unflatten(0, (self.n_head, -1))  # (H, D - R, L)
            U = self.value_up.weight.unflatten(0, (self.n_head, -1))  # (H, D, L)
            content, turned = q.split([A.size(1), self.rotary], -1)
            latent = torch.einsum('bthd,hdl->bhtl', content, A)
            absorbed = torch.cat([latent, turned.transpose(1, 2)], -1)  # (B, H, T, L + R)
            y = attend_to_cache(absorbed, key.transpose(1, 2), value.transpose(1, 2), cache, places,
                                scale=q.size(-1) ** -0.5)
            y = torch.einsum('bhtl,hdl->bhtd', y, U)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


ATTENTIONS = {'mha': Attention, 'mla': LatentAttention}


def attention_backend(config, device, dtype):
    """Name of the kernel that runs this model's attention here; 'math' is unfused.

    PyTorch's own dispatcher names it for one row of the real shape. 'flex' is that of the compiled
    model: the window of one that is not compiled is 'math' on a GPU too.
    """
    if config.windowed:
        device_type = torch.device(device).type
        return 'flex' if flex_runs(device_type, dtype, config.head_width) else 'math'
    H = config.n_head
    K = config.n_kv_head if config.attention == 'mha' and config.n_kv_head else H
    D = config.head_width * (2 if config.reciprocal else 1)
    shape = (1, config.block_size, H + 2 * K, D)
    heads = torch.empty(shape, device=device, dtype=dtype, requires_grad=True)
    q, k, v = (part.transpose(1, 2) for part in heads.split([H, K, K], 2))
    choice = torch._fused_sdp_choice(q, k, v, None, config.dropout, True, enable_gqa=K < H)
    return SDPBackend(choice).name.lower().removesuffix('_attention')


# --- the model ------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.norm_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attention = ATTENTIONS[config.attention](config)
        self.norm_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, places, cache=None):  # (B, T, C)
        x = x + self.dropout(self.attention(self.norm_1(x), places, cache))
        return x + self.dropout(self.mlp(self.norm_2(x)))


def run_with_gradients(function, *arguments):
    """Its result, by the graph that is compiled for gradients, also where none are wanted: so that
    evaluation need not wait for a graph of its own."""
    with torch.enable_grad():
        result = function(*arguments)
    return result if torch.is_grad_enabled() else result.detach()


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): pre-norm, head tied to the token embedding."""

    def __init__(self, config):
        super().__init__()
        config.check()
        self.config = config
        self.loss_chunk = loss_chunk
        self.token_embedding = nn.Embedding(config.padded_vocab_size, config.n_embd)
        if config.positions == 'learned':
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = LayerNorm(config.n_embd, bias=config.bias)
        for name, p in self.named_parameters():
            std = 0.02
            if name.endswith('proj.weight'):  # the residual stream sums 2 n_layer of them: keep its
                std /= math.sqrt(2 * config.n_layer)  # variance (GPT-2, section 2.3)
            elif name.endswith('_up.weight'):  # keys and values spread as GPT-2's, whose C inputs
                std *= math.sqrt(config.n_embd / config.latent_dim)  # have variance 1 too
            if p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def hidden(self, idx, positions=None, cache=None):
        """Tokens (B, T) -> the final normalised residual stream (B, T, C).

        With a cache, of new_cache, they stand at positions (B, T) of it, after what it holds.
        """
        c = self.config
        T = idx.size(1)
        if T > c.block_size:
            raise ValueError(f'{T} tokens do not fit in block_size={c.block_size}')
        x = self.token_embedding(idx)  # (B, T, C)
        if c.positions == 'learned':
            embedding = self.position_embedding
            x = x + (embedding.weight[:T] if positions is None else embedding(positions))
        if c.dropout:  # a look at self.training would cost the compiler a graph for evaluation
            x = F.dropout(x, c.dropout, self.training)
        cos = sin = mask = None
        if cache:
            _, K, S, _ = cache[0].keys.shape
            later = torch.arange(S, device=idx.device) > positions[:, None, :, None]  # (B, 1, T, S)
            mask = torch.zeros_like(later, dtype=x.dtype).masked_fill_(later, -math.inf)
            mask = mask.repeat(1, 1, c.n_head // K, 1)  # heads that share a key head are queries
        elif c.rotary_width:
            positions = torch.arange(T, device=idx.device)[None]  # (1, T)
        if c.rotary_width:
            exact = torch.promote_types(self.token_embedding.weight.dtype, torch.float32)
            cos, sin = rotary_angles(positions, c.rotary_width, exact)
        places = Places(cos, sin, positions, mask)
        for n, block in enumerate(self.blocks):
            x = block(x, places, cache[n] if cache else None)
        return self.norm(x)

    def head(self, hidden):
        """(..., C) -> logits (..., vocab_size): no padded row can ever be sampled."""
        logits = hidden @ self.token_embedding.weight.t()  # whole: GPUs like even sizes
        return logits[..., :self.config.vocab_size]

    def forward(self, idx, targets=None):
        """Tokens (B, T) -> logits (B, T, vocab_size); with targets (B, T) the mean loss in nats.

        A target of -1 is not scored.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.head(x)
        c = self.config
        weight = self.token_embedding.weight
        training = torch.is_grad_enabled()
        one_chunk = fastest_chunk(x, self.loss_chunk)
        if c.fp8 and training:
            one_chunk = float8.head(weight)
        arguments = (x.flatten(0, 1), weight, targets.flatten(), c.vocab_size, c.loss_chunk_tokens,
                     one_chunk)
        if training:
            return ChunkedCrossEntropy.apply(*arguments)
        return chunked_loss(*arguments)[0]

    def new_cache(self, rows):
        """An empty Cache for each layer, for `rows` texts of block_size tokens.

        2 C numbers a token and layer, C times 2 K / H of grouped queries, 2 L + R of latents.
        """
        if self.config.reciprocal:
            raise ValueError('reciprocal attention has no cache; read the whole text instead')
        S = self.config.block_size
        heads, key_width, value_width = self.blocks[0].attention.cached
        zeros = self.token_embedding.weight.new_zeros
        return [Cache(zeros(rows, heads, S, key_width), zeros(rows, heads, S, value_width))
                for _ in self.blocks]

    def compile_parts(self):
        """Compile the blocks and, where there is no kernel for it, the loss of a chunk.

        One graph for both would hold all logits: the compiler puts the head's products first.
        """
        # The cache may key by float8's function: it is traced whole, so the key misses nothing.
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        device = self.token_embedding.weight.device
        if self.config.windowed and device.type == 'cuda':
            block_masks(self.config.block_size, self.config.ra_window, device)
        self.hidden = torch.compile(self.hidden, fullgraph=True, dynamic=False)
        if not self.config.dropout and not self.config.fp8:  # which training alone has
            self.hidden = functools.partial(run_with_gradients, self.hidden)
        self.loss_chunk = torch.compile(loss_chunk, fullgraph=True, dynamic=False)

    def uncompile_parts(self):
        self.__dict__.pop('hidden', None)
        self.loss_chunk = loss_chunk

    def parameter_count(self):
        """All of them, with the embedding's padded rows, the tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """FLOPs of forward and backward, one token: 6 a weight that multiplies, 12 n_layer C T of
        attention (PaLM, arXiv 2204.02311, appendix B), 6 n_layer C a token in RA's window."""
        c = self.config
        multiplying = self.parameter_count()
        if c.positions == 'learned':
            multiplying -= self.position_embedding.weight.numel()
        attended = 12 * c.block_size
        if c.reciprocal:
            attended += 6 * (c.ra_window + 1 if c.windowed else c.block_size)
        return 6 * multiplying + c.n_layer * c.n_embd * attended
