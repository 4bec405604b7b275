"""sample.py through the cache: batches of prompts, drawing, streaming, scores."""
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import HOME, refusal, train
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
from attention import new_cache
from model import GPT, GPTConfig
from preflight import find_machine
from shards import EOT_TEXT, get_tokenizer

VARIANTS = {'mha': {}, 'mha, ra': dict(ra_learned=True, ra_alpha=0.5, ra_window=5), 'mla': dict(attention='mla', latent_dim=12),
            'mla, ra': dict(attention='mla', latent_dim=12, ra_alpha=-0.5, ra_window=-1)}
variants = pytest.mark.parametrize('told', VARIANTS.values(), ids=VARIANTS)


def lively(**told):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32, **told)).double().eval()
    for p in model.blocks.parameters():
        p.data *= 20 if p.dim() == 2 else 1  # so that all tokens it sees matter, not the last alone
    return model


def generated(model, prompts, seeds, count=70, **told):
    """Tokens that each prompt is continued with."""
    cache = new_cache(model.config, len(prompts), 'cpu', torch.float64)
    rows = zip(*sample.generate(model, cache, prompts, seeds, count, **{'temperature': 1.5, **told}))
    return [[token for token in row if token is not None] for row in rows]


def without_cache(model, prompt, seed, count, temperature, end=None):
    """The same text by reading everything anew for each token."""
    generator, tokens, seen = torch.Generator().manual_seed(seed), list(prompt), prompt[-32:]
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([seen]))[0, -1].float()
        reach = np.cumsum((logits.double() / temperature).softmax(-1).numpy())
        tokens.append(int((reach <= torch.rand((), dtype=torch.float64, generator=generator).item() * reach[-1]).sum()))
        if tokens[-1] == end:
            break
        seen = (seen if len(seen) < 32 else tokens[-16:-1]) + tokens[-1:]  # positions used up: the last half, read anew
    return tokens[len(prompt):]


PROMPTS = [[5], list(range(20)), list(range(100, 132)), list(range(200, 250)), [7, 8, 9]]


@variants
def test_each_row_of_a_batch_is_what_reading_everything_anew_gives(told):
    model = lively(**told)
    rows = generated(model, PROMPTS, [1, 2, 3, 4, 5])
    for prompt, seed, row in zip(PROMPTS, [1, 2, 3, 4, 5], rows):
        assert row == without_cache(model, prompt, seed, 70, 1.5)
        assert len(set(row)) > 20


