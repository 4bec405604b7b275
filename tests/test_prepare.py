"""prepare.py: from text to token shards and meta.json, however often it is interrupted."""
import errno
import json
import math
import signal
import time

import numpy as np
import pytest
from texts import (
    command,
    contents,
    documents,
    local_fineweb,
    refusal,
    refused,
    run,
    small_data,
    split_by_hash,
    unlabelled_data,
    use_small_gpt2,
    whole,
    write_fineweb,
    write_jsonl,
)

import prepare
from support import shards
from support.shards import open_data
from support.tokenizer import Tokenizer


def text_of(stream):
    return Tokenizer('bytes').decode(whole(stream).tolist())


# --- shards ---------------------------------------------------------------------------------------


def test_same_text_same_shards_from_every_format(tmp_path, monkeypatch):
    small_gpt2 = use_small_gpt2(monkeypatch)
    texts = documents(40) + ['a literal <|endoftext|> inside', '']
    (tmp_path / 'txt').mkdir()
    for i, text in enumerate(texts):
        (tmp_path / 'txt' / f'{i:03d}.txt').write_bytes(text.encode())
    source = local_fineweb(tmp_path / 'parquet', texts)
    write_jsonl(tmp_path / 'x.jsonl', texts)
    commands = {
        'txt': ('text', f'--input={tmp_path}/txt'),
        'parquet': ('text', f'--input={tmp_path}/parquet'),
        'jsonl': ('text', f'--input={tmp_path}/x.jsonl'),
        'fineweb_edu': ('fineweb_edu', source),
    }
    made = []
    for kind, told in commands.items():
        folder = tmp_path / f'out_{kind}'
        run(*told, f'--data_dir={folder}', '--val_fraction=0.3', '--shard_tokens=5000',
            '--name=same')
        made.append(contents(folder))
        del made[-1]['meta.json']
    assert len(made[0]) > 4
    assert made[0] == made[1] == made[2] == made[3]
    data = open_data(f'{tmp_path}/out_txt', 'same')
    for stream in (data.train, data.val):
        expected = []
        for text in split_by_hash(texts, 0.3)[stream.split]:
            expected += small_gpt2.encode_ordinary(text) + [50256]
        assert whole(stream).tolist() == expected


def test_shards_are_llm_c_s(tmp_path):
    path = write_jsonl(tmp_path / 'x.jsonl', documents(50))
    run('text', f'--input={path}', '--name=x', f'--data_dir={tmp_path}/x', '--tokenizer=bytes',
        '--val_fraction=0.3', '--shard_tokens=5000')
    meta = json.loads((tmp_path / 'x' / 'meta.json').read_text())
    for split in ('train', 'val'):
        left = meta[f'{split}_tokens']
        assert left > 2 * 5000
        for path in sorted((tmp_path / 'x').glob(f'{split}_*.bin')):
            raw = path.read_bytes()
            head = np.frombuffer(raw[:1024], '<i4').tolist()
            assert head == [20240520, 1, min(left, 5000)] + [0] * 253
            assert len(raw) == 1024 + 2 * min(left, 5000)
            left -= min(left, 5000)
        assert left == 0


def test_cores_do_not_change_the_shards(tmp_path, monkeypatch):
    use_small_gpt2(monkeypatch)
    long = 'one document that takes long. ' * 60_000
    write_jsonl(tmp_path / 'x.jsonl', [*documents(600), long, *documents(600, seed=1)])
    for cores in (1, 3):
        monkeypatch.setattr(prepare.os, 'cpu_count', lambda cores=cores: cores)
        run('text', f'--input={tmp_path}/x.jsonl', f'--data_dir={tmp_path}/{cores}',
            '--val_fraction=0.1', '--shard_tokens=300_000')
    assert len(contents(tmp_path / '1')) > 8
    assert contents(tmp_path / '1') == contents(tmp_path / '3')


