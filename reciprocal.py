"""Reciprocal attention (RA): the logit of token i for token j <= i is S_ij + alpha 1[i - j <= W] S_ji, with S_ij = q_i . k_j.

Shapes: B batch, H heads, T time, D head width, W window, R = T - W - 1 rows that look beyond the window. With a window, two
kernels share the work. Beyond it row i sees the keys j < i - W: that is plain causal attention of q[W + 1:] to k[:R], which
PyTorch's fused kernels do. The band i - j <= W and the merging of both are a kernel of ours. Backwards each part is given the
output and the log-sum-exp of the whole, which makes its gradients those of the whole (as FlashAttention's backward is told the
softmax's denominator, arXiv 2307.08691, algorithm 2), so that neither needs the gradient of the other's log-sum-exp.
"""
import math

import torch
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without
    triton = None

aten = torch.ops.aten


def per_head(alpha):
    """alpha, a number or (H,), as a factor of (B, H, T, anything)."""
    return alpha[:, None, None] if torch.is_tensor(alpha) else alpha


def widened(q, k, alpha):
    """(q', k'), each (B, H, T, 2D), with q'_i . k'_j = q_i . k_j + alpha q_j . k_i."""
    return torch.cat([q, (per_head(alpha) * k).to(q.dtype)], -1), torch.cat([k, q], -1)


def dense_reciprocal(q, k, v, alpha, window, scale):
    """Reciprocal attention by its formula, with all (B, H, T, T) logits: the CPU's, and what the fused one is tested against."""
    q, k = exactly(q, k)
    logits, back = q @ k.mT * scale, steps_back(q)  # (B, H, T, T), (T, T)
    logits = logits + torch.where((back >= 0) & (back <= window), per_head(alpha) * logits.mT, 0)
    return logits.masked_fill(back < 0, -math.inf).softmax(-1).to(v.dtype) @ v


def steps_back(q):
    """(T, T): i - j."""
    token = torch.arange(q.size(-2), device=q.device)
    return token[:, None] - token


def band_logits(q, k, alpha, window, scale):
    """(B, H, T, T): the logits with the reciprocal term, -inf outside 0 <= i - j <= window."""
    plain, back = q @ k.mT * scale, steps_back(q)
    return (plain + per_head(alpha) * plain.mT).masked_fill((back < 0) | (back > window), -math.inf)


def fused_runs(device_type, dtype, head_width):
    """True if the kernel of the window can do it: Triton on a GPU, heads of a power of two from 16 to 256, no float64."""
    return device_type == 'cuda' and triton is not None and head_width in (16, 32, 64, 128, 256) and dtype != torch.float64


# --- the window as one operation of the model's graph ------------------------------------------------


@torch.library.custom_op('nanoprune::windowed', mutates_args=())
def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor, window: int,
             scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Reciprocal attention of q, k, v (B, H, T, D), alpha (H,), 0 <= window < T - 1 -> (B, T, H, D), log-sum-exp (B, H, T)."""
    R = q.size(2) - window - 1
    far, far_lse = far_forward(q[:, :, window + 1:], k[:, :, :R], v[:, :, :R], scale)
    return (band_forward if q.is_cuda else band_forward_plain)(q, k, v, alpha, far, far_lse, window, scale)


@torch.library.custom_op('nanoprune::windowed_backward', mutates_args=())
def windowed_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor, out: torch.Tensor,
                      lse: torch.Tensor, window: int, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k, v, each (B, T, H, D), and of alpha (H,)."""
    R = q.size(2) - window - 1
    far = far_backward(grad.transpose(1, 2)[:, :, window + 1:], q[:, :, window + 1:], k[:, :, :R], v[:, :, :R],
                       out.transpose(1, 2)[:, :, window + 1:], lse[:, :, window + 1:], scale)
    return (band_backward if q.is_cuda else band_backward_plain)(grad, q, k, v, alpha, out, lse, far, window, scale)


def of_tokens(q):
    """An empty (B, T, H, D) for a (B, H, T, D)."""
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D)


@windowed.register_fake
def _(q, k, v, alpha, window, scale):
    return of_tokens(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@windowed_backward.register_fake
def _(grad, q, k, v, alpha, out, lse, window, scale):
    return of_tokens(q), of_tokens(q), of_tokens(q), torch.empty_like(alpha)


def keep_for_backward(ctx, inputs, output):
    q, k, v, alpha, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, alpha, *output)
    ctx.mark_non_differentiable(output[1])


def gradients(ctx, grad, _):
    *of_qkv, of_alpha = windowed_backward(grad.contiguous(), *ctx.saved_tensors, ctx.window, ctx.scale)
    return *(x.transpose(1, 2) for x in of_qkv), of_alpha, None, None


