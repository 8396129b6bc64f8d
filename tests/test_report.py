"The report: what stands on the page against the files of the run, what is said where they are missing, and how it looks in a browser."
import base64
import io
import json
import shutil
import statistics
from pathlib import Path
import numpy as np
import pytest
from browser import browser  # a fixture
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ppc.data import DataError, TagFolder, read_mask
from ppc.pipeline import run
from ppc.plots import colour_mask
from ppc.report import Run, find_runs, report_page, seeds_table

TINY = dict(closeups=32, pretrain_epochs=1, batch_size=4, seg_options=dict(batch_size=4, crop=64), crop=64, resize=[64, 96])


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "The run of 39_pipeline's last cell, and its page."
    out = tmp_path_factory.mktemp('report')/'tiny'
    run(out, ['cam'], scenes=12, **TINY)
    return out, report_page(out, out.parent/'report.html')


def soup(page): return BeautifulSoup(Path(page).read_text(encoding='utf-8'), 'html.parser')
def tables(page): return {t.caption.get_text(): [[c.get_text() for c in row.find_all(['th', 'td'])] for row in t.find_all('tr')] for t in soup(page).find_all('table')}
def picture(img): return Image.open(io.BytesIO(base64.b64decode(img['src'].split(',')[1])))
def sound(page):
    "Nothing from elsewhere, and nothing that a screen reader would stumble over."
    s = soup(page)
    assert all(t.caption for t in s.find_all('table')) and all(th.get('scope') in ('row', 'col') for th in s.find_all('th')) and all(i.get('alt') for i in s.find_all('img'))
    assert all(i['src'].startswith('data:image/') for i in s.find_all('img')) and not s.find_all(['link', 'script', 'iframe']) and 'url(' not in s.style.get_text()
    ids = [e['id'] for e in s.find_all(id=True)]
    assert len(ids) == len(set(ids)) and {a['href'][1:] for a in s.find_all('a')} <= set(ids)
    assert [h.name for h in s.find_all(['h1', 'h2', 'h3'])][0] == 'h1' and s.html['lang'] == 'en' and s.find('meta', attrs={'name': 'viewport'})
    return s


# --- one run ----------------------------------------------------------------------------------------------------------------

def test_numbers_are_those_of_the_files(done):
    out, page = done
    sound(page)
    found, metrics = tables(page), json.loads((out/'metrics.json').read_text())
    rows = found['What came out'][1:]
    assert [(r[0], r[1], r[-1]) for r in rows] == [(w['stage'], w['method'], f'{w["miou"]:.1f}') for w in metrics['table']]
    assert [r[6] for r in rows] == ['yes' if w['tags at test time'] else 'no' for w in metrics['table']]
    head, *classes = found['IoU of each class, %']
    for name, stage in (('cam seeds', 'cam/seeds'), ('cam +CRF', 'cam/crf'), ('masks', 'masks'), ('segmenter', 'segmentation')):
        want = json.loads((out/stage/'metrics.json').read_text())['iou']
        assert {r[0]: r[head.index(name)] for r in classes} == {c: '–' if v is None else f'{v:.1f}' for c, v in want.items()}
    own = {r[0]: r[1] for r in found['Settings of its own'][1:]}
    assert own == {'scenes': '12', 'closeups': '32', 'batch_size': '4', 'seg_options': 'batch_size: 4, crop: 64', 'crop': '64', 'resize': '64, 96'}
    assert len(own) + len(found['At their defaults']) - 1 == len(metrics['parameters'])
    text = soup(page).get_text()
    assert all(str(metrics[k]) in text for k in ('device', 'threads')) and f'{metrics["peak_memory_mb"]:,} MB' in text and f'torch {metrics["versions"]["torch"]}' in text


