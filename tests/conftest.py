"""Shared by all tests: the repository on the path, a tiny data set, a tiny run."""
import gc
import os
import pathlib
import random
import sys

import pytest

HOME = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))
if '-m gpu' not in ' '.join(sys.argv):
    os.environ['CUDA_VISIBLE_DEVICES'] = ''

import torch  # noqa: E402  (after CUDA_VISIBLE_DEVICES)

import prepare  # noqa: E402
from support.rundir import load_checkpoint, read_metrics  # noqa: E402
from support.settings import Refused  # noqa: E402

torch.set_num_threads(1)  # tiny tensors; and two threads that share busy cores with others spin


@pytest.fixture(scope='session', autouse=True)
def modules_frozen():
    """Each run collects garbage once; without this it looks at all imported modules each time."""
    gc.freeze()


def words(count, seed):
    """Text that can be learned: made-up words, the next depending on the one before."""
    draw = random.Random(seed)
    vocabulary = [''.join(draw.choices('abcdefghijklmnop', k=draw.randint(2, 8)))
                  for _ in range(200)]
    index = 0
    out = []
    for _ in range(count):
        index = (index * 7 + draw.choice((1, 2, 3))) % 200
        out.append(vocabulary[index])
    return ' '.join(out)


@pytest.fixture(scope='session')
def tiny_data(tmp_path_factory):
    """Folder of a data set 'tiny': about 60,000 training and 5,000 validation bytes in shards."""
    folder = tmp_path_factory.mktemp('tiny')
    for i in range(60):
        (folder / f'{i:02d}.txt').write_text(words(200, i))
    code = prepare.main(['text', f'--input={folder}', '--name=tiny', '--tokenizer=bytes',
                         f'--data_dir={folder / "data"}', '--val_fraction=0.1',
                         '--shard_tokens=20000'])
    assert code == 0
    return folder / 'data'


TINY = dict(
    dataset='tiny', device='cpu', compile=False, batch_size=2, gradient_accumulation_steps=2,
    block_size=32, n_layer=2, n_head=2, n_embd=32, warmup_iters=2, max_iters=8,
    learning_rate=1e-2, min_lr=1e-3, eval_interval=4, eval_tokens=640, log_interval=2,
    save_interval=4, loss_chunk_tokens=48)


@pytest.fixture
def tiny(tiny_data, tmp_path):
    """A function (**settings) -> argv of a tiny run on the CPU, in a folder of this test."""
    def argv(**changes):
        told = {**TINY, 'data_dir': tiny_data, 'out_dir': tmp_path / 'run', **changes}
        return [f'--{key}={value}' for key, value in told.items()]
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
    """{step: logged training loss} of a run directory."""
    records = read_metrics(os.path.join(folder, 'metrics.jsonl'))
    return {record['step']: record['loss'] for record in records if 'loss' in record}


MAY_DIFFER = (['progress', 'seconds'], ['settings', 'out_dir'], ['settings', 'init_from'],
              ['settings', 'max_iters'])


def assert_same_run(a, b):
    """Everything in two last.pt is the same to the bit, but for its time and its place."""
    def compare(x, y, path):
        if isinstance(x, dict):
            assert x.keys() == y.keys(), path
            for key in x:
                if path + [key] not in MAY_DIFFER:
                    compare(x[key], y[key], path + [key])
        elif isinstance(x, (list, tuple)):
            assert len(x) == len(y), path
            for i, pair in enumerate(zip(x, y)):
                compare(*pair, path + [i])
        elif torch.is_tensor(x):
            assert torch.equal(x, y), path
        else:
            assert x == y, path
    compare(last(a), last(b), [])
