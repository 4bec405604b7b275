"""Pruning: which weights to keep, and how many, from the states that Adam has anyway.

A score says how much a weight is worth (higher = keep), a schedule says how many may stay, and a selection turns
both into masks (True = keep). Selection is exact: of n weights exactly round(sparsity * n) go, among equal scores
those at the lower position (order of the list, then flat index), as a stable ascending sort would have it. It is
made of integer counts alone, hence the same bits on every device and rank.
"""
import math
from typing import Literal

import numpy as np
import torch

from settings import convert

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without
    triton = None

EPSILON = 1e-12  # keeps divisions finite; Adam's usual 1e-8 would be as large as sqrt(v) itself
FLOOR = 0.01  # share of each matrix that training always keeps: an empty matrix cuts its block off
CAP = 0.95  # highest sparsity that bitter4's factors may give a matrix
SCOPES = ('blocks', 'blocks+embedding')


def known(what, name, names):
    """`name`, or a ValueError that says what it might have been meant to be."""
    return convert(what, name, Literal[tuple(names)])


# --- scores ------------------------------------------------------------------------------------------


def relative_step(m, v):
    """The step that Adam takes, in learning rates and up to sign and bias correction."""
    return m / (v.sqrt() + EPSILON)


def root(m):
    return (m.abs() + EPSILON).sqrt()


# Products are ordered so that nothing under- or overflows on the way to a result that does not; above all neither m^2
# nor w^2 is ever formed: below 1e-19 a float32 square is 0.
FORMULAS = {
    **dict.fromkeys(('magnitude', 'bitter1', 'bitter2'), lambda w, m, v: w.abs()),
    'bitter0': lambda w, m, v: w.abs() * (w.abs() * relative_step(m, v).abs()),
    # bitter4 differs by layer_sparsities, bitter8 by its bias-corrected m, bitter10 by tracked_factor
    **dict.fromkeys(('bitter3', 'bitter4', 'bitter8', 'bitter10'), lambda w, m, v: w.abs() * root(m)),
    'bitter5': lambda w, m, v: 0.1 * w.abs() - w.sign() * relative_step(m, v),
    'bitter6': lambda w, m, v: w.abs() * root(m) * (m.abs() / (v + EPSILON).sqrt()),
    'bitter7': lambda w, m, v: w.abs() * (v + EPSILON).sqrt().sqrt(),
    'bitter9': lambda w, m, v: w.abs() * root(m) - 0.1 * w.sign() * relative_step(m, v),
    'bitter10z': lambda w, m, v: w.abs() * root(m) * relative_step(m, v).abs(),
}
SCORES = (*FORMULAS, 'movement')


def score(name, weight, exp_avg, exp_avg_sq, *, step, betas, initial=None, tracker=None):
    """What each weight is worth, higher = keep: float32 of the shape of `weight`. The formulas are FORMULAS' and
    movement's w (w - w0) (arXiv 2005.07683); names without a paper are those of the AdamWPrune experiments, 2025.

    weight, exp_avg, exp_avg_sq: master weights and raw moments, a matrix or all of them end to end, any float type.
    step: updates done, for the bias correction of bitter8. initial: the weights that movement starts from.
    tracker: of new_tracker, for bitter10, whose factors are of this tensor as a whole: call it matrix by matrix.
    ValueError: unknown name, or what the name needs is missing.
    """
    if name not in SCORES:
        known('score', name, SCORES)
    w, m, v = weight.detach().float(), exp_avg.detach().float(), exp_avg_sq.detach().float()
    if name == 'movement':
        if initial is None:
            raise ValueError("score 'movement' needs initial=, the weights at the start")
        return w * (w - initial.detach().float())
    if name == 'bitter8':
        if step < 1:
            raise ValueError(f"score 'bitter8' corrects the bias of m, which takes step >= 1, not {step}")
        m = m / (1 - betas[0] ** step)
    if name == 'bitter10':
        if tracker is None:
            raise ValueError("score 'bitter10' needs tracker=, three more numbers a weight; bitter10z does without")
        return FORMULAS[name](w, m, v) * tracked_factor(tracker, w, m)
    return FORMULAS[name](w, m, v)


