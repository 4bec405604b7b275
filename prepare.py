"""Text in, token shards out.

python prepare.py SOURCE [--key=value ...] writes data/<name>/: train_000000.bin, ...,
val_000000.bin, ... and meta.json, which gets its fingerprint when all is done. It may be killed
at any time; the same command continues.

The sources of text are in support/sources.py; the format of the shards, their reader and the
tokenizers are in support/shards.py.
"""
import hashlib
import itertools
import os
import pathlib
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

from support import shards
from support.files import locked, write_json
from support.settings import Path, Refused, help_text, parse, run_command, separate, unmet
from support.sources import SOURCES
from support.tokenizer import Tokenizer

SAVE_TOKENS = 1 << 24  # at most this much work, 32 MB, is lost to a kill


@dataclass
class PrepareSettings:
    # --- what -------------------------------------------------------------------------------------
    name: str = ''  # of the data set, which a config's `dataset` must match; empty: the source's
    input: str = ''  # of text: files or folders of .txt, .jsonl, .parquet, comma-separated
    val_input: str = ''  # the same, for validation; empty: val_fraction of the documents of input
    source: Path = 'HuggingFaceFW/fineweb-edu'  # of fineweb_edu: hub name, or a local copy's folder
    subset: str = ''  # of source, by the hub's name; empty: sample-10BT, or the default one
    max_tokens: int = 0  # stop after the document that reaches it, both splits together; 0: all
    tokenizer: Literal[*shards.VOCABULARY] = 'gpt2'  # GPT-2's 50257 or 257 for bytes of UTF-8
    val_fraction: float = 0.005  # of the documents, chosen by hash of the text, for validation;
    # of fewer documents than 2 / val_fraction in input, the end of them all
    # --- where and how ----------------------------------------------------------------------------
    data_dir: Path = ''  # folder of the shards; empty: data/<name>
    shard_tokens: int = 100_000_000  # tokens a shard, 2 bytes each (llm.c's size)


def check(source, settings, typed):
    """Problems of the settings, for the source of that name; typed: names on the command line."""
    users = dict(input='text', val_input='text', source='fineweb_edu', subset='fineweb_edu')
    named = settings.name or settings.source == PrepareSettings.source
    two_ways = settings.val_input and 'val_fraction' in typed
    return unmet(settings, [
        ('max_tokens', settings.max_tokens >= 0, 'must be at least 0'),
        ('shard_tokens', 0 < settings.shard_tokens < 2**31,
         'must be at least 1 and below 2^31, because the header counts in int32'),
        ('val_fraction', 0 < settings.val_fraction < 1, 'must be above 0 and below 1'),
        ('val_fraction', not two_ways, 'all of val_input is validation; leave out one of the two'),
        ('name', re.fullmatch(r'(\w[\w.-]*)?', settings.name),
         'use letters, digits, _ . - only, because it names a folder'),
        ('source', settings.source, 'must not be empty'),
        ('source', named or os.path.isdir(settings.source), 'give this set a --name of its own'),
        *((key, key not in typed or source == user, f'{source} does not use it; leave it out')
          for key, user in users.items()),
    ])


# --- tokenising, in several threads ---------------------------------------------------------------


def encode(text, chance, tokenizer):
    """(uint16 tokens with a final <|endoftext|>, bytes of text, split) of a document."""
    raw = text.encode(errors='replace')  # half a surrogate pair, which JSON can hold, is a ?
    tokens = tokenizer.encode(raw.decode()) + [tokenizer.eot]
    number = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), 'big')
    split = 'val' if number < chance * 2**64 else 'train'
    return np.array(tokens, np.uint16), len(raw), split


def encoded(documents, tokenizer):
    """(tokens, bytes, split) of each document, in order.

    Threads are enough, because tiktoken tokenises without holding Python's lock.
    """
    threads = os.cpu_count() or 1
    waiting = deque()
    with ThreadPoolExecutor(threads) as pool:
        for text, chance in documents:
            waiting.append(pool.submit(encode, text, chance, tokenizer))
            if len(waiting) == 8 * threads:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


# --- writing --------------------------------------------------------------------------------------


def append(folder, split, written, tokens, shard_tokens):
    """Put tokens (N,) behind the first `written` ones of a split, and wait until the disk has them.

    What a killed run has left behind those is overwritten.
    """
    while len(tokens):
        index, filled = divmod(written, shard_tokens)
        piece = tokens[:shard_tokens - filled]
        with open(os.path.join(folder, f'{split}_{index:06d}.bin'), 'r+b' if filled else 'wb') as f:
            f.write(shards.header(filled + len(piece)))
            f.seek(2 * filled, os.SEEK_CUR)
            f.write(piece.astype('<u2').tobytes())
            f.truncate()  # and flush
            os.fsync(f.fileno())
        written += len(piece)
        tokens = tokens[len(piece):]


def write_meta(folder, meta):
    write_json(os.path.join(folder, 'meta.json'), meta)


def save(settings, meta, pieces):
    """Append pieces, [(tokens, bytes)] of each split, to the shards; then meta.json says so."""
    for split, documents in pieces.items():
        if documents:
            arrays, sizes = zip(*documents)
            tokens = np.concatenate(arrays)
            written = meta[f'{split}_tokens']
            append(settings.data_dir, split, written, tokens, settings.shard_tokens)
            meta[f'{split}_tokens'] += len(tokens)
            if f'{split}_bytes' in meta:  # not of a folder that an earlier version began
                meta[f'{split}_bytes'] += sum(sizes)
            meta['documents'] += len(documents)
            documents.clear()
    write_meta(settings.data_dir, meta)


