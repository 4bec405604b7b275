"""Sources of text: files, CPython's own documentation, Hugging Face. SOURCES lists them.

A source is one entry of that table; the commands, help and checks of prepare.py derive from it.
"""
import ast
import contextlib
import itertools
import json
import os
import pathlib
import platform
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from support.settings import Refused

FINEWEB_BYTES = 46e9  # of sample-10BT: 10e9 GPT-2 tokens by its data card, at 4.6 bytes each
STDLIB_BYTES = 2.1e6  # of CPython 3.11


@dataclass(frozen=True)
class Source:
    """What prepare.py knows of a source of text. Its functions take prepare.py's settings.

    open(settings, documents, state) returns the documents after the first `documents`, and a
    function that returns the state (for JSON) to continue from after the document last taken. A
    document is (text, chance): it is validation with this chance, by a hash of its text; 0 is
    training, 1 is validation. `read_again` makes an `open` of a function that yields texts.
    """
    about: str
    open: Callable
    text_bytes: Callable  # (settings) -> bytes of text, an estimate
    origin: Callable  # (settings) -> what the documents depend on, for JSON
    uses: tuple = ()  # settings that sources which do not list them refuse
    needs: tuple = ()  # what its command line cannot do without
    starts_from: tuple = ()  # arguments that go before those of the command line


def read_again(texts):
    """Source.open for texts(settings): continuing reads what is done again, and drops it."""
    def open_texts(settings, documents, state):
        read = ((text, settings.val_fraction) for text in texts(settings))
        return itertools.islice(read, documents, None), lambda: None
    return open_texts


# --- files ----------------------------------------------------------------------------------------


def read_txt(path):
    try:
        yield path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise Refused(f'{path}: not UTF-8 at byte {error.start}; convert it, e.g. with '
                      'iconv') from None


def read_jsonl(path):
    with open(path, 'rb') as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise Refused(f'{path}: line {number}: not JSON ({error}); correct or remove '
                              'it') from None
            if not isinstance(record, dict) or not isinstance(record.get('text'), str):
                raise Refused(f"{path}: line {number}: no 'text' string in it; correct or remove "
                              'it')
            yield record['text']


def parquet_file(path):
    """A pyarrow ParquetFile that has a text column."""
    try:
        from pyarrow.parquet import ParquetFile
        table = ParquetFile(path)
    except (ImportError, OSError, ValueError) as error:  # pyarrow's own are some of these
        raise Refused(f'{path}: cannot be read as Parquet ({error}); download it again, or '
                      'pip install pyarrow') from None
    columns = table.schema_arrow
    if 'text' not in columns.names or not str(columns.field('text').type).endswith('string'):
        raise Refused(f"{path}: has no 'text' column of strings, only {', '.join(columns.names)}; "
                      'rename the column that holds it')
    return table


def read_parquet(path):
    row = 0
    for rows in parquet_file(path).iter_batches(batch_size=64, columns=['text']):
        for text in rows.column(0).to_pylist():
            if text is None:
                raise Refused(f"{path}: row {row}: 'text' is null; remove the row")
            yield text
            row += 1


READERS = {'.txt': read_txt, '.jsonl': read_jsonl, '.parquet': read_parquet}


def read_files(files):
    for path in files:
        try:
            yield from READERS[path.suffix](path)
        except OSError as error:
            raise Refused(f'{path}: cannot be read ({error}); check the file, or download it '
                          'again') from None


def input_files(key, told):
    """Files named by a comma-separated list of files and folders, each folder's sorted by path.

    key: the setting that names them.
    """
    kinds = ', '.join(READERS)
    files = []
    for entry in map(str.strip, told.split(',')):
        path = pathlib.Path(entry)
        inside = sorted(path.rglob('*')) if entry and path.is_dir() else [path]
        usable = [f for f in inside if f.suffix in READERS and f.is_file()]
        if not usable:
            raise Refused(f'{key}={told!r}: {entry!r} is no file of {kinds} and no folder with '
                          f'one; name such, e.g. --{key}=books/,more.jsonl')
        files += usable
    return files


