"""The optimizer: one update in one pass over memory, its schedule, and parameters laid out for it.

Training keeps three kinds of numbers apart. Working weights are what the model reads (bfloat16 on a GPU), master
weights and moments are float32 and belong to the optimizer, and gradients accumulate in float32 over the
micro-batches. All of them live in flat tensors of N elements, one for the matrices and one for the vectors, so
that a step is one kernel a tensor, the gradient norm one reduction, and a sum over GPUs one call.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn


def learning_rate_at(step, peak, minimum, warmup, decay):
    """Learning rate of update `step` (from 0): linear warm-up, cosine to `minimum` at `decay`, constant after it."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step >= decay:
        return minimum
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (decay - warmup)))


def adamw_update(weight, grad, exp_avg, exp_avg_sq, working, clip, finite, keep, step_size, root, *, beta1, beta2, eps):
    """AdamW (arXiv 1711.05101, algorithm 2) in place on tensors of one shape, float32 or float64.

    weight: master weights; working: their copy in another type that the model reads, or None; grad: any float type.
    0-dimensional tensors, so that a new value compiles nothing anew: clip scales the gradient, finite = False leaves
    everything as it was, keep = 1 - lr * weight_decay, step_size = lr / (1 - beta1^t), root = sqrt(1 - beta2^t).
    """
    g = grad.to(weight.dtype) * clip
    m = torch.lerp(exp_avg, g, 1 - beta1)
    v = exp_avg_sq * beta2 + g * g * (1 - beta2)
    w = weight * keep - step_size * m / (v.sqrt() / root + eps)
    exp_avg.copy_(torch.where(finite, m, exp_avg))
    exp_avg_sq.copy_(torch.where(finite, v, exp_avg_sq))
    weight.copy_(torch.where(finite, w, weight))
    if working is not None:
        working.copy_(weight)


class AdamW(torch.optim.Optimizer):
    """Drop-in for torch.optim.AdamW with the same defaults; `step()` reads `p.main_grad` if there is one, else `p.grad`.

    A parameter of less than float32 gets float32 master weights and moments: `state[p]` has `step`, `exp_avg`,
    `exp_avg_sq` and, where needed, `master`. compiled=True fuses the update; meant for few, large parameters.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, compiled=False):
        for name, value, fine in (('lr', lr, lr >= 0), ('eps', eps, eps >= 0), ('weight_decay', weight_decay, weight_decay >= 0),
                                  ('betas', betas, all(0 <= beta < 1 for beta in betas))):
            if not fine:
                raise ValueError(f'AdamW: {name}={value} is out of range')
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay))
        self.update = torch.compile(adamw_update, fullgraph=True, dynamic=False) if compiled else adamw_update

    def state_of(self, p):
        """The state of parameter p, created at first use."""
        state = self.state[p]
        if not state:
            exact = torch.promote_types(p.dtype, torch.float32)
            state['step'] = 0
            state['exp_avg'] = torch.zeros_like(p, dtype=exact)
            state['exp_avg_sq'] = torch.zeros_like(p, dtype=exact)
            if exact != p.dtype:
                state['master'] = p.detach().to(exact)
        return state

    @torch.no_grad()
    def step(self, closure=None, clip=None, finite=None):
        """One update. clip: 0-dim tensor that scales all gradients (default 1); finite: 0-dim bool tensor, False skips."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group['params']:
                grad = getattr(p, 'main_grad', p.grad)
                if grad is not None:
                    self._update_one(group, p, grad, clip, finite)
        return loss

    def _update_one(self, group, p, grad, clip, finite):
        state = self.state_of(p)
        state['step'] += 1
        (beta1, beta2), lr = group['betas'], group['lr']
        exact = state['exp_avg'].dtype

        def scalar(value):
            return torch.full((), value, dtype=exact, device=p.device)

        self.update(
            state.get('master', p.detach()), grad, state['exp_avg'], state['exp_avg_sq'],
            p.detach() if 'master' in state else None,
            scalar(1.0) if clip is None else clip.to(exact),
            torch.full((), True, device=p.device) if finite is None else finite,
            scalar(1 - lr * group['weight_decay']), scalar(lr / (1 - beta1 ** state['step'])),
            scalar(math.sqrt(1 - beta2 ** state['step'])), beta1=beta1, beta2=beta2, eps=group['eps'])

    def load_state_dict(self, state_dict):
        """As in torch, except that moments and masters keep the type they were saved in."""
        super().load_state_dict(state_dict)  # torch casts them to the parameter's type
        parameters = [p for group in self.param_groups for p in group['params']]
        for index, saved in state_dict['state'].items():
            for key, value in saved.items():
                if torch.is_tensor(value):
                    self.state[parameters[index]][key] = value.detach().to(parameters[index].device, copy=True)


