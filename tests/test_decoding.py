"""model.py's cache and sample.py's readers, against reading the whole text at once."""
from functools import partial

import pytest
import torch
from models import CACHED, MLA, RA, lively, text
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig
from sample import CachedReader, generate, read_whole
from support.settings import Refused

cached = pytest.mark.parametrize('told', CACHED.values(), ids=CACHED)
PROMPTS = [[5], list(range(30)), list(range(48, 96)), list(range(20, 80)), [7, 8, 9]]
SEEDS = [1, 2, 3, 4, 5]


# --- the cache ------------------------------------------------------------------------------------


@cached
@pytest.mark.parametrize('pieces', [[1] * 48, [48], [7, 13, 1, 20, 7]], ids=str)
def test_cached_reading_in_any_pieces_is_reading_at_once(told, pieces):
    model = lively(**told).double()
    idx = text(model)
    cache = model.new_cache(3)
    out = []
    start = 0
    with torch.no_grad():
        for piece in idx.split(pieces, 1):
            end = start + piece.size(1)
            positions = torch.arange(start, end).expand(3, -1)
            out.append(model.hidden(piece, positions, cache))
            start = end
        expected = model.hidden(idx)
    torch.testing.assert_close(torch.cat(out, 1), expected, atol=1e-10, rtol=1e-10)


@cached
def test_rows_at_different_positions_are_what_they_are_alone(told):
    model = lively(**told).double()
    idx = text(model)
    cache = model.new_cache(3)
    lengths = torch.tensor([20, 5, 1])
    with torch.no_grad():
        first = torch.arange(20).expand(3, -1)
        model.hidden(idx[:, :20], first, cache)  # the rest of the shorter ones is filling
        whole = model.hidden(idx)
        for step in range(10):
            at = lengths + step
            tokens = idx[torch.arange(3), at]
            out = model.hidden(tokens[:, None], at[:, None], cache)[:, 0]
            expected = whole[torch.arange(3), at]
            torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('told, numbers', [
    ({}, 2 * 768), (dict(positions='rotary'), 2 * 768), (dict(n_kv_head=3), 2 * 192),
    (dict(attention='mla'), 2 * 128), (dict(attention='mla', positions='rotary'), 2 * 128 + 32)])
def test_size_of_the_cache(told, numbers):
    """Numbers a token and layer."""
    with torch.device('meta'):
        model = GPT(GPTConfig(**told)).bfloat16()
        reader = CachedReader(model, 3, recorded=False)
    assert reader.nbytes == 2 * 3 * 12 * 1024 * numbers


# --- readers --------------------------------------------------------------------------------------


def generated(model, reader, prompts=PROMPTS, seeds=SEEDS, count=120, **told):
    """Tokens that each prompt is continued with."""
    told = {'temperature': 1.5, **told}
    rows = zip(*generate(reader, model.config.block_size, prompts, seeds, count, **told))
    return [[token for token in row if token is not None] for row in rows]


@cached
def test_each_row_of_a_batch_is_what_reading_everything_anew_gives(told):
    """Unequal prompts, rows that use up their positions at different times; one by one, uncached.

    In float64, where rounding changes no token.
    """
    model = lively(**told).double()
    rows = generated(model, CachedReader(model, len(PROMPTS), recorded=False))
    for prompt, seed, row in zip(PROMPTS, SEEDS, rows):
        assert row == generated(model, partial(read_whole, model), [prompt], [seed])[0]
        assert len(set(row)) > 20


@pytest.mark.parametrize('told', [{}, RA], ids=['mha', 'ra'])
def test_reading_anew_gives_the_logits_of_each_row_alone(told):
    model = lively(**told).double()
    texts = [list(range(5)), list(range(48)), [7]]
    with torch.no_grad():
        logits = read_whole(model, texts)
        for row, tokens in enumerate(texts):
            expected = model(torch.tensor([tokens]))[0, -1]
            torch.testing.assert_close(logits[row], expected, atol=1e-10, rtol=1e-10)


def test_a_row_that_has_ended_changes_no_other():
    model = lively().double()
    free = generated(model, CachedReader(model, 5, recorded=False))
    end = free[1][10]
    rows = generated(model, CachedReader(model, 5, recorded=False), end=end)
    assert rows == [row[:row.index(end) + 1] if end in row else row for row in free]
    assert len({len(row) for row in rows}) > 1


@pytest.mark.parametrize('block_size', [1, 2, 3])
def test_the_smallest_of_windows(block_size):
    model = lively(block_size=block_size).double()
    prompts = [[1], [2, 3], [4, 5, 6, 7]]
    rows = generated(model, CachedReader(model, 3, recorded=False), prompts, [1, 2, 3], 12)
    assert rows == generated(model, partial(read_whole, model), prompts, [1, 2, 3], 12)


