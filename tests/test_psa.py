"""PSA against literal references: labels, affinities, loss with gradients, masks.

Every backbone, and little and bad input.
"""
import shutil
from dataclasses import replace
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_walk import literal_neighbours, literal_walk
from ppc import crf, psa
from ppc.backbones import ResNet, ResNet38, Timm, Tiny
from ppc.data import DataError, TagFolder, read_mask, write_mask
from ppc.inference import write_cam
from ppc.psa import (
    PSA_AUTHORS,
    PSA_OFFICIAL,
    PSA_PRESETS,
    PSA_SEAM,
    AffinityNet,
    PsaOptions,
    affinity_labels,
    affinity_loss,
    majority_label,
    pair_affinity,
    train_affinity,
    walked_mask,
    write_affinity_labels,
    write_psa_masks,
)

seeds = st.integers(0, 2**31)
TINY = replace(
    PSA_AUTHORS, crop=64, optimizer='AdamW', lr=1e-3, epochs=1, batch_size=4, t=4)


def close(a, b): torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


# --- affinity labels --------------------------------------------------------------------------

def literal_with_background(scores, rule, level):
    P, H, W = scores.shape
    bg = np.zeros((1, H, W))
    for y in range(H):
        for x in range(W):
            highest = max([scores[c, y, x] for c in range(P)], default=0)
            bg[0, y, x] = (1 - highest)**level if rule == 'power' else level
    return np.concatenate([bg, scores])


def best(full, names): return np.array(names)[full.argmax(0)]   # numpy: the first of equals


def unchanged_labels(image, labels, classes, pairwise):
    "Stands in for `crf`."
    return labels if classes == 7 else None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6),
       st.integers(6, 40), seeds)
def test_labels_are_the_literal_ones(P, H, W, low, high, seed):
    """With a CRF that does nothing.

    Class under the low exponent, background under the high one, the rest unsure; all background
    without a tag.
    """
    rng, image = np.random.default_rng(seed), np.zeros((H, W, 3), np.uint8)
    scores = rng.random((P, H, W))*rng.random((P, 1, 1))
    present = np.sort(rng.permutation(6)[:P] + 1)
    under_low, under_high = (best(literal_with_background(scores, 'power', a), [0, *present])
                             for a in (low, high))
    want = np.zeros((H, W))
    if P:
        want = np.where(under_high == 0, 0, np.where(under_low == 0, 255, under_low))
    with pytest.MonkeyPatch.context() as m:
        m.setattr('ppc.crf.crf_scores', lambda image, scores, pairwise: scores)
        m.setattr(psa, 'dense_crf', unchanged_labels)
        for unary in ('soft', 'hard'):
            options = PsaOptions(unary=unary, low=low, high=high)
            got = affinity_labels(image, scores, present, 7, options)
            assert got.dtype == np.uint8 and (got == want).all()


def test_labels_with_the_crf():
    """A bright disc on dark ground, scores high in its middle and low outside.

    Disc and ground are sure, under every preset.
    """
    y, x = np.mgrid[:48, :64]
    d = np.hypot(y - 24, x - 32)
    image = np.where((d < 16)[..., None], (220, 160, 60), (30, 60, 90)).astype(np.uint8)
    scores = (1 - d/22).clip(0, 1)[None].astype(np.float32)
    for o in PSA_PRESETS.values():
        got = affinity_labels(image, scores, np.array([3]), 7, o)
        assert set(np.unique(got)) <= {0, 3, 255}
        assert (got[d < 10] == 3).all() and (got[d > 24] == 0).all()


def test_labels_of_empty_and_full_channels():
    grey, none = np.full((5, 4, 3), 90, np.uint8), np.zeros((1, 5, 4), np.float32)
    for o in PSA_PRESETS.values():
        assert (affinity_labels(grey, none[:0], [], 7, o) == 0).all()    # no tag
        assert (affinity_labels(grey, none, [2], 7, o) == 0).all()       # an empty channel
        assert (affinity_labels(grey, none + 1, [2], 7, o) == 2).all()   # a full one
        assert affinity_labels(grey[:1, :1], none[:, :1, :1] + 1, [2], 7, o).tolist() == [[2]]
        both = np.concatenate([none, none + 1])
        assert (affinity_labels(grey, both, [2, 5], 7, o) == 5).all()


