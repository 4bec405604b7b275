"""Gradient spikes: when moments are reset, by how much the learning rate is held back, what is taken off a gradient.

The arithmetic of AdamWSPAM's three modes, apart from the element-wise clip, which is part of optim.adamw_update. What
depends on the step alone is computed on the host; what depends on gradients stays on their device, unwaited for.
"""
import math
from typing import NamedTuple

import torch

MODES = {'paper': 5000.0, 'reference': 50.0, 'stable': None}  # -> default theta; None: the mode has no element-wise clip
HISTORY, ENOUGH, Z_LIMIT = 100, 10, 2.0  # reference: norms remembered, norms needed for a verdict, z-score of a spike
DAMPING = (0.5, 0.9)  # reference: factors of m and v on a spike
V_FLOOR = 1e-12  # reference: added to v in its clip
GAMMA_NORM, GAMMA_SQUARE, GAMMA_LEVEL = 0.7, 0.9, 0.999  # stable: decays gamma 1 to 3 of arXiv 2502.17055
LEVELS = ('clip_level', 'norm_mean', 'norm_square')  # stable: what it remembers of each tensor


class Cycle(NamedTuple):
    """The host's half of AdamWSPAM. Updates are counted from 0; the one numbered t > 0 is a reset if interval divides t.

    k = t modulo interval: updates since the last reset, or since the start.
    """
    mode: str
    interval: int  # updates between resets; 0: none
    warmup: int  # N
    theta: float | None
    grace: int  # updates after the start or a reset without clipping, paper only
    step_twice: bool = False  # defect of the 2025 runs: the clock went by 2 an update, so an interval of 1000 meant 500
    lr_sticks: bool = False  # defect: each warm-up scaled what the last had left of the learning rate, which never recovered
    decay_lost: bool = False  # defect: weight decay was not passed on

    def since_reset(self, t):
        """(resets so far, the one at update t included; k)."""
        clock = t * (1 + self.step_twice)
        return divmod(clock, self.interval) if self.interval else (0, clock)

    def is_reset(self, t):
        resets, k = self.since_reset(t)
        return resets > 0 and k == 0

    def recovering(self, t):
        """Whether update t lies in the N + 1 updates from a reset on, when moments say little about a weight."""
        resets, k = self.since_reset(t)
        return resets > 0 and k <= self.warmup

    def lr_factor(self, t):
        """What the learning rate of update t is scaled by."""
        resets, k = self.since_reset(t)
        if resets == 0 or self.mode == 'stable':  # restarting the bias correction replaces its warm-up
            return 1.0
        if not self.lr_sticks:
            return self.ramp(k)
        positions = range(0, self.interval, 1 + self.step_twice)
        return math.prod(map(self.ramp, positions)) ** (resets - 1) * math.prod(self.ramp(i) for i in positions if i <= k)

    def ramp(self, k):
        """0.01 at k = 0 up to 1 after k = N as in the authors' code, or from 0.001 to 1 at k = N as in the 2025 runs."""
        if k > self.warmup:
            return 1.0
        if self.mode == 'paper':
            return 1 - 0.99 * (1 + math.cos(math.pi * k / (self.warmup + 1))) / 2
        return max(1e-3, (1 - math.cos(math.pi * k / self.warmup)) / 2) if self.warmup else 1.0

    def threshold(self, t):
        """theta of update t, infinite while nothing is clipped."""
        free = self.since_reset(t)[1] < self.grace if self.mode == 'paper' else t == 0  # the reference had no v at first
        return math.inf if free else self.theta


