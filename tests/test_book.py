"The notebooks are clean, ppc/ is what they export, and each of them runs."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import papermill
import pytest
from ppc import parameters, pipeline

ROOT = Path(__file__).parent.parent
BOOK = sorted((ROOT/'nbs').glob('*.ipynb'))


@pytest.fixture(scope='module', autouse=True)
def no_runs_of_an_earlier_edition(): shutil.rmtree(ROOT/'runs'/'book', ignore_errors=True)   # they would be refused where a parameter is new


@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    "The repository's sources, cleaned and exported again."
    root = tmp_path_factory.mktemp('fresh')
    for name in ('settings.ini', 'pyproject.toml', 'README.md'):
        shutil.copy(ROOT/name, root)
    (root/'nbs').mkdir()
    for nb in BOOK:
        shutil.copy(nb, root/'nbs')
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    for command in ('nbdev_clean', 'nbdev_export'):
        subprocess.run([Path(sys.executable).parent/command], cwd=root, env=env, check=True)
    return root


@pytest.mark.parametrize('nb', BOOK, ids=lambda p: p.stem)
def test_notebook_is_clean(nb, fresh): assert nb.read_text() == (fresh/'nbs'/nb.name).read_text(), 'run: make export'


def test_export_is_in_sync(fresh):
    files = {p.name for p in (ROOT/'ppc').glob('*.py')}
    assert files == {p.name for p in (fresh/'ppc').glob('*.py')}
    for f in files:
        assert (ROOT/'ppc'/f).read_text() == (fresh/'ppc'/f).read_text(), f'ppc/{f} differs: run make export'


def execute(nb):
    "In a process of its own, in nbs/, as a reader would; what it writes goes to runs/."
    code = f'from nbdev.test import test_nb; from pathlib import Path; import sys; sys.exit(not test_nb(Path({str(nb)!r}))[0])'
    env = {**os.environ, 'OMP_NUM_THREADS': str(max(1, os.cpu_count()//TOGETHER))}
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT/'nbs', env=env, capture_output=True, text=True)


TOGETHER = 2  # notebooks


@pytest.fixture(scope='module')
def executed(request):
    "Those that are asked for, and are on their way."
    wanted = [item.callspec.params['nb'] for item in request.session.items if getattr(item, 'originalname', '') == 'test_notebook_runs']
    with ThreadPoolExecutor(TOGETHER) as pool:
        yield {nb: pool.submit(execute, nb) for nb in wanted}


@pytest.mark.parametrize('nb', BOOK, ids=lambda p: p.stem)
def test_notebook_runs(nb, executed):
    done = executed[nb].result()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize('nb', BOOK, ids=lambda p: p.stem)
def test_notebook_reads_well(nb):
    "Outputs are there, small, and name no path of a machine; exported cells are short; modules import only from lower numbers."
    book = json.loads(nb.read_text())
    code = [c for c in book['cells'] if c['cell_type'] == 'code']
    exported = [''.join(c['source']) for c in code if ''.join(c['source']).startswith('#| export')]
    assert any(c['outputs'] for c in code)
    assert len(book['cells']) <= 65 and nb.stat().st_size < 400_000
    assert not re.search(r'/(home|tmp|root|work|opt|Users)/', nb.read_text())
    for source in exported:
        assert source.count('\n') < 60
    numbers = {m: p.stem for p in BOOK for m in re.findall(r'#\| default_exp (\w+)', p.read_text())}
    for module in re.findall(r'from ppc\.(\w+) import', '\n'.join(exported)):
        assert numbers[module] < nb.stem, module


def test_parameters_live_once():
    "The parameters cell of 50_run repeats the dataclasses: names, types, defaults and comments."
    import inspect
    cell = next(c for c in json.loads((ROOT/'nbs'/'50_run.ipynb').read_text())['cells'] if 'parameters' in c['metadata'].get('tags', []))
    line = re.compile(r'^(\w+): (\w+) = (.*?) +# (.*)$')
    found = [line.match(l).groups() for l in ''.join(cell['source']).splitlines() if not l.startswith('#')]
    want = []
    for group in parameters.GROUPS:
        for l in inspect.getsource(group).splitlines():
            m = line.match(l.strip())
            if m:
                want.append((m[1], m[2], re.sub(r'field\(default_factory=lambda: (.*)\)', r'\1', m[3]), m[4]))
    own = [f for f in found if f[0] in ('out', 'methods', 'progress')]
    assert [f for f in found if f not in own] == want and len(want) == sum(len(parameters.fields(g)) for g in parameters.GROUPS)
    assert ast.literal_eval(next(f[2] for f in own if f[0] == 'methods')) == list(pipeline.METHODS)


def test_papermill_sees_the_parameters():
    known = papermill.inspect_notebook(str(ROOT/'nbs'/'50_run.ipynb'))
    assert known['k']['help'].startswith('K, pixels') and known['k']['inferred_type_name'] == 'int'