def test_max_tokens_stops_after_the_document_that_reaches_it(tmp_path):
    texts = documents(100)
    write_jsonl(tmp_path / 'x.jsonl', texts)
    end = sum(len(text.encode()) + 1 for text in texts[:50])
    for limit in (end - 1, end):
        run('text', f'--input={tmp_path}/x.jsonl', f'--data_dir={tmp_path}/{limit}',
            '--tokenizer=bytes', '--val_fraction=0.3', f'--max_tokens={limit}')
        data = open_data(f'{tmp_path}/{limit}', 'text')
        assert data.train.tokens + data.val.tokens == end
        meta = json.loads((tmp_path / str(limit) / 'meta.json').read_text())
        assert meta['documents'] == 50


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    lines = [json.dumps({'text': f'{i} \ud800 {i * i}'}) + '\n' for i in range(40)]
    (tmp_path / 'x.jsonl').write_text(''.join(lines))
    run('text', f'--input={tmp_path}/x.jsonl', '--tokenizer=bytes', '--val_fraction=0.3',
        f'--data_dir={tmp_path}/out')
    assert ' ? ' in text_of(open_data(f'{tmp_path}/out', 'text').train)


# --- splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('lengths, fraction', [
    ([9_999], 0.1),
    ([99_999], 0.005),
    ([599, 0, 599], 0.2),
    ([9] * 300, 0.005),  # of each one's end, a letter would be left
    ([600, 100], 0.5),
])
def test_few_documents_are_split_by_position(tmp_path, lengths, fraction):
    texts = [chr(97 + i % 26) * length for i, length in enumerate(lengths)]
    path = write_jsonl(tmp_path / 'x.jsonl', texts)
    told = ('text', f'--input={path}', '--name=mine', '--tokenizer=bytes',
            f'--val_fraction={fraction}')
    run(*told, '--shard_tokens=500', f'--data_dir={tmp_path}/out')
    data = open_data(f'{tmp_path}/out', 'mine')
    train = text_of(data.train).removesuffix('<|endoftext|>').split('<|endoftext|>')
    val = text_of(data.val).removesuffix('<|endoftext|>').split('<|endoftext|>')
    assert ''.join(train + val) == ''.join(texts)
    assert len(''.join(val)) == math.ceil(fraction * sum(lengths))
    whole = [text for text in texts if text]
    assert train[:-1] == whole[:len(train) - 1] and val[1:] == whole[len(whole) - len(val) + 1:]
    run(*told, f'--max_tokens={data.val.tokens + 1}', f'--data_dir={tmp_path}/less')
    assert text_of(open_data(f'{tmp_path}/less', 'mine').train) == f'{train[0]}<|endoftext|>'


def test_by_hash_from_two_expected_documents_on(tmp_path):
    for count in (9, 10):
        path = write_jsonl(tmp_path / 'x.jsonl', documents(count))
        run('text', f'--input={path}', '--tokenizer=bytes', '--val_fraction=0.2',
            f'--data_dir={tmp_path}/{count}')
    by_hash = split_by_hash(documents(10), 0.2)
    assert text_of(open_data(f'{tmp_path}/10', 'text').val) == ''.join(
        f'{text}<|endoftext|>' for text in by_hash['val'])
    end = text_of(open_data(f'{tmp_path}/9', 'text').val).replace('<|endoftext|>', '')
    assert ''.join(documents(9)).endswith(end) and end


