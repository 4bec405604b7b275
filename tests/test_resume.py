"""Stopping and going on: what was interrupted, by whatever, ends as if it had not been."""
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from conftest import HOME, assert_same_run, last, refusal, train, words

import prepare
import rundir
from shards import open_data

TIMINGS = ('tokens_per_second', 'mfu', 'peak_memory_bytes', 'seconds')


def metrics(folder):
    """The records of a run without what the machine decides."""
    return [{k: v for k, v in r.items() if k not in TIMINGS} for r in rundir.read_metrics(folder / 'metrics.jsonl')]


def make_data(tmp_path, texts, seed):
    """Folder of another data set named 'tiny', of this many texts of 100 words."""
    (tmp_path / 'text').mkdir()
    for i in range(texts):
        (tmp_path / 'text' / f'{i}.txt').write_text(words(100, seed + i))
    assert prepare.main(['text', f'--input={tmp_path / "text"}', '--name=tiny', '--tokenizer=bytes',
                         f'--data_dir={tmp_path / "data"}', '--val_fraction=0.2']) == 0
    return tmp_path / 'data'


def files_of(folder):
    """name -> (content, time of the last change)."""
    return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.iterdir()}


# --- exact continuation ------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_resumed_run_is_the_straight_run_to_the_bit(tiny, tmp_path, dtype):
    folder = make_data(tmp_path, texts=12, seed=0)
    windows = open_data(str(folder), 'tiny').train.windows
    block = next(b for b in range(32, 64) if windows(b) % 24 == 0)
    epoch = windows(block) // 24  # updates; the epoch ends exactly between two of them
    told = dict(data_dir=folder, batch_size=12, gradient_accumulation_steps=2, block_size=block, dropout=0.2, dtype=dtype, eval_interval=1,
                log_interval=1, save_interval=100, lr_decay_iters=epoch + 4)
    train.main(tiny(**told, max_iters=epoch + 4, out_dir=tmp_path / 'straight'))
    generator = torch.get_rng_state()
    for stop in (epoch - 2, epoch, epoch + 1, epoch + 4):  # in the middle, at the end, in the next epoch
        torch.manual_seed(stop)  # what the process did before must not matter
        assert train.main(tiny(**told, max_iters=stop, out_dir=tmp_path / 'split', init_from='auto')) == 0
        assert last(tmp_path / 'split')['progress']['step'] == stop
    assert_same_run(tmp_path / 'straight', tmp_path / 'split')
    assert torch.equal(torch.get_rng_state(), generator)
    assert metrics(tmp_path / 'split') == metrics(tmp_path / 'straight')
    steps = [r['step'] for r in metrics(tmp_path / 'split') if 'loss' in r]
    assert steps == list(range(1, epoch + 5))


def test_metrics_have_no_step_twice_and_none_missing_wherever_the_run_was_split(tiny, tmp_path, monkeypatch):
    told = dict(lr_decay_iters=16, log_interval=2, eval_interval=4, save_interval=4)
    gradients = train.local_gradients  # one loss is far below the others, at a step that only a split run logs
    monkeypatch.setattr(train, 'local_gradients', lambda run: gradients(run) - (3 if run.progress.step == 6 else 0))
    train.main(tiny(**told, max_iters=16, out_dir=tmp_path / 'straight'))
    for stop in (4, 7, 16):
        train.main(tiny(**told, max_iters=stop, out_dir=tmp_path / 'split', init_from='auto'))
    assert_same_run(tmp_path / 'straight', tmp_path / 'split')
    split = metrics(tmp_path / 'split')
    assert all(record in split for record in metrics(tmp_path / 'straight'))
    for key in ('loss', 'val_loss'):
        steps = [r['step'] for r in split if key in r]
        assert steps == sorted(set(steps)), key


def test_what_a_crashed_run_measured_after_its_checkpoint_is_measured_again(tiny, tmp_path, monkeypatch):
    told = dict(max_iters=8, log_interval=1, save_interval=4, eval_interval=2)
    train.main(tiny(**told, out_dir=tmp_path / 'straight'))
    gradients = train.local_gradients

    def crash(run):
        if run.progress.step == 6:
            raise ValueError('crash')
        return gradients(run)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match='crash'):
        patch.setattr(train, 'local_gradients', crash)
        train.main(tiny(**told))
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['exit_reason'] == 'error'
    with open(tmp_path / 'run' / 'metrics.jsonl', 'a') as f:
        f.write('{"step": 7, "lo')  # cut short by the crash
    assert train.main(tiny(**told, init_from='resume')) == 0
    assert_same_run(tmp_path / 'straight', tmp_path / 'run')
    assert metrics(tmp_path / 'run') == metrics(tmp_path / 'straight')


