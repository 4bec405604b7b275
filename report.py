"""Runs side by side: tables, what makes them unfair to compare, and pictures.

    python report.py out/quickstart
    python report.py results/table_3000/* --baseline=dense --sparsity_plot=docs/table_3000.png
    python report.py docs/RESULTS.md

Runs whose names differ only by their seed (dense_1337, dense_1338) are an arm; the second table has
a line an arm. A Markdown file's tables and pictures are made anew from the runs in results/NAME, as
the marks in it say: <!-- results: NAME --baseline=ARM --plot=FILE --> ... <!-- end -->.
A run that is still going, or was killed, is shown with what it has measured so far.
"""
import glob
import math
import os
import re
from dataclasses import dataclass

import numpy as np

from support.files import read_json, write_atomically
from support.rundir import read_metrics
from support.settings import Path, Refused, arguments, help_text, parse, read_config, run_command


@dataclass
class ReportSettings:
    baseline: str = ''  # arm that the others are compared with; empty: that of the first run
    plot: str = ''  # picture to write; empty: loss.png in the run directory, report.png for several
    sparsity_plot: str = ''  # another: perplexity against sparsity, loss of baseline and best 50%


@dataclass
class Run:
    name: str
    config: dict  # of config.json
    summary: dict  # of summary.json, or what is known so far; and what is derived from metrics
    metrics: list  # the records of metrics.jsonl


def load_run(folder, name):
    """The Run in a directory; Refused if there is none."""
    config = read_json(os.path.join(folder, 'config.json'))
    if config is None or 'settings' not in config:
        raise Refused(f"'{folder}' has no config.json of a run: no run directory; check the path")
    summary = read_json(os.path.join(folder, 'summary.json'))
    metrics = read_metrics(os.path.join(folder, 'metrics.jsonl'))
    if summary is None or (metrics and metrics[-1]['step'] > summary['steps']):  # resumed since
        summary = {'steps': 0, 'tokens': 0, 'exit_reason': 'running'}
        for record in metrics:
            summary.update(record)
            if 'tokens' in record:
                summary['steps'] = record['step']
    return Run(name, config, {**summary, **derived(config, summary, metrics)}, metrics)


