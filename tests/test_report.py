"""report.py on run directories made here: the table, what is unfair, and what the picture shows.

And on results/: the tables in docs/ are those of the committed figures.
"""
import json
import math
import os
import shutil
import statistics
import sys

import numpy as np
import pytest
from conftest import HOME, refusal
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

    def make(name, final=3.0, steps=400, sparsity=0.0, ended=True, summary=(), seed=1, layers=3,
             matrices=MATRICES):
        folder = tmp_path / name
        folder.mkdir(parents=True)
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
        told = dict(seed=seed, block_size=64, eval_tokens=640, dataset='tiny', learning_rate=1e-3,
                    out_dir=str(folder), prune_scope='blocks', prune_end=300,
                    target_sparsity=sparsity or 0.5,
                    prune_score='magnitude' if sparsity else 'none')
        config = dict(settings=told, data=dict(name='tiny', train_tokens=200_000),
                      fingerprint='f00d', dtype='float32', commit='c0ffee', edited=False,
                      torch='2.11', device='H100')
        (folder / 'config.json').write_text(json.dumps(config))
        by_layer = {f'blocks.{n}.{matrix}.weight': sparsity + n / 100 + i / 1000
                    for n in range(layers) for i, matrix in enumerate(matrices)}
        content = dict(
            steps=steps, tokens=steps * BATCH, val_loss=loss, val_ppl=math.exp(loss),
            best_val_loss=loss, sparsity=sparsity, sparsity_all=sparsity / 2,
            sparsity_by_layer=by_layer if sparsity else {}, tokens_per_second=5e5, mfu=0.4,
            peak_memory_bytes=2**31, peak_reserved_bytes=3 * 2**30, rung=0,
            rung_label='as configured', effective_batch=8, parameters=1000, dataset='tiny',
            fingerprint='f00d', exit_reason='finished')
        if ended:
            (folder / 'summary.json').write_text(json.dumps({**content, **dict(summary)}))
        return str(folder)
    return make


def arms_of(*folders):
    return report.load_arms(folders, '')


def loaded(*folders):
    return sum(arms_of(*folders).values(), [])


def drawn(*folders, curves=''):
    return report.picture(arms_of(*folders), curves)


def cells(line):
    return [cell.strip() for cell in line.strip('|').split('|')]


def rows(printed):
    """{arm: {heading: cell}} of a printed table."""
    lines = [cells(line) for line in printed.splitlines() if line.startswith('|')]
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


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
    folders = [run('short', sparsity=0.5), run('a_longer_name', final=2.5)]
    edit(folders[1], data=dict(name='tiny'))
    assert report.main(folders) == 0
    lines = capsys.readouterr().out.splitlines()
    assert cells(lines[0]) == [
        'arm', 'seeds', 'sparsity', 'val loss', 'perplexity', 'minus baseline', 'in perplexity',
        'training, last 10', 'non-zero', 'mean density', 'tokens', 'epochs', 'tok/s', 'mean GiB',
        'peak GiB', 'reserved']
    assert set(lines[1]) == set('|-: ')
    assert cells(lines[2]) == [
        'short', '1', '50.0%', '3.0000', '20.09', '-', '-', '2.9000', '0.0M', '74.4%', '0.4M',
        '2.00', '500,000', '-', '2.00', '3.00']
    assert cells(lines[3]) == [
        'a_longer_name', '1', '0.0%', '2.5000', '12.18', '-0.5000', '-39.3%', '2.4000', '0.0M',
        '100.0%', '0.4M', '-', '500,000', '-', '2.00', '3.00']
    assert len({len(line) for line in lines[:4]}) == 1


