"""Runs side by side: a table, what makes them unfair to compare, and a picture.

    python report.py out/quickstart
    python report.py out/a out/b --plot=out/compared.png

A run that is still going, or was killed, is shown with what it has measured so far.
"""
import math
import os
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
        summary = {'steps': 0, 'tokens': 0, 'exit_reason': 'running'}
        for record in metrics:
            summary.update(record)
            if 'tokens' in record:
                summary['steps'] = record['step']
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
    return '\n'.join('  '.join(map(str.rjust, row, widths)) for row in rows)


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
