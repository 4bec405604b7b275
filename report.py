"""Runs side by side: a table, what makes them unfair to compare, and a picture.

    python report.py out/quickstart
    python report.py results/table_3000/* --baseline=dense --plot=compared.png
    python report.py docs/RESULTS.md

Runs whose names differ only by their seed, as dense_1337 and dense_1338, are an arm and share a
line. A Markdown file's tables, from <!-- results: NAME --baseline=ARM ... --> to <!-- end -->, are
made anew of all runs in results/NAME, and a picture where there is a --plot. A run that is still
going, or was killed, is shown with what it has measured so far.
"""
import glob
import math
import os
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from support.files import read_json, write_atomically
from support.rundir import read_metrics
from support.settings import Path, Refused, help_text, parse, read_config, run_command, separate


@dataclass
class ReportSettings:
    baseline: str = ''  # arm that the others are compared with; empty: the first
    curves: str = ''  # runs whose curves are drawn, with commas between; empty: all
    plot: Path = ''  # picture to write; empty: loss.png in the run directory, or report.png


@dataclass
class Run:
    name: str
    told: dict  # its settings, config.json and summary.json, or what is known so far
    metrics: list  # the records of metrics.jsonl


def load_run(folder, name):
    """The Run in a directory; Refused if there is none."""
    config = read_json(os.path.join(folder, 'config.json'))
    if not isinstance(config, dict) or not isinstance(config.get('settings'), dict):
        raise Refused(f"'{folder}' has no config.json of a run: no run directory; check the path")
    summary = read_json(os.path.join(folder, 'summary.json'), ['steps', 'tokens', 'exit_reason'])
    metrics = read_metrics(os.path.join(folder, 'metrics.jsonl'))
    if summary is None or (metrics and metrics[-1]['step'] > summary['steps']):  # resumed since
        summary = {'tokens': 0, 'exit_reason': 'running'}
        for record in metrics:
            summary.update(record)
    return Run(name, {**config['settings'], **config, **summary}, metrics)


