"""Our training beside a plain mixed-precision step: same model, same start, same batches.

    python bench.py config/vanilla_baseline.py --max_iters=300 --lr_decay_iters=300 --warmup_iters=100 --json=out/bench.json
    python bench.py config/quickstart.py --steps=30          # any preset, made short; this one on the CPU
    python bench.py --help

Takes all arguments of train.py besides its own. Runs the real train.py in a process of its own; then the plain step here,
as nanoGPT has it: float32 weights under autocast, all logits at once, torch.optim.AdamW, never pruned; then a few steps under
the profiler (anatomy.py). Prints one table: speed, loss, start-up, memory and time by part. The runs live in a temporary folder
beside out_dir and leave nothing behind. Exit code: that of train.py.
"""
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch.nn import functional as F

import anatomy
from export import starting_weights
from files import read_json, write_json
from memory import ran_out, size
from model import GPT, model_config
from optim import learning_rate_at
from preflight import effective_batch, preflight
from rundir import read_metrics
from settings import Settings, check, help_text, parse, run_command
from shards import window_order
from train import inputs_and_targets

LATE_STEPS = 50  # the losses that are compared are those of the last 50 steps


@dataclass
class Bench(Settings):
    # --- bench ---------------------------------------------------------------------------------------
    steps: int = 0  # updates of each run, its warm-up, decay and pruning ramp shortened in proportion; 0: all max_iters as they are
    plain: bool = True  # run the plain step too
    profile: bool = False  # print the kernels (on a CPU the operators) that take most of a step
    json: str = ''  # file for all results, kernels included; empty: none


# --- the two trainings -------------------------------------------------------------------------------


def train_ours(s):
    """Run train.py: (exit code, seconds until it logged its first step, compiled graphs at each report of them)."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')
    told = [f'--{key}={value}' for key, value in asdict(s).items() if value != getattr(Settings, key)]
    start, first, graphs = time.monotonic(), None, []
    with subprocess.Popen([sys.executable, script, *told], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end='', flush=True)
            if first is None and re.match(r'step +\d+  loss', line):
                first = time.monotonic() - start
            graphs += map(int, re.findall(r'^compiled graphs (\d+)', line))
    return process.returncode, first, graphs


def plain_loss(model, idx, targets):
    """The loss as nanoGPT has it: the logits of all tokens at once, then one cross-entropy. Unlike there, padded rows take no
    probability: with few tokens that would be another loss."""
    logits = F.linear(model.hidden(idx), model.token_embedding.weight)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1)[:, :model.config.vocab_size], targets.flatten())


def train_plain(s, machine, data, say):
    """(loss of every step, tokens/s at every log step but the first, peak bytes or None on a CPU). Never in float8."""
    s = replace(s, fp8=False)
    device, gpu = machine.device, machine.device.type == 'cuda'
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(s.seed)
    model = GPT(model_config(s, data.vocab_size))
    model.load_state_dict(starting_weights(s, model))
    model.to(device)
    kinds = [[p for p in model.parameters() if (p.dim() >= 2) == matrices] for matrices in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=kinds[0], weight_decay=s.weight_decay), dict(params=kinds[1], weight_decay=0.0)],
                                  betas=(s.beta1, s.beta2), eps=s.eps, fused=gpu)
    step_loss = torch.compile(plain_loss, dynamic=False) if s.compile else plain_loss
    autocast = torch.autocast(device.type, torch.bfloat16) if machine.dtype == torch.bfloat16 else contextlib.nullcontext()
    losses, rates, mark, mark_step = [], [], time.monotonic(), 0
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
        done = step + 1
        if done % s.log_interval == 0 or done in (1, s.max_iters):
            told = total.item()  # waits for the device, as a log line of train.py does
            now = time.monotonic()
            rates.append((done - mark_step) * effective_batch(s) * s.block_size / (now - mark))
            mark, mark_step = now, done
            say(f'plain step {done}/{s.max_iters}  loss {told:.4f}  {rates[-1] / 1e3:.1f}k tok/s')
    return [loss.item() for loss in losses], rates[1:], torch.cuda.max_memory_allocated() if gpu else None


def train_plain_if_it_fits(s, machine, data):
    """train_plain, or None if memory runs out: it has no ladder."""
    try:
        return train_plain(s, machine, data, print)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        print(f'plain step: left out, {str(error).splitlines()[0]}')


# --- what is asked for -------------------------------------------------------------------------------


def understood(argv):
    """(Bench, Settings of the runs, problems) of a command line."""
    b, problems = parse(Bench, argv)
    s = for_train(b)
    if not 0 <= b.steps <= s.max_iters:
        problems.append(f'steps={b.steps} max_iters={s.max_iters}: steps shorten a run; 0 leaves it as it is')
    elif b.steps:
        s = shortened(s, b.steps)
    if s.max_iters < 2:
        problems.append(f'max_iters={s.max_iters}: the first step is warm-up, so at least 2 are needed')
    if s.init_from == 'resume':
        problems.append("init_from='resume': both runs start from scratch; leave it out")
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        problems.append(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: bench.py compares single processes; start it without torchrun")
    folder, made = os.path.dirname(os.path.abspath(b.json)), os.path.dirname(os.path.abspath(s.out_dir))  # made by main()
    writable = os.path.isdir(folder) and os.access(folder, os.W_OK) or folder == made and not os.path.exists(made)
    if b.json and (os.path.isdir(b.json) or not writable):
        problems.append(f"json='{b.json}': cannot be written; name a file in a folder that exists")
    beside = os.path.join(made, 'bench_')
    start = 'scratch' if s.init_from in ('auto', 'resume') else s.init_from
    return b, replace(s, init_from=start, out_dir=beside), problems


def for_train(b):
    return Settings(**{f.name: getattr(b, f.name) for f in fields(Settings)})


def shortened(s, steps):
    """The same run in fewer steps: its schedules end at the same share of it."""
    keys = ['warmup_iters', 'lr_decay_iters'] + ['prune_start', 'prune_end'] * (s.prune_score != 'none')
    return replace(s, max_iters=steps, **{key: getattr(s, key) * steps // s.max_iters for key in keys})


# --- results -----------------------------------------------------------------------------------------


def arithmetic(s, machine, data):
    """What MFU is made of (GPT.flops_per_token): FLOPs a token = 6 N + attention, and the device's peak in FLOP/s (None: unknown)."""
    with torch.device('meta'):
        model = GPT(model_config(s, data.vocab_size))
    flops, parameters = model.flops_per_token(), model.parameter_count() - model.position_embedding.weight.numel()
    return dict(flops_a_token=flops, attention_flops_a_token=flops - 6 * parameters, multiplying_parameters=parameters,
                peak_flops=machine.peak_flops)


