"""However the effective batch is divided, over micro-batches or over processes, the training is the same."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import HOME, last, losses, train

# Adam's first updates are nearly the sign of the gradient, so where a gradient is almost zero a rounding error decides the
# direction of a whole step. An eps far above such gradients keeps the update proportional to them.
SMOOTH = dict(eps=1e-3, eval_interval=10, log_interval=1, lr_decay_iters=20)


def weights(folder):
    return last(folder)['weights']


def assert_close(a, b, tolerance):
    assert a.keys() == b.keys()
    for key in a:
        assert abs(a[key] - b[key]).max() <= tolerance, key


@pytest.mark.parametrize('batch_size, micro_batches', [(1, 8), (2, 4)])
def test_micro_batches_add_up_to_the_same_update(tiny, tmp_path, batch_size, micro_batches):
    told = dict(SMOOTH, max_iters=6)
    train.main(tiny(**told, batch_size=8, gradient_accumulation_steps=1, out_dir=tmp_path / 'one'))
    train.main(tiny(**told, batch_size=batch_size, gradient_accumulation_steps=micro_batches, out_dir=tmp_path / 'split'))
    one, split = losses(tmp_path / 'one'), losses(tmp_path / 'split')
    assert one.keys() == split.keys() and one[6] < one[1] - 0.1
    for step in one:
        assert abs(one[step] - split[step]) < 2e-6, step
    assert_close(weights(tmp_path / 'one'), weights(tmp_path / 'split'), 1e-5)


# Run by torchrun: a run as any other, whose weights each process then writes; and a pruned one that is told to stop.
DRIVER = '''
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
import train
torch.set_num_threads(1)
folder, argv, rank = sys.argv[2], sys.argv[3:], int(os.environ['RANK'])
finish, gradients, save = train.finish, train.local_gradients, train.save_checkpoint

def keep_weights(run):
    code = finish(run)
    torch.save({'weights': train.named_state(run.flats, run.optimizer)['weights'], 'val_loss': run.progress.val_loss,
                'step': run.progress.step}, f'{folder}/{os.path.basename(run.settings.out_dir)}.pt')
    return code

def signal_self(run):
    if run.progress.step == 8 - rank:  # one process before the log step at which they agree, the other after it
        os.kill(os.getpid(), signal.SIGTERM)
    return gradients(run)

def save_slowly(path, content):
    time.sleep(2)  # the other process must not end before, for torchrun kills the rest then
    save(path, content)
    with open(f'{folder}/saved', 'a') as f:
        f.write(f'{rank} {os.path.basename(path)} {content["progress"]["step"]}\\n')

train.finish = keep_weights
assert train.main(argv + [f'--out_dir={folder}/two_{rank}']) == 0
train.local_gradients, train.save_checkpoint = signal_self, save_slowly
sys.exit(train.main(argv + [f'--out_dir={folder}/stopped_{rank}', '--log_interval=8', '--eval_interval=100', '--save_interval=5',
                            '--optimizer=adamwprune', '--prune_score=bitter7', '--prune_start=2', '--prune_end=18', '--prune_interval=2']))
'''


def test_two_processes_train_as_one_and_stop_as_one(tiny, tmp_path):
    told = dict(SMOOTH, max_iters=20, batch_size=2, gradient_accumulation_steps=4)
    (tmp_path / 'driver.py').write_text(DRIVER)
    argv = [a for a in tiny(**told) if not a.startswith('--out_dir')]
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', tmp_path / 'driver.py',
                           HOME, tmp_path, *argv], capture_output=True, text=True, timeout=180, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    train.main(tiny(**told, out_dir=tmp_path / 'one'))
    zero, one = (torch.load(tmp_path / f'two_{rank}.pt') for rank in (0, 1))

    # The same run: to the bit on both ranks, to rounding on one process.
    assert all(torch.equal(zero['weights'][name], one['weights'][name]) for name in zero['weights'])
    assert zero['val_loss'] == one['val_loss']
    assert_close(weights(tmp_path / 'one'), weights(tmp_path / 'two_0'), 1e-5)
    alone, together = losses(tmp_path / 'one'), losses(tmp_path / 'two_0')
    assert alone.keys() == together.keys() == set(range(1, 21))
    assert max(abs(alone[step] - together[step]) for step in alone) < 2e-6
    summaries = [json.loads((tmp_path / name / 'summary.json').read_text()) for name in ('one', 'two_0')]
    assert abs(summaries[0]['val_loss'] - summaries[1]['val_loss']) < 2e-6
    assert 'x 4 micro-batches = 8 sequences (2 processes, 2 each)' in (tmp_path / 'two_0' / 'train.log').read_text()

    # Only rank 0 writes.
    assert not (tmp_path / 'two_1').exists() and not (tmp_path / 'stopped_1').exists()

    # SIGTERM: both stop at the same step, saved once and whole, before torchrun can kill what is left.
    assert done.returncode != 0 and 'exitcode  : 143' in done.stderr, done.stderr
    stopped = [torch.load(tmp_path / f'stopped_{rank}.pt') for rank in (0, 1)]
    assert stopped[0]['step'] == stopped[1]['step'] == 8
    assert (tmp_path / 'saved').read_text() == '0 last.pt 5\n0 last.pt 8\n'
    for name, tensor in weights(tmp_path / 'stopped_0').items():
        assert torch.equal(tensor, stopped[0]['weights'][name]) and torch.equal(tensor, stopped[1]['weights'][name])
    masks = last(tmp_path / 'stopped_0')['mask']  # chosen by each rank for itself, and the weights above are the same
    assert 0.3 < sum(int((~m).sum()) for m in masks.values()) / sum(m.numel() for m in masks.values()) < 0.5
    assert json.loads((tmp_path / 'stopped_0' / 'summary.json').read_text())['exit_reason'] == 'sigterm'
