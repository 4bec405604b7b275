"""The cache that texts are decoded from, against reading the whole text."""
import time

import pytest
import torch
from test_attention import lively, text, variants

from attention import new_cache
from model import GPT, GPTConfig


@variants
@pytest.mark.parametrize('pieces', [[1] * 48, [48], [20] + [1] * 28, [7, 13, 1, 1, 20, 5, 1], [1, 47]], ids=str)
def test_cached_reading_in_any_pieces_is_reading_at_once(told, pieces):
    model = lively(**told)
    idx, cache, out = text(model), new_cache(model.config, 3, 'cpu', torch.float32), []
    with torch.no_grad():
        for piece in idx.split(pieces, 1):
            out.append(model.hidden(piece, cache))
        torch.testing.assert_close(torch.cat(out, 1), model.hidden(idx), atol=1e-5, rtol=1e-5)
    assert cache.lengths.tolist() == [48] * 3


@variants
@pytest.mark.parametrize('steps, fresh_at', [
    ([(1, 9, 30), (1, 1, 1), (3, 1, 1), (2, 1, 14), (12, 7, 1), (1, 1, 1)], {4: 1}),  # before step 4 row 1 forgets what it has read
    ([(2, 1, 3), (1, 20, 2), (1, 1, 1)], {1: 1}),  # the first text of one row is as long as all that any row has then
    ([(20, 21, 22), (1, 1, 30), (1, 1, 1)], {1: 2})])
def test_rows_of_different_lengths_are_what_they_are_alone(told, steps, fresh_at):
    """Prompts filled up to the longest, then steps of which some rows take one, more, or start again."""
    model = lively(**told)
    draw, cache = torch.Generator().manual_seed(2), new_cache(model.config, 3, 'cpu', torch.float32)
    read = [torch.empty(0, dtype=torch.int64)] * 3
    with torch.no_grad():
        for number, counts in enumerate(steps):
            if number in fresh_at:
                cache.lengths[fresh_at[number]], read[fresh_at[number]] = 0, read[0][:0]
            idx = torch.randint(131, (3, max(counts)), generator=draw)
            out = model.hidden(idx, cache, torch.tensor(counts))
            for row, count in enumerate(counts):
                read[row] = torch.cat([read[row], idx[row, :count]])
                alone = model.hidden(read[row][None])[0, -count:]
                assert (out[row, :count] - alone).abs().max() < 1e-5, (number, row)
            assert cache.lengths.tolist() == [len(tokens) for tokens in read]


@variants
def test_a_step_may_look_at_places_that_nobody_has_used_yet(told):
    """As a recorded step does, whose shapes are fixed: all 48 places, with no length known but on the device."""
    model = lively(**told)
    idx, lengths = text(model), torch.tensor([20, 5, 1])
    caches = [new_cache(model.config, 3, 'cpu', torch.float32) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model.hidden(idx[:, :20], cache, lengths)
        for t in range(20, 30):
            step = caches[0].step(lengths, torch.ones_like(lengths), 1, 48)
            torch.testing.assert_close(model.hidden(idx[:, t:t + 1], caches[0], step=step), model.hidden(idx[:, t:t + 1], caches[1]))
            lengths = lengths + 1
    assert caches[0].lengths.tolist() == [20, 5, 1] and caches[1].lengths.tolist() == [30, 15, 11]


def test_what_is_refused_or_fails_is_not_read():
    def refuse(*arguments):
        raise torch.OutOfMemoryError

    model = lively()
    cache = new_cache(model.config, 2, 'cpu', torch.float32)
    model.hidden(text(model, rows=2, T=40), cache)
    with pytest.raises(ValueError, match='49 tokens do not fit in block_size=48'):
        model.hidden(text(model, rows=2, T=9), cache, torch.tensor([9, 1]))
    with pytest.raises(ValueError, match=r'counts=\[8, 0\]: each row must have 1 to 8 tokens'):
        model.hidden(text(model, rows=2, T=8), cache, torch.tensor([8, 0]))
    with pytest.raises(ValueError, match=r'counts=\[7, 8\]: each row must have 1 to 7 tokens'):
        model.hidden(text(model, rows=2, T=7), cache, torch.tensor([7, 8]))
    with pytest.raises(ValueError, match='1 rows of tokens, but the cache is for 2'):
        model.hidden(text(model, rows=1, T=8), cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.blocks[-1], 'forward', refuse)
        with pytest.raises(torch.OutOfMemoryError):
            model.hidden(text(model, rows=2, T=8), cache)
    assert cache.lengths.tolist() == [40, 40]
    model.hidden(text(model, rows=2, T=9), cache, torch.tensor([8, 1]))
    assert cache.lengths.tolist() == [48, 41]


@pytest.mark.parametrize('told, a_token, a_text', [
    ({}, 2 * 768, 0), (dict(attention='mla'), 2 * 128, 0), (dict(ra_learned=True), 2 * 768, 64 * 768),
    (dict(attention='mla', latent_rotary=32), 2 * 128 + 32, 0),
    (dict(attention='mla', ra_alpha=0.1, ra_window=9), 2 * 128, 9 * 768), (dict(ra_alpha=0.1, ra_window=-1), 2 * 768, 1024 * 768)])
def test_size_of_the_cache(told, a_token, a_text):
    config = GPTConfig(**told)
    cache = new_cache(config, 3, 'meta', torch.bfloat16)
    for layer in cache.layers:
        assert sum(t.nbytes for t in layer.values()) == 2 * 3 * (1024 * a_token + a_text)
    assert cache.bytes() == 12 * 2 * 3 * (1024 * a_token + a_text)


@pytest.mark.parametrize('told', [{}, dict(attention='mla', latent_dim=32)], ids=['mha', 'mla'])
def test_decoding_with_the_cache_is_faster(told):
    """256 tokens after 768. Without the cache a sample of the steps is timed, for all take minutes."""
    model = GPT(GPTConfig(vocab_size=500, n_layer=2, n_head=4, n_embd=128, **told)).eval()
    idx, cache = text(model, rows=1), new_cache(model.config, 1, 'cpu', torch.float32)
    with torch.inference_mode():
        start = time.perf_counter()
        model.hidden(idx[:, :768], cache)
        for t in range(768, 1024):
            model.hidden(idx[:, t:t + 1], cache)
        cached, start = time.perf_counter() - start, time.perf_counter()
        for t in range(768, 1024, 32):
            model.hidden(idx[:, :t + 1])
        whole = 32 * (time.perf_counter() - start)
    print(f'256 tokens: {cached:.2f} s with the cache, {whole:.2f} s without, {whole / cached:.1f} times')
    assert whole > 5 * cached
