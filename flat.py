"""Parameters end to end in memory, as training lays them out, and their state by the parameters' names.

The matrices of the blocks lie in one flat tensor of N elements, the embeddings in another and all vectors in a third (a mask
is needed only where pruning is), so that an optimizer's step is one kernel a tensor, the gradient norm one reduction each,
and a sum over GPUs one call each.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn

from spam import LEVELS


class Flat(NamedTuple):
    """Parameters of one kind, end to end in memory."""
    parameter: nn.Parameter  # (N,) working weights; `main_grad` (N,) float32 holds the accumulated gradient
    layout: dict  # name -> (offset, shape)
    members: list  # (parameter of the model, a view of `parameter`; its part of `main_grad`), in this order

    def views(self, flat):
        """name -> view of `flat` (N,), which may be the weights, a moment, a mask ..."""
        return views_of(self.layout, flat)


def flatten(model, dtype):
    """Move the model's parameters into flat tensors: [matrices of the blocks and embeddings in `dtype`, vectors in float32].

    The parameters become views of them. accumulate() moves their gradients to `main_grad` after each backward.
    """
    kinds = {'blocks': [], 'embeddings': [], 'vectors': []}
    for name, p in model.named_parameters():
        kinds['vectors' if p.dim() < 2 else 'blocks' if name.startswith('blocks.') else 'embeddings'].append((name, p))
    return [flatten_kind(named, torch.float32 if kind == 'vectors' else dtype) for kind, named in kinds.items() if named]


def flatten_kind(named, dtype):
    """One Flat of [(name, parameter)], in this order, each starting at a multiple of 64 elements."""
    layout, size = {}, 0
    for name, p in named:
        layout[name] = (size, p.shape)
        size += -(-p.numel() // 64) * 64  # kernels want 128-byte aligned starts; the gaps stay zero
    device = named[0][1].device
    flat = Flat(nn.Parameter(torch.zeros(size, dtype=dtype, device=device), requires_grad=False), layout, [])
    flat.parameter.main_grad = torch.zeros(size, dtype=torch.promote_types(dtype, torch.float32), device=device)
    weights, grads = flat.views(flat.parameter.data), flat.views(flat.parameter.main_grad)
    for name, p in named:
        p.data = weights[name].copy_(p.data)
        flat.members.append((p, grads[name]))
    return flat


def clear(flats):
    """Set all gradients to 0, also what a backward that failed halfway has left behind."""
    for flat in flats:
        flat.parameter.main_grad.zero_()
        for p, _ in flat.members:
            p.grad = None


def add_each(sums, terms):
    """Add each tensor of `terms` to its one of `sums`. Compiled it is one kernel for all, which mixed types are not otherwise."""
    torch._foreach_add_(sums, terms)


def accumulate(flats, add=add_each):
    """Add the gradients of the last backward to `main_grad` and free them. add: add_each, compiled or not."""
    pairs = [(p, main_grad) for flat in flats for p, main_grad in flat.members if p.grad is not None]
    add([main_grad for _, main_grad in pairs], [p.grad for p, _ in pairs])
    for p, _ in pairs:
        p.grad = None


def views_of(layout, flat):
    """name -> view of `flat` (N,), for a layout name -> (offset, shape)."""
    return {name: flat[offset:offset + math.prod(shape)].view(shape) for name, (offset, shape) in layout.items()}


def gradient_norm(flats):
    """Global 2-norm of the accumulated gradients, a 0-dim float32 tensor on their device."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(f.parameter.main_grad) for f in flats]))


def named_state(flats, optimizer):
    """{kind of state: {parameter name: view}}: all that defines the trained model and the optimizer, but for the step.

    Kinds: weights (float32 masters, dense while pruned weights may regrow), exp_avg, exp_avg_sq, and what the optimizer
    has besides, such as mask, initial (prunable names only), max_exp_avg_sq; tracker_* of bitter10; statistics of
    'stable', 0-dim. `shared`, where there is one: {name: tensor or number} of the optimizer as a whole.
    """
    named = {'weights': {}, 'exp_avg': {}, 'exp_avg_sq': {}}
    for flat in flats:
        state = optimizer.state_of(flat.parameter)
        group = next(group for group in optimizer.param_groups if group['params'][0] is flat.parameter)
        named['weights'].update(flat.views(state.get('master', flat.parameter.data)))
        for key, value in state.items():
            if key == 'trackers':
                for name, tracker in value.items():
                    for part, tensor in tracker.items():
                        named.setdefault(f'tracker_{part}', {})[name] = tensor
            elif key in LEVELS:
                named.setdefault(key, {}).update(zip(flat.layout, value.unbind()))
            elif torch.is_tensor(value) and key != 'master':
                views = flat.views(value)
                chosen = group['prunable'] if key in ('mask', 'initial') else views
                named.setdefault(key, {}).update({name: view for name, view in views.items() if name in chosen})
    return {**named, **({'shared': optimizer.shared} if optimizer.shared else {})}


@torch.no_grad()
def load_named_state(flats, optimizer, saved, step=0):
    """Inverse of named_state: copies what `saved` has, refreshes the working weights, sets the step of the clock."""
    for key, tensors in named_state(flats, optimizer).items():
        for name, tensor in tensors.items():
            if key in saved and key != 'shared':
                tensor.copy_(saved[key][name])
    optimizer.load_shared(saved.get('shared', {}))
    if optimizer.shared:
        optimizer.shared['updates'] = step
    for flat in flats:
        state = optimizer.state_of(flat.parameter)
        master = state.get('master', flat.parameter)
        state['step'] = step
        if 'restart' in state:
            state['restart'] = optimizer.restart_at(step)
        if 'initial' in state and 'initial' not in saved:
            state['initial'].copy_(master)
        flat.parameter.copy_(torch.where(state['mask'], master, 0) if 'mask' in state else master)
