"""Shared by all tests: the repository on the path, a tiny data set, a tiny run."""
import os
import pathlib
import random
import sys

import pytest

HOME = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '' if '-m gpu' not in ' '.join(sys.argv) else os.environ.get('CUDA_VISIBLE_DEVICES', '0'))

import torch  # noqa: E402  (after CUDA_VISIBLE_DEVICES)

import prepare  # noqa: E402
import train  # noqa: E402
from rundir import load_checkpoint, read_metrics  # noqa: E402
from settings import Refused  # noqa: E402
from texts import shards, small_gpt2, stdlib_like  # noqa: E402,F401  (fixtures)

torch.set_num_threads(1)  # tiny tensors; and two threads that share two busy cores with others spin


def words(count, seed):
    """Text that can be learned: a few hundred made-up words, the next depending on the one before."""
    draw = random.Random(seed)
    vocabulary = [''.join(draw.choices('abcdefghijklmnop', k=draw.randint(2, 8))) for _ in range(200)]
    index, out = 0, []
    for _ in range(count):
        index = (index * 7 + draw.choice((1, 2, 3))) % 200
        out.append(vocabulary[index])
    return ' '.join(out)


@pytest.fixture(scope='session')
def tiny_data(tmp_path_factory):
    """Folder of a data set named 'tiny': about 60,000 training and 5,000 validation bytes in several shards."""
    folder = tmp_path_factory.mktemp('tiny')
    for i in range(60):
        (folder / f'{i:02d}.txt').write_text(words(200, i))
    code = prepare.main(['text', f'--input={folder}', '--name=tiny', '--tokenizer=bytes', f'--data_dir={folder / "data"}',
                         '--val_fraction=0.1', '--shard_tokens=20000'])
    assert code == 0
    return folder / 'data'


@pytest.fixture
def tiny(tiny_data, tmp_path):
    """A function (**settings) -> argv of a tiny run on the CPU, in a run directory of this test."""
    def argv(**changes):
        told = dict(dataset='tiny', data_dir=tiny_data, out_dir=tmp_path / 'run', device='cpu', compile=False, batch_size=2,
                    gradient_accumulation_steps=2, block_size=32, n_layer=2, n_head=2, n_embd=32, warmup_iters=2, max_iters=8,
                    learning_rate=1e-2, min_lr=1e-3, eval_interval=4, eval_tokens=640, log_interval=2, save_interval=4,
                    loss_chunk_tokens=48)
        return [f'--{key}={value}' for key, value in {**told, **changes}.items()]
    return argv


def refusal(call, *arguments):
    """The problems of the Refused that call(*arguments) raises."""
    with pytest.raises(Refused) as caught:
        call(*arguments)
    return caught.value.problems


def last(folder):
    """The content of a run directory's last.pt."""
    return load_checkpoint(os.path.join(folder, 'last.pt'))


def losses(folder):
    """step -> logged training loss of a run directory."""
    return {r['step']: r['loss'] for r in read_metrics(os.path.join(folder, 'metrics.jsonl')) if 'loss' in r}


def assert_same_run(a, b):
    """Everything in two last.pt is the same to the bit, but for the time it took and where it lies."""
    may_differ = (['progress', 'seconds'], ['settings', 'out_dir'], ['settings', 'init_from'], ['settings', 'max_iters'])

    def compare(x, y, path):
        if isinstance(x, dict):
            assert x.keys() == y.keys(), path
            for key in x:
                if path + [key] not in may_differ:
                    compare(x[key], y[key], path + [key])
        elif torch.is_tensor(x):
            assert torch.equal(x, y), path
        else:
            assert x == y, path
    compare(last(a), last(b), [])


__all__ = ['train']
