"""The products of the MLP and of the head in float8 (arXiv 2209.05433), for the setting fp8.

Shapes: N = B x T tokens, n of them a chunk of the loss, C width, V rows of the padded embedding.
They need a GPU of compute capability 9.0 or more, which multiplies float8 only where both operands
hold the summed dimension in consecutive memory. So whatever the gradient of a weight needs is
written a second time, transposed ('_t'), by the kernel that makes it.

Numbers are e4m3. Only the gradient of the logits is e5m2, because probabilities span more than e4m3
holds. Each tensor has one scale: value = float8 * inverse, inverse a 0-dim float32 tensor on the
device. It is a bound of the values over the largest number of e4m3, which has all its 3 bits for
sizes from 2^-6 to 448, so that a bound 100 times too high costs nothing. The bounds are the norm of
the longest row and, of sums of products, the product of two norms (Cauchy-Schwarz).
"""
import math

import torch
from torch.nn import functional as F

from kernels.loss import cross_entropy

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without
    triton = None

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
LARGEST = 448.0  # number of e4m3
ONE = 32768.0  # what 1 becomes in e5m2, whose largest number is 57344
ROUNDED = (17 / 16) ** 2  # a product of numbers rounded to 3 bits over that of the numbers, at most
STEEPEST = 1.13  # |gelu'|, rounded up
GELU_LINEAR = math.sqrt(8 / math.pi)  # gelu(h) = h sigmoid(2 u), the tanh form of GPT-2, where
GELU_CUBIC = 0.044715  # 2 u = GELU_LINEAR (h + GELU_CUBIC h^3)


def inverse_of(bound):
    """The scale of values up to `bound`; never 0, because 0 / 0 is no number."""
    return (bound / LARGEST).clamp(min=1e-30)


def longest(x, dim=1):
    """The largest norm of a row of x (rows, columns), or with dim=0 of a column: 0-dim, float32."""
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float32).amax()


def cast(x, inverse):
    """x / inverse in e4m3."""
    return (x.float() * (1 / inverse)).clamp(-LARGEST, LARGEST).to(E4M3)


def gate(h):
    """sigmoid(2 u) in float32: gelu(h) = h gate(h)."""
    h = h.float()
    return torch.sigmoid(GELU_LINEAR * h * (1 + GELU_CUBIC * h * h))


# --- operations: kernels on a GPU, which the compiler launches itself; plain twins on a CPU -------


def product(a, b, inverse_a, inverse_b, dtype, fast):
    """a (m, k), b (n, k) in float8 -> a b^T (m, n) in `dtype`.

    fast: summed in about 14 bits, too few for sums over tokens.
    """
    if not a.is_cuda:
        return (a.float() @ b.float().t() * (inverse_a * inverse_b)).to(dtype)
    return torch._scaled_mm(a, b.t(), scale_a=inverse_a, scale_b=inverse_b, out_dtype=dtype,
                            use_fast_accum=fast)


def cast_both(x, inverse):
    """x (rows, columns) -> x / inverse in e4m3, and the same transposed."""
    if not x.is_cuda:
        return both_plain(cast(x, inverse))
    out, out_t = both_empty(x.shape, x.device)
    launch(cast_kernel, x.shape, x.contiguous(), inverse, out, out_t)
    return out, out_t


def gelu_backward(h, da, inverse_dh, inverse_a):
    """Of a = gelu(h): h, da (N, 4C) -> dh (N, 4C), dh_t (4C, N), a_t (4C, N) in e4m3."""
    if not h.is_cuda:
        h = h.float()
        g = gate(h)
        slope = g + h * g * (1 - g) * GELU_LINEAR * (1 + 3 * GELU_CUBIC * h * h)
        a = cast(h * g, inverse_a)
        return *both_plain(cast(da.float() * slope, inverse_dh)), a.t().contiguous()
    dh, dh_t = both_empty(h.shape, h.device)
    a_t = torch.empty_like(dh_t)
    launch(gelu_kernel, h.shape, h.contiguous(), da.contiguous(), inverse_dh, inverse_a,
           dh, dh_t, a_t)
    return dh, dh_t, a_t


