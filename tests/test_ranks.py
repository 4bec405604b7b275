"""However the batch is divided, over micro-batches or over processes, the training is the same."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import HOME, TINY, last, losses

import train

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
# in one of the two, and a pruned one that is told to stop.
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
forward = train.GPT.forward

def keep_weights(run):
    code = finish(run)
    name = os.path.basename(run.settings.out_dir)
    weights = {key: tensor.clone() for key, tensor in train.weights_of(run).items()}
    torch.save({'weights': weights, 'val_loss': run.progress.val_loss, 'step': run.progress.step,
                'masks': train.named_masks(run)}, f'{folder}/{name}.pt')
    return code

def signal_self(run):
    if run.progress.step == 8 - rank:  # not at the same step, and far from the next log line
        os.kill(os.getpid(), signal.SIGTERM)
    return gradients(run)

def save_slowly(path, content, keep=None):
    if content['step'] == 8:  # the other must not end before, because torchrun kills the rest then
        time.sleep(1)
    save(path, content, keep)
    with open(f'{folder}/saved', 'a') as f:
        f.write(f'{rank} {os.path.basename(path)} {content["step"]}\\n')

def limited(self, idx, targets=None):
    if rank == 1 and self.training and idx.size(0) > 1:
        raise torch.OutOfMemoryError('out of memory')
    return forward(self, idx, targets)

train.finish = keep_weights
assert train.main(argv + [f'--out_dir={folder}/two_{rank}']) == 0
train.GPT.forward = limited
assert train.main(argv + [f'--out_dir={folder}/short_{rank}', '--max_iters=3']) == 0
train.GPT.forward = forward
train.local_gradients = signal_self
train.save_checkpoint = save_slowly
sys.exit(train.main(argv + [
    f'--out_dir={folder}/stopped_{rank}', '--log_interval=100', '--eval_interval=100',
    '--save_interval=7', '--optimizer=adamwprune', '--prune_score=bitter7', '--prune_start=2',
    '--prune_end=18', '--prune_interval=2']))
'''


@pytest.fixture(scope='module')
def two(tiny_data, tmp_path_factory):
    """(folder in which two processes have trained and stopped, what torchrun said, settings)."""
    folder = tmp_path_factory.mktemp('two')
    (folder / 'driver.py').write_text(DRIVER)
    told = {**TINY, 'data_dir': tiny_data, **TOLD, 'max_iters': 20, 'batch_size': 2,
            'gradient_accumulation_steps': 4}
    argv = [f'--{key}={value}' for key, value in told.items()]
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                '--nproc_per_node=2']
    done = subprocess.run([*torchrun, folder / 'driver.py', HOME, folder, *argv], timeout=180,
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
        'short_0', 'stopped_0', 'two_0']


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
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    pruned = sum(int((~mask).sum()) for mask in masks[0].values())
    scope = sum(mask.numel() for mask in masks[0].values())
    assert 0.3 < pruned / scope < 0.5
    summary = json.loads((folder / 'stopped_0' / 'summary.json').read_text())
    assert summary['exit_reason'] == 'sigterm'
