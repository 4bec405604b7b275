"""To and from the Hugging Face GPT-2 format.

    python export.py out/best_50 out/best_50_hf --dtype=bfloat16

writes a folder that transformers' GPT2LMHeadModel.from_pretrained loads, if the logits it computes
from that are those of the run. The other way, fine-tuning or pruning a GPT-2, folder or hub name:

    python train.py config/best_50.py --init_from=hf:gpt2 --bias=True --out_dir=out/pretrained_50
"""
import os
import re
from dataclasses import dataclass
from typing import Literal

import torch

from model import GPT, GPTConfig, load_model, model_config
from support.files import read_json, write_atomically, write_folder, write_json
from support.settings import Refused, help_text, parse, run_command
from support.shards import EOT_TEXT, get_tokenizer


@dataclass
class ExportSettings:
    checkpoint: Literal['best', 'last'] = 'best'  # best validation loss, or the latest weights
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of all tensors in the file


# --- the format -----------------------------------------------------------------------------------

FILE = 'model.safetensors'
SIZES = dict(vocab_size='vocab_size', block_size='n_positions', n_layer='n_layer', n_head='n_head',
             n_embd='n_embd')  # fields of GPTConfig: keys of config.json
FIXED = {  # key of config.json: what our model can be where weights do not show it, default first
    'activation_function': ('gelu_new', 'gelu_pytorch_tanh'),
    'layer_norm_epsilon': (1e-5,),
    'scale_attn_weights': (True,),
    'scale_attn_by_inverse_layer_idx': (False,),
}
BLOCK = {  # our module: (theirs, shape of its weight in widths)
    'norm_1': ('ln_1', (1,)),
    'attention.qkv': ('attn.c_attn', (3, 1)),
    'attention.proj': ('attn.c_proj', (1, 1)),
    'norm_2': ('ln_2', (1,)),
    'mlp.fc': ('mlp.c_fc', (4, 1)),
    'mlp.proj': ('mlp.c_proj', (1, 4)),
}


def layout(config):
    """{our name: (name in the format, our shape)} of every parameter of a GPT-2 of this size."""
    C = config.n_embd
    parameters = {
        'token_embedding.weight': ('wte.weight', (config.vocab_size, C)),
        'position_embedding.weight': ('wpe.weight', (config.block_size, C)),
    }
    modules = {'norm': ('ln_f', (1,))}
    for n in range(config.n_layer):
        for ours, (theirs, widths) in BLOCK.items():
            modules[f'blocks.{n}.{ours}'] = (f'h.{n}.{theirs}', widths)
    for ours, (theirs, widths) in modules.items():
        shape = tuple(width * C for width in widths)
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
    problems = []
    for what, names in (('GPT-2 has no', extra), ('it lacks', missing)):
        more = f' and {len(names) - 3} more' if len(names) > 3 else ''
        if names:
            problems.append(f'{what} {", ".join(names[:3])}{more}')
    if problems:
        raise Refused(f'{told}: {", ".join(problems)}')


def gpt2_weights(model, told):
    """{our name: tensor} of a model as far as the format goes: no padded rows, zeros for biases
    that it does without. Refused, as `told`, if the format does not hold just these."""
    rows = model.config.vocab_size
    weights = {name: weight[:rows] if name == 'token_embedding.weight' else weight
               for name, weight in model.state_dict().items()}
    for name, (_, shape) in layout(model.config).items():
        if name.endswith('.bias'):
            weights.setdefault(name, torch.zeros(shape))
    check_parameters(weights, model.config, told)
    return weights


# --- reading --------------------------------------------------------------------------------------


def read_gpt2(path):
    """({our name: float32 tensor}, GPTConfig) of a GPT-2; padded rows of the embedding are zeros.

    path: a folder with config.json and model.safetensors, or a name on the hub such as 'gpt2'.
    Refused, naming the file, if it is damaged or describes anything that our model is not.
    """
    folder = os.path.expanduser(path)
    if not os.path.isdir(folder):
        folder = download(path)
    config = read_config(os.path.join(folder, 'config.json'))
    file = os.path.join(folder, FILE)
    tensors = read_tensors(file)
    head = tensors.pop('lm_head.weight', None)
    weights = {}
    for name, (theirs, _) in layout(config).items():
        if theirs in tensors:
            weights[name] = turned(theirs, tensors.pop(theirs)).float()
    check_parameters({**weights, **tensors}, config, f'{file} is another kind of model')
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise Refused(f'{file} holds NaN or infinity; use another model')
    embedding = weights['token_embedding.weight']
    if head is not None and not torch.equal(head.float(), embedding):
        raise Refused(f'{file}: lm_head.weight is not the token embedding, which is the head here; '
                      'use another model')
    padding = torch.zeros(config.padded_vocab_size - config.vocab_size, config.n_embd)
    weights['token_embedding.weight'] = torch.cat([embedding, padding])
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
    sizes = {key: theirs.get(key) for key in SIZES.values()}
    faults = [f'{key}={value!r} must be a positive integer'
              for key, value in sizes.items() if type(value) is not int or value < 1]
    for key, allowed in {'model_type': ('gpt2',), **FIXED}.items():
        if theirs.get(key, allowed[0]) not in allowed:
            faults.append(f'{key}={theirs[key]!r} must be {allowed[0]!r}')
    if faults:
        raise Refused([f'{path}: {fault}; use another model' for fault in faults])
    return GPTConfig(bias=True, **{ours: sizes[key] for ours, key in SIZES.items()})


