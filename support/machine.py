"""The device a program runs on: which, how fast, how much memory it took."""
import os
import re
import sys
from typing import NamedTuple

import torch

# Dense bfloat16 FLOP/s, from the vendors' data sheets, of the first name that the device's holds.
PEAK_FLOPS = {
    'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'GH200': 989e12,
    'A100': 312e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'A10G': 70e12,
    'RTX 5090': 210e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12,
    'MI355X': 2500e12, 'MI325X': 1307e12, 'MI300X': 1307e12, 'MI250': 181e12,
    'W7900': 123e12, '7900 XTX': 123e12,
}


class Machine(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of the matrices at work
    rank: int
    world: int  # processes; torchrun sets rank and world
    name: str
    peak_flops: float | None


def find_machine(asked, dtype):
    """(Machine, problems) for the settings device and dtype; ranks are torchrun's environment."""
    rank, world, local_rank, problems = find_place()
    device, more = find_device(asked, local_rank)
    gpu = device.type == 'cuda'
    name = f'CPU, {torch.get_num_threads()} threads'
    if gpu:
        name = torch.cuda.get_device_name(device)
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    imitated = gpu and torch.cuda.get_device_capability(device) < (8, 0)
    if imitated:
        name += ' (without bfloat16)'
    numbers = torch.float32
    if dtype == 'bfloat16' or (dtype == 'auto' and gpu and not imitated):
        numbers = torch.bfloat16
    return Machine(device, numbers, rank, world, name, peak), problems + more


def find_place():
    """(rank, world, local rank, problems) of the environment that torchrun gives a process."""
    told = [os.environ.get(name, default) for name, default in PLACE.items()]
    whole = all(re.fullmatch('[0-9]{1,9}', text) for text in told)
    rank, world, local_rank = map(int, told) if whole else (0, 1, 0)
    needed = ('RANK', *MEETING) if world > 1 else ()
    if whole and rank < world and all(os.environ.get(name) for name in needed):
        return rank, world, local_rank, []
    found = ' '.join(f'{name}={os.environ.get(name)!r:.30}' for name in (*PLACE, *MEETING))
    return 0, 1, 0, [f'{found} in the environment are no place among processes; start several with '
                     'torchrun, or unset these for a single one']


PLACE = dict(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0')  # and what stands for those that are unset
MEETING = ('MASTER_ADDR', 'MASTER_PORT')


def find_device(asked, local_rank):
    """(torch device, problems); one that cannot be had becomes the CPU."""
    cpu = torch.device('cpu')
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == 'mps':
        return cpu, ["device='mps': up to PyTorch 2.12.1 its causal attention in half precision "
                     'sees future keys (pytorch#195910); use --device=cpu']
    if not re.fullmatch(r'auto|cpu|cuda(:[0-9]{1,4})?', asked):
        return cpu, [f'device={asked!r}: must be auto, cpu, cuda or cuda:N']
    if asked == 'cpu' or (asked == 'auto' and not gpus):
        return cpu, []
    number = int(asked.partition(':')[2] or local_rank)
    if number < gpus:
        return torch.device('cuda', number), []
    return cpu, [f"device='{asked}': GPU {number} is not among the {gpus} that this PyTorch "
                 f'({torch.__version__}) sees; use --device=cpu, a build for your GPU, or no more '
                 'processes than there are GPUs']


def peak_memory(device):
    """{'allocated', 'reserved'}: highest bytes of the GPU's allocator since the last call, or of
    this process in RAM."""
    if device.type == 'cuda':
        peak = dict(allocated=torch.cuda.max_memory_allocated(device),
                    reserved=torch.cuda.max_memory_reserved(device))
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        import resource
    except ImportError:  # Windows has none
        return dict(allocated=0, reserved=0)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident = kibibytes * (1 if sys.platform == 'darwin' else 1024)  # macOS counts bytes
    return dict(allocated=resident, reserved=resident)


def memory_figures(peaks):
    """What a summary says of the peak_memory() of each log line: the first is that of compiling,
    the others are training's."""
    figures = {'compile_peak_bytes': peaks[0]['allocated']}
    for kind, name in (('allocated', 'memory'), ('reserved', 'reserved')):
        later = [peak[kind] for peak in peaks[1:] or peaks]
        figures[f'peak_{name}_bytes'] = max(peak[kind] for peak in peaks)
        figures[f'mean_{name}_bytes'] = sum(later) // len(later)
    return figures
