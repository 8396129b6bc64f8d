"The commands: what they print, and how they end."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
import yaml
from PIL import Image
from test_coco import small_coco
from test_voc import small_voc
from typer.testing import CliRunner
from ppc import cli
from ppc.cli import app, run_notebook
from ppc.data import TagFolder, read_mask, write_mask
from ppc.folders import class_counts
from ppc.parameters import Config
from ppc.pipeline import read_run, run
from ppc.predicting import load_model
from ppc.sweeps import run_name, write_records

QUICK = dict(
    batch_size=4, crop=64, target=32, resize=[64, 96], k=4,
    seg_options=dict(batch_size=4, epochs=1, crop=64))
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore:__array__ implementation')]


def ppc(*args):
    "The result of a command: exit_code, output (of both streams), stdout, stderr."
    env = {'COLUMNS': '200', 'TERM': 'dumb'}
    return CliRunner().invoke(app, [str(a) for a in args], env=env)


@pytest.fixture(scope='module')
def done(scenes, tmp_path_factory):
    "A finished run of one method and a segmenter."
    out = tmp_path_factory.mktemp('runs')/'done'
    run(out, ['cam'], data=str(scenes), **QUICK)
    return out


@pytest.fixture
def empty(tmp_path, monkeypatch):
    "An empty folder as the working directory, as after `pip install`."
    folder = tmp_path/'empty'
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv('TQDM_DISABLE', '1')
    return folder


# --- data -----------------------------------------------------------------------------------------

def test_voc(tmp_path):
    found = ppc('data', 'voc', tmp_path/'voc', *small_voc(tmp_path/'original', archives=True))
    assert found.exit_code == 0 and 'train_aug      14' in found.output
    assert len(TagFolder(tmp_path/'voc', 'val')) == 6
    found = ppc('data', 'saliency', tmp_path/'voc', '--split', 'train_aug')
    assert found.exit_code == 0 and "not the paper's" in found.output
    assert 'maps           14' in found.output
    sources = small_voc(tmp_path/'again')
    options = '--no-difficult', '--tags', tmp_path/'cls_labels.npy'
    found = ppc('data', 'voc', tmp_path/'voc', *sources, *options)
    assert found.exit_code == 1 and 'not both' in found.output


def test_coco(tmp_path):
    found = ppc('data', 'coco', tmp_path/'coco', *small_coco(tmp_path/'original', 4, 2)[0])
    assert found.exit_code == 0 and 'classes        8' in found.output
    assert 'without_tags   2' in found.output
    found = ppc('data', 'coco', tmp_path/'none')
    assert found.exit_code == 1 and 'cocodataset.org' in found.output


def test_own_folder_with_masks(scenes, tmp_path):
    for i in ('val00000', 'val00001'):
        shutil.copy(scenes/'SegmentationClass'/f'{i}.png', tmp_path/f'{i}.png')
    names, made = ','.join(TagFolder(scenes).classes[1:]), tmp_path/'mine'
    options = '--tags', scenes/'tags.csv', '--classes', names, '--masks', tmp_path
    found = ppc('data', 'folder', made, scenes/'JPEGImages', *options)
    assert found.exit_code == 0 and 'images         20' in found.output
    assert 'masks          2' in found.output
    assert TagFolder(made, 'val').ids == ['val00000', 'val00001']
    assert TagFolder(made).classes == TagFolder(scenes).classes


def test_own_folder_prints_its_classes_and_converts_masks(scenes, tmp_path):
    "Masks of 0 and 255: the check says so, and `--mask-values` makes objects of them."
    made, masks = tmp_path/'mine', tmp_path/'masks'
    for i in ('val00000', 'val00001'):
        object_mask = np.where(read_mask(scenes/'SegmentationClass'/f'{i}.png') > 0, 255, 0)
        write_mask(masks/f'{i}.png', object_mask)
    given = 'data', 'folder', made, scenes/'JPEGImages', '--tags', scenes/'tags.csv'
    found = ppc(*given, '--masks', masks)
    counts = ', '.join(f'{name} {n}' for name, n in class_counts(made).items())
    assert found.exit_code == 0 and f'classes        6: {counts}' in found.output
    assert '18 of 20 photographs lack a mask: these are the list train' in found.output
    found = ppc('data', 'check', made)
    assert found.exit_code == 1 and '--mask-values 255=1' in found.stderr
    assert 'The object should be 1' in found.stderr
    assert ppc(*given, '--masks', masks, '--mask-values', '255=1').exit_code == 0
    assert ppc('data', 'check', made).exit_code == 0
    assert {*np.unique(TagFolder(made, 'val').mask(0))} == {0, 1}
    found = ppc(*given)
    assert found.exit_code == 0 and 'masks          2' in found.output
    found = ppc(*given, '--masks', masks, '--mask-values', '255=cat')
    assert found.exit_code == 1 and 'VALUE=CLASS' in found.stderr


