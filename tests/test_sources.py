"""support/sources.py: where text comes from, and what is said where it does not."""
import time

import pyarrow
import pyarrow.parquet
from texts import command, documents, refused, run, whole, write_jsonl

import prepare
from support import sources
from support.shards import get_tokenizer, open_data
from support.sources import SOURCES, Source


def test_a_source_of_ones_own_is_one_entry(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SOURCES, 'mine', Source(
        about='forty documents',
        documents=lambda settings: ((text, settings.val_fraction) for text in documents(40)),
        origin=lambda settings: 'version 1',
        defaults=('--tokenizer=bytes', '--val_fraction=0.3'),
    ))
    run('mine')
    data = open_data('', 'mine')
    assert data.tokenizer == 'bytes'
    size = sum(len(text.encode()) + 1 for text in documents(40))
    assert data.train.tokens + data.val.tokens == size
    assert refused('mine', '--input=x') == "input='x': mine does not use it; leave it out"
    assert refused('zzz').endswith('say one of fineweb_edu, text, stdlib, mine')
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
    text = get_tokenizer('bytes').decode(whole(data.val).tolist())
    assert text.count(' the ') > 500
    assert '\ufffd' not in text
    again = 0
    for document, chance in sources.stdlib_documents(prepare.PrepareSettings(val_fraction=0.05)):
        assert chance == 0.05
        again += len(document.encode()) + 1
    assert again == data.train.tokens + data.val.tokens