windowed.register_autograd(gradients, setup_context=keep_for_backward)


# --- beyond the window: causal attention, R tokens to R tokens ---------------------------------------


def far_forward(q, k, v, scale):
    """Causal attention of (B, H, R, D), by the kernel PyTorch would choose -> (B, R, H, D), log-sum-exp (B, H, R)."""
    choice = kernel_choice(q, k, v, scale=scale) if q.is_cuda else 'math'  # on a CPU: the tests
    if choice == 'cudnn':
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    elif choice == 'flash':
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    elif choice == 'memory-efficient':
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scale)
    else:
        q, k, v, dtype = *exactly(q, k, v), q.dtype
        out, lse = part(band_logits(q, k, 0.0, q.size(2), scale), v)
        out = out.to(dtype)
    return out.transpose(1, 2).contiguous(), lse.flatten(2)[..., :q.size(2)].contiguous()  # the efficient one fills up with rows


def far_backward(grad, q, k, v, out, lse, scale):
    """grad, q, k, v, out (B, H, R, D) and lse (B, H, R), those of the whole -> gradients of q, k, v, each (B, R, H, D)."""
    choice, R = kernel_choice(q, k, v, scale=scale) if q.is_cuda else 'math', q.size(2)
    lse = lse.contiguous()
    seed, offset = torch.zeros(2, dtype=torch.int64, device=q.device).unbind()  # of a dropout that is not there
    if choice == 'cudnn':
        found = aten._scaled_dot_product_cudnn_attention_backward(grad, q, k, v, out, lse[..., None], seed, offset, None, None, None, R, R,
                                                                  0.0, True, scale=scale)
    elif choice == 'flash':
        found = aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, lse, None, None, R, R, 0.0, True, seed, offset,
                                                                  scale=scale)
    elif choice == 'memory-efficient':
        if not torch.version.hip:  # there its kernel takes R rows as they are
            lse = F.pad(lse, (0, -R % 32), value=math.inf)
        *found, _ = aten._scaled_dot_product_efficient_attention_backward(grad, q, k, v, None, out, lse, seed, offset, 0.0,
                                                                          [True, True, True, False], True, scale=scale)
    else:
        grad, q, k, v, out, dtype = *exactly(grad, q, k, v, out), q.dtype
        ds, dv = part_backward(band_logits(q, k, 0.0, R, scale), v, grad, out, lse)
        found = [x.to(dtype) for x in (ds @ k * scale, ds.mT @ q * scale, dv)]
    return [x.transpose(1, 2).contiguous() for x in found]


FUSED = ('flash', 'memory-efficient', 'cudnn')


def kernel_choice(q, k, v, dropout=0.0, scale=None):
    """The kernel that PyTorch's dispatcher runs causal attention of (B, H, T, D) with: one of FUSED, 'math' ..."""
    choice = int(torch._fused_sdp_choice(q, k, v, None, dropout, True, scale=scale))
    return dict(enumerate(('math', *FUSED))).get(choice, f'unknown ({choice})')  # torch.nn.attention.SDPBackend


# --- the band, in plain PyTorch: what its kernels are tested against ---------------------------------


