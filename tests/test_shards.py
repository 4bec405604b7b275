"""support/shards.py: the reader of token shards, the order of windows."""
import json
import os
import pickle

import numpy as np
import pytest
from texts import (
    refusal,
    small_data,
    unlabelled_data,
    whole,
    write_shard,
)

from support.shards import open_data, window_order

# --- reading --------------------------------------------------------------------------------------


def test_windows_span_shards(tmp_path):
    tokens = unlabelled_data(tmp_path)
    data = open_data(str(tmp_path), 'unlabelled')
    assert (data.name, data.tokenizer, data.vocab_size) == ('unlabelled', 'gpt2', 50257)
    assert (data.train.tokens, data.val.tokens) == (1000, 100)
    assert [data.train.windows(size) for size in (16, 999, 1000)] == [62, 1, 0]
    got = data.train.read(np.arange(0, 984, 7), 16)
    assert got.dtype == np.int64
    assert (got == np.stack([tokens[i:i + 16] for i in range(0, 984, 7)])).all()
    assert (whole(data.train) == tokens).all()
    with pytest.raises(IndexError):
        data.train.read([985], 16)


@pytest.mark.parametrize('names', [
    ('edu_fineweb_train_000001.bin', 'edu_fineweb_val_000000.bin'),
    ('fineweb_train_000001.bin', 'fineweb_val_000000.bin'),
    ('medieval_train.bin', 'medieval_val.bin'),
    ('val_d_isere_train.bin', 'trains_val.bin'),
])
def test_other_tools_names(tmp_path, names):
    for name, tokens in zip(names, ([5, 6, 7], [8, 9])):
        write_shard(tmp_path / name, tokens)
    data = open_data(str(tmp_path), 'unlabelled')
    assert whole(data.train).tolist() == [5, 6, 7]
    assert whole(data.val).tolist() == [8, 9]


def test_nanogpt_bins_without_header(tmp_path):
    np.array([5, 6, 50256], '<u2').tofile(tmp_path / 'train.bin')
    np.array([7, 8], '<u2').tofile(tmp_path / 'val.bin')
    data = open_data(str(tmp_path), 'unlabelled')
    assert whole(data.train).tolist() == [5, 6, 50256]
    assert whole(data.val).tolist() == [7, 8]
    write_shard(tmp_path / 'train.bin', [1, 2])  # the same name with a header
    assert whole(open_data(str(tmp_path), 'unlabelled').train).tolist() == [1, 2]
    (tmp_path / 'val.bin').write_bytes(b'abc')
    assert refusal(open_data, str(tmp_path), 'unlabelled') == (
        f'{tmp_path}/val.bin: damaged: expected 2 bytes (1 tokens), found 3; copy or prepare it '
        'again')


def test_header_with_a_damaged_magic_is_no_nanogpt_bin(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 3000)
    write_shard(tmp_path / 'val.bin', tokens)
    path = tmp_path / 'train.bin'
    write_shard(path, tokens)
    good = path.read_bytes()
    for magic in (b'\xd9', good[:1] + b'\xff\xff\xff', bytes(12)):
        path.write_bytes(magic + good[len(magic):])
        said = refusal(open_data, str(tmp_path), 'unlabelled')
        assert said.startswith(f'{path}: not a token shard: magic ')
    path.write_bytes(good[1024:])
    assert whole(open_data(str(tmp_path), 'unlabelled').train).tolist() == tokens.tolist()


def test_tokens_wider_than_uint16_are_refused(tmp_path):
    np.arange(100, dtype='<u2').tofile(tmp_path / 'val.bin')
    path = tmp_path / 'train.bin'
    draw = np.random.default_rng(0)
    for kind, vocabulary in (('<u4', 128_000), ('<u4', 256_000), ('<u4', 50257), ('<i8', 50257)):
        draw.integers(0, vocabulary, 5000).astype(kind).tofile(path)
        said = refusal(open_data, str(tmp_path), 'unlabelled')
        assert said.startswith(f'{path}: tokens of more than 16 bits')
        assert 'python prepare.py text --input=' in said
    for vocabulary in (2, 4, 50257):
        draw.integers(0, vocabulary, 5000).astype('<u2').tofile(path)
        assert open_data(str(tmp_path), 'unlabelled').train.tokens == 5000


