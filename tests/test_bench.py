"""bench.py: one real call on a CPU, the plain step by itself, what is told and what is refused."""
import contextlib
import io
import json
import subprocess
from dataclasses import replace

import pytest
import torch
from conftest import refusal
from models import block_matrices, tiny_model

import bench
import train
from support.checks import check
from support.rundir import RunLog
from support.settings import parse

TINY = dict(dataset='tiny', device='cpu', compile=False, batch_size=2, n_layer=2, n_head=2,
            gradient_accumulation_steps=2, block_size=64, n_embd=64, warmup_iters=20, max_iters=120,
            learning_rate=3e-3, min_lr=1e-3, eval_tokens=640, log_interval=5, loss_chunk_tokens=96)


def arguments(**told):
    return [f'--{key}={value}' for key, value in told.items()]


@pytest.fixture(scope='module')
def benched(tiny_data, tmp_path_factory):
    """(folder, results, text) of one call of bench.py with AdamW in float32 on a tiny model."""
    folder = tmp_path_factory.mktemp('bench')
    text = io.StringIO()
    told = arguments(**TINY, data_dir=tiny_data, out_dir=folder / 'run', steps=60, profile=True,
                     json=folder / 'deep' / 'r.json')
    with contextlib.redirect_stdout(text):
        assert bench.main(told) == 0
    return folder, json.loads((folder / 'deep' / 'r.json').read_text()), text.getvalue()


def test_plain_step_learns_what_ours_learns(benched):
    _, r, _ = benched
    ours = {record['step']: record['loss'] for record in r['ours']['records']}
    plain = {record['step']: record['loss'] for record in r['plain']['records']}
    assert list(ours) == list(plain) == [1, *range(5, 61, 5)]
    assert ours[1] - ours[60] > 1  # it learned
    for step, loss in ours.items():
        assert plain[step] == pytest.approx(loss, abs=1e-4), step


def test_table_tells_both(benched):
    _, r, text = benched
    told = text[text.index('peak memory   late loss'):].splitlines()
    assert told[1].split()[:2] == ['ours', f'{r["ours"]["tokens_per_second"]:,.0f}']
    assert told[2].split()[0] == 'plain' and told[2].endswith(f'{r["plain"]["late_loss"]:.4f}')
    late = [record['loss'] for record in r['plain']['records'] if record['step'] > 25]
    assert r['plain']['late_loss'] == pytest.approx(sum(late) / len(late))


def test_profile_is_that_of_torch_and_its_trace_can_be_read(benched):
    folder, _, text = benched
    assert 'Self CPU %' in text and 'aten::mm' in text
    assert str(folder / 'bench_trace.json') in text
    events = json.loads((folder / 'bench_trace.json').read_text())['traceEvents']
    products = [event for event in events if event.get('name') == 'aten::mm']
    in_blocks = 3 * len(block_matrices(tiny_model(**TINY)))  # forward and two backward
    in_loss = 2 * 3  # chunks; logits and both gradients
    assert len(products) == 3 * 2 * (in_blocks + in_loss)  # steps, micro-batches


def test_nothing_else_is_left_behind(benched):
    folder, _, _ = benched
    assert sorted(file.name for file in folder.iterdir()) == ['bench_trace.json', 'deep']


# --- the plain step -------------------------------------------------------------------------------


def plain_losses(told, **changes):
    s, machine, data = train.read_settings(told)
    records = bench.train_plain(replace(s, **changes), machine, data)
    return [record['loss'] for record in records]


def test_plain_step_is_never_in_float8_and_never_pruned(tiny):
    """fp8 is refused on a CPU, so it is set after the checks: its twins would run here."""
    expected = plain_losses(tiny(max_iters=6, log_interval=1))
    pruned = dict(prune_score='magnitude', target_sparsity=0.9, prune_start=1, prune_end=4,
                  prune_interval=1)
    assert plain_losses(tiny(max_iters=6, log_interval=1), fp8=True) == expected
    assert plain_losses(tiny(max_iters=6, log_interval=1, **pruned)) == expected


def test_plain_step_in_bfloat16_multiplies_float32_weights(tiny, monkeypatch):
    seen = set()
    plain_loss = bench.plain_loss

    def watched(model, idx, targets):
        hook = model.blocks[0].attention.proj.register_forward_hook(
            lambda module, inputs, output: seen.add((module.weight.dtype, output.dtype)))
        loss = plain_loss(model, idx, targets)
        hook.remove()
        return loss

    monkeypatch.setattr(bench, 'plain_loss', watched)
    plain_losses(tiny(max_iters=4, dtype='bfloat16'))
    plain_losses(tiny(max_iters=4))
    assert seen == {(torch.float32, torch.bfloat16), (torch.float32, torch.float32)}


