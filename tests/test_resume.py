"""Stopping and going on: what was interrupted, by whatever, ends as if it had not been."""
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import HOME, assert_same_run, last, refusal, words

import optim
import prepare
import prune
import train
from model import ATTENTIONS
from support.rundir import load_checkpoint, read_metrics, save_checkpoint
from support.shards import open_data

TIMINGS = ('tokens_per_second', 'milliseconds', 'mfu', 'peak_memory_bytes',
           'peak_reserved_bytes', 'seconds')


def metrics(folder):
    """The records of a run without what the machine decides."""
    records = read_metrics(folder / 'metrics.jsonl')
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


def make_data(tmp_path, texts, seed):
    """Folder of another data set named 'tiny', of this many texts of 100 words."""
    (tmp_path / 'text').mkdir()
    for i in range(texts):
        (tmp_path / 'text' / f'{i}.txt').write_text(words(100, seed + i))
    folder = tmp_path / 'data'
    code = prepare.main(['text', f'--input={tmp_path / "text"}', '--name=tiny', '--tokenizer=bytes',
                         f'--data_dir={folder}', '--val_fraction=0.2'])
    assert code == 0
    return folder


def files_of(folder):
    """{name: (content, time of the last change)}."""
    return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.iterdir()}


# --- exact continuation ---------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_resumed_run_is_the_straight_run_to_the_bit(tiny, tmp_path, dtype):
    """With dropout, over the end of an epoch, and whatever the process did before."""
    folder = make_data(tmp_path, texts=12, seed=0)
    windows = open_data(str(folder), 'tiny').train.windows
    block = next(b for b in range(32, 64) if windows(b) % 24 == 0)
    epoch = windows(block) // 24  # updates; the epoch ends exactly between two of them
    told = dict(data_dir=folder, batch_size=12, gradient_accumulation_steps=2, block_size=block,
                dropout=0.2, dtype=dtype, eval_interval=1, log_interval=1, save_interval=100,
                eval_tokens=128, lr_decay_iters=epoch + 4)
    train.main(tiny(**told, max_iters=epoch + 4, out_dir=tmp_path / 'straight'))
    split = dict(told, out_dir=tmp_path / 'split', init_from='auto')
    for stop in (epoch - 2, epoch, epoch + 1, epoch + 4):  # before, at and after the end
        torch.manual_seed(stop)
        assert train.main(tiny(**split, max_iters=stop)) == 0
        assert last(tmp_path / 'split')['step'] == stop
    assert_same_run(tmp_path / 'straight', tmp_path / 'split')
    assert metrics(tmp_path / 'split') == metrics(tmp_path / 'straight')
    steps = [record['step'] for record in metrics(tmp_path / 'split') if 'loss' in record]
    assert steps == list(range(1, epoch + 5))


def straight_and_split(tiny, tmp_path, told, stop, end, monkeypatch):
    """Train to `end` at once, and in two sessions of which the first is stopped at step `stop`."""
    assert train.main(tiny(**told, max_iters=end, out_dir=tmp_path / 'straight')) == 0
    gradients = train.local_gradients

    def signalled(run):
        if run.progress.step == stop - 1:
            run.stop_signal = signal.SIGTERM  # is noticed after this update
        return gradients(run)

    split = dict(told, max_iters=end, out_dir=tmp_path / 'split')
    with monkeypatch.context() as patch:
        patch.setattr(train, 'local_gradients', signalled)
        assert train.main(tiny(**split)) == 128 + signal.SIGTERM
    assert last(tmp_path / 'split')['step'] == stop
    assert train.main(tiny(**split, init_from='resume')) == 0


SMALL = dict(n_layer=1, batch_size=2, gradient_accumulation_steps=1, eval_interval=100,
             eval_tokens=64, save_interval=100)
