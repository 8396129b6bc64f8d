"Linked saliency maps, simple ones against a slow reference, their source; and unusable folders."
import sys
import types
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter
from ppc import saliency as module
from ppc.data import DataError, TagFolder, check
from ppc.saliency import SIMPLE, link_saliency, make_saliency, saliency_source, simple_saliency
from ppc.scenes import scene

PHOTOS = Path(__file__).parents[2]/'shared'/'data'/'voc-animals'


def fails(call, *words, error=DataError):
    "The call raises an error whose message holds all the words."
    with pytest.raises(error) as e:
        call()
    for word in words:
        assert word in str(e.value), str(e.value)


@pytest.fixture
def bare(mine):
    "Scenes without maps, and a folder of their maps."
    (mine/'Saliency').rename(mine.parent/'SALImages')
    (mine.parent/'SALImages'/'SOURCE.txt').unlink(missing_ok=True)
    return mine, mine.parent/'SALImages'


# --- linked maps

def test_linked_maps_are_unchanged(bare):
    root, maps = bare
    assert link_saliency(root, maps) == dict(maps=16, unused=4)
    folder = TagFolder(root)
    check(folder, saliency=True)
    for i, name in enumerate(folder.ids):
        path = root/'Saliency'/f'{name}.png'
        assert path.is_symlink() and path.read_bytes() == (maps/f'{name}.png').read_bytes()
        original = np.array(Image.open(maps/f'{name}.png'))
        assert (folder.saliency(i)[0].numpy()*255 == original).all()
    assert not (root/'Saliency'/'val00000.png').exists()
    assert saliency_source(root) == 'linked from the folder SALImages'


def test_linking_twice_and_the_other_split(bare):
    root, maps = bare
    for split, n in (('train', 16), ('train', 16), ('val', 4)):
        assert link_saliency(root, maps, split, 'PFAN')['maps'] == n
    assert saliency_source(root) == 'PFAN' and len(list((root/'Saliency').glob('*.png'))) == 20


def test_maps_of_any_kind(bare):
    "Other sizes, three channels, JPEG, capital endings, subfolders, other files, macOS leftovers."
    root, maps = bare
    (maps/'deeper').mkdir()
    for n, f in enumerate(sorted(maps.glob('*.png'))):
        im = Image.open(f).convert('RGB' if n % 2 else 'L').resize((50 + n, 40))
        f.unlink()
        ending = (".png", ".jpg", ".JPEG", ".PNG")[n % 4]
        im.save(maps/('deeper' if n % 3 else '')/f'{f.stem}{ending}', quality=95)
    (maps/'readme.txt').write_text('maps')
    (maps/'._train00000.png').write_bytes(b'Mac OS X')
    assert link_saliency(root, maps)['maps'] == 16
    check(TagFolder(root), saliency=True)
    assert TagFolder(root).saliency(1).shape == (1, 40, 51)


def test_lacking_maps_are_counted_and_the_first_is_named(bare):
    root, maps = bare
    for i in (3, 7):
        (maps/f'train{i:05}.png').unlink()
    fails(lambda: link_saliency(root, maps), 'SALImages', '2 of the 16', 'train00003.png')
    fails(lambda: link_saliency(root, maps.parent/'nowhere'), 'nowhere', '16 of the 16')
    assert not (root/'Saliency').exists()


def damage(path, how):
    "Replace a map by one of 16 bits, by its first bytes, or by the bytes given."
    if how == 'deep':
        Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(path)
    elif how == 'truncated':
        path.write_bytes(path.read_bytes()[:200])
    else:
        path.write_bytes(how)


@pytest.mark.parametrize('how, word', [
    ('deep', '8-bit'),
    ('truncated', 'cannot be read'),
    (b'', 'cannot be read'),
    (b'<html>not found</html>', 'cannot be read'),
])
def test_unusable_map(bare, how, word):
    "Rejected before the first map is linked."
    root, maps = bare
    damage(maps/'train00011.png', how)
    fails(lambda: link_saliency(root, maps), 'train00011.png', word)
    assert not (root/'Saliency').exists()


def test_two_maps_of_one_image(bare):
    root, maps = bare
    Image.open(maps/'train00002.png').save(maps/'train00002.jpg')
    fails(lambda: link_saliency(root, maps), 'train00002.png', 'train00002.jpg')