def test_check_says_how_many_masks_are_missing(mine):
    (mine/'SegmentationClass'/'val00001.png').unlink()
    found = ppc('data', 'check', mine)
    assert found.exit_code == 0
    assert "1 of 4 photographs in the list 'val' lack a mask" in found.output


def test_misread_tags_and_classes_with_spaces(scenes, tmp_path):
    given = 'data', 'folder', tmp_path/'mine', scenes/'JPEGImages', '--tags', tmp_path/'t.csv'
    (tmp_path/'t.csv').write_text('image,tags\ntrain00000,dog|cat\n')
    found = ppc(*given)
    assert found.exit_code == 1 and "line 2 has 'dog|cat'" in found.stderr
    (tmp_path/'t.csv').write_text('image,tags\ntrain00000,"dog, cat"\n')
    found = ppc(*given, '--classes', 'cat, dog')
    assert found.exit_code == 0 and 'classes        2: cat 1, dog 1' in found.output
    assert TagFolder(tmp_path/'mine').classes == ['background', 'cat', 'dog']


def test_check_names_every_problem_and_ends_with_1(mine):
    assert ppc('data', 'check', mine).exit_code == 0
    (mine/'JPEGImages'/'train00003.jpg').write_bytes(b'')
    (mine/'SegmentationClass'/'train00004.png').write_bytes(b'nothing')
    found = ppc('data', 'check', mine)
    assert found.exit_code == 1
    for word in ('train00003.jpg', 'train00004.png', 'images'):
        assert word in found.output


# --- recipes --------------------------------------------------------------------------------------

def test_recipes_are_listed_and_printed(empty):
    found = ppc('recipe')
    assert found.exit_code == 0 and found.output.split() == cli.recipe_names()
    for name in cli.recipe_names():
        found = ppc('recipe', name)
        assert found.exit_code == 0
        assert found.stdout == (cli.RECIPE_FOLDER/f'{name}.yaml').read_text(encoding='utf-8')
    found = ppc('recipe', 'voc_sean')
    assert found.exit_code == 1 and "There is no recipe 'voc_sean'" in found.stderr
    assert ', '.join(cli.recipe_names()) in found.stderr


@pytest.mark.parametrize('command', ['run', 'plan', ('weights', 'needed')])
@pytest.mark.parametrize('name', ['voc_sean', 'recipes/voc_sean.yaml'])
def test_an_unknown_recipe_is_named_with_those_there_are(empty, command, name):
    command = [command] if isinstance(command, str) else command
    found = ppc(*command, name)
    assert found.exit_code == 1 and f'{name} is missing' in found.stderr
    assert ', '.join(cli.recipe_names()) in found.stderr
    assert not [*empty.iterdir()]


def test_a_recipe_is_found_by_its_name_from_an_empty_folder(empty, scenes):
    "Planned on the scenes, and its weights looked for; run, it says that its data are missing."
    tiny = 'backbone=tiny', 'weights=', 'output_stride=8', 'crop=64', 'target=32'
    given = (*tiny, f'data={scenes}', 'resize=[64, 96]', 'batch_size=4', 'workers=0')
    options = [word for item in given for word in ('-p', item)]
    found = ppc('plan', 'own_data', '--steps', 1, *options)
    assert found.exit_code == 0 and 'seam/train' in found.output and 'in all' in found.output
    found = ppc('plan', 'voc_seam')
    assert found.exit_code == 1 and 'datasets/voc' in found.output
    assert 'ilsvrc-cls_rna-a1_cls1000_ep-0001.params is missing' in found.output
    found = ppc('weights', 'needed', 'voc_seam', 'own_data')
    assert found.exit_code == 1 and 'voc_seam' in found.output and 'own_data' in found.output
    assert not [*empty.iterdir()]
    found = ppc('run', 'voc_seam')
    assert found.exit_code == 1 and 'datasets/voc' in found.stderr
    assert not isinstance(found.exception, Exception)