def test_pictures_are_those_of_the_files(done):
    out, page = done
    rows = next(t for t in soup(page).find_all('table') if t.caption.get_text() == 'The first images through every stage').find_all('tr')
    assert [th.get_text() for th in rows[0].find_all('th')] == ['tags', 'image', 'truth', 'cam', 'cam +CRF', 'segmenter'] and len(rows) == 7
    data = TagFolder(out/'scenes')
    for i, row in enumerate(rows[1:]):
        image, truth, cam, crf, segmenter = row.find_all('img')
        assert row.th.get_text() == ' '.join(np.array(data.classes[1:])[data.tags[i].numpy() > 0])
        assert np.abs(np.asarray(picture(image), dtype=int) - np.asarray(data.image(i), dtype=int)).mean() < 16   # a JPEG
        for img, mask in ((truth, data.mask(i)), (crf, read_mask(out/'cam'/'crf'/f'{data.ids[i]}.png')), (segmenter, read_mask(out/'shown'/f'{data.ids[i]}.png'))):
            assert (np.asarray(picture(img)) == colour_mask(mask)).all()
        assert picture(cam).size == picture(image).size == (int(image['width']), int(image['height']))


def test_same_bytes_twice(done, tmp_path): assert done[1].read_bytes() == report_page(done[0], tmp_path/'again.html').read_bytes()


def test_large_photographs_are_small_on_the_page(done, tmp_path):
    shutil.copytree(done[0], tmp_path/'tiny')
    for f in [*(tmp_path/'tiny'/'scenes'/'JPEGImages').iterdir(), *(tmp_path/'tiny'/'scenes'/'SegmentationClass').iterdir()]:
        Image.open(f).resize((900, 500), Image.NEAREST).save(f)
    page = report_page(tmp_path/'tiny', tmp_path/'page.html')
    rows = [[picture(i) for i in row.find_all('img')] for row in sound(page).select('.gallery tbody tr')]
    assert {p.size for row in rows for p in row[:2]} == {(160, 89)} and page.stat().st_size < 400_000
    colours = {tuple(c) for row in rows for c in np.asarray(row[1]).reshape(-1, 3)}
    assert colours <= {tuple(c) for c in colour_mask(np.arange(256)[None])[0]}   # no mixed colours at the edges of a mask


# --- what is missing --------------------------------------------------------------------------------------------------------

def test_only_the_record(done, tmp_path):
    (tmp_path/'copied').mkdir()
    shutil.copy(done[0]/'metrics.json', tmp_path/'copied')
    page = report_page(tmp_path/'copied', tmp_path/'page.html')
    text = sound(page).get_text()
    assert not soup(page).find_all('img') and text.count('not at hand') == 2 and all(tables(page)[t] == tables(done[1])[t] for t in ('What came out', 'IoU of each class, %'))


def test_data_moved_away(done, tmp_path):
    shutil.copytree(done[0], tmp_path/'tiny')
    shutil.rmtree(tmp_path/'tiny'/'scenes')
    page = report_page(tmp_path/'tiny', tmp_path/'page.html')
    assert 'the images that this run learned from are not at hand' in sound(page).get_text() and not soup(page).select('.gallery') and len(soup(page).select('.figures img')) == 3


def test_without_masks(mine, tmp_path):
    for d in ('SegmentationClass', 'Saliency', 'Parts', 'ImageSets'):
        shutil.rmtree(mine/d)
    run(tmp_path/'run', ['cam'], data=str(mine), val_split='', **TINY)
    page = report_page(tmp_path/'run', tmp_path/'page.html')
    assert all(r[-1] == '–' for r in tables(page)['What came out'][1:]) and 'nothing was compared with masks' in sound(page).get_text()
    assert tables(page)['The first images through every stage'][0] == ['tags', 'image', 'cam', 'cam +CRF', 'segmenter']


def test_no_run_and_damaged_runs(done, tmp_path):
    for root in (tmp_path, done[0]/'cam'/'seeds', done[0]/'cam', tmp_path/'nowhere'):
        with pytest.raises(DataError, match='no finished run'):
            report_page(root, tmp_path/'page.html')
    shutil.copytree(done[0], tmp_path/'tiny')
    cam = tmp_path/'tiny'/'cam'/'cams-train'/'train00002.npz'
    cam.write_bytes(cam.read_bytes()[:50])
    with pytest.raises(DataError, match=cam.name):
        report_page(tmp_path/'tiny', tmp_path/'page.html')
    (tmp_path/'tiny'/'metrics.json').write_text('{"seed')
    with pytest.raises(DataError, match='metrics.json is damaged'):
        report_page(tmp_path/'tiny', tmp_path/'page.html')
    assert not (tmp_path/'page.html').exists()


# --- several runs -----------------------------------------------------------------------------------------------------------

