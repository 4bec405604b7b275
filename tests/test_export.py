"""export.py against transformers' own GPT-2: there, back, on from there, and every folder that must be refused."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import HOME, assert_same_run, last, refusal, train
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import bench
import export
import files
import shards
from export import read_gpt2
from model import GPT, GPTConfig
from preflight import preflight
from prune import masked
from rundir import read_metrics
from settings import Settings, check, parse

transformers = pytest.importorskip('transformers')
PRUNED = dict(prune_score='magnitude', prune_start=2, prune_end=6, prune_interval=2)


def pretrained(folder, **changes):
    """A GPT-2 of transformers' own making, saved by it; weights and biases large enough that each of them matters."""
    torch.manual_seed(5)
    config = dict(vocab_size=257, n_positions=48, n_layer=2, n_head=2, n_embd=32, bos_token_id=256, eos_token_id=256)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config, **changes})).eval()
    for p in theirs.parameters():
        p.data += 0.15 * torch.randn_like(p)
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture
def gpt2(tmp_path):
    """(transformers' model, its folder)"""
    return pretrained(tmp_path / 'gpt2'), tmp_path / 'gpt2'


def loaded(folder):
    """The model in a folder as transformers reads it; nothing may be missing, left over or of another shape."""
    theirs, told = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return theirs.eval()


@torch.no_grad()
def difference(ours, theirs):
    """Largest difference of a logit on random tokens."""
    tokens = torch.randint(ours.config.vocab_size, (3, ours.config.block_size))
    logits = theirs(tokens).logits
    assert logits.shape[-1] == ours.config.vocab_size and logits.std() > 0.01
    return (ours.eval()(tokens) - logits).abs().max().item()


def imported(folder):
    weights, config = read_gpt2(str(folder))
    model = GPT(config)
    model.load_state_dict(weights)
    return model


def used(run_dir):
    """The weights of last.pt as the run uses them."""
    saved = last(run_dir)
    return masked(saved['weights'], saved.get('mask', {}))


# --- there and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize('bias', [True, False])
def test_run_to_transformers_and_back(tiny, tmp_path, bias, capsys):
    train.main(tiny(bias=bias, dropout=0.1, n_head=4))
    capsys.readouterr()
    assert export.main([f'{tmp_path}/run', f'{tmp_path}/hf', '--checkpoint=last']) == 0
    said = capsys.readouterr().out
    ours, _ = export.exportable_run(str(tmp_path / 'run'), 'last')
    theirs = loaded(tmp_path / 'hf')
    assert difference(ours, theirs) < 1e-5
    config = theirs.config
    assert (config.vocab_size, config.n_positions, config.n_layer, config.n_head, config.n_embd) == (257, 32, 2, 4, 32)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop, config.activation_function) == (0.1, 0.1, 0.1, 'gelu_new')
    assert (config.eos_token_id, config.bos_token_id, theirs.generation_config.eos_token_id, theirs.dtype) == (256, 256, 256, torch.float32)
    weights, back = read_gpt2(str(tmp_path / 'hf'))
    assert (back.vocab_size, back.block_size, back.n_layer, back.n_head, back.n_embd, back.bias) == (257, 32, 2, 4, 32, True)
    for name, w in used(tmp_path / 'run').items():
        rows = 257 if name == 'token_embedding.weight' else None
        assert torch.equal(weights[name][:rows], w[:rows]), name
    assert len(weights) == 2 + 12 * 2 + 2
    assert not any(w.any() for name, w in weights.items() if name not in ours.state_dict())
    assert f'largest logit difference {export.check_export(str(tmp_path / "hf"), ours, "float32"):.2e},' in said
    assert 'hf: last.pt of step 8,' in said and 'no tokenizer files: a token is a byte, 256 ends a document' in said
    assert {f.name for f in (tmp_path / 'hf').iterdir()} == {'config.json', 'generation_config.json', 'model.safetensors'}


