"""support/settings.py: config files and command line, and every wrong input with its answer."""
import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from conftest import HOME
from torch._inductor.exc import InvalidCxxCompiler

from support.settings import Path, Refused, arguments, changed, help_text, parse, run_command


@dataclass
class Settings:
    # --- run ----------------------------------------------------------------------------
    out_dir: Path = 'out'  # where it writes
    init_from: Literal['scratch', 'resume', 'hf:PATH'] = 'scratch'  # first weights
    # hf: those of a folder
    seed: int = 1  # decides everything
    compile: bool = True  # torch.compile
    # --- size ---------------------------------------------------------------------------
    batch_size: int = 32  # sequences
    n_layer: int = 12  # blocks
    learning_rate: float = 6e-4  # peak
    optimizer: Literal['adamw', 'adamwspam', 'adamwprune'] = 'adamw'  # which


def parsed(*argv):
    """(Settings, problems) of a command line."""
    settings, problems, _ = parse(Settings, [str(word) for word in argv])
    return settings, problems


# --- accepted -------------------------------------------------------------------------------------


def test_later_wins_among_config_files_and_command_line(tmp_path):
    first, second = tmp_path / 'first.py', tmp_path / 'second.py'
    first.write_text('batch_size = 1\nseed = 2\nn_layer = 3\n')
    second.write_text('seed = 4\nn_layer = 5\n')
    s, problems = parsed('--batch_size=9', first, second, '--n_layer=6')
    assert problems == []
    assert (s.batch_size, s.seed, s.n_layer) == (1, 4, 6)


def test_names_that_were_typed_are_those_of_the_command_line(tmp_path):
    (tmp_path / 'c.py').write_text('batch_size = 1\n')
    _, _, typed = parse(Settings, [f'{tmp_path}/c.py', '--seed=3', '--n_layer=12'])
    assert typed == {'seed', 'n_layer'}


def test_config_file_may_import_compute_and_keep_names_of_its_own(tmp_path):
    (tmp_path / 'c.py').write_text('import math\nfrom pathlib import Path\n_layers = 6\n'
                                   'def twice(n):\n    return 2 * n\n'
                                   'class Size:\n    pass\n'
                                   'n_layer = twice(_layers)\nlearning_rate = math.sqrt(1e-6)\n'
                                   'out_dir = str(Path("a") / "b")\nseed = 10 ** 4\n')
    s, problems = parsed(tmp_path / 'c.py')
    assert problems == []
    assert (s.n_layer, s.learning_rate, s.out_dir, s.seed) == (12, 1e-3, 'a/b', 10_000)


def test_functions_that_a_config_file_imports_are_its_own_business(tmp_path):
    (tmp_path / 'c.py').write_text('from math import sqrt\nlearning_rate = sqrt(1e-6)\n')
    s, problems = parsed(tmp_path / 'c.py')
    assert problems == [] and s.learning_rate == 1e-3


def test_config_file_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / 'c.py').write_bytes(b'\xef\xbb\xbfseed = 5\n')
    s, problems = parsed(tmp_path / 'c.py')
    assert problems == [] and s.seed == 5


def test_values_arrive_as_the_type_of_the_setting():
    s, problems = parsed('--learning_rate=1', '--seed=50_000', '--compile=False',
                         '--out_dir=a=b', '--optimizer=adamwspam', '--init_from=hf:gpt2')
    assert problems == []
    assert isinstance(s.learning_rate, float) and s.learning_rate == 1.0
    assert (s.seed, s.compile, s.out_dir) == (50_000, False, 'a=b')
    assert (s.optimizer, s.init_from) == ('adamwspam', 'hf:gpt2')


def test_changed_settings_are_those_that_differ_from_their_defaults():
    s, _ = parsed('--seed=1', '--n_layer=2', '--compile=False')
    assert changed(s) == {'n_layer': 2, 'compile': False}


def test_help_without_docstrings():
    assert '--seed=1 ' in help_text(Settings, None)


