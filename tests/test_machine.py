"""support/machine.py: which device, what is known of it."""
import pytest
import torch

from support.machine import find_machine, peak_memory


@pytest.fixture
def gpus(monkeypatch):
    """A function: this PyTorch sees so many GPUs of this name."""
    def pretend(count, name='NVIDIA H100 80GB HBM3'):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: count > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    return pretend


@pytest.mark.parametrize('device', ['cuda', 'cuda:1'])
def test_gpu_that_is_not_there(gpus, device):
    gpus(0)
    machine, problems = find_machine(device, 'auto')
    number = {'cuda': 0, 'cuda:1': 1}[device]
    assert problems == [
        f"device='{device}': GPU {number} is not among the 0 that this PyTorch "
        f'({torch.__version__}) sees; use --device=cpu or a build for your GPU']
    assert machine.device.type == 'cpu'


def test_device_must_have_a_known_name_and_number(gpus):
    gpus(2)
    [problem] = find_machine('cuda:2', 'auto')[1]
    assert problem.startswith("device='cuda:2': GPU 2 is not among the 2 that this PyTorch ")
    for wrong in ('gpu', 'cuda:', 'cuda:x', 'cpu:0', ''):
        assert find_machine(wrong, 'auto')[1] == [
            f"device='{wrong}': must be auto, cpu, cuda or cuda:N"]


def test_auto_takes_the_gpu_of_this_process_and_bfloat16(gpus, monkeypatch):
    gpus(4)
    monkeypatch.setenv('LOCAL_RANK', '2')
    monkeypatch.setenv('RANK', '6')
    monkeypatch.setenv('WORLD_SIZE', '8')
    machine, problems = find_machine('auto', 'auto')
    assert problems == [] and machine.device == torch.device('cuda:2')
    assert (machine.dtype, machine.rank, machine.world) == (torch.bfloat16, 6, 8)
    assert machine.peak_flops == 989e12  # NVIDIA's data sheet: dense bfloat16 of an H100 SXM
    assert find_machine('cuda:1', 'float32')[0].device == torch.device('cuda:1')


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA H100 PCIe', 756e12), ('NVIDIA L40S', 362e12), ('NVIDIA L4', 121e12),
    ('NVIDIA GeForce GTX 1080', None)])
def test_peak_is_of_the_card_that_is_meant(gpus, name, peak):
    gpus(1, name)
    assert find_machine('cuda', 'auto')[0].peak_flops == peak


def test_cpu_works_in_float32_and_has_no_known_peak(gpus):
    gpus(0)
    machine, problems = find_machine('auto', 'auto')
    assert problems == []
    assert (machine.device.type, machine.dtype) == ('cpu', torch.float32)
    assert (machine.rank, machine.world, machine.peak_flops) == (0, 1, None)
    assert find_machine('cpu', 'bfloat16')[0].dtype == torch.bfloat16


def test_peak_memory_of_a_cpu_is_that_of_the_process():
    before = peak_memory(torch.device('cpu'))
    block = torch.ones(100 * 2**18)  # 100 MiB, written
    after = peak_memory(torch.device('cpu'))
    assert after['allocated'] == after['reserved'] >= before['allocated'] > 2**20
    assert after['allocated'] >= block.nbytes
