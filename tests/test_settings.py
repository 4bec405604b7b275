"""What is asked for: config files, command line, and every wrong input with the exact line that answers it."""
import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal, train

import preflight
from settings import Settings, check, help_text, parse
from shards import open_data


def parsed(*argv):
    """(Settings, problems) of a command line."""
    return parse(Settings, [str(a) for a in argv])


# --- accepted ----------------------------------------------------------------------------------------


def test_later_wins_among_config_files_and_command_line(tmp_path):
    first, second = tmp_path / 'first.py', tmp_path / 'second.py'
    first.write_text('batch_size = 1\nseed = 1\nn_layer = 1\n')
    second.write_text('seed = 2\nn_layer = 2\n')
    s, problems = parsed('--batch_size=9', first, second, '--n_layer=3')
    assert not problems and (s.batch_size, s.seed, s.n_layer) == (1, 2, 3)


def test_config_file_may_import_compute_and_keep_private_names(tmp_path):
    config = tmp_path / 'c.py'
    config.write_text('import math\n_width = 64\nn_embd = 2 * _width\nlearning_rate = math.sqrt(1e-6)\nmax_iters = 10 ** 4\n')
    s, problems = parsed(config)
    assert not problems and (s.n_embd, s.learning_rate, s.max_iters) == (128, 1e-3, 10_000)


def test_values_arrive_as_the_type_of_the_setting():
    s, problems = parsed('--learning_rate=3e-4', '--max_iters=50_000', '--compile=False', '--bias=True', '--out_dir=a=b', '--eps=1')
    assert not problems
    assert (s.learning_rate, s.max_iters, s.compile, s.bias, s.out_dir, s.eps) == (3e-4, 50_000, False, True, 'a=b', 1.0)
    assert isinstance(s.eps, float)


def test_configs_of_the_repository_are_valid():
    for config in ('quickstart', 'vanilla_baseline'):
        s, problems = parsed(f'{train.__file__[:-len("train.py")]}config/{config}.py')
        assert problems + check(s) == []


def test_help_lists_every_setting_with_default_and_comment(capsys):
    assert train.main(['--help']) == 0
    text = capsys.readouterr().out
    assert 'python train.py config/' in text
    lines = text.splitlines()
    for f in dataclasses.fields(Settings):
        at = next(i for i, line in enumerate(lines) if line.split()[:1] == [f'--{f.name}={f.default!r}'])
        assert lines[at + 1].strip(), f.name
    assert '        sequences a micro-batch' in lines
    assert help_text(Settings, 'usage').startswith('usage')


# --- refused: one wrong thing ------------------------------------------------------------------------

ARGUMENTS = {
    'misspelt': ('--learing_rate=1', "command line: unknown setting 'learing_rate' (value '1'); did you mean 'learning_rate'?"),
    'dashes': ('--max-iters=5', "command line: unknown setting 'max-iters' (value '5'); did you mean 'max_iters'?"),
    'unknown': ('--x=a=b', "command line: unknown setting 'x' (value 'a=b'); --help lists all settings"),
    'no value': ('--x', "command line: '--x' has no value; write --x=VALUE"),
    'two equals signs': ('--batch_size=1=2', "command line: batch_size='1=2' is not an int"),
    'int': ('--batch_size=1.5', "command line: batch_size='1.5' is not an int"),
    'int, exponent': ('--max_iters=1e3', "command line: max_iters='1e3' is not an int"),
    'int, empty': ('--seed=', "command line: seed='' is not an int"),
    'float': ('--learning_rate=fast', "command line: learning_rate='fast' is not a finite float"),
    'float, nan': ('--learning_rate=nan', "command line: learning_rate='nan' is not a finite float"),
    'bool': ('--compile=1', "command line: compile='1' is not a bool: write True or False"),
    'bool, no': ('--bias=no', "command line: bias='no' is not a bool: write True or False"),
    'choice': ('--optimizer=adam', "command line: optimizer='adam' is not one of adamw, adamwspam, adamwprune; did you mean 'adamw'?"),
    'choice, far': ('--dtype=int8', "command line: dtype='int8' is not one of auto, float32, bfloat16"),
    'stray word': ('fast', "command line: 'fast' is not of the form config/FILE.py or --key=value"),
}


