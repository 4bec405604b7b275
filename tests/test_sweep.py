"""sweep.py: an experiment on the CPU, from nothing to committed figures, stopped and continued."""
import json
import time

import pytest
from conftest import HOME, TINY, refusal

import sweep
import train
from support.checks import check
from support.rundir import read_metrics
from support.settings import parse


@pytest.fixture
def experiment(tiny_data, tmp_path, monkeypatch):
    """Path of an experiment of two runs; results/ and out/ lie beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'preset.py').write_text('grad_clip = 0.5\n')
    path = tmp_path / 'experiments' / 'small.py'
    path.parent.mkdir()
    common = {**TINY, 'data_dir': str(tiny_data), 'max_iters': 12}
    path.write_text(f'base = {str(tmp_path / "preset.py")!r}\n'
                    f'common = {common!r}\n'
                    "varied = ['tokens', 'learning_rate']\n"
                    "runs = {'first': {}, 'second': {'seed': 2, 'max_iters': 16}}\n")
    return path


def test_runs_leave_their_figures_and_a_report(experiment, tmp_path, capsys):
    assert sweep.main([str(experiment)]) == 0
    for name, steps in (('first', 12), ('second', 16)):
        kept = tmp_path / 'results' / 'small' / name
        assert {file.name for file in kept.iterdir()} == {'config.json', 'summary.json',
                                                          'metrics.jsonl'}
        assert json.loads((kept / 'summary.json').read_text())['steps'] == steps
        assert json.loads((kept / 'config.json').read_text())['settings']['grad_clip'] == 0.5
    printed = capsys.readouterr().out
    assert '|  first |     1 |' in printed and '| second |     1 |' in printed
    assert 'careful: max_iters differs: 12 (first), 16 (second)' in printed
    assert 'tokens differs' not in printed and 'seed differs' not in printed
    assert (tmp_path / 'out' / 'small' / 'report.png').exists()
    assert sweep.main([str(experiment)]) == 0
    assert 'started' not in capsys.readouterr().out  # what is finished is not run again


def test_a_run_may_leave_idle_what_all_have_in_common(experiment, tmp_path):
    """As a preset may: both are typed nowhere."""
    pruned = dict(prune_score='magnitude', prune_start=2, prune_end=8, prune_interval=2,
                  prune_lr_power=0.5, target_sparsity=0.25)
    source = experiment.read_text().replace("'first': {}", "'first': {'prune_score': 'none'}")
    experiment.write_text(source.replace('\nvaried', f'\ncommon.update({pruned!r})\nvaried'))
    assert sweep.main([str(experiment)]) == 0
    for name, sparsity in (('first', 0.0), ('second', 0.25)):
        kept = tmp_path / 'results' / 'small' / name / 'summary.json'
        assert json.loads(kept.read_text())['sparsity'] == pytest.approx(sparsity, abs=1e-3)


class Clock:
    """For sweep.py the time is up as soon as the run has got beyond `step`."""

    def __init__(self, folder, step):
        self.metrics = folder / 'metrics.jsonl'
        self.step = step

    def monotonic(self):
        steps = [record['step'] for record in read_metrics(self.metrics)]
        return 1e9 if steps and steps[-1] > self.step else 0.0

    def sleep(self, seconds):
        time.sleep(seconds)


def test_time_limit_saves_and_the_same_command_continues(experiment, tmp_path, capsys,
                                                         monkeypatch):
    source = experiment.read_text().replace("'max_iters': 12", "'max_iters': 100000")
    experiment.write_text(source.replace("'second'", "# 'second'").replace('{}, #', '{}} #'))
    folder = tmp_path / 'out' / 'small' / 'first'
    monkeypatch.setattr(sweep, 'time', Clock(folder, 0))
    assert sweep.main([str(experiment), '--time_limit=8']) == 1
    assert 'continues it' in capsys.readouterr().out
    summary = folder / 'summary.json'
    first = json.loads(summary.read_text())
    assert first['exit_reason'] == 'sigterm' and first['steps'] > 0
    assert not (tmp_path / 'results').exists()
    monkeypatch.setattr(sweep, 'time', Clock(folder, first['steps']))
    assert sweep.main([str(experiment), '--time_limit=8']) == 1
    assert json.loads(summary.read_text())['steps'] > first['steps']


def test_metrics_are_thinned_but_evaluations_stay(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    for name in ('config.json', 'summary.json'):
        (folder / name).write_text('{}')
    records = [{'step': step, 'loss': 1.0} for step in range(1, 1001)]
    records += [{'step': step, 'val_loss': 1.0} for step in range(0, 1001, 100)]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    sweep.keep_results(str(folder), str(tmp_path / 'kept'))
    kept = read_metrics(tmp_path / 'kept' / 'metrics.jsonl')
    assert 150 <= len(kept) <= sweep.METRICS_KEPT
    assert sum('val_loss' in record for record in kept) == 11
    assert {'step': 1000, 'loss': 1.0} in kept


def test_what_is_not_an_experiment_is_refused(tmp_path):
    path = tmp_path / 'wrong.py'
    path.write_text('base = "config/vanilla_baseline.py"\n')
    preset = path.read_text()
    for runs in ('', 'runs = {}', 'runs = [1]', 'runs = {"a": 3}',
                 'runs = {"a": {}}; common = 3', 'runs = {"a": {}}; base = 3'):
        path.write_text(preset + runs)
        assert 'must assign base, a preset, and runs' in refusal(sweep.main, [str(path)])[0]
    assert refusal(sweep.main, [str(path), '--gpus=-1', '--time_limit=-1']) == [
        'gpus_a_run=1 gpus=-1 time_limit=-1: none is negative, and gpus_a_run is from 1 to gpus']
    assert 'cannot be read' in refusal(sweep.main, [str(tmp_path / 'none.py')])[0]
    assert 'gpus_a_run=3' in refusal(sweep.main, [str(path), '--gpus=2', '--gpus_a_run=3'])[0]


@pytest.mark.parametrize('listed, gpus, a_run, given', [
    (None, 2, 1, ['0', '1']), ('', 2, 2, ['0,1', '0,1']), ('5,2,GPU-8932f937', 2, 1, ['5', '2']),
    ('5,2,GPU-8932f937', 3, 2, ['5,2', 'GPU-8932f937,5']), ('3', 1, 1, ['3', '3']),
    ('5,2', 0, 1, ['5,2', '5,2']), (None, 0, 1, [None, None])])
def test_a_sweep_takes_its_gpus_from_those_it_was_given(experiment, monkeypatch, listed, gpus,
                                                        a_run, given):
    if listed is None:
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    else:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', listed)
    seen = []

    class Process:
        returncode = 1

        def __init__(self, command, env, **_):
            seen.append(env.get('CUDA_VISIBLE_DEVICES'))

        def poll(self):
            return 1

    monkeypatch.setattr(sweep.subprocess, 'Popen', Process)
    assert sweep.main([str(experiment), f'--gpus={gpus}', f'--gpus_a_run={a_run}']) == 1
    assert seen == given


def test_fewer_gpus_than_a_sweep_is_told_to_take(experiment, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,3')
    assert refusal(sweep.main, [str(experiment), '--gpus=4']) == [
        "gpus=4: CUDA_VISIBLE_DEVICES='2,3' lists 2"]


def test_an_edited_experiment_is_not_finished(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'summary.json').write_text('{"exit_reason": "finished"}')
    (folder / 'config.json').write_text('{"settings": {"seed": 1, "learning_rate": 0.001}}')
    assert sweep.is_finished(str(folder), dict(seed=1, learning_rate=1e-3))
    for reason, ended in (('diverged', True), ('nan', True), ('sigterm', False), ('error', False)):
        (folder / 'summary.json').write_text(json.dumps({'exit_reason': reason}))
        assert sweep.is_finished(str(folder), dict(seed=1)) is ended
    (folder / 'summary.json').write_text('{"exit_reason": "finished"}')
    assert not sweep.is_finished(str(folder), dict(seed=2, learning_rate=1e-3))


def test_a_run_that_does_not_save_in_time_is_killed_and_said(experiment, monkeypatch, capsys):
    monkeypatch.setattr(sweep, 'SAVING_SECONDS', 0)
    assert sweep.main([str(experiment), '--time_limit=1']) == 1
    assert 'killed, because it had not saved' in capsys.readouterr().out


@pytest.mark.parametrize('path', sorted(HOME.glob('experiments/*.py')), ids=lambda path: path.stem)
def test_runs_of_every_experiment_have_settings_that_train(path):
    _, base, runs = sweep.read_experiment(str(path))
    for told in runs.values():
        argv = [str(HOME / base), *(f'--{key}={value}' for key, value in told.items())]
        settings, problems, _ = parse(train.Settings, argv)
        assert problems + check(settings) == []
