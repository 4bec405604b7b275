"""What the README promises to whoever changes the code: its four diffs, and a copied train.py."""
import ast
import pathlib
import re
import shutil
import subprocess
import sys

import count_lines
import pytest
from conftest import HOME, TINY

SHOWN = re.search(r'```diff\n(.*?)```', (HOME / 'README.md').read_text(), re.S)[1]
DIFFS = re.split(r'(?m)^(?=--- a/)', SHOWN)[1:]
TRAINED_WITH = {  # a word of each diff -> how the changed tree is trained
    'steady': dict(prune_score='steady', prune_start=5, prune_end=15, prune_interval=5),
    'nadam': dict(optimizer='nadam', prune_score='bitter7', prune_start=5, prune_end=15,
                  prune_interval=5),
    'silu': {},
    'stop_at': {},
}


def copy_of_the_tree(folder):
    """The sources and presets in a folder of their own."""
    for path in [*count_lines.SOURCES, *HOME.glob('config/*.py')]:
        place = folder / path.relative_to(HOME)
        place.parent.mkdir(exist_ok=True)
        shutil.copy(path, place)
    return folder


def python(folder, *arguments):
    """Run a script of the tree in `folder`; returns what it printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def told(data, **changes):
    settings = {**TINY, 'data_dir': data, 'max_iters': 20, 'eval_interval': 10, **changes}
    return [f'--{key}={value}' for key, value in settings.items()]


def apply(diff, folder):
    git = subprocess.run(['git', 'apply', '-p1', '-'], cwd=folder, input=diff, text=True,
                         capture_output=True)
    assert git.returncode == 0, git.stderr


def test_the_readme_shows_four_diffs():
    assert len(DIFFS) == len(TRAINED_WITH)


@pytest.mark.parametrize('word', TRAINED_WITH)
def test_each_diff_of_the_readme_applies_and_trains(word, tiny_data, tmp_path):
    diff = next(diff for diff in DIFFS if word in diff)
    tree = copy_of_the_tree(tmp_path)
    if 'train_mine.py' in diff:
        shutil.copy(tree / 'train.py', tree / 'train_mine.py')
    apply(diff, tree)
    script = 'train_mine.py' if 'train_mine.py' in diff else 'train.py'
    printed = python(tree, script, *told(tiny_data, out_dir='out', **TRAINED_WITH[word]))
    assert 'finished: validation loss' in printed
    if 'prune_score' in TRAINED_WITH[word]:
        assert '"sparsity": 0.5' in (tree / 'out' / 'summary.json').read_text()


COPIED = (  # what a user changes in a copied train.py: a new setting and the loop
    ("    seed: int = 1337", "    noise: float = 0.0  # standard deviation added to gradients\n"
                             "    seed: int = 1337"),
    ("    norm = get_total_norm([flat.grads for flat in run.flats])\n",
     "    for flat in run.flats:\n"
     "        flat.grads.add_(run.settings.noise * torch.randn_like(flat.grads))\n"
     "    norm = get_total_norm([flat.grads for flat in run.flats])\n"),
)


@pytest.fixture(scope='module')
def copied(tiny_data, tmp_path_factory):
    """A tree with such a train_mine.py and its run out/mine, of 20 steps."""
    tree = copy_of_the_tree(tmp_path_factory.mktemp('copied'))
    source = (tree / 'train.py').read_text()
    for old, new in COPIED:
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tree / 'train_mine.py').write_text(source)
    python(tree, 'train_mine.py', *told(tiny_data, noise=1e-3, out_dir='out/mine'))
    return tree


@pytest.mark.gpt2
def test_a_run_of_a_copied_train_py_is_exported(copied):
    assert 'zeros: 0.00%' in python(copied, 'export.py', 'out/mine', 'out/exported')
    assert (copied / 'out/exported/model.safetensors').exists()


def test_a_run_of_a_copied_train_py_is_resumed_sampled_and_reported(copied, tiny_data):
    mine = dict(noise=1e-3, out_dir='out/mine')
    longer = dict(max_iters=24, lr_decay_iters=20, init_from='resume')
    assert 'continued from step 20' in python(
        copied, 'train_mine.py', *told(tiny_data, **mine, **longer))
    assert 'noise' in python(copied, 'train.py', *told(
        tiny_data, out_dir='out/mine', **{**longer, 'max_iters': 28}))  # a note, not an error
    assert '---' in python(copied, 'sample.py', 'out/mine', '--max_new_tokens=5', '--device=cpu')
    assert 'mine' in python(copied, 'report.py', 'out/mine')


def test_budget_of_lines():
    """The house stays small: see make lines."""
    loaded = count_lines.loaded_by(HOME / 'train.py')
    assert sum(map(count_lines.length, count_lines.SOURCES)) <= 6_415
    assert sum(map(count_lines.length, loaded)) <= 4_660
    assert max(map(count_lines.length, count_lines.SOURCES)) <= 630


def test_no_import_inside_a_function_of_our_own_files():
    own = {path.stem for path in count_lines.SOURCES} | {'kernels', 'support'}
    for path in count_lines.SOURCES:
        for line in pathlib.Path(path).read_text().splitlines():
            if found := re.match(r'\s+(?:from|import) (\w+)', line):
                assert found[1] not in own, f'{path}: {line}'


def test_source_is_plain():
    """No long function, no comprehension that must be read twice, no assert that guards input."""
    faults = []
    for path in count_lines.SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            place = f'{path.relative_to(HOME)}:{getattr(node, "lineno", 0)}'
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 65:
                faults.append(f'{place}: {node.name} is long')
            if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
                if len(node.generators) > 1 or len(node.generators[0].ifs) > 1:
                    faults.append(f'{place}: more than one for or if in a comprehension')
            if isinstance(node, ast.IfExp) and isinstance(node.orelse, ast.IfExp):
                faults.append(f'{place}: a chain of conditional expressions')
            if isinstance(node, ast.Assert):
                faults.append(f'{place}: assert')
    assert faults == []
