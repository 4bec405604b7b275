"""Fuzzed settings, checkpoints and metrics: whole files and command lines of odd content."""
import dataclasses
import os
import signal
from typing import get_args

import torch

from . import judge, sabotage
from .cases import HALF
from .runner import train

# --- settings -------------------------------------------------------------------------------------

KINDS_OF = {field.name: field.type for field in dataclasses.fields(train.Settings)
            if field.name not in ('compile', 'tracker')}  # a compiler is not at every hand
SUITABLE = {
    bool: ('True', 'False'),
    int: '-1 0 1 2 3 4 5 8 16 33 100 1000 1000000000000 4611686018427387904'.split(),
    float: '-1 0 1e-30 0.001 0.1 0.5 0.999 1 2 10 1e6 1e30 1e300'.split(),
    str: ('/dev/null', '/dev/null/x', '/proc/nowhere', '.', 'über', 'a' * 5000, 'x\ny', '~', ' x'),
}
STRANGE = [*SUITABLE[str], *'''True 2.5 -0.0 1e308 -inf nan 9223372036854775807 None 0x10 １２ 1_0 '
    9223372036854775808 -9223372036854775809 [1] {} %s%n cuda cuda:7 hf:.'''.split(), '', ' ', '=',
           '\udcff', '\x1b[31m', '1' + '0' * 400]
OBJECTS = ('None', '[1, 2]', '{}', "b'x'", '10**400', '10**5000', "float('nan')", "'a\\0b'", '1j',
           '{1}', 'range(3)', "'\\ud800'", '-1', '0.5', '10**30', "float('inf')", '...', 'object()')
LINES = ('import sys; sys.exit()', '1/0', 'x = (', 'raise KeyboardInterrupt', '\x00', 'quit(0)',
         '[' * 200, 'raise SystemExit("x")',
         'import nothing_there', 'f = lambda: f()\nf()', 'raise MemoryError')


def odd_argument(draw):
    """Like --key=value, or not quite."""
    key = draw.choice(sorted(KINDS_OF))
    kind = KINDS_OF[key]
    if draw.random() < 0.03:
        return draw.choice((f'-{key}=1', f'--{key}', key, 'nowhere.py', '.', '', '--', '-h', '='))
    values = [value for value in get_args(kind) if 'PATH' not in value] or (
        SUITABLE.get(kind, SUITABLE[str]))
    value = draw.choice(STRANGE if draw.random() < 0.1 else values)
    if draw.random() < 0.03:
        key = draw.choice((key.upper(), key[:-1], key.replace('_', '-'), '', '=', '\udcff'))
    return f'--{key}={value}'


def settings(case):
    """One to three odd settings, on the command line or in a config file."""
    if case.draw.random() < 0.2:
        lines = [f'{case.draw.choice(sorted(KINDS_OF))} = {case.draw.choice(OBJECTS)}']
        if case.draw.random() < 0.4:
            lines.append(case.draw.choice(LINES))
        (case.place / 'odd.py').write_text('\n'.join(lines) + '\n')
        odd = ['odd.py']
    else:
        odd = [odd_argument(case.draw) for _ in range(case.draw.randint(1, 3))]
    command = case.start([*case.argv(), *odd], sabotage.little_memory)
    if not command.finished(4):  # a long run, perhaps: it must be one that can be stopped
        command.send(signal.SIGTERM)
        if not command.finished(20):
            command.send(signal.SIGTERM)  # a step may take that long: the second acts at once
    ended = command.wait()
    judge.end(ended, (0, 1, 2, 3, 143, -15))
    if ended.code == 143 or 'finished: validation loss' in ended.out:
        folders = {path.parent for path in case.place.rglob('last.pt')}
        if not folders:
            raise judge.Lost(f'{odd}: ended with {ended.code}, and there is no checkpoint')
        for folder in folders:
            judge.finite(folder)


# --- checkpoints ----------------------------------------------------------------------------------


