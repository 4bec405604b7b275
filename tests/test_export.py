"""export.py against transformers' own GPT-2: there, back, on from there, and what is refused."""
import json
import os
import shutil
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import refusal
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import export
import train
from export import pretrained_problems, read_gpt2, starting_weights
from model import GPT, GPTConfig
from support import files
from support.rundir import pack_weights, save_checkpoint

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.gpt2  # it is GPT-2's format
SIZES = dict(vocab_size=257, block_size=32, n_layer=2, n_head=4, n_embd=32)
DATA = {'name': 'tiny', 'tokenizer': 'bytes', 'vocab_size': 257}


def shaken(model):
    """With every parameter far enough from its initial value that each of them matters."""
    torch.manual_seed(5)
    for p in model.parameters():
        p.data += 0.15 * torch.randn_like(p)
    return model.eval()


def write_run(folder, model, masks=None, tokenizer='bytes'):
    """A run directory, as far as an export needs one, whose checkpoints hold the model."""
    os.makedirs(folder)
    weights = pack_weights(model.state_dict(), masks or {}, torch.float32)
    for name in ('best', 'last'):
        save_checkpoint(os.path.join(folder, f'{name}.pt'), dict(
            format='nanoprune 2', model=asdict(model.config), settings={}, fingerprint='',
            data={**DATA, 'tokenizer': tokenizer}, weights=weights, step=8, val_loss=1.0))


@pytest.fixture
def trained(tmp_path):
    """A function (**fields of GPTConfig) -> (model, run directory, folder to export to)."""
    def make(**changes):
        model = shaken(GPT(GPTConfig(**{**SIZES, **changes})))
        write_run(tmp_path / 'run', model)
        return model, str(tmp_path / 'run'), str(tmp_path / 'hf')
    return make


def loaded(folder):
    """The model in a folder as transformers reads it; nothing missing or left over."""
    load = transformers.GPT2LMHeadModel.from_pretrained
    theirs, told = load(folder, output_loading_info=True)
    assert not any(told.values()), told
    return theirs.eval()


@torch.no_grad()
def difference(ours, theirs):
    """Largest difference of a logit on random tokens."""
    tokens = torch.randint(ours.config.vocab_size, (3, ours.config.block_size))
    logits = theirs(tokens).logits
    assert logits.shape[-1] == ours.config.vocab_size and logits.std() > 0.01
    return (ours(tokens) - logits).abs().max().item()


def pretrained(folder, **changes):
    """A GPT-2 of transformers' own making, saved by it."""
    told = dict(vocab_size=257, n_positions=48, n_layer=2, n_head=2, n_embd=32, bos_token_id=256,
                eos_token_id=256)
    config = transformers.GPT2Config(**{**told, **changes})
    theirs = shaken(transformers.GPT2LMHeadModel(config))
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture
def gpt2(tmp_path):
    """(transformers' model, its folder)"""
    return pretrained(tmp_path / 'gpt2'), tmp_path / 'gpt2'


def imported(folder):
    weights, config = read_gpt2(str(folder))
    model = GPT(config)
    model.load_state_dict(weights)
    return model.eval()


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize('bias', [True, False])
def test_run_to_transformers_and_back(trained, bias, capsys):
    model, run, out = trained(bias=bias, dropout=0.1)
    assert export.main([run, out, '--checkpoint=last']) == 0
    said = capsys.readouterr().out
    theirs = loaded(out)
    assert difference(model, theirs) < 1e-4
    config = theirs.config
    sizes = (config.vocab_size, config.n_positions, config.n_layer, config.n_head, config.n_embd)
    assert sizes == (257, 32, 2, 4, 32)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.1, 0.1, 0.1)
    assert config.eos_token_id == theirs.generation_config.eos_token_id == 256
    weights, back = read_gpt2(out)
    assert back == GPTConfig(**SIZES, bias=True)
    for name, weight in model.state_dict().items():
        rows = 257 if name == 'token_embedding.weight' else None
        assert torch.equal(weights[name][:rows], weight[:rows]), name
    for name in weights.keys() - model.state_dict().keys():
        assert name.endswith('.bias') and not weights[name].any(), name
    assert 'hf: last.pt of step 8 in float32\n' in said
    assert f'transformers {transformers.__version__}, on random tokens and 3 prompts' in said
    assert 'tokenizer' not in said
    assert set(os.listdir(out)) == {'config.json', 'model.safetensors', 'vocab.json', 'merges.txt',
                                    'tokenizer_config.json'}


def test_bfloat16_rounds_all_tensors_and_compares_rounded_ones(trained, capsys):
    model, run, out = trained(bias=True)
    export.main([run, out, '--dtype=bfloat16'])
    said = capsys.readouterr().out
    assert float(said.split('at most ')[1].split()[0]) < 1e-5
    assert loaded(out).dtype == torch.bfloat16
    weights, _ = read_gpt2(out)
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name][:257], weight[:257].bfloat16().float()), name


