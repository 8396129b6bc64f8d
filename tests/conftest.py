"Small datasets on disk, made once or freshly for each test."
import shutil
from pathlib import Path
import pytest
from hypothesis import settings
from ppc.scenes import make_scenes

# The same examples in every run: a failing test means a change, not chance
settings.register_profile('repeatable', derandomize=True)
settings.load_profile('repeatable')


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    "Sixteen training scenes and four for validation, not to be written to."
    return make_scenes(tmp_path_factory.mktemp('data')/'scenes', train=16, val=4)


@pytest.fixture
def mine(scenes, tmp_path):
    "A copy of the scenes that a test may damage."
    shutil.copytree(scenes, tmp_path/'mine')
    return tmp_path/'mine'


def pytest_configure(config):
    "Runs of the book are made anew once: an earlier edition's would be refused."
    if not hasattr(config, 'workerinput'):
        shutil.rmtree(Path(__file__).parent.parent/'runs'/'book', ignore_errors=True)


def pytest_collection_modifyitems(items):
    "One process for a module, as its tests share what is costly; notebooks go where there is room."
    for item in items:
        if getattr(item, 'originalname', '') != 'test_notebook_runs':
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
