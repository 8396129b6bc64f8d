"The dense CRF: against pydensecrf, against the exact mean field in float64 by loops, its lattice against one of dictionaries; and bad input."
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
    CRF_PSA,
    CRF_SSC,
    Pairwise,
    crf,
    crf_scores,
    hard_unary,
    lattice,
    lattice_blur,
    mean_field,
    normalised_kernel,
    write_masks,
)
from ppc.data import TagFolder, read_image, read_mask
from ppc.inference import write_cam
from ppc.scenes import scene

PHOTOS = Path(__file__).parents[2]/'shared'/'data'/'voc-animals'
seeds = st.integers(0, 2**20)


def rough(mask, rng, n=90, side=12):
    "A seed as CAMs make them: blocks of the mask moved or flattened."
    out = mask.copy()
    for y, x in zip(rng.integers(0, mask.shape[0] - side + 1, n), rng.integers(0, mask.shape[1] - side + 1, n)):
        out[y:y+side, x:x+side] = mask[y + side//2, x + side//2]
    return out


def picture(seed):
    rng = np.random.default_rng(seed)
    image, mask, _ = scene(rng)
    return np.array(image), rough(np.array(mask), rng)


def energies(labels, names, classes, confidence=.7):
    return hard_unary(torch.from_numpy(labels).long(), torch.as_tensor(names), classes, confidence)


# --- pydensecrf ------------------------------------------------------------------------------------------------------------

def theirs(image, unary, p):
    "q of pydensecrf (L, H, W)."
    densecrf = pytest.importorskip('pydensecrf.densecrf')
    L, H, W = unary.shape
    field = densecrf.DenseCRF2D(W, H, L)
    field.setUnaryEnergy(np.ascontiguousarray(unary.reshape(L, -1), dtype=np.float32))
    field.addPairwiseGaussian(sxy=p.smooth_sxy, compat=p.smooth_compat)
    field.addPairwiseBilateral(sxy=p.sxy, srgb=p.srgb, rgbim=np.ascontiguousarray(image), compat=p.compat)
    return np.array(field.inference(p.iterations)).reshape(L, H, W)


def assert_same(image, unary, p):
    got, want = mean_field(torch.from_numpy(image)[None], unary[None], p)[0].numpy(), theirs(image, unary.numpy(), p)
    assert (got.argmax(0) == want.argmax(0)).mean() >= .999
    assert abs(got - want).mean() <= .001


@pytest.mark.parametrize('i', range(20))
def test_scenes_are_as_pydensecrf_has_them(i):
    "All 21 labels, under one preset after the other."
    image, labels = picture(i)
    assert_same(image, energies(labels, range(21), 21), (CRF_IRN, CRF_PSA, CRF_SSC, CRF_DLP)[i % 4])


def photographs(n=10):
    "Images, and seeds made of their masks where there are masks."
    if not PHOTOS.is_dir():
        pytest.skip('the photographs are not here')
    folder = TagFolder(PHOTOS, 'train_masks')
    for i in range(0, len(folder), max(1, len(folder)//n))[:n]:
        mask = np.where(folder.mask(i) == 255, 0, folder.mask(i))
        yield np.array(folder.image(i)), rough(mask, np.random.default_rng(i), 60, 30), len(folder.classes)


def test_photographs_are_as_pydensecrf_has_them():
    pytest.importorskip('pydensecrf')
    for image, labels, _ in photographs():
        names = np.unique(labels)
        assert_same(image, energies(labels, names, max(2, len(names))), CRF_IRN)


def test_labels_and_scores_are_as_pydensecrf_has_them():
    "The arrays' door: labels over all classes with an unsure one, soft scores, sizes not divisible by four, one row."
    utils = pytest.importorskip('pydensecrf.utils')
    image, labels = picture(3)
    image, labels = np.ascontiguousarray(image[:121, :99]), labels[:121, :99]
    labels = labels.astype(int)
    labels[40:60, 30:70] = 255
    unary = utils.unary_from_labels(np.where(labels == 255, 0, labels + 1), 21, .7, zero_unsure=True).reshape(21, *labels.shape)
    assert (crf(image, labels, 21, unsure=255) == theirs(image, unary, CRF_IRN).argmax(0)).mean() >= .999
    scores = np.random.default_rng(0).random((3, 121, 99)).astype(np.float32)*(np.arange(3)[:, None, None] != labels % 3)
    for part in (np.s_[:, :], np.s_[:1, :], np.s_[:, :1], np.s_[:1, :1]):
        some = np.ascontiguousarray(scores[(slice(None), *part)])
        want = theirs(image[part], utils.unary_from_softmax(some).reshape(some.shape), CRF_PSA)
        assert abs(crf_scores(image[part], some) - want).mean() <= .001


# --- the exact mean field, pair by pair ------------------------------------------------------------------------------------

def literal_mean_field(image, unary, p):
    "Every pair of pixels, in float64 -> (L, H, W)."
    L, H, W = unary.shape
    pixels = [(x, y, *map(float, image[y, x])) for y in range(H) for x in range(W)]
    def matrix(reach):
        k = [[math.exp(-sum(((a - b)/r)**2 for a, b, r in zip(s, t, reach))/2) for t in pixels] for s in pixels]
        sums = [sum(row) for row in k]
        return np.array([[k[i][j]/math.sqrt(sums[i]*sums[j]) for j in range(H*W)] for i in range(H*W)])
    total = p.smooth_compat*matrix([p.smooth_sxy]*2) + p.compat*matrix([p.sxy]*2 + [p.srgb]*3)
    def normal(x): return np.exp(x - x.max(0))/np.exp(x - x.max(0)).sum(0)
    alone = -unary.reshape(L, -1).astype(np.float64)
    q = normal(alone)
    for _ in range(p.iterations):
        q = normal(alone + q @ total.T)
    return q.reshape(L, H, W)


@pytest.mark.parametrize('p', [CRF_IRN, CRF_PSA, CRF_SSC, CRF_DLP], ids=['irn', 'psa', 'ssc', 'dlp'])
def test_the_lattice_costs_little_beside_every_pair(p):
    "Over pieces of 16x16 of scenes with a noisy seed of four labels: mean |q - q'|, and how many labels are others."
    off, same = [], []
    for i in range(6):
        rng = np.random.default_rng(i)
        image, mask, _ = scene(rng)
        image, mask = np.array(image)[56:72, 48:64], np.array(mask)[56:72, 48:64]
        labels = np.where(rng.random((16, 16)) < .2, rng.integers(0, 4, (16, 16)), mask > 0)
        unary = energies(labels, range(4), 4)
        got, want = mean_field(torch.from_numpy(image)[None], unary[None], p)[0].numpy(), literal_mean_field(image, unary.numpy(), p)
        off.append(abs(got - want).mean())
        same.append((got.argmax(0) == want.argmax(0)).mean())
    assert np.mean(off) <= .005 and np.mean(same) >= .99


def test_without_pairs_there_is_nothing_but_the_unary():
    image, labels = picture(0)
    unary = energies(labels, range(7), 7)[None]
    for p in (Pairwise(iterations=0), Pairwise(compat=0, smooth_compat=0)):
        torch.testing.assert_close(mean_field(torch.from_numpy(image)[None], unary, p), (-unary).softmax(1))


# --- the lattice, with a dictionary ----------------------------------------------------------------------------------------

def literal_blur(features, values):
    "Adams, Baek and Davis point by point in float64: nearest corner of remainder 0, ranks, barycentric weights, a dictionary of corners."
    d = len(features[0])
    blurred, splats = {}, []
    for f, value in zip(features, values):
        scaled = [x*(d + 1)*math.sqrt(2/3)/math.sqrt(i*(i + 1)) for i, x in enumerate(f, 1)]
        y = [sum(scaled[k:]) - (k*scaled[k - 1] if k else 0) for k in range(d + 1)]
        zero = [(d + 1)*round(c/(d + 1)) for c in y]
        excess = sum(zero)//(d + 1)
        ranking = sorted(range(d + 1), key=lambda k: zero[k] - y[k])     # largest rest first
        for k in (ranking[d + 1 - excess:] if excess > 0 else []):
            zero[k] -= d + 1
        for k in (ranking[:-excess] if excess < 0 else []):
            zero[k] += d + 1
        ranking = sorted(range(d + 1), key=lambda k: zero[k] - y[k])
        rest = [(y[k] - zero[k])/(d + 1) for k in ranking]
        for r in range(d + 1):                                           # the corner of remainder r: r up, and around for the last r ranks
            weight = 1 - rest[0] + rest[d] if r == 0 else rest[d - r] - rest[d + 1 - r]
            key = tuple(zero[k] + r - (d + 1)*(ranking.index(k) > d - r) for k in range(d + 1))
            splats.append((key, weight))
            blurred[key] = blurred.get(key, 0) + weight*np.asarray(value)
    for j in range(d + 1):
        step = [1 - (d + 1)*(k == j) for k in range(d + 1)]
        beside = lambda key, s: blurred.get(tuple(a + s*b for a, b in zip(key, step)), 0)
        blurred = {key: v + .5*(beside(key, 1) + beside(key, -1)) for key, v in blurred.items()}
    read = [w*blurred[key] for key, w in splats]
    return np.array([sum(read[i:i + d + 1]) for i in range(0, len(read), d + 1)])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 60), st.integers(1, 3), st.sampled_from([.2, 1., 30.]), seeds)
def test_lattice_is_the_literal_one(d, n, images, spread, seed):
    "Blur and normalised kernel, for several pictures at once."
    g = torch.Generator().manual_seed(seed)
    features = (torch.randn(images, n, d, generator=g)*spread).double()
    values = torch.randn(images*n, 3, generator=g).double()
    got = lattice_blur(lattice(features), values).view(images, n, 3)
    once = normalised_kernel(features, 2.)
    for f, v, blurred, scaled in zip(features, values.view(images, n, 3), got, lattice_blur(once, values).view(images, n, 3)):
        want = literal_blur(f.tolist(), v.tolist())
        np.testing.assert_allclose(blurred, want, atol=1e-4)
        norm = 1/np.sqrt(literal_blur(f.tolist(), np.ones((n, 1)).tolist()))
        np.testing.assert_allclose(scaled, 2*norm*literal_blur(f.tolist(), (norm*v.numpy()).tolist()), atol=1e-4)


# --- properties ------------------------------------------------------------------------------------------------------------

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 20), st.sampled_from([CRF_IRN, CRF_PSA, CRF_DLP]), seeds)
def test_one_absent_label_stands_for_all(present, absent, p, seed):
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(scene(rng)[0][40:88, 40:80].copy())[None]
    unary = torch.from_numpy(rng.random((1, present + 1, 48, 40), dtype=np.float32)*4)
    full = mean_field(image, unary[:, [*range(present), *[present]*absent]], p)
    short = mean_field(image, unary, p, multiplicity=[1]*present + [absent])
    torch.testing.assert_close(full[:, :present + 1], short, atol=1e-4, rtol=0)
    torch.testing.assert_close(full.sum(1), torch.ones(1, 48, 40))