def test_arms_are_means_over_seeds_and_differences_are_paired(run, capsys):
    finals = {'dense': {1: 3.0, 2: 3.2, 3: 3.1}, 'half': {1: 3.02, 2: 3.19, 3: 3.15, 4: 9.0}}
    folders = [run(f'{arm}_{seed}', final=final, seed=seed)
               for arm in finals for seed, final in finals[arm].items()]
    assert report.main([*folders, '--baseline=half']) == 0
    half, dense = rows(capsys.readouterr().out).values()  # the baseline first

    def told(values, form):
        error = statistics.stdev(values) / len(values) ** 0.5
        return form.format(statistics.fmean(values), error)

    gaps = [final - finals['half'][seed] for seed, final in finals['dense'].items()]
    assert (dense['seeds'], half['seeds']) == ('3', '4')
    assert dense['val loss'] == told(finals['dense'].values(), '{:.4f} ± {:.4f}')
    assert dense['perplexity'] == f'{math.exp(3.1):.2f}'
    assert dense['minus baseline'] == told(gaps, '{:+.4f} ± {:.4f}')
    ratios = [math.exp(gap) - 1 for gap in gaps]
    assert dense['in perplexity'] == told(ratios, '{:+.1%} ± {:.1%}')
    assert half['minus baseline'] == '-'


def test_a_trailing_number_that_is_not_the_seed_names_an_arm(run):
    folders = [run('best_50', seed=1), run('best_75', seed=1), run('best_75_1', seed=1)]
    assert list(arms_of(*folders)) == ['best_50', 'best_75']
    problem, = refusal(report.main, [*folders, '--baseline=dense'])
    assert problem == "baseline='dense' is not one of these arms: best_50, best_75"


def test_what_a_run_has_not_measured_is_a_dash(run, tmp_path, capsys):
    folder = run('old', ended=False)
    write_lines(tmp_path / 'old' / 'metrics.jsonl', [])
    report.main([folder])
    old = rows(capsys.readouterr().out)['old']
    assert {heading for heading, cell in old.items() if cell != '-'} == {'arm', 'seeds', 'tokens',
                                                                         'epochs'}


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


def test_whatever_differs_is_named_the_decisive_first(run):
    first, other = run('first'), run('other')
    edit(other, edited=True, commit='beef', torch='2.12', device='H200', settings=dict(
        learning_rate=2e-3, seed=2, log_interval=1, out_dir='x', prune_end=7, target_sparsity=0.9))
    edit(first, settings=dict(log_interval=10))
    assert report.unfair(loaded(first, other)) == [
        'commit differs: c0ffee (first), beef (other)',
        'torch differs: 2.11 (first), 2.12 (other)', 'device differs: H100 (first), H200 (other)',
        'learning_rate differs: 0.001 (first), 0.002 (other)',  # prune_end: neither prunes
        'log_interval differs: 10 (first), 1 (other)',
        'other was made by code that differs from its commit']


def test_what_the_experiment_declares_is_not_called_unfair(run, tmp_path, capsys):
    folders = [run(f'small/{name}', sparsity=sparsity)
               for name, sparsity in (('dense', 0), ('half', 0.5), ('most', 0.9))]
    edit(folders[2], torch='2.12')
    (tmp_path / 'experiments').mkdir()
    experiment = tmp_path / 'experiments' / 'small.py'
    experiment.write_text("varied = ['prune_score', 'target_sparsity']\n")
    report.main(folders)
    assert [line for line in capsys.readouterr().out.splitlines() if 'careful' in line] == [
        '- careful: torch differs: 2.11 (dense, half), 2.12 (most)']
    experiment.write_text('varied = [')
    problem, = refusal(report.main, folders)
    assert problem.startswith("config file 'experiments/small.py' cannot be read: SyntaxError")


def test_pruned_beside_dense_differ_in_the_score_only(run):
    lines = report.unfair(loaded(run('dense'), run('pruned', sparsity=0.5)))
    assert lines == ['prune_score differs: none (dense), magnitude (pruned)']


def test_run_that_goes_on_is_shown_with_what_it_has(run, capsys):
    going, resumed = run('going', steps=155, ended=False), run('resumed', summary=dict(steps=200))
    assert report.main([going, resumed]) == 0
    printed = capsys.readouterr().out
    told = rows(printed)
    assert told['going']['val loss'] == f'{loss_at(150, 3.0):.4f}'
    assert told['going']['epochs'] == '0.75' and told['resumed']['epochs'] == '2.00'
    for name in ('going', 'resumed'):
        assert f'- careful: {name} has not finished: running' in printed.splitlines()


