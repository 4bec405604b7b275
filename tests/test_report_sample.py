"""What is done with finished runs: text from them, and comparisons."""
import json
import os
import shutil

import pytest
import torch
from conftest import refusal, train

import report
import sample
from attention import new_cache
from model import GPT, GPTConfig


@pytest.fixture
def trained(tiny, tmp_path):
    """Run directory of a finished run."""
    train.main(tiny())
    return tmp_path / 'run'


# --- sample.py ---------------------------------------------------------------------------------------


def texts(capsys, folder, **told):
    """What sample.py prints for a run directory."""
    capsys.readouterr()
    assert sample.main([str(folder)] + [f'--{key}={value}' for key, value in {'device': 'cpu', **told}.items()]) == 0
    return capsys.readouterr().out


def model_of(vocab_size=257, block_size=32):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=block_size, n_layer=2, n_head=2, n_embd=32)).eval()
    for p in model.blocks.parameters():
        p.data *= 20  # so that all tokens it sees matter, not the last alone
    return model


def generated(model, prompt, count, temperature=0.8, top_k=0, seed=1, end=None):
    steps = sample.generate(model, new_cache(model.config, 1, 'cpu', torch.float32), [prompt], [seed], count, temperature, top_k, end=end)
    return prompt + [token for token, in steps]


def test_same_seed_same_text(trained, capsys):
    told = dict(prompt='abc', max_new_tokens=40, num_samples=2, temperature=2.0)
    once, again, other = texts(capsys, trained, **told), texts(capsys, trained, **told), texts(capsys, trained, **told, seed=1338)
    assert once == again != other
    first, second = once.split('\n---\n')[:2]
    assert first != second


def test_prompt_is_continued_past_the_block_size(trained, capsys):
    text = texts(capsys, trained, prompt='the prompt ', max_new_tokens=100, temperature=0).removesuffix('\n---\n')  # block_size 32
    assert text.startswith('the prompt ') and len(text.encode()) >= len('the prompt ') + 100


def test_last_and_best_checkpoint_can_be_chosen(trained, capsys):
    told = dict(prompt='abc', max_new_tokens=30)
    assert texts(capsys, trained, **told, checkpoint='last') == texts(capsys, trained, **told, checkpoint='best')
    os.remove(trained / 'best.pt')
    texts(capsys, trained, **told, checkpoint='last')
    assert refusal(sample.main, [str(trained)]) == [
        f'{trained}/best.pt is not there: it is written at the first evaluation after step 0 that beats those before, of a pruned run '
        'from prune_end on; use --checkpoint=last']


def test_temperature_zero_and_top_k_one_take_the_likeliest_token():
    model, tokens, seen = model_of(), [5], [5]
    for _ in range(50):
        with torch.no_grad():
            tokens.append(model(torch.tensor([seen]))[0, -1].argmax().item())
        seen = (seen if len(seen) < 32 else tokens[-16:-1]) + tokens[-1:]  # all positions used up: the last half, read anew
    assert len(set(tokens[32:])) > 5
    assert generated(model, [5], 50, temperature=0) == tokens
    assert generated(model, [5], 50, temperature=3.0, top_k=1) == tokens
    assert generated(model, [5], 50, temperature=3.0) != tokens


def test_top_k_draws_from_the_likeliest_k_only():
    model = model_of()
    with torch.no_grad():
        likeliest = model(torch.tensor([[5]]))[0, -1].topk(3).indices.tolist()
    drawn = {generated(model, [5], 1, temperature=5.0, top_k=3, seed=seed)[1] for seed in range(40)}
    assert drawn == set(likeliest)


@pytest.mark.parametrize('temperature', [0, 1.0])
def test_padding_of_the_vocabulary_is_never_drawn(temperature):
    model = model_of()
    assert model.token_embedding.weight.size(0) == 384
    with torch.no_grad():
        model.token_embedding.weight[257:] = 1000 * model.norm(torch.randn(127, 32))
        hidden = model.hidden(torch.tensor([[5]]))[0, -1]
        assert (model.token_embedding.weight @ hidden).argmax() >= 257  # it would be, if it could
    tokens = generated(model, [5], 500, temperature=temperature)
    assert len(tokens) == 501 and max(tokens) < 257


