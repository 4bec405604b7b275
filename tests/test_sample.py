"""sample.py: drawing, printing, scores, and the command on a run directory."""
import dataclasses
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from models import MLA, RA, lively, text
from torch.nn import functional as F

import sample
from sample import CachedReader, draw, generate
from support.rundir import FORMAT, save_checkpoint
from support.settings import Refused
from support.shards import EOT_TEXT
from support.tokenizer import Tokenizer

HOME = pathlib.Path(__file__).resolve().parent.parent


def numbers(count):
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# --- drawing --------------------------------------------------------------------------------------


@pytest.mark.parametrize('top_p, kept', [
    (0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 3, 4}), (0.96, {0, 1, 2, 3, 4})])
def test_top_p_keeps_the_fewest_likeliest_tokens_that_make_it_up(top_p, kept):
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = probabilities.log().expand(2000, 5)
    drawn = draw(logits, 1.0, 0, top_p, numbers(2000))
    assert set(drawn.tolist()) == kept
    tokens = list(kept)
    expected = probabilities[tokens] / probabilities[tokens].sum()
    seen = (drawn[:, None] == torch.tensor(tokens)).float().mean(0)
    assert (seen - expected).abs().max() < 0.04


def test_temperature_divides_the_logits():
    probabilities = torch.tensor([0.1, 0.6, 0.3])
    drawn = draw(probabilities.log().expand(4000, 3), 2.0, 0, 1.0, numbers(4000))
    expected = probabilities.sqrt() / probabilities.sqrt().sum()
    assert (drawn.bincount(minlength=3) / 4000 - expected).abs().max() < 0.03


def test_top_p_counts_among_the_top_k():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(300, 4)
    drawn = draw(logits, 1.0, 2, 0.58, numbers(300))
    assert set(drawn.tolist()) == {0, 1}  # 4/7 of two is not 0.58 yet
    assert set(draw(logits, 1.0, 2, 0.56, numbers(300)).tolist()) == {0}


@pytest.mark.parametrize('told', [(0, 0, 1.0), (0.8, 20, 1.0), (0.7, 0, 0.9)], ids=str)
def test_logits_in_bfloat16_are_drawn_from_as_they_are(told):
    logits = torch.randn(300, 100, generator=torch.Generator().manual_seed(1)).bfloat16()
    drawn, expected = draw(logits, *told, numbers(300)), draw(logits.double(), *told, numbers(300))
    likely = logits.gather(1, torch.stack([drawn, expected], 1))
    assert torch.equal(likely[:, 0], likely[:, 1])  # of equally likely ones it may be another
    broken = logits.index_fill(1, torch.tensor(7), torch.nan)
    assert draw(broken, *told, numbers(300)).tolist() == [-1] * 300


@pytest.mark.parametrize('told', [(0, 0, 1.0), (1.0, 0, 1.0), (1.0, 2, 0.9)], ids=str)
def test_a_draw_asks_the_device_nothing(told, monkeypatch):
    def asked(*arguments):
        raise AssertionError('a tensor was read on the host')

    for name in ('item', 'tolist', '__bool__', '__int__', '__float__', '__index__', 'cpu'):
        monkeypatch.setattr(torch.Tensor, name, asked)
    draw(torch.zeros(2, 5), *told, numbers(2))


