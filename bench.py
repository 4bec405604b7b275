"""Our training beside a plain mixed-precision step, same model, same start, same batches.

    python bench.py config/vanilla_baseline.py --max_iters=300 --lr_decay_iters=50000 --out_dir=out/bench

All arguments are train.py's. Runs the real train.py in a process of its own, then the plain step here: float32
weights under autocast, all logits at once, torch.optim.AdamW. Prints speed, peak memory and the two loss curves'
difference, and writes out_dir/bench.json.
"""
import contextlib
import os
import statistics
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

from files import read_json, write_json
from model import GPT
from optim import learning_rate_at
from preflight import effective_batch, model_config, preflight
from rundir import read_metrics
from settings import Settings, check, parse, run_command
from shards import window_order
from train import inputs_and_targets


def plain_loss(model, idx, targets):
    """The loss as nanoGPT has it: the logits of all tokens and all (padded) rows, then one cross-entropy."""
    logits = F.linear(model.hidden(idx), model.token_embedding.weight)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train_plain(s, machine, data, say):
    """Losses of every step, seconds of every step after the first, peak bytes (0 on a CPU)."""
    device, gpu = machine.device, machine.device.type == 'cuda'
    torch.manual_seed(s.seed)
    model = GPT(model_config(s, data.vocab_size)).to(device)
    kinds = [[p for p in model.parameters() if (p.dim() >= 2) == matrices] for matrices in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=kinds[0], weight_decay=s.weight_decay), dict(params=kinds[1], weight_decay=0.0)],
                                  betas=(s.beta1, s.beta2), eps=s.eps, fused=gpu)
    step_loss = torch.compile(plain_loss, dynamic=False) if s.compile else plain_loss
    autocast = torch.autocast(device.type, torch.bfloat16) if machine.dtype == torch.bfloat16 else contextlib.nullcontext()
    losses, seconds, start = [], [], time.monotonic()
    for step in range(s.max_iters):
        total = torch.zeros((), device=device)
        for micro in range(s.gradient_accumulation_steps):
            first = step * effective_batch(s) + micro * s.batch_size
            order = window_order(range(first, first + s.batch_size), data.train.windows(s.block_size), s.seed)
            idx, targets = inputs_and_targets(device, data.train, order, s.block_size)
            with autocast:
                loss = step_loss(model, idx, targets) / s.gradient_accumulation_steps
            loss.backward()
            total += loss.detach()
        if s.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        for group in optimizer.param_groups:
            group['lr'] = learning_rate_at(step, s.learning_rate, s.min_lr, s.warmup_iters, s.lr_decay_iters or s.max_iters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        if (step + 1) % s.log_interval == 0 or step == 0:
            losses[-1].item()  # waits for the device, as a log line would
            seconds.append((time.monotonic() - start) / (s.log_interval if step else 1))
            start = time.monotonic()
            say(f'plain step {step + 1}/{s.max_iters}  loss {losses[-1].item():.4f}  {seconds[-1] * 1e3:.1f} ms')
    return [loss.item() for loss in losses], seconds[1:], torch.cuda.max_memory_allocated() if gpu else 0


def main(argv):
    """Both trainings, one after the other, their table and bench.json; returns the exit code."""
    s, problems = parse(Settings, argv)
    machine, data = preflight(s, problems + check(s))
    trained = subprocess.run([sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py'), *argv])
    if trained.returncode:
        return trained.returncode
    ours = [r for r in read_metrics(os.path.join(s.out_dir, 'metrics.jsonl')) if 'loss' in r]
    summary = read_json(os.path.join(s.out_dir, 'summary.json'))
    losses, seconds, peak = train_plain(s, machine, data, print)
    tokens = effective_batch(s) * s.block_size
    late = [(r['loss'], losses[r['step'] - 1]) for r in ours if r['step'] > s.max_iters - 50]
    result = dict(
        device=machine.name, torch=torch.__version__, tokens_a_step=tokens,
        ours=dict(tokens_per_second=statistics.median(r['tokens_per_second'] for r in ours[1:]), peak_bytes=summary['peak_memory_bytes'],
                  late_loss=statistics.mean(a for a, _ in late), compiled_graphs=summary['compiled_graphs'],
                  graph_breaks=summary['graph_breaks']),
        plain=dict(tokens_per_second=tokens / statistics.median(seconds), peak_bytes=peak, late_loss=statistics.mean(b for _, b in late)),
        late_difference=statistics.mean(a - b for a, b in late), late_steps=len(late),
        curve=[(r['step'], r['loss'], losses[r['step'] - 1]) for r in ours])
    write_json(os.path.join(s.out_dir, 'bench.json'), result)
    for name in ('ours', 'plain'):
        r = result[name]
        print(f'{name:6s} {r["tokens_per_second"] / 1e3:8.1f}k tok/s  {r["peak_bytes"] / 2**30:6.2f} GiB  '
              f'loss of the last 50 steps {r["late_loss"]:.4f}')
    print(f'difference of the last {len(late)} logged losses: {result["late_difference"]:+.4f} nat')
    return 0


if __name__ == '__main__':
    run_command(main)
