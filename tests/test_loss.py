"""The chunked loss against float64 cross-entropy, and its kernel against its plain twin."""
import os

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import loss
from kernels.loss import ChunkedCrossEntropy, chunked_loss, fastest_chunk, loss_chunk

VOCAB = 100  # of 128 rows
interpreted = pytest.mark.skipif(not loss.triton or not os.environ.get('TRITON_INTERPRET'),
                                 reason='needs TRITON_INTERPRET=1 and Triton')
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_batch(tokens=50, width=12, vocab_size=VOCAB):
    """x (tokens, width), weight (padded vocabulary, width) in float64; targets, some not scored."""
    rows = -(-vocab_size // 128) * 128
    draw = torch.Generator().manual_seed(2)
    targets = torch.randint(vocab_size, (tokens,), generator=draw)
    targets[::7] = -1
    targets[1] = 0
    targets[2] = vocab_size - 1
    return drawn(tokens, width), drawn(rows, width, seed=1), targets


def of_torch(x, weight, targets):
    """(loss, gradient of x, gradient of weight) of torch's cross-entropy over all logits."""
    x = x.detach().requires_grad_()
    weight = weight.detach().requires_grad_()
    expected = F.cross_entropy((x @ weight.t())[:, :VOCAB], targets, ignore_index=-1)
    return expected.detach(), *torch.autograd.grad(expected, (x, weight))


@pytest.mark.parametrize('chunk', [1, 7, 16, 50, 1000])
def test_chunked_loss_is_cross_entropy_in_float64(chunk):
    x, weight, targets = a_batch()
    grad_weight = torch.zeros_like(weight)
    mean, grad_x = chunked_loss(x, weight, targets, VOCAB, chunk, grad_weight=grad_weight)
    for ours, theirs in zip((mean, grad_x, grad_weight), of_torch(x, weight, targets)):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    assert (grad_weight[VOCAB:] == 0).all()
    alone, nothing = chunked_loss(x, weight, targets, VOCAB, chunk)
    assert torch.equal(alone, mean) and nothing is None


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5),
                                              (torch.bfloat16, 2e-2)])
def test_its_gradients_are_scaled_by_what_follows(dtype, tolerance):
    """As a mean over micro-batches does; in bfloat16 the loss itself stays float32."""
    x, weight, targets = a_batch()
    x = x.to(dtype).requires_grad_()
    weight = weight.to(dtype).requires_grad_()
    mean = ChunkedCrossEntropy.apply(x, weight, targets, VOCAB, 16, loss_chunk)
    (mean / 4).backward()
    expected = of_torch(x.double(), weight.double(), targets)
    assert mean.dtype == torch.promote_types(dtype, torch.float32)
    for ours, theirs in zip((mean, x.grad * 4, weight.grad * 4), expected):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_a_batch_in_which_nothing_is_scored_has_loss_zero():
    x, weight, targets = a_batch()
    grad_weight = torch.zeros_like(weight)
    mean, grad_x = chunked_loss(x, weight, torch.full_like(targets, -1), VOCAB, 16,
                                grad_weight=grad_weight)
    assert mean == 0 and grad_x.count_nonzero() == grad_weight.count_nonzero() == 0


def test_all_logits_never_exist_at_once():
    """No tensor of tokens x vocabulary elements is made, forward or backward."""
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if torch.is_tensor(out):
                largest[0] = max(largest[0], out.numel())
            return out

    x, weight, targets = a_batch(tokens=512, vocab_size=5000)
    with Watch():
        ChunkedCrossEntropy.apply(x.requires_grad_(), weight, targets, 5000, 32,
                                  loss_chunk).backward()
    assert largest[0] < 512 * 5000 / 4
    assert largest[0] >= 32 * 5000  # the watch does see a chunk's logits


def test_the_plain_way_is_taken_where_there_is_no_kernel():
    def compiled(*arguments):
        return loss_chunk(*arguments)
    assert fastest_chunk(torch.zeros(1), compiled) is compiled


# --- the kernel -----------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize('vocab_size', [5, 600, 4090, 4096, 9000])
def test_kernel_is_its_twin(vocab_size):
    """In Triton's interpreter, on a CPU."""
    compare_with_twin('cpu', torch.float32, 1e-5, vocab_size, tokens=9)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize('vocab_size', [5, 4096, 50257])
def test_compiled_kernel_is_its_twin(dtype, tolerance, vocab_size):
    compare_with_twin('cuda', dtype, tolerance, vocab_size, tokens=300)


def compare_with_twin(device, dtype, tolerance, vocab_size, tokens):
    x, weight, targets = a_batch(tokens, 64, vocab_size)
    x = x.to(device, dtype)
    weight = (0.2 * weight).to(device, dtype)  # logits of 1.6
    targets = targets.to(device)
    scored = (targets >= 0).sum()
    before = 1e-4 * drawn(*weight.shape, seed=3).to(device)  # as small as what is added
    sums = before.float()
    exact_sums = sums.double()
    ours = loss.loss_chunk_fused(x, weight, targets, scored, vocab_size, sums)
    exact = loss_chunk(x.double(), weight.double(), targets, scored, vocab_size, exact_sums)
    added = sums.double() - before.float().double()
    exact_added = exact_sums - before.float().double()
    for a, b in zip((*ours, added), (*exact, exact_added)):
        assert (a.double() - b).norm() <= tolerance * b.norm()
    alone, nothing = loss.loss_chunk_fused(x, weight, targets, scored, vocab_size, None)
    assert nothing is None and alone == ours[0]