def test_only_labels_in_the_picture_take_part():
    "All 21 labels written out choose the same as crf() does, and an absent label is never chosen."
    for i in range(6):
        image, labels = picture(i)
        labels[:30] = np.where(np.arange(128) < 64, labels[:30], 255)
        full = energies(labels, range(21), 21)
        best = mean_field(torch.from_numpy(image)[None], full[None])[0].argmax(0).numpy()
        assert set(np.unique(best)) <= set(np.unique(labels)) and (crf(image, labels, 21, unsure=255) == best).mean() > .9999


def test_a_batch_is_its_pictures():
    images, labels = map(np.stack, zip(*[picture(i) for i in (0, 3, 7)]))
    unary = torch.stack([energies(l, range(7), 7) for l in labels])
    batch = mean_field(torch.from_numpy(images), unary, CRF_PSA)
    for i in range(3):
        torch.testing.assert_close(batch[i:i+1], mean_field(torch.from_numpy(images[i:i+1]), unary[i:i+1], CRF_PSA), atol=1e-5, rtol=0)


def test_labels_have_no_order_and_energies_no_zero():
    image, labels = picture(1)
    unary, image = energies(labels, range(4), 4)[None], torch.from_numpy(image)[None]
    q = mean_field(image, unary)
    torch.testing.assert_close(mean_field(image, unary.flip(1)).flip(1), q, atol=1e-4, rtol=0)
    torch.testing.assert_close(mean_field(image, unary + torch.rand(1, 1, 128, 128)), q, atol=1e-4, rtol=0)
    assert (mean_field(image, unary) == q).all()


