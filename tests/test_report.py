"""The report: the page agrees with the files of the run, says what is missing, and works in a
browser."""
import base64
import io
import json
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
import numpy as np
import pytest
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ppc.data import DataError, TagFolder, read_mask
from ppc.pipeline import run
from ppc.plots import colour_mask
from ppc.report import Run, find_runs, report_page, seeds_table

pytestmark = pytest.mark.slow

pytest_plugins = ['browser']  # the fixture
ROOT = Path(__file__).parent.parent
TINY = dict(closeups=32, pretrain_epochs=1, batch_size=4, crop=64, resize=[64, 96],
            seg_options=dict(batch_size=4, crop=64))
RESULTS = 'What came out'
CLASSES = 'IoU of each class, %'
GALLERY = 'Images through every stage'
EVERY_RUN = 'Every run: settings of its own, mIoU in %, time'
OVER_SEEDS = 'Mean ± standard deviation over seeds, mIoU in %'


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "The run of 39_pipeline's last cell, and its page."
    out = tmp_path_factory.mktemp('report')/'tiny'
    run(out, ['cam'], scenes=12, **TINY)
    return out, report_page(out, out.parent/'report.html')


def parse(page):
    return BeautifulSoup(Path(page).read_text(encoding='utf-8'), 'html.parser')


def tables(page):
    "Caption -> rows of texts."
    return {t.caption.get_text(): [[c.get_text() for c in row.find_all(['th', 'td'])]
                                   for row in t.find_all('tr')]
            for t in parse(page).find_all('table')}


def picture(img):
    return Image.open(io.BytesIO(base64.b64decode(img['src'].split(',')[1])))