def test_a_file_goes_before_a_recipe_of_its_name(empty):
    "And a recipe is found in spite of a folder of its name."
    Path('voc_seam').mkdir()
    assert cli.find_recipe('voc_seam') == cli.RECIPE_FOLDER/'voc_seam.yaml'
    Path('voc_seam.yaml').write_text('out: x\n')
    assert cli.find_recipe('voc_seam.yaml') == Path('voc_seam.yaml')


# --- runs -----------------------------------------------------------------------------------------

def test_the_notebook_of_a_run_is_in_the_package():
    "A copy of 50_run without outputs, as nbs/export.py writes it."
    path = run_notebook()
    assert path.parent == Path(cli.__file__).parent
    book = json.loads(path.read_text(encoding='utf-8'))
    source = Path(__file__).parent.parent/'nbs'/'50_run.ipynb'
    original = json.loads(source.read_text(encoding='utf-8'))
    assert [c['source'] for c in book['cells']] == [c['source'] for c in original['cells']]
    code = [c for c in book['cells'] if c['cell_type'] == 'code']
    assert all(c['outputs'] == [] and c['execution_count'] is None for c in code)


def test_parameters_of_an_earlier_edition(empty, scenes):
    "Accepted by `ppc plan` and `ppc run`, each with a sentence that gives the present name."
    shorter = dict(QUICK, crf=False, refine='none', segmenter='none')
    old = dict(lr_new=5, classifier='drawn', options={'negatives': 'drawn'})
    given = dict(shorter, **old, out='runs/x', data=str(scenes), methods=['seam+ppc'])
    Path('old.yaml').write_text(yaml.safe_dump(given))
    planned = ppc('plan', 'old.yaml', '--steps', 1)
    assert planned.exit_code == 0 and 'in all' in planned.stdout
    made = ppc('run', 'old.yaml')
    assert made.exit_code == 0 and 'runs/x/run.ipynb' in made.stdout
    for found in (planned, made):
        assert 'ppc: lr_new: 5 is now head_lr_mult: 5.' in found.stderr
        assert "ppc: classifier: 'drawn' is now classifier: 'random'." in found.stderr
        assert "{'negatives': 'drawn'} is now options: {'negatives': 'random'}." in found.stderr
        assert 'lr_new' not in found.stdout
    config = read_run('runs/x')[1]
    assert (config.cam.head_lr_mult, config.cam.classifier) == (5, 'random')
    assert config.cam.options == {'negatives': 'random'}
    found = ppc('run', 'old.yaml', '-p', 'lr_neu=5')
    assert found.exit_code == 1 and "There is no parameter 'lr_neu'" in found.stderr


@pytest.mark.parametrize('line, given, words', [
    ('k: 1\nk: 2', '', 'k stands there 2 times'), ('out: 12', '', 'out is 12, it should be'),
    ('', 'k=[3', '-p k=[3 cannot be read: it is not YAML'), ('3: 4', '', '"name: value"'),
    ('scales: []', '', 'scales is []'), ('', 'lr=-1e-4', 'lr is -0.0001, it should be above 0'),
    ('seg_options: {lr: fast}', '', 'options of recipe: lr'), ('device: gpu', '', 'auto, cpu'),
    ('methods: seam+pcp', '', "no method 'pcp'"), ('', 'out=', 'names no run folder')])
@pytest.mark.parametrize('command', ['run', 'plan'])
def test_a_wrong_value_is_a_sentence(empty, scenes, command, line, given, words):
    out = '' if line.startswith('out') else 'out: x\n'
    Path('p.yaml').write_text(f'{out}data: {scenes}\n{line}\n')
    found = ppc(command, 'p.yaml', *(['-p', given] if given else []))
    assert found.exit_code == 1 and words in found.stderr and len(found.stderr.splitlines()) == 1
    assert not Path('x').exists() and not isinstance(found.exception, Exception)


