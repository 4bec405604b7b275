"""Each command of the README is one that a shell in the repository takes as pasted."""
import importlib.util
import pathlib
import re
import shlex
import shutil
import sys

import pytest
from conftest import HOME
from torch.distributed.run import get_args_parser

import bench
import export
import prepare
import report
import sample
import sweep
import train
from support.checks import check
from support.settings import parse, separate

README = re.sub(r'```diff\n.*?```', '', (HOME / 'README.md').read_text(), flags=re.S)
BLOCKS = re.findall(r'```(?:sh)?\n(.*?)```', README, re.S)
INLINE = re.findall(r'`([^`\n]+)`', re.sub(r'```.*?```', '', README, flags=re.S))
PROGRAM = re.compile(r'(?<![\w./])(?:\.venv/bin/)?(?:python3?|pip3?|torchrun|lm_eval|hf|pytest|ruff'
                     r'|make|cp)(?= )[^;#\n]+')
COMMANDS = [found.strip() for found in PROGRAM.findall('\n'.join(BLOCKS))]
COMMANDS += [span for span in INLINE if PROGRAM.match(span)]
INSTALLED = re.findall(r'pip install "(\w+)', README)  # by commands of the README itself
TOOLS = {  # script: its settings
    'train.py': train.Settings, 'sample.py': sample.SampleSettings, 'sweep.py': sweep.SweepSettings,
    'export.py': export.ExportSettings, 'report.py': report.ReportSettings,
}


def check_words(words):
    """Each file is there, but for what earlier commands make (out/) and what stands for a name."""
    for word in words:
        made = word.startswith('out/') or word.isupper()
        assert made or list(HOME.glob(word)), word


def check_train(argv):
    words, _ = separate(train.Settings, argv)
    check_words(words)
    told = [str(HOME / argument) if argument in words else argument for argument in argv]
    settings, problems, typed = parse(train.Settings, told)
    assert problems + check(settings, typed) == []


def check_script(script, argv):
    """The script accepts the arguments, as far as it can say without data and runs."""
    assert (HOME / script).exists()
    if script == 'train.py':
        check_train(argv)
    elif script == 'bench.py':
        check_train(bench.understood(argv)[2])
    elif script == 'prepare.py':
        source, *options = argv
        told = [*prepare.SOURCES[source].defaults, *options]
        settings, problems, typed = parse(prepare.PrepareSettings, told, config_files=False)
        assert problems + prepare.check(source, settings, typed) == []
    else:
        words, options = separate(TOOLS[script], argv)
        check_words(words)
        assert parse(TOOLS[script], options, config_files=False)[1] == []


def check_module(module, argv):
    assert importlib.util.find_spec(module)
    if '-m' in argv:  # of pytest
        assert f'\n    {argv[argv.index("-m") + 1]}: ' in (HOME / 'pytest.ini').read_text()


def test_all_commands_are_found():
    """As many as the README has, by hand; a change of their form would leave the rest untested."""
    assert len(COMMANDS) >= 25
    for tool in (*TOOLS, 'prepare.py', 'bench.py', 'pip', 'torchrun', 'lm_eval', 'hf', 'make'):
        assert any(tool in command.split('--')[0] for command in COMMANDS), tool


@pytest.mark.parametrize('command', COMMANDS)
def test_command_runs_as_pasted(command):
    program, *words = shlex.split(re.sub(r' \[.*?\]', '', command))  # [what may be left out]
    folder, _, name = program.rpartition('.venv/bin/')
    if name == program:
        assert program in ('make', 'cp', 'python3'), 'not of the virtual environment'
        assert shutil.which(program)
    else:
        beside = str(pathlib.Path(sys.executable).parent)
        assert folder == '' and (name in INSTALLED or shutil.which(name, path=beside)), name
    if name == 'make':
        [targets] = re.findall(r'^\.PHONY: (.*)', (HOME / 'Makefile').read_text(), re.M)
        assert set(words) <= set(targets.split())
    elif name == 'torchrun':
        told = get_args_parser().parse_args(words)
        check_script(told.training_script, told.training_script_args)
    elif name == 'pip' and '-r' in words:
        check_words(words[words.index('-r') + 1:])
    elif name.startswith('python') and words[0] == '-m':
        check_module(words[1], words[2:])
    elif name.startswith('python'):
        check_script(words[0], words[1:])
