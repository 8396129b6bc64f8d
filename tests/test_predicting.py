"Photographs in, masks out: the same as the run's own, whatever the photographs are called and however they are stored."
import json
import math
import shutil
import tempfile
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from torch.nn import functional as F
from ppc.cam import Maps
from ppc.crf import seed_mask, write_masks
from ppc.data import DataError, TagFolder, normalise, read_image, read_mask, voc_palette
from ppc.deeplab import write_predictions
from ppc.inference import read_cam, write_cams
from ppc.pipeline import run, trained_segmenter
from ppc.plots import legend, overlay
from ppc.predicting import (
    CamModel,
    SegmenterModel,
    areas,
    find_photographs,
    load_model,
    mask_of,
    predict_images,
    read_names,
    tags_of,
)
from ppc.stages import read_json

METHODS = ['cam', 'seam+ppc']


@pytest.fixture(scope='module')
def done(scenes, tmp_path_factory):
    "A finished run of two methods and a segmenter."
    out = tmp_path_factory.mktemp('runs')/'done'
    run(out, METHODS, data=str(scenes), batch_size=4, crop=64, target=32, resize=[64, 96], k=4, scales=[.5, 1.],
        seg_options=dict(batch_size=4, epochs=1, crop=64, pairwise='dlp'))
    return out


@pytest.fixture
def copied(done, tmp_path):
    "The run, for a test that changes it."
    return shutil.copytree(done, tmp_path/'run')


class Halves:
    "A model whose masks are known: background on the left, class 2 on the right. It remembers what it was shown."
    classes = ['background', 'cat', 'dog']
    def __init__(self): self.seen = []

    def __call__(self, image, tags=None):
        self.seen.append((image.size, tags))
        return np.where(np.arange(image.width) < image.width//2, 0, 2)[None].repeat(image.height, 0).astype(np.uint8)


def photo(path, size=(60, 40), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)).save(path, **more)
    return path


# --- the same masks as the run -------------------------------------------------------------------------------------------------

def test_a_segmenter_repeats_its_run(done, scenes, tmp_path):
    model, data = load_model(done), TagFolder(scenes, 'val')
    assert isinstance(model, SegmenterModel) and model.classes == data.classes and 'CRF' in str(model)
    write_predictions(model.network, data, tmp_path/'one', model.recipe.scales, batch_size=1, pairwise=model.recipe.pairwise)   # the run's function
    assert all(torch.equal(a, b) for a, b in zip(model.network.state_dict().values(), trained_segmenter(done).state_dict().values()))
    predict_images(model, data.files.values(), tmp_path/'out')
    for i in data.ids:
        mask = read_mask(tmp_path/'out'/'masks'/f'{i}.png')
        assert (mask == read_mask(tmp_path/'one'/f'{i}.png')).all()
        assert (mask == read_mask(done/'segmentation'/f'{i}.png')).mean() > .999   # made in a batch, whose sums end in other bits
    assert len({m for i in data.ids for m in np.unique(read_mask(tmp_path/'out'/'masks'/f'{i}.png'))}) > 1


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('use_crf', [True, False])
def test_cams_repeat_their_run(done, scenes, tmp_path, method, use_crf):
    model, data = load_model(done/method, use_crf), TagFolder(scenes)
    threshold = read_json(done/method/'seeds'/'metrics.json')['threshold']
    assert isinstance(model, CamModel) and model.threshold == threshold and model.scales == [.5, 1.] and (model.network.refine is not None) == ('seam' in method)
    data.ids = data.ids[:6]
    write_cams(model.network, data, tmp_path/'cams', model.scales, batch_size=1)
    write_masks(data, tmp_path/'cams', tmp_path/'one', threshold, use_crf, classes=len(data.classes))
    told = {i: [data.classes[1 + k] for k in data.tags[n].nonzero().flatten()] for n, i in enumerate(data.ids)}
    predict_images(model, [data.files[i] for i in data.ids], tmp_path/'out', told)
    for i in data.ids:
        mask = read_mask(tmp_path/'out'/'masks'/f'{i}.png')
        assert (mask == read_mask(tmp_path/'one'/f'{i}.png')).all()
        own = read_mask(done/method/'crf'/f'{i}.png') if use_crf else seed_mask(*read_cam(done/method/'cams-train'/f'{i}.npz'), threshold)
        assert (mask == own).mean() > .995
    assert any(read_mask(tmp_path/'out'/'masks'/f'{i}.png').any() for i in data.ids)


