"""Faults of what lies on the disk: bits that turn over, files cut short or gone, odd shards."""
import os

from . import judge
from .cases import HALF

# --- the run directory ----------------------------------------------------------------------------


def flip(draw, path):
    """One to three bits turn over."""
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 3)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(draw, path):
    """Parts of a file are missing, zero or strange, or it is no file."""
    content = path.read_bytes()
    place = draw.randrange(len(content))
    contents = dict(
        short=content[:place], empty=b'', strange=draw.randbytes(len(content)),
        zeros=content[:place] + bytes(len(content) - place),
        more=content + draw.randbytes(draw.randint(1, 999)))
    path.unlink()
    way = draw.choice([*sorted(contents), 'gone', 'dangling', 'folder'])
    if way == 'dangling':
        path.symlink_to('nowhere')
    elif way == 'folder':
        path.mkdir()
    elif way in contents:
        path.write_bytes(contents[way])


def damaged_run(case, damage):
    """A file of a run half way is damaged: it goes on exactly, or is refused by name and whole."""
    case.go_half()
    names = sorted(path.name for path in case.folder.iterdir())
    name = case.draw.choice([*names, 'last.pt', 'metrics.jsonl'])
    path = case.folder / name
    damage(case.draw, path)
    ended = case.run(init_from='auto')
    judge.end(ended, (0, 1, 2), path)
    if ended.code:
        if path.is_file() and not path.is_symlink():  # in each case the rest is enough to go on
            raise judge.Lost(f'damage of {name} ends the run: {ended.err[-300:]}')
        case.put_back(path)
        judge.recover(case, HALF)
    judge.same(case, {'metrics.jsonl': ['records'], 'best.pt': ['best']}.get(name, []))
    later = [[record for record in all if record['step'] > HALF]
             for all in (judge.records(case.folder), case.wanted[case.scenario]['records'])]
    if later[0] != later[1]:  # whatever became of those before
        raise judge.Wrong('metrics after the checkpoint are not the undisturbed ones')
    judge.end(case.report(), (0, 2), path)
    judge.end(case.sample(), (0, 2), path)


def flips(case):
    """Bits of a file in the run directory turn over."""
    damaged_run(case, flip)


def cuts(case):
    """A file of the run directory is cut short, emptied, overwritten, gone, a folder or a link."""
    damaged_run(case, cut)


# --- data -----------------------------------------------------------------------------------------


def data(case):
    """A shard or meta.json is damaged before a run, half way, or while it works; then restored."""
    case.own_data()
    when = case.draw.choice(('before', 'half way', 'while it works'))
    path = case.draw.choice(sorted(case.data.iterdir()))
    damage = case.draw.choice((flip, flip, cut))
    if when == 'half way':
        case.go_half()
    if when != 'while it works':
        damage(case.draw, path)
    command = case.start(init_from='auto')
    if when == 'while it works':
        command.send(0, case.draw.uniform(0, case.seconds))
        damage(case.draw, path)
    ended = command.wait()
    judge.end(ended, (0, 1, 2), case.data)
    if ended.code == 0:
        judge.same(case)
    else:
        case.put_back(path)
        judge.recover(case)


def odd_shard(draw, folder):
    """Something is not right in a data folder."""
    path = draw.choice(sorted(folder.glob('*.bin')))
    whole = path.read_bytes()
    meta = (folder / 'meta.json').read_bytes()
    new = folder / draw.choice(('train_000009.bin', 'val_000009.bin'))
    odd = draw.choice((b'\0\0\0\0', b'\xff\xff\xff\xff', b'\xff\xff\xff\x7f', draw.randbytes(4)))
    at = draw.choice((0, 4, 8))
    ways = {
        'header': lambda: path.write_bytes(whole[:at] + odd + whole[at + 4:]),
        'token': lambda: path.write_bytes(whole[:-2] + draw.choice((b'\xff\xff', b'\x01\x01'))),
        'no tokens': lambda: path.write_bytes(whole[:1024]),
        'odd size': lambda: path.write_bytes(whole[:-1]),
        'fifo': lambda: os.mkfifo(new),
        'more': lambda: new.write_bytes(draw.choice((whole, b'', b'x'))),
        'other name': lambda: path.rename(new),
        'folder': lambda: new.mkdir(),
        'loop': lambda: new.symlink_to(new.name),
        'no meta': lambda: (folder / 'meta.json').unlink(),
        'meta': lambda: (folder / 'meta.json').write_bytes(draw.choice((
            b'', b'[]', b'null', b'{"name": "tiny"}', b'[' * 100_000, b'\xff\xfe{\0}\0',
            b'1' * 5000, meta.replace(b'"bytes"', b'["bytes"]'),
            meta.replace(b'"tiny"', b'{"tiny": 1}'), meta.replace(b'"fingerprint"', b'"finger"')))),
    }
    ways[draw.choice(sorted(ways))]()


def shards(case):
    """A data folder that prepare.py would not write, with meta.json or without."""
    case.own_data()
    odd_shard(case.draw, case.data)
    if case.draw.random() < 0.2:
        (case.data / 'meta.json').unlink(missing_ok=True)
    ended = case.run()
    judge.end(ended, (0, 2), case.data)
    if ended.code == 0:
        judge.same(case)


KINDS = {'flips': (flips, 60), 'cuts': (cuts, 40), 'data': (data, 40), 'shards': (shards, 40)}
