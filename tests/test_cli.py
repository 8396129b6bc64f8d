"The commands: what they print, and how they end."
import json
import shutil
import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner
from ppc.cli import app
from ppc.data import TagFolder, read_mask
from ppc.pipeline import run
from ppc.predicting import load
from test_coco import small_coco
from test_voc import small_voc

QUICK = dict(batch_size=4, crop=64, target=32, resize=[64, 96], k=4, seg_options=dict(batch_size=4, epochs=1, crop=64))
pytestmark = pytest.mark.filterwarnings('ignore:__array__ implementation')


def ppc(*args): return CliRunner().invoke(app, [str(a) for a in args], env={'COLUMNS': '200', 'TERM': 'dumb'})


@pytest.fixture(scope='module')
def done(scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'done'
    run(out, ['cam'], data=str(scenes), **QUICK)
    return out


# --- data -------------------------------------------------------------------------------------------------------------------

def test_voc(tmp_path):
    found = ppc('data', 'voc', tmp_path/'voc', *small_voc(tmp_path/'original', archives=True))
    assert found.exit_code == 0 and 'train_aug      14' in found.output and len(TagFolder(tmp_path/'voc', 'val')) == 6
    found = ppc('data', 'saliency', tmp_path/'voc', '--split', 'train_aug')
    assert found.exit_code == 0 and "not the paper's" in found.output and 'maps           14' in found.output
    found = ppc('data', 'voc', tmp_path/'voc', *small_voc(tmp_path/'again'), '--no-difficult', '--tags', tmp_path/'cls_labels.npy')
    assert found.exit_code == 1 and 'not both' in found.output


def test_coco(tmp_path):
    found = ppc('data', 'coco', tmp_path/'coco', *small_coco(tmp_path/'original', 4, 2)[0])
    assert found.exit_code == 0 and 'classes        8' in found.output and 'without_tags   2' in found.output
    assert ppc('data', 'coco', tmp_path/'none').exit_code == 1 and 'cocodataset.org' in ppc('data', 'coco', tmp_path/'none').output


def test_own_folder_with_masks(scenes, tmp_path):
    for i in ('val00000', 'val00001'): shutil.copy(scenes/'SegmentationClass'/f'{i}.png', tmp_path/f'{i}.png')
    names = ','.join(TagFolder(scenes).classes[1:])
    found = ppc('data', 'folder', tmp_path/'mine', scenes/'JPEGImages', '--tags', scenes/'tags.csv', '--classes', names, '--masks', tmp_path)
    assert found.exit_code == 0 and 'images         20' in found.output and 'masks          2' in found.output
    assert TagFolder(tmp_path/'mine', 'val').ids == ['val00000', 'val00001'] and TagFolder(tmp_path/'mine').classes == TagFolder(scenes).classes


def test_check_tells_all_and_ends_with_1(mine):
    assert ppc('data', 'check', mine).exit_code == 0
    (mine/'JPEGImages'/'train00003.jpg').write_bytes(b'')
    (mine/'SegmentationClass'/'train00004.png').write_bytes(b'nothing')
    found = ppc('data', 'check', mine)
    assert found.exit_code == 1 and 'train00003.jpg' in found.output and 'train00004.png' in found.output and 'images' in found.output


# --- runs -------------------------------------------------------------------------------------------------------------------

def test_plan_says_how_long_and_what_is_missing(scenes, tmp_path):
    params = tmp_path/'p.yaml'
    params.write_text(yaml.safe_dump(dict(QUICK, out='runs/x', data=str(scenes), methods=['cam', 'seam+ppc'], epochs=50)))
    found = ppc('plan', params, '--steps', 2)
    assert found.exit_code == 0 and 'in all' in found.output and 'missing' not in found.output
    rows = {line.split()[0]: line.split() for line in found.output.splitlines() if '/' in line}
    assert rows['seam+ppc/train'][1:5] == ['train', '16', '4', '200'] and rows['cam/seeds'][1:3] == ['train', '16']
    found = ppc('plan', params, '--steps', 1, '-p', 'weights=nowhere.pth')
    assert found.exit_code == 1 and 'missing: nowhere.pth' in found.output and 'in all' in found.output   # the probe needs no weights
    found = ppc('plan', params, '-p', 'val_split=test', '-p', 'weights=nowhere.pth')
    assert found.exit_code == 1 and 'test.txt is missing' in found.output and 'nowhere.pth' in found.output and 'in all' not in found.output
    assert ppc('plan', params, '-p', 'epoch=3').exit_code == 1
    assert not (tmp_path/'runs').exists()


def test_plan_comes_near_the_run(scenes, tmp_path):
    "Steps and images as they are; time within a factor of four, which says that it is counted up at all."
    parameters = dict(QUICK, data=str(scenes), epochs=12, crf=False, segmenter='none', refine='none')
    run(tmp_path/'run', ['seam+ppc'], **parameters)
    (tmp_path/'p.yaml').write_text(yaml.safe_dump(dict(parameters, out='x', methods=['seam+ppc'])))
    line = next(l for l in ppc('plan', tmp_path/'p.yaml').output.splitlines() if l.startswith('in all') or 'seam+ppc/train' in l)
    h, m, s = map(int, line.split()[-1].split(':'))
    took = json.loads((tmp_path/'run'/'seam+ppc'/'train'/'metrics.json').read_text())['seconds']
    assert line.split()[3:5] == ['4', '48'] and took/4 < 3600*h + 60*m + s + 1 < 4*took + 1


# --- networks ---------------------------------------------------------------------------------------------------------------

def test_weights_of_the_recipes():
    found = ppc('weights')
    assert found.exit_code == 0
    for word in ('ilsvrc-cls_rna-a1_cls1000_ep-0001.params', 'f668a2add80e33dfa8f1a0695df91f6d8cfad5ffbb26d1dc7bcd35903a1f6e16', 'voc_seam', 'coco_seam', 'own_data', 'put it there'):
        assert word in found.output, word


def test_weights_needed_fetched_converted(tmp_path):
    recipe = tmp_path/'mine.yaml'
    recipe.write_text(f'out: x\nbackbone: resnet38\nweights: {tmp_path}/a.params\n')
    assert ppc('weights', 'needed', recipe).exit_code == 1 and 'a.params is missing' in ppc('weights', 'needed', recipe).output
    recipe.write_text('out: x\n')
    assert ppc('weights', 'needed', recipe).exit_code == 0 and ppc('weights', 'fetch', recipe).exit_code == 0
    assert 'none of the known files' in ppc('weights', 'fetch', 'resnet5000').output
    assert 'is missing' in ppc('weights', 'convert', tmp_path/'a.params', tmp_path/'a.safetensors').output


def test_predict_goes_on_after_a_broken_image(done, scenes, tmp_path):
    folder = tmp_path/'in'
    folder.mkdir()
    for i in ('val00000', 'val00001'): shutil.copy(scenes/'JPEGImages'/f'{i}.jpg', folder)
    (folder/'broken.jpg').write_bytes((folder/'val00000.jpg').read_bytes()[:500])
    found = ppc('predict', done, folder, '--out', tmp_path/'out')
    assert found.exit_code == 1 and 'broken.jpg' in found.output and 'segmenter' in found.output
    assert (read_mask(tmp_path/'out'/'masks'/'val00001.png') == load(done)(Image.open(folder/'val00001.jpg'))).all()
    (folder/'broken.jpg').unlink()
    found = ppc('predict', done/'cam', folder, '--out', tmp_path/'cam', '--tag', 'cat', '--no-crf')
    cat = TagFolder(scenes).classes.index('cat')
    assert found.exit_code == 0 and 'CAM network' in found.output and {*np.unique(read_mask(tmp_path/'cam'/'masks'/'val00000.png'))} <= {0, cat}
    assert 'no class' in ppc('predict', done/'cam', folder, '--out', tmp_path/'cam', '--tag', 'unicorn').output
    assert ppc('predict', tmp_path, folder, '--out', tmp_path/'cam').exit_code == 1
