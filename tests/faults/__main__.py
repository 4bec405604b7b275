"""python -m tests.faults --all | KIND [--tries=N] [--seed=N] [--jobs=N]

Strikes tiny runs with faults and prints how many of each kind were tried and survived. Fault i of a
kind is drawn from the seed + i, so that --tries=1 --seed=S repeats one. Exit code 1: some was lost
or wrong.
"""
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
import tempfile
import textwrap
import traceback

from . import damage, fuzz, judge, processes
from .cases import DRAWN, Case, make_scenarios

KINDS = {**processes.KINDS, **damage.KINDS, **fuzz.KINDS}


def strike(task):
    """One fault: (kind, seed, 'survived' | 'lost' | 'wrong', what happened)."""
    kind, seed, home, undisturbed = task
    place = home / f'{kind.replace(" ", "_")}_{seed}'
    draw = random.Random(f'{kind} {seed}')
    case = Case(draw, home, place, draw.choice(DRAWN), *undisturbed)
    verdict = ('survived', '')
    try:
        KINDS[kind][0](case)
        shutil.rmtree(place, ignore_errors=True)
    except judge.Lost as lost:
        verdict = ('lost', str(lost))
    except judge.Wrong as wrong:
        verdict = ('wrong', str(wrong))
    except Exception:  # the harness itself, or what the product left behind
        verdict = ('wrong', traceback.format_exc())
    return kind, seed, *verdict


def strike_all(home, kinds, tries, seed, jobs):
    """{kind: {'tried', 'survived', 'lost', 'wrong'}}; tells each that was not survived."""
    undisturbed = make_scenarios(home)
    tasks = [(kind, seed + i, home, undisturbed) for kind in kinds
             for i in range(tries or KINDS[kind][1])]
    table = {kind: dict(tried=0, survived=0, lost=0, wrong=0) for kind in kinds}
    with multiprocessing.get_context('fork').Pool(jobs, maxtasksperchild=50) as pool:
        for kind, number, verdict, told in pool.imap_unordered(strike, tasks):
            table[kind]['tried'] += 1
            table[kind][verdict] += 1
            if verdict != 'survived':
                print(f"{verdict}: python -m tests.faults '{kind}' --tries=1 --seed={number}")
                print(textwrap.indent(told.strip(), '    '), flush=True)
    return table


def print_table(table):
    table = {**table, 'total': {key: sum(row[key] for row in table.values())
                                for key in ('tried', 'survived', 'lost', 'wrong')}}
    print('| kind | tried | survived | lost | wrong |\n|---|---|---|---|---|')
    for kind, row in table.items():
        print(f"| {kind} | {' | '.join(str(number) for number in row.values())} |")


def main(argv):
    told = dict(argument[2:].split('=') for argument in argv if '=' in argument)
    kinds = list(KINDS) if '--all' in argv else [word for word in argv if word in KINDS]
    if not kinds:
        print(f'{__doc__}\nKinds: {", ".join(KINDS)}')
        return 2
    home = pathlib.Path(tempfile.mkdtemp(prefix='faults_'))
    table = strike_all(home, kinds, int(told.get('tries', 0)), int(told.get('seed', 0)),
                       int(told.get('jobs', os.cpu_count())))
    print_table(table)
    if any(row['lost'] + row['wrong'] for row in table.values()):
        print(f'what they left: {home}')
        return 1
    shutil.rmtree(home)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