def check_page(page):
    "Nothing is loaded from elsewhere, and a screen reader finds what it needs."
    soup = parse(page)
    images = soup.find_all('img')
    assert all(t.caption for t in soup.find_all('table'))
    assert all(th.get('scope') in ('row', 'col') for th in soup.find_all('th'))
    assert all(i.get('alt') and i['src'].startswith('data:image/') for i in images)
    assert not soup.find_all(['link', 'script', 'iframe'])
    assert 'url(' not in soup.style.get_text()
    ids = [e['id'] for e in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    assert {a['href'][1:] for a in soup.find_all('a')} <= set(ids)
    assert soup.find(['h1', 'h2', 'h3']).name == 'h1'
    assert soup.html['lang'] == 'en' and soup.find('meta', attrs={'name': 'viewport'})
    return soup


# --- one run -------------------------------------------------------------------------------------

def test_numbers_are_those_of_the_files(done):
    out, page = done
    check_page(page)
    found, metrics = tables(page), json.loads((out/'metrics.json').read_text())
    rows = found[RESULTS][1:]
    wanted = [(w['stage'], w['method'], f'{w["miou"]:.1f}') for w in metrics['table']]
    assert [(r[0], r[1], r[-1]) for r in rows] == wanted
    tags = ['yes' if w['tags at test time'] else 'no' for w in metrics['table']]
    assert [r[6] for r in rows] == tags
    head, *classes = found[CLASSES]
    stages = {'cam seeds': 'cam/seeds', 'cam +CRF': 'cam/crf', 'masks': 'masks',
              'segmenter': 'segmentation'}
    for name, stage in stages.items():
        iou = json.loads((out/stage/'metrics.json').read_text())['iou']
        wanted = {c: '–' if v is None else f'{v:.1f}' for c, v in iou.items()}
        assert {r[0]: r[head.index(name)] for r in classes} == wanted


def test_settings_and_machine_are_those_of_the_files(done):
    out, page = done
    found, metrics = tables(page), json.loads((out/'metrics.json').read_text())
    own = {r[0]: r[1] for r in found['Settings of its own'][1:]}
    assert own == {'scenes': '12', 'closeups': '32', 'batch_size': '4', 'crop': '64',
                   'seg_options': 'batch_size: 4, crop: 64', 'resize': '64, 96'}
    assert len(own) + len(found['At their defaults']) - 1 == len(metrics['parameters'])
    text = parse(page).get_text()
    assert all(str(metrics[k]) in text for k in ('device', 'threads'))
    assert f'{metrics["peak_memory_mb"]:,} MB' in text
    assert f'torch {metrics["versions"]["torch"]}' in text


def test_pictures_are_those_of_the_files(done):
    out, page = done
    found = parse(page).find_all('table')
    rows = next(t for t in found if t.caption.get_text() == GALLERY).find_all('tr')
    head = [th.get_text() for th in rows[0].find_all('th')]
    assert head == ['name', 'tags', 'image', 'truth', 'cam', 'cam +CRF', 'segmenter']
    data, ranked = TagFolder(out/'scenes'), json.loads((out/'shown'/'metrics.json').read_text())
    assert len(ranked['images']) == len(rows) - 1 == 5
    for (name, rank), row in zip(ranked['images'].items(), rows[1:]):
        i = data.ids.index(name)
        image, truth, cam, crf, segmenter = row.find_all('img')
        tags = ' '.join(np.array(data.classes[1:])[data.tags[i].numpy() > 0])
        assert row.get_text(' ', strip=True).startswith(f'{name}: {rank} {tags}')
        shown, real = (np.asarray(im, dtype=int) for im in (picture(image), data.image(i)))
        assert np.abs(shown - real).mean() < 16  # a JPEG
        masks = [(truth, data.mask(i)),
                 (crf, read_mask(out/'cam'/'crf'/f'{data.ids[i]}.png')),
                 (segmenter, read_mask(out/'shown'/f'{data.ids[i]}.png'))]
        for img, mask in masks:
            assert (np.asarray(picture(img)) == colour_mask(mask)).all()
        size = (int(image['width']), int(image['height']))
        assert picture(cam).size == picture(image).size == size


def test_same_bytes_twice(done, tmp_path):
    out, page = done
    assert page.read_bytes() == report_page(out, tmp_path/'again.html').read_bytes()


def test_large_photographs_are_small_on_the_page(done, tmp_path):
    shutil.copytree(done[0], tmp_path/'tiny')
    scenes = tmp_path/'tiny'/'scenes'
    for f in [*(scenes/'JPEGImages').iterdir(), *(scenes/'SegmentationClass').iterdir()]:
        Image.open(f).resize((900, 500), Image.NEAREST).save(f)
    page = report_page(tmp_path/'tiny', tmp_path/'page.html')
    rows = check_page(page).select('.gallery tbody tr')
    rows = [[picture(i) for i in row.find_all('img')] for row in rows]
    assert {p.size for row in rows for p in row[:2]} == {(160, 89)}
    assert page.stat().st_size < 400_000
    colours = {tuple(c) for row in rows for c in np.asarray(row[1]).reshape(-1, 3)}
    palette = {tuple(c) for c in colour_mask(np.arange(256)[None])[0]}
    assert colours <= palette  # no mixed colours at the edges of a mask


def test_an_installed_package_has_its_templates(tmp_path):
    "They are in the wheel, and a page can be rendered from it alone."
    pytest.importorskip('setuptools', minversion='77', reason='builds the wheel')
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT/name, tmp_path)
    shutil.copytree(ROOT/'ppc', tmp_path/'ppc', ignore=shutil.ignore_patterns('__pycache__'))
    build = 'from setuptools.build_meta import build_wheel as b; print(b("."))'
    made = subprocess.run([sys.executable, '-c', build], cwd=tmp_path, check=True,
                          capture_output=True, text=True)
    with zipfile.ZipFile(tmp_path/made.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path/'installed')
    templates = {f'ppc/templates/{f.name}' for f in (ROOT/'ppc'/'templates').iterdir()}
    assert len(templates) == 8 and templates <= set(names)
    (tmp_path/'run').mkdir()
    record = {'seed_miou': {'cam': 30.}}
    (tmp_path/'run'/'metrics.json').write_text(json.dumps(record))
    script = 'import sys; sys.path.insert(0, "."); from ppc.report import __file__, report_page; ' \
             'print(__file__, report_page("../run", "../page.html"))'
    said = subprocess.run([sys.executable, '-c', script], cwd=tmp_path/'installed', check=True,
                          capture_output=True, text=True).stdout
    assert str(tmp_path/'installed') in said
    expected = report_page(tmp_path/'run', tmp_path/'expected.html')
    assert (tmp_path/'page.html').read_bytes() == expected.read_bytes()


