"The commands: what they print, and how they end."
import json
import shutil
from pathlib import Path
import numpy as np
import pytest
import yaml
from PIL import Image
from test_coco import small_coco
from test_voc import small_voc
from typer.testing import CliRunner
from ppc.cli import app, notebook
from ppc.data import TagFolder, read_mask
from ppc.pipeline import run
from ppc.predicting import load_model
from ppc.sweeps import run_name

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
    for i in ('val00000', 'val00001'):
        shutil.copy(scenes/'SegmentationClass'/f'{i}.png', tmp_path/f'{i}.png')
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
    for i in ('val00000', 'val00001'):
        shutil.copy(scenes/'JPEGImages'/f'{i}.jpg', folder)
    (folder/'broken.jpg').write_bytes((folder/'val00000.jpg').read_bytes()[:500])
    found = ppc('predict', done, folder, '--out', tmp_path/'out')
    assert found.exit_code == 1 and 'broken.jpg' in found.output and 'segmenter' in found.output
    assert (read_mask(tmp_path/'out'/'masks'/'val00001.png') == load_model(done)(Image.open(folder/'val00001.jpg'))).all()
    (folder/'broken.jpg').unlink()
    found = ppc('predict', done/'cam', folder, '--out', tmp_path/'cam', '--tag', 'cat', '--no-crf')
    cat = TagFolder(scenes).classes.index('cat')
    assert found.exit_code == 0 and 'CAM network' in found.output and {*np.unique(read_mask(tmp_path/'cam'/'masks'/'val00000.png'))} <= {0, cat}
    assert 'no class' in ppc('predict', done/'cam', folder, '--out', tmp_path/'cam', '--tag', 'unicorn').output
    assert ppc('predict', tmp_path, folder, '--out', tmp_path/'cam').exit_code == 1


# --- many runs ------------------------------------------------------------------------------------------------------------------

def test_sweep_shares_what_runs_have_in_common(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TQDM_DISABLE', '1')
    common = {k: v for k, v in QUICK.items() if k != 'k'} | dict(methods=['seam+ppc'], scenes=12, closeups=32, crf=False, refine='none', segmenter='none')
    Path('common.yaml').write_text(yaml.safe_dump(common))
    found = ppc('sweep', notebook(), '-f', 'common.yaml', '-p', 'k=4,8')
    assert found.exit_code == 0 and found.output == '2 done; they are in runs/50_run\n'
    for name in ('scenes', 'pretrain'):
        assert len({Path('runs', '50_run', f'k={k}', name).resolve() for k in (4, 8)}) == 1
    assert Path('runs/50_run/k=4/seam+ppc').resolve() != Path('runs/50_run/k=8/seam+ppc').resolve()
    found = ppc('sweep', notebook(), '-f', 'common.yaml', '-p', 'K=4')
    assert found.exit_code == 1 and "did you mean 'k'" in found.stderr


def put_run(root, miou, **settings):
    (root/(name := run_name(settings))).mkdir(parents=True)
    (root/name/'settings.json').write_text(json.dumps(settings))
    (root/name/'metrics.json').write_text(json.dumps({'seed_miou': {settings['methods'][0]: miou}, 'parameters': settings}))


def test_table_and_report_of_a_sweep(tmp_path):
    "One of the paper's tables by the folder's name, any other by its settings; a markdown file is made anew."
    assert ppc('table', tmp_path).exit_code == 1 and ppc('report', tmp_path).exit_code == 1
    for seed, (seam, ours) in enumerate(((50, 52), (52, 56))):
        for root in ('k', 'mine'):
            put_run(tmp_path/root, seam, methods=['seam'], seed=seed)
            put_run(tmp_path/root, ours, methods=['seam+ppc'], k=8, seed=seed)
    paper, mine = (ppc('table', tmp_path/root).output for root in ('k', 'mine'))
    assert '| K = 8 | 60.87 | 54.0 ± 2.8 | 54.0 | 2 | +5.5 | +3.0 | -9.7 to +15.7 |' in paper and '| K = 64 | 60.55 |  |  | 0, lacks 0, 1 |' in paper
    assert "methods = ['seam+ppc'], k = 8 | 54.0 ± 2.8 |" in mine and '60.87' not in mine
    text = '# Mine\n\n<!-- ppc table k train -->\n{}\n<!-- end -->\n\nAnd so on.\n'
    (tmp_path/'README.md').write_text(text.format('old'))
    assert ppc('table', tmp_path/'README.md').exit_code == 0
    made = (tmp_path/'README.md').read_text()
    assert '| K = 8 | 60.87 | 54.0 ± 2.8 |' in made and made.startswith('# Mine') and made.endswith('<!-- end -->\n\nAnd so on.\n') and 'old' not in made
    (tmp_path/'README.md').write_text(text.replace('train', 'K = 8').format(''))
    assert ppc('table', tmp_path/'README.md').exit_code == 0 and '| train | 51.0 ± 1.4 | 54.0 ± 2.8 | 2 | +5.5 | +3.0 | -9.7 to +15.7 |' in (tmp_path/'README.md').read_text()
    (tmp_path/'README.md').write_text(text.replace('train', 'tram').format(''))
    assert "no 'tram'" in ppc('table', tmp_path/'README.md').stderr
    assert ppc('report', tmp_path/'k').exit_code == 0 and '4 finished runs' in (tmp_path/'k'/'report.html').read_text()
