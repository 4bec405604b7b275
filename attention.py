"""Attention: multi-head (MHA), latent (MLA), either with a reciprocal term (RA), and the cache they decode from.

Shapes: B batch, T new tokens, C width (n_embd), H heads, D head width (C / H), L latent width, R rotary part of D, S tokens in
all, W window.
The logits of token i for token j <= i are S_ij = q_i . k_j times the scale; RA makes them S_ij + alpha 1[i - j <= W] S_ji.
"""
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from reciprocal import FUSED, dense_reciprocal, fused_runs, kernel_choice, per_head, widened, windowed


class Linear(nn.Linear):
    """nn.Linear whose bias may be float32 beside a bfloat16 weight."""

    def forward(self, x):
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """x / root mean square, times a gain (arXiv 1910.07467), computed in the gain's (float32) precision."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, 1e-5).to(x.dtype)


def recomputed(function, *arguments):
    """function(*arguments); compiled, its backward computes the result again instead of keeping it."""
    if torch.compiler.is_compiling():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


def rotated_end(x, positions, R):
    """x (B, H, T, D) with its last R numbers, R even, as rotary embedding (arXiv 2104.09864) turns them at positions (B, T) or (T,)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    frequency = 1e4 ** (-torch.arange(R // 2, device=x.device, dtype=exact) / (R // 2))
    angle = positions[..., None, :, None] * frequency  # ([B,] 1, T, R / 2)
    (a, b), cos, sin = x[..., -R:].to(exact).chunk(2, -1), angle.cos(), angle.sin()
    return torch.cat([x[..., :-R], (a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)], -1)


# --- attention of a whole text: training, evaluation -------------------------------------------------


def attend(q, k, v, alpha=None, window=-1, scale=None, dropout=0.0):
    """Causal attention of q, k, v (B, H, T, D) -> (B, H, T, D).

    alpha: weight of the reciprocal term, a number or a tensor (H,); None: none. window: how far back it reaches, 0: to the
    token itself, -1: to the first. scale: of the logits, None: 1/sqrt(D). With a window that cuts, dropout must be 0.
    """
    if alpha is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scale)
    T, D = q.shape[-2:]
    scale = scale or D ** -0.5
    if window < 0 or window >= T - 1:
        wide_v = recomputed(F.pad, v, (0, D))  # filled up with zeros, for fused kernels want one width for all three
        y = F.scaled_dot_product_attention(*recomputed(widened, q, k, alpha), wide_v, is_causal=True, dropout_p=dropout, scale=scale)
        return y[..., :D]
    if dropout:
        raise ValueError(f'dropout={dropout} window={window}: the kernels of the window have no dropout')
    if not fused_runs(q.device.type, q.dtype, D):
        return dense_reciprocal(q, k, v, alpha, window, scale)
    weight = alpha if torch.is_tensor(alpha) else torch.full((q.size(1),), alpha, device=q.device)
    return windowed(q, k, v, weight, window, scale)[0].transpose(1, 2)


def is_reciprocal(config):
    return config.ra_learned or config.ra_alpha != 0


def has_window(config):
    """Whether RA's window cuts anything off."""
    return is_reciprocal(config) and 0 <= config.ra_window < config.block_size - 1


def attention_backend(config, batch_size, device, dtype):
    """Name of the kernels that run this model's attention here: 'flash', 'cudnn', 'windowed, cudnn' ..., or 'math', unfused.

    Asks PyTorch's own dispatcher with tensors of the real shapes, so it is what runs, not what was hoped for.
    """
    B, T, H, D = batch_size, config.block_size, config.n_head, config.n_embd // config.n_head
    if not has_window(config):
        return kernel_name(B, T, H, 2 * D if is_reciprocal(config) else D, device, dtype, config.dropout)
    beyond = kernel_name(B, T - config.ra_window - 1, H, D, device, dtype, 0.0)
    return f'windowed, {beyond}' if fused_runs(torch.device(device).type, dtype, D) and beyond in FUSED else 'math'


def kernel_name(B, T, H, D, device, dtype, dropout):
    q, k, v = torch.empty((B, T, 3, H, D), device=device, dtype=dtype, requires_grad=True).permute(2, 0, 3, 1, 4)
    return kernel_choice(q, k, v, dropout)


# --- the modules -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention. With `layer`, a dict of Cache.layers, and `step` it reads and extends the cache."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout, self.window, self.scale = config.n_head, config.dropout, config.ra_window, None
        self.build(config)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        if config.ra_learned:
            self.alpha = nn.Parameter(torch.full((config.n_head,), config.ra_alpha))
        else:
            self.alpha = config.ra_alpha or None

    def build(self, config):
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)

    def project(self, x):
        """x (B, T, C) -> queries, keys and values, each (B, H, T, D)."""
        B, T, C = x.shape
        return self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)

    def placed(self, q, k, positions):
        """Queries and keys of project(), at positions (B, T) or (T,) -> the same with what tells their positions."""
        return q, k

    def expanded(self, q, k, v, positions):
        """What project() gives -> queries, keys and values, each (B, H, T, D)."""
        return q, k, v

    def cached(self, k, v):
        """Keys and values of project() -> as the cache holds them."""
        return k, v

    def keys(self, k):
        """Keys as the cache holds them -> (B, H, T, D)."""
        return k

    def values(self, v):
        """Values as the cache holds them -> (B, H, T, D)."""
        return v

    def absorb(self, q):
        """Queries (B, H, T, D) -> those that the cached keys are multiplied with."""
        return q

    def release(self, y):
        """A mean of cached values -> (B, H, T, D)."""
        return y

    def forward(self, x, layer=None, step=None):  # (B, T, C)
        q, k, v = self.project(x)
        if layer is None:
            positions = torch.arange(x.size(1), device=x.device)
            y = attend(*self.expanded(q, k, v, positions), self.alpha, self.window, self.scale, self.dropout if self.training else 0.0)
        else:
            q, k = self.placed(q, k, step.positions)
            y = self.decode(q, *self.cached(k, v), layer, step)
        y = self.proj(y.transpose(1, 2).reshape(x.shape))
        return F.dropout(y, self.dropout, self.training)

    def decode(self, q, k, v, layer, step):
        """Attention of new queries (B, H, T, D) to all that the cache then holds -> (B, H, T, D)."""
        put(layer['keys'], k, step.positions, step.column)
        put(layer['values'], v, step.positions, step.column)
        if step.causal:
            return attend(q, self.keys(k), self.values(v), scale=self.scale)
        mask, scale = step.allowed, self.scale or q.size(-1) ** -0.5
        if self.alpha is not None:
            mask = self.reciprocal_logits(q, self.keys(k), layer, step, scale).masked_fill(~step.allowed, -math.inf)
            put(layer['queries'], q, step.ring.slot, step.ring.column)
        keys, values = layer['keys'][:, :, :step.end], layer['values'][:, :, :step.end]
        B, H, T, _ = q.shape
        held = keys.size(1)  # heads; 1 of MLA's latents, whose heads are more queries of it
        if mask is not None:
            mask = mask.expand(B, H, T, step.end).reshape(B, held, -1, step.end)
        y = F.scaled_dot_product_attention(self.absorb(q).reshape(B, held, -1, keys.size(-1)), keys, values, mask, scale=scale)
        return self.release(y.reshape(B, H, T, -1))

    def reciprocal_logits(self, q, k, layer, step, scale):
        """alpha S_ji of the new tokens i (q, k: (B, H, T, D)) and all tokens j: (B, H, T, end), 0 outside the window."""
        logits = k @ torch.cat([layer['queries'], q], 2).mT * scale  # (B, H, T, ring + T): of the queries that are known
        source = step.ring.source[:, None, None].expand(*q.shape[:3], -1)
        return torch.where(step.ring.band, per_head(self.alpha) * logits.gather(-1, source), 0).to(q.dtype)


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    All heads share c^K = norm(x W_dk) and c^V = norm(x W_dv), each (T, L). Head h has keys K_h = c^K A_h^T and values
    V_h = c^V U_h, with A_h (D, L), U_h (L, D). A whole text expands them and is attended to as ever; decoding
    turns that round, (q_h A_h) . c^K and then U_h, so that the cache need hold c^K and c^V alone. With a rotary part (section 2.1.3)
    the last R numbers of queries and keys are rotary instead; those of the keys come straight from x and are the same in all heads.
    """

    def build(self, config):
        C, L, R, D = config.n_embd, config.latent_dim, config.latent_rotary, config.n_embd // config.n_head
        self.latent_dim, self.rotary = L, R
        self.key_heads, self.value_heads = (config.n_head if own else 1 for own in (config.per_head_q_latent, config.per_head_v_up))
        self.down = Linear(C, C + L + R + L, bias=config.bias)  # W_q, W_dk and the rotary keys', W_dv in one product
        self.key_up = Linear(L, self.key_heads * (D - R), bias=False)  # A
        self.value_up = Linear(L, self.value_heads * D, bias=False)  # U
        self.key_norm = RMSNorm(L) if config.latent_norm else nn.Identity()
        self.value_norm = RMSNorm(L) if config.latent_norm else nn.Identity()
        if config.latent_scale:
            self.scale = L ** -0.5

    def project(self, x):
        """x (B, T, C) -> queries (B, H, T, D); key latents before their norm, then the rotary keys, (B, 1, T, L + R); value latents
        before theirs (B, 1, T, L)."""
        B, T, C = x.shape
        q, k, v = self.down(x).split([C, self.latent_dim + self.rotary, self.latent_dim], -1)
        return q.view(B, T, self.n_head, -1).transpose(1, 2), k[:, None], v[:, None]

    def placed(self, q, k, positions):
        return (rotated_end(q, positions, self.rotary), rotated_end(k, positions, self.rotary)) if self.rotary else (q, k)

    def cached(self, k, v):
        latent, rotary = k.split([self.latent_dim, self.rotary], -1)
        return torch.cat([self.key_norm(latent), rotary], -1) if self.rotary else self.key_norm(latent), self.value_norm(v)

    def expanded(self, q, k, v, positions):
        def expand(q, k, v, positions):
            q, k = self.placed(q, k, positions)
            k, v = self.cached(k, v)
            return q, self.keys(k), self.values(v)
        return recomputed(expand, q, k, v, positions)  # cheap to make again, and much larger than the latents

    def expand(self, latent, up, heads):
        """c (B, 1, T, L) -> (B, H, T, width of a head) by `up`, which makes as many heads; one is repeated for all."""
        B, _, T, _ = latent.shape
        x = up(latent[:, 0]).view(B, T, heads, -1)  # (B, T, H, D), or (B, T, 1, D)
        if heads < self.n_head:
            x = x.repeat(1, 1, self.n_head, 1)  # not expanded: not every fused kernel takes a stride of 0
        return x.transpose(1, 2)

    def keys(self, k):
        latent, rotary = k.split([self.latent_dim, self.rotary], -1)
        keys = self.expand(latent, self.key_up, self.key_heads)
        return torch.cat([keys, rotary.expand(-1, self.n_head, -1, -1)], -1) if self.rotary else keys

    def values(self, v):
        return self.expand(v, self.value_up, self.value_heads)

    def absorb(self, q):
        content, rotary = q.split([q.size(-1) - self.rotary, self.rotary], -1)
        latent = torch.einsum('bhtd,hdl->bhtl', content, self.key_up.weight.view(self.key_heads, -1, self.latent_dim))  # d: D - R
        return torch.cat([latent, rotary], -1) if self.rotary else latent

    def release(self, y):
        return torch.einsum('bhtl,hdl->bhtd', y, self.value_up.weight.view(self.value_heads, -1, self.latent_dim))


def up_std(config):
    """Standard deviation of A and U at the start, which gives keys and values the spread that GPT-2's have.

    There the input of a block is normalised, so that a key has the variance 0.02^2 C. Here a key has that of L latents
    times std^2: latents have the variance 1 after a norm, and without it the 0.02^2 C of a projection. (latent_scale,
    the reference's, makes the logits smaller by sqrt(D / L), as it did there.)
    """
    return 0.02 * math.sqrt(config.n_embd / config.latent_dim) if config.latent_norm else config.latent_dim ** -0.5


# --- the cache ---------------------------------------------------------------------------------------


class Ring(NamedTuple):
    """What RA needs of a step. Slot p % W of the ring holds the query of position p, of the last W positions."""
    band: Any  # (B, 1, T, end) bool: 0 <= i - j <= W
    source: Any  # (B, end) int64: where the query of position j is among [ring, new]
    slot: Any  # (B, min(T, W)) int64: slots in the ring of the new queries that stay
    column: Any  # and their places among the new


class Step(NamedTuple):
    """Where T new tokens of each row belong, the same for all layers. All on the device."""
    positions: Any  # (B, T) int64; filling has the position of the last real token
    column: Any  # (B, T) int64: places of the tokens among the new ones, again of the last real one for filling; None: no filling
    end: int  # places of the cache that are looked at, at least those in use by the longest row
    allowed: Any  # (B, 1, T, end) bool: token i may see token j; None: all, or those up to it (causal)
    causal: bool  # nothing was read before, and no RA
    ring: Ring | None
    lengths: Any = None  # (B,) on the CPU: Cache.lengths after the step; None: the caller counts


def put(held, new, slot, column):
    """held[b, :, slot[b, m]] = new[b, :, column[b, m]], of held (B, H, places, D), new (B, H, T, D); column None: m itself."""
    def wide(index):  # (B, M) -> (B, H, M, D)
        return index[:, None, :, None].expand(-1, new.size(1), -1, new.size(3))
    held.scatter_(2, wide(slot), new if column is None else new.gather(2, wide(column)))


@dataclass
class Cache:
    """What B texts have read so far, room for block_size tokens each. No gradients flow through it.

    layers: a dict a layer: keys, values (B, H, block_size, D), of MLA the latents, (B, 1, block_size, L + R) and
    (B, 1, block_size, L); with RA also queries (B, H, W, D). lengths: (B,) int64 on the CPU, tokens read of each text;
    setting one to 0 forgets that text.
    """
    lengths: torch.Tensor
    layers: list
    block_size: int
    window: int  # of RA in tokens; -1: no RA

    def bytes(self):
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.values())

    def plan(self, idx, counts):
        """The Step of new tokens (B, T), of which counts (B,) a row, 1 or more, are real and the rest filling at the end."""
        (rows, T), device = idx.shape, idx.device
        if rows != len(self.lengths):
            raise ValueError(f'{rows} rows of tokens, but the cache is for {len(self.lengths)}')
        counts = torch.full_like(self.lengths, T) if counts is None else counts
        after = self.lengths + counts
        if after.max() > self.block_size:
            raise ValueError(f'{int(after.max())} tokens do not fit in block_size={self.block_size}')
        if counts.min() < 1 or counts.max() > T:
            raise ValueError(f'counts={counts.tolist()}: each row must have 1 to {T} tokens')
        end = int(after.max())
        causal = self.window < 0 and T == end > 1 and not self.lengths.any()
        masked = not causal and (T > 1 or int(after.min()) < end)
        step = self.step(self.lengths.to(device), counts.to(device), T, end, bool(counts.min() < T), masked, causal)
        return step._replace(lengths=after)

    def step(self, lengths, counts, T, end, filled=False, masked=True, causal=False):
        """The Step of T tokens a row, `counts` of them real, after `lengths`, (B,) each, with nothing read back from their device."""
        place, key, ring = torch.arange(T, device=lengths.device), torch.arange(end, device=lengths.device), None
        column = place.minimum(counts[:, None] - 1)
        positions = lengths[:, None] + column  # (B, T)
        earlier = positions[:, None, :, None] - key  # (B, 1, T, end): i - j
        if (W := self.window) >= 0:
            new = key - lengths[:, None]  # (B, end): place among the new tokens, negative if it is not one of them
            source = torch.where(new >= 0, W + new, key % max(W, 1)).clamp(max=W + T - 1)
            last = (counts[:, None] - 1 - place[:W]).clamp(min=0)  # (B, min(T, W)): of the new ones, from the end
            ring = Ring((earlier >= 0) & (earlier <= W), source, (lengths[:, None] + last) % max(W, 1), last)
        return Step(positions, column if filled else None, end, earlier >= 0 if masked or ring else None, causal, ring)


def new_cache(config, rows, device, dtype):
    """An empty Cache for `rows` texts: 2 C numbers a token and layer, of MLA 2 L + R; with RA also W C a layer and text."""
    S, H, D = config.block_size, config.n_head, config.n_embd // config.n_head
    keys = values = (rows, H, S, D)
    if config.attention == 'mla':
        keys, values = (rows, 1, S, config.latent_dim + config.latent_rotary), (rows, 1, S, config.latent_dim)
    window = -1 if not is_reciprocal(config) else min(config.ra_window, S) if config.ra_window >= 0 else S
    shapes = {'keys': keys, 'values': values, **({'queries': (rows, H, window, D)} if window >= 0 else {})}
    layers = [{name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in shapes.items()} for _ in range(config.n_layer)]
    return Cache(torch.zeros(rows, dtype=torch.int64), layers, S, window)