@pytest.mark.parametrize('wrong, words', [
    (dict(unary='soft?'), 'unary'),
    (dict(background='rest'), 'background'),
    (dict(low=9, high=8), 'low is 9'),
    (dict(radius=1), 'radius'),
])
def test_impossible_options_raise(wrong, words):
    with pytest.raises(ValueError, match=words):
        PsaOptions(**wrong)


def test_recipes_are_those_of_the_facts():
    o = PSA_AUTHORS
    assert (o.high, o.level, o.t, o.lr) == (32, 16, 256, .1)
    o = PSA_SEAM
    assert (o.high, o.level, o.t, o.lr) == (24, 6, 64, .01)
    o = PSA_OFFICIAL
    assert (o.unary, o.background, o.level, o.t, o.lr) == ('hard', 'constant', .27, 64, .01)
    for o in (PSA_AUTHORS, PSA_SEAM, PSA_OFFICIAL):
        assert (o.low, o.radius, o.beta) == (4, 5, 8)
        assert (o.epochs, o.batch_size, o.crop, o.weight_decay) == (8, 8, 448, 5e-4)


# --- labels on the grid, affinities, loss -----------------------------------------------------

def literal_majority(mask, h, w):
    N, H, W = mask.shape
    a, b = int(np.ceil(H/h)), int(np.ceil(W/w))
    out = torch.full((N, h, w), 255, dtype=torch.uint8)
    for n in range(N):
        for i in range(h):
            for j in range(w):
                block = mask[n, i*a:i*a + a, j*b:j*b + b].flatten().tolist()
                for v in set(block):
                    if block.count(v) > a*b/2:
                        out[n, i, j] = v
    return out


def random_mask(*size):
    "Background, two classes and unsure pixels."
    return torch.tensor([0, 0, 1, 4, 255], dtype=torch.uint8)[torch.randint(0, 5, size)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans(), seeds)
def test_majority_is_the_literal_one(H, W, stride, two_values, seed):
    torch.manual_seed(seed)
    mask, size = random_mask(2, H, W), (-(-H//stride), -(-W//stride))
    if two_values:
        mask = mask.clamp(max=1)*3   # majorities are rare among many values
    assert torch.equal(majority_label(mask, size), literal_majority(mask, *size))


def literal_affinity(f, radius):
    "Pairs (n, k, y, x) that lie inside -> exp(-mean |f_i - f_j|)."
    N, D, h, w = f.shape
    pairs = {}
    for k, (dy, dx) in enumerate(literal_neighbours(radius)):
        for n in range(N):
            for y in range(h):
                for x in range(w):
                    if y + dy < h and 0 <= x + dx < w:
                        distances = [(f[n, d, y, x] - f[n, d, y + dy, x + dx]).abs()
                                     for d in range(D)]
                        pairs[n, k, y, x] = torch.exp(-sum(distances)/D)
    return pairs


def literal_loss(f, labels, radius):
    "Each kind of pair has its own mean."
    kinds, offsets = {'bg': [], 'fg': [], 'neg': []}, literal_neighbours(radius)
    for (n, k, y, x), a in literal_affinity(f, radius).items():
        dy, dx = offsets[k]
        here, there = labels[n, y, x].item(), labels[n, y + dy, x + dx].item()
        if 255 in (here, there):
            continue
        if here != there:
            kinds['neg'].append(-torch.log(1 + 1e-5 - a))
        else:
            kinds['fg' if here else 'bg'].append(-torch.log(a + 1e-5))
    weights = {'bg': 1/4, 'fg': 1/4, 'neg': 1/2}
    return {k: weight*(sum(kinds[k]) + f.sum()*0)/(len(kinds[k]) + 1e-5)
            for k, weight in weights.items()}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5),
       st.integers(2, 4), st.integers(1, 2), seeds)
