"""The weights that a run or a tool starts from: those of another run or of a published GPT-2."""
import functools
import os
import sys
from dataclasses import fields

import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, model_config
from support.files import read_json
from support.rundir import load_checkpoint, unpack_weights
from support.settings import Refused

# --- from a run directory -------------------------------------------------------------------------


def load_model(run_dir, checkpoint):
    """(GPT on the CPU, float32, in eval mode; what its checkpoint says) of a run directory.

    checkpoint: 'best' or 'last'. Refused if there is none, or another version's weights in it.
    """
    path = os.path.join(run_dir, f'{checkpoint}.pt')
    if not os.path.exists(path):
        raise Refused(f'no checkpoint {path}; check the folder, or (sample.py, export.py) use '
                      '--checkpoint=last; best.pt begins after step 0, pruned: after prune_end')
    saved = load_checkpoint(path)
    known = {f.name for f in fields(GPTConfig)}
    told = saved['model']
    if differing := sorted(known ^ told.keys()):
        print(f"note: {path} and this model.py do not both know {', '.join(differing)}: ignored, "
              'or left at the default', file=sys.stderr)
    try:
        weights = {name: weight.float().contiguous()
                   for name, weight in unpack_weights(saved['weights']).items()}
        config = GPTConfig(**{name: told[name] for name in known & told.keys()})
        if config.n_layer > len(weights):
            raise ValueError(f'n_layer={config.n_layer}, and {len(weights)} tensors')
        with torch.device('meta'):  # no memory beyond that of the weights
            model = GPT(config)
        model.load_state_dict(weights, assign=True)
    except (ValueError, RuntimeError, TypeError, ArithmeticError) as error:
        reason = ' '.join(str(error).split())[:300]
        raise Refused(f'{path} does not fit this model.py: {reason}') from None
    return model.eval(), saved


# --- a GPT-2 in Hugging Face's format -------------------------------------------------------------

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


def read_gpt2(path):
    """({our name: float32 tensor}, GPTConfig) of a GPT-2; padded rows of the embedding are zeros.

    path: a folder with config.json and model.safetensors, or a name on the hub such as 'gpt2'.
    Refused, naming the file, if it is damaged or describes anything that our model is not.
    """
    folder = path if os.path.isdir(path) else download(path)
    config = gpt2_config(os.path.join(folder, 'config.json'))
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


def gpt2_config(path):
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
