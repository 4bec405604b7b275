"""support/pretrained.py: what a run directory holds, and transformers' own GPT-2, as a start."""
import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import refusal
from models import difference, lively, shaken
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import train
from model import GPT, GPTConfig
from support import pretrained
from support.pretrained import load_model, pretrained_problems, read_gpt2, starting_weights
from support.rundir import FORMAT, pack_weights, save_checkpoint
from support.settings import Refused

# --- from a run directory -------------------------------------------------------------------------


def save(folder, name, model, config=None):
    """A checkpoint as train.py writes it, of what load_model reads."""
    folder.mkdir(exist_ok=True)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    name_of_pruned = 'blocks.0.attention.proj.weight'
    mask = {name_of_pruned: weights[name_of_pruned].abs() > 0.1}
    config = config or dataclasses.asdict(model.config)
    content = dict(format=FORMAT, model=config, settings={}, step=3, fingerprint='f00d',
                   data=dict(name='tiny', tokenizer='bytes', vocab_size=131),
                   weights=pack_weights(weights, mask, torch.float32))
    save_checkpoint(str(folder / f'{name}.pt'), content)
    return mask


def test_a_saved_model_is_loaded_from_its_own_configuration(tmp_path, capsys):
    model = lively(positions='rotary', n_kv_head=2)
    mask = save(tmp_path / 'run', 'best', model)
    loaded, saved = load_model(str(tmp_path / 'run'), 'best')
    assert loaded.config == model.config and not loaded.training and saved['step'] == 3
    for name, p in loaded.named_parameters():
        expected = model.get_parameter(name)
        if name in mask:
            expected = expected * mask[name]
        assert torch.equal(p, expected) and p.dtype == torch.float32
    assert capsys.readouterr().err == ''


def test_settings_that_only_one_side_knows_are_noted(tmp_path, capsys):
    told = dataclasses.asdict(lively().config)
    del told['positions']
    save(tmp_path / 'run', 'last', lively(), {**told, 'n_experts': 8})
    load_model(str(tmp_path / 'run'), 'last')
    note, = capsys.readouterr().err.splitlines()
    assert note.startswith('note: ') and 'n_experts, positions' in note


def test_what_cannot_be_loaded_is_refused(tmp_path):
    run = tmp_path / 'run'
    with pytest.raises(Refused, match='no checkpoint'):
        load_model(str(run), 'best')
    save(run, 'last', lively())
    with pytest.raises(Refused, match='no checkpoint .*/best.pt; .* use --checkpoint=last'):
        load_model(str(run), 'best')
    save(run, 'best', lively(), dataclasses.asdict(lively(bias=True).config))
    with pytest.raises(Refused, match='does not fit this model.py: .*Missing key'):
        load_model(str(run), 'best')
    told = dataclasses.asdict(lively().config)
    for change, message in ((dict(n_layer=10**6), r'n_layer=1000000, and \d+ tensors'),
                            (dict(vocab_size=10**15), 'size mismatch'),
                            (dict(n_embd=10**14, n_head=1), 'Storage size calculation overflowed'),
                            (dict(n_head=0), 'by zero'), (dict(n_layer='2'), 'not supported')):
        save(run, 'best', lively(), {**told, **change})
        with pytest.raises(Refused, match=f'does not fit this model.py: .*{message}'):
            load_model(str(run), 'best')


# --- a GPT-2 in Hugging Face's format -------------------------------------------------------------


def saved_gpt2(folder, **changes):
    """A GPT-2 of transformers' own making, saved by it."""
    told = dict(vocab_size=257, n_positions=48, n_layer=2, n_head=2, n_embd=32, bos_token_id=256,
                eos_token_id=256)
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(**{**told, **changes})
    theirs = shaken(transformers.GPT2LMHeadModel(config))
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture
def gpt2(tmp_path):
    """(transformers' model, its folder)"""
    return saved_gpt2(tmp_path / 'gpt2'), tmp_path / 'gpt2'


def imported(folder):
    weights, config = read_gpt2(str(folder))
    model = GPT(config)
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.gpt2
@pytest.mark.parametrize('form', ['as saved', "the hub's", 'half'])
def test_import_of_what_transformers_saved(gpt2, form):
    theirs, folder = gpt2
    if form != 'as saved':  # 2019's files: no prefix, no head, and the causal masks as buffers
        tensors = {name.removeprefix('transformer.'): tensor
                   for name, tensor in theirs.state_dict().items() if name != 'lm_head.weight'}
        for n in range(2):
            tensors[f'h.{n}.attn.bias'] = torch.ones(1, 1, 48, 48).tril()
            tensors[f'h.{n}.attn.masked_bias'] = torch.tensor(-1e4)
        if form == 'half':
            tensors = {name: tensor.half() for name, tensor in tensors.items()}
            theirs = theirs.half().float()
        save_file(tensors, folder / 'model.safetensors')
    ours = imported(folder)
    assert difference(ours, theirs) < 1e-4
    assert ours.token_embedding.weight.shape == (384, 32)
    assert not ours.token_embedding.weight[257:].any()


