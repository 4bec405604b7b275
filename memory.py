"""Memory: what a run will need, and the ladder of ways to need less of it."""
import resource
import sys

import torch

from attention import has_window, is_reciprocal


def predicted_memory(s, config, dtype, parameters, prunable, gpu=False):
    """{part: bytes} on one device. Activations are an estimate, the rest is counted.

    A compiled block keeps 12 widths a token (residual x 2, norms x 2, qkv x 3, attention, 4 of the MLP), 10 of them if it may
    compute the norms again (activation_budget < 1); uncompiled it also keeps the GELU's 4 and float32 norm inputs.
    Latent attention keeps q and its latents instead of q, k and v, with a rotary part q once more; reciprocal attention without
    a window keeps two outputs more, and latent keys (uncompiled 7 widths, of double q, k and v), as counted in the compiler's
    graphs. With float8 the MLP keeps its input in float8, never its GELU, and two matrices; of the head and of its logits'
    gradient there are two in float8. Attention is taken to be fused: dense logits are not in here.
    """
    element = torch.finfo(dtype).bits // 8
    tokens = s.batch_size * s.block_size
    kept = 12 * (1 if s.activation_budget == 1 else min(10 / 12, s.activation_budget)) if s.compile else 17
    latents = s.latent_dim / s.n_embd if s.attention == 'mla' else 0
    kept += (2 * latents - 2 * bool(latents)) if s.compile else (4 if s.latent_norm else 2) * latents
    if s.latent_rotary:  # uncompiled its parts in float32 too
        kept += 1 + s.latent_rotary / s.n_embd if s.compile else 2 + 2 * s.latent_rotary * s.n_head / s.n_embd
    kept += (2 + bool(latents) if s.compile else 7) * (is_reciprocal(config) and not has_window(config))
    kept -= s.fp8 * (0.5 if s.compile else 4.5)
    a_block = int((kept * element + (0 if s.compile else 2 * 4)) * tokens * s.n_embd) + s.fp8 * 8 * s.n_embd**2
    chunk = min(s.loss_chunk_tokens, tokens) * config.padded_vocab_size
    return {
        'working weights': parameters * element if element < 4 else 0,
        'master weights': parameters * 4,
        'moments': parameters * (12 if s.spam_mode == 'reference' else 8),  # AMSGrad has a third
        'gradients': parameters * (4 + element),
        'pruning': prunable * per_weight(s, element) if s.prune_score != 'none' else 0,
        'activations': s.n_layer * a_block + 2 * tokens * s.n_embd * element,
        'logits': chunk * ((element if gpu or s.compile else element + 4 * 4) + 2 * s.fp8)
                  + config.padded_vocab_size * s.n_embd * (4 + 2 * element + 2 * s.fp8),
    }


def per_weight(s, element):
    """Bytes a prunable weight that pruning needs: its mask, and what only some scores or settings keep."""
    extra = {'movement': 4, 'bitter10': 12}.get(s.prune_score, 0)
    return 1 + extra + (4 if s.prune_regrow and element == 4 else 0)


def peak_memory(device):
    """Bytes so far: of the device's allocator on a GPU, of the process on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def ran_out(error):
    """Whether this RuntimeError is for lack of memory; inside the compiler it arrives wrapped."""
    return isinstance(error, torch.OutOfMemoryError) or 'out of memory' in str(error).lower()


def size(n):
    return f'{n / 2**30:.2f} GiB' if n >= 2**28 else f'{n / 2**20:.1f} MiB'


def ladder(s):
    """(label, changed settings) from as configured down; the effective batch is the same on every rung."""
    finer = {'loss_chunk_tokens': max(1, s.loss_chunk_tokens // 4)}
    rungs = [('as configured', {}), ('loss in chunks of a quarter', finer)]
    if s.compile:
        rungs.append(('without compile', {**finer, 'compile': False}))
    batch, micro_batches = s.batch_size, s.gradient_accumulation_steps
    while batch > 1:
        factor = next(f for f in range(2, batch + 1) if batch % f == 0)
        batch, micro_batches = batch // factor, micro_batches * factor
        # Compiled again: without compile was tried for the compiler's own needs, and needs more memory in the steps.
        changes = {**finer, 'batch_size': batch, 'gradient_accumulation_steps': micro_batches}
        rungs.append((f'micro-batches of {batch}, {micro_batches} of them', changes))
    return rungs
