"The notebooks are clean and in style, ppc/ is what they export, and each of them runs."
import ast
import importlib
import inspect
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
import papermill
import pytest
import ppc
from ppc import parameters
from ppc.methods import DEFAULT_METHODS

ROOT = Path(__file__).parent.parent
BOOK = sorted((ROOT/'nbs').glob('*.ipynb'))
BIN = Path(sys.executable).parent


def source(cell):
    return ''.join(cell['source'])


def code_cells(path):
    return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']


def exported(path):
    "The exported cells of a notebook, without their directives."
    cells = [source(c) for c in code_cells(path)]
    return [re.sub(r'^#\|.*\n', '', s) for s in cells if s.startswith('#| export')]


def module_name(path):
    found = re.findall(r'^#\| default_exp (\w+)', '\n'.join(map(source, code_cells(path))), re.M)
    return found[0] if found else ''


MODULES = {module_name(nb): nb for nb in BOOK if module_name(nb)}


# --- in sync -------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    "The repository's sources, cleaned and exported again."
    root = tmp_path_factory.mktemp('fresh')
    for name in ('settings.ini', 'pyproject.toml', 'README.md'):
        shutil.copy(ROOT/name, root)
    shutil.copytree(ROOT/'nbs', root/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    for command in ('nbdev_clean', 'nbdev_export'):
        subprocess.run([BIN/command], cwd=root, env=env, check=True)
    subprocess.run([sys.executable, ROOT/'nbs'/'export.py', root], cwd=ROOT, env=env, check=True)
    return root


@pytest.mark.parametrize('nb', BOOK, ids=lambda p: p.stem)
def test_notebook_is_clean(nb, fresh):
    assert nb.read_text() == (fresh/'nbs'/nb.name).read_text(), 'run: make export'


def test_export_is_in_sync(fresh):
    "But for __init__.py and __main__.py, which are written by hand."
    by_hand = {'__init__.py', '__main__.py'}
    def modules(root): return {p.name for p in (root/'ppc').glob('*.py')} - by_hand
    assert modules(ROOT) == modules(fresh)
    for f in (*modules(ROOT), 'run.ipynb'):
        assert (ROOT/'ppc'/f).read_text() == (fresh/'ppc'/f).read_text(), f'{f}: run make export'


# --- each of them runs ---------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize('nb', BOOK, ids=lambda p: p.stem)
def test_notebook_runs(nb):
    "In a process of its own, in nbs/, as a reader would; what it writes goes to runs/."
    code = ('from nbdev.test import test_nb; from pathlib import Path; import sys; '
            f'sys.exit(not test_nb(Path({str(nb)!r}))[0])')
    command, env = [sys.executable, '-c', code], {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, cwd=ROOT/'nbs', env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# --- in style ------------------------------------------------------------------------------------

@pytest.mark.parametrize('nb', BOOK, ids=lambda p: p.stem)
def test_notebook_reads_well(nb):
    "Outputs are there, small, and name no path of a machine; modules import from lower numbers."
    assert any(c['outputs'] for c in code_cells(nb))
    assert len(json.loads(nb.read_text())['cells']) <= 65 and nb.stat().st_size < 400_000
    assert not re.search(r'/(home|tmp|root|work|opt|Users)/', nb.read_text())
    numbers = {m: p.stem for m, p in MODULES.items()}
    for module in re.findall(r'from ppc\.(\w+) import', '\n'.join(exported(nb))):
        assert numbers[module] < nb.stem, module


def test_exported_cells_are_short():
    "At most 40 lines; half of them at most 12, in all and in nearly every notebook."
    lengths = {nb.stem: [s.count('\n') + 1 for s in exported(nb)] for nb in BOOK if exported(nb)}
    everything = [n for found in lengths.values() for n in found]
    assert max(everything) <= 40 and statistics.median(everything) <= 12
    long = {k: statistics.median(v) for k, v in lengths.items() if statistics.median(v) > 14}
    assert not long, long


def public_names(module):
    "Functions and classes that a module exports, with the methods of the classes."
    for name in module.__all__:
        value = getattr(module, name)
        if not callable(value) or getattr(value, '__module__', '') != module.__name__:
            continue
        yield name, value
        if inspect.isclass(value):
            for method, f in vars(value).items():
                if inspect.isfunction(f) and not method.startswith('_'):
                    yield f'{name}.{method}', f


FROM_TORCH = {'forward', 'train'}  # torch's documentation has them


def hints_missing(name, value):
    "Parameters of a function without a type, 'return' where that has none."
    if inspect.isclass(value):
        value = value.__init__ if '__init__' in vars(value) else None
        if not inspect.isfunction(value) or value.__qualname__.startswith('__create_fn__'):
            return []
    found = inspect.signature(value)
    lacking = [p for p in found.parameters.values() if p.annotation is p.empty]
    rest = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL  # of another function
    lacking = [p.name for p in lacking if p.name not in ('self', 'cls') and p.kind not in rest]
    made = value.__name__ != '__init__' and found.return_annotation is found.empty
    return lacking + ['return']*made


@pytest.mark.parametrize('module', MODULES)
def test_public_names_have_hints_and_docstrings(module):
    found = importlib.import_module(f'ppc.{module}')
    for name, value in public_names(found):
        last = name.split('.')[-1]
        if last not in FROM_TORCH:
            assert inspect.getdoc(value), f'{module}.{name} has no docstring'
        assert not hints_missing(name, value), (module, name, hints_missing(name, value))


# --- parameters live once ------------------------------------------------------------------------

def parameters_source():
    cells = code_cells(ROOT/'nbs'/'50_run.ipynb')
    return next(source(c) for c in cells if 'parameters' in c['metadata'].get('tags', []))


def test_parameters_cell_is_made_from_the_dataclasses():
    "Names, types, defaults and comments; those of the notebook alone stand before."
    own, made = parameters_source().split('# Settings', 1)
    assert f'# Settings{made}' == parameters.parameters_cell()
    given = {line.split(':')[0] for line in made.splitlines() if not line.startswith(('#', ' '))}
    assert given == {*parameters.PARAMETERS} and len(given) == 68
    methods, = re.findall(r'^methods: list = (\[.*?\])', own, re.M)
    assert tuple(ast.literal_eval(methods)) == DEFAULT_METHODS


def test_papermill_sees_the_parameters():
    known = papermill.inspect_notebook(str(ROOT/'nbs'/'50_run.ipynb'))
    assert known['k']['help'].startswith('K, pixels') and known['k']['inferred_type_name'] == 'int'


# --- the public API ------------------------------------------------------------------------------

def test_the_package_names_its_api():
    "Lazily: each name is found where it lives, and importing the package imports none of them."
    for name in ppc.__all__:
        assert getattr(ppc, name) is not None and name in dir(ppc)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = ppc.runn
    code = ('import sys, time; t = time.perf_counter(); import ppc; '
            'print(time.perf_counter() - t, "torch" in sys.modules)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    seconds, torch_is_there = done.stdout.split()
    assert float(seconds) < .2 and torch_is_there == 'False'


def test_help_is_a_page():
    done = subprocess.run(
        [sys.executable, '-c', 'import ppc; help(ppc)'], capture_output=True, text=True, check=True)
    for words in ('Pixel masks from image tags', 'class PixelToPrototypeContrast', 'dense_crf('):
        assert words in done.stdout