def new_tracker(weight):
    """What bitter10 remembers of one matrix's updates: three float32 tensors of its shape, and four scalars."""
    tracker = {key: torch.zeros_like(weight, dtype=torch.float32) for key in ('last', 'average', 'size')}
    for key, neutral in (('count', 0.0), ('flip', 0.0), ('cos_dir', 1.0), ('jitter', 0.0)):
        tracker[key] = torch.full((), neutral, device=weight.device)
    return tracker


def track(tracker, update, decay=0.9):
    """The tracker after one more update (weight after - weight before, or anything proportional to it).

    flip: share of the weights whose update has another sign than the last one. cos_dir: cosine of the update and the
    exponential average of those before it, negative ones as 0. jitter: mean distance of |update| from its own
    exponential average, relative to the mean of that average. The first update leaves all three neutral.
    """
    u = update.detach().float()
    distance, usual = (u.abs() - tracker['size']).abs().mean(), tracker['size'].mean()
    rate = (1 / (tracker['count'] + 1)).clamp(min=1 - decay)  # a plain mean until the average has a past
    return {'last': u.clone(), 'average': torch.lerp(tracker['average'], u, rate), 'size': torch.lerp(tracker['size'], u.abs(), rate),
            'count': tracker['count'] + 1, 'flip': (u.sign() * tracker['last'].sign() < 0).float().mean(),
            'cos_dir': cosine(u, tracker['average']).clamp(min=0),
            'jitter': torch.where(usual > 0, distance / usual.clamp(min=torch.finfo(torch.float32).tiny), 0.0)}


def cosine(a, b):
    """Of two tensors as vectors, 0-dim; 1, which changes no score, if one of them is zero."""
    a, b = (x / x.abs().max().clamp(min=torch.finfo(torch.float32).tiny) for x in (a, b))  # squares of 1e-20 are 0
    norms = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return torch.where(norms > 0, (a * b).sum() / norms.clamp(min=EPSILON), 1.0)


def tracked_factor(tracker, w, m):
    """bitter10's factor of a whole tensor: (1 - flip) cos_dir cos_mw / (1 + jitter), cos_mw = |cosine(m, w)|."""
    return (1 - tracker['flip']) * tracker['cos_dir'] * cosine(m, w).abs() / (1 + tracker['jitter'])


# --- selection ---------------------------------------------------------------------------------------


def select(scores, sparsity, floor=0.0):
    """Masks (True = keep) of a list of float32 score tensors: the round(sparsity * n) lowest of all n are pruned.

    floor: share of each tensor, rounded up, that is kept whatever the others score (its highest; training uses FLOOR);
    the total stays exact. NaN counts as the lowest score, -0 equals +0. ValueError: sparsity out of reach.
    """
    if not 0 <= sparsity <= 1 or not 0 <= floor <= 1:
        raise ValueError(f'sparsity={sparsity} and floor={floor} must lie between 0 and 1')
    n, limits = sum(s.numel() for s in scores), [s.numel() - kept_at_least(s.numel(), floor) for s in scores]
    total = round(sparsity * n)
    if total > sum(limits):
        raise ValueError(f'sparsity={sparsity} would prune {total} of {n} weights, but a floor of {floor} of each of {len(scores)} '
                         f'tensors lets at most {sum(limits)} go; a target up to {math.floor(sum(limits) / n * 1e4) / 1e4} is possible')
    return prune_lowest(scores, limits, total)


def kept_at_least(n, floor):
    return math.ceil(round(floor * n, 6))  # rounded, since 0.07 * 100 is a hair above 7


def select_each(scores, sparsities, floor=0.0):
    """As select, but tensor by tensor: of n_i scores the round(sparsities[i] * n_i) lowest are pruned."""
    if len(scores) != len(sparsities):
        raise ValueError(f'{len(scores)} tensors of scores, but {len(sparsities)} sparsities')
    counts = [round(sparsity * s.numel()) for s, sparsity in zip(scores, sparsities)]
    for i, (s, count) in enumerate(zip(scores, counts)):
        if not 0 <= count <= s.numel() - kept_at_least(s.numel(), floor):
            raise ValueError(f'tensor {i}: sparsity={sparsities[i]} would prune {count} of {s.numel()} weights, floor={floor}')
    return prune_lowest(scores, counts, sum(counts))


