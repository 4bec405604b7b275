"""Text from a trained run, or how well a run predicts a text.

    python sample.py out/quickstart --prompt="The Python interpreter" --max_new_tokens=200
    python sample.py out/quickstart --prompts_file=prompts.txt --num_samples=2 --top_p=0.9
    python sample.py out/quickstart --score=book.txt

Texts go to stdout, a single one as it is made, several once all are done; speed and cache size go to stderr.
"""
import codecs
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

import rundir
from attention import new_cache
from memory import size
from preflight import find_machine
from settings import Refused, help_text, parse, run_command, unused
from shards import get_tokenizer


@dataclass
class SampleSettings:
    # --- text ----------------------------------------------------------------------------------------
    prompt: str = ''  # text to continue; empty: a new document
    prompts_file: str = ''  # file with a prompt a line, all continued at once; an empty line: a new document
    num_samples: int = 1  # texts a prompt
    max_new_tokens: int = 200  # tokens a text, fewer if it ends by itself
    temperature: float = 0.8  # the logits are divided by it; 0: always the likeliest token
    top_k: int = 200  # only the likeliest k tokens can be drawn; 0: all
    top_p: float = 1.0  # only the likeliest tokens that make up this much probability (arXiv 1904.09751); 1: all
    seed: int = 1337  # of the drawing; a text depends on it, its prompt and its number among the prompt's samples
    score: str = ''  # file whose loss and perplexity are measured, in windows of block_size; no text is made
    # --- where ---------------------------------------------------------------------------------------
    checkpoint: Literal['best', 'last'] = 'best'  # weights with the best validation loss, or the latest
    device: str = 'auto'  # auto, cpu, cuda or cuda:N
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # auto: bfloat16 on a GPU, else float32


def check(s, vocab_size):
    """Problems of SampleSettings."""
    problems = [f'{key}={getattr(s, key)!r}: must be at least 1' for key in ('num_samples', 'max_new_tokens') if getattr(s, key) < 1]
    problems += [f'{key}={getattr(s, key)!r}: must not be negative' for key in ('temperature', 'top_k', 'seed') if getattr(s, key) < 0]
    if s.seed >= 2**63:
        problems.append(f'seed={s.seed}: must be below 2^63, which PyTorch takes')
    if s.top_k > vocab_size:
        problems.append(f'top_k={s.top_k}: the vocabulary has {vocab_size} tokens; 0 draws from all of them')
    if not 0 < s.top_p <= 1:
        problems.append(f'top_p={s.top_p}: must be above 0 and at most 1')
    if s.prompts_file:
        problems += unused(s, 'prompt', 'no prompts_file')
    if s.temperature == 0:
        problems += unused(s, 'top_k top_p seed num_samples', 'a temperature above 0')
    if s.score:
        problems += unused(s, 'prompt prompts_file num_samples max_new_tokens temperature top_k top_p seed', 'no score')
    return problems


def read_text(path, setting):
    """The text of a file that a setting names; Refused if there is none."""
    try:
        with open(path, encoding='utf-8', newline='') as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f'{setting}={path!r} cannot be read: {getattr(error, "strerror", None) or error}') from None
    if not text:
        raise Refused(f'{setting}={path!r}: the file is empty')
    return text


def load_model(run_dir, checkpoint, machine):
    """(model for use on `machine`, name of its tokenizer) from a run directory; Refused if there is none."""
    model, saved = rundir.load_model(run_dir, checkpoint)
    if machine.device.type == 'cuda':
        torch.cuda.set_device(machine.device)  # Triton's kernels are launched on the current device
    for p in model.parameters():
        p.data = p.data.to(machine.device, machine.dtype if p.dim() >= 2 else torch.float32)
    return model, saved['data']['tokenizer']


