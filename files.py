"""Files that are whole or absent: temporary name, fsync, rename."""
import json
import math
import os
import shutil

from settings import Refused


def publish(f, path):
    """Give an open temporary file, path + '.tmp', its name once its bytes are on the disk.

    Whatever happens in between, `path` holds the old content or the new, whole.
    """
    f.flush()
    os.fsync(f.fileno())
    f.close()
    os.replace(f'{path}.tmp', path)
    sync_rename(path)


def sync_rename(path):
    """Wait until the renaming of `path` is on the disk."""
    if os.name == 'posix':
        folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomically(path, write):
    """Call write(file) on a temporary binary file and publish it as `path`; if that fails, `path` stays as it was.

    The temporary name is fixed, so that what a killed process leaves is overwritten by the next.
    """
    f = open(f'{path}.tmp', 'wb')
    try:
        write(f)
        publish(f, path)
    except BaseException:
        f.close()
        if os.path.exists(f'{path}.tmp'):
            os.remove(f'{path}.tmp')
        raise


def write_folder(path, write):
    """Call write(folder) on a temporary folder beside `path`, then give it that name; if anything fails, `path` stays as it was.

    OSError if `path` is there and anything but an empty folder. What lies in the folder is for `write` to bring to the disk.
    """
    path = os.path.abspath(path)
    temporary = f'{path}.{os.getpid()}.tmp'
    os.makedirs(temporary)
    try:
        write(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    sync_rename(path)


def finite_or_none(value):
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {k: finite_or_none(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    except ValueError as error:
        raise Refused(f'{path} is damaged ({error}); restore or remove it') from None
