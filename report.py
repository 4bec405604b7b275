"""Runs side by side: a table, what makes them unfair to compare, and a picture.

    python report.py out/quickstart
    python report.py out/a out/b --plot=out/compared.png
"""
import os
from dataclasses import dataclass

from files import read_json
from rundir import read_metrics
from settings import Refused, help_text, parse, run_command

COLUMNS = (  # heading, key of summary.json, how to write it
    ('steps', 'steps', '{:,}'), ('tokens', 'tokens', '{:,}'), ('val loss', 'val_loss', '{:.4f}'), ('perplexity', 'val_ppl', '{:.2f}'),
    ('best loss', 'best_val_loss', '{:.4f}'), ('sparsity', 'sparsity', '{:.1%}'), ('of all', 'sparsity_all', '{:.1%}'),
    ('tok/s', 'tokens_per_second', '{:,.0f}'), ('MFU', 'mfu', '{:.1%}'),
    ('peak GiB', 'peak_memory_bytes', '{:.2f}'), ('graphs', 'compiled_graphs', '{}'), ('breaks', 'graph_breaks', '{}'),
    ('rung', 'rung', '{}'), ('ended', 'exit_reason', '{}'))


@dataclass
class ReportSettings:
    plot: str = ''  # picture to write; empty: loss.png in the run directory, or report.png in the current one for several


def load_run(folder):
    """dict(name, summary, config, metrics) of a run directory; Refused if it is none."""
    summary, config = (read_json(os.path.join(folder, f)) for f in ('summary.json', 'config.json'))
    if summary is None or config is None:
        raise Refused(f"'{folder}' has no summary.json and config.json: not a run directory, or a run that has not ended")
    return dict(name=os.path.basename(os.path.normpath(folder)), folder=folder, summary=summary, config=config,
                metrics=read_metrics(os.path.join(folder, 'metrics.jsonl')))


def table(runs):
    """The runs' summaries as aligned text, a line a run."""
    rows = [['run'] + [heading for heading, _, _ in COLUMNS]]
    for run in runs:
        cells = [run['name']]
        for _, key, form in COLUMNS:
            value = run['summary'].get(key)
            cells.append('-' if value is None else form.format(value / 2**30 if key == 'peak_memory_bytes' else value))
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return '\n'.join('  '.join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows)


def unfair(runs):
    """Lines that say why these runs must not be compared just so."""
    lines = []
    views = {'data set': lambda r: r['summary']['dataset'], 'data fingerprint': lambda r: r['summary']['fingerprint'],
             'tokens trained on': lambda r: r['summary']['tokens'], 'effective batch': lambda r: r['summary']['effective_batch'],
             'tokens evaluated (eval_tokens)': lambda r: r['config']['settings']['eval_tokens'],
             'block_size': lambda r: r['config']['settings']['block_size'], 'seed': lambda r: r['config']['settings']['seed'],
             'parameters': lambda r: r['summary']['parameters'],
             'prune_scope': lambda r: r['config']['settings']['prune_scope'] if r['summary'].get('sparsity') else None,
             'numbers': lambda r: r['config']['dtype'],
             'code': lambda r: r['config']['commit'][:12]}
    for what, view in views.items():
        if len({view(run) for run in runs} - {None}) > 1:
            lines.append(f'{what} differs: ' + ', '.join(f"{run['name']} {view(run)}" for run in runs))
    for run in runs:
        if run['summary']['exit_reason'] != 'finished':
            lines.append(f"{run['name']} did not finish: {run['summary']['exit_reason']}")
        if run['summary']['rung']:
            lines.append(f"{run['name']} ran out of memory and took another way: {run['summary'].get('rung_label')}")
        if run['config']['edited']:
            lines.append(f"{run['name']} was made by code that differs from its commit")
    return lines


