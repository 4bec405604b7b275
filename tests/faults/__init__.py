"""Faults on purpose: python -m tests.faults --all, or python -m tests.faults KIND --seed=N.

runner.py runs the commands in forks; sabotage.py makes files and numbers fail inside of one;
cases.py has the runs that are struck, judge.py says what became of them, with readers of its own;
processes.py, damage.py and fuzz.py hold the kinds of faults.
"""