AT_ONCE = dict(prune_start=2, prune_end=7, prune_pattern='2:4')
RAMP = dict(prune_start=2, prune_end=7, prune_interval=2)
SPAM = dict(optimizer='adamwspam', spam_interval=4, spam_warmup=1)
OPTIMIZERS = {
    'adamw': {},
    'spam paper': SPAM,
    'spam reference': dict(SPAM, spam_mode='reference'),
    'spam stable': dict(SPAM, spam_mode='stable'),
    'adamwprune': dict(RAMP, optimizer='adamwprune', prune_score='bitter7'),
}
VARIANTS = {
    'adamw and movement': dict(RAMP, prune_score='movement'),
    'spam and bitter3': dict(RAMP, **SPAM, prune_score='bitter3'),
    'spam reference and magnitude': dict(RAMP, **SPAM, spam_mode='reference',
                                         prune_score='magnitude'),
    'spam stable and movement': dict(RAMP, **SPAM, spam_mode='stable', prune_score='movement'),
    'straight-through': dict(RAMP, prune_score='bitter7', prune_regrow=0.0),
    'SR-STE': dict(RAMP, prune_score='magnitude', prune_regrow=0.01),
    'SR-STE in bfloat16': dict(RAMP, prune_score='bitter7', prune_regrow=0.01, dtype='bfloat16'),
    'each matrix at a raised rate': dict(RAMP, prune_score='bitter7', prune_allocation='layer',
                                         prune_lr_power=1.0),
    '2:4 of everything': dict(AT_ONCE, prune_score='bitter7', prune_scope='blocks+embedding'),
    '2:4 with regrowth': dict(RAMP, prune_score='bitter7', prune_pattern='2:4', prune_regrow=0.0),
    'linear schedules': dict(RAMP, prune_score='bitter0', prune_schedule='linear',
                             lr_schedule='linear'),
}
CASES = {
    **{f'{name}, {attention}': dict(told, attention=attention)
       for name, told in OPTIMIZERS.items() for attention in ATTENTIONS},
    **{f'score {name}': dict(RAMP, prune_score=name) for name in prune.SCORES if name != 'zeros'},
    **VARIANTS,
    'grouped, rotary, bias': dict(n_kv_head=1, positions='rotary', bias=True),
    'mla, rotary': dict(attention='mla', positions='rotary', latent_dim=8),
    'ra': dict(ra_learned=True, ra_window=5),
    'mla, ra everywhere': dict(attention='mla', ra_alpha=0.5, ra_window=-1, dropout=0.1),
}


def test_every_optimizer_is_among_the_cases():
    names = {told.get('optimizer', 'adamw') for told in OPTIMIZERS.values()}
    modes = {told.get('spam_mode', 'paper') for told in OPTIMIZERS.values()}
    assert names == set(optim.OPTIMIZERS), 'a new optimizer has a case in OPTIMIZERS'
    assert modes == set(optim.SPAM_MODES), 'a new mode has a case in OPTIMIZERS'


@pytest.mark.parametrize('name', CASES)
def test_resume_is_exact_and_masks_hold(tiny, tmp_path, monkeypatch, name):
    told = {**SMALL, **CASES[name]}
    straight_and_split(tiny, tmp_path, told, stop=5, end=9, monkeypatch=monkeypatch)
    assert_same_run(tmp_path / 'straight', tmp_path / 'split')
    assert metrics(tmp_path / 'split')[-2:] == metrics(tmp_path / 'straight')[-2:]
    if 'prune_score' not in told:
        return
    saved = last(tmp_path / 'straight')
    summary = json.loads((tmp_path / 'straight' / 'summary.json').read_text())
    matrices = [w for name, w in saved['weights'].items() if name in summary['sparsity_by_layer']]
    scope = sum(w.numel() for w in matrices)
    zeros = sum(int((w == 0).sum()) for w in matrices)
    assert zeros == round(0.5 * scope) and summary['sparsity'] == zeros / scope


def test_metrics_have_no_step_twice_and_none_missing_wherever_the_run_was_split(
        tiny, tmp_path, monkeypatch):
    told = dict(lr_decay_iters=16, log_interval=2, eval_interval=4, save_interval=4)
    gradients = train.local_gradients
    # One loss is far below the others, at a step that only a split run logs.
    monkeypatch.setattr(train, 'local_gradients',
                        lambda run: gradients(run) - (3 if run.progress.step == 6 else 0))
    train.main(tiny(**told, max_iters=16, out_dir=tmp_path / 'straight'))
    for stop in (4, 7, 16):
        train.main(tiny(**told, max_iters=stop, out_dir=tmp_path / 'split', init_from='auto'))
    assert_same_run(tmp_path / 'straight', tmp_path / 'split')
    split = metrics(tmp_path / 'split')
    assert all(record in split for record in metrics(tmp_path / 'straight'))
    for key in ('loss', 'val_loss'):
        steps = [record['step'] for record in split if key in record]
        assert steps == sorted(set(steps)), key