def read_tensors(file):
    """{their name without 'transformer.': tensor} of a file; Refused if damaged or absent."""
    if not os.path.exists(file):
        raise Refused(f'{file} is missing; load other weights with transformers and save them as '
                      "one such file, save_pretrained(FOLDER, max_shard_size='100GB')")
    try:
        from safetensors.torch import load_file
        tensors = load_file(file)  # mapped: read from the disk when used
    except Exception as error:  # a dozen types for a damaged file
        raise Refused(f'{file} is damaged ({error}); get it again') from None
    masks = re.compile(r'\.attn\.(bias|masked_bias)$')  # causal ones, in files of 2019
    return {name.removeprefix('transformer.'): tensor
            for name, tensor in tensors.items() if not masks.search(name)}


# --- a run that starts from a GPT-2 ---------------------------------------------------------------


def starting_weights(settings, model):
    """{name: float32 tensor} that a new run starts from: those of `model`, drawn from the seed, or
    those of --init_from=hf:PATH, of whose positions it takes the first block_size."""
    if not settings.init_from.startswith('hf:'):
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    weights, _ = read_gpt2(settings.init_from.removeprefix('hf:'))
    positions = weights['position_embedding.weight'][:settings.block_size]
    return {**weights, 'position_embedding.weight': positions}


def pretrained_problems(settings, data):
    """Problems of the settings, and of the data unless None, with init_from=hf:PATH's GPT-2."""
    source = settings.init_from
    if not source.startswith('hf:'):
        return []
    try:
        _, theirs = read_gpt2(source.removeprefix('hf:'))
    except Refused as refused:
        return refused.problems
    problems = []
    for key in ('n_layer', 'n_head', 'n_embd', 'bias'):
        value = vars(theirs)[key]
        if vars(settings)[key] != value:
            problems.append(f'{key}={vars(settings)[key]!r}: {source} has {key}={value!r}; write '
                            f'--{key}={value!r}')
    if settings.block_size > theirs.block_size:
        problems.append(f'block_size={settings.block_size}: {source} has {theirs.block_size} '
                        f'positions; write --block_size={theirs.block_size} or less')
    if not problems:  # all sizes agree: is it built alike?
        try:
            with torch.device('meta'):
                ours = GPT(model_config(settings, theirs.vocab_size))
            gpt2_weights(ours, f'{source} does not fit the settings of attention and positions')
        except Refused as refused:
            problems += refused.problems
        except ValueError as error:  # settings that contradict each other
            problems.append(str(error))
    if data and data.vocab_size != theirs.vocab_size:
        problems.append(f'dataset={data.name!r}: {source} has {theirs.vocab_size} tokens, not the '
                        f'{data.vocab_size} of {data.tokenizer!r}; use text of its own tokenizer')
    return problems


# --- does somebody else's GPT-2 compute the same? -------------------------------------------------

TOLERANCE = 1e-4  # of the logits' standard deviation; rounding in float32 makes about 1e-6
PROMPTS = (
    'The theory of evolution explains how species change over time.',
    'In 1969, two men walked on the Moon; a third one waited in orbit.',
    '"Are you sure?" she asked. He wasn\'t, but he nodded.',
)


@torch.inference_mode()
def compare_logits(folder, model, tokenizer):
    """A line about how near the logits of `model` are to those of transformers' GPT-2 with the
    files in `folder`; Refused if they are not. tokenizer: for PROMPTS, None if there is none."""
    try:
        import transformers
    except ImportError:
        return 'logits: NOT COMPARED with anything; for that, pip install transformers'
    T = model.config.block_size
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.config.vocab_size, (T,), generator=generator)]
    if tokenizer:
        prompts += [torch.tensor(tokenizer.encode(text)[:T]) for text in PROMPTS]
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).float().eval()
    our_logits = torch.cat([model(prompt[None])[0] for prompt in prompts])  # (tokens, vocab_size)
    their_logits = torch.cat([theirs(prompt[None]).logits[0] for prompt in prompts])
    difference = ((our_logits - their_logits).abs().max() / our_logits.std()).item()
    told = f'{difference:.1e} standard deviations from transformers {transformers.__version__}'
    if not difference <= TOLERANCE:  # NaN is a difference
        raise Refused(f'the logits differ by {told}: this model computes something GPT-2 does not, '
                      'which the format cannot hold; compare its attention, activation and norms')
    return f'logits: at most {told}, on {len(prompts) - 1} prompts and {T} random tokens'


