"""Texts and small data sets for the tests of prepare.py and support/shards.py."""
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest

import prepare
from support import tokenizer
from support.settings import Refused

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORDS = "the a of sparse weights and dense gradients prune moments vanish under noise".split()
WORDS += [',', "don't", '1234\nαβγ', '漢字', '🙂']


def documents(count, words=200, seed=0):
    draw = random.Random(seed)
    return [f'document {i} ' + ' '.join(draw.choices(WORDS, k=words)) for i in range(count)]


def refusal(function, *arguments):
    """What the Refused that function(*arguments) raises says."""
    with pytest.raises(Refused) as caught:
        function(*arguments)
    return str(caught.value)


def run(*argv):
    assert prepare.main([str(argument) for argument in argv]) == 0


def refused(*argv):
    """What prepare.py says of arguments that it refuses."""
    return refusal(prepare.main, [str(argument) for argument in argv])


def command(*argv, code='import prepare', **environment):
    """prepare.py in a process of its own, after running `code` in it."""
    code += '; from support.settings import run_command; run_command(prepare.main)'
    return subprocess.Popen(
        [sys.executable, '-c', code, *map(str, argv)], stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment})


def write_jsonl(path, texts):
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    return path


def write_fineweb(path, texts):
    """A Parquet file with FineWeb-Edu's columns."""
    import pyarrow
    import pyarrow.parquet
    n = len(texts)
    columns = {
        'text': texts, 'id': [f'<urn:uuid:{i}>' for i in range(n)],
        'dump': ['CC-MAIN-2024-10'] * n, 'url': ['https://example.org'] * n,
        'file_path': ['s3://x'] * n, 'language': ['en'] * n, 'language_score': [0.9] * n,
        'token_count': list(range(n)), 'score': [3.1] * n, 'int_score': [3] * n,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=100)


def local_fineweb(folder, texts):
    """The argument that names a local copy of FineWeb-Edu with these texts, in two files."""
    folder.mkdir()
    half = len(texts) // 2
    write_fineweb(folder / '000_00000.parquet', texts[:half])
    write_fineweb(folder / '001_00000.parquet', texts[half:])
    return f'--source={folder}'


def write_shard(path, tokens):
    """llm.c's format, written without the code under test."""
    head = np.zeros(256, '<i4')
    head[:3] = (20240520, 1, len(tokens))
    path.write_bytes(head.tobytes() + np.asarray(tokens).astype('<u2').tobytes())


def contents(folder):
    """{file name: hash of its bytes}."""
    files = sorted(f for f in pathlib.Path(folder).iterdir() if f.is_file())
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def whole(stream):
    return stream.read([0], stream.tokens)[0]


def split_by_hash(texts, fraction):
    """{'train': texts, 'val': texts} by the definition: blake2b as a number in [0, 1)."""
    splits = {'train': [], 'val': []}
    for text in texts:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        number = int.from_bytes(digest, 'big') / 2**64
        splits['val' if number < fraction else 'train'].append(text)
    return splits


def unlabelled_data(folder):
    """Write three training shards of odd sizes and a validation shard; the training tokens."""
    tokens = np.random.default_rng(0).integers(0, 50257, 1000)
    for i, (begin, end) in enumerate([(0, 333), (333, 340), (340, 1000)]):
        write_shard(folder / f'train_{i:06d}.bin', tokens[begin:end])
    write_shard(folder / 'val_000000.bin', tokens[:100])
    return tokens


def small_data(folder):
    """Prepare 50 documents as bytes in folder/small, called 'small'."""
    write_jsonl(folder / 'in.jsonl', documents(50))
    run('text', f'--input={folder}/in.jsonl', '--name=small', '--tokenizer=bytes',
        '--val_fraction=0.2', f'--data_dir={folder}/small')
    return folder / 'small'


def use_small_gpt2(monkeypatch):
    """GPT-2's splitting and numbers, with bytes and two merges for a vocabulary."""
    import tiktoken
    ranks = {bytes([i]): i for i in range(256)} | {b'th': 256, b'the': 257}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    encoding = tiktoken.Encoding('small', pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': 50256})
    monkeypatch.setattr(tokenizer, 'gpt2_encoding', lambda: encoding)
    return encoding
