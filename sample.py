"""Text from a trained run, or how well a run predicts a text.

    python sample.py out/quickstart --prompt="The Python interpreter" --max_new_tokens=200
    python sample.py out/quickstart --prompts_file=prompts.txt --num_samples=2 --top_p=0.9
    python sample.py out/quickstart --score=book.txt

Texts go to stdout, the first as it is made, others once all are done; speed and the size of the
cache go to stderr. The model sees the last block_size tokens of a text.
"""
import codecs
import functools
import math
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

from support.machine import find_machine
from support.pretrained import load_model
from support.rundir import size
from support.settings import Path, Refused, help_text, parse, run_command, separate, unmet
from support.shards import bits_a_byte
from support.tokenizer import Tokenizer


@dataclass
class SampleSettings:
    # --- text -------------------------------------------------------------------------------------
    prompt: str = ''  # text to continue; empty: a new document
    prompts_file: Path = ''  # file with a prompt a line, all continued at once, instead of prompt
    num_samples: int = 1  # texts a prompt
    max_new_tokens: int = 200  # tokens a text, fewer if it ends by itself
    temperature: float = 0.8  # the logits are divided by it; 0: always the likeliest token
    top_k: int = 200  # only the likeliest k tokens can be drawn; 0: all
    top_p: float = 1.0  # only the likeliest of this probability (arXiv 1904.09751); 1: all
    seed: int = 1337  # a text depends on it, its prompt and its number among the prompt's samples
    score: Path = ''  # file whose loss, perplexity and bits a byte are measured; no text is made
    # --- where ------------------------------------------------------------------------------------
    checkpoint: Literal['best', 'last'] = 'best'  # best validation loss, or the latest weights
    device: str = 'auto'  # auto, cpu, cuda or cuda:N
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # auto: bfloat16 on a GPU, else float32


def check(s, vocab_size):
    """Problems of SampleSettings."""
    return unmet(s, [
        ('prompt', not (s.prompt and s.prompts_file), 'leave it out, or prompts_file'),
        ('score', not (s.score and (s.prompt or s.prompts_file)), 'leave it out, or the prompt'),
        ('num_samples', s.num_samples >= 1, 'must be at least 1'),
        ('max_new_tokens', s.max_new_tokens >= 1, 'must be at least 1'),
        ('temperature', s.temperature >= 0, 'must not be negative'),
        ('top_k', 0 <= s.top_k <= vocab_size, f'must be 0 to {vocab_size}, the vocabulary'),
        ('top_p', 0 < s.top_p <= 1, 'must be above 0 and at most 1'),
        ('seed', s.seed >= 0, 'must not be negative'),
    ])


def read_text(path, setting):
    """The text of a file that a setting names; Refused if there is none."""
    try:
        with open(path, encoding='utf-8-sig', newline='') as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f'{setting}={path!r} cannot be read: {error}') from None


# --- reading --------------------------------------------------------------------------------------


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
        return self.logits()

    def grown(self, drawn):
        """As __call__ of the texts before with one token more each, drawn (B,) on the device."""
        self.lengths = [length + 1 for length in self.lengths]
        self.tokens.copy_(drawn[:, None].clamp(min=0))
        self.positions += 1
        return self.logits()

    def logits(self):
        """What `step` gives, replayed from a graph if they are to be recorded."""
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


# --- the next token -------------------------------------------------------------------------------


AHEAD = 256  # steps whose random numbers are drawn at once


def draw(logits, temperature, top_k, top_p, numbers):
    """One token a row (B,) of logits (B, vocab_size), by a number in [0, 1) a row (B,), float64.

    -1 where a logit is not finite. Nothing waits for the device.
    """
    if temperature == 0:
        highest, chosen = logits.max(-1, keepdim=True)  # (B, 1) each
    else:
        logits, order = logits.topk(top_k or logits.size(-1))  # (B, K) each, likeliest first
        highest = logits[:, :1]  # nan counts as more than any other
        # The highest is moved to 0, because low temperatures overflow.
        probabilities = ((logits.double() - highest) / temperature).softmax(-1)
        if top_p < 1:  # a token goes if those before it are enough
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= top_p, 0)
        reach = probabilities.cumsum(-1)
        # One number a row: torch.multinomial would be called for each row, six times as slow.
        place = torch.searchsorted(reach, numbers[:, None] * reach[:, -1:], right=True)  # (B, 1)
        chosen = order.gather(-1, place.clamp(max=reach.size(-1) - 1))
    return chosen.masked_fill(~highest.isfinite(), -1)[:, 0]


