"""optim.py and prune.py in other people's programs: copies, torch.distributed.checkpoint, states of
other optimizers, options of torch's, and the two files alone in a folder."""
import copy
import inspect
import os
import pickle
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from conftest import HOME
from test_adamwprune import MODES
from test_pruner import assert_same, give_gradients, parameters, pruned, ramp, run
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import optim
import prune
from optim import AdamW, AdamWPrune, AdamWSPAM
from prune import Pruner

SPAM = {key: value for key, value in MODES['paper'].items() if key != 'base'}
KINDS = {  # name -> function (parameters, more arguments)
    'adamw': AdamW,
    'adamwspam': partial(AdamWSPAM, **SPAM),
    'reference': partial(AdamWSPAM, **{**SPAM, 'spam_mode': 'reference'}),
    'stable': partial(AdamWSPAM, **{**SPAM, 'spam_mode': 'stable'}),
    'adamwprune': partial(AdamWPrune, **ramp('bitter7')),
    'movement': partial(AdamWPrune, **ramp('movement', **MODES['paper'])),
    'bitter10': partial(AdamWPrune, **ramp('bitter10')),
    'regrow': partial(AdamWPrune, **ramp('magnitude', regrow=True, srste=0.1)),
}
KINDS = {name: partial(kind, lr=5e-2) for name, kind in KINDS.items()}
SPAM_KINDS = ['adamwspam', 'reference', 'stable']
COPIES = [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))]


def assert_same_optimizers(a, b):
    """Weights, state and what is shared, to the bit."""
    params = zip(a.param_groups[0]['params'], b.param_groups[0]['params'])
    assert all(torch.equal(p, q) for p, q in params)
    ours, theirs = a.state_dict(), b.state_dict()
    assert_same(ours['state'], theirs['state'])
    assert_same(ours['param_groups'][0], theirs['param_groups'][0])


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('make', COPIES)
@pytest.mark.parametrize('kind', KINDS)
def test_a_copy_under_a_scheduler_steps_its_own_weights(kind, make):
    """A scheduler puts a step() of the original into the optimizer."""
    params = parameters()
    optimizer = KINDS[kind](params)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5)
    run(optimizer, params, 11)
    scheduler.step()
    twin_params, twin = make((params, optimizer))
    before = [p.detach().clone() for p in params]
    run(twin, twin_params, 25, 11)
    assert all(torch.equal(p, old) for p, old in zip(params, before))
    run(optimizer, params, 25, 11)
    assert not torch.equal(params[0], before[0])
    assert_same_optimizers(optimizer, twin)


@pytest.mark.parametrize('order', [1, -1])
@pytest.mark.parametrize('make', COPIES)
@pytest.mark.parametrize('kind', [AdamW, torch.optim.AdamW])
def test_a_copied_pruner_still_regrows(kind, make, order):
    """Once a step: SR-STE would not be the same twice."""
    params = parameters()
    optimizer = kind(params, 5e-2)
    pruner = Pruner(optimizer, **ramp('magnitude', regrow=True, srste=0.1))
    run(optimizer, params, 8, 0, pruner)
    twins = make((params, optimizer, pruner)[::order])[::order]
    run(twins[1], twins[0], 25, 8, twins[2])
    run(optimizer, params, 25, 8, pruner)
    for p, q in zip(params, twins[0]):
        assert torch.equal(p, q)
    assert_same(pruner.state_dict(), twins[2].state_dict())


def test_a_pruner_copied_out_of_its_optimizer_brings_it_along():
    params = parameters()
    optimizer = KINDS['regrow'](params)
    run(optimizer, params, 8)
    twin = copy.deepcopy(optimizer.pruner).optimizer
    run(twin, twin.param_groups[0]['params'], 25, 8)
    run(optimizer, params, 25, 8)
    assert_same_optimizers(optimizer, twin)