def test_text_ends_at_the_end_of_text():
    model = model_of()
    whole = generated(model, [5], 60, temperature=2.0)
    end = whole[20]
    assert generated(model, [5], 60, temperature=2.0, end=end) == whole[:whole.index(end, 1) + 1]


def test_sampling_refuses_what_cannot_be(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert refusal(sample.main, [str(trained), '--num_samples=0', '--max_new_tokens=-1', '--temperature=-0.5', '--top_k=300']) == [
        'num_samples=0: must be at least 1', 'max_new_tokens=-1: must be at least 1', 'temperature=-0.5: must not be negative',
        'top_k=300: the vocabulary has 257 tokens; 0 draws from all of them']
    assert refusal(sample.main, [f'{tmp_path}/none', '--temprature=1', '--seed=x', 'config.py', '--device=gpu']) == [
        "command line: unknown setting 'temprature' (value '1'); did you mean 'temperature'?",
        "command line: seed='x' is not an int",
        "command line: 'config.py' is not of the form --key=value",
        "device='gpu': must be auto, cpu, cuda or cuda:N",
        f"'{tmp_path}/none' is not a run directory; usage: python sample.py RUN_DIRECTORY [--key=value ...]"]
    assert refusal(sample.main, [str(trained), '--device=cuda']) == [
        f"device='cuda': this PyTorch ({torch.__version__}) sees no GPU; use --device=cpu or install a build for your GPU (CUDA or ROCm)"]


# --- report.py ---------------------------------------------------------------------------------------


def variant(folder, name, file, **changes):
    """A copy of a run directory, beside it, with other values in one of its JSON files."""
    copy = shutil.copytree(folder, folder.parent / name)
    content = json.loads((copy / file).read_text())
    content.get('settings', {}).update({k: v for k, v in changes.items() if k in content.get('settings', {})})
    content.update({k: v for k, v in changes.items() if k in content})
    (copy / file).write_text(json.dumps(content))
    return copy


def unfair(*folders):
    return [line for line in report.unfair([report.load_run(f) for f in folders]) if 'code that differs' not in line]


def test_table_says_what_the_summaries_say(trained, tiny, tmp_path, capsys):
    train.main(tiny(out_dir=tmp_path / 'longer_name', max_iters=12, n_layer=1, n_embd=2,
                    batch_size=1))
    capsys.readouterr()
    assert report.main([str(trained), str(tmp_path / 'longer_name') + '/', f'--plot={tmp_path}/p.png']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ('run steps tokens val loss perplexity best loss sparsity of all tok/s MFU peak GiB graphs breaks rung '
                                'ended').split()
    told = [json.loads((tmp_path / name / 'summary.json').read_text()) for name in ('run', 'longer_name')]
    for line, name, numbers, t in zip(lines[1:3], ('run', 'longer_name'), (['8', '1,024'], ['12', '768']), told):
        assert line.split() == [
            name, *numbers, f"{t['val_loss']:.4f}", f"{t['val_ppl']:.2f}", f"{t['best_val_loss']:.4f}", '0.0%', '0.0%',
            f"{t['tokens_per_second']:,.0f}", '-', f"{t['peak_memory_bytes'] / 2**30:.2f}", '0', '0', '0', 'finished']
    assert len(lines[0]) == len(lines[1]) == len(lines[2])


def test_what_makes_a_comparison_unfair_is_said(trained, tiny, tmp_path):
    same = shutil.copytree(trained, tmp_path / 'same')
    assert unfair(trained, same) == []
    summary = {'rung': 2, 'rung_label': 'loss in chunks', 'exit_reason': 'sigterm', 'dataset': 'other', 'fingerprint': 'abc', 'tokens': 5}
    other = variant(trained, 'other', 'summary.json', **summary)
    fingerprint = json.loads((trained / 'summary.json').read_text())['fingerprint']
    assert unfair(trained, same, other) == [
        'data set differs: run tiny, same tiny, other other',
        f'data fingerprint differs: run {fingerprint}, same {fingerprint}, other abc',
        'tokens trained on differs: run 1024, same 1024, other 5',
        'other did not finish: sigterm',
        'other ran out of memory and took another way: loss in chunks']
    config = variant(trained, 'config', 'config.json', eval_tokens=0, block_size=64, seed=1, dtype='bfloat16', commit='f' * 40)
    commit = json.loads((trained / 'config.json').read_text())['commit'][:12]
    assert unfair(trained, config) == [
        'tokens evaluated (eval_tokens) differs: run 640, config 0', 'block_size differs: run 32, config 64',
        'seed differs: run 1337, config 1', 'numbers differs: run float32, config bfloat16',
        f'code differs: run {commit}, config {"f" * 12}']
    edited = variant(trained, 'edited', 'config.json', edited=True)
    assert 'edited was made by code that differs from its commit' in report.unfair([report.load_run(edited)])


def test_picture_is_written(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report.main([str(trained)]) == 0
    assert report.main([str(trained), str(trained)]) == 0
    assert report.main([str(trained), '--plot=named.png']) == 0
    for path in (trained / 'loss.png', tmp_path / 'report.png', tmp_path / 'named.png'):
        assert path.read_bytes().startswith(b'\x89PNG') and path.stat().st_size > 10_000
    assert capsys.readouterr().out.count('picture: ') == 3


def test_picture_of_several_runs_shows_how_far_each_is_from_the_first(trained, tiny, tmp_path, monkeypatch):
    pyplot = pytest.importorskip('matplotlib.pyplot')
    train.main(tiny(out_dir=tmp_path / 'other', learning_rate=1e-4, min_lr=1e-5))
    figures = []
    monkeypatch.setattr(pyplot, 'close', figures.append)
    report.main([str(trained), str(tmp_path / 'other'), f'--plot={tmp_path}/p.png'])
    report.main([str(trained), f'--plot={tmp_path}/p.png'])
    labels = [[axis.get_ylabel() for axis in figure.axes] for figure in figures]
    assert labels == [['loss (nat a token)', 'minus run (nat)', 'learning rate'], ['loss (nat a token)', 'learning rate']]  # none prunes
    told = [[json.loads(line) for line in (tmp_path / name / 'metrics.jsonl').read_text().splitlines()] for name in ('run', 'other')]
    legends = [[text.get_text().partition(':')[0] for text in figure.axes[0].get_legend().get_texts()] for figure in figures]
    assert legends == [['run', 'other'], ['run']]
    for line, key in zip(figures[0].axes[1].lines, ('loss', 'val_loss')):
        mine, theirs = ([r[key] for r in rows if key in r] for rows in told)
        assert list(line.get_ydata()) == [b - a for a, b in zip(mine, theirs)] and len(mine) > 2


def test_run_that_ended_before_it_measured_anything_can_be_reported(tiny, tmp_path, monkeypatch, capsys):
    def no_memory(self, idx, targets=None):
        raise torch.OutOfMemoryError('out of memory')
    monkeypatch.setattr(GPT, 'forward', no_memory)
    assert train.main(tiny(oom='fail')) == 1
    assert report.main([str(tmp_path / 'run')]) == 0
    assert 'careful: run did not finish: out of memory' in capsys.readouterr().out


def test_folder_without_a_run_is_refused(trained, tmp_path):
    os.remove(trained / 'summary.json')
    (tmp_path / 'damaged').mkdir()
    (tmp_path / 'damaged' / 'summary.json').write_text('{')
    problems = refusal(report.main, [str(tmp_path / 'none'), str(trained), str(tmp_path / 'damaged'), '--polt=x.png'])
    assert problems[:3] == [
        "command line: unknown setting 'polt' (value 'x.png'); did you mean 'plot'?",
        f"'{tmp_path}/none' has no summary.json and config.json: not a run directory, or a run that has not ended",
        f"'{trained}' has no summary.json and config.json: not a run directory, or a run that has not ended"]
    assert problems[3].startswith(f'{tmp_path}/damaged/summary.json is damaged (') and len(problems) == 4