def test_pruned_run_keeps_its_zeros(tmp_path, capsys):
    model = shaken(GPT(GPTConfig(**SIZES)))
    masks = {name: torch.rand(p.shape) > 0.6 for name, p in model.blocks.named_parameters()
             if p.dim() == 2}
    masks = {f'blocks.{name}': mask for name, mask in masks.items()}
    write_run(tmp_path / 'run', model, masks)
    export.main([f'{tmp_path}/run', f'{tmp_path}/hf', '--dtype=bfloat16'])
    theirs = loaded(tmp_path / 'hf')
    for n in range(2):
        for ours, name in (('attention.qkv', 'attn.c_attn'), ('attention.proj', 'attn.c_proj'),
                           ('mlp.fc', 'mlp.c_fc'), ('mlp.proj', 'mlp.c_proj')):
            weight = theirs.get_parameter(f'transformer.h.{n}.{name}.weight')
            assert torch.equal(weight.t() != 0, masks[f'blocks.{n}.{ours}.weight'])
    pruned = sum((~mask).sum().item() for mask in masks.values())
    linear = sum(mask.numel() for mask in masks.values())
    told = f"zeros: {pruned / linear:.2%} of the blocks' linear weights"
    assert told in capsys.readouterr().out


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


# --- a run that starts from a GPT-2 ---------------------------------------------------------------


def settings(folder, **changes):
    told = dict(init_from=f'hf:{folder}', n_layer=2, n_head=2, n_embd=32, bias=True, block_size=32)
    return SimpleNamespace(**{**told, **changes})


def data(vocab_size=257):
    return SimpleNamespace(**{**DATA, 'vocab_size': vocab_size})


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

    monkeypatch.setattr(export, 'read_gpt2', counted)
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32, bias=True))
    for starts in (1, 2):
        pretrained_problems(settings(folder), data())
        starting_weights(settings(folder), model)
        assert len(reads) == starts
    assert export.read_start.cache_info().currsize == 0


def test_other_runs_start_from_the_weights_drawn():
    model = GPT(GPTConfig(**SIZES))
    weights = starting_weights(SimpleNamespace(init_from='scratch'), model)
    assert weights.keys() == model.state_dict().keys()
    for name, p in model.named_parameters():
        assert torch.equal(weights[name], p)
    assert pretrained_problems(SimpleNamespace(init_from='auto'), None) == []


def test_settings_that_disagree_are_named_all_at_once(tmp_path):
    pretrained(tmp_path / 'other', vocab_size=50257, n_positions=16, n_layer=1, n_head=4, n_embd=16)
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


# --- refused: what cannot be written --------------------------------------------------------------

STRUCTURES = {
    'rotary': (dict(positions='rotary'), 'missing: position_embedding.weight'),
    'grouped': (dict(n_kv_head=2), 'beyond GPT-2: blocks.0.attention.qkv.weight (64, 32), '),
    'latent': (dict(attention='mla', latent_dim=8), 'missing: blocks.0.attention.qkv.weight'),
    'learned RA': (dict(ra_learned=True), 'GPT-2 has no reciprocal attention'),
}


@pytest.mark.parametrize('changes, told', STRUCTURES.values(), ids=STRUCTURES)
def test_parameters_that_the_format_has_no_place_for(trained, changes, told):
    _, run, out = trained(**changes)
    problems = refusal(export.main, [run, out])
    assert any(told in problem for problem in problems), problems
    assert not os.path.exists(out)


def add_third_matrix(monkeypatch):
    import model

    class SwiGLU(model.MLP):
        def __init__(self, config):
            super().__init__(config)
            self.gate = model.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
    monkeypatch.setattr(model, 'MLP', SwiGLU)


def test_scalar_of_an_edited_model_is_named(tmp_path):
    model = GPT(GPTConfig(**SIZES))
    model.blocks[1].gate = torch.nn.Parameter(torch.tensor(1.0))
    problem, = refusal(export.export, model, 'bytes', str(tmp_path / 'hf'), 'float32')
    assert problem.endswith('beyond GPT-2: blocks.1.gate (); missing: nothing')


def test_third_matrix_of_an_edited_model_is_named(trained, monkeypatch):
    add_third_matrix(monkeypatch)
    _, run, out = trained()
    problem, = refusal(export.main, [run, out])
    assert 'beyond GPT-2: blocks.0.mlp.gate.weight (128, 32), blocks.1.mlp.gate' in problem


def other_activation(monkeypatch):
    import model
    monkeypatch.setattr(model, 'gelu', F.gelu)  # exact instead of the tanh form: up to 5e-4 apart


def scaled_logits(monkeypatch):
    head = GPT.head
    monkeypatch.setattr(GPT, 'head', lambda self, x: 1.001 * head(self, x))


BEHAVIOURS = {'activation': other_activation, 'logits': scaled_logits}


@pytest.mark.parametrize('edit', BEHAVIOURS.values(), ids=BEHAVIOURS)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_what_weights_do_not_show_is_refused_by_the_logits(trained, monkeypatch, edit, dtype):
    _, run, out = trained()
    edit(monkeypatch)
    problem, = refusal(export.main, [run, out, f'--dtype={dtype}'])
    assert problem.startswith('the logits differ by ')
    assert 'this model computes something GPT-2 does not' in problem
    assert os.listdir(os.path.dirname(out)) == ['run']


