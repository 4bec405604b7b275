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
    kind, problems = find_device(asked)
    device = torch.device(kind)
    gpu = device.type == 'cuda'
    numbers = torch.float32
    if dtype == 'bfloat16' or (dtype == 'auto' and gpu):
        numbers = torch.bfloat16
    name = f'CPU, {torch.get_num_threads()} threads'
    peak = None
    if gpu:
        name = torch.cuda.get_device_name(device)
        peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    rank = int(os.environ.get('RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    return Machine(device, numbers, rank, world, name, peak), problems


def find_device(asked):
    """(name of the torch device, problems); a device that cannot be had becomes the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not re.fullmatch(r'auto|cpu|cuda(:\d+)?', asked):
        return 'cpu', [f'device={asked!r}: must be auto, cpu, cuda or cuda:N']
    if asked == 'cpu' or (asked == 'auto' and not gpus):
        return 'cpu', []
    number = int(asked.partition(':')[2] or os.environ.get('LOCAL_RANK', 0))
    if number < gpus:
        return f'cuda:{number}', []
    return 'cpu', [f"device='{asked}': GPU {number} is not among the {gpus} that this PyTorch "
                   f'({torch.__version__}) sees; use --device=cpu or a build for your GPU']


def peak_memory(device):
    """{'allocated', 'reserved'}: highest bytes of the GPU's allocator, or this process in RAM."""
    if device.type == 'cuda':
        return dict(allocated=torch.cuda.max_memory_allocated(device),
                    reserved=torch.cuda.max_memory_reserved(device))
    import resource  # Windows has none
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident = kibibytes * (1 if sys.platform == 'darwin' else 1024)  # macOS counts bytes
    return dict(allocated=resident, reserved=resident)