def test_what_a_crashed_run_measured_after_its_checkpoint_is_measured_again(
        tiny, tmp_path, monkeypatch):
    told = dict(max_iters=8, log_interval=1, save_interval=4, eval_interval=2)
    train.main(tiny(**told, out_dir=tmp_path / 'straight'))
    gradients = train.local_gradients

    def crash(run):
        if run.progress.step == 6:
            raise ValueError('crash')
        return gradients(run)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match='crash'):
        patch.setattr(train, 'local_gradients', crash)
        train.main(tiny(**told))
    with open(tmp_path / 'run' / 'metrics.jsonl', 'a') as f:
        f.write('{"step": 7, "lo')  # cut short by the crash
    assert train.main(tiny(**told, init_from='resume')) == 0
    assert_same_run(tmp_path / 'straight', tmp_path / 'run')
    assert metrics(tmp_path / 'run') == metrics(tmp_path / 'straight')


def test_micro_batch_may_change_on_resume_and_the_result_stays(tiny, tmp_path):
    told = dict(lr_decay_iters=8, eval_interval=8, log_interval=1)
    whole = dict(batch_size=4, gradient_accumulation_steps=1)
    parts = dict(batch_size=1, gradient_accumulation_steps=4)
    split = dict(told, out_dir=tmp_path / 'split')
    train.main(tiny(**told, **whole, max_iters=8, out_dir=tmp_path / 'straight'))
    train.main(tiny(**split, **whole, max_iters=4))
    train.main(tiny(**split, **parts, max_iters=8, init_from='resume'))
    for a, b in zip(metrics(tmp_path / 'straight'), metrics(tmp_path / 'split')):
        assert a['step'] == b['step']
        assert 'loss' not in a or abs(a['loss'] - b['loss']) < 1e-3
        assert 'loss' not in a or a['step'] > 5 or abs(a['loss'] - b['loss']) < 2e-6


# --- auto, finished -------------------------------------------------------------------------------


def test_auto_starts_goes_on_and_ends(tiny, tmp_path, capsys):
    told = dict(lr_decay_iters=8)
    assert train.main(tiny(**told, init_from='auto', max_iters=4)) == 0
    assert train.main(tiny(**told, init_from='auto', max_iters=8)) == 0
    assert 'continued from step 4' in capsys.readouterr().out
    assert last(tmp_path / 'run')['progress']['step'] == 8
    before = files_of(tmp_path / 'run')
    for init_from in ('auto', 'resume'):
        assert train.main(tiny(**told, init_from=init_from, max_iters=8)) == 0
        assert capsys.readouterr().out == (
            f'{tmp_path}/run holds this run, finished; nothing to do\n')
    assert files_of(tmp_path / 'run') == before


def test_time_is_that_of_all_sessions(tiny, tmp_path, monkeypatch):
    told = dict(lr_decay_iters=8, init_from='auto')
    train.main(tiny(**told, max_iters=4))
    saved = last(tmp_path / 'run')
    assert 0 < saved['progress']['seconds'] < 60
    saved['progress']['seconds'] = 1000.0
    del saved['format']
    save_checkpoint(str(tmp_path / 'run' / 'last.pt'), {'format': train.FORMAT, **saved})
    train.main(tiny(**told, max_iters=8))
    seconds = json.loads((tmp_path / 'run' / 'summary.json').read_text())['seconds']
    assert 1000 < seconds < 1060


# --- refused, or not ------------------------------------------------------------------------------


@pytest.fixture
def half(tiny, tmp_path):
    """Folder of a run of 4 steps; with lr_decay_iters=8 it may go on."""
    train.main(tiny(max_iters=4, lr_decay_iters=8, save_interval=2))
    return tmp_path / 'run'