# --- bad input -------------------------------------------------------------------------------------------------------------

def test_few_labels_and_small_pictures():
    image, labels = picture(2)
    assert (crf(image, np.full((128, 128), 9)) == 9).all() and (crf(image, np.full((128, 128), 9), 21) == 9).all()
    assert (crf(image, np.where(labels > 0, 255, 4), 21, unsure=255) == 4).all()
    assert (crf(image, np.full((128, 128), 255), 21, unsure=255) == 255).all()
    for cut in (np.s_[:1, :1], np.s_[:1], np.s_[:, 5:6]):
        out = crf(image[cut], labels[cut], 21)
        assert out.shape == labels[cut].shape and out.dtype == np.uint8 and np.isin(out, labels[cut]).all()
        q = crf_scores(image[cut], np.zeros((2, *labels[cut].shape)))                   # nothing known of two labels: they stay equal
        assert q.dtype == np.float32 and abs(q - .5).max() < 1e-6
    assert (crf_scores(image, np.zeros((1, 128, 128))) == 1).all()


def test_grey_is_three_equal_colours():
    image, labels = picture(4)
    grey = image[..., 1].copy()
    want = crf(np.stack([grey]*3, -1), labels)
    assert (crf(grey, labels) == want).all() and (crf(grey[..., None], labels) == want).all()