def logit_gradient(logits, targets, losses, scored, vocab_size):
    """Of losses = cross_entropy(logits (n, V), ...): their sum's gradient, (n, V) and (V, n).

    In e5m2, times scored x ONE.
    """
    if not logits.is_cuda:
        softmax = logits[:, :vocab_size].float().softmax(-1)
        softmax = F.pad(softmax, (0, logits.size(1) - vocab_size))  # (n, V)
        grad = softmax - (torch.arange(logits.size(1)) == targets[:, None]).float()
        grad = grad * (targets >= 0).float()[:, None]
        return both_plain((grad * ONE).to(E5M2))
    grad, grad_t = both_empty(logits.shape, logits.device, E5M2)
    launch(gradient_kernel, logits.shape, logits, targets, losses, scored, vocab_size, grad, grad_t)
    return grad, grad_t


def cross_entropy_plain(logits, targets, scored, vocab_size):
    """kernels.loss.cross_entropy on a CPU."""
    return F.cross_entropy(logits[:, :vocab_size].float(), targets, ignore_index=-1,
                           reduction='none') / scored


def both_plain(matrix):
    return matrix, matrix.t().contiguous()


def both_empty(shape, device, dtype=E4M3):
    """Room for a matrix, and for the transposed one."""
    straight = torch.empty(shape, dtype=dtype, device=device)
    return straight, torch.empty(shape[::-1], dtype=dtype, device=device)


# --- the MLP and the head -------------------------------------------------------------------------


class Float8MLP(torch.autograd.Function):
    """x (B, T, C), W_fc (4C, C), W_proj (C, 4C) -> gelu(x W_fc^T) W_proj^T (B, T, C)."""

    @staticmethod
    def forward(ctx, x, w_fc, w_proj):
        rows = x.flatten(0, -2)  # (N, C)
        bound_x = longest(rows)
        bound_fc = longest(w_fc)
        bound_proj = longest(w_proj, dim=0)  # a hidden unit's column: the backward sums over it
        inverse_x = inverse_of(bound_x)
        inverse_fc = inverse_of(bound_fc)
        inverse_a = inverse_of(bound_x * bound_fc * ROUNDED)  # |gelu(h)| <= |h|
        inverse_proj = inverse_of(bound_proj)
        x8, x8_t = cast_both(rows, inverse_x)
        fc, fc_t = cast_both(w_fc, inverse_fc)
        proj, proj_t = cast_both(w_proj, inverse_proj)
        h = product(x8, fc, inverse_x, inverse_fc, x.dtype, True)  # (N, 4C)
        y = product(cast(h * gate(h), inverse_a), proj, inverse_a, inverse_proj, x.dtype, True)
        ctx.save_for_backward(x8_t, h, fc_t, proj_t, inverse_x, inverse_fc, inverse_a, inverse_proj,
                              bound_proj)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        (x8_t, h, fc_t, proj_t, inverse_x, inverse_fc, inverse_a, inverse_proj,
         bound_proj) = ctx.saved_tensors
        rows = dy.flatten(0, -2)  # (N, C)
        bound_dy = longest(rows)
        inverse_dy = inverse_of(bound_dy)
        inverse_dh = inverse_of(bound_dy * bound_proj * (ROUNDED * STEEPEST))
        dy8, dy8_t = cast_both(rows, inverse_dy)
        da = product(dy8, proj_t, inverse_dy, inverse_proj, dy.dtype, True)  # (N, 4C)
        dh, dh_t, a_t = gelu_backward(h, da, inverse_dh, inverse_a)
        dx = product(dh, fc_t, inverse_dh, inverse_fc, dy.dtype, True)
        dw_fc = product(dh_t, x8_t, inverse_dh, inverse_x, dy.dtype, False)
        dw_proj = product(dy8_t, a_t, inverse_dy, inverse_a, dy.dtype, False)
        return dx.view(dy.shape), dw_fc, dw_proj


