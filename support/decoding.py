"""Decoding: the cache of what was read, and readers that turn texts into logits of the next token.

Shapes: B rows, a text each; T new tokens; S places of the cache.
"""
from typing import NamedTuple

import torch


class Cache(NamedTuple):
    """What one layer has read of B texts. A place holds what was put there last."""
    keys: torch.Tensor  # (B, heads, S, width)
    values: torch.Tensor

    def extend(self, keys, values, positions):
        """Put new ones (B, heads, T, width) at positions (B, T); returns all that it holds."""
        row = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[row, :, positions] = keys.transpose(1, 2)
        self.values[row, :, positions] = values.transpose(1, 2)
        return self

    def part(self, rows, places):
        """A view of a slice of rows and of one of places."""
        return Cache(self.keys[rows, :, places], self.values[rows, :, places])


def read_whole(model, texts):
    """Texts, lists of tokens -> logits (B, vocab_size) of the next token of each.

    For attention that has no cache: all is read anew for each token.
    """
    device = model.token_embedding.weight.device
    last = [model.hidden(torch.tensor([text], device=device))[0, -1] for text in texts]
    return model.head(torch.stack(last))


class CachedReader:
    """Reads texts that grow by a token a call from a cache; any other is read anew.

    On a GPU a step is a CUDA graph, because the kernels of one token take less time than their
    launches. A graph has fixed shapes, so there is one for every 256 places of the cache that are
    looked at, recorded when first needed. A call overwrites the logits of the one before.
    """

    def __init__(self, model, rows, recorded):
        device = model.token_embedding.weight.device
        self.model = model
        self.recorded = recorded  # by CUDA graphs
        self.cache = model.new_cache(rows)
        self.nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache)
        self.lengths = [0] * rows  # tokens read
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # of a step
        self.positions = torch.zeros_like(self.tokens)
        self.graphs = {}  # places looked at -> (graph, its logits)

    def __call__(self, texts):
        """As read_whole."""
        for row, (text, length) in enumerate(zip(texts, self.lengths)):
            if len(text) not in (1, length + 1):  # one token has nothing before it
                self.read(row, text[:-1])
        self.lengths = [len(text) for text in texts]
        self.tokens.copy_(torch.tensor([text[-1:] for text in texts]))
        self.positions.copy_(torch.tensor(self.lengths)[:, None] - 1)
        longest = max(self.lengths)
        if not self.recorded:
            return self.step(longest)
        places = min(-(-longest // 256) * 256, self.model.config.block_size)
        if places not in self.graphs:
            self.step(places)  # unrecorded first: libraries choose their kernels
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.step(places)
            self.graphs[places] = graph, logits
        graph, logits = self.graphs[places]
        graph.replay()
        return logits

    def read(self, row, text):
        """Put a text, a list of tokens, into a row of the cache."""
        idx = torch.tensor([text], device=self.tokens.device)
        positions = torch.arange(len(text), device=self.tokens.device)[None]
        cache = [layer.part(slice(row, row + 1), slice(len(text))) for layer in self.cache]
        self.model.hidden(idx, positions, cache)

    def step(self, places):
        """Logits after self.tokens at self.positions, looking at the cache's first `places`."""
        cache = [layer.part(slice(None), slice(places)) for layer in self.cache]
        hidden = self.model.hidden(self.tokens, self.positions, cache)  # (B, 1, C)
        return self.model.head(hidden[:, 0])