def load_arms(folders, baseline):
    """{arm: its Runs}, the baseline first."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len(set(names)) < len(names):
        names = folders
    arms = {}
    for run in map(load_run, folders, names):
        arms.setdefault(run.name.removesuffix(f'_{run.told.get("seed")}'), []).append(run)
    baseline = baseline or next(iter(arms))
    if baseline not in arms:
        raise Refused(f"baseline='{baseline}' is not one of these arms: {', '.join(arms)}")
    return {baseline: arms.pop(baseline), **arms}


# --- text -----------------------------------------------------------------------------------------

LAST = 10  # logged losses whose mean is the training loss; each is that of one step
COLUMNS = (  # heading, key of numbers(), how to write mean and standard error
    ('sparsity', 'sparsity', '{:.1%}'.format),
    ('val loss', 'val_loss', '{:.4f} ± {:.4f}'.format),
    ('perplexity', 'val_loss', lambda loss, _: f'{np.exp(loss):.2f}'),
    ('minus baseline', 'difference', '{:+.4f} ± {:.4f}'.format),
    ('in perplexity', 'ratio', '{:+.1%} ± {:.1%}'.format),
    (f'training, last {LAST}', 'train_loss', '{:.4f}'.format),
    ('non-zero', 'nonzero', lambda n, _: f'{n / 1e6:.1f}M'),
    ('mean density', 'density', '{:.1%}'.format),
    ('tokens', 'tokens', lambda n, _: f'{n / 1e6:,.1f}M'),
    ('epochs', 'epochs', '{:.2f}'.format),
    ('tok/s', 'tokens_per_second', '{:,.0f}'.format),
    ('mean GiB', 'mean_memory_bytes', lambda n, _: f'{n / 2**30:.2f}'),
    ('peak GiB', 'peak_memory_bytes', lambda n, _: f'{n / 2**30:.2f}'),
    ('reserved', 'peak_reserved_bytes', lambda n, _: f'{n / 2**30:.2f}'),
)


def numbers(run, theirs):
    """What a run tells, and what else COLUMNS show; NaN where it is unknown. theirs: {seed:
    validation loss} of the baseline."""
    known = {key: value for key, value in run.told.items() if value is not None}
    told = defaultdict(lambda: math.nan, known)
    told['difference'] = told['val_loss'] - theirs.get(told['seed'], math.nan)
    told['ratio'] = np.expm1(told['difference'])
    told['train_loss'] = np.mean([*series(run, 'loss')[1, -LAST:]] or math.nan)
    told['density'] = 1 - np.mean([*series(run, 'sparsity')[1]] or math.nan)
    told['tokens_per_second'] = np.median([*series(run, 'tokens_per_second')[1]] or math.nan)
    told['nonzero'] = told['parameters'] * (1 - told['sparsity_all'])
    told['epochs'] = told['tokens'] / run.told.get('data', {}).get('train_tokens', math.nan)
    return told


def estimate(told, key):
    """(mean, its standard error) of the numbers that are known; NaN of none, and of one."""
    known = [each[key] for each in told if math.isfinite(each[key])]
    error = np.std(known, ddof=1) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return np.mean(known or math.nan), error


def table(arms):
    """A line an arm, as aligned Markdown; the first arm is the baseline."""
    rows = [['arm', 'seeds'] + [heading for heading, _, _ in COLUMNS]]
    theirs = {}
    for name, runs in arms.items():
        told = [numbers(run, theirs) for run in runs]
        theirs = theirs or {each['seed']: each['val_loss'] for each in told}
        row = [name, str(len(runs))]
        for _, key, write in COLUMNS:
            mean, error = estimate(told, key)
            row.append('-' if math.isnan(mean) else re.sub(' ± nan%?', '', write(mean, error)))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, [':'.rjust(width, '-') for width in widths])
    return '\n'.join(f"| {' | '.join(map(str.rjust, row, widths))} |" for row in rows)


FACTS = ('dataset', 'fingerprint', 'tokens', 'effective_batch', 'parameters', 'dtype', 'commit',
         'torch', 'device', 'processes', 'eval_tokens', 'block_size', 'prune_scope')  # told first
EXPECTED = ('seed', 'out_dir', 'data_dir')  # to differ; the fingerprint says more than data_dir


def varied(folder):
    """What experiments/NAME.py, for a run in .../NAME/RUN, says is varied on purpose."""
    name = os.path.basename(os.path.dirname(os.path.abspath(folder)))
    path = os.path.join('experiments', f'{name}.py')
    return read_config(path).get('varied', ()) if os.path.exists(path) else ()


def unfair(runs, varied=()):
    """Lines that say why these runs must not be compared just so, but for what is `varied`."""
    lines = []
    names = dict.fromkeys(FACTS)  # a set that keeps its order
    for run in runs:
        names.update(run.told['settings'])
    for name in [name for name in names if name not in (*EXPECTED, *varied)]:
        of_pruning = name != 'prune_score' and name.startswith(('prune_', 'target_sparsity'))
        groups = {}
        for run in runs:
            idle = of_pruning and run.told.get('prune_score') == 'none'
            groups.setdefault(None if idle else run.told.get(name), []).append(run.name)
        groups.pop(None, None)  # has no effect there, or is newer than the run
        if len(groups) > 1:
            told = [f'{value} ({", ".join(of_runs)})' for value, of_runs in groups.items()]
            lines.append(f'{name} differs: ' + ', '.join(told))
    for run in runs:
        if run.told['exit_reason'] != 'finished':
            lines.append(f'{run.name} has not finished: {run.told["exit_reason"]}')
        if run.told.get('rung'):
            lines.append(f'{run.name} ran out of memory, hence: {run.told["rung_label"]}')
        if run.told.get('edited'):
            lines.append(f'{run.name} was made by code that differs from its commit')
    return lines


# --- picture; a curve is an array (2, N): millions of training tokens, values ---------------------

FONT = 8  # points
ROW = 1.25 * FONT / 72  # inches, of text
HEIGHTS = {'perplexity': 2.5, 'validation loss': 2.5, 'minus the first': 1.25, 'sparsity': 0.5,
           'learning rate': 0.5}  # inches
LABELLED = {'perplexity', 'validation loss', 'minus the first'}  # a row of text for each curve


def series(run, key):
    """What the run measured under `key` from its first step on."""
    trained = [record for record in run.metrics if 'tokens' in record]
    millions = trained[-1]['tokens'] / trained[-1]['step'] / 1e6 if trained else 0.0  # a step
    points = [(record['step'] * millions, record.get(key)) for record in run.metrics]
    shown = [(x, y) for x, y in points if x > 0 and y is not None and math.isfinite(y)]
    return np.array(shown).reshape(-1, 2).T


def difference(run, first):
    """Validation loss of `run` minus that of `first` where both were evaluated."""
    theirs = dict(series(first, 'val_loss').T)
    points = [(x, y - theirs[x]) for x, y in series(run, 'val_loss').T if x in theirs]
    return np.array(points).reshape(-1, 2).T


def methods(arms):
    """{method: array (3, N) of the share of prunable weights that is gone, perplexity, its standard
    error}; {} unless arms are pruned to several sparsities. A method of several arms begins at a
    dense baseline. A dense model with fewer weights stands where a pruned one has as many."""
    told = {name: [numbers(run, {}) for run in runs] for name, runs in arms.items()}
    pruned = [each for each in sum(told.values(), []) if each['sparsity_all'] > 0]
    if len({round(each['sparsity'], 2) for each in pruned}) < 2:
        return {}
    prunable = max(each['sparsity_all'] / each['sparsity'] for each in pruned)  # share of all
    whole = next(iter(told.values()))[0]['parameters']
    points = defaultdict(list)
    for name, of_arm in told.items():
        gone = (1 - estimate(of_arm, 'nonzero')[0] / whole) / prunable
        loss, error = estimate(of_arm, 'val_loss')
        method = name.removesuffix(f'_{100 * estimate(of_arm, "sparsity")[0]:.0f}')
        if math.isfinite(gone + loss):  # a run that goes on does not say how many weights it has
            points[method].append((gone, np.exp(loss), np.exp(loss) * error))
    baseline = [first for first in next(iter(points.values()), [])[:1] if round(first[0], 2) == 0]
    return {method: np.array(sorted(baseline + of_method) if of_method[1:] else of_method).T
            for method, of_method in points.items()}


def picture(arms, curves=''):
    """A matplotlib Figure: perplexity over sparsity; losses, difference to the first run, sparsity
    and learning rate over tokens, of the runs named in `curves`; beside them the sparsity of each
    matrix of the first pruned one."""
    import matplotlib.figure

    matplotlib.rcParams['font.size'] = FONT
    runs = {run.name: run for run in sum(arms.values(), [])}
    chosen = curves.split(',') if curves else runs
    if unknown := [name for name in chosen if name not in runs]:
        raise Refused(f"curves='{curves}': none of these runs is {' or '.join(unknown)}")
    runs = [run for run in runs.values() if run.name in chosen]
    panels = {
        'perplexity': methods(arms),
        'validation loss': {run.name: series(run, 'val_loss') for run in runs},  # nat a token
        'minus the first': {run.name: difference(run, runs[0]) for run in runs},
        'sparsity': {run.name: series(run, 'sparsity') for run in runs},
        'learning rate': {run.name: series(run, 'lr') for run in runs},
    }
    for label in ('perplexity', 'minus the first', 'sparsity'):
        if not any(curve[1].any() for curve in panels[label].values()):
            del panels[label]
    pruned = [run for run in runs if run.told.get('sparsity_by_layer')]
    beside = ['map'] if pruned else []
    heights = [max(HEIGHTS[label], ROW * len(curves) * (label in LABELLED))
               for label, curves in panels.items()]
    figure = matplotlib.figure.Figure((12.5, 3 + sum(heights)), 120, layout='constrained')
    axes = figure.subplot_mosaic([[label, *beside] for label in panels], height_ratios=heights,
                                 width_ratios=[4, 1][:1 + len(beside)])
    if pruned:
        draw_map(axes['map'], pruned[0])
    draw_panels(axes, panels)
    if len(runs) <= 3:  # training losses of more cannot be told apart
        axes['validation loss'].set_ylabel('loss (dots: validation, thin: training)')
        for i, run in enumerate(runs):
            axes['validation loss'].plot(*series(run, 'loss'), color=f'C{i}', linewidth=0.2)
    figure.draw_without_rendering()  # fixes the heights of the panels
    for label in LABELLED & panels.keys():
        label_ends(axes[label], panels[label])
    return figure


def draw_panels(axes, panels):
    """Curves, a panel above the other. axes: {label: axis}; panels: {label: {name: curve}}."""
    for label, curves in panels.items():
        axis = axes[label]
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.spines[['top', 'right']].set_visible(False)
        marker = 'o' if label in ('perplexity', 'validation loss') else ''
        for i, curve in enumerate(curves.values()):
            axis.errorbar(*curve, color=f'C{i}', marker=marker, markersize=3)
        if label == 'perplexity':
            axis.set_xlabel('share of the prunable weights that is gone')
            axis.xaxis.set_major_formatter('{x:.0%}')
        elif label != 'learning rate':
            axis.sharex(axes['learning rate'])
            axis.tick_params(labelbottom=False)
    axis.set_xlabel('training tokens (millions)')


def label_ends(axis, names):
    """Scale the axis to what matters, all after a tenth of the longest run and every last value.
    Right of it write names and last values of the first lines, none over another."""
    lines = [line for line in axis.lines if line.get_xydata().size]
    if not lines:
        return
    start = 0.0999 * max(line.get_xdata()[-1] for line in lines)
    curves = [line.get_data() for line in lines]
    shown = np.concatenate([y[x >= min(start, x[-1])] for x, y in curves])
    margin = 0.05 * np.ptp(shown) or 0.1
    axis.set_ylim(shown.min() - margin, shown.max() + margin)
    row = ROW * axis.figure.dpi / axis.bbox.height * np.ptp(axis.get_ylim())
    ends = sorted((line.get_ydata()[-1], line.get_xdata()[-1], name, line.get_color())
                  for line, name in zip(axis.lines, names) if line in lines)
    heights = []
    height = -math.inf
    for y, *_ in ends:
        height = max(y, height + row)
        heights.append(height)
    highest = max(axis.get_ylim())
    for i in reversed(range(len(ends))):  # what was pushed out comes down again
        heights[i] = min(heights[i], highest)
        highest = heights[i] - row
    for (y, x, name, color), height in zip(ends, heights):
        leader = dict(arrowstyle='-', color=color, linewidth=0.6, linestyle=':', relpos=(0, 0.5))
        axis.annotate(f'{name}  {y:.3f}', (x, y), (1.03, height), color=color, va='center',
                      textcoords=axis.get_yaxis_transform(), arrowprops=leader,
                      annotation_clip=False, parse_math=False)  # a name may hold a '$'


def draw_map(axis, run):
    """A heat map of the sparsity of each matrix of the blocks, a row a layer."""
    columns = defaultdict(list)  # name of a matrix: its sparsity in each layer
    for name, share in run.told['sparsity_by_layer'].items():
        if name.startswith('blocks.'):
            matrix = name.removesuffix('.weight').split('.', 2)[-1]
            columns[matrix.replace('attention', 'attn').replace('.', '\n')].append(share)
    image = axis.imshow(np.array(list(columns.values())).T, aspect='auto', cmap='YlGnBu')
    axis.set_title(run.name, fontsize=FONT, parse_math=False)
    axis.set_xticks(range(len(columns)), columns)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel('layer')
    axis.figure.colorbar(image, ax=axis, format='{x:.1%}', label='sparsity of a matrix')


def compare(folders, options, plot=''):
    """Print the table and what makes it unfair, and draw the picture; returns the text."""
    s, problems, _ = parse(ReportSettings, options, config_files=False)
    if problems:
        raise Refused(problems)
    arms = load_arms(folders, s.baseline)
    lines = unfair(sum(arms.values(), []), varied(folders[0]))
    text = '\n'.join([table(arms), '', *(f'- careful: {line}' for line in lines)]).strip()
    print(text)
    if path := s.plot or plot:
        kind = os.path.splitext(path)[1][1:] or 'png'  # else matplotlib gives it another name
        try:
            picture(arms, s.curves).savefig(path, format=kind, bbox_inches='tight')
        except (ImportError, OSError, ValueError) as error:  # ValueError: an unknown kind of file
            raise Refused(f"plot='{path}' cannot be written ({error}); choose another --plot, or "
                          'pip install matplotlib') from None
        print(f'picture: {path}')
    return text


BLOCK = re.compile(r'(<!-- results: (\S+)(.*) -->\n)(?:.*\n)*?(<!-- end -->)')


def renew(path, options):
    """Write the tables of a Markdown file, and their pictures, anew from results/."""
    def block(found):
        folders = sorted(glob.glob(f'results/{found[2]}/*/'))
        if not folders:
            raise Refused(f'{path}: results/{found[2]} has no runs')
        text = compare(folders, [*found[3].split(), *options])
        return f'{found[1]}\n{text}\n\n{found[4]}'

    with open(path, encoding='utf-8') as f:
        text = BLOCK.sub(block, f.read())
    write_atomically(path, lambda f: f.write(text.encode()))


def main(argv):
    """Print the table and write the picture; returns the exit code."""
    folders, options = separate(ReportSettings, argv)
    if '--help' in options or not folders:
        print(help_text(ReportSettings, __doc__))
        return 0 if '--help' in options else 2
    if folders[0].endswith('.md'):
        renew(folders[0], options)
    else:
        alone = os.path.join(folders[0], 'loss.png')
        compare(folders, options, plot='report.png' if folders[1:] else alone)
    return 0


if __name__ == '__main__':
    run_command(main)
