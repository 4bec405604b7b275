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
    place, problems = find_place()
    kind, more = find_device(asked, place['LOCAL_RANK'])
    device = torch.device(kind)
    gpu = device.type == 'cuda'
    imitated = gpu and torch.cuda.get_device_capability(device) < (8, 0)
    numbers = torch.float32
    if dtype == 'bfloat16' or (dtype == 'auto' and gpu and not imitated):
        numbers = torch.bfloat16
    name = f'CPU, {torch.get_num_threads()} threads'
    peak = None
    if gpu:
        name = torch.cuda.get_device_name(device)
        peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
        name += ' (without bfloat16)' if imitated else ''
    return (Machine(device, numbers, place['RANK'], place['WORLD_SIZE'], name, peak),
            problems + more)


def find_place():
    """({'RANK', 'WORLD_SIZE', 'LOCAL_RANK': number}, problems) of the environment that torchrun
    gives a process."""
    place = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
    told = {name: os.environ[name] for name in place if name in os.environ}
    problems = [f'{name}={text!r} in the environment is no whole number; {LAUNCH}'
                for name, text in told.items() if not re.fullmatch('[0-9]{1,9}', text)]
    if problems:
        return place, problems
    place.update({name: int(text) for name, text in told.items()})
    rank, world = place['RANK'], place['WORLD_SIZE']
    if rank >= world:
        problems.append(f'RANK={rank} in the environment is not below WORLD_SIZE={world}; {LAUNCH}')
    missing = [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
    if world > 1 and missing:
        problems.append(f'WORLD_SIZE={world} is in the environment without {", ".join(missing)}; '
                        f'{LAUNCH}')
    return place, problems


LAUNCH = 'start several processes with torchrun, or unset it for a single one'


def find_device(asked, local_rank):
    """(name of the torch device, problems); a device that cannot be had becomes the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == 'mps':
        return 'cpu', ["device='mps': up to PyTorch 2.12.1 its causal attention in half precision "
                       'sees future keys (pytorch#195910); use --device=cpu']
    if not re.fullmatch(r'auto|cpu|cuda(:\d+)?', asked):
        return 'cpu', [f'device={asked!r}: must be auto, cpu, cuda or cuda:N']
    if asked == 'cpu' or (asked == 'auto' and not gpus):
        return 'cpu', []
    number = int(asked.partition(':')[2] or local_rank)
    if number < gpus:
        return f'cuda:{number}', []
    fix = 'use --device=cpu or a build for your GPU'
    if gpus and ':' not in asked:
        fix = f'LOCAL_RANK={number} asks for it: start no more processes than there are GPUs'
    return 'cpu', [f"device='{asked}': GPU {number} is not among the {gpus} that this PyTorch "
                   f'({torch.__version__}) sees; {fix}']


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
