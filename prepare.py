"""Text in, token shards out.

python prepare.py SOURCE [--key=value ...] writes data/<name>/: train_000000.bin, ...,
val_000000.bin, ... and, last, meta.json. It may be killed at any time; the same command continues.

The sources of text are in support/sources.py; the format of the shards, their reader and the
tokenizers are in support/shards.py.
"""
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import os
import pathlib
import re
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from support import shards
from support.files import read_json, write_json
from support.settings import Refused, changed, help_text, parse, run_command
from support.sources import SOURCES

CHUNK_CHARACTERS = 1 << 20  # that a thread gets at a time: much beside the cost of handing over
JOURNAL_SECONDS = 60  # at most this much work is lost to a kill, unless one document takes longer
WINDOW_TOKENS = 1025  # what one row of GPT-2's context reads, targets included
BYTES_PER_TOKEN = {'gpt2': 4.5, 'bytes': 1.0}  # about, of English


@dataclass
class PrepareSettings:
    # --- what -------------------------------------------------------------------------------------
    name: str = ''  # of the data set, which a config's `dataset` must match; empty: the source's
    input: str = ''  # files or folders of .txt, .jsonl, .parquet, comma-separated
    val_input: str = ''  # the same, for validation; empty: val_fraction of the documents of input
    source: str = 'HuggingFaceFW/fineweb-edu'  # Hugging Face data set, or folder of Parquet files
    max_tokens: int = 0  # stop after the document that reaches it, both splits together; 0: all
    tokenizer: Literal[*shards.VOCABULARY] = 'gpt2'  # GPT-2's 50257 or 257 for bytes of UTF-8
    val_fraction: float = 0.005  # of the documents, chosen by hash of the text, for validation
    # --- where and how ----------------------------------------------------------------------------
    data_dir: str = ''  # folder of the shards; empty: data/<name>
    shard_tokens: int = 100_000_000  # tokens a shard, 2 bytes each (llm.c's size)


def check(name, settings):
    """Problems of the settings, and of settings that the source called `name` does not use."""
    problems = []
    if settings.max_tokens < 0:
        problems.append(f'max_tokens={settings.max_tokens}: must be at least 0')
    if not 0 < settings.shard_tokens < 2**31:
        problems.append(f'shard_tokens={settings.shard_tokens}: must be at least 1 and below 2^31, '
                        'because the header counts in int32')
    if not 0 < settings.val_fraction < 1:
        problems.append(f'val_fraction={settings.val_fraction}: must be above 0 and below 1')
    if not re.fullmatch(r'(\w[\w.-]*)?', settings.name):
        problems.append(f'name={settings.name!r}: use letters, digits, _ . - only, because it '
                        'names a folder')
    typed = changed(settings)
    of_some = set().union(*(source.uses for source in SOURCES.values()))
    for key in sorted(of_some - set(SOURCES[name].uses)):
        if key in typed:
            problems.append(f'{key}={typed[key]!r}: {name} does not use it; leave it out')
    if settings.val_input and 'val_fraction' in typed:
        problems.append(f'val_fraction={settings.val_fraction}: all of val_input is validation; '
                        'leave out one of the two')
    return problems


# --- tokenising, in several threads ---------------------------------------------------------------


class Encoded(NamedTuple):
    """A chunk of D documents, N tokens together. Each document ends with <|endoftext|>."""
    tokens: np.ndarray  # (N,) uint16
    lengths: np.ndarray  # (D,) tokens of each document
    in_val: np.ndarray  # (D,) bool
    state: Any  # of the source after them


def encode_chunk(documents, state, tokenizer):
    """Encoded of a list of documents; a document is (text, chance of being validation)."""
    pieces = []
    lengths = []
    in_val = []
    for text, chance in documents:
        raw = text.encode(errors='replace')  # half a surrogate pair, which JSON can hold, is a ?
        tokens = tokenizer.encode_array(raw.decode())
        number = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), 'big')
        pieces += [tokens, np.array([tokenizer.eot], np.uint16)]
        lengths.append(len(tokens) + 1)
        in_val.append(number < chance * 2**64)
    return Encoded(np.concatenate(pieces), np.array(lengths), np.array(in_val), state)


