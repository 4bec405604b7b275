"""To and from the Hugging Face GPT-2 format.

    python export.py out/best_50 out/best_50_hf --dtype=bfloat16

writes a folder that transformers' GPT2LMHeadModel.from_pretrained loads. The other way, fine-tuning or pruning a GPT-2
from a folder or from the hub:

    python train.py config/best_50.py --init_from=hf:gpt2 --bias=True --out_dir=out/pretrained_50
"""
import math
import os
import re
from dataclasses import dataclass, replace
from typing import Literal

import torch

from files import read_json, write_atomically, write_folder, write_json
from model import GPT, GPTConfig
from rundir import load_model
from settings import Refused, help_text, parse, run_command
from shards import EOT_TEXT, VOCABULARY, get_tokenizer

# config.json: what our model can be; the first value is the format's default and what we write.
FIXED = {'activation_function': ('gelu_new', 'gelu_pytorch_tanh'), 'layer_norm_epsilon': (1e-5,), 'scale_attn_weights': (True,),
         'scale_attn_by_inverse_layer_idx': (False,), 'reorder_and_upcast_attn': (False,), 'add_cross_attention': (False,),
         'tie_word_embeddings': (True,)}
SIZES = {'vocab_size': 'vocab_size', 'block_size': 'n_positions', 'n_layer': 'n_layer', 'n_head': 'n_head', 'n_embd': 'n_embd'}
PARTS = {'token_embedding': 'wte', 'position_embedding': 'wpe', 'blocks': 'h', 'norm_1': 'ln_1', 'norm_2': 'ln_2', 'attention': 'attn',
         'qkv': 'c_attn', 'fc': 'c_fc', 'proj': 'c_proj', 'norm': 'ln_f'}


@dataclass
class ExportSettings:
    checkpoint: Literal['best', 'last'] = 'best'  # weights with the best validation loss, or the latest
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of all tensors in the file


def problems_of(settings):
    """What of a run's settings (a dict, of whatever version) the format has no place for, one line each."""
    problems = []
    if settings.get('attention', 'mha') != 'mha':
        problems.append(f"attention={settings['attention']!r}: GPT-2's format has multi-head attention only")
    if settings.get('ra_alpha', 0) != 0 or settings.get('ra_learned', False):
        told = ' '.join(f'{key}={settings[key]!r}' for key in ('ra_alpha', 'ra_learned') if settings.get(key))
        problems.append(f"{told}: GPT-2's format has no reciprocal attention")
    return problems


# --- the two layouts ---------------------------------------------------------------------------------


def layout(config):
    """{our name: (their name, our shape without padded rows, whether theirs is transposed)} of a model with biases.

    Their linear layers (Conv1D) keep weights as (inputs, outputs); names are without the prefix 'transformer.'.
    """
    with torch.device('meta'):
        model = GPT(replace(config, bias=True))
    out = {}
    for name, p in model.named_parameters():
        shape = (config.vocab_size, config.n_embd) if name == 'token_embedding.weight' else tuple(p.shape)
        out[name] = ('.'.join(PARTS.get(part, part) for part in name.split('.')), shape, name.startswith('blocks.') and p.dim() == 2)
    return out


def to_gpt2(weights, config, dtype):
    """{their name: tensor} of {our name: tensor}. Biases that a model does without become zeros: theirs always has them."""
    tensors = {}
    for name, (theirs, shape, transposed) in layout(config).items():
        w = weights[name][:shape[0]] if name in weights else torch.zeros(shape)
        tensors[f'transformer.{theirs}'] = (w.t() if transposed else w).to(dtype).contiguous()
    return tensors


