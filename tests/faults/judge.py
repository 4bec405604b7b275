"""What became of a run after a fault, judged with readers of its own."""
import json
import math
import re
import zipfile

import torch

STEPS = 24  # updates of a run that faults strike
LOG_INTERVAL = 2
FILES = {'config.json', 'train.log', 'metrics.jsonl', 'last.pt', 'previous.pt', 'best.pt',
         'last.pt.damaged', 'summary.json'}
# What of metrics.jsonl and summary.json depends neither on the machine nor on the sessions.
EXACT = set('''step steps tokens loss grad_norm lr val_loss val_ppl best_val_loss sparsity
    sparsity_all sparsity_by_layer spikes clipped resets effective_batch parameters dataset
    fingerprint exit_reason'''.split())


class Lost(Exception):
    """Work that had been saved is gone, or cannot be continued."""


class Wrong(Exception):
    """A result that is not the undisturbed one, a traceback, a hang, a leftover."""


# --- what a command said --------------------------------------------------------------------------


def end(ended, codes, *names):
    """It ended with one of the codes, and said why: where it was refused, with one of the names."""
    told = f'{ended.out[-300:]}{ended.err[-1500:]}'
    if ended.code is None:
        raise Wrong(f'hangs: {told}')
    if 'Traceback' in ended.out + ended.err or 'Exception ignored' in ended.err:
        raise Wrong(f'traceback, code {ended.code}: {told}')
    if ended.code not in codes:
        raise Wrong(f'exit code {ended.code}, not one of {codes}: {told}')
    if ended.code in (1, 2, 3):
        if not told.strip() or not any(str(n) in ended.out + ended.err for n in names or ['']):
            raise Wrong(f'exit code {ended.code} without a word of {names}: {told}')


def leftovers(folder):
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names - FILES:
        raise Wrong(f'left behind: {sorted(names - FILES)}')


# --- results --------------------------------------------------------------------------------------


def read_checkpoint(path):
    """The content, or None where there is no whole file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                return None
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception:  # torch raises a dozen types
        return None


def saved_step(folder):
    """The step of last.pt, 0 where there is none; Lost if it is damaged."""
    if not (folder / 'last.pt').exists():
        return 0
    content = read_checkpoint(folder / 'last.pt')
    if content is None:
        raise Lost('last.pt is damaged')
    return content['step']


def records(folder):
    """The good lines of metrics.jsonl, without those of steps that only a restart logs."""
    found = []
    for line in (folder / 'metrics.jsonl').read_bytes().split(b'\n'):
        try:
            record = json.loads(line)
            step = record['step']
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if type(step) is not int:
            continue
        if 'loss' not in record or step in (1, STEPS) or step % LOG_INTERVAL == 0:
            found.append({k: v for k, v in record.items() if k in EXACT})
    return found


def result(folder):
    """All that a run leaves behind, but for times and places."""
    last, best = (read_checkpoint(folder / name) for name in ('last.pt', 'best.pt'))
    summary = json.loads((folder / 'summary.json').read_text())
    parts = {key: last[key] for key in ('weights', 'optimizer', 'pruner', 'step', 'fingerprint')}
    progress = {k: v for k, v in last['progress'].items() if k != 'seconds'}
    return dict(
        last={**parts, 'progress': progress},
        best=best and best['weights'],
        records=records(folder),
        summary={k: v for k, v in summary.items() if k in EXACT})


def difference(a, b, path=''):
    """Where two results differ first, '' if nowhere."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return '' if same else path
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        pairs = [(f'{path}.{key}', a[key], b[key]) for key in a]
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = [(f'{path}[{i}]', *pair) for i, pair in enumerate(zip(a, b))]
    else:
        return '' if a == b and type(a) is type(b) else f'{path}: {a!r:.100} != {b!r:.100}'
    return next(filter(None, (difference(x, y, where) for where, x, y in pairs)), '')


def same(case, ignore=()):
    """The run directory holds the undisturbed result, but for these parts."""
    leftovers(case.folder)
    try:
        found = result(case.folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Wrong(f'no readable result ({type(error).__name__}: {error})') from None
    for part, value in case.wanted[case.scenario].items():
        where = difference(value, found[part], part)
        if where and part not in ignore:
            raise Wrong(f'not the undisturbed result: {where}')


def finite(folder):
    """There is no checkpoint that holds a weight or a loss that is not finite."""
    for name in ('last.pt', 'previous.pt', 'best.pt'):
        content = read_checkpoint(folder / name)
        for key, weight in content['weights'].items() if content else ():
            values = weight['values'] if isinstance(weight, dict) else weight
            if not torch.isfinite(values).all():
                raise Lost(f'{name}: {key} is not finite')
        if content and not math.isfinite(content['val_loss']):
            raise Lost(f"{name}: val_loss {content['val_loss']}")


def recover(case, saved=None):
    """Go on as a user would: from where it was saved, to the undisturbed end."""
    saved = saved_step(case.folder) if saved is None else saved
    ended = case.run(init_from='auto')
    end(ended, (0, 1, 2, 3))
    if ended.code != 0:
        raise Lost(f'cannot be continued: {ended.err[-600:] or ended.out[-600:]}')
    found = re.search(r'continued from step (\d+)', ended.out)
    went_on = int(found[1]) if found else 0
    if saved > went_on and not (saved == STEPS and 'nothing to do' in ended.out):
        raise Lost(f'saved at step {saved}, continued from {went_on}')
    same(case)
