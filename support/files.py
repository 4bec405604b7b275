"""Files that are whole or absent: temporary name, fsync, rename."""
import contextlib
import json
import math
import os
import re
import shutil

from support.settings import Refused

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None


@contextlib.contextmanager
def locked(folder, message):
    """Keep other processes out of a folder, which is made if it is not there.

    Refused(message) if one of them has locked it. The lock ends with the process.
    """
    os.makedirs(folder, exist_ok=True)
    if not fcntl:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise Refused(message) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(lock)


def sync_rename(path):
    """Wait until the renaming of `path` is on the disk."""
    if os.name != 'posix':
        return
    folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def temporary_name(path):
    """A name beside `path` of this process's own; what dead processes left there is removed."""
    folder, name = os.path.split(path)
    for found in os.listdir(folder or '.'):
        number = re.fullmatch(re.escape(name) + r'\.(\d+)\.tmp', found)
        if number and (int(number[1]) == os.getpid() or not is_alive(int(number[1]))):
            remove(os.path.join(folder, found))
    return f'{path}.{os.getpid()}.tmp'


def is_alive(process):
    """Whether a process of that number runs; on Windows, which cannot be asked, True."""
    if os.name != 'posix':
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def remove(path):
    """Remove a file or folder as far as that is possible."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.remove(path)


def write_atomically(path, write, keep=None):
    """Call write(file) on a temporary binary file, then give it the name `path`.

    Whatever happens in between, `path` holds the old content or the new, whole. keep: name beside
    `path` that the old content gets first; for a moment it is only there.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, 'xb') as f:  # x: never through a link
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if keep and os.path.exists(path):
            os.replace(path, os.path.join(os.path.dirname(path), keep))
        os.replace(temporary, path)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError):
            error.filename = error.filename or path  # a full disk names none
        raise
    sync_rename(path)


def write_folder(path, write):
    """Call write(folder) on a temporary folder beside `path`, then give it that name.

    If anything fails, `path` stays as it was. OSError if `path` is anything but an empty folder.
    """
    path = os.path.abspath(path)
    temporary = temporary_name(path)
    os.makedirs(temporary)
    try:
        write(temporary)
        for name in os.listdir(temporary):
            with open(os.path.join(temporary, name), 'rb') as f:
                os.fsync(f.fileno())
        os.rename(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    sync_rename(path)


def finite_or_none(value):
    """`value` for JSON, which has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: finite_or_none(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite_or_none(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path, content):
    text = json.dumps(finite_or_none(content), indent=1) + '\n'
    write_atomically(path, lambda f: f.write(text.encode()))


def read_json(path):
    """The content of a JSON file, None if there is no such file; Refused if it is damaged."""
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Refused(f'{path} cannot be read ({error.strerror}); correct that') from None
    except ValueError as error:
        raise Refused(f'{path} is damaged ({error}); restore or remove it') from None