def put(root, name, metrics, settings=None):
    folder = root/name
    folder.mkdir(parents=True)
    (folder/'metrics.json').write_text(json.dumps(metrics))
    if settings is not None:
        (folder/'settings.json').write_text(json.dumps(settings))


def record(**miou): return {'seed_miou': miou, 'table': [], 'parameters': {'k': 8}, 'seconds': 71.2, 'mask_miou': None}


@pytest.fixture
def sweep(tmp_path):
    for k in (0, 8):
        for seed in (0, 1, 2):
            if (k, seed) != (8, 2):
                put(tmp_path/'sweep', f'k={k},seed={seed}', record(**{'seam+ppc': 30 + k + 1.7*seed, 'cam': 20. + seed}), {'k': k, 'seed': seed})
    (tmp_path/'sweep'/'k=8,seed=2').mkdir()
    (tmp_path/'sweep'/'k=8,seed=2'/'settings.json').write_text('{"k": 8, "seed": 2}')
    return tmp_path/'sweep'


def test_a_sweep(sweep, tmp_path):
    page = report_page(sweep, tmp_path/'page.html')
    s, found = sound(page), tables(page)
    assert 'Not finished: k=8,seed=2.' in s.header.get_text() and len(s.find_all('details')) == 5
    assert found['Every run: settings of its own, mIoU in %, time'][0] == ['run', 'k', 'seed', 'seam+ppc seeds', 'cam seeds', 'time']
    assert found['Every run: settings of its own, mIoU in %, time'][2] == ['k=0,seed=1', '0', '1', '31.7', '21.0', '0:01:11']
    spread = f'31.7 ± {statistics.stdev([30, 31.7, 33.4]):.1f}'
    assert found['Mean ± standard deviation over seeds, mIoU in %'][1:] == [['k: 0', '3', spread, '21.0 ± 1.0'], ['k: 8', '2', '38.9 ± 1.2', '20.5 ± 0.7']]
    assert page.read_bytes() == report_page(sweep, page).read_bytes()


@given(st.lists(st.floats(0, 100), min_size=2, max_size=6))
def test_spread_is_that_of_the_textbook(values):
    runs = [Run(Path(str(i)), {'seed_miou': {'cam': v}}, {'seed': i}) for i, v in enumerate(values)]
    mean, std = map(float, seeds_table(runs).rows[0][2].split(' ± '))
    assert abs(mean - statistics.mean(values)) < .051 and abs(std - statistics.stdev(values)) < .051 and seeds_table(runs).rows[0][1] == str(len(values))


def test_without_settings_the_difference_tells(tmp_path):
    "Ordinary runs side by side: what differs in their parameters is theirs."
    for seed in (0, 1):
        put(tmp_path/'runs', f's{seed}', {**record(cam=30. + seed), 'parameters': {'k': 8, 'seed': seed}})
    assert [r.own for r in find_runs(tmp_path/'runs')] == [{'seed': 0}, {'seed': 1}]
    assert tables(report_page(tmp_path/'runs', tmp_path/'page.html'))['Mean ± standard deviation over seeds, mIoU in %'][1] == ['all runs', '2', '30.5 ± 0.7']


def test_runs_of_one_method_share_their_columns(tmp_path):
    "Whose a number is stands among the settings: one column, not one for each method with gaps in it."
    for m in ('cam', 'seam'):
        for seed in (0, 1):
            put(tmp_path/'runs', f'{m}{seed}', {**record(**{m: 30. + seed}), 'seed_crf_miou': {m: 40. + seed}}, {'methods': [m], 'seed': seed})
    found = tables(report_page(tmp_path/'runs', tmp_path/'page.html'))['Mean ± standard deviation over seeds, mIoU in %']
    assert found[0] == ['setting', 'runs', 'seeds', '+CRF'] and found[2] == ['methods: seam', '2', '30.5 ± 0.7', '40.5 ± 0.7']


def test_runs_that_tell_nothing_are_not_averaged(tmp_path):
    for name in 'ab':
        put(tmp_path/'runs', name, {'seed_miou': {'cam': 30.}})
    page = report_page(tmp_path/'runs', tmp_path/'page.html')
    assert 'Mean ± standard deviation over seeds, mIoU in %' not in tables(page) and '±' not in sound(page).get_text()


