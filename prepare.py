"""Text in, token shards out.

python prepare.py SOURCE [--key=value ...] writes data/<name>/: train_000000.bin, ...,
val_000000.bin, ... and, last, meta.json. It may be killed at any time; the same command continues.

The sources of text are in support/sources.py; the format of the shards, their reader and the
tokenizers are in support/shards.py.
"""
import contextlib
import dataclasses
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from support import shards
from support.files import read_json, write_json
from support.settings import Refused, changed, did_you_mean, help_text, parse, run_command
from support.sources import SOURCES

CHUNK_CHARACTERS = 1 << 20  # that a worker gets at a time: much beside the cost of handing over
JOURNAL_SECONDS = 60  # at most this much work is lost to a kill, unless one document takes longer
WINDOW_TOKENS = 1025  # what one row of GPT-2's context reads, targets included
BYTES_PER_TOKEN = {'gpt2': 4.0, 'bytes': 1.0}  # English has 4.6; low, so that the disk suffices


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
    processes: int = 0  # that tokenise; 0: one a core for gpt2, 1 for bytes, which need no more


def check(name, settings):
    """Problems of the settings, and of settings that the source called `name` does not use."""
    problems = []
    for key, least in (('max_tokens', 0), ('processes', 0), ('shard_tokens', 1)):
        if getattr(settings, key) < least:
            problems.append(f'{key}={getattr(settings, key)}: must be at least {least}')
    if settings.shard_tokens >= 2**31:
        problems.append(f'shard_tokens={settings.shard_tokens}: must be below 2^31, because the '
                        'header counts in int32')
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


# --- tokenising, in several processes -------------------------------------------------------------


class Encoded(NamedTuple):
    """A chunk of D documents, N tokens together. Each document ends with <|endoftext|>."""
    tokens: np.ndarray  # (N,) uint16
    lengths: np.ndarray  # (D,) tokens of each document
    in_val: np.ndarray  # (D,) bool
    text_bytes: int


def encode_chunk(documents, tokenizer):
    """Encoded of a list of documents; a document is (text, chance of being validation)."""
    pieces = []
    lengths = []
    in_val = []
    text_bytes = 0
    for text, chance in documents:
        try:
            raw = text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and UTF-8 cannot
            text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
            raw = text.encode()
        tokens = tokenizer.encode_array(text)
        number = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), 'big')
        pieces += [tokens, np.array([tokenizer.eot], np.uint16)]
        lengths.append(len(tokens) + 1)
        in_val.append(number < chance * 2**64)
        text_bytes += len(raw)
    return Encoded(np.concatenate(pieces), np.array(lengths), np.array(in_val), text_bytes)


worker_tokenizer = None  # in a worker; too large to send with every chunk


def start_worker(tokenizer):
    """Set up a worker, which must end with its parent: a killed parent cannot tell it to."""
    global worker_tokenizer
    worker_tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and decides

    def follow_parent():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=follow_parent, daemon=True).start()


def encode_in_worker(documents):
    return encode_chunk(documents, worker_tokenizer)


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


def encoded(chunks, tokenizer, processes):
    """(Encoded, state) of each chunk, in order, with at most 2 chunks a process in memory."""
    if processes == 1:
        for documents, state in chunks:
            yield encode_chunk(documents, tokenizer), state
        return
    # spawn: libraries that read the text have threads, with which fork is not safe
    context = multiprocessing.get_context('spawn')
    pool = ProcessPoolExecutor(processes, context, start_worker, (tokenizer,))
    waiting = deque()
    try:
        for documents, state in chunks:
            waiting.append((pool.submit(encode_in_worker, documents), state))
            if len(waiting) >= 2 * processes:
                future, state = waiting.popleft()
                yield future.result(), state
        for future, state in waiting:
            yield future.result(), state
    except BrokenProcessPool:
        raise Refused(f'processes={processes}: a tokenising process was killed, most likely for '
                      'want of memory; run the same command again with fewer --processes: it '
                      'continues') from None
    finally:
        pool.shutdown(cancel_futures=True)


# --- writing shards -------------------------------------------------------------------------------


