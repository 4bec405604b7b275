"""However the batch is divided, over micro-batches or over processes, the training is the same."""
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from conftest import HOME, TINY, last, losses, refusal

import train
from support import ranks
from support.guards import Stop
from support.machine import Machine
from support.rundir import exit_reason
from support.settings import Refused, run_command

# Adam's first updates are nearly the sign of the gradient, so where a gradient is almost zero a
# rounding error decides the direction of a whole step. Hence the tight bound on the losses, which
# hardly depend on such weights, and the loose one on single weights.
TOLD = dict(eval_interval=10, log_interval=1, lr_decay_iters=20, learning_rate=3e-3)


def assert_close(a, b):
    """Weights that are the same but for what rounding did to those without a gradient."""
    assert a.keys() == b.keys()
    difference = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert difference.max() < 1e-2 and difference.mean() < 1e-5


@pytest.mark.parametrize('batch_size, micro_batches', [(1, 8), (2, 4)])
def test_micro_batches_add_up_to_the_same_update(tiny, tmp_path, batch_size, micro_batches):
    told = dict(TOLD, max_iters=6)
    whole = dict(batch_size=8, gradient_accumulation_steps=1, out_dir=tmp_path / 'whole')
    parts = dict(batch_size=batch_size, gradient_accumulation_steps=micro_batches)
    train.main(tiny(**told, **whole))
    train.main(tiny(**told, **parts, out_dir=tmp_path / 'parts'))
    a, b = losses(tmp_path / 'whole'), losses(tmp_path / 'parts')
    assert a.keys() == b.keys() and a[6] < a[1] - 0.1
    assert abs(a[1] - b[1]) < 2e-6 and abs(a[2] - b[2]) < 5e-6
    assert max(abs(a[step] - b[step]) for step in a) < 1e-4
    assert_close(last(tmp_path / 'whole')['weights'], last(tmp_path / 'parts')['weights'])


# Run by torchrun, each process writes its weights: a run as any other, one with too little memory
# in one of the two, some in which the two differ, and a pruned one that is told to stop.
DRIVER = '''
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
import train
torch.set_num_threads(1)
folder = sys.argv[2]
argv = sys.argv[3:]
rank = int(os.environ['RANK'])
finish = train.finish
gradients = train.local_gradients
save = train.save_checkpoint
write_summary = train.write_summary
forward = train.GPT.forward

def keep_weights(run):
    code = finish(run)
    name = os.path.basename(run.settings.out_dir)
    weights = {key: tensor.clone() for key, tensor in train.weights_of(run).items()}
    torch.save({'weights': weights, 'val_loss': run.progress.val_loss, 'step': run.progress.step,
                'masks': list(run.pruner.masks.values()) if run.pruner else []},
               f'{folder}/{name}.pt')
    return code

def signal_self(run):
    if run.progress.step == 8 - rank:  # not at the same step, and far from the next log line
        os.kill(os.getpid(), signal.SIGTERM)
    return gradients(run)

def write_slowly(run, reason):
    # the other must not end before, because torchrun kills the rest then
    time.sleep(rank == 0)
    write_summary(run, reason)

def save_and_say(path, content, keep=None):
    save(path, content, keep)
    with open(f'{folder}/saved', 'a') as f:
        f.write(f'{rank} {os.path.basename(path)} {content["step"]}\\n')

forwards = 0

def limited(self, idx, targets=None):
    global forwards
    forwards += self.training
    if rank == 1 and forwards > 4 and self.training and idx.size(0) > 1:  # in the third step
        raise torch.OutOfMemoryError('out of memory')
    return forward(self, idx, targets)

def altered(run):
    # one bit of one weight, or a mask, of one of the two
    if rank == 1 and run.progress.step == 5:
        if run.pruner:
            next(iter(run.pruner.masks.values()))[1, 1] ^= True
        else:
            run.flats[0].masters.view(torch.int32)[7] ^= 1
    return gradients(run)

train.finish = keep_weights
assert train.main(argv + [f'--out_dir={folder}/two_{rank}']) == 0
train.GPT.forward = limited
assert train.main(argv + [f'--out_dir={folder}/short_{rank}', '--max_iters=3']) == 0
train.GPT.forward = forward
PRUNED = ['--optimizer=adamwprune', '--prune_score=bitter7', '--prune_start=2', '--prune_end=18',
          '--prune_interval=2']
again = argv + [f'--out_dir={folder}/two_{rank}', '--init_from=auto', '--max_iters=30',
                '--lr_decay_iters=20']  # only the first finds a checkpoint
assert train.main(again) == 1
assert train.main(argv + [f'--out_dir={folder}/settings_{rank}', f'--seed={rank}',
                          f'--eval_interval={10 + rank}']) == 1
train.local_gradients = altered
told = ['--save_interval=4', '--eval_interval=100']
assert train.main(argv + told + [f'--out_dir={folder}/weights_{rank}']) == 1
assert train.main(argv + told + PRUNED + [f'--out_dir={folder}/masks_{rank}',
                                          '--prune_interval=10']) == 1
train.local_gradients = signal_self
train.save_checkpoint = save_and_say
train.write_summary = write_slowly
code = train.main(argv + [
    f'--out_dir={folder}/stopped_{rank}', '--log_interval=100', '--eval_interval=100',
    '--save_interval=7'] + PRUNED)
sys.stdout.flush()
os._exit(code)  # at once
'''


TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


@pytest.fixture(scope='module')
def two(tiny_data, tmp_path_factory):
    """(folder in which two processes have trained and stopped, what torchrun said, settings)."""
    folder = tmp_path_factory.mktemp('two')
    (folder / 'driver.py').write_text(DRIVER)
    told = {**TINY, 'data_dir': tiny_data, **TOLD, 'max_iters': 20, 'batch_size': 2,
            'gradient_accumulation_steps': 4}
    argv = [f'--{key}={value}' for key, value in told.items()]
    done = subprocess.run([*TORCHRUN, folder / 'driver.py', HOME, folder, *argv], timeout=180,
                          capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert (folder / 'stopped_1.pt').exists(), done.stderr
    return folder, done, argv


def test_two_processes_train_as_one(two, tmp_path):
    folder, _, argv = two
    assert train.main([*argv, f'--out_dir={tmp_path}/one']) == 0
    zero, one = (torch.load(folder / f'two_{rank}.pt') for rank in (0, 1))
    for name, weight in zero['weights'].items():
        assert torch.equal(weight, one['weights'][name])
    assert zero['val_loss'] == one['val_loss']
    alone, together = losses(tmp_path / 'one'), losses(folder / 'two_0')
    assert alone.keys() == together.keys() == set(range(1, 21))
    assert abs(alone[1] - together[1]) < 2e-6 and abs(alone[2] - together[2]) < 5e-6
    assert max(abs(alone[step] - together[step]) for step in alone) < 1e-3
    assert_close(last(tmp_path / 'one')['weights'], last(folder / 'two_0')['weights'])
    told = [json.loads((path / 'summary.json').read_text())
            for path in (tmp_path / 'one', folder / 'two_0')]
    assert abs(told[0]['val_loss'] - told[1]['val_loss']) < 1e-3
    log = (folder / 'two_0' / 'train.log').read_text()
    assert 'x 4 micro-batches = 8 sequences on 2 processes' in log


def test_only_the_first_process_writes(two):
    folder, _, _ = two
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        'masks_0', 'settings_0', 'short_0', 'stopped_0', 'two_0', 'weights_0']


def test_both_take_smaller_micro_batches_if_one_lacks_memory(two):
    folder, _, _ = two
    zero, one = (torch.load(folder / f'short_{rank}.pt') for rank in (0, 1))
    assert all(torch.equal(zero['weights'][name], one['weights'][name]) for name in zero['weights'])
    summary = json.loads((folder / 'short_0' / 'summary.json').read_text())
    assert (summary['rung'], summary['rung_label']) == (1, 'micro-batches of 1')
    assert 'another rank ran out of memory' in (folder / 'short_0' / 'train.log').read_text()
    enough, short = losses(folder / 'two_0'), losses(folder / 'short_0')
    assert list(short) == [1, 2, 3] and abs(short[1] - enough[1]) < 2e-6
    assert max(abs(short[step] - enough[step]) for step in short) < 1e-4