# --- what is missing -----------------------------------------------------------------------------

def test_a_record_without_its_files(done, tmp_path):
    (tmp_path/'copied').mkdir()
    shutil.copy(done[0]/'metrics.json', tmp_path/'copied')
    page = report_page(tmp_path/'copied', tmp_path/'page.html')
    soup = check_page(page)
    assert not soup.find_all('img') and soup.get_text().count('not at hand') == 2
    assert all(tables(page)[t] == tables(done[1])[t] for t in (RESULTS, CLASSES))


def test_a_run_of_an_earlier_edition(done, tmp_path):
    "It has no list of stages, and other names for some parameters."
    shutil.copytree(done[0], tmp_path/'tiny')
    (tmp_path/'tiny'/'stages.json').unlink()
    for file in ('config.json', 'metrics.json'):
        path = tmp_path/'tiny'/file
        path.write_text(path.read_text().replace('head_lr_mult', 'lr_new'))
    new, old = (check_page(report_page(root, tmp_path/'page.html'))
                for root in (done[0], tmp_path/'tiny'))
    for part in ('.gallery', '.figures', 'details'):
        assert [str(x) for x in old.select(part)] == [str(x) for x in new.select(part)]


def test_data_moved_away(done, tmp_path):
    shutil.copytree(done[0], tmp_path/'tiny')
    shutil.rmtree(tmp_path/'tiny'/'scenes')
    soup = check_page(report_page(tmp_path/'tiny', tmp_path/'page.html'))
    assert 'the images that this run learned from are not at hand' in soup.get_text()
    assert not soup.select('.gallery') and len(soup.select('.figures img')) == 4


def test_without_masks(mine, tmp_path):
    for d in ('SegmentationClass', 'Saliency', 'Parts', 'ImageSets'):
        shutil.rmtree(mine/d)
    run(tmp_path/'run', ['cam'], data=str(mine), val_split='', **TINY)
    page = report_page(tmp_path/'run', tmp_path/'page.html')
    assert all(r[-1] == '–' for r in tables(page)[RESULTS][1:])
    assert 'nothing was compared with masks' in check_page(page).get_text()
    assert tables(page)[GALLERY][0] == ['name', 'tags', 'image', 'cam', 'cam +CRF', 'segmenter']


def test_no_run_and_damaged_runs(done, tmp_path):
    for root in (tmp_path, done[0]/'cam'/'seeds', done[0]/'cam', tmp_path/'nowhere'):
        with pytest.raises(DataError, match='no finished run'):
            report_page(root, tmp_path/'page.html')
    shutil.copytree(done[0], tmp_path/'tiny')
    shown = json.loads((done[0]/'shown'/'metrics.json').read_text())['images']
    cam = tmp_path/'tiny'/'cam'/'cams-train'/f'{next(iter(shown))}.npz'
    cam.write_bytes(cam.read_bytes()[:50])
    with pytest.raises(DataError, match=cam.name):
        report_page(tmp_path/'tiny', tmp_path/'page.html')
    (tmp_path/'tiny'/'metrics.json').write_text('{"seed')
    with pytest.raises(DataError, match='metrics.json is damaged'):
        report_page(tmp_path/'tiny', tmp_path/'page.html')
    assert not (tmp_path/'page.html').exists()


# --- several runs --------------------------------------------------------------------------------

def write_run(root, name, metrics, settings=None):
    "A run that consists of its record, and in a sweep of its settings."
    folder = root/name
    folder.mkdir(parents=True)
    (folder/'metrics.json').write_text(json.dumps(metrics))
    if settings is not None:
        (folder/'settings.json').write_text(json.dumps(settings))


def record(**miou):
    return {'seed_miou': miou, 'table': [], 'parameters': {'k': 8}, 'seconds': 71.2,
            'mask_miou': None}


