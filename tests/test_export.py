"""export.py against transformers' own GPT-2: there, back, and what is refused."""
import os
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import refusal
from models import difference, shaken
from torch.nn import functional as F

import export
from model import GPT, GPTConfig
from support import files
from support.pretrained import read_gpt2
from support.rundir import pack_weights, save_checkpoint

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.gpt2  # it is GPT-2's format
SIZES = dict(vocab_size=257, block_size=32, n_layer=2, n_head=4, n_embd=32)
DATA = {'name': 'tiny', 'tokenizer': 'bytes', 'vocab_size': 257}


def write_run(folder, model, masks=None, tokenizer='bytes'):
    """A run directory, as far as an export needs one, whose checkpoints hold the model."""
    os.makedirs(folder)
    weights = pack_weights(model.state_dict(), masks or {}, torch.float32)
    for name in ('best', 'last'):
        save_checkpoint(os.path.join(folder, f'{name}.pt'), dict(
            format='nanoprune 3', model=asdict(model.config), settings={}, fingerprint='',
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
    told = f'zeros: {pruned / linear:.2%} of the matrices in the blocks'
    assert told in capsys.readouterr().out


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
    from support.tokenizer import Tokenizer
    tokenizer = Tokenizer('gpt2')
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