def chunks_of(documents, state):
    """(list of documents, state after them): about CHUNK_CHARACTERS, or one longer document."""
    chunk = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document[0])
        if size >= CHUNK_CHARACTERS:
            yield chunk, state()
            chunk = []
            size = 0
    if chunk:
        yield chunk, state()


def encoded(chunks, tokenizer):
    """Encoded of each chunk, in order, with at most 2 chunks a core in memory.

    Threads are enough, because tiktoken tokenises without holding Python's lock.
    """
    threads = os.cpu_count() or 1
    waiting = deque()
    with ThreadPoolExecutor(threads) as pool:
        for documents, state in chunks:
            waiting.append(pool.submit(encode_chunk, documents, state, tokenizer))
            if len(waiting) == 2 * threads:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


# --- writing shards -------------------------------------------------------------------------------


class SplitWriter:
    """Writes split_000000.bin, split_000001.bin, ... in a folder.

    tokens: how many they hold by the journal. What a killed run wrote after them is overwritten.
    """

    def __init__(self, folder, split, shard_tokens, tokens):
        self.folder = pathlib.Path(folder)
        self.split = split
        self.shard_tokens = shard_tokens
        self.tokens = tokens
        self.unsynced = set()  # paths
        for path in self.folder.glob(f'{split}_{"[0-9]" * 6}.bin'):
            if int(path.stem[-6:]) * shard_tokens >= tokens:
                path.unlink()
        path, filled = self.end()
        if filled and path.stat().st_size < shards.HEADER_BYTES + 2 * filled:
            raise Refused(f'{path}: shorter than journal.json says; delete the folder {folder} and '
                          'start again')

    def end(self):
        """(path of the shard that the next token goes to, tokens it holds)."""
        index, filled = divmod(self.tokens, self.shard_tokens)
        return self.folder / f'{self.split}_{index:06d}.bin', filled

    def append(self, tokens):
        while len(tokens):
            path, filled = self.end()
            piece = tokens[:self.shard_tokens - filled]
            with open(path, 'r+b' if filled else 'wb') as f:
                f.write(shards.header(filled + len(piece)))
                f.seek(2 * filled, os.SEEK_CUR)
                f.write(piece.astype('<u2').tobytes())
                f.truncate()
            self.unsynced.add(path)
            self.tokens += len(piece)
            tokens = tokens[len(piece):]

    def sync(self):
        """Wait until all tokens are on the disk."""
        for path in self.unsynced:
            with open(path, 'rb') as f:
                os.fsync(f.fileno())
        self.unsynced.clear()


# --- what a folder holds, and what is missing -----------------------------------------------------


@dataclass
class Journal:
    """journal.json: how far the folder is, enough to continue."""
    arguments: dict  # what the shards depend on
    cut: int | None = None  # tokens from this position on are validation, whatever the hash says
    documents: int = 0
    train_tokens: int = 0
    val_tokens: int = 0
    state: Any = None  # of the source

    @property
    def tokens(self):
        return self.train_tokens + self.val_tokens

    def write(self, folder):
        write_json(os.path.join(folder, 'journal.json'), dataclasses.asdict(self))


def arguments_of(name, settings):
    """What the tokens depend on: only a command that would write the same continues a folder."""
    keys = ('name', 'tokenizer', 'val_fraction', 'shard_tokens', 'max_tokens')
    given = {key: getattr(settings, key) for key in keys}
    return {'prepare': name, 'source': SOURCES[name].origin(settings), **given}