@pytest.mark.parametrize('told', [(0, 0, 1.0), (1.0, 0, 1.0), (1.0, 2, 0.9)], ids=str)
@pytest.mark.parametrize('broken', [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(told, broken):
    logits = torch.zeros(2, 5)
    logits[1, 3] = broken
    with pytest.raises(Refused, match='the model gives logits that are not finite'):
        list(generate(lambda texts: logits, 8, [[1], [1]], [0, 1], 3, *told))


# --- texts ----------------------------------------------------------------------------------------


def generated(model, prompt, count, temperature=0.8, top_k=0, seed=1, end=None):
    """The prompt and the tokens that continue it."""
    reader = CachedReader(model, 1, recorded=False)
    steps = generate(reader, model.config.block_size, [prompt], [seed], count, temperature, top_k,
                     end=end)
    return prompt + [token for token, in steps]


def test_temperature_zero_and_top_k_one_take_the_likeliest_token():
    model = lively()
    late = set()
    for prompt in text(model, rows=8, T=40).tolist():
        tokens = list(prompt)
        seen = list(prompt)
        for _ in range(20):
            with torch.no_grad():
                tokens.append(model(torch.tensor([seen]))[0, -1].argmax().item())
            seen = seen + tokens[-1:]
            if len(seen) > 48:  # positions are used up: the last half is read anew
                seen = tokens[-24:]
        assert generated(model, prompt, 20, temperature=0) == tokens
        assert generated(model, prompt, 20, temperature=3.0, top_k=1) == tokens
        assert generated(model, prompt, 20, temperature=3.0) != tokens
        late.update(tokens[49:])
    assert len(late) > 5  # the likeliest token is not always the same


def test_padding_of_the_vocabulary_is_never_drawn():
    model = lively()  # 131 tokens, 256 rows
    with torch.no_grad():
        model.token_embedding.weight[131:] = 1000 * model.norm(torch.randn(125, 32))
        hidden = model.hidden(torch.tensor([[5]]))[0, -1]
        assert (model.token_embedding.weight @ hidden).argmax() >= 131  # it would be, if it could
    assert max(generated(model, [5], 200, temperature=1.0)) < 131


def test_a_text_ends_at_the_end_of_text_but_a_prompt_goes_on():
    model = lively()
    whole = generated(model, [5], 60, temperature=2.0)
    end = whole[20]
    assert generated(model, [5], 60, temperature=2.0, end=end) == whole[:whole.index(end, 1) + 1]
    assert len(generated(model, [end], 3, end=end)) > 1


def test_a_character_is_printed_once_it_is_whole(capsys):
    tokenizer = Tokenizer('bytes')
    printed = []

    def steps(tokens):
        for token in tokens:
            yield [token]
            printed.append(capsys.readouterr().out)

    assert sample.print_texts(tokenizer, ['>'], steps('é€😀!'.encode()), tokenizer.eot) == 10
    assert printed == ['>', 'é', '', '', '€', '', '', '', '😀', '!']
    assert capsys.readouterr().out == '\n---\n'
    sample.print_texts(tokenizer, [''], steps([65, tokenizer.eot]), tokenizer.eot)
    assert EOT_TEXT not in ''.join(printed)


# --- the command ----------------------------------------------------------------------------------


def run_directory(folder, **told):
    """A run directory with best.pt and last.pt of a model that writes bytes."""
    model = lively(**{**dict(vocab_size=257, block_size=32), **told})
    folder.mkdir()
    for name in ('best', 'last'):
        weights = {name: p.detach() for name, p in model.named_parameters()}
        data = dict(name='tiny', tokenizer='bytes', vocab_size=257)
        content = dict(format=FORMAT, model=dataclasses.asdict(model.config), settings={},
                       data=data, fingerprint='', weights=weights, step=1, val_loss=1.0)
        save_checkpoint(str(folder / f'{name}.pt'), content)
    return folder


@pytest.fixture(params=[{}, dict(MLA, positions='rotary'), RA], ids=['mha', 'mla, rotary', 'ra'])
def run(tmp_path, request):
    return run_directory(tmp_path / 'run', **request.param)


@pytest.fixture
def plain_run(tmp_path):
    return run_directory(tmp_path / 'run')


def command(folder, *argv):
    return sample.main([str(folder), '--device=cpu', *argv])


def refusal(folder, *argv):
    with pytest.raises(Refused) as caught:
        command(folder, *argv)
    return caught.value.problems


def test_prompts_of_a_file_are_what_each_is_alone(run, tmp_path, capsys):
    lines = ['the first prompt', '', 'é', 'x' * 50]
    (tmp_path / 'prompts.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    told = ('--num_samples=2', '--max_new_tokens=40', '--temperature=1.5')
    assert command(run, f'--prompts_file={tmp_path / "prompts.txt"}', *told) == 0
    together = capsys.readouterr()
    for line in lines:
        command(run, f'--prompt={line}', *told)
    assert together.out == capsys.readouterr().out
    texts = together.out.split('\n---\n')
    assert len(texts) == 9 and texts[0] != texts[1]
    assert all(texts[n].startswith(lines[n // 2]) for n in range(8))
    last = together.err.splitlines()[-1]
    told = re.fullmatch(r'(\d+) tokens, ([\d.]+) a second, in 8 texts; (cache [\d.]+ MiB|'
                        'no cache, because reciprocal attention has none)', last)
    assert int(told[1]) <= 8 * 40 and float(told[2]) > 0


def test_a_single_text_is_the_same_streamed(run, capsys):
    """The second of two texts, printed when done, and the same alone, printed as it comes."""
    told = ('--max_new_tokens=60', '--temperature=3', '--top_k=0')
    command(run, *told, '--prompt=a€', f'--seed={1337 + 1_000_003}')
    streamed = capsys.readouterr().out
    command(run, *told, '--prompt=a€', '--num_samples=2')
    assert capsys.readouterr().out.endswith('\n---\n' + streamed)
    assert '\ufffd' in streamed  # random bytes are no UTF-8


def test_an_empty_file_of_prompts_is_a_new_document(plain_run, tmp_path, capsys):
    (tmp_path / 'empty.txt').write_text('')
    command(plain_run, f'--prompts_file={tmp_path}/empty.txt', '--max_new_tokens=20')
    text = capsys.readouterr().out
    command(plain_run, '--max_new_tokens=20')
    assert capsys.readouterr().out == text


def test_a_seed_gives_a_text(plain_run, capsys):
    texts = []
    for seed in ('1337', '1337', '1338'):
        command(plain_run, '--prompt=abc', '--max_new_tokens=40', f'--seed={seed}')
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_very_low_temperature_is_greedy(plain_run, capsys):
    command(plain_run, '--prompt=abc', '--max_new_tokens=20', '--temperature=0')
    greedy = capsys.readouterr().out
    command(plain_run, '--prompt=abc', '--max_new_tokens=20', '--temperature=1e-40', '--top_p=0.9')
    assert capsys.readouterr().out == greedy


def test_text_comes_while_it_is_made(plain_run):
    """The first bytes are out long before the last token: read from a real pipe."""
    argv = [sys.executable, str(HOME / 'sample.py'), str(plain_run), '--device=cpu',
            '--prompt=abc', '--max_new_tokens=100000']
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
    try:
        assert process.stdout.read(3) == b'abc' and process.stdout.read(5)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_score_is_the_cross_entropy_of_the_windows(run, tmp_path, capsys):
    text = 'Some text that was never seen: é€, twice. ' * 3
    (tmp_path / 'book.txt').write_text(text, encoding='utf-8', newline='')
    assert command(run, f'--score={tmp_path}/book.txt') == 0
    model, _ = sample.load_model(str(run), 'best')
    tokens = torch.tensor(list(text.encode()))
    losses = []
    assert (len(tokens) - 1) % 32 != 0
    for start in range(0, len(tokens) - 1, 32):
        window = tokens[start:start + 33]
        logits = model(window[None, :-1])[0]
        losses.append(F.cross_entropy(logits, window[1:], reduction='none').detach())
    loss = torch.cat(losses).mean().item()
    assert capsys.readouterr().out == (
        f'{tmp_path}/book.txt: {len(tokens) - 1} tokens, loss {loss:.4f}, '
        f'perplexity {math.exp(loss):.2f}, {loss / math.log(2):.4f} bits a byte\n')


class Pairs:
    """A tokenizer whose tokens are two bytes each."""

    def encode(self, text):
        return [(a + 7 * b) % 257 for a, b in zip(text.encode()[::2], text.encode()[1::2])]

    def decode_bytes(self, tokens):
        return b'ab' * len(tokens)


def test_bits_a_byte_count_the_bytes_of_the_tokens(plain_run, tmp_path, capsys):
    (tmp_path / 'text').write_text('some words ' * 20)
    model, _ = sample.load_model(str(plain_run), 'best')
    sample.print_score(model, Pairs(), f'{tmp_path}/text')
    _, loss, _, bits = capsys.readouterr().out.split(': ')[1].split(', ')
    loss = float(loss.removeprefix('loss '))
    assert float(bits.split()[0]) == pytest.approx(loss / math.log(2) / 2, abs=1e-4)


REFUSED = {
    'ranges': (
        ['--num_samples=0', '--max_new_tokens=-1', '--temperature=-0.5', '--top_k=300',
         '--top_p=0', '--seed=-1'],
        ['num_samples=0: must be at least 1', 'max_new_tokens=-1: must be at least 1',
         'temperature=-0.5: must not be negative', 'top_k=300: must be 0 to 257, the vocabulary',
         'top_p=0.0: must be above 0 and at most 1',
         'seed=-1: must not be negative']),
    'two prompts': (['--prompt=a', '--prompts_file=b'],
                    ["prompt='a': leave it out, or prompts_file"]),
    'no file': (['--score=none.txt'], ["score='none.txt' cannot be read: [Errno 2] No such file "
                                       "or directory: 'none.txt'"]),
    'one token': (['--score=one.txt'], ["score='one.txt': has no token with one before it; use a "
                                        'longer text']),
}


@pytest.mark.parametrize('argv, problems', REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(plain_run, tmp_path, monkeypatch, argv, problems):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'one.txt').write_text('x')
    assert refusal(plain_run, *argv) == problems


def test_files_that_are_no_text_are_refused(plain_run, tmp_path):
    (tmp_path / 'binary').write_bytes(b'\xff\xfe\xfa')
    problem, = refusal(plain_run, f'--score={tmp_path}/binary')
    assert "binary' cannot be read: 'utf-8' codec" in problem
    assert refusal(plain_run, '--score=x', '--prompt=a') == [
        "score='x': leave it out, or the prompt"]
    problem, = refusal(plain_run, f'--score={tmp_path}')
    assert 'Is a directory' in problem


def test_mistakes_on_the_command_line_are_listed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(Refused) as caught:
        sample.main(['--temprature=1', f'{tmp_path}/none', 'config.py', '--device=gpu'])
    assert caught.value.problems == [
        "command line: 'config.py' is not of the form --key=value",
        "command line: unknown setting 'temprature' (value '1'); did you mean 'temperature'?",
        "device='gpu': must be auto, cpu, cuda or cuda:N"]


def test_the_best_checkpoint_that_is_not_there_is_refused(plain_run, capsys):
    os.remove(plain_run / 'best.pt')
    problem, = refusal(plain_run)
    assert problem.startswith(f'no checkpoint {plain_run}/best.pt; ') and '=last' in problem
    assert command(plain_run, '--checkpoint=last', '--max_new_tokens=2') == 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_score_is_the_same_on_a_gpu_that_is_not_the_first(plain_run, tmp_path, capsys):
    (tmp_path / 'text').write_text('some words that are scored ' * 20)
    told = []
    for device in ('cuda:0', 'cuda:1'):
        assert sample.main([str(plain_run), f'--score={tmp_path}/text', f'--device={device}']) == 0
        told.append(capsys.readouterr().out)
    torch.cuda.set_device(0)
    assert told[0] == told[1]