class Malice:
    """A pickle that makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ('owned',)


def paths_in(content, path=()):
    """The ways to all that lies in nested dicts and lists."""
    if path:
        yield path
    if isinstance(content, (dict, list)) and len(path) < 5:
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from paths_in(content[key], (*path, key))


def odd_value(draw, value):
    """Something of another type, or a tensor that is not quite like it."""
    odd = [None, 'x', [], {}, (), 1 << 70, [[]], {'x': {}}, Malice(), b'x', torch.zeros(3), -7.5]
    if torch.is_tensor(value):
        odd += [value[..., None], value.flatten()[:1].clone(), torch.zeros(1).expand(1 << 40),
                value.to(torch.complex64), torch.full_like(value.float(), float('nan')),
                torch.empty(0), value.float().to_sparse(), value.bool()]
    return draw.choice(odd)


def operate(draw, content):
    """A part goes, gets another name or becomes odd: (the whole after that, what was done)."""
    if draw.random() < 0.05:
        return odd_value(draw, None), 'all'
    *way, key = draw.choice(list(paths_in(content)))
    inside = content
    for each in way:
        inside = inside[each]
    value = inside[key]
    how = draw.choice(('drop', 'rename', 'odd', 'odd'))
    if how == 'odd':
        inside[key] = odd_value(draw, value)
    else:
        del inside[key]
    if how == 'rename' and isinstance(inside, dict):
        inside[f'x_{key}'] = value
    return content, f'{how} {".".join(map(str, (*way, key)))}'


def checkpoints(case):
    """A whole last.pt or best.pt whose content is not what was saved."""
    case.go_half()
    path = case.folder / case.draw.choice(('last.pt', 'last.pt', 'best.pt'))
    if not path.exists():  # half way through pruning there is no best.pt
        path = case.folder / 'last.pt'
    content, done = operate(case.draw, judge.read_checkpoint(path))
    torch.save(content, path)
    if path.name == 'best.pt':
        ended = case.sample()
    else:
        ended = case.run(init_from='auto', sabotage=sabotage.little_memory)
    try:
        judge.end(ended, (0, 2, 3), case.folder)
        if (case.place / 'owned').exists():
            raise judge.Wrong('code in a checkpoint was run')
        if ended.code == 0 and path.name == 'last.pt':
            judge.same(case)
        else:
            case.put_back(path)
            judge.recover(case, HALF)
    except judge.Wrong as wrong:
        raise judge.Wrong(f'{path.name}, {done}: {wrong}') from None


# --- metrics --------------------------------------------------------------------------------------

ODD_LINES = (
    b'', b'\xff\xfe', b'null', b'7', b'{"st', b'{"step": "x"}', b'{"step": null, "loss": 1}',
    b'{"step": 1e400}', b'{"step": NaN, "loss": NaN}', b'{"step": -5, "loss": "x"}', b'\0' * 4096,
    b'[' * 100_000, b'x' * 1_000_000, b'{"step": 1' + b'0' * 5000 + b'}', b'{"step": true}',
    b'{"step": [1]}', b'{"step": 2.5, "val_loss": {}}', b'{"loss": 1}', b'\xe2\x80\xa8', b'\r')


def metrics(case):
    """Odd lines between those of metrics.jsonl: the run goes on exactly, and none is lost."""
    case.go_half()
    path = case.folder / 'metrics.jsonl'
    lines = path.read_bytes().split(b'\n')[:-1]
    for _ in range(case.draw.randint(1, 4)):
        lines.insert(case.draw.randint(0, len(lines)), case.draw.choice(ODD_LINES))
    end = case.draw.choice((b'\n', b'\n', b'', b'\n{"step": 15, "lo'))  # cut short by a crash
    path.write_bytes(b'\n'.join(lines) + end)
    judge.recover(case, HALF)
    judge.end(case.report(), (0,))


KINDS = {'settings': (settings, 80), 'checkpoints': (checkpoints, 60), 'metrics': (metrics, 40)}
