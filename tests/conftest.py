"Small datasets on disk, made once or freshly for each test."
import shutil
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