def test_no_run_is_refused(run, tmp_path):
    (tmp_path / 'hf').mkdir()
    (tmp_path / 'hf' / 'config.json').write_text('{"model_type": "gpt2"}')
    (tmp_path / 'odd').mkdir()
    (tmp_path / 'odd' / 'config.json').write_text('{"settings": 3}')
    good, broken = run('good'), run('broken')
    with open(os.path.join(broken, 'summary.json'), 'w') as f:
        f.write('{')
    for name in ('none', 'hf', 'odd'):
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
    report.main([folder, '--plot=bare'])
    for path in ('one/loss.png', 'report.png', 'named.png', 'bare'):
        assert (tmp_path / path).read_bytes().startswith(b'\x89PNG')
    told = capsys.readouterr().out
    assert told.count('picture: ') == 4 and 'picture: bare\n' in told


def test_picture_that_cannot_be_written_is_refused_after_the_table(run, capsys, monkeypatch):
    folder = run('one')
    for path in ('none/x.png', 'x.nonsense', folder):
        problem, = refusal(report.main, [folder, f'--plot={path}'])
        assert problem.startswith(f"plot='{path}' cannot be written (") and '\n' not in problem
        assert capsys.readouterr().out.startswith('| ')
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    problem, = refusal(report.main, [folder])
    assert problem.endswith('pip install matplotlib') and capsys.readouterr().out.startswith('| ')


def test_panels_are_those_that_have_something_to_show(run):
    one = drawn(run('one'))
    assert [axis.get_ylabel()[:9] for axis in one.axes] == ['loss (dot', 'learning ']
    both = drawn(run('dense'), run('pruned', final=2.9, sparsity=0.5))
    labels = {axis.get_ylabel() for axis in both.axes}
    assert {'minus the first', 'sparsity', 'learning rate', 'layer'} <= labels


def test_axis_is_scaled_to_what_comes_after_the_first_tenth(run):
    folders = [run('a'), run('short', final=4.2, steps=20), run('worse', final=3.5)]
    axis = axis_of(drawn(*folders), 'loss')
    low, high = axis.get_ylim()
    assert 2.7 < low < 2.9  # the lowest training loss, and a margin
    assert loss_at(20, 4.2) - 0.1 < high < loss_at(0, 3.0)  # the last of the short run is in view
    alone = axis_of(drawn(folders[0]), 'loss').get_ylim()[1]
    assert loss_at(50, 3.0) < alone < loss_at(30, 3.0)


def test_lines_are_validation_with_dots_and_training_only_of_few_runs(run):
    folders = [run(f'run_{i}', final=3 + i / 10) for i in range(4)]
    few = axis_of(drawn(*folders[:3]), 'loss').lines
    many = axis_of(drawn(*folders), 'validation loss').lines
    assert len(few) == 6 and len(many) == 4
    for line, each in zip(many, loaded(*folders)):
        tokens, values = line.get_data()
        np.testing.assert_allclose(tokens, [step * BATCH / 1e6 for step in range(50, 401, 50)])
        assert list(values) == [r['val_loss'] for r in each.metrics if 'val_loss' in r][1:]
        assert line.get_marker() == 'o'
    assert few[3].get_marker() == 'None' and few[3].get_linewidth() < few[0].get_linewidth()


def test_difference_is_that_of_the_validation_losses(run):
    axis = axis_of(drawn(run('a'), run('b', final=3.25)), 'minus the first')
    np.testing.assert_allclose(axis.lines[1].get_ydata(), 0.25)
    assert texts(axis) == ['a  0.000', 'b  0.250']


def test_labels_stand_level_with_their_ends_and_do_not_overlap(run):
    finals = [3.0, 3.001, 3.002, 3.003, 3.2, 3.2004, 3.4, 3.6, 3.60001, 3.8]
    figure = drawn(*[run(f'run_{i}', final=f) for i, f in enumerate(finals)])
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


def test_labels_of_many_runs_find_room(run, recwarn):
    """Most of them end at the top of the panel; and the map of sparsities is beside them."""
    folders = [run(f'run_{i}', final=3.0 + (i > 2) + i / 1000, sparsity=0.5) for i in range(40)]
    figure = drawn(*folders)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert not [warning for warning in recwarn if 'layout' in str(warning.message)]
    axis = axis_of(figure, 'validation loss')
    boxes = [height_of(text, canvas) for text in axis.texts]
    assert len(boxes) == 40 and all(low[1] < high[0] for low, high in zip(boxes, boxes[1:]))
    panel = axis.get_window_extent()
    assert panel.y0 - 10 < boxes[0][0] and boxes[-1][1] < panel.y1 + 10