def draw(logits, temperature, top_k, top_p, generators):
    """One token a row from logits (B, vocab_size), each row by one number of its own generator -> list of B ints."""
    highest = logits.amax(-1, keepdim=True)
    if not highest.isfinite().all():
        raise Refused('the model gives logits that are not finite: its weights are broken, or too large for the dtype')
    if temperature == 0:
        return logits.argmax(-1).tolist()
    order = None
    if top_k or top_p < 1:
        logits, order = logits.topk(top_k or logits.size(-1))  # (B, K) each, likeliest first
    logits = (logits - highest).double() / temperature  # the highest at 0: low temperatures overflow
    probabilities = logits.softmax(-1)
    if top_p < 1:
        probabilities.masked_fill_(probabilities.cumsum(-1) - probabilities >= top_p, 0)  # a token goes if those before it are enough
    reach = probabilities.cumsum(-1)
    numbers = torch.stack([torch.rand((), dtype=torch.float64, generator=generator) for generator in generators])  # in [0, 1)
    chosen = torch.searchsorted(reach, numbers.to(reach.device)[:, None] * reach[:, -1:], right=True).clamp(max=reach.size(-1) - 1)
    return (chosen if order is None else order.gather(-1, chosen))[:, 0].tolist()


def one_more(model, cache):
    """A function tokens (B,) int64 on the CPU -> logits (B, vocab_size) of one more token a row, as CUDA graphs. A call overwrites
    the logits of the one before.

    The kernels of one token take less time than their launches, a graph is one launch. It is of fixed shapes, so there is one for
    every 256 places of the cache that are looked at, recorded when they are first needed.
    """
    idx, lengths, counts = (torch.ones_like(cache.lengths, device=model.token_embedding.weight.device) for _ in range(3))
    graphs, pool = {}, torch.cuda.graph_pool_handle()

    def forward(end):
        return model.head(model.hidden(idx[:, None], cache, step=cache.step(lengths, counts, 1, end))[:, 0])

    def replay(tokens):
        end = min(-(-int(cache.lengths.max() + 1) // 256) * 256, cache.block_size)
        idx.copy_(tokens)
        lengths.copy_(cache.lengths)
        if end in graphs:
            graph, logits = graphs[end]
            graph.replay()
        else:
            logits = forward(end)  # not recorded: libraries choose their kernels
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                graphs[end] = graph, forward(end)  # not run: RA would find its oldest query replaced
        cache.lengths = cache.lengths + 1
        return logits
    return replay


@torch.inference_mode()
def generate(model, cache, prompts, seeds, max_new_tokens, temperature, top_k=0, top_p=1.0, end=None, recorded=False):
    """Continue prompts, lists of at least one token: yields a list of each row's next token, None once it has drawn `end`.

    cache: an empty one with a row a prompt. Row i draws with seeds[i] and is what it would be alone, but for rounding.
    The model sees at most block_size tokens: the last so many of a longer prompt, and each time all positions are used
    up, the last half of the text is read anew. recorded: single tokens are CUDA graphs.
    """
    positions, device = cache.block_size, model.token_embedding.weight.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    texts, unread, ended = [list(prompt) for prompt in prompts], [prompt[-positions:] for prompt in prompts], [False] * len(prompts)
    replay = one_more(model, cache) if recorded else None
    for _ in range(max_new_tokens):
        counts = torch.tensor([len(tokens) for tokens in unread])
        T = int(counts.max())
        idx = torch.tensor([tokens + [0] * (T - len(tokens)) for tokens in unread])  # (B, T)
        if T == 1 and replay:
            logits = replay(idx[:, 0])
        else:
            hidden = model.hidden(idx.to(device), cache, counts)  # (B, T, C)
            logits = model.head(hidden[torch.arange(len(unread), device=device), counts.to(device) - 1])
        drawn = draw(logits.float(), temperature, top_k, top_p, generators)
        yield [None if over else token for token, over in zip(drawn, ended)]
        for row, token in enumerate(drawn):
            ended[row] |= token == end
            texts[row].append(token)
            unread[row] = [token]
            if ended[row]:
                cache.lengths[row] = 0  # what it reads and draws from here on is of no use
            elif cache.lengths[row] == positions:
                cache.lengths[row], unread[row] = 0, texts[row][-max(1, positions // 2):]
        if all(ended):
            return


@torch.inference_mode()
def score(model, tokens):
    """Mean loss in nats of all tokens (a list) but the first, each given those before it in its window of block_size."""
    T, device = model.config.block_size, model.token_embedding.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(tokens) - 1, T):
        window = tokens[start:start + T + 1]
        filling = T + 1 - len(window)  # one shape for all windows, the last too
        idx, targets = torch.tensor([window[:-1] + [0] * filling, window[1:] + [-1] * filling], device=device)[:, None]  # (1, T) each
        total += model(idx, targets).double() * (len(window) - 1)
    return total.item() / (len(tokens) - 1)


def print_texts(tokenizer, prompts, steps, end):
    """Print the texts that `steps`, lists of a token a row, make of prompts (strings); a single one as it comes."""
    rows, decoder = [[] for _ in prompts], codecs.getincrementaldecoder('utf-8')('replace')  # holds back half a character
    alone = len(prompts) == 1
    print(prompts[0] if alone else '', end='', flush=True)
    for drawn in steps:
        for row, token in zip(rows, drawn):
            row += [] if token is None else [token]
        if alone and drawn[0] != end:
            print(decoder.decode(tokenizer.decode_bytes(drawn)), end='', flush=True)
    if alone:
        print(decoder.decode(b'', final=True) + '\n---')
    else:
        for prompt, row in zip(prompts, rows):
            print(prompt + tokenizer.decode(row[:-1] if row[-1] == end else row) + '\n---')
    return sum(map(len, rows))


def main(argv):
    """Print texts or a score; returns the exit code."""
    if '--help' in argv or not argv:
        print(help_text(SampleSettings, __doc__))
        return 0 if argv else 2
    run_dir, (s, problems) = argv[0], parse(SampleSettings, argv[1:], config_files=False)
    machine, more = find_machine(s.device, s.dtype)
    if not os.path.isdir(run_dir):
        more.append(f"'{run_dir}' is not a run directory; usage: python sample.py RUN_DIRECTORY [--key=value ...]")
    if problems + more:
        raise Refused(problems + more)
    model, name = load_model(run_dir, s.checkpoint, machine)
    if problems := check(s, model.config.vocab_size):
        raise Refused(problems)
    tokenizer = get_tokenizer(name)
    if s.score:
        tokens = tokenizer.encode(read_text(s.score, 'score'))
        if len(tokens) < 2:
            raise Refused(f'score={s.score!r}: one token has nothing to be predicted from; use a longer text')
        loss = score(model, tokens)
        print(f'{s.score}: {len(tokens) - 1:,} tokens, loss {loss:.4f}, perplexity {math.exp(loss):.2f}')
        return 0
    lines = read_text(s.prompts_file, 'prompts_file').replace('\r\n', '\n').removesuffix('\n').split('\n') if s.prompts_file else [s.prompt]
    prompts = [line for line in lines for _ in range(s.num_samples)]
    seeds = [s.seed + 1_000_003 * number for _ in lines for number in range(s.num_samples)]
    encoded = [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in prompts]
    if max(map(len, encoded)) > model.config.block_size:
        print(f'note: the model sees the last block_size={model.config.block_size} tokens of a prompt', file=sys.stderr)
    cache = new_cache(model.config, len(prompts), machine.device, machine.dtype)
    start = time.monotonic()
    count = print_texts(tokenizer, prompts, generate(
        model, cache, encoded, seeds, s.max_new_tokens, s.temperature, s.top_k, s.top_p, tokenizer.eot,
        recorded=machine.device.type == 'cuda'), tokenizer.eot)
    print(f'{count} tokens, {count / (time.monotonic() - start):.1f} a second, in {len(prompts)} texts; cache {size(cache.bytes())}',
          file=sys.stderr)
    return 0


if __name__ == '__main__':
    run_command(main)
