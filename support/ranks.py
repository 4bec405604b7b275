"""The processes of one run: how they meet, agree, and notice that one does not answer."""
import atexit
import contextlib
import os
import zlib
from datetime import timedelta

import torch
import torch.distributed as dist

from support.guards import Stop
from support.rundir import exit_reason
from support.settings import Refused, tell

PATIENCE = timedelta(minutes=5)  # that ranks have with each other once all have done a step
PATIENCE_AT_FIRST = timedelta(minutes=30)  # until then, because compiling takes long
FINAL = ('nan', 'diverged', 'unsaved')  # exit reasons of code 3; what refused may change
LOST = 'rank lost'  # the exit reason after which nobody is waited for
PLACES = {'out_dir', 'data_dir', 'device'}  # settings that each machine may have of its own


def join(machine):
    """Meet the other processes of the run. Refused: they cannot be reached."""
    if machine.world == 1 or dist.is_initialized():
        return
    # The hosts agree by gloo, so that a GPU's work is never waited for.
    backend = 'cpu:gloo,cuda:nccl' if machine.device.type == 'cuda' else 'gloo'
    try:
        store, _, _ = next(dist.rendezvous('env://', timeout=PATIENCE_AT_FIRST))
        # torchrun's store outlives a restart, and in it the addresses of processes that are gone.
        store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        dist.init_process_group(backend, store=store, rank=machine.rank, world_size=machine.world)
    except (RuntimeError, ValueError) as error:
        raise Refused(f'WORLD_SIZE={machine.world}: the processes do not meet at MASTER_ADDR='
                      f'{os.environ["MASTER_ADDR"]} MASTER_PORT={os.environ["MASTER_PORT"]} '
                      f'({first_line(error)}); start all, with an address that all reach') from None


def check_restart(out_dir):
    """Refused: torchrun starts a run again that would end as before."""
    reason = exit_reason(out_dir)  # of the session before, if it came to an end
    if os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0' and reason in FINAL:
        raise Refused(f"out_dir='{out_dir}': the run ended as {reason!r}, which "
                      'another start does not change; its train.log says what does')


def combine(run, tensors, op=dist.ReduceOp.SUM):
    """Each tensor becomes the sum over all ranks, or their `op`. Stop: one does not answer."""
    if run.machine.world == 1:
        return
    first = run.progress.step == run.start_step
    dist.distributed_c10d._set_pg_timeout(PATIENCE_AT_FIRST if first else PATIENCE)
    try:
        for tensor in tensors:
            dist.all_reduce(tensor, op)
    except RuntimeError as error:
        told = (f'step {run.progress.step}: a rank did not answer ({first_line(error)}); see what '
                'each said, and continue with --init_from=resume')
        if run.machine.rank > 0:  # the log is that of rank 0, which may be the one
            tell(told)
        raise Stop(LOST, 1, told) from None


def highest(run, number):
    """The highest of the ranks' numbers; waits for the other processes, never for a GPU."""
    shared = torch.tensor(int(number))
    combine(run, [shared], dist.ReduceOp.MAX)
    return int(shared)


def first_line(error):
    """Of an error of torch.distributed, without the place in its source."""
    return str(error).splitlines()[0].rpartition('] ')[2]


def part(run, reason, code):
    """Wait for the others before the end, because torchrun kills the rest as soon as one ends."""
    if reason == LOST:
        os._exit(code)  # at once: what torch.distributed does at an end waits for the lost one
    with contextlib.suppress(Stop):  # it has been told
        highest(run, 0)
        if run.machine.world > 1:  # NCCL waits for all ranks, so this is not for one that failed
            atexit.register(dist.destroy_process_group)


def check_same_run(run):
    """Stop, on all ranks, where they differ in what they hold."""
    if run.machine.world == 1:
        return
    masters = [flat.masters.view(torch.int64).sum() for flat in run.flats]  # sums may wrap
    masks = 0
    for mask in run.pruner.masks.values() if run.pruner else ():
        masks = zlib.crc32(mask.cpu().numpy(), masks)
    held = {'step': run.progress.step, 'weights': int(sum(masters)), 'masks': masks}
    for key, value in {**vars(run.settings), 'data': run.data.fingerprint}.items():
        if key not in PLACES:
            held[key] = zlib.crc32(repr(value).encode())  # hash() differs between processes
    numbers = torch.tensor(list(held.values()))
    extremes = torch.stack([numbers, -numbers])
    combine(run, [extremes], dist.ReduceOp.MAX)
    differ = [name for name, high, low in zip(held, *extremes.tolist()) if high != -low]
    if differ:
        raise Stop('ranks differ', 1, f'step {run.progress.step}: the ranks hold different runs '
                                      f'(not the same: {", ".join(differ)}); nothing was saved. '
                                      'See that all read the same settings, data and out_dir; if '
                                      'they do, a machine is faulty')