def test_values_of_a_file_as_they_are_meant(empty):
    "And on the command line; `seed: 010` is ten."
    text = 'out: ~/runs/x\ndata: ~/mine\nlr: 1e-4\nprecision: no\nseed: 010\nmethods: seam+ppc\n'
    Path('p.yaml').write_text(text + 'seg_options: {lr: 3e-4}\n')
    home = Path.home()
    for extra in ([], ['lr=1e-4', 'precision=no', 'seed=010', 'methods=seam+ppc', 'data=~/mine']):
        out, found = cli.read_parameters('p.yaml', extra)
        assert out == home/'runs'/'x' and found['data'] == str(home/'mine')
        assert found.pop('methods') == ['seam+ppc'] and found['seg_options'] == {'lr': 3e-4}
        config = Config.from_flat(**found)
        assert (config.cam.lr, config.run.precision, config.run.seed) == (1e-4, 'no', 10)


TINY = dict(QUICK, methods='cam', crf=False, segmenter='none')


def test_changed_data_and_fresh_from(empty, mine):
    Path('p.yaml').write_text(yaml.safe_dump(dict(TINY, out='x', data=str(mine))))
    assert ppc('run', 'p.yaml').exit_code == 0
    tags = mine/'tags.csv'
    tags.write_text(tags.read_text().replace('train00001,', 'train00001,panda ', 1))
    found = ppc('run', 'p.yaml')
    assert found.exit_code == 1 and 'tags changed: 1 (train00001)' in found.stderr
    assert '--fresh-from cam/train' in found.stderr
    assert ppc('run', 'p.yaml', '--fresh-from', 'cam/train').exit_code == 0
    found = ppc('run', 'p.yaml', '--fresh-from', 'crf')
    assert found.exit_code == 1 and 'choose from cam/train' in found.stderr


def ppc_elsewhere(scenes, **env):
    "`ppc run` in a process of its own, with another environment."
    Path('p.yaml').write_text(yaml.safe_dump(dict(TINY, out='x', data=str(scenes), refine='none')))
    root = str(Path(cli.__file__).parent.parent)
    env = {**os.environ, 'PYTHONPATH': root, 'TQDM_DISABLE': '1', **env}
    command = [sys.executable, '-m', 'ppc', 'run', 'p.yaml']
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and 'seed    cam train' in done.stdout, done.stderr
    assert 'Traceback' not in done.stderr
    return done


def test_a_foreign_kernel_python3(empty, scenes, tmp_path):
    "In the user's folder, of a Python without ppc; the notebook is executed by this one."
    folder = tmp_path/'home'/'kernels'/'python3'
    folder.mkdir(parents=True)
    spec = {'argv': ['/bin/false', '{connection_file}'], 'display_name': 'x', 'language': 'python'}
    (folder/'kernel.json').write_text(json.dumps(spec))
    ppc_elsewhere(scenes, JUPYTER_PATH=str(tmp_path/'home'))
    assert Path('x/run.ipynb').is_file() and Path('x/result.png').is_file()


def test_no_home_and_no_git(empty, scenes, tmp_path):
    "A home that cannot be written to, even by root, and a PATH without git."
    (tmp_path/'home').write_text('')
    ppc_elsewhere(scenes, HOME=str(tmp_path/'home'), PATH=str(tmp_path))
    assert Path('x/run.ipynb').is_file()
    assert json.loads(Path('x/metrics.json').read_text())['commit'] is None


@pytest.mark.parametrize('error', [RuntimeError('It died'), PermissionError(13, 'no'), OSError()])
def test_a_run_without_its_notebook(empty, scenes, error, monkeypatch):
    "Is done all the same: its table is printed, and what is missing is said."
    def fail(*args, **options): raise error
    monkeypatch.setattr(cli.papermill, 'execute_notebook', fail)
    Path('p.yaml').write_text(yaml.safe_dump(dict(TINY, out='x', data=str(scenes), refine='none')))
    found = ppc('run', 'p.yaml')
    assert found.exit_code == 0 and 'seed    cam train' in found.stdout
    assert 'its notebook could not be made' in found.stderr and Path('x/report.html').is_file()