def exactly(*tensors):
    """The same in at least float32."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def part(logits, v):
    """Attention by the logits (B, H, T, S), some of them -inf, and its log-sum-exp."""
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp() @ v, lse


def part_backward(logits, v, grad, out, lse):
    """Gradients of the logits (B, H, T, S) and of v, if `out` and lse are of all that the rows see."""
    shares = (logits - lse[..., None]).exp()
    return shares * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)), shares.mT @ grad


def band_forward_plain(q, k, v, alpha, far, far_lse, window, scale):
    q, k, v, far, dtype = *exactly(q, k, v, far), q.dtype
    of_band, lse = part(band_logits(q, k, alpha, window, scale), v)
    far, far_lse = F.pad(far, (0, 0, 0, 0, window + 1, 0)), F.pad(far_lse, (window + 1, 0), value=-math.inf)
    merged = torch.logaddexp(lse, far_lse)
    out = of_band * (lse - merged).exp()[..., None] + far.transpose(1, 2) * (far_lse - merged).exp()[..., None]
    return out.to(dtype).transpose(1, 2).contiguous(), merged


def band_backward_plain(grad, q, k, v, alpha, out, lse, far, window, scale):
    grad, q, k, v, out, dtype = *exactly(grad, q, k, v, out), q.dtype
    ds, dv = part_backward(band_logits(q, k, alpha, window, scale), v, grad.transpose(1, 2), out.transpose(1, 2), lse)
    ds, weight = ds * scale, per_head(alpha)
    reciprocal = ds @ q  # (B, H, T, D): its product with k_i is the logits' derivative by alpha
    found = [ds @ k + weight * (ds.mT @ k), ds.mT @ q + weight * reciprocal, dv]
    found = [x.transpose(1, 2).contiguous() for x in found]
    found[0][:, window + 1:] += far[0]
    for mine, theirs in zip(found[1:], far[1:]):
        mine[:, :q.size(2) - window - 1] += theirs
    return *(x.to(dtype) for x in found), (k * reciprocal).sum((0, 2, 3)).to(alpha.dtype)


# --- the band on a GPU -------------------------------------------------------------------------------


def token_rows(x):
    """(B, H, T, D) with the heads of a token side by side, and the numbers from one token to the next."""
    B, H, T, D = x.shape
    stride = x.stride(2)
    if x.stride() != (T * stride, D, stride, 1):
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
        stride = H * D
    return x, stride


def launch(kernel, q, k, v, alpha, *others, window, scale):
    B, H, T, D = q.shape
    (q, stride_q), (k, stride_k), (v, stride_v) = token_rows(q), token_rows(k), token_rows(v)
    block = 64 if D * q.element_size() <= 128 else 32 if D * q.element_size() <= 512 else 16  # more than that spills registers
    kernel[triton.cdiv(T, block), B * H](q, k, v, alpha.float(), *others, stride_q, stride_k, stride_v, T, H, window, scale,
                                         BLOCK=block, D=D, num_warps=4, num_stages=1)


def band_forward(q, k, v, alpha, far, far_lse, window, scale):
    out, lse = of_tokens(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    launch(band_kernel, q, k, v, alpha, far, far_lse, out, lse, window=window, scale=scale)
    return out, lse


def band_backward(grad, q, k, v, alpha, out, lse, far, window, scale):
    found = [of_tokens(q) for _ in range(3)]
    by_alpha = q.new_zeros(*q.shape[:2], -(-q.size(2) // 16), dtype=torch.float32)  # (B, H, blocks, of 16 or more tokens)
    launch(band_backward_kernel, q, k, v, alpha, grad, out, lse, *far, *found, by_alpha, by_alpha.size(2),
           window=window, scale=scale)
    return *found, by_alpha.sum((0, 2)).to(alpha.dtype)


if triton:
    @triton.jit
    def rows(matrix, stride, token, T, D: tl.constexpr):
        """(BLOCK, D): some tokens' numbers of one head, 0 where there is no such token."""
        return tl.load(matrix + token[:, None] * stride + tl.arange(0, D)[None, :], mask=((token >= 0) & (token < T))[:, None], other=0.0)

    @triton.jit
    def times(a, b):
        return tl.dot(a, b, input_precision='ieee')

    @triton.jit
    def logits_of(q_i, k_i, i, q_j, k_j, j, weight, window, scale):
        """(BLOCK, BLOCK): of tokens i for tokens j, -inf outside the band."""
        logits = (times(q_i, tl.trans(k_j)) + weight * times(k_i, tl.trans(q_j))) * scale
        back = i[:, None] - j[None, :]
        return tl.where((back >= 0) & (back <= window), logits, -float('inf'))

    @triton.jit
    def band_kernel(q, k, v, alpha, far, far_lse, out, lse, stride_q, stride_k, stride_v, T, H, window, scale,
                    BLOCK: tl.constexpr, D: tl.constexpr):
        """One program a block of tokens and head: its band, block after block backwards, then merged with what lies beyond."""
        block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
        b, h, R = row // H, row % H, T - window - 1
        q, k, v = q + b * T * stride_q + h * D, k + b * T * stride_k + h * D, v + b * T * stride_v + h * D
        weight, i = tl.load(alpha + h), block * BLOCK + tl.arange(0, BLOCK)
        q_i, k_i = rows(q, stride_q, i, T, D), rows(k, stride_k, i, T, D)
        highest, total = tl.full([BLOCK], -float('inf'), tl.float32), tl.zeros([BLOCK], tl.float32)
        y = tl.zeros([BLOCK, D], tl.float32)
        for back in range(0, tl.minimum(block, tl.cdiv(window, BLOCK)) + 1):  # from the diagonal on: no row of it is empty
            j = i - back * BLOCK
            v_j = rows(v, stride_v, j, T, D)
            logits = logits_of(q_i, k_i, i, rows(q, stride_q, j, T, D), rows(k, stride_k, j, T, D), j, weight, window, scale)
            before = highest
            highest = tl.maximum(before, tl.max(logits, 1))
            shares, kept = tl.exp(logits - highest[:, None]), tl.exp(before - highest)
            total = total * kept + tl.sum(shares, 1)
            y = y * kept[:, None] + times(shares.to(v_j.dtype), v_j)
        of_band, beyond = highest + tl.log(total), i - window - 1
        of_far = tl.load(far_lse + row * R + beyond, mask=(beyond >= 0) & (i < T), other=-float('inf'))
        top = tl.maximum(of_band, of_far)
        merged = top + tl.log(tl.exp(of_band - top) + tl.exp(of_far - top))
        y = y * (tl.exp(of_band - merged) / total)[:, None]
        y += rows(far + b * R * H * D + h * D, H * D, beyond, R, D) * tl.exp(of_far - merged)[:, None]
        tl.store(out + ((b * T + i[:, None]) * H + h) * D + tl.arange(0, D)[None, :], y.to(out.dtype.element_ty), mask=(i < T)[:, None])
        tl.store(lse + row * T + i, merged, mask=i < T)

    @triton.jit
    def slopes(q_i, k_i, grad_i, out_i, lse_i, i, q_j, k_j, v_j, j, weight, T, window, scale):
        """(BLOCK, BLOCK) each: tokens i's shares of tokens j, and the gradient of their products."""
        shares = tl.where((i < T)[:, None], tl.exp(logits_of(q_i, k_i, i, q_j, k_j, j, weight, window, scale) - lse_i[:, None]), 0.0)
        mean = tl.sum(grad_i.to(tl.float32) * out_i.to(tl.float32), 1)
        return shares.to(q_i.dtype), (shares * (times(grad_i, tl.trans(v_j)) - mean[:, None]) * scale).to(q_i.dtype)

    @triton.jit
    def band_backward_kernel(q, k, v, alpha, grad, out, lse, far_q, far_k, far_v, grad_q, grad_k, grad_v, by_alpha, alpha_blocks,
                             stride_q, stride_k, stride_v, T, H, window, scale, BLOCK: tl.constexpr, D: tl.constexpr):
        """One program a block of tokens and head: what they get as those who look back, then as those looked at."""
        block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
        b, h, R, C = row // H, row % H, T - window - 1, H * D
        q, k, v = q + b * T * stride_q + h * D, k + b * T * stride_k + h * D, v + b * T * stride_v + h * D
        grad, out, lse = grad + b * T * C + h * D, out + b * T * C + h * D, lse + row * T
        weight, t = tl.load(alpha + h), block * BLOCK + tl.arange(0, BLOCK)
        q_t, k_t, v_t = rows(q, stride_q, t, T, D), rows(k, stride_k, t, T, D), rows(v, stride_v, t, T, D)
        grad_t, out_t, lse_t = rows(grad, C, t, T, D), rows(out, C, t, T, D), tl.load(lse + t, mask=t < T, other=0.0)
        dq, reciprocal, dv = tl.zeros([BLOCK, D], tl.float32), tl.zeros([BLOCK, D], tl.float32), tl.zeros([BLOCK, D], tl.float32)
        reach = tl.cdiv(window, BLOCK)
        for back in range(0, tl.minimum(block, reach) + 1):
            j = t - back * BLOCK
            q_j, k_j, v_j = rows(q, stride_q, j, T, D), rows(k, stride_k, j, T, D), rows(v, stride_v, j, T, D)
            shares, slope = slopes(q_t, k_t, grad_t, out_t, lse_t, t, q_j, k_j, v_j, j, weight, T, window, scale)
            dq += times(slope, k_j)
            reciprocal += times(slope, q_j)
        tl.store(by_alpha + row * alpha_blocks + block, tl.sum(reciprocal * k_t.to(tl.float32)))
        dk = weight * reciprocal
        for ahead in range(0, tl.minimum(tl.cdiv(T, BLOCK) - 1 - block, reach) + 1):
            i = t + ahead * BLOCK
            q_i, k_i, grad_i = rows(q, stride_q, i, T, D), rows(k, stride_k, i, T, D), rows(grad, C, i, T, D)
            lse_i = tl.load(lse + i, mask=i < T, other=0.0)
            shares, slope = slopes(q_i, k_i, grad_i, rows(out, C, i, T, D), lse_i, i, q_t, k_t, v_t, t, weight, T, window, scale)
            dv += times(tl.trans(shares), grad_i)
            dk += times(tl.trans(slope), q_i)
            dq += weight * times(tl.trans(slope), k_i)
        at = b * R * C + h * D
        dq += rows(far_q + at, C, t - window - 1, R, D)
        dk += rows(far_k + at, C, t, R, D)
        dv += rows(far_v + at, C, t, R, D)
        at = ((b * T + t[:, None]) * H + h) * D + tl.arange(0, D)[None, :]
        tl.store(grad_q + at, dq.to(grad_q.dtype.element_ty), mask=(t < T)[:, None])
        tl.store(grad_k + at, dk.to(grad_k.dtype.element_ty), mask=(t < T)[:, None])
        tl.store(grad_v + at, dv.to(grad_v.dtype.element_ty), mask=(t < T)[:, None])
