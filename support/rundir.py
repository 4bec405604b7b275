"""The run directory: checkpoints, the log, metrics and the tracker.

out_dir/ holds config.json, train.log, metrics.jsonl, last.pt (everything, to resume from), best.pt
(weights) and summary.json.
"""
import contextlib
import importlib
import json
import math
import os
import platform
import queue
import secrets
import subprocess
import sys
import threading
import zipfile
import zlib

import numpy as np
import torch

from support.files import finite_or_none, read_json, write_atomically
from support.settings import Refused, drop_output, regular

# --- checkpoints ----------------------------------------------------------------------------------


def save_checkpoint(path, content, keep=None):
    """Write a dict of tensors, containers and primitives; Refused if the disk has no room.

    keep: name beside `path` under which the checkpoint that it replaces stays.
    """
    stays = '; the previous checkpoint stays' if os.path.isfile(path) else ''
    content = {**content, 'outline': outline(content)}
    try:
        write_atomically(path, lambda f: torch.save(content, f), keep)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        if isinstance(error.__context__, KeyboardInterrupt):  # a second Ctrl-C
            raise KeyboardInterrupt from None
        reason = str(error).splitlines()[0]  # of an OSError, with the name of the file
        raise Refused(f'{path} could not be written ({reason}){stays}; correct that, then '
                      '--init_from=auto continues') from None


