"""prepare.py: the shard reader, the order of windows, tokenizers, and preparation from text to meta.json."""
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare  # noqa: E402
import sources  # noqa: E402
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


# --- preparing -----------------------------------------------------------------------------------------

def test_same_text_same_shards_from_every_format(tmp_path, small_gpt2, capsys):
    texts = documents(40) + ['a literal <|endoftext|> inside', '']
    for i, text in enumerate(texts):
        path = tmp_path / 'txt' / f'{i:03d}.txt'
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / 'parquet').mkdir()
    write_fineweb(tmp_path / 'parquet' / 'a.parquet', texts[:20])
    write_fineweb(tmp_path / 'parquet' / 'b.parquet', texts[20:])
    write_jsonl(tmp_path / 'x.jsonl', texts)
    common = ('--val_fraction=0.3', '--shard_tokens=5000', '--name=same')
    made = {}
    for kind, told in (('txt', f'--input={tmp_path}/txt'), ('parquet', f'--input={tmp_path}/parquet'),
                       ('jsonl', f'--input={tmp_path}/x.jsonl'), ('hub', f'--source={tmp_path}/parquet')):
        name = 'fineweb_edu' if kind == 'hub' else 'text'
        run(name, told, f'--data_dir={tmp_path}/out_{kind}', '--processes=1', *common)
        made[kind] = {k: v for k, v in contents(tmp_path / f'out_{kind}').items() if k != 'meta.json'}
    assert made['txt'] == made['parquet'] == made['jsonl'] == made['hub'] and len(made['txt']) > 4
    data = reader.open_data(f'{tmp_path}/out_txt', 'same')

    # An oracle that shares nothing with the code but the definition.
    expected = {'train': [], 'val': []}
    for text in texts:
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big') / 2**64
        expected['val' if number < 0.3 else 'train'] += small_gpt2.encode_ordinary(text) + [50256]
    assert whole(data.train).tolist() == expected['train'] and whole(data.val).tolist() == expected['val']


def test_processes_do_not_change_the_shards(tmp_path, small_gpt2):
    texts = documents(600) + ['one document longer than a chunk. ' * 60_000] + documents(600, seed=1)
    write_jsonl(tmp_path / 'x.jsonl', texts)
    for processes in (1, 2):
        run('text', f'--input={tmp_path}/x.jsonl', f'--data_dir={tmp_path}/{processes}', f'--processes={processes}',
            '--val_fraction=0.1', '--shard_tokens=300_000')
    assert contents(tmp_path / '1') == contents(tmp_path / '2') and len(contents(tmp_path / '1')) > 8
    assert reader.read_header(tmp_path / '1' / 'train_000000.bin') == 300_000


def test_max_tokens_stops_after_the_document_that_reaches_it(tmp_path):
    texts = documents(100)
    write_jsonl(tmp_path / 'x.jsonl', texts)
    ends = np.cumsum([len(t.encode()) + 1 for t in texts])
    for limit in (int(ends[49]) - 1, int(ends[49])):
        run('text', f'--input={tmp_path}/x.jsonl', f'--data_dir={tmp_path}/{limit}', '--tokenizer=bytes', '--val_fraction=0.3',
            f'--max_tokens={limit}')
        data = reader.open_data(f'{tmp_path}/{limit}', 'text')
        assert data.train_tokens + data.val_tokens == ends[49]
        assert json.loads((tmp_path / str(limit) / 'meta.json').read_text())['documents'] == 50


def kill_after(shards, folder, argv):
    """Start the command and kill it, with no chance to tidy up, when so many shards are there."""
    child = command(*argv)
    try:
        deadline = time.monotonic() + 30
        while len(list(folder.glob('train_*.bin'))) < shards and time.monotonic() < deadline:
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.001)
        children = pathlib.Path(f'/proc/{child.pid}/task/{child.pid}/children')
        workers = children.read_text().split() if children.exists() else []
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=10)  # does not end before the workers, which share its output
    return workers


def alive(pid):
    try:
        return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