def from_gpt2(tensors, config, file):
    """{our name: float32 tensor} of {their name: tensor}; Refused, naming `file`, unless they are all there and nothing else is.

    Padded rows of the token embedding are zeros: they take no probability, get no gradient, and pruning may well
    take them first.
    """
    prefix = 'transformer.'
    found = {name.removeprefix(prefix): t for name, t in tensors.items() if not re.search(r'\.attn\.(bias|masked_bias)$', name)}
    head, expected, weights, faults = found.pop('lm_head.weight', None), layout(config), {}, []
    unknown = sorted(found.keys() - {theirs for theirs, _, _ in expected.values()})
    for name, (theirs, shape, transposed) in expected.items():
        w, stored = found.get(theirs), shape[::-1] if transposed else shape
        if w is None:
            faults.append(f'{theirs} is missing')
        elif tuple(w.shape) != stored:
            faults.append(f'{theirs} has shape {tuple(w.shape)}, config.json asks for {stored}')
        elif w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            faults.append(f'{theirs} is of {str(w.dtype)[6:]}, not of float32, float16 or bfloat16')
        elif not w.isfinite().all():
            faults.append(f'{theirs} holds NaN or infinity')
        else:
            weights[name] = (w.t() if transposed else w).float()
    faults += [f'{name} is not part of a GPT-2 with n_layer={config.n_layer}' for name in unknown]
    if head is not None and not torch.equal(head, found.get('wte.weight', head[:0])):
        faults.append('lm_head.weight differs from the token embedding, which the head is tied to here')
    if faults:
        more = f' (and {len(faults) - 1} more faults)' if len(faults) > 1 else ''
        raise Refused(f'{file}: {faults[0]}{more}; it is another kind of model or damaged: get it again or use another')
    padding = torch.zeros(config.padded_vocab_size - config.vocab_size, config.n_embd)
    weights['token_embedding.weight'] = torch.cat([weights['token_embedding.weight'], padding])
    return weights


# --- reading -----------------------------------------------------------------------------------------


def read_gpt2(path):
    """(weights, GPTConfig) of a GPT-2: {our name: float32 tensor, the embedding padded}, dropout left at 0.

    path: a folder with config.json and model.safetensors (or pytorch_model.bin), or a name on the hub such as 'gpt2'.
    Refused, naming the file, if it is damaged or describes anything that our model is not.
    """
    folder = os.path.expanduser(path)
    if not os.path.isdir(folder):
        folder = download(path, 'model.safetensors')
        if not holds_weights(folder):
            folder = download(path, 'pytorch_model.bin')
    config = read_config(os.path.join(folder, 'config.json'))
    file, tensors = read_tensors(folder)
    return from_gpt2(tensors, config, file), config


def download(name, weights):
    """Folder of the hub's cache that holds config.json of the repository `name` and, if it has that file, its `weights`."""
    if os.path.exists(name) or not re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*)?', name):
        raise Refused(f"'{name}' is not a folder; give one with config.json and model.safetensors, or a name on the hub such as gpt2")
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=['config.json', weights])
    except Exception as error:  # a dozen types: no network, no such name, not allowed, not installed
        raise Refused(f"'{name}' is not a folder, and cannot be had from the hub ({brief(error)}); check the name, or get it where "
                      f'there is a network, with: hf download {name} config.json model.safetensors --local-dir FOLDER, and name the '
                      'FOLDER') from None


def brief(error):
    """Type and first line of an exception."""
    return f'{type(error).__name__}: {(str(error).strip() or "-").splitlines()[0]}'[:160].rstrip()


def read_config(path):
    """GPTConfig of a config.json; Refused, with every reason, if our model cannot be that."""
    try:
        theirs = read_json(path)
    except OSError as error:
        raise Refused(f'{path}: cannot be read ({error.strerror}); check its permissions') from None
    if not isinstance(theirs, dict):
        raise Refused(f'{path} is missing' if theirs is None else f'{path} is damaged: no JSON object; get it again')
    if theirs.get('model_type') != 'gpt2':
        raise Refused(f"{path}: model_type={theirs.get('model_type')!r}, but only 'gpt2' can be read; use another model")
    problems = [f'{path}: {key}={theirs.get(key)!r} is not a positive integer; get it again' for key in SIZES.values()
                if type(theirs.get(key)) is not int or theirs[key] < 1]
    problems += [f'{path}: {key}={theirs[key]!r}, but our GPT-2 has {allowed[0]!r}; use another model' for key, allowed in FIXED.items()
                 if theirs.get(key, allowed[0]) not in allowed]
    if not problems and theirs['n_embd'] % theirs['n_head']:
        problems.append(f"{path}: n_embd={theirs['n_embd']} is not a multiple of n_head={theirs['n_head']}; get it again")
    if not problems and theirs.get('n_inner') not in (None, 4 * theirs['n_embd']):
        problems.append(f"{path}: n_inner={theirs['n_inner']!r}, but our GPT-2 has 4 n_embd = {4 * theirs['n_embd']}; use another model")
    if problems:
        raise Refused(problems)
    return GPTConfig(bias=True, **{ours: theirs[key] for ours, key in SIZES.items()})