def test_resume_with_other_settings_names_each(tiny, half):
    before = files_of(half)
    other = dict(learning_rate=2e-2, n_layer=3, batch_size=3, lr_decay_iters=9)
    end = 'keep it, or start another run with another --out_dir'
    assert refusal(train.main, tiny(init_from='resume', **other)) == [
        f'n_layer=3: the run in {half} has n_layer=2; {end}',
        f'learning_rate=0.02: the run in {half} has learning_rate=0.01; {end}',
        'batch_size x gradient_accumulation_steps=6: the run in '
        f'{half} has batch_size x gradient_accumulation_steps=4; {end}',
        f'lr_decay_iters (0: max_iters)=9: the run in {half} has lr_decay_iters (0: '
        f'max_iters)=8; {end}']
    assert files_of(half) == before


def test_resume_may_change_what_does_not_make_another_run(tiny, half, tmp_path):
    moved = half.rename(tmp_path / 'moved')
    free = dict(out_dir=moved, lr_decay_iters=0, max_iters=8, eval_interval=2, eval_tokens=320,
                log_interval=1, save_interval=2, loss_chunk_tokens=64)
    assert train.main(tiny(init_from='resume', **free)) == 0
    assert last(moved)['step'] == 8


def test_resume_may_change_what_has_no_effect(tiny, half):
    """In the run as it was, and in the run as it is asked for."""
    idle = dict(prune_start=3, spam_warmup=7, latent_dim=9)
    assert train.main(tiny(init_from='resume', lr_decay_iters=8, **idle)) == 0
    told = refusal(train.main, tiny(init_from='resume', lr_decay_iters=8, prune_score='magnitude',
                                    prune_start=2, prune_end=6))
    problems = [problem.split(':')[0] for problem in told]
    assert problems == ["prune_score='magnitude'", 'prune_start=2', 'prune_end=6']


def test_resume_on_other_data(tiny, half, tmp_path):
    then = last(half)['fingerprint']
    folder = make_data(tmp_path, texts=12, seed=1000)
    now = open_data(str(folder), 'tiny').fingerprint
    assert refusal(train.main, tiny(init_from='resume', lr_decay_iters=8, data_dir=folder)) == [
        f"fingerprint of the data='{now}': the run in {half} has fingerprint of the data='{then}'; "
        'keep it, or start another run with another --out_dir']


def test_resume_from_weights_only_or_from_a_damaged_checkpoint(tiny, half):
    (half / 'previous.pt').unlink()
    path = half / 'last.pt'
    whole = path.read_bytes()
    path.write_bytes((half / 'best.pt').read_bytes())
    assert refusal(train.main, tiny(init_from='resume', lr_decay_iters=8)) == [
        f'{path} holds weights only, like a best.pt: not enough to resume from; restore the '
        'last.pt of this run']
    path.write_bytes(whole[:-100])
    [problem] = refusal(train.main, tiny(init_from='resume', lr_decay_iters=8))
    assert problem.startswith(f'checkpoint {path} is damaged')
    path.write_bytes(whole)
    assert train.main(tiny(init_from='resume', lr_decay_iters=8)) == 0


def test_a_damaged_summary_is_written_anew(tiny, half):
    (half / 'summary.json').write_text('{"exit')
    assert train.main(tiny(init_from='auto', lr_decay_iters=8)) == 0
    assert json.loads((half / 'summary.json').read_text())['exit_reason'] == 'finished'


def test_a_summary_does_not_outlive_its_session(tiny, half, monkeypatch):
    """A run that was finished, asked for more, and killed just before its new end."""
    told = tiny(init_from='auto', lr_decay_iters=8)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'write_summary', lambda run, reason: None)
        assert train.main(told) == 0
    assert last(half)['step'] == 8 and not (half / 'summary.json').exists()
    assert train.main(told) == 0
    assert json.loads((half / 'summary.json').read_text())['steps'] == 8