def test_map_shows_the_sparsity_of_each_matrix_of_the_first_pruned_run(run):
    pruned = [run(f'p{i}', sparsity=0.2 + 0.1 * i) for i in range(3)]
    axis = axis_of(drawn(run('dense'), *pruned), 'layer')
    assert axis.get_title() == 'p0'
    axis = axis_of(drawn(run('also_dense'), *pruned, curves='p1,p2'), 'layer')
    assert axis.get_title() == 'p1'
    grid = axis.images[0].get_array()
    assert grid.shape == (3, 4) and grid[2, 3] == pytest.approx(0.3 + 0.02 + 0.003)
    columns = [label.get_text() for label in axis.get_xticklabels()]
    assert columns == ['attn\nqkv', 'attn\nproj', 'mlp\nfc', 'mlp\nproj']


def test_names_are_shown_as_they_are(run, tmp_path):
    names = ['a_$b$_c', '$x', '{0}', '_hidden', 'back\\slash', 'x^2_{y}']
    folders = [run(name, sparsity=(i + 1) / 10) for i, name in enumerate(names)]
    figure = drawn(*folders)
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
    figure = drawn(early)
    axis = axis_of(figure, 'loss')
    assert texts(axis) == []  # a training loss is never called a validation loss
    assert axis.get_ylim()[1] < 8  # scaled to the training loss


def test_same_names_become_paths(run, tmp_path, capsys):
    report.main([run('a'), run('deep/a')])
    assert list(rows(capsys.readouterr().out)) == [f'{tmp_path}/a', f'{tmp_path}/deep/a']


def test_map_of_another_depth_and_attention_has_labels_of_its_own(run):
    latent = ('attention.q', 'attention.key_up', 'mlp.fc')
    others = run('dense', layers=5), run('pruned', sparsity=0.5)
    axis = axis_of(drawn(run('latent', sparsity=0.6, layers=2, matrices=latent), *others), 'layer')
    assert axis.images[0].get_array().shape == (2, 3)
    assert [label.get_text() for label in axis.get_xticklabels()] == [
        'attn\nq', 'attn\nkey_up', 'mlp\nfc']


def test_perplexity_over_sparsity_is_a_line_a_method_and_a_point_a_smaller_dense_model(run):
    """The runs have 1,000 weights, of which the fixture lets half be pruned."""
    finals = {'dense': (3.0, 0), 'best_50': (3.1, 0.5), 'best_90': (3.4, 0.9), '2_4': (3.2, 0.5)}
    folders = [run(f'{arm}_{seed}', final=final + seed / 10, sparsity=sparsity, seed=seed)
               for seed in (1, 2) for arm, (final, sparsity) in finals.items()]
    smaller = run('dense_6_layers_1', final=3.5, summary=dict(parameters=750))
    figure = drawn(*folders, smaller, curves='dense_1,best_50_1')
    axis = axis_of(figure, 'perplexity')
    assert {text.get_text().split()[0] for text in axis.texts} == {'dense', 'best', '2_4',
                                                                   'dense_6_layers'}

    def ppl(final):  # the mean of the losses of two seeds
        return math.exp(final + 0.15)

    shown = [line.get_xydata() for line in axis.lines]
    expected = [[(0, ppl(3.0))], [(0, ppl(3.0)), (0.5, ppl(3.1)), (0.9, ppl(3.4))],
                [(0.5, ppl(3.2))], [(0.5, math.exp(3.5))]]
    for points, wanted in zip(shown, expected, strict=True):
        np.testing.assert_allclose(points, wanted, rtol=1e-6, atol=1e-9)
    segments = axis.collections[1].get_segments()  # error bars of `best`
    error = 0.05 * ppl(3.1)  # of 3.2 and 3.3: their standard error is 0.05
    np.testing.assert_allclose(segments[1][:, 1], [ppl(3.1) - error, ppl(3.1) + error], rtol=1e-6)
    losses = axis_of(figure, 'loss')
    assert [text.split()[0] for text in texts(losses)] == ['dense_1', 'best_50_1']
    problem, = refusal(report.main, [*folders, '--curves=dense_1,dense_9'])
    assert problem == "curves='dense_1,dense_9': none of these runs is dense_9"


