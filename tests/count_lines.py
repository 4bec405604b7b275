"""How many lines of source there are, and how many of them python train.py loads: make lines."""
import ast
import pathlib

HOME = pathlib.Path(__file__).resolve().parent.parent
SOURCES = sorted([*HOME.glob('*.py'), *HOME.glob('kernels/*.py'), *HOME.glob('support/*.py')])


def length(path):
    return len(path.read_text().splitlines())


def imported(path):
    """The files of this repository that the statements of `path` import, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)]
        for name in names:
            file = HOME / (name.replace('.', '/') + '.py')
            if file in SOURCES:
                found.add(file)
    return found


def loaded_by(path):
    """`path` and every file that importing it loads."""
    found = set()
    waiting = {path}
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting |= imported(file) - found
    return found


def main():
    loaded = loaded_by(HOME / 'train.py')
    for path in SOURCES:
        mark = 'python train.py' if path in loaded else ''
        print(f'{length(path):6,}  {str(path.relative_to(HOME)):24s} {mark}')
    print(f'{sum(map(length, SOURCES)):6,}  lines of source')
    print(f'{sum(map(length, loaded)):6,}  of them loaded by python train.py')


if __name__ == '__main__':
    main()
