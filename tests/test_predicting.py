"Photographs in, masks out: equal to the run's own, whatever the files are called and contain."
import errno
import json
import math
import os
import shutil
import tempfile
import unicodedata
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from torch.nn import functional as F
import ppc
from ppc.cam import Maps
from ppc.crf import seed_mask, write_masks
from ppc.data import (
    DataError,
    TagFolder,
    WriteError,
    normalise,
    read_image,
    read_mask,
    voc_palette,
)
from ppc.deeplab import write_predictions
from ppc.folders import make_folder
from ppc.inference import read_cam, write_cams
from ppc.pipeline import run, trained_segmenter
from ppc.plots import legend, overlay
from ppc.predicting import (
    CamModel,
    SegmenterModel,
    areas,
    find_imagenet,
    find_photographs,
    load_model,
    mask_of,
    predict,
    read_names,
    tags_of,
)
from ppc.work import read_json

pytestmark = pytest.mark.slow

METHODS = ['cam', 'seam+ppc']


@pytest.fixture(scope='module')
def done(scenes, tmp_path_factory):
    "A finished run of two methods and a segmenter."
    out = tmp_path_factory.mktemp('runs')/'done'
    options = dict(batch_size=4, epochs=1, crop=64, pairwise='dlp')
    run(out, METHODS, data=str(scenes), batch_size=4, crop=64, target=32, resize=[64, 96], k=4,
        scales=[.5, 1.], seg_options=options)
    return out


@pytest.fixture
def copied(done, tmp_path):
    "The run, for a test that changes it."
    return shutil.copytree(done, tmp_path/'run')