def write_tokens(documents, settings, meta):
    """Tokenise what is missing by meta, write it, keep meta and meta.json up to date."""
    tokenizer = Tokenizer(settings.tokenizer)
    write_meta(settings.data_dir, meta)
    documents = itertools.islice(documents, meta['documents'], None)
    saved = meta['train_tokens'] + meta['val_tokens']
    seen = saved
    pieces = {'train': [], 'val': []}
    with tqdm(total=settings.max_tokens or None, initial=seen, unit=' tokens', unit_scale=True,
              disable=None) as bar:
        for tokens, size, split in encoded(documents, tokenizer):
            if 0 < settings.max_tokens <= seen:
                break
            pieces[split].append((tokens, size))
            seen += len(tokens)
            bar.update(len(tokens))
            if seen - saved >= SAVE_TOKENS:
                save(settings, meta, pieces)
                saved = seen
    save(settings, meta, pieces)


# --- preparing a data set -------------------------------------------------------------------------


def find_meta(folder, origin, settings):
    """meta.json's content, from which to continue, or that of a new folder.

    Refused if the folder holds anything that this command would not have written.
    """
    keys = ('name', 'tokenizer', 'val_fraction', 'shard_tokens', 'max_tokens')
    arguments = {key: getattr(settings, key) for key in keys}
    arguments['source'] = origin
    meta = shards.read_meta(folder)
    found = sorted(pathlib.Path(folder).glob('*.bin'))
    if meta is None and found:
        raise Refused(f'{folder} holds {found[0].name}, which was not prepared here; give another '
                      '--data_dir, or move it away')
    if meta is None or meta['documents'] == 0:  # nothing is lost
        for path in found:
            path.unlink()
        return dict(
            name=settings.name, tokenizer=settings.tokenizer,
            vocab_size=shards.VOCABULARY[settings.tokenizer],
            train_tokens=0, val_tokens=0, train_bytes=0, val_bytes=0, documents=0,
            arguments=arguments)
    told = meta.get('arguments', {})
    for key, value in arguments.items():
        if told.get(key) != value:
            raise Refused(f'{folder} was prepared with {key}={repr(told.get(key)):.100}, not '
                          f'{repr(value):.100}; give the same, another --data_dir, or delete the '
                          'folder')
    return meta


def checksums(folder):
    """{file name: SHA-256} of the shards in a folder."""
    found = {}
    for path in sorted(pathlib.Path(folder).glob('*.bin')):
        with open(path, 'rb') as f:
            found[path.name] = hashlib.file_digest(f, 'sha256').hexdigest()
    return found


def verify(folder, told):
    """Refused if a shard has not the checksum told in meta.json, of which older ones have none."""
    found = checksums(folder)
    for name, checksum in told.items():
        if found.get(name) != checksum:
            raise Refused(f'{folder}/{name} is not as it was prepared (SHA-256); copy it again, or '
                          'delete the folder and prepare the data again')
    print(f'{len(told)} shards verified by SHA-256')


def prepare(source, settings):
    """Make what is missing of the data set that the source and the settings describe."""
    folder = settings.data_dir
    busy = (f'{folder}: another process is preparing data there; wait for it, or give another '
            '--data_dir')
    with locked(folder, busy):
        origin, documents = SOURCES[source].read(settings)
        meta = find_meta(folder, origin, settings)
        if 'fingerprint' in meta:
            verify(folder, meta.get('sha256', {}))
            return
        if meta['documents']:
            print(f"continuing after {meta['documents']:,} documents", flush=True)
        write_tokens(documents, settings, meta)
        if min(meta['train_tokens'], meta['val_tokens']) < 2:  # an input and a target
            write_meta(folder, {**meta, 'documents': 0})  # so that other arguments may follow
            raise Refused(f"{settings.name}: {meta['train_tokens']} training and "
                          f"{meta['val_tokens']} validation tokens, too few to learn from; give "
                          'more text, a larger --max_tokens or another --val_fraction')
        train, val = shards.open_splits(folder, settings.tokenizer)
        write_meta(folder, {**meta, 'fingerprint': shards.fingerprint_of(train, val),
                            'sha256': checksums(folder)})


def usage():
    lines = ['python prepare.py SOURCE [--key=value ...], where SOURCE is one of:', '']
    for name, source in SOURCES.items():
        lines.append(f"  {name}: {source.about} {' '.join(source.defaults)}".rstrip())
    return '\n'.join(lines)


def main(argv):
    """Prepare the data set that the arguments describe; returns the exit code."""
    words, options = separate(PrepareSettings, argv)
    source = words[0] if words else ''
    if '--help' in options:
        print(help_text(PrepareSettings, usage()))
        return 0
    if source not in SOURCES:
        raise Refused(f"unknown source '{source}'; say one of {', '.join(SOURCES)}")
    told = [*SOURCES[source].defaults, *words[1:], *options]
    settings, problems, typed = parse(PrepareSettings, told, config_files=False)
    if problems := problems + check(source, settings, typed):
        raise Refused(problems)
    settings.name = settings.name or source
    settings.data_dir = shards.data_folder(settings.data_dir, settings.name)
    try:
        prepare(source, settings)
    except OSError as error:  # most likely a full disk, or no right to write there
        raise Refused(f'{settings.data_dir}: {error}; correct that and run the same command again, '
                      'which continues, or give another --data_dir') from None
    data = shards.open_data(settings.data_dir, settings.name)
    print(f'{settings.data_dir}: {data.train.tokens:,} training and {data.val.tokens:,} validation '
          f'tokens, fingerprint {data.fingerprint}')
    return 0


if __name__ == '__main__':
    try:
        run_command(main)
    except SystemExit as end:
        # In the interpreter's own way out, threads of pyarrow that a stream has left behind may
        # abort it with code 134 (github.com/apache/arrow/issues/45214).
        os._exit(end.code)
