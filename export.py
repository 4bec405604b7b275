"""To and from the Hugging Face GPT-2 format.

    python export.py out/best_50 out/best_50_hf --dtype=bfloat16

writes a folder that transformers' GPT2LMHeadModel and AutoTokenizer load with from_pretrained, if
the logits it computes from that are those of the run. The other way, fine-tuning or pruning a
GPT-2, folder or hub name:

    python train.py config/best_50.py --init_from=hf:gpt2 --bias=True --out_dir=out/pretrained_50
"""
import json
import os
from dataclasses import dataclass
from typing import Literal

import torch

from support.files import write_folder, write_json
from support.pretrained import FILE, FIXED, SIZES, check_parameters, layout, load_model, turned
from support.rundir import share_of_zeros
from support.settings import Refused, help_text, parse, run_command, separate
from support.shards import EOT_TEXT
from support.tokenizer import Tokenizer


@dataclass
class ExportSettings:
    checkpoint: Literal['best', 'last'] = 'best'  # best validation loss, or the latest weights
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of all tensors in the file


TOLERANCE = 1e-4  # of the logits' standard deviation; rounding in float32 makes about 1e-6
PROMPTS = (
    'The theory of evolution explains how species change over time.',
    'In 1969, two men walked on the Moon; a third one waited in orbit.',
    '"Are you sure?" she asked. He wasn\'t, but he nodded.',
)


def prompts_of(config, tokenizer):
    """[(1, T) tokens]: random ones that fill a whole context, and PROMPTS unless tokenizer=None."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(config.vocab_size, (1, config.block_size), generator=generator)
    texts = [tokenizer.encode(text)[:config.block_size] for text in PROMPTS] if tokenizer else []
    return [random, *(torch.tensor([text]) for text in texts)]


@torch.inference_mode()
def compare_logits(folder, model, prompts):
    """Say how near the logits of `model` are to those of transformers' GPT-2 with the files in
    `folder`; Refused if they are not."""
    try:
        import transformers
    except ImportError:
        print('logits: NOT COMPARED with anything; for that, pip install transformers')
        return
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).float().eval()
    differences = []
    for tokens in prompts:
        logits = model(tokens)  # (1, T, vocab_size)
        differences.append((logits - theirs(tokens).logits).abs().max() / logits.std())
    difference = torch.stack(differences).max().item()
    told = f'{difference:.1e} standard deviations from transformers {transformers.__version__}'
    if not difference <= TOLERANCE:  # NaN is a difference
        raise Refused(f'the logits differ by {told}: this model computes something GPT-2 does not, '
                      'which the format cannot hold; compare its attention, activation and norms')
    print(f'logits: at most {told}, on random tokens and {len(prompts) - 1} prompts')


def write_model(folder, config, weights, dtype):
    """config.json and model.safetensors."""
    from safetensors.torch import save
    eot = config.vocab_size - 1
    sizes = {key: vars(config)[ours] for ours, key in SIZES.items()}
    write_json(os.path.join(folder, 'config.json'), dict(
        architectures=['GPT2LMHeadModel'], torch_dtype=dtype, **sizes, **FIXED,
        embd_pdrop=config.dropout, attn_pdrop=config.dropout, resid_pdrop=config.dropout,
        bos_token_id=eot, eos_token_id=eot))
    tensors = {}
    for name, (theirs, _) in layout(config).items():
        stored = turned(theirs, weights[name]).to(getattr(torch, dtype))
        tensors[f'transformer.{theirs}'] = stored.contiguous()
    with open(os.path.join(folder, FILE), 'wb') as f:
        f.write(save(tensors, {'format': 'pt'}))


def byte_vocabulary():
    """{stand-in: byte} as in GPT-2's files, which hold printable characters alone: a byte that is
    none goes by the next character from number 256 on. And the end of a text."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != ' ']
    hidden = [byte for byte in range(256) if byte not in printable]
    characters = map(chr, [*printable, *range(256, 512)])
    return {**dict(zip(characters, printable + hidden)), EOT_TEXT: 256}


def write_tokenizer(folder, name, block_size):
    """The files that AutoTokenizer reads. GPT-2's are OpenAI's, which tiktoken has cached; bytes
    are a GPT-2 that merges nothing."""
    if name == 'bytes':
        vocabulary = json.dumps(byte_vocabulary()).encode()
        merges = b'#version: 0.2\n'
    else:
        from tiktoken.load import read_file_cached
        source = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main'
        vocabulary = read_file_cached(f'{source}/encoder.json')
        merges = read_file_cached(f'{source}/vocab.bpe')
    for file, content in (('vocab.json', vocabulary), ('merges.txt', merges)):
        with open(os.path.join(folder, file), 'wb') as f:
            f.write(content)
    write_json(os.path.join(folder, 'tokenizer_config.json'), dict(
        tokenizer_class='GPT2Tokenizer', model_max_length=block_size,
        clean_up_tokenization_spaces=False))


def export(model, tokenizer_name, out_dir, dtype):
    """Write the folder and say what is in it. Refused, and no folder, if anything fails."""
    model.to(getattr(torch, dtype)).float()  # rounded like the file, so that the logits compare
    config = model.config
    if config.reciprocal:  # a fixed weight of it is no parameter that could be missed
        raise Refused(f'ra_alpha={config.ra_alpha} ra_learned={config.ra_learned}: the format of '
                      'GPT-2 has no reciprocal attention; use it with sample.py')
    weights = model.state_dict()
    embedding = weights['token_embedding.weight']
    weights['token_embedding.weight'] = embedding[:config.vocab_size]  # no padding
    for name, (_, shape) in layout(config).items():
        if name.endswith('.bias'):
            weights.setdefault(name, torch.zeros(shape))
    check_parameters(weights, config, 'this model is no GPT-2, use it with sample.py')

    try:
        tokenizer = Tokenizer(tokenizer_name)
    except Refused as refused:
        tokenizer = None
        print(f'no tokenizer files: {refused}')

    def write(folder):
        write_model(folder, config, weights, dtype)
        compare_logits(folder, model, prompts_of(config, tokenizer))
        if tokenizer:
            write_tokenizer(folder, tokenizer_name, config.block_size)

    write_folder(out_dir, write)
    print(f'zeros: {share_of_zeros(weights):.2%} of the matrices in the blocks')


def main(argv):
    """Export a run; returns the exit code."""
    folders, options = separate(ExportSettings, argv)
    if '--help' in options or len(folders) != 2:
        print(help_text(ExportSettings, __doc__))
        return 0 if '--help' in options else 2
    settings, problems, _ = parse(ExportSettings, options, config_files=False)
    if problems:
        raise Refused(problems)
    run_dir, out_dir = folders
    if os.path.isfile(out_dir) or (os.path.isdir(out_dir) and os.listdir(out_dir)):
        raise Refused(f"'{out_dir}' exists and is not an empty folder; choose another folder")
    model, saved = load_model(run_dir, settings.checkpoint)
    export(model, saved['data']['tokenizer'], out_dir, settings.dtype)
    print(f"{out_dir}: {settings.checkpoint}.pt of step {saved['step']} in {settings.dtype}")
    return 0


if __name__ == '__main__':
    run_command(main)