def test_validation_text_of_ones_own(tmp_path):
    train = write_jsonl(tmp_path / 'train.jsonl', documents(600))
    val = write_jsonl(tmp_path / 'val.jsonl', documents(5, seed=1))
    told = ('text', f'--input={train}', f'--val_input={val}', '--tokenizer=bytes')
    run(*told, f'--data_dir={tmp_path}/out')
    data = open_data(f'{tmp_path}/out', 'text')
    assert text_of(data.train) == ''.join(f'{t}<|endoftext|>' for t in documents(600))
    assert text_of(data.val) == ''.join(f'{t}<|endoftext|>' for t in documents(5, seed=1))
    both = ('text', f'--input={train},{val}', '--tokenizer=bytes', f'--data_dir={tmp_path}/out')
    assert 'was prepared with source=' in refused(*both)
    run(*told, '--max_tokens=20_000', f'--data_dir={tmp_path}/less')
    assert whole(open_data(f'{tmp_path}/less', 'text').val).tolist() == whole(data.val).tolist()
    assert 'give more text, a larger --max_tokens or another --val_fraction' in refused(
        *told, '--max_tokens=10', f'--data_dir={tmp_path}/least')
    run(*told, f'--data_dir={tmp_path}/least')
    assert contents(tmp_path / 'least') == contents(tmp_path / 'out')


def test_too_little_text(tmp_path):
    told = ('text', f'--input={tmp_path}/x.txt', '--tokenizer=bytes', f'--data_dir={tmp_path}/out')
    (tmp_path / 'x.txt').write_text('')
    message = refused(*told)
    assert message.startswith('text: 0 training and 0 validation tokens, too few to learn from')
    (tmp_path / 'x.txt').write_text('enough')
    assert 'too few to learn from' in refused(*told, '--val_fraction=5e-324')
    run(*told)
    assert open_data(f'{tmp_path}/out', 'text').val.tokens == 2


# --- interruptions --------------------------------------------------------------------------------


def interrupted_commands(tmp_path):
    """Commands that go each another way through prepare.py."""
    source = local_fineweb(tmp_path / 'hub', documents(300))
    train = write_jsonl(tmp_path / 'train.jsonl', documents(300))
    val = write_jsonl(tmp_path / 'val.jsonl', documents(100, seed=1))
    common = ('text', '--tokenizer=bytes', '--shard_tokens=15_000')
    return {
        'by hash': (*common, f'--input={train}', '--val_fraction=0.3'),
        'val_input': (*common, f'--input={train}', f'--val_input={val}'),
        'max_tokens': (*common, f'--input={train}', '--val_fraction=0.3', '--max_tokens=200_000'),
        'by position': (*common, f'--input={train}', '--val_fraction=1e-9'),
        'fineweb_edu': ('fineweb_edu', source, *common[1:], '--val_fraction=0.3'),
    }


@pytest.mark.parametrize('kind', ['by hash', 'val_input', 'max_tokens', 'by position',
                                  'fineweb_edu'])
def test_interrupted_before_and_after_each_meta(tmp_path, monkeypatch, kind):
    """Shards lie on the disk that meta.json does not know."""
    told = interrupted_commands(tmp_path)[kind]
    run(*told, f'--data_dir={tmp_path}/straight')
    monkeypatch.setattr(prepare, 'SAVE_TOKENS', 50_000)
    folder = tmp_path / 'killed'
    real = prepare.write_json
    writes = []

    def interrupting(path, content):
        """Two writes of each attempt succeed; the third is interrupted, before it or after."""
        writes.append(path)
        last = len(writes) % 3 == 0
        if last and len(writes) % 2:
            raise KeyboardInterrupt
        for split in ('train', 'val'):
            sizes = [f.stat().st_size - 1024 for f in folder.glob(f'{split}_*.bin')]
            assert sum(sizes) >= 2 * content[f'{split}_tokens'], 'told, but not on the disk'
        real(path, content)
        if last:
            raise KeyboardInterrupt
    monkeypatch.setattr(prepare, 'write_json', interrupting)
    interruptions = 0
    while interruptions < 30:
        try:
            run(*told, f'--data_dir={folder}')
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert 2 <= interruptions < 30
    assert contents(folder) == contents(tmp_path / 'straight')


