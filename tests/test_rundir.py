"""support/rundir.py: checkpoints, sparse weights, the log, metrics and trackers."""
import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import types
import zipfile

import pytest
import torch
from conftest import HOME, refusal

import train
from support import rundir
from support.rundir import (
    FORMAT,
    RunLog,
    clock,
    load_checkpoint,
    pack,
    pack_weights,
    provenance,
    read_metrics,
    record_of,
    save_checkpoint,
    size,
    unpack,
    unpack_weights,
)
from support.settings import Refused, run_command

# --- checkpoints ----------------------------------------------------------------------------------


def content(**more):
    draw = torch.Generator().manual_seed(0)
    weights = {'a': torch.randn(50, 40, generator=draw),
               'b': torch.randn(9, generator=draw).bfloat16()}
    return {'format': FORMAT, 'weights': weights, 'betas': (0.9, None), 'step': 4, 'model': {},
            'settings': {}, 'data': {}, 'fingerprint': 'f00d', **more}


def test_checkpoint_comes_back_as_it_was(tmp_path):
    saved = content(scalar=torch.tensor(3), empty=torch.zeros(0, 2), flags=[True, 'x'])
    saved['weights']['column'] = torch.arange(6.0).view(2, 3).T  # not contiguous
    save_checkpoint(str(tmp_path / 'last.pt'), saved)
    loaded = load_checkpoint(str(tmp_path / 'last.pt'))
    assert loaded.keys() == saved.keys()
    for name, tensor in saved['weights'].items():
        assert torch.equal(loaded['weights'][name], tensor)
        assert loaded['weights'][name].dtype == tensor.dtype
    assert loaded['betas'] == (0.9, None) and loaded['flags'] == [True, 'x']
    assert loaded['scalar'] == 3 and loaded['empty'].shape == (0, 2)


def damaged(path, content):
    """The problem of loading `content` as a checkpoint, without what is specific to the damage."""
    path.write_bytes(content)
    [problem] = refusal(load_checkpoint, str(path))
    begin = f'checkpoint {path} is damaged or not one of ours ('
    end = '); use another copy, e.g. best.pt for the weights'
    assert problem.startswith(begin) and problem.endswith(end) and '\n' not in problem
    return problem.removeprefix(begin).removesuffix(end)


