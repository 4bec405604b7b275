"""Run an experiment: several trainings, side by side, resumed where they were stopped.

    python sweep.py experiments/table_3000.py --gpus=4 --time_limit=540

An experiment is a Python file with `base`, a preset, `runs`, {name: {setting: value}}, `common`,
settings of all runs, and `varied`, those that report.py expects to differ. Call it again until all
are finished. It ends with report.py's table and picture, and figures in results/NAME/RUN/.
"""
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import report
from support.files import read_json, write_atomically, write_json
from support.rundir import exit_reason, read_metrics
from support.settings import Path, Refused, arguments, help_text, parse, read_config, run_command

HOME = os.path.dirname(os.path.abspath(__file__))
METRICS_KEPT = 200  # lines of a run's metrics in results/
SAVING_SECONDS = 60  # a run may take to save after SIGTERM


@dataclass
class SweepSettings:
    gpus: int = 0  # first of CUDA_VISIBLE_DEVICES, a run each; 0: a run at a time, as settings say
    gpus_a_run: int = 1  # more than 1: each run by torchrun over so many
    time_limit: int = 0  # seconds after which all runs save and stop, to be continued; 0: none
    out_dir: Path = 'out'  # runs go to OUT_DIR/NAME/RUN


def read_experiment(path):
    """(name, base preset, {run: {setting: value}}) of an experiment file."""
    told = read_config(path)
    try:
        runs = {str(name): {**told.get('common', {}), **changes}
                for name, changes in told['runs'].items()}
        base = os.fspath(told['base'])
    except (KeyError, TypeError, AttributeError):
        runs = {}
    if not runs:
        raise Refused(f'{path} must assign base, a preset, and runs = {{name: {{setting: value}}}}')
    return os.path.basename(path).removesuffix('.py'), base, runs


def is_finished(folder, settings):
    """Whether `folder` has the end, good or bad, of a run of these settings, not of others."""
    if exit_reason(folder) not in ('finished', 'diverged', 'nan', 'unsaved'):
        return False
    made_with = read_json(os.path.join(folder, 'config.json'))['settings']
    return all(made_with.get(key) == value for key, value in settings.items())


def start(name, base, settings, folder, gpus):
    """The process that trains, or continues, one run in `folder`; it says so in FOLDER.log."""
    command = [sys.executable]
    if len(gpus) > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={len(gpus)}']
    # A preset, so that one setting may deprive another of effect; as text, like a command line.
    lines = ''.join(f'{key} = {str(value)!r}\n' for key, value in settings.items())
    write_atomically(f'{folder}.py', lambda f: f.write(lines.encode()))
    command += ['train.py', base, f'{folder}.py', f'--out_dir={folder}', '--init_from=auto']
    env = os.environ if None in gpus else {**os.environ, 'CUDA_VISIBLE_DEVICES': ','.join(gpus)}
    print(f'{name}: started; it says: {folder}.log', flush=True)
    with open(f'{folder}.log', 'a') as log:
        return subprocess.Popen(command, cwd=HOME, env=env, stdout=log, stderr=log)


def run_all(base, runs, folders, s, gpus):
    """Train what is not finished, until all are or the time is up."""
    waiting = [name for name in runs if not is_finished(folders[name], runs[name])]
    free = gpus or [None]  # None: the device that the settings name
    running = {}  # run: (process, its GPUs)
    deadline = time.monotonic() + (s.time_limit or float('inf'))
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(free) >= s.gpus_a_run:
            name = waiting.pop(0)
            gpus = [free.pop(0) for _ in range(s.gpus_a_run)]
            running[name] = start(name, base, runs[name], folders[name], gpus), gpus
        time.sleep(0.2)
        for name in [name for name in running if running[name][0].poll() is not None]:
            process, gpus = running.pop(name)
            free += gpus
            print(f'{name}: ended with exit code {process.returncode}', flush=True)
    for process, _ in running.values():
        process.terminate()
    for name, (process, _) in running.items():
        told = 'the time is up'
        try:
            process.wait(SAVING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            told = f'killed, because it had not saved after {SAVING_SECONDS} s'
        print(f'{name}: {told}; the same command continues it', flush=True)


def keep_results(folder, place):
    """Copy config.json and summary.json, and metrics.jsonl in at most METRICS_KEPT lines."""
    os.makedirs(place, exist_ok=True)
    for name in ('config.json', 'summary.json'):
        content = read_json(os.path.join(folder, name))
        content.pop('host', None)  # results are for everybody
        content.pop('command', None)  # the experiment says it
        content.get('settings', {}).pop('out_dir', None)
        write_json(os.path.join(place, name), content)
    records = read_metrics(os.path.join(folder, 'metrics.jsonl'))
    steps = [record['step'] for record in records if 'loss' in record]  # of training
    room = max(1, METRICS_KEPT - (len(records) - len(steps)))
    left = set(steps[::-1 - len(steps) // room])  # from the last backwards
    kept = [record for record in records if 'loss' not in record or record['step'] in left]
    text = ''.join(json.dumps(record) + '\n' for record in kept)
    write_atomically(os.path.join(place, 'metrics.jsonl'), lambda f: f.write(text.encode()))


def main(argv):
    """Run an experiment; exit code 0 once all its runs are finished, 1 while some are not."""
    argv = arguments(SweepSettings, argv)
    if '--help' in argv or not argv:
        print(help_text(SweepSettings, __doc__))
        return 0 if argv else 2
    s, problems, _ = parse(SweepSettings, argv[1:], config_files=False)
    if min(s.gpus, s.time_limit) < 0 or not 1 <= s.gpus_a_run <= max(1, s.gpus):
        problems.append(f'gpus_a_run={s.gpus_a_run} gpus={s.gpus} time_limit={s.time_limit}: none '
                        'is negative, and gpus_a_run is from 1 to gpus')
    listed = os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(s.gpus)))
    gpus = listed.split(',')[:s.gpus]
    if len(gpus) < s.gpus:
        problems.append(f'gpus={s.gpus}: CUDA_VISIBLE_DEVICES={listed!r} lists {len(gpus)}')
    if problems:
        raise Refused(problems)
    experiment, base, runs = read_experiment(argv[0])
    parent = os.path.join(os.path.abspath(s.out_dir), experiment)
    os.makedirs(parent, exist_ok=True)
    folders = {name: os.path.join(parent, name) for name in runs}
    run_all(base, runs, folders, s, gpus)
    done = [name for name in runs if is_finished(folders[name], runs[name])]
    for name in done:
        keep_results(folders[name], os.path.join('results', experiment, name))
    if done:
        report.compare([folders[name] for name in done], [], os.path.join(parent, 'report.png'))
    if left := [name for name in runs if name not in done]:
        print(f'not finished: {", ".join(left)}')
    return 1 if left else 0


if __name__ == '__main__':
    run_command(main)