@torch.inference_mode()
def generate(reader, block_size, prompts, seeds, max_new_tokens, temperature, top_k=0, top_p=1.0,
             end=None):
    """Continue prompts, lists of at least one token; reader: CachedReader or read_whole of a model.

    Yields a list of each row's next token, None once it has drawn `end`. Row i draws with seeds[i]
    and is what it would be alone, but for rounding. The model sees at most block_size tokens: the
    last so many of a longer prompt, and when they are used up, the last half of the text.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    seen = [prompt[-block_size:] for prompt in prompts]
    ended = [False] * len(prompts)
    logits = None  # of a step that has begun
    for step in range(max_new_tokens):
        if logits is None:
            logits = reader(seen)  # (B, vocab_size)
        if step % AHEAD == 0:
            numbers = [torch.rand(AHEAD, dtype=torch.float64, generator=g) for g in generators]
            numbers = torch.stack(numbers, 1).to(logits.device)  # (AHEAD, B)
        drawn = draw(logits, temperature, top_k, top_p, numbers[step % AHEAD])
        tokens = drawn.to('cpu', non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if drawn.is_cuda else None
        logits = None
        full = max(map(len, seen)) == block_size
        if isinstance(reader, CachedReader) and not full and step + 1 < max_new_tokens:
            logits = reader.grown(drawn)  # a GPU runs it while the host looks at what was drawn
        if copied:
            copied.synchronize()
        tokens = tokens.tolist()
        if min(tokens) < 0:
            raise Refused('the model gives logits that are not finite: its weights are broken, or '
                          'too large for the dtype')
        yield [None if over else token for token, over in zip(tokens, ended)]
        for row, token in enumerate(tokens):
            ended[row] |= token == end
            seen[row].append(token)
            if ended[row] and logits is None:  # a step that has begun still reads it as it is
                seen[row] = [token]  # what it draws after its end is of no use
            elif len(seen[row]) > block_size:
                seen[row] = seen[row][-max(1, block_size // 2):]
        if all(ended):
            return


# --- the command ----------------------------------------------------------------------------------


def print_texts(tokenizer, prompts, steps, end):
    """Print what `steps`, lists of a token a row, make of prompts (strings); returns the tokens.

    The first text comes as it is made.
    """
    rows = [[] for _ in prompts]
    decoder = codecs.getincrementaldecoder('utf-8')('replace')  # holds back half a character
    print(prompts[0], end='', flush=True)
    for drawn in steps:
        for row, token in zip(rows, drawn):
            if token not in (None, end):
                row.append(token)
        if drawn[0] not in (None, end):
            print(decoder.decode(tokenizer.decode_bytes(drawn[:1])), end='', flush=True)
    print(decoder.decode(b'', final=True) + '\n---')
    for prompt, row in zip(prompts[1:], rows[1:]):
        print(prompt + tokenizer.decode(row) + '\n---')
    return sum(map(len, rows))


@torch.inference_mode()
def print_score(model, tokenizer, path):
    """Mean loss of all tokens of a file but the first, given those before in their window."""
    tokens = tokenizer.encode(read_text(path, 'score'))
    scored = len(tokens) - 1
    if scored < 1:
        raise Refused(f'score={path!r}: has no token with one before it; use a longer text')
    T = model.config.block_size
    total = 0.0
    for start in range(0, scored, T):
        window = torch.tensor([tokens[start:start + T + 1]])  # (1, T + 1), the last is shorter
        window = window.to(model.token_embedding.weight.device)
        total += model(window[:, :-1], window[:, 1:]).item() * (window.size(1) - 1)
    loss = total / scored
    bits = bits_a_byte(total, len(tokenizer.decode_bytes(tokens[1:])))
    print(f'{path}: {scored:,} tokens, loss {loss:.4f}, perplexity {math.exp(loss):.2f}, '
          f'{bits:.4f} bits a byte')


def print_continued(model, tokenizer, s):
    """Print what the model makes of the prompts of SampleSettings, and to stderr how fast."""
    lines = [s.prompt]
    if s.prompts_file:
        lines = read_text(s.prompts_file, 'prompts_file').splitlines() or ['']
    prompts = []
    seeds = []
    for line in lines:
        prompts += [line] * s.num_samples
        seeds += [s.seed + 1_000_003 * number for number in range(s.num_samples)]
    encoded = [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in prompts]
    if model.config.reciprocal:
        reader = functools.partial(read_whole, model)
        cache = 'no cache, because reciprocal attention has none'
    else:
        reader = CachedReader(model, len(prompts), recorded=model.token_embedding.weight.is_cuda)
        cache = f'cache {size(reader.nbytes)}'
    start = time.monotonic()
    steps = generate(reader, model.config.block_size, encoded, seeds, s.max_new_tokens,
                     s.temperature, s.top_k, s.top_p, tokenizer.eot)
    count = print_texts(tokenizer, prompts, steps, tokenizer.eot)
    rate = count / (time.monotonic() - start)
    print(f'{count} tokens, {rate:.1f} a second, in {len(prompts)} texts; {cache}',
          file=sys.stderr)


def main(argv):
    """Print texts or a score; returns the exit code."""
    words, options = separate(SampleSettings, argv)
    if '--help' in options or not words:
        print(help_text(SampleSettings, __doc__))
        return 0 if '--help' in options else 2
    s, problems, _ = parse(SampleSettings, [*words[1:], *options], config_files=False)
    machine, of_machine = find_machine(s.device, s.dtype)
    if problems := problems + of_machine:
        raise Refused(problems)
    model, saved = load_model(words[0], s.checkpoint)
    if problems := check(s, model.config.vocab_size):
        raise Refused(problems)
    if machine.device.type == 'cuda':
        torch.cuda.set_device(machine.device)  # kernels are launched on the current device
    for p in model.parameters():
        p.data = p.data.to(machine.device, machine.dtype if p.dim() >= 2 else torch.float32)
    tokenizer = Tokenizer(saved['data']['tokenizer'])
    print(f'{words[0]}: {s.checkpoint}.pt of step {saved["step"]}, validation loss '
          f'{saved["val_loss"]:.4f}', file=sys.stderr)
    if s.score:
        print_score(model, tokenizer, s.score)
    else:
        print_continued(model, tokenizer, s)
    return 0


if __name__ == '__main__':
    run_command(main)
