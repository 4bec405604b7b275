"""Sources of text: files, CPython's own documentation, Hugging Face. SOURCES lists them.

A source is one entry of that table; the commands, help and checks of prepare.py derive from it.
"""
import ast
import contextlib
import json
import os
import pathlib
import platform
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from support.settings import Refused


@dataclass(frozen=True)
class Source:
    """What prepare.py knows of a source of text. Its functions take prepare.py's settings.

    open(settings, state) returns the documents and a function that returns the state (for JSON) to
    continue from after the document last taken. A document is (text, chance): it is validation
    with this chance, by a hash of its text.
    """
    about: str
    open: Callable
    text_bytes: Callable  # (settings) -> bytes of text, an estimate
    origin: Callable  # (settings) -> what the documents depend on, for JSON
    uses: tuple = ()  # settings that sources which do not list them refuse
    starts_from: tuple = ()  # arguments that go before those of the command line


def without_state(documents):
    """Source.open of documents(settings), which always begin with the first."""
    return lambda settings, state: (documents(settings), lambda: None)


@contextlib.contextmanager
def explained(what, fix):
    """Whatever goes wrong in reading, in one line: the libraries raise many kinds of errors."""
    try:
        yield
    except Exception as error:
        reason = ' '.join(str(error).split())[:200]
        raise Refused(f'{what}: cannot be read ({type(error).__name__}: {reason}); '
                      f'{fix}') from None


# --- text: files of one's own ---------------------------------------------------------------------


def read_txt(path):
    yield path.read_bytes().decode()


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


def parquet_file(path):
    from pyarrow.parquet import ParquetFile
    return ParquetFile(path)


def read_parquet(path):
    for rows in parquet_file(path).iter_batches(batch_size=64, columns=['text']):
        yield from rows['text'].to_pylist()


READERS = {'.txt': read_txt, '.jsonl': read_jsonl, '.parquet': read_parquet}
FILE_FIX = 'correct it, download it again, or leave it out'


def read_files(files):
    """The texts in files."""
    for path in files:
        with explained(path, FILE_FIX):
            for number, text in enumerate(READERS[path.suffix](path), 1):
                if not isinstance(text, str):
                    raise ValueError(f"the 'text' of document {number} is {text!r}, not a string")
                yield text


def files_bytes(files):
    """Bytes of text in files, estimated without reading them; in Parquet, all columns count."""
    total = 0
    for path in files:
        if path.suffix != '.parquet':
            total += path.stat().st_size
            continue
        with explained(path, FILE_FIX):
            metadata = parquet_file(path).metadata
        groups = map(metadata.row_group, range(metadata.num_row_groups))
        total += sum(group.total_byte_size for group in groups)
    return total


def input_files(key, told):
    """Files named by a comma-separated list of files and folders, each folder's sorted by path.

    key: the setting that names them.
    """
    files = []
    for entry in map(str.strip, told.split(',')):
        path = pathlib.Path(entry)
        inside = sorted(path.rglob('*')) if entry and path.is_dir() else [path]
        usable = [f for f in inside if f.suffix in READERS and f.is_file()]
        if not usable:
            raise Refused(f"{key}={told!r}: {entry!r} is no file of {', '.join(READERS)} and no "
                          f'folder with one; name such, e.g. --{key}=books/,more.jsonl')
        files += usable
    return files


def training_files(settings):
    return input_files('input', settings.input)


def validation_files(settings):
    """Files of a validation text of one's own; without them the other files are split."""
    return input_files('val_input', settings.val_input) if settings.val_input else []


def text_documents(settings):
    """Validation comes first, so that max_tokens leaves it whole."""
    validation = validation_files(settings)
    for text in read_files(validation):
        yield text, 1.0
    chance = 0.0 if validation else settings.val_fraction
    for text in read_files(training_files(settings)):
        yield text, chance


def text_origin(settings):
    origin = [[str(f), f.stat().st_size] for f in training_files(settings)]
    return origin + [[str(f), f.stat().st_size, 'val'] for f in validation_files(settings)]


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


def stdlib_documents(settings):
    """The language reference's topics, then each module's docstrings."""
    from pydoc_data.topics import topics
    texts = [topics[key] for key in sorted(topics)]
    for path in module_files():
        # Escapes in other people's strings are warned of; some distributions add templates that
        # are not Python.
        with warnings.catch_warnings(action='ignore'), contextlib.suppress(SyntaxError):
            tree = ast.parse(path.read_bytes())
            texts.append('\n\n'.join(docstrings_of(tree)))
    for text in filter(None, texts):
        yield text, settings.val_fraction


# --- fineweb_edu: Hugging Face --------------------------------------------------------------------


def open_hugging_face(settings, state):
    """Source.open; the library's own state skips whole files without fetching them."""
    source = settings.source
    config = None if os.path.isdir(source) else 'sample-10BT'
    fix = ('check the network and run the same command again, which continues where it stopped; or '
           'download Parquet files and use: python prepare.py text --name=fineweb_edu '
           '--input=FOLDER')
    with explained(source, fix):
        from datasets import load_dataset
        stream = load_dataset(source, config, split='train', streaming=True)
        stream = stream.select_columns(['text'])
        if state:
            stream.load_state_dict(state)

    def documents():
        with explained(source, fix):
            for row in stream:
                yield row['text'], settings.val_fraction
    return documents(), stream.state_dict


def hugging_face_bytes(settings):
    if os.path.isdir(settings.source):
        return files_bytes(pathlib.Path(settings.source).rglob('*.parquet'))
    return 46e9  # of sample-10BT: 10e9 GPT-2 tokens by its data card, at 4.6 bytes each


# --- all of them ----------------------------------------------------------------------------------

SOURCES = {
    'fineweb_edu': Source(
        about='FineWeb-Edu, sample-10BT, streamed from Hugging Face',
        open=open_hugging_face,
        text_bytes=hugging_face_bytes,
        origin=lambda settings: settings.source,
        uses=('source',),
    ),
    'text': Source(
        about='files of your own, named by --input=FILES',
        open=without_state(text_documents),
        text_bytes=lambda s: files_bytes(training_files(s) + validation_files(s)),
        origin=text_origin,
        uses=('input', 'val_input'),
    ),
    'stdlib': Source(
        about='documentation of your own Python: small, in bytes, needs no network',
        open=without_state(stdlib_documents),
        text_bytes=lambda settings: 2.1e6,  # of CPython 3.11
        origin=lambda settings: f'CPython {platform.python_version()}',
        # Of few documents 0.5% would be too little to evaluate on.
        starts_from=('--tokenizer=bytes', '--val_fraction=0.05'),
    ),
}
