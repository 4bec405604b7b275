"""Text from a trained run, or how well a run predicts a text.

    python sample.py out/quickstart --prompt="The Python interpreter" --max_new_tokens=200
    python sample.py out/quickstart --prompts_file=prompts.txt --num_samples=2 --top_p=0.9
    python sample.py out/quickstart --score=book.txt

Texts go to stdout, a single one as it is made, several once all are done; speed and the size of the
cache go to stderr.
"""
import codecs
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

from model import load_model
from support.decoding import CachedReader, WholeReader
from support.machine import find_machine
from support.rundir import size
from support.settings import Refused, help_text, parse, run_command
from support.shards import get_tokenizer


@dataclass
class SampleSettings:
    # --- text -------------------------------------------------------------------------------------
    prompt: str = ''  # text to continue; empty: a new document
    prompts_file: str = ''  # file with a prompt a line, all continued at once; empty line: as above
    num_samples: int = 1  # texts a prompt
    max_new_tokens: int = 200  # tokens a text, fewer if it ends by itself
    temperature: float = 0.8  # the logits are divided by it; 0: always the likeliest token
    top_k: int = 200  # only the likeliest k tokens can be drawn; 0: all
    top_p: float = 1.0  # only the likeliest of this probability (arXiv 1904.09751); 1: all
    seed: int = 1337  # a text depends on it, its prompt and its number among the prompt's samples
    score: str = ''  # file whose loss and perplexity are measured, in windows; no text is made
    # --- where ------------------------------------------------------------------------------------
    checkpoint: Literal['best', 'last'] = 'best'  # best validation loss, or the latest weights
    device: str = 'auto'  # auto, cpu, cuda or cuda:N
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # auto: bfloat16 on a GPU, else float32


TEXT = 'prompt prompts_file num_samples max_new_tokens temperature top_k top_p seed'.split()


def check(s, typed, vocab_size):
    """Problems of SampleSettings; typed: names of those on the command line."""
    problems = []

    def require(condition, key, must):
        if not condition:
            problems.append(f'{key}={getattr(s, key)!r}: {must}')

    def need(keys, condition, needs):
        for key in keys:
            require(condition or key not in typed, key, f'acts only with {needs}; leave it out')

    for key in ('num_samples', 'max_new_tokens'):
        require(getattr(s, key) >= 1, key, 'must be at least 1')
    for key in ('temperature', 'top_k', 'seed'):
        require(getattr(s, key) >= 0, key, 'must not be negative')
    require(s.seed < 2**63, 'seed', 'must be below 2^63, which PyTorch takes')
    require(s.top_k <= vocab_size, 'top_k',
            f'the vocabulary has {vocab_size} tokens; 0 draws from all of them')
    require(0 < s.top_p <= 1, 'top_p', 'must be above 0 and at most 1')
    need(['prompt'], not s.prompts_file, 'no prompts_file')
    need(['num_samples', 'top_k', 'top_p', 'seed'], s.temperature, 'a temperature above 0')
    need(TEXT, not s.score, 'no score')
    return problems


def read_text(path, setting):
    """The text of a file that a setting names; Refused if there is none."""
    try:
        with open(path, encoding='utf-8', newline='') as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f'{setting}={path!r} cannot be read: {error}') from None
    if not text:
        raise Refused(f'{setting}={path!r}: the file is empty')
    return text


# --- the next token -------------------------------------------------------------------------------


def draw(logits, temperature, top_k, top_p, generators):
    """One token a row from logits (B, vocab_size), by one number of each row's own generator."""
    highest = logits.amax(-1, keepdim=True)
    if not highest.isfinite().all():
        raise Refused('the model gives logits that are not finite: its weights are broken, or too '
                      'large for the dtype')
    if temperature == 0:
        return logits.argmax(-1).tolist()
    order = None
    if top_k or top_p < 1:
        logits, order = logits.topk(top_k or logits.size(-1))  # (B, K) each, likeliest first
    # The highest is moved to 0, because low temperatures overflow.
    probabilities = ((logits - highest).double() / temperature).softmax(-1)
    if top_p < 1:  # a token goes if those before it are enough
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    reach = probabilities.cumsum(-1)
    numbers = [torch.rand((), dtype=torch.float64, generator=each) for each in generators]  # [0, 1)
    points = torch.stack(numbers).to(reach.device)[:, None] * reach[:, -1:]  # (B, 1)
    chosen = torch.searchsorted(reach, points, right=True).clamp(max=reach.size(-1) - 1)
    if order is not None:
        chosen = order.gather(-1, chosen)
    return chosen[:, 0].tolist()


