"""The one reader of token shards, and the order of the training windows.

A shard is llm.c's: 256 little-endian int32 (magic, version, number of tokens, zeros), then uint16
tokens. Every document ends with <|endoftext|>. nanoGPT's headerless train.bin and val.bin are read
too.
"""
import hashlib
import math
import os
import re
from dataclasses import dataclass

import numpy as np

from support.files import read_json
from support.settings import Refused, regular

MAGIC = 20240520  # llm.c, dev/data/data_common.py
VERSION = 1
HEADER_BYTES = 1024
VOCABULARY = {'gpt2': 50257, 'bytes': 257}  # tokens; the last one of each is <|endoftext|>
EOT_TEXT = '<|endoftext|>'


# --- shards ---------------------------------------------------------------------------------------


def header(tokens):
    """The bytes before the tokens of a shard."""
    return np.array([MAGIC, VERSION, tokens] + [0] * (HEADER_BYTES // 4 - 3), '<i4').tobytes()


def read_numbers(path, kind, count, offset=0):
    """(count,) numbers of a file, fewer at its end. Refused if it cannot be read."""
    try:
        return np.fromfile(regular(path), kind, count, offset=offset)  # a FIFO is not waited for
    except OSError as error:
        raise Refused(f'{path}: cannot be read ({error.strerror}); copy or prepare it '
                      'again') from None


def shard_layout(path):
    """(offset of the first token in bytes, number of tokens) of a shard, with a header or without.

    Refused if it is foreign or if its size does not fit.
    """
    head = read_numbers(path, '<i4', HEADER_BYTES // 4)
    magic, version, tokens = [*head[:3].tolist(), 0, 0, 0][:3]
    zeros = len(head) == HEADER_BYTES // 4 and not head[3:].any()
    size = os.path.getsize(path)
    offset = HEADER_BYTES
    # The magic's first two bytes would be token 56280, which GPT-2 does not have: the two formats
    # cannot be confused. Where the magic is damaged, the zeros tell.
    if os.path.basename(path) in ('train.bin', 'val.bin') and magic != MAGIC and not zeros:
        # In tokens of 32 or 64 bits every second uint16 is 0, or close to it.
        halves = head.view('<u2')
        if len(halves) >= 64 and 16 * int(halves[1::2].max()) < halves[::2].max():
            raise Refused(f'{path}: tokens of more than 16 bits, which are not of GPT-2; prepare '
                          'the text itself: python prepare.py text --input=FILES --name=NAME')
        offset = 0
        tokens = size // 2
    elif (magic, version) != (MAGIC, VERSION):
        raise Refused(f'{path}: not a token shard: magic {magic} version {version}, expected '
                      f"{MAGIC} version {VERSION} (llm.c's GPT-2 format); move it away")
    expected = offset + 2 * tokens
    if size != expected:
        raise Refused(f'{path}: damaged: expected {expected} bytes ({tokens} tokens), found '
                      f'{size}; copy or prepare it again')
    return offset, tokens


class TokenStream:
    """The shards of one split as one sequence of tokens.

    files: paths in order; vocab_size: the first token that is too large.
    """

    def __init__(self, split, files, vocab_size):
        self.split = split
        self.files = files
        self.vocab_size = vocab_size
        layouts = [shard_layout(f) for f in files]
        self.opened = {f: (os.path.getsize(f), os.path.getmtime(f)) for f in files}
        self.offsets = [offset for offset, _ in layouts]
        # (shards + 1,): position of each shard's first token, then the end
        self.firsts = np.cumsum([0] + [tokens for _, tokens in layouts])
        self.tokens = int(self.firsts[-1])

    def windows(self, block_size):
        """Non-overlapping windows of block_size inputs; the last target needs one token more."""
        return (self.tokens - 1) // block_size

    def read_shard(self, index, begin, count):
        """uint16 (count,): tokens of one shard. Refused at one that the vocabulary does not have.

        A map of the file would be no faster, and its pages would count as this process's memory.
        """
        path = self.files[index]
        tokens = read_numbers(path, '<u2', count, self.offsets[index] + 2 * begin)
        if len(tokens) < count:
            raise Refused(f'{path}: truncated since it was opened; copy or prepare it again')
        wrong = np.flatnonzero(tokens >= self.vocab_size)
        if len(wrong):
            raise Refused(f'{path}: token {tokens[wrong[0]]} at position {begin + wrong[0]} is '
                          f'outside the vocabulary of {self.vocab_size}; the file is damaged or '
                          'was made with another tokenizer')
        return tokens

    def read(self, starts, length):
        """int64 (len(starts), length): the tokens from each start, across shards where need be.

        IndexError at the end of the stream; Refused at a token that the vocabulary does not have.
        """
        out = np.empty((len(starts), length), np.int64)
        for row, position in zip(out, starts):
            while len(row):
                index = np.searchsorted(self.firsts, position, side='right') - 1
                count = min(len(row), self.firsts[index + 1] - position)
                row[:count] = self.read_shard(index, position - self.firsts[index], count)
                row = row[count:]
                position += count
        return out


# --- data sets ------------------------------------------------------------------------------------


@dataclass
class Data:
    """An opened data set. The fingerprint depends on the tokens, not on folder or shard size."""
    name: str
    tokenizer: str
    vocab_size: int
    fingerprint: str
    train: TokenStream
    val: TokenStream
    val_bytes: int  # of the text that val was made from; 0: unknown

    def describe(self):
        """What a checkpoint says of it."""
        return dict(name=self.name, tokenizer=self.tokenizer, vocab_size=self.vocab_size,
                    train_tokens=self.train.tokens)

    def check_unchanged(self):
        """Refused if a file has another size or time than when it was opened."""
        for path, before in {**self.train.opened, **self.val.opened}.items():
            now = os.path.exists(path) and (os.path.getsize(path), os.path.getmtime(path))
            if now != before:
                raise Refused(f'{path}: deleted or overwritten since it was opened; copy or '
                              'prepare it again')


def bits_a_byte(nats, size):
    """Of a text of `size` bytes whose tokens cost `nats` in all; compares different tokenizers."""
    return nats / math.log(2) / size


def fingerprint_of(train, val):
    """16 hex digits of SHA-256 over both splits' names, sizes and tokens.

    All tokens count up to 32M; of more, samples of 2048 at both ends and evenly between (16 MB of
    reading in 20 GB).
    """
    digest = hashlib.sha256()
    for stream in (train, val):
        digest.update(f'{stream.split} {stream.tokens} '.encode())
        length = min(2048, stream.tokens)
        count = -(-stream.tokens // length)
        if stream.tokens > 1 << 25:
            count = 1024 + stream.tokens // (1 << 22)
        for i in range(count):
            start = i * (stream.tokens - length) // max(1, count - 1)
            digest.update(stream.read([start], length).astype('<u2').tobytes())
    return digest.hexdigest()[:16]


def split_of(filename):
    """'train', 'val' or '': what stands last in the name, not after a letter (medieval.bin)."""
    found = re.findall(r'(?<![a-z])(train|val)', filename.lower())
    return found[-1] if found and filename.endswith('.bin') else ''


def open_splits(folder, tokenizer):
    """(train, val), each a TokenStream of what the folder holds."""
    streams = []
    for split in ('train', 'val'):
        names = [name for name in sorted(os.listdir(folder)) if split_of(name) == split]
        paths = [os.path.join(folder, name) for name in names]
        streams.append(TokenStream(split, paths, VOCABULARY[tokenizer]))
    return streams


def read_meta(folder):
    """meta.json as a dictionary, None where there is none, Refused where it is damaged."""
    path = os.path.join(folder, 'meta.json')
    meta = read_json(path, ['name', 'tokenizer', 'documents', 'train_tokens', 'val_tokens'])
    if meta and meta['tokenizer'] not in [*VOCABULARY]:
        raise Refused(f"{path} is damaged: its tokenizer is none of {', '.join(VOCABULARY)}; "
                      'restore it, or delete the folder and prepare the data again')
    return meta


def data_folder(data_dir, dataset):
    """Where the shards of a data set lie; an empty data_dir is data/<dataset>."""
    return data_dir or os.path.join('data', dataset)


def open_data(data_dir, dataset):
    """The data set in its data_folder as Data.

    Refused where the folder holds nothing, another data set than `dataset`, or other tokens than
    were prepared.
    """
    folder = data_folder(data_dir, dataset)
    fix = (f'prepare it with: python prepare.py SOURCE --name={dataset} --data_dir={folder} '
           '(python prepare.py --help lists the sources)')
    if not os.path.isdir(folder):
        raise Refused(f"dataset='{dataset}': folder {folder} does not exist; {fix}")
    told = read_meta(folder) or {}
    if not told and os.path.exists(os.path.join(folder, 'meta.pkl')):
        raise Refused(f'{folder}/meta.pkl: these tokens are characters, not of GPT-2; prepare the '
                      f'text itself: python prepare.py text --input={folder}/input.txt '
                      '--tokenizer=bytes --name=NAME')
    if told and 'fingerprint' not in told:
        raise Refused(f'{folder}: preparation has not finished; give its prepare.py command again, '
                      'which continues')
    name = told.get('name', 'unlabelled')
    tokenizer = told.get('tokenizer', 'gpt2')
    train, val = open_splits(folder, tokenizer)
    for stream in (train, val):
        if stream.tokens == 0:
            raise Refused(f"{folder} holds no {stream.split} tokens ('{stream.split}' in the name, "
                          f'.bin at the end); {fix}')
    if name != dataset:
        raise Refused(f"dataset='{dataset}' but {folder} holds '{name}' (by its meta.json, or for "
                      f'lack of one); write --dataset={name} --data_dir={folder} to train on it, '
                      f'or give the --data_dir of {dataset}')
    fingerprint = fingerprint_of(train, val)
    if fingerprint != told.get('fingerprint', fingerprint):
        raise Refused(f'{folder}: the shards have changed since they were prepared: fingerprint '
                      f"{fingerprint}, meta.json says {told['fingerprint']}; copy the folder "
                      'again, or delete it and prepare the data again')
    return Data(name, tokenizer, VOCABULARY[tokenizer], fingerprint, train, val,
                told.get('val_bytes', 0))


# --- order of the training windows ----------------------------------------------------------------


def mixed(x):
    """splitmix64's output function (Steele, Lea, Flood, OOPSLA 2014) on a uint64 array."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def window_order(positions, windows, seed):
    """Window indices, int64, shape of `positions`: p is draw p % windows of epoch p // windows.

    Each epoch is a permutation that depends on (seed, epoch) only, in O(1) memory: a keyed Feistel
    network over the next power of four, walked along its cycle until it lands below `windows`
    (Black and Rogaway, CT-RSA 2002). Integer arithmetic makes it the same with every NumPy.
    """
    positions = np.asarray(positions, np.int64)
    epoch, value = np.divmod(positions.ravel(), windows)
    value = value.astype(np.uint64)
    key = mixed(mixed(np.full(1, seed % 2**64, np.uint64)) + epoch.astype(np.uint64))
    half = np.uint64(max(1, ((windows - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    walking = np.arange(len(value))
    while len(walking):
        left = value[walking] >> half
        right = value[walking] & mask
        # 4 rounds make a strong pseudo-random permutation (Luby and Rackoff); narrow halves
        # need more.
        for number in range(8):
            round_key = mixed(key[walking] + np.uint64(number))
            left, right = right, left ^ (mixed(round_key ^ right) & mask)
        value[walking] = left << half | right
        walking = walking[value[walking] >= windows]
    return value.astype(np.int64).reshape(positions.shape)
