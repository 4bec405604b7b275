"""Read settings: config files and --key=value become one checked dataclass.

Whatever is unknown, of the wrong type or impossible becomes one line that names the culprit, its
value and the fix. All problems are collected before anything is said. No value is ever clamped,
ignored or replaced.
"""
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
from typing import Literal, get_args, get_origin


class Refused(Exception):
    """What was asked for cannot be done. `problems` lists every reason, one line each."""

    def __init__(self, problems):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__('\n'.join(self.problems))

    def report(self):
        """Print the problems; returns the exit code for them."""
        lines = [f'  - {problem}' for problem in self.problems]
        print('\n'.join(['refused:', *lines]), file=sys.stderr)
        return 2


def run_command(main):
    """Exit with the code that main(arguments) returns, or with 2 after saying what was refused."""
    try:
        code = main(sys.argv[1:])
    except Refused as refused:
        code = refused.report()
    sys.exit(code)


def did_you_mean(word, choices):
    """"; did you mean 'x'?" for the closest of the choices, or an empty string."""
    close = difflib.get_close_matches(str(word), choices, 1)
    return f"; did you mean '{close[0]}'?" if close else ''


# --- one value ------------------------------------------------------------------------------------


def type_name(kind):
    return ' | '.join(get_args(kind)) if get_origin(kind) is Literal else kind.__name__


def convert(key, value, kind):
    """`value` as `kind`, or ValueError. The command line gives text, a config file other types."""
    if get_origin(kind) is Literal:
        return to_choice(key, value, get_args(kind))
    return {str: to_str, bool: to_bool, int: to_int, float: to_float}[kind](key, value)


def to_choice(key, value, choices):
    """One of the choices. A choice such as 'hf:PATH' stands for 'hf:' and any text after it."""
    for choice in choices:
        prefix = choice.removesuffix('PATH') if choice.endswith(':PATH') else None
        if value == choice and prefix is None:
            return value
        if prefix and str(value).startswith(prefix) and value not in (prefix, choice):
            return value
    hint = did_you_mean(value, choices)
    raise ValueError(f"{key}={value!r} is not one of {', '.join(choices)}{hint}")


def to_str(key, value):
    if isinstance(value, str):
        return value
    raise ValueError(f'{key}={value!r} is not a str')


def to_bool(key, value):
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ('true', 'false'):
        return value.lower() == 'true'
    raise ValueError(f'{key}={value!r} is not a bool: write True or False')


def to_int(key, value):
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r'[+-]?\d+(_\d+)*', value):
        return int(value)
    raise ValueError(f'{key}={value!r} is not an int')


def to_float(key, value):
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isfinite(number) and not isinstance(value, bool):
        return number
    raise ValueError(f'{key}={value!r} is not a finite float')


# --- all of them ----------------------------------------------------------------------------------


def read_config(path):
    """The settings a config file assigns; ValueError if it cannot be read or run.

    Names with a leading underscore, functions and imports are the file's own business.
    """
    try:
        with open(path, encoding='utf-8-sig') as f:
            source = f.read()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        hint = did_you_mean(os.path.basename(path), configs_beside(path))
        raise ValueError(f"config file '{path}' cannot be read: {reason}{hint}") from None
    names = {}
    try:
        exec(compile(source, path, 'exec'), {'__name__': 'config', '__file__': path}, names)
    except SyntaxError as error:
        raise ValueError(f"config file '{path}' line {error.lineno}: {error.msg}") from None
    except Exception as error:  # whatever the file's code raises
        raise ValueError(f"config file '{path}': {type(error).__name__}: {error}") from None
    return {
        key: value for key, value in names.items()
        if not key.startswith('_') and not callable(value) and not inspect.ismodule(value)
    }


def configs_beside(path):
    """Names of the other .py files in the folder of `path`."""
    folder = os.path.dirname(path) or '.'
    if not os.path.isdir(folder):
        return []
    names = set(os.listdir(folder)) - {os.path.basename(path)}
    return sorted(name for name in names if name.endswith('.py'))


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

    for argument in argv:
        if argument.startswith('--'):
            key, equals, value = argument[2:].partition('=')
            if equals:
                assign('command line', key, value)
                typed.add(key)
            else:
                problems.append(f"command line: '{argument}' has no value; write --{key}=VALUE")
        elif config_files and argument.endswith('.py'):
            try:
                for key, value in read_config(argument).items():
                    assign(argument, key, value)
            except ValueError as error:
                problems.append(str(error))
        else:
            forms = 'config/FILE.py or --key=value' if config_files else '--key=value'
            problems.append(f"command line: '{argument}' is not of the form {forms}")
    return settings, problems, typed


def changed(settings):
    """{name: value} of the settings that differ from their defaults."""
    default = type(settings)()
    return {key: value for key, value in vars(settings).items() if value != vars(default)[key]}


def help_text(cls, usage):
    """Every setting with type, default and the comment that stands behind it in the source.

    A comment on a line of its own goes on with the help of the setting above it.
    """
    lines = [usage, '']
    for line in inspect.getsource(cls).splitlines():
        if found := re.match(r'    (\w+): .*?  # (.*)', line):
            field = cls.__dataclass_fields__[found[1]]
            default = f'{field.name}={field.default!r}'
            lines.append(f'  --{default:34s} {type_name(field.type)}')
            lines.append(f'        {found[2]}')
        elif found := re.match(r'    # -+ (.*?) -+$', line):
            lines.append(f'{found[1]}:')
        elif found := re.match(r'    # +(.*)', line):
            lines.append(f'        {found[1]}')  # a comment that goes on
    return '\n'.join(lines)
