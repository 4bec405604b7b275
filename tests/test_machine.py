"""support/machine.py: which device, what is known of it."""
import sys

import pytest
import torch

from support.machine import find_machine, memory_figures, peak_memory


@pytest.fixture
def gpus(monkeypatch):
    """A function: this PyTorch sees so many GPUs of this name and compute capability."""
    def pretend(count, name='NVIDIA H100 80GB HBM3', capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: count > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    return pretend


FIX = 'use --device=cpu, a build for your GPU, or no more processes than there are GPUs'


@pytest.mark.parametrize('device', ['cuda', 'cuda:1'])
def test_gpu_that_is_not_there(gpus, device):
    gpus(0)
    machine, problems = find_machine(device, 'auto')
    number = {'cuda': 0, 'cuda:1': 1}[device]
    assert problems == [
        f"device='{device}': GPU {number} is not among the 0 that this PyTorch "
        f'({torch.__version__}) sees; {FIX}']
    assert machine.device.type == 'cpu'


def test_device_must_have_a_known_name_and_number(gpus):
    gpus(2)
    [problem] = find_machine('cuda:2', 'auto')[1]
    assert problem.startswith("device='cuda:2': GPU 2 is not among the 2 that this PyTorch ")
    for wrong in ('gpu', 'cuda:', 'cuda:x', 'cpu:0', '', 'cuda:' + '1' * 5000):
        assert find_machine(wrong, 'auto')[1] == [
            f"device='{wrong}': must be auto, cpu, cuda or cuda:N"]


def test_auto_takes_the_gpu_of_this_process_and_bfloat16(gpus, monkeypatch):
    gpus(4)
    monkeypatch.setenv('LOCAL_RANK', '2')
    monkeypatch.setenv('RANK', '6')
    monkeypatch.setenv('WORLD_SIZE', '8')
    monkeypatch.setenv('MASTER_ADDR', 'localhost')
    monkeypatch.setenv('MASTER_PORT', '29500')
    machine, problems = find_machine('auto', 'auto')
    assert problems == [] and machine.device == torch.device('cuda:2')
    assert (machine.dtype, machine.rank, machine.world) == (torch.bfloat16, 6, 8)
    assert machine.peak_flops == 989e12  # NVIDIA's data sheet: dense bfloat16 of an H100 SXM
    assert find_machine('cuda:1', 'float32')[0].device == torch.device('cuda:1')


@pytest.mark.parametrize('name, capability', [('Tesla V100-SXM2-16GB', (7, 0)),
                                              ('Tesla T4', (7, 5))])
def test_a_gpu_that_only_imitates_bfloat16_works_in_float32(gpus, name, capability):
    gpus(1, name, capability)
    machine, problems = find_machine('auto', 'auto')
    assert problems == [] and machine.device == torch.device('cuda:0')
    assert machine.dtype == torch.float32
    assert machine.name == f'{name} (without bfloat16)'  # the preflight table says it
    assert find_machine('cuda', 'bfloat16')[0].dtype == torch.bfloat16  # who asks for it gets it
    gpus(1, 'NVIDIA A100', (8, 0))
    machine, _ = find_machine('auto', 'auto')
    assert (machine.dtype, machine.name) == (torch.bfloat16, 'NVIDIA A100')


def test_apples_gpu_is_refused_with_the_reason(gpus):
    gpus(0)
    assert find_machine('mps', 'auto')[1] == [
        "device='mps': up to PyTorch 2.12.1 its causal attention in half precision sees future "
        'keys (pytorch#195910); use --device=cpu']


@pytest.mark.parametrize('environment, told', [
    (dict(RANK='', WORLD_SIZE='x2', LOCAL_RANK='-1'), "RANK='' WORLD_SIZE='x2' LOCAL_RANK='-1'"),
    (dict(RANK='9' * 5000), f"RANK='{'9' * 29} WORLD_SIZE=None LOCAL_RANK=None"),
    (dict(RANK='3', WORLD_SIZE='2', MASTER_ADDR='a', MASTER_PORT='1'), "RANK='3' WORLD_SIZE='2'"),
    (dict(RANK='1'), "RANK='1' WORLD_SIZE=None"),
    (dict(WORLD_SIZE='2'), "RANK=None WORLD_SIZE='2' LOCAL_RANK=None MASTER_ADDR=None "),
    (dict(RANK='0', WORLD_SIZE='2', MASTER_ADDR='', MASTER_PORT='1'),
     "RANK='0' WORLD_SIZE='2' LOCAL_RANK=None MASTER_ADDR='' MASTER_PORT='1'"),
    (dict(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0'), ''),
])
def test_launcher_variables_that_make_no_sense(gpus, monkeypatch, environment, told):
    gpus(0)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    machine, problems = find_machine('cpu', 'auto')
    assert (machine.rank, machine.world) == (0, 1)
    if told:
        [problem] = problems
        assert problem.startswith(told) and problem.endswith(
            ' in the environment are no place among processes; start several with torchrun, or '
            'unset these for a single one')
    else:
        assert problems == []


def test_more_processes_than_gpus(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv('LOCAL_RANK', '2')
    assert find_machine('auto', 'auto')[1] == [
        f"device='auto': GPU 2 is not among the 2 that this PyTorch ({torch.__version__}) sees; "
        f'{FIX}']


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


def test_peak_memory_is_unknown_where_python_cannot_say(monkeypatch):
    monkeypatch.setitem(sys.modules, 'resource', None)  # as on Windows
    assert peak_memory(torch.device('cpu')) == dict(allocated=0, reserved=0)


def test_memory_figures_keep_the_compiling_apart():
    peaks = [dict(allocated=a, reserved=r) for a, r in ((9, 12), (4, 6), (6, 8))]
    assert memory_figures(peaks) == dict(compile_peak_bytes=9, peak_memory_bytes=9,
                                         mean_memory_bytes=5, peak_reserved_bytes=12,
                                         mean_reserved_bytes=7)