class Flat(NamedTuple):
    """Parameters of one kind, end to end in memory."""
    parameter: nn.Parameter  # (N,) working weights; `main_grad` (N,) float32 holds the accumulated gradient
    layout: dict  # name -> (offset, shape)

    def views(self, flat):
        """name -> view of `flat` (N,), which may be the weights, a moment, a mask ..."""
        return {name: flat[offset:offset + math.prod(shape)].view(shape) for name, (offset, shape) in self.layout.items()}


def flatten(model, dtype):
    """Move the model's parameters into two flat tensors, [matrices in `dtype`, vectors in float32].

    The parameters become views of them. Every backward adds its gradients to `main_grad` and frees them.
    """
    kinds = [[(n, p) for n, p in model.named_parameters() if (p.dim() >= 2) == matrices] for matrices in (True, False)]
    return [flatten_kind(kinds[0], dtype), flatten_kind(kinds[1], torch.float32)]


def flatten_kind(named, dtype):
    layout, size = {}, 0
    for name, p in named:
        layout[name] = (size, p.shape)
        size += -(-p.numel() // 64) * 64  # kernels want 128-byte aligned starts; the gaps stay zero
    device = named[0][1].device
    flat = Flat(nn.Parameter(torch.zeros(size, dtype=dtype, device=device), requires_grad=False), layout)
    flat.parameter.main_grad = torch.zeros(size, dtype=torch.promote_types(dtype, torch.float32), device=device)
    weights, grads = flat.views(flat.parameter.data), flat.views(flat.parameter.main_grad)
    for name, p in named:
        p.data = weights[name].copy_(p.data)

        def accumulate(p, main_grad=grads[name]):
            main_grad.add_(p.grad)
            p.grad = None

        p.register_post_accumulate_grad_hook(accumulate)
    return flat


def build_optimizer(flats, *, lr, betas, eps, weight_decay, compiled):
    """AdamW over [matrices, vectors]; weight decay is for the matrices (GPT-2/3 practice, as in nanoGPT)."""
    matrices, vectors = flats
    groups = [dict(params=[matrices.parameter], weight_decay=weight_decay), dict(params=[vectors.parameter], weight_decay=0.0)]
    return AdamW(groups, lr=lr, betas=betas, eps=eps, compiled=compiled)


def named_state(flats, optimizer):
    """{'weights' | 'exp_avg' | 'exp_avg_sq': {parameter name: float32 view}}: all that defines the trained model."""
    named = {'weights': {}, 'exp_avg': {}, 'exp_avg_sq': {}}
    for flat in flats:
        state = optimizer.state_of(flat.parameter)
        named['weights'].update(flat.views(state.get('master', flat.parameter.data)))
        for key in ('exp_avg', 'exp_avg_sq'):
            named[key].update(flat.views(state[key]))
    return named


@torch.no_grad()
def load_named_state(flats, optimizer, saved, step=0):
    """Inverse of named_state: copies what `saved` has, refreshes the working weights, sets the step of the clock."""
    for key, tensors in named_state(flats, optimizer).items():
        for name, tensor in tensors.items():
            if key in saved:
                tensor.copy_(saved[key][name])
    for flat in flats:
        state = optimizer.state_of(flat.parameter)
        state['step'] = step
        flat.parameter.copy_(state.get('master', flat.parameter))


def gradient_norm(flats):
    """Global 2-norm of the accumulated gradients, a 0-dim float32 tensor on their device."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(f.parameter.main_grad) for f in flats]))