class Halves:
    "A model whose masks are known: background on the left, class 2 on the right. It keeps a log."
    classes, limit = ['background', 'cat', 'dog'], 1024
    def __init__(self):
        self.seen = []

    def __call__(self, image, tags=None):
        self.seen.append((image.size, tags))
        row = np.where(np.arange(image.width) < image.width//2, 0, 2)
        return row[None].repeat(image.height, 0).astype(np.uint8)


def photo(path, size=(60, 40), **more):
    "Write an image of noise."
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(noise).save(path, **more)
    return path


# --- the same masks as the run --------------------------------------------------------------------

def test_a_segmenter_repeats_its_run(done, scenes, tmp_path):
    model, data = load_model(done), TagFolder(scenes, 'val')
    assert isinstance(model, SegmenterModel) and model.classes == data.classes
    assert 'CRF' in str(model)
    recipe = model.recipe
    options = dict(batch_size=1, pairwise=recipe.pairwise)
    write_predictions(model.network, data, tmp_path/'one', recipe.scales, **options)  # the run's
    networks = model.network, trained_segmenter(done)
    tensors = zip(*(network.state_dict().values() for network in networks))
    assert all(torch.equal(a, b) for a, b in tensors)
    predict(model, data.files.values(), tmp_path/'out')
    found = {i: read_mask(tmp_path/'out'/'masks'/f'{i}.png') for i in data.ids}
    for i, mask in found.items():
        assert (mask == read_mask(tmp_path/'one'/f'{i}.png')).all()
        own = read_mask(done/'segmentation'/f'{i}.png')
        assert (mask == own).mean() > .999  # made in a batch, whose sums end in other bits
    assert len({m for mask in found.values() for m in np.unique(mask)}) > 1


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('use_crf', [True, False])
def test_cams_repeat_their_run(done, scenes, tmp_path, method, use_crf):
    model, data = load_model(done/method, use_crf), TagFolder(scenes)
    threshold = read_json(done/method/'seeds'/'metrics.json')['threshold']
    assert isinstance(model, CamModel) and model.threshold == threshold
    assert model.scales == [.5, 1.] and (model.network.refine is not None) == ('seam' in method)
    data.ids = data.ids[:6]
    write_cams(model.network, data, tmp_path/'cams', model.scales, batch_size=1)
    classes = len(data.classes)
    write_masks(data, tmp_path/'cams', tmp_path/'one', threshold, use_crf, classes=classes)
    tags = {
        i: [data.classes[1 + k] for k in data.tags[n].nonzero().flatten()]
        for n, i in enumerate(data.ids)}
    predict(model, [data.files[i] for i in data.ids], tmp_path/'out', tags)
    found = {i: read_mask(tmp_path/'out'/'masks'/f'{i}.png') for i in data.ids}
    for i, mask in found.items():
        assert (mask == read_mask(tmp_path/'one'/f'{i}.png')).all()
        if use_crf:
            own = read_mask(done/method/'crf'/f'{i}.png')
        else:
            own = seed_mask(*read_cam(done/method/'cams-train'/f'{i}.npz'), threshold)
        assert (mask == own).mean() > .995
    assert any(mask.any() for mask in found.values())


def test_without_the_crf_a_segmenter_takes_the_best_logit(done, scenes):
    model, image = load_model(done, crf=False), TagFolder(scenes).image(0)
    x = normalise(image)[None]
    with torch.no_grad():
        logits = [
            F.interpolate(model.network(v), (128, 128), mode='bilinear', align_corners=True)
            for v in (x, x.flip(-1))]
    want = (logits[0] + logits[1].flip(-1))[0].argmax(0).numpy()
    assert (model(image) == want).mean() > .999
    assert (load_model(done)(image) != want).mean() > .001
    assert 'no CRF' in str(model)


# --- the public function --------------------------------------------------------------------------

@pytest.mark.parametrize('kind', [str, Path])
@pytest.mark.parametrize('place', ['', 'seam+ppc'])
def test_a_folder_stands_for_its_model(done, scenes, tmp_path, kind, place):
    "`ppc.predict` takes what `load_model` takes."
    assert ppc.predict is predict
    images = [*TagFolder(scenes, 'val').files.values()]
    tags = ['cat'] if place else None
    tables = [
        ppc.predict(model, images, tmp_path/str(n), tags)[0]
        for n, model in enumerate([kind(done/place), load_model(done/place)])]
    assert len(tables[0]) and tables[0].equals(tables[1])
    masks = [sorted((tmp_path/n/'masks').iterdir()) for n in '01']
    assert len(masks[0]) == len(images)
    assert [f.read_bytes() for f in masks[0]] == [f.read_bytes() for f in masks[1]]


def test_a_folder_without_a_model(tmp_path):
    photo(tmp_path/'in'/'a.jpg')
    with pytest.raises(DataError, match='is no run: give the folder of a run'):
        predict(tmp_path, [tmp_path/'in'], tmp_path/'out')
    assert not (tmp_path/'out').exists()


# --- tags -----------------------------------------------------------------------------------------

def test_guessed_tags(done, scenes):
    """A classifier that says yes to foxes alone, and one that says no to all: features are
    positive, so the sign of the weights decides."""
    model, image = load_model(done/'cam'), TagFolder(scenes).image(0)
    with torch.no_grad():
        model.network.classifier.weight.fill_(-1)
        assert not model(image).any()
        model.network.classifier.weight[2] = torch.linspace(0, 2, 96)[:, None, None]
    assert {*np.unique(model(image))} == {0, 2} and (model(image) == model(image, ['fox'])).all()
    assert not model(image, []).any() and 3 not in model(image, ['fox', 'cat'])


def test_guessing_asks_every_scale_and_the_mirror(done, scenes):
    "To the letter: the mean of the pooled maps of each view, at least 0."
    model, data = load_model(done/'seam+ppc', crf=False), TagFolder(scenes)
    for i in range(4):
        x, total = normalise(data.image(i))[None], np.zeros(6)
        with torch.no_grad():
            for side, flip in ((64, False), (64, True), (128, False), (128, True)):
                view = F.interpolate(x, (side, side), mode='bilinear', align_corners=True)
                maps = model.network(view.flip(-1) if flip else view).cam[0].double()
                for c in range(1, 7):
                    total[c - 1] += sum(float(v) for v in maps[c].flatten())/maps[c].numel()/4
        assert abs(total).min() > 1e-4
        seen = [model.classes[1 + k] for k in range(6) if total[k] > 0]
        assert (model(data.image(i)) == model(data.image(i), seen)).all()


class LeftHalf(torch.nn.Module):
    "Class 1 is how bright the left half is, class 2 how dark; a quarter is the limit between them."
    def __init__(self):
        super().__init__()
        self.any = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        left = (x[:, 0, :, :x.shape[-1]//2].mean((1, 2)) > 0).float()
        cam = torch.stack([0*left, left - .25, .25 - left, left - .75], 1)
        cam = cam[..., None, None].expand(-1, -1, 4, 4)
        return Maps(cam + torch.arange(16.).view(4, 4)/1000, None, None)


def test_the_mirror_counts():
    """Bright on one side alone: in the mean of both views the left half is half bright, more than
    a quarter and less than three."""
    classes = ['background', 'bright', 'dark', 'very bright']
    model = CamModel(LeftHalf(), classes, [1], True, .1)
    def found(image, tags=None):
        return set(np.unique(model(image, tags)))
    for side in (slice(0, 20), slice(20, 40)):
        picture = np.zeros((30, 40, 3), np.uint8)
        picture[:, side] = 255
        assert found(Image.fromarray(picture)) == {0, 1}
    assert found(Image.new('RGB', (40, 30))) == {0, 2}
    assert found(Image.new('RGB', (40, 30), 'white'), ['very bright']) == {0, 3}


def test_tags_that_do_not_fit(done, tmp_path):
    for name in 'ab':
        photo(tmp_path/'in'/f'{name}.jpg')
    images, out = [tmp_path/'in'], tmp_path/'out'
    for model in (load_model(done/'cam'), Halves()):
        with pytest.raises(ValueError, match="no class 'unicorn': choose from cat"):
            predict(model, images, out, ['unicorn'])
        with pytest.raises(ValueError, match="'background'"):
            predict(model, images, out, {'a': ['cat'], 'b': ['background']})
        with pytest.raises(ValueError, match="no tags for 'b'"):
            predict(model, images, out, {'a': ['cat']})
    with pytest.raises(ValueError, match='takes no tags'):
        predict(load_model(done), images, out, ['cat'])
    assert not out.exists()


SPREADSHEET = '\ufeffimage,tags\r\na/1.jpg,cat dog\r\n1,dog\r\n\r\nb/2,\r\nsomebody else,cat\r\n'

def test_tags_reach_their_photographs(tmp_path):
    for name in ('a/1.jpg', 'b/1.jpg', 'b/2.png'):
        photo(tmp_path/'in'/name)
    (tmp_path/'tags.csv').write_bytes(SPREADSHEET.encode())
    names = read_names(tmp_path/'tags.csv')
    assert names == {'a/1': ['cat', 'dog'], '1': ['dog'], 'b/2': [], 'somebody else': ['cat']}
    model = Halves()
    predict(model, [tmp_path/'in'], tmp_path/'out', names)
    assert [tags for _, tags in model.seen] == [['cat', 'dog'], ['dog'], []]
    assert [*tags_of({'x': Path('x.jpg')}, None, model.classes).values()] == [None]


@pytest.mark.parametrize('content, words', [
    (b'', 'line 1'),
    (b'a,cat\n', 'line 1'),
    (b'image,tags\n', 'line 1'),
    (b'image,tags\na,dog|cat\n', "line 2 has 'dog.cat'"),
    (b'image,tags\na,cat\nb,nan\n', "line 3 has 'nan'"),
    (b'image,tags\na,"traffic light, cat"\n', "line 2 has 'traffic light'"),
    (b'image,cat,dog\na,1,2\n', "line 2 has '2'"),
    ('image,tags\nbär,cat\n'.encode('latin1'), 'UTF-8'),
    (None, 'is missing')])
def test_bad_spreadsheet(tmp_path, content, words):
    if content is not None:
        (tmp_path/'t.csv').write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_names(tmp_path/'t.csv')


SHEETS = {
    'columns without quotes': 'image,tags\na.jpg,cat,dog\nb,\n',
    'a row for each tag': 'image,tags\na,cat\na.jpg,dog\nb,\n',
    'commas in quotes': 'image,tags\na.jpg,"cat, dog"\nb,background\n',
    'semicolons': 'Bild;Inhalt\r\na.jpg;cat, dog\r\nb;\r\n',
    'a column for each class': 'image,cat,dog\na.jpg,x,x\nb,,\n',
    'a path of Windows': 'image,tags\n.\\a.jpg,dog cat\nb,\n',
}


@pytest.mark.parametrize('name', SHEETS)
def test_a_spreadsheet_is_read_as_for_a_dataset(tmp_path, name):
    "One reader: what `make_folder` reads, `predict` reads in the same way."
    for photograph in 'ab':
        photo(tmp_path/'in'/f'{photograph}.jpg')
    (tmp_path/'t.csv').write_bytes(SHEETS[name].encode())
    make_folder(tmp_path/'data', tmp_path/'in', tmp_path/'t.csv')
    folder = TagFolder(tmp_path/'data')
    names = read_names(tmp_path/'t.csv')
    for i, row in zip(folder.ids, folder.tags):
        assert {*names[i]} == {c for c, t in zip(folder.classes[1:], row) if t}
    predict(Halves(), [tmp_path/'in'], tmp_path/'out', names)


def test_classes_of_the_network_decide_how_a_cell_is_read(tmp_path):
    (tmp_path/'t.csv').write_text('image,tags\na,"traffic light, cat"\nb,x\n')
    names = read_names(tmp_path/'t.csv', ['cat', 'traffic_light', 'x'])
    assert names == {'a': ['traffic_light', 'cat'], 'b': ['x']}
    assert find_imagenet('Egyptian_cat') == find_imagenet('egyptian cat')


@pytest.mark.parametrize('files, rows', [('NFD', 'NFC'), ('NFC', 'NFD'), ('NFD', 'NFD')])
def test_names_of_a_mac(tmp_path, files, rows):
    "In a spreadsheet and in a dict, for a photograph in a folder and by its name alone."
    def name(form, text='Käse/Frühstück'): return unicodedata.normalize(form, text)
    photo(tmp_path/'in'/f'{name(files)}.jpg')
    photo(tmp_path/'in'/'b.jpg')
    model = Halves()
    for row in (name(rows), name(rows, 'Frühstück')):
        (tmp_path/'t.csv').write_text(f'image,tags\n{row}.jpg,cat\nb,dog\n')
        for tags in (read_names(tmp_path/'t.csv'), {row: ['cat'], 'b': ['dog']}):
            predict(model, [tmp_path/'in'], tmp_path/'out', tags)
            assert sorted(tags for _, tags in model.seen[-2:]) == [['cat'], ['dog']]


# --- models ---------------------------------------------------------------------------------------

def without(run, *stages):
    "The run with some stages not done."
    for s in stages:
        (run/s/'metrics.json').unlink()
    return run


def uses_pcm(model):
    return model.network.refine is not None


def test_the_best_method_where_there_is_no_segmenter(copied):
    without(copied, 'segmenter')
    for best in METHODS:
        for m in METHODS:
            seeds = dict(miou=50., threshold=.5) if m == best else dict(miou=40., threshold=.1)
            (copied/m/'seeds'/'metrics.json').write_text(json.dumps(seeds))
        assert load_model(copied).threshold == .5
        assert uses_pcm(load_model(copied)) == (best == 'seam+ppc')


def test_the_last_method_where_nothing_was_measured(copied):
    "And the default threshold; seeds that are not there yet count as not measured."
    without(copied, 'segmenter', 'cam/seeds')
    (copied/'seam+ppc'/'seeds'/'metrics.json').write_text('{"miou": null}')
    assert load_model(copied).threshold == .25 and uses_pcm(load_model(copied))
    without(copied, 'seam+ppc/train')
    assert not uses_pcm(load_model(copied))
    without(copied, 'cam/train')
    with pytest.raises(DataError, match='no trained network yet'):
        load_model(copied)


@pytest.mark.parametrize('given, used', [
    (dict(crf=False), True),
    (dict(crf=False, refine='psa'), False),
    (dict(refine='none'), True)])
def test_the_crf_of_seeds_is_the_runs(copied, given, used):
    config = read_json(copied/'config.json')
    (copied/'config.json').write_text(json.dumps(config | {'threshold': .4} | given))
    model = load_model(copied/'cam')
    assert (model.pairwise is not None) == used and model.threshold == .4


def test_a_run_of_an_earlier_edition(copied):
    "Its parameters have other names."
    config = read_json(copied/'config.json')
    old = {'lr_new': config.pop('head_lr_mult'), 'classifier': 'drawn'}
    (copied/'config.json').write_text(json.dumps(config | old))
    assert isinstance(load_model(copied), SegmenterModel)
    assert load_model(copied/'cam').classes == load_model(copied).classes


@pytest.mark.parametrize('place', ['nowhere', '', 'segmenter', 'cam/train', 'masks'])
def test_what_is_no_model(done, tmp_path, place):
    with pytest.raises(DataError, match='is no run: give the folder of a run'):
        load_model(done/place if place else tmp_path)


def test_a_method_from_inside_its_folder(done, monkeypatch):
    monkeypatch.chdir(done/'seam+ppc')
    assert uses_pcm(load_model('.')) and load_model('..').recipe


def test_a_run_outlives_its_data(copied, scenes):
    "Its own classes.txt comes first; where there are none at all, the sentence says what to do."
    folders = copied, copied/'cam'
    config = read_json(copied/'config.json')
    (copied/'config.json').write_text(json.dumps(config | {'data': str(copied/'moved')}))
    assert load_model(copied).classes == TagFolder(scenes).classes
    (copied/'classes.txt').unlink()
    for path in folders:
        with pytest.raises(DataError, match='classes.txt is missing, and .*moved has gone'):
            load_model(path)
    shutil.copy(scenes/'classes.txt', copied/'classes.txt')
    for path in folders:
        assert load_model(path).classes == TagFolder(scenes).classes
    (copied/'config.json').write_text(json.dumps(config))
    (copied/'classes.txt').write_text('background\na\nb\nc\nd\ne\nf\n')
    for path in folders:
        assert load_model(path).classes == ['background', *'abcdef']
    (copied/'classes.txt').write_text('background\ncat\n')
    with pytest.raises(DataError, match='weights.safetensors has'):
        load_model(copied/'cam')


def test_damaged_files_of_a_run_are_named(copied):
    for stage, folder in (('segmenter', copied), ('cam/train', copied/'cam')):
        path = copied/stage/'weights.safetensors'
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(DataError, match='weights.safetensors cannot be read'):
            load_model(folder)
    (copied/'config.json').write_text('{"methods"')
    with pytest.raises(DataError, match='config.json is damaged'):
        load_model(copied)


# --- names ----------------------------------------------------------------------------------------

def test_names(tmp_path):
    for name in (
            'x/1.jpg', 'x/1.png', 'x/deep/1.JPEG', 'y/1.jpg', 'y/on the beach, späť 猫.Png',
            'y/.1.jpg', 'y/._1.jpg', '.trash/1.jpg', 'y/notes.txt', 'y/film.mp4'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    (tmp_path/'y'/'album.jpg').mkdir()
    def find(*paths):
        return [*find_photographs([tmp_path/p for p in paths], tmp_path/'out')]
    everything = ['x/1.jpg', 'x/1.png', 'x/deep/1', 'y/1', 'y/on the beach, späť 猫']
    assert find('x', 'y') == find('.') == everything
    assert find('x/1.jpg', 'x/1.jpg') == find('x/1.jpg') == ['1']
    assert find('x/deep', 'x/deep/1.JPEG') == ['1']
    assert find('x/1.jpg', 'y/1.jpg') == ['x/1', 'y/1']
    assert find('y/film.mp4') == ['film']  # a file that is named needs no known ending
    with pytest.raises(DataError, match='no photographs'):
        find_photographs(iter([]), tmp_path)
    long = 'x'*300
    for path, words in (('z', 'z is missing'), ('y/album.jpg', 'album.jpg holds no photographs'),
                        (long, 'xx is missing')):
        with pytest.raises(DataError, match=words):
            find('x', path)


@pytest.mark.parametrize('kind', [str, Path])
def test_one_path_is_not_a_list_of_letters(tmp_path, kind):
    for name in 'ab':
        photo(tmp_path/'in'/f'{name}.jpg')
    table, problems = predict(Halves(), kind(tmp_path/'in'), kind(tmp_path/'out'))
    assert [*table.image.unique()] == ['a', 'b'] and not problems
    table, _ = predict(Halves(), kind(tmp_path/'in'/'a.jpg'), tmp_path/'out')
    assert [*table.image.unique()] == ['a']
    with pytest.raises(DataError, match='nowhere/ is missing|nowhere is missing'):
        predict(Halves(), 'nowhere/', tmp_path/'out')


def test_formats_that_are_not_read_are_named(tmp_path):
    for name in ('1.HEIC', '2.heic', 'sub/3.webp'):
        (tmp_path/'in'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'in'/name).write_bytes(b'')
    with pytest.raises(DataError, match='in holds no photographs, but 2 .heic, 1 .webp'):
        find_photographs([tmp_path/'in'], tmp_path/'out')


NAMES = st.lists(
    st.tuples(
        st.sampled_from(['', 'a/', 'b/', 'a/a/']), st.sampled_from('12'),
        st.sampled_from(['', '.jpg', '.png']), st.sampled_from(['.jpg', '.png', '.JPG'])),
    min_size=1, max_size=8, unique=True)

@given(NAMES)
@example([('', '1', '', '.jpg'), ('', '1', '', '.png'), ('', '1', '.jpg', '.png')])
@settings(max_examples=60, deadline=None)
def test_no_mask_overwrites_another(parts):
    with tempfile.TemporaryDirectory() as root:
        files = {Path(root)/''.join(p) for p in parts}
        for f in files:
            f.parent.mkdir(parents=True, exist_ok=True)
            f.touch()
        found = find_photographs([root], Path(root)/'out')
        # names are a dict's keys: were two the same, one would be missing
        assert set(found.values()) == files and len(found) == len(files)
        assert not any(Path(n).is_absolute() or '..' in Path(n).parts for n in found)
        for name, file in found.items():
            assert file.as_posix().startswith(f'{file.parent.as_posix()}/{Path(name).name}')


def test_results_are_no_photographs(tmp_path):
    "With the results next to the photographs, a second call finds and makes the same as the first."
    photo(tmp_path/'1.jpg')
    photo(tmp_path/'masks'/'own.jpg')
    def twice(out):
        return [predict(Halves(), [tmp_path], out)[0] for _ in range(2)]
    first, second = twice(tmp_path/'out')
    assert [*first.image.unique()] == ['1', 'masks/own'] and first.equals(second)
    first, second = twice(tmp_path)
    assert first.equals(second)


# --- photographs ----------------------------------------------------------------------------------

def test_files(tmp_path):
    photo(tmp_path/'in'/'a.jpg', (60, 40))
    photo(tmp_path/'in'/'sub dir'/'ü.png', (31, 20))
    out = tmp_path/'out'
    table, problems = predict(Halves(), [tmp_path/'in'], out)
    files = sorted(p.relative_to(out).as_posix() for p in out.rglob('*') if p.is_file())
    assert problems == [] and files == [
        'areas.csv', 'masks/a.png', 'masks/sub dir/ü.png', 'overlays/a.png',
        'overlays/sub dir/ü.png']
    with Image.open(out/'masks'/'a.png') as im:
        palette = np.reshape(im.getpalette(), (-1, 3))[:3].tolist()
        assert im.mode == 'P' and palette == voc_palette(3).tolist()
    assert read_mask(out/'masks'/'sub dir'/'ü.png').shape == (20, 31)
    rows = [
        ('a', 'background', 1200, .5),
        ('a', 'dog', 1200, .5),
        ('sub dir/ü', 'background', 300, 15/31),
        ('sub dir/ü', 'dog', 320, 16/31)]
    assert [*table.itertuples(index=False, name=None)] == rows
    read = pd.read_csv(out/'areas.csv')
    assert [*read.columns] == ['image', 'class', 'pixels', 'fraction']
    assert [*read.image] == [row[0] for row in rows]
    assert np.allclose(read.fraction, [row[3] for row in rows], atol=1e-5)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_areas_are_counts(h, w, n):
    mask = np.random.default_rng(n).integers(0, 4, (h, w)).astype(np.uint8)
    classes = ['background', 'a', 'b', 'c', 'd']
    rows = {r['class']: r for r in areas(mask, classes)}
    for k, name in enumerate(classes):
        pixels = sum(int(v) == k for line in mask for v in line)
        want = {'class': name, 'pixels': pixels, 'fraction': pixels/(h*w)}
        assert (name in rows) == (pixels > 0) and (not pixels or rows[name] == want)


def test_broken_ones_among_good_ones(tmp_path):
    root = tmp_path/'in'
    for name in 'ace':
        photo(root/f'{name}.jpg')
    (root/'b.jpg').write_bytes((root/'a.jpg').read_bytes()[:900])
    (root/'d.png').write_text('no picture')
    (root/'f.jpg').write_bytes(b'')
    (root/'g.jpg').symlink_to(tmp_path/'gone.jpg')
    table, problems = predict(Halves(), [root], tmp_path/'out')
    assert [*table.image.unique()] == ['a', 'c', 'e'] and len(problems) == 4
    for name, sentence in zip(('b.jpg', 'd.png', 'f.jpg', 'g.jpg'), problems):
        assert str(root/name) in sentence and 'cannot be read' in sentence
    masks = sorted(p.name for p in (tmp_path/'out'/'masks').iterdir())
    assert masks == ['a.png', 'c.png', 'e.png']
    only, problems = predict(Halves(), [root/'f.jpg'], tmp_path/'none')
    assert len(only) == 0 and len(problems) == 1
    assert (tmp_path/'none'/'areas.csv').read_text() == 'image,class,pixels,fraction\n'


def gpu_runs_out():
    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')

def numpy_runs_out():
    np.empty(10**17, np.uint8)

def cpu_allocator_runs_out():
    torch.empty(10**17, dtype=torch.uint8)

def shapes_do_not_fit():
    raise RuntimeError('mat1 and mat2 shapes cannot be multiplied')


class FailsOnWide(Halves):
    "A model with an error for wide images."
    def __init__(self, fail):
        super().__init__()
        self.fail = fail

    def __call__(self, image, tags=None):
        if image.width > 60:
            self.fail()
        return super().__call__(image)


def test_one_that_is_too_large_for_the_memory(tmp_path):
    "On a GPU, in numpy, in torch's CPU allocator. An error that has another cause is not hidden."
    photo(tmp_path/'in'/'a.jpg')
    photo(tmp_path/'in'/'b.jpg', (90, 40))
    photo(tmp_path/'in'/'c.jpg')
    for fail in (gpu_runs_out, numpy_runs_out, cpu_allocator_runs_out):
        table, problems = predict(FailsOnWide(fail), [tmp_path/'in'], tmp_path/'out')
        assert [*table.image.unique()] == ['a', 'c'] and len(problems) == 1
        assert 'b.jpg needs more memory' in problems[0] and 'limit' in problems[0]
    with pytest.raises(RuntimeError, match='mat1'):
        predict(FailsOnWide(shapes_do_not_fit), [tmp_path/'in'], tmp_path/'out')


def system_fails(): raise OSError(errno.EIO, 'Input/output error')

def path_is_too_long(): open('x'*300)


def test_an_error_of_the_system_stops_nothing(tmp_path):
    "One photograph whose name leaves no room for its mask's, and errors of reading."
    photo(tmp_path/'in'/'a.jpg')
    photo(tmp_path/'in'/'b.jpg', (90, 40))
    photo(tmp_path/'in'/f'{"猫"*82}.jpg')
    photo(tmp_path/'in'/f'{"x"*251}.jpg')
    photo(tmp_path/'in'/f'{"x"*251}.png')
    for fail in (system_fails, path_is_too_long):
        table, problems = predict(FailsOnWide(fail), [tmp_path/'in'], tmp_path/'out')
        assert [*table.image.unique()] == ['a', '猫'*82] and len(problems) == 3
        assert 'b.jpg has no mask' in problems[0]
        assert all('too long' in p for p in problems[1:])
        assert read_mask(tmp_path/'out'/'masks'/f'{"猫"*82}.png').shape == (40, 60)


def test_names_of_no_text_encoding(tmp_path):
    "A name in Latin-1, from an old archive."
    photo(tmp_path/'in'/'a.jpg')
    (tmp_path/'in'/'a.jpg').rename(os.fsdecode(os.fsencode(tmp_path/'in') + b'/b\xe4r.jpg'))
    photo(tmp_path/'in'/'a.jpg')
    table, problems = predict(Halves(), [tmp_path/'in'], tmp_path/'out')
    assert not problems and len({*table.image}) == 2
    assert len([*(tmp_path/'out'/'masks').iterdir()]) == 2
    assert len({*pd.read_csv(tmp_path/'out'/'areas.csv').image}) == 2


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_folder_of_results_that_takes_nothing_stops(tmp_path, monkeypatch, number):
    "A full disk or a folder that is not writable concerns all photographs."
    for name in 'ab':
        photo(tmp_path/'in'/f'{name}.jpg')
    model, replace = Halves(), os.replace
    def refuse(source, target):
        if 'masks' in Path(target).parts:
            raise OSError(number, os.strerror(number), str(source), None, str(target))
        replace(source, target)
    monkeypatch.setattr(os, 'replace', refuse)
    with pytest.raises(WriteError, match='a.png cannot be written'):
        predict(model, [tmp_path/'in'], tmp_path/'out')
    assert len(model.seen) == 1


def test_results_where_a_file_is(tmp_path):
    photo(tmp_path/'in'/'a.jpg')
    model = Halves()
    with pytest.raises(DataError, match='a.jpg is a file: give a folder'):
        predict(model, [tmp_path/'in'], tmp_path/'in'/'a.jpg')
    assert not model.seen


MODES = {'L': 'jpg', 'CMYK': 'jpg', 'P': 'png', '1': 'png', 'LA': 'png', 'RGBA': 'png'}
TURNS = {  # EXIF's orientation -> its inverse
    6: Image.ROTATE_90, 8: Image.ROTATE_270, 3: Image.ROTATE_180, 2: Image.FLIP_LEFT_RIGHT}

@pytest.mark.parametrize('place', ['', 'cam'])
def test_every_way_to_store_a_picture(done, scenes, tmp_path, place):
    """Grey, CMYK, with transparency, with a palette, turned by EXIF, of a single pixel: a mask of
    the upright size."""
    model, root = load_model(done/place), tmp_path/'in'
    picture = TagFolder(scenes).image(0).resize((90, 60))
    root.mkdir()
    for mode, ending in MODES.items():
        picture.convert(mode).save(root/f'{mode}.{ending}')
    exif = picture.getexif()
    for orientation, inverse in TURNS.items():
        exif[ExifTags.Base.Orientation] = orientation
        picture.transpose(inverse).save(root/f'turned{orientation}.png', exif=exif)
    picture.save(root/'upright.png')
    Image.new('RGB', (1, 1)).save(root/'pixel.png')
    table, problems = predict(model, [root], tmp_path/'out')
    assert problems == [] and table.image.nunique() == 12
    masks = {f.stem: read_mask(tmp_path/'out'/'masks'/f'{f.stem}.png') for f in root.iterdir()}
    for f in root.iterdir():
        size = (1, 1) if f.stem == 'pixel' else (60, 90)
        assert masks[f.stem].shape == read_image(f).size[::-1] == size
        if f.stem.startswith('turned'):
            assert (masks[f.stem] == masks['upright']).all()
    for image, rows in table.groupby('image'):
        assert rows.pixels.sum() == (1 if image == 'pixel' else 5400)
        assert abs(rows.fraction.sum() - 1) < 1e-12


@pytest.mark.parametrize('size, limit, shown', [
    ((3000, 2000), 1024, (1024, 683)),
    ((2000, 3000), 300, (200, 300)),
    ((1024, 700), 1024, (1024, 700)),
    ((1025, 9), 1024, (1024, 9)),
    ((5000, 2), 100, (100, 1)),
    ((1500, 900), 0, (1500, 900))])
def test_large_photographs_are_segmented_small(size, limit, shown):
    model = Halves()
    mask = mask_of(model, Image.new('RGB', size), limit=limit)
    assert model.seen == [(shown, None)]
    assert mask.shape == size[::-1] and mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 2}
    assert abs((mask == 0).mean() - .5) < .01 and not mask[:, :size[0]//2 - 16].any()


def test_a_telephones_photograph(done, scenes, tmp_path):
    "Twelve million pixels: a mask of all of them, equal to that of the small photograph."
    model, image = load_model(done/'cam'), TagFolder(scenes).image(0)
    tags = ['cat', 'panda']
    image.resize((4000, 3000), Image.BICUBIC).save(tmp_path/'large.jpg', quality=95)
    predict(model, [tmp_path/'large.jpg'], tmp_path/'out', tags, limit=128)
    mask = read_mask(tmp_path/'out'/'masks'/'large.png')
    small = model(image.resize((128, 96)), tags)
    assert mask.shape == (3000, 4000)
    shrunk = np.asarray(Image.fromarray(mask).resize((128, 96), Image.NEAREST))
    assert (shrunk == small).mean() > .9
    with Image.open(tmp_path/'out'/'overlays'/'large.png') as im:
        assert im.width == 1600 and 1200 < im.height < 1400


# --- overlays -------------------------------------------------------------------------------------

ZOO = ['background', 'cat', 'dog', 'aardvark of the savannah', 'cow']

@pytest.mark.parametrize('size', [(100, 70), (70, 100), (500, 375), (1600, 1200), (6000, 4000)])
def test_overlay(size):
    """Background as photographed, classes tinted, white lines between; below it the classes found,
    in their colours, no others."""
    (w, h), grey, palette = size, 120, voc_palette()
    mask = np.zeros((h, w), np.uint8)
    mask[h//4:h//2, w//4:] = 3
    mask[h//2:, w//4:w//2] = 2
    image = Image.new('RGB', size, (grey,)*3)
    seen = np.asarray(overlay(image, mask, ZOO)).astype(int)
    assert image.size == size and image.getcolors() == [(w*h, (grey,)*3)]  # itself left alone
    s = min(1, 1600/max(size))
    width, height = round(w*s), round(h*s)
    assert seen.shape[1] == width if max(size) >= 500 else seen.shape[1] >= width
    assert (seen[:height//4 - 3, :width] == grey).all()
    assert (seen[:height, :width//4 - 3] == grey).all()
    for k, y, x in ((3, .375, .7), (2, .75, .375)):
        tinted = seen[int(y*height), int(x*width)]
        assert abs(tinted - (grey + palette[k])/2).max() <= 1
    for y, x in ((.25, .6), (.5, .3)):
        line = seen[int(y*height) - 3:int(y*height) + 3, int(x*width)]
        assert (line == 255).all(-1).any()
    below = seen[height:]
    assert below.shape[0] >= 28 and (below[0] == 255).all()
    found = {k for k in range(1, 5) if (below == palette[k]).all(-1).sum() >= 12*12}
    assert found == {2, 3}
    entries = [f'{ZOO[k]} {100*np.count_nonzero(mask == k)/(w*h):.1f} %' for k in (2, 3)]
    letters = max(14, max(width, height)//50)
    assert (below == np.asarray(legend(entries, palette[2:4], width, letters))).all()


def test_overlay_of_nothing_and_of_the_unknown():
    for mask, colour in (
            (np.zeros((30, 200)), None), (np.full((30, 200), 255), 255),
            (np.ones((1, 1)), (128, 0, 0))):
        image = Image.new('RGB', mask.shape[::-1], (10, 20, 30))
        seen = np.asarray(overlay(image, mask, ZOO))
        assert seen.shape[0] >= mask.shape[0] + 28
        assert (seen[mask.shape[0]:] < 100).any()  # something is written
        if colour is None:
            nothing = np.asarray(legend(['nothing found'], [(255, 255, 255)], 200, 14))
            assert (seen[:30] == (10, 20, 30)).all() and (seen[30:] == nothing).all()


WORDS = st.sampled_from(['cat', 'Bär', 'жираф', 'aardvark of the savannah', 'x'*60])

@given(st.lists(WORDS, min_size=1, max_size=30), st.integers(1, 900), st.integers(8, 40))
@settings(max_examples=40, deadline=None)
def test_legend_holds_every_entry(names, width, size):
    """One square for each name, none cut off, none on another; no line is longer than the picture
    if it holds more than one entry."""
    colours = [(10 + n, 200, 7) for n in range(len(names))]
    sheet = np.asarray(legend(names, colours, width, size))
    lines = {}
    for c in colours:
        y, x = np.nonzero((sheet == c).all(-1))
        assert len(x) == (size - 2)**2  # inside its black border
        assert x.max() - x.min() == y.max() - y.min() == size - 3
        lines.setdefault(y.min(), []).append((x.min(), x.max()))
    assert sheet.shape[1] >= width
    assert not (sheet[:, -1] < 100).any()  # the last letter ends before the edge
    for squares in lines.values():
        assert len(squares) == 1 or max(squares)[1] < width
    if sheet.shape[1] > width:
        assert any(len(squares) == 1 for squares in lines.values())
    height = math.ceil(len(lines)*(size + size//2)) - size//2 + 2*(size//2)
    assert sheet.shape[0] == height