def test_processes_that_hold_different_runs_do_not_begin(two):
    folder, done, _ = two
    told = [line for line in done.stdout.splitlines() if 'different runs' in line]
    assert told[:2] == [
        f'step {step}: the ranks hold different runs (not the same: {what}); nothing was saved. '
        'See that all read the same settings, data and out_dir; if they do, a machine is faulty'
        for step, what in ((20, 'step, weights'), (0, 'weights, seed, eval_interval'))]
    summary = json.loads((folder / 'two_0' / 'summary.json').read_text())
    assert summary['exit_reason'] == 'finished' and last(folder / 'two_0')['step'] == 20
    assert not list((folder / 'settings_0').glob('*.*'))  # but for the lock


@pytest.mark.parametrize('what', ['weights', 'masks'])
def test_nothing_is_saved_that_the_processes_do_not_share(two, what):
    folder, _, _ = two
    summary = json.loads((folder / f'{what}_0' / 'summary.json').read_text())
    assert (summary['exit_reason'], summary['steps']) == ('ranks differ', 8)
    log = (folder / f'{what}_0' / 'train.log').read_text().splitlines()
    assert log[-1].startswith('step 8: the ranks hold different runs (not the same: '
                              f'{what})')
    assert last(folder / f'{what}_0')['step'] == 4


def test_two_processes_stop_as_one(two):
    """At the same step, saved once and whole, before torchrun can kill what is left."""
    folder, done, _ = two
    assert done.returncode != 0 and 'exitcode  : 143' in done.stderr, done.stderr
    stopped = [torch.load(folder / f'stopped_{rank}.pt') for rank in (0, 1)]
    assert stopped[0]['step'] == stopped[1]['step'] == 8
    assert (folder / 'saved').read_text() == '0 last.pt 7\n0 last.pt 8\n'
    for name, weight in last(folder / 'stopped_0')['weights'].items():
        assert torch.equal(weight, stopped[0]['weights'][name])
        assert torch.equal(weight, stopped[1]['weights'][name])
    masks = [each['masks'] for each in stopped]  # chosen by each rank for itself
    assert all(torch.equal(*pair) for pair in zip(*masks, strict=True))
    pruned = sum(int((~mask).sum()) for mask in masks[0])
    scope = sum(mask.numel() for mask in masks[0])
    assert 0.3 < pruned / scope < 0.5
    summary = json.loads((folder / 'stopped_0' / 'summary.json').read_text())
    assert summary['exit_reason'] == 'sigterm'


# --- processes that are missing, refused or started again -----------------------------------------

def lonely_rank(rank, port, stopped, told_in, argv):
    """A process of two without torchrun, which would kill a stopped one only after 30 seconds."""
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=port)
    file = os.open(told_in, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, 'w')
    sys.stderr = open(2, 'w', buffering=1)  # as Python has it
    ranks.PATIENCE = timedelta(seconds=1)
    gradients = train.local_gradients

    def stop_self(run):
        if rank == stopped and run.progress.step == 5:
            os.kill(os.getpid(), signal.SIGSTOP)
        return gradients(run)

    train.local_gradients = stop_self
    sys.argv[1:] = argv
    run_command(train.main)