# --- the record of the source

def test_two_sources_do_not_mix(bare):
    root, maps = bare
    link_saliency(root, maps, source='PFAN')
    fails(lambda: link_saliency(root, maps), 'Saliency', 'PFAN', 'another source')
    fails(lambda: make_saliency(root), 'Saliency', 'PFAN', 'another source')
    fails(lambda: make_saliency(root, 'val'), 'Saliency', 'PFAN', 'another source')
    assert saliency_source(root) == 'PFAN'


def test_maps_of_unknown_source_are_left_alone(bare):
    root, maps = bare
    (root/'Saliency').mkdir()
    (root/'Saliency'/'train00000.png').write_bytes((maps/'train00000.png').read_bytes())
    assert saliency_source(root) is None
    fails(lambda: link_saliency(root, maps), 'Saliency', 'SOURCE.txt')
    fails(lambda: make_saliency(root), 'Saliency', 'SOURCE.txt')
    (root/'Saliency'/'SOURCE.txt').write_text('drawn by hand\n')
    assert saliency_source(root) == 'drawn by hand'


def test_no_maps_no_source(bare): assert saliency_source(bare[0]) is None


def test_the_source_is_one_line(bare):
    root, maps = bare
    link_saliency(root, maps, source='PFAN,\n  from a drive\n')
    assert (root/'Saliency'/'SOURCE.txt').read_text() == 'PFAN, from a drive\n'
    assert saliency_source(root) == 'PFAN, from a drive'


# --- simple maps

def fine_grained(image):
    "OpenCV's map, without blur and prior."
    import cv2
    bgr = np.asarray(image)[..., ::-1].copy()
    return cv2.saliency.StaticSaliencyFineGrained_create().computeSaliency(bgr)[1]


def literal(image, blur, sigma):
    "The formula in float64, by loops, with SciPy's blur and Otsu's threshold by its definition."
    pytest.importorskip('cv2')
    x = np.array(fine_grained(image), np.float64)
    h, w = x.shape
    x = gaussian_filter(x, blur*max(h, w), mode='mirror')
    low, high = x.min(), x.max()
    for i in range(h):
        for j in range(w):
            r2 = ((i + .5)/h - .5)**2 + ((j + .5)/w - .5)**2
            x[i, j] = (x[i, j] - low)/max(high - low, 1e-6)*np.exp(-r2/(2*sigma**2))
    levels = np.floor(255*x).astype(int)
    best, t = -1, 0
    for k in range(256):
        a, b = levels[levels <= k], levels[levels > k]
        if a.size and b.size:
            between = a.size*b.size*(a.mean() - b.mean())**2
        else:
            between = 0
        if between > best*(1 + 1e-9):
            best, t = between, k
    return np.minimum(1, 255*x/(2*t + 1)), t


@pytest.mark.parametrize('i, blur, sigma', [
    (0, .05, .3),
    (1, .05, .3),
    (2, .02, .25),
    (3, .1, .5),
])
def test_equals_the_formula(i, blur, sigma):
    image = scene(np.random.default_rng([15, i]))[0][:, :100 + 9*i]
    got = simple_saliency(image, blur, sigma)
    want, t = literal(image, blur, sigma)
    assert got.shape == image.shape[:2] and got.dtype == np.float32
    slack = 255*2*2/(2*t - 1)**2   # rounding may move the threshold by one level
    assert abs(got - want).max() < slack and ((got > .5) == (want > .5)).mean() > .99


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**20),
    st.sampled_from([0, 1, 60, 255]))
def test_any_picture_has_a_map(h, w, seed, contrast):
    "Also one of a single pixel or colour: between 0 and 1, and the same each time."
    pytest.importorskip('cv2')
    image = (np.random.default_rng(seed).integers(0, contrast + 1, (h, w, 3))).astype(np.uint8)
    s = simple_saliency(image)
    assert s.shape == (h, w) and np.isfinite(s).all() and s.min() >= 0 and s.max() <= 1
    assert (s == simple_saliency(image.copy())).all()


def test_one_colour_has_nothing_that_stands_out():
    pytest.importorskip('cv2')
    for v in (0, 7, 255):
        assert not simple_saliency(np.full((30, 40, 3), v, np.uint8)).any()


