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
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace

import torch
from torch.nn import functional as F

import train
from model import GPT, model_config
from support.files import write_json
from support.machine import peak_memory
from support.pretrained import starting_weights
from support.rundir import read_metrics, size
from support.settings import Path, Refused, arguments, help_text, parse, run_command, unmet
from support.shards import window_order


@dataclass
class Bench:
    steps: int = 0  # updates of each run, its schedules scaled in proportion; 0: all max_iters
    plain: bool = True  # run the plain step too; it needs the memory that nanoGPT needs
    profile: bool = False  # then profile three steps of train.py: a table and a Chrome trace file
    json: Path = ''  # file for the results; empty: none


def understood(argv):
    """(Bench, settings, arguments for train.py) of a command line, as short as --steps asks for."""
    own = [argument for argument in argv if argument[2:].partition('=')[0] in vars(Bench())]
    told = [argument for argument in argv if argument not in own]
    b, problems, _ = parse(Bench, own, config_files=False)
    if problems := problems + unmet(b, [('steps', b.steps >= 0, 'must not be negative')]):
        raise Refused(problems)
    s, _, _ = parse(train.Settings, told)  # what is wrong with these, train.py says itself
    if b.steps and s.max_iters > 0:
        keys = ['max_iters', 'warmup_iters', 'lr_decay_iters']
        if s.prune_score != 'none':
            keys += ['prune_start', 'prune_end']
        told += [f'--{key}={vars(s)[key] * b.steps // s.max_iters}' for key in keys]
    return b, s, told


# --- the plain step -------------------------------------------------------------------------------


def plain_loss(model, idx, targets):
    """nanoGPT's loss of idx, targets (B, T): all logits at once, without those of padded rows."""
    logits = F.linear(model.hidden(idx), model.token_embedding.weight)  # (B, T, V)
    logits = logits.flatten(0, 1)[:, :model.config.vocab_size]
    return F.cross_entropy(logits, targets.flatten())


def train_plain(s, machine, data):
    """The records of its log steps, as of train.py's metrics.jsonl."""
    torch.manual_seed(s.seed)
    model = GPT(replace(model_config(s, data.vocab_size), fp8=False))
    model.load_state_dict(starting_weights(s, model))
    parameters = list(model.to(machine.device).parameters())
    groups = [dict(params=[p for p in parameters if p.dim() >= 2], weight_decay=s.weight_decay),
              dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(s.beta1, s.beta2), fused=True)
    step_loss = torch.compile(plain_loss, dynamic=False) if s.compile else plain_loss
    mixed = machine.dtype == torch.bfloat16
    windows = data.train.windows(s.block_size)
    first = 0  # position of the next sequence in the order of the windows
    records = []
    mark = time.monotonic()
    mark_step = 0
    for step in range(1, s.max_iters + 1):
        total = torch.zeros((), device=machine.device)
        for _ in range(s.gradient_accumulation_steps):  # the batches of train.py
            order = window_order(range(first, first + s.batch_size), windows, s.seed)
            first += s.batch_size
            idx, targets = train.inputs_and_targets(machine.device, data.train, order, s.block_size)
            with torch.autocast(machine.device.type, torch.bfloat16, enabled=mixed):
                loss = step_loss(model, idx, targets) / s.gradient_accumulation_steps
            loss.backward()
            total += loss.detach()
        if s.grad_clip:
            torch.nn.utils.clip_grad_norm_(parameters, s.grad_clip)
        for group in optimizer.param_groups:
            group['lr'] = train.learning_rate(s, step - 1)
        optimizer.step()
        optimizer.zero_grad()
        if step % s.log_interval == 0 or step in (1, s.max_iters):
            loss = total.item()  # waits for the device, as a log line of train.py does
            seconds = (time.monotonic() - mark) / (step - mark_step)  # a step
            rate = train.effective_batch(s) * s.block_size / seconds
            records.append(dict(step=step, loss=loss, tokens_per_second=rate,
                                peak_memory_bytes=peak_memory(machine.device)['allocated']))
            print(f'plain step {step}/{s.max_iters}  loss {loss:.4f}', flush=True)
            mark = time.monotonic()
            mark_step = step
    return records


# --- results --------------------------------------------------------------------------------------


def tell(name, records):
    """Print and return what the records say of one training. Its first step is warm-up."""
    rates = [record['tokens_per_second'] for record in records]
    rate = statistics.median(rates[1:] or rates)
    peak = max(record['peak_memory_bytes'] for record in records)
    loss = statistics.mean(record['loss'] for record in records[len(records) // 2:])
    print(f'{name:8s}{rate:12,.0f}{size(peak):>14s}{loss:12.4f}')
    return dict(tokens_per_second=rate, peak_memory_bytes=peak, late_loss=loss, records=records)


def profile_ours(told, trace, steps=3):
    """Print which operators or kernels take the time of train.py's steps. trace: file to write."""
    run = train.prepare_run(*train.read_settings(told))
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


def main(argv):
    """Both trainings, their table and what else is asked for. Returns the exit code."""
    argv = arguments(Bench, argv)
    if '--help' in argv:
        print(help_text(Bench, __doc__))
        print(help_text(train.Settings, '\nsettings of train.py'))
        return 0
    b, s, told = understood(argv)
    beside = os.path.dirname(os.path.abspath(s.out_dir))
    os.makedirs(beside, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='bench_', dir=beside) as folder:
        ours = os.path.join(folder, 'ours')
        s, machine, data = train.read_settings([*told, f'--out_dir={ours}'])
        command = [sys.executable, train.__file__, *told, f'--out_dir={ours}']
        code = subprocess.run(command).returncode
        if code or s.dry_run:  # then there is nothing to compare
            return code
        records = read_metrics(os.path.join(ours, 'metrics.jsonl'))
        trainings = {'ours': [record for record in records if 'loss' in record]}
        if b.plain:
            trainings['plain'] = train_plain(s, machine, data)
        result = dict(device=machine.name, torch=torch.__version__, settings=asdict(s))
        print(f'{machine.name}, torch {torch.__version__}; late loss: mean of the second half')
        print(f'{"":8s}{"tokens/s":>12s}{"peak memory":>14s}{"late loss":>12s}')
        result.update({name: tell(name, records) for name, records in trainings.items()})
        if b.json:
            os.makedirs(os.path.dirname(os.path.abspath(b.json)), exist_ok=True)
            write_json(b.json, result)
        if b.profile:
            trace = os.path.join(beside, 'bench_trace.json')
            profile_ours([*told, f'--out_dir={folder}/profile'], trace)
    return 0


if __name__ == '__main__':
    run_command(main)