def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU; Refused if it is absent, damaged or another file."""
    if not os.path.exists(path):
        raise Refused(f'no checkpoint {path}; check the folder, or start with --init_from=scratch')
    try:
        with zipfile.ZipFile(regular(path)) as archive:  # torch.load checks no checksums
            if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):
                raise ValueError('it unpacks to more than the file')
            if damaged := archive.testzip():
                raise ValueError(f'{damaged} in it does not match its checksum')
        content = torch.load(path, map_location='cpu', weights_only=True)
        written_as = content.get('format')
        if content.pop('outline', None) != outline(content) and written_as == FORMAT:
            raise ValueError('it was changed; if on purpose, write it by save_checkpoint')
    except Exception as error:  # torch raises a dozen types for a damaged file
        reason = f'{type(error).__name__}: {error}'.splitlines()[0][:120]
        raise Refused(f'checkpoint {path} is damaged or not one of ours ({reason}); use another '
                      'copy, e.g. best.pt for the weights') from None
    if written_as != FORMAT:
        raise Refused(f'checkpoint {path} is of another format ({written_as!r}, this version reads '
                      f'{FORMAT!r}); use the version that wrote it')
    return content


def outline(content):
    """Checksum of names, types, shapes and plain values but itself; the zip has those of tensors.

    ValueError: a tensor that repeats a few numbers many times.
    """
    def lines(each):
        if isinstance(each, dict):
            return [(key, lines(value)) for key, value in each.items() if key != 'outline']
        if isinstance(each, (list, tuple)):
            return [type(each).__name__, *map(lines, each)]
        if not torch.is_tensor(each):
            return each
        if each.nbytes > each.untyped_storage().nbytes():
            raise ValueError(f'a tensor of {size(each.nbytes)} that is not in it')
        return each.dtype, tuple(each.shape)

    return zlib.crc32(repr(lines(content)).encode())


FORMAT = 'nanoprune 3'  # older ones do not load: no model configuration, another AdamWSPAM


# --- pruned weights, stored sparse ----------------------------------------------------------------


def pack(tensor, mask):
    """What the mask keeps of `tensor`, on the CPU: one bit a weight and the kept values."""
    mask = mask.cpu()
    bits = torch.from_numpy(np.packbits(mask.numpy()))
    return {'bits': bits, 'values': tensor.cpu()[mask], 'shape': list(tensor.shape)}


def unpack(packed):
    """The tensor of pack, to the bit, +0 where pruned."""
    shape = packed['shape']
    bits = np.unpackbits(packed['bits'].numpy())[:math.prod(shape)]
    mask = torch.from_numpy(bits.reshape(shape)).bool()  # ValueError: too few for this shape
    out = torch.zeros(shape, dtype=packed['values'].dtype)
    return out.masked_scatter_(mask, packed['values'])


def pack_weights(weights, masks, dtype):
    """{name: tensor}, the masked ones packed, matrices in `dtype`; unpack_weights undoes it."""
    packed = {}
    for name, weight in weights.items():
        cast = weight.to(dtype) if weight.dim() >= 2 else weight
        # A copy, because torch.save writes all of the tensor that a view is of.
        packed[name] = pack(cast, masks[name]) if name in masks else cast.clone()
    return packed


def unpack_weights(weights):
    """{name: dense tensor} of what a checkpoint has under `weights`, packed or not."""
    return {name: unpack(w) if isinstance(w, dict) else w for name, w in weights.items()}


def share_of_zeros(weights):
    """Of the matrices in the blocks, by {name: tensor} of a model."""
    matrices = [w for name, w in weights.items() if name.startswith('blocks.') and w.dim() == 2]
    return sum((w == 0).sum().item() for w in matrices) / max(1, sum(map(torch.numel, matrices)))


# --- log, metrics, tracker ------------------------------------------------------------------------

TRACKERS = ('none', 'wandb', 'trackio', 'tensorboard')
TRACKER_PATIENCE = 60  # seconds in which it may send what is left when the run has ended


def clock(seconds):
    """Seconds as h:mm:ss."""
    seconds = int(seconds)
    return f'{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}'


def size(n):
    """Bytes as text."""
    return f'{n / 2**30:.2f} GiB' if n >= 2**28 else f'{n / 2**20:.1f} MiB'


class RunLog:
    """Prints and keeps what a run says."""

    def __init__(self, out_dir, tracker='none', config=None, keep_until=None, write=True,
                 speak=True):
        """keep_until: the step a run resumes from; what was measured after it goes. None: anew.
        write, speak: whether there are files, and whether anything is printed."""
        self.write = write
        self.speak = speak
        self.tracker = None  # the thread that gives records to a tracker
        if not write:
            return
        os.makedirs(out_dir, exist_ok=True)
        metrics, text = (os.path.join(out_dir, name) for name in ('metrics.jsonl', 'train.log'))
        kept = []
        if keep_until is not None:
            # The evaluation at the step it resumes from is made again, if it is due.
            kept = [line for line, record in metrics_lines(metrics)
                    if record is None or record['step'] < keep_until + ('loss' in record)]
        write_atomically(metrics, lambda f: f.writelines(kept))
        if keep_until is None or os.path.islink(text) or not os.path.isfile(text):
            write_atomically(text, lambda f: None)  # in the place of a link or a FIFO
        self.metrics = open(metrics, 'a', encoding='utf-8')
        self.text = open(text, 'a', encoding='utf-8', errors='backslashreplace')
        if tracker != 'none':  # in a thread, because a server may take long to answer
            self.records = queue.SimpleQueue()
            told = (tracker, out_dir, keep_until is None, config)
            self.tracker = threading.Thread(target=self.follow, args=told, daemon=True)
            self.tracker.start()

    def follow(self, tracker, out_dir, anew, config):
        """Give records to a tracker. It never ends a run: its first error is its own end."""
        try:
            run_tracker(tracker, out_dir, anew, config, iter(self.records.get, None))
        except Exception as error:  # whatever its package raises
            with contextlib.suppress(ValueError):  # the run has ended, and its files are closed
                self.say(f'WARNING: tracker={tracker} is not available ({type(error).__name__}: '
                         f'{error}); metrics.jsonl has it all')

    def say(self, line):
        if self.speak:
            try:
                print(line, flush=True)
            except OSError:  # train.log has it all
                drop_output()
        if self.write:
            self.put(self.text, line)

    def put(self, file, line):
        """A line into a file. Without room the run goes on, and the file's buffer keeps the line:
        whether that matters is for the next checkpoint to say."""
        try:
            print(line, file=file, flush=True)
        except OSError as error:
            with contextlib.suppress(OSError):
                print(f'WARNING: {file.name}: {error.strerror}', flush=True)

    def measure(self, record):
        """One object of metrics.jsonl."""
        if not self.write:
            return
        text = json.dumps(finite_or_none(record))[:-1]
        self.put(self.metrics, f'{text}, "crc": {zlib.crc32(text.encode())}}}')
        if self.tracker:
            self.records.put(record)

    def sync(self):
        """Wait until the disk has all that was measured, if it has room."""
        with contextlib.suppress(OSError):
            os.fsync(self.metrics.fileno())

    def close(self):
        if self.tracker:
            self.records.put(None)
            self.tracker.join(TRACKER_PATIENCE)
        if self.write:
            for file in (self.metrics, self.text):
                with contextlib.suppress(OSError):  # a full disk
                    file.close()


def tracker_name(out_dir, anew):
    """What a tracker calls the run: its folder and a number, which a resumed run keeps."""
    path = os.path.join(out_dir, 'tracker_name')
    if anew or not os.path.exists(path):
        name = f'{os.path.basename(os.path.abspath(out_dir))}-{secrets.token_hex(4)}'
        write_atomically(path, lambda f: f.write(name.encode()))
    with open(path, encoding='utf-8') as f:
        return f.read()


def run_tracker(tracker, out_dir, anew, config, records):
    """Give records, of training and of evaluations, to a tracker as train/ and val/; what it has of
    the run goes on, unless `anew`. Raises whatever the tracker's package raises."""
    def numbers(record):
        part = 'train' if 'loss' in record else 'val'
        return {f'{part}/{key.removeprefix("val_")}': value for key, value in record.items()
                if value is not None and key != 'step'}

    name = tracker_name(out_dir, anew)
    if tracker == 'tensorboard':
        tensorboard = importlib.import_module('torch.utils.tensorboard')
        writer = tensorboard.SummaryWriter(os.path.join(out_dir, tracker))
        writer.add_text('settings', '\n'.join(f'    {key} = {config[key]!r}' for key in config))
        for record in records:
            for key, value in numbers(record).items():
                writer.add_scalar(key, value, record['step'])
            writer.flush()
        return
    folder = os.path.abspath(out_dir)
    os.environ.setdefault('TRACKIO_DIR', os.path.join(folder, 'trackio'))
    package = importlib.import_module(tracker)  # wandb and trackio have nearly the same interface
    own = dict(id=name, dir=folder) if tracker == 'wandb' else {}
    package.init(project='nanoprune', name=name, config=config, resume='allow', **own)
    for record in records:
        package.log(numbers(record), step=record['step'])
    package.finish()


