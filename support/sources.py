"""Sources of text: files, CPython's own documentation, the hub's sets. SOURCES lists them.

A source is one entry of that table; the commands and help of prepare.py derive from it.
"""
import ast
import collections
import contextlib
import itertools
import json
import math
import os
import pathlib
import platform
import sys
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from support.settings import Refused


@dataclass(frozen=True)
class Source:
    """What prepare.py knows of a source of text.

    read(settings of prepare.py) -> (origin, documents): what the documents depend on, for JSON; and
    (text, chance of being validation, by a hash of the text) of each, in the same order always.
    """
    about: str
    read: Callable
    defaults: tuple = ()  # arguments that go before those of the command line


@contextlib.contextmanager
def explained(what, fix):
    """Whatever goes wrong in reading, in one line: the libraries raise many kinds of errors."""
    try:
        yield
    except Exception as error:
        reason = ' '.join(str(error).split())[:200]
        raise Refused(f'{what}: cannot be read ({type(error).__name__}: {reason}); '
                      f'{fix}') from None


def strings(texts):
    """The texts, those of binary columns as UTF-8. ValueError at what is no text."""
    for number, text in enumerate(texts, 1):
        if isinstance(text, bytes):
            text = text.decode()
        if not isinstance(text, str):
            raise ValueError(f"the 'text' of document {number} is {text!r}, not a string")
        yield text


# --- text: files of one's own ---------------------------------------------------------------------


def read_txt(path):
    yield path.read_bytes().decode('utf-8-sig')


def read_jsonl(path):
    with open(path, 'rb') as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)['text']
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"line {number} is no JSON object with a 'text'") from None
            yield text


def read_parquet(path):
    from pyarrow.parquet import ParquetFile
    for rows in ParquetFile(path).iter_batches(batch_size=64, columns=['text']):
        yield from rows['text'].to_pylist()


READERS = {'.txt': read_txt, '.jsonl': read_jsonl, '.parquet': read_parquet}


def reader_of(path):
    return READERS.get(path.suffix.lower())


def read_files(files):
    """The texts in files."""
    for path in files:
        with explained(path, 'correct it, download it again, or leave it out'):
            yield from strings(reader_of(path)(path))


def input_files(key, told):
    """Files named by a comma-separated list of files and folders, each folder's sorted by path.

    key: the setting that names them. How many others there are goes to stderr.
    """
    files = []
    others = collections.Counter()
    for entry in map(str.strip, told.split(',')):
        path = pathlib.Path(os.path.expanduser(entry))
        inside = sorted(path.rglob('*')) if entry and path.is_dir() else [path]
        usable = [f for f in inside if reader_of(f) and f.is_file()]
        if not usable:
            raise Refused(f"{key}={told!r}: {entry!r} is no file of {', '.join(READERS)} and no "
                          f'folder with one; name such, e.g. --{key}=books/,more.jsonl')
        files += usable
        # Linked, unreadable and empty folders are the parents of nothing, and named.
        unread = set(inside) - set(usable) - {f.parent for f in inside}
        others.update(f.suffix or f.name for f in unread)
    if others:
        kinds = ', '.join(f'{count} {kind}' for kind, count in sorted(others.items()))
        print(f"{key}: not read: {kinds} (only {', '.join(READERS)})", file=sys.stderr)
    return files


def sizes(files):
    return [[str(f), f.stat().st_size] for f in files]


def read_text(settings):
    files = input_files('input', settings.input)
    val_files = input_files('val_input', settings.val_input) if settings.val_input else []
    origin = sizes(files) + [[*entry, 'val'] for entry in sizes(val_files)]
    return origin, text_documents(files, val_files, settings.val_fraction)


def text_documents(files, val_files, val_fraction):
    """Validation comes first, so that max_tokens leaves it whole."""
    for text in read_files(val_files):
        yield text, 1.0
    enough = math.ceil(min(2 / val_fraction, 1e9))
    lengths = [len(text) for text in itertools.islice(read_files(files), enough)]
    if val_files or len(lengths) == enough:
        yield from ((text, 0.0 if val_files else val_fraction) for text in read_files(files))
        return
    # Chosen by hash, a split of few documents might stay empty.
    for chance in (1.0, 0.0):
        left = int(sum(lengths) * (1 - val_fraction))  # characters before validation begins
        for text in read_files(files):
            cut = min(left, len(text))
            left -= cut
            if piece := text[cut:] if chance else text[:cut]:
                yield piece, chance