@pytest.mark.parametrize('kind', ['text', 'fineweb_edu'])
def test_killed_and_continued_equals_uninterrupted(tmp_path, kind, capsys):
    (tmp_path / 'in').mkdir()
    for i in range(3):
        write_fineweb(tmp_path / 'in' / f'{i}.parquet', documents(1500, seed=i))
    told = [kind, f'--source={tmp_path}/in' if kind == 'fineweb_edu' else f'--input={tmp_path}/in', '--tokenizer=bytes',
            '--shard_tokens=30_000', '--val_fraction=0.004', '--name=x']
    run(*told, f'--data_dir={tmp_path}/straight')
    folder, rounds = tmp_path / 'killed', (3, 60, 110) if kind == 'text' else (50,)
    for shards in rounds:
        workers = kill_after(shards, folder, [*told, f'--data_dir={folder}', '--processes=2'])
        assert not (folder / 'meta.json').exists() and (folder / 'journal.json').exists()
        deadline = time.monotonic() + 10
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(alive, workers)), 'workers outlive a killed parent'
    assert json.loads((folder / 'journal.json').read_text())['documents'] > 0
    assert 'preparation has not finished' in refusal(reader.open_data, str(folder), 'x')
    capsys.readouterr()
    other = run(*told, f'--data_dir={folder}', '--shard_tokens=40_000', code=2, capsys=capsys).err
    assert other == (f'{folder} was prepared with shard_tokens=30000, not 40000; give the same, another --data_dir, '
                     'or delete the folder\n')
    assert 'continuing after ' in run(*told, f'--data_dir={folder}', capsys=capsys).out
    assert contents(folder) == contents(tmp_path / 'straight')
    assert reader.open_data(str(folder), 'x').train_tokens > 30_000 * 100


def test_kill_between_shard_and_journal(tmp_path, monkeypatch):
    """The rarest moment: shards have their final names, the journal does not know of them yet; and of the last steps."""
    write_jsonl(tmp_path / 'x.jsonl', documents(3000))
    told = ['text', f'--input={tmp_path}/x.jsonl', '--tokenizer=bytes', '--shard_tokens=400_000', '--val_fraction=0.3']
    run(*told, f'--data_dir={tmp_path}/straight')
    folder, real, calls = tmp_path / 'killed', prepare.write_json, []

    def failing(path, value):
        calls.append(path)
        if len(calls) in (3, 5) or path.endswith('meta.json') and len(calls) < 20:
            calls.extend([None] * (20 if path.endswith('meta.json') else 0))
            raise KeyboardInterrupt
        for split in ('train', 'val') if path.endswith('journal.json') else ():
            there = sum((f.stat().st_size - 1024) // 2 for f in folder.glob(f'{split}_*.bin*'))
            assert there >= value[f'{split}_tokens'], 'the journal promises what is still in a buffer'
        real(path, value)
    monkeypatch.setattr(prepare, 'write_json', failing)
    codes = [prepare.main([*told, f'--data_dir={folder}']) for _ in range(4)]
    assert codes == [130, 130, 130, 0]
    assert contents(folder) == contents(tmp_path / 'straight')


def test_nothing_is_left_of_a_run_that_was_killed_early(tmp_path, monkeypatch):
    """Before the first journal there is nothing to continue, so that other arguments may follow; longer shards lie about."""
    write_jsonl(tmp_path / 'x.jsonl', documents(1000))
    told = ['text', f'--input={tmp_path}/x.jsonl', '--tokenizer=bytes', '--val_fraction=0.3']
    real, calls = prepare.write_json, []

    def failing(path, value):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, value)
    monkeypatch.setattr(prepare, 'write_json', failing)
    assert prepare.main([*told, '--shard_tokens=100_000', f'--data_dir={tmp_path}/killed']) == 130
    assert len(list((tmp_path / 'killed').glob('*.bin'))) > 5
    for name in ('killed', 'straight'):
        run(*told, '--shard_tokens=50_000', '--max_tokens=100_000', f'--data_dir={tmp_path}/{name}')
    assert contents(tmp_path / 'killed') == contents(tmp_path / 'straight')