WEIGHTS = ('model.safetensors', 'pytorch_model.bin')


def holds_weights(folder):
    return any(os.path.exists(os.path.join(folder, name)) for name in WEIGHTS)


def read_tensors(folder):
    """(path of the file, {name: tensor}) of the weights in a folder; Refused if there are none or they are damaged."""
    if not holds_weights(folder):
        sharded = any(f.endswith('.index.json') for f in os.listdir(folder))
        raise Refused(f'{folder} holds neither {" nor ".join(WEIGHTS)}' + (
            "; weights in several files are not read, save them again as one, with max_shard_size='100GB'" if sharded else ''))
    path = next(path for path in (os.path.join(folder, name) for name in WEIGHTS) if os.path.exists(path))
    try:
        if path.endswith('.safetensors'):
            from safetensors.torch import load_file
            tensors = load_file(path)  # mapped: read from the disk when used
        else:
            tensors = torch.load(path, map_location='cpu', weights_only=True)  # runs no code of the file
        if isinstance(tensors, dict) and all(torch.is_tensor(t) for t in tensors.values()):
            return path, tensors
        reason = 'it holds other things than tensors'
    except Exception as error:  # a dozen types for a damaged file
        reason = brief(error)
    raise Refused(f'{path} is damaged or no file of weights ({reason}); get it again')


def starting_weights(s, model):
    """{name: float32 tensor} that a new run of these Settings starts from: those of `model`, drawn from the seed, or
    those of --init_from=hf:PATH, of whose positions it takes the first block_size."""
    if not s.init_from.startswith('hf:'):
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    weights, _ = read_gpt2(s.init_from[3:])
    return {**weights, 'position_embedding.weight': weights['position_embedding.weight'][:s.block_size]}


# --- writing -----------------------------------------------------------------------------------------


def exportable_run(run_dir, checkpoint):
    """load_model of a run that the format has a place for; Refused if it has none."""
    model, saved = load_model(run_dir, checkpoint)
    if problems := problems_of(saved['settings']):
        raise Refused([f'{run_dir}: {problem}; such a run can be evaluated with: python sample.py {run_dir} --score=FILE'
                       for problem in problems])
    return model, saved


def write_model(folder, model, eot, dtype):
    """config.json, generation_config.json and model.safetensors. eot: number of the token that ends a document."""
    from safetensors.torch import save
    config, tokens = model.config, dict(bos_token_id=eot, eos_token_id=eot)
    write_json(os.path.join(folder, 'config.json'), dict(
        model_type='gpt2', architectures=['GPT2LMHeadModel'], **{key: getattr(config, ours) for ours, key in SIZES.items()}, n_inner=None,
        **{key: allowed[0] for key, allowed in FIXED.items()}, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
        resid_pdrop=config.dropout, initializer_range=0.02, torch_dtype=dtype, **tokens))
    write_json(os.path.join(folder, 'generation_config.json'), dict(_from_model_config=True, **tokens))
    content = save(to_gpt2(model.state_dict(), config, getattr(torch, dtype)), metadata={'format': 'pt'})
    write_atomically(os.path.join(folder, 'model.safetensors'), lambda f: f.write(content))


def write_tokenizer(folder, tokenizer, block_size):
    """vocab.json, merges.txt and tokenizer_config.json of a byte-pair encoding that tiktoken has."""
    encoding, letter = tokenizer.encoding, byte_alphabet()
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}

    def spelt(token):
        return ''.join(letter[byte] for byte in token)

    ordered = sorted(ranks, key=ranks.get)
    merges = [' '.join(map(spelt, merge_of(token, ranks))) for token in ordered if len(token) > 1]
    write_json(os.path.join(folder, 'vocab.json'), {**{spelt(token): ranks[token] for token in ordered}, EOT_TEXT: tokenizer.eot})
    text = '\n'.join(['#version: 0.2', *merges]) + '\n'
    write_atomically(os.path.join(folder, 'merges.txt'), lambda f: f.write(text.encode()))
    write_json(os.path.join(folder, 'tokenizer_config.json'), dict(
        tokenizer_class='GPT2Tokenizer', model_max_length=block_size, bos_token=EOT_TEXT, eos_token=EOT_TEXT, unk_token=EOT_TEXT,
        add_prefix_space=False, clean_up_tokenization_spaces=False))


