"""shards.py: the reader of token shards, the order of windows, tokenizers."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from texts import command, refusal, ROOT, whole

import prepare
import shards as reader


# --- reading -------------------------------------------------------------------------------------------

def test_header_is_llm_c_s(tmp_path):
    prepare.write_shard(tmp_path / 'x.bin', [1, 2, 50256])
    raw = (tmp_path / 'x.bin').read_bytes()
    assert len(raw) == 1024 + 6 and raw[1024:] == b'\x01\x00\x02\x00\x50\xc4'
    assert np.frombuffer(raw[:1024], '<i4').tolist() == [20240520, 1, 3] + [0] * 253
    assert reader.read_header(tmp_path / 'x.bin') == 3
    assert [f.name for f in tmp_path.iterdir()] == ['x.bin']


def test_windows_span_shards(shards):
    folder, tokens = shards
    data = reader.open_data(str(folder), 'unlabelled')
    assert (data.name, data.tokenizer, data.vocab_size) == ('unlabelled', 'gpt2', 50257)
    assert (data.train_tokens, data.val_tokens) == (data.train.tokens, data.val.tokens) == (1000, 100)
    assert data.train.windows(16) == 62 and data.train.windows(999) == 1 and data.train.windows(1000) == 0
    got = data.train.read(np.arange(0, 984, 7), 16)
    assert got.dtype == np.int64 and (got == np.stack([tokens[i:i + 16] for i in range(0, 984, 7)])).all()
    assert (whole(data.train) == tokens).all()
    positions = np.arange(50, 90)  # straddles the first epoch's end
    order = reader.window_order(positions, 62, 1)
    got = data.train.read(order * 16, 17)
    assert got.shape == (40, 17) and (got == np.stack([tokens[w * 16:w * 16 + 17] for w in order])).all()
    for start in (-1, 985):
        with pytest.raises(ValueError):
            data.train.read([start], 16)


def test_many_shards_need_few_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, 'MAX_MAPS', 4)
    tokens = np.arange(600)
    for i in range(30):
        prepare.write_shard(tmp_path / f'train_{i:06d}.bin', tokens[i * 20:i * 20 + 20])
    stream = reader.TokenStream('train', sorted(tmp_path.iterdir()), 50257)
    for start in range(0, 590, 20):
        assert stream.read([start], 10).tolist() == [list(range(start, start + 10))]
        assert len(stream.maps) <= 4
    assert (stream.read(np.arange(590), 10)[:, 9] == np.arange(9, 599)).all() and len(stream.maps) <= 4


@pytest.mark.parametrize('names', [('edu_fineweb_train_000001.bin', 'edu_fineweb_val_000000.bin'),
                                   ('fineweb_train_000001.bin', 'fineweb_val_000000.bin'),
                                   ('medieval_train.bin', 'medieval_val.bin')])
def test_other_tools_names(tmp_path, names):
    for name, tokens in zip(names, ([5, 6, 7], [8, 9])):
        prepare.write_shard(tmp_path / name, tokens)
    data = reader.open_data(str(tmp_path), 'unlabelled')
    assert whole(data.train).tolist() == [5, 6, 7] and whole(data.val).tolist() == [8, 9]


def test_nanogpt_bins_without_header(tmp_path):
    np.array([5, 6, 50256], '<u2').tofile(tmp_path / 'train.bin')
    np.array([7, 8], '<u2').tofile(tmp_path / 'val.bin')
    data = reader.open_data(str(tmp_path), 'unlabelled')
    assert whole(data.train).tolist() == [5, 6, 50256] and whole(data.val).tolist() == [7, 8]
    prepare.write_shard(tmp_path / 'train.bin', [1, 2])  # the same name with a header
    assert whole(reader.open_data(str(tmp_path), 'unlabelled').train).tolist() == [1, 2]
    (tmp_path / 'val.bin').write_bytes(b'abc')
    assert refusal(reader.open_data, str(tmp_path), 'unlabelled') == (
        f'{tmp_path}/val.bin: truncated: 3 bytes is not a positive number of 2-byte tokens; copy or make it again')


def test_damaged_shards_are_named(shards):
    folder, _ = shards
    path = folder / 'train_000001.bin'
    good = path.read_bytes()

    def opened_with(content):
        path.write_bytes(content)
        return refusal(reader.open_data, str(folder), 'unlabelled')
    assert opened_with(good[:-2]) == f'{path}: truncated: expected 1038 bytes (7 tokens), found 1036; copy or prepare it again'
    assert opened_with(good + b'ab') == (f'{path}: longer than its header says: expected 1038 bytes (7 tokens), found 1040; '
                                         'copy or prepare it again')
    assert opened_with(good[:100]) == f'{path}: truncated: 100 bytes, but the header alone has 1024; copy or prepare it again'
    assert opened_with(b'PK' * 1000) == (f'{path}: not a token shard: magic 1263553360 version 1263553360, expected 20240520 '
                                         "version 1 (llm.c's GPT-2 format); move it away")
    assert opened_with(good[:-2] + b'\xff\xff') == (
        f'{path}: token 65535 at position 6 is outside the vocabulary of 50257; '
        'the file is damaged or was made with another tokenizer')
    (folder / 'train_val.bin').write_bytes(good)
    assert "has both 'train' and 'val' in its name" in refusal(reader.open_data, str(folder), 'unlabelled')


def test_missing_data_names_the_command(shards, monkeypatch):
    folder, _ = shards
    monkeypatch.chdir(folder)
    assert refusal(reader.open_data, '', 'fineweb_edu') == (
        "dataset='fineweb_edu': folder data/fineweb_edu does not exist; prepare it with: python prepare.py fineweb_edu")
    assert refusal(reader.open_data, 'nowhere', 'books').endswith(
        'prepare it with: python prepare.py text --input=FILES --name=books --data_dir=nowhere')
    (folder / 'val_000000.bin').unlink()
    assert refusal(reader.open_data, str(folder), 'stdlib') == (
        f"{folder} holds no val shards ('val' in the name, .bin at the end); "
        f'prepare the data with: python prepare.py stdlib --data_dir={folder}')


def test_other_data_set_than_configured(stdlib_like, shards):
    assert refusal(reader.open_data, str(stdlib_like), 'fineweb_edu') == (
        f"dataset='fineweb_edu' but {stdlib_like} holds 'small' (meta.json); write --dataset=small to train on it, or give the "
        '--data_dir of fineweb_edu, prepared with: python prepare.py fineweb_edu')
    assert "holds 'unlabelled' shards (there is no meta.json)" in refusal(reader.open_data, str(shards[0]), 'small')


def test_meta_and_fingerprint_guard_the_shards(stdlib_like):
    meta, shard = stdlib_like / 'meta.json', stdlib_like / 'train_000000.bin'
    good, raw = meta.read_text(), shard.read_bytes()
    told = json.loads(good)
    data = reader.open_data(str(stdlib_like), 'small')
    assert (told['train_tokens'], told['val_tokens'], told['vocab_size']) == (data.train_tokens, data.val_tokens, 257)
    assert told['documents'] == 50 == sum((whole(s) == 256).sum() for s in (data.train, data.val))
    shard.write_bytes(raw[:2000] + b'\x21' + raw[2001:])
    message = refusal(reader.open_data, str(stdlib_like), 'small')
    assert 'the shards have changed since they were prepared: fingerprint ' in message and told['fingerprint'] in message
    shard.rename(stdlib_like / 'train_000001.bin')
    assert f'{shard} is missing, but meta.json lists it' in refusal(reader.open_data, str(stdlib_like), 'small')
    shard.write_bytes(raw)
    assert f'{stdlib_like}/train_000001.bin is not in meta.json' in refusal(reader.open_data, str(stdlib_like), 'small')
    for damaged in ('{', '[]', good.replace('"vocab_size": 257', '"vocab_size": 9'), good.replace('"shards"', '"x"')):
        meta.write_text(damaged)
        assert refusal(reader.open_data, str(stdlib_like), 'small').startswith(f'{meta}: ')


def test_fingerprint_depends_on_tokens_only(tmp_path):
    tokens = np.random.default_rng(1).integers(0, 50257, 5000).astype(np.uint16)

    def fingerprint(folder, cuts, values=tokens):
        (tmp_path / folder).mkdir()
        for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, 5000])):
            prepare.write_shard(tmp_path / folder / f'train_{i}.bin', values[a:b])
        prepare.write_shard(tmp_path / folder / 'val_0.bin', tokens[:9])
        return reader.open_data(str(tmp_path / folder), 'unlabelled').fingerprint
    changed = tokens.copy()
    changed[3210] ^= 1
    assert fingerprint('a', []) == fingerprint('b', [1, 2500]) != fingerprint('c', [], changed)


RSS = '''
import sys
sys.path.insert(0, {root!r})
import numpy as np, shards as reader
def resident():
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS')) / 1024
stream = reader.TokenStream('train', ['train.bin', 'train_1.bin'], 50257)
reader.RESIDENT_BYTES = {limit}
growth = []
stream.read(reader.window_order(np.arange(64), stream.windows(1024), 0) * 1024, 1025)
before = resident()
for step in range(300):
    stream.read(reader.window_order(np.arange(step * 64, step * 64 + 64), stream.windows(1024), 0) * 1024, 1025)
    growth.append(resident() - before)
print(max(growth))
'''


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads resident memory from /proc')
def test_memory_does_not_grow_with_reading(tmp_path):
    for name, header in (('train.bin', b''), ('train_1.bin', prepare.header(60_000_000))):
        with open(tmp_path / name, 'wb') as f:
            f.write(header)
            f.truncate(len(header) + 120_000_000)

    def growth(limit):
        code = RSS.format(root=str(ROOT), limit=limit)
        child = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, capture_output=True, text=True)
        return float(child.stdout)
    assert growth('reader.RESIDENT_BYTES') < 20  # MiB
    assert growth('1 << 40') > 100  # so the reads do touch the files, and only the limit keeps memory down


# --- order ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 7, 8, 9, 1000, 4096, 4097, 65537])
def test_each_epoch_visits_every_window_once(n):
    order = reader.window_order(np.arange(3 * n), n, 1337).reshape(3, n)
    assert order.dtype == np.int64 and (np.sort(order) == np.arange(n)).all()
    if n >= 1000:
        assert (order[0] != order[1]).mean() > 0.99 and (order[1] != order[2]).mean() > 0.99
        assert (order[0] != reader.window_order(np.arange(n), n, 1338)).mean() > 0.99


def test_order_looks_shuffled():
    n = 20_000
    for seed in range(5):
        order = reader.window_order(np.arange(n), n, seed)
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 4 / np.sqrt(n)
        assert abs(np.abs(np.diff(order)).mean() / n - 1 / 3) < 0.01  # of two uniform draws
    first = np.array([reader.window_order(np.array([0]), 10, seed)[0] for seed in range(2000)])
    assert (np.abs(np.bincount(first, minlength=10) - 200) < 70).all()  # 5 standard deviations


def test_order_is_a_pure_function_of_position():
    together = reader.window_order(np.arange(5000), 777, 3)
    apart = np.concatenate([reader.window_order(np.arange(i, i + 50), 777, 3) for i in range(0, 5000, 50)])
    assert (together == apart).all()
    assert reader.window_order(np.arange(8), 1000, 1337).tolist() == FIRST_OF_1000  # a changed order would break resuming
    far = reader.window_order(np.array([10**15]), 10**7, 2**63)
    assert 0 <= far[0] < 10**7


FIRST_OF_1000 = [371, 439, 722, 729, 876, 520, 488, 351]


# --- tokenizers ----------------------------------------------------------------------------------------

def test_bytes_tokenizer_round_trips():
    t = reader.get_tokenizer('bytes')
    assert (t.vocab_size, t.eot, t.encode('aé')) == (257, 256, [97, 195, 169])
    assert t.decode(t.encode('naïve 漢 <|endoftext|>') + [256]) == 'naïve 漢 <|endoftext|><|endoftext|>'
    assert t.decode([195]) == '\ufffd'
    assert refusal(reader.get_tokenizer, 'gpt3') == "tokenizer='gpt3' is not one of gpt2, bytes"


def test_literal_end_of_text_and_long_white_space_are_text(small_gpt2):
    t = reader.get_tokenizer('gpt2')
    assert t.encode('the<|endoftext|>')[0] == 257 and 50256 not in t.encode('the<|endoftext|>')
    assert t.decode([257, 50256]) == 'the<|endoftext|>'
    for space in (' ', '\n', ' \n', '\u2003', '\x1c\n'):
        text = 'x' + space * 3000 + 'the' + space * 5000 + '\x1c.' + space * 2000
        long = f'{text}{space * 400_000}y'  # more than tiktoken's regular expression takes
        assert t.encode(text) == small_gpt2.encode_ordinary(text)
        assert t.decode(t.encode(long)) == long
    with_space = 'x' + '\n' * 400_000 + ' y'
    assert t.encode(with_space) == [120] + [10] * 400_000 + [32, 121]


@pytest.mark.skipif('TIKTOKEN_CACHE_DIR' not in os.environ, reason="GPT-2's vocabulary may need the network")
def test_real_gpt2():
    t = reader.get_tokenizer('gpt2')
    assert t.encode('Hello world') == [15496, 995] and t.decode([15496, 995, 50256]) == 'Hello world<|endoftext|>'
    assert (t.vocab_size, t.eot) == (50257, 50256)


def test_vocabulary_without_network(tmp_path):
    (tmp_path / 'a.txt').write_text('some text')
    child = command('text', f'--input={tmp_path}/a.txt', f'--data_dir={tmp_path}/out', TIKTOKEN_CACHE_DIR=str(tmp_path / 'empty'),
                    HTTPS_PROXY='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9')
    _, said = child.communicate(timeout=60)
    assert child.returncode == 2 and "the vocabulary cannot be fetched" in said and 'set TIKTOKEN_CACHE_DIR' in said
    assert said.startswith('refused:\n') and len(said.strip().splitlines()) == 2