def test_bfloat16_rounds_all_tensors_and_says_how_far_the_logits_moved(tiny, tmp_path, capsys):
    train.main(tiny(bias=True))
    capsys.readouterr()
    export.main([f'{tmp_path}/run', f'{tmp_path}/hf', '--dtype=bfloat16', '--checkpoint=last'])
    said = float(capsys.readouterr().out.split('largest logit difference ')[1].split(',')[0])
    assert 1e-4 < said < 0.1
    assert loaded(tmp_path / 'hf').dtype == torch.bfloat16
    weights, _ = read_gpt2(str(tmp_path / 'hf'))
    for name, w in used(tmp_path / 'run').items():
        assert torch.equal(weights[name][:257], w[:257].bfloat16().float()), name


@pytest.mark.parametrize('form', ['as saved', 'pickle', "the hub's", 'half'])
def test_import_of_what_transformers_saved(gpt2, form):
    theirs, folder = gpt2
    if form != 'as saved':  # 2019's files: no prefix, no head, and the causal masks that were buffers then
        tensors = {k.removeprefix('transformer.' if form != 'pickle' else ''): v for k, v in theirs.state_dict().items()}
        prefix = 'transformer.' if form == 'pickle' else ''
        tensors.update({f'{prefix}h.{i}.attn.bias': torch.ones(1, 1, 48, 48).tril() for i in range(2)})
        tensors.update({f'{prefix}h.{i}.attn.masked_bias': torch.tensor(-1e4) for i in range(2)})
        if form == 'pickle':
            os.remove(folder / 'model.safetensors')
            torch.save(tensors, folder / 'pytorch_model.bin')
        else:
            del tensors['lm_head.weight']
            save_file({k: (v.half() if form == 'half' else v).contiguous() for k, v in tensors.items()}, folder / 'model.safetensors')
    if form == 'half':
        theirs = theirs.half().float()
    ours = imported(folder)
    assert difference(ours, theirs) < 1e-5
    assert ours.token_embedding.weight.shape == (384, 32) and not ours.token_embedding.weight[257:].any()


def test_pruned_run_keeps_its_zeros(tiny, tmp_path, capsys):
    train.main(tiny(**PRUNED, target_sparsity=0.6, prune_scope='blocks+embedding'))
    capsys.readouterr()
    export.main([f'{tmp_path}/run', f'{tmp_path}/hf', '--checkpoint=last'])
    theirs, masks = loaded(tmp_path / 'hf'), last(tmp_path / 'run')['mask']
    zeros, linear = 0, 0
    for name, (hf_name, shape, transposed) in export.layout(imported(tmp_path / 'hf').config).items():
        if name in masks:
            w, mask = theirs.get_parameter(f'transformer.{hf_name}'), masks[name][:shape[0]]
            assert torch.equal((w.t() if transposed else w) != 0, mask), name
            zeros, linear = zeros + (~mask).sum().item(), linear + (~mask).sum().item() * transposed
    vectors = 5 * 32  # norms: this run has no biases, and those added do not count
    total = sum(p.numel() for p in theirs.transformer.parameters() if p.dim() == 2)
    assert zeros > 0.5 * (total - 32 * 32)
    told = f"zeros: {linear / (2 * 12 * 32**2):.2%} of the blocks' linear weights, {zeros / (total + vectors):.2%} of all parameters"
    assert told in capsys.readouterr().out


# --- training from a pretrained model ----------------------------------------------------------------


def hf(folder, **told):
    return dict(init_from=f'hf:{folder}', bias=True, **told)


