"""Faults of processes, disks and numbers: what stops, fails or goes astray while a run works."""
import functools
import os
import re
import shutil
import signal
import subprocess
import sys

from . import judge, sabotage
from .cases import HALF
from .runner import HOME, LIMIT, Ended

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def kill(case):
    """kill -9 at a random moment, perhaps again when it goes on."""
    for _ in range(case.draw.randint(1, 3)):
        victim = case.start(init_from='auto')
        victim.send(signal.SIGKILL, case.moment())
        victim.wait()
    judge.recover(case)


def crash(case):
    """kill -9 just before one of the run's calls that change files."""
    call = case.draw.choice(sorted(sabotage.CALLS))
    number = case.draw.randint(1, sabotage.CALLS[call])
    case.run(sabotage=lambda: sabotage.fail_at(call, number, sabotage.die, case.folder))
    judge.recover(case)


def signals(case):
    """TERM, INT, HUP or USR1 at a random moment or in a random step; perhaps a second one."""
    number = case.draw.choice((*STOPS, signal.SIGUSR1))
    codes = [0] if number == signal.SIGUSR1 else [0, 128 + number]
    if case.draw.random() < 0.5:
        call = case.draw.randint(1, 2 * judge.STEPS)
        ended = case.run(sabotage=lambda: sabotage.signal_in_step(call, number))
    else:
        victim = case.start()
        after = case.moment()
        victim.send(number, after)
        if case.draw.random() < 0.3:
            victim.send(number, after + case.draw.uniform(0, 0.02))
            codes.append(-number)  # a second one acts at once
        ended = victim.wait()
        if 'preflight' not in ended.out:
            codes.append(-number)  # nothing is there to be saved
    judge.end(ended, codes)
    saved = judge.saved_step(case.folder)
    told = re.findall(r'saved at step (\d+)', ended.out)
    if told and int(told[-1]) > saved:
        raise judge.Lost(f'last.pt is of step {saved}, and it said: {ended.out[-200:]}')
    if ended.code == 0:
        judge.same(case)
    judge.recover(case, saved)


def output(case):
    """Whoever reads the output goes away at a random moment, or the output's disk is full."""
    if case.draw.random() < 0.3:
        full = os.open('/dev/full', os.O_WRONLY)
        victim = case.start(stdout=full)
        os.close(full)
    else:
        reader, writer = os.pipe()
        victim = case.start(stdout=writer)
        os.close(writer)
        victim.send(0, case.moment())
        os.close(reader)
    judge.end(victim.wait(), (0,))
    judge.same(case)


def disk(case):
    """From a random call on all calls of its kind fail: full, read-only, broken, forbidden."""
    call = case.draw.choice(('write', 'write', 'open', 'fsync', 'replace', 'makedirs'))
    number = case.draw.randint(1, sabotage.CALLS[call])
    if case.draw.random() < 0.4:
        case.go_half()
        number = (number + 1) // 2
    error = case.draw.choice(sabotage.ERRORS)
    fail = functools.partial(sabotage.raise_error, error)
    saved = judge.saved_step(case.folder)
    ended = case.run(init_from='auto', sabotage=lambda: sabotage.fail_at(call, number, fail,
                                                                         case.folder))
    judge.end(ended, (0, 1, 2), case.folder)
    judge.leftovers(case.folder)
    judge.recover(case, max(saved, judge.saved_step(case.folder)))


def numbers(case):
    """NaN or infinity as loss, gradient, weight or validation loss at a random step."""
    bad = case.draw.choice((float('nan'), float('inf'), -float('inf')))
    step = case.draw.randint(1, judge.STEPS)
    ways = {
        'loss': lambda: sabotage.forward_does(2 * step, True, lambda loss: loss * bad),
        'gradient': lambda: sabotage.forward_does(
            2 * step, True, lambda loss: sabotage.BadGradient.apply(loss, bad)),
        'weight': lambda: sabotage.bad_weight(step, bad, case.draw),
        'validation': lambda: sabotage.forward_does(step, False, lambda loss: loss * bad),
    }
    ended = case.run(sabotage=ways[case.draw.choice(sorted(ways))])
    judge.end(ended, (0, 3), 'step')
    judge.finite(case.folder)
    if ended.code == 0:  # it was in a look at the losses ahead, which changes nothing
        judge.same(case)
    judge.recover(case)


def restarts(case):
    """A run in several sessions of random ends, moved in between, saved at other steps."""
    for _ in range(case.draw.randint(2, 5)):
        number = case.draw.choice((*STOPS, signal.SIGKILL))
        call = case.draw.randint(1, judge.STEPS)
        stop = functools.partial(sabotage.signal_in_step, call, number)
        ended = case.run(init_from='auto', save_interval=case.draw.randint(1, 9), sabotage=stop)
        judge.end(ended, (0, -9, 128 + number))
        if case.draw.random() < 0.3 and case.folder.exists():
            shutil.move(case.folder, case.place / 'moved')
            shutil.copytree(case.place / 'moved', case.folder)
            shutil.rmtree(case.place / 'moved')
    judge.recover(case)