def byte_alphabet():
    """{byte: character} of GPT-2's files: itself where Latin-1 has a visible character, the others in order from U+0100 on."""
    visible, others = {*range(0x21, 0x7F), *range(0xA1, 0x100)} - {0xAD}, iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in visible else next(others)) for byte in range(256)}


def merge_of(token, ranks):
    """The two tokens that merge into `token` (bytes): its bytes, merged in the order of the ranks until two are left."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


@torch.inference_mode()
def check_export(folder, model, dtype):
    """Largest difference of a logit between `model` and what the files say, read as a user would: on a sequence of
    block_size random tokens. Refused if a weight is not, to the bit, the model's in `dtype`."""
    weights, config = read_gpt2(folder)
    for name, w in model.state_dict().items():
        rows = config.vocab_size if name == 'token_embedding.weight' else None
        if not torch.equal(w[:rows].to(getattr(torch, dtype)).float(), weights[name][:rows]):
            raise Refused(f'{folder}: {name} was read back with other values than were written; is the disk in order?')
    again = GPT(config).eval()
    again.load_state_dict(weights)
    tokens = torch.randint(config.vocab_size, (1, config.block_size), generator=torch.Generator().manual_seed(0))  # (B, T)
    return (model(tokens) - again(tokens)).abs().max().item()


def share_of_zeros(weights):
    return 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def export(model, saved, out_dir, dtype):
    """Write the folder; returns the lines that tell what was written. Refused, and no folder, if anything fails."""
    name, lines = saved['data']['tokenizer'], []

    def write(folder):
        write_model(folder, model, VOCABULARY[name] - 1, dtype)
        difference = check_export(folder, model, dtype)
        lines.append(f'largest logit difference {difference:.2e}, of the files read back against the run, {model.config.block_size} '
                     'random tokens')
        if name == 'bytes':
            lines.append(f'no tokenizer files: a token is a byte, {VOCABULARY[name] - 1} ends a document')
            return
        try:
            write_tokenizer(folder, get_tokenizer(name), model.config.block_size)
        except Refused as refused:
            lines.append(f'no tokenizer files: {refused}')

    try:
        write_folder(out_dir, write)
    except OSError as error:
        raise Refused(f"'{out_dir}' could not be written ({error.strerror or error}); choose another folder") from None
    return lines


def main(argv):
    """Export a run; returns the exit code."""
    if '--help' in argv or not argv:
        print(help_text(ExportSettings, __doc__))
        return 0 if argv else 2
    (run_dir, out_dir), (s, problems) = (argv + [''])[:2], parse(ExportSettings, argv[2:], config_files=False)
    if not os.path.isdir(run_dir):
        problems.append(f"'{run_dir}' is not a run directory; usage: python export.py RUN_DIRECTORY OUT_DIRECTORY [--key=value ...]")
    if not out_dir or out_dir.startswith('--'):
        problems.append('no OUT_DIRECTORY; usage: python export.py RUN_DIRECTORY OUT_DIRECTORY [--key=value ...]')
    elif os.path.lexists(out_dir) and not (os.path.isdir(out_dir) and not os.listdir(out_dir)):
        problems.append(f"'{out_dir}' is there already; choose another OUT_DIRECTORY or remove it")
    if problems:
        raise Refused(problems)
    model, saved = exportable_run(run_dir, s.checkpoint)
    lines = export(model, saved, out_dir, s.dtype)
    weights = {name: w[:model.config.vocab_size] if name == 'token_embedding.weight' else w for name, w in model.state_dict().items()}
    matrices = [w for name, w in weights.items() if name.startswith('blocks.') and w.dim() == 2]
    step = saved['step'] if 'step' in saved else saved['progress']['step']
    print(f'{out_dir}: {s.checkpoint}.pt of step {step}, {sum(w.numel() for w in weights.values()):,} parameters in {s.dtype}')
    print(f"zeros: {share_of_zeros(matrices):.2%} of the blocks' linear weights, {share_of_zeros(weights.values()):.2%} of all parameters")
    print('\n'.join(lines))
    return 0


if __name__ == '__main__':
    run_command(main)