def check_cycle(owner, cycle, known):
    """ValueError if the settings of a Cycle are impossible. known: prune.known, which also guesses what was meant."""
    known(f'{owner}: spam_mode', cycle.mode, MODES)
    for name in ('interval', 'warmup', 'grace'):
        if getattr(cycle, name) < 0:
            raise ValueError(f'{owner}: spam_{name}={getattr(cycle, name)} must not be negative')
    if cycle.theta is not None and not cycle.theta > 0:
        raise ValueError(f'{owner}: spam_theta={cycle.theta} must be above 0; math.inf clips nothing')
    for name in ('step_twice', 'lr_sticks', 'decay_lost'):
        if getattr(cycle, name) and cycle.mode != 'reference':
            raise ValueError(f"{owner}: spam_{name}=True repeats a defect of spam_mode='reference', not of {cycle.mode!r}; leave it False")
    if cycle.step_twice and cycle.interval % 2:
        raise ValueError(f'{owner}: spam_interval={cycle.interval} must be even with spam_step_twice=True, which halves it')


def new_history(device):
    """What z_score_fires remembers: the last HISTORY gradient norms and how many there have been."""
    return {'norms': torch.zeros(HISTORY, dtype=torch.float64, device=device),
            'norm_count': torch.zeros((), dtype=torch.int64, device=device)}


def z_score_fires(history, norm, finite):
    """Whether `norm` lies more than Z_LIMIT standard deviations above the mean of the norms before it, 0-dim bool.

    Then remembers it, unless it or the step is not finite. With fewer than ENOUGH norms, or equal ones, never.
    """
    norms, count = history['norms'], history['norm_count']
    position, norm = torch.arange(HISTORY, device=norms.device), norm.double()
    finite, there = finite & norm.isfinite(), position < count
    known = count.clamp(min=1, max=HISTORY)
    mean = torch.where(there, norms, 0).sum() / known
    deviation = (torch.where(there, norms - mean, 0).square().sum() / known).sqrt()
    fires = finite & (count >= ENOUGH) & (deviation > 0) & (norm - mean > Z_LIMIT * deviation)
    norms.copy_(torch.where(finite & (position == count % HISTORY), norm, norms))
    count.add_(finite)
    return fires


def stabilise(grads, outs, levels, clip, finite, step, eps):
    """AdaClip and AdaGN of arXiv 2502.17055 on S tensors: writes the new gradients to `outs` (which may be `grads`).

    levels: three (S,) tensors by LEVELS, updated; step: updates they have seen, this one included; clip: 0-dim, scales
    the gradients first. Elements of a tensor above its usual maximum T are scaled by T / max, then the tensor gets its
    usual norm. Returns the number of elements above T, 0-dim int64, 0 where a step is not finite. A tensor of zeros stays.
    """
    largest = torch.stack([torch.linalg.vector_norm(g, math.inf) for g in grads]).to(clip.dtype) * clip  # (S,)
    level = GAMMA_LEVEL * levels['clip_level'] + (1 - GAMMA_LEVEL) * largest
    usual = level / (1 - GAMMA_LEVEL ** step)
    shrink = torch.where(largest > 0, usual / largest, 1.0)
    counts, norms = [], []
    for g, out, limit, factor in zip(grads, outs, usual.unbind(), shrink.unbind()):
        g = g.to(clip.dtype) * clip
        above = g.abs() > limit
        counts.append(above.sum())
        norms.append(torch.linalg.vector_norm(out.copy_(torch.where(above, g * factor, g))))
    norm = torch.stack(norms)
    mean = GAMMA_NORM * levels['norm_mean'] + (1 - GAMMA_NORM) * norm
    square = GAMMA_SQUARE * levels['norm_square'] + (1 - GAMMA_SQUARE) * norm * norm
    wanted = mean / (1 - GAMMA_NORM ** step) / ((square / (1 - GAMMA_SQUARE ** step)).sqrt() + eps)
    for out, gain in zip(outs, torch.where(norm > 0, wanted / norm, 1.0).unbind()):
        out.mul_(gain)
    fine = finite & norm.isfinite()
    for key, new in zip(LEVELS, (level, mean, square)):
        levels[key].copy_(torch.where(fine, new, levels[key]))
    return torch.where(finite, torch.stack(counts).sum(), 0)