@pytest.mark.parametrize('lost', [0, 1])
def test_a_process_that_stopped_is_missed(tiny, tmp_path, lost):
    """Also the first, which is the one that writes."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    fork = multiprocessing.get_context('fork')
    both = [fork.Process(target=lonely_rank, args=(
        rank, port, lost, tmp_path / f'told_{rank}', tiny(save_interval=2))) for rank in (0, 1)]
    for each in both:
        each.start()
    both[1 - lost].join(60)
    both[lost].kill()
    both[lost].join()
    told = (tmp_path / f'told_{1 - lost}').read_text()
    assert both[1 - lost].exitcode == 1, told
    [line] = [line for line in told.splitlines() if 'did not answer' in line]
    assert line.startswith(('' if lost else 'rank 1: ') + 'step 5: a rank did not answer '
                           '(Timed out waiting 1000ms for ')
    assert line.endswith('); see what each said, and continue with --init_from=resume')
    assert 'Traceback' not in told
    assert last(tmp_path / 'run')['step'] == 4
    if lost:
        summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
        assert summary['exit_reason'] == 'rank lost'


def test_only_a_process_that_met_the_others_at_the_end_waits_for_them(monkeypatch):
    """NCCL's end waits for all ranks, which would keep a refusal on one of them for minutes."""
    waits = []
    monkeypatch.setattr(ranks.atexit, 'register', waits.append)
    monkeypatch.setattr(ranks.dist, 'rendezvous', lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr(ranks.dist, 'PrefixStore', lambda *_: None)
    monkeypatch.setattr(ranks.dist, 'init_process_group', lambda *_, **__: None)
    run = SimpleNamespace(machine=Machine(torch.device('cpu'), torch.float32, 0, 2, 'CPU', None))
    ranks.join(run.machine)
    monkeypatch.setattr(ranks, 'highest', lambda run, number: (_ for _ in ()).throw(
        Stop(ranks.LOST, 1, 'gone')))
    ranks.part(run, 'finished', 0)
    assert waits == []
    monkeypatch.setattr(ranks, 'highest', lambda run, number: number)
    ranks.part(run, 'finished', 0)
    assert waits == [ranks.dist.destroy_process_group]


def test_the_end_after_a_lost_process_asks_no_device(tiny, tmp_path, monkeypatch):
    """Its queue may hold a sum over the ranks that never ends."""
    def lost(run):
        raise Stop(ranks.LOST, 1, 'gone')

    def counters(optimizer):
        raise AssertionError

    monkeypatch.setattr(train, 'train', lost)
    monkeypatch.setattr(train.optim.AdamWSPAM, 'counters', counters)
    monkeypatch.setattr(ranks.os, '_exit', lambda code: None)
    assert train.main(tiny(optimizer='adamwspam')) == 1
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert summary['exit_reason'] == ranks.LOST


def test_a_refusal_on_another_rank_is_told(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(sys, 'argv', ['train.py', '--dataset=nope', '--device=cpu'])
    with pytest.raises(SystemExit) as ended:
        run_command(train.main)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and 'rank 1' in told and "dataset='nope'" in told
    assert 'MASTER_ADDR' in told and 'in the environment' in told


KILLED = '''
import os, runpy, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import torch
from support import guards
torch.set_num_threads(1)
go_on = guards.stop_if_signalled

def kill_self(run, stop, save):
    first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'
    if first and os.environ['RANK'] == '1' and run.progress.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    go_on(run, stop, save)

guards.stop_if_signalled = kill_self
runpy.run_path(os.path.join(sys.path[0], 'train.py'), run_name='__main__')
'''


def test_torchrun_starts_a_killed_run_again(tiny, tmp_path):
    (tmp_path / 'driver.py').write_text(KILLED)
    done = subprocess.run(
        [*TORCHRUN, '--max-restarts=1', tmp_path / 'driver.py', HOME,
         *tiny(init_from='auto')],
        timeout=180, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert last(tmp_path / 'run')['step'] == 8
    log = (tmp_path / 'run' / 'train.log').read_text()
    assert 'continued from step 4' in log


def test_torchrun_may_start_again_what_a_full_disk_ended(tiny, tmp_path, monkeypatch):
    def full(*_, **__):
        raise Refused('last.pt could not be written')

    with monkeypatch.context() as patch:
        patch.setattr(train, 'save_checkpoint', full)
        refusal(train.main, tiny(init_from='auto'))
    assert exit_reason(tmp_path / 'run') == 'refused'
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    assert train.main(tiny(init_from='auto')) == 0


def test_what_would_end_as_before_is_not_started_again(tiny, tmp_path, monkeypatch):
    told = dict(init_from='auto', learning_rate=1e20, min_lr=0.0, warmup_iters=0,
                weight_decay=0.0)
    assert train.main(tiny(**told)) == 3
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '0')
    assert train.main(tiny(**told)) == 3  # by hand it may be tried again
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    assert refusal(train.main, tiny(**told)) == [
        f"out_dir='{tmp_path}/run': the run ended as 'nan', which another start does not change; "
        'its train.log says what does']
