"""Needs a GPU; run by hand: python -m pytest -m gpu -s"""
import json

import pytest
import torch
from conftest import assert_same_run, losses, train

import optim
from attention import attention_backend
from flat import flatten
from model import GPT, GPTConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]
ON_GPU = dict(device='cuda', compile=True, dtype='bfloat16', loss_chunk_tokens=512, n_embd=128, block_size=128, batch_size=8,
              eval_tokens=2560)


def summary(folder):
    return json.loads((folder / 'summary.json').read_text())


def test_compiles_without_breaks_and_learns(tiny, tmp_path):
    assert train.main(tiny(**ON_GPU, max_iters=60)) == 0
    result = summary(tmp_path / 'run')
    # blocks and loss, each with and without gradients; updates of blocks, embeddings and vectors
    assert result['compiled_graphs'] == 7 and result['graph_breaks'] == 0
    assert result['val_loss'] < 4.0 and result['rung'] == 0


@pytest.mark.parametrize('compiled', [False, True])
def test_deterministic_run_repeats_and_resumes_to_the_bit(tiny, tmp_path, compiled):
    common = {**ON_GPU, 'compile': compiled, 'deterministic': True, 'dropout': 0.1, 'lr_decay_iters': 12}
    train.main(tiny(**common, max_iters=12, out_dir=tmp_path / 'straight'))
    train.main(tiny(**common, max_iters=6, out_dir=tmp_path / 'split'))
    train.main(tiny(**common, max_iters=12, out_dir=tmp_path / 'split', init_from='resume'))
    assert_same_run(tmp_path / 'straight', tmp_path / 'split')
    torch.use_deterministic_algorithms(False)


def test_memory_ladder_keeps_the_effective_batch(tiny, tmp_path):
    big = {**ON_GPU, 'n_layer': 8, 'n_embd': 512, 'n_head': 8, 'block_size': 256, 'batch_size': 32, 'gradient_accumulation_steps': 1,
           'max_iters': 6, 'log_interval': 1, 'eval_tokens': 2560, 'loss_chunk_tokens': 4096}
    train.main(tiny(**big, out_dir=tmp_path / 'free'))
    free = summary(tmp_path / 'free')
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * free['peak_memory_bytes'] / total)
    try:
        assert train.main(tiny(**big, out_dir=tmp_path / 'capped')) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    capped = summary(tmp_path / 'capped')
    print(f"free: {free['peak_memory_bytes'] / 2**20:.0f} MiB; capped: {capped['peak_memory_bytes'] / 2**20:.0f} MiB, rung "
          f"{capped['rung']} ({capped['rung_label']})")
    assert capped['rung'] >= 1 and capped['effective_batch'] == free['effective_batch'] == 32
    for step, loss in losses(tmp_path / 'free').items():
        assert abs(loss - losses(tmp_path / 'capped')[step]) < 0.02


def test_compiled_update_equals_its_plain_twin():
    torch.manual_seed(0)
    flats = [torch.randn(100_003, device='cuda') for _ in range(4)]
    scalars = [torch.tensor(x, device='cuda') for x in (0.7, True, 0.99, 1e-3, 0.2)]
    results = []
    for function in (optim.adamw_update, torch.compile(optim.adamw_update, fullgraph=True, dynamic=False)):
        w, g, m, v = (x.clone() for x in flats)
        v.abs_()
        working = w.bfloat16()
        function(w, g, m, v, working, *scalars, beta1=0.9, beta2=0.95, eps=1e-8)
        results.append((w, m, v, working))
    for a, b in zip(*results):
        assert torch.allclose(a.float(), b.float(), rtol=1e-6, atol=1e-7) or a.dtype == torch.bfloat16


def test_bfloat16_loss_and_gradients_stay_near_float64():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=500, block_size=64, n_layer=2, n_head=2, n_embd=64, loss_chunk_tokens=100)
    exact = GPT(config).cuda().double()
    model = GPT(config).cuda()
    model.load_state_dict(exact.state_dict())
    flats = flatten(model, torch.bfloat16)
    idx, targets = torch.randint(500, (2, 4, 64), device='cuda')
    exact(idx, targets).backward()
    model(idx, targets).backward()
    gradients = {name: grad for flat in flats for name, grad in flat.views(flat.parameter.main_grad).items()}
    for name, p in exact.named_parameters():
        error = (gradients[name].double() - p.grad).norm() / p.grad.norm()
        assert error < 2e-2, (name, error)


def test_attention_is_fused():
    assert attention_backend(GPTConfig(), 4, 'cuda', torch.bfloat16) in ('flash', 'cudnn', 'memory-efficient')