def test_adamwprune_regrows_as_a_pruner_beside_adamw():
    """And a closure sees the masked weights."""
    told = ramp('magnitude', regrow=True, srste=0.1)
    params = parameters()
    twins = parameters()
    ours = AdamWPrune(params, 5e-2, **told)
    plain = AdamW(twins, 5e-2)
    pruner = Pruner(plain, **told)
    zeros = []
    for step in range(25):
        give_gradients(params, step)
        ours.step(lambda: zeros.append(sum(int((p == 0).sum()) for p in params)))
        run(plain, twins, step + 1, step, pruner)
        for p, q in zip(params, twins):
            assert torch.equal(p, q)
    assert zeros[-1] == pruned(pruner.masks) == pruner.pruned > 0 and len(set(zeros)) > 3


# --- torch.distributed.checkpoint -----------------------------------------------------------------


def module():
    """A model whose parameters are those of parameters()."""
    model = nn.Module()
    for name, p in zip(('embedding.weight', 'norm', 'conv.kernel'), parameters()):
        model.register_parameter(name.replace('.', '_'), p)
    return model


@pytest.mark.parametrize('flat', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_distributed_checkpoint_keeps_all_state(kind, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    straight = KINDS[kind](parameters())
    run(straight, straight.param_groups[0]['params'], 25)
    for split in (2, 11):
        first = module()
        optimizer = KINDS[kind](first.parameters())
        run(optimizer, list(first.parameters()), split)
        saved = copy.deepcopy(get_optimizer_state_dict(first, optimizer, options=options))
        second = module()
        second.load_state_dict(first.state_dict())
        fresh = KINDS[kind](second.parameters())
        set_optimizer_state_dict(second, fresh, saved, options=options)
        assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))
        run(fresh, list(second.parameters()), 25, split)
        assert_same_optimizers(straight, fresh)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('split', [2, 11, 24])
def test_distributed_checkpoint_on_the_disk(kind, split, tmp_path):
    """It loads what a new optimizer has an entry for, which the dense weights are not."""
    first = module()
    optimizer = KINDS[kind](first.parameters())
    run(optimizer, list(first.parameters()), split)
    content = {'model': first.state_dict(), 'optim': get_optimizer_state_dict(first, optimizer)}
    dcp.save(content, checkpoint_id=tmp_path)
    second = module()
    fresh = KINDS[kind](second.parameters())
    content = {'model': second.state_dict(), 'optim': get_optimizer_state_dict(second, fresh)}
    dcp.load(content, checkpoint_id=tmp_path)
    if kind == 'regrow' and split == 11:
        with pytest.raises(ValueError, match='Pruner: this state lacks the dense weights'):
            set_optimizer_state_dict(second, fresh, content['optim'])
        return
    set_optimizer_state_dict(second, fresh, content['optim'])
    run(optimizer, list(first.parameters()), 25, split)
    run(fresh, list(second.parameters()), 25, split)
    assert_same_optimizers(optimizer, fresh)


# --- states of other optimizers -------------------------------------------------------------------

FOREIGN = {  # kind, the other optimizer, what is missing
    'adamwspam': ('adamwspam', torch.optim.AdamW, 'AdamWSPAM: .* it has no spam'),
    'adamwprune': ('adamwprune', torch.optim.AdamW, 'AdamWPrune: .* it has no pruner, spam'),
    'of sgd': ('stable', torch.optim.SGD, 'AdamWSPAM: .* it has no spam'),
}


@pytest.mark.parametrize('kind, theirs, told', FOREIGN.values(), ids=FOREIGN)
def test_state_of_another_optimizer_is_refused_at_load(kind, theirs, told):
    params = parameters()
    ours = KINDS[kind](params)
    run(ours, params, 2)
    before = copy.deepcopy(ours.state_dict())
    other = parameters()
    optimizer = theirs(other, lr=1e-2)
    run(optimizer, other, 3)
    with pytest.raises(ValueError, match=told):
        ours.load_state_dict(optimizer.state_dict())
    assert_same(before['state'], ours.state_dict()['state'])


def test_how_spikes_are_cut_does_not_come_from_a_state():
    """A run saved where there is a compiler may go on where there is none."""
    theirs = AdamWSPAM(parameters(), compiled=True)
    ours = AdamWSPAM(parameters(), compiled=False)
    ours.load_state_dict(theirs.state_dict())
    assert 'compiled' not in ours.spam and not ours.defaults['compiled']


