"""The run directory: files that are whole or absent, checkpoints with a checksum, log, metrics, tracker.

out_dir/ holds config.json, train.log, metrics.jsonl, last.pt (everything, for resume), best.pt (weights only)
and summary.json.
"""
import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys

import torch

from files import finite_or_none, write_atomically
from model import GPT, model_config
from prune import masked, unpack_weights
from settings import Refused, Settings


# --- checkpoints -------------------------------------------------------------------------------------


def checksum(content, digest=None):
    """SHA-256 over a tree of dicts, primitives and CPU tensors: keys, types, shapes and bytes."""
    outermost, digest = digest is None, digest or hashlib.sha256()
    if isinstance(content, dict):
        digest.update(f'dict {len(content)};'.encode())
        for key, value in content.items():
            digest.update(f'{key!r}:'.encode())
            checksum(value, digest)
    elif torch.is_tensor(content):
        digest.update(f'{content.dtype} {tuple(content.shape)};'.encode())
        digest.update(content.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        digest.update(f'{content!r};'.encode())
    return digest.hexdigest() if outermost else None


def to_cpu(content):
    """The same tree with every tensor copied to the CPU, each with memory of its own."""
    if isinstance(content, dict):
        return {key: to_cpu(value) for key, value in content.items()}
    return content.detach().to('cpu', copy=True) if torch.is_tensor(content) else content


def save_checkpoint(path, content):
    """Write a dict of tensors, dicts and primitives, atomically and with its checksum.

    Refused if the disk has no room; the previous file stays.
    """
    content = to_cpu(content)
    try:
        write_atomically(path, lambda f: torch.save({**content, 'checksum': checksum(content)}, f))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise Refused(f'{path} could not be written ({str(error).splitlines()[0]}); the previous checkpoint stays') from None


def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU; Refused if the file is absent, damaged or something else."""
    if not os.path.exists(path):
        raise Refused(f'no checkpoint {path}; check the folder, or start with --init_from=scratch')
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
        stored = content.pop('checksum')
        if checksum(content) == stored:
            return content
        reason = 'its checksum does not match'
    except Exception as error:  # torch raises a dozen types for a damaged file
        reason = f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}'[:120]
    raise Refused(f'checkpoint {path} is damaged or not one of ours ({reason}); use another copy, e.g. best.pt for the weights')


def load_model(run_dir, checkpoint):
    """(model on the CPU, its matrices in float32 as the run uses them; what the checkpoint says of itself). Refused: damaged or absent.

    checkpoint: 'best' or 'last'.
    """
    path, last = (os.path.join(run_dir, f'{name}.pt') for name in (checkpoint, 'last'))
    if not os.path.exists(path) and os.path.exists(last):
        raise Refused(f'{path} is not there: it is written at the first evaluation after step 0 that beats those before, of a pruned run '
                      'from prune_end on; use --checkpoint=last')
    saved = load_checkpoint(path)
    model = GPT(model_config(Settings(**saved['settings']), saved['data']['vocab_size']))
    model.load_state_dict(masked(unpack_weights(saved['weights']), saved.get('mask', {})))
    return model.eval(), saved


# --- log, metrics, tracker ---------------------------------------------------------------------------


def clock(seconds):
    """Seconds as h:mm:ss."""
    return f'{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}'


class RunLog:
    """Prints and keeps what a run says. On ranks other than 0 everything is a no-op."""

    def __init__(self, out_dir, tracker='none', config=None, keep_until=None, write=True):
        """keep_until: when a run resumes from this step, what was measured after it goes; None starts anew."""
        self.write, self.track = write, None
        if not write:
            return
        os.makedirs(out_dir, exist_ok=True)
        metrics = os.path.join(out_dir, 'metrics.jsonl')
        # The evaluation at the step it resumes from is made again, if it is due.
        kept = [r for r in read_metrics(metrics) if keep_until is not None and r['step'] < keep_until + ('loss' in r)]
        write_atomically(metrics, lambda f: f.write(''.join(json.dumps(r) + '\n' for r in kept).encode()))
        self.metrics = open(metrics, 'a')
        self.text = open(os.path.join(out_dir, 'train.log'), 'w' if keep_until is None else 'a')
        try:
            self.track = open_tracker(tracker, out_dir, config or {})
        except Exception as error:
            self.say(f'WARNING: tracker={tracker} is not available ({type(error).__name__}: {error}); metrics.jsonl has it all')

    def say(self, line=''):
        if self.write:
            print(line, flush=True)
            self.text.write(line + '\n')
            self.text.flush()

    def measure(self, record):
        """One object of metrics.jsonl."""
        if not self.write:
            return
        self.metrics.write(json.dumps(finite_or_none(record)) + '\n')
        self.metrics.flush()
        if self.track:
            try:
                self.track({k: v for k, v in record.items() if isinstance(v, (int, float))}, record['step'])
            except Exception as error:
                self.track = None
                self.say(f'WARNING: the tracker failed ({type(error).__name__}: {error}); metrics.jsonl has it all')

    def close(self):
        if self.write:
            self.metrics.close()
            self.text.close()


def read_metrics(path):
    """The objects of a metrics.jsonl; a last line cut short by a crash is left out."""
    records = []
    if os.path.exists(path):
        with open(path) as f:
            for line in f:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
    return records


def open_tracker(name, out_dir, config):
    """A function (numbers, step) for the tracker `name`; raises whatever its package raises."""
    if name == 'none':
        return None
    if name == 'tensorboard':
        writer = importlib.import_module('torch.utils.tensorboard').SummaryWriter(os.path.join(out_dir, 'tensorboard'))
        return lambda numbers, step: [writer.add_scalar(k, v, step) for k, v in numbers.items()]
    package = importlib.import_module(name)  # wandb and trackio share this interface
    package.init(project='nanoprune', name=os.path.basename(os.path.normpath(out_dir)), config=config)
    if name == 'wandb':
        return lambda numbers, step: package.log(numbers, step=step)
    return lambda numbers, step: package.log(numbers)


def provenance():
    """What made this run: command, commit of the code (and whether it was edited), versions."""
    home = os.path.dirname(os.path.abspath(__file__))

    def git(*words):
        try:
            return subprocess.run(['git', '-C', home, *words], capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ''

    return dict(command=' '.join(sys.argv), commit=git('rev-parse', 'HEAD') or 'unknown',
                edited=bool(git('status', '--porcelain', '--untracked-files=no')), python=platform.python_version(),
                torch=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip, host=platform.node())