@pytest.mark.parametrize('damage', ['cut short', 'missing'])
@pytest.mark.parametrize('init_from', ['auto', 'resume'])
def test_resume_goes_on_from_the_checkpoint_before_a_damaged_one(
        tiny, tmp_path, capsys, damage, init_from):
    told = dict(max_iters=8, save_interval=3, eval_interval=100)
    train.main(tiny(**told, out_dir=tmp_path / 'straight'))
    train.main(tiny(**told))
    folder = tmp_path / 'run'
    assert load_checkpoint(folder / 'previous.pt')['step'] == 6
    whole = (folder / 'last.pt').read_bytes()
    (folder / 'last.pt').unlink()
    if damage == 'cut short':
        (folder / 'last.pt').write_bytes(whole[:-100])
    before = files_of(folder)
    assert train.main(tiny(**told, init_from=init_from, dry_run=True)) == 0
    assert files_of(folder) == before
    dry = capsys.readouterr().out
    assert train.main(tiny(**told, init_from=init_from)) == 0
    problem = 'no checkpoint ' if damage == 'missing' else 'checkpoint '
    [note] = [line for line in capsys.readouterr().out.splitlines() if line.startswith('note: ')]
    assert note.startswith(f'note: {problem}{folder}/last.pt')
    assert note.endswith(f'; continuing from {folder}/previous.pt, step 6')
    assert note in (folder / 'train.log').read_text() and note in dry.splitlines()
    assert_same_run(tmp_path / 'straight', folder)
    assert load_checkpoint(folder / 'previous.pt')['step'] == 6  # the damaged one did not follow
    assert (folder / 'last.pt.damaged').exists() == (damage == 'cut short')


def test_resume_with_two_damaged_checkpoints_or_of_another_run_leaves_all_as_it_is(tiny, half):
    for name in ('last.pt', 'previous.pt'):
        path = half / name
        path.write_bytes(path.read_bytes()[:-100])
        before = files_of(half)
        told = tiny(init_from='resume', lr_decay_iters=8, seed=2)
        assert refusal(train.main, told)[0].startswith(
            'seed=2' if name == 'last.pt' else f'checkpoint {half}/previous.pt is damaged')
        assert files_of(half) == before


def test_a_run_that_has_done_more_than_is_asked_for_is_refused(tiny, tmp_path):
    """Whether its end is known or not; of just as many steps it ends at once."""
    folder = tmp_path / 'run'
    train.main(tiny())
    for ended in (True, False):
        before = files_of(folder)
        for init_from in ('auto', 'resume'):
            told = tiny(init_from=init_from, max_iters=4, lr_decay_iters=8)
            assert refusal(train.main, told) == [
                f'max_iters=4: the run in {folder} has done 8 updates; ask for as many, or start '
                'another run with another --out_dir']
        assert files_of(folder) == before
        if ended:
            (folder / 'summary.json').unlink()
    before = last(folder)['weights']
    assert train.main(tiny(init_from='resume')) == 0
    after = last(folder)['weights']
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert json.loads((folder / 'summary.json').read_text())['exit_reason'] == 'finished'


def test_the_advice_after_a_run_without_a_checkpoint_works(tiny, tmp_path, monkeypatch):
    """Killed between best.pt and the first last.pt."""
    def killed(run):
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, 'save', killed)
        train.main(tiny(save_interval=6))
    folder = tmp_path / 'run'
    (folder / 'summary.json').unlink()
    assert {'best.pt'} == {path.name for path in folder.glob('*.pt')}
    for init_from in ('scratch', 'resume'):
        [problem] = refusal(train.main, tiny(init_from=init_from))
        assert '--init_from=auto' in problem and '--init_from=resume' not in problem
    assert train.main(tiny(init_from='auto')) == 0
    assert last(folder)['step'] == 8


def test_settings_of_other_versions_do_not_end_a_resume(tiny, half, capsys):
    """One that the reader does not have is named in a note, one newer than the run had its
    default."""
    saved = last(half)
    saved['settings']['label_smoothing'] = 0.1
    del saved['settings']['lr_schedule']
    save_checkpoint(str(half / 'last.pt'), saved)
    assert train.main(tiny(init_from='resume', lr_decay_iters=8)) == 0
    told = capsys.readouterr()
    assert 'label_smoothing' in told.out + told.err
    saved['settings']['label_smoothing'] = 0.1
    save_checkpoint(str(half / 'last.pt'), saved)
    [problem] = refusal(train.main, tiny(
        init_from='resume', lr_decay_iters=8, max_iters=9, lr_schedule='linear'))
    assert problem.startswith(f"lr_schedule='linear': the run in {half} has lr_schedule='cosine'")


