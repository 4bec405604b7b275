"""support/sources.py: where text comes from, and what is said where it does not."""
import gzip
import os
import subprocess
import sys
import time

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from texts import (
    ROOT,
    command,
    documents,
    local_fineweb,
    refused,
    run,
    whole,
    write_fineweb,
    write_jsonl,
)

import prepare
import sample
import train
from support import sources
from support.shards import open_data
from support.sources import SOURCES, Source
from support.tokenizer import Tokenizer


def test_a_source_of_ones_own_is_one_entry(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SOURCES, 'mine', Source(
        about='forty documents',
        read=lambda settings: ('version 1', [(t, settings.val_fraction) for t in documents(40)]),
        defaults=('--tokenizer=bytes', '--val_fraction=0.3'),
    ))
    run('mine')
    data = open_data('', 'mine')
    assert data.tokenizer == 'bytes'
    size = sum(len(text.encode()) + 1 for text in documents(40))
    assert data.train.tokens + data.val.tokens == size
    assert refused('mine', '--input=x') == "input='x': mine does not use it; leave it out"
    assert refused('zzz').endswith(f"say one of {', '.join(prepare.SOURCES)}")
    assert prepare.main(['--help']) == 0
    assert 'mine: forty documents' in capsys.readouterr().out


def test_files_are_read_in_order(tmp_path):
    (tmp_path / 'b').mkdir()
    for name in ('b/2.txt', 'b/1.txt', 'b/3.md', 'a.txt'):
        (tmp_path / name).write_text(name)
    write_jsonl(tmp_path / 'c.jsonl', ['first', 'second'])
    told = f'{tmp_path}/c.jsonl, {tmp_path}/b ,{tmp_path}/a.txt'
    files = sources.input_files('input', told)
    assert list(sources.read_files(files)) == ['first', 'second', 'b/1.txt', 'b/2.txt', 'a.txt']