def plot(runs, path):
    """Loss, sparsity and learning rate over tokens, how far each run is from the first where both logged, and the sparsity of each
    matrix, to a PNG at `path`."""
    import matplotlib
    matplotlib.use('Agg')  # no display needed
    from matplotlib import pyplot

    pruned = [run for run in runs if run['summary'].get('sparsity_by_layer')]
    shared = any(set(mine) & set(theirs) for run in runs[1:] for mine, theirs in zip(losses(run), losses(runs[0])))
    heights = {'loss (nat a token)': 4, **({f"minus {runs[0]['name']} (nat)": 2} if shared else {}), **({'sparsity': 1} if pruned else {}),
               'learning rate': 1}
    figure, axes = pyplot.subplots(len(heights), 2 if pruned else 1, figsize=(12 if pruned else 8, 7), squeeze=False, sharex='col',
                                   layout='constrained', height_ratios=list(heights.values()), width_ratios=(5, 3) if pruned else (1,))
    panels = dict(zip(heights, axes[:, 0]))
    for i, run in enumerate(runs):
        plot_run(run, runs[0], f'C{i}', panels)
    for label, axis in panels.items():
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(title='thin: training; dots: validation', fontsize='small', title_fontsize='small')
    axes[-1, 0].set_xlabel('training tokens')
    if pruned:
        plot_layers(pruned, runs, figure, axes)
    figure.savefig(path, dpi=110, bbox_inches='tight')
    pyplot.close(figure)


def losses(run):
    """({training tokens: loss of the step}, {training tokens: validation loss})"""
    a_step = run['summary']['tokens'] / max(1, run['summary']['steps'])
    return tuple({r['step'] * a_step: r[key] for r in run['metrics'] if key in r} for key in ('loss', 'val_loss'))


def plot_run(run, first, color, panels):
    """One run's lines on the panels, {label: axis}, and how far it is from the run `first`."""
    loss, difference = panels['loss (nat a token)'], panels.get(f"minus {first['name']} (nat)")
    final = run['summary']['val_loss']  # None if it ended before the first evaluation
    styles = (dict(alpha=0.35, linewidth=1),
              dict(marker='o', markersize=3, label=f"{run['name']}: " + ('-' if final is None else f'{final:.3f}')))
    for mine, theirs, style in zip(losses(run), losses(first), styles):
        loss.plot(list(mine), list(mine.values()), color=color, **style)
        common = [tokens for tokens in mine if tokens in theirs]
        if difference and run is not first:
            difference.plot(common, [mine[tokens] - theirs[tokens] for tokens in common], color=color, **style)
    trained = [r for r in run['metrics'] if 'loss' in r]
    for label, key in (('sparsity', 'sparsity'), ('learning rate', 'lr')):
        if label in panels:
            panels[label].plot([r['tokens'] for r in trained], [r[key] for r in trained], color=color)


def plot_layers(pruned, runs, figure, axes):
    """The right column: sparsity of each matrix, in the order of the model."""
    for axis in axes[:, 1]:
        axis.remove()
    axis = figure.add_subplot(axes[0, 1].get_gridspec()[:, 1])
    for run in pruned:
        layers = run['summary']['sparsity_by_layer']
        axis.plot(list(layers.values()), range(len(layers)), color=f'C{runs.index(run)}', marker='o', markersize=4, label=run['name'])
    few = max(1, len(layers) // 24)  # names that fit
    axis.set_yticks(range(0, len(layers), few), [name.removesuffix('.weight') for name in layers][::few], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel('sparsity of a matrix')
    axis.grid(alpha=0.3)


def main(argv):
    """Print the table and write the picture; returns the exit code."""
    folders = [a for a in argv if not a.startswith('--')]
    if '--help' in argv or not folders:
        print(help_text(ReportSettings, __doc__))
        return 0 if '--help' in argv else 2
    s, problems = parse(ReportSettings, [a for a in argv if a.startswith('--')], config_files=False)
    runs = []
    for folder in folders:
        try:
            runs.append(load_run(folder))
        except Refused as refused:
            problems += refused.problems
    if problems:
        raise Refused(problems)
    print(table(runs))
    for line in unfair(runs):
        print(f'  careful: {line}')
    path = s.plot or (os.path.join(folders[0], 'loss.png') if len(runs) == 1 else 'report.png')
    plot(runs, path)
    print(f'picture: {path}')
    return 0


if __name__ == '__main__':
    run_command(main)
