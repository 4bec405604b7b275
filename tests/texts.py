"""Texts and small data sets for the tests of prepare.py and shards.py."""
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare  # noqa: E402
import shards as reader  # noqa: E402
from settings import Refused  # noqa: E402

WORDS = "the a of sparse weights and dense gradients prune moments vanish under noise, don't 1234\nαβγ 漢字 🙂".split(' ')


def documents(count, words=200, seed=0):
    rng = random.Random(seed)
    return [f'document {i} ' + ' '.join(rng.choices(WORDS, k=words)) for i in range(count)]


def refusal(function, *args, **kwargs):
    with pytest.raises(Refused) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def write_jsonl(path, texts):
    path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    return path


def write_fineweb(path, texts):
    """A Parquet file with FineWeb-Edu's columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    n = len(texts)
    pq.write_table(pa.table({
        'text': texts, 'id': [f'<urn:uuid:{i}>' for i in range(n)], 'dump': ['CC-MAIN-2024-10'] * n,
        'url': ['https://example.org'] * n, 'file_path': ['s3://x'] * n, 'language': ['en'] * n, 'language_score': [0.9] * n,
        'token_count': list(range(n)), 'score': [3.1] * n, 'int_score': [3] * n}), path, row_group_size=100)
    return path


def run(*argv, code=0, capsys=None):
    """Run prepare's main in this process and return what it printed."""
    assert prepare.main([str(a) for a in argv]) == code
    captured = capsys.readouterr() if capsys else None
    return captured and captured._replace(err=captured.err.removeprefix('refused:\n').replace('  - ', ''))


def command(*argv, **environment):
    return subprocess.Popen([sys.executable, str(ROOT / 'prepare.py'), *map(str, argv)], stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})


def contents(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(pathlib.Path(folder).iterdir())}


def whole(stream):
    return stream.read([0], stream.tokens)[0]


@pytest.fixture
def shards(tmp_path):
    """Unlabelled data: three training shards of odd sizes, one validation shard; and the training tokens."""
    tokens = np.random.default_rng(0).integers(0, 50257, 1000)
    for i, (a, b) in enumerate([(0, 333), (333, 340), (340, 1000)]):
        prepare.write_shard(tmp_path / f'train_{i:06d}.bin', tokens[a:b])
    prepare.write_shard(tmp_path / 'val_000000.bin', tokens[:100])
    return tmp_path, tokens


@pytest.fixture
def stdlib_like(tmp_path):
    """A small finished data set of bytes, called 'small'."""
    write_jsonl(tmp_path / 'in.jsonl', documents(50))
    folder = tmp_path / 'small'
    run('text', f'--input={tmp_path}/in.jsonl', '--name=small', '--tokenizer=bytes', '--val_fraction=0.2', f'--data_dir={folder}')
    return folder


@pytest.fixture
def small_gpt2(monkeypatch):
    """GPT-2's splitting and token numbers with bytes and two merges for a vocabulary, where the real one cannot be had."""
    import tiktoken
    ranks = {bytes([i]): i for i in range(256)} | {b'th': 256, b'the': 257}
    encoding = tiktoken.Encoding(
        'small', pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 50256})
    monkeypatch.setattr(reader, 'gpt2_encoding', lambda: encoding)
    return encoding
