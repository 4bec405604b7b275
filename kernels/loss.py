"""Head and cross-entropy that never hold all their logits.

Shapes: N = B x T tokens, n of them a chunk, C width, V rows of the (padded) token embedding.
The gradients of a chunk are computed in the forward pass, while its logits exist; on a GPU by one
kernel that turns logits into their gradient in place.
"""
import math

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without
    triton = None


# --- one chunk ------------------------------------------------------------------------------------


def loss_chunk(x, weight, targets, scored, vocab_size, grad_weight):
    """Head and cross-entropy of some tokens: (their share of the mean loss, gradient of x or None).

    x (n, C), weight (V, C), targets (n,) with -1 = not scored; scored: tokens scored in all, 0-dim.
    grad_weight (V, C), float32, has this chunk's gradient added to it; None: no gradients.
    Columns from vocab_size on are padding and take no probability. Another loss goes here; on a GPU
    it needs fastest_chunk to return `plain`, because loss_chunk_fused would run instead.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    column = torch.arange(weight.size(0), device=x.device)  # (V,)
    logits = (x @ weight.t()).to(exact).masked_fill(column >= vocab_size, -math.inf)  # (n, V)
    log_total = logits.logsumexp(-1, keepdim=True)  # (n, 1)
    correct = logits.gather(1, targets.clamp(min=0)[:, None])  # (n, 1)
    share = (targets >= 0).to(exact)[:, None] / scored  # (n, 1)
    loss = ((log_total - correct) * share).sum()
    if grad_weight is None:
        return loss, None
    grad = (logits - log_total).exp()  # (n, V): the softmax
    grad = grad - (column == targets[:, None]).to(exact)  # minus one-hot
    grad = (grad * share).to(x.dtype)
    grad_weight += grad.t() @ x
    return loss, grad @ weight


def loss_chunk_fused(x, weight, targets, scored, vocab_size, grad_weight):
    """The same on a GPU, where the gradient of the logits overwrites them.

    V is vocab_size rounded up to a multiple of 128, so that the kernel's last block covers it.
    """
    logits = x @ weight.t()  # (n, V)
    losses = cross_entropy(logits, targets, scored, vocab_size, grad_weight is not None)
    if grad_weight is None:
        return losses.sum(), None
    if torch.version.cuda and x.dtype == torch.bfloat16:
        # The product goes into float32 as it is, not rounded to bfloat16 first.
        torch.addmm(grad_weight, logits.t(), x, out_dtype=torch.float32, out=grad_weight)
    else:
        grad_weight += logits.t() @ x
    return losses.sum(), logits @ weight


def fastest_chunk(x, plain):
    """loss_chunk_fused where it can be, else `plain`: loss_chunk, compiled or not."""
    return loss_chunk_fused if x.is_cuda and triton and x.dtype != torch.float64 else plain


# --- all chunks -----------------------------------------------------------------------------------


def chunked_loss(x, weight, targets, vocab_size, chunk, one_chunk=loss_chunk, grad_weight=None):
    """(mean loss over the scored tokens, gradient of x (N, C) or None); see loss_chunk.

    A chunk has `chunk` tokens; one_chunk is loss_chunk or another that does the same.
    """
    scored = (targets >= 0).sum().clamp(min=1)
    results = [one_chunk(piece, weight, target, scored, vocab_size, grad_weight)
               for piece, target in zip(x.split(chunk), targets.split(chunk))]
    losses, gradients = zip(*results)
    return torch.stack(losses).sum(), None if grad_weight is None else torch.cat(gradients)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x (N, C) through the head `weight` (V, C): 0-dim, float32 or float64.

    The forward computes the gradients chunk by chunk, the backward only scales them. Of the logits
    there are `chunk` x V at a time.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, chunk, one_chunk):
        exact = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=exact)  # (V, C)
        loss, grad_x = chunked_loss(x, weight, targets, vocab_size, chunk, one_chunk, grad_weight)
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        scale = grad_loss.to(grad_x.dtype)
        return grad_x * scale, grad_weight * scale, None, None, None, None


# --- the kernel -----------------------------------------------------------------------------------


def cross_entropy(logits, targets, scored, vocab_size, gradient=False):
    """logits (n, V) on a GPU -> each token's share of the mean loss (n,), float32.

    With `gradient` the logits become their gradient.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    warps = 32 if torch.version.cuda else 16  # 1,024 threads: a warp of ROCm has 64
    cross_entropy_kernel[len(logits),](
        logits, targets, scored, losses, vocab_size, logits.size(1),
        GRADIENT=gradient, BLOCK=4096, num_warps=warps)
    return losses


if triton:
    # Powers of 2 are what a GPU computes, so the kernel counts in bits.
    LOG2_E = tl.constexpr(math.log2(math.e))
    LN_2 = tl.constexpr(math.log(2))

    @triton.jit
    def cross_entropy_kernel(logits, targets, scored, losses, vocab_size, width,
                             GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
        """One program a token. Each lane keeps a maximum and a sum of its own, so that the threads
        meet once. The last block, which vocab_size cuts and width ends in, starts them.
        """
        row = tl.program_id(0).to(tl.int64)
        logits += row * width
        target = tl.load(targets + row)
        lane = tl.arange(0, BLOCK)
        whole = vocab_size // BLOCK * BLOCK
        exists = whole + lane < vocab_size
        highest = tl.load(logits + whole + lane, mask=exists, other=-1e30).to(tl.float32) * LOG2_E
        total = tl.where(exists, 1.0, 0.0)  # sum 2^(logit - highest)
        for start in range(0, whole, BLOCK):
            block = tl.load(logits + start + lane).to(tl.float32) * LOG2_E
            before = highest
            highest = tl.maximum(before, block)
            total = total * tl.exp2(before - highest) + tl.exp2(block - highest)
        top = tl.max(highest, 0)
        log_total = top + tl.log2(tl.sum(total * tl.exp2(highest - top), 0))
        share = tl.where(target >= 0, 1.0, 0.0) / tl.load(scored).to(tl.float32)
        correct = tl.load(logits + tl.maximum(target, 0)).to(tl.float32) * LOG2_E
        tl.store(losses + row, (log_total - correct) * share * LN_2)
        if GRADIENT:
            tl.debug_barrier()  # no thread may overwrite the correct logit before all have read it
            for start in range(0, whole, BLOCK):
                place = logits + start + lane
                block = tl.load(place).to(tl.float32) * LOG2_E
                grad = tl.exp2(block - log_total) * share
                tl.store(place, grad.to(logits.dtype.element_ty))
            place = logits + whole + lane
            block = tl.load(place, mask=exists, other=-float('inf')).to(tl.float32) * LOG2_E
            inside = whole + lane < width
            grad = tl.exp2(block - log_total) * share
            tl.store(place, grad.to(logits.dtype.element_ty), mask=inside)
            tl.debug_barrier()
            if target >= 0:
                correct_place = logits + target
                correct_grad = (tl.exp2(correct - log_total) - 1) * share
                tl.store(correct_place, correct_grad.to(logits.dtype.element_ty))