def test_plan_says_how_long_and_what_is_missing(scenes, tmp_path):
    params = tmp_path/'p.yaml'
    given = dict(QUICK, out='runs/x', data=str(scenes), methods=['cam', 'seam+ppc'], epochs=50)
    params.write_text(yaml.safe_dump(given))
    found = ppc('plan', params, '--steps', 2)
    assert found.exit_code == 0 and 'in all' in found.output and 'missing' not in found.output
    rows = {line.split()[0]: line.split() for line in found.output.splitlines() if '/' in line}
    assert rows['seam+ppc/train'][1:5] == ['train', '16', '4', '200']
    assert rows['cam/seeds'][1:3] == ['train', '16']
    found = ppc('plan', params, '--steps', 1, '-p', 'weights=nowhere.pth')
    assert found.exit_code == 1 and 'missing: nowhere.pth' in found.output
    assert 'in all' in found.output  # the probe needs no weights
    found = ppc('plan', params, '-p', 'val_split=test', '-p', 'weights=nowhere.pth')
    assert found.exit_code == 1 and 'test.txt is missing' in found.output
    assert 'nowhere.pth' in found.output and 'in all' not in found.output
    assert ppc('plan', params, '-p', 'epoch=3').exit_code == 1
    assert not (tmp_path/'runs').exists()


def test_plan_comes_near_the_run(scenes, tmp_path):
    "Steps and images as they are; time within a factor of four, which shows that it is summed."
    shorter = dict(QUICK, crf=False, refine='none', segmenter='none')
    parameters = dict(shorter, data=str(scenes), epochs=12)
    run(tmp_path/'run', ['seam+ppc'], **parameters)
    text = yaml.safe_dump(dict(parameters, out='x', methods=['seam+ppc']))
    (tmp_path/'p.yaml').write_text(text)
    lines = ppc('plan', tmp_path/'p.yaml').output.splitlines()
    line = next(x for x in lines if x.startswith('in all') or 'seam+ppc/train' in x)
    h, m, s = map(int, line.split()[-1].split(':'))
    planned = 3600*h + 60*m + s
    took = json.loads((tmp_path/'run'/'seam+ppc'/'train'/'metrics.json').read_text())['seconds']
    assert line.split()[3:5] == ['4', '48'] and took/4 < planned + 1 < 4*took + 1


# --- networks -------------------------------------------------------------------------------------

def test_weights_of_the_recipes():
    found = ppc('weights')
    assert found.exit_code == 0
    sha = 'f668a2add80e33dfa8f1a0695df91f6d8cfad5ffbb26d1dc7bcd35903a1f6e16'
    file = 'ilsvrc-cls_rna-a1_cls1000_ep-0001.params'
    for word in (file, sha, 'voc_seam', 'coco_seam', 'own_data', 'put it there'):
        assert word in found.output, word


def test_weights_needed_fetched_converted(tmp_path):
    recipe = tmp_path/'mine.yaml'
    recipe.write_text(f'out: x\nbackbone: resnet38\nweights: {tmp_path}/a.params\n')
    found = ppc('weights', 'needed', recipe)
    assert found.exit_code == 1 and 'a.params is missing' in found.output
    recipe.write_text('out: x\n')
    assert ppc('weights', 'needed', recipe).exit_code == 0
    assert ppc('weights', 'fetch', recipe).exit_code == 0
    assert 'none of the known files' in ppc('weights', 'fetch', 'resnet5000').output
    found = ppc('weights', 'convert', tmp_path/'a.params', tmp_path/'a.safetensors')
    assert 'is missing' in found.output


def test_predict_goes_on_after_a_broken_image(done, scenes, tmp_path):
    folder, out, cam = tmp_path/'in', tmp_path/'out', tmp_path/'cam'
    folder.mkdir()
    for i in ('val00000', 'val00001'):
        shutil.copy(scenes/'JPEGImages'/f'{i}.jpg', folder)
    (folder/'broken.jpg').write_bytes((folder/'val00000.jpg').read_bytes()[:500])
    found = ppc('predict', done, folder, '--out', out)
    assert found.exit_code == 1 and 'broken.jpg' in found.output and 'segmenter' in found.output
    want = load_model(done)(Image.open(folder/'val00001.jpg'))
    assert (read_mask(out/'masks'/'val00001.png') == want).all()
    (folder/'broken.jpg').unlink()
    found = ppc('predict', done/'cam', folder, '--out', cam, '--tag', 'cat', '--no-crf')
    assert found.exit_code == 0 and 'CAM network' in found.output
    cat = TagFolder(scenes).classes.index('cat')
    assert {*np.unique(read_mask(cam/'masks'/'val00000.png'))} <= {0, cat}
    found = ppc('predict', done/'cam', folder, '--out', cam, '--tag', 'unicorn')
    assert 'no class' in found.output
    assert ppc('predict', tmp_path, folder, '--out', cam).exit_code == 1