def test_help_lists_every_setting_with_type_default_and_comment():
    lines = help_text(Settings, 'usage of it').splitlines()
    assert lines[0] == 'usage of it'
    for heading in ('run:', 'size:'):
        assert heading in lines
    at = lines.index('size:')
    assert lines[at + 1].split() == ['--batch_size=32', 'int']
    assert lines[at + 2] == '        sequences'
    at = next(i for i, line in enumerate(lines) if '--init_from' in line)
    name, kind = lines[at].split(maxsplit=1)
    assert (name, kind) == ("--init_from='scratch'", 'scratch | resume | hf:PATH')
    assert lines[at + 1:at + 3] == ['        first weights', '        hf: those of a folder']
    for name in Settings.__dataclass_fields__:
        assert any(line.startswith(f'  --{name}=') for line in lines), name


FORMS = {
    'second word': (['--batch_size', '16', '--learning_rate', '-1e-3'],
                    dict(batch_size=16, learning_rate=-1e-3)),
    'flag': (['--compile', '--seed=3'], dict(compile=True, seed=3)),
    'flag and a word': (['--compile', 'False'], dict(compile=False)),
    'no flag': (['--no-compile'], dict(compile=False)),
    'whole number with an exponent': (['--seed=1e3', '--batch_size=1.5e2'],
                                      dict(seed=1000, batch_size=150)),
    'home': (['--out_dir=~/run'], dict(out_dir='/home/me/run')),
}