def test_checkpoint_with_one_flipped_bit_is_refused(tmp_path):
    path = tmp_path / 'last.pt'
    save_checkpoint(str(path), content())
    whole = path.read_bytes()
    middle = whole.index(content()['weights']['a'].numpy().tobytes()) + 1001
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]
    assert 'does not match its checksum' in damaged(path, flipped)


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    path = tmp_path / 'last.pt'
    save_checkpoint(str(path), content())
    whole = path.read_bytes()
    for other in (whole[:len(whole) // 2], whole[:-1], b'', b'my notes\n', b'{"step": 4}'):
        damaged(path, other)
    torch.save([1, 2], path)
    damaged(path, path.read_bytes())


def test_checkpoint_that_unpacks_to_more_than_its_file_is_refused(tmp_path):
    path = tmp_path / 'last.pt'
    save_checkpoint(str(path), content(zeros=torch.zeros(300_000)))
    with zipfile.ZipFile(path) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as deflated:
        for name, data in members.items():
            deflated.writestr(name, data)
    assert damaged(path, path.read_bytes()) == 'ValueError: it unpacks to more than the file'


def test_tensor_that_repeats_a_few_numbers_is_refused(tmp_path):
    path = tmp_path / 'last.pt'
    torch.save(content(deep=[{'a': (torch.zeros(1).expand(2**28),)}]), path)
    assert damaged(path, path.read_bytes()) == ('ValueError: a tensor of 1.00 GiB that is not in '
                                                'it')
    bits = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(ValueError, match='cannot reshape array of size 8'):
        unpack({'bits': bits, 'values': torch.zeros(0), 'shape': [2**20, 2**20]})


@pytest.mark.parametrize('change', [
    lambda saved: saved.pop('outline'),
    lambda saved: saved['weights'].update(other=saved['weights'].pop('a')),
    lambda saved: saved['settings'].update(seed=2),
    lambda saved: saved.update(step=str(saved['step'])),
    lambda saved: saved['weights'].update(a=saved['weights']['a'].bfloat16())])
def test_checkpoint_changed_by_hand_is_refused_until_it_is_written_as_ours_are(tmp_path, change):
    path = str(tmp_path / 'last.pt')
    save_checkpoint(path, content())
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    assert 'if on purpose, write it by save_checkpoint' in refusal(load_checkpoint, path)[0]
    save_checkpoint(path, saved)
    assert int(load_checkpoint(path)['step']) == 4


def test_fifo_or_folder_as_a_checkpoint_is_refused(tmp_path):
    os.mkfifo(tmp_path / 'last.pt')
    (tmp_path / 'best.pt').mkdir()
    for name in ('last.pt', 'best.pt'):
        [problem] = refusal(load_checkpoint, str(tmp_path / name))
        assert problem.startswith(f'checkpoint {tmp_path / name} is damaged or not one of ours (')


def test_checkpoint_before_the_newest_stays(tmp_path):
    path = str(tmp_path / 'last.pt')
    for step in (1, 2, 3):
        save_checkpoint(path, content(step=step), keep='previous.pt')
    assert load_checkpoint(path)['step'] == 3
    assert load_checkpoint(str(tmp_path / 'previous.pt'))['step'] == 2
    assert sorted(os.listdir(tmp_path)) == ['last.pt', 'previous.pt']


def test_checkpoint_in_a_folder_that_is_gone_or_full_of_others(tmp_path):
    (tmp_path / 'last.pt').mkdir()
    for path, reason in ((tmp_path / 'gone' / 'last.pt', 'No such file or directory'),
                         (tmp_path / 'last.pt', 'Is a directory')):
        [problem] = refusal(save_checkpoint, str(path), content(), 'previous.pt')
        assert problem.startswith(f'{path} could not be written (') and reason in problem
        assert 'stays' not in problem
    assert os.listdir(tmp_path) == ['last.pt']


def test_folder_in_the_place_of_the_previous_checkpoint_is_named(tmp_path):
    save_checkpoint(str(tmp_path / 'last.pt'), content())
    (tmp_path / 'previous.pt').mkdir()
    [problem] = refusal(save_checkpoint, str(tmp_path / 'last.pt'), content(), 'previous.pt')
    assert f"Is a directory: '{tmp_path}/last.pt' -> '{tmp_path}/previous.pt'" in problem
    assert load_checkpoint(str(tmp_path / 'last.pt'))['step'] == 4


def test_a_second_interruption_while_saving_is_one(tmp_path, monkeypatch):
    """torch replaces it by an error of its own, because the archive is not finished."""
    torch_save = torch.save

    class Interrupted(io.BytesIO):
        def write(self, data):
            if self.tell() > 1000:
                raise KeyboardInterrupt
            return super().write(data)

    monkeypatch.setattr(torch, 'save', lambda saved, f: torch_save(saved, Interrupted()))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(str(tmp_path / 'last.pt'), content())
    assert os.listdir(tmp_path) == []


def test_missing_checkpoint_and_one_of_another_format(tmp_path):
    path = str(tmp_path / 'last.pt')
    assert refusal(load_checkpoint, path) == [
        f'no checkpoint {path}; check the folder, or start with --init_from=scratch']
    for other in ('nanoprune 2', None):
        save_checkpoint(path, content(format=other))
        [problem] = refusal(load_checkpoint, path)
        assert repr(other) in problem and repr(FORMAT) in problem and path in problem


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'run code'),)

    torch.save({'weights': Attack()}, tmp_path / 'last.pt')
    damaged(tmp_path / 'last.pt', (tmp_path / 'last.pt').read_bytes())
    assert not (tmp_path / 'run code').exists()


