"""Text from a trained run.

    python sample.py out/quickstart --prompt="The Python interpreter" --max_new_tokens=200
"""
import os
from dataclasses import dataclass
from typing import Literal

import torch

from model import GPT, model_config
from preflight import find_machine
from prune import masked, unpack_weights
from rundir import load_checkpoint
from settings import Refused, Settings, help_text, parse, run_command
from shards import get_tokenizer


@dataclass
class SampleSettings:
    # --- text ----------------------------------------------------------------------------------------
    prompt: str = ''  # text to continue; empty: a new document
    num_samples: int = 1  # texts
    max_new_tokens: int = 200  # tokens a text, fewer if it ends by itself
    temperature: float = 0.8  # the logits are divided by it; 0: always the likeliest token
    top_k: int = 200  # only the likeliest k tokens can be drawn; 0: all
    seed: int = 1337  # of the drawing
    # --- where ---------------------------------------------------------------------------------------
    checkpoint: Literal['best', 'last'] = 'best'  # weights with the best validation loss, or the latest
    device: str = 'auto'  # auto, cpu, cuda or cuda:N
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # auto: bfloat16 on a GPU, else float32


def check(s, vocab_size):
    """Problems of SampleSettings."""
    problems = [f'{key}={getattr(s, key)!r}: must be at least 1' for key in ('num_samples', 'max_new_tokens') if getattr(s, key) < 1]
    problems += [f'{key}={getattr(s, key)!r}: must not be negative' for key in ('temperature', 'top_k', 'seed') if getattr(s, key) < 0]
    if s.top_k > vocab_size:
        problems.append(f'top_k={s.top_k}: the vocabulary has {vocab_size} tokens; 0 draws from all of them')
    return problems


def load_model(run_dir, checkpoint, machine):
    """(model for use on `machine`, name of its tokenizer) from a run directory; Refused if there is none."""
    saved = load_checkpoint(os.path.join(run_dir, f'{checkpoint}.pt'))
    model = GPT(model_config(Settings(**saved['settings']), saved['data']['vocab_size']))
    model.load_state_dict(masked(unpack_weights(saved['weights']), saved.get('mask', {})))
    for p in model.parameters():
        p.data = p.data.to(machine.device, machine.dtype if p.dim() >= 2 else torch.float32)
    return model.eval(), saved['data']['tokenizer']


def next_tokens(logits, temperature, top_k, generator):
    """Draw from logits (B, vocab_size) on the CPU -> (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.inference_mode()
def generate(model, tokens, max_new_tokens, temperature, top_k, seed, end=None):
    """Continue tokens (B, T) int64 by up to max_new_tokens; stops early once every row has drawn `end`.

    The model sees the last block_size tokens. The same seed gives the same text on every device but for rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    device, ended = tokens.device, torch.zeros(tokens.size(0), dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits = model.head(model.hidden(tokens[:, -model.config.block_size:])[:, -1])  # (B, vocab_size)
        drawn = next_tokens(logits.float().cpu(), temperature, top_k, generator)
        tokens = torch.cat([tokens, drawn.to(device)], dim=1)
        ended |= drawn[:, 0] == end
        if ended.all():
            break
    return tokens


def main(argv):
    """Print samples; returns the exit code."""
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
    start = tokenizer.encode(s.prompt) or [tokenizer.eot]
    tokens = torch.tensor([start] * s.num_samples, device=machine.device)  # (B, T)
    for row in generate(model, tokens, s.max_new_tokens, s.temperature, s.top_k, s.seed, tokenizer.eot).tolist():
        end = row.index(tokenizer.eot, len(start)) if tokenizer.eot in row[len(start):] else len(row)
        print(tokenizer.decode(row[:end] if s.prompt else row[1:end]) + '\n---')
    return 0


if __name__ == '__main__':
    run_command(main)
