"""Read settings: config files and --key=value become one checked dataclass.

Whatever is unknown or of the wrong type becomes one line that names culprit, value and fix. All
problems are collected before anything is said. No value is ever clamped, ignored or replaced.
"""
import contextlib
import dataclasses
import difflib
import errno
import glob
import inspect
import io
import math
import os
import re
import runpy
import sys
import textwrap
import traceback
from typing import NewType, get_args

Path = NewType('Path', str)  # type of a setting that names a file or folder; ~ is the home


class Refused(Exception):
    """What was asked for cannot be done. `problems` lists every reason, one line each."""

    def __init__(self, problems):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__('\n'.join(self.problems))


# --- the boundary of every command ----------------------------------------------------------------

MEMORY = 'out of memory|not enough memory|DefaultCPUAllocator|MemoryError|STATUS_ALLOC_FAILED'
WORLD = (  # what the world does, by type and text of the error: the way out
    (Exception, MEMORY, 'free some memory, or ask for less of it'),
    (Exception, r'C(\+\+)? compiler|CppCompile', 'install a compiler, or use --compile=False'),
    (RuntimeError, r'gloo|NCCL|Dist\w*Error', 'the output of the other processes says why'),
    (RuntimeError, 'too old|no kernel image', 'use --compile=False, or a PyTorch for this GPU'),
    (RecursionError, '', 'a file is nested too deeply'),
    (OverflowError, '', 'a setting is too large'),
    (UnicodeError, '', 'that is not UTF-8'),
    (OSError, '', 'correct that and give the same command again'),
)


def tell(text):
    """Say on stderr, if it still exists, why the command ends, and of which rank that is."""
    rank = os.environ.get('RANK') or '0'
    with contextlib.suppress(OSError):
        print(text if rank == '0' else f'rank {rank}: {text}', file=sys.stderr)


def exit_code(error):
    """Say what ended the command, in one line if the world did; raise a mistake in the code again.

    NANOPRUNE_TRACEBACK=1 shows where it happened.
    """
    if os.environ.get('NANOPRUNE_TRACEBACK'):
        traceback.print_exception(error)
    if isinstance(error, Refused):
        tell('\n'.join(['refused:', *(f'  - {problem}' for problem in error.problems)]))
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, BrokenPipeError):  # nobody reads any more, so say nothing
        return 141
    reason = ' '.join(f'{type(error).__name__}: {error}'.split()).removesuffix(':')
    for kind, text, way_out in WORLD:
        if isinstance(error, kind) and re.search(text, reason, re.IGNORECASE):
            tell(f'failed: {reason[:400]}; {way_out}')
            return 1
    raise error


def drop_output():
    """What is printed from now on vanishes, because pipe, terminal or disk do not take it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(main):
    """Exit with the code that main(arguments) returns, or with that of what ended it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')  # cp1252 and POSIX lack most characters
    try:
        code = main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code(error)
    try:
        print(end='', flush=True)
    except OSError as error:
        drop_output()
        code = code or exit_code(error)
    sys.exit(code)


