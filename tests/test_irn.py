"""IRN against its definitions written out literally, pair by pair in float64.

Paths, affinities, losses and their gradients, the walk; and bad input.
"""
import math
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal import gradients
from PIL import Image
from ppc import irn
from ppc.backbones import ResNet, ResNet38, Timm, Tiny
from ppc.data import DataError, TagFolder, normalise, read_mask
from ppc.inference import write_cam
from ppc.irn import (
    IRN_AUTHORS,
    IRN_PRESETS,
    IRNet,
    IrnOptions,
    centre_displacement,
    edge_affinity,
    edge_map,
    irn_labels,
    irn_losses,
    irn_parameters,
    line_paths,
    upsample_aligned,
    walk_cam,
    write_irn_labels,
    write_irn_masks,
)
from ppc.walk import neighbours

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**20)


def close(got, want, tol=1e-6):
    torch.testing.assert_close(got, want, atol=tol, rtol=tol, check_dtype=False)


# --- paths and affinities, literally ------------------------------------------------------------

def way(dy, dx):
    """The pixels of the rectangle of (0, 0) and (dy, dx) that are near the line through both.

    The distance is that to the foot of the perpendicular.
    """
    on = []
    for y in range(min(0, dy), max(0, dy) + 1):
        for x in range(min(0, dx), max(0, dx) + 1):
            s = (y*dy + x*dx)/(dy*dy + dx*dx)
            if math.hypot(y - s*dy, x - s*dx) < 1 - 1e-9:
                on.append((y, x))
    return on


def literal_affinity(edge, radius):
    "(K, h, w) from (h, w), one pair at a time."
    h, w = edge.shape
    rows = []
    for dy, dx in neighbours(radius).tolist():
        for y in range(h):
            for x in range(w):
                if 0 <= y + dy < h and 0 <= x + dx < w:
                    between = [edge[y + a, x + b] for a, b in way(dy, dx)]
                    rows.append(1 - max(between, key=lambda e: e.item()))
                else:
                    rows.append(edge.sum()*0)
    return torch.stack(rows).view(-1, h, w)


@pytest.mark.parametrize('radius', [1, 2, 5, 10])
def test_paths_are_the_pixels_less_than_one_from_the_line(radius):
    got = line_paths(radius)
    assert len(got) == {1: 0, 2: 4, 5: 34, 10: 152}[radius]
    for (dy, dx), p in zip(neighbours(radius).tolist(), got):
        assert sorted(p) == sorted(way(dy, dx)) and (0, 0) in p and (dy, dx) in p


@quick
@given(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7), st.integers(2, 6), seeds)
def test_affinity_is_the_literal_one(N, h, w, radius, seed):
    "Value and gradient, on maps smaller than the radius too."
    torch.manual_seed(seed)
    edge = torch.rand(N, h, w, dtype=torch.float64, requires_grad=True)
    got = edge_affinity(edge, radius)
    want = torch.stack([literal_affinity(e, radius) for e in edge])
    close(got, want)
    weight = torch.randn_like(got)
    close(*(torch.autograd.grad((a*weight).sum(), edge)[0] for a in (got, want)))


# --- losses, literally --------------------------------------------------------------------------

def literal_losses(edge, displacement, mask, radius):
    "Section 9 of the facts, one pair at a time."
    N, h, w = edge.shape
    terms = {k: [] for k in ('bg', 'fg', 'apart', 'move_bg', 'move_fg')}
    for n in range(N):
        a = literal_affinity(1/(1 + torch.exp(-edge[n])), radius)
        for k, (dy, dx) in enumerate(neighbours(radius).tolist()):
            for y in range(h):
                for x in range(w):
                    if not (0 <= y + dy < h and 0 <= x + dx < w):
                        continue
                    i, j = int(mask[n, 4*y, 4*x]), int(mask[n, 4*(y + dy), 4*(x + dx)])
                    if 255 in (i, j):
                        continue
                    d = displacement[n, :, y, x] - displacement[n, :, y + dy, x + dx]
                    if i != j:
                        terms['apart'].append(-torch.log(1 + 1e-5 - a[k, y, x]))
                    elif i == 0:
                        terms['bg'].append(-torch.log(a[k, y, x] + 1e-5))
                        terms['move_bg'].append((d[0].abs() + d[1].abs())/2)
                    else:
                        terms['fg'].append(-torch.log(a[k, y, x] + 1e-5))
                        terms['move_fg'].append(((d[0] - dy).abs() + (d[1] - dx).abs())/2)
    weight = dict(bg=1/4, fg=1/4, apart=1/2, move_bg=1/2, move_fg=1/2)
    return {k: weight[k]*sum(v)/len(v) if v else edge.sum()*0 for k, v in terms.items()}


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 2), st.integers(1, 21), st.integers(1, 17), st.integers(2, 4),
       st.lists(st.sampled_from([0, 1, 3, 255]), min_size=1, max_size=4, unique=True), seeds)