@torch.no_grad()
def loss_of(theirs, data_dir, tokens, T):
    """transformers' mean loss over the first tokens of the validation split, in windows of T."""
    stream = shards.open_data(str(data_dir), 'tiny').val
    windows = torch.from_numpy(stream.read([i * T for i in range(tokens // T)], T + 1))
    return F.cross_entropy(theirs(windows[:, :-1]).logits.double().flatten(0, 1), windows[:, 1:].flatten()).item()


def test_run_starts_at_the_loss_of_the_pretrained_model_and_prunes_it(tiny, tiny_data, gpt2, tmp_path, capsys):
    theirs, folder = gpt2
    assert train.main(tiny(**hf(folder), **{**PRUNED, 'prune_score': 'movement'}, n_layer=2)) == 0
    records = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    first = next(r['val_loss'] for r in records if r['step'] == 0)
    assert first == pytest.approx(loss_of(theirs, tiny_data, 640, 32), abs=1e-5)
    assert abs(first - torch.tensor(257.0).log().item()) > 0.1  # an untrained model's
    assert records[-1]['sparsity'] == pytest.approx(0.5, abs=1e-4) and records[-1]['val_loss'] < first
    saved, weights = last(tmp_path / 'run'), read_gpt2(str(folder))[0]
    for name, initial in saved['initial'].items():
        assert torch.equal(initial, weights[name]) and not torch.equal(initial, saved['weights'][name]), name
    assert sum(len(initial) for initial in saved['initial'].values()) > 0
    assert saved['weights']['position_embedding.weight'].shape == (32, 32)  # of 48
    assert f'they start from hf:{folder}\n' in capsys.readouterr().out


def test_masters_are_the_pretrained_weights_whatever_the_working_type(tiny, gpt2):
    s, problems = parse(Settings, tiny(**hf(gpt2[1]), dtype='bfloat16', block_size=48))
    run = train.build(s, *preflight(s, problems + check(s)), saved=None)
    masters, weights = train.named_state(run.flats, run.optimizer)['weights'], read_gpt2(str(gpt2[1]))[0]
    assert masters.keys() == weights.keys() and all(torch.equal(masters[name], weights[name]) for name in weights)
    assert run.model.blocks[0].mlp.fc.weight.dtype == torch.bfloat16
    assert torch.equal(run.model.blocks[0].mlp.fc.weight, weights['blocks.0.mlp.fc.weight'].bfloat16())


def test_resume_of_such_a_run_is_exact_and_needs_the_folder_no_more(tiny, gpt2, tmp_path):
    told = dict(bias=True, lr_decay_iters=8)
    _, folder = gpt2
    train.main(tiny(**told, init_from=f'hf:{folder}', out_dir=tmp_path / 'straight'))
    train.main(tiny(**told, init_from=f'hf:{folder}', max_iters=4, out_dir=tmp_path / 'split'))
    shutil.rmtree(folder)
    train.main(tiny(**told, init_from='resume', out_dir=tmp_path / 'split'))
    assert_same_run(tmp_path / 'straight', tmp_path / 'split')


def test_folder_that_holds_a_run_is_refused_finished_or_not(tiny, gpt2, tmp_path):
    told = tiny(**hf(gpt2[1]), max_iters=4)
    train.main(told)
    for gone in ('train.log', 'summary.json'):
        os.remove(tmp_path / 'run' / gone)
        assert refusal(train.main, told) == [
            f"out_dir='{tmp_path}/run' holds another run; continue it with --init_from=resume or choose another --out_dir"]


def test_plain_step_of_bench_starts_there_too(tiny, gpt2):
    s, problems = parse(Settings, tiny(**hf(gpt2[1]), max_iters=3, batch_size=4, gradient_accumulation_steps=1))
    machine, data = preflight(s, problems + check(s))
    order = shards.window_order(range(4), data.train.windows(32), s.seed)
    windows = torch.from_numpy(data.train.read([w * 32 for w in order], 33))
    logits = gpt2[0](windows[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert bench.train_plain(s, machine, data, lambda line: None)[0][0] == pytest.approx(expected, abs=1e-5)


def test_settings_that_disagree_are_refused_all_at_once(tiny, tiny_data, tmp_path):
    pretrained(tmp_path / 'other', vocab_size=50257, n_positions=16, n_layer=1, n_head=4, n_embd=16)
    name = f'hf:{tmp_path}/other'
    assert refusal(train.main, tiny(init_from=name, max_iters=0)) == [
        'max_iters=0: must be at least 1',
        'warmup_iters=2 max_iters=0 lr_decay_iters=0: the warm-up must end before the decay does (0)',
        f'n_layer=2: the model of {name} has n_layer=1; write --n_layer=1',
        f'n_head=2: the model of {name} has n_head=4; write --n_head=4',
        f'n_embd=32: the model of {name} has n_embd=16; write --n_embd=16',
        f'bias=False: the model of {name} has bias=True; write --bias=True',
        f'block_size=32: the model of {name} has 16 positions; write --block_size=16 or less',
        f"dataset='tiny' has the 257 tokens of 'bytes', the model of {name} 50257; use text prepared with --tokenizer=gpt2"]
    pretrained(tmp_path / 'odd', vocab_size=300)
    assert refusal(train.main, tiny(**hf(tmp_path / 'odd'))) == [
        f"dataset='tiny' has the 257 tokens of 'bytes', the model of hf:{tmp_path}/odd 300; use another model"]


@pytest.mark.parametrize('value, hint', [('scratsh', "; did you mean 'scratch'?"), ('rezume', "; did you mean 'resume'?"), ('gpt2', ''),
                                         ('hf:', "; did you mean 'hf:PATH'?"), ('hf', ''), ('xhf:a', '')])
def test_init_from_stays_a_checked_choice(tiny, value, hint):
    assert refusal(train.main, tiny(init_from=value)) == [
        f"command line: init_from='{value}' is not one of scratch, resume, auto, hf:PATH{hint}"]


# --- refused: what cannot be read --------------------------------------------------------------------


def change_config(**changes):
    def damage(folder):
        config = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v != 'gone'}))
    return damage


def change_tensors(change):
    """A damage that applies change(dict of tensors) to model.safetensors."""
    def damage(folder):
        tensors = {k: v.clone() for k, v in load_file(folder / 'model.safetensors').items()}
        change(tensors)
        save_file(tensors, folder / 'model.safetensors')
    return damage


def rewrite(name, content):
    return lambda folder: (folder / name).write_bytes(content((folder / name).read_bytes()))


def only_pickle(content):
    def damage(folder):
        os.remove(folder / 'model.safetensors')
        torch.save(content, folder / 'pytorch_model.bin')
    return damage


def several_files(folder):
    os.rename(folder / 'model.safetensors', folder / 'model-00001-of-00002.safetensors')
    (folder / 'model.safetensors.index.json').write_text('{}')


ANOTHER = '; it is another kind of model or damaged: get it again or use another'
DAMAGES = {
    'no config': (lambda folder: os.remove(folder / 'config.json'), '{folder}/config.json is missing'),
    'damaged config': (rewrite('config.json', lambda raw: raw[:-10]), '{folder}/config.json is damaged ('),
    'binary config': (rewrite('config.json', lambda raw: b'\xff\xfe' + raw), '{folder}/config.json is damaged ('),
    'config of another type': (rewrite('config.json', lambda raw: b'[1]'), '{folder}/config.json is damaged: no JSON object'),
    'llama': (change_config(model_type='llama'), "{folder}/config.json: model_type='llama', but only 'gpt2' can be read"),
    'no type': (change_config(model_type='gone'), '{folder}/config.json: model_type=None, but only'),
    'gelu': (change_config(activation_function='gelu'), "{folder}/config.json: activation_function='gelu', but our GPT-2 has 'gelu_new'"),
    'inverse layer': (change_config(scale_attn_by_inverse_layer_idx=True),
                      '{folder}/config.json: scale_attn_by_inverse_layer_idx=True, but our GPT-2 has False'),
    'upcast': (change_config(reorder_and_upcast_attn=True), '{folder}/config.json: reorder_and_upcast_attn=True, but'),
    'not scaled': (change_config(scale_attn_weights=False), '{folder}/config.json: scale_attn_weights=False, but our GPT-2 has True'),
    'cross': (change_config(add_cross_attention=True), '{folder}/config.json: add_cross_attention=True, but'),
    'untied': (change_config(tie_word_embeddings=False), '{folder}/config.json: tie_word_embeddings=False, but'),
    'epsilon': (change_config(layer_norm_epsilon=1e-6), '{folder}/config.json: layer_norm_epsilon=1e-06, but our GPT-2 has 1e-05'),
    'inner': (change_config(n_inner=64), '{folder}/config.json: n_inner=64, but our GPT-2 has 4 n_embd = 128'),
    'no layers': (change_config(n_layer='gone'), '{folder}/config.json: n_layer=None is not a positive integer'),
    'heads': (change_config(n_head=3), '{folder}/config.json: n_embd=32 is not a multiple of n_head=3'),
    'no weights': (lambda folder: os.remove(folder / 'model.safetensors'), '{folder} holds neither model.safetensors nor pytorch_'),
    'several': (several_files, '{folder} holds neither model.safetensors nor pytorch_model.bin; weights in several files are not'),
    'truncated': (rewrite('model.safetensors', lambda raw: raw[:-100]), '{folder}/model.safetensors is damaged or no file of weights ('),
    'empty': (rewrite('model.safetensors', lambda raw: b''), '{folder}/model.safetensors is damaged or no file of weights ('),
    'pointer': (rewrite('model.safetensors', lambda raw: b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'),
                '{folder}/model.safetensors is damaged or no file of weights ('),
    'other config': (change_config(n_layer=1), '{folder}/model.safetensors: h.1.attn.c_attn.bias is not part of a GPT-2 with n_layer=1 '
                                               '(and 11 more faults)' + ANOTHER),
    'missing': (change_tensors(lambda t: t.pop('transformer.h.1.mlp.c_fc.bias')),
                '{folder}/model.safetensors: h.1.mlp.c_fc.bias is missing' + ANOTHER),
    'shape': (change_tensors(lambda t: t.update({'transformer.h.0.mlp.c_fc.weight': torch.zeros(128, 32)})),
              '{folder}/model.safetensors: h.0.mlp.c_fc.weight has shape (128, 32), config.json asks for (32, 128)' + ANOTHER),
    'integers': (change_tensors(lambda t: t.update({'transformer.ln_f.bias': torch.zeros(32, dtype=torch.int8)})),
                 '{folder}/model.safetensors: ln_f.bias is of int8, not of float32, float16 or bfloat16' + ANOTHER),
    'nan': (change_tensors(lambda t: t['transformer.ln_f.bias'].fill_(float('nan'))),
            '{folder}/model.safetensors: ln_f.bias holds NaN or infinity' + ANOTHER),
    'head': (change_tensors(lambda t: t.update({'lm_head.weight': torch.zeros(257, 32)})),
             '{folder}/model.safetensors: lm_head.weight differs from the token embedding, which the head is tied to here' + ANOTHER),
    'no embedding': (change_tensors(lambda t: t.update({'lm_head.weight': t.pop('transformer.wte.weight')})),
                     '{folder}/model.safetensors: wte.weight is missing (and 1 more faults)' + ANOTHER),
    'pickled code': (only_pickle(Settings()), '{folder}/pytorch_model.bin is damaged or no file of weights (UnpicklingError: '),
    'pickled list': (only_pickle([1]), '{folder}/pytorch_model.bin is damaged or no file of weights (it holds other things than tensors)'),
    'pickled tree': (only_pickle({'model': {}}), '{folder}/pytorch_model.bin is damaged or no file of weights (it holds other things'),
}


@pytest.mark.parametrize('damage, begins', DAMAGES.values(), ids=DAMAGES)
def test_damaged_or_foreign_folder(tiny, gpt2, tmp_path, damage, begins):
    damage(gpt2[1])
    problem, = refusal(train.main, tiny(**hf(gpt2[1])))
    assert problem.startswith(begins.format(folder=gpt2[1])) and '\n' not in problem and len(problem) < 400, problem
    assert not (tmp_path / 'run').exists()


def test_refusals_are_one_line_and_exit_code_2(tiny, gpt2, tmp_path):
    DAMAGES['truncated'][0](gpt2[1])
    for argv in (['train.py', *tiny(**hf(gpt2[1]))], ['export.py', str(tmp_path / 'none'), str(tmp_path / 'hf')]):
        child = subprocess.run([sys.executable, str(HOME / argv[0]), *argv[1:]], capture_output=True, text=True)
        assert child.returncode == 2 and child.stderr.startswith('refused:\n  - ') and child.stderr.count('\n') == 2, child.stderr


def test_hub(gpt2, tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    problem, = refusal(read_gpt2, 'someone/model')
    assert problem.startswith("'someone/model' is not a folder, and cannot be had from the hub (") and '\n' not in problem
    assert problem.endswith('with: hf download someone/model config.json model.safetensors --local-dir FOLDER, and name the FOLDER')
    snapshot = tmp_path / 'cache' / 'models--someone--model' / 'snapshots' / ('a' * 40)  # as a download leaves it
    shutil.copytree(gpt2[1], snapshot)
    (snapshot.parent.parent / 'refs').mkdir()
    (snapshot.parent.parent / 'refs' / 'main').write_text('a' * 40)
    assert difference(imported('someone/model'), gpt2[0]) < 1e-5
    os.remove(snapshot / 'model.safetensors')
    assert refusal(read_gpt2, 'someone/model') == [f'{snapshot} holds neither model.safetensors nor pytorch_model.bin']
    torch.save(gpt2[0].state_dict(), snapshot / 'pytorch_model.bin')
    assert difference(imported('someone/model'), gpt2[0]) < 1e-5
    for path in (f'{tmp_path}/none', './none', f'{gpt2[1]}/config.json'):
        assert refusal(read_gpt2, path) == [
            f"'{path}' is not a folder; give one with config.json and model.safetensors, or a name on the hub such as gpt2"]


# --- refused: what cannot be written -----------------------------------------------------------------


@pytest.fixture
def trained(tiny, tmp_path):
    train.main(tiny(max_iters=4))
    return str(tmp_path / 'run')


def test_folder_is_whole_or_not_there(trained, tmp_path, monkeypatch):
    out = tmp_path / 'deep' / 'hf'
    for where, name in ((export, 'write_atomically'), (export, 'check_export'), (files.os, 'rename')):
        def fail(*arguments):
            raise OSError(28, 'No space left on device')
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fail)
            assert refusal(export.main, [trained, str(out)]) == [
                f"'{out}' could not be written (No space left on device); choose another folder"]
        assert list(out.parent.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(export, 'write_atomically', lambda path, write: files.write_atomically(path, lambda f: f.write(b'\0' * 9)))
        assert 'model.safetensors is damaged or no file of weights' in refusal(export.main, [trained, str(out)])[0]
    assert list(out.parent.iterdir()) == []
    out.mkdir()  # empty: may be used
    assert export.main([trained, str(out)]) == 0 and (out / 'model.safetensors').exists()


def test_weights_that_are_read_back_otherwise_are_refused(trained, tmp_path, monkeypatch):
    written = export.to_gpt2
    monkeypatch.setattr(export, 'to_gpt2', lambda *told: {k: v + 1e-6 * ('h.1.mlp.c_proj.weight' in k) for k, v in written(*told).items()})
    problem, = refusal(export.main, [trained, str(tmp_path / 'hf')])
    assert 'blocks.1.mlp.proj.weight was read back with other values than were written' in problem and not (tmp_path / 'hf').exists()


def test_wrong_arguments(trained, tmp_path, capsys):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'notes.txt').write_text('mine')
    (tmp_path / 'file').write_text('mine')
    for name in ('full', 'file'):
        assert refusal(export.main, [trained, f'{tmp_path}/{name}']) == [
            f"'{tmp_path}/{name}' is there already; choose another OUT_DIRECTORY or remove it"]
    assert (tmp_path / 'full' / 'notes.txt').read_text() == (tmp_path / 'file').read_text() == 'mine'
    usage = 'usage: python export.py RUN_DIRECTORY OUT_DIRECTORY [--key=value ...]'
    assert refusal(export.main, ['none', '--dtype=float16']) == [f"'none' is not a run directory; {usage}", f'no OUT_DIRECTORY; {usage}']
    assert refusal(export.main, [trained, f'{tmp_path}/hf', '--dtype=float16', '--chekpoint=last']) == [
        "command line: dtype='float16' is not one of float32, bfloat16; did you mean 'bfloat16'?",
        "command line: unknown setting 'chekpoint' (value 'last'); did you mean 'checkpoint'?"]
    assert export.main(['--help']) == 0 and 'latest' in capsys.readouterr().out
    os.remove(f'{trained}/best.pt')
    assert refusal(export.main, [trained, f'{tmp_path}/hf']) == [
        f'{trained}/best.pt is not there: it is written at the first evaluation after step 0 that beats those before, of a pruned run '
        'from prune_end on; use --checkpoint=last']


ATTENTION = {
    'latent': (dict(attention='mla', latent_dim=8), "attention='mla': GPT-2's format has multi-head attention only"),
    'reciprocal': (dict(ra_alpha=0.5), "ra_alpha=0.5: GPT-2's format has no reciprocal attention"),
    'learned': (dict(ra_learned=True), "ra_learned=True: GPT-2's format has no reciprocal attention"),
}


@pytest.mark.parametrize('told, problem', ATTENTION.values(), ids=ATTENTION)
def test_attention_that_the_format_does_not_know(tiny, tmp_path, told, problem):
    train.main(tiny(**told, max_iters=4))
    assert refusal(export.main, [f'{tmp_path}/run', f'{tmp_path}/hf']) == [
        f'{tmp_path}/run: {problem}; such a run can be evaluated with: python sample.py {tmp_path}/run --score=FILE']
    assert not os.path.exists(tmp_path / 'hf') and export.problems_of({}) == []  # settings of before there was a choice


# --- tokenizer ---------------------------------------------------------------------------------------

NASTY = [
    "Hello world, it's  two   spaces\t\ttabs\n\n\nlines \n x", '', ' ', '\n', "don't we'll I'VE 'S ''s", '\x00\x01\x7f\x80\xad\xa0\u2028',
    'naïve façade ß ﬁ Å A\u030a', '漢字かな交じり文 한국어', 'العربية עברית हिन्दी',
    '👩‍👩‍👧‍👦🏳️‍🌈 🤷🏽',
    '١٢٣ ½ ² Ⅷ 1234567890', 'the other thether',
    'def f(x):\n\treturn {"a": [1, 2.5e-3]}  # !!!???...', '\u200b\ufeff\u2003x\u3000y', 'a' * 300 + ' ' * 300 + 'b',
    ''.join(map(chr, range(256))), '___--- ~~~ ``` <|end <|endoftext', '\r\n\r\n  \r x']


def check_tokenizer(folder, tokenizer):
    export.write_tokenizer(str(folder), tokenizer, 1024)
    (folder / 'config.json').write_text('{"model_type": "gpt2"}')
    for theirs in (transformers.GPT2Tokenizer.from_pretrained(folder), transformers.GPT2TokenizerFast.from_pretrained(folder),
                   transformers.AutoTokenizer.from_pretrained(folder)):
        for text in NASTY:
            assert theirs(text)['input_ids'] == tokenizer.encode(text), text
            assert theirs.decode(tokenizer.encode(text)) == text
        assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot and theirs.model_max_length == 1024
        assert theirs('the<|endoftext|>the')['input_ids'] == tokenizer.encode('the') + [tokenizer.eot] + tokenizer.encode('the')


def test_tokenizer_files_of_a_small_vocabulary(tmp_path):
    import tiktoken
    merges = ['th', 'the', ' t', ' the', 'er', 'ther', '  ', '    ', 'ä', 'ï']  # 'ther' is the + r or th + er: the is merged first
    ranks = {bytes([i]): i for i in range(256)} | {text.encode(): 256 + i for i, text in enumerate(merges)}
    encoding = tiktoken.Encoding('small', pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
                                 mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 266})
    check_tokenizer(tmp_path, shards.Tokenizer('small', 267, 266, encoding))


@pytest.fixture
def real_gpt2():
    """shards' GPT-2 tokenizer, from this machine."""
    if not os.path.isdir(os.environ.get('TIKTOKEN_CACHE_DIR', '')):
        pytest.skip("GPT-2's vocabulary is not here: TIKTOKEN_CACHE_DIR names no folder, and tests use no network")
    return shards.get_tokenizer('gpt2')


def test_tokenizer_files_of_gpt2(real_gpt2, tmp_path):
    check_tokenizer(tmp_path, real_gpt2)


def gpt2_run():
    """(model, what its checkpoint would say) of a tiny run on GPT-2's tokens."""
    return GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16)).eval(), {'data': {'tokenizer': 'gpt2'}}


def test_run_on_gpt2_tokens_is_exported_with_its_tokenizer(real_gpt2, tmp_path):
    model, saved = gpt2_run()
    assert len(export.export(model, saved, str(tmp_path / 'hf'), 'float32')) == 1
    theirs = loaded(tmp_path / 'hf')
    assert difference(model, theirs) < 1e-5 and theirs.config.eos_token_id == 50256
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')('Hello world')['input_ids'] == [15496, 995]


def test_export_without_the_vocabulary_says_so(tmp_path, monkeypatch):
    import tiktoken

    def offline(name):
        raise OSError('no network')
    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    model, saved = gpt2_run()
    line = export.export(model, saved, str(tmp_path / 'hf'), 'float32')[1]
    assert line.startswith("no tokenizer files: tokenizer='gpt2': the vocabulary cannot be fetched (OSError) and is not in TIKTOKEN")
    assert difference(model, loaded(tmp_path / 'hf')) < 1e-5 and not (tmp_path / 'hf' / 'vocab.json').exists()