def test_odd_weights_of_an_import_are_told(gpt2, capsys):
    """A flipped bit of an exponent: the file has no checksum that would tell."""
    _, folder = gpt2
    path = folder / 'model.safetensors'
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    read_gpt2(str(folder))
    assert 'note' not in capsys.readouterr().out
    tensors['transformer.h.1.mlp.c_fc.weight'][3, 4] = 1e36
    save_file(tensors, path, {'format': 'pt'})
    read_gpt2(str(folder))
    assert 'blocks.1.mlp.fc.weight has weights of 1e+36' in capsys.readouterr().out


# --- a run that starts from a GPT-2 ---------------------------------------------------------------


def settings(folder, **changes):
    told = dict(init_from=f'hf:{folder}', n_layer=2, n_head=2, n_embd=32, bias=True, block_size=32)
    return SimpleNamespace(**{**told, **changes})


def data(vocab_size=257):
    return SimpleNamespace(name='tiny', tokenizer='bytes', vocab_size=vocab_size)


@pytest.mark.gpt2
@torch.no_grad()
def test_run_starts_at_the_loss_of_the_pretrained_model(gpt2):
    theirs, folder = gpt2
    s = settings(folder)
    assert pretrained_problems(s, data()) == []
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32, bias=True))
    model.load_state_dict(starting_weights(s, model))  # the first 32 of 48 positions
    tokens = torch.randint(257, (3, 33))
    expected = F.cross_entropy(theirs(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss = model.eval()(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)


def test_an_import_is_read_once_by_the_check_and_the_start_and_not_kept(gpt2, monkeypatch):
    _, folder = gpt2
    reads = []

    def counted(path):
        reads.append(path)
        return read_gpt2(path)

    monkeypatch.setattr(pretrained, 'read_gpt2', counted)
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32, bias=True))
    for starts in (1, 2):
        pretrained_problems(settings(folder), data())
        starting_weights(settings(folder), model)
        assert len(reads) == starts
    assert pretrained.read_start.cache_info().currsize == 0


def test_other_runs_start_from_the_weights_drawn():
    model = lively()
    weights = starting_weights(SimpleNamespace(init_from='scratch'), model)
    assert weights.keys() == model.state_dict().keys()
    for name, p in model.named_parameters():
        assert torch.equal(weights[name], p)
    assert pretrained_problems(SimpleNamespace(init_from='auto'), None) == []


def test_settings_that_disagree_are_named_all_at_once(tmp_path):
    saved_gpt2(tmp_path / 'other', vocab_size=50257, n_positions=16, n_layer=1, n_head=4, n_embd=16)
    source = f'hf:{tmp_path}/other'
    wrong = settings(tmp_path / 'other', bias=False)
    assert pretrained_problems(wrong, data()) == [
        f'n_layer=2: {source} has n_layer=1; write --n_layer=1',
        f'n_head=2: {source} has n_head=4; write --n_head=4',
        f'n_embd=32: {source} has n_embd=16; write --n_embd=16',
        f'bias=False: {source} has bias=True; write --bias=True',
        f'block_size=32: {source} has block_size=16; write --block_size=16',
        f"dataset='tiny': {source} has 50257 tokens, not the 257 of 'bytes'; use text of its own "
        'tokenizer']
    assert len(pretrained_problems(wrong, None)) == 5


@pytest.mark.parametrize('key, value, fix', [
    ('positions', 'rotary', 'learned'), ('attention', 'mla', 'mha'), ('n_kv_head', 1, 0),
    ('ra_learned', True, False)])
def test_structure_that_the_weights_do_not_fit(gpt2, key, value, fix):
    problem, = pretrained_problems(settings(gpt2[1], **{key: value}), data())
    assert problem.startswith(f'{key}={value!r}: hf:{gpt2[1]} has {key}={fix!r}')
    assert problem.endswith(f'write --{key}={fix}')