class Trap:
    """What must not be unpickled."""

    def __reduce__(self):
        return exec, ("raise AssertionError('unpickled')",)


def test_nanogpt_characters_are_not_gpt2(tmp_path):
    np.array([5, 6, 64], '<u2').tofile(tmp_path / 'train.bin')
    np.array([7, 8], '<u2').tofile(tmp_path / 'val.bin')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 65, 'stoi': Trap()}))
    assert refusal(open_data, str(tmp_path), 'unlabelled') == (
        f'{tmp_path}/meta.pkl: these tokens are characters, not of GPT-2; prepare the text itself: '
        f'python prepare.py text --input={tmp_path}/input.txt --tokenizer=bytes --name=NAME')


@pytest.mark.parametrize('change', ['deleted', 'truncated', 'overwritten'])
@pytest.mark.parametrize('name', ['train_000001.bin', 'val_000000.bin'])
def test_files_that_change_under_a_run(tmp_path, change, name):
    unlabelled_data(tmp_path)
    path = tmp_path / name
    os.utime(path, ns=(1, 1))  # because clocks tick slowly
    data = open_data(str(tmp_path), 'unlabelled')
    data.check_unchanged()
    raw = path.read_bytes()
    path.unlink()
    if change == 'truncated':
        path.write_bytes(raw[:-8])
    if change == 'overwritten':
        path.write_bytes(raw[:-1] + b'\x01')
    assert refusal(data.check_unchanged) == (
        f'{path}: deleted or overwritten since it was opened; copy or prepare it again')


def test_reading_what_is_gone_is_refused(tmp_path):
    tokens = unlabelled_data(tmp_path)
    data = open_data(str(tmp_path), 'unlabelled')
    path = tmp_path / 'train_000002.bin'
    os.truncate(path, 1024 + 2 * 100)
    assert (data.train.read([340], 100) == tokens[340:440]).all()
    for start in (341, 700):
        assert refusal(data.train.read, [start], 100) == (
            f'{path}: truncated since it was opened; copy or prepare it again')
    path.unlink()
    assert refusal(data.train.read, [500], 100) == (
        f'{path}: cannot be read (No such file or directory); copy or prepare it again')


def test_damaged_shards_are_named(tmp_path):
    unlabelled_data(tmp_path)
    path = tmp_path / 'train_000001.bin'
    good = path.read_bytes()

    def opened_with(content):
        path.write_bytes(content)
        return refusal(open_data, str(tmp_path), 'unlabelled')
    for content in (good[:-2], good + b'ab', good[:100]):
        assert opened_with(content) == (
            f'{path}: damaged: expected 1038 bytes (7 tokens), found {len(content)}; copy or '
            'prepare it again')
    assert opened_with(b'PK' * 1000) == (
        f'{path}: not a token shard: magic 1263553360 version 1263553360, expected 20240520 '
        "version 1 (llm.c's GPT-2 format); move it away")
    assert 'not a token shard' in opened_with(b'')
    assert opened_with(good[:-2] + b'\xff\xff') == (
        f'{path}: token 65535 at position 6 is outside the vocabulary of 50257; '
        'the file is damaged or was made with another tokenizer')


def test_missing_data_names_the_command(tmp_path, monkeypatch):
    unlabelled_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    fix = 'prepare it with: python prepare.py SOURCE --name=books --data_dir='
    hint = ' (python prepare.py --help lists the sources)'
    assert refusal(open_data, '', 'books') == (
        f"dataset='books': folder data/books does not exist; {fix}data/books{hint}")
    (tmp_path / 'val_000000.bin').unlink()
    assert refusal(open_data, str(tmp_path), 'books') == (
        f"{tmp_path} holds no val tokens ('val' in the name, .bin at the end); "
        f'{fix}{tmp_path}{hint}')


def test_other_data_set_than_configured(tmp_path):
    folder = small_data(tmp_path)
    assert refusal(open_data, str(folder), 'fineweb_edu') == (
        f"dataset='fineweb_edu' but {folder} holds 'small' (by its meta.json, or for lack of one); "
        f'write --dataset=small --data_dir={folder} to train on it, or give the --data_dir of '
        'fineweb_edu')
    unlabelled_data(tmp_path)
    assert "holds 'unlabelled' (by " in refusal(open_data, str(tmp_path), 'small')