def test_loss_is_the_literal_one(N, D, h, w, radius, stride, seed):
    "Value and gradient, on grids smaller than the radius too."
    torch.manual_seed(seed)
    f = torch.randn(N, D, h, w, dtype=torch.float64, requires_grad=True)
    mask = random_mask(N, h*stride, w*stride)
    affinity = pair_affinity(f, radius)
    for at, a in literal_affinity(f, radius).items():
        close(affinity[at], a)
    got = affinity_loss(affinity, mask, radius)
    want = literal_loss(f, literal_majority(mask, h, w), radius)
    assert list(got) == list(want)
    for k in want:
        close(got[k], want[k])
    close(*(torch.autograd.grad(sum(x.values()), f, retain_graph=True)[0] for x in (got, want)))


def test_pairs_outside_or_unsure_take_no_part():
    torch.manual_seed(0)
    f, mask = torch.randn(1, 4, 6, 7), random_mask(1, 48, 56)
    mask[:, :24] = 255
    affinity = pair_affinity(f, 5)
    want = affinity_loss(affinity, mask, 5)
    for k, (dy, dx) in enumerate(literal_neighbours(5)):
        for y in range(6):
            for x in range(7):
                if y < 3 or y + dy >= 6 or not 0 <= x + dx < 7:
                    affinity[0, k, y, x] = .123
    for k, v in affinity_loss(affinity, mask, 5).items():
        torch.testing.assert_close(v, want[k])


@pytest.mark.parametrize('value, kinds', [(255, set()), (0, {'bg'}), (3, {'fg'})])
def test_masks_of_one_value(value, kinds):
    "All unsure: nothing lost, nothing learned. A class without any pixel: its term is zero."
    f = torch.randn(2, 4, 6, 6, requires_grad=True)
    terms = affinity_loss(pair_affinity(f, 5), torch.full((2, 48, 48), value, dtype=torch.uint8), 5)
    assert {k for k, v in terms.items() if v > 0} == kinds
    g = torch.autograd.grad(sum(terms.values()), f)[0]
    assert g.isfinite().all() and g.any() == bool(kinds)


def test_equal_features_are_finite():
    "|x| has no slope at 0, and log(1 - 1) is infinite: an image padded with zeros meets both."
    f = torch.zeros(1, 4, 6, 6, requires_grad=True)
    mask = torch.tensor([0, 1], dtype=torch.uint8).repeat(1, 6, 3)
    terms = affinity_loss(pair_affinity(f, 5), mask, 5)
    assert all(v.isfinite() for v in terms.values())
    assert torch.autograd.grad(sum(terms.values()), f)[0].isfinite().all()


def test_half_precision_tells_close_affinities_apart():
    f = torch.randn(1, 8, 6, 6)
    rounded = f.bfloat16()
    torch.testing.assert_close(pair_affinity(rounded, 5), pair_affinity(rounded.float(), 5))
    assert pair_affinity(f.half(), 5).dtype == torch.float32


# --- the network ------------------------------------------------------------------------------

BACKBONES = {
    'tiny': Tiny,
    'resnet38': lambda: ResNet38(shrink=16),
    'resnet50': ResNet,
    'mobilenetv2': lambda: Timm('mobilenetv2_050', 16),
    'vit': lambda: Timm('vit_tiny_patch16_224', 16),
}


