"""A part of python -m tests.faults --all: two faults of each kind, in a process of its own."""
import subprocess
import sys

from .__main__ import KINDS
from .runner import HOME


def test_nothing_is_lost_and_nothing_wrong():
    slow = ('torchrun', 'ranks', 'restarts', 'cuts')  # flips and shards are like cuts
    kinds = [kind for kind in KINDS if not kind.startswith(slow)]
    done = subprocess.run([sys.executable, '-m', 'tests.faults', *kinds, '--tries=2'], cwd=HOME,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
