"""Runs side by side: a table, what makes them unfair to compare, and a picture.

    python report.py out/quickstart
    python report.py out/a out/b --plot=out/compared.png

A run that is still going, or was killed, is shown with what it has measured so far.
"""
import math
import os
import re
from dataclasses import dataclass

import numpy as np

from support.files import read_json
from support.rundir import read_metrics
from support.settings import Refused, help_text, parse, run_command


@dataclass
class ReportSettings:
    plot: str = ''  # picture to write; empty: loss.png in the run directory, report.png for several


@dataclass
class Run:
    name: str
    config: dict  # of config.json
    summary: dict  # of summary.json, or what is known so far
    metrics: list  # the records of metrics.jsonl


def load_run(folder, name):
    """The Run in a directory; Refused if there is none."""
    config = read_json(os.path.join(folder, 'config.json'))
    if config is None or 'settings' not in config:
        raise Refused(f"'{folder}' has no config.json of a run: no run directory; check the path")
    summary = read_json(os.path.join(folder, 'summary.json'))
    metrics = read_metrics(os.path.join(folder, 'metrics.jsonl'))
    if summary is None or (metrics and metrics[-1]['step'] > summary['steps']):  # resumed since
        summary = {'tokens': 0, 'exit_reason': 'running'}
        for record in metrics:
            summary.update(record)
        summary['steps'] = max([r['step'] for r in metrics if 'tokens' in r], default=0)
    return Run(name, config, summary, metrics)


# --- text -----------------------------------------------------------------------------------------

COLUMNS = (  # heading, key of summary.json, how to write it
    ('steps', 'steps', '{:,}'.format),
    ('tokens', 'tokens', '{:,}'.format),
    ('val loss', 'val_loss', '{:.4f}'.format),
    ('perplexity', 'val_ppl', '{:.2f}'.format),
    ('best loss', 'best_val_loss', '{:.4f}'.format),
    ('sparsity', 'sparsity', '{:.1%}'.format),
    ('of all', 'sparsity_all', '{:.1%}'.format),
    ('tok/s', 'tokens_per_second', '{:,.0f}'.format),
    ('MFU', 'mfu', '{:.1%}'.format),
    ('peak GiB', 'peak_memory_bytes', lambda n: f'{n / 2**30:.2f}'),
    ('graphs', 'compiled_graphs', str),
    ('breaks', 'graph_breaks', str),
    ('rung', 'rung', str),
    ('ended', 'exit_reason', str),
)


def table(runs):
    """The summaries as aligned text, a line a run."""
    rows = [['run'] + [heading for heading, _, _ in COLUMNS]]
    for run in runs:
        values = [(run.summary.get(key), write) for _, key, write in COLUMNS]
        rows.append([run.name] + ['-' if v is None else write(v) for v, write in values])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *cells in rows:
        aligned = [text.rjust(width) for text, width in zip(cells, widths[1:])]
        lines.append('  '.join([name.ljust(widths[0]), *aligned]))
    return '\n'.join(lines)


FACTS = ('dataset', 'fingerprint', 'tokens', 'effective_batch', 'parameters', 'dtype', 'commit',
         'seed', 'eval_tokens', 'block_size', 'prune_scope')  # told before all other settings
UNIMPORTANT = ('out_dir', 'init_from', 'data_dir', 'device', 'tracker', 'log_interval',
               'save_interval')


def facts(run):
    """{name: value} of what should be the same in runs that are compared."""
    settings = run.config['settings']
    told = {**settings, **run.config, **run.summary}
    idle = set(UNIMPORTANT)
    if settings.get('prune_score') == 'none':
        idle |= {name for name in settings if name.startswith('prune_')} - {'prune_score'}
    return {name: told.get(name) for name in (*FACTS, *settings) if name not in idle}


