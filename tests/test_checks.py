"""support/checks.py and the Settings of train.py: presets, ranges, combinations, no effect."""
import dataclasses
import os
from typing import get_args

import pytest
from conftest import HOME

import model
import optim
import prune
import train
from support.checks import check, without_effect
from support.settings import help_text, parse


def problems_of(*argv):
    """Problems of a command line, by parsing and by check."""
    settings, problems, typed = parse(train.Settings, [str(word) for word in argv])
    return problems + check(settings, typed)


def typed(changes):
    return [f'--{key}={value}' for key, value in changes.items()]


# --- settings and presets -------------------------------------------------------------------------


def test_settings_are_few_and_help_explains_each(capsys):
    fields = dataclasses.fields(train.Settings)
    assert len(fields) <= 60
    assert train.main(['--help']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert '    python train.py config/vanilla_baseline.py --batch_size=16' in lines
    for f in fields:
        name = f'--{f.name}={f.default!r}'
        at = [i for i, line in enumerate(lines) if line.split()[:1] == [name]]
        assert len(at) == 1 and lines[at[0] + 1].startswith(' ' * 8), f.name


def test_comments_that_go_on_are_part_of_the_help():
    text = help_text(train.Settings, '')
    for words in ('hf: a GPT-2, in a folder', 'the compiler computes the rest again',
                  'sparse muP', '(SR-STE, arXiv 2102.04010)'):
        assert words in text


def test_choices_are_those_of_the_tables_that_define_them():
    kinds = {f.name: get_args(f.type) for f in dataclasses.fields(train.Settings)}
    assert kinds['prune_score'] == ('none', *prune.SCORES)
    assert kinds['prune_schedule'] == tuple(prune.SCHEDULES)
    assert kinds['optimizer'] == tuple(optim.OPTIMIZERS)
    assert kinds['lr_schedule'] == tuple(optim.LR_SCHEDULES)
    assert kinds['spam_mode'] == tuple(optim.SPAM_MODES)
    assert kinds['attention'] == tuple(model.ATTENTIONS)


PRESETS = sorted(HOME.glob('config/*.py'))


@pytest.mark.parametrize('path', PRESETS, ids=lambda path: path.stem)
def test_presets_are_accepted(path):
    settings, problems, _ = parse(train.Settings, [str(path)])
    assert problems + check(settings) == []
    assert without_effect(settings) == {}
    assert settings.out_dir == f'out/{path.stem}'


def test_presets_of_the_contract_exist():
    assert {path.stem for path in PRESETS} >= set(
        '''quickstart vanilla_baseline ra_mla_baseline adamwspam_magnitude_50 best_50 small_card
        adamwprune_bitter0_state_50 adamwprune_bitter1_state_50
        adamwprune_bitter2_state_50'''.split())


STARTING_POINTS = {
    'dense twin': ('best_50', '--prune_score=none'),
    'dense quickstart': ('quickstart', '--optimizer=adamw', '--prune_score=none'),
    'historical, dense': ('adamwspam_magnitude_50', '--prune_score=none'),
    'historical, other optimizer': ('adamwspam_magnitude_50', '--optimizer=adamw'),
    'historical, no score': ('adamwprune_bitter0_state_50', '--prune_score=none'),
    'other attention': ('mla_rotary', '--attention=mha'),
    'not compiled': ('small_card', '--compile=False'),
    'no reciprocity': ('ra_learned', '--ra_learned=False'),
    '2:4': ('best_50', '--prune_pattern=2:4'),
    'other schedule': ('quickstart', '--lr_schedule=linear', '--positions=rotary'),
}


@pytest.mark.parametrize('words', STARTING_POINTS.values(), ids=STARTING_POINTS)
def test_preset_is_a_starting_point(words):
    name, *changes = words
    assert problems_of(HOME / 'config' / f'{name}.py', *changes) == []
    assert os.path.exists(HOME / 'config' / f'{name}.py')


# --- ranges and combinations ----------------------------------------------------------------------

PRUNED = dict(prune_score='bitter7', prune_start=2, prune_end=9, max_iters=12)
SPAM = dict(PRUNED, optimizer='adamwspam', spam_interval=4, spam_warmup=2)
IMPOSSIBLE = {
    'heads': (dict(n_embd=30, n_head=4), [
        'n_embd=30 n_head=4: the width must be a multiple of the heads, e.g. n_embd=28']),
    'no heads': (dict(n_head=0), ['n_head=0: must be at least 1']),
    'batch': (dict(batch_size=0), ['batch_size=0: must be at least 1']),
    'block': (dict(block_size=0), ['block_size=0: must be at least 1']),
    'interval': (dict(eval_interval=0), ['eval_interval=0: must be at least 1']),
    'steps': (dict(max_iters=0, warmup_iters=0), [
        'max_iters=0: must be at least 1',
        'warmup_iters=0 max_iters=0 lr_decay_iters=0: the warm-up must end before the decay '
        'does (0)']),
    'negative': (dict(seed=-1), ['seed=-1: must not be negative']),
    'seed': (dict(seed=2**63), ['command line: seed is a number of 64 bits; at most 63']),
    'sizes': (dict(batch_size=2**61 - 1, n_layer=10**6, n_embd=10**12), [
        'batch_size=2305843009213693951: must be at most 1048576',
        'n_layer=1000000: must be at most 10000', 'n_embd=1000000000000: must be at most 1048576']),
    'dropout': (dict(dropout=1.0), ['dropout=1.0: must be at least 0 and below 1']),
    'betas': (dict(beta1=1.0, beta2=-0.1), [
        'beta1=1.0: must be at least 0 and below 1',
        'beta2=-0.1: must be at least 0 and below 1']),
    'warm-up': (dict(warmup_iters=8), [
        'warmup_iters=8 max_iters=8 lr_decay_iters=0: the warm-up must end before the decay '
        'does (8)']),
    'warm-up, decay': (dict(lr_decay_iters=2), [
        'warmup_iters=2 max_iters=8 lr_decay_iters=2: the warm-up must end before the decay '
        'does (2)']),
    'decay': (dict(learning_rate=2.0, weight_decay=0.5), [
        'learning_rate=2.0 weight_decay=0.5: their product must be below 1, or an update would '
        'remove all weights']),
    'min_lr': (dict(min_lr=0.1), [
        'min_lr=0.1 learning_rate=0.01: must not be above learning_rate']),
    'evaluation': (dict(eval_tokens=31), [
        'eval_tokens=31 block_size=32: must hold at least one sequence; 0 scores the whole '
        'split']),
    'no out_dir': (dict(out_dir=''), ["out_dir='': must not be empty"]),
    'budget': (dict(activation_budget=0.0, compile=True), [
        'activation_budget=0.0: must be above 0 and at most 1']),
    'rotary': (dict(n_embd=6, positions='rotary'), [
        "positions='rotary' n_embd=6 n_head=2: rotary positions need a head width that 2 divides, "
        'not 3']),
    'rotary, latent': (dict(n_embd=12, positions='rotary', attention='mla'), [
        "positions='rotary' n_embd=12 n_head=2: rotary positions need a head width that 4 "
        'divides, not 6']),
    'key heads': (dict(n_head=4, n_kv_head=3), [
        'n_head=4 n_kv_head=3: the heads must be a multiple of the key and value heads']),
    'key heads, reciprocal': (dict(n_kv_head=1, ra_learned=True), [
        'n_kv_head=1 ra_alpha=0.0 ra_learned=True: the reciprocal term exchanges query and key, '
        'so it needs a key for each head; set --n_kv_head=0']),
    'window': (dict(ra_window=-2, ra_alpha=0.5), [
        'ra_window=-2: must be at least 0, or -1 for all earlier tokens']),
    'window, dropout': (dict(ra_alpha=0.5, ra_window=5, dropout=0.1), [
        'dropout=0.1 ra_window=5: the window has no dropout; set --dropout=0 or --ra_window=-1']),
    'float8': (dict(fp8=True, bias=True, n_embd=20, loss_chunk_tokens=65), [
        'fp8=True bias=True: the products in float8 have no bias; set one to False',
        'fp8=True n_embd=20: the products in float8 need a multiple of 16',
        'fp8=True loss_chunk_tokens=65: the products in float8 need a multiple of 64']),
    'ramp, end': (dict(PRUNED, prune_end=13), [
        'prune_start=2 prune_end=13 max_iters=12: the ramp must start before it ends and end '
        'within the run, e.g. --prune_start=3 --prune_end=11']),
    'ramp, start': (dict(PRUNED, prune_start=9), [
        'prune_start=9 prune_end=9 max_iters=12: the ramp must start before it ends and end '
        'within the run, e.g. --prune_start=3 --prune_end=11']),
    'ramp, spike warm-up': (dict(SPAM, prune_end=13, max_iters=14), [
        'prune_end=13 max_iters=14 spam_interval=4 spam_warmup=2: no masks are chosen in the '
        'warm-up after the reset at 12, so target_sparsity would not be reached; set another '
        'prune_end or a shorter warm-up']),
    'endless spike warm-up': (dict(SPAM, prune_end=11, spam_warmup=3, max_iters=20), [
        'prune_end=11 max_iters=20 spam_interval=4 spam_warmup=3: no masks are chosen in the '
        'warm-up after the reset at 8, so target_sparsity would not be reached; set another '
        'prune_end or a shorter warm-up']),
    'power': (dict(PRUNED, prune_lr_power=-1.0), ['prune_lr_power=-1.0: must not be negative']),
    'masks': (dict(PRUNED, prune_interval=0), ['prune_interval=0: must be at least 1']),
}


@pytest.mark.parametrize('changes, expected', IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_setting_or_combination(tiny, changes, expected):
    assert problems_of(*tiny(**changes)) == expected


POSSIBLE = {
    'window without cut': dict(ra_alpha=0.5, ra_window=-1, dropout=0.1),
    'window longer than the block': dict(ra_alpha=0.5, ra_window=31, dropout=0.1),
    'whole split': dict(eval_tokens=0),
    'one key head': dict(n_kv_head=1),
    'no warm-up': dict(warmup_iters=0),
    'rotary latent': dict(n_embd=16, positions='rotary', attention='mla'),
    'no clipping': dict(grad_clip=0.0),
    'every rank alike': dict(batch_size=1, gradient_accumulation_steps=3),
    'ramp to the end': dict(PRUNED, prune_end=12),
    'score under any optimizer': dict(PRUNED, optimizer='adamw'),
    'ramp, spike warm-up that ends in time': dict(SPAM, prune_end=13, max_iters=15),
    'ramp, no spike warm-up at its end': dict(SPAM, prune_end=15, max_iters=15),
    'ramp that is over before the first spike': dict(SPAM, prune_end=3, spam_warmup=9),
    '2:4 is complete at prune_start': dict(SPAM, prune_end=13, max_iters=14, prune_pattern='2:4'),
}


@pytest.mark.parametrize('changes', POSSIBLE.values(), ids=POSSIBLE)
def test_possible_combination(tiny, changes):
    assert problems_of(*tiny(**changes)) == []


def test_regrowth_is_a_decay_or_minus_one(tiny):
    for decay in (-1.0, 0.0, 0.1):
        assert problems_of(*tiny(**PRUNED, prune_regrow=decay)) == []
    [problem] = problems_of(*tiny(**PRUNED, prune_regrow=-0.5))
    assert problem.startswith('prune_regrow=-0.5')


# --- settings without effect ----------------------------------------------------------------------

WITHOUT_EFFECT = {
    'latent width': (dict(latent_dim=64), dict(attention='mha'), 'attention=mla'),
    'key heads': (dict(n_kv_head=4), dict(attention='mla'), 'attention=mha'),
    'window': (dict(ra_window=5), dict(ra_alpha=0.0), 'ra_alpha or ra_learned'),
    'budget': (dict(activation_budget=0.5), dict(compile=False), 'compile=True'),
    'spam': (dict(spam_interval=9), dict(optimizer='adamw'), 'optimizer=adamwspam'),
    'sparsity': (dict(target_sparsity=0.7), dict(prune_score='none'), 'a prune_score'),
    'rate': (dict(prune_lr_power=1.0), dict(prune_score='none'), 'a prune_score'),
    'optimizer': (dict(optimizer='adamwprune'), dict(prune_score='none'), 'a prune_score'),
    'bitter4': (dict(prune_allocation='layer'), dict(prune_score='bitter4'), 'bitter4'),
    '2:4, schedule': (dict(prune_schedule='linear', prune_score='magnitude'),
                      dict(prune_pattern='2:4'), 'prune_pattern=unstructured'),
}


@pytest.mark.parametrize('changes, against, needs', WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_setting_without_effect_is_noted_and_refused_only_if_both_were_typed(
        tmp_path, changes, against, needs):
    name = next(iter(changes))
    settings, problems, _ = parse(train.Settings, typed({**changes, **against}))
    noted = without_effect(settings)
    assert problems == [] and list(noted) == [name]
    assert needs in noted[name]

    lines = [f'{key} = {value!r}\n' for key, value in changes.items()]
    (tmp_path / 'preset.py').write_text(''.join(lines))
    assert problems_of(tmp_path / 'preset.py', *typed(against)) == []  # a preset goes on
    assert problems_of(*typed(changes)) == []  # typed, but contradicted by a default only

    told = ' '.join(f'{key}={value!r}' for key, value in {name: changes[name], **against}.items())
    [problem] = problems_of(*typed({**changes, **against}))
    assert problem.startswith(f'{told}: acts only with ')
    assert needs in problem and problem.endswith('; leave one of them out')


def test_settings_with_effect_are_not_noted():
    several = dict(attention='mla', latent_dim=64, ra_learned=True, ra_window=5,
                   activation_budget=0.5, optimizer='adamwspam', spam_interval=9,
                   prune_score='magnitude', prune_interval=7, prune_allocation='layer',
                   prune_schedule='linear', prune_regrow=0.0, dropout=0.1)
    settings, problems, _ = parse(train.Settings, typed(several))
    assert problems == [] and without_effect(settings) == {}
    settings.prune_pattern = '2:4'
    assert list(without_effect(settings)) == ['prune_schedule', 'prune_allocation']


def test_unknown_names_on_the_command_line_contradict_nothing():
    [problem] = problems_of('--target_sparsity=0.7', '--a=1')
    assert problem.startswith("command line: unknown setting 'a'")