class Recorded(TorchDispatchMode):
    """A CUDA graph of a CPU: recording runs nothing that changes a tensor, replaying puts all results where they were."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert str(function) not in ('aten._local_scalar_dense.default', 'aten.nonzero.default')  # these wait for the device
        result = args[0] if function._schema.is_mutable else function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.calls:
            for kept, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs))):
                if torch.is_tensor(kept) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    for name, fake in (('CUDAGraph', Recorded), ('graph', lambda graph, pool: graph), ('graph_pool_handle', lambda: None)):
        monkeypatch.setattr(torch.cuda, name, fake)


@variants
def test_recorded_steps_give_the_same_logits(told, graphs):
    model = lively(**told)
    idx, lengths = torch.randint(257, (3, 32), generator=torch.Generator().manual_seed(3)), torch.tensor([20, 9, 1])
    plain, other = (new_cache(model.config, 3, 'cpu', torch.float64) for _ in range(2))
    with torch.inference_mode():
        for cache in (plain, other):
            model.hidden(idx[:, :20], cache, lengths)
        replay = sample.one_more(model, other)
        for t in range(20, 32):
            torch.testing.assert_close(replay(idx[:, t]), model.head(model.hidden(idx[:, t:t + 1], plain))[:, 0], rtol=1e-9, atol=1e-9)
    assert other.lengths.tolist() == plain.lengths.tolist() == [32, 21, 13]


@variants
def test_recorded_steps_give_the_same_texts(told, graphs):
    """Unequal prompts, rows that end, positions that are used up."""
    model = lively(**told)
    free = generated(model, PROMPTS, [1, 2, 3, 4, 5])
    for end in (None, free[1][10]):
        assert generated(model, PROMPTS, [1, 2, 3, 4, 5], end=end, recorded=True) == generated(model, PROMPTS, [1, 2, 3, 4, 5], end=end)


def test_rows_end_each_for_itself():
    model = lively()
    free = generated(model, PROMPTS, [1, 2, 3, 4, 5])
    end = free[1][10]
    rows = generated(model, PROMPTS, [1, 2, 3, 4, 5], end=end)
    assert rows == [row[:row.index(end) + 1] if end in row else row for row in free]
    assert len({len(row) for row in rows}) > 1


def test_a_prompt_that_holds_the_end_of_text_goes_on():
    model = lively()
    assert generated(model, [[256]], [1], end=256)[0][:3] == generated(model, [[256]], [1])[0][:3]


def test_top_p_keeps_the_fewest_likeliest_tokens_that_make_it_up():
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    for top_p, kept in ((0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 3, 4}), (0.96, {0, 1, 2, 3, 4})):
        logits = probabilities.log().expand(2000, 5)
        drawn = torch.tensor(sample.draw(logits, 1.0, 0, top_p, [torch.Generator().manual_seed(i) for i in range(2000)]))
        assert set(drawn.tolist()) == kept
        share = probabilities[list(kept)] / probabilities[list(kept)].sum()
        seen = (drawn[:, None] == torch.tensor(list(kept))).float().mean(0)
        assert (seen - share).abs().max() < 0.04


@pytest.mark.parametrize('told', [dict(temperature=0), dict(temperature=1.0), dict(temperature=1.0, top_k=2, top_p=0.9)])
@pytest.mark.parametrize('broken', [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(told, broken):
    logits = torch.zeros(2, 5)
    logits[1, 3] = broken
    arguments = {'top_k': 0, 'top_p': 1.0, **told}
    assert refusal(lambda logits: sample.draw(logits, **arguments, generators=[torch.Generator()] * 2), logits) == [
        'the model gives logits that are not finite: its weights are broken, or too large for the dtype']


def test_top_p_counts_among_the_top_k():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(300, 4)
    drawn = sample.draw(logits, 1.0, 2, 0.58, [torch.Generator().manual_seed(i) for i in range(300)])
    assert set(drawn) == {0, 1}  # 4/7 of the two is not 0.58 yet
    assert set(sample.draw(logits, 1.0, 2, 0.56, [torch.Generator().manual_seed(i) for i in range(300)])) == {0}


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture(params=[{}, dict(attention='mla', latent_dim=8, ra_learned=True, ra_window=4)], ids=['mha', 'mla, ra'])
def trained(tiny, tmp_path, request):
    train.main(tiny(**request.param))
    return tmp_path / 'run'


def command(folder, *argv):
    return sample.main([str(folder), '--device=cpu', *argv])


def test_prompts_of_a_file_are_what_each_is_alone(trained, tmp_path, capsys):
    lines = ['the first prompt', '', 'é', 'x' * 50]
    (tmp_path / 'prompts.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    told = ('--num_samples=2', '--max_new_tokens=40', '--temperature=1.5')
    capsys.readouterr()
    assert command(trained, f'--prompts_file={tmp_path / "prompts.txt"}', *told) == 0
    together = capsys.readouterr()
    for line in lines:
        command(trained, f'--prompt={line}', *told)
    alone = capsys.readouterr()
    assert together.out == alone.out and together.out.count('\n---\n') == 8
    texts = together.out.split('\n---\n')
    assert all(text.startswith(line) for line, text in zip([x for x in lines for _ in 'ab'], texts)) and texts[0] != texts[1]
    told = re.fullmatch(r'note: .*\n(\d+) tokens, ([\d.]+) a second, in (\d) texts; cache ([\d.]+ MiB)\n', together.err)
    count, rate, rows, _ = told.groups()
    assert int(count) <= 8 * 40 and float(rate) > 0 and rows == '8'


def test_size_of_the_cache_is_told(tiny, tmp_path, capsys):
    for name, told, numbers in (('mha', {}, 2 * 128), ('mla', dict(attention='mla', latent_dim=64), 2 * 64)):
        train.main(tiny(**told, n_embd=128, block_size=256, max_iters=3, batch_size=1, eval_tokens=512, out_dir=tmp_path / name))
        command(tmp_path / name, '--max_new_tokens=2')
        assert capsys.readouterr().err.endswith(f'cache {2 * 256 * numbers * 4 / 2**20:.1f} MiB\n')


def test_a_single_text_is_the_same_streamed(trained, capsys):
    """The first of two texts, printed when done, and the same alone, printed as it comes."""
    told = ('--prompt=a€', '--max_new_tokens=60', '--temperature=3', '--top_k=0')
    command(trained, *told)
    streamed = capsys.readouterr().out
    command(trained, *told, '--num_samples=2')
    assert capsys.readouterr().out.startswith(streamed) and '\ufffd' in streamed  # random bytes are no UTF-8


def test_a_very_low_temperature_is_greedy_and_a_long_prompt_is_told(trained, capsys):
    command(trained, '--prompt=abc', '--max_new_tokens=20', '--temperature=0')
    greedy = capsys.readouterr()
    command(trained, '--prompt=abc', '--max_new_tokens=20', '--temperature=1e-40', '--top_p=0.9')
    assert capsys.readouterr().out == greedy.out and 'note' not in greedy.err
    command(trained, f'--prompt={"abc" * 20}', '--max_new_tokens=1')
    assert capsys.readouterr().err.startswith('note: the model sees the last block_size=32 tokens of a prompt\n')


def test_a_character_is_printed_once_it_is_whole(capsys):
    tokenizer, printed = get_tokenizer('bytes'), []
    pieces = [[byte] for byte in 'é€😀!'.encode()]

    def steps():
        for piece in pieces:
            yield piece
            printed.append(capsys.readouterr().out)

    assert sample.print_texts(tokenizer, ['>'], steps(), tokenizer.eot) == 10
    assert printed == ['>', 'é', '', '', '€', '', '', '', '😀', '!'] and capsys.readouterr().out == '\n---\n'
    pieces[-1:] = [[tokenizer.eot]]
    sample.print_texts(tokenizer, [''], steps(), tokenizer.eot)
    assert EOT_TEXT not in ''.join(printed)


def test_text_comes_while_it_is_made(tiny, tmp_path):
    """The first bytes are out long before the last token: read from a real pipe."""
    train.main(tiny(max_iters=3))
    argv = [sys.executable, str(HOME / 'sample.py'), str(tmp_path / 'run'), '--device=cpu', '--prompt=abc', '--max_new_tokens=100000']
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    try:
        assert process.stdout.read(3) == b'abc' and process.stdout.read(5) and process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_score_is_the_cross_entropy_of_the_windows(trained, tmp_path, capsys):
    text = 'Some text that was never seen: é€, twice. ' * 3
    (tmp_path / 'book.txt').write_text(text, encoding='utf-8', newline='')
    capsys.readouterr()
    assert command(trained, f'--score={tmp_path}/book.txt') == 0
    model, _ = sample.load_model(str(trained), 'best', find_machine('cpu', 'float32')[0])
    tokens, losses = torch.tensor(list(text.encode())), []
    assert (len(tokens) - 1) % 32 != 0
    for start in range(0, len(tokens) - 1, 32):
        window = tokens[start:start + 33]
        losses.append(F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction='none').detach())
    loss = torch.cat(losses).mean().item()
    assert capsys.readouterr().out == f'{tmp_path}/book.txt: {len(tokens) - 1} tokens, loss {loss:.4f}, perplexity {math.exp(loss):.2f}\n'


def test_score_of_the_validation_text_is_the_validation_loss(trained, tiny_data, tmp_path, capsys):
    """640 tokens, as eval_tokens of the run, in the same windows."""
    tokens = torch.from_file(str(tiny_data / 'val_000000.bin'), size=512 + 641, dtype=torch.int16)[512:]
    assert (tokens < 256).all()
    (tmp_path / 'val.txt').write_bytes(bytes(tokens.tolist()))
    capsys.readouterr()
    command(trained, f'--score={tmp_path}/val.txt', '--checkpoint=last')
    told = json.loads((trained / 'summary.json').read_text())
    assert f': 640 tokens, loss {told["val_loss"]:.4f}, ' in capsys.readouterr().out


REFUSED = {
    'top_p': (['--top_p=0'], ['top_p=0.0: must be above 0 and at most 1']),
    'seed': ([f'--seed={2**63}'], ['seed=9223372036854775808: must be below 2^63, which PyTorch takes']),
    'two prompts': (['--prompt=a', '--prompts_file=b'], ["prompt='a': acts only with no prompts_file; leave it out"]),
    'greedy': (['--temperature=0', '--top_k=5', '--seed=3', '--num_samples=2'], [
        f'{told}: acts only with a temperature above 0; leave it out' for told in ('top_k=5', 'seed=3', 'num_samples=2')]),
    'score and text': (['--score=x', '--prompt=a', '--top_p=0.5'], ["prompt='a': acts only with no score; leave it out",
                                                                     'top_p=0.5: acts only with no score; leave it out']),
    'no file': (['--score=none.txt'], ["score='none.txt' cannot be read: No such file or directory"]),
    'no prompts': (['--prompts_file=none.txt'], ["prompts_file='none.txt' cannot be read: No such file or directory"]),
    'empty file': (['--score=empty.txt'], ["score='empty.txt': the file is empty"]),
    'empty prompts': (['--prompts_file=empty.txt'], ["prompts_file='empty.txt': the file is empty"]),
    'one token': (['--score=one.txt'], ["score='one.txt': one token has nothing to be predicted from; use a longer text"]),
    'folder': (['--score=.'], ["score='.' cannot be read: Is a directory"]),
}


def test_what_cannot_be_is_refused(tiny, tmp_path, monkeypatch):
    train.main(tiny(max_iters=3))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'one.txt').write_text('x')
    (tmp_path / 'binary').write_bytes(b'\xff\xfe\xfa')
    for argv, messages in REFUSED.values():
        assert refusal(command, 'run', *argv) == messages
    assert refusal(command, 'run', '--score=binary')[0].startswith("score='binary' cannot be read: 'utf-8' codec")
