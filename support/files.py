"""Files that are whole or absent: temporary name, fsync, rename."""
import json
import math
import os
import shutil

from support.settings import Refused


def sync_rename(path):
    """Wait until the renaming of `path` is on the disk."""
    if os.name != 'posix':
        return
    folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path, write):
    """Call write(file) on a temporary binary file, then give it the name `path`.

    Whatever happens in between, `path` holds the old content or the new, whole. The temporary name
    is fixed, so that the next process overwrites what a killed one has left.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    sync_rename(path)


def write_folder(path, write):
    """Call write(folder) on a temporary folder beside `path`, then give it that name.

    If anything fails, `path` stays as it was. OSError if `path` is anything but an empty folder.
    """
    path = os.path.abspath(path)
    temporary = f'{path}.{os.getpid()}.tmp'
    os.makedirs(temporary)
    try:
        write(temporary)
        for name in os.listdir(temporary):
            with open(os.path.join(temporary, name), 'rb') as f:
                os.fsync(f.fileno())
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary)
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
