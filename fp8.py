"""The products of the MLP and of the head in float8, for GPUs of compute capability 9.0 and above (setting fp8).

Shapes: N = B x T tokens, n of them a chunk of the loss, C width, V rows of the padded embedding. Such a GPU multiplies float8 only where
both operands hold the summed dimension in consecutive memory, so whatever the gradient of a weight needs is written a second time,
transposed ('_t'), by the kernel that makes it. Weights are cast in each forward: none can be stale, and there is nothing to save.

Numbers are e4m3, only the gradient of the logits e5m2 (arXiv 2209.05433): probabilities span more than e4m3 holds.
Scales: one a tensor; value = float8 * inverse, inverse a float32 tensor of no dimension on the device. It is a bound of the values over
the largest number of e4m3. This has all its 3 bits for sizes from 2^-6 to 448, a factor of 28672, so a bound 100 times too high costs
nothing. The bounds are the norm of the longest row and, of sums of products, the product of two norms (Cauchy-Schwarz).
"""
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from loss import cross_entropy

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without
    triton = None

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = 448.0  # number of e4m3
ONE = 32768.0  # what 1 becomes in e5m2, whose largest number is 57344
ROUNDED = (17 / 16) ** 2  # a product of numbers rounded to 3 bits over that of the numbers, at most
STEEPEST = 1.13  # |gelu'|, rounded up


def inverse_of(bound):
    """The scale of values up to `bound`; never 0, for 0 / 0 is no number."""
    return (bound / LARGEST).clamp(min=1e-30)


def longest(x, dim=1):
    """The largest norm of a row of x (rows, columns), or with dim=0 of a column: no dimension, float32."""
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float32).amax()


def cast(x, inverse):
    """x / inverse in e4m3."""
    return (x.float() * (1 / inverse)).clamp(-LARGEST, LARGEST).to(E4M3)


def gate(h):
    """sigmoid(2 u) in float32: gelu(h) = h sigmoid(2 u), see model.gelu."""
    h = h.float()
    return torch.sigmoid(math.sqrt(8 / math.pi) * h * (1 + 0.044715 * h * h))


# --- operations that the compiler leaves alone: kernels on a GPU, their plain twins on a CPU ---------------