@pytest.mark.parametrize('argument, message', ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_argument(tiny, tmp_path, argument, message):
    assert refusal(train.main, tiny() + [argument]) == [message]
    assert not (tmp_path / 'run').exists()


def test_value_as_a_second_word(tiny):
    assert refusal(train.main, tiny() + ['--batch_size', '16']) == [
        "command line: '--batch_size' has no value; write --batch_size=VALUE",
        "command line: '16' is not of the form config/FILE.py or --key=value"]


CONFIGS = {
    'misspelt': ('btach_size = 4\n', "{path}: unknown setting 'btach_size' (value 4); did you mean 'batch_size'?"),
    'int': ('batch_size = 4.0\n', '{path}: batch_size=4.0 is not an int'),
    'int, bool': ('batch_size = True\n', '{path}: batch_size=True is not an int'),
    'float': ("learning_rate = 'fast'\n", "{path}: learning_rate='fast' is not a finite float"),
    'float, bool': ('learning_rate = True\n', '{path}: learning_rate=True is not a finite float'),
    'bool': ('compile = 0\n', '{path}: compile=0 is not a bool: write True or False'),
    'text': ('out_dir = None\n', '{path}: out_dir=None is not a str'),
    'choice': ("oom = 'fall back'\n", "{path}: oom='fall back' is not one of fallback, fail; did you mean 'fallback'?"),
    'syntax': ('seed = 1\nbatch_size = = 4\n', "config file '{path}' line 2: invalid syntax"),
    'exception': ('batch_size = 1 / 0\n', "config file '{path}': ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize('text, message', CONFIGS.values(), ids=CONFIGS)
def test_wrong_config_file(tiny, tmp_path, text, message):
    config = tmp_path / 'c.py'
    config.write_text(text)
    assert refusal(train.main, [str(config)] + tiny()) == [message.format(path=config)]


def test_config_file_that_is_not_there_or_not_text(tiny, tmp_path):
    (tmp_path / 'baseline.py').write_bytes(b'\xff\xfe')
    for name, hint in (('basline.py', f"; did you mean '{tmp_path}/baseline.py'?"), ('other_thing.py', '')):
        assert refusal(train.main, [f'{tmp_path}/{name}'])[0] == (
            f"config file '{tmp_path}/{name}' cannot be read: No such file or directory{hint}")
    problem, = refusal(train.main, [f'{tmp_path}/baseline.py'] + tiny())
    assert problem.startswith(f"config file '{tmp_path}/baseline.py' cannot be read: ")


COMBINATIONS = {
    'heads': (dict(n_embd=30, n_head=4), ['n_embd=30 n_head=4: the width must be a multiple of the heads, e.g. n_embd=28']),
    'no heads': (dict(n_head=0), ['n_head=0: must be at least 1']),
    'batch': (dict(batch_size=0), ['batch_size=0: must be at least 1']),
    'block': (dict(block_size=0), ['block_size=0: must be at least 1']),
    'steps': (dict(max_iters=0, warmup_iters=0), [
        'max_iters=0: must be at least 1',
        'warmup_iters=0 max_iters=0 lr_decay_iters=0: the warm-up must end before the decay does (0)']),
    'negative': (dict(seed=-1), ['seed=-1: must not be negative']),
    'seed': (dict(seed=2**63), ['seed=9223372036854775808: must be below 2^63, which PyTorch takes']),
    'dropout': (dict(dropout=1.0), ['dropout=1.0: must be at least 0 and below 1']),
    'eps': (dict(eps=0.0), ['eps=0.0: must be above 0']),
    'warm-up': (dict(warmup_iters=8), [
        'warmup_iters=8 max_iters=8 lr_decay_iters=0: the warm-up must end before the decay does (8)']),
    'min_lr': (dict(min_lr=0.1), ['min_lr=0.1 learning_rate=0.01: min_lr must not be above learning_rate']),
    'evaluation': (dict(eval_tokens=31), [
        'eval_tokens=31 block_size=32: must hold at least one sequence; 0 scores the whole split']),
    'device': (dict(device='gpu'), ["device='gpu': must be auto, cpu, cuda or cuda:N"]),
    'no out_dir': (dict(out_dir=''), ["out_dir='': must name a folder"]),
}


@pytest.mark.parametrize('changes, messages', COMBINATIONS.values(), ids=COMBINATIONS)
def test_impossible_setting_or_combination(tiny, changes, messages):
    assert refusal(train.main, tiny(**changes)) == messages


@pytest.mark.parametrize('device', ['cuda', 'cuda:1'])
def test_gpu_that_is_not_there(tiny, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert refusal(train.main, tiny(device=device)) == [
        f"device='{device}': this PyTorch ({torch.__version__}) sees no GPU; use --device=cpu or install a build for your GPU "
        '(CUDA or ROCm)']


def test_micro_batches_that_do_not_divide_among_the_processes(tiny, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    s, problems = parsed(*tiny(gradient_accumulation_steps=6))
    assert refusal(preflight.preflight, s, problems + check(s)) == [
        'gradient_accumulation_steps=6: counts the micro-batches of all ranks, so it must be a multiple of the 4 processes']


# --- refused: the data -------------------------------------------------------------------------------


@pytest.fixture
def copy(tiny_data, tmp_path):
    """A copy of the tiny data that a test may damage."""
    return shutil.copytree(tiny_data, tmp_path / 'data')


def test_block_longer_than_the_data(tiny, tiny_data):
    data = open_data(str(tiny_data), 'tiny')
    assert refusal(train.main, tiny(block_size=100_000, eval_tokens=0)) == [
        f'block_size=100000: the {split} split of tiny has {tokens} tokens, too few for one sequence of 100000 + 1'
        for split, tokens in (('train', data.train.tokens), ('val', data.val.tokens))]


def test_all_validation_tokens_can_be_asked_for_only_if_the_last_has_a_target(tiny, tiny_data):
    tokens = open_data(str(tiny_data), 'tiny').val.tokens
    block = next(b for b in range(32, tokens) if (tokens - 1) % b == 0)  # up to the very last token
    assert train.main(tiny(block_size=block, eval_tokens=tokens - 1, batch_size=1, max_iters=3)) == 0
    assert refusal(train.main, tiny(eval_tokens=tokens, out_dir='elsewhere')) == [
        f'eval_tokens={tokens}: the validation split has {tokens} tokens, the last of which has nothing to predict; '
        '0 scores all the others']


def test_missing_data_names_the_command_that_makes_it(tiny, tmp_path):
    assert refusal(train.main, tiny(data_dir=tmp_path / 'none')) == [
        f"dataset='tiny': folder {tmp_path}/none does not exist; prepare it with: "
        f'python prepare.py text --input=FILES --name=tiny --data_dir={tmp_path}/none']


def test_other_data_set_than_the_config_says(tiny, tiny_data):
    assert refusal(train.main, tiny(dataset='fineweb_edu')) == [
        f"dataset='fineweb_edu' but {tiny_data} holds 'tiny' (meta.json); write --dataset=tiny to train on it, or give the --data_dir "
        'of fineweb_edu, prepared with: python prepare.py fineweb_edu']


def test_truncated_shard(tiny, copy):
    shard = copy / 'train_000000.bin'
    expected = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-10])
    assert refusal(train.main, tiny(data_dir=copy)) == [
        f'{shard}: truncated: expected {expected} bytes ({(expected - 1024) // 2} tokens), found {expected - 10}; '
        'copy or prepare it again']


def test_foreign_shard(tiny, copy):
    (copy / 'train_000000.bin').write_bytes(bytes([1]) * 4096)
    assert refusal(train.main, tiny(data_dir=copy)) == [
        f'{copy}/train_000000.bin: not a token shard: magic 16843009 version 16843009, expected 20240520 version 1 '
        "(llm.c's GPT-2 format); move it away"]


def test_token_outside_the_vocabulary_is_found_before_training(tiny, copy):
    shard = copy / 'val_000000.bin'
    tokens = np.fromfile(shard, '<u2')
    tokens[512 + 100] = 300  # 512 words of header
    tokens.tofile(shard)
    assert refusal(train.main, tiny(data_dir=copy)) == [
        f'{shard}: token 300 at position 100 is outside the vocabulary of 257; the file is damaged or was made with another tokenizer']


# --- refused: the run directory ----------------------------------------------------------------------


def test_out_dir_that_is_a_file_or_lies_in_one(tiny, tmp_path):
    (tmp_path / 'file').write_text('')
    for out_dir in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        assert refusal(train.main, tiny(out_dir=out_dir)) == [
            f"out_dir='{out_dir}': {tmp_path}/file is a file; choose another --out_dir"]


def test_out_dir_that_holds_another_run(tiny, tmp_path):
    train.main(tiny(max_iters=3))
    before = (tmp_path / 'run' / 'train.log').read_text()
    assert refusal(train.main, tiny()) == [
        f"out_dir='{tmp_path}/run' holds another run; continue it with --init_from=resume or choose another --out_dir"]
    assert (tmp_path / 'run' / 'train.log').read_text() == before


def test_disk_without_room_for_the_checkpoints(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=2**19))
    assert refusal(train.main, tiny()) == [
        f"out_dir='{tmp_path}/run': the checkpoints need 1.2 MiB, the disk has 0.5 MiB left; free some or choose another --out_dir"]


# --- several at once, and none -----------------------------------------------------------------------


def test_all_mistakes_are_listed_at_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    config = tmp_path / 'c.py'
    config.write_text('btach_size = 4\ndropout = "much"\n')
    (tmp_path / 'file').write_text('')
    wrong = tiny(n_head=5, device='cuda', data_dir=tmp_path / 'none', out_dir=tmp_path / 'file', grad_clip=-1.0)
    assert refusal(train.main, [str(config), f'{tmp_path}/missing.py'] + wrong + ['--sede=3', '--bias']) == [
        f"{config}: unknown setting 'btach_size' (value 4); did you mean 'batch_size'?",
        f"{config}: dropout='much' is not a finite float",
        f"config file '{tmp_path}/missing.py' cannot be read: No such file or directory",
        "command line: unknown setting 'sede' (value '3'); did you mean 'seed'?",
        "command line: '--bias' has no value; write --bias=VALUE",
        'grad_clip=-1.0: must not be negative',
        'n_embd=32 n_head=5: the width must be a multiple of the heads, e.g. n_embd=30',
        f"device='cuda': this PyTorch ({torch.__version__}) sees no GPU; use --device=cpu or install a build for your GPU (CUDA or ROCm)",
        f"dataset='tiny': folder {tmp_path}/none does not exist; prepare it with: "
        f'python prepare.py text --input=FILES --name=tiny --data_dir={tmp_path}/none',
        f"out_dir='{tmp_path}/file': {tmp_path}/file is a file; choose another --out_dir"]


def test_batch_of_one_is_used_as_given(tiny, tmp_path):
    assert train.main(tiny(batch_size=1, gradient_accumulation_steps=3)) == 0
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['settings']['batch_size'] == 1
    log = (tmp_path / 'run' / 'train.log').read_text()
    assert '  effective batch    1 sequences x 3 micro-batches = 3 sequences\n' in log
    assert '  tokens a step      3 x 32 = 96\n' in log