@pytest.mark.parametrize('wrong, message', [
    (dict(labels=np.zeros((5, 4), int)), 'image is uint8'), (dict(image=np.zeros((4, 4, 3))), 'image is float64'), (dict(image=np.zeros((4, 4, 4), np.uint8)), 'image is'),
    (dict(labels=np.full((4, 4), 21)), r'hold 21..21: class numbers are 0..20'), (dict(labels=np.full((4, 4), 255)), 'unsure'), (dict(labels=np.full((4, 4), -1)), 'hold -1'),
    (dict(labels=np.full((4, 4), 256), classes=None), '0..255'), (dict(confidence=0), 'confidence'), (dict(confidence=1.5), 'confidence')])
def test_wrong_labels(wrong, message):
    with pytest.raises(ValueError, match=message):
        crf(**{**dict(image=np.zeros((4, 4, 3), np.uint8), labels=np.eye(4, dtype=int), classes=21), **wrong})


def test_wrong_scores_sizes_and_settings():
    image = np.zeros((4, 4, 3), np.uint8)
    for shape in ((4, 4), (0, 4, 4), (2, 4, 5)):
        with pytest.raises(ValueError, match='scores|image'):
            crf_scores(image, np.zeros(shape))
    q = crf_scores(image, np.stack([np.full((4, 4), -1), np.full((4, 4), .5), np.full((4, 4), 2)]), Pairwise(iterations=0))
    np.testing.assert_allclose(q[:, 0, 0], np.array([1e-5, .5, 1])/1.50001, rtol=1e-5)   # clamped, and what is left of them normalised
    with pytest.raises(ValueError, match='images are'):
        mean_field(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match='too fine'):
        mean_field(torch.randint(0, 256, (1, 9, 9, 3), dtype=torch.uint8), torch.zeros(1, 2, 9, 9), Pairwise(srgb=1e-3))
    for wrong in (dict(sxy=0), dict(srgb=-1), dict(smooth_sxy=math.nan), dict(compat=-1), dict(iterations=-1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Pairwise(**wrong)


# --- a whole split ---------------------------------------------------------------------------------------------------------

def test_masks_are_the_same_from_one_process_or_two(scenes, tmp_path, monkeypatch):
    folder, rng = TagFolder(scenes), np.random.default_rng(0)
    for i, name in enumerate(folder.ids):
        present = np.unique(folder.mask(i))[1:]
        write_cam(tmp_path/'cams'/f'{name}.npz', np.stack([rough(folder.mask(i), rng) == c for c in present])*.9, present)
    write_masks(folder, tmp_path/'cams', tmp_path/'one', .3, True, 1, classes=7)
    monkeypatch.setattr(module, 'MIN_PARALLEL', 2)
    write_masks(folder, tmp_path/'cams', tmp_path/'two', .3, True, 2, classes=7)
    write_masks(folder, tmp_path/'cams', tmp_path/'other', .3, True, 1, pairwise=CRF_SSC)
    for name in folder.ids:
        assert (tmp_path/'one'/f'{name}.png').read_bytes() == (tmp_path/'two'/f'{name}.png').read_bytes()
    assert any((read_mask(tmp_path/'one'/f'{n}.png') != read_mask(tmp_path/'other'/f'{n}.png')).any() for n in folder.ids)
    n = folder.ids[0]
    labels = module.seed_mask(*module.read_cam(tmp_path/'cams'/f'{n}.npz'), .3)
    assert (read_mask(tmp_path/'one'/f'{n}.png') == crf(read_image(folder.files[n]), labels, 7)).all()


def test_workers_end_with_a_killed_parent(tmp_path):
    "Else a killed run would go on writing masks beside the one that continues it."
    (tmp_path/'parent.py').write_text("""
import os, sys, time
from pathlib import Path
from ppc.crf import write_each
def work(job): job[0].write_text(str(os.getpid())); time.sleep(60)
if __name__ == '__main__': write_each(work, [(Path(sys.argv[1])/f'{i}.pid',) for i in range(100)], 2, 'masks')
""")
    parent = subprocess.Popen([sys.executable, tmp_path/'parent.py', tmp_path], stderr=subprocess.DEVNULL)
    def until(true, seconds=60):
        end = time.time() + seconds
        while not true():
            assert time.time() < end
            time.sleep(.1)
    def workers(): return [int(text) for f in tmp_path.glob('*.pid') if (text := f.read_text())]
    def lives(pid): return Path(f'/proc/{pid}').exists() and 'Z' not in Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
    until(lambda: len(workers()) == 2)
    parent.kill()
    parent.wait()
    until(lambda: not any(map(lives, workers())), 20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda_says_what_the_cpu_says():
    images, labels = map(np.stack, zip(*[picture(i) for i in (0, 3, 7)]))
    images, unary = torch.from_numpy(images), torch.stack([energies(l, range(7), 7) for l in labels])
    there = mean_field(images.cuda(), unary.cuda())
    assert there.is_cuda
    here = mean_field(images, unary)
    assert (here - there.cpu()).abs().mean() < 1e-3 and (here.argmax(1) == there.cpu().argmax(1)).double().mean() > .999
    assert (mean_field(images.cuda(), unary.cuda()) == there).all()