# --- writing --------------------------------------------------------------------------------------


def write_model(folder, model, weights, eot, dtype):
    """config.json, generation_config.json, model.safetensors. eot: token that ends a document."""
    from safetensors.torch import save
    config = model.config
    ends = dict(bos_token_id=eot, eos_token_id=eot)
    sizes = {key: vars(config)[ours] for ours, key in SIZES.items()}
    fixed = {key: allowed[0] for key, allowed in FIXED.items()}
    drops = {f'{where}_pdrop': config.dropout for where in ('embd', 'attn', 'resid')}
    write_json(os.path.join(folder, 'config.json'), dict(
        model_type='gpt2', architectures=['GPT2LMHeadModel'], torch_dtype=dtype,
        initializer_range=0.02, n_inner=None, **sizes, **fixed, **drops, **ends))
    write_json(os.path.join(folder, 'generation_config.json'), {'_from_model_config': True, **ends})
    tensors = {}
    for name, (theirs, _) in layout(config).items():
        stored = turned(theirs, weights[name]).to(getattr(torch, dtype))
        tensors[f'transformer.{theirs}'] = stored.contiguous()
    content = save(tensors, metadata={'format': 'pt'})
    write_atomically(os.path.join(folder, FILE), lambda f: f.write(content))


def write_tokenizer(folder, block_size):
    """vocab.json, merges.txt and tokenizer_config.json of GPT-2: OpenAI's files, which tiktoken
    has already fetched, under the names that transformers gives them."""
    from tiktoken.load import read_file_cached
    source = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main'
    for theirs, name in (('encoder.json', 'vocab.json'), ('vocab.bpe', 'merges.txt')):
        content = read_file_cached(f'{source}/{theirs}')
        write_atomically(os.path.join(folder, name), lambda f, content=content: f.write(content))
    ends = dict.fromkeys(('bos_token', 'eos_token', 'unk_token'), EOT_TEXT)
    write_json(os.path.join(folder, 'tokenizer_config.json'), dict(
        tokenizer_class='GPT2Tokenizer', model_max_length=block_size, add_prefix_space=False,
        clean_up_tokenization_spaces=False, **ends))


def export(model, tokenizer_name, out_dir, dtype):
    """Write the folder; returns lines about it. Refused, and no folder, if anything fails."""
    model.to(getattr(torch, dtype)).float()  # rounded like the file, so that the logits compare
    weights = gpt2_weights(model, 'this model is no GPT-2, use it with sample.py')
    eot = model.config.vocab_size - 1
    linear = [w for name, w in weights.items() if name.startswith('blocks.') and w.dim() == 2]
    lines = [f"zeros: {zeros(linear):.2%} of the blocks' linear weights, "
             f'{zeros(weights.values()):.2%} of all in the file']
    tokenizer = None
    try:
        tokenizer = get_tokenizer(tokenizer_name)
    except Refused as refused:
        lines.append(f'no tokenizer files: {refused}')

    def write(folder):
        write_model(folder, model, weights, eot, dtype)
        lines.append(compare_logits(folder, model, tokenizer))
        if tokenizer_name == 'bytes':
            lines.append(f'no tokenizer files: a token is a byte, {eot} ends a document')
        elif tokenizer:
            write_tokenizer(folder, model.config.block_size)

    try:
        write_folder(out_dir, write)
    except OSError as error:
        raise Refused(f"'{out_dir}' could not be written ({error.strerror or error}); choose "
                      'another folder') from None
    return lines


def zeros(weights):
    """Share of exact zeros in these tensors."""
    return 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def main(argv):
    """Export a run; returns the exit code."""
    if '--help' in argv or not argv:
        print(help_text(ExportSettings, __doc__))
        return 0 if argv else 2
    run_dir, out_dir = (argv + [''])[:2]
    settings, problems, _ = parse(ExportSettings, argv[2:], config_files=False)
    usage = 'usage: python export.py RUN_DIRECTORY OUT_DIRECTORY [--key=value ...]'
    if not os.path.isdir(run_dir):
        problems.append(f"'{run_dir}' is not a run directory; {usage}")
    if not out_dir or out_dir.startswith('--'):
        problems.append(f'no OUT_DIRECTORY; {usage}')
    elif os.path.lexists(out_dir) and not (os.path.isdir(out_dir) and not os.listdir(out_dir)):
        problems.append(f"'{out_dir}' is there already; choose another OUT_DIRECTORY or remove it")
    if problems:
        raise Refused(problems)
    model, saved = load_model(run_dir, settings.checkpoint)
    lines = export(model, saved['data']['tokenizer'], out_dir, settings.dtype)
    print(f"{out_dir}: {settings.checkpoint}.pt of step {saved['step']} in {settings.dtype}")
    print('\n'.join(lines))
    return 0


if __name__ == '__main__':
    run_command(main)