# --- with a training that was prepared ------------------------------------------------------------


def test_what_is_told_of_a_run(tiny, tmp_path, monkeypatch, capsys):
    """train.py is not run; its run directory holds four log steps and evaluations."""
    def run(command):
        s, _, _ = parse(train.Settings, command[2:])
        log = RunLog(s.out_dir)
        for step, loss, rate, mebibytes in ((1, 5.0, 10.0, 50), (20, 4.0, 300.0, 90),
                                            (40, 3.0, 100.0, 60), (60, 2.0, 200.0, 60)):
            log.measure(dict(step=step, loss=loss, tokens_per_second=rate,
                             peak_memory_bytes=2**20 * mebibytes))
            log.measure(dict(step=step, val_loss=9.0))
        log.close()
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(subprocess, 'run', run)
    assert bench.main(tiny(plain=False, json=tmp_path / 'r.json')) == 0
    r = json.loads((tmp_path / 'r.json').read_text())
    assert r['ours']['tokens_per_second'] == 200 and r['ours']['late_loss'] == 2.5
    told = capsys.readouterr().out
    assert 'ours             200      90.0 MiB      2.5000' in told
    assert 'plain' not in r and 'plain' not in told


def test_failed_training_ends_it_with_its_code(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, 'run', lambda told: subprocess.CompletedProcess(told, 3))
    assert bench.main(tiny(json=tmp_path / 'r.json')) == 3
    assert not (tmp_path / 'r.json').exists()


def test_dry_run_compares_nothing(tiny, tmp_path, capfd):
    assert bench.main(tiny(dry_run=True, json=tmp_path / 'r.json')) == 0
    assert 'preflight' in (told := capfd.readouterr().out) and 'plain' not in told
    assert not (tmp_path / 'r.json').exists()


# --- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize('changes, words', [
    (dict(plains=True), "unknown setting 'plains'"),
    (dict(profile='perhaps'), "profile='perhaps' is not a bool"),
    (dict(batchsize=2), "did you mean 'batch_size'?"),
    (dict(data_dir='nowhere'), 'folder nowhere does not exist'),
    (dict(steps=-1), 'steps=-1: must not be negative'),
    (dict(max_iters=0), 'max_iters=0: must be at least 1'),
    (dict(init_from='resume'), "init_from='resume'"),
])
def test_refused(tiny, changes, words):
    assert any(words in problem for problem in refusal(bench.main, tiny(**changes)))


def test_a_single_step_is_told_too(tiny, capsys):
    assert bench.main(tiny(steps=1, warmup_iters=0)) == 0
    assert 'plain step 1/1' in capsys.readouterr().out


@pytest.mark.parametrize('told, expected', [
    (['config/quickstart.py', '--steps=30'], dict(
        max_iters=30, warmup_iters=3, prune_start=9, prune_end=24, lr_decay_iters=0)),
    (['config/vanilla_baseline.py', '--steps=500', '--lr_decay_iters=25_000'], dict(
        max_iters=500, warmup_iters=20, prune_start=15_000, lr_decay_iters=250)),
    (['config/best_50.py', '--steps=200', '--prune_score=none'], dict(
        max_iters=200, warmup_iters=8)),
    (['config/quickstart.py'], dict(max_iters=1000, prune_start=300)),
])
def test_short_runs_keep_the_shape_of_their_schedules(told, expected):
    _, _, told = bench.understood(told)
    s, problems, typed = parse(train.Settings, told)
    assert {key: getattr(s, key) for key in expected} == expected
    assert problems + check(s, typed) == []


def test_help_tells_the_settings_of_both(capsys):
    assert bench.main(['--help']) == 0
    told = capsys.readouterr().out
    for key in (*vars(bench.Bench()), *vars(train.Settings())):
        assert f'--{key}=' in told


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_compiled_on_a_gpu(tiny, tmp_path, capsys):
    told = tiny(device='cuda', compile=True, dtype='bfloat16', n_layer=4, n_embd=512, n_head=8,
                block_size=256, batch_size=16, loss_chunk_tokens=2048, eval_tokens=2560,
                max_iters=20, profile=True, json=tmp_path / 'r.json')
    assert bench.main(told) == 0
    r = json.loads((tmp_path / 'r.json').read_text())
    assert abs(r['ours']['late_loss'] - r['plain']['late_loss']) < 0.05
    assert 0 < r['ours']['peak_memory_bytes'] < r['plain']['peak_memory_bytes']
    assert 'Self CUDA %' in capsys.readouterr().out