def test_meta_and_fingerprint_guard_the_shards(tmp_path):
    folder = small_data(tmp_path)
    meta = folder / 'meta.json'
    shard = folder / 'train_000000.bin'
    good = meta.read_text()
    told = json.loads(good)
    raw = shard.read_bytes()
    data = open_data(str(folder), 'small')
    assert told['train_tokens'] == data.train.tokens
    assert told['val_tokens'] == data.val.tokens
    assert told['vocab_size'] == 257
    assert told['documents'] == 50 == sum((whole(s) == 256).sum() for s in (data.train, data.val))
    shard.write_bytes(raw[:2000] + b'\x21' + raw[2001:])
    message = refusal(open_data, str(folder), 'small')
    assert 'the shards have changed since they were prepared: fingerprint ' in message
    assert told['fingerprint'] in message
    shard.rename(folder / 'train_000001.bin')
    shard.write_bytes(raw)
    assert 'the shards have changed' in refusal(open_data, str(folder), 'small')
    other_tokenizer = good.replace('"tokenizer": "bytes"', '"tokenizer": "words"')
    meta.write_text(good.replace('"fingerprint"', '"x"'))
    assert 'preparation has not finished' in refusal(open_data, str(folder), 'small')
    no_tokenizer = good.replace('"tokenizer": "bytes"', '"tokenizer": []')
    for damaged in ('{', '[]', other_tokenizer, no_tokenizer, good.replace('"documents"', '"x"')):
        meta.write_text(damaged)
        assert refusal(open_data, str(folder), 'small').startswith(f'{meta} is damaged')
    meta.unlink()
    meta.mkdir()
    assert refusal(open_data, str(folder), 'small') == (
        f'{meta} cannot be read (not a regular file); correct that')


def test_fingerprint_depends_on_tokens_only(tmp_path):
    tokens = np.random.default_rng(1).integers(0, 50257, 5000).astype(np.uint16)

    def fingerprint(name, cuts, values=tokens):
        folder = tmp_path / name
        folder.mkdir()
        for i, piece in enumerate(np.split(values, cuts)):
            write_shard(folder / f'train_{i}.bin', piece)
        write_shard(folder / 'val_0.bin', tokens[:9])
        return open_data(str(folder), 'unlabelled').fingerprint
    changed = tokens.copy()
    changed[3210] ^= 1
    assert fingerprint('a', []) == '6644638b0caec571'  # a changed one would orphan all data
    assert fingerprint('b', [1, 2500]) == '6644638b0caec571'
    assert fingerprint('c', [], changed) != '6644638b0caec571'


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 7, 8, 9, 1000, 4096, 4097, 65537])
def test_each_epoch_visits_every_window_once(n):
    order = window_order(np.arange(3 * n), n, 1337).reshape(3, n)
    assert order.dtype == np.int64
    assert (np.sort(order) == np.arange(n)).all()
    if n >= 1000:
        assert (order[0] != order[1]).mean() > 0.99
        assert (order[1] != order[2]).mean() > 0.99
        assert (order[0] != window_order(np.arange(n), n, 1338)).mean() > 0.99


def test_order_looks_shuffled():
    n = 20_000
    for seed in range(5):
        order = window_order(np.arange(n), n, seed)
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 4 / np.sqrt(n)
        assert abs(np.abs(np.diff(order)).mean() / n - 1 / 3) < 0.01  # of two uniform draws
    first = np.array([window_order(np.array([0]), 10, seed)[0] for seed in range(2000)])
    assert (np.abs(np.bincount(first, minlength=10) - 200) < 70).all()  # 5 standard deviations


def test_order_is_a_pure_function_of_position():
    together = window_order(np.arange(5000), 777, 3)
    apart = [window_order(np.arange(i, i + 50), 777, 3) for i in range(0, 5000, 50)]
    assert (together == np.concatenate(apart)).all()
    # a changed order would break resuming
    assert window_order(np.arange(8), 1000, 1337).tolist() == [371, 439, 722, 729, 876, 520, 488,
                                                               351]
    far = window_order(np.array([10**15]), 10**7, 2**63)
    assert 0 <= far[0] < 10**7