@torch.no_grad()
def head(weight):
    """kernels.loss.loss_chunk with this weight (V, C) in float8, for training."""
    inverse_w = inverse_of(longest(weight))
    w, w_t = cast_both(weight, inverse_w)

    def loss_chunk(x, weight, targets, scored, vocab_size, grad_weight):
        inverse_x = inverse_of(longest(x))
        inverse_grad = 1 / (scored.float() * ONE)
        x8, x8_t = cast_both(x, inverse_x)
        logits = product(x8, w, inverse_x, inverse_w, x.dtype, True)  # (n, V)
        token_losses = cross_entropy if x.is_cuda else cross_entropy_plain
        losses = token_losses(logits, targets, scored, vocab_size)
        grad, grad_t = logit_gradient(logits, targets, losses, scored, vocab_size)
        del logits  # the largest tensor here makes room for the product below
        grad_weight += product(grad_t, x8_t, inverse_grad, inverse_x, x.dtype, False)
        return losses.sum(), product(grad, w_t, inverse_grad, inverse_w, x.dtype, False)
    return loss_chunk


# --- kernels: a program turns a tile of ROWS x COLUMNS --------------------------------------------


def launch(kernel, shape, *arguments):
    """kernel(*arguments, rows, columns) over a matrix of this shape, multiples of 16."""
    rows, columns = shape
    height = min(64, rows & -rows)  # the largest tile up to 64 x 128 that divides the matrix
    width = min(128, columns & -columns)
    kernel[columns // width, rows // height](
        *arguments, rows, columns, ROWS=height, COLUMNS=width, num_warps=4)


