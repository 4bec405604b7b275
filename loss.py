"""Head and cross-entropy that never hold all their logits.

Shapes: N = B x T tokens, n of them a chunk, C width, V rows of the (padded) token embedding. The gradients of a chunk are
computed in the forward pass, while its logits exist; on a GPU by one kernel that turns logits into their gradient in place.
"""
import math

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without
    triton = None


def loss_chunk(x, weight, targets, scored, vocab_size, grad_weight):
    """Head and cross-entropy of some tokens: (their share of the mean loss, gradient of x or None).

    x (n, C), weight (V, C), targets (n,) with -1 = not scored, scored: tokens scored in all. grad_weight (V, C),
    float32, has this chunk's gradient added to it; None: no gradients. Columns from vocab_size on are padding and
    take no probability.
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
    grad = (logits - log_total).exp() - (column == targets[:, None]).to(exact)  # (n, V): softmax - one-hot
    grad = (grad * share).to(x.dtype)
    grad_weight += grad.t() @ x
    return loss, grad @ weight


def loss_chunk_fused(x, weight, targets, scored, vocab_size, grad_weight):
    """The same on a GPU: the logits are read twice and overwritten by their gradient, which makes them the only (n, V) tensor.

    V is vocab_size rounded up to a multiple of 128 (padded_vocab_size): what the kernel's last block must cover.
    """
    logits = x @ weight.t()  # (n, V)
    losses = cross_entropy(logits, targets, scored, vocab_size, gradient=grad_weight is not None)
    if grad_weight is None:
        return losses.sum(), None
    if torch.version.cuda and x.dtype == torch.bfloat16:  # the product is added to float32 as it is, not rounded first
        torch.addmm(grad_weight, logits.t(), x, out_dtype=torch.float32, out=grad_weight)
    else:
        grad_weight += logits.t() @ x
    return losses.sum(), logits @ weight


def cross_entropy(logits, targets, scored, vocab_size, gradient=False):
    """logits (n, V) on a GPU -> each token's share of the mean loss (n,) float32; with `gradient` they become their gradient."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    cross_entropy_kernel[len(logits),](logits, targets, scored, losses, vocab_size, logits.size(1), GRADIENT=gradient, BLOCK=4096,
                                       num_warps=32 if torch.version.cuda else 16)  # 1,024 threads
    return losses


if triton:
    LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))  # powers of 2 are what a GPU computes

    @triton.jit
    def cross_entropy_kernel(logits, targets, scored, losses, vocab_size, width, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
        """One program a token: its loss over `scored`, and with GRADIENT its `width` logits replaced by d loss / d logits.

        Each lane keeps a maximum and a sum of its own, so that the threads meet once. The last block, which vocab_size cuts
        and width ends in, comes first: it starts them.
        """
        row = tl.program_id(0).to(tl.int64)
        logits += row * width
        target, lane, whole = tl.load(targets + row), tl.arange(0, BLOCK), vocab_size // BLOCK * BLOCK
        exists = whole + lane < vocab_size
        highest = tl.load(logits + whole + lane, mask=exists, other=-1e30).to(tl.float32) * LOG2_E
        total = tl.where(exists, 1.0, 0.0)  # sum 2^(logit - highest)
        for start in range(0, whole, BLOCK):
            block, before = tl.load(logits + start + lane).to(tl.float32) * LOG2_E, highest
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
                block = tl.load(logits + start + lane).to(tl.float32) * LOG2_E
                tl.store(logits + start + lane, (tl.exp2(block - log_total) * share).to(logits.dtype.element_ty))
            block = tl.load(logits + whole + lane, mask=exists, other=-float('inf')).to(tl.float32) * LOG2_E
            tl.store(logits + whole + lane, (tl.exp2(block - log_total) * share).to(logits.dtype.element_ty), mask=whole + lane < width)
            tl.debug_barrier()
            if target >= 0:
                tl.store(logits + target, ((tl.exp2(correct - log_total) - 1) * share).to(logits.dtype.element_ty))


def fastest_chunk(x, plain):
    """loss_chunk_fused where it can be, else `plain`: loss_chunk, compiled or not."""
    return loss_chunk_fused if x.is_cuda and triton and x.dtype != torch.float64 else plain


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x (N, C) through the head `weight` (V, C), with the gradients computed chunk by chunk.

    Memory: `chunk` x V logits instead of N x V, plus a float32 gradient of the weight. The backward only scales.
    one_chunk: loss_chunk or another that does the same. Returns a float32 scalar (float64 for float64 input).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, chunk, one_chunk):
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        loss, grad_x = chunked_loss(x, weight, targets, vocab_size, chunk, one_chunk, grad_weight)
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss.to(grad_x.dtype), grad_weight * grad_loss.to(grad_weight.dtype), None, None, None, None


def chunked_loss(x, weight, targets, vocab_size, chunk, one_chunk=loss_chunk, grad_weight=None):
    """(mean loss over the scored tokens, gradient of x or None); see loss_chunk for the arguments."""
    scored = (targets >= 0).sum().clamp(min=1)
    losses, gradients = zip(*(one_chunk(piece, weight, target, scored, vocab_size, grad_weight)
                              for piece, target in zip(x.split(chunk), targets.split(chunk))))
    return torch.stack(losses).sum(), None if grad_weight is None else torch.cat(gradients)
