"""Reciprocal attention (RA): token i's logit for token j <= i is S_ij + alpha 1[i - j <= W] S_ji.

S_ij = q_i . k_j / sqrt(D). Shapes: B rows, H heads, T tokens, D head width, W window. One formula,
three forms: `wide` where the window cuts nothing, `banded` in the compiled graph of a GPU, `dense`
everywhere else.
"""
import math

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint


def reciprocal_attention(q, k, v, alpha, window, dropout=0.0):
    """Causal attention of q, k, v (B, H, T, D) with the reciprocal term -> (B, H, T, D).

    alpha: a number, or a tensor (H,). window: how many tokens back the term reaches, 0 to the token
    itself, -1 to the first. ValueError for dropout beside a window that cuts.
    """
    if not 0 <= window < q.size(2) - 1:  # it cuts nothing
        return wide(q, k, v, alpha, dropout)
    if dropout:
        raise ValueError('the window of reciprocal attention has no dropout; set ra_window=-1')
    if torch.compiler.is_compiling() and flex_runs(q.device.type, q.dtype, q.size(3)):
        return banded(q, k, v, alpha, window)
    return dense(q, k, v, alpha, window)


def recomputed(function, *arguments):
    """function(*arguments); compiled, the backward computes the result again and keeps none."""
    if torch.compiler.is_compiling():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


def per_head(alpha):
    """alpha, a number or (H,), as a factor of (B, H, T, anything)."""
    return alpha[:, None, None] if torch.is_tensor(alpha) else alpha


def dense(q, k, v, alpha, window):
    """The formula as it is written, with all (B, H, T, T) logits, in at least float32."""
    exact = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(exact) @ k.to(exact).mT / math.sqrt(q.size(3))  # (B, H, T, T)
    token = torch.arange(q.size(2), device=q.device)
    back = token[:, None] - token  # (T, T): i - j
    inside = (back >= 0) & (back <= window)
    logits = logits + torch.where(inside, per_head(alpha) * logits.mT, 0)
    return logits.masked_fill(back < 0, -math.inf).softmax(-1).to(v.dtype) @ v


def widened(q, k, alpha):
    """(q', k'), each (B, H, T, 2 D), with q'_i . k'_j = q_i . k_j + alpha q_j . k_i."""
    wide_q = torch.cat([q, (per_head(alpha) * k).to(q.dtype)], -1)
    return wide_q, torch.cat([k, q], -1)


def wide(q, k, v, alpha, dropout):
    """The term everywhere: plain causal attention of double width."""
    D = q.size(3)
    wide_q, wide_k = recomputed(widened, q, k, alpha)
    wide_v = recomputed(F.pad, v, (0, D))  # zeros: fused kernels want one width for all three
    y = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, is_causal=True, dropout_p=dropout,
                                       scale=D ** -0.5)
    return y[..., :D]


# --- the window, by FlexAttention -----------------------------------------------------------------


def flex_runs(device_type, dtype, head_width):
    """Whether FlexAttention's kernels can: on a GPU, no float64, products of 16 or more numbers."""
    return device_type == 'cuda' and dtype != torch.float64 and head_width >= 16


def banded(q, k, v, alpha, window):
    """The band i - j <= W in double width and the rest plain, merged by their log-sum-exp.

    At T = 1024, W = 64 the band touches 15 of the 36 causal blocks of 128 x 128.
    """
    band_mask, rest_mask = block_masks(q.size(2), window, q.device)
    wide_q, wide_k = recomputed(widened, q, k, alpha)
    told = dict(scale=q.size(3) ** -0.5, return_aux=AuxRequest(lse=True))
    band, of_band = flex_attention(wide_q, wide_k, v, block_mask=band_mask, **told)
    rest, of_rest = flex_attention(q, k, v, block_mask=rest_mask, **told)
    # Where the rest is empty its log-sum-exp is -inf, and its share and that share's derivative
    # are exactly 0. The band is never empty: it holds the diagonal.
    share = torch.sigmoid(of_rest.lse - of_band.lse)[..., None]  # (B, H, T, 1)
    return (band + share * (rest.to(share.dtype) - band)).to(band.dtype)


MASKS = {}  # (T, window, device) -> (band, rest)


def block_masks(T, window, device):
    """FlexAttention's masks of the band i - j <= window and of the rest of the causal triangle.

    A compiled model must find them here (GPT.compile_parts sees to it), or each call builds them.
    """
    if (T, window, device) in MASKS:
        return MASKS[T, window, device]

    def band(b, h, i, j):
        return (i >= j) & (i - j <= window)

    def rest(b, h, i, j):
        return i - j > window

    masks = tuple(create_block_mask(m, None, None, T, T, device=device) for m in (band, rest))
    if not torch.compiler.is_compiling():
        MASKS[T, window, device] = masks
    return masks