def test_finished_data_is_left_alone(stdlib_like, tmp_path, capsys):
    before = contents(stdlib_like)
    told = ['text', f'--input={tmp_path}/in.jsonl', '--name=small', '--tokenizer=bytes', f'--data_dir={stdlib_like}']
    assert 'already prepared, nothing to do' in run(*told, '--val_fraction=0.2', capsys=capsys).out
    assert 'was prepared with val_fraction=0.2, not 0.005' in run(*told, code=2, capsys=capsys).err
    write_jsonl(tmp_path / 'in.jsonl', documents(49))
    assert 'was prepared with source=' in run(*told, '--val_fraction=0.2', code=2, capsys=capsys).err
    assert contents(stdlib_like) == before


def test_strange_folders_are_refused(shards, tmp_path, capsys):
    folder, _ = shards
    before = contents(folder)
    (tmp_path / 'file').write_text('')
    write_jsonl(tmp_path / 'x.jsonl', documents(9))
    told = ('text', f'--input={tmp_path}/x.jsonl', '--tokenizer=bytes', '--val_fraction=0.5')
    assert run(*told, f'--data_dir={folder}', code=2, capsys=capsys).err == (
        f'{folder} holds train_000000.bin, which was not prepared here; give another --data_dir, or move it away\n')
    assert {k: v for k, v in contents_of_files(folder).items() if k in before} == before
    assert 'cannot be made a folder' in run(*told, f'--data_dir={tmp_path}/file/x', code=2, capsys=capsys).err
    (tmp_path / 'busy').mkdir()
    with prepare.locked(tmp_path / 'busy'):
        assert 'another process is preparing data there' in run(*told, f'--data_dir={tmp_path}/busy', code=2, capsys=capsys).err


def contents_of_files(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in pathlib.Path(folder).iterdir() if f.is_file()}


def test_no_disk_space(tmp_path, capsys, monkeypatch):
    write_jsonl(tmp_path / 'x.jsonl', documents(50))
    size = (tmp_path / 'x.jsonl').stat().st_size
    monkeypatch.setattr(prepare.shutil, 'disk_usage', lambda path: type('usage', (), {'free': 100}))
    told = ('text', f'--input={tmp_path}/x.jsonl', '--tokenizer=bytes', '--val_fraction=0.2', f'--data_dir={tmp_path}/out')
    assert run(*told, code=2, capsys=capsys).err == (
        f'{tmp_path}/out: about {2 * size:,} bytes needed, 100 free; free some, give a --data_dir on a larger disk, '
        'or set --max_tokens\n')
    assert not list((tmp_path / 'out').iterdir())
    monkeypatch.undo()
    run(*told, '--max_tokens=30_000')  # as the message said


def test_full_disk_can_be_continued(tmp_path, capsys, monkeypatch):
    write_jsonl(tmp_path / 'x.jsonl', documents(3000))
    told = ['text', f'--input={tmp_path}/x.jsonl', '--tokenizer=bytes', '--shard_tokens=400_000']
    real, calls = prepare.os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 12:
            raise OSError(prepare.errno.ENOSPC, 'No space left on device')
        real(descriptor)
    monkeypatch.setattr(prepare.os, 'fsync', full)
    assert 'the disk is full; free some space and run the same command again: it continues' in run(
        *told, f'--data_dir={tmp_path}/a', code=2, capsys=capsys).err
    run(*told, f'--data_dir={tmp_path}/a')
    run(*told, f'--data_dir={tmp_path}/b')
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


def test_command_line_mistakes(tmp_path, capsys):
    def said(*argv):
        return run(*argv, code=2, capsys=capsys).err.strip()
    assert said('fineweb_edy') == "unknown data set 'fineweb_edy'; did you mean 'fineweb_edu'?"
    assert said('zzz') == "unknown data set 'zzz'; say one of fineweb_edu, text, stdlib, throughput"
    assert said() == "unknown data set ''; say one of fineweb_edu, text, stdlib, throughput"
    assert said('stdlib', '--shard_token=5', '--val_fraction=1').splitlines() == [
        "command line: unknown setting 'shard_token' (value '5'); did you mean 'shard_tokens'?",
        'val_fraction=1.0: must be above 0 and below 1']
    assert said('stdlib', '--input=x') == "input='x': stdlib does not use it; leave it out"
    assert said('text', '--source=x') == "source='x': text does not use it; leave it out"
    assert said('throughput', '--input=x', '--max_tokens=9') == 'max_tokens=9: throughput does not use it; leave it out'
    assert said('stdlib', '--name=../x') == "name='../x': use letters, digits, _ . - only, for it names a folder"
    assert said('stdlib', '--shard_tokens=0', '--processes=-1', '--max_tokens=-1').count('must be at least') == 3
    assert 'stdlib starts from --tokenizer=bytes --val_fraction=0.05' in run('--help', capsys=capsys).out