def prune_lowest(scores, limits, total):
    """Masks that prune `total` scores, the lowest that can go when tensor i loses limits[i] at most; total <= sum(limits).

    A radix select: digit by digit from the top, the scores that agree with the threshold so far are counted. Nothing is
    sorted or concatenated, and on a GPU nothing is waited for. Memory besides the masks: a few MiB.
    """
    if any(s.dtype != torch.float32 for s in scores):
        raise ValueError(f'scores must be float32, not {sorted({str(s.dtype) for s in scores})}')
    if sum(s.numel() for s in scores) == 0:
        return [torch.ones_like(s, dtype=torch.bool) for s in scores]
    bits = [s.detach().reshape(-1).view(torch.int32) for s in scores]
    masks = [torch.empty(s.shape, dtype=torch.bool, device=s.device) for s in scores]
    chunks = chunk_table(bits, masks) if bits[0].is_cuda and triton else None
    threshold, ties = thresholds(bits, limits, total, chunks)
    if chunks:
        write_masks_fused(chunks, threshold, ties)
    else:
        for b, mask, lowest, tied in zip(bits, masks, threshold.tolist(), ties.tolist()):
            write_mask(b, mask.view(-1), lowest, tied)
    return masks


def thresholds(bits, limits, total, chunks):
    """(threshold (S,) int32, ties (S,) int64): tensor i prunes its keys below the threshold and the first `ties` equal to it.

    The tensors share one threshold, the smallest T with sum_i min(#(keys of i <= T), limit_i) >= total, until one of them
    reaches its limit below T: from then on it follows the threshold of its own limit, and counts as that limit.
    """
    S, device, shift = len(bits), bits[0].device, 32
    limits = upload(limits, device)
    prefix = torch.zeros(S, dtype=torch.int32, device=device)  # the digits so far, a key whose lower bits are 0
    below = torch.zeros(S, dtype=torch.int64, device=device)  # keys smaller than every key with this prefix
    shared = torch.ones(S, dtype=torch.bool, device=device)
    for width in ((8, 8, 8, 8) if chunks else (12, 10, 10)):  # more bins cost registers on a GPU, more passes time on a CPU
        shift -= width
        counts = histograms_fused(chunks, prefix, shift, width) if chunks else torch.stack(
            [histogram(b, p, shift, width) for b, p in zip(bits, prefix.tolist())])
        up_to = below[:, None] + counts.cumsum(1)  # (S, bins)
        reached = torch.where(shared[:, None], up_to.minimum(limits[:, None]), limits[:, None]).sum(0)  # (bins,)
        common = (reached < total).sum()  # the first digit that suffices
        own = (up_to < limits[:, None]).sum(1)  # (S,)
        digit = torch.where(shared, own.minimum(common), own)  # (S,)
        shared = shared & (own >= common)
        below = torch.where(digit > 0, up_to.gather(1, (digit - 1).clamp(min=0)[:, None])[:, 0], below)
        tied = up_to.gather(1, digit[:, None])[:, 0] - below
        top = 2 ** (width - 1) if shift + width == 32 else 0  # the first digit has the sign
        prefix = prefix + ((digit - top) * 2 ** shift).int()
    available = limits.minimum(below + tied) - below
    rest = total - torch.where(shared, below, limits).sum()
    open_to = torch.where(shared, available, 0)
    ties = torch.where(shared, (rest - (open_to.cumsum(0) - open_to)).clamp(min=0).minimum(available), available)
    return prefix, ties