@torch.library.custom_op('nanoprune::fp8_product', mutates_args=())
def product(a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a (m, k), b (n, k) in float8 -> a b^T (m, n) in `dtype`. fast: summed in about 14 bits, too few for sums over tokens."""
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), scale_a=inverse_a, scale_b=inverse_b, out_dtype=dtype, use_fast_accum=fast)
    return (a.float() @ b.float().t() * (inverse_a * inverse_b)).to(dtype)


@product.register_fake
def _(a, b, inverse_a, inverse_b, dtype, fast):
    return a.new_empty(a.size(0), b.size(0), dtype=dtype)


@torch.library.custom_op('nanoprune::fp8_cast_both', mutates_args=())
def cast_both(x: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, columns) -> x / inverse in e4m3, and the same transposed."""
    if not x.is_cuda:
        return both_plain(cast(x, inverse))
    out, out_t = both(x.shape, x.device)
    launch(cast_kernel, x.shape, x.contiguous(), inverse, out, out_t)
    return out, out_t


@cast_both.register_fake
def _(x, inverse):
    return both(x.shape, x.device)


@torch.library.custom_op('nanoprune::fp8_gelu_backward', mutates_args=())
def gelu_backward(h: Tensor, da: Tensor, inverse_dh: Tensor, inverse_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a = gelu(h): h, da (N, 4C) -> dh (N, 4C), dh_t (4C, N), a_t (4C, N) in e4m3."""
    if not h.is_cuda:
        x, g = h.float(), gate(h)
        slope = g + x * g * (1 - g) * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x * x)
        return *both_plain(cast(da.float() * slope, inverse_dh)), both_plain(cast(x * g, inverse_a))[1]
    dh, dh_t = both(h.shape, h.device)
    a_t = torch.empty_like(dh_t)
    launch(gelu_kernel, h.shape, h.contiguous(), da.contiguous(), inverse_dh, inverse_a, dh, dh_t, a_t)
    return dh, dh_t, a_t


@gelu_backward.register_fake
def _(h, da, inverse_dh, inverse_a):
    dh, dh_t = both(h.shape, h.device)
    return dh, dh_t, torch.empty_like(dh_t)


def logit_gradient(logits, targets, losses, scored, vocab_size):
    """Of losses = cross_entropy(logits (n, V), ...): the gradient of their sum times scored x ONE in e5m2, (n, V) and (V, n)."""
    if not logits.is_cuda:
        shares, column = F.pad(logits[:, :vocab_size].float().softmax(-1), (0, logits.size(1) - vocab_size)), torch.arange(logits.size(1))
        grad = (shares - (column == targets[:, None]).float()) * (targets >= 0).float()[:, None]
        return both_plain((grad * ONE).to(E5M2))
    grad, grad_t = both(logits.shape, logits.device, E5M2)
    launch(gradient_kernel, logits.shape, logits, targets, losses, scored, vocab_size, grad, grad_t)
    return grad, grad_t


def both_plain(x8):
    return x8, x8.t().contiguous()


# --- the MLP and the head ----------------------------------------------------------------------------------


class Float8MLP(torch.autograd.Function):
    """x (B, T, C), W_fc (4C, C), W_proj (C, 4C) -> gelu(x W_fc^T) W_proj^T (B, T, C). Keeps fc's output, the rest in float8."""

    @staticmethod
    def forward(ctx, x, w_fc, w_proj):
        rows = x.flatten(0, -2)  # (N, C)
        far, length, reach = longest(rows), longest(w_fc), longest(w_proj, dim=0)
        of_x, of_fc, of_a, of_proj = (inverse_of(bound) for bound in (far, length, far * length * ROUNDED, reach))
        x8, x8_t = cast_both(rows, of_x)
        fc, fc_t = cast_both(w_fc, of_fc)
        proj, proj_t = cast_both(w_proj, of_proj)
        h = product(x8, fc, of_x, of_fc, x.dtype, True)  # (N, 4C)
        y = product(cast(h * gate(h), of_a), proj, of_a, of_proj, x.dtype, True)
        ctx.save_for_backward(x8_t, h, fc_t, proj_t, of_x, of_fc, of_a, of_proj, reach)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x8_t, h, fc_t, proj_t, of_x, of_fc, of_a, of_proj, reach = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        far = longest(rows)
        of_dy, of_dh = inverse_of(far), inverse_of(far * reach * (ROUNDED * STEEPEST))
        dy8, dy8_t = cast_both(rows, of_dy)
        da = product(dy8, proj_t, of_dy, of_proj, dy.dtype, True)  # (N, 4C)
        dh, dh_t, a_t = gelu_backward(h, da, of_dh, of_a)
        dx = product(dh, fc_t, of_dh, of_fc, dy.dtype, True)
        dw_fc = product(dh_t, x8_t, of_dh, of_x, dy.dtype, False)
        dw_proj = product(dy8_t, a_t, of_dy, of_a, dy.dtype, False)
        return dx.view(dy.shape), dw_fc, dw_proj


@torch.no_grad()
def head(weight):
    """loss.loss_chunk with this weight (V, C) in float8, for training."""
    of_w = inverse_of(longest(weight))
    w, w_t = cast_both(weight, of_w)

    def loss_chunk(x, weight, targets, scored, vocab_size, grad_weight):
        of_x, of_grad = inverse_of(longest(x)), 1 / (scored.float() * ONE)
        x8, x8_t = cast_both(x, of_x)
        logits = product(x8, w, of_x, of_w, x.dtype, True)  # (n, V)
        losses = (cross_entropy if x.is_cuda else cross_entropy_plain)(logits, targets, scored, vocab_size)
        grad, grad_t = logit_gradient(logits, targets, losses, scored, vocab_size)
        del logits
        grad_weight += product(grad_t, x8_t, of_grad, of_x, x.dtype, False)
        return losses.sum(), product(grad, w_t, of_grad, of_w, x.dtype, False)
    return loss_chunk


def cross_entropy_plain(logits, targets, scored, vocab_size):
    return F.cross_entropy(logits[:, :vocab_size].float(), targets, ignore_index=-1, reduction='none') / scored


# --- kernels: a program turns a tile of ROWS x COLUMNS -----------------------------------------------------


def both(shape, device, dtype=E4M3):
    """Room for a matrix, and for the transposed one."""
    return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape[::-1], dtype=dtype, device=device)


def launch(kernel, shape, *arguments):
    """kernel(*arguments, rows, columns) over a matrix of this shape, in the largest tiles up to 64 x 128 that divide it."""
    rows, columns = shape
    height, width = min(64, rows & -rows), min(128, columns & -columns)
    if height < 16 or width < 16:
        raise ValueError(f'{rows} x {columns}: float8 wants multiples of 16')
    kernel[columns // width, rows // height](*arguments, rows, columns, ROWS=height, COLUMNS=width, num_warps=4)


if triton:
    # Four float32 -> a word of four bytes. Two conversions, each of which goes whole into one word: where their bytes were taken apart
    # as well, to be stored both ways, ptxas 12.8 (of Triton 3.6) read registers that nothing had written.
    PACK_E4M3 = tl.constexpr('{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; '
                             'mov.b32 $0, {low, high}; }')
    PACK_E5M2 = tl.constexpr(PACK_E4M3.value.replace('e4m3', 'e5m2'))
    UNIT = tl.constexpr(ONE)

    @triton.jit
    def tile(columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Where rows 0, 4, 8, ... of this program's tile lie in a matrix: (ROWS / 4, COLUMNS)."""
        i, j = tl.program_id(1) * ROWS + 4 * tl.arange(0, ROWS // 4), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        return i[:, None].to(tl.int64) * columns + j[None, :]

    @triton.jit
    def store(out, row_0, row_1, row_2, row_3, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Rows 0, 4, ..., rows 1, 5, ... and so on of a tile, in float32, to `out` (rows, columns)."""
        place = out + tile(columns, ROWS, COLUMNS)
        tl.store(place, row_0.to(out.dtype.element_ty))
        tl.store(place + columns, row_1.to(out.dtype.element_ty))
        tl.store(place + 2 * columns, row_2.to(out.dtype.element_ty))
        tl.store(place + 3 * columns, row_3.to(out.dtype.element_ty))

    @triton.jit
    def store_transposed(out_t, row_0, row_1, row_2, row_3, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """The same to out_t (columns, rows). What lies side by side there, four rows of a column, one thread holds."""
        PACK: tl.constexpr = PACK_E5M2 if out_t.dtype.element_ty == tl.float8e5 else PACK_E4M3
        word = tl.inline_asm_elementwise(PACK, '=r,r,r,r,r', [row_0, row_1, row_2, row_3], tl.int32, is_pure=True, pack=1)
        i, j = tl.program_id(1) * (ROWS // 4) + tl.arange(0, ROWS // 4), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        words = out_t.to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(words + j[:, None].to(tl.int64) * (rows // 4) + i[None, :], tl.trans(word))

    @triton.jit
    def cast_kernel(x, inverse, out, out_t, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        place, scale = x + tile(columns, ROWS, COLUMNS), tl.div_rn(1.0, tl.load(inverse))
        row_0 = tl.load(place).to(tl.float32) * scale
        row_1 = tl.load(place + columns).to(tl.float32) * scale
        row_2 = tl.load(place + 2 * columns).to(tl.float32) * scale
        row_3 = tl.load(place + 3 * columns).to(tl.float32) * scale
        store(out, row_0, row_1, row_2, row_3, columns, ROWS, COLUMNS)
        store_transposed(out_t, row_0, row_1, row_2, row_3, rows, ROWS, COLUMNS)

    @triton.jit
    def gelu_rows(h, da, scale_dh, scale_a):
        """(da gelu'(h), gelu(h)), scaled, of the rows at these places."""
        x, grad = tl.load(h).to(tl.float32), tl.load(da).to(tl.float32)
        square = x * x
        # sigmoid(2 u) = 1 / (1 + 2^z), z = -2 u / ln 2, as the square of a reciprocal root: two fast instructions, a division is many
        root = tl.rsqrt(1 + tl.exp2(x * (-2.302208198 - 0.1029432397 * square)))
        a = x * root * root
        slope = root * root + (a - a * root * root) * (1.595769122 + 0.2140644488 * square)
        return grad * slope * scale_dh, a * scale_a

    @triton.jit
    def gelu_kernel(h, da, inverse_dh, inverse_a, dh, dh_t, a_t, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        place = tile(columns, ROWS, COLUMNS)
        scale_dh, scale_a = tl.div_rn(1.0, tl.load(inverse_dh)), tl.div_rn(1.0, tl.load(inverse_a))
        dh_0, a_0 = gelu_rows(h + place, da + place, scale_dh, scale_a)
        dh_1, a_1 = gelu_rows(h + place + columns, da + place + columns, scale_dh, scale_a)
        dh_2, a_2 = gelu_rows(h + place + 2 * columns, da + place + 2 * columns, scale_dh, scale_a)
        dh_3, a_3 = gelu_rows(h + place + 3 * columns, da + place + 3 * columns, scale_dh, scale_a)
        store(dh, dh_0, dh_1, dh_2, dh_3, columns, ROWS, COLUMNS)
        store_transposed(dh_t, dh_0, dh_1, dh_2, dh_3, rows, ROWS, COLUMNS)
        store_transposed(a_t, a_0, a_1, a_2, a_3, rows, ROWS, COLUMNS)

    @triton.jit
    def gradient_rows(logits, targets, losses, scored, vocab_size, columns, PHASE: tl.constexpr, ROWS: tl.constexpr,
                      COLUMNS: tl.constexpr):
        """UNIT x (softmax - one-hot) of rows PHASE, PHASE + 4, ... of a tile; 0 where nothing is scored."""
        i, j = tl.program_id(1) * ROWS + 4 * tl.arange(0, ROWS // 4) + PHASE, tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        target, row = tl.load(targets + i), logits + i.to(tl.int64) * columns
        log_total = tl.load(losses + i) * tl.load(scored).to(tl.float32) + tl.load(row + tl.maximum(target, 0)).to(tl.float32)
        block = tl.load(row[:, None] + j[None, :]).to(tl.float32)
        grad = tl.exp(block - log_total[:, None]) - tl.where(j[None, :] == target[:, None], 1.0, 0.0)
        return tl.where((j < vocab_size)[None, :] & (target >= 0)[:, None], grad * UNIT, 0.0)

    @triton.jit
    def gradient_kernel(logits, targets, losses, scored, vocab_size, grad, grad_t, rows, columns, ROWS: tl.constexpr,
                        COLUMNS: tl.constexpr):
        row_0 = gradient_rows(logits, targets, losses, scored, vocab_size, columns, 0, ROWS, COLUMNS)
        row_1 = gradient_rows(logits, targets, losses, scored, vocab_size, columns, 1, ROWS, COLUMNS)
        row_2 = gradient_rows(logits, targets, losses, scored, vocab_size, columns, 2, ROWS, COLUMNS)
        row_3 = gradient_rows(logits, targets, losses, scored, vocab_size, columns, 3, ROWS, COLUMNS)
        store(grad, row_0, row_1, row_2, row_3, columns, ROWS, COLUMNS)
        store_transposed(grad_t, row_0, row_1, row_2, row_3, rows, ROWS, COLUMNS)
