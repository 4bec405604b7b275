"""Read settings: config files and --key=value become one checked dataclass.

Whatever is unknown or of the wrong type becomes one line that names culprit, value and fix. All
problems are collected before anything is said. No value is ever clamped, ignored or replaced.
"""
import dataclasses
import difflib
import inspect
import math
import re
import sys
import textwrap
from typing import get_args


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

WANTED = {str: 'a str', bool: 'a bool: write True or False', int: 'an int', float: 'a finite float'}


def convert(key, value, kind):
    """`value` as `kind`, or ValueError. The command line gives text, a config file other types."""
    if choices := get_args(kind):
        return to_choice(key, value, choices)
    found = value
    if kind is bool and isinstance(value, str):
        found = {'true': True, 'false': False}.get(value.lower())
    elif isinstance(value, str) or (kind is float and not isinstance(value, bool)):
        try:  # an int will do for a float
            found = kind(value)
        except (TypeError, ValueError, OverflowError):
            found = None
    if type(found) is not kind or (kind is float and not math.isfinite(found)):
        raise ValueError(f'{key}={value!r} is not {WANTED[kind]}')
    return found


def to_choice(key, value, choices):
    """One of the choices. A choice such as 'hf:PATH' stands for 'hf:' and any text after it."""
    for choice in choices:
        pattern = re.escape(choice).replace('PATH', '.+')
        if re.fullmatch(pattern, str(value)):
            return value
    hint = did_you_mean(value, choices)
    raise ValueError(f"{key}={value!r} is not one of {', '.join(choices)}{hint}")


# --- all of them ----------------------------------------------------------------------------------


def read_config(path):
    """The settings a config file assigns; ValueError if it cannot be read or run.

    Names with a leading underscore, functions and imports are the file's own business.
    """
    names = {}
    try:
        with open(path, encoding='utf-8-sig') as f:
            code = compile(f.read(), path, 'exec')
        exec(code, {'__name__': 'config', '__file__': path}, names)
    except Exception as error:  # whatever the file's code raises
        reason = f'{type(error).__name__}: {error}'
        raise ValueError(f"config file '{path}' cannot be read: {reason}") from None
    return {
        key: value for key, value in names.items()
        if not key.startswith('_') and not callable(value) and not inspect.ismodule(value)
    }


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
        key, equals, value = argument.partition('=')
        if key.startswith('--') and equals:
            assign('command line', key[2:], value)
            typed.add(key[2:])
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
    """Every setting with type, default and its comments, at its line and below, in the source."""
    lines = [usage, '']
    for line in inspect.getsource(cls).splitlines():
        if found := re.match(r'    (\w+): .*?  # (.*)', line):
            field = cls.__dataclass_fields__[found[1]]
            default = f'{field.name}={field.default!r}'
            kind = ' | '.join(get_args(field.type)) or field.type.__name__
            lines += textwrap.wrap(f'--{default:34s} {kind}', 98, initial_indent='  ',
                                   subsequent_indent=' ' * 39)
            lines.append(f'        {found[2]}')
        elif found := re.match(r'    # -+ (.*?) -+$', line):
            lines.append(f'{found[1]}:')
        elif found := re.match(r'    # +(.*)', line):
            lines.append(f'        {found[1]}')
    return '\n'.join(lines)