if triton:
    # Four float32 -> a word of four bytes. Two conversions, each of which goes whole into one word:
    # where their bytes were taken apart as well, to be stored both ways, ptxas 12.8 (of Triton 3.6)
    # read registers that nothing had written.
    PACK_E4M3 = tl.constexpr('{ .reg .b16 low, high; '
                             'cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; '
                             'cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; '
                             'mov.b32 $0, {low, high}; }')
    PACK_E5M2 = tl.constexpr(PACK_E4M3.value.replace('e4m3', 'e5m2'))
    UNIT = tl.constexpr(ONE)

    @triton.jit
    def tile(columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Where rows 0, 4, 8, ... of this program's tile lie in a matrix: (ROWS / 4, COLUMNS)."""
        i = tl.program_id(1) * ROWS + 4 * tl.arange(0, ROWS // 4)
        j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        return i[:, None].to(tl.int64) * columns + j[None, :]

    @triton.jit
    def store(out, row_0, row_1, row_2, row_3, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Rows 0, 4, ..., rows 1, 5, ... and so on of a tile, in float32, to `out`."""
        place = out + tile(columns, ROWS, COLUMNS)
        tl.store(place, row_0.to(out.dtype.element_ty))
        tl.store(place + columns, row_1.to(out.dtype.element_ty))
        tl.store(place + 2 * columns, row_2.to(out.dtype.element_ty))
        tl.store(place + 3 * columns, row_3.to(out.dtype.element_ty))

    @triton.jit
    def store_transposed(out_t, row_0, row_1, row_2, row_3, rows, ROWS: tl.constexpr,
                         COLUMNS: tl.constexpr):
        """The same to out_t (columns, rows), where four rows of a column are a word."""
        PACK: tl.constexpr = PACK_E5M2 if out_t.dtype.element_ty == tl.float8e5 else PACK_E4M3
        word = tl.inline_asm_elementwise(PACK, '=r,r,r,r,r', [row_0, row_1, row_2, row_3], tl.int32,
                                         is_pure=True, pack=1)
        i = tl.program_id(1) * (ROWS // 4) + tl.arange(0, ROWS // 4)
        j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        words = out_t.to(tl.pointer_type(tl.int32), bitcast=True)
        place = words + j[:, None].to(tl.int64) * (rows // 4) + i[None, :]
        tl.store(place, tl.trans(word))

    @triton.jit
    def cast_kernel(x, inverse, out, out_t, rows, columns, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr):
        place = x + tile(columns, ROWS, COLUMNS)
        scale = tl.div_rn(1.0, tl.load(inverse))
        row_0 = tl.load(place).to(tl.float32) * scale
        row_1 = tl.load(place + columns).to(tl.float32) * scale
        row_2 = tl.load(place + 2 * columns).to(tl.float32) * scale
        row_3 = tl.load(place + 3 * columns).to(tl.float32) * scale
        store(out, row_0, row_1, row_2, row_3, columns, ROWS, COLUMNS)
        store_transposed(out_t, row_0, row_1, row_2, row_3, rows, ROWS, COLUMNS)

    @triton.jit
    def gelu_rows(h, da, scale_dh, scale_a):
        """(da gelu'(h), gelu(h)), scaled, of the rows at these places."""
        x = tl.load(h).to(tl.float32)
        grad = tl.load(da).to(tl.float32)
        square = x * x
        # sigmoid(2 u) = 1 / (1 + 2^z), z = -2 u / ln 2, as the square of a reciprocal root: two
        # fast instructions, where a division is many. 2 u / ln 2 = x (2.302 + 0.1029 x^2),
        # d 2u / dx = 1.596 + 0.2141 x^2.
        root = tl.rsqrt(1 + tl.exp2(x * (-2.302208198 - 0.1029432397 * square)))
        a = x * root * root
        slope = root * root + (a - a * root * root) * (1.595769122 + 0.2140644488 * square)
        return grad * slope * scale_dh, a * scale_a

    @triton.jit
    def gelu_kernel(h, da, inverse_dh, inverse_a, dh, dh_t, a_t, rows, columns, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr):
        place = tile(columns, ROWS, COLUMNS)
        scale_dh = tl.div_rn(1.0, tl.load(inverse_dh))
        scale_a = tl.div_rn(1.0, tl.load(inverse_a))
        h += place
        da += place
        dh_0, a_0 = gelu_rows(h, da, scale_dh, scale_a)
        dh_1, a_1 = gelu_rows(h + columns, da + columns, scale_dh, scale_a)
        dh_2, a_2 = gelu_rows(h + 2 * columns, da + 2 * columns, scale_dh, scale_a)
        dh_3, a_3 = gelu_rows(h + 3 * columns, da + 3 * columns, scale_dh, scale_a)
        store(dh, dh_0, dh_1, dh_2, dh_3, columns, ROWS, COLUMNS)
        store_transposed(dh_t, dh_0, dh_1, dh_2, dh_3, rows, ROWS, COLUMNS)
        store_transposed(a_t, a_0, a_1, a_2, a_3, rows, ROWS, COLUMNS)

    @triton.jit
    def grad_rows(logits, targets, losses, scored, vocab_size, columns, PHASE: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """UNIT x (softmax - one-hot) of rows PHASE, PHASE + 4, ... of a tile; 0 if not scored."""
        i = tl.program_id(1) * ROWS + 4 * tl.arange(0, ROWS // 4) + PHASE
        j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        target = tl.load(targets + i)
        row = logits + i.to(tl.int64) * columns
        loss = tl.load(losses + i) * tl.load(scored).to(tl.float32)
        log_total = loss + tl.load(row + tl.maximum(target, 0)).to(tl.float32)
        block = tl.load(row[:, None] + j[None, :]).to(tl.float32)
        softmax = tl.exp(block - log_total[:, None])
        one_hot = tl.where(j[None, :] == target[:, None], 1.0, 0.0)
        grad = softmax - one_hot
        counts = (j < vocab_size)[None, :] & (target >= 0)[:, None]
        return tl.where(counts, grad * UNIT, 0.0)

    @triton.jit
    def gradient_kernel(logits, targets, losses, scored, vocab_size, grad, grad_t, rows, columns,
                        ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        row_0 = grad_rows(logits, targets, losses, scored, vocab_size, columns, 0, ROWS, COLUMNS)
        row_1 = grad_rows(logits, targets, losses, scored, vocab_size, columns, 1, ROWS, COLUMNS)
        row_2 = grad_rows(logits, targets, losses, scored, vocab_size, columns, 2, ROWS, COLUMNS)
        row_3 = grad_rows(logits, targets, losses, scored, vocab_size, columns, 3, ROWS, COLUMNS)
        store(grad, row_0, row_1, row_2, row_3, columns, ROWS, COLUMNS)
        store_transposed(grad_t, row_0, row_1, row_2, row_3, rows, ROWS, COLUMNS)