def find_journal(folder, arguments):
    """The journal to continue from, a new one for a new folder, None if all is done.

    Refused if the folder holds anything that this command would not have written.
    """
    meta = shards.read_meta(folder)
    done = meta or read_json(os.path.join(folder, 'journal.json'))
    found = sorted(f for f in os.listdir(folder) if f.endswith('.bin'))
    if done is None and found:
        raise Refused(f'{folder} holds {found[0]}, which was not prepared here; give another '
                      '--data_dir, or move it away')
    if done is None or done['documents'] == 0:
        return Journal(arguments)  # nothing is lost
    told = done.get('arguments', {})
    for key, value in arguments.items():
        if told.get(key) != value:
            raise Refused(f'{folder} was prepared with {key}={repr(told.get(key)):.100}, not '
                          f'{repr(value):.100}; give the same, another --data_dir, or delete the '
                          'folder')
    return None if meta else Journal(**done)


@contextlib.contextmanager
def locked(folder):
    """Keep a second process from writing to the folder. The lock ends with the process."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Refused(f'{folder}: another process is preparing data there; wait for it, or give '
                      'another --data_dir') from None
    finally:
        os.close(lock)


# --- preparing a data set -------------------------------------------------------------------------


def announce(name, settings, journal):
    """Say what it will take; returns the tokens to expect. Refused if the disk is too small."""
    folder = settings.data_dir
    tokens = int(SOURCES[name].text_bytes(settings) / BYTES_PER_TOKEN[settings.tokenizer])
    tokens = min(tokens, settings.max_tokens or tokens)
    print(f'{name} -> {folder}: about {tokens / 1e6:,.1f}M tokens, {2 * tokens / 1e6:,.0f} MB of '
          'disk', flush=True)
    free = shutil.disk_usage(folder).free
    if journal.documents:
        print(f'continuing after {journal.documents:,} documents', flush=True)
    elif 2 * tokens > free:
        raise Refused(f'{folder}: about {2 * tokens:,} bytes needed, {free:,} free; free some, '
                      'give a --data_dir on a larger disk, or set --max_tokens')
    return tokens


def write_tokens(name, settings, journal, expected):
    """Tokenise what the journal says is missing, write all shards, keep the journal up to date.

    expected: how many tokens there will be, about, for the progress bar.
    """
    folder = settings.data_dir
    tokenizer = shards.get_tokenizer(settings.tokenizer)
    journal.write(folder)
    train = SplitWriter(folder, 'train', settings.shard_tokens, journal.train_tokens)
    val = SplitWriter(folder, 'val', settings.shard_tokens, journal.val_tokens)
    limit = settings.max_tokens or sys.maxsize
    documents, state = SOURCES[name].open(settings, journal.state)
    if journal.state is None:
        documents = itertools.islice(documents, journal.documents, None)
    saved = time.monotonic()
    seconds = 0.5 if sys.stderr.isatty() else 30
    with tqdm(total=expected, initial=journal.tokens, unit=' tokens', unit_scale=True,
              delay=seconds, mininterval=seconds, maxinterval=seconds) as bar:
        for chunk in encoded(chunks_of(documents, state), tokenizer):
            if journal.tokens >= limit:
                break
            ends = journal.tokens + np.cumsum(chunk.lengths)
            enough = np.searchsorted(ends, limit) + 1  # documents to reach it, if not more
            lengths = chunk.lengths[:enough]
            in_val = np.repeat(chunk.in_val[:enough], lengths)  # (tokens,)
            tokens = chunk.tokens[:len(in_val)]
            if journal.cut is not None:
                in_val = journal.tokens + np.arange(len(tokens)) >= journal.cut
            val.append(tokens[in_val])
            train.append(tokens[~in_val])
            journal.documents += len(lengths)
            journal.train_tokens = train.tokens
            journal.val_tokens = val.tokens
            journal.state = chunk.state
            if time.monotonic() - saved > JOURNAL_SECONDS:
                train.sync()
                val.sync()
                journal.write(folder)
                saved = time.monotonic()
            bar.update(len(tokens))
    train.sync()
    val.sync()


def cut_by_position(settings, journal):
    """A journal to start again from, by which the end of the text becomes validation.

    At least one window does if there is text enough. Refused if there is too little.
    """
    if settings.val_input or journal.tokens < 4:
        raise Refused(f'{settings.name}: {journal.train_tokens} training and {journal.val_tokens} '
                      'validation tokens, too few to learn from; give more text or a larger '
                      '--max_tokens')
    of_val = max(int(settings.val_fraction * journal.tokens),
                 min(WINDOW_TOKENS, journal.tokens // 2))
    print(f'val_fraction={settings.val_fraction}, by hash, leaves a split empty (documents: '
          f'{journal.documents}): the last {of_val:,} tokens become validation', flush=True)
    return Journal(journal.arguments, cut=journal.tokens - of_val)


def write_meta(settings, journal):
    """Describe the finished shards in meta.json, whose presence says that they are finished."""
    train, val = shards.open_splits(settings.data_dir, settings.tokenizer)
    write_json(os.path.join(settings.data_dir, 'meta.json'), {
        'name': settings.name,
        'tokenizer': settings.tokenizer,
        'vocab_size': shards.VOCABULARY[settings.tokenizer],
        'train_tokens': train.tokens,
        'val_tokens': val.tokens,
        'documents': journal.documents,
        'fingerprint': shards.fingerprint_of(train, val),
        'arguments': journal.arguments,
    })


def prepare(name, settings):
    """Make the data set that the source called `name` and the settings describe.

    What is there already stays. Returns whether anything was missing.
    """
    folder = settings.data_dir
    arguments = arguments_of(name, settings)
    os.makedirs(folder, exist_ok=True)
    with locked(folder):
        journal = find_journal(folder, arguments)
        if journal:
            expected = announce(name, settings, journal)
            write_tokens(name, settings, journal, expected)
            if min(journal.train_tokens, journal.val_tokens) < 2:  # an input and a target
                journal = cut_by_position(settings, journal)
                write_tokens(name, settings, journal, expected)
            write_meta(settings, journal)
        pathlib.Path(folder, 'journal.json').unlink(missing_ok=True)
    return bool(journal)


def usage():
    lines = ['python prepare.py SOURCE [--key=value ...], where SOURCE is one of:', '']
    for name, source in SOURCES.items():
        lines.append(f'  {name}: {source.about}')
        if source.starts_from:
            lines.append(f"    starts from {' '.join(source.starts_from)}")
        if source.uses:
            lines.append(f"    its own settings: {' '.join(source.uses)}")
    return '\n'.join(lines)


def main(argv):
    """Exit code: 0 done, 130 interrupted."""
    name = argv[0] if argv else ''
    if {'-h', '--help'} & set(argv):
        print(help_text(PrepareSettings, usage()))
        return 0
    if name not in SOURCES:
        raise Refused(f"unknown source '{name}'; say one of {', '.join(SOURCES)}")
    told = [*SOURCES[name].starts_from, *argv[1:]]
    settings, problems, _ = parse(PrepareSettings, told, config_files=False)
    if problems := problems + check(name, settings):
        raise Refused(problems)
    settings.name = settings.name or name
    settings.data_dir = settings.data_dir or os.path.join('data', settings.name)
    try:
        missing = prepare(name, settings)
    except KeyboardInterrupt:
        print('\ninterrupted; the same command continues', file=sys.stderr)
        return 130
    except OSError as error:  # most likely a full disk, or no right to write there
        raise Refused(f'{settings.data_dir}: {error}; correct that and run the same command again, '
                      'which continues, or give another --data_dir') from None
    data = shards.open_data(settings.data_dir, settings.name)
    print(f'{settings.data_dir}: {data.train.tokens:,} training and {data.val.tokens:,} validation '
          f'tokens, fingerprint {data.fingerprint}'
          + ('' if missing else '; already prepared, nothing to do'))
    return 0


if __name__ == '__main__':
    run_command(main)
