"""Small models of the tests, and what is counted of a model whatever its layers are."""
from types import SimpleNamespace

import torch
from conftest import TINY

from model import GPT, GPTConfig, model_config

SMALL = dict(vocab_size=131, block_size=48, n_layer=2, n_head=4, n_embd=32, loss_chunk_tokens=24)
MLA = dict(attention='mla', latent_dim=12)
RA = dict(ra_learned=True, ra_alpha=0.7, ra_window=5)
CACHED = {
    'mha': {},
    'mha, biases': dict(bias=True),
    'mha, rotary': dict(positions='rotary'),
    'gqa': dict(n_kv_head=2),
    'mqa, rotary': dict(n_kv_head=1, positions='rotary'),
    'mla': MLA,
    'mla, biases': dict(MLA, bias=True),
    'mla, rotary': dict(MLA, positions='rotary'),
}
RECIPROCAL = {
    'ra': RA,
    'ra fixed, diagonal': dict(ra_alpha=-0.6, ra_window=0),
    'ra everywhere': dict(RA, ra_window=-1),
    'ra, rotary': dict(RA, positions='rotary'),
    'ra, mla': {**MLA, **RA},
    'ra everywhere, mla, rotary': {**MLA, **RA, 'ra_window': -1, 'positions': 'rotary'},
}


def lively(**told):
    """A model in eval mode whose tokens all matter to each other."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **told})).eval()
    with torch.no_grad():
        for name, p in model.blocks.named_parameters():
            if p.dim() == 2 and 'attention' in name:
                p.mul_(6)
            p.add_(0.1 * torch.randn_like(p))
    return model


def tiny_model(**changes):
    """The model of a run that conftest's tiny(**changes) describes, without weights."""
    with torch.device('meta'):
        return GPT(model_config(SimpleNamespace(**{**TINY, **changes}), vocab_size=257))


def block_matrices(model):
    """[parameter]: the matrices of the blocks, which pruning's scope 'blocks' is."""
    return [p for p in model.blocks.parameters() if p.dim() == 2]


def text(model, rows=3, T=None):
    """Tokens (rows, T); T None: block_size."""
    draw = torch.Generator().manual_seed(1)
    shape = (rows, T or model.config.block_size)
    return torch.randint(model.config.vocab_size, shape, generator=draw)


def shaken(model):
    """With every parameter far enough from its initial value that each of them matters."""
    torch.manual_seed(5)
    for p in model.parameters():
        p.data += 0.15 * torch.randn_like(p)
    return model.eval()


@torch.no_grad()
def difference(ours, theirs):
    """Largest difference of a logit of our model from that of transformers, on random tokens."""
    tokens = torch.randint(ours.config.vocab_size, (3, ours.config.block_size))
    logits = theirs(tokens).logits
    assert logits.shape[-1] == ours.config.vocab_size and logits.std() > 0.01
    return (ours(tokens) - logits).abs().max().item()