@pytest.mark.parametrize('name', BACKBONES)
def test_any_backbone_is_trained_too(name):
    torch.manual_seed(0)
    net = AffinityNet(BACKBONES[name](), radius=3)
    image = torch.randn(1, 3, 64, 96)
    a, stride = net(image), net.backbone.stride
    assert a.shape == (1, len(literal_neighbours(3)), 64//stride, 96//stride)
    assert 0 <= a.min() and a.max() <= 1
    mask = torch.zeros(1, 64, 96, dtype=torch.uint8)
    mask[:, :, 48:] = 1
    sum(affinity_loss(a, mask, 3).values()).backward()
    learning = [n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()]
    assert {n.split('.')[0] for n in learning} == {'backbone', 'reduce', 'mix'}


def test_widths_are_the_papers():
    with torch.device('meta'):
        net = AffinityNet(ResNet38())
    assert [m.out_channels for m in net.reduce] == [64, 128, 256]
    assert net.mix.weight.shape == (448, 448, 1, 1)
    small = AffinityNet(Tiny())
    assert [m.out_channels for m in small.reduce] == [24, 36, 48]


# --- masks ------------------------------------------------------------------------------------

def literal_enlarged(x, stride, H, W):
    "Bilinear from the grid (C, h, w) to (C, H, W), pixel by pixel; corners not aligned."
    C, h, w = x.shape
    up = np.zeros((C, H, W))
    for y in range(H):
        for z in range(W):
            v, u = (min(max((p + .5)/stride - .5, 0), n - 1) for p, n in ((y, h), (z, w)))
            i, j = int(v), int(u)
            for q, dy in ((min(i + 1, h - 1), v - i), (i, 1 - v + i)):
                for r, dx in ((min(j + 1, w - 1), u - j), (j, 1 - u + j)):
                    up[:, y, z] += dy*dx*x[:, q, r]
    return up


def literal_mask(scores, present, affinity, stride, o):
    "Section 8: background, zero padding to the stride, blocks, dense walk, bilinear, argmax."
    P, H, W = scores.shape
    h, w = affinity.shape[1:]
    full = np.zeros((P + 1, h*stride, w*stride))
    full[:, :H, :W] = literal_with_background(scores, o.background, o.level)
    grid = torch.from_numpy(full).view(P + 1, h, stride, w, stride).mean((2, 4))
    walked, _ = literal_walk(grid, affinity, o.radius, o.beta, o.t)
    up = literal_enlarged(walked.numpy(), stride, H, W)
    return best(up, [0, *present]), up


@pytest.mark.parametrize('preset', PSA_PRESETS)
@pytest.mark.parametrize('H, W', [(16, 24), (13, 18), (3, 5), (1, 1)])
def test_masks_are_the_literal_ones(H, W, preset):
    torch.manual_seed(H)
    o = replace(PSA_PRESETS[preset], t=5)
    for P in (1, 3):
        scores, present = .6*np.random.default_rng(P).random((P, H, W)), np.array([2, 3, 6])[:P]
        affinity = torch.rand(34, -(-H//4), -(-W//4), dtype=torch.float64)
        got = walked_mask(scores, present, affinity, 4, o)
        want, up = literal_mask(scores, present, affinity, 4, o)
        second, first = np.sort(up, 0)[-2:]
        tied = first - second < 1e-9   # of two such classes either may win
        assert got.dtype == np.uint8 and got.shape == (H, W)
        assert ((got == want) | tied).all() and tied.mean() < .5


def test_masks_of_empty_and_full_channels():
    affinity, empty = torch.rand(34, 2, 3), np.zeros((1, 11, 20), np.float32)
    for o in PSA_PRESETS.values():
        untagged = walked_mask(empty[:0], np.zeros(0, np.uint8), affinity, 8, o)
        assert untagged.dtype == np.uint8 and untagged.shape == (11, 20)
        assert (untagged == 0).all()
        assert (walked_mask(empty, [4], affinity, 8, o) == 0).all()
        assert (walked_mask(empty + 1, [4], affinity, 8, o) == 4).all()
    full, o = np.ones((1, 16, 24), np.float32), replace(PSA_AUTHORS, radius=3)
    with pytest.raises(ValueError, match='for radius 3'):
        walked_mask(full, [4], affinity, 8, o)


@pytest.fixture
def odd(mine):
    "Scenes of many sizes, one without a tag, with CAMs; and no masks at all."
    shutil.rmtree(mine/'SegmentationClass')
    rows = (mine/'tags.csv').read_text().splitlines()
    ids = (mine/'ImageSets'/'train.txt').read_text().split()
    for n, row in enumerate(rows):
        name, _ = row.split(',')
        if name.split('.')[0] == ids[1]:
            rows[n] = f'{name},'
    (mine/'tags.csv').write_text('\n'.join(rows) + '\n')
    folder = TagFolder(mine)
    sizes = {0: (1, 1), 1: (30, 41), 2: (5, 100), 3: (67, 50), 4: (67, 50)}
    for i, (h, w) in sizes.items():
        noise = np.random.default_rng(i).integers(0, 255, (h, w, 3), np.uint8)
        Image.fromarray(noise).save(folder.files[ids[i]])
    for i, name in enumerate(folder.ids):
        present = classes_of(folder, i)
        scores = np.random.default_rng(i).random((len(present), *image_size(folder, i)))
        write_cam(mine/'cams'/f'{name}.npz', scores*(i != 3), present)
    return mine, folder


def classes_of(folder, i): return folder.tags[i].nonzero()[:, 0].numpy() + 1


def image_size(folder, i): return np.asarray(folder.image(i)).shape[:2]


def files(path): return {f.name: f.read_bytes() for f in sorted(path.iterdir())}


def test_labels_training_and_masks_from_tags_alone(odd):
    "Images of any size, smaller than the radius, not divisible by the stride; no masks on disk."
    root, folder = odd
    write_affinity_labels(folder, root/'cams', root/'labels')
    for i, name in enumerate(folder.ids):
        y = read_mask(root/'labels'/f'{name}.png')
        assert y.shape == image_size(folder, i)
        assert set(np.unique(y)) <= {0, 255, *classes_of(folder, i)}
    torch.manual_seed(0)
    net = AffinityNet(Tiny())
    train_affinity(net, folder, root/'labels', root/'train', TINY, device='cpu')
    write_psa_masks(net, folder, root/'cams', root/'together', TINY)
    write_psa_masks(net, folder, root/'cams', root/'alone', TINY, batch_size=1)
    assert len(files(root/'together')) == len(folder)
    for i, name in enumerate(folder.ids):
        y, z = (read_mask(root/d/f'{name}.png') for d in ('together', 'alone'))
        assert y.shape == image_size(folder, i)
        assert set(np.unique(y)) <= {0, *classes_of(folder, i)}
        assert (y == z).mean() > .99   # one image or several: rounding only


def test_files_that_exist_are_kept(odd):
    root, folder = odd
    net = AffinityNet(Tiny())
    def labels(out): write_affinity_labels(folder, root/'cams', out)
    def masks(out): write_psa_masks(net, folder, root/'cams', out, TINY)
    for out, write in (('labels', labels), ('masks', masks)):
        write_mask(root/out/f'{folder.ids[2]}.png', np.full((2, 2), 9))
        write(root/out)
        first = files(root/out)
        assert len(first) == len(folder)
        assert (read_mask(root/out/f'{folder.ids[2]}.png') == 9).all()
        (root/out/f'{folder.ids[5]}.png').unlink()
        write(root/out)
        assert files(root/out) == first


def test_a_cam_of_another_size_is_named(odd):
    root, folder = odd
    write_cam(root/'cams'/f'{folder.ids[6]}.npz', np.ones((1, 20, 30)), [1])
    def labels(): write_affinity_labels(folder, root/'cams', root/'labels')
    def masks(): write_psa_masks(AffinityNet(Tiny()), folder, root/'cams', root/'masks', TINY)
    for write in (labels, masks):
        words = rf'{folder.ids[6]}.npz is 30x20 but its image is 128x128'
        with pytest.raises(DataError, match=words):
            write()
    (root/'cams'/f'{folder.ids[6]}.npz').unlink()
    with pytest.raises(DataError, match='is missing'):
        labels()


@pytest.mark.slow
def test_processes_write_the_same_labels(odd, monkeypatch):
    root, folder = odd
    write_affinity_labels(folder, root/'cams', root/'one', PSA_SEAM, workers=1)
    monkeypatch.setattr(crf, 'MIN_PARALLEL', 2)
    write_affinity_labels(folder, root/'cams', root/'two', PSA_SEAM, workers=2)
    assert files(root/'one') == files(root/'two')


def test_masks_without_a_sure_pixel_change_no_weight(odd):
    "All masks 255: the loss is zero in every step, and training goes through."
    root, folder = odd
    for i, name in enumerate(folder.ids):
        write_mask(root/'labels'/f'{name}.png', np.full(image_size(folder, i), 255))
    net = AffinityNet(Tiny())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    options = replace(TINY, weight_decay=0.)
    train_affinity(net, folder, root/'labels', root/'train', options, device='cpu')
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k]), k


def test_one_seed_one_network(odd):
    root, folder = odd
    write_affinity_labels(folder, root/'cams', root/'labels')
    states = []
    for out, seed in (('a', 0), ('b', 0), ('c', 1)):
        torch.manual_seed(0)
        net = AffinityNet(Tiny())
        train_affinity(net, folder, root/'labels', root/out, TINY, seed, device='cpu')
        states.append(net.state_dict()['mix.weight'])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