def test_a_spot_stands_out_more_in_the_middle():
    pytest.importorskip('cv2')
    image = np.full((80, 80, 3), 90, np.uint8)
    image[34:46, 34:46] = image[4:16, 4:16] = (230, 200, 40)
    s = simple_saliency(image)
    assert s[40, 40] > .9 and s[10, 10] < .5 and s[70, 20] < .1


def iou(make, pictures):
    "Of what is above one half and what is an animal, over the pixels that are not unknown."
    hits = [((make(image) > .5) & (mask > 0) & (mask < 255)).sum() for image, mask in pictures]
    unions = [(((make(image) > .5) | (mask > 0)) & (mask < 255)).sum() for image, mask in pictures]
    return sum(hits)/sum(unions)


def test_better_than_the_bare_map_on_scenes():
    pytest.importorskip('cv2')
    pictures = [scene(np.random.default_rng([16, i]))[:2] for i in range(20)]
    assert iou(simple_saliency, pictures) > .4 > iou(fine_grained, pictures)


def test_better_than_the_bare_map_on_photographs():
    pytest.importorskip('cv2')
    if not PHOTOS.is_dir():
        pytest.skip('the photographs are not here')
    folder = TagFolder(PHOTOS, 'train_masks')
    some = range(0, len(folder), 15)
    pictures = [(np.array(folder.image(i)), folder.mask(i)) for i in some]
    assert iou(simple_saliency, pictures) > 2*iou(fine_grained, pictures)


# --- a folder of simple maps

def test_a_folder_of_maps(bare):
    pytest.importorskip('cv2')
    root, _ = bare
    assert make_saliency(root, workers=3) == dict(maps=16)
    assert make_saliency(root, 'val') == dict(maps=4)
    for split in ('train', 'val'):
        folder = TagFolder(root, split)
        check(folder, saliency=True)
        for i in range(len(folder)):
            image, stored = folder.image(i), folder.saliency(i)
            assert stored.shape[1:] == image.size[::-1]
            assert abs(stored[0].numpy() - simple_saliency(image)).max() < .51/255
    assert saliency_source(root) == SIMPLE and "not the paper's" in SIMPLE


def test_continued_with_any_number_of_workers(bare, monkeypatch):
    "An existing map is not made again; a missing one is made again with the same bytes."
    pytest.importorskip('cv2')
    root, _ = bare
    make_saliency(root, workers=1)
    paths = sorted((root/'Saliency').glob('*.png'))
    before = [p.read_bytes() for p in paths]
    times = [p.stat().st_mtime_ns for p in paths]
    for p in paths[:5]:
        p.unlink()
    make_saliency(root, workers=4)
    assert [p.read_bytes() for p in paths] == before
    assert [p.stat().st_mtime_ns for p in paths[5:]] == times[5:]
    monkeypatch.setattr(module, 'simple_saliency', lambda *a: pytest.fail('made again'))
    make_saliency(root)


def test_stopped_in_the_middle(bare, monkeypatch):
    "A stopped run leaves complete maps and their source; the next run makes the rest."
    pytest.importorskip('cv2')
    root, _ = bare
    (root/'JPEGImages'/'train00009.jpg').write_bytes(b'no photograph')
    fails(lambda: make_saliency(root, workers=1), 'train00009.jpg', 'cannot be read')
    done = list((root/'Saliency').glob('*.png'))
    assert saliency_source(root) == SIMPLE and 9 <= len(done) < 16
    assert not list((root/'Saliency').glob('.*'))
    Image.new('RGB', (128, 128), 'gray').save(root/'JPEGImages'/'train00009.jpg')
    make_saliency(root)
    check(TagFolder(root), saliency=True)


@pytest.mark.parametrize('found', [None, types.ModuleType('cv2')])
def test_without_opencv(bare, monkeypatch, found):
    "Missing, or without the module that only the contrib packages have."
    monkeypatch.setitem(sys.modules, 'cv2', found)
    monkeypatch.delitem(sys.modules, 'cv2.saliency', raising=False)
    fails(lambda: make_saliency(bare[0]), "pip install 'ppc-wsss[saliency]'", error=ImportError)
    assert not (bare[0]/'Saliency').exists()
    link_saliency(*bare)  # works without OpenCV