def test_without_the_crf_a_segmenter_takes_the_best_logit(done, scenes):
    model, image = load_model(done, crf=False), TagFolder(scenes).image(0)
    with torch.no_grad():
        logits = [F.interpolate(model.network(x), (128, 128), mode='bilinear', align_corners=True) for x in (normalise(image)[None], normalise(image)[None].flip(-1))]
    want = (logits[0] + logits[1].flip(-1))[0].argmax(0).numpy()
    assert (model(image) == want).mean() > .999 and (load_model(done)(image) != want).mean() > .001
    assert 'no CRF' in str(model)


# --- tags -----------------------------------------------------------------------------------------------------------------------

def test_guessed_tags(done, scenes):
    "A classifier that says yes to foxes alone, and one that says no to all: features are positive, so the sign of the weights decides."
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


class OneEyed(torch.nn.Module):
    "Says how bright the left half is to class 1, how dark to class 2; a quarter is where it changes its mind."
    def __init__(self):
        super().__init__()
        self.any = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        left = (x[:, 0, :, :x.shape[-1]//2].mean((1, 2)) > 0).float()
        cam = torch.stack([0*left, left - .25, .25 - left, left - .75], 1)[..., None, None].expand(-1, -1, 4, 4)
        return Maps(cam + torch.arange(16.).view(4, 4)/1000, None, None)


def test_the_mirror_has_a_say():
    "Bright on one side alone: in the mean of both views the left half is half bright, more than a quarter and less than three."
    model = CamModel(OneEyed(), ['background', 'bright', 'dark', 'very bright'], [1], True, .1)
    for side in (slice(0, 20), slice(20, 40)):
        picture = np.zeros((30, 40, 3), np.uint8)
        picture[:, side] = 255
        assert set(np.unique(model(Image.fromarray(picture)))) == {0, 1}
    assert set(np.unique(model(Image.new('RGB', (40, 30))))) == {0, 2} and set(np.unique(model(Image.new('RGB', (40, 30), 'white'), ['very bright']))) == {0, 3}


def test_tags_that_do_not_fit(done, tmp_path):
    for name in 'ab':
        photo(tmp_path/'in'/f'{name}.jpg')
    for model in (load_model(done/'cam'), Halves()):
        with pytest.raises(ValueError, match="no class 'unicorn': choose from cat"):
            predict_images(model, [tmp_path/'in'], tmp_path/'out', ['unicorn'])
        with pytest.raises(ValueError, match="'background'"):
            predict_images(model, [tmp_path/'in'], tmp_path/'out', {'a': ['cat'], 'b': ['background']})
        with pytest.raises(ValueError, match="no tags for 'b'"):
            predict_images(model, [tmp_path/'in'], tmp_path/'out', {'a': ['cat']})
    with pytest.raises(ValueError, match='takes no tags'):
        predict_images(load_model(done), [tmp_path/'in'], tmp_path/'out', ['cat'])
    assert not (tmp_path/'out').exists()


def test_tags_reach_their_photographs(tmp_path):
    for name in ('a/1.jpg', 'b/1.jpg', 'b/2.png'):
        photo(tmp_path/'in'/name)
    (tmp_path/'tags.csv').write_bytes('\ufeffimage,tags\r\na/1.jpg,cat dog\r\n1,dog\r\n\r\nb/2,\r\nsomebody else,cat\r\n'.encode())
    assert read_names(tmp_path/'tags.csv') == {'a/1': ['cat', 'dog'], '1': ['dog'], 'b/2': [], 'somebody else': ['cat']}
    model = Halves()
    predict_images(model, [tmp_path/'in'], tmp_path/'out', read_names(tmp_path/'tags.csv'))
    assert [tags for _, tags in model.seen] == [['cat', 'dog'], ['dog'], []]
    assert [*tags_of({'x': Path('x.jpg')}, None, model.classes).values()] == [None]


@pytest.mark.parametrize('content, words', [
    (b'', 'line 1'), (b'a,cat\n', 'line 1'), (b'image,tags\na,cat,dog\n', 'line 2 has 3 columns'), (b'image,tags\na,cat\na.jpg,dog\n', "line 3 repeats image 'a'"),
    ('image,tags\nbär,cat\n'.encode('latin1'), 'UTF-8'), (None, 'is missing')])
def test_bad_spreadsheet(tmp_path, content, words):
    if content is not None:
        (tmp_path/'t.csv').write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_names(tmp_path/'t.csv')


# --- models ---------------------------------------------------------------------------------------------------------------------

def without(run, *stages):
    for s in stages:
        (run/s/'metrics.json').unlink()
    return run


def test_the_best_method_where_there_is_no_segmenter(copied):
    without(copied, 'segmenter')
    for best in METHODS:
        for m in METHODS:
            (copied/m/'seeds'/'metrics.json').write_text(json.dumps({'miou': 50. if m == best else 40., 'threshold': .5 if m == best else .1}))
        assert load_model(copied).threshold == .5 and (load_model(copied).network.refine is not None) == (best == 'seam+ppc')


def test_the_last_method_where_nothing_was_measured(copied):
    "And the default threshold; seeds that are not there yet count as not measured."
    without(copied, 'segmenter', 'cam/seeds')
    (copied/'seam+ppc'/'seeds'/'metrics.json').write_text('{"miou": null}')
    assert load_model(copied).threshold == .25 and load_model(copied).network.refine is not None
    without(copied, 'seam+ppc/train')
    assert load_model(copied).network.refine is None
    without(copied, 'cam/train')
    with pytest.raises(DataError, match='no trained network yet'):
        load_model(copied)


@pytest.mark.parametrize('told, used', [(dict(crf=False), True), (dict(crf=False, refine='psa'), False), (dict(refine='none'), True)])
def test_the_crf_of_seeds_is_the_runs(copied, told, used):
    config = read_json(copied/'config.json')
    (copied/'config.json').write_text(json.dumps(config | {'threshold': .4} | told))
    assert (load_model(copied/'cam').pairwise is not None) == used and load_model(copied/'cam').threshold == .4


@pytest.mark.parametrize('place', ['nowhere', '', 'segmenter', 'cam/train', 'masks'])
def test_what_is_no_model(done, tmp_path, place):
    with pytest.raises(DataError, match='is no run: give the folder of a run'):
        load_model(done/place if place else tmp_path)


def test_a_method_from_inside_its_folder(done, monkeypatch):
    monkeypatch.chdir(done/'seam+ppc')
    assert load_model('.').network.refine is not None and load_model('..').recipe


def test_a_run_outlives_its_data(copied, scenes):
    "Its own classes.txt comes first; where there is none and the dataset is gone, the sentence says what to do."
    config = read_json(copied/'config.json')
    (copied/'config.json').write_text(json.dumps(config | {'data': str(copied/'moved')}))
    assert load_model(copied).classes == TagFolder(scenes).classes
    (copied/'classes.txt').unlink()
    for path in (copied, copied/'cam'):
        with pytest.raises(DataError, match='classes.txt is missing, and .*moved has gone'):
            load_model(path)
    shutil.copy(scenes/'classes.txt', copied/'classes.txt')
    for path in (copied, copied/'cam'):
        assert load_model(path).classes == TagFolder(scenes).classes
    (copied/'config.json').write_text(json.dumps(config))
    (copied/'classes.txt').write_text('background\na\nb\nc\nd\ne\nf\n')
    for path in (copied, copied/'cam'):
        assert load_model(path).classes == ['background', *'abcdef']
    (copied/'classes.txt').write_text('background\ncat\n')
    with pytest.raises(DataError, match='weights.safetensors has'):
        load_model(copied/'cam')


def test_damaged_files_of_a_run_are_named(copied):
    for stage, place in (('segmenter', copied), ('cam/train', copied/'cam')):
        path = copied/stage/'weights.safetensors'
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(DataError, match='weights.safetensors cannot be read'):
            load_model(place)
    (copied/'config.json').write_text('{"methods"')
    with pytest.raises(DataError, match='config.json is damaged'):
        load_model(copied)


# --- names ----------------------------------------------------------------------------------------------------------------------

def test_names(tmp_path):
    there = ['x/1.jpg', 'x/1.png', 'x/deep/1.JPEG', 'y/1.jpg', 'y/on the beach, späť 猫.Png', 'y/.1.jpg', 'y/._1.jpg', '.trash/1.jpg', 'y/notes.txt', 'y/film.mp4']
    for name in there:
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    (tmp_path/'y'/'album.jpg').mkdir()
    find = lambda *paths: [*find_photographs([tmp_path/p for p in paths], tmp_path/'out')]
    assert find('x', 'y') == find('.') == ['x/1.jpg', 'x/1.png', 'x/deep/1', 'y/1', 'y/on the beach, späť 猫']
    assert find('x/1.jpg', 'x/1.jpg') == find('x/1.jpg') == ['1'] and find('x/deep', 'x/deep/1.JPEG') == ['1']
    assert find('x/1.jpg', 'y/1.jpg') == ['x/1', 'y/1'] and find('y/film.mp4') == ['film']   # who names a file means it
    with pytest.raises(DataError, match='no photographs'):
        find_photographs(iter([]), tmp_path)
    for path, words in (('z', 'z is missing'), ('y/album.jpg', 'album.jpg holds no photographs')):
        with pytest.raises(DataError, match=words):
            find('x', path)


NAMES = st.lists(st.tuples(st.sampled_from(['', 'a/', 'b/', 'a/a/']), st.sampled_from('12'), st.sampled_from(['', '.jpg', '.png']), st.sampled_from(['.jpg', '.png', '.JPG'])),
                 min_size=1, max_size=8, unique=True)

@given(NAMES)
@example([('', '1', '', '.jpg'), ('', '1', '', '.png'), ('', '1', '.jpg', '.png')])
@settings(max_examples=60, deadline=None)
def test_no_mask_takes_the_place_of_another(parts):
    with tempfile.TemporaryDirectory() as root:
        files = {Path(root)/''.join(p) for p in parts}
        for f in files:
            f.parent.mkdir(parents=True, exist_ok=True)
            f.touch()
        found = find_photographs([root], Path(root)/'out')
        assert set(found.values()) == files and len(found) == len(files)   # names are a dict's keys: were two the same, one would be missing
        assert not any(Path(n).is_absolute() or '..' in Path(n).parts for n in found)
        for name, file in found.items():
            assert file.as_posix().startswith(f'{file.parent.as_posix()}/{Path(name).name}')


def test_results_are_no_photographs(tmp_path):
    "Called twice with the results beside the photographs, the second call finds what the first did, and makes the same."
    photo(tmp_path/'1.jpg'), photo(tmp_path/'masks'/'own.jpg')
    tables = [predict_images(Halves(), [tmp_path], tmp_path/'out')[0] for _ in range(2)]
    assert [*tables[0].image.unique()] == ['1', 'masks/own'] and tables[0].equals(tables[1])
    inside = [predict_images(Halves(), [tmp_path], tmp_path)[0] for _ in range(2)]
    assert inside[0].equals(inside[1])


# --- photographs ----------------------------------------------------------------------------------------------------------------

def test_files(tmp_path):
    photo(tmp_path/'in'/'a.jpg', (60, 40)), photo(tmp_path/'in'/'sub dir'/'ü.png', (31, 20))
    table, problems = predict_images(Halves(), [tmp_path/'in'], tmp_path/'out')
    assert problems == [] and sorted(p.relative_to(tmp_path/'out').as_posix() for p in (tmp_path/'out').rglob('*') if p.is_file()) == [
        'areas.csv', 'masks/a.png', 'masks/sub dir/ü.png', 'overlays/a.png', 'overlays/sub dir/ü.png']
    with Image.open(tmp_path/'out'/'masks'/'a.png') as im:
        assert im.mode == 'P' and np.reshape(im.getpalette(), (-1, 3))[:3].tolist() == voc_palette(3).tolist()
    assert read_mask(tmp_path/'out'/'masks'/'sub dir'/'ü.png').shape == (20, 31)
    rows = [('a', 'background', 1200, .5), ('a', 'dog', 1200, .5), ('sub dir/ü', 'background', 300, 15/31), ('sub dir/ü', 'dog', 320, 16/31)]
    assert [*table.itertuples(index=False, name=None)] == rows
    read = pd.read_csv(tmp_path/'out'/'areas.csv')
    assert [*read.columns] == ['image', 'class', 'pixels', 'fraction'] and [*read.image] == [r[0] for r in rows] and np.allclose(read.fraction, [r[3] for r in rows], atol=1e-5)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_areas_are_counts(h, w, n):
    mask = np.random.default_rng(n).integers(0, 4, (h, w)).astype(np.uint8)
    rows = {r['class']: r for r in areas(mask, ['background', 'a', 'b', 'c', 'd'])}
    for k, name in enumerate(['background', 'a', 'b', 'c', 'd']):
        pixels = sum(int(v) == k for line in mask for v in line)
        assert (name in rows) == (pixels > 0) and (not pixels or rows[name] == {'class': name, 'pixels': pixels, 'fraction': pixels/(h*w)})


def test_broken_ones_among_good_ones(tmp_path):
    for name in 'ace':
        photo(tmp_path/'in'/f'{name}.jpg')
    (tmp_path/'in'/'b.jpg').write_bytes((tmp_path/'in'/'a.jpg').read_bytes()[:900])
    (tmp_path/'in'/'d.png').write_text('no picture')
    (tmp_path/'in'/'f.jpg').write_bytes(b'')
    (tmp_path/'in'/'g.jpg').symlink_to(tmp_path/'gone.jpg')
    table, problems = predict_images(Halves(), [tmp_path/'in'], tmp_path/'out')
    assert [*table.image.unique()] == ['a', 'c', 'e'] and len(problems) == 4
    for name, told in zip(('b.jpg', 'd.png', 'f.jpg', 'g.jpg'), problems):
        assert str(tmp_path/'in'/name) in told and 'cannot be read' in told
    assert sorted(p.name for p in (tmp_path/'out'/'masks').iterdir()) == ['a.png', 'c.png', 'e.png']
    only, problems = predict_images(Halves(), [tmp_path/'in'/'f.jpg'], tmp_path/'none')
    assert len(only) == 0 and len(problems) == 1 and (tmp_path/'none'/'areas.csv').read_text() == 'image,class,pixels,fraction\n'


def test_one_that_is_too_large_for_the_memory(tmp_path):
    "Of the GPU, of numpy, and truly asked of torch's CPU allocator. What is no matter of the photograph is not hidden."
    def allocate(): torch.empty(10**17, dtype=torch.uint8)
    def raises(e): raise e
    troubles = [lambda: raises(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')), lambda: np.empty(10**17, np.uint8), allocate]

    class Trouble(Halves):
        def __call__(self, image, tags=None):
            if image.width > 60:
                trouble()
            return super().__call__(image)
    photo(tmp_path/'in'/'a.jpg'), photo(tmp_path/'in'/'b.jpg', (90, 40)), photo(tmp_path/'in'/'c.jpg')
    for trouble in troubles:
        table, problems = predict_images(Trouble(), [tmp_path/'in'], tmp_path/'out')
        assert [*table.image.unique()] == ['a', 'c'] and len(problems) == 1 and 'b.jpg needs more memory' in problems[0] and 'limit' in problems[0]
    trouble = lambda: raises(RuntimeError('mat1 and mat2 shapes cannot be multiplied'))
    with pytest.raises(RuntimeError, match='mat1'):
        predict_images(Trouble(), [tmp_path/'in'], tmp_path/'out')


@pytest.mark.parametrize('kind', ['done', 'done/cam'])
def test_every_way_to_store_a_picture(done, scenes, tmp_path, kind):
    "Grey, CMYK, with transparency, with a palette, turned by EXIF, of a single pixel: a mask of the upright size."
    model, picture, root = load_model(done/Path(kind).relative_to('done')), TagFolder(scenes).image(0).resize((90, 60)), tmp_path/'in'
    root.mkdir()
    for mode, ending in (('L', 'jpg'), ('CMYK', 'jpg'), ('P', 'png'), ('1', 'png'), ('LA', 'png'), ('RGBA', 'png')):
        picture.convert(mode).save(root/f'{mode}.{ending}')
    exif = picture.getexif()
    for orientation, back in ((6, Image.ROTATE_90), (8, Image.ROTATE_270), (3, Image.ROTATE_180), (2, Image.FLIP_LEFT_RIGHT)):
        exif[ExifTags.Base.Orientation] = orientation
        picture.transpose(back).save(root/f'turned{orientation}.png', exif=exif)
    picture.save(root/'upright.png')
    Image.new('RGB', (1, 1)).save(root/'pixel.png')
    table, problems = predict_images(model, [root], tmp_path/'out')
    assert problems == [] and table.image.nunique() == 12
    for f in root.iterdir():
        mask = read_mask(tmp_path/'out'/'masks'/f'{f.stem}.png')
        assert mask.shape == read_image(f).size[::-1] == ((1, 1) if f.stem == 'pixel' else (60, 90))
        if f.stem.startswith('turned'):
            assert (mask == read_mask(tmp_path/'out'/'masks'/'upright.png')).all()
    for image, rows in table.groupby('image'):
        assert rows.pixels.sum() == (1 if image == 'pixel' else 5400) and abs(rows.fraction.sum() - 1) < 1e-12


@pytest.mark.parametrize('size, limit, shown', [
    ((3000, 2000), 1024, (1024, 683)), ((2000, 3000), 300, (200, 300)), ((1024, 700), 1024, (1024, 700)), ((1025, 9), 1024, (1024, 9)), ((5000, 2), 100, (100, 1)), ((1500, 900), 0, (1500, 900))])
def test_large_photographs_are_segmented_small(size, limit, shown):
    model = Halves()
    mask = mask_of(model, Image.new('RGB', size), limit=limit)
    assert model.seen == [(shown, None)] and mask.shape == size[::-1] and mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 2}
    assert abs((mask == 0).mean() - .5) < .01 and not mask[:, :size[0]//2 - 16].any()


def test_a_telephones_photograph(done, scenes, tmp_path):
    "Twelve million pixels, as they come: a mask of all of them, the one of the small photograph."
    model, image = load_model(done/'cam'), TagFolder(scenes).image(0)
    image.resize((4000, 3000), Image.BICUBIC).save(tmp_path/'large.jpg', quality=95)
    predict_images(model, [tmp_path/'large.jpg'], tmp_path/'out', ['cat', 'panda'], limit=128)
    mask, small = read_mask(tmp_path/'out'/'masks'/'large.png'), model(image.resize((128, 96)), ['cat', 'panda'])
    assert mask.shape == (3000, 4000)
    assert (np.asarray(Image.fromarray(mask).resize((128, 96), Image.NEAREST)) == small).mean() > .9
    with Image.open(tmp_path/'out'/'overlays'/'large.png') as im:
        assert im.width == 1600 and 1200 < im.height < 1400


# --- overlays -------------------------------------------------------------------------------------------------------------------

ZOO = ['background', 'cat', 'dog', 'aardvark of the savannah', 'cow']

@pytest.mark.parametrize('size', [(100, 70), (70, 100), (500, 375), (1600, 1200), (6000, 4000)])
def test_overlay(size):
    "Background as photographed, classes tinted, white lines between; below it the classes found, in their colours, no others."
    (w, h), grey = size, 120
    mask = np.zeros((h, w), np.uint8)
    mask[h//4:h//2, w//4:], mask[h//2:, w//4:w//2] = 3, 2
    image = Image.new('RGB', size, (grey,)*3)
    seen = np.asarray(overlay(image, mask, ZOO)).astype(int)
    assert image.size == size and image.getcolors() == [(w*h, (grey,)*3)]   # the photograph itself is left alone
    s = min(1, 1600/max(size))
    width, height = round(w*s), round(h*s)
    assert seen.shape[1] == width if max(size) >= 500 else seen.shape[1] >= width
    assert (seen[:height//4 - 3, :width] == grey).all() and (seen[:height, :width//4 - 3] == grey).all()
    for k, y, x in ((3, .375, .7), (2, .75, .375)):
        assert abs(seen[int(y*height), int(x*width)] - (grey + voc_palette()[k])/2).max() <= 1
    for y, x in ((.25, .6), (.5, .3)):
        assert (seen[int(y*height) - 3:int(y*height) + 3, int(x*width)] == 255).all(-1).any()
    below = seen[height:]
    assert below.shape[0] >= 28 and (below[0] == 255).all()
    found = {k for k in range(1, 5) if (below == voc_palette()[k]).all(-1).sum() >= 12*12}
    assert found == {2, 3}
    entries = [f'{ZOO[k]} {100*np.count_nonzero(mask == k)/(w*h):.1f} %' for k in (2, 3)]
    assert (below == np.asarray(legend(entries, voc_palette()[2:4], width, max(14, max(width, height)//50)))).all()


def test_overlay_of_nothing_and_of_the_unknown():
    for mask, colour in ((np.zeros((30, 200)), None), (np.full((30, 200), 255), 255), (np.ones((1, 1)), (128, 0, 0))):
        image = Image.new('RGB', mask.shape[::-1], (10, 20, 30))
        seen = np.asarray(overlay(image, mask, ZOO))
        assert seen.shape[0] >= mask.shape[0] + 28 and (seen[mask.shape[0]:] < 100).any()   # something is written
        if colour is None:
            assert (seen[:30] == (10, 20, 30)).all() and (seen[30:] == np.asarray(legend(['nothing found'], [(255, 255, 255)], 200, 14))).all()


@given(st.lists(st.sampled_from(['cat', 'Bär', 'жираф', 'aardvark of the savannah', 'x'*60]), min_size=1, max_size=30), st.integers(1, 900), st.integers(8, 40))
@settings(max_examples=40, deadline=None)
def test_legend_holds_every_entry(names, width, size):
    "One square for each name, none cut off, none on another; no line is longer than the picture if it holds more than one entry."
    colours = [(10 + n, 200, 7) for n in range(len(names))]
    sheet = np.asarray(legend(names, colours, width, size))
    lines = {}
    for c in colours:
        y, x = np.nonzero((sheet == c).all(-1))
        assert len(x) == (size - 2)**2 and x.max() - x.min() == y.max() - y.min() == size - 3   # inside its black border
        lines.setdefault(y.min(), []).append((x.min(), x.max()))
    assert sheet.shape[1] >= width and not (sheet[:, -1] < 100).any()   # the last letter ends before the edge
    for squares in lines.values():
        assert len(squares) == 1 or max(squares)[1] < width
    if sheet.shape[1] > width:
        assert any(len(squares) == 1 for squares in lines.values())
    assert sheet.shape[0] == math.ceil(len(lines)*(size + size//2)) - size//2 + 2*(size//2)
