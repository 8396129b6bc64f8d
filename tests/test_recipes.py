"""Every recipe from originals in their own formats to masks: 24 small images, the tiny backbone in
place of the big one, trainings of two epochs, and nothing else changed."""
import csv
import warnings
from pathlib import Path
import numpy as np
import papermill
import pytest
import yaml
from PIL import Image
from test_coco import small_coco
from test_voc import small_voc
from ppc import cli
from ppc.coco import make_coco
from ppc.data import TagFolder, read_mask
from ppc.folders import folder_report, make_folder
from ppc.methods import contrast_reading
from ppc.parameters import Config
from ppc.pipeline import run
from ppc.saliency import make_saliency, saliency_source
from ppc.scenes import scene
from ppc.training import Batches
from ppc.voc import make_voc
from ppc.work import affinity_options, segmentation_recipe

RECIPES = cli.recipe_names()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings('ignore:__array__ implementation'),
    pytest.mark.filterwarnings('ignore:This DataLoader will create')]


def read_recipe(name):
    return yaml.safe_load((cli.RECIPE_FOLDER/f'{name}.yaml').read_text())


def config_of(name):
    "The parameters of a recipe, where a name of an earlier edition is an error."
    parameters = read_recipe(name)
    for other in ('out', 'methods'):
        parameters.pop(other)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return Config.from_flat(**parameters)


def small_own(folder, n=24):
    "Photographs of two made-up classes in subfolders, and a spreadsheet as Excel in Europe has it."
    rows, rng = [('picture', 'what is in it')], np.random.default_rng(3)
    while len(rows) <= n:
        image, mask, _ = scene(rng)
        words = {('beast', 'bird-like')[c % 2] for c in np.unique(mask) if c}
        path = Path(f'roll {len(rows) % 3}')/f'photo {len(rows):02}.jpg'
        (folder/'images'/path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :96]).save(folder/'images'/path)
        rows.append((path.as_posix(), ' '.join(sorted(words))))
    with open(folder/'what.csv', 'w', newline='', encoding='utf-8-sig') as f:
        csv.writer(f, delimiter=';').writerows(rows)
    return folder/'images', folder/'what.csv'


def make_small_voc(root, originals):
    make_voc(root, small_voc(originals, archives=True))

def make_small_coco(root, originals):
    make_coco(root, small_coco(originals, 8, 16, packed=True)[0])

def make_small_own(root, originals):
    make_folder(root, *small_own(originals))


MAKE = {'voc': make_small_voc, 'coco': make_small_coco, 'own': make_small_own}
LISTS = {  # kind -> list -> images
    'voc': {'train': 8, 'train_aug': 14, 'val': 6, 'test': 4},
    'coco': {'train': 8, 'val': 16},
    'own': {'train': 24}}


@pytest.fixture(scope='module')
def datasets(tmp_path_factory):
    "Kind -> dataset folder, made by what `ppc data` calls."
    roots = {kind: tmp_path_factory.mktemp('datasets')/kind for kind in MAKE}
    for kind, make in MAKE.items():
        make(roots[kind], tmp_path_factory.mktemp('originals'))
    make_saliency(roots['voc'], 'train_aug')
    return roots


@pytest.mark.parametrize('kind', MAKE)
def test_datasets_are_whole(datasets, kind):
    table, problems = folder_report(datasets[kind])
    few = 'no image is tagged', 'which no image'  # a few scenes have few of the classes
    assert not [p for p in problems if not any(words in p for words in few)]
    assert table.loc['images'].to_dict() == LISTS[kind]


def small_version(recipe):
    "The recipe with the tiny backbone and trainings of two epochs."
    for part in ('', 'refine_', 'seg_'):
        if recipe.get(f'{part}backbone'):
            recipe = recipe | {f'{part}backbone': 'tiny', f'{part}weights': ''}
    options = ['seg_options']
    if recipe['refine'] in ('psa', 'irn'):
        options.append('refine_options')
    short = {k: {**recipe.get(k, {}), 'epochs': 2} for k in options}
    return recipe | {'epochs': 2} | short


# demo is run by test_package, own_data by test_readme
@pytest.mark.parametrize('name', [n for n in RECIPES if n not in ('demo', 'own_data')])
def test_recipes_from_end_to_end(name, datasets, tmp_path):
    recipe, root = small_version(read_recipe(name)), datasets[name.split('_')[0]]
    out, methods = recipe.pop('out'), recipe.pop('methods')
    found = run(tmp_path/'run', methods, **recipe | {'data': str(root)})
    assert Path(out).parent == Path('runs') and methods == list(found['seed_miou'])
    data = TagFolder(root, recipe['mask_split'])
    for k, i in enumerate(data.ids):
        mask = read_mask(tmp_path/'run'/'masks'/f'{i}.png')
        tagged = {0, *(data.tags[k].nonzero().flatten() + 1).tolist()}
        assert mask.shape[::-1] == data.image(k).size and {*np.unique(mask)} <= tagged
    rows = found['table']
    assert rows[0]['saliency'] == (saliency_source(root) if 'eps' in name else None)
    assert all(row['miou'] is not None for row in rows)
    assert rows[-1]['stage'] == 'segmenter' and rows[-1]['list'] == 'val'
    assert [row['list'] for row in rows[:-1]] == ['train']*(len(rows) - 1)


