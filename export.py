"""To and from the Hugging Face GPT-2 format.

    python export.py out/best_50 out/best_50_hf --dtype=bfloat16

writes a folder that transformers' GPT2LMHeadModel and AutoTokenizer load with from_pretrained, if
the logits it computes from that are those of the run. The other way, fine-tuning or pruning a
GPT-2, folder or hub name:

    python train.py config/best_50.py --init_from=hf:gpt2 --bias=True --out_dir=out/pretrained_50
"""
import functools
import json
import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from model import GPTConfig, load_model, model_config
from support.files import read_json, write_folder, write_json
from support.settings import Refused, help_text, parse, run_command, words_and_options
from support.shards import EOT_TEXT, get_tokenizer


@dataclass
class ExportSettings:
    checkpoint: Literal['best', 'last'] = 'best'  # best validation loss, or the latest weights
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of all tensors in the file


# --- the format -----------------------------------------------------------------------------------

FILE = 'model.safetensors'
SIZES = {  # field of GPTConfig: key of config.json
    'vocab_size': 'vocab_size',
    'block_size': 'n_positions',
    'n_layer': 'n_layer',
    'n_head': 'n_head',
    'n_embd': 'n_embd',
}
FIXED = {  # key of config.json: the one value that our model can be
    'model_type': 'gpt2',
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': 1e-5,
    'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False,
    'tie_word_embeddings': True,
}
UNUSED = ('lm_head.weight', '.attn.bias', '.attn.masked_bias')  # tied; causal masks of 2019


def layout(config):
    """{our name: (name in the format, our shape)} of every parameter of a GPT-2 of this size."""
    C = config.n_embd
    parameters = {
        'token_embedding.weight': ('wte.weight', (config.vocab_size, C)),
        'position_embedding.weight': ('wpe.weight', (config.block_size, C)),
    }
    modules = {'norm': ('ln_f', (C,))}
    for n in range(config.n_layer):
        modules |= {
            f'blocks.{n}.norm_1': (f'h.{n}.ln_1', (C,)),
            f'blocks.{n}.attention.qkv': (f'h.{n}.attn.c_attn', (3 * C, C)),
            f'blocks.{n}.attention.proj': (f'h.{n}.attn.c_proj', (C, C)),
            f'blocks.{n}.norm_2': (f'h.{n}.ln_2', (C,)),
            f'blocks.{n}.mlp.fc': (f'h.{n}.mlp.c_fc', (4 * C, C)),
            f'blocks.{n}.mlp.proj': (f'h.{n}.mlp.c_proj', (C, 4 * C)),
        }
    for ours, (theirs, shape) in modules.items():
        parameters[f'{ours}.weight'] = (f'{theirs}.weight', shape)
        parameters[f'{ours}.bias'] = (f'{theirs}.bias', shape[:1])
    return parameters


def turned(theirs, tensor):
    """From our orientation to theirs or back: their linear layers keep (inputs, outputs)."""
    return tensor.t() if theirs.startswith('h.') and tensor.dim() == 2 else tensor


def check_parameters(tensors, config, told):
    """Refused, as `told`, unless {our name: tensor} is what a GPT-2 of this size consists of."""
    expected = [f'{name} {shape}' for name, (_, shape) in layout(config).items()]
    found = [f'{name} {tuple(tensor.shape)}' for name, tensor in tensors.items()]
    extra = [parameter for parameter in found if parameter not in expected]
    missing = [parameter for parameter in expected if parameter not in found]
    if extra or missing:
        raise Refused(f'{told}: beyond GPT-2: {", ".join(extra[:3]) or "nothing"}; '
                      f'missing: {", ".join(missing[:3]) or "nothing"}')


# --- reading --------------------------------------------------------------------------------------


def read_gpt2(path):
    """({our name: float32 tensor}, GPTConfig) of a GPT-2; padded rows of the embedding are zeros.

    path: a folder with config.json and model.safetensors, or a name on the hub such as 'gpt2'.
    Refused, naming the file, if it is damaged or describes anything that our model is not.
    """
    folder = path if os.path.isdir(path) else download(path)
    config = read_config(os.path.join(folder, 'config.json'))
    file = os.path.join(folder, FILE)
    try:
        from safetensors.torch import load_file
        tensors = load_file(file)  # mapped: read from the disk when used
    except Exception as error:  # a dozen types, for a file that is damaged or absent
        raise Refused(f'{file} cannot be read ({error}); get it again, or load the weights with '
                      'transformers and save_pretrained them as one such file') from None
    if config.n_layer > len(tensors):  # the layout of so many would take for ever
        raise Refused(f'{file} has {len(tensors)} tensors, which is too few for n_layer='
                      f'{config.n_layer} of config.json; get both again')
    names = {theirs: ours for ours, (theirs, _) in layout(config).items()}
    weights = {}
    for name, tensor in tensors.items():
        theirs = name.removeprefix('transformer.')
        if not theirs.endswith(UNUSED):
            weights[names.get(theirs, theirs)] = turned(theirs, tensor).float()
    check_parameters(weights, config, f'{file} is another kind of model')
    for name, weight in weights.items():
        if not weight.abs().max() < 1e3:  # a flipped bit; the file has no checksum
            print(f'note: {file}: {name} has weights of {weight.abs().max():.0e}')
    padding = (0, 0, 0, config.padded_vocab_size - config.vocab_size)
    weights['token_embedding.weight'] = F.pad(weights['token_embedding.weight'], padding)
    return weights, config


