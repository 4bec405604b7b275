"""Our training beside a plain mixed-precision step: same model, same start, same batches.

    python bench.py config/vanilla_baseline.py --steps=300 --json=out/bench.json
    python bench.py config/quickstart.py --steps=30  # any preset, made short; this one on a CPU
    python bench.py config/vanilla_baseline.py --steps=20 --plain=False --profile=True

Takes all arguments of train.py besides its own. Runs the real train.py in a process of its own;
then the plain step here, as nanoGPT has it: float32 weights under autocast, all logits at once,
torch.optim.AdamW; never pruned, never in float8. The runs live in a temporary folder beside out_dir
and leave nothing behind. Exit code: that of train.py.
"""
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace

import torch
from torch.nn import functional as F

import train
from export import starting_weights
from model import GPT, model_config
from support.files import read_json, write_json
from support.machine import peak_memory
from support.memory import ran_out
from support.rundir import read_metrics, size
from support.settings import Refused, help_text, parse, run_command
from support.shards import window_order

LATE_STEPS = 50  # the losses that are compared are those logged in them, the last of a run


@dataclass
class Bench:
    steps: int = 0  # updates of each run, its schedules scaled in proportion; 0: all max_iters
    plain: bool = True  # run the plain step too
    profile: bool = False  # then profile three steps of train.py: a table and a Chrome trace file
    json: str = ''  # file for the results; empty: none


def understood(argv):
    """(Bench, arguments for train.py, problems that train.py does not see) of a command line."""
    own = [told for told in argv if told[2:].partition('=')[0] in vars(Bench())]
    told = [argument for argument in argv if argument not in own]
    b, problems, _ = parse(Bench, own, config_files=False)
    s, _, _ = parse(train.Settings, told)
    if b.steps > 0 and s.max_iters > 0:
        keys = ['max_iters', 'warmup_iters', 'lr_decay_iters']
        if s.prune_score != 'none':
            keys += ['prune_start', 'prune_end']
        told += [f'--{key}={getattr(s, key) * b.steps // s.max_iters}' for key in keys]
    if b.steps < 0 or (b.steps or s.max_iters) == 1:
        problems.append(f'steps={b.steps} max_iters={s.max_iters}: at least 2 steps are needed, '
                        'because the first is warm-up')
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        problems.append('bench.py compares single processes; start it without torchrun')
    folder = os.path.dirname(os.path.abspath(b.json))
    if b.json and (os.path.isdir(b.json) or not os.access(folder, os.W_OK)):
        problems.append(f'json={b.json!r}: cannot be written; name a file in a folder that exists')
    beside = os.path.dirname(os.path.abspath(s.out_dir))
    return b, [*told, f'--out_dir={os.path.join(beside, "bench")}'], problems


# --- the two trainings ----------------------------------------------------------------------------


def train_ours(told):
    """Run train.py: (exit code, seconds until its first step was done)."""
    command = [sys.executable, os.path.abspath(train.__file__), *told]
    seconds = None
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end='', flush=True)
            if seconds is None and re.match(r'step +\d+  loss', line):
                seconds = time.monotonic() - start
    return process.returncode, seconds


def plain_loss(model, idx, targets):
    """nanoGPT's loss of idx, targets (B, T): all logits at once. Padding is left out, as in ours.
    """
    logits = F.linear(model.hidden(idx), model.token_embedding.weight)  # (B, T, V)
    logits = logits.flatten(0, 1)[:, :model.config.vocab_size]
    return F.cross_entropy(logits, targets.flatten())


def micro_batches(s, machine, data):
    """Yields tokens and their successors (B, T) in the order in which train.py reads them."""
    for first in range(0, s.max_iters * train.effective_batch(s), s.batch_size):
        positions = range(first, first + s.batch_size)
        windows = window_order(positions, data.train.windows(s.block_size), s.seed)
        yield train.inputs_and_targets(machine.device, data.train, windows, s.block_size)


def train_plain(s, machine, data):
    """The records of its log steps, as of train.py's metrics.jsonl."""
    torch.manual_seed(s.seed)
    model = GPT(replace(model_config(s, data.vocab_size), fp8=False))
    model.load_state_dict(starting_weights(s, model))
    model.to(machine.device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=s.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(s.beta1, s.beta2),
                                  fused=machine.device.type == 'cuda')
    step_loss = torch.compile(plain_loss, dynamic=False) if s.compile else plain_loss
    mixed = machine.dtype == torch.bfloat16
    batches = micro_batches(s, machine, data)
    records = []
    mark = time.monotonic()
    mark_step = 0
    for step in range(1, s.max_iters + 1):
        total = torch.zeros((), device=machine.device)
        for _ in range(s.gradient_accumulation_steps):
            idx, targets = next(batches)
            with torch.autocast(machine.device.type, torch.bfloat16, enabled=mixed):
                loss = step_loss(model, idx, targets) / s.gradient_accumulation_steps
            loss.backward()
            total += loss.detach()
        if s.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        for group in optimizer.param_groups:
            group['lr'] = train.learning_rate(s, step - 1)
        optimizer.step()
        optimizer.zero_grad()
        if step % s.log_interval == 0 or step in (1, s.max_iters):
            loss = total.item()  # waits for the device, as a log line of train.py does
            now = time.monotonic()
            tokens = (step - mark_step) * train.effective_batch(s) * s.block_size
            records.append(dict(step=step, loss=loss, tokens_per_second=tokens / (now - mark),
                                peak_memory_bytes=peak_memory(machine.device)['allocated']))
            print(f'plain step {step}/{s.max_iters}  loss {loss:.4f}', flush=True)
            mark = now
            mark_step = step
    return records