@pytest.mark.parametrize('name', RECIPES)
def test_recipes_are_parameters_of_the_notebook(name):
    "So that `papermill -f` takes them; and every parameter has its type and its present name."
    known = papermill.inspect_notebook(str(cli.run_notebook()))
    assert {*read_recipe(name)} <= {*known}
    config_of(name)


def test_a_recipe_names_itself():
    "What its comments say to type is its own name, and no path of a repository."
    assert RECIPES == ['coco_seam', 'demo', 'own_data', 'voc_cam', 'voc_eps', 'voc_seam']
    for name in RECIPES:
        text = (cli.RECIPE_FOLDER/f'{name}.yaml').read_text()
        assert f'ppc run {name}\n' in text and 'recipes/' not in text
        assert read_recipe(name)['out'] in (f'runs/{name}', 'runs/mine')
        assert ('ppc weights needed' in text) == (f'`ppc weights needed {name}`' in text)


@pytest.mark.parametrize('name', ['voc_seam', 'voc_eps', 'voc_cam'])
def test_what_the_runs_on_voc_have_in_common(name):
    config = config_of(name)
    c, seeds = config.cam, config.seeds
    assert (c.backbone, c.output_stride) == ('resnet38', 8)
    assert (c.resize, c.crop, c.batch_size) == ([448, 768], 448, 8)
    assert (c.optimizer, c.lr, c.head_lr_mult) == ('SGD', .01, 10)
    assert (c.weight_decay, c.momentum) == (5e-4, 5e-4)
    assert (seeds.scales, seeds.seed_split) == ([.5, 1, 1.5, 2], 'train')
    assert (config.refine.mask_split, config.segment.val_split) == ('train_aug', 'val')


def test_voc_seam_says_what_the_facts_say():
    "Sections 1 and 6 to 11 of the facts, typed again; so in the tests that follow."
    config = config_of('voc_seam')
    c, g = config.cam, config.segment
    assert (c.target, c.k, c.tau, c.alpha, c.beta, c.dropout) == (128, 32, .1, .1, .1, .5)
    assert Batches(10_582, 8, c.epochs).steps == 10_576
    reading, psa = contrast_reading(config), affinity_options(config)
    ssc = segmentation_recipe(config)
    assert (reading.grid, reading.level) == (16, .2)
    assert (reading.background, reading.assigned) == ('constant', False)
    assert (psa.lr, psa.t, psa.beta, psa.level) == (.01, 64, 8, .27)
    assert (psa.background, psa.crop) == ('constant', 448) and not config.seeds.crf_power
    assert (g.segmenter, ssc.lr, ssc.crop, ssc.batch_size) == ('largefov', 1e-3, 448, 10)
    assert abs(Batches(10_582, 10, ssc.epochs).steps - 20_000) < 10


def test_voc_eps_says_what_the_facts_say():
    config = config_of('voc_eps')
    c, seeds = config.cam, config.seeds
    assert (c.k, c.saliency_weight, c.saliency_overlap) == (16, .5, .4)
    assert (contrast_reading(config).level, c.dropout) == (.1, 0)
    assert Batches(10_582, 8, c.epochs).steps == 19_830
    assert (seeds.crf_power, seeds.crf_iterations) == (8, 5)
    assert (config.refine.refine, config.segment.seg_backbone) == ('crf', 'resnet101')


def test_voc_cam_says_what_the_facts_say():
    config = config_of('voc_cam')
    irn, dlp = affinity_options(config), segmentation_recipe(config)
    assert config.refine.refine_backbone == 'resnet50'
    assert (irn.crop, irn.batch_size, irn.t, irn.beta) == (512, 32, 256, 10)
    assert (irn.fg, irn.bg) == (.3, .05)
    assert config.segment.segmenter == 'aspp'
    assert (dlp.crop, dlp.lr, dlp.msc) == (321, 2.5e-4, (.5, .75))


def test_coco_seam_says_what_the_facts_say():
    coco = segmentation_recipe(config_of('coco_seam'))
    assert (coco.lr, coco.batch_size) == (2e-4, 20)
    assert abs(Batches(82_081, 20, coco.epochs).steps/100_000 - 1) < .01