def test_micro_batch_may_change_on_resume_and_the_result_stays(tiny, tmp_path):
    told = dict(lr_decay_iters=8, eval_interval=8, eps=1e-2)  # eps: see test_ranks.py
    train.main(tiny(**told, max_iters=8, batch_size=4, gradient_accumulation_steps=1, out_dir=tmp_path / 'straight'))
    train.main(tiny(**told, max_iters=4, batch_size=4, gradient_accumulation_steps=1, out_dir=tmp_path / 'split'))
    train.main(tiny(**told, max_iters=8, batch_size=1, gradient_accumulation_steps=4, out_dir=tmp_path / 'split', init_from='resume'))
    for a, b in zip(*(last(tmp_path / name)['weights'].values() for name in ('straight', 'split'))):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


# --- auto, finished ----------------------------------------------------------------------------------


def test_auto_starts_goes_on_and_ends(tiny, tmp_path, capsys):
    told = dict(init_from='auto', lr_decay_iters=8)
    assert train.main(tiny(**told, max_iters=4)) == 0
    assert train.main(tiny(**told, max_iters=8)) == 0
    assert 'continued from step 4' in capsys.readouterr().out
    assert last(tmp_path / 'run')['progress']['step'] == 8
    before = files_of(tmp_path / 'run')
    for init_from in ('auto', 'resume'):
        assert train.main(tiny(**{**told, 'init_from': init_from}, max_iters=8)) == 0
        assert capsys.readouterr().out == f'{tmp_path}/run holds this run, finished; nothing to do\n'
    assert files_of(tmp_path / 'run') == before


# --- refused -----------------------------------------------------------------------------------------


def test_resume_with_nothing_there(tiny, tmp_path):
    assert refusal(train.main, tiny(init_from='resume')) == [
        f"init_from='resume': there is no {tmp_path}/run/last.pt; check out_dir or use --init_from=scratch"]


def test_resume_with_other_settings_names_each(tiny, tmp_path):
    train.main(tiny(max_iters=4, lr_decay_iters=8))
    out = tmp_path / 'run'
    before = files_of(out)
    assert refusal(train.main, tiny(init_from='resume', learning_rate=2e-2, n_layer=3, batch_size=3, lr_decay_iters=9)) == [
        f'n_layer=3: the run in {out} has n_layer=2; keep it, or start another run with another --out_dir',
        f'learning_rate=0.02: the run in {out} has learning_rate=0.01; keep it, or start another run with another --out_dir',
        f'batch_size x gradient_accumulation_steps = 6: the run in {out} has 4; keep it, or start another run with another --out_dir',
        f'lr_decay_iters (0: max_iters) = 9: the run in {out} has 8; keep it, or start another run with another --out_dir']
    assert files_of(out) == before


def test_resume_on_other_data(tiny, tmp_path):
    train.main(tiny(max_iters=4, lr_decay_iters=8))
    then = last(tmp_path / 'run')['fingerprint']
    folder = make_data(tmp_path, texts=12, seed=1000)
    now = open_data(str(folder), 'tiny').fingerprint
    assert refusal(train.main, tiny(init_from='resume', lr_decay_iters=8, data_dir=folder)) == [
        f'data in {folder} changed: fingerprint {now}, the run in {tmp_path}/run was trained on {then}; '
        'restore that data, or start another run with another --out_dir']


def damaged(path, reason):
    return [f'checkpoint {path} is damaged or not one of ours ({reason}); use another copy, e.g. best.pt for the weights']