@pytest.mark.parametrize('kind', KINDS)
def test_the_first_group_may_be_empty(kind):
    """Its entries for all parameters are not on the device of any of its own."""
    params = parameters()
    optimizer = KINDS[kind]([dict(params=[]), dict(params=params)])
    run(optimizer, params, 8)
    twins = copy.deepcopy(params)
    fresh = KINDS[kind]([dict(params=[]), dict(params=twins)])
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, 25, 8)
    run(fresh, twins, 25, 8)
    assert all(torch.equal(p, q) for p, q in zip(params, twins))


# --- what surrounds a step ------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_hooks_run_once_a_step(kind):
    """PyTorch puts them into step() of each class that has had an instance, AdamW's too."""
    AdamW(parameters())
    params = parameters()
    optimizer = KINDS[kind](params)
    told = []
    optimizer.register_step_pre_hook(lambda *a: told.append(params[0].detach().clone()))
    optimizer.register_step_post_hook(lambda *a: told.append(params[0].detach().clone()))
    before = params[0].detach().clone()
    run(optimizer, params, 1)
    assert len(told) == 2
    assert torch.equal(told[0], before) and torch.equal(told[1], params[0])


@pytest.mark.parametrize('more', [{}, dict(fused=True)])
@pytest.mark.parametrize('kind', [*SPAM_KINDS, 'movement'])
def test_a_learning_rate_may_be_a_tensor(kind, more):
    results = []
    for rate in (torch.tensor(5e-2), 5e-2):
        params = parameters()
        optimizer = KINDS[kind](params, lr=rate, **more)
        run(optimizer, params, 25)
        assert optimizer.param_groups[0]['lr'] is rate and float(rate) == pytest.approx(5e-2)
        results.append(params)
    for p, q in zip(*results):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', [*SPAM_KINDS, 'movement'])
def test_a_step_that_fails_leaves_the_groups_as_they_were(kind):
    params = parameters()
    optimizer = KINDS[kind](params)
    for step in range(13):  # some lie in a warm-up
        give_gradients(params, step)
        before = dict(optimizer.param_groups[0])
        params[-1].grad = params[-1].grad.to_sparse()
        with pytest.raises((RuntimeError, NotImplementedError)):
            optimizer.step()
        assert optimizer.param_groups[0] == before
        run(optimizer, params, step + 1, step)


@pytest.mark.parametrize('kind', SPAM_KINDS)
def test_a_step_without_gradients_changes_nothing(kind):
    params = parameters()
    optimizer = KINDS[kind](params)
    for step in range(9):
        optimizer.zero_grad()
        before = copy.deepcopy((params, optimizer.state_dict()))
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, before[0]))
        assert_same(optimizer.state_dict()['state'], before[1]['state'])
        run(optimizer, params, step + 1, step)


@pytest.mark.parametrize('mode', ['paper', 'stable'])
@pytest.mark.parametrize('late', ['gradients', 'group'])
def test_parameters_that_come_late_train_like_new_ones(mode, late):
    """eps is 0 because 'paper' scales it by the updates of all."""
    told = dict(spam_mode=mode, spam_interval=0, spam_grace=0, eps=0.0, lr=5e-2)
    old, new = parameters()[:1], parameters()[1:]
    alone = copy.deepcopy(new)
    optimizer = AdamWSPAM(old + new if late == 'gradients' else old, **told)
    run(optimizer, old, 40)
    if late == 'group':
        optimizer.add_param_group(dict(params=new))
    reference = AdamWSPAM(alone, **told)
    for step in range(10):
        give_gradients(old, step)
        for params in (new, alone):
            give_gradients(params, step)
        optimizer.step()
        reference.step()
    for p, q in zip(new, alone):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize('mode', optim.SPAM_MODES)
def test_decay_by_all_of_a_weight_leaves_the_step(mode):
    p = nn.Parameter(torch.full((4, 4), 3.0))
    optimizer = AdamWSPAM([p], lr=10.0, weight_decay=0.1, spam_mode=mode)
    p.grad = torch.ones_like(p)
    optimizer.step()
    expected = 0.0 if mode == 'paper' else -10.0  # 'paper' decays what its step has made
    torch.testing.assert_close(p, torch.full_like(p, expected), atol=1e-6, rtol=1e-5)


# --- arguments ------------------------------------------------------------------------------------

