"The wheel alone, in an empty folder: all commands work without the repository."
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
import numpy as np
import pytest
import yaml
from PIL import Image

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SMALL = dict(
    scenes=12, closeups=32, batch_size=4, crop=64, target=32, resize=[64, 96], k=4,
    seg_options=dict(batch_size=4, epochs=1, crop=64))


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--quiet', '-w', folder, ROOT]
    subprocess.run(command, check=True)
    found, = folder.glob('ppc_wsss-*.whl')
    return found


@pytest.fixture(scope='module')
def site(wheel, tmp_path_factory):
    "A folder with the installed package and nothing else."
    folder = tmp_path_factory.mktemp('site')
    install = [sys.executable, '-m', 'pip', 'install', '--no-deps', '--quiet']
    subprocess.run([*install, '--target', folder, wheel], check=True)
    return folder


@pytest.fixture
def ppc(site, tmp_path):
    "Call the installed command in an empty folder."
    env = {**os.environ, 'PYTHONPATH': str(site), 'TQDM_DISABLE': '1'}

    def call(*args, setup=''):
        code = f'from ppc import cli\n{setup}\ncli.app({[str(a) for a in args]!r})'
        command = [sys.executable, '-c', code]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    return call


def test_the_wheel_has_all_its_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for file in ('run.ipynb', 'recipes/own_data.yaml', 'templates/report.html', 'cli.py',
                 'starts/tiny-closeups.safetensors'):
        assert f'ppc/{file}' in names
    assert not [n for n in names if n.startswith(('tests/', 'nbs/', 'runs/'))]


def test_the_package_is_the_installed_one(ppc, site):
    done = ppc('recipe', setup='print(cli.__file__)')
    assert done.stdout.splitlines()[0] == str(site/'ppc'/'cli.py') and 'own_data' in done.stdout


def test_demo(ppc, tmp_path):
    "The demo's way, in seconds."
    small = [f'{name}={yaml.safe_dump(value)}' for name, value in dict(SMALL, epochs=1).items()]
    done = ppc('demo', *(word for item in small for word in ('-p', item)))
    assert done.returncode == 0, done.stderr
    out = tmp_path/'runs'/'demo'
    assert 'seam+ppc' in done.stdout and f'masks     runs{os.sep}demo/masks' in done.stdout
    assert all((out/file).is_file() for file in ('result.png', 'run.ipynb', 'report.html'))
    assert json.loads((out/'metrics.json').read_text())['segmentation_miou'] is not None


def test_run_plan_predict_and_report(ppc, tmp_path):
    "From a YAML file to masks of a new photograph."
    settings = dict(SMALL, out='mine', methods=['cam'], segmenter='none', crf=False)
    (tmp_path/'mine.yaml').write_text(yaml.safe_dump(settings))
    planned = ppc('plan', 'mine.yaml', '--steps', 2)
    assert planned.returncode == 0 and 'cam/train' in planned.stdout, planned.stderr
    assert not (tmp_path/'mine').exists()
    done = ppc('run', 'mine.yaml')
    assert done.returncode == 0, done.stderr
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path/'new.png')
    predicted = ppc('predict', 'mine', 'new.png', '--out', 'masks')
    assert predicted.returncode == 0, predicted.stderr
    assert Image.open(tmp_path/'masks'/'masks'/'new.png').size == (60, 40)
    reported = ppc('report', 'mine')
    assert reported.returncode == 0 and (tmp_path/'mine'/'report.html').is_file(), reported.stderr


def test_weights_and_recipes(ppc):
    done = ppc('weights')
    assert done.returncode == 0 and 'voc_seam' in done.stdout, done.stderr
    printed = ppc('recipe', 'own_data')
    assert yaml.safe_load(printed.stdout)['methods'] == ['seam']
    missing = ppc('run', 'nowhere.yaml')
    assert missing.returncode == 1 and 'own_data' in missing.stderr


def test_a_run_without_its_dataset_ends_in_a_sentence(ppc, tmp_path):
    "What is missing is said before training, and nothing is left behind."
    done = ppc('run', 'own_data', '-p', 'out=mine')
    assert done.returncode == 1 and 'datasets/mine' in done.stderr
    assert 'Traceback' not in done.stderr and not (tmp_path/'mine'/'metrics.json').exists()


def test_no_module_imports_what_only_unix_has(site):
    "At its top level; inside a function it may, where its absence is met."
    unix = 'resource', 'fcntl', 'pwd', 'grp', 'termios', 'tty', 'pty'
    for file in (site/'ppc').glob('*.py'):
        for line in file.read_text(encoding='utf-8').splitlines():
            assert line not in [f'import {name}' for name in unix], (file.name, line)


def test_the_command_spins_briefly(site, tmp_path):
    "Set before torch is loaded, where the user has not set it."
    code = 'import os, runpy, sys; sys.argv = ["ppc", "recipe"]\n'
    code += 'try: runpy.run_module("ppc", run_name="__main__")\n'
    code += 'finally: print(os.environ["GOMP_SPINCOUNT"])'
    for given, want in (({}, '1000'), ({'GOMP_SPINCOUNT': '7'}, '7')):
        env = {**os.environ, 'PYTHONPATH': str(site), **given}
        done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env,
                              capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == want and 'own_data' in done.stdout, done.stderr