@pytest.fixture
def sweep(tmp_path):
    "Two settings of three seeds; the last run is not finished."
    for k in (0, 8):
        for seed in (0, 1, 2):
            if (k, seed) != (8, 2):
                metrics = record(**{'seam+ppc': 30 + k + 1.7*seed, 'cam': 20. + seed})
                settings = {'k': k, 'seed': seed}
                write_run(tmp_path/'sweep', f'k={k},seed={seed}', metrics, settings)
    (tmp_path/'sweep'/'k=8,seed=2').mkdir()
    (tmp_path/'sweep'/'k=8,seed=2'/'settings.json').write_text('{"k": 8, "seed": 2}')
    return tmp_path/'sweep'


def test_a_sweep(sweep, tmp_path):
    page = report_page(sweep, tmp_path/'page.html')
    soup, found = check_page(page), tables(page)
    assert 'Not finished: k=8,seed=2.' in soup.header.get_text()
    assert len(soup.find_all('details')) == 5
    head, _, second, *_ = found[EVERY_RUN]
    assert head == ['run', 'k', 'seed', 'seam+ppc seeds', 'cam seeds', 'time']
    assert second == ['k=0,seed=1', '0', '1', '31.7', '21.0', '0:01:11']
    spread = f'31.7 ± {statistics.stdev([30, 31.7, 33.4]):.1f}'
    assert found[OVER_SEEDS][1:] == [['k: 0', '3', spread, '21.0 ± 1.0'],
                                     ['k: 8', '2', '38.9 ± 1.2', '20.5 ± 0.7']]
    assert page.read_bytes() == report_page(sweep, page).read_bytes()


@given(st.lists(st.floats(0, 100), min_size=2, max_size=6))
def test_spread_is_that_of_the_statistics_module(values):
    runs = [Run(Path(str(i)), {'seed_miou': {'cam': v}}, {'seed': i})
            for i, v in enumerate(values)]
    row = seeds_table(runs).rows[0]
    mean, std = map(float, row[2].split(' ± '))
    assert abs(mean - statistics.mean(values)) < .051
    assert abs(std - statistics.stdev(values)) < .051
    assert row[1] == str(len(values))


def test_without_settings_the_parameters_are_compared(tmp_path):
    "Ordinary runs side by side: their parameters say in what they differ."
    for seed in (0, 1):
        metrics = {**record(cam=30. + seed), 'parameters': {'k': 8, 'seed': seed}}
        write_run(tmp_path/'runs', f's{seed}', metrics)
    assert [r.varied for r in find_runs(tmp_path/'runs')] == [{'seed': 0}, {'seed': 1}]
    found = tables(report_page(tmp_path/'runs', tmp_path/'page.html'))
    assert found[OVER_SEEDS][1] == ['all runs', '2', '30.5 ± 0.7']


def test_runs_of_one_method_share_their_columns(tmp_path):
    "The method stands among the settings: one column, not one for each method with gaps in it."
    for m in ('cam', 'seam'):
        for seed in (0, 1):
            metrics = {**record(**{m: 30. + seed}), 'seed_crf_miou': {m: 40. + seed}}
            write_run(tmp_path/'runs', f'{m}{seed}', metrics, {'methods': [m], 'seed': seed})
    found = tables(report_page(tmp_path/'runs', tmp_path/'page.html'))[OVER_SEEDS]
    assert found[0] == ['setting', 'runs', 'seeds', '+CRF']
    assert found[2] == ['methods: seam', '2', '30.5 ± 0.7', '40.5 ± 0.7']


def test_runs_of_unknown_settings_are_not_averaged(tmp_path):
    for name in 'ab':
        write_run(tmp_path/'runs', name, {'seed_miou': {'cam': 30.}})
    page = report_page(tmp_path/'runs', tmp_path/'page.html')
    assert OVER_SEEDS not in tables(page) and '±' not in check_page(page).get_text()


def evil_runs(root, run):
    "Two runs whose classes, folders, settings, device and data are markup, or LaTeX."
    evil = '<img/src=x/onerror=document.title=1>'
    for n in (0, 1):
        folder = root/f'<b>$\\frac{n}'
        shutil.copytree(run, folder)
        record = folder/'metrics.json'
        for f in (folder/'scenes'/'classes.txt', folder/'scenes'/'tags.csv', record):
            f.write_text(f.read_text().replace('cat', evil))
        m = json.loads(record.read_text())
        m |= {'device': evil, 'parameters': {**m['parameters'], 'reading': evil}}
        record.write_text(json.dumps(m))
        (folder/'settings.json').write_text(json.dumps({evil: f'</td>$_{n}$$', 'seed': n}))
    return evil


