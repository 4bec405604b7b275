"""Text in, token shards out; also the one reader of the shard format.

python prepare.py fineweb_edu|text|stdlib [--key=value ...] writes data/<name>/: train_000000.bin, ...,
val_000000.bin, ... and, last, meta.json. python prepare.py throughput --input=FILES measures the pipeline.

The format of the shards, their reader and the tokenizers are in shards.py, the sources of text in sources.py. A hash
of each document's text decides whether it is training or validation.
"""
import contextlib
import errno
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import numpy as np

from files import publish, write_atomically, write_json
from settings import Refused, help_text, parse
from sources import input_files, open_source, read_files, text_bytes
from shards import (HEADER_BYTES, MAGIC, VERSION, VOCABULARY, TokenStream, fingerprint_of, get_tokenizer, open_data, read_header,
                    read_meta, split_of)

CHUNK_CHARACTERS = 1 << 20  # text handed to a worker at a time: large beside the cost of a hand-over
JOURNAL_SECONDS = 60  # at most this much work is lost to a kill, unless one document takes longer
FINEWEB_TOKENS, FINEWEB_BYTES = 10e9, 46e9  # sample-10BT: GPT-2 tokens by its data card, and text at 4.6 bytes each
STDLIB_BYTES = 2.1e6  # of CPython 3.11
BYTES_PER_TOKEN = {'gpt2': 4.0, 'bytes': 1.0}  # English; low on purpose, so that the disk estimate is high
BYTES_PER_SECOND = {'gpt2': 6e6, 'bytes': 50e6}  # a process, measured on a 2-core virtual machine


@dataclass
class PrepareSettings:
    # --- what ----------------------------------------------------------------------------------------
    name: str = ''  # name of the data set, which a config's `dataset` must match; empty: as on the command line
    input: str = ''  # text, throughput: files or folders of .txt, .jsonl, .parquet, comma-separated
    source: str = 'HuggingFaceFW/fineweb-edu'  # fineweb_edu: Hugging Face data set, or a local folder of Parquet files
    max_tokens: int = 0  # stop after the document that reaches it, both splits together; 0: all
    tokenizer: Literal['gpt2', 'bytes'] = 'gpt2'  # GPT-2's BPE (50257) or UTF-8 bytes (257); stdlib starts from bytes
    val_fraction: float = 0.005  # of the documents, chosen by hash, for validation; stdlib starts from 0.05
    # --- where and how -------------------------------------------------------------------------------
    data_dir: str = ''  # folder of the shards; empty: data/<name>
    shard_tokens: int = 100_000_000  # tokens a shard, 2 bytes each (llm.c's size)
    processes: int = 0  # that tokenise; 0: one a core for gpt2, 1 for bytes, which are not worth more


# The small data set is made of bytes, and of few documents: 0.5% of those would be too little to evaluate on.
STARTS_FROM = {'fineweb_edu': [], 'text': [], 'stdlib': ['--tokenizer=bytes', '--val_fraction=0.05'], 'throughput': []}


# --- tokenising, in several processes ------------------------------------------------------------------

def encode_chunk(texts, tokenizer, val_fraction):
    """(tokens uint16, tokens of each document, whether each is validation, bytes of text), each with its <|endoftext|>."""
    pieces, lengths, in_val, size = [], [], [], 0
    eot = np.array([tokenizer.eot], np.uint16)
    for text in texts:
        try:
            raw = text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and UTF-8 cannot
            text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
            raw = text.encode()
        tokens = tokenizer.encode_array(text)
        pieces += tokens, eot
        lengths.append(len(tokens) + 1)
        in_val.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), 'big') < val_fraction * 2**64)
        size += len(raw)
    return np.concatenate(pieces), np.array(lengths), np.array(in_val), size


worker_arguments = []  # in a worker: tokenizer and val_fraction, too large to send with every chunk


def start_worker(*arguments):
    """Set up a worker, which must end with its parent: a killed parent cannot tell it to."""
    worker_arguments.extend(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and decides

    def follow_parent():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=follow_parent, daemon=True).start()


def encode_in_worker(texts):
    return encode_chunk(texts, *worker_arguments)