def test_what_is_not_read_is_named(tmp_path, capsys):
    for name in ('in/sub/A.TXT', 'in/b.txt', 'in/c.md', 'in/d.md', 'in/LICENSE', 'elsewhere/f.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name * 50)
    (tmp_path / 'in' / 'g.jsonl.gz').write_bytes(gzip.compress(b'{"text": "g"}'))
    (tmp_path / 'in' / 'link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'in' / 'loop').symlink_to(tmp_path / 'in')
    (tmp_path / 'in' / 'dangling.txt').symlink_to('nowhere')
    (tmp_path / 'in' / 'secret').mkdir(mode=0)  # root, who may look into it, finds nothing
    told = ('text', f'--input={tmp_path}/in', '--tokenizer=bytes', '--name=x')
    run(*told, f'--data_dir={tmp_path}/out')
    assert capsys.readouterr().err == ('input: not read: 1 .gz, 2 .md, 1 .txt, 1 LICENSE, 1 link, '
                                       '1 loop, 1 secret (only .txt, .jsonl, .parquet)\n')
    data = open_data(f'{tmp_path}/out', 'x')
    assert data.train.tokens + data.val.tokens == (
        50 * len('in/sub/A.TXT' + 'in/b.txt') + 3)  # ends; one of the two is cut


def test_byte_order_marks_are_no_text(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfa')
    (tmp_path / 'b.jsonl').write_bytes(b'\xef\xbb\xbf{"text": "b"}\n{"text": "c"}')
    files = sources.input_files('input', str(tmp_path))
    assert list(sources.read_files(files)) == ['a', 'b', 'c']
    assert sample.read_text(str(tmp_path / 'a.txt'), 'score') == 'a'


PLAIN = pyarrow.array(['a', 'é'])
BINARY = pyarrow.array(['a'.encode(), 'é'.encode()])
STRUCTS = pyarrow.array([{'text': 'no', 'x': 1}, {'text': 'neither', 'x': 2}])


@pytest.mark.parametrize('text', [
    PLAIN.cast(pyarrow.large_string()), PLAIN.cast(pyarrow.string_view()),
    PLAIN.dictionary_encode(), BINARY, BINARY.cast(pyarrow.large_binary())], ids=str)
def test_columns_of_parquet(tmp_path, text):
    for stored in (True, False):  # the type in pyarrow's own words, too
        table = pyarrow.table({'before': STRUCTS, 'text': text})
        pyarrow.parquet.write_table(table, tmp_path / 'x.parquet', store_schema=stored)
        assert list(sources.read_files([tmp_path / 'x.parquet'])) == ['a', 'é']


def test_input_mistakes(tmp_path):
    def said(path):
        return refused('text', '--tokenizer=bytes', f'--data_dir={tmp_path}/out',
                       f'--input={path}')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'x.csv').write_text('')
    for told in ('', 'nowhere.txt', tmp_path / 'empty', tmp_path / 'x.csv'):
        assert said(told) == (
            f'input={str(told)!r}: {str(told)!r} is no file of .txt, .jsonl, .parquet and no '
            'folder with one; name such, e.g. --input=books/,more.jsonl')
    fix = 'correct it, download it again, or leave it out'
    text = tmp_path / 'x.txt'
    text.write_bytes(b'abc\xff')
    assert said(text).startswith(f'{text}: cannot be read (UnicodeDecodeError: ')
    assert said(text).endswith(f'in position 3: invalid start byte); {fix}')
    jsonl = tmp_path / 'x.jsonl'
    for wrong in ('not json', '{"body": "b"}', '["text"]'):
        jsonl.write_text('{"text": "a"}\n\n' + wrong + '\n')
        assert said(jsonl) == (f"{jsonl}: cannot be read (ValueError: line 3 is no JSON object "
                               f"with a 'text'); {fix}")
    jsonl.write_text('{"text": "a"}\n{"text": 5}\n')
    assert "the 'text' of document 2 is 5, not a string" in said(jsonl)
    parquet = tmp_path / 'x.parquet'
    parquet.write_text('PAR1 not really')
    assert said(parquet).startswith(f'{parquet}: cannot be read (ArrowInvalid: ')
    pyarrow.parquet.write_table(pyarrow.table({'body': ['a'], 'id': [1]}), parquet)
    assert said(parquet).startswith(f'{parquet}: cannot be read (KeyError: ')
    assert '"text" does not exist' in said(parquet)
    pyarrow.parquet.write_table(pyarrow.table({'text': ['a', None]}), parquet)
    assert "the 'text' of document 2 is None, not a string" in said(parquet)
    invalid = pyarrow.array([b'a', b'\xed\xa0\x80'])  # half a surrogate pair
    for column in (invalid, pyarrow.Array.from_buffers(pyarrow.string(), 2, invalid.buffers())):
        pyarrow.parquet.write_table(pyarrow.table({'text': column}), parquet)
        assert said(parquet).startswith(f'{parquet}: cannot be read (UnicodeDecodeError: ')


# --- sets of the hub ------------------------------------------------------------------------------

CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
---
# FineWeb-Edu
"""


def hub_set(folder, *paths, card=''):
    """A set as the hub's tools copy it; each file holds 30 texts of its own."""
    for seed, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_fineweb(folder / path, documents(30, seed=seed))
    if card:
        (folder / 'README.md').write_text(card)
    return folder


SAMPLE = ('sample/10BT/000_00000.parquet', 'sample/10BT/001_00000.parquet')
STORIES = ('data/train-00000-of-00001.parquet', 'data/validation-00000-of-00001.parquet')

LANGUAGES = ('de/train.parquet', 'en/train.parquet')
TWO = """---
configs:
- {{config_name: german, data_dir: de}}
- {{config_name: english, data_dir: en, {more}}}
---
"""


@pytest.mark.parametrize('paths, card, subset, seeds', [
    (SAMPLE, CARD, '', [0, 1]),  # where the card's first subset is not there
    ((*SAMPLE, 'data/CC/0.parquet'), CARD, '', [0, 1]),
    ((*SAMPLE, 'data/CC/0.parquet'), CARD, 'sample-10BT', [0, 1]),
    ((*SAMPLE, 'data/CC/0.parquet'), CARD, 'default', [2]),
    (STORIES, '', '', [0]),
    (STORIES, '---\nlicense: mit\n---\n', '', [0]),
    (('b.parquet', 'a.parquet'), '', '', [1, 0]),
    (LANGUAGES, TWO.format(more='default: true'), '', [1]),
    (LANGUAGES, TWO.format(more='x: 1'), 'german', [0]),
    (LANGUAGES, '---\nconfigs: [{config_name: only, data_dir: en}]\n---\n', '', [1]),
])
def test_local_copies_of_sets(tmp_path, paths, card, subset, seeds):
    folder = hub_set(tmp_path / 'set', *paths, card=card)
    settings = prepare.PrepareSettings(source=str(folder), subset=subset, val_fraction=0.25)
    expected = []
    for seed in seeds:
        expected += [(text, 0.25) for text in documents(30, seed=seed)]
    assert list(sources.read_hub(settings)[1]) == expected


def test_subset_that_is_not_there(tmp_path):
    folder = hub_set(tmp_path / 'set', *SAMPLE, card=CARD)
    told = ('fineweb_edu', f'--source={folder}', f'--data_dir={tmp_path}/out')
    assert "subset='sample' is not one of default, sample-10BT" in refused(*told, '--subset=sample')
    assert "for training in its subset 'default'" in refused(*told, '--subset=default')
    bare = hub_set(tmp_path / 'bare', *STORIES)
    assert "subset='x' is not one of default" in refused(*told, f'--source={bare}', '--subset=x')
    two = hub_set(tmp_path / 'two', *LANGUAGES, card=TWO.format(more='x: 1'))
    assert "subset='' is not one of german, english); name another" in refused(
        *told, f'--source={two}')
    test = hub_set(tmp_path / 'test', 'test.parquet')
    assert 'no .txt, .jsonl, .parquet for training' in refused(*told, f'--source={test}')


def test_file_added_to_a_source_folder(tmp_path):
    source = local_fineweb(tmp_path / 'set', documents(100))
    told = ('fineweb_edu', source, '--tokenizer=bytes', '--val_fraction=0.2',
            f'--data_dir={tmp_path}/out')
    run(*told)
    run(*told)
    write_fineweb(tmp_path / 'set' / '002_00000.parquet', documents(9))
    assert 'was prepared with source=' in refused(*told)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder which datasets takes for any set on the hub, and the (name, subset) asked for."""
    real = datasets.load_dataset
    asked = []

    def load_dataset(name, subset, **arguments):
        asked.append((name, subset))
        return real(str(tmp_path / 'hub'), **arguments)
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    return tmp_path / 'hub', asked


def test_any_set_of_the_hub(tmp_path, hub):
    folder, asked = hub
    hub_set(folder, *STORIES)
    told = ('--tokenizer=bytes', '--val_fraction=0.2')
    stories = ('fineweb_edu', '--source=roneneldan/TinyStories', '--name=stories', *told)
    run(*stories, f'--data_dir={tmp_path}/a')
    run('fineweb_edu', *told, f'--data_dir={tmp_path}/b')
    run(*stories, '--subset=x', f'--data_dir={tmp_path}/c')
    assert asked == [('roneneldan/TinyStories', None), ('HuggingFaceFW/fineweb-edu', 'sample-10BT'),
                     ('roneneldan/TinyStories', 'x')]
    assert 'was prepared with source=' in refused(*stories, f'--data_dir={tmp_path}/c')
    data = open_data(f'{tmp_path}/a', 'stories')
    size = sum(len(text.encode()) + 1 for text in documents(30))
    assert data.train.tokens + data.val.tokens == size


def test_null_text(tmp_path, hub):
    folder, _ = hub
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({'text': ['a', None]}), folder / 'x.parquet')
    for source in ('--source=someone/set', f'--source={folder}'):
        said = refused('fineweb_edu', source, '--name=x', '--tokenizer=bytes',
                       f'--data_dir={tmp_path}/out')
        assert "the 'text' of document 2 is None, not a string" in said


PROGRAM = """
import atexit, os, runpy, sys, datasets
real = datasets.load_dataset
datasets.load_dataset = lambda name, subset, **arguments: real(os.environ['HUB'], **arguments)
atexit.register(os.abort)  # like pyarrow's threads
sys.argv[0] = 'prepare.py'
runpy.run_path('prepare.py', run_name='__main__')
"""


def test_exit_code_after_a_stream_that_was_left(tmp_path):
    """Because of a damaged second file, twice, and of max_tokens."""
    folder = hub_set(tmp_path / 'hub', 'train-0.parquet', 'train-1.parquet')

    def tried(*more):
        told = ['fineweb_edu', '--source=a/b', '--name=x', '--tokenizer=bytes', *more,
                '--val_fraction=0.3', f'--data_dir={tmp_path}/out']
        child = subprocess.run([sys.executable, '-c', PROGRAM, *told], capture_output=True,
                               text=True, cwd=ROOT, env={**os.environ, 'HUB': str(folder)})
        return child.returncode, child.stderr
    damaged = folder / 'train-1.parquet'
    good = damaged.read_bytes()
    damaged.write_bytes(good[:2000] + b'\xff' * 2000 + good[4000:])
    for _ in range(2):
        code, said = tried()
        assert code == 2
        assert said.count('refused:\n  - a/b: cannot be read (') == 1
    assert tried('--max_tokens=9000')[0] == 0


def test_hub_out_of_reach(tmp_path):
    child = command('fineweb_edu', f'--data_dir={tmp_path}/out', '--tokenizer=bytes',
                    '--max_tokens=1000', HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'hf'))
    _, said = child.communicate(timeout=60)
    assert child.returncode == 2
    assert said.startswith('refused:\n  - HuggingFaceFW/fineweb-edu: cannot be read (')
    assert 'check the network and run the same command again' in said


def test_stdlib_is_english_and_repeatable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    run('stdlib')
    assert time.monotonic() - started < 30
    data = open_data('', 'stdlib')
    assert data.vocab_size == 257
    assert 1_500_000 < data.train.tokens + data.val.tokens < 8_000_000
    assert 0.02 < data.val.tokens / data.train.tokens < 0.12
    text = Tokenizer('bytes').decode(whole(data.val).tolist())
    assert text.count(' the ') > len(text) / 200
    assert '\ufffd' not in text
    again = 0
    for document, chance in sources.read_stdlib(prepare.PrepareSettings(val_fraction=0.05))[1]:
        assert chance == 0.05
        again += len(document.encode()) + 1
    assert again == data.train.tokens + data.val.tokens
    train.read_settings([str(ROOT / 'config/quickstart.py')])  # is not refused