def test_fixed_reciprocal_attention_and_another_epsilon_are_refused(trained, tmp_path):
    _, run, out = trained(ra_alpha=0.01)
    assert 'GPT-2 has no reciprocal attention' in refusal(export.main, [run, out])[0]
    model = shaken(GPT(GPTConfig(**SIZES)))
    model.norm.eps = 1e-3
    problem, = refusal(export.export, model, 'bytes', out, 'float32')
    assert 'computes something GPT-2 does not' in problem and not os.path.exists(out)


def test_without_transformers_nothing_is_compared_and_that_is_said(trained, monkeypatch, capsys):
    _, run, out = trained()
    monkeypatch.setitem(sys.modules, 'transformers', None)
    assert export.main([run, out]) == 0
    assert 'logits: NOT COMPARED with anything' in capsys.readouterr().out


def test_folder_is_whole_or_not_there(trained, tmp_path, monkeypatch):
    _, run, _ = trained()
    out = tmp_path / 'deep' / 'hf'

    def fail(*arguments):
        raise OSError(28, 'No space left on device')
    for where, name in ((export, 'write_json'), (files.os, 'fsync')):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fail)
            with pytest.raises(OSError, match='No space left') as raised:
                export.main([run, str(out)])
        assert str(raised.value.filename).startswith(str(out))
        assert list(out.parent.iterdir()) == []
    out.mkdir()  # empty: may be used
    assert export.main([run, str(out)]) == 0 and (out / 'model.safetensors').exists()


def test_wrong_arguments(trained, tmp_path, capsys):
    _, run, out = trained()
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'notes.txt').write_text('mine')
    for path in (f'{tmp_path}/full', f'{tmp_path}/full/notes.txt'):
        assert refusal(export.main, [run, path]) == [
            f"'{path}' exists and is not an empty folder; choose another folder"]
    assert (tmp_path / 'full' / 'notes.txt').read_text() == 'mine'
    assert export.main([run]) == 2 and 'python export.py' in capsys.readouterr().out
    assert refusal(export.main, ['none', out])[0].startswith('no checkpoint none/best.pt')
    assert refusal(export.main, [run, out, '--dtype=float16', '--chekpoint=last']) == [
        "command line: dtype='float16' is not one of float32, bfloat16; did you mean 'bfloat16'?",
        "command line: unknown setting 'chekpoint' (value 'last'); did you mean 'checkpoint'?"]
    assert export.main(['--help']) == 0 and 'latest' in capsys.readouterr().out
    os.remove(f'{run}/best.pt')
    assert 'use --checkpoint=last' in refusal(export.main, [run, out])[0]


# --- tokenizer ------------------------------------------------------------------------------------

NASTY = [
    "Hello world, it's  two   spaces\t\ttabs\n\n\nlines \n x", '', ' ', '\n',
    "don't we'll I'VE 'S ''s", '\x00\x01\x7f\x80\xad\xa0\u2028', 'naïve façade ß ﬁ Å A\u030a',
    '漢字かな交じり文 한국어', 'العربية עברית हिन्दी', '👩‍👩‍👧‍👦🏳️‍🌈 🤷🏽', '١٢٣ ½ ² Ⅷ 1234567890',
    'def f(x):\n\treturn {"a": [1, 2.5e-3]}  # !!!???...', '\u200b\ufeff\u2003x\u3000y',
    'a' * 300 + ' ' * 300 + 'b', ''.join(map(chr, range(256))), '___--- ~~~ ``` <|end', '\r\n \r x']


def test_run_on_gpt2_tokens_is_exported_with_its_tokenizer(tmp_path, capsys):
    if not os.path.isdir(os.environ.get('TIKTOKEN_CACHE_DIR', '')):
        pytest.skip('TIKTOKEN_CACHE_DIR names no folder with GPT-2\'s vocabulary')
    from support.shards import get_tokenizer
    tokenizer = get_tokenizer('gpt2')
    model = shaken(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16)))
    export.export(model, 'gpt2', str(tmp_path / 'hf'), 'float32')
    assert 'tokenizer' not in capsys.readouterr().out
    assert loaded(tmp_path / 'hf').config.eos_token_id == 50256
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    for text in NASTY:
        assert theirs(text)['input_ids'] == tokenizer.encode(text), text
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.eot and theirs.model_max_length == 16
    assert theirs('the<|endoftext|>the')['input_ids'] == [1169, 50256, 1169]


def test_export_without_the_vocabulary_says_so(tmp_path, monkeypatch, capsys):
    import tiktoken

    def offline(name):
        raise OSError('no network')
    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    model = shaken(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16)))
    export.export(model, 'gpt2', str(tmp_path / 'hf'), 'float32')
    told = "no tokenizer files: tokenizer='gpt2': the vocabulary cannot be"
    assert told in capsys.readouterr().out
    assert (tmp_path / 'hf' / 'model.safetensors').exists()
    assert not (tmp_path / 'hf' / 'vocab.json').exists()


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