def test_damaged_checkpoint(tiny, tmp_path):
    train.main(tiny(max_iters=4, lr_decay_iters=8))
    path = tmp_path / 'run' / 'last.pt'
    whole = path.read_bytes()
    middle = whole.index(last(tmp_path / 'run')['weights']['blocks.0.mlp.fc.weight'].numpy().tobytes()) + 1001
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:])
    assert refusal(train.main, tiny(init_from='resume', lr_decay_iters=8)) == damaged(path, 'its checksum does not match')
    for content in (whole[:len(whole) // 2], whole[:-1], b'', b'my notes\n', json.dumps({'step': 4}).encode()):
        path.write_bytes(content)
        problem, = refusal(train.main, tiny(init_from='resume', lr_decay_iters=8))
        before, after = damaged(path, '|')[0].split('|')
        assert problem.startswith(before) and problem.endswith(after) and '\n' not in problem
    path.write_bytes((tmp_path / 'run' / 'best.pt').read_bytes())
    assert refusal(train.main, tiny(init_from='resume', lr_decay_iters=8)) == [
        f'{path} holds weights only, like a best.pt: not enough to resume from; restore the last.pt of this run']
    path.write_bytes(whole)
    assert train.main(tiny(init_from='resume', lr_decay_iters=8)) == 0


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'run code'),)

    torch.save({'weights': Attack()}, tmp_path / 'last.pt')
    assert 'is damaged or not one of ours' in refusal(rundir.load_checkpoint, str(tmp_path / 'last.pt'))[0]
    assert not (tmp_path / 'run code').exists()


def test_full_disk_while_saving_keeps_the_previous_checkpoint(tmp_path):
    path, limit = str(tmp_path / 'last.pt'), 200_000
    rundir.save_checkpoint(path, {'weights': torch.ones(10)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        problem, = refusal(rundir.save_checkpoint, path, {'weights': torch.ones(limit)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert problem.startswith(f'{path} could not be written (') and problem.endswith('); the previous checkpoint stays')
    assert torch.equal(rundir.load_checkpoint(path)['weights'], torch.ones(10))
    assert os.listdir(tmp_path) == ['last.pt']


# --- killed ------------------------------------------------------------------------------------------

SAVE_AND_KILL = '''
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from rundir import load_checkpoint, save_checkpoint
torch.set_num_threads(1)
path, draw = sys.argv[2], random.Random(0)
save_checkpoint(path, {'version': 0, 'weights': torch.full((500_000,), 0.0)})
partial, found = 0, set()
for kill in range(25):
    child = os.fork()
    if child == 0:
        version = 100 * kill
        while True:
            version += 1
            save_checkpoint(path, {'version': version, 'weights': torch.full((500_000,), float(version))})
    time.sleep(draw.uniform(0.005, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    partial += os.path.exists(path + '.tmp')
    saved = load_checkpoint(path)
    assert torch.equal(saved['weights'], torch.full((500_000,), float(saved['version']))), kill
    found.add(saved['version'])
save_checkpoint(path, {'version': -1})
assert load_checkpoint(path) == {'version': -1} and os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
print(partial, len(found))
'''


def test_kill_9_while_saving_leaves_a_whole_checkpoint(tmp_path):
    (tmp_path / 'run').mkdir()
    done = subprocess.run([sys.executable, '-c', SAVE_AND_KILL, str(HOME), str(tmp_path / 'run' / 'last.pt')],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    partial, versions = map(int, done.stdout.split())
    assert partial > 0 and versions > 1  # the kills did come in the middle, and checkpoints did change


# --- signals -----------------------------------------------------------------------------------------


def test_sigterm_and_ctrl_c_save_at_a_step_boundary(tiny, tmp_path):
    told = dict(lr_decay_iters=100, eval_interval=10, save_interval=10**6, log_interval=1, dropout=0.1)
    environment = {**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads())}  # sums depend on it
    started = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        argv = [sys.executable, str(HOME / 'train.py'), *tiny(**told, max_iters=10**6, out_dir=tmp_path / number.name)]
        started[number] = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    for number, process in started.items():
        while not process.stdout.readline().startswith('step      2  loss'):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
    steps = {}
    for number, process in started.items():
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number and err == '', err
        folder = tmp_path / number.name
        step = steps[number] = last(folder)['progress']['step']
        assert out.endswith(f'{number.name}: saved at step {step}; continue with --init_from=resume\n')
        summary = json.loads((folder / 'summary.json').read_text())
        assert (summary['exit_reason'], summary['steps']) == (number.name.lower(), step)
    told['max_iters'] = max(steps.values()) + 5
    train.main(tiny(**told, out_dir=tmp_path / 'straight'))
    for number in started:
        assert train.main(tiny(**told, out_dir=tmp_path / number.name, init_from='resume')) == 0
        assert_same_run(tmp_path / 'straight', tmp_path / number.name)
        assert metrics(tmp_path / number.name) == metrics(tmp_path / 'straight')