# --- many runs ------------------------------------------------------------------------------------

def test_sweep_shares_what_runs_have_in_common(empty):
    shared = {k: v for k, v in QUICK.items() if k != 'k'} | dict(
        methods=['seam+ppc'], scenes=12, closeups=32, crf=False, refine='none', segmenter='none')
    Path('common.yaml').write_text(yaml.safe_dump(shared))
    root = Path('runs')/run_notebook().stem
    found = ppc('sweep', run_notebook(), '-f', 'common.yaml', '-p', 'k=4,8')
    assert found.exit_code == 0 and found.output == f'2 done; they are in {root}\n'
    for name in ('scenes', 'pretrain'):
        assert len({(root/f'k={k}'/name).resolve() for k in (4, 8)}) == 1
    assert len({(root/f'k={k}'/'seam+ppc').resolve() for k in (4, 8)}) == 2
    found = ppc('sweep', run_notebook(), '-f', 'common.yaml', '-p', 'k=4,8', '-p', 'lr=1e-3')
    assert found.exit_code == 0 and '2 done' in found.output  # a number, and not a text
    found = ppc('sweep', run_notebook(), '-f', 'common.yaml', '-p', 'K=4')
    assert found.exit_code == 1 and "did you mean 'k'" in found.stderr


def put_run(root, miou, **settings):
    "The files of a finished run of a sweep."
    folder = root/run_name(settings)
    folder.mkdir(parents=True)
    (folder/'settings.json').write_text(json.dumps(settings))
    found = {'seed_miou': {settings['methods'][0]: miou}, 'parameters': settings}
    (folder/'metrics.json').write_text(json.dumps(found))


def test_table_and_report_of_a_sweep(tmp_path):
    """One of the paper's tables by the folder's name, any other by its settings; a markdown file is
    made anew."""
    assert ppc('table', tmp_path).exit_code == 1 and ppc('report', tmp_path).exit_code == 1
    for seed, (seam, ours) in enumerate(((50, 52), (52, 56))):
        for root in ('k', 'mine'):
            put_run(tmp_path/root, seam, methods=['seam'], seed=seed)
            put_run(tmp_path/root, ours, methods=['seam+ppc'], k=8, seed=seed)
    paper, mine = (ppc('table', tmp_path/root).output for root in ('k', 'mine'))
    assert '| K = 8 | 60.87 | 54.0 ± 2.8 | 54.0 | 2 | +5.5 | +3.0 | -9.7 to +15.7 |' in paper
    assert '| K = 64 | 60.55 |  |  | 0, lacks 0, 1 |' in paper
    assert "methods = ['seam+ppc'], k = 8 | 54.0 ± 2.8 |" in mine and '60.87' not in mine
    page = tmp_path/'README.md'
    text = '# Mine\n\n<!-- ppc table k train -->\n{}\n<!-- end -->\n\nAnd so on.\n'
    page.write_text(text.format('old'))
    assert ppc('table', page).exit_code == 0
    made = page.read_text()
    assert '| K = 8 | 60.87 | 54.0 ± 2.8 |' in made and 'old' not in made
    assert made.startswith('# Mine') and made.endswith('<!-- end -->\n\nAnd so on.\n')
    page.write_text(text.replace('train', 'K = 8').format(''))
    row = '| train | 51.0 ± 1.4 | 54.0 ± 2.8 | 2 | +5.5 | +3.0 | -9.7 to +15.7 |'
    assert ppc('table', page).exit_code == 0 and row in page.read_text()
    page.write_text(text.replace('train', 'tram').format(''))
    assert "no 'tram'" in ppc('table', page).stderr
    write_records(tmp_path/'k')
    shutil.move(tmp_path/'k', tmp_path/'moved')
    found = ppc('report', tmp_path/'k.jsonl')
    assert found.exit_code == 0 and '4 finished runs' in (tmp_path/'k.html').read_text()
    assert ppc('report', tmp_path/'none.jsonl').exit_code == 1
    shutil.move(tmp_path/'moved', tmp_path/'k')
    assert ppc('report', tmp_path/'k').exit_code == 0
    assert '4 finished runs' in (tmp_path/'k'/'report.html').read_text()
