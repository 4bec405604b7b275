"""report.py on run directories made here: the table, what is unfair, and what the picture shows."""
import json
import math
import os
import sys

import numpy as np
import pytest
from conftest import refusal
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

import report

MATRICES = ('attention.qkv', 'attention.proj', 'mlp.fc', 'mlp.proj')
BATCH = 1000  # tokens a step


def loss_at(step, final):
    return final + 5 * math.exp(-step / 20)


def write_lines(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function (name, ...) -> run directory, evaluated every 50 steps, of 3 layers."""
    monkeypatch.chdir(tmp_path)  # where pictures of several runs go

    def make(name, final=3.0, steps=400, sparsity=0.0, ended=True, summary=()):
        folder = tmp_path / name
        folder.mkdir()
        records = []
        for step in range(steps + 1):
            if step % 10 == 0 and step > 0:
                records.append(dict(step=step, tokens=step * BATCH, loss=loss_at(step, final) - 0.1,
                                    lr=1e-3, sparsity=sparsity * step / steps, mfu=0.4,
                                    tokens_per_second=5e5, peak_memory_bytes=2**31))
            if step % 50 == 0:
                loss = loss_at(step, final)
                records.append(dict(step=step, val_loss=loss, val_ppl=math.exp(loss)))
        write_lines(folder / 'metrics.jsonl', records)
        told = dict(seed=1, block_size=64, eval_tokens=640, dataset='tiny', learning_rate=1e-3,
                    out_dir=str(folder), log_interval=10, prune_scope='blocks', prune_end=300,
                    prune_score='magnitude' if sparsity else 'none')
        config = dict(settings=told, data=dict(name='tiny'), fingerprint='f00d', dtype='float32',
                      commit='c0ffee', edited=False)
        (folder / 'config.json').write_text(json.dumps(config))
        by_layer = {f'blocks.{n}.{matrix}.weight': sparsity + n / 100 + i / 1000
                    for n in range(3) for i, matrix in enumerate(MATRICES)}
        content = dict(
            steps=steps, tokens=steps * BATCH, val_loss=loss, val_ppl=math.exp(loss),
            best_val_loss=loss, sparsity=sparsity, sparsity_all=sparsity / 2,
            sparsity_by_layer=by_layer if sparsity else {}, tokens_per_second=5e5, mfu=0.4,
            peak_memory_bytes=2**31, compiled_graphs=6, graph_breaks=0, rung=0,
            rung_label='as configured', effective_batch=8, parameters=1000, dataset='tiny',
            fingerprint='f00d', exit_reason='finished')
        if ended:
            (folder / 'summary.json').write_text(json.dumps({**content, **dict(summary)}))
        return str(folder)
    return make


def loaded(*folders):
    return [report.load_run(folder, os.path.basename(folder)) for folder in folders]


def axis_of(figure, label):
    return next(axis for axis in figure.axes if axis.get_ylabel().startswith(label))


def texts(axis):
    return [text.get_text() for text in axis.texts]


def height_of(text, canvas):
    """Bottom and top of a label, without its line, in pixels."""
    box = Text.get_window_extent(text, canvas.get_renderer())
    return box.y0, box.y1


# --- text -----------------------------------------------------------------------------------------


def test_table_says_what_the_summaries_say(run, capsys):
    folders = [run('short', sparsity=0.5), run('a_longer_name', final=2.5, summary=dict(mfu=None))]
    assert report.main(folders) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ('run steps tokens val loss perplexity best loss sparsity of all '
                                'tok/s MFU peak GiB graphs breaks rung ended').split()
    assert lines[1].split() == ['short', '400', '400,000', '3.0000', '20.09', '3.0000', '50.0%',
                                '25.0%', '500,000', '40.0%', '2.00', '6', '0', '0', 'finished']
    assert lines[2].split() == ['a_longer_name', '400', '400,000', '2.5000', '12.18', '2.5000',
                                '0.0%', '0.0%', '500,000', '-', '2.00', '6', '0', '0', 'finished']
    assert len(lines[0]) == len(lines[1]) == len(lines[2])


def test_what_makes_a_comparison_unfair_is_said(run):
    first, same = run('first'), run('same')
    assert report.unfair(loaded(first, same)) == []
    other = run('other', summary=dict(rung=2, rung_label='loss in chunks', exit_reason='sigterm',
                                      dataset='wiki', fingerprint='abc', tokens=5))
    assert report.unfair(loaded(first, same, other)) == [
        'dataset differs: tiny (first, same), wiki (other)',
        'fingerprint differs: f00d (first, same), abc (other)',
        'tokens differs: 400000 (first, same), 5 (other)',
        'other has not finished: sigterm',
        'other ran out of memory, hence: loss in chunks']


def edit(folder, **changes):
    path = os.path.join(folder, 'config.json')
    config = report.read_json(path)
    config['settings'].update(changes.pop('settings', {}))
    with open(path, 'w') as f:
        json.dump({**config, **changes}, f)


def test_settings_that_differ_are_named_the_decisive_first(run):
    first, other = run('first'), run('other')
    edit(other, edited=True, commit='beef', settings=dict(
        learning_rate=2e-3, seed=2, log_interval=1, out_dir='x', prune_end=7))
    assert report.unfair(loaded(first, other)) == [
        'commit differs: c0ffee (first), beef (other)', 'seed differs: 1 (first), 2 (other)',
        'learning_rate differs: 0.001 (first), 0.002 (other)',  # prune_end: neither prunes
        'other was made by code that differs from its commit']


def test_pruned_beside_dense_differ_in_the_score_only(run):
    lines = report.unfair(loaded(run('dense'), run('pruned', sparsity=0.5)))
    assert lines == ['prune_score differs: none (dense), magnitude (pruned)']


def test_run_that_goes_on_is_shown_with_what_it_has(run, capsys):
    going, resumed = run('going', steps=155, ended=False), run('resumed', summary=dict(steps=200))
    assert report.main([going, resumed]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ['going', '150', '150,000', f'{loss_at(150, 3.0):.4f}']
    assert lines[1].split()[-1] == lines[2].split()[-1] == 'running'
    assert lines[2].split()[1:3] == ['400', '400,000']
    assert '  careful: going has not finished: running' in lines


def test_no_run_is_refused(run, tmp_path):
    (tmp_path / 'hf').mkdir()
    (tmp_path / 'hf' / 'config.json').write_text('{"model_type": "gpt2"}')
    good, broken = run('good'), run('broken')
    with open(os.path.join(broken, 'summary.json'), 'w') as f:
        f.write('{')
    for name in ('none', 'hf'):
        assert refusal(report.main, [good, f'{tmp_path}/{name}']) == [
            f"'{tmp_path}/{name}' has no config.json of a run: no run directory; check the path"]
    problem, = refusal(report.main, [good, broken])
    assert problem.startswith(f'{broken}/summary.json is damaged (')
    assert refusal(report.main, [good, '--polt=x.png']) == [
        "command line: unknown setting 'polt' (value 'x.png'); did you mean 'plot'?"]


# --- picture --------------------------------------------------------------------------------------


def test_picture_is_written_where_it_is_said(run, tmp_path, capsys):
    folder = run('one')
    report.main([folder])
    report.main([folder, run('two')])
    report.main([folder, '--plot=named.png'])
    for path in (tmp_path / 'one' / 'loss.png', tmp_path / 'report.png', tmp_path / 'named.png'):
        assert path.read_bytes().startswith(b'\x89PNG') and path.stat().st_size > 10_000
    assert capsys.readouterr().out.count('picture: ') == 3


def test_picture_that_cannot_be_written_is_refused_after_the_table(run, capsys, monkeypatch):
    folder = run('one')
    for path in ('none/x.png', 'x.nonsense'):
        problem, = refusal(report.main, [folder, f'--plot={path}'])
        assert problem.startswith(f"plot='{path}' cannot be written (") and '\n' not in problem
        assert capsys.readouterr().out.startswith('run ')
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    problem, = refusal(report.main, [folder])
    assert problem.endswith('pip install matplotlib') and capsys.readouterr().out.startswith('run ')


def test_panels_are_those_that_have_something_to_show(run):
    one = report.picture(loaded(run('one')))
    assert [axis.get_ylabel()[:9] for axis in one.axes] == ['loss (dot', 'learning ']
    both = report.picture(loaded(run('dense'), run('pruned', final=2.9, sparsity=0.5)))
    labels = {axis.get_ylabel() for axis in both.axes}
    assert {'minus the first', 'sparsity', 'learning rate', 'layer'} <= labels


def test_axis_is_scaled_to_what_comes_after_the_first_tenth(run):
    runs = loaded(run('a'), run('short', final=4.2, steps=20), run('worse', final=3.5))
    axis = axis_of(report.picture(runs), 'loss')
    low, high = axis.get_ylim()
    assert 2.7 < low < 2.9  # the lowest training loss, and a margin
    assert loss_at(20, 4.2) - 0.1 < high < loss_at(0, 3.0)  # the last of the short run is in view
    alone = axis_of(report.picture(runs[:1]), 'loss').get_ylim()[1]
    assert loss_at(50, 3.0) < alone < loss_at(30, 3.0)


def test_lines_are_validation_with_dots_and_training_only_of_few_runs(run):
    runs = loaded(*[run(f'run_{i}', final=3 + i / 10) for i in range(4)])
    few = axis_of(report.picture(runs[:3]), 'loss').lines
    many = axis_of(report.picture(runs), 'validation loss').lines
    assert len(few) == 6 and len(many) == 4
    for line, each in zip(many, runs):
        tokens, values = line.get_data()
        np.testing.assert_allclose(tokens, [step * BATCH / 1e6 for step in range(50, 401, 50)])
        assert list(values) == [r['val_loss'] for r in each.metrics if 'val_loss' in r][1:]
        assert line.get_marker() == 'o'
    assert few[3].get_marker() == 'None' and few[3].get_linewidth() < few[0].get_linewidth()


def test_difference_is_that_of_the_validation_losses(run):
    runs = loaded(run('a'), run('b', final=3.25))
    axis = axis_of(report.picture(runs), 'minus the first')
    np.testing.assert_allclose(axis.lines[1].get_ydata(), 0.25)
    assert texts(axis) == ['a  0.000', 'b  0.250']


def test_labels_stand_level_with_their_ends_and_do_not_overlap(run):
    finals = [3.0, 3.001, 3.002, 3.003, 3.2, 3.2004, 3.4, 3.6, 3.60001, 3.8]
    figure = report.picture(loaded(*[run(f'run_{i}', final=f) for i, f in enumerate(finals)]))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axis = axis_of(figure, 'validation loss')
    assert texts(axis) == [f'run_{i}  {f:.3f}' for i, f in enumerate(finals)]
    boxes = [height_of(text, canvas) for text in axis.texts]
    assert all(below[1] < above[0] for below, above in zip(boxes, boxes[1:]))
    middle = axis.transData.inverted().transform((0, sum(boxes[-1]) / 2))[1]
    assert middle == pytest.approx(3.8, abs=0.02)  # far from the others: not moved
    assert len({line.get_color() for line in axis.lines}) == 10
    assert [text.get_color() for text in axis.texts] == [line.get_color() for line in axis.lines]


def test_maps_show_the_sparsity_of_each_matrix(run):
    pruned = [run(f'p{i}', sparsity=0.2 + 0.1 * i) for i in range(4)]
    figure = report.picture(loaded(run('dense'), *pruned))
    maps = [axis for axis in figure.axes if axis.get_ylabel() == 'layer']
    assert [axis.get_title() for axis in maps] == ['p0', 'p1', 'p2']
    grid = maps[1].images[0].get_array()
    assert grid.shape == (3, 4) and grid[2, 3] == pytest.approx(0.3 + 0.02 + 0.003)
    columns = [label.get_text() for label in maps[0].get_xticklabels()]
    assert columns == ['attn\nqkv', 'attn\nproj', 'mlp\nfc', 'mlp\nproj']
    assert len({axis.images[0].get_clim() for axis in maps}) == 1
    assert 'sparsity of a matrix, 3 of 4 pruned runs' in [axis.get_xlabel() for axis in figure.axes]


def test_names_are_shown_as_they_are(run, tmp_path):
    names = ['a_$b$_c', '$x', '{0}', '_hidden', 'back\\slash', 'x^2_{y}']
    figure = report.picture(loaded(*[run(name, sparsity=0.5) for name in names]))
    figure.savefig(tmp_path / 'x.png')
    axis = axis_of(figure, 'validation loss')
    assert texts(axis) == [f'{name}  3.000' for name in sorted(names)]
    titles = [axis.title for axis in figure.axes if axis.get_ylabel() == 'layer']
    assert not any(text.get_parse_math() for text in [*axis.texts, *titles])


def test_runs_that_measured_little_or_nothing(run, tmp_path):
    nothing = run('nothing', ended=False)
    open(os.path.join(nothing, 'metrics.jsonl'), 'w').close()
    early = run('early', steps=40)  # evaluated before its first step only
    nan = run('nan', summary=dict(val_loss=None, val_ppl=None, exit_reason='nan'))
    with open(os.path.join(nan, 'metrics.jsonl'), 'a') as f:
        f.write('{"step": 410, "tokens": 410000, "loss": null, "lr": 0.001}\n')
        f.write('{"step": 410, "val_loss": NaN}\n{"step": 41')
    for folders in ([nothing], [nothing, early, nan, run('good')]):
        assert report.main([*folders, f'--plot={tmp_path}/x.png']) == 0
    figure = report.picture(loaded(early))
    axis = axis_of(figure, 'loss')
    assert texts(axis) == []  # a training loss is never called a validation loss
    assert axis.get_ylim()[1] < 8  # scaled to the training loss


def test_same_names_become_paths(run, tmp_path, capsys):
    (tmp_path / 'deep').mkdir()
    report.main([run('a'), run('deep/a')])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == [f'{tmp_path}/a', f'{tmp_path}/deep/a']
