"""The dense CRF against pydensecrf and against the exact mean field in float64 by loops.

Its lattice against one of dictionaries; and bad input.
"""
import math
import subprocess
import sys
import time
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ppc import crf as module
from ppc.crf import (
    CRF_DLP,
    CRF_IRN,
    CRF_PRESETS,
    CRF_PSA,
    CRF_SSC,
    Pairwise,
    crf_scores,
    dense_crf,
    hard_unary,
    lattice,
    lattice_blur,
    mean_field,
    normalised_kernel,
    write_masks,
)
from ppc.data import TagFolder, read_image, read_mask
from ppc.inference import read_cam, write_cam
from ppc.scenes import scene

PHOTOS = Path(__file__).parents[2]/'shared'/'data'/'voc-animals'
seeds = st.integers(0, 2**20)


def rough(mask, rng, n=90, side=12):
    "A seed as CAMs make them: blocks of the mask moved or flattened."
    out = mask.copy()
    H, W = mask.shape
    for y, x in zip(rng.integers(0, H - side + 1, n), rng.integers(0, W - side + 1, n)):
        out[y:y+side, x:x+side] = mask[y + side//2, x + side//2]
    return out


def picture(seed):
    "A generated scene, and a rough seed of it."
    rng = np.random.default_rng(seed)
    image, mask, _ = scene(rng)
    return np.array(image), rough(np.array(mask), rng)


def energies(labels, names, classes, confidence=.7):
    return hard_unary(torch.from_numpy(labels).long(), torch.as_tensor(names), classes, confidence)


# --- pydensecrf -----------------------------------------------------------------------------------

def theirs(image, unary, p):
    "q of pydensecrf (L, H, W)."
    densecrf = pytest.importorskip('pydensecrf.densecrf')
    L, H, W = unary.shape
    field = densecrf.DenseCRF2D(W, H, L)
    field.setUnaryEnergy(np.ascontiguousarray(unary.reshape(L, -1), dtype=np.float32))
    field.addPairwiseGaussian(sxy=p.smooth_sxy, compat=p.smooth_compat)
    colours = np.ascontiguousarray(image)
    field.addPairwiseBilateral(sxy=p.sxy, srgb=p.srgb, rgbim=colours, compat=p.compat)
    return np.array(field.inference(p.iterations)).reshape(L, H, W)


def assert_same(image, unary, p):
    "Our q is that of pydensecrf, up to 0.1 % of the labels and 0.001 in the mean."
    got = mean_field(torch.from_numpy(image)[None], unary[None], p)[0].numpy()
    want = theirs(image, unary.numpy(), p)
    assert (got.argmax(0) == want.argmax(0)).mean() >= .999
    assert abs(got - want).mean() <= .001


@pytest.mark.parametrize('i', range(20))
def test_scenes_agree_with_pydensecrf(i):
    "All 21 labels, under one preset after the other."
    image, labels = picture(i)
    pairwise = (CRF_IRN, CRF_PSA, CRF_SSC, CRF_DLP)[i % 4]
    assert_same(image, energies(labels, range(21), 21), pairwise)


def photographs(n=10):
    "Images, and seeds made of their masks where there are masks."
    if not PHOTOS.is_dir():
        pytest.skip('the photographs are not here')
    folder = TagFolder(PHOTOS, 'train_masks')
    for i in range(0, len(folder), max(1, len(folder)//n))[:n]:
        mask = np.where(folder.mask(i) == 255, 0, folder.mask(i))
        yield np.array(folder.image(i)), rough(mask, np.random.default_rng(i), 60, 30)


def test_photographs_agree_with_pydensecrf():
    pytest.importorskip('pydensecrf')
    for image, labels in photographs():
        names = np.unique(labels)
        assert_same(image, energies(labels, names, max(2, len(names))), CRF_IRN)


def test_labels_and_scores_agree_with_pydensecrf():
    """`crf` and `crf_scores`: labels over all classes with an unsure one, and soft scores.

    Of sizes not divisible by four, of one row, one column and one pixel.
    """
    utils = pytest.importorskip('pydensecrf.utils')
    image, labels = picture(3)
    image, labels = np.ascontiguousarray(image[:121, :99]), labels[:121, :99]
    labels = labels.astype(int)
    labels[40:60, 30:70] = 255
    from_1 = np.where(labels == 255, 0, labels + 1)
    unary = utils.unary_from_labels(from_1, 21, .7, zero_unsure=True).reshape(21, *labels.shape)
    want = theirs(image, unary, CRF_IRN).argmax(0)
    assert (dense_crf(image, labels, 21, unsure=255) == want).mean() >= .999
    scores = np.random.default_rng(0).random((3, 121, 99)).astype(np.float32)
    scores = scores*(np.arange(3)[:, None, None] != labels % 3)
    for part in (np.s_[:, :], np.s_[:1, :], np.s_[:, :1], np.s_[:1, :1]):
        some = np.ascontiguousarray(scores[(slice(None), *part)])
        want = theirs(image[part], utils.unary_from_softmax(some).reshape(some.shape), CRF_PSA)
        assert abs(crf_scores(image[part], some) - want).mean() <= .001


# --- the exact mean field, pair by pair -----------------------------------------------------------

def literal_kernel(pixels, reach):
    "The normalised kernel of every pair, over the first dimensions of the pixels."
    def similarity(s, t):
        return math.exp(-sum(((a - b)/r)**2 for a, b, r in zip(s, t, reach))/2)
    k = [[similarity(s, t) for t in pixels] for s in pixels]
    sums = [sum(row) for row in k]
    n = range(len(pixels))
    return np.array([[k[i][j]/math.sqrt(sums[i]*sums[j]) for j in n] for i in n])


def literal_softmax(x):
    return np.exp(x - x.max(0))/np.exp(x - x.max(0)).sum(0)


def literal_mean_field(image, unary, p):
    "Every pair of pixels, in float64 -> (L, H, W)."
    L, H, W = unary.shape
    pixels = [(x, y, *map(float, image[y, x])) for y in range(H) for x in range(W)]
    smoothness = literal_kernel(pixels, [p.smooth_sxy]*2)
    appearance = literal_kernel(pixels, [p.sxy]*2 + [p.srgb]*3)
    total = p.smooth_compat*smoothness + p.compat*appearance
    alone = -unary.reshape(L, -1).astype(np.float64)
    q = literal_softmax(alone)
    for _ in range(p.iterations):
        q = literal_softmax(alone + q @ total.T)
    return q.reshape(L, H, W)


@pytest.mark.parametrize('p', CRF_PRESETS.values(), ids=CRF_PRESETS)
def test_the_lattice_is_close_to_the_exact_mean_field(p):
    """Over pieces of 16x16 of scenes with a noisy seed of four labels.

    Measured by the mean of |q - q'|, and by how many labels are the same.
    """
    off, same = [], []
    for i in range(6):
        rng = np.random.default_rng(i)
        image, mask, _ = scene(rng)
        image, mask = np.array(image)[56:72, 48:64], np.array(mask)[56:72, 48:64]
        labels = np.where(rng.random((16, 16)) < .2, rng.integers(0, 4, (16, 16)), mask > 0)
        unary = energies(labels, range(4), 4)
        got = mean_field(torch.from_numpy(image)[None], unary[None], p)[0].numpy()
        want = literal_mean_field(image, unary.numpy(), p)
        off.append(abs(got - want).mean())
        same.append((got.argmax(0) == want.argmax(0)).mean())
    assert np.mean(off) <= .005 and np.mean(same) >= .99


def test_without_pairs_there_is_nothing_but_the_unary():
    image, labels = picture(0)
    unary = energies(labels, range(7), 7)[None]
    for p in (Pairwise(iterations=0), Pairwise(compat=0, smooth_compat=0)):
        got = mean_field(torch.from_numpy(image)[None], unary, p)
        torch.testing.assert_close(got, (-unary).softmax(1))


# --- the lattice, with a dictionary ---------------------------------------------------------------

def literal_elevate(f):
    "A point in the hyperplane, scaled so that corners lie d+1 apart."
    d = len(f)
    scaled = [x*(d + 1)*math.sqrt(2/3)/math.sqrt(i*(i + 1)) for i, x in enumerate(f, 1)]
    return [sum(scaled[k:]) - (k*scaled[k - 1] if k else 0) for k in range(d + 1)]


def literal_corners(y):
    "The d+1 corners around an elevated point, each with its barycentric weight."
    d = len(y) - 1
    zero = [(d + 1)*round(c/(d + 1)) for c in y]                      # the corner of remainder 0
    excess = sum(zero)//(d + 1)
    ranking = sorted(range(d + 1), key=lambda k: zero[k] - y[k])      # largest rest first
    if excess > 0:
        for k in ranking[d + 1 - excess:]:
            zero[k] -= d + 1
    if excess < 0:
        for k in ranking[:-excess]:
            zero[k] += d + 1
    ranking = sorted(range(d + 1), key=lambda k: zero[k] - y[k])
    rest = [(y[k] - zero[k])/(d + 1) for k in ranking]
    for r in range(d + 1):   # the corner of remainder r: r up, and around for the last r ranks
        weight = 1 - rest[0] + rest[d] if r == 0 else rest[d - r] - rest[d + 1 - r]
        around = ranking[d + 1 - r:]
        yield tuple(zero[k] + r - (d + 1 if k in around else 0) for k in range(d + 1)), weight


def literal_step(values, j):
    "Blur a dictionary of corners in direction j."
    def at(key, sign):
        moved = (a + sign*(1 - (len(key) if k == j else 0)) for k, a in enumerate(key))
        return values.get(tuple(moved), 0)
    return {key: v + .5*(at(key, 1) + at(key, -1)) for key, v in values.items()}


def literal_blur(features, values):
    """Adams, Baek and Davis point by point in float64.

    Nearest corner of remainder 0, ranks, barycentric weights, a dictionary of corners.
    """
    d = len(features[0])
    splats = [corner for f in features for corner in literal_corners(literal_elevate(f))]
    blurred = {}
    for n, (key, weight) in enumerate(splats):
        blurred[key] = blurred.get(key, 0) + weight*np.asarray(values[n//(d + 1)])
    for j in range(d + 1):
        blurred = literal_step(blurred, j)
    read = [weight*blurred[key] for key, weight in splats]
    return np.array([sum(read[i:i + d + 1]) for i in range(0, len(read), d + 1)])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 60), st.integers(1, 3),
       st.sampled_from([.2, 1., 30.]), seeds)
def test_lattice_is_the_literal_one(d, n, images, spread, seed):
    "Blur and normalised kernel, for several pictures at once."
    g = torch.Generator().manual_seed(seed)
    features = (torch.randn(images, n, d, generator=g)*spread).double()
    values = torch.randn(images*n, 3, generator=g).double()
    plain = lattice_blur(lattice(features), values).view(images, n, 3)
    normalised = lattice_blur(normalised_kernel(features, 2.), values).view(images, n, 3)
    for f, v, got, got_normalised in zip(features, values.view(images, n, 3), plain, normalised):
        want = literal_blur(f.tolist(), v.tolist())
        np.testing.assert_allclose(got, want, atol=1e-4)
        norm = 1/np.sqrt(literal_blur(f.tolist(), np.ones((n, 1)).tolist()))
        want = 2*norm*literal_blur(f.tolist(), (norm*v.numpy()).tolist())
        np.testing.assert_allclose(got_normalised, want, atol=1e-4)


# --- properties -----------------------------------------------------------------------------------

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 20), st.sampled_from([CRF_IRN, CRF_PSA, CRF_DLP]), seeds)
def test_one_absent_label_stands_for_all(present, absent, p, seed):
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(scene(rng)[0][40:88, 40:80].copy())[None]
    unary = torch.from_numpy(rng.random((1, present + 1, 48, 40), dtype=np.float32)*4)
    channels = [*range(present)] + [present]*absent
    full = mean_field(image, unary[:, channels], p)
    short = mean_field(image, unary, p, multiplicity=[1]*present + [absent])
    torch.testing.assert_close(full[:, :present + 1], short, atol=1e-4, rtol=0)
    torch.testing.assert_close(full.sum(1), torch.ones(1, 48, 40))


def test_only_labels_in_the_image_take_part():
    "All 21 labels written out choose the same as crf() does, and an absent label is never chosen."
    for i in range(6):
        image, labels = picture(i)
        labels[:30] = np.where(np.arange(128) < 64, labels[:30], 255)
        full = energies(labels, range(21), 21)
        best = mean_field(torch.from_numpy(image)[None], full[None])[0].argmax(0).numpy()
        assert set(np.unique(best)) <= set(np.unique(labels))
        assert (dense_crf(image, labels, 21, unsure=255) == best).mean() > .9999


def batch_of_scenes():
    "Three images (3, H, W, 3), and their energies over seven labels."
    images, labels = zip(*[picture(i) for i in (0, 3, 7)])
    unary = torch.stack([energies(mask, range(7), 7) for mask in labels])
    return torch.from_numpy(np.stack(images)), unary


def test_a_batch_equals_its_images():
    images, unary = batch_of_scenes()
    batch = mean_field(images, unary, CRF_PSA)
    for i in range(3):
        one = mean_field(images[i:i+1], unary[i:i+1], CRF_PSA)
        torch.testing.assert_close(batch[i:i+1], one, atol=1e-5, rtol=0)


def test_the_order_of_labels_and_the_zero_of_energies_do_not_matter():
    image, labels = picture(1)
    unary, image = energies(labels, range(4), 4)[None], torch.from_numpy(image)[None]
    q = mean_field(image, unary)
    reversed_labels = mean_field(image, unary.flip(1)).flip(1)
    torch.testing.assert_close(reversed_labels, q, atol=1e-4, rtol=0)
    shifted = mean_field(image, unary + torch.rand(1, 1, 128, 128))
    torch.testing.assert_close(shifted, q, atol=1e-4, rtol=0)
    assert (mean_field(image, unary) == q).all()


# --- bad input ------------------------------------------------------------------------------------

def test_few_labels_and_small_images():
    image, labels = picture(2)
    assert (dense_crf(image, np.full((128, 128), 9)) == 9).all()
    assert (dense_crf(image, np.full((128, 128), 9), 21) == 9).all()
    assert (dense_crf(image, np.where(labels > 0, 255, 4), 21, unsure=255) == 4).all()
    assert (dense_crf(image, np.full((128, 128), 255), 21, unsure=255) == 255).all()
    for cut in (np.s_[:1, :1], np.s_[:1], np.s_[:, 5:6]):
        out = dense_crf(image[cut], labels[cut], 21)
        assert out.shape == labels[cut].shape and out.dtype == np.uint8
        assert np.isin(out, labels[cut]).all()
        q = crf_scores(image[cut], np.zeros((2, *labels[cut].shape)))   # two unknown labels: equal
        assert q.dtype == np.float32 and abs(q - .5).max() < 1e-6
    assert (crf_scores(image, np.zeros((1, 128, 128))) == 1).all()


def test_grey_is_three_equal_colours():
    image, labels = picture(4)
    grey = image[..., 1].copy()
    want = dense_crf(np.stack([grey]*3, -1), labels)
    assert (dense_crf(grey, labels) == want).all()
    assert (dense_crf(grey[..., None], labels) == want).all()


@pytest.mark.parametrize('wrong, message', [
    (dict(labels=np.zeros((5, 4), int)), 'image is uint8'),
    (dict(image=np.zeros((4, 4, 3))), 'image is float64'),
    (dict(image=np.zeros((4, 4, 4), np.uint8)), 'image is'),
    (dict(labels=np.full((4, 4), 21)), r'hold 21..21: class numbers are 0..20'),
    (dict(labels=np.full((4, 4), 255)), 'unsure'),
    (dict(labels=np.full((4, 4), -1)), 'hold -1'),
    (dict(labels=np.full((4, 4), 256), classes=None), '0..255'),
    (dict(confidence=0), 'confidence'),
    (dict(confidence=1.5), 'confidence'),
])
def test_wrong_labels(wrong, message):
    right = dict(image=np.zeros((4, 4, 3), np.uint8), labels=np.eye(4, dtype=int), classes=21)
    with pytest.raises(ValueError, match=message):
        dense_crf(**{**right, **wrong})


def test_wrong_scores_and_sizes():
    image = np.zeros((4, 4, 3), np.uint8)
    for shape in ((4, 4), (0, 4, 4), (2, 4, 5)):
        with pytest.raises(ValueError, match='scores|image'):
            crf_scores(image, np.zeros(shape))
    scores = np.stack([np.full((4, 4), value) for value in (-1, .5, 2)])
    q = crf_scores(image, scores, Pairwise(iterations=0))
    np.testing.assert_allclose(q[:, 0, 0], np.array([1e-5, .5, 1])/1.50001, rtol=1e-5)   # clamped
    scores[1, 2, 3] = math.nan
    with pytest.raises(ValueError, match='scores hold NaN'):
        crf_scores(image, scores)
    with pytest.raises(ValueError, match='scores hold NaN'):
        module.seed_mask(scores, [1, 2, 3], .3)
    with pytest.raises(ValueError, match='scores hold NaN'):
        module.crf_cam(image, scores, [1, 2, 3])
    with pytest.raises(ValueError, match='unary holds NaN'):
        mean_field(torch.from_numpy(image)[None], torch.from_numpy(scores)[None])
    with pytest.raises(ValueError, match='images are'):
        mean_field(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match='too fine'):
        noise = torch.randint(0, 256, (1, 9, 9, 3), dtype=torch.uint8)
        mean_field(noise, torch.zeros(1, 2, 9, 9), Pairwise(srgb=1e-3))


@pytest.mark.parametrize('name, value', [
    ('sxy', 0), ('srgb', -1), ('smooth_sxy', math.nan), ('compat', -1), ('iterations', -1)])
def test_wrong_settings(name, value):
    with pytest.raises(ValueError, match=name):
        Pairwise(**{name: value})


# --- a whole split --------------------------------------------------------------------------------

@pytest.mark.slow
def test_masks_are_the_same_from_one_process_or_two(scenes, tmp_path, monkeypatch):
    folder, rng = TagFolder(scenes), np.random.default_rng(0)
    cams = tmp_path/'cams'
    for i, name in enumerate(folder.ids):
        present = np.unique(folder.mask(i))[1:]
        scores = np.stack([rough(folder.mask(i), rng) == c for c in present])*.9
        write_cam(cams/f'{name}.npz', scores, present)
    write_masks(folder, cams, tmp_path/'one', .3, True, 1, classes=7)
    monkeypatch.setattr(module, 'MIN_PARALLEL', 2)
    write_masks(folder, cams, tmp_path/'two', .3, True, 2, classes=7)
    write_masks(folder, cams, tmp_path/'other', .3, True, 1, pairwise=CRF_SSC)
    files = {out: [tmp_path/out/f'{name}.png' for name in folder.ids]
             for out in ('one', 'two', 'other')}
    for one, two in zip(files['one'], files['two']):
        assert one.read_bytes() == two.read_bytes()
    assert any((read_mask(a) != read_mask(b)).any() for a, b in zip(files['one'], files['other']))
    first = folder.ids[0]
    labels = module.seed_mask(*read_cam(cams/f'{first}.npz'), .3)
    want = dense_crf(read_image(folder.files[first]), labels, 7)
    assert (read_mask(files['one'][0]) == want).all()


PARENT = """
import os
import sys
import time
from pathlib import Path
from ppc.crf import write_each

def work(job):
    job[0].write_text(str(os.getpid()))
    time.sleep(60)

if __name__ == '__main__':
    write_each(work, [(Path(sys.argv[1])/f'{i}.pid',) for i in range(100)], 2, 'masks')
"""


def wait_until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(.1)


def is_running(pid):
    "The process exists and is no zombie."
    stat = Path(f'/proc/{pid}/stat')
    return stat.exists() and 'Z' not in stat.read_text().rpartition(')')[2].split()[0]


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    "Otherwise a killed run would go on writing masks while the run that continues it writes too."
    (tmp_path/'parent.py').write_text(PARENT)
    command = [sys.executable, tmp_path/'parent.py', tmp_path]
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def workers():
        texts = [f.read_text() for f in tmp_path.glob('*.pid')]
        return [int(text) for text in texts if text]

    wait_until(lambda: len(workers()) == 2)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(is_running, workers())), 20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda_agrees_with_the_cpu():
    images, unary = batch_of_scenes()
    cuda = mean_field(images.cuda(), unary.cuda())
    assert cuda.is_cuda
    cpu = mean_field(images, unary)
    assert (cpu - cuda.cpu()).abs().mean() < 1e-3
    assert (cpu.argmax(1) == cuda.cpu().argmax(1)).double().mean() > .999
    assert (mean_field(images.cuda(), unary.cuda()) == cuda).all()