def download(name):
    """Folder of the hub's cache that holds the repository `name`."""
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=['config.json', FILE])
    except Exception as error:  # a dozen types: no network, no such name, not installed
        raise Refused(f"'{name}' is not a folder, and cannot be had from the hub "
                      f'({type(error).__name__}); check the name, or where there is a network: hf '
                      f'download {name} config.json {FILE} --local-dir FOLDER') from None


def read_config(path):
    """GPTConfig of a config.json; Refused if our model cannot be that."""
    theirs = read_json(path)
    if not isinstance(theirs, dict):
        raise Refused(f'{path} is missing or no JSON object; get it again')
    faults = [f'{key}={theirs.get(key)!r} must be a positive integer'
              for key in SIZES.values() if type(theirs.get(key)) is not int or theirs[key] < 1]
    faults += [f'{key}={theirs[key]!r} must be {value!r}'
               for key, value in FIXED.items() if theirs.get(key, value) != value]
    if faults:
        raise Refused([f'{path}: {fault}; use another model' for fault in faults])
    return GPTConfig(bias=True, **{ours: theirs[key] for ours, key in SIZES.items()})


# --- a run that starts from a GPT-2, or from another run ------------------------------------------

STRUCTURE = ('n_layer', 'n_head', 'n_embd', 'bias', 'attention', 'positions', 'n_kv_head',
             'ra_learned')  # settings that the weights decide


@functools.lru_cache(maxsize=1)  # the check before a run and its start read it once
def read_start(source):
    """({name: float32 tensor}, GPTConfig) of init_from=hf:PATH or run:PATH; None for others."""
    kind, _, path = source.partition(':')
    if kind == 'hf':
        return read_gpt2(path)
    if kind == 'run':
        model, _ = load_model(path, 'best' if os.path.exists(f'{path}/best.pt') else 'last')
        return model.state_dict(), model.config
    return None


def starting_weights(settings, model):
    """{name: float32 tensor} that a new run starts from: those of `model`, drawn from the seed, or
    those that init_from names, of whose positions it takes the first block_size."""
    weights, _ = read_start(settings.init_from) or (model.state_dict(), model.config)
    read_start.cache_clear()  # a run has its own copy from now on
    name = 'position_embedding.weight'
    if name in weights:
        weights[name] = weights[name][:model.config.block_size]
    return weights


def pretrained_problems(settings, data):
    """Problems of the settings, and of the data unless None, with what init_from names."""
    source = settings.init_from
    try:
        start = read_start(source)
    except Refused as refused:
        return refused.problems
    if start is None:
        return []
    _, theirs = start
    ours = model_config(settings, theirs.vocab_size)
    needed = {key: vars(theirs)[key] for key in STRUCTURE}
    if theirs.attention == 'mla':
        needed['latent_dim'] = theirs.latent_dim
    needed['block_size'] = min(ours.block_size, theirs.block_size)
    problems = [f'{key}={vars(ours)[key]!r}: {source} has {key}={value!r}; write --{key}={value}'
                for key, value in needed.items() if vars(ours)[key] != value]
    if data and data.vocab_size != theirs.vocab_size:
        problems.append(f'dataset={data.name!r}: {source} has {theirs.vocab_size} tokens, not the '
                        f'{data.vocab_size} of {data.tokenizer!r}; use text of its own tokenizer')
    return problems


# --- writing --------------------------------------------------------------------------------------

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
        tokenizer = get_tokenizer(tokenizer_name)
    except Refused as refused:
        tokenizer = None
        print(f'no tokenizer files: {refused}')

    def write(folder):
        write_model(folder, config, weights, dtype)
        compare_logits(folder, model, prompts_of(config, tokenizer))
        if tokenizer:
            write_tokenizer(folder, tokenizer_name, config.block_size)

    write_folder(out_dir, write)
    linear = [w for name, w in weights.items() if name.startswith('blocks.') and w.dim() == 2]
    zeros = sum((w == 0).sum().item() for w in linear) / sum(w.numel() for w in linear)
    print(f"zeros: {zeros:.2%} of the blocks' linear weights")


def main(argv):
    """Export a run; returns the exit code."""
    folders, options = words_and_options(ExportSettings, argv)
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
