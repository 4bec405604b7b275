"""Files that are whole or absent: temporary name, fsync, rename."""
import contextlib
import glob
import json
import math
import os
import shutil

from support.settings import Refused, regular

if os.name == 'posix':
    import fcntl


@contextlib.contextmanager
def locked(folder, message):
    """Keep other processes out of a folder, which is made if it is not there.

    Refused(message) if one of them has locked it. The lock ends with the process.
    """
    os.makedirs(folder, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if os.name == 'posix':
            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(message) from None
            except OSError:  # a file system without locks
                pass
        yield


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
    """A name beside `path` of this process's own; what others that were killed left is removed."""
    for left in glob.glob(f'{glob.escape(path)}.by-*.tmp'):
        remove(left)
    return f'{path}.by-{os.getpid()}.tmp'


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
        if keep and os.path.isfile(path):
            os.replace(path, os.path.join(os.path.dirname(path), keep))
        os.replace(temporary, path)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError) and error.filename in (None, temporary):  # full; folder gone
            error.filename = path
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


def read_json(path, needs=()):
    """The content of a JSON file, None if there is no such file; Refused if it is damaged.

    needs: keys that an object must have; without any, all JSON will do.
    """
    try:
        with open(regular(path), encoding='utf-8') as f:
            content = json.load(f)
        if missing := [key for key in needs if not isinstance(content, dict) or key not in content]:
            raise ValueError(f'no {missing[0]!r} in it')
        return content
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Refused(f'{path} cannot be read ({error.strerror}); correct that') from None
    except (ValueError, RecursionError) as error:
        raise Refused(f'{path} is damaged ({error}); restore or remove it') from None