def test_other_arguments_may_follow_a_run_that_was_interrupted_early(tmp_path, monkeypatch):
    """Before meta.json tells of the first documents there is nothing to continue."""
    write_jsonl(tmp_path / 'x.jsonl', documents(1000))
    told = ('text', f'--input={tmp_path}/x.jsonl', '--tokenizer=bytes', '--val_fraction=0.3')
    real = prepare.write_json

    def interrupting(path, content):
        if content['documents']:
            raise KeyboardInterrupt
        real(path, content)
    monkeypatch.setattr(prepare, 'write_json', interrupting)
    small = [*told, '--shard_tokens=9000', f'--data_dir={tmp_path}/a']
    with pytest.raises(KeyboardInterrupt):
        prepare.main(small)
    assert len(contents(tmp_path / 'a')) > 100
    monkeypatch.undo()
    for folder in 'ab':
        run(*told, f'--data_dir={tmp_path}/{folder}')
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


def kill_in_the_middle(folder, told):
    """Start the command and kill it, with no chance to tidy up."""
    child = command(*told, code='import prepare; prepare.SAVE_TOKENS = 10_000')
    deadline = time.monotonic() + 30
    while len(list(folder.glob('train_*.bin'))) < 50 and time.monotonic() < deadline:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=10)


def test_killed_and_continued_equals_uninterrupted(tmp_path, capsys):
    (tmp_path / 'in').mkdir()
    for i in range(3):
        write_fineweb(tmp_path / 'in' / f'{i}.parquet', documents(1500, seed=i))
    told = ('text', f'--input={tmp_path}/in', '--tokenizer=bytes', '--shard_tokens=30_000',
            '--val_fraction=0.004', '--name=x')
    run(*told, f'--data_dir={tmp_path}/straight')
    folder = tmp_path / 'killed'
    kill_in_the_middle(folder, [*told, f'--data_dir={folder}'])
    assert json.loads((folder / 'meta.json').read_text())['documents'] > 0
    assert 'preparation has not finished' in refusal(open_data, str(folder), 'x')
    assert refused(*told, '--shard_tokens=40_000', f'--data_dir={folder}') == (
        f'{folder} was prepared with shard_tokens=30000, not 40000; give the same, another '
        '--data_dir, or delete the folder')
    capsys.readouterr()
    run(*told, f'--data_dir={folder}')
    said = capsys.readouterr()
    assert 'continuing after ' in said.out
    assert said.err == ''  # no bar where there is no terminal
    assert contents(folder) == contents(tmp_path / 'straight')


def test_full_disk_can_be_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, 'SAVE_TOKENS', 100_000)
    write_jsonl(tmp_path / 'x.jsonl', documents(3000))
    told = ('text', f'--input={tmp_path}/x.jsonl', '--tokenizer=bytes', '--shard_tokens=400_000')
    real = prepare.os.fsync
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, 'No space left on device')
        real(descriptor)
    monkeypatch.setattr(prepare.os, 'fsync', full)
    assert refused(*told, f'--data_dir={tmp_path}/a') == (
        f"{tmp_path}/a: [Errno 28] No space left on device: '{tmp_path}/a/meta.json'; correct that "
        'and run the same command again, which continues, or give another --data_dir')
    run(*told, f'--data_dir={tmp_path}/a')
    run(*told, f'--data_dir={tmp_path}/b')
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


# --- refusals -------------------------------------------------------------------------------------


def test_finished_data_is_left_alone(tmp_path):
    folder = small_data(tmp_path)
    before = contents(folder)
    told = ('text', f'--input={tmp_path}/in.jsonl', '--name=small', '--tokenizer=bytes',
            f'--data_dir={folder}')
    run(*told, '--val_fraction=0.2')
    assert contents(folder) == before
    assert 'was prepared with val_fraction=0.2, not 0.005' in refused(*told)
    write_jsonl(tmp_path / 'in.jsonl', documents(49))
    assert 'was prepared with source=' in refused(*told, '--val_fraction=0.2')
    assert contents(folder) == before