@torch.inference_mode()
def generate(reader, block_size, prompts, seeds, max_new_tokens, temperature, top_k=0, top_p=1.0,
             end=None):
    """Continue prompts, lists of at least one token, with a reader of support.decoding.

    Yields a list of each row's next token, None once it has drawn `end`. Row i draws with seeds[i]
    and is what it would be alone, but for rounding. The model sees at most block_size tokens: the
    last so many of a longer prompt, and when they are used up, the last half of the text.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    seen = [prompt[-block_size:] for prompt in prompts]
    ended = [False] * len(prompts)
    for _ in range(max_new_tokens):
        drawn = draw(reader(seen).float(), temperature, top_k, top_p, generators)
        yield [None if over else token for token, over in zip(drawn, ended)]
        for row, token in enumerate(drawn):
            ended[row] |= token == end
            text = seen[row] + [token]
            if len(text) > block_size:
                text = text[-max(1, block_size // 2):]
            seen[row] = [token] if ended[row] else text  # what it draws after its end is of no use
        if all(ended):
            return


@torch.inference_mode()
def score(model, tokens):
    """Mean loss in nats of all tokens (a list) but the first.

    Each is given those before it in its window of block_size.
    """
    T = model.config.block_size
    device = model.token_embedding.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(tokens) - 1, T):
        window = tokens[start:start + T + 1]
        filling = T + 1 - len(window)  # one shape for all windows, the last too
        idx = torch.tensor([window[:-1] + [0] * filling], device=device)  # (1, T)
        targets = torch.tensor([window[1:] + [-1] * filling], device=device)
        total += model(idx, targets).double() * (len(window) - 1)
    return total.item() / (len(tokens) - 1)


# --- the command ----------------------------------------------------------------------------------


def print_texts(tokenizer, prompts, steps, end):
    """Print what `steps`, lists of a token a row, make of prompts (strings); returns the tokens.

    A single text comes as it is made.
    """
    rows = [[] for _ in prompts]
    alone = len(prompts) == 1
    decoder = codecs.getincrementaldecoder('utf-8')('replace')  # holds back half a character
    if alone:
        print(prompts[0], end='', flush=True)
    for drawn in steps:
        for row, token in zip(rows, drawn):
            if token is not None:
                row.append(token)
        if alone and drawn[0] != end:
            print(decoder.decode(tokenizer.decode_bytes(drawn)), end='', flush=True)
    if alone:
        print(decoder.decode(b'', final=True) + '\n---')
    else:
        for prompt, row in zip(prompts, rows):
            text = row[:-1] if row[-1] == end else row
            print(prompt + tokenizer.decode(text) + '\n---')
    return sum(map(len, rows))


def print_score(model, tokenizer, path):
    tokens = tokenizer.encode(read_text(path, 'score'))
    if len(tokens) < 2:
        raise Refused(f'score={path!r}: one token has nothing to be predicted from; use a longer '
                      'text')
    loss = score(model, tokens)
    print(f'{path}: {len(tokens) - 1:,} tokens, loss {loss:.4f}, perplexity {math.exp(loss):.2f}')


def print_continued(model, tokenizer, s):
    lines = [s.prompt]
    if s.prompts_file:
        text = read_text(s.prompts_file, 'prompts_file').replace('\r\n', '\n')
        lines = text.removesuffix('\n').split('\n')
    numbers = range(s.num_samples)
    prompts = [line for line in lines for _ in numbers]
    seeds = [s.seed + 1_000_003 * number for _ in lines for number in numbers]
    encoded = [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in prompts]
    block_size = model.config.block_size
    if max(map(len, encoded)) > block_size:
        print(f'note: the model sees the last block_size={block_size} tokens of a prompt',
              file=sys.stderr)
    if model.config.reciprocal:
        print('note: reciprocal attention has no cache: the whole text is read for each token',
              file=sys.stderr)
        reader = WholeReader(model)
    else:
        on_gpu = model.token_embedding.weight.is_cuda
        reader = CachedReader(model, len(prompts), recorded=on_gpu)
    start = time.monotonic()
    steps = generate(reader, block_size, encoded, seeds, s.max_new_tokens, s.temperature, s.top_k,
                     s.top_p, tokenizer.eot)
    count = print_texts(tokenizer, prompts, steps, tokenizer.eot)
    rate = count / (time.monotonic() - start)
    print(f'{count} tokens, {rate:.1f} a second, in {len(prompts)} texts; '
          f'cache {size(reader.nbytes)}', file=sys.stderr)


def main(argv):
    """Print texts or a score; returns the exit code."""
    if '--help' in argv or not argv:
        print(help_text(SampleSettings, __doc__))
        return 0 if argv else 2
    run_dir = argv[0]
    s, problems, typed = parse(SampleSettings, argv[1:], config_files=False)
    machine, of_machine = find_machine(s.device, s.dtype)
    problems += of_machine
    if not os.path.isdir(run_dir):
        problems.append(f"'{run_dir}' is not a run directory; usage: python sample.py "
                        'RUN_DIRECTORY [--key=value ...]')
    if problems:
        raise Refused(problems)
    model, saved = load_model(run_dir, s.checkpoint)
    if problems := check(s, typed, model.config.vocab_size):
        raise Refused(problems)
    if machine.device.type == 'cuda':
        torch.cuda.set_device(machine.device)  # kernels are launched on the current device
    for p in model.parameters():
        p.data = p.data.to(machine.device, machine.dtype if p.dim() >= 2 else torch.float32)
    tokenizer = get_tokenizer(saved['data']['tokenizer'])
    if s.score:
        print_score(model, tokenizer, s.score)
    else:
        print_continued(model, tokenizer, s)
    return 0


if __name__ == '__main__':
    run_command(main)