def speed(rates, flops):
    """Median tokens/s of the log steps after the first, and MFU."""
    rate = statistics.median(rates)
    return dict(tokens_per_second=rate, mfu=rate * flops['flops_a_token'] / flops['peak_flops'] if flops['peak_flops'] else None)


def results(s, machine, data, ours, plain, dissected):
    """Everything measured as one dict. ours: (seconds to the first step, graphs) of train_ours; plain: what train_plain
    returned, or None; dissected: of anatomy.measure."""
    logged = [r for r in read_metrics(os.path.join(s.out_dir, 'metrics.jsonl')) if 'loss' in r]
    summary, flops, (first, graphs) = read_json(os.path.join(s.out_dir, 'summary.json')), arithmetic(s, machine, data), ours
    late = [r for r in logged if r['step'] > s.max_iters - LATE_STEPS]
    before, after = graphs[0] if graphs else 0, summary['compiled_graphs']
    result = dict(
        device=machine.name, torch=torch.__version__, dtype=str(machine.dtype)[6:], compile=s.compile, steps=s.max_iters,
        tokens_a_step=effective_batch(s) * s.block_size, **flops,
        ours=dict(speed([r['tokens_per_second'] for r in logged[1:]], flops), peak_bytes=summary['peak_memory_bytes'],
                  late_loss=statistics.mean(r['loss'] for r in late), rung=summary['rung'], rung_label=summary['rung_label']),
        plain=None, late_steps=len(late), late_difference=None,
        startup=dict(first_step_seconds=first, graphs_after_first_step=before, graphs_at_end=after, recompilations=after - before,
                     graph_breaks=summary['graph_breaks']),
        curve=[(r['step'], r['loss']) for r in logged], **dissected)
    if plain:
        losses, rates, peak = plain
        result['plain'] = dict(speed(rates, flops), peak_bytes=peak, late_loss=statistics.mean(losses[r['step'] - 1] for r in late))
        result['late_difference'] = result['ours']['late_loss'] - result['plain']['late_loss']
        result['curve'] = [(r['step'], r['loss'], losses[r['step'] - 1]) for r in logged]
    return result


