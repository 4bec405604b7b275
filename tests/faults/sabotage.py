"""What is done inside of a fork before its command begins: files and numbers that fail."""
import builtins
import errno
import io
import os
import resource
import signal

import torch

from .runner import train

# --- files ----------------------------------------------------------------------------------------

# How often a run of cases.py makes each call, about: which one fails is drawn below that.
CALLS = {'open': 24, 'fsync': 36, 'replace': 18, 'write': 80, 'remove': 4, 'makedirs': 1}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EMFILE)


def fail_at(name, number, act, folder):
    """From the number-th call of `name` on, act(path) comes first, for files in `folder`."""
    counted = 0

    def touched(call, path=None):
        nonlocal counted
        counted += call == name
        if call == name and counted >= number:
            act(path)

    class File(io.FileIO):
        def write(self, data):
            touched('write')
            return super().write(data)

    plain_open = builtins.open

    def open_for_writing(path, mode='r', buffering=-1, encoding=None, **more):
        ours = isinstance(path, (str, os.PathLike)) and str(path).startswith(str(folder))
        if not ours or not set(mode) & set('wax+'):
            return plain_open(path, mode, buffering, encoding, **more)
        touched('open', path)
        raw = File(path, mode.replace('b', '').replace('t', ''))
        file = io.BufferedRandom(raw) if '+' in mode else io.BufferedWriter(raw)
        return file if 'b' in mode else io.TextIOWrapper(file, encoding, **more)

    def watched(call, function):
        def wrapper(path, *arguments, **more):
            touched(call, path)
            return function(path, *arguments, **more)
        return wrapper

    builtins.open = io.open = open_for_writing
    for call in ('fsync', 'replace', 'remove', 'makedirs'):
        setattr(os, call, watched(call, getattr(os, call)))


def little_memory():
    """6 GiB of address space: torch itself takes less than 2."""
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


def die(path):
    os.kill(os.getpid(), signal.SIGKILL)


def raise_error(number, path):
    """As the system does: of an open file it tells no name."""
    raise OSError(number, os.strerror(number), *([path] if isinstance(path, str) else []))


# --- numbers --------------------------------------------------------------------------------------


class BadGradient(torch.autograd.Function):
    """The loss as it is; its gradient is bad."""

    @staticmethod
    def forward(context, loss, bad):
        context.bad = bad
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * context.bad, None


def forward_does(number, training, change):
    """The number-th call of the model, of those in training or of the others, is changed."""
    forward = train.GPT.forward
    calls = 0

    def changed(self, idx, targets=None):
        nonlocal calls
        loss = forward(self, idx, targets)
        mine = self.training == training and not idx.is_meta  # memory is counted on meta
        calls += mine
        return change(loss) if mine and calls == number else loss

    train.GPT.forward = changed


def bad_weight(number, bad, draw):
    """After the number-th update a weight is bad."""
    refresh = train.optim.refresh_working
    updates = 0

    def changed(flats):
        nonlocal updates
        updates += len(flats) > 1  # of an update; when they are made, they come one by one
        if len(flats) > 1 and updates == number:
            name = draw.choice(sorted(flats[0].parameters))
            flats[0].parameters[name].data.view(-1)[0] = bad
        refresh(flats)

    train.optim.refresh_working = changed


def signal_in_step(number, name=signal.SIGTERM):
    """The process gets a signal in its number-th update."""
    def send(loss):
        os.kill(os.getpid(), name)
        return loss

    forward_does(number, True, send)