def unfair(runs):
    """Lines that say why these runs must not be compared just so."""
    views = [facts(run) for run in runs]
    lines = []
    settings = []
    names = {}  # a set that keeps its order
    for view in views:
        names.update(view)
    for name in names:
        groups = {}
        for run, view in zip(runs, views):
            groups.setdefault(view.get(name), []).append(run.name)
        groups.pop(None, None)  # has no effect there, or is newer than the run
        if len(groups) > 1:
            told = [f'{value} ({", ".join(of_runs)})' for value, of_runs in groups.items()]
            kind = lines if name in FACTS else settings
            kind.append(f'{name} differs: ' + ', '.join(told))
    lines += settings[:6]
    if len(settings) > 6:
        lines.append(f'{len(settings) - 6} more settings differ, see config.json')
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
    """What the run measured under `key`."""
    millions = run.summary['tokens'] / max(1, run.summary['steps']) / 1e6  # a step
    points = [(record['step'] * millions, record.get(key)) for record in run.metrics]
    finite = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    return np.array(finite).reshape(-1, 2).T


def evaluated(run):
    """Whether there is a curve of the validation loss."""
    return series(run, 'val_loss').shape[1] > 1


def losses(run):
    """(validation loss, running mean of the training loss); the latter twice if evaluated once."""
    validation = series(run, 'val_loss')
    training = series(run, 'loss')
    if (width := training.shape[1] // 50) > 1:
        training = np.array([np.convolve(row, np.ones(width) / width, 'valid') for row in training])
    return (validation if evaluated(run) else training), training


def difference(run, first):
    """Validation loss of `run` minus that of `first` where both were evaluated."""
    theirs = dict(series(first, 'val_loss').T)
    points = [(x, y - theirs[x]) for x, y in series(run, 'val_loss').T if x in theirs]
    return np.array(points).reshape(-1, 2).T


def sparsity_grid(run):
    """(names of a block's matrices, their sparsity (layers, matrices)); empty if not pruned."""
    shares = {}  # matrix -> {layer: sparsity}
    for name, share in run.summary.get('sparsity_by_layer', {}).items():
        if found := re.fullmatch(r'blocks\.(\d+)\.(.+?)(\.weight)?', name):
            shares.setdefault(found[2], {})[int(found[1])] = share
    layers = range(1 + max(map(max, shares.values()), default=-1))
    columns = [[share.get(layer, math.nan) for layer in layers] for share in shares.values()]
    return [name.split('.')[-1] for name in shares], np.array(columns).T


def picture(runs):
    """A matplotlib Figure: losses, difference to the first run, sparsity and learning rate over
    tokens; beside them the sparsity of each matrix of the first pruned runs."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()  # a style of the user's may ask for LaTeX, to which '_' is an error
    matplotlib.rcParams['font.size'] = FONT
    pruned = {f'C{i}': run for i, run in enumerate(runs) if sparsity_grid(run)[1].size}
    figure = Figure(figsize=(12.5 if pruned else 9.5, 7.5), dpi=120, layout='constrained')
    left = figure
    if pruned:
        left, right = figure.subfigures(1, 2, width_ratios=(9.5, 3), wspace=0.02)
        draw_maps(right, pruned)
    axes = draw_curves(left, runs)
    figure.draw_without_rendering()  # fixes the heights of the panels
    names = [run.name if evaluated(run) else f'{run.name}, training' for run in runs]
    label_ends(axes['validation loss'], names, '{}  {:.3f}')
    if 'minus the first' in axes:
        label_ends(axes['minus the first'], [runs[0].name] + [''] * len(runs), '{} {:+.3f}')
    return figure


def draw_curves(figure, runs):
    """Panels one below the other, without those that have nothing to show: {label: axis}."""
    differences = [difference(run, runs[0]) for run in runs]
    sparsities = [series(run, 'sparsity') for run in runs]
    panels = {'validation loss': [losses(run)[0] for run in runs]}  # nat a token
    if any(curve.shape[1] > 1 for curve in differences[1:]):
        panels['minus the first'] = differences
    if any(curve[1].any() for curve in sparsities):
        panels['sparsity'] = sparsities
    panels['learning rate'] = [series(run, 'lr') for run in runs]
    heights = [HEIGHTS[label] for label in panels]
    axes = dict(zip(panels, figure.subplots(len(panels), sharex=True, height_ratios=heights)))
    for label, axis in axes.items():
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.spines[['top', 'right']].set_visible(False)
        for i, curve in enumerate(panels[label]):
            axis.plot(*curve, color=f'C{i}')
    axis.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
    axis.set_xlabel('training tokens (millions)')
    for run, line in zip(runs, axes['validation loss'].lines):
        every = max(1, len(line.get_xdata()) // 20)
        line.set(marker='o' if evaluated(run) else '', markersize=3, markevery=every)
    if len(runs) <= 3:  # training losses of more cannot be told apart
        axes['validation loss'].set_ylabel('loss (dots: validation, thin: training)')
        for i, run in enumerate(runs):
            axes['validation loss'].plot(*losses(run)[1], color=f'C{i}', linewidth=0.5)
    return axes


def label_ends(axis, names, form):
    """Scale the axis to what matters, all after a tenth of the longest run and every last value.
    Right of it write name and last value of the first lines, pushed apart."""
    lines = [line for line in axis.lines if line.get_xydata().size]
    if not lines:
        return
    points = np.concatenate([line.get_xydata() for line in lines])  # (N, 2)
    last = np.array([line.get_xydata()[-1] for line in lines])  # (lines, 2)
    late = points[points[:, 0] >= 0.0999 * last[:, 0].max()]
    shown = np.append(late[:, 1], last[:, 1])
    margin = 0.05 * np.ptp(shown) or 0.1
    axis.set_ylim(shown.min() - margin, shown.max() + margin)
    ends = [(*line.get_xydata()[-1], name, line.get_color())
            for line, name in zip(axis.lines, names) if line in lines]
    ends.sort(key=lambda end: end[1])
    panel = axis.bbox.height / axis.figure.dpi * 72  # its height in points
    gap = 1.25 * FONT / panel * (np.ptp(shown) + 2 * margin)
    for (x, y, name, color), height in zip(ends, spread([y for _, y, *_ in ends], gap)):
        leader = dict(arrowstyle='-', color=color, linewidth=0.6, linestyle=':', relpos=(0, 0.5))
        axis.annotate(form.format(name, y), (x, y), (1.03, height), color=color, va='center',
                      textcoords=axis.get_yaxis_transform(), arrowprops=leader,
                      annotation_clip=False, parse_math=False)  # a name may hold a '$'


def spread(heights, gap):
    """Ascending heights, pushed apart until neighbours are `gap` apart."""
    heights = np.array(heights)
    for _ in range(20 * len(heights)**2):
        push = np.maximum(0, gap - np.diff(heights)) / 3
        heights[:-1] -= push
        heights[1:] += push
    return heights


def draw_maps(figure, pruned):
    """Heat maps of the sparsity of each matrix, a row a layer. pruned: {color: Run}."""
    shown = list(pruned.items())[:3]
    grids = [sparsity_grid(run) for _, run in shown]
    low = min(np.nanmin(grid) for _, grid in grids)
    high = max(np.nanmax(grid) for _, grid in grids)
    axes = figure.subplots(len(shown), squeeze=False)[:, 0]
    for (color, run), (names, grid), axis in zip(shown, grids, axes):
        image = axis.imshow(grid, aspect='auto', cmap='YlGnBu', vmin=low, vmax=high)
        axis.set_title(run.name, fontsize=FONT, color=color, parse_math=False)
        axis.set_xticks(range(len(names)), names)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel('layer')
        for (layer, column), share in np.ndenumerate(grid):
            if len(grid) <= 16:  # numbers fit
                ink = 'white' if share > (low + high) / 2 else 'black'
                axis.text(column, layer, f'{share:.0%}', ha='center', va='center', color=ink)
    figure.colorbar(image, ax=axes, location='bottom', format=lambda share, _: f'{share:.0%}',
                    label=f'sparsity of a matrix, {len(shown)} of {len(pruned)} pruned runs')


def main(argv):
    """Print the table and write the picture; returns the exit code."""
    folders = [argument for argument in argv if not argument.startswith('--')]
    options = [argument for argument in argv if argument.startswith('--')]
    if '--help' in argv or not folders:
        print(help_text(ReportSettings, __doc__))
        return 0 if '--help' in argv else 2
    settings, problems, _ = parse(ReportSettings, options, config_files=False)
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    runs = []
    for folder, name in zip(folders, names):
        try:
            runs.append(load_run(folder, name if names.count(name) == 1 else folder))
        except Refused as refused:
            problems += refused.problems
    if problems:
        raise Refused(problems)
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
