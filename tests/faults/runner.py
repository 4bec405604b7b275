"""The repository's commands in forks of this process, which has imported them: 0.2 s, not 4."""
import ast
import os
import pathlib
import signal
import sys
import time
import traceback
from typing import NamedTuple

HOME = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(HOME))
os.environ.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')  # sums depend on the threads

import torch  # noqa: E402  (after the environment)

import prepare  # noqa: E402
import report  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

torch.set_num_threads(1)
COMMANDS = {'train': train, 'prepare': prepare, 'report': report, 'sample': sample}
LIMIT = 60.0  # seconds until a command counts as hanging; 0.2 are usual


def entry(module):
    """What the shell runs of a script whose functions are imported: its last `if __name__ ==`."""
    block = ast.parse(pathlib.Path(module.__file__).read_text()).body[-1]
    return compile(ast.Module(block.body, []), module.__file__, 'exec')


ENTRIES = {name: entry(module) for name, module in COMMANDS.items()}


class Ended(NamedTuple):
    code: int | None  # of the exit; -9: killed by signal 9; None: it hung
    out: str
    err: str


class Command:
    """A command that runs in a fork, with the folder `place` as its working directory.

    sabotage() is called in the fork before it. stdout: a file descriptor to print to instead.
    """
    count = 0

    def __init__(self, name, argv, place, sabotage=None, environment=(), stdout=None):
        Command.count += 1
        self.code = None
        self.texts = [place / f'{stream}.{Command.count}' for stream in ('stdout', 'stderr')]
        ready, say_ready = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setpgid(0, 0)
                os.chdir(place)
                for number, path in enumerate(self.texts, 1):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                if stdout is not None:
                    os.dup2(stdout, 1)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                sys.stdout = open(1, 'w', closefd=False)  # what it was is not a file like these
                sys.stderr = open(2, 'w', 1, errors='backslashreplace', closefd=False)
                os.environ.update(environment)
                sys.argv = [f'{name}.py', *map(str, argv)]
                if sabotage:
                    sabotage()
                os.write(say_ready, b'.')
                os.closerange(3, 256)
                code = exit_code(name)
            finally:
                os._exit(code)
        os.close(say_ready)
        os.read(ready, 1)  # the moments of faults are counted from when the command begins
        os.close(ready)
        self.began = time.monotonic()

    def send(self, number, after=0.0):
        """A signal, so many seconds after the command began; 0 only waits for that moment."""
        time.sleep(max(0.0, self.began + after - time.monotonic()))
        os.kill(self.pid, number)  # until it is waited for, its number is its own

    def finished(self, limit):
        """Whether it ends within so many seconds."""
        deadline = time.monotonic() + limit
        while self.code is None and time.monotonic() < deadline:
            time.sleep(0.002)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self):
        """Ended, whichever way; what hangs is killed."""
        if not self.finished(LIMIT):
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        return Ended(self.code, *(path.read_text(errors='replace') for path in self.texts))


def exit_code(name):
    """Run a command in this process; returns what the shell would see."""
    code = 0
    try:
        exec(ENTRIES[name], vars(COMMANDS[name]))
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
    except OSError:  # Python says so and exits with 120
        traceback.print_exc()
        code = 120
    sys.stderr.flush()
    return code
