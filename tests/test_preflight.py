"""support/preflight.py: what is impossible is said at once, before the first step; the table."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal
from models import block_matrices, tiny_model

import train
from support import preflight
from support.machine import Machine
from support.rundir import load_checkpoint, save_checkpoint
from support.shards import open_data

CPU = Machine(torch.device('cpu'), torch.float32, 0, 1, 'CPU', None)
H100 = Machine(torch.device('cuda:0'), torch.bfloat16, 0, 1, 'NVIDIA H100', 989e12)


# --- refused: the machine -------------------------------------------------------------------------


def test_micro_batches_that_do_not_divide_among_the_processes(tiny, monkeypatch):
    for name, value in dict(RANK=0, WORLD_SIZE=4, MASTER_ADDR='localhost', MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    assert refusal(train.main, tiny(gradient_accumulation_steps=6)) == [
        'gradient_accumulation_steps=6: counts those of all ranks, so it must be a multiple of the '
        '4 processes']


def test_float8_needs_a_gpu(tiny):
    [problem] = refusal(train.main, tiny(fp8=True, loss_chunk_tokens=64))
    assert problem.startswith('fp8=True: needs an NVIDIA GPU') and 'CPU' in problem


# --- refused: the data ----------------------------------------------------------------------------


@pytest.fixture
def copy(tiny_data, tmp_path):
    """A copy of the tiny data that a test may damage."""
    return shutil.copytree(tiny_data, tmp_path / 'data')


def test_block_longer_than_the_data(tiny, tiny_data):
    data = open_data(str(tiny_data), 'tiny')
    assert refusal(train.main, tiny(block_size=100_000, eval_tokens=0)) == [
        f'block_size=100000: the {split} split of tiny has {stream.tokens} tokens, too few for '
        'one sequence of 100000 + 1; set a smaller one, or prepare more text, with a larger '
        '--val_fraction'
        for split, stream in (('train', data.train), ('val', data.val))]


def test_last_validation_token_has_nothing_to_predict(tiny, tiny_data):
    tokens = open_data(str(tiny_data), 'tiny').val.tokens
    assert refusal(train.main, tiny(eval_tokens=tokens)) == [
        f'eval_tokens={tokens}: the validation split has {tokens} tokens, the last of which has '
        'nothing to predict; 0 scores all the others']
    train.read_settings(tiny(eval_tokens=tokens - 1))  # is not refused


def test_missing_data_names_the_command_that_makes_it(tiny, tmp_path):
    [problem] = refusal(train.main, tiny(data_dir=tmp_path / 'none'))
    assert problem.startswith(f"dataset='tiny': folder {tmp_path}/none does not exist; prepare it "
                              'with: python prepare.py ')
    assert f'--name=tiny --data_dir={tmp_path}/none' in problem


def test_damaged_data_is_found_before_training(tiny, copy, tmp_path):
    shard = copy / 'val_000000.bin'
    tokens = np.fromfile(shard, '<u2')
    tokens[512 + 100] = 300  # 512 words of header
    tokens.tofile(shard)
    assert refusal(train.main, tiny(data_dir=copy)) == [
        f'{shard}: token 300 at position 100 is outside the vocabulary of 257; the file is '
        'damaged or was made with another tokenizer']
    shard.write_bytes(shard.read_bytes()[:-10])
    [problem] = refusal(train.main, tiny(data_dir=copy))
    size = shard.stat().st_size
    assert problem.startswith(f'{shard}: ') and f'found {size}' in problem
    assert not (tmp_path / 'run').exists()


# --- refused: the run directory -------------------------------------------------------------------


def test_out_dir_that_is_a_file_or_lies_in_one(tiny, tmp_path):
    (tmp_path / 'file').write_text('')
    for out_dir in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        assert refusal(train.main, tiny(out_dir=out_dir)) == [
            f"out_dir='{out_dir}': {tmp_path}/file is no folder that may be written to; choose "
            'another --out_dir']


@pytest.mark.parametrize('name', ['last.pt', 'previous.pt', 'best.pt', 'summary.json'])
def test_out_dir_that_holds_another_run(tiny, tmp_path, name):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / name).write_text('{}')
    assert refusal(train.main, tiny()) == [
        f"out_dir='{tmp_path}/run' holds another run; --init_from=auto continues it, or begins it "
        'again if it has no checkpoint; or choose another --out_dir']
    assert [f.name for f in (tmp_path / 'run').iterdir()] == [name]


def test_resume_with_nothing_there(tiny, tmp_path):
    assert refusal(train.main, tiny(init_from='resume')) == [
        f"init_from='resume': no checkpoint {tmp_path}/run/last.pt; check the folder, or start "
        'with --init_from=auto']


def test_second_run_in_one_out_dir_is_refused_and_touches_nothing(tiny, tmp_path, monkeypatch):
    """Also before the first checkpoint. A lock keeps out whoever opens the folder once more."""
    ours = tmp_path / 'run'
    announce = preflight.announce

    def contents():
        return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in ours.iterdir()}

    def announce_and_start_another(run, *presets):
        announce(run, *presets)
        before = contents()
        assert before.keys() == {'metrics.jsonl', 'train.log', 'config.json'}
        for init_from in ('scratch', 'auto'):
            assert refusal(train.main, tiny(init_from=init_from)) == [
                f"out_dir='{ours}': another process trains there; wait for it, or choose another "
                '--out_dir']
        assert contents() == before

    with monkeypatch.context() as patch:
        patch.setattr(preflight, 'announce', announce_and_start_another)
        assert train.main(tiny(max_iters=4, lr_decay_iters=8)) == 0
    assert train.main(tiny(max_iters=8, init_from='auto')) == 0  # the lock went with the run


def test_out_dir_is_judged_again_once_it_is_locked(tiny, tmp_path, monkeypatch):
    """Another run may have ended in it between the two."""
    asked = train.read_settings(tiny())
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'summary.json').write_text('{}')
    [problem] = refusal(train.prepare_run, *asked)
    assert 'holds another run' in problem
    assert [f.name for f in (tmp_path / 'run').iterdir()] == ['summary.json']


def test_disk_without_room_for_the_checkpoints(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=2**19))
    # Weights and two moments in last.pt, which stays as previous.pt while the next is written, and
    # weights in best.pt, beside the one it replaces.
    needed = sum(p.numel() for p in tiny_model().parameters()) * 4 * (3 * 3 + 1 * 2)
    assert refusal(train.main, tiny()) == [
        f"out_dir='{tmp_path}/run': the checkpoints need {needed / 2**20:.1f} MiB, the disk has "
        '0.5 MiB left; free some or choose another --out_dir']
    assert not (tmp_path / 'run').exists()
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'last.pt').write_bytes(bytes(needed - 2**19))  # of the same run
    train.read_settings(tiny(init_from='auto'))  # is not refused, because that one makes way


def test_out_dir_that_may_not_be_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.os, 'access', lambda path, mode: False)
    assert refusal(train.main, tiny()) == [
        f"out_dir='{tmp_path}/run': {tmp_path} is no folder that may be written to; choose another "
        '--out_dir']


# --- refused: what building finds -----------------------------------------------------------------

PRUNED = dict(prune_score='bitter7', prune_start=2, prune_end=9, max_iters=12)


@pytest.mark.parametrize('changes, culprit', [
    (dict(PRUNED, target_sparsity=1.0), 'target_sparsity=1.0'),
    (dict(PRUNED, target_sparsity=0.995), 'target_sparsity=0.995'),  # 1% of each matrix stays
    (dict(PRUNED, prune_pattern='2:4', target_sparsity=0.6), 'target_sparsity=0.6'),
])
def test_impossible_pruning_is_refused_before_anything_is_written(tiny, tmp_path, changes, culprit):
    [problem] = refusal(train.main, tiny(**changes))
    assert culprit in problem
    assert not (tmp_path / 'run').exists()


def test_all_mistakes_are_listed_at_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    (tmp_path / 'c.py').write_text('btach_size = 4\ndropout = "much"\n')
    (tmp_path / 'file').write_text('')
    wrong = tiny(n_head=5, device='cuda', data_dir=tmp_path / 'none', out_dir=tmp_path / 'file',
                 grad_clip=-1.0, attention='mla', n_kv_head=5)
    argv = [f'{tmp_path}/c.py', f'{tmp_path}/missing.py', *wrong, '--sede=3', 'fast']
    problems = refusal(train.main, argv)
    beginnings = [
        f"{tmp_path}/c.py: unknown setting 'btach_size'",
        f"{tmp_path}/c.py: dropout='much'",
        f"config file '{tmp_path}/missing.py'",
        "command line: unknown setting 'sede'",
        "command line: 'fast' is not of the form",
        'grad_clip=-1.0: ',
        'n_embd=32 n_head=5: ',
        "n_kv_head=5 attention='mla': ",
        "device='cuda': ",
        "dataset='tiny': folder",
        f"out_dir='{tmp_path}/file': "]
    assert len(problems) == len(beginnings)
    for problem, beginning in zip(problems, beginnings):
        assert problem.startswith(beginning) and '\n' not in problem


# --- the table ------------------------------------------------------------------------------------


@pytest.fixture
def announced(tiny, monkeypatch):
    """A function (machine, **settings) -> ({row: text}, [note]) of the table of a tiny run."""
    def announce(machine=CPU, kernel='flash', **changes):
        run = train.prepare_run(*train.read_settings(tiny(**changes)))
        said = []
        run.machine = machine
        monkeypatch.setattr(run.log, 'say', said.append)
        monkeypatch.setattr(preflight, 'attention_backend', lambda *shape: kernel)
        preflight.announce(run)
        run.log.close()
        shutil.rmtree(run.settings.out_dir)
        lines = said[0].splitlines()[1:]
        notes = [line.strip() for line in lines if line.startswith('  note: ')]
        return {line[:20].strip(): line[20:].strip() for line in lines}, notes
    return announce


def test_table_tells_batch_tokens_epochs_and_ranks(announced, tiny_data):
    rows, _ = announced(H100._replace(world=2), batch_size=2, gradient_accumulation_steps=4,
                        max_iters=10_000)
    data = open_data(str(tiny_data), 'tiny')
    assert rows['effective batch'].startswith('2 sequences x 4 micro-batches = 8 sequences')
    assert '2 processes' in rows['effective batch']
    epochs = 10_000 * 8 * 32 / ((data.train.tokens - 1) // 32 * 32)
    assert rows['tokens'].startswith(
        f'256 a step x 10,000 = 2,560,000 = {epochs:.3g} epochs of {data.train.tokens:,}')
    assert rows['data'].startswith('tiny, bytes, 257 tokens, fingerprint ')
    assert data.fingerprint[:16] in rows['data']
    assert rows['device'] == 'NVIDIA H100, 989 TFLOP/s peak, bfloat16'
    assert rows['optimizer'] == 'AdamW, 2 warm-up, 0.01 -> 0.001 at 10000 (cosine)'


def test_table_lists_the_settings_that_differ_from_their_defaults(announced):
    told = announced(positions='rotary', n_kv_head=1, ra_alpha=0.0)[0]['settings'].split()
    assert {"positions='rotary'", 'n_kv_head=1', 'n_layer=2', "dataset='tiny'"} <= set(told)
    assert not any(word.startswith(('ra_alpha', 'beta1')) for word in told)


def test_much_repeated_text_is_told(announced):
    assert 'repeated text teaches little' in announced(batch_size=1000, max_iters=20)[0]['tokens']
    assert 'repeated' not in announced()[0]['tokens']


def test_notes_name_what_has_no_effect_or_is_costly(announced):
    assert announced()[1] == []
    assert announced(spam_interval=9)[1] == [
        'note: spam_interval=9 has no effect: it acts only with optimizer=adamwspam']
    assert announced(**{**PRUNED, 'prune_score': 'bitter10'})[1] == [
        'note: bitter10 keeps three more float32 numbers a prunable weight']


@pytest.mark.parametrize('changes, words', [
    ({}, ['by bitter7, between step 2 and 9', 'x 1 in the end']),
    (dict(prune_lr_power=2.0), ['x 4 in the end']),
])
def test_table_tells_what_pruning_will_do(announced, changes, words):
    rows, _ = announced(**PRUNED, **changes)
    scope = sum(p.numel() for p in block_matrices(tiny_model()))
    for word in [f'50.0% of the {scope:,} weights of blocks', *words]:
        assert word in rows['pruning'], rows['pruning']
    assert announced()[0]['pruning'] == 'none'


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_table_counts_the_memory_of_what_is_there(tiny, dtype):
    run = train.prepare_run(*train.read_settings(tiny(dtype=dtype, n_embd=128, bias=True)))
    told = preflight.rows_of(run)['memory, counted']
    train.one_step(run)
    run.log.close()
    there = list(run.model.parameters())  # for what the backward makes, of the same type
    for flat in run.flats:
        there += [flat.masters, flat.grads]
        there += [] if flat.working is flat.masters else [flat.working]
        for p in flat.parameters.values():
            there += [value for value in run.optimizer.state[p].values() if torch.is_tensor(value)]
    mebibytes = sum(tensor.nbytes for tensor in there) / 2**20
    assert float(told.split()[0]) == pytest.approx(mebibytes, rel=0.02)
    assert ' MiB for weights, gradients and moments, ' in told


def test_unfused_attention_on_a_gpu_is_told(announced):
    assert 'UNFUSED' in announced(H100, kernel='math')[0]['model']
    assert 'UNFUSED' not in announced(H100)[0]['model']
    assert 'UNFUSED' not in announced(CPU, kernel='math')[0]['model']  # there is no other


def test_rocm_without_its_attention_is_told_how_to_get_it(announced, monkeypatch):
    variable = 'TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL'
    monkeypatch.delenv(variable, raising=False)
    assert variable not in announced(H100, kernel='math')[0]['model']
    monkeypatch.setattr(torch.version, 'hip', '7.0')
    assert f'set {variable}=1' in announced(H100, kernel='math')[0]['model']
    monkeypatch.setenv(variable, '1')
    assert 'another head width' in announced(H100, kernel='math')[0]['model']


def test_announcement_is_printed_logged_and_kept(tiny, tmp_path, capsys):
    run = train.prepare_run(*train.read_settings(tiny(**PRUNED, optimizer='adamwspam')))
    preflight.announce(run)
    run.log.close()
    printed = capsys.readouterr().out
    assert printed == (tmp_path / 'run' / 'train.log').read_text()
    rows = {line[2:20].strip(): line[21:] for line in printed.splitlines()[1:]}
    parameters = sum(p.numel() for p in run.model.parameters())
    assert rows['model'].startswith(f'{parameters:,} parameters, mha attention, learned positions')
    assert rows['optimizer'].startswith('AdamWSPAM, ')
    assert rows['run directory'] == str(tmp_path / 'run')
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert set(config) == set('''settings model data fingerprint device dtype processes command
        commit edited python torch cuda hip host'''.split())
    assert config['settings']['prune_score'] == 'bitter7'
    assert config['model']['n_embd'] == 32
    assert config['data']['name'] == 'tiny' and config['data']['train_tokens'] > 60_000
    assert (config['dtype'], config['processes']) == ('float32', 1)


def test_sizes_beyond_all_bounds_are_one_line(tiny):
    [problem] = refusal(train.main, tiny(n_embd=10**9, n_head=1))
    assert problem.startswith('n_embd=1000000000: ')


def test_a_dry_run_prints_the_table_and_what_differs_from_the_preset(tiny, tmp_path, capsys):
    preset = tmp_path / 'preset.py'
    preset.write_text('max_iters = 7\nseed = 3\n')
    assert train.main([str(preset), *tiny(max_iters=9, dry_run=True)]) == 0
    printed = capsys.readouterr().out
    assert 'effective batch' in printed
    assert f'note: max_iters=9, {preset} has 7' in printed and 'seed=3,' not in printed
    assert 'note: dry_run' not in printed
    assert not (tmp_path / 'run').exists()


def test_a_dry_run_tells_what_the_run_would_be_continued_from(tiny, tmp_path, capsys):
    assert train.main(tiny()) == 0
    path = str(tmp_path / 'run' / 'last.pt')
    saved = load_checkpoint(path)
    save_checkpoint(path, {**saved, 'settings': {**saved['settings'], 'noise': 0.1}})
    told = tiny(init_from='auto', max_iters=12, lr_decay_iters=8)
    capsys.readouterr()
    for argv in ([*told, '--dry_run'], told):
        assert train.main(argv) == 0
        printed = capsys.readouterr().out
        assert 'note: the run has settings that this version does not know: noise\n' in printed
        assert 'run, continued from step 8\n' in printed


def test_no_arguments_at_all_name_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'make quickstart' in refusal(train.main, [])[-1]