def metrics_lines(path):
    """[(line in bytes, its record or None)] of a metrics.jsonl; says how many are damaged."""
    if not os.path.exists(path):
        return []
    with open(regular(path), 'rb') as f:
        lines = [(line.rstrip(b'\n') + b'\n', record_of(line)) for line in f]
    if damaged := sum(record is None for _, record in lines):
        print(f'note: {path}: {damaged} damaged lines are left out, and stay', file=sys.stderr)
    return lines


def record_of(line):
    """The record of a line, None if it is damaged. The lines of results/ have no checksum."""
    text, has_checksum, _ = line.rpartition(b', "crc": ')
    try:
        record = json.loads(line)
        whole = record.pop('crc', None) == zlib.crc32(text) or not has_checksum
        return record if whole and type(record['step']) is int else None
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return None


def read_metrics(path):
    """The records of a metrics.jsonl, without damaged lines."""
    return [record for _, record in metrics_lines(path) if record is not None]


def exit_reason(out_dir):
    """How the run in it ended, by its summary.json; '' if there is none that can be read."""
    try:
        summary = read_json(os.path.join(out_dir, 'summary.json'), ['exit_reason'])
    except Refused:
        return ''
    return summary['exit_reason'] if summary else ''


def provenance():
    """What made this run: command, commit of the code (and whether it was edited), versions."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    describe = ['git', '-C', home, 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    try:
        told = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        told = ''
    return dict(
        command=' '.join(sys.argv),
        commit=told.removesuffix('-dirty') or 'unknown',
        edited=told.endswith('-dirty'),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        host=platform.node(),
    )