def test_another_width_of_latents_is_named(tiny, tmp_path):
    latent = dict(attention='mla', max_iters=3, prune_score='none')
    assert train.main(tiny(**latent, latent_dim=8, out_dir=tmp_path / 'start')) == 0
    start = f'run:{tmp_path}/start'
    [problem] = refusal(train.main, tiny(**latent, latent_dim=16, init_from=start))
    assert problem == f'latent_dim=16: {start} has latent_dim=8; write --latent_dim=8'
    assert train.main(tiny(**latent, latent_dim=8, init_from=start)) == 0


# --- refused: what cannot be read -----------------------------------------------------------------


def change_config(**changes):
    def damage(folder):
        path = folder / 'config.json'
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in config.items() if v != 'gone'}))
    return damage


def change_tensors(change):
    """A damage that applies change(dict of tensors) to model.safetensors."""
    def damage(folder):
        path = folder / 'model.safetensors'
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)
    return damage


def rewrite(name, content):
    return lambda folder: (folder / name).write_bytes(content((folder / name).read_bytes()))


CONFIG = '{folder}/config.json: '
WEIGHTS = '{folder}/model.safetensors is another kind of model: beyond GPT-2: '
DAMAGED = '{folder}/model.safetensors cannot be read ('
DAMAGES = {
    'no config': (lambda folder: os.remove(folder / 'config.json'),
                  '{folder}/config.json is missing'),
    'damaged config': (rewrite('config.json', lambda raw: raw[:-10]),
                       '{folder}/config.json is damaged ('),
    'another type': (rewrite('config.json', lambda raw: b'[1]'),
                     '{folder}/config.json is missing or no JSON object'),
    'llama': (change_config(model_type='llama'), CONFIG + "model_type='llama' must be 'gpt2'"),
    'gelu': (change_config(activation_function='gelu'),
             CONFIG + "activation_function='gelu' must be 'gelu_new'"),
    'inverse layer': (change_config(scale_attn_by_inverse_layer_idx=True),
                      CONFIG + 'scale_attn_by_inverse_layer_idx=True must be False'),
    'epsilon': (change_config(layer_norm_epsilon=1e-6), CONFIG + 'layer_norm_epsilon=1e-06 must'),
    'layers': (change_config(n_layer=10**9), '{folder}/model.safetensors has '),
    'no layers': (change_config(n_layer='gone'), CONFIG + 'n_layer=None must be a positive'),
    'no weights': (lambda folder: os.remove(folder / 'model.safetensors'), DAMAGED),
    'truncated': (rewrite('model.safetensors', lambda raw: raw[:-100]), DAMAGED),
    'empty': (rewrite('model.safetensors', lambda raw: b''), DAMAGED),
    'fewer layers': (change_config(n_layer=1), WEIGHTS + 'h.1.attn.c_attn.bias (96,), '),
    'missing': (change_tensors(lambda t: t.pop('transformer.h.1.mlp.c_fc.bias')),
                WEIGHTS + 'nothing; missing: blocks.1.mlp.fc.bias (128,)'),
    'shape': (change_tensors(
        lambda t: t.update({'transformer.h.0.mlp.c_fc.weight': torch.zeros(128, 32)})),
        WEIGHTS + 'blocks.0.mlp.fc.weight (32, 128); missing: blocks.0.mlp.fc.weight (128, 32)'),
    'inner': (change_config(n_embd=16), WEIGHTS),
    'head': (change_config(tie_word_embeddings=False),
             CONFIG + 'tie_word_embeddings=False must be True'),
    'no embedding': (
        change_tensors(lambda t: t.update({'lm_head.weight': t.pop('transformer.wte.weight')})),
        WEIGHTS + 'nothing; missing: token_embedding.weight (257, 32)'),
}


@pytest.mark.parametrize('damage, begins', DAMAGES.values(), ids=DAMAGES)
def test_damaged_or_foreign_folder(gpt2, damage, begins):
    damage(gpt2[1])
    problems = pretrained_problems(settings(gpt2[1]), None)
    assert problems[0].startswith(begins.format(folder=gpt2[1])), problems
    assert all('\n' not in problem and len(problem) < 500 for problem in problems)


@pytest.mark.gpt2
def test_hub(gpt2, tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    problem, = refusal(read_gpt2, 'someone/model')
    assert problem.startswith("'someone/model' is not a folder, and cannot be had from the hub (")
    assert 'hf download someone/model config.json model.safetensors' in problem
    snapshot = tmp_path / 'cache' / 'models--someone--model' / 'snapshots' / ('a' * 40)
    shutil.copytree(gpt2[1], snapshot)  # as a download leaves it
    (snapshot.parent.parent / 'refs').mkdir()
    (snapshot.parent.parent / 'refs' / 'main').write_text('a' * 40)
    assert difference(imported('someone/model'), gpt2[0]) < 1e-4