def test_markup_in_files_is_text(done, tmp_path):
    evil = evil_runs(tmp_path/'$<i>', done[0])
    page = report_page(tmp_path/'$<i>', tmp_path/'page.html')
    soup = check_page(page)
    assert soup.h1.get_text() == '$<i>' and soup.title.get_text() == '$<i>'
    assert not soup.find_all(['b', 'i']) and not soup.find_all('img', src='x')
    names = [d.summary.get_text() for d in soup.find_all('details') if d.find('h3')]
    assert names == ['<b>$\\frac0', '<b>$\\frac1']
    assert soup.get_text().count(evil) > 8 and evil in tables(page)[CLASSES][2]
    assert any(evil in i['alt'] for i in soup.find_all('img'))
    assert page.read_text().count(evil) == 0


# --- in a browser --------------------------------------------------------------------------------

PICTURES_FIT = '''[...document.images].every(i => i.complete && i.naturalWidth > 0
    && i.width <= i.naturalWidth + 1
    && Math.abs(i.width/i.height - i.naturalWidth/i.naturalHeight) < .05)'''
TABLES_SCROLL = '''[...document.querySelectorAll('.wide')].every(
    e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX))'''
LINES_ARE_SHORT = '''[...document.querySelectorAll('p, li')].every(
    e => e.getBoundingClientRect().width < 800)'''
RED_OF_PAPER = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
CELLS_ARE_LOW = "[...document.querySelectorAll('td, th')].every(c => c.offsetHeight < 220)"
ROW_NAMES_STAY = '''[...document.querySelectorAll('.wide')].filter(w => w.offsetParent)
    .flatMap(w => {
        w.scrollLeft = 60
        return [...w.querySelectorAll('tr > th:first-child')].map(t => [t, w])
    })
    .every(([t, w]) => t.offsetWidth < 200
        && Math.abs(t.getBoundingClientRect().left - w.getBoundingClientRect().left) < 1)'''
OPENED = '''new Promise(r => setTimeout(() => r(
    [...document.querySelectorAll('details[open] > summary')].map(s => s.textContent)), 300))'''


def check_in_browser(browser, page, width, dark=False):
    "No error, nothing outside the window, every picture loaded and not enlarged."
    browser.show(page, width, dark)
    assert browser.errors == [], browser.errors
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate('document.documentElement.scrollWidth') <= width
    for script in (PICTURES_FIT, TABLES_SCROLL, LINES_ARE_SHORT):
        assert browser.evaluate(script), script


@pytest.mark.parametrize('width', [400, 1400])
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_one_run_in_a_browser(done, browser, width, dark):
    check_in_browser(browser, done[1], width, dark)
    assert browser.evaluate("document.querySelectorAll('table').length") == 5
    assert browser.evaluate('document.images.length') == 5*5 + 4
    assert (browser.evaluate(RED_OF_PAPER) < 60) == dark
    assert browser.evaluate(CELLS_ARE_LOW)  # no column is squeezed to a word a line


@pytest.mark.parametrize('width', [400, 1400])
def test_a_sweep_in_a_browser(sweep, browser, tmp_path, width):
    check_in_browser(browser, report_page(sweep, tmp_path/'page.html'), width)
    browser.show(tmp_path/'page.html', width)
    assert browser.evaluate("document.querySelectorAll('details[open]').length") == 0
    if width == 400:  # also while scrolled, a row's name leaves room for its first number
        assert browser.evaluate(ROW_NAMES_STAY)
    browser.evaluate("document.querySelectorAll('th a')[3].click()")
    assert browser.evaluate(OPENED) == ['k=8,seed=0']


def test_markup_in_files_does_nothing_in_a_browser(done, browser, tmp_path):
    evil_runs(tmp_path/'$<i>', done[0])
    check_in_browser(browser, report_page(tmp_path/'$<i>', tmp_path/'page.html'), 400)
    assert browser.evaluate('document.title') == '$<i>'