def files_bytes(files):
    """Bytes of text in files, estimated without reading them."""
    total = 0
    for path in files:
        if path.suffix != '.parquet':
            total += path.stat().st_size
            continue
        table = parquet_file(path)
        column = table.schema_arrow.get_field_index('text')
        for group in range(table.metadata.num_row_groups):
            total += table.metadata.row_group(group).column(column).total_uncompressed_size
    return total


# --- text: files of one's own ---------------------------------------------------------------------


def training_files(settings):
    return input_files('input', settings.input)


def validation_files(settings):
    """Files of a validation text of one's own; without them the other files are split."""
    return input_files('val_input', settings.val_input) if settings.val_input else []


def open_text(settings, documents, state):
    """Source.open; validation comes first, so that max_tokens leaves it whole."""
    validation = validation_files(settings)
    chance = 0.0 if validation else settings.val_fraction
    of_validation = ((text, 1.0) for text in read_files(validation))
    others = ((text, chance) for text in read_files(training_files(settings)))
    both = itertools.chain(of_validation, others)
    return itertools.islice(both, documents, None), lambda: None


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


def stdlib_documents():
    """The language reference's topics, then each module's docstrings."""
    from pydoc_data.topics import topics
    for key in sorted(topics):
        yield topics[key]
    left_out = {'test', 'tests', 'idlelib', 'idle_test', 'lib2to3', 'pydoc_data', 'site-packages',
                'dist-packages', '__pycache__'}
    for folder, folders, files in os.walk(sysconfig.get_path('stdlib')):
        folders[:] = sorted(set(folders) - left_out)
        for name in sorted(files):
            if not name.endswith('.py'):
                continue
            with warnings.catch_warnings():  # about escapes in other people's strings
                warnings.simplefilter('ignore')
                try:
                    tree = ast.parse(pathlib.Path(folder, name).read_bytes())
                except SyntaxError:  # some distributions add templates that are not Python
                    continue
            if text := '\n\n'.join(docstrings_of(tree)):
                yield text


# --- fineweb_edu: Hugging Face --------------------------------------------------------------------


@contextlib.contextmanager
def explained(source):
    """Whatever goes wrong on the way to the Hub, in one line: its libraries raise many kinds."""
    try:
        yield
    except Exception as error:
        reason = ' '.join(str(error).split())[:200]
        raise Refused(f'{source}: cannot be read ({type(error).__name__}: {reason}); check the '
                      'network and run the same command again, which continues where it stopped; '
                      'or download Parquet files and use: python prepare.py text '
                      '--name=fineweb_edu --input=FOLDER') from None


def open_hugging_face(settings, documents, state):
    """Source.open; the library's own state skips whole files without fetching them."""
    source = settings.source
    config = None if os.path.isdir(source) else 'sample-10BT'
    with explained(source):
        from datasets import load_dataset
        stream = load_dataset(source, config, split='train', streaming=True)
        stream = stream.select_columns(['text'])
    if state:
        stream.load_state_dict(state)

    def texts():
        with explained(source):
            for row in stream:
                yield row['text'], settings.val_fraction
    return texts(), stream.state_dict


def hugging_face_bytes(settings):
    if os.path.isdir(settings.source):
        return files_bytes(pathlib.Path(settings.source).rglob('*.parquet'))
    return FINEWEB_BYTES


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
        about='files of your own',
        open=open_text,
        text_bytes=lambda s: files_bytes(training_files(s) + validation_files(s)),
        origin=text_origin,
        uses=('input', 'val_input'),
        needs=('--input=FILES',),
    ),
    'stdlib': Source(
        about='documentation of your own Python: small, in bytes, needs no network',
        open=read_again(lambda settings: stdlib_documents()),
        text_bytes=lambda settings: STDLIB_BYTES,
        origin=lambda settings: f'CPython {platform.python_version()}',
        # Of few documents 0.5% would be too little to evaluate on.
        starts_from=('--tokenizer=bytes', '--val_fraction=0.05'),
    ),
}