class SplitWriter:
    """Appends to split_000000.bin, split_000001.bin, ... in a folder.

    tokens: how many they hold by the journal. What a killed run wrote after them is cut off.
    """

    def __init__(self, folder, split, shard_tokens, tokens):
        self.folder = folder
        self.split = split
        self.shard_tokens = shard_tokens
        self.tokens = tokens
        for name in os.listdir(folder):
            found = re.fullmatch(split + r'_(\d{6,})\.bin', name)
            if found and int(found[1]) > tokens // shard_tokens:
                os.remove(os.path.join(folder, name))
        self.open()

    def open(self):
        """Open the shard of the next token and cut it off there."""
        index = self.tokens // self.shard_tokens
        self.path = pathlib.Path(self.folder, f'{self.split}_{index:06d}.bin')
        self.path.touch()
        filled = self.tokens % self.shard_tokens
        end = shards.HEADER_BYTES + 2 * filled
        if filled and self.path.stat().st_size < end:
            raise Refused(f'{self.path}: shorter than journal.json says; delete the folder '
                          f'{self.folder} and start again')
        self.file = open(self.path, 'r+b')
        self.file.truncate(end)
        self.file.seek(end)

    def append(self, tokens):
        while len(tokens):
            piece = tokens[:self.shard_tokens - self.tokens % self.shard_tokens]
            self.file.write(piece.astype('<u2').tobytes())
            self.tokens += len(piece)
            tokens = tokens[len(piece):]
            if self.tokens % self.shard_tokens == 0:
                self.sync()
                self.file.close()
                self.open()

    def sync(self):
        """Bring what is written to the disk, as a whole shard."""
        end = self.file.tell()
        self.file.seek(0)
        self.file.write(shards.header((end - shards.HEADER_BYTES) // 2))
        self.file.seek(end)
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self):
        self.sync()
        self.file.close()
        if self.tokens % self.shard_tokens == 0:
            self.path.unlink()


# --- what a folder holds, and what is missing -----------------------------------------------------


@dataclass
class Journal:
    """journal.json: how far the folder is, enough to continue."""
    arguments: dict  # what the shards depend on
    cut: int | None = None  # tokens from this position on are validation, whatever the hash says
    documents: int = 0
    text_bytes: int = 0
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
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
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
    """Say what it will take; returns bytes of text. Refused if the disk is too small."""
    folder = settings.data_dir
    text_bytes = SOURCES[name].text_bytes(settings)
    tokens = text_bytes / BYTES_PER_TOKEN[settings.tokenizer]
    if settings.max_tokens and settings.max_tokens < tokens:
        text_bytes *= settings.max_tokens / tokens
        tokens = settings.max_tokens
    print(f'{name} -> {folder}: about {text_bytes / 1e6:,.0f} MB of text, {tokens / 1e6:,.1f}M '
          f'tokens, {2 * tokens / 1e6:,.0f} MB of disk; processes: {settings.processes}',
          flush=True)
    if journal.documents:
        print(f'continuing after {journal.documents:,} documents', flush=True)
    there = sum(f.stat().st_size for f in pathlib.Path(folder).glob('*.bin'))
    needed = int(2 * tokens) - there
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise Refused(f'{folder}: about {needed:,} bytes needed, {free:,} free; free some, give a '
                      '--data_dir on a larger disk, or set --max_tokens')
    return text_bytes


def progress_bar(journal, text_bytes):
    """tqdm over bytes of text: twice a second on a terminal, else a line every 30 seconds."""
    terminal = sys.stderr.isatty()
    seconds = 0.5 if terminal else 30
    form = '{l_bar}{bar}{r_bar}' if terminal else '{l_bar}{bar:10}{r_bar}\n'
    return tqdm(total=text_bytes, initial=journal.text_bytes, unit='B', unit_scale=True,
                bar_format=form, delay=seconds, mininterval=seconds, maxinterval=seconds)


def write_tokens(name, settings, journal, text_bytes):
    """Tokenise what the journal says is missing, write all shards, keep the journal up to date.

    text_bytes: the estimate that progress is measured by.
    """
    folder = settings.data_dir
    tokenizer = shards.get_tokenizer(settings.tokenizer)
    journal.write(folder)
    train = SplitWriter(folder, 'train', settings.shard_tokens, journal.train_tokens)
    val = SplitWriter(folder, 'val', settings.shard_tokens, journal.val_tokens)
    limit = settings.max_tokens or sys.maxsize
    documents, state = SOURCES[name].open(settings, journal.documents, journal.state)
    chunks = chunks_of(documents, state) if journal.tokens < limit else ()
    saved = time.monotonic()
    with (contextlib.closing(encoded(chunks, tokenizer, settings.processes)) as results,
          progress_bar(journal, text_bytes) as bar):
        for chunk, state_after in results:
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
            journal.text_bytes += chunk.text_bytes
            journal.train_tokens = train.tokens
            journal.val_tokens = val.tokens
            journal.state = state_after
            if time.monotonic() - saved > JOURNAL_SECONDS:
                train.sync()
                val.sync()
                journal.write(folder)
                saved = time.monotonic()
            bar.set_postfix_str(f'{journal.tokens / 1e6:,.1f}M tokens', refresh=False)
            bar.update(chunk.text_bytes)
            if journal.tokens >= limit:
                break
    train.finish()
    val.finish()


def cut_by_position(settings, journal):
    """A journal to start again from, by which the end of the text becomes validation.

    At least one window does if there is text enough. Refused if there is too little.
    """
    afresh = Journal(journal.arguments)
    if settings.val_input or journal.tokens < 4:
        afresh.write(settings.data_dir)  # so that a command with other arguments may follow
        raise Refused(f'{settings.name}: {journal.train_tokens} training and {journal.val_tokens} '
                      'validation tokens, too few to learn from; give more text or a larger '
                      '--max_tokens')
    of_val = max(int(settings.val_fraction * journal.tokens),
                 min(WINDOW_TOKENS, journal.tokens // 2))
    afresh.cut = journal.tokens - of_val
    print(f'val_fraction={settings.val_fraction}, by hash, leaves a split empty (documents: '
          f'{journal.documents}): the last {of_val:,} tokens become validation', flush=True)
    return afresh


def write_meta(settings, journal):
    """Describe the finished shards in meta.json, whose presence says that they are finished."""
    train, val = shards.open_splits(settings.data_dir, settings.tokenizer)
    files = []
    for stream in (train, val):
        for path, tokens in zip(stream.files, np.diff(stream.firsts).tolist()):
            files.append({'file': os.path.basename(path), 'tokens': tokens})
    write_json(os.path.join(settings.data_dir, 'meta.json'), {
        'name': settings.name,
        'tokenizer': settings.tokenizer,
        'vocab_size': shards.VOCABULARY[settings.tokenizer],
        'train_tokens': train.tokens,
        'val_tokens': val.tokens,
        'documents': journal.documents,
        'fingerprint': shards.fingerprint_of(train, val),
        'arguments': journal.arguments,
        'shards': files,
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
            text_bytes = announce(name, settings, journal)
            write_tokens(name, settings, journal, text_bytes)
            if min(journal.train_tokens, journal.val_tokens) < 2:  # an input and a target
                journal = cut_by_position(settings, journal)
                write_tokens(name, settings, journal, text_bytes)
            write_meta(settings, journal)
        for leftover in pathlib.Path(folder).glob('journal.json*'):
            leftover.unlink()
    return bool(journal)


def usage():
    lines = ['python prepare.py SOURCE [--key=value ...], where SOURCE is one of:', '']
    for name, source in SOURCES.items():
        lines.append(f"  {' '.join([name, *source.needs])}: {source.about}")
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
        hint = did_you_mean(name, SOURCES) or '; say one of ' + ', '.join(SOURCES)
        raise Refused(f"unknown source '{name}'{hint}")
    told = [*SOURCES[name].starts_from, *argv[1:]]
    settings, problems, _ = parse(PrepareSettings, told, config_files=False)
    if problems := problems + check(name, settings):
        raise Refused(problems)
    settings.name = settings.name or name
    settings.data_dir = settings.data_dir or os.path.join('data', settings.name)
    if settings.processes == 0:
        cores = os.cpu_count() or 1
        settings.processes = cores if settings.tokenizer == 'gpt2' else 1
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
