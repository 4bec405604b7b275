"""Decoding: the cache of what was read, and readers that turn texts into logits of the next token.

Shapes: B rows, a text each; T new tokens; S places of the cache.
"""
from typing import NamedTuple

import torch


class Cache(NamedTuple):
    """What one layer has read of B texts. No gradients flow through it.

    A place holds what was put there last. Nothing says how long a text is but the positions of its
    tokens, which see their own place and those before it.
    """
    keys: torch.Tensor  # (B, heads, S, width)
    values: torch.Tensor

    def extend(self, keys, values, positions):
        """Put new ones (B, heads, T, width) at positions (B, T); None: at 0 ... T - 1."""
        for held, new in zip(self, (keys.detach(), values.detach())):
            if positions is None:
                held[:, :, :new.size(2)] = new
            else:
                row = torch.arange(len(positions), device=positions.device)[:, None]
                held[row, :, positions] = new.transpose(1, 2)

    def part(self, rows=slice(None), places=slice(None)):
        """A view of some rows and places."""
        return Cache(*(held[rows, :, places] for held in self))


def filled(texts, device):
    """Lists of tokens -> (B, T), shorter ones filled up at their end."""
    T = max(map(len, texts))
    return torch.tensor([text + [0] * (T - len(text)) for text in texts], device=device)


class WholeReader:
    """Reads all that the model sees anew for each token: for attention that has no cache."""
    nbytes = 0  # of the cache

    def __init__(self, model):
        self.model = model

    def __call__(self, texts):
        """What each row sees, lists of tokens -> logits (B, vocab_size) of its next token."""
        device = self.model.token_embedding.weight.device
        hidden = self.model.hidden(filled(texts, device))  # (B, T, C)
        row = torch.arange(len(texts), device=device)
        last = torch.tensor([len(text) - 1 for text in texts], device=device)
        return self.model.head(hidden[row, last])


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
        self.nbytes = sum(held.nbytes for layer in self.cache for held in layer)
        self.lengths = [0] * rows  # tokens read
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # of a step
        self.positions = torch.zeros_like(self.tokens)
        self.graphs = {}  # places looked at -> (graph, its logits)

    def __call__(self, texts):
        """What each row sees, lists of tokens -> logits (B, vocab_size) of its next token."""
        fresh = []
        for row, (text, length) in enumerate(zip(texts, self.lengths)):
            if length == 0 or len(text) != length + 1:
                fresh.append(row)
        if len(fresh) == len(texts):
            self.read(texts, self.cache)
        else:
            for row in fresh:
                own = slice(row, row + 1)
                self.read(texts[own], [layer.part(rows=own) for layer in self.cache])
        self.lengths = [len(text) for text in texts]
        self.tokens.copy_(torch.tensor([text[-1:] for text in texts]))
        self.positions.copy_(torch.tensor(self.lengths)[:, None] - 1)
        return self.step()

    def read(self, texts, cache):
        """Read all but the last token of each text, together.

        Filling is read too, into places beyond a text's end: before any token sees such a place, a
        token of the text has come to stand there.
        """
        if max(map(len, texts)) > 1:
            idx = filled([text[:-1] for text in texts], self.tokens.device)
            self.model.hidden(idx, cache=cache)

    def step(self):
        """Logits (B, vocab_size) after self.tokens at self.positions."""
        longest = max(self.lengths)
        if not self.recorded:
            return self.forward(longest)
        places = min(-(-longest // 256) * 256, self.model.config.block_size)
        if places not in self.graphs:
            self.forward(places)  # unrecorded first: libraries choose their kernels
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.forward(places)
            self.graphs[places] = graph, logits
        graph, logits = self.graphs[places]
        graph.replay()
        return logits

    def forward(self, places):
        """The step as it is, looking at the first `places` of the cache."""
        cache = [layer.part(places=slice(places)) for layer in self.cache]
        hidden = self.model.hidden(self.tokens, self.positions, cache)  # (B, 1, C)
        return self.model.head(hidden[:, 0])