def test_losses_are_the_literal_ones(N, H, W, radius, labels, seed):
    """Values and gradients.

    Sides that four does not divide, maps smaller than the radius, any of the labels missing, all
    of them 255.
    """
    torch.manual_seed(seed)
    h, w = -(-H//4), -(-W//4)
    edge = torch.randn(N, h, w, dtype=torch.float64, requires_grad=True)
    displacement = torch.randn(N, 2, h, w, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(labels, dtype=torch.uint8)[torch.randint(len(labels), (N, H, W))]
    leaves = edge, displacement
    got, want = (f(*leaves, mask, radius) for f in (irn_losses, literal_losses))
    assert list(got) == list(want)
    for k in want:
        close(got[k], want[k])
        for g, e in zip(gradients(got[k], leaves), gradients(want[k], leaves)):
            close(g, e)


@pytest.mark.parametrize('label', [0, 2, 255])
def test_a_mask_of_one_label_gives_finite_losses(label):
    "Also where the network is as sure as float32 allows, and wrong."
    edge = torch.tensor([-200., 200.]).repeat(6, 3)[None].requires_grad_()
    displacement = torch.randn(1, 2, 6, 6, requires_grad=True)
    mask = torch.full((1, 24, 24), label, dtype=torch.uint8)
    terms = irn_losses(edge, displacement, mask)
    zero = {0: {'fg', 'apart', 'move_fg'}, 2: {'bg', 'apart', 'move_bg'}, 255: set(terms)}[label]
    for k, v in terms.items():
        assert v.isfinite() and (v == 0) == (k in zero), k
    sum(terms.values()).backward()
    assert edge.grad.isfinite().all() and displacement.grad.isfinite().all()
    if label == 255:
        assert not edge.grad.any() and not displacement.grad.any()


def test_half_precision_and_float32_agree():
    torch.manual_seed(0)
    edge, displacement = torch.randn(1, 8, 8).bfloat16(), torch.randn(1, 2, 8, 8).bfloat16()
    mask = torch.randint(0, 2, (1, 32, 32))
    got = irn_losses(edge, displacement, mask, 4)
    want = irn_losses(edge.float(), displacement.float(), mask, 4)
    for k in want:
        assert got[k].dtype == torch.float32 and torch.equal(got[k], want[k])


# --- labels -------------------------------------------------------------------------------------

def test_labels_are_those_on_which_two_cuts_agree(monkeypatch):
    "With a CRF that changes nothing."
    asked = []
    def unchanged(image, labels, classes):
        asked.append(classes)
        return labels
    monkeypatch.setattr(irn, 'dense_crf', unchanged)
    image, present = np.zeros((1, 5, 3), np.uint8), np.array([4, 9], np.uint8)
    scores = np.array([[[.04, .2, .31, .05, .30]], [[.05, .06, .9, 0, .0]]], dtype=np.float32)
    assert irn_labels(image, scores, present).tolist() == [[0, 255, 9, 0, 255]]
    assert asked == [3, 3]   # as many labels as the image has classes, and background
    labels = irn_labels(image, scores, present, IrnOptions(fg=.05))
    assert labels.tolist() == [[0, 4, 9, 0, 4]]


def test_labels_of_an_image_without_tags_and_of_empty_channels():
    image = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    empty, one = np.zeros((2, 9, 7), np.float32), np.ones((1, 1, 1), np.float32)
    assert (irn_labels(image, empty[:0], np.zeros(0, np.uint8)) == 0).all()
    assert (irn_labels(image, empty, np.array([1, 5], np.uint8)) == 0).all()
    assert irn_labels(image[:1, :1], one, np.array([5], np.uint8)).tolist() == [[5]]


def test_impossible_options_raise():
    with pytest.raises(ValueError, match='bg is 0.4 and fg 0.3'):
        IrnOptions(bg=.4)
    with pytest.raises(ValueError, match='walk_radius 1: neighbours begin with 2'):
        IrnOptions(walk_radius=1)
    recam = IRN_PRESETS['recam']
    assert IRN_PRESETS['irn'] == IRN_AUTHORS
    assert (recam.fg, recam.bg, recam.t) == (.35, .10, 256)


# --- the network --------------------------------------------------------------------------------

@quick
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), seeds)
def test_enlarged_pixels_stay_where_they_are(factor, H, W, seed):
    """Each new pixel is the bilinear mean of the old pixels around its position.

    Beyond its last row and column the old map is continued by their values.
    """
    torch.manual_seed(seed)
    x = torch.randn(1, 1, -(-H//factor), -(-W//factor), dtype=torch.float64)
    got = upsample_aligned(x, factor, (H, W))[0, 0]
    def at(y, z): return x[0, 0, min(y, x.shape[2] - 1), min(z, x.shape[3] - 1)]
    want = torch.empty(H, W, dtype=torch.float64)
    for i in range(H):
        for j in range(W):
            (y, a), (z, b) = divmod(i, factor), divmod(j, factor)
            a, b = a/factor, b/factor
            upper = (1 - b)*at(y, z) + b*at(y, z + 1)
            lower = (1 - b)*at(y + 1, z) + b*at(y + 1, z + 1)
            want[i, j] = (1 - a)*upper + a*lower
    close(got, want)


BACKBONES = {
    'tiny': Tiny,
    'resnet38': lambda: ResNet38(shrink=16),
    'resnet50': lambda: ResNet('resnet50', 16),
    'resnet50 at 8': ResNet,
    'timm resnet18': lambda: Timm('resnet18', 16),
    'timm mobilenet': lambda: Timm('mobilenetv2_100', 16),
}


@pytest.mark.parametrize('name', BACKBONES)
def test_every_backbone_gives_stride_4_at_any_size(name):
    torch.manual_seed(0)
    net = IRNet(BACKBONES[name]()).eval()
    for size in ((33, 47), (64, 36), (5, 1), (1, 1)):
        edge, displacement = net(torch.randn(1, 3, *size))
        assert edge.shape == (1, *(-(-n//4) for n in size))
        assert displacement.shape == (1, 2, *edge.shape[1:])
        assert edge.isfinite().all() and displacement.isfinite().all()


@pytest.mark.parametrize('build', [Tiny, ResNet])
def test_stages_end_in_the_three_maps(build):
    torch.manual_seed(0)
    net, x = build().eval(), torch.randn(1, 3, 40, 32)
    with torch.no_grad():
        stages, maps = net.stages(x), net(x)
    assert len(maps) == 3 and all(torch.equal(a, b) for a, b in zip(stages[-3:], maps))
    assert all(m.shape[2:] == (10, 8) for m in stages[:-3])


def test_only_the_branches_learn():
    torch.manual_seed(0)
    net = IRNet(Tiny()).train()
    assert net.edge.training and not net.backbone.training
    groups = irn_parameters(net)
    assert [(g['lr'], g['weight_decay']) for g in groups] == [(.1, 1e-4), (1., 1e-4)]
    trained = [id(p) for g in groups for p in g['params']]
    assert sorted(trained) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    assert len(set(trained)) == len(trained)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.SGD(groups)
    maps, mask = net(torch.randn(2, 3, 40, 40)), torch.randint(0, 2, (2, 40, 40))
    sum(irn_losses(*maps, mask, 4).values()).backward()
    optimizer.step()
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k]) == (k.startswith('backbone') or k == 'mean'), k


def test_the_mean_displacement_is_subtracted_once(scenes):
    torch.manual_seed(0)
    net, folder = IRNet(Tiny()), TagFolder(scenes, 'val')
    with torch.no_grad():
        raw = [net(normalise(folder.image(i))[None])[1] for i in range(len(folder))]
    centre_displacement(net, folder, batch_size=3)
    close(net.mean, torch.stack([r.double().mean((0, 2, 3)) for r in raw]).mean(0), 1e-5)
    with torch.no_grad():
        close(net(normalise(folder.image(0))[None])[1], raw[0] - net.mean[:, None, None])
    stored = net.mean.clone()
    centre_displacement(net, folder)
    close(net.mean, stored, 1e-5)
    assert 'mean' in net.state_dict()


# --- inference ----------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [(33, 49), (17, 5), (1, 1)])
def test_edges_of_the_mirror_image_are_mirrored(size):
    torch.manual_seed(0)
    net, image = IRNet(Tiny()).eval(), torch.randn(3, *size)
    edge = edge_map(net, image)
    assert edge.shape == tuple(-(-n//4) for n in size) and 0 <= edge.min() and edge.max() <= 1
    close(edge_map(net, image.flip(-1)), edge.flip(-1), 1e-5)
    logits = net(image[None])[0]
    mirrored = net(image.flip(-1)[None])[0].flip(-1)
    close(edge, (1/(1 + torch.exp(-(logits + mirrored)/2)))[0], 1e-5)


def test_any_size_is_as_if_enlarged_to_a_multiple_of_four_and_one():
    torch.manual_seed(0)
    net, image = IRNet(Tiny()).eval(), torch.randn(3, 22, 31)
    full = torch.zeros(3, 25, 33)
    full[:, :22, :31] = image
    close(edge_map(net, image), edge_map(net, full)[:6, :8], 1e-5)


@quick
@given(st.integers(1, 3), st.integers(1, 22), st.integers(1, 22), st.integers(0, 9), seeds)
def test_the_walk_is_the_dense_one(P, H, W, t, seed):
    "From the matrix of all pairs; sizes below the radius and not divisible by four."
    torch.manual_seed(seed)
    options, h, w = IrnOptions(walk_radius=3, beta=2, t=t), -(-H//4), -(-W//4)
    scores = torch.rand(P, H, W, dtype=torch.float64)
    edge = torch.rand(h, w, dtype=torch.float64)*.9
    a, A = literal_affinity(edge, 3), torch.eye(h*w, dtype=torch.float64)
    for k, (dy, dx) in enumerate(neighbours(3).tolist()):
        for y in range(h):
            for x in range(w):
                if y + dy < h and 0 <= x + dx < w:
                    i, j = y*w + x, (y + dy)*w + x + dx
                    A[i, j] = A[j, i] = a[k, y, x]**2
    start = torch.stack([s[::4, ::4]*(1 - edge) for s in scores]).flatten(1)
    cam = start @ torch.matrix_power(A/A.sum(0, keepdim=True), t)
    got = walk_cam(scores, edge, options)
    assert got.shape == scores.shape and got.max() <= 1
    up = upsample_aligned(cam.view(1, P, h, w), 4, (H, W))[0]
    close(got, up/up.max())
    close(got[:, ::4, ::4].flatten(1)*up.max(), cam)


def test_empty_channels_stay_empty():
    edge = torch.full((2, 3), .5)
    assert walk_cam(torch.zeros(0, 7, 9), edge).shape == (0, 7, 9)
    assert not walk_cam(torch.zeros(2, 7, 9), edge).any()
    assert not walk_cam(torch.rand(2, 7, 9), torch.ones(2, 3)).any()   # edges everywhere
    half = torch.zeros(2, 7, 9)
    half[1, 3:, 3:] = 1   # one channel is empty, the other is not
    assert not walk_cam(half, edge)[0].any() and walk_cam(half, edge)[1].max() == 1


@pytest.fixture
def odd(tmp_path):
    "Images from a single pixel on, one of them without tags, with CAMs."
    sizes = {'a': (1, 1), 'b': (3, 18), 'c': (30, 29), 'd': (16, 20)}
    rng = np.random.default_rng(0)
    (tmp_path/'JPEGImages').mkdir()
    for name, (w, h) in sizes.items():
        noise = rng.integers(0, 255, (h, w, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path/'JPEGImages'/f'{name}.png')
        present = [] if name == 'd' else [2, 3]
        write_cam(tmp_path/'cams'/f'{name}.npz', rng.random((len(present), h, w)), present)
    (tmp_path/'classes.txt').write_text('background\ncat\nfox\nbear\n')
    (tmp_path/'tags.csv').write_text('image,tags\na,fox bear\nb,fox bear\nc,fox bear\nd,\n')
    return TagFolder(tmp_path)


def test_masks_and_labels_of_odd_images(odd, tmp_path):
    torch.manual_seed(0)
    net, cams, masks = IRNet(Tiny()), tmp_path/'cams', tmp_path/'masks'
    write_irn_labels(odd, cams, tmp_path/'labels')
    write_irn_masks(net, odd, cams, masks)
    for i, name in enumerate(odd.ids):
        label = read_mask(tmp_path/'labels'/f'{name}.png')
        mask = read_mask(masks/f'{name}.png')
        assert label.shape == mask.shape == odd.image(i).size[::-1]
        assert set(np.unique(label)) <= {0, 2, 3, 255} and set(np.unique(mask)) <= {0, 2, 3}
    assert not label.any() and not mask.any()   # d has no tags
    first = (masks/'a.png').read_bytes()
    (masks/'a.png').unlink()
    (masks/'b.png').write_bytes(b'stays')
    write_irn_masks(net, odd, cams, masks)
    assert (masks/'a.png').read_bytes() == first
    assert (masks/'b.png').read_bytes() == b'stays'


def test_a_cam_of_another_size_is_named(odd, tmp_path):
    cams = tmp_path/'cams'
    def labels(): write_irn_labels(odd, cams, tmp_path/'labels')
    def masks(): write_irn_masks(IRNet(Tiny()), odd, cams, tmp_path/'masks')
    write_cam(cams/'c.npz', np.zeros((2, 8, 9)), [2, 3])
    for write in (labels, masks):
        with pytest.raises(DataError, match=r'c\.npz is 9x8 but its image is 30x29: delete it'):
            write()
    (cams/'c.npz').unlink()
    with pytest.raises(DataError, match=r'c\.npz is missing'):
        masks()