def table(r, with_kernels):
    """The results as text."""
    startup = r['startup']
    lines = [f'{r["device"]}, torch {r["torch"]}, {r["dtype"]}, {"compiled" if r["compile"] else "not compiled"}, '
             f'{r["tokens_a_step"]:,} tokens a step, {r["steps"]} steps', '',
             f'{"":28s}{"tokens/s":>12s}{"MFU":>10s}{"peak memory":>14s}{"late loss":>12s}']
    for name in ('ours', 'plain'):
        if each := r[name]:
            share = 'unknown' if each['mfu'] is None else f'{each["mfu"]:.1%}'
            peak = 'unknown' if each['peak_bytes'] is None else size(each['peak_bytes'])
            lines.append(f'{name:28s}{each["tokens_per_second"]:12,.0f}{share:>10s}{peak:>14s}{each["late_loss"]:12.4f}')
    if r['plain']:
        lines.append(f'difference in late loss {r["late_difference"]:+.4f} nat')
    if r['device'].startswith('CPU'):
        lines.append('peak memory on a CPU is that of the whole process')
    peak = f'{r["peak_flops"] / 1e12:.0f} TFLOP/s in bfloat16' if r['peak_flops'] else 'unknown'
    lines += [
        f'late loss: mean of the {r["late_steps"]} losses logged in the last {min(LATE_STEPS, r["steps"])} steps',
        f'MFU = tokens/s x FLOPs a token / peak; FLOPs a token = 6 N + attention = {r["flops_a_token"]:,}; '
        f'N = {r["multiplying_parameters"]:,} parameters that multiply, attention {r["attention_flops_a_token"]:,}; peak {peak}',
        f'out-of-memory rung {r["ours"]["rung"]}: {r["ours"]["rung_label"]}', '',
        f'first step done {startup["first_step_seconds"]:.1f} s after the start of the process',
        f'compiled graphs: {startup["graphs_after_first_step"]} after the first evaluation and step, {startup["graphs_at_end"]} at the '
        f'end, {startup["recompilations"]} recompilations' + (' (should be 0)' if startup['recompilations'] else '')
        + f', {startup["graph_breaks"]} graph breaks']
    return '\n'.join(lines + memory_rows(r['memory']) + time_rows(r['time'], with_kernels))


def memory_rows(memory):
    """Lines of the memory by part."""
    rows = [(part, *(size(memory[kind][part]) if part in memory[kind] else '' for kind in ('measured', 'predicted')))
            for part in memory['measured']]
    rows.append(('sum', size(memory['peak']), size(sum(memory['predicted'].values()))))
    return ['', f'{"memory at the peak of a step":30s}{"measured":>12s}{"predicted":>12s}'] + [
        f'{part:30s}{measured:>12s}{predicted:>12s}' for part, measured, predicted in rows]


def time_rows(taken, with_kernels):
    """Lines of one step's time by part, and of the 15 kernels that take most of it."""
    def row(name, ms):
        return f'{name:30s}{ms:9.3f} ms{ms / taken["step_ms"]:9.1%}'

    lines = ['', f'one step {taken["step_ms"]:.3f} ms under the profiler, {taken["unprofiled_ms"]:.3f} ms without']
    lines += [row(part, ms) for part, ms in taken['parts'].items()] + [row('sum', sum(taken['parts'].values()))]
    if with_kernels:
        lines += ['', 'kernels of one step (on a CPU operators, self time)']
        lines += [f'{each["ms"]:9.3f} ms {each["count"]:7.0f} x  {each["part"]}: {each["name"][:90]}' for each in taken['kernels'][:15]]
    return lines


def main(argv):
    """Both trainings and the profile, one after the other; their table, and on request a JSON file. Returns the exit code."""
    if '--help' in argv:
        print(help_text(Bench, __doc__) + '\n\nsettings of train.py\n' + help_text(Settings, ''))
        return 0
    b, s, problems = understood(argv)
    machine, data = preflight(s, problems + check(s))
    if machine.device.type == 'cuda':
        torch.cuda.set_device(machine.device)
        if s.deterministic:
            os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # as in train.py
    os.makedirs(os.path.dirname(s.out_dir), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='bench_', dir=os.path.dirname(s.out_dir)) as folder:
        s = replace(s, out_dir=os.path.join(folder, 'train'))
        code, *ours = train_ours(s)
        if code:
            return code
        plain = train_plain_if_it_fits(s, machine, data) if b.plain else None
        as_asked = replace(for_train(b), init_from=s.init_from, out_dir=os.path.join(folder, 'anatomy'))  # masks are seldom chosen so early
        dissected = anatomy.measure(as_asked, machine, data)
        result = results(s, machine, data, ours, plain, dissected)
    print('\n' + table(result, b.profile))
    if b.json:
        write_json(b.json, result)
    return 0


if __name__ == '__main__':
    run_command(main)