def plain_if_it_fits(s, machine, data):
    """train_plain, or no records if memory runs out, because the plain step has no ladder."""
    try:
        return train_plain(s, machine, data)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        print(f'plain step: left out, {str(error).splitlines()[0]}')
        return []


def profile_ours(told, trace, steps=3):
    """Print which operators or kernels take the time of train.py's steps. trace: file to write."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # it reports its own start and stop otherwise
    run = train.prepare_run(told)
    for _ in range(steps):
        train.one_step(run)  # compiles
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            loss, _ = train.one_step(run)
        loss.item()  # waits for the device
    run.log.close()
    kind = 'device' if run.machine.device.type == 'cuda' else 'cpu'
    print(profiler.key_averages().table(sort_by=f'self_{kind}_time_total', row_limit=25))
    profiler.export_chrome_trace(trace)
    print(f'{steps} steps of train.py, also for chrome://tracing or ui.perfetto.dev: {trace}')


# --- results --------------------------------------------------------------------------------------


def figures(records, flops, peak_flops):
    """What the table says of one training. flops: a token; peak_flops: of the device, or None."""
    rate = statistics.median(record['tokens_per_second'] for record in records[1:])
    steps = records[-1]['step']
    late_from = steps - min(LATE_STEPS, steps // 2)
    late = [record['loss'] for record in records if record['step'] > late_from]
    return dict(tokens_per_second=rate, mfu=rate * flops / peak_flops if peak_flops else None,
                peak_memory_bytes=records[-1]['peak_memory_bytes'],
                late_loss=statistics.mean(late), records=records)


def results(s, machine, data, run_dir, plain):
    """What is known of both trainings, as a dict. plain: the records of train_plain, if it ran."""
    metrics = read_metrics(os.path.join(run_dir, 'metrics.jsonl'))
    ours = [record for record in metrics if 'loss' in record]
    summary = read_json(os.path.join(run_dir, 'summary.json'))
    with torch.device('meta'):
        flops = GPT(model_config(s, data.vocab_size)).flops_per_token()
    with open(os.path.join(run_dir, 'train.log'), encoding='utf-8') as f:
        graphs = re.findall(r'^compiled graphs (\d+)', f.read(), re.M)
    return dict(
        device=machine.name, torch=torch.__version__, settings=asdict(s), flops_a_token=flops,
        peak_flops=machine.peak_flops, ours=figures(ours, flops, machine.peak_flops),
        plain=figures(plain, flops, machine.peak_flops) if plain else None,
        graphs=summary['compiled_graphs'], graph_breaks=summary['graph_breaks'],
        recompilations=int(graphs[-1]) - int(graphs[0]) if graphs else 0)


def table(r):
    """The results as text."""
    lines = [f'{r["device"]}, torch {r["torch"]}', '',
             f'{"":8s}{"tokens/s":>12s}{"MFU":>10s}{"peak memory":>14s}{"late loss":>12s}']
    for name in ('ours', 'plain'):
        if row := r[name]:
            mfu = f'{row["mfu"]:.1%}' if row['mfu'] else 'unknown'
            lines.append(f'{name:8s}{row["tokens_per_second"]:12,.0f}{mfu:>10s}'
                         f'{size(row["peak_memory_bytes"]):>14s}{row["late_loss"]:12.4f}')
    if r['plain']:
        difference = r['ours']['late_loss'] - r['plain']['late_loss']
        lines.append(f'difference in late loss {difference:+.4f} nat')
    peak = f'{r["peak_flops"]:.3g} FLOP/s in bfloat16' if r['peak_flops'] else 'unknown'
    return '\n'.join([
        *lines, '',
        f'late loss: mean of those logged in the last {LATE_STEPS} steps, or half of the run',
        'MFU = tokens/s x FLOPs a token / peak; FLOPs a token = 6 a weight that multiplies + those '
        f'of attention (GPT.flops_per_token) = {r["flops_a_token"]:,}; peak {peak}',
        f'train.py: first step done after {r["first_step_seconds"]:.1f} s; {r["graphs"]} compiled '
        f'graphs, {r["recompilations"]} of them after it; {r["graph_breaks"]} graph breaks'])


def main(argv):
    """Both trainings, their table and what else is asked for. Returns the exit code."""
    if '--help' in argv:
        print(help_text(Bench, __doc__))
        print(help_text(train.Settings, '\nsettings of train.py'))
        return 0
    b, told, problems = understood(argv)
    try:
        s, machine, data = train.read_settings(told)
    except Refused as refused:
        problems += refused.problems
    if problems:
        raise Refused(problems)
    beside = os.path.dirname(s.out_dir)
    os.makedirs(beside, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='bench_', dir=beside) as folder:
        run_dir = os.path.join(folder, 'ours')
        code, first_step_seconds = train_ours([*told, f'--out_dir={run_dir}'])
        if code:
            return code
        plain = plain_if_it_fits(s, machine, data) if b.plain else []
        result = results(s, machine, data, run_dir, plain)
        result['first_step_seconds'] = first_step_seconds
        print('\n' + table(result))
        if b.json:
            write_json(b.json, result)
        if b.profile:
            trace = os.path.join(beside, 'bench_trace.json')
            profile_ours([*told, f'--out_dir={folder}/profile'], trace)
    return 0


if __name__ == '__main__':
    run_command(main)
