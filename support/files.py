"""Files that are whole or absent: temporary name, fsync, rename."""
import contextlib
import glob
import json
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


def remove(path):
    """Remove a file or folder as far as that is possible."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.remove(path)


@contextlib.contextmanager
def replaced(path):
    """A temporary name of this process's own, which becomes `path` unless something fails."""
    for left in glob.glob(f'{glob.escape(path)}.by-*.tmp'):  # by processes that were killed
        remove(left)
    temporary = f'{path}.by-{os.getpid()}.tmp'
    try:
        yield temporary
        os.replace(temporary, path)
        if os.name == 'posix':
            folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
            os.fsync(folder)  # or the old name may come back after a crash
            os.close(folder)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError) and error.filename in (None, temporary):  # full; folder gone
            error.filename = path
        raise


def write_atomically(path, write, keep=None):
    """Call write(file) on a temporary binary file, then give it the name `path`.

    Whatever happens in between, `path` holds the old content or the new, whole. keep: name beside
    `path` that the old content gets first; for a moment it is only there.
    """
    with replaced(path) as temporary:
        with open(temporary, 'xb') as f:  # x: never through a link
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if keep and os.path.isfile(path):
            os.replace(path, os.path.join(os.path.dirname(path), keep))


def write_folder(path, write):
    """Call write(folder) on a temporary folder beside `path`, then give it that name.

    If anything fails, `path` stays as it was. OSError if `path` is anything but an empty folder.
    """
    with replaced(os.path.abspath(path)) as temporary:
        os.makedirs(temporary)
        write(temporary)
        for name in os.listdir(temporary):
            with open(os.path.join(temporary, name), 'rb') as f:
                os.fsync(f.fileno())


def finite_or_none(value):
    """`value` for JSON, which has no NaN and no infinity."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


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