def twins(case):
    """A second run in the same run directory, of other settings or the same, a little later."""
    ways = [case.draw.choice(('scratch', 'auto')) for _ in range(2)]
    case.scenario = 'dense'
    first = case.start(init_from=ways[0])
    first.send(0, case.moment() / 2)
    case.scenario = case.draw.choice(('dense', 'other'))
    ends = [case.start(init_from=ways[1]).wait(), first.wait()]
    for ended in ends:
        judge.end(ended, (0, 2), case.folder)
    codes = [ended.code for ended in ends]
    if 0 not in codes or case.scenario == 'other' and codes == [0, 0]:
        raise judge.Wrong(f'two runs in one folder ended with {codes}')
    case.scenario = case.scenario if codes[0] == 0 else 'dense'
    judge.same(case)


# --- ranks ----------------------------------------------------------------------------------------


def go_on(case):
    """Both ranks to the undisturbed end."""
    for ended in [command.wait() for command in case.start_ranks(init_from='auto')]:
        judge.end(ended, (0,))
    judge.same(case)


def ranks_killed(case):
    """One of two ranks is killed: the other ends by itself, with a line, and both can go on."""
    case.scenario = 'two'
    commands = case.start_ranks()
    victim = case.draw.randrange(2)
    commands[victim].send(signal.SIGKILL, 2 * case.moment())
    ends = [command.wait() for command in commands]
    judge.end(ends[1 - victim], (0, 1))
    go_on(case)


def ranks_stopped(case):
    """One rank stands still for a moment, or both are told to stop."""
    case.scenario = 'two'
    commands = case.start_ranks()
    after = 2 * case.moment()
    number = case.draw.choice((*STOPS, signal.SIGSTOP))
    if number == signal.SIGSTOP:
        victim = case.draw.choice(commands)
        victim.send(number, after)
        victim.send(signal.SIGCONT, after + case.draw.uniform(0.1, 1.0))
    else:
        for command in commands:
            command.send(number, after)
    for ended in [command.wait() for command in commands]:
        if number == signal.SIGSTOP or 'preflight' in ended.out:
            judge.end(ended, (0,) if number == signal.SIGSTOP else (0, 1, 128 + number))
    go_on(case)


def ranks_differ(case):
    """The ranks hold different runs: other settings, another state, another weight."""
    case.scenario = 'dense'
    case.go_half()
    change = case.draw.choice(('seed', 'fresh', 'weight', 'step'))
    other = [f'--out_dir={case.place}/none']
    if change == 'seed':
        other += ['--seed=8']
    if change == 'step':
        shutil.copytree(case.folder, case.place / 'none')
        (case.place / 'none' / 'previous.pt').replace(case.place / 'none' / 'last.pt')
    spoil = None
    if change == 'weight':
        other = []
        spoil = functools.partial(sabotage.bad_weight, case.draw.randint(1, 4), 0.123, case.draw)
    ends = [command.wait() for command in
            case.start_ranks((None, spoil), ((), other), init_from='auto')]
    for ended in ends:  # one speaks for both
        judge.end(Ended(ended.code, *(a + b for a, b in zip(ends[0][1:], ends[1][1:]))),
                  (1, 2, 3), 'rank')
    judge.recover(case, HALF)


WORKER = '''
import os, signal, sys
sys.path.insert(0, {home!r})
from tests.faults import sabotage
from tests.faults.runner import exit_code

def die(loss):
    if os.environ['RANK'] == '{rank}' and not os.path.exists('killed'):
        open('killed', 'w').close()
        os.kill(os.getpid(), signal.SIGKILL)
    return loss

sabotage.forward_does({call}, True, die)
sys.exit(exit_code('train'))
'''


def torchrun(case):
    """One worker of torchrun is killed in a random step: --max-restarts brings it to its end."""
    case.scenario = 'two'
    (case.place / 'worker.py').write_text(WORKER.format(
        home=str(HOME), rank=case.draw.randrange(2), call=case.draw.randint(1, judge.STEPS)))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               '--max-restarts=2', 'worker.py', *case.argv(init_from='auto')]
    with open(case.place / 'said', 'w') as said:
        process = subprocess.Popen(command, cwd=case.place, stdout=said, stderr=said)
        try:
            code = process.wait(2 * LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its workers, which would live on otherwise
            process.wait()
            raise judge.Wrong('torchrun hangs') from None
    if code:
        raise judge.Lost(f'not restarted ({code}): {(case.place / "said").read_text()[-1500:]}')
    judge.same(case)


KINDS = {  # name: (fault, how many --all tries)
    'kill': (kill, 50), 'crash': (crash, 50), 'signals': (signals, 50), 'output': (output, 12),
    'disk': (disk, 60), 'numbers': (numbers, 40), 'restarts': (restarts, 20), 'twins': (twins, 20),
    'ranks killed': (ranks_killed, 6), 'ranks stopped': (ranks_stopped, 6),
    'ranks differ': (ranks_differ, 8), 'torchrun': (torchrun, 2),
}
