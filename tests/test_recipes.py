"Every recipe from originals in their own formats to masks: 24 small images, the tiny backbone in place of the big one, trainings of two epochs, and nothing else changed."
import csv
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
from ppc.parameters import settings
from ppc.pipeline import run
from ppc.saliency import make_saliency, saliency_source
from ppc.scenes import CLASSES, scene
from ppc.stages import affinity_options, contrast_reading, segmentation_recipe
from ppc.training import Batches
from ppc.voc import make_voc

RECIPES = {p.stem: p for p in sorted((Path(__file__).parent.parent/'recipes').glob('*.yaml'))}
pytestmark = [pytest.mark.filterwarnings('ignore:__array__ implementation'), pytest.mark.filterwarnings('ignore:This DataLoader will create')]


def small_own(folder, n=24):
    "Photographs of two made-up classes in subfolders, and the spreadsheet of somebody in Europe."
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


MAKE = {'voc': lambda root, there: make_voc(root, small_voc(there, archives=True)), 'coco': lambda root, there: make_coco(root, small_coco(there, 8, 16, packed=True)[0]),
        'own': lambda root, there: make_folder(root, *small_own(there))}


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
    assert not [p for p in problems if 'no image is tagged' not in p and 'which no image' not in p]   # a few scenes have few of the classes
    lists = dict(voc={'train': 8, 'train_aug': 14, 'val': 6, 'test': 4}, coco={'train': 8, 'val': 16}, own={'train': 24})[kind]
    assert table.loc['images'].to_dict() == lists


@pytest.mark.parametrize('name', [n for n in RECIPES if n != 'own_data'])   # that one is run by test_readme, as a user does
def test_recipes_from_end_to_end(name, datasets, tmp_path):
    recipe = yaml.safe_load(RECIPES[name].read_text())
    out, methods, root = recipe.pop('out'), recipe.pop('methods'), datasets[name.split('_')[0]]
    for part in ('', 'refine_', 'seg_'):
        if recipe.get(f'{part}backbone'):
            recipe |= {f'{part}backbone': 'tiny', f'{part}weights': ''}
    learned = [k for k, there in (('refine_options', recipe['refine'] in ('psa', 'irn')), ('seg_options', True)) if there]
    recipe |= {'epochs': 2, **{k: {**recipe.get(k, {}), 'epochs': 2} for k in learned}}
    found = run(tmp_path/'run', methods, **recipe | {'data': str(root)})
    assert Path(out).parent == Path('runs') and methods == list(found['seed_miou'])
    data = TagFolder(root, recipe['mask_split'])
    for k, i in enumerate(data.ids):
        mask = read_mask(tmp_path/'run'/'masks'/f'{i}.png')
        assert mask.shape[::-1] == data.image(k).size and {*np.unique(mask)} <= {0, *(data.tags[k].nonzero().flatten() + 1).tolist()}   # only what was told
    rows = found['table']
    assert rows[0]['saliency'] == (saliency_source(root) if 'eps' in name else None)
    assert all(row['miou'] is not None for row in rows)
    assert rows[-1]['stage'] == 'segmenter' and rows[-1]['list'] == 'val' and [r['list'] for r in rows[:-1]] == ['train']*(len(rows) - 1)


@pytest.mark.parametrize('name', RECIPES)
def test_recipes_are_parameters_of_the_notebook(name):
    "So that `papermill -f` takes them; and every parameter has its type."
    recipe = yaml.safe_load(RECIPES[name].read_text())
    known = papermill.inspect_notebook(str(cli.notebook()))
    assert {*recipe} <= {*known}
    recipe.pop('out'), recipe.pop('methods')
    settings(**recipe)


def test_recipes_say_what_the_facts_say():
    "Sections 1 and 6 to 11 of the facts, typed again."
    parts = {n: settings(**{k: v for k, v in yaml.safe_load(p.read_text()).items() if k not in ('out', 'methods')}).values() for n, p in RECIPES.items()}
    for name in ('voc_seam', 'voc_eps', 'voc_cam'):
        s, c, seeds, r, g = parts[name]
        assert (c.backbone, c.output_stride, c.resize, c.crop, c.batch_size) == ('resnet38', 8, [448, 768], 448, 8)
        assert (c.optimizer, c.lr, c.lr_new, c.weight_decay, c.momentum) == ('SGD', .01, 10, 5e-4, 5e-4)
        assert (seeds.scales, seeds.seed_split, r.mask_split, g.val_split) == ([.5, 1, 1.5, 2], 'train', 'train_aug', 'val')
    _, seam, seeds, r, g = parts['voc_seam']
    assert (seam.target, seam.k, seam.tau, seam.alpha, seam.beta, seam.dropout) == (128, 32, .1, .1, .1, .5) and Batches(10_582, 8, seam.epochs).steps == 10_576
    reading, psa, ssc = contrast_reading(seam), affinity_options(r), segmentation_recipe(g)
    assert (reading.grid, reading.level, reading.background, reading.assigned) == (16, .2, 'constant', False)
    assert (psa.lr, psa.t, psa.beta, psa.level, psa.background, psa.crop) == (.01, 64, 8, .27, 'constant', 448) and not seeds.crf_power
    assert (g.segmenter, ssc.lr, ssc.crop, ssc.batch_size) == ('largefov', 1e-3, 448, 10) and abs(Batches(10_582, 10, ssc.epochs).steps - 20_000) < 10
    _, eps, seeds, r, g = parts['voc_eps']
    assert (eps.k, eps.saliency_weight, eps.saliency_overlap, contrast_reading(eps).level, eps.dropout) == (16, .5, .4, .1, 0)
    assert Batches(10_582, 8, eps.epochs).steps == 19_830 and (seeds.crf_power, seeds.crf_iterations, r.refine, g.seg_backbone) == (8, 5, 'crf', 'resnet101')
    _, _, _, r, g = parts['voc_cam']
    irn, dlp = affinity_options(r), segmentation_recipe(g)
    assert (r.refine_backbone, irn.crop, irn.batch_size, irn.t, irn.beta, irn.fg, irn.bg) == ('resnet50', 512, 32, 256, 10, .3, .05)
    assert (g.segmenter, dlp.crop, dlp.lr, dlp.msc) == ('aspp', 321, 2.5e-4, (.5, .75))
    _, _, _, r, g = parts['coco_seam']
    coco = segmentation_recipe(g)
    assert (coco.lr, coco.batch_size) == (2e-4, 20) and abs(Batches(82_081, 20, coco.epochs).steps/100_000 - 1) < .01
