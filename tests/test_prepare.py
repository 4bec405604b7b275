"""prepare.py and sources.py: from text to token shards and meta.json."""
import hashlib
import json
import pathlib
import signal
import time

import numpy as np
import pytest
from texts import command, contents, documents, refusal, run, whole, write_fineweb, write_jsonl

import prepare
import shards as reader
import sources


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
