"""Sources of text: generators of one document after the other, from files, from CPython, from Hugging Face."""
import ast
import contextlib
import itertools
import json
import os
import pathlib
import sysconfig
import warnings

from settings import Refused



def input_files(told):
    """Files named by a comma-separated list of files and folders, each folder's sorted by path."""
    files = []
    for entry in filter(None, (e.strip() for e in told.split(','))):
        path = pathlib.Path(entry)
        if not path.exists():
            raise Refused(f'input: {entry} does not exist')
        inside = sorted(f for f in path.rglob('*') if f.suffix in ('.txt', '.jsonl', '.parquet')) if path.is_dir() else [path]
        if not inside:
            raise Refused(f'input: folder {entry} holds no .txt, .jsonl or .parquet file')
        if inside[0].suffix not in ('.txt', '.jsonl', '.parquet'):
            raise Refused(f'input: {entry} is none of .txt, .jsonl, .parquet')
        files += inside
    if not files:
        raise Refused(f'input={told!r}: name the files or folders to read, e.g. --input=books/,more.jsonl')
    return files


def parquet_file(path):
    """A pyarrow ParquetFile that has a text column."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Refused(f'{path}: Parquet files need pyarrow, which is not installed; run: pip install pyarrow') from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise Refused(f'{path}: not a readable Parquet file ({error}); download it again') from None
    columns = table.schema_arrow
    if 'text' not in columns.names or not str(columns.field('text').type).endswith('string'):
        raise Refused(f"{path}: has no 'text' column of strings, only {', '.join(columns.names)}; "
                      'rename the column that holds it')
    return table


def text_bytes(path):
    """Bytes of text in a file, estimated without reading it."""
    if path.suffix != '.parquet':
        return path.stat().st_size
    table = parquet_file(path)
    column = table.schema_arrow.get_field_index('text')
    groups = range(table.metadata.num_row_groups)
    return sum(table.metadata.row_group(g).column(column).total_uncompressed_size for g in groups)


def read_parquet(path):
    row = 0
    try:
        for rows in parquet_file(path).iter_batches(batch_size=64, columns=['text']):
            for text in rows.column(0).to_pylist():
                if text is None:
                    raise Refused(f"{path}: row {row}: 'text' is null; remove the row")
                yield text
                row += 1
    except OSError as error:
        raise Refused(f'{path}: damaged after row {row} ({error}); download it again') from None


def read_jsonl(path):
    with open(path, 'rb') as f:
        for number, line in enumerate(f, 1):
            try:
                record = json.loads(line) if line.strip() else {'text': None}
            except ValueError as error:
                raise Refused(f'{path}: line {number}: not JSON ({error}); correct or remove it') from None
            if not line.strip():
                continue
            if not isinstance(record, dict) or not isinstance(record.get('text'), str):
                raise Refused(f"{path}: line {number}: no 'text' string in it; correct or remove it")
            yield record['text']


def read_files(files):
    for path in files:
        if path.suffix == '.txt':
            try:
                yield path.read_bytes().decode()
            except UnicodeDecodeError as error:
                raise Refused(f'{path}: not UTF-8 at byte {error.start}; convert it, e.g. with iconv') from None
        else:
            yield from read_jsonl(path) if path.suffix == '.jsonl' else read_parquet(path)


def docstrings_of(node):
    """Docstrings in a syntax tree, in the order of the source. Expressions are not visited: they hold none and cost most."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
        yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.ExceptHandler)):
            yield from docstrings_of(child)


def stdlib_documents():
    """Documentation that every CPython carries: the language reference's topics, then each module's docstrings."""
    from pydoc_data.topics import topics
    yield from (topics[key] for key in sorted(topics))
    root = pathlib.Path(sysconfig.get_path('stdlib'))
    left_out = {'test', 'tests', 'idlelib', 'idle_test', 'lib2to3', 'pydoc_data', 'site-packages', 'dist-packages', '__pycache__'}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - left_out)
        for path in (os.path.join(folder, f) for f in sorted(files) if f.endswith('.py')):
            with warnings.catch_warnings():  # about escapes in other people's strings
                warnings.simplefilter('ignore')
                try:
                    tree = ast.parse(pathlib.Path(path).read_bytes())
                except SyntaxError:  # some distributions add templates that are not Python
                    continue
            if text := '\n\n'.join(docstrings_of(tree)):
                yield text


def hugging_face(source):
    """datasets' stream of FineWeb-Edu or of a local folder of Parquet files."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise Refused('fineweb_edu needs datasets, which is not installed; run: pip install datasets') from None
    config = {} if os.path.isdir(source) else {'name': 'sample-10BT'}
    with explained(source):
        return load_dataset(source, split='train', streaming=True, **config).select_columns(['text'])


@contextlib.contextmanager
def explained(source):
    """Whatever goes wrong between here and the Hub, as one line. Its libraries raise exceptions of many kinds."""
    try:
        yield
    except Exception as error:
        reason = ' '.join(str(error).split())[:200]
        fix = ('check the network and run the same command again, which continues where it stopped; or download Parquet files '
               'and use: python prepare.py text --name=fineweb_edu --input=FOLDER')
        raise Refused(f'{source}: cannot be read ({type(error).__name__}: {reason}); '
                      + ('check the Parquet files in it' if os.path.isdir(source) else fix)) from None


def open_source(name, s, documents, state):
    """(generator of texts after the first `documents`, function that gives the state to continue from)."""
    if name == 'fineweb_edu':
        stream = hugging_face(s.source)
        if state:
            stream.load_state_dict(state)  # skips whole files without fetching them

        def texts():
            with explained(s.source):
                for row in stream:
                    yield row['text']
        return texts(), stream.state_dict
    texts = stdlib_documents() if name == 'stdlib' else read_files(input_files(s.input))
    return itertools.islice(texts, documents, None), lambda: None