def load_runs(folders, baseline):
    """{arm: its Runs}, the baseline first: runs whose names differ only by a trailing _SEED."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len(set(names)) < len(names):
        names = folders
    arms = {}
    for run in map(load_run, folders, names):
        seed = run.config['settings'].get('seed')
        arms.setdefault(run.name.removesuffix(f'_{seed}'), []).append(run)
    baseline = baseline or next(iter(arms))
    if baseline not in arms:
        raise Refused(f"baseline='{baseline}' is no arm of these runs; choose {', '.join(arms)}")
    return {baseline: arms.pop(baseline), **arms}


# --- numbers --------------------------------------------------------------------------------------

LAST = 10  # logged losses whose mean is the training loss; one of them is that of a single step


def known(records, key):
    """The finite values that dicts have under `key`."""
    values = [record.get(key) for record in records]
    return [value for value in values if value is not None and math.isfinite(value)]


def derived(config, summary, metrics):
    """{name: number} of what the files of a run say together, without what they lack."""
    told = {}
    if losses := known(metrics, 'loss'):
        told['train_loss'] = np.mean(losses[-LAST:])
    if rates := known(metrics, 'tokens_per_second'):
        told['tokens_per_second'] = np.median(rates)
    if 'parameters' in summary:
        told['nonzero'] = summary['parameters'] * (1 - summary['sparsity_all'])
    if 'train_tokens' in config.get('data', {}):
        told['epochs'] = summary['tokens'] / config['data']['train_tokens']
    shares = {record['step']: record['sparsity'] for record in metrics if 'sparsity' in record}
    if len(shares) > 1:
        steps = list(shares)
        removed = np.trapezoid(list(shares.values()), steps) / (steps[-1] - steps[0])
        told['density'] = 1 - removed
    return told


def estimate(values):
    """(mean, its standard error, NaN of a single value); None of no values."""
    if not values:
        return None
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return np.mean(values), error


def arm_summary(runs, baseline):
    """What ARM_COLUMNS show of an arm. Differences are those of runs of equal seed."""
    told = {'seeds': len(runs)}
    for _, key, _ in ARM_COLUMNS:
        if values := known([run.summary for run in runs], key):
            told[key] = max(values) if key.startswith('peak') else np.mean(values)
    losses, theirs = by_seed(runs), by_seed(baseline)
    if losses:
        told['val_loss'] = estimate(list(losses.values()))
        told['perplexity'] = np.exp(told['val_loss'][0])
    pairs = [loss - theirs[seed] for seed, loss in losses.items() if seed in theirs]
    if pairs and runs is not baseline:
        mean, error = told['difference'] = estimate(pairs)
        told['ratio'] = np.expm1(mean), np.exp(mean) * error  # the error to first order
    return told


def by_seed(runs):
    """{seed: validation loss} of the runs that have one."""
    measured = [run for run in runs if known([run.summary], 'val_loss')]
    return {run.config['settings'].get('seed'): run.summary['val_loss'] for run in measured}


# --- text -----------------------------------------------------------------------------------------


def with_error(form):
    """A function that writes (mean, error), and the mean alone where the error is not known."""
    return lambda pair: form.format(*pair).removesuffix(' ± nan').removesuffix(' ± nan%')


COLUMNS = (  # heading, key of Run.summary, how to write it
    ('steps', 'steps', '{:,}'.format),
    ('val loss', 'val_loss', '{:.4f}'.format),
    ('perplexity', 'val_ppl', '{:.2f}'.format),
    ('best loss', 'best_val_loss', '{:.4f}'.format),
    ('of all', 'sparsity_all', '{:.1%}'.format),
    ('MFU', 'mfu', '{:.1%}'.format),
    ('graphs', 'compiled_graphs', str),
    ('breaks', 'graph_breaks', str),
    ('rung', 'rung', str),
    ('ended', 'exit_reason', str),
)
ARM_COLUMNS = (  # heading, key of arm_summary, how to write it
    ('seeds', 'seeds', str),
    ('sparsity', 'sparsity', '{:.1%}'.format),
    ('val loss', 'val_loss', with_error('{:.4f} ± {:.4f}')),
    ('perplexity', 'perplexity', '{:.2f}'.format),
    ('minus baseline', 'difference', with_error('{:+.4f} ± {:.4f}')),
    ('in perplexity', 'ratio', with_error('{:+.1%} ± {:.1%}')),
    (f'train loss, last {LAST} logged', 'train_loss', '{:.4f}'.format),
    ('non-zero', 'nonzero', lambda n: f'{n / 1e6:.1f}M'),
    ('mean density', 'density', '{:.1%}'.format),
    ('tokens', 'tokens', lambda n: f'{n / 1e6:,.1f}M'),
    ('epochs', 'epochs', '{:.2f}'.format),
    ('tok/s, median', 'tokens_per_second', '{:,.0f}'.format),
    ('GiB allocated', 'peak_memory_bytes', lambda n: f'{n / 2**30:.2f}'),
    ('reserved', 'peak_reserved_bytes', lambda n: f'{n / 2**30:.2f}'),
)


def table(first, columns, summaries):
    """Aligned Markdown, a line for each of {name: {key: value}}; '-' where there is no value."""
    rows = [[first] + [heading for heading, _, _ in columns]]
    for name, summary in summaries.items():
        values = [(summary.get(key), write) for _, key, write in columns]
        rows.append([name] + ['-' if v is None else write(v) for v, write in values])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, [':'.rjust(width, '-') for width in widths])
    return '\n'.join(f"| {' | '.join(map(str.rjust, row, widths))} |" for row in rows)


def comparison(arms, varied):
    """The table by arm, and what makes it unfair, as Markdown."""
    baseline = next(iter(arms.values()))
    summaries = {name: arm_summary(runs, baseline) for name, runs in arms.items()}
    lines = [f'- careful: {line}' for line in unfair(sum(arms.values(), []), varied)]
    return '\n'.join([table('arm', ARM_COLUMNS, summaries), '', *lines]).rstrip()


FACTS = ('dataset', 'fingerprint', 'tokens', 'effective_batch', 'parameters', 'dtype', 'commit',
         'torch', 'device', 'processes', 'eval_tokens', 'block_size', 'prune_scope')  # told first
UNIMPORTANT = ('out_dir', 'data_dir', 'seed')


def facts(run):
    """{name: value} of what should be the same in runs that are compared."""
    settings = run.config['settings']
    told = {**settings, **run.config, **run.summary}
    if told.get('init_from') in ('auto', 'resume'):
        told['init_from'] = 'scratch'
    idle = set(UNIMPORTANT)
    if settings.get('prune_score') == 'none':
        idle |= {name for name in settings if name.startswith('prune_')} - {'prune_score'}
        idle.add('target_sparsity')
    return {name: told.get(name) for name in (*FACTS, *settings) if name not in idle}


def declared(folder):
    """The settings that experiments/NAME.py says are `varied`, for a run in .../NAME/RUN."""
    experiment = os.path.basename(os.path.dirname(os.path.abspath(folder)))
    path = os.path.join('experiments', f'{experiment}.py')
    try:
        return read_config(path).get('varied', []) if os.path.exists(path) else []
    except ValueError as error:
        raise Refused(str(error)) from None


def unfair(runs, varied=()):
    """Lines that say why these runs must not be compared just so, but for what is varied."""
    views = [facts(run) for run in runs]
    lines = []
    names = {}  # a set that keeps its order
    for view in views:
        names.update(view)
    for name in names.keys() - set(varied):
        groups = {}
        for run, view in zip(runs, views):
            groups.setdefault(view.get(name), []).append(run.name)
        groups.pop(None, None)  # has no effect there, or is newer than the run
        if len(groups) > 1:
            told = [f'{value} ({", ".join(of_runs)})' for value, of_runs in groups.items()]
            lines.append(f'{name} differs: ' + ', '.join(told))
    for run in runs:
        if run.summary['exit_reason'] != 'finished':
            lines.append(f'{run.name} has not finished: {run.summary["exit_reason"]}')
        if run.summary.get('rung'):
            lines.append(f'{run.name} ran out of memory, hence: {run.summary["rung_label"]}')
        if run.config.get('edited'):
            lines.append(f'{run.name} was made by code that differs from its commit')
    return lines


# --- picture; a curve is an array (2, N): millions of training tokens, values ---------------------

FONT = 8  # points
HEIGHTS = {'validation loss': 5, 'minus the first': 2.5, 'sparsity': 1, 'learning rate': 1}


def series(run, key):
    """What the run measured under `key` from its first step on."""
    millions = run.summary['tokens'] / max(1, run.summary['steps']) / 1e6  # a step
    points = [(record['step'] * millions, record.get(key)) for record in run.metrics]
    shown = [(x, y) for x, y in points if x > 0 and y is not None and math.isfinite(y)]
    return np.array(shown).reshape(-1, 2).T


def smooth(curve):
    """Its means over fiftieths of its points."""
    width = max(1, curve.shape[1] // 50)
    return curve[:, curve.shape[1] % width:].reshape(2, -1, width).mean(-1)


def difference(run, first):
    """Validation loss of `run` minus that of `first` where both were evaluated."""
    theirs = dict(series(first, 'val_loss').T)
    points = [(x, y - theirs[x]) for x, y in series(run, 'val_loss').T if x in theirs]
    return np.array(points).reshape(-1, 2).T


def sparsity_grid(run):
    """(names of a block's matrices, their sparsity (layers, matrices)); empty if not pruned."""
    shares = {}  # name of a matrix: its sparsity in each layer
    for name, share in run.summary.get('sparsity_by_layer', {}).items():
        if name.startswith('blocks.'):
            _, _, module, matrix = name.removesuffix('.weight').split('.', 3)
            label = f"{module.replace('attention', 'attn')}\n{matrix}"
            shares.setdefault(label, []).append(share)
    return list(shares), np.array(list(shares.values())).T


def picture(runs):
    """A matplotlib Figure: losses, difference to the first run, sparsity and learning rate over
    tokens; beside them the sparsity of each matrix of the first pruned runs."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams['font.size'] = FONT
    pruned = {f'C{i}': run for i, run in enumerate(runs) if sparsity_grid(run)[0]}
    figure = Figure(figsize=(12.5, 7.5), dpi=120, layout='constrained')
    left = figure
    if pruned:
        left, right = figure.subfigures(1, 2, width_ratios=(3, 1), wspace=0.02)
        draw_maps(right, pruned)
    axes = draw_curves(left, runs)
    figure.draw_without_rendering()  # fixes the heights of the panels
    label_ends(axes['validation loss'], runs)
    if 'minus the first' in axes:
        label_ends(axes['minus the first'], runs)
    return figure


def draw_curves(figure, runs):
    """Panels one below the other, without those that have nothing to show: {label: axis}."""
    panels = {
        'validation loss': [series(run, 'val_loss') for run in runs],  # nat a token
        'minus the first': [difference(run, runs[0]) for run in runs],
        'sparsity': [series(run, 'sparsity') for run in runs],
        'learning rate': [series(run, 'lr') for run in runs],
    }
    for label in ('minus the first', 'sparsity'):
        if not any(curve[1].any() for curve in panels[label]):
            del panels[label]
    heights = [HEIGHTS[label] for label in panels]
    axes = dict(zip(panels, figure.subplots(len(panels), sharex=True, height_ratios=heights)))
    for label, axis in axes.items():
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.spines[['top', 'right']].set_visible(False)
        marker = 'o' if label == 'validation loss' else ''
        for i, curve in enumerate(panels[label]):
            axis.plot(*curve, color=f'C{i}', marker=marker, markersize=3)
    axis.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
    axis.set_xlabel('training tokens (millions)')
    if len(runs) <= 3:  # training losses of more cannot be told apart
        axes['validation loss'].set_ylabel('loss (dots: validation, thin: training)')
        for i, run in enumerate(runs):
            axes['validation loss'].plot(*smooth(series(run, 'loss')), color=f'C{i}', linewidth=0.5)
    return axes


def label_ends(axis, runs):
    """Scale the axis to what matters, all after a tenth of the longest run and every last value.
    Right of it write name and last value of the runs, the first lines, none over another."""
    lines = [line for line in axis.lines if line.get_xydata().size]
    if not lines:
        return
    points = np.concatenate([line.get_xydata() for line in lines])  # (N, 2)
    late = points[points[:, 0] >= 0.0999 * points[:, 0].max()]
    shown = [*late[:, 1], *(line.get_ydata()[-1] for line in lines)]
    margin = 0.05 * np.ptp(shown) or 0.1
    axis.set_ylim(min(shown) - margin, max(shown) + margin)
    panel = axis.bbox.height / axis.figure.dpi * 72  # its height in points
    gap = 1.25 * FONT / panel * (np.ptp(shown) + 2 * margin)
    ends = [(line.get_ydata()[-1], line.get_xdata()[-1], run.name, line.get_color())
            for line, run in zip(axis.lines, runs) if line in lines]
    height = -math.inf
    for y, x, name, color in sorted(ends):
        height = max(y, height + gap)
        leader = dict(arrowstyle='-', color=color, linewidth=0.6, linestyle=':', relpos=(0, 0.5))
        axis.annotate(f'{name}  {y:.3f}', (x, y), (1.03, height), color=color, va='center',
                      textcoords=axis.get_yaxis_transform(), arrowprops=leader,
                      annotation_clip=False, parse_math=False)  # a name may hold a '$'


def draw_maps(figure, pruned):
    """Heat maps of the sparsity of each matrix, a row a layer. pruned: {color: Run}."""
    shown = list(pruned.items())[:3]
    grids = [sparsity_grid(run) for _, run in shown]
    low = min(grid.min() for _, grid in grids)
    high = max(grid.max() for _, grid in grids)
    axes = figure.subplots(len(shown), squeeze=False)[:, 0]
    for (color, run), (names, grid), axis in zip(shown, grids, axes):
        image = axis.imshow(grid, aspect='auto', cmap='YlGnBu', vmin=low, vmax=high)
        axis.set_title(run.name, fontsize=FONT, color=color, parse_math=False)
        axis.set_xticks(range(len(names)), names)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel('layer')
    figure.colorbar(image, ax=axes, location='bottom', format=lambda share, _: f'{share:.1%}',
                    label=f'sparsity of a matrix, {len(shown)} of {len(pruned)} pruned runs')


def main(argv):
    """Print the table and write the picture; returns the exit code."""
    argv = arguments(ReportSettings, argv)
    folders = [argument for argument in argv if not argument.startswith('--')]
    options = [argument for argument in argv if argument.startswith('--')]
    if '--help' in argv or not folders:
        print(help_text(ReportSettings, __doc__))
        return 0 if '--help' in argv else 2
    settings, problems, _ = parse(ReportSettings, options, config_files=False)
    if problems:
        raise Refused(problems)
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len(set(names)) < len(names):
        names = folders
    runs = [load_run(folder, name) for folder, name in zip(folders, names)]
    print(table(runs))
    for line in unfair(runs):
        print(f'  careful: {line}')
    beside = os.path.join(folders[0], 'loss.png')
    path = settings.plot or (beside if len(runs) == 1 else 'report.png')
    try:
        picture(runs).savefig(path, bbox_inches='tight')
    except (ImportError, OSError, ValueError) as error:  # ValueError: an unknown kind of file
        raise Refused(f"plot='{path}' cannot be written ({error}); choose another --plot, or pip "
                      'install matplotlib') from None
    print(f'picture: {path}')
    return 0


if __name__ == '__main__':
    run_command(main)