def test_finished_shards_are_verified(tmp_path, monkeypatch, capsys):
    folder = small_data(tmp_path)
    told = ('text', f'--input={tmp_path}/in.jsonl', '--name=small', '--tokenizer=bytes',
            '--val_fraction=0.2', f'--data_dir={folder}')
    sums = contents(folder)
    del sums['meta.json']
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['sha256'] == sums
    capsys.readouterr()
    run(*told)
    assert '2 shards verified by SHA-256' in capsys.readouterr().out
    monkeypatch.setattr(shards, 'fingerprint_of', lambda *_: meta['fingerprint'])  # sees it not
    path = folder / 'train_000000.bin'
    raw = path.read_bytes()
    path.write_bytes(raw[:2000] + bytes([raw[2000] ^ 1]) + raw[2001:])
    fix = 'is not as it was prepared (SHA-256); copy it again, or delete the folder and'
    assert refused(*told).startswith(f'{path} {fix}')
    path.unlink()
    assert refused(*told).startswith(f'{path} {fix}')
    path.write_bytes(raw)
    del meta['sha256']
    (folder / 'meta.json').write_text(json.dumps(meta))
    run(*told)
    assert '0 shards verified by SHA-256' in capsys.readouterr().out


def test_strange_folders_are_refused(tmp_path):
    unlabelled_data(tmp_path)
    write_jsonl(tmp_path / 'x.jsonl', documents(9))
    (tmp_path / 'file').write_text('')
    (tmp_path / 'busy').mkdir()
    before = contents(tmp_path)
    told = ('text', f'--input={tmp_path}/x.jsonl', '--tokenizer=bytes', '--val_fraction=0.5')
    assert refused(*told, f'--data_dir={tmp_path}') == (
        f'{tmp_path} holds train_000000.bin, which was not prepared here; give another '
        '--data_dir, or move it away')
    assert 'Not a directory' in refused(*told, f'--data_dir={tmp_path}/file/x')
    with prepare.locked(tmp_path / 'busy', 'busy'):
        message = refused(*told, f'--data_dir={tmp_path}/busy')
    assert 'another process is preparing data there' in message
    assert contents(tmp_path) == before


def test_command_line_mistakes(capsys):
    choices = ', '.join(prepare.SOURCES)
    assert refused('fineweb_edy') == f"unknown source 'fineweb_edy'; say one of {choices}"
    assert refused('--name=x', 'fineweb_edy').startswith("unknown source 'fineweb_edy'")
    assert refused('fineweb_edu', '--source=', '--name=x') == "source='': must not be empty"
    assert refused() == f"unknown source ''; say one of {choices}"
    assert refused('stdlib', '--shard_token=5', '--val_fraction=1').splitlines() == [
        "command line: unknown setting 'shard_token' (value '5'); did you mean 'shard_tokens'?",
        'val_fraction=1.0: must be above 0 and below 1']
    assert refused('text', '--input=x', '--subset=y') == (
        "subset='y': text does not use it; leave it out")
    assert refused('fineweb_edu', '--source=roneneldan/TinyStories') == (
        "source='roneneldan/TinyStories': give this set a --name of its own")
    assert refused('stdlib', '--input=x') == "input='x': stdlib does not use it; leave it out"
    assert refused('text', '--input=x', '--val_input=y', '--val_fraction=0.1') == (
        'val_fraction=0.1: all of val_input is validation; leave out one of the two')
    assert refused('stdlib', '--name=../x') == (
        "name='../x': use letters, digits, _ . - only, because it names a folder")
    too_small = refused('stdlib', '--shard_tokens=0', '--max_tokens=-1')
    assert too_small.count('must be at least') == 2
    assert 'shard_tokens=2147483648: must be' in refused('stdlib', f'--shard_tokens={2**31}')
    assert prepare.main(['--help']) == 0
    said = capsys.readouterr().out
    assert 'stdlib: ' in said
    assert '--tokenizer=bytes --val_fraction=0.05' in said
    assert 'text: files of your own, named by --input=FILES' in said