MADE = {
    'AdamWSPAM': AdamWSPAM,
    'AdamWPrune': lambda params, **more: AdamWPrune(params, **ramp('magnitude'), **more),
}


@pytest.mark.parametrize('mode', optim.SPAM_MODES)
@pytest.mark.parametrize('option', ['foreach', 'fused'])
def test_ways_of_torch_to_compute_the_same_do(option, mode):
    results = []
    for more in ({}, {option: True}):
        params = parameters()
        optimizer = AdamWSPAM(params, 5e-2, **{**SPAM, 'spam_mode': mode}, **more)
        run(optimizer, params, 25)
        results.append((params, optimizer.counters()))
    (plain, counted), (others, counters) = results
    assert counters == counted and counted['resets'] > 0
    for p, q in zip(plain, others):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('fused', [False, True])
def test_spikes_are_cut_of_what_a_gradscaler_has_scaled_back(fused):
    """A fused optimizer of PyTorch gets the gradients as they are scaled."""
    results = []
    for scale in (1.0, 1024.0):
        params = parameters()
        optimizer = AdamWSPAM(params, 5e-2, **{**SPAM, 'spam_theta': 5.0}, fused=fused)
        scaler = torch.amp.GradScaler('cpu', init_scale=scale, enabled=scale > 1)
        for step in range(25):
            give_gradients(params, step)
            for p in params:
                p.grad *= scale
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update()
        results.append((params, optimizer.counters()))
    (plain, counted), (scaled, counters) = results
    assert counters == counted and counted['clipped'] > 0
    for p, q in zip(plain, scaled):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize('option', ['amsgrad', 'spam_tetha', 'fuse', 'capturable',
                                    'differentiable'])
@pytest.mark.parametrize('name', MADE)
def test_options_that_there_are_not_are_answered_by_name(name, option):
    with pytest.raises((TypeError, ValueError), match=option):
        MADE[name](parameters(), **{option: True})


@pytest.mark.parametrize('name', MADE)
def test_complex_parameters_are_refused(name):
    wrong = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match='complex parameters are not offered'):
        MADE[name]([wrong])
    optimizer = MADE[name](parameters())
    with pytest.raises(ValueError, match='complex parameters are not offered'):
        optimizer.add_param_group({'params': [wrong]})
    with pytest.raises(ValueError, match='Pruner: complex parameters'):
        Pruner(torch.optim.SGD([wrong], 0.1), **ramp('magnitude'))


@pytest.mark.parametrize('function', [
    AdamW, AdamWSPAM, AdamWPrune, Pruner, prune.score, prune.select, prune.select_2_4])
def test_what_others_import_has_type_hints(function):
    signature = inspect.signature(function)
    assert all(each.annotation is not each.empty for each in signature.parameters.values())
    assert inspect.isclass(function) or signature.return_annotation is not signature.empty


# --- another project ------------------------------------------------------------------------------

THEIRS = """\
import sys
import torch
from optim import AdamW, AdamWPrune, AdamWSPAM
from prune import Pruner

model = torch.nn.Linear(8, 8)
sgd = torch.optim.SGD(model.parameters(), 0.1)
told = dict(score='magnitude', target_sparsity=0.25, start=1, end=4, interval=1)
optimizers = [AdamW(model.parameters()), AdamWSPAM(model.parameters()), sgd,
              AdamWPrune(model.parameters(), start=1, end=4, interval=1)]
pruner = Pruner(sgd, **told)
for optimizer in optimizers:
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        if optimizer is sgd:
            pruner.step()
print(sum(p.numel() for p in model.parameters()), int((model.weight == 0).sum()))
print(*sys.path, sep='\\n')
"""


def test_the_files_that_the_docstring_names_are_all_that_another_project_copies(tmp_path):
    line = re.search(r'In another project: copy (.*)', optim.__doc__)[1]
    for name in re.findall(r'\w+\.py', line):
        shutil.copy(HOME / name, tmp_path)
    (tmp_path / 'theirs.py').write_text(THEIRS)
    clean = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    done = subprocess.run([sys.executable, 'theirs.py'], cwd=tmp_path, env=clean,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    numbers, *path = done.stdout.splitlines()
    assert numbers == '72 32'
    assert path[0] == str(tmp_path) and str(HOME) not in path