def test_input_mistakes(tmp_path, capsys):
    def said(*argv):
        return run('text', '--tokenizer=bytes', f'--data_dir={tmp_path}/out', *argv, code=2, capsys=capsys).err.strip()
    empty, jsonl, text, parquet = tmp_path / 'empty', tmp_path / 'x.jsonl', tmp_path / 'x.txt', tmp_path / 'x.parquet'
    empty.mkdir()
    assert said() == "input='': name the files or folders to read, e.g. --input=books/,more.jsonl"
    assert said(f'--input={empty}') == f'input: folder {empty} holds no .txt, .jsonl or .parquet file'
    assert said('--input=nowhere.txt') == 'input: nowhere.txt does not exist'
    (tmp_path / 'x.csv').write_text('')
    assert said(f'--input={tmp_path}/x.csv') == f'input: {tmp_path}/x.csv is none of .txt, .jsonl, .parquet'
    text.write_text('')
    assert said(f'--input={text}') == (
        'text: none of the 1 documents fell into the val split (val_fraction=0.005, by hash of the text); '
        'give more documents or another --val_fraction, e.g. 0.3')
    assert not list((tmp_path / 'out').iterdir())
    text.write_bytes(b'abc\xff')
    assert said(f'--input={text}') == f'{text}: not UTF-8 at byte 3; convert it, e.g. with iconv'
    jsonl.write_text('{"text": "a"}\n\nnot json\n')
    assert said(f'--input={jsonl}').startswith(f'{jsonl}: line 3: not JSON (')
    jsonl.write_text('{"text": "a"}\n{"body": "b"}\n')
    assert said(f'--input={jsonl}') == f"{jsonl}: line 2: no 'text' string in it; correct or remove it"
    parquet.write_text('PAR1 not really')
    assert said(f'--input={parquet}').startswith(f'{parquet}: not a readable Parquet file (')
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.table({'body': ['a'], 'id': [1]}), parquet)
    assert said(f'--input={parquet}') == (
        f"{parquet}: has no 'text' column of strings, only body, id; rename the column that holds it")
    pq.write_table(pa.table({'text': ['a', None]}), parquet)
    assert said(f'--input={parquet}') == f"{parquet}: row 1: 'text' is null; remove the row"


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / 'x.jsonl').write_text(''.join(json.dumps({'text': f'{i} \ud800 {i * i}'}) + '\n' for i in range(40)))
    run('text', f'--input={tmp_path}/x.jsonl', '--tokenizer=bytes', '--val_fraction=0.3', f'--data_dir={tmp_path}/out')
    text = reader.get_tokenizer('bytes').decode(whole(reader.open_data(f'{tmp_path}/out', 'text').train).tolist())
    assert ' \ufffd ' in text


def test_hub_out_of_reach(tmp_path):
    child = command('fineweb_edu', f'--data_dir={tmp_path}/out', '--tokenizer=bytes', '--max_tokens=1000', HF_HUB_OFFLINE='1',
                    HF_HOME=str(tmp_path / 'hf'))
    _, said = child.communicate(timeout=60)
    assert child.returncode == 2 and said.startswith('refused:\n  - HuggingFaceFW/fineweb-edu: cannot be read (')
    assert 'check the network and run the same command again' in said


def test_stdlib_is_english_and_repeatable(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    run('stdlib', capsys=capsys)
    assert time.monotonic() - started < 30
    data = reader.open_data('', 'stdlib')
    assert data.vocab_size == 257 and 1_500_000 < data.train_tokens + data.val_tokens < 8_000_000
    assert 0.02 < data.val_tokens / data.train_tokens < 0.12
    text = reader.get_tokenizer('bytes').decode(data.val.read([0], data.val_tokens)[0].tolist())
    assert text.count(' the ') > 500 and '\ufffd' not in text
    assert sum(len(d.encode()) + 1 for d in sources.stdlib_documents()) == data.train_tokens + data.val_tokens