# --- stdlib: documentation that every CPython carries ---------------------------------------------


def docstrings_of(node):
    """Docstrings in a syntax tree, in the order of the source."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        if text := ast.get_docstring(node):
            yield text
    for child in ast.iter_child_nodes(node):
        # Expressions are not visited: they hold none and cost most.
        if isinstance(child, (ast.stmt, ast.ExceptHandler)):
            yield from docstrings_of(child)


def module_files():
    """The standard library's modules, sorted folder by folder."""
    left_out = {'test', 'tests', 'idlelib', 'idle_test', 'lib2to3', 'pydoc_data', 'site-packages',
                'dist-packages', '__pycache__'}
    for folder, folders, files in os.walk(sysconfig.get_path('stdlib')):
        folders[:] = sorted(set(folders) - left_out)
        for name in sorted(files):
            if name.endswith('.py'):
                yield pathlib.Path(folder, name)


def read_stdlib(settings):
    documents = ((text, settings.val_fraction) for text in stdlib_texts())
    return f'CPython {platform.python_version()}', documents


def stdlib_texts():
    """The language reference's topics, then each module's docstrings."""
    from pydoc_data.topics import topics
    texts = [topics[key] for key in sorted(topics)]
    for path in module_files():
        # Escapes in other people's strings are warned of; some distributions add templates that
        # are not Python.
        with warnings.catch_warnings(action='ignore'), contextlib.suppress(SyntaxError):
            tree = ast.parse(path.read_bytes())
            texts.append('\n\n'.join(docstrings_of(tree)))
    yield from filter(None, texts)


# --- fineweb_edu: sets of the Hugging Face hub ----------------------------------------------------

USUAL_SUBSET = 'sample-10BT'  # of FineWeb-Edu


def subset_files(settings):
    """The training files of a set's local copy, by its card if it has one, else by their names.

    load_dataset wants all subsets that a card names to be there.
    """
    source = settings.source
    with explained(source, 'name another --subset, or files: prepare.py text --input=FILES'):
        from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
        from huggingface_hub import DatasetCard
        card = pathlib.Path(source, 'README.md')
        content = DatasetCard.load(card).data.to_dict() if card.is_file() else {}
        subsets = {told['config_name']: told for told in content.get('configs', [])}
        subsets = subsets or {'default': {}}
        usual = [name for name, told in subsets.items()
                 if name == USUAL_SUBSET or told.get('default') or len(subsets) == 1]
        subset = settings.subset or (usual or ['default'])[0]
        if subset not in subsets:
            raise ValueError(f"subset='{settings.subset}' is not one of {', '.join(subsets)}")
        told = subsets[subset]
        folder = os.path.join(source, told.get('data_dir', ''))
        patterns = sanitize_patterns(told.get('data_files') or get_data_patterns(folder))
        found = DataFilesDict.from_patterns(patterns, base_path=folder).get('train', [])
        files = [path for path in map(pathlib.Path, found) if reader_of(path)]
        if not files:
            raise ValueError(f"no {', '.join(READERS)} for training in its subset '{subset}'")
    return files


def streamed(settings):
    """The training texts of a set on the hub."""
    usual = USUAL_SUBSET if settings.source.endswith('/fineweb-edu') else None
    fix = ('check the network and run the same command again, which continues where it stopped; or '
           'download Parquet files and give --source=FOLDER')
    with explained(settings.source, fix):
        from datasets import load_dataset
        rows = load_dataset(settings.source, settings.subset or usual, split='train',
                            streaming=True)
        yield from strings(row['text'] for row in rows.select_columns(['text']))


def read_hub(settings):
    origin = f'{settings.source} {settings.subset}'.strip()
    texts = streamed(settings)
    if os.path.isdir(settings.source):
        files = subset_files(settings)
        origin = sizes(files)
        texts = read_files(files)
    return origin, ((text, settings.val_fraction) for text in texts)


# --- all of them ----------------------------------------------------------------------------------

SOURCES = {
    'fineweb_edu': Source(
        'FineWeb-Edu, sample-10BT, or another --source of the Hugging Face hub', read_hub),
    'text': Source('files of your own, named by --input=FILES', read_text),
    'stdlib': Source(
        'documentation of your own Python, without network;', read_stdlib,
        # Of few documents 0.5% would be too little to evaluate on.
        defaults=('--tokenizer=bytes', '--val_fraction=0.05')),
}
