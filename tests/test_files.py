"""support/files.py: files are whole or absent."""
import json
import math
import os

import pytest
from conftest import refusal

from support.files import finite_or_none, read_json, write_atomically, write_folder, write_json


def broken(f):
    f.write(b'half')
    raise ValueError('broken')


def test_file_holds_the_old_content_until_the_new_is_whole(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'old')
    seen = []

    def write(f):
        f.write(b'new')
        seen.append(path.read_bytes())

    write_atomically(str(path), write)
    assert seen == [b'old'] and path.read_bytes() == b'new'
    assert os.listdir(tmp_path) == ['file']


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'file'
    for before in ([], ['file']):
        with pytest.raises(ValueError, match='broken'):
            write_atomically(str(path), broken)
        assert os.listdir(tmp_path) == before
        path.write_bytes(b'old')
    assert path.read_bytes() == b'old'


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / 'file.tmp').write_bytes(b'much longer than what follows')
    write_atomically(str(tmp_path / 'file'), lambda f: f.write(b'new'))
    assert (tmp_path / 'file').read_bytes() == b'new' and os.listdir(tmp_path) == ['file']


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (order.append('fsync'), fsync(fd)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (order.append('rename'), replace(a, b)))
    write_atomically(str(tmp_path / 'file'), lambda f: f.write(b'new'))
    assert order == ['fsync', 'rename', 'fsync']  # the file, its name, the folder that has it


def test_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / 'folder'

    def write(temporary):
        assert not folder.exists()
        with open(os.path.join(temporary, 'a'), 'w') as f:
            f.write('x')

    def fail(temporary):
        write(temporary)
        raise ValueError('broken')

    with pytest.raises(ValueError, match='broken'):
        write_folder(str(folder), fail)
    assert os.listdir(tmp_path) == []
    write_folder(str(folder), write)
    assert (folder / 'a').read_text() == 'x' and os.listdir(tmp_path) == ['folder']


def test_folder_with_something_in_it_is_not_replaced(tmp_path):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'kept').write_text('x')
    with pytest.raises(OSError):
        write_folder(str(tmp_path / 'folder'), lambda temporary: None)
    assert os.listdir(tmp_path) == ['folder'] and os.listdir(tmp_path / 'folder') == ['kept']


def test_json_has_null_where_python_has_nan(tmp_path):
    content = {'a': math.nan, 'b': {'c': -math.inf, 'd': 1.5}, 'e': 3, 'f': 'text', 'g': True}
    expected = {**content, 'a': None, 'b': {'c': None, 'd': 1.5}}
    assert finite_or_none(content) == expected
    write_json(str(tmp_path / 'x.json'), content)
    strict = json.loads((tmp_path / 'x.json').read_text(), parse_constant=pytest.fail)
    assert strict == expected == read_json(str(tmp_path / 'x.json'))


def test_json_that_is_absent_or_damaged(tmp_path):
    path = str(tmp_path / 'x.json')
    assert read_json(path) is None
    for damage in (b'{"a": 1', b'\xff\xfe'):
        (tmp_path / 'x.json').write_bytes(damage)
        [problem] = refusal(read_json, path)
        assert problem.startswith(f'{path} is damaged (')
        assert problem.endswith('); restore or remove it')