def test_a_step_begins_before_the_last_is_looked_at(monkeypatch):
    """Unless a text is full: here after 3 tokens, and when its last 24 and 24 more are."""
    model = lively()
    events = []
    step, tolist = CachedReader.step, torch.Tensor.tolist
    monkeypatch.setattr(CachedReader, 'step', lambda *a: events.append('step') or step(*a))
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda t: events.append('look') or tolist(t))
    reader = CachedReader(model, 2, recorded=False)
    generated(model, reader, [list(range(46)), [5]], [1, 2], 30)
    apart = ['step', 'look']
    assert events == (['step'] + apart * 2 + ['look'] + ['step'] + apart * 24 + ['look']
                      + ['step'] + apart * 1 + ['look'])
    assert events.count('step') == 30


def test_tokens_that_were_not_drawn_are_never_looked_up():
    """A step that has begun when the one before turns out to be broken."""
    model = lively()
    model.norm.weight.data[3] = torch.nan
    with pytest.raises(Refused, match='the model gives logits that are not finite'):
        generated(model, CachedReader(model, 5, recorded=False))


# --- CUDA graphs ----------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """A CUDA graph of a CPU: recording keeps operations, replaying puts results where they were."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ('aten._local_scalar_dense.default', 'aten.nonzero.default')  # for the device
        assert str(function) not in waits
        kwargs = kwargs or {}
        changes = function._schema.is_mutable  # recording changes nothing
        result = args[0] if changes else function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.calls:
            new = function(*args, **kwargs)
            for kept, made in zip(tree_leaves(result), tree_leaves(new)):
                if torch.is_tensor(kept) and kept.data_ptr() != made.data_ptr():
                    kept.copy_(made)


@cached
def test_recorded_steps_give_the_same_texts(told, monkeypatch):
    """Unequal prompts, rows that end, positions that are used up."""
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', Recorded)
    monkeypatch.setattr(torch.cuda, 'graph', lambda graph: graph)
    model = lively(**told).double()
    free = generated(model, CachedReader(model, 5, recorded=False), count=60)
    for end in (None, free[1][10]):
        plain = generated(model, CachedReader(model, 5, recorded=False), count=60, end=end)
        assert generated(model, CachedReader(model, 5, recorded=True), count=60, end=end) == plain


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


@pytest.mark.gpu
@on_gpu
@cached
def test_recorded_steps_on_a_gpu_are_reading_at_once(told):
    """From 250 places on, so that a second graph takes over at 256; rows of three lengths."""
    model = lively(**{**told, 'block_size': 512, 'n_embd': 256}).cuda()
    idx = text(model, T=300)
    lengths = [250, 120, 1]
    reader = CachedReader(model, 3, recorded=True)
    with torch.inference_mode():
        whole = model(idx.cuda())
        for step in range(50):
            ends = [length + step for length in lengths]
            logits = reader([idx[row, :end].tolist() for row, end in enumerate(ends)])
            right = whole[torch.arange(3), torch.tensor(ends) - 1]
            assert (logits - right).norm() / right.norm() < 1e-2, step  # TF32
    assert len(reader.graphs) == 2


@pytest.mark.gpu
@on_gpu
@cached
def test_recorded_texts_on_a_gpu_are_those_without_graphs(told):
    """Rows that end and rows that read their last half anew. In float64: no rounding matters."""
    model = lively(**{**told, 'block_size': 320, 'vocab_size': 257}).cuda().double()
    prompts = [list(range(240)), [5], list(range(10, 30))]

    def texts(end, recorded):
        reader = CachedReader(model, 3, recorded)
        return generated(model, reader, prompts, [1, 2, 3], 120, end=end, temperature=1.0)

    free = texts(None, False)
    end = free[2][40]
    assert texts(None, True) == free
    assert texts(end, True) == texts(end, False) != free


@pytest.mark.gpu
@on_gpu
def test_decoding_in_bfloat16_on_a_gpu():
    """GPT-2's shapes in latents with a rotary part; graphs need memory of their own, not caches."""
    model = GPT(GPTConfig(**{**MLA, 'latent_dim': 128}, positions='rotary', n_layer=4)).cuda()
    for p in model.parameters():
        p.data = p.data.bfloat16() if p.dim() == 2 else p.data
    prompts = torch.randint(50257, (64, 500)).tolist()
    reader = CachedReader(model.eval(), 64, recorded=True)
    before = torch.cuda.memory_allocated()
    steps = list(generate(reader, 1024, prompts, range(64), 20, 0.8, 200))
    assert len(steps) == 20 and len(reader.graphs) == 2
    assert torch.cuda.memory_allocated() - before < reader.nbytes