def test_runs_that_go_on_are_left_out_of_perplexity_over_sparsity(run):
    folders = [run('dense'), run('best_50', sparsity=0.5), run('best_90', sparsity=0.9)]
    going = run('best_75', sparsity=0.75, steps=155, ended=False)
    axis = axis_of(drawn(folders[0], going, *folders[1:]), 'perplexity')
    np.testing.assert_allclose(axis.lines[1].get_xdata(), [0, 0.5, 0.9])
    shown = drawn(going, *folders).axes  # the baseline itself goes on
    assert 'perplexity' not in [axis.get_ylabel() for axis in shown]


def test_pruned_runs_alone_stand_at_their_own_sparsity(run):
    folders = [run('bitter_75', sparsity=0.75), run('best_50', sparsity=0.5),
               run('best_90', sparsity=0.9)]
    axis = axis_of(drawn(*folders), 'perplexity')
    shown = [line.get_xdata().tolist() for line in axis.lines]
    np.testing.assert_allclose(shown[0], [0.75])
    np.testing.assert_allclose(shown[1], [0.5, 0.9])  # not by way of another method


def test_one_sparsity_makes_no_panel_of_perplexity(run):
    figure = drawn(run('dense'), run('a', sparsity=0.5), run('b', sparsity=0.5))
    assert 'perplexity' not in [axis.get_ylabel() for axis in figure.axes]


# --- results/ and docs/ ---------------------------------------------------------------------------


def test_a_document_is_written_anew_between_its_marks_only(run, tmp_path, capsys):
    for name in ('dense_1', 'half_1'):
        run(f'results/small/{name}', final=3.0 if 'dense' in name else 2.9,
            sparsity=0.0 if 'dense' in name else 0.5)
    document = tmp_path / 'doc.md'
    mark = '<!-- results: small --baseline=dense --plot=small.png -->'
    document.write_text(f'above $1 \\1\n{mark}\nold\n\nolder\n<!-- end -->\nbelow\n')
    assert report.main(['doc.md']) == 0
    once = document.read_text()
    assert once.startswith(f'above $1 \\1\n{mark}\n\n| ')
    assert once.endswith('\n\n<!-- end -->\nbelow\n')
    assert 'old' not in once and list(rows(once)) == ['dense', 'half']
    assert '- careful: prune_score differs: none (dense_1), magnitude (half_1)\n' in once
    assert (tmp_path / 'small.png').read_bytes().startswith(b'\x89PNG')
    report.main(['doc.md'])
    assert document.read_text() == once
    document.write_text(once.replace('results: small', 'results: none'))
    assert refusal(report.main, ['doc.md']) == ['doc.md: results/none has no runs']


def test_tables_in_the_documents_are_those_of_the_results(tmp_path, monkeypatch):
    monkeypatch.chdir(HOME)
    monkeypatch.setattr(report, 'picture', lambda *_: NoPicture())
    committed = HOME / 'docs' / 'RESULTS.md'
    copied = shutil.copy(committed, tmp_path)
    report.main([str(copied)])
    assert (tmp_path / 'RESULTS.md').read_text() == committed.read_text()
    assert ' best_50 |' in committed.read_text()


class NoPicture:
    def savefig(self, *_, **__):
        """Nothing: docs/ stays as it is."""


def test_results_are_small_and_complete():
    runs = sorted(path.parent for path in HOME.glob('results/*/*/config.json'))
    assert len(runs) >= 4
    for folder in runs:
        metrics = (folder / 'metrics.jsonl').read_text().splitlines()
        assert 10 < len(metrics) <= 200
        assert 'host' not in (folder / 'config.json').read_text()
        assert json.loads((folder / 'summary.json').read_text())['exit_reason'] in (
            'finished', 'diverged', 'nan')