def chunks_of(texts, state):
    """(list of texts, state after them): about CHUNK_CHARACTERS of text, or a single longer document."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield chunk, state()
            chunk, size = [], 0
    if chunk:
        yield chunk, state()


def encoded(chunks, tokenizer, val_fraction, processes):
    """(result of encode_chunk, state) of each chunk, in order, with at most 2 chunks a process in memory."""
    if processes == 1:
        for texts, state in chunks:
            yield encode_chunk(texts, tokenizer, val_fraction), state
        return
    # spawn: libraries that read the text have threads, with which fork is not safe.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context('spawn'), start_worker, (tokenizer, val_fraction))
    waiting = deque()
    try:
        for texts, state in chunks:
            waiting.append((pool.submit(encode_in_worker, texts), state))
            if len(waiting) >= 2 * processes:
                future, state = waiting.popleft()
                yield future.result(), state
        for future, state in waiting:
            yield future.result(), state
    except BrokenProcessPool:
        raise Refused(f'processes={processes}: a tokenising process was killed, most likely for want of memory; run the same '
                      'command again with fewer --processes: it continues') from None
    finally:
        pool.shutdown(cancel_futures=True)


# --- writing shards ----------------------------------------------------------------------------------

def header(tokens):
    return np.array([MAGIC, VERSION, tokens] + [0] * (HEADER_BYTES // 4 - 3), '<i4').tobytes()


def write_shard(path, tokens):
    """Write the tokens (integers below 65536) as one shard, atomically."""
    write_atomically(path, lambda f: f.write(header(len(tokens)) + np.asarray(tokens).astype('<u2').tobytes()))


class SplitWriter:
    """Appends to split_000000.bin, split_000001.bin, ...; the one being filled ends in .tmp.

    tokens: how many the files already hold, as journalled. Whatever a killed run wrote after that is cut off.
    """

    def __init__(self, folder, split, shard_tokens, tokens):
        self.folder, self.split, self.shard_tokens, self.tokens = folder, split, shard_tokens, tokens
        self.open()
        for name in os.listdir(folder):
            found = re.fullmatch(split + r'_(\d{6,})\.bin(\.tmp)?', name)
            if found and int(found[1]) > tokens // shard_tokens:
                os.remove(os.path.join(folder, name))

    def open(self):
        self.path = os.path.join(self.folder, f'{self.split}_{self.tokens // self.shard_tokens:06d}.bin')
        if os.path.exists(self.path):
            os.replace(self.path, f'{self.path}.tmp')
        self.file = open(f'{self.path}.tmp', 'r+b' if os.path.exists(f'{self.path}.tmp') else 'w+b')
        end = HEADER_BYTES + 2 * (self.tokens % self.shard_tokens)
        if end > HEADER_BYTES and os.path.getsize(f'{self.path}.tmp') < end:
            raise Refused(f'{self.path}.tmp: shorter than journal.json says; delete the folder {self.folder} and start again')
        self.file.write(header(0))
        self.file.truncate(end)
        self.file.seek(end)

    def append(self, tokens):
        """Number of shards that became full."""
        finished = 0
        while len(tokens):
            room = self.shard_tokens - self.tokens % self.shard_tokens
            self.file.write(tokens[:room].astype('<u2').tobytes())
            self.tokens += len(tokens[:room])
            tokens = tokens[room:]
            if self.tokens % self.shard_tokens == 0:
                self.publish(self.shard_tokens)
                self.open()
                finished += 1
        return finished

    def publish(self, tokens):
        self.file.seek(0)
        self.file.write(header(tokens))
        publish(self.file, self.path)

    def sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self):
        if self.tokens % self.shard_tokens:
            self.publish(self.tokens % self.shard_tokens)
        else:
            self.file.close()
            os.remove(f'{self.path}.tmp')


# --- preparing a data set ------------------------------------------------------------------------------

def check(name, s):
    """Problems of the settings, and of settings that NAME does not use."""
    problems, default = [], PrepareSettings()
    for key, least in (('max_tokens', 0), ('processes', 0), ('shard_tokens', 1)):
        if getattr(s, key) < least:
            problems.append(f'{key}={getattr(s, key)}: must be at least {least}')
    if s.shard_tokens >= 2**31:
        problems.append(f'shard_tokens={s.shard_tokens}: must be below 2^31, for the header counts in int32')
    if not 0 < s.val_fraction < 1:
        problems.append(f'val_fraction={s.val_fraction}: must be above 0 and below 1')
    if not re.fullmatch(r'(\w[\w.-]*)?', s.name):
        problems.append(f'name={s.name!r}: use letters, digits, _ . - only, for it names a folder')
    unused = {'fineweb_edu': 'input', 'text': 'source', 'stdlib': 'input source',
              'throughput': 'name source max_tokens tokenizer data_dir'}[name].split()
    return problems + [f'{key}={getattr(s, key)!r}: {name} does not use it; leave it out'
                       for key in unused if getattr(s, key) != getattr(default, key)]


def estimate(name, s):
    """(bytes of text, tokens) to come, both estimates."""
    if name == 'fineweb_edu' and not os.path.isdir(s.source):
        size = FINEWEB_BYTES
        tokens = FINEWEB_TOKENS if s.tokenizer == 'gpt2' else FINEWEB_BYTES
    else:
        local = {'stdlib': lambda: STDLIB_BYTES, 'text': lambda: sum(map(text_bytes, input_files(s.input))),
                 'fineweb_edu': lambda: sum(text_bytes(f) for f in pathlib.Path(s.source).rglob('*.parquet'))}
        size = local[name]()
        tokens = size / BYTES_PER_TOKEN[s.tokenizer]
    if s.max_tokens and s.max_tokens < tokens:
        size, tokens = size * s.max_tokens / tokens, s.max_tokens
    return size, tokens


def announce(name, s, folder, processes, size, tokens):
    """Say what it will take. Refused if the disk is too small for what is still missing."""
    there = sum(f.stat().st_size for f in pathlib.Path(folder).glob('*.bin*'))
    needed, free = int(2 * tokens) - there, shutil.disk_usage(folder).free
    minutes = size / BYTES_PER_SECOND[s.tokenizer] / min(processes, os.cpu_count() or 1) / 60
    print(f'{name} -> {folder}: about {size / 1e6:,.0f} MB of text, {tokens / 1e6:,.1f}M tokens, {2 * tokens / 1e6:,.0f} MB '
          f'of disk, {minutes:.1f} minutes if the source keeps up (processes: {processes})', flush=True)
    if needed > free:
        raise Refused(f'{folder}: about {needed:,} bytes needed, {free:,} free; free some, give a --data_dir on a larger disk, '
                      'or set --max_tokens')


def arguments_of(name, s):
    """What the tokens depend on: a folder is continued only by a command that would write the same."""
    source = {'fineweb_edu': lambda: s.source, 'stdlib': lambda: f'CPython {platform.python_version()}',
              'text': lambda: [[str(f), f.stat().st_size] for f in input_files(s.input)]}
    return {'prepare': name, 'source': source[name](), 'name': s.name, 'tokenizer': s.tokenizer, 'val_fraction': s.val_fraction,
            'shard_tokens': s.shard_tokens, 'max_tokens': s.max_tokens}


def find_journal(folder, arguments):
    """The journal to continue from, a new one for a new folder, None if the data set is finished.

    Refused if the folder holds anything that this command would not have written.
    """
    before, path = read_meta(folder), os.path.join(folder, 'journal.json')
    if before is None and os.path.exists(path):
        try:
            with open(path, encoding='utf-8') as f:
                before = json.load(f)
        except ValueError as error:
            raise Refused(f'{path}: damaged ({error}); delete the folder {folder} and start again') from None
    strangers = sorted(f for f in os.listdir(folder) if f.endswith(('.bin', '.bin.tmp')))
    if before is None and strangers:
        raise Refused(f'{folder} holds {strangers[0]}, which was not prepared here; give another --data_dir, or move it away')
    if before is None or before['documents'] == 0:
        return {'arguments': arguments, 'documents': 0, 'text_bytes': 0, 'train_tokens': 0, 'val_tokens': 0, 'state': None}
    told = before.get('arguments', {})
    if differing := [k for k in arguments if told.get(k) != arguments[k]]:
        key = differing[0]
        raise Refused(f'{folder} was prepared with {key}={shortened(told.get(key))}, not {shortened(arguments[key])}; '
                      'give the same, another --data_dir, or delete the folder')
    return None if 'fingerprint' in before else before


def shortened(value):
    return repr(value) if len(repr(value)) < 100 else repr(value)[:97] + '...'


@contextlib.contextmanager
def locked(folder):
    """Keep a second process from writing to the folder; the lock ends with the process, however it ends."""
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
        raise Refused(f'{folder}: another process is preparing data there; wait for it, or give another --data_dir') from None
    finally:
        os.close(lock)


def show_progress(journal, before, total, started):
    """One line on stderr about all text so far; `before` bytes of it were done by an earlier run."""
    done, tokens = journal['text_bytes'], journal['train_tokens'] + journal['val_tokens']
    speed = max(1, done - before) / (time.monotonic() - started)
    line = f'{tokens / 1e6:,.1f}M tokens, {done / 1e6:,.0f} MB of text, {speed / 1e6:.1f} MB/s'
    if done < total:
        line += f', {done / total:.0%}, {(total - done) / speed / 60:.1f} minutes left'
    terminal = sys.stderr.isatty()
    print(f'\r{line:<79}' if terminal else line, end='' if terminal else '\n', file=sys.stderr, flush=True)


def write_tokens(name, s, tokenizer, folder, journal, processes, total):
    """Tokenise what the journal says is missing, of about `total` bytes of text; publish all shards, update the journal."""
    path, before = os.path.join(folder, 'journal.json'), journal['text_bytes']
    write_json(path, journal)
    writers = {split: SplitWriter(folder, split, s.shard_tokens, journal[f'{split}_tokens']) for split in ('train', 'val')}
    texts, state = open_source(name, s, journal['documents'], journal['state'])
    saved = shown = started = time.monotonic()
    if s.max_tokens and journal['train_tokens'] + journal['val_tokens'] >= s.max_tokens:
        texts = ()
    with contextlib.closing(encoded(chunks_of(texts, state), tokenizer, s.val_fraction, processes)) as results:
        for (tokens, lengths, in_val, size), after in results:
            ends = journal['train_tokens'] + journal['val_tokens'] + np.cumsum(lengths)
            if last := s.max_tokens and ends[-1] >= s.max_tokens:
                lengths = lengths[:int(np.searchsorted(ends, s.max_tokens)) + 1]
            of_val, tokens = np.repeat(in_val[:len(lengths)], lengths), tokens[:lengths.sum()]
            full = writers['val'].append(tokens[of_val]) + writers['train'].append(tokens[~of_val])
            journal.update(documents=journal['documents'] + len(lengths), text_bytes=journal['text_bytes'] + size, state=after,
                           train_tokens=writers['train'].tokens, val_tokens=writers['val'].tokens)
            if full or time.monotonic() - saved > JOURNAL_SECONDS:
                for writer in writers.values():
                    writer.sync()
                write_json(path, journal)
                saved = time.monotonic()
            if time.monotonic() - shown > (0.5 if sys.stderr.isatty() else 30):
                show_progress(journal, before, total, started)
                shown = time.monotonic()
            if last:
                break
    if sys.stderr.isatty():
        show_progress(journal, before, 0, started)
        print(file=sys.stderr)
    for split, writer in writers.items():
        if writer.tokens == 0:
            discard(folder, writers)
            raise Refused(f"{s.name}: none of the {journal['documents']} documents fell into the {split} split (val_fraction="
                          f'{s.val_fraction}, by hash of the text); give more documents or another --val_fraction, e.g. 0.3')
    for writer in writers.values():
        writer.finish()


def discard(folder, writers):
    """Remove what this run wrote and nobody can use."""
    for writer in writers.values():
        writer.file.close()
        for path in pathlib.Path(folder).glob(f'{writer.split}_*.bin*'):
            path.unlink()
    os.remove(os.path.join(folder, 'journal.json'))


def write_meta(s, folder, journal):
    """Describe the finished shards in meta.json, whose presence says that they are finished."""
    names = sorted(f for f in os.listdir(folder) if split_of(f))
    train, val = (TokenStream(split, [os.path.join(folder, f) for f in names if split_of(f) == split], VOCABULARY[s.tokenizer])
                  for split in ('train', 'val'))
    meta = {'name': s.name, 'tokenizer': s.tokenizer, 'vocab_size': VOCABULARY[s.tokenizer],
            'train_tokens': train.tokens, 'val_tokens': val.tokens, 'documents': journal['documents'],
            'fingerprint': fingerprint_of(train, val), 'arguments': journal['arguments'],
            'shards': [{'file': f, 'tokens': read_header(os.path.join(folder, f))} for f in names]}
    write_json(os.path.join(folder, 'meta.json'), meta)


def prepare(name, s):
    """Make the data set that NAME and the settings describe, or what is missing of it. Refused if that cannot be."""
    s.name = s.name or name
    folder = s.data_dir or os.path.join('data', s.name)
    processes = s.processes or (os.cpu_count() or 1 if s.tokenizer == 'gpt2' else 1)
    arguments, (size, tokens) = arguments_of(name, s), estimate(name, s)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise Refused(f'{folder}: cannot be made a folder ({error.strerror}); give another --data_dir') from None
    with locked(folder):
        journal = find_journal(folder, arguments)
        if journal:
            announce(name, s, folder, processes, size, tokens)
            if journal['documents']:
                print(f"continuing after {journal['documents']:,} documents", flush=True)
            try:
                write_tokens(name, s, get_tokenizer(s.tokenizer), folder, journal, processes, size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise Refused(f'{folder}: the disk is full; free some space and run the same command again: '
                              'it continues') from None
            write_meta(s, folder, journal)
        for leftover in pathlib.Path(folder).glob('journal.json*'):
            leftover.unlink()
    data = open_data(folder, s.name)
    print(f'{folder}: {data.train_tokens:,} training and {data.val_tokens:,} validation tokens, fingerprint {data.fingerprint}'
          + ('' if journal else '; already prepared, nothing to do'))


def throughput(s):
    """Print text per second of the whole pipeline (read, tokenise, write) beside tiktoken's own batch call on text in memory.

    Three repeats of each, alternating, for machines are noisy; the ratio is of the medians.
    """
    s.name, tokenizer, processes = 'throughput', get_tokenizer('gpt2'), s.processes or os.cpu_count() or 1
    texts = list(read_files(input_files(s.input)))
    size, rates = sum(len(t.encode()) for t in texts) / 1e6, {'prepare.py': [], 'encode_ordinary_batch': []}
    print(f'{size:.1f} MB of text, {len(texts):,} documents, {processes} processes against {processes} threads', flush=True)
    for repeat in range(3):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            write_tokens('text', s, tokenizer, folder, find_journal(folder, {}), processes, 0)
            rates['prepare.py'].append(size / (time.perf_counter() - started))
        started = time.perf_counter()
        tokenizer.encoding.encode_ordinary_batch(texts, num_threads=processes)
        rates['encode_ordinary_batch'].append(size / (time.perf_counter() - started))
        print('  '.join(f'{name} {rate[-1]:.2f} MB/s' for name, rate in rates.items()), flush=True)
    ours, theirs = (float(np.median(rate)) for rate in rates.values())
    print(f'medians {ours:.2f} and {theirs:.2f} MB/s: {ours / theirs:.1%}')


def main(argv):
    """Exit code: 0 done, 2 refused, 130 interrupted."""
    usage = (f'python prepare.py {"|".join(STARTS_FROM)} [--key=value ...]\n'
             + '\n'.join(f'{name} starts from {" ".join(told)}' for name, told in STARTS_FROM.items() if told))
    name = argv[0] if argv else ''
    if {'-h', '--help'} & set(argv):
        print(help_text(PrepareSettings, usage))
        return 0
    try:
        if name not in STARTS_FROM:
            close = get_close_matches(name, STARTS_FROM, 1)
            hint = f"did you mean '{close[0]}'?" if close else 'say one of ' + ', '.join(STARTS_FROM)
            raise Refused(f"unknown data set '{name}'; {hint}")
        s, problems = parse(PrepareSettings, STARTS_FROM[name] + argv[1:], config_files=False)
        if problems := problems + check(name, s):
            raise Refused(problems)
        throughput(s) if name == 'throughput' else prepare(name, s)
        return 0
    except Refused as refused:
        return refused.report()
    except KeyboardInterrupt:
        print('\ninterrupted; the same command continues', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
