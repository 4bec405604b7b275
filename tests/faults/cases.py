"""The tiny runs that faults strike, their undisturbed ends, and states half way."""
import functools
import pathlib
import random
import shutil
import socket
import time
from dataclasses import dataclass

from . import judge, sabotage
from .runner import Command

COMMON = dict(
    dataset='tiny', device='cpu', compile=False, batch_size=2, gradient_accumulation_steps=2,
    block_size=32, n_layer=1, n_head=2, n_embd=32, warmup_iters=2, max_iters=judge.STEPS,
    learning_rate=1e-2, min_lr=1e-3, eval_interval=6, eval_tokens=640,
    log_interval=judge.LOG_INTERVAL, save_interval=4)
PRUNED = dict(prune_start=4, prune_end=20, prune_interval=2)
DRAWN = ('dense', 'spam', 'regrow')
SCENARIOS = {
    'dense': dict(dropout=0.1),
    'spam': dict(PRUNED, optimizer='adamwspam', spam_interval=10, spam_warmup=2,
                 prune_score='bitter7'),
    'regrow': dict(PRUNED, prune_score='magnitude', prune_regrow=0.01, dtype='bfloat16'),
    'other': dict(dropout=0.1, seed=7),  # gets in the way of 'dense'
    'two': dict(dropout=0.1),  # 'dense' on two ranks
}
HALF = 14  # updates of a run half way; the checkpoint before its last one is of 12


@dataclass
class Case:
    """One fault: where it strikes, and what should be there in the end."""
    draw: random.Random
    home: pathlib.Path  # of data and undisturbed runs
    place: pathlib.Path  # of this fault alone
    scenario: str
    seconds: float = 0.0  # that an undisturbed run takes
    wanted: dict = None  # {scenario: its undisturbed result}

    def __post_init__(self):
        self.folder = self.place / 'run'
        self.data = self.place / 'data'
        self.place.mkdir()
        self.data.symlink_to(self.home / 'data')

    def moment(self):
        """Seconds until a random moment of a run, a little after its end at most."""
        return self.draw.uniform(0, 1.1 * self.seconds)

    def argv(self, **changes):
        told = {**COMMON, **SCENARIOS[self.scenario], 'data_dir': self.data,
                'out_dir': self.folder, **changes}
        return [f'--{key}={value}' for key, value in told.items()]

    def start(self, argv=None, sabotage=None, stdout=None, **changes):
        """train.py of this scenario, started; argv: the whole command line instead."""
        argv = argv or self.argv(**changes)
        return Command('train', argv, self.place, sabotage, stdout=stdout)

    def run(self, *arguments, **changes):
        return self.start(*arguments, **changes).wait()

    def report(self):
        plot = f'--plot={self.place}/loss.png'
        return Command('report', [self.folder, plot], self.place, sabotage.little_memory).wait()

    def sample(self):
        argv = [self.folder, '--max_new_tokens=2', '--device=cpu']
        return Command('sample', argv, self.place, sabotage.little_memory).wait()

    def start_ranks(self, sabotages=(None, None), changes=((), ()), **common):
        """The two ranks of one run, as torchrun would start them."""
        with socket.socket() as free:
            free.bind(('localhost', 0))
            port = str(free.getsockname()[1])
        return [Command('train', [*self.argv(**common), *changes[rank]], self.place,
                        sabotages[rank], dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2',
                                              LOCAL_WORLD_SIZE='2', MASTER_ADDR='localhost',
                                              MASTER_PORT=port)) for rank in range(2)]

    def go_half(self):
        """The run directory as it was half way."""
        shutil.copytree(self.home / self.scenario / 'half', self.folder)

    def own_data(self):
        """Data of its own, to be damaged."""
        self.data.unlink()
        shutil.copytree(self.home / 'data', self.data)

    def put_back(self, path):
        """A damaged file of the run directory half way, or of the data, as it was."""
        inside = self.home / 'data' if path.parent == self.data else (
            self.home / self.scenario / 'half')
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        shutil.copy2(inside / path.name, path)


def make_data(home):
    """home/data: about 30,000 training and 3,000 validation bytes, in two shards of training."""
    draw = random.Random(0)
    vocabulary = [''.join(draw.choices('abcdefghijklmnop', k=draw.randint(2, 8)))
                  for _ in range(100)]
    (home / 'text').mkdir()
    for i in range(30):
        words = draw.choices(vocabulary, range(1, 101), k=200)
        (home / 'text' / f'{i:02d}.txt').write_text(' '.join(words))
    argv = ['text', f'--input={home}/text', f'--data_dir={home}/data', '--name=tiny',
            '--tokenizer=bytes', '--val_fraction=0.1', '--shard_tokens=20000']
    judge.end(Command('prepare', argv, home).wait(), (0,))


def make_scenarios(home):
    """Undisturbed runs in home/<scenario>/run, stopped ones in half: (seconds of one, results)."""
    make_data(home)
    results = {}
    for scenario in SCENARIOS:
        case = Case(random.Random(0), home, home / scenario, scenario)
        began = time.monotonic()
        if scenario == 'two':
            for command in case.start_ranks():
                judge.end(command.wait(), (0,))
        else:
            judge.end(case.run(), (0,))
            seconds = time.monotonic() - began
            stop = functools.partial(sabotage.signal_in_step, 2 * HALF)
            judge.end(case.run(sabotage=stop, out_dir=case.place / 'half'), (143,))
        results[scenario] = judge.result(case.folder)
    return seconds, results