@pytest.mark.parametrize('argv, told', FORMS.values(), ids=FORMS)
def test_forms_of_an_argument(argv, told, monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    assert parsed(*argv) == (Settings(**told), [])


def test_config_file_without_its_ending(tmp_path):
    (tmp_path / 'mine.py').write_text('seed = 5\n')
    assert parsed(tmp_path / 'mine') == (Settings(seed=5), [])


def test_short_help():
    assert arguments(Settings, ['-h', 'x.py']) == ['--help', 'x.py']


# --- refused: the command line --------------------------------------------------------------------

ARGUMENTS = {
    'misspelt': ('--learing_rate=1', "unknown setting 'learing_rate' (value '1'); did you mean "
                                     "'learning_rate'?"),
    'dashes': ('--batch-size=5', "unknown setting 'batch-size' (value '5'); did you mean "
                                 "'batch_size'?"),
    'unknown': ('--x=a=b', "unknown setting 'x' (value 'a=b'); --help lists them all"),
    'no value': ('--x', "unknown setting 'x' (value '')"),
    'two equals signs': ('--batch_size=1=2', "batch_size='1=2' is not an int"),
    'int': ('--batch_size=1.5', "batch_size='1.5' is not an int"),
    'int, exponent': ('--seed=1e-3', "seed='1e-3' is not an int"),
    'int, exponent of a fraction': ('--seed=1.25e1', "seed='1.25e1' is not an int"),
    'a key without its value': ('--seed', "'--seed' is not of the form"),
    'no- of what is no flag': ('--no-seed', "unknown setting 'no-seed'"),
    'int, huge': ('--seed=10000000000000000000', 'seed is a number of 64 bits; at most 63'),
    'int, empty': ('--seed=', "seed='' is not an int"),
    'float': ('--learning_rate=fast', "learning_rate='fast' is not a finite float"),
    'float, nan': ('--learning_rate=nan', "learning_rate='nan' is not a finite float"),
    'float, inf': ('--learning_rate=inf', "learning_rate='inf' is not a finite float"),
    'bool': ('--compile=1', "compile='1' is not a bool: write True or False"),
    'bool, no': ('--compile=no', "compile='no' is not a bool: write True or False"),
    'choice': ('--optimizer=adam', "optimizer='adam' is not one of adamw, adamwspam, adamwprune; "
                                   "did you mean 'adamw'?"),
    'choice, far': ('--optimizer=x', "optimizer='x' is not one of adamw, adamwspam, adamwprune"),
    'choice with a path': ('--init_from=hf:', "init_from='hf:' is not one of scratch, resume, "
                                              'hf:PATH'),
    'stray word': ('fast', "'fast' is not of the form a file config/FILE.py or --key=value"),
    'misspelt preset': ('config/best50', "'config/best50' is not of the form a file config/FILE.py "
                                         "or --key=value; did you mean 'config/best_50.py'?"),
}


@pytest.mark.parametrize('argument, message', ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_argument(argument, message):
    s, problems = parsed('--n_layer=7', argument)
    assert len(problems) == 1 and problems[0].startswith(f'command line: {message}')
    assert changed(s) == {'n_layer': 7}


def test_an_unknown_key_and_its_second_word_are_both_told():
    assert len(parsed('--btach_size', '16')[1]) == 2


def test_tools_that_take_no_config_files_say_so():
    _, problems, _ = parse(Settings, ['config/x.py'], config_files=False)
    assert problems == ["command line: 'config/x.py' is not of the form --key=value"]


# --- refused: config files ------------------------------------------------------------------------

CONFIGS = {
    'misspelt': ('btach_size = 4', "{path}: unknown setting 'btach_size' (value 4); did you mean "
                                   "'batch_size'?"),
    'int': ('batch_size = 4.0', '{path}: batch_size=4.0 is not an int'),
    'int, bool': ('batch_size = True', '{path}: batch_size=True is not an int'),
    'float': ("learning_rate = 'fast'", "{path}: learning_rate='fast' is not a finite float"),
    'float, bool': ('learning_rate = True', '{path}: learning_rate=True is not a finite float'),
    'float, list': ('learning_rate = [1]', '{path}: learning_rate=[1] is not a finite float'),
    'bool': ('compile = 0', '{path}: compile=0 is not a bool: write True or False'),
    'text': ('out_dir = None', '{path}: out_dir=None is not a str'),
    'choice': ("optimizer = 'adamv'", "{path}: optimizer='adamv' is not one of adamw, adamwspam, "
                                      "adamwprune; did you mean 'adamw'?"),
    'choice, number': ('optimizer = 3', '{path}: optimizer=3 is not one of adamw, adamwspam, '
                                        'adamwprune'),
    'float, huge': ('learning_rate = 2**2000', '{path}: learning_rate is a number of 2001 bits; at '
                                               'most 63'),
    'int, huge': ('batch_size = 10**400', '{path}: batch_size is a number of 1329 bits; at most '
                                          '63'),
    'int, without a repr': ('seed = -10**5000', '{path}: seed is a number of 16610 bits; at most '
                                                '63'),
    'text, NUL': (r"out_dir = 'a\0b'", r"{path}: out_dir='a\x00b' has a NUL, which no name can "
                                       'have'),
    'choice, NUL': (r"init_from = 'hf:a\0b'", r"{path}: init_from='hf:a\x00b' has a NUL, which no "
                                              'name can have'),
    'exit': ('import sys\nsys.exit()', "config file '{path}' cannot be read: SystemExit: "),
    'syntax': ('seed = 1\nn_layer = = 4', "config file '{path}' cannot be read: SyntaxError: "
                                          'invalid syntax (c.py, line 2)'),
    'exception': ('seed = 1 / 0', "config file '{path}' cannot be read: ZeroDivisionError: "
                                  'division by zero'),
}


@pytest.mark.parametrize('text, message', CONFIGS.values(), ids=CONFIGS)
def test_wrong_config_file(tmp_path, text, message):
    config = tmp_path / 'c.py'
    config.write_text(text + '\n')
    s, problems = parsed(config, '--n_layer=7')
    assert problems == [message.format(path=config)]
    assert changed(s) == {'n_layer': 7}


def test_config_file_that_is_not_there_or_not_text(tmp_path):
    (tmp_path / 'c.py').write_bytes(b'\xff\xfe')
    (tmp_path / 'folder.py').mkdir()
    os.mkfifo(tmp_path / 'fifo.py')
    errors = {'fifo.py': 'OSError', 'none.py': 'FileNotFoundError',
              'none/none.py': 'FileNotFoundError',
              'c.py': 'SyntaxError', 'folder.py': 'OSError'}
    for name, error in errors.items():
        [problem] = parsed(tmp_path / name)[1]
        assert problem.startswith(f"config file '{tmp_path}/{name}' cannot be read: {error}: ")


# --- refused: the program -------------------------------------------------------------------------


def test_command_that_is_refused_says_every_reason_and_ends_with_2(capsys, monkeypatch):
    def refuse(argv):
        raise Refused(['a=1: too small', 'b=2: too large'] if argv == ['x'] else [])

    monkeypatch.setattr(sys, 'argv', ['tool.py', 'x'])
    with pytest.raises(SystemExit) as ended:
        run_command(refuse)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == '' and told.err == 'refused:\n  - a=1: too small\n  - b=2: too large\n'


def command(main, monkeypatch):
    """The exit code of a command whose main(arguments) is this."""
    monkeypatch.setattr(sys, 'argv', ['tool.py', 'a', 'b'])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    return ended.value.code


MEMORY = 'free some memory, or ask for less of it'
WORLD = {  # what ends main: (exit code, what is said)
    'refused': (Refused('a=1: too small'), 2, 'refused:\n  - a=1: too small'),
    'Ctrl-C': (KeyboardInterrupt(), 130, ''),
    'reader has gone': (BrokenPipeError(errno.EPIPE, 'Broken pipe'), 141, ''),
    'file': (PermissionError(errno.EACCES, 'Permission denied', 'a/b'), 1,
             "failed: PermissionError: [Errno 13] Permission denied: 'a/b'; correct that and give "
             'the same command again'),
    'old GPU': (RuntimeError('GPUTooOldForTriton: Found Tesla P100 which is too old'), 1,
                'failed: RuntimeError: GPUTooOldForTriton: Found Tesla P100 which is too old; use '
                '--compile=False, or a PyTorch for this GPU'),
    'GPU of another build': (RuntimeError('CUDA error: no kernel image is available'), 1,
                             'failed: RuntimeError: CUDA error: no kernel image is available; use '
                             '--compile=False, or a PyTorch for this GPU'),
    'two files': (IsADirectoryError(errno.EISDIR, 'Is a directory', 'a.tmp', None, 'a'), 1,
                  "failed: IsADirectoryError: [Errno 21] Is a directory: 'a.tmp' -> 'a'; correct "
                  'that and give the same command again'),
    'full disk': (OSError(errno.ENOSPC, 'No space left on device'), 1,
                  'failed: OSError: [Errno 28] No space left on device; correct that and give the '
                  'same command again'),
    'another file error': (OSError('not\na file'), 1, 'failed: OSError: not a file; correct that '
                           'and give the same command again'),
    'text': (UnicodeEncodeError('ascii', 'ä', 0, 1, 'no'), 1,
             "failed: UnicodeEncodeError: 'ascii' codec can't encode character '\\xe4' in position "
             '0: no; that is not UTF-8'),
    'memory': (MemoryError(), 1, f'failed: MemoryError; {MEMORY}'),
    'memory, CPU': (RuntimeError("DefaultCPUAllocator: can't allocate"), 1,
                    f"failed: RuntimeError: DefaultCPUAllocator: can't allocate; {MEMORY}"),
    'memory, GPU': (torch.OutOfMemoryError('CUDA out of memory'), 1,
                    f'failed: OutOfMemoryError: CUDA out of memory; {MEMORY}'),
    'nesting': (RecursionError('too deep'), 1, 'failed: RecursionError: too deep; a file is nested '
                                               'too deeply'),
    'number': (OverflowError('int too large'), 1, 'failed: OverflowError: int too large; a setting '
                                                  'is too large'),
    'compiler': (InvalidCxxCompiler(), 1, 'failed: InvalidCxxCompiler: No working C++ compiler '
                 "found in torch._inductor.config.cpp.cxx: (None, 'g++'); install a compiler, or "
                 'use --compile=False'),
    'other process': (RuntimeError('[gloo/pair.cc:5] Connection closed'), 1,
                      'failed: RuntimeError: [gloo/pair.cc:5] Connection closed; the output '
                      'of the other processes says why'),
}


@pytest.mark.parametrize('error, code, line', WORLD.values(), ids=WORLD)
def test_what_the_world_does_is_one_line(monkeypatch, capsys, error, code, line):
    def main(argv):
        raise error

    assert command(main, monkeypatch) == code
    assert capsys.readouterr().err.rstrip('\n') == line
    monkeypatch.setenv('RANK', '3')
    assert command(main, monkeypatch) == code
    assert capsys.readouterr().err.rstrip('\n') == (line and f'rank 3: {line}')
    monkeypatch.setenv('NANOPRUNE_TRACEBACK', '1')
    assert command(main, monkeypatch) == code
    assert capsys.readouterr().err.startswith('Traceback (most recent call last)')


@pytest.mark.parametrize('error', [ZeroDivisionError(), KeyError('a'), RuntimeError('a shape')])
def test_mistakes_in_the_code_keep_their_traceback(monkeypatch, error):
    def main(argv):
        raise error

    monkeypatch.setattr(sys, 'argv', ['tool.py'])
    with pytest.raises(type(error)) as caught:
        run_command(main)
    assert caught.value is error


def test_rank_without_a_number_is_the_first(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '')
    assert command(lambda argv: refuse('x'), monkeypatch) == 2
    assert capsys.readouterr().err == 'refused:\n  - x\n'


def refuse(problem):
    raise Refused(problem)


TOOL = '''
import sys
sys.path.insert(0, sys.argv[1])
from support.settings import run_command

def main(argv):
    print('naïve 漢字')
    for n in range(int(argv[1])):
        print('a line', n)
    return 0

run_command(main)
'''


def run_tool(stdout, lines, **environment):
    """The finished process of the tool, its output as bytes."""
    environment = {**os.environ, 'PYTHONUNBUFFERED': '', **environment}  # the buffer is the danger
    command = [sys.executable, '-c', TOOL, str(HOME), lines]
    return subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE,
                          timeout=60)


@pytest.mark.parametrize('encoding, first', [('cp1252', b'na\xefve \\u6f22\\u5b57'),
                                             ('ascii', b'na\\xefve \\u6f22\\u5b57')])
def test_output_in_an_encoding_that_lacks_characters(encoding, first):
    done = run_tool(subprocess.PIPE, '1', PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == b''
    assert done.stdout.splitlines()[0] == first


@pytest.mark.parametrize('lines', ['1', '20000'])  # within and beyond a buffer
def test_output_that_nobody_reads_ends_quietly(lines):
    read, write = os.pipe()
    os.close(read)
    with open(write, 'wb') as pipe:
        done = run_tool(pipe, lines)
    assert done.returncode == 141 and done.stderr == b''


@pytest.mark.parametrize('lines', ['1', '20000'])
def test_output_to_a_full_disk_is_one_line(lines):
    with open('/dev/full', 'wb') as full:
        done = run_tool(full, lines)
    assert done.returncode == 1
    assert done.stderr.decode() == ('failed: OSError: [Errno 28] No space left on device; correct '
                                    'that and give the same command again\n')


def test_command_ends_with_the_code_of_its_main(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['tool.py', 'a', 'b'])
    with pytest.raises(SystemExit) as ended:
        run_command(len)
    assert ended.value.code == 2
    assert Refused('one').problems == ['one']


def test_help_in_another_locale_and_without_docstrings():
    environment = {**os.environ, 'LC_ALL': 'POSIX', 'PYTHONIOENCODING': 'ascii'}
    done = subprocess.run([sys.executable, '-OO', HOME / 'prepare.py', '--help'], env=environment,
                          capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stderr == b'' and b'--shard_tokens=' in done.stdout