def test_full_disk_while_saving_keeps_the_previous_checkpoint(tmp_path):
    path = str(tmp_path / 'last.pt')
    save_checkpoint(path, content())
    limit = 200_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Writing beyond the limit then fails, as on a full disk.
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        [problem] = refusal(save_checkpoint, path, content(more=torch.ones(limit)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert problem.startswith(f'{path} could not be written (')
    assert problem.endswith('); the previous checkpoint stays; correct that, then --init_from=auto '
                            'continues')
    assert torch.equal(load_checkpoint(path)['weights']['a'], content()['weights']['a'])
    assert os.listdir(tmp_path) == ['last.pt']


def fill_disk(monkeypatch, is_full):
    """Files of which is_full(name while it is written) holds cannot be written."""
    real = os.fsync

    def full(descriptor):
        name = os.readlink(f'/proc/self/fd/{descriptor}')
        if name.endswith('.tmp') and is_full(name):
            raise OSError(errno.ENOSPC, 'No space left on device')
        real(descriptor)

    monkeypatch.setattr(os, 'fsync', full)


def test_disk_that_fills_while_training(tiny, tmp_path, monkeypatch, capsys):
    fill_disk(monkeypatch, lambda name: (tmp_path / 'run' / 'last.pt').exists())
    monkeypatch.setattr(sys, 'argv', ['train.py', *tiny(save_interval=2, eval_interval=8)])
    with pytest.raises(SystemExit) as ended:
        run_command(train.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f'refused:\n  - {tmp_path}/run/last.pt could not be written ([Errno 28] No space left on '
        f"device: '{tmp_path}/run/last.pt'); the previous checkpoint stays; correct that, then "
        '--init_from=auto continues\n')
    assert load_checkpoint(str(tmp_path / 'run' / 'last.pt'))['step'] == 2
    assert sorted(os.listdir(tmp_path / 'run')) == ['config.json', 'last.pt', 'metrics.jsonl',
                                                    'train.log']


@pytest.mark.parametrize('changes, code', [
    (dict(learning_rate=1e20, min_lr=0.0, warmup_iters=0, weight_decay=0.0), 3),  # NaN
    ({}, 1),  # finished, but nobody will know
])
def test_a_disk_without_room_for_the_summary(tiny, tmp_path, monkeypatch, changes, code):
    fill_disk(monkeypatch, lambda name: 'summary.json' in name)
    assert train.main(tiny(**changes)) == code
    assert (tmp_path / 'run' / 'train.log').read_text().endswith(
        f"WARNING: [Errno 28] No space left on device: '{tmp_path}/run/summary.json'; no summary "
        'tells how this run ended\n')


def test_an_error_is_told_even_if_there_is_no_room_for_the_summary(tiny, monkeypatch):
    def broken(run):
        raise ValueError('broken')

    fill_disk(monkeypatch, lambda name: 'summary.json' in name)
    monkeypatch.setattr(train, 'one_step', broken)
    with pytest.raises(ValueError, match='broken'):
        train.main(tiny())


SAVE_AND_KILL = '''
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from support.rundir import FORMAT, load_checkpoint, save_checkpoint
torch.set_num_threads(1)
path = sys.argv[2]
draw = random.Random(0)

def save(version):
    weights = {'all': torch.full((500_000,), float(version))}
    save_checkpoint(path, {'format': FORMAT, 'step': version, 'weights': weights, 'model': {},
                           'settings': {}, 'data': {}, 'fingerprint': ''})

save(0)
partial = 0
found = set()
for kill in range(25):
    child = os.fork()
    if child == 0:
        version = 100 * kill
        while True:
            version += 1
            save(version)
    time.sleep(draw.uniform(0.005, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    partial += os.path.exists(f'{path}.by-{child}.tmp')
    saved = load_checkpoint(path)
    assert (saved['weights']['all'] == saved['step']).all(), kill
    found.add(saved['step'])
save(-1)
assert load_checkpoint(path)['step'] == -1
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
print(partial, len(found))
'''


def test_kill_9_while_saving_leaves_a_whole_checkpoint(tmp_path):
    (tmp_path / 'run').mkdir()
    command = [sys.executable, '-c', SAVE_AND_KILL, str(HOME), str(tmp_path / 'run' / 'last.pt')]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    partial, versions = map(int, done.stdout.split())
    assert partial > 0 and versions > 1  # the kills came in the middle, and checkpoints changed


# --- pruned weights -------------------------------------------------------------------------------


@pytest.mark.parametrize('shape', [(64, 64), (7, 3), (1, 1)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_packed_weights_come_back_to_the_bit(shape, dtype):
    draw = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=draw) < 0.5
    dense = torch.randn(shape, generator=draw).to(dtype)
    dense[0, 0] = -0.0
    mask[0, 0] = True  # a kept weight may be zero
    packed = pack(dense, mask)
    back = unpack(packed)
    expected = torch.where(mask, dense, torch.zeros((), dtype=dtype))
    assert back.dtype == dtype
    integer = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(back.view(integer), expected.view(integer))
    if shape == (64, 64) and dtype == torch.float32:
        assert packed['bits'].nbytes + packed['values'].nbytes <= 0.55 * dense.nbytes


def test_matrices_are_packed_in_the_working_type_and_vectors_stay_as_they_are():
    weights = {'matrix': torch.full((4, 4), 1.001), 'dense': torch.full((2, 2), 1.001),
               'vector': torch.full((4,), 1.001)}
    mask = torch.eye(4, dtype=torch.bool)
    packed = pack_weights(weights, {'matrix': mask}, torch.bfloat16)
    assert packed['matrix']['values'].numel() == 4
    back = unpack_weights(packed)
    assert torch.equal(back['matrix'], torch.full((4, 4), 1.001).bfloat16() * mask)
    assert torch.equal(back['dense'], weights['dense'].bfloat16())
    assert torch.equal(back['vector'], weights['vector'])


# --- log and metrics ------------------------------------------------------------------------------


def records(folder):
    return read_metrics(os.path.join(folder, 'metrics.jsonl'))


def test_log_prints_and_keeps_and_metrics_have_no_nan(tmp_path, capsys):
    log = RunLog(str(tmp_path / 'a' / 'run'))
    log.say('first')
    log.measure(dict(step=1, loss=float('nan'), mfu=None))
    log.say('second')
    log.close()
    assert capsys.readouterr().out == 'first\nsecond\n'
    assert (tmp_path / 'a' / 'run' / 'train.log').read_text() == 'first\nsecond\n'
    assert records(tmp_path / 'a' / 'run') == [dict(step=1, loss=None, mfu=None)]


def test_resumed_log_goes_on_and_a_new_one_begins_anew(tmp_path):
    def log_once(text, keep_until, step):
        log = RunLog(str(tmp_path), keep_until=keep_until)
        log.say(text)
        log.measure(dict(step=step, loss=float(step)))
        log.close()

    log_once('first', None, 1)
    log_once('second', 1, 2)
    assert (tmp_path / 'train.log').read_text() == 'first\nsecond\n'
    assert [r['step'] for r in records(tmp_path)] == [1, 2]
    log_once('third', None, 1)
    assert (tmp_path / 'train.log').read_text() == 'third\n'
    assert [r['step'] for r in records(tmp_path)] == [1]


def test_resumed_metrics_drop_what_will_be_measured_again(tmp_path):
    measured = [dict(step=0, val_loss=1.0), dict(step=2, loss=1.0), dict(step=4, loss=1.0),
                dict(step=4, val_loss=1.0), dict(step=6, loss=1.0)]
    lines = [json.dumps(record) + '\n' for record in measured]
    (tmp_path / 'metrics.jsonl').write_text(''.join(lines) + '{"step": 7, "lo')
    RunLog(str(tmp_path), keep_until=4).close()
    assert records(tmp_path) == measured[:3]


def test_damaged_metrics_stay_where_they_are_and_are_counted(tmp_path, capsys):
    log = RunLog(str(tmp_path))
    for step in range(1, 6):
        log.measure(dict(step=step, loss=1 / step))
    log.close()
    path = tmp_path / 'metrics.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'0.5', b'0.7')  # still JSON
    lines[3:3] = [b'{"step": 4, "lo\xff\n', b'[' * 100_000 + b'\n']
    path.write_bytes(b''.join(lines) + b'{"step": 6, "los')
    assert [record['step'] for record in records(tmp_path)] == [1, 3, 4, 5]
    note = f'note: {path}: 4 damaged lines are left out, and stay\n'
    assert capsys.readouterr().err == note
    log = RunLog(str(tmp_path), keep_until=4)
    log.measure(dict(step=5, loss=0.0))
    log.close()
    assert capsys.readouterr().err == note
    kept = path.read_bytes().splitlines(keepends=True)
    assert kept[:6] == lines[:6] and kept[6] == b'{"step": 6, "los\n' and len(kept) == 8
    assert [record['step'] for record in records(tmp_path)] == [1, 3, 4, 5]


def test_no_flipped_bit_of_a_line_becomes_another_number(tmp_path):
    log = RunLog(str(tmp_path))
    measured = dict(step=123, loss=2.718281828, mfu=None)
    log.measure(measured)
    log.close()
    line = (tmp_path / 'metrics.jsonl').read_bytes()
    assert record_of(line) == measured
    for bit in range(8 * (len(line) - 1)):
        flipped = bytearray(line)
        flipped[bit // 8] ^= 1 << bit % 8
        record = record_of(bytes(flipped))
        assert record is None or measured.items() <= record.items(), flipped
    assert record_of(json.dumps(measured).encode()) == measured  # of an earlier version


def test_metrics_are_on_the_disk_after_sync(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, 'fsync', lambda fd: synced.append(os.readlink(f'/proc/self/fd/{fd}')))
    log = RunLog(str(tmp_path))
    log.measure(dict(step=1))
    synced.clear()
    log.sync()
    assert synced == [f'{tmp_path}/metrics.jsonl']
    log.close()


def test_log_and_metrics_follow_no_link_and_wait_for_no_fifo(tmp_path):
    outside = tmp_path / 'outside'
    outside.write_text('mine')
    for mode in (None, 4):
        run = tmp_path / f'run {mode}'
        run.mkdir()
        (run / 'train.log').symlink_to(outside)
        (run / 'metrics.jsonl').symlink_to(outside)
        log = RunLog(str(run), keep_until=mode)
        log.say('a line')
        log.close()
        assert (run / 'train.log').read_text().endswith('a line\n')
    assert outside.read_text() == 'mine'
    (run / 'train.log').unlink()
    os.mkfifo(run / 'train.log')
    RunLog(str(run)).close()
    assert (run / 'train.log').read_text() == ''
    (run / 'train.log').unlink()
    (run / 'train.log').mkdir()
    with pytest.raises(IsADirectoryError, match='train.log'):
        RunLog(str(run))


def test_log_on_a_full_disk_goes_on(tmp_path, capsys):
    log = RunLog(str(tmp_path))
    log.metrics.close()
    log.text.close()
    log.metrics = open('/dev/full', 'w')
    log.text = open('/dev/full', 'w')
    log.measure(dict(step=1))
    log.say('a line')
    log.close()
    assert capsys.readouterr().out.count('WARNING: /dev/full: No space left on device\n') == 2


LOG_WITHOUT_READER = '''
import sys
sys.path.insert(0, sys.argv[1])
from support.rundir import RunLog
from support.settings import run_command

def main(argv):
    log = RunLog(sys.argv[2])
    for n in range(3):
        log.say(f'line {n}')
    log.close()
    return 0

run_command(main)
'''


def test_log_goes_on_after_its_reader_has_gone(tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, '-c', LOG_WITHOUT_READER, str(HOME), str(tmp_path)]
    with open(write, 'wb') as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, timeout=60,
                              env={**os.environ, 'PYTHONUNBUFFERED': ''})
    assert (done.returncode, done.stderr) == (0, b'')
    assert (tmp_path / 'train.log').read_text() == 'line 0\nline 1\nline 2\n'


def test_clock_that_stands_still_ends_no_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train.time, 'monotonic', lambda: 5.0)
    assert train.main(tiny()) == 0
    assert records(tmp_path / 'run')[-1]['step'] == 8


def test_only_the_first_rank_writes(tmp_path, capsys):
    log = RunLog(str(tmp_path / 'run'), tracker='wandb', write=False, speak=False)
    log.say('x')
    log.measure(dict(step=1))
    log.close()
    assert capsys.readouterr().out == '' and os.listdir(tmp_path) == []


def test_numbers_as_text():
    assert [clock(s) for s in (0, 59.9, 61, 3600 * 33 + 16 * 60)] == [
        '0:00:00', '0:00:59', '0:01:01', '33:16:00']
    assert [size(n) for n in (2**20, 2**28 - 1, 2**28, 3 * 2**30)] == [
        '1.0 MiB', '256.0 MiB', '0.25 GiB', '3.00 GiB']


def test_provenance_names_command_commit_and_versions(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--seed=3'])
    told = provenance()
    assert told['command'] == 'train.py --seed=3' and told['torch'] == torch.__version__
    repository = ['git', '-C', str(HOME), 'rev-parse', 'HEAD']
    done = subprocess.run(repository, capture_output=True, text=True)
    assert told['commit'] == (done.stdout.strip() or 'unknown')
    status = [*repository[:3], 'status', '--porcelain', '--untracked-files=no']
    changes = subprocess.run(status, capture_output=True, text=True).stdout
    assert told['edited'] == bool(changes.strip())
    monkeypatch.setenv('PATH', '')  # a machine without git
    assert (provenance()['commit'], provenance()['edited']) == ('unknown', False)


# --- trackers -------------------------------------------------------------------------------------


def test_missing_tracker_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    log = RunLog(str(tmp_path), tracker='wandb', config={})
    log.measure(dict(step=1, loss=2.0))
    log.close()
    text = (tmp_path / 'train.log').read_text()
    assert text.startswith('WARNING: tracker=wandb is not available (ModuleNotFoundError: ')
    assert records(tmp_path) == [dict(step=1, loss=2.0)]


def stand_in(monkeypatch, name, log):
    """A module called `name` with init and finish, in whose stead their arguments are kept."""
    began = []
    package = types.ModuleType(name)
    package.init = lambda **told: began.append(told)
    package.log = log
    package.finish = lambda: began.append('finished')
    monkeypatch.setitem(sys.modules, name, package)
    return began


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_tracker_gets_what_is_measured_until_it_fails(tmp_path, monkeypatch, name):
    got = []

    def log_numbers(numbers, step):
        if len(got) == 2:
            raise ConnectionError('no network')
        got.append((numbers, step))

    began = stand_in(monkeypatch, name, log_numbers)
    monkeypatch.delenv('TRACKIO_DIR', raising=False)
    log = RunLog(str(tmp_path / 'run'), tracker=name, config=dict(seed=3))
    measured = [dict(step=step, loss=1.0 / step, mfu=None) for step in (1, 2, 3, 4)]
    measured[1] = dict(step=2, val_loss=0.5)
    for record in measured:
        log.measure(record)
    log.close()
    [told] = began
    assert told['project'] == 'nanoprune' and told['config'] == dict(seed=3)
    assert told['name'].startswith('run-') and told['resume'] == 'allow'
    if name == 'wandb':
        assert told['id'] == told['name'] and told['dir'] == str(tmp_path / 'run')
    assert os.environ['TRACKIO_DIR'] == str(tmp_path / 'run' / 'trackio')
    assert got == [({'train/loss': 1.0}, 1), ({'val/loss': 0.5}, 2)]
    assert (tmp_path / 'run' / 'train.log').read_text() == (
        f'WARNING: tracker={name} is not available (ConnectionError: no network); '
        'metrics.jsonl has it all\n')
    assert records(tmp_path / 'run') == measured


def test_a_resumed_run_has_the_same_name_in_the_tracker_and_a_new_one_another(
        tmp_path, monkeypatch):
    began = stand_in(monkeypatch, 'wandb', lambda numbers, step: None)
    for keep_until in (None, 0, None):
        RunLog(str(tmp_path), tracker='wandb', config={}, keep_until=keep_until).close()
    first, again, anew = [told['name'] for told in began if told != 'finished']
    assert first == again != anew and began.count('finished') == 3


def test_a_name_that_cannot_be_read_ends_the_tracker_alone(tmp_path):
    (tmp_path / 'tracker_name').write_bytes(b'run-\xff')
    log = RunLog(str(tmp_path), tracker='wandb', config={}, keep_until=0)
    log.close()
    assert 'tracker=wandb is not available (Unicode' in (tmp_path / 'train.log').read_text()


def test_a_tracker_that_does_not_answer_holds_nothing_up(tmp_path, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(rundir, 'TRACKER_PATIENCE', 0.1)
    began = stand_in(monkeypatch, 'wandb', None)
    monkeypatch.setattr(sys.modules['wandb'], 'init', lambda **told: answer.wait())
    log = RunLog(str(tmp_path), tracker='wandb', config={})
    log.measure(dict(step=1, loss=2.0))
    log.close()
    assert records(tmp_path) == [dict(step=1, loss=2.0)] and not began
    answer.set()


def test_tensorboard_gets_each_number_at_its_step(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_text(self, name, text):
            written.append((name, text))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            written.append('flushed')

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module)
    log = RunLog(str(tmp_path), tracker='tensorboard', config=dict(seed=3))
    log.measure(dict(step=5, loss=2.5, mfu=None))
    log.close()
    assert written == [('settings', '    seed = 3'), ('train/loss', 2.5, 5), 'flushed']


def test_damaged_lines_of_the_metrics_are_left_out(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'{"step": 1, "loss": 3.0}\n{"step": 2, "lo\xff\n[]\n'
                     b'{"step": 3, "loss": 2.0}\n')
    assert [record['step'] for record in read_metrics(path)] == [1, 3]


def test_a_disk_that_takes_no_summary(tiny, monkeypatch, capsys):
    """Of a finished run; of one that could not save either, which is the greater news."""
    def fails(error):
        def fail(*told, **more):
            raise error
        return fail

    told = 'WARNING: no room; no summary tells how this run ended'
    monkeypatch.setattr(train, 'write_json', fails(OSError('no room')))
    assert train.main(tiny(save_interval=100)) == 1
    assert told in capsys.readouterr().out
    monkeypatch.setattr(train, 'save_checkpoint', fails(Refused('last.pt could not be written')))
    assert refusal(train.main, tiny(init_from='auto')) == ['last.pt could not be written']
    assert told in capsys.readouterr().out
