"""support/files.py: files are whole or absent."""
import errno
import json
import math
import os
import subprocess
import sys

import pytest
from conftest import HOME, refusal

from support import files
from support.files import (
    finite_or_none,
    locked,
    read_json,
    write_atomically,
    write_folder,
    write_json,
)


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


def test_what_killed_processes_left_is_removed(tmp_path):
    for name in ('file.by-1.tmp', f'file.by-{os.getpid()}.tmp', 'other.by-1.tmp', 'file.1.tmp'):
        (tmp_path / name).write_bytes(b'left')
    write_atomically(str(tmp_path / 'file'), lambda f: f.write(b'new'))
    assert (tmp_path / 'file').read_bytes() == b'new'
    assert sorted(os.listdir(tmp_path)) == ['file', 'file.1.tmp', 'other.by-1.tmp']


def test_folder_that_a_killed_process_left_is_removed(tmp_path):
    for process in (1, os.getpid()):
        (tmp_path / f'[a].by-{process}.tmp').mkdir()
        (tmp_path / f'[a].by-{process}.tmp' / 'half').write_text('x')
    write_folder(str(tmp_path / '[a]'), lambda folder: None)
    assert os.listdir(tmp_path) == ['[a]'] and os.listdir(tmp_path / '[a]') == []


def test_temporary_file_is_never_written_through_a_link(tmp_path, monkeypatch):
    (tmp_path / 'outside').write_text('mine')
    (tmp_path / f'file.by-{os.getpid()}.tmp').symlink_to(tmp_path / 'outside')
    write_atomically(str(tmp_path / 'file'), lambda f: f.write(b'new'))
    assert sorted(os.listdir(tmp_path)) == ['file', 'outside']
    monkeypatch.setattr(files, 'remove', lambda path: None)  # someone makes it just after
    (tmp_path / f'file.by-{os.getpid()}.tmp').symlink_to(tmp_path / 'outside')
    with pytest.raises(FileExistsError):
        write_atomically(str(tmp_path / 'file'), lambda f: f.write(b'new'))
    assert (tmp_path / 'outside').read_text() == 'mine'


def test_old_content_can_be_kept_under_another_name(tmp_path):
    for content in (b'1', b'2', b'3'):
        write_atomically(str(tmp_path / 'file'), lambda f, text=content: f.write(text), 'before')
    assert (tmp_path / 'file').read_bytes() == b'3'
    assert (tmp_path / 'before').read_bytes() == b'2'
    assert sorted(os.listdir(tmp_path)) == ['before', 'file']


def test_failed_write_names_the_file_and_keeps_both_contents(tmp_path):
    def full(f):
        raise OSError(errno.ENOSPC, 'No space left on device')

    path = str(tmp_path / 'file')
    for content in (b'1', b'2'):
        write_atomically(path, lambda f, text=content: f.write(text), 'before')
    with pytest.raises(OSError, match='No space left') as caught:
        write_atomically(path, full, 'before')
    assert caught.value.filename == path
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(f'{tmp_path}/gone/file', lambda f: None)
    assert caught.value.filename == f'{tmp_path}/gone/file'
    assert (tmp_path / 'file').read_bytes() + (tmp_path / 'before').read_bytes() == b'21'
    assert sorted(os.listdir(tmp_path)) == ['before', 'file']


LOCK_AND_WAIT = '''
import sys
sys.path.insert(0, sys.argv[1])
from support.files import locked
with locked(sys.argv[2], 'busy'):
    print('locked', flush=True)
    sys.stdin.read()
'''


def test_one_process_at_a_time_in_a_locked_folder(tmp_path):
    def enter():
        with locked(folder, 'someone else is there'):
            return 'entered'

    folder = str(tmp_path / 'a' / 'b')
    command = [sys.executable, '-c', LOCK_AND_WAIT, str(HOME), folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b'locked\n'
        assert refusal(enter) == ['someone else is there']
        other.kill()
        other.wait()
        assert enter() == enter() == 'entered'


def test_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def not_supported(*arguments):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(files.fcntl, 'flock', not_supported)
    with locked(str(tmp_path), 'busy'):
        pass


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        order.append(os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}')))
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', note_fsync)
    monkeypatch.setattr(os, 'replace', lambda a, b: (order.append('rename'), replace(a, b)))
    write_atomically(str(tmp_path / 'file'), lambda f: f.write(b'new'))
    assert order == [f'file.by-{os.getpid()}.tmp', 'rename', tmp_path.name]


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
    for damage in (b'{"a": 1', b'\xff\xfe', b'[' * 100_000, b'1' * 5000, b'{"a": 1}', b'["b"]',
                   b'7'):
        (tmp_path / 'x.json').write_bytes(damage)
        [problem] = refusal(read_json, path, ['b'])
        assert problem.startswith(f'{path} is damaged (')
        assert problem.endswith('); restore or remove it')


def test_json_that_is_a_fifo_or_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'fifo.json')
    (tmp_path / 'folder.json').mkdir()
    for name in ('fifo.json', 'folder.json'):
        assert refusal(read_json, str(tmp_path / name)) == [
            f'{tmp_path / name} cannot be read (not a regular file); correct that']