def regular(path):
    """`path`, unless it is no regular file, such as a FIFO that would be waited for: OSError."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, 'not a regular file', path)
    return path


def did_you_mean(word, choices):
    """"; did you mean 'x'?" for the closest of the choices, or an empty string."""
    close = difflib.get_close_matches(str(word), choices, 1)
    return f"; did you mean '{close[0]}'?" if close else ''


def unmet(settings, rules):
    """Problems: those of [(key, whether its rule holds, what it must be)] that do not hold."""
    return [f'{key}={getattr(settings, key)!r}: {must}' for key, holds, must in rules if not holds]


# --- one value ------------------------------------------------------------------------------------

WANTED = {str: 'a str', Path: 'a str', bool: 'a bool: write True or False', int: 'an int',
          float: 'a finite float'}


def convert(key, value, kind):
    """`value` as `kind`, or ValueError. The command line gives text, a config file other types."""
    if isinstance(value, str) and '\0' in value:
        raise ValueError(f'{key}={value!r} has a NUL, which no name can have')
    if choices := get_args(kind):  # such as 'hf:PATH', which stands for 'hf:' and any text after it
        pattern = '|'.join(map(re.escape, choices)).replace('PATH', '.+')
        if not re.fullmatch(pattern, str(value)):
            hint = did_you_mean(value, choices)
            raise ValueError(f"{key}={value!r} is not one of {', '.join(choices)}{hint}")
        return value
    found = value
    if kind is Path and isinstance(value, str):
        return os.path.expanduser(value)
    if kind is bool and isinstance(value, str):
        found = {'true': True, 'false': False}.get(value.lower())
    elif kind is int and isinstance(value, str) and re.fullmatch(r'\d+(\.\d+)?[eE]\d{1,2}', value):
        found = int(float(value)) if float(value).is_integer() else None  # 1e3
    elif isinstance(value, str) or (kind is float and not isinstance(value, bool)):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            found = kind(value)  # an int will do for a float
    if isinstance(found, int) and found.bit_length() > 63:  # its repr may fail
        raise ValueError(f'{key} is a number of {found.bit_length()} bits; at most 63')
    if type(found) is not kind or (kind is float and not math.isfinite(found)):
        raise ValueError(f'{key}={value!r} is not {WANTED[kind]}')
    return found


# --- all of them ----------------------------------------------------------------------------------


def read_config(path):
    """The settings a config file assigns; Refused if it cannot be read or run.

    Names with a leading underscore, functions and imports are the file's own business.
    """
    try:
        names = runpy.run_path(regular(path), run_name='config')
    except (Exception, SystemExit) as error:  # whatever the file's code raises
        reason = f'{type(error).__name__}: {error}'
        raise Refused(f"config file '{path}' cannot be read: {reason}") from None
    return {
        key: value for key, value in names.items()
        if not key.startswith('_') and not callable(value) and not inspect.ismodule(value)
    }


def arguments(cls, argv):
    """argv in one form: --key value, a bare --flag and --no-flag as --key=value, -h as --help."""
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    found = []
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        key = word[2:] if word.startswith('--') else ''
        next_word = waiting[0] if waiting else '--'
        if word == '-h':
            word = '--help'
        elif kinds.get(key.removeprefix('no-')) is bool:
            is_value = key in kinds and next_word.lower() in ('true', 'false')
            value = waiting.pop(0) if is_value else key in kinds
            word = f'--{key.removeprefix("no-")}={value}'
        elif key in kinds and not next_word.startswith('--'):
            word = f'{word}={waiting.pop(0)}'
        found.append(word)
    return found


def separate(cls, argv):
    """(the words of a tool's command line, such as folders; its options in one form)."""
    argv = arguments(cls, argv)
    words = [argument for argument in argv if not argument.startswith('--')]
    return words, [argument for argument in argv if argument.startswith('--')]


def parse(cls, argv, config_files=True):
    """(instance of the dataclass `cls`, problems, names typed on the command line).

    Config files and --key=value are read in order, later wins. A value that is refused leaves the
    setting as it was, so that the rest can still be checked.
    """
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    settings = cls()
    problems = []
    typed = set()

    def assign(where, key, value):
        if key not in kinds:
            hint = did_you_mean(key.replace('-', '_').lower(), kinds) or '; --help lists them all'
            problems.append(f"{where}: unknown setting '{key}' (value {value!r}){hint}")
            return
        try:
            setattr(settings, key, convert(key, value, kinds[key]))
        except ValueError as error:
            problems.append(f'{where}: {error}')

    for argument in arguments(cls, argv):
        if config_files and os.path.isfile(f'{argument}.py'):
            argument += '.py'
        key, equals, value = argument.partition('=')
        if key.startswith('--') and (equals or key[2:] not in kinds):
            assign('command line', key[2:], value)
            typed.add(key[2:])
        elif config_files and argument.endswith('.py'):
            try:
                for key, value in read_config(argument).items():
                    assign(argument, key, value)
            except Refused as refused:
                problems += refused.problems
        else:
            forms = 'a file config/FILE.py or --key=value' if config_files else '--key=value'
            hint = did_you_mean(argument, glob.glob('config/*.py')) if config_files else ''
            problems.append(f"command line: '{argument}' is not of the form {forms}{hint}")
    return settings, problems, typed


def changed(settings):
    """{name: value} of the settings that differ from their defaults."""
    default = type(settings)()
    return {key: value for key, value in vars(settings).items() if value != vars(default)[key]}


def help_text(cls, usage):
    """Every setting with type, default and its comments, at its line and below, in the source."""
    lines = [usage or '', '']  # python -OO has no docstrings
    for line in inspect.getsource(cls).splitlines():
        if found := re.match(r'    (\w+): .*?  # (.*)', line):
            field = cls.__dataclass_fields__[found[1]]
            default = f'{field.name}={field.default!r}'
            kind = ' | '.join(get_args(field.type)) or field.type.__name__
            lines += textwrap.wrap(f'  --{default:34s} {kind}', 98, subsequent_indent=' ' * 39)
            lines.append(f'        {found[2]}')
        elif found := re.match(r'    # -+ (.*?) -+$', line):
            lines.append(f'{found[1]}:')
        elif found := re.match(r'    # +(.*)', line):
            lines.append(f'        {found[1]}')
    return '\n'.join(lines)