def upload(numbers, device, dtype=torch.int64):
    """A tensor of host numbers. From pinned memory, or the host would wait for the device."""
    tensor = torch.as_tensor(numbers, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else tensor.to(device)


def blocks_of(bits):
    """Pieces small enough for the cache; below 32,768 elements PyTorch starts no threads, whose hand-over costs more."""
    return bits.split(2 ** 15 if bits.device.type == 'cpu' else 2 ** 21)


def ordered_keys(bits):
    """float32 as int32 bits -> int32 that compare as the numbers do: -NaN = NaN < -inf < ... < -0 = +0 < ... < inf."""
    if bits.device.type == 'cpu' and bits.numel():
        low, high = bits.aminmax()
        if low >= 0 and high <= 0x7F800000:
            return bits  # the usual case, and much the cheaper one
    magnitude = bits & 0x7FFFFFFF
    key = magnitude * ((bits >> 31) | 1)
    return key.masked_fill_(magnitude > 0x7F800000, -0x7FFFFFFF)


def histogram(bits, prefix, shift, width):
    """(2^width,) int64: how often each digit follows among the keys that agree with `prefix` above bit shift + width."""
    counts, above = torch.zeros(2 ** width, dtype=torch.int64, device=bits.device), shift + width
    for block in blocks_of(bits):
        key = ordered_keys(block)
        if above < 32:
            key = key[(key >> above) == (prefix >> above)]
        digit = (key >> shift) + 2 ** (width - 1) if above == 32 else (key >> shift) & (2 ** width - 1)
        counts += torch.bincount(digit, minlength=2 ** width)
    return counts


def write_mask(bits, mask, threshold, ties):
    """mask (n,) = False for the keys below `threshold` and for the first `ties` equal to it."""
    for block, out in zip(blocks_of(bits), blocks_of(mask)):
        key = ordered_keys(block)
        torch.gt(key, threshold, out=out)
        equal = (key == threshold).nonzero()[:, 0]
        out[equal[ties:]] = True
        ties = max(0, ties - len(equal))


# --- the same on a GPU: every pass over all tensors is one kernel ------------------------------------

CHUNK = 8192  # scores a program; 32 a thread at 8 warps


def chunk_table(bits, masks):
    """Where each program finds its scores: addresses and sizes of the tensors (S,), its tensor and the first of its programs."""
    device, programs = bits[0].device, np.array([-(-b.numel() // CHUNK) for b in bits])
    owner = np.repeat(np.arange(len(bits)), programs)  # (P,); torch's repeat_interleave on the CPU took 6 ms here
    return {'bits': upload([b.data_ptr() for b in bits], device), 'masks': upload([m.data_ptr() for m in masks], device),
            'sizes': upload([b.numel() for b in bits], device), 'owner': upload(owner, device, torch.int32),
            'first': upload(programs.cumsum(0) - programs, device)}


def histograms_fused(chunks, prefix, shift, width):
    """(S, 2^width) int64: `histogram` of every tensor with its own prefix."""
    c, counts = chunks, torch.zeros(len(prefix), 2 ** width, dtype=torch.int32, device=prefix.device)
    histogram_kernel[len(c['owner']),](c['bits'], c['sizes'], c['owner'], c['first'], prefix, counts, SHIFT=shift, WIDTH=width,
                                       CHUNK=CHUNK, num_warps=8)
    return counts.long()


def write_masks_fused(chunks, threshold, ties):
    """`write_mask` of every tensor: programs count their ties, a sum over them gives each its start, and they write."""
    c, owner = chunks, chunks['owner'].long()
    counts = torch.empty(len(owner), dtype=torch.int64, device=ties.device)  # ties a program
    for write in (False, True):
        if write:
            counts = counts.cumsum(0) - counts
            counts = ties[owner] - (counts - counts[c['first'].clamp(max=len(owner) - 1)][owner])  # ties it may still prune
        mask_kernel[len(owner),](c['bits'], c['sizes'], c['owner'], c['first'], c['masks'], threshold, counts, WRITE=write,
                                 CHUNK=CHUNK, num_warps=8)


if triton:
    @triton.jit
    def chunk_keys(bits, sizes, owner, first, CHUNK: tl.constexpr):
        """`ordered_keys` of this program's chunk: (its tensor, positions, which of them exist, keys)."""
        program = tl.program_id(0)
        tensor = tl.load(owner + program)
        position = (program - tl.load(first + tensor)) * CHUNK + tl.arange(0, CHUNK)  # int64, as `first` is
        inside = position < tl.load(sizes + tensor)
        raw = tl.load(tl.load(bits + tensor).to(tl.pointer_type(tl.int32)) + position, mask=inside, other=0)
        magnitude = raw & 0x7FFFFFFF
        key = tl.where(raw < 0, -magnitude, magnitude)
        return tensor, position, inside, tl.where(magnitude > 0x7F800000, -0x7FFFFFFF, key)

    @triton.jit
    def histogram_kernel(bits, sizes, owner, first, prefix, counts, SHIFT: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
        tensor, position, inside, key = chunk_keys(bits, sizes, owner, first, CHUNK)
        if SHIFT + WIDTH == 32:
            digit = (key >> SHIFT) + (1 << (WIDTH - 1))
        else:
            inside = inside & ((key >> (SHIFT + WIDTH)) == (tl.load(prefix + tensor) >> (SHIFT + WIDTH)))
            digit = (key >> SHIFT) & ((1 << WIDTH) - 1)
        found = tl.histogram(digit, 1 << WIDTH, mask=inside)  # in shared memory: no atomics on hot bins
        tl.atomic_add(counts + tensor * (1 << WIDTH) + tl.arange(0, 1 << WIDTH), found, mask=found > 0)

    @triton.jit
    def mask_kernel(bits, sizes, owner, first, masks, threshold, counts, WRITE: tl.constexpr, CHUNK: tl.constexpr):
        tensor, position, inside, key = chunk_keys(bits, sizes, owner, first, CHUNK)
        lowest = tl.load(threshold + tensor)
        tied = ((key == lowest) & inside).to(tl.int32)
        if WRITE:
            keep = (key > lowest) | ((tied == 1) & (tl.cumsum(tied, 0) > tl.load(counts + tl.program_id(0))))
            tl.store(tl.load(masks + tensor).to(tl.pointer_type(tl.uint8)) + position, keep.to(tl.uint8), mask=inside)
        else:
            tl.store(counts + tl.program_id(0), tl.sum(tied, 0).to(tl.int64))


# --- patterns and layers -----------------------------------------------------------------------------


def select_2_4(scores):
    """Masks of matrices (..., inputs): the two highest of each four neighbours along the inputs, which sparse tensor
    cores want. Ties as in select. ValueError: the inputs are no multiple of four."""
    for i, s in enumerate(scores):
        if s.dim() == 0 or s.size(-1) % 4:
            raise ValueError(f'tensor {i} of shape {tuple(s.shape)}: 2:4 needs an input dimension that is a multiple of 4')
    masks = []
    for s in scores:
        keep = []
        for block in blocks_of(s.detach().float().reshape(-1).view(torch.int32)):
            columns = ordered_keys(block).view(-1, 4).unbind(1)  # four of (groups,)
            # A later column wins a tie, so column i survives if at most one beats it.
            beaten = [sum(((columns[j] >= columns[i]) if j > i else (columns[j] > columns[i])).byte() for j in range(4) if j != i)
                      for i in range(4)]
            keep.append(torch.stack([b < 2 for b in beaten], 1).view(-1))
        masks.append(torch.cat(keep).view(s.shape) if keep else torch.ones_like(s, dtype=torch.bool))
    return masks


def layer_sparsities(sizes, layers, sparsity, first=0.7, last=1.3, cap=CAP):
    """Sparsity of each matrix, for select_each: `first` of the target in the first layer, `last` in the last (bitter4: 0.7
    and 1.3), linear between, at most `cap`, scaled so that the pruned weights (integers) sum to round(sparsity * sum(sizes)).

    sizes: weights of each matrix; layers: its depth (any numbers; see depths). A matrix passes `cap` by less than one
    weight. ValueError: a target above `cap`.
    """
    n = sum(sizes)
    total = round(sparsity * n)
    if not 0 <= sparsity <= cap:
        raise ValueError(f'sparsity={sparsity} must lie between 0 and {cap}, the cap of each layer')
    low, span = min(layers), max(layers) - min(layers)
    factors = [first + (last - first) * (layer - low) / span if span else 1.0 for layer in layers]
    capped = set()
    while True:  # a capped matrix passes on what it cannot take, which may cap the next
        left = total - sum(cap * sizes[i] for i in capped)
        scale = left / (sum(size * f for i, (size, f) in enumerate(zip(sizes, factors)) if i not in capped) or 1)
        wanted = [cap if i in capped else scale * f for i, f in enumerate(factors)]
        over = {i for i, w in enumerate(wanted) if w > cap}
        if not over:
            break
        capped |= over
    counts = [math.floor(w * size) for w, size in zip(wanted, sizes)]
    by_remainder = sorted(range(len(sizes)), key=lambda i: counts[i] - wanted[i] * sizes[i])
    for i in by_remainder[:total - sum(counts)]:
        counts[i] += 1
    return [count / size for count, size in zip(counts, sizes)]


def depths(names):
    """For layer_sparsities: the number of each parameter's block; -1 outside the blocks, as the embedding comes first."""
    return [int(name.split('.')[1]) if name.startswith('blocks.') else -1 for name in names]


# --- schedules ---------------------------------------------------------------------------------------

SCHEDULES = {  # share of the target at t, the share of the ramp that is done
    'linear': lambda t: t,
    'zhu_gupta': lambda t: 1 - (1 - t) ** 3,  # arXiv 1710.01878, equation 1 with initial sparsity 0
    'cubic_late': lambda t: t ** 3,
}


def is_update_step(step, start, end, interval):
    """Whether masks are chosen anew at `step`: at start + k * interval, and at end, after which they stay."""
    if not 0 <= start <= end or interval < 1:
        raise ValueError(f'prune_start={start} prune_end={end} prune_interval={interval}: need 0 <= start <= end and interval >= 1')
    return step == end or start <= step < end and (step - start) % interval == 0


def sparsity_at(step, schedule, target, start, end, interval):
    """Share of pruned weights in force at `step`: 0 before start, the target from end on, constant between updates."""
    is_update_step(step, start, end, interval)  # refuses an impossible ramp
    rise = SCHEDULES[known('prune_schedule', schedule, SCHEDULES)]
    if step < start:
        return 0.0
    if step >= end:
        return target
    return target * rise((step - start) // interval * interval / (end - start))


# --- scope, report, storage --------------------------------------------------------------------------


def prunable(named_parameters, scope):
    """Names of the parameters in `scope`: the matrices of the blocks, and on request the token embedding.

    The padded rows of the embedding belong to it: GPT-2's 123.57M are 84.93M + 50304 x 768. Biases, norms and
    positions are never pruned.
    """
    known('prune_scope', scope, SCOPES)
    return [name for name, p in named_parameters if p.dim() == 2 and (
        name.startswith('blocks.') or scope == 'blocks+embedding' and name == 'token_embedding.weight')]


def sparsity_report(named, masks):
    """{'layers': {name: sparsity}, 'scope': of all masked weights, 'all': of all parameters}, by the masks (name -> bool).

    named: name -> tensor of every parameter. Waits for the device once.
    """
    pruned = torch.stack([(~mask).sum() for mask in masks.values()]).tolist() if masks else []
    sizes, total = [mask.numel() for mask in masks.values()], sum(p.numel() for p in named.values())
    return {'layers': {name: count / max(1, size) for name, count, size in zip(masks, pruned, sizes)},
            'scope': sum(pruned) / max(1, sum(sizes)), 'all': sum(pruned) / max(1, total)}


def pack(tensor, mask):
    """What of `tensor` the mask keeps, for a checkpoint, on the CPU: one bit a weight and the kept values in their type."""
    tensor, mask = tensor.detach().cpu(), mask.cpu()
    return {'bits': torch.from_numpy(np.packbits(mask.numpy())), 'values': tensor[mask], 'shape': list(tensor.shape)}


def unpack(packed):
    """The tensor of pack, to the bit, +0 where the mask pruned. ValueError: bits, values and shape do not fit together."""
    n, bits = math.prod(packed['shape']), packed['bits'].cpu().numpy()
    mask = np.unpackbits(bits)[:n].astype(bool)
    if len(bits) != -(-n // 8) or mask.sum() != packed['values'].numel():
        raise ValueError(f"packed tensor of shape {packed['shape']}: {len(bits)} bytes of mask that keep {mask.sum()} weights do not "
                         f"fit {packed['values'].numel()} values")
    out = torch.zeros(packed['shape'], dtype=packed['values'].dtype)
    out[torch.from_numpy(mask).view(packed['shape'])] = packed['values']
    return out


def masked(weights, masks):
    """{name: weights as the model uses them}, 0 where the masks (name -> bool, of some of the names) prune."""
    return {name: torch.where(masks[name], w, 0) if name in masks else w for name, w in weights.items()}


def pack_weights(weights, masks, dtype):
    """{name: tensor} with the masked ones packed, matrices in `dtype` (what the model reads); unpack_weights undoes it."""
    cast = {name: w.to(dtype) if w.dim() >= 2 else w for name, w in weights.items()}
    return {name: pack(w, masks[name]) if name in masks else w for name, w in cast.items()}


def unpack_weights(weights):
    """{name: dense tensor} of what a checkpoint has under `weights`, packed or not."""
    return {name: unpack(w) if isinstance(w, dict) else w for name, w in weights.items()}