def evil_runs(root, run):
    "Two runs whose classes, folders, settings, device and data are markup, or LaTeX."
    evil = '<img/src=x/onerror=document.title=1>'
    for n in (0, 1):
        folder = root/f'<b>$\\frac{n}'
        shutil.copytree(run, folder)
        for f in (folder/'scenes'/'classes.txt', folder/'scenes'/'tags.csv', folder/'metrics.json'):
            f.write_text(f.read_text().replace('cat', evil))
        m = json.loads((folder/'metrics.json').read_text())
        m |= {'device': evil, 'parameters': {**m['parameters'], 'reading': evil}}
        (folder/'metrics.json').write_text(json.dumps(m))
        (folder/'settings.json').write_text(json.dumps({evil: f'</td>$_{n}$$', 'seed': n}))
    return evil


def test_whatever_files_say_is_text(done, tmp_path):
    evil = evil_runs(tmp_path/'$<i>', done[0])
    page = report_page(tmp_path/'$<i>', tmp_path/'page.html')
    s = sound(page)
    assert s.h1.get_text() == '$<i>' and s.title.get_text() == '$<i>' and not s.find_all(['b', 'i']) and not s.find_all('img', src='x')
    assert [d.summary.get_text() for d in s.find_all('details') if d.find('h3')] == ['<b>$\\frac0', '<b>$\\frac1']
    assert s.get_text().count(evil) > 8 and evil in tables(page)['IoU of each class, %'][2] and any(evil in i['alt'] for i in s.find_all('img'))
    assert page.read_text().count(evil) == 0


# --- in a browser -----------------------------------------------------------------------------------------------------------

def looks_well(browser, page, width, dark=False):
    "Nothing in the console, nothing beside the page, every picture there and not enlarged."
    browser.show(page, width, dark)
    assert browser.errors == [], browser.errors
    browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.ask('document.documentElement.scrollWidth') <= width
    assert browser.ask("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.width <= i.naturalWidth + 1 && Math.abs(i.width/i.height - i.naturalWidth/i.naturalHeight) < .05)")
    assert browser.ask("[...document.querySelectorAll('.wide')].every(e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX))")
    assert browser.ask("[...document.querySelectorAll('p, li')].every(e => e.getBoundingClientRect().width < 800)")
    return browser


@pytest.mark.parametrize('width', [400, 1400])
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_one_run_in_a_browser(done, browser, width, dark):
    looks_well(browser, done[1], width, dark)
    assert browser.ask("document.querySelectorAll('table').length") == 5 and browser.ask('document.images.length') == 6*5 + 3
    light = browser.ask("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (light < 60) == dark
    assert browser.ask("[...document.querySelectorAll('td, th')].every(c => c.offsetHeight < 220)")   # no column is squeezed to a word a line


@pytest.mark.parametrize('width', [400, 1400])
def test_a_sweep_in_a_browser(sweep, browser, tmp_path, width):
    looks_well(browser, report_page(sweep, tmp_path/'page.html'), width)
    browser.show(tmp_path/'page.html', width)
    assert browser.ask("document.querySelectorAll('details[open]').length") == 0
    if width == 400:   # the name of a row leaves room for its first number, also while the rest is scrolled through
        names = "[...document.querySelectorAll('.wide')].filter(w => w.offsetParent).flatMap(w => { w.scrollLeft = 60; return [...w.querySelectorAll('tr > th:first-child')].map(t => [t, w]) })"
        assert browser.ask(f"{names}.every(([t, w]) => t.offsetWidth < 200 && Math.abs(t.getBoundingClientRect().left - w.getBoundingClientRect().left) < 1)")
    browser.ask("document.querySelectorAll('th a')[3].click()")
    assert browser.ask("new Promise(r => setTimeout(() => r([...document.querySelectorAll('details[open] > summary')].map(s => s.textContent)), 300))") == ['k=8,seed=0']


def test_markup_in_files_does_nothing_in_a_browser(done, browser, tmp_path):
    evil_runs(tmp_path/'$<i>', done[0])
    looks_well(browser, report_page(tmp_path/'$<i>', tmp_path/'page.html'), 400)
    assert browser.ask('document.title') == '$<i>'