# --- signals --------------------------------------------------------------------------------------


def test_sigterm_and_ctrl_c_save_at_a_step_boundary(tiny, tmp_path):
    told = dict(lr_decay_iters=100, eval_interval=10, save_interval=10**6, log_interval=1,
                dropout=0.1)
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}  # sums depend on it
    steps = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        folder = tmp_path / number.name
        argv = [sys.executable, HOME / 'train.py', *tiny(**told, max_iters=10**6, out_dir=folder)]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env=environment)
        while not process.stdout.readline().startswith('step      2  loss'):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number and err == '', err
        step = steps[number] = last(folder)['progress']['step']
        assert out.endswith(
            f'{number.name}: saved at step {step}; continue with --init_from=resume\n')
        summary = json.loads((folder / 'summary.json').read_text())
        assert (summary['exit_reason'], summary['steps']) == (number.name.lower(), step)
    told['max_iters'] = max(steps.values()) + 5
    train.main(tiny(**told, out_dir=tmp_path / 'straight'))
    for number in steps:
        assert train.main(tiny(**told, out_dir=tmp_path / number.name, init_from='resume')) == 0
        assert_same_run(tmp_path / 'straight', tmp_path / number.name)
        assert metrics(tmp_path / number.name) == metrics(tmp_path / 'straight')


def test_lost_output_does_not_end_a_run(tiny, tmp_path):
    argv = [sys.executable, HOME / 'train.py', *tiny()]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'preflight\n'
    process.stdout.close()  # as `head -1` does
    assert process.stderr.read() == '' and process.wait(timeout=60) == 0
    assert last(tmp_path / 'run')['step'] == 8
    assert 'finished: validation loss' in (tmp_path / 'run' / 'train.log').read_text()


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('told', [
    dict(compile=False, dropout=0.1), dict(dropout=0.1), dict(attention='mla'),
    dict(ra_learned=True, ra_window=10), dict(RAMP, prune_score='bitter7'), SPAM,
    dict(fp8=True), dict(fp8=True, compile=False)],
    ids=lambda told: ', '.join(f'{key}={value}' for key, value in told.items()))
def test_deterministic_gpu_run_repeats_and_resumes_to_the_bit(tiny, tmp_path, monkeypatch, told):
    if 'fp8' in told and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip('float8 needs compute capability 9.0')
    on_gpu = dict(device='cuda', compile=True, dtype='bfloat16', loss_chunk_tokens=512, n_embd=128,
                  block_size=128, batch_size=8, eval_tokens=2560, deterministic=True)
    try:
        straight_and_split(tiny, tmp_path, {**on_gpu, **told}, stop=6, end=12,
                           monkeypatch=monkeypatch)
        assert_same_run(tmp_path / 'straight', tmp_path / 'split')
    finally:
        torch.use_deterministic_algorithms(False)


def test_finished_run_of_other_settings_is_refused_not_called_done(tiny, tmp_path):
    assert train.main(tiny()) == 0
    problems = refusal(train.main, tiny(init_from='auto', seed=99, n_layer=1))
    assert [problem.split(':')[0] for problem in problems] == ['seed=99', 'n_layer=1']


def test_weights_of_an_edited_model_are_refused(tiny, tmp_path, monkeypatch):
    train.main(tiny(max_iters=4, lr_decay_iters=8))

    class Edited(train.GPT):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Parameter(torch.zeros(3))

    monkeypatch.setattr(train, 'GPT', Edited)
    told = refusal(train.main, tiny(max_iters=8, lr_decay_iters=8, init_from='resume'))
    assert len(told) == 1 and 'not those of this model.py' in told[0] and '"extra"' in told[0]


def test_the_end_is_written_once_so_that_the_checkpoint_before_it_stays(tiny, tmp_path):
    assert train.main(tiny(max_iters=8, save_interval=4)) == 0
    assert load_checkpoint(tmp_path / 'run' / 'previous.pt')['step'] == 4
    assert last(tmp_path / 'run')['step'] == 8
