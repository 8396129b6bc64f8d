"""DeepLab against its definitions written out pixel by pixel in float64.

Also batch-norm modes, recipes, hostile archives, and networks exported to onnxruntime.
"""
import gzip
import io
import math
import sys
import tarfile
from dataclasses import replace
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from ppc import deeplab as module
from ppc.backbones import ResNet, ResNet38, Timm, Tiny
from ppc.data import (
    DataError,
    TagFolder,
    TrainingViews,
    augmentation,
    normalise,
    read_mask,
    voc_palette,
    write_mask,
)
from ppc.deeplab import (
    ASPP,
    RECIPE_DLP,
    RECIPE_R38,
    RECIPE_SSC,
    RECIPE_SSC_ASPP,
    RECIPES,
    ConcatASPP,
    DeepLab,
    LargeFOV,
    check_archive,
    deeplab,
    export,
    logits_to_mask,
    recipe_groups,
    segmentation_loss,
    voc_archive,
    write_predictions,
)
from ppc.training import fit

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**20)


def assert_near(got, want, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(got, want, atol=atol, rtol=rtol, check_dtype=False)


# --- literally ------------------------------------------------------------------------------------

def literal_conv(x, conv):
    "One image (C, h, w); nine taps `dilation` apart, zero outside."
    weight, d, (_, h, w) = conv.weight, conv.dilation[0], x.shape
    taps = [-d, 0, d] if weight.shape[-1] == 3 else [0]
    out = torch.zeros(len(weight), h, w, dtype=x.dtype)
    for y in range(h):
        for z in range(w):
            for a, dy in enumerate(taps):
                for b, dz in enumerate(taps):
                    if 0 <= y + dy < h and 0 <= z + dz < w:
                        out[:, y, z] += weight[:, :, a, b] @ x[:, y + dy, z + dz]
    return out + conv.bias[:, None, None]


def literal_block(x, block):
    "Convolution, normalisation by its running statistics with scale 1 and shift 0, ReLU."
    y = literal_conv(x, block[0])
    if isinstance(block[1], nn.BatchNorm2d):
        mean, var = block[1].running_mean, block[1].running_var
        y = torch.stack([(y[c] - mean[c])/math.sqrt(var[c] + block[1].eps) for c in range(len(y))])
    return y.clamp(min=0)


def literal_head(x, head):
    if isinstance(head, LargeFOV):
        return literal_conv(literal_block(literal_block(x, head[0]), head[1]), head[3])
    if isinstance(head, ASPP):
        return sum(literal_conv(x, b) for b in head.branches)
    mean = torch.stack([sum(row.sum() for row in c)/c.numel() for c in x])[:, None, None]
    pooled = literal_block(mean, head.pooled).expand(-1, *x.shape[1:])
    parts = [literal_block(x, b) for b in head.branches] + [pooled]
    return literal_conv(literal_block(torch.cat(parts), head.mix[0]), head.mix[2])


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([LargeFOV, ASPP, ConcatASPP]), st.booleans(), st.integers(1, 5),
       st.tuples(st.integers(1, 6), st.integers(1, 6)), seeds)
@torch.no_grad()
def test_heads_are_the_literal_ones(kind, norm, dilation, size, seed):
    torch.manual_seed(seed)
    head = ASPP(3, 4, dilation) if kind is ASPP else kind(3, 4, 5, dilation, norm)
    head.double().eval()
    for m in head.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(.5, 2)
        if isinstance(m, nn.Conv2d):
            m.bias.normal_()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert_near(head(x), torch.stack([literal_head(one, head) for one in x]))


def dilations(net):
    convolutions = [m for m in net.head.modules() if isinstance(m, nn.Conv2d)]
    return [m.dilation[0] for m in convolutions if m.kernel_size == (3, 3)]


def test_dilations():
    "The pyramid is 6, 12, 18, 24 at output stride 8 and half of it at 16; it never becomes 0."
    for stride, pyramid in ((8, [6, 12, 18, 24]), (16, [3, 6, 9, 12])):
        backbone = Timm('test_efficientnet', 16) if stride == 16 else Tiny()
        assert dilations(deeplab(backbone, 5, replace(RECIPE_SSC, width=8))) == [pyramid[1]]
        for recipe in (RECIPE_DLP, RECIPE_SSC_ASPP):
            assert dilations(deeplab(backbone, 5, replace(recipe, width=8))) == pyramid
    assert dilations(deeplab(backbone, 5, replace(RECIPE_DLP, dilation=1))) == [1, 1, 1, 2]


def literal_bilinear(x, size):
    "(C, h, w) -> (C, *size): first pixel on first, last on last."
    def weights(n, out):
        m = torch.zeros(out, n, dtype=torch.float64)
        for i in range(out):
            p = i*(n - 1)/(out - 1) if out > 1 else 0.
            k = min(int(p), max(n - 2, 0))
            m[i, k] += 1 - (p - k)
            if n > 1:
                m[i, k + 1] += p - k
        return m
    return weights(x.shape[1], size[0]) @ x @ weights(x.shape[2], size[1]).T


def literal_loss(logits, mask, full):
    "The mean over the known pixels, at the mask's size or at the nearest pixels of the mask."
    total, count = 0., 0
    (H, W), (h, w) = mask.shape[1:], logits.shape[2:]
    for n in range(len(logits)):
        up = literal_bilinear(logits[n], (H, W)) if full else logits[n]
        for y in range(up.shape[1]):
            for x in range(up.shape[2]):
                at = (y, x) if full else (int((y + .5)*H/h), int((x + .5)*W/w))
                c = int(mask[n][at])
                if c == 255:
                    continue
                total = total + torch.log(sum(torch.exp(v) for v in up[:, y, x])) - up[c, y, x]
                count += 1
    return total/max(count, 1)


@quick
@given(st.integers(1, 2), st.integers(2, 5), st.tuples(st.integers(2, 4), st.integers(2, 4)),
       st.tuples(st.integers(2, 9), st.integers(2, 9)), st.booleans(),
       st.sampled_from([0., .3, 1.]), seeds)
def test_the_loss_is_the_literal_one(N, classes, small, big, full, unknown, seed):
    "Value and gradient; some examples have classes without a pixel, or no known pixel."
    torch.manual_seed(seed)
    logits = torch.randn(N, classes, *small, requires_grad=True)
    mask = torch.randint(0, classes, (N, *big), dtype=torch.uint8)
    mask[torch.rand(N, *big) < unknown] = 255
    exact = logits.detach().double().requires_grad_()
    got = segmentation_loss(logits, mask, full)
    want = literal_loss(exact, mask, full)
    assert_near(got, torch.as_tensor(want))
    gradient = torch.zeros_like(exact)
    if torch.is_tensor(want):
        gradient = torch.autograd.grad(want, exact)[0]
    assert_near(torch.autograd.grad(got, logits)[0], gradient)


def test_a_list_of_logits_has_the_sum_of_their_losses():
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, s, s) for s in (8, 6, 4)]
    mask = torch.randint(0, 3, (2, 20, 20))
    for full in (True, False):
        want = sum(segmentation_loss(m, mask, full) for m in maps)
        assert_near(segmentation_loss(maps, mask, full), want)


# --- batch normalisation --------------------------------------------------------------------------

def statistics(module):
    return {k: v.clone() for k, v in module.state_dict().items() if 'running' in k}


def batchnorms(module):
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def make_net(make, mode):
    torch.manual_seed(0)
    backbone = make()
    head = LargeFOV(backbone.channels[-1], 3, 8, norm=True)
    return DeepLab(backbone, head, mode, momentum=.01), torch.randn(3, 3, 48, 40)


backbones = pytest.mark.parametrize(
    'make', [lambda: ResNet38(shrink=16), lambda: Timm('test_efficientnet', 16)],
    ids=['resnet38', 'timm'])
modes = pytest.mark.parametrize('mode', ['frozen', 'batch'])


@backbones
@modes
def test_which_statistics_move(mode, make):
    "In training, at test time, and back in training; and by how much."
    net, image = make_net(make, mode)
    inputs = {}
    for m in batchnorms(net):
        m.register_forward_hook(lambda m, x, y: inputs.update({m: x[0].detach()}))
    for _ in range(2):
        before, head = statistics(net.backbone), statistics(net.head)
        net.train()(image).square().mean().backward()
        for k, v in statistics(net.backbone).items():
            assert torch.equal(before[k], v) == (mode == 'frozen')
        assert not any(torch.equal(head[k], v) for k, v in statistics(net.head).items())
        after = statistics(net)
        net.eval()(image)
        assert all(torch.equal(after[k], v) for k, v in statistics(net).items())
    first = batchnorms(net)[0]
    want = first.running_mean.clone()
    net.train()(image)
    if mode == 'batch':
        want = .99*want + .01*inputs[first].mean((0, 2, 3))
    assert_near(first.running_mean, want)


@backbones
@modes
def test_which_parameters_learn(mode, make):
    "No scales and shifts; all others with `batch`, all but the stem's with `frozen`."
    net, image = make_net(make, mode)
    for _ in range(2):
        net.train()(image).square().mean().backward()
        net.eval()(image)
    net.train()(image)
    affine = [p for m in batchnorms(net) for p in m.parameters(recurse=False)]
    assert affine and not any(p.requires_grad or p.grad is not None for p in affine)
    others = {id(p) for p in net.parameters()} - {id(p) for p in affine}
    learning = {id(p) for p in net.parameters() if p.grad is not None}
    stem = [getattr(net.backbone, name) for name in getattr(net.backbone, 'stem', ())]
    frozen = {id(p) for m in stem for p in m.parameters()} if mode == 'frozen' else set()
    assert learning == others - frozen


def test_what_a_normalised_head_needs():
    "In training more than one image a batch, for the mean of the map; at test time one is enough."
    net = deeplab(Tiny(), 3, replace(RECIPE_SSC_ASPP, width=8))
    with pytest.raises(ValueError, match='more than 1 value'):
        net(torch.randn(1, 3, 32, 32))
    assert net.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3, 4, 4)
    plain = deeplab(Tiny(), 3, replace(RECIPE_SSC_ASPP, width=8, norm=False))
    assert plain(torch.randn(1, 3, 32, 32)).isfinite().all()


# --- several sizes of the input -------------------------------------------------------------------

def literal_resize(maps, size):
    return torch.stack([literal_bilinear(m.double(), size) for m in maps])


def test_the_largest_logit_of_all_sizes_wins():
    torch.manual_seed(0)
    net = DeepLab(Tiny(), ASPP(96, 3, 2), msc=(.5, .75))
    nn.init.normal_(net.head.branches[0].weight)
    image, mask = torch.randn(2, 3, 40, 33), torch.randint(0, 3, (2, 40, 33))
    images = [literal_resize(image, size).float() for size in ((40, 33), (20, 16), (30, 24))]
    maps = [net.head(net.backbone(x)[-1]) for x in images]
    best = torch.stack([literal_resize(m, maps[0].shape[2:]) for m in maps]).amax(0)
    got = net(image)
    assert len(got) == 4
    for g, w in zip(got, [*maps, best]):
        assert_near(g, w, 1e-4, 1e-4)
    loss = segmentation_loss(got, mask, full=False)
    assert_near(loss, sum(segmentation_loss(g, mask, full=False) for g in got))
    loss.backward()
    assert all(p.grad.any() for p in net.parameters())
    with torch.no_grad():
        assert_near(net.eval()(image), best, 1e-4, 1e-4)


# --- recipes --------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', RECIPES)
def test_every_learned_parameter_is_in_one_group(name):
    r = replace(RECIPES[name], width=8)
    backbone = ResNet38(shrink=16)
    net = deeplab(backbone, 5, r)
    groups = recipe_groups(net, r)
    held = [id(p) for g in groups for p in g['params']]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in net.parameters() if p.requires_grad}
    assert [g['lr']/r.lr for g in groups] == pytest.approx([1, 10, 10 if name == 'small' else 20])
    assert [g['weight_decay'] for g in groups] == [5e-4, 5e-4, 0 if name == 'dlp' else 5e-4]
    assert all(p.ndim == 4 for p in groups[1]['params'])
    assert all(p.ndim == 1 for p in groups[2]['params'])
    torch.optim.SGD(groups, momentum=r.momentum)


def assert_fields(record, **want):
    assert {name: getattr(record, name) for name in want} == want


def test_recipes_are_those_of_their_sources():
    "Section 11 of the facts, typed again."
    assert_fields(RECIPE_SSC, lr=1e-3, crop=448, resize=(.5, 1.5), epochs=18.9, batch_size=10,
                  batchnorm='batch', bn_momentum=3e-4)
    assert_fields(RECIPE_SSC, head='largefov', width=512, dilation=12, norm=True, full=True, msc=())
    assert_fields(RECIPE_SSC_ASPP, head='aspp-concat', width=256, lr=1e-3)
    assert_fields(RECIPE_DLP, head='aspp', lr=2.5e-4, crop=321, batchnorm='frozen', msc=(.5, .75),
                  full=False, bias_decay=False)
    assert_fields(RECIPE_R38, lr=8e-4, crop=512, resize=(.5, 2), batch_size=6, msc=(.5, .75))
    assert_fields(RECIPE_SSC.pairwise, iterations=1, sxy=32, srgb=13, compat=10)
    assert_fields(RECIPE_DLP.pairwise, iterations=10, sxy=67, srgb=3, compat=4,
                  smooth_sxy=1, smooth_compat=3)


@pytest.mark.parametrize('wrong', [{'head': 'deeplab'}, {'batchnorm': 'train'}])
def test_an_unknown_choice(wrong):
    with pytest.raises(ValueError, match=f'{next(iter(wrong))} is .* choose from'):
        replace(RECIPE_SSC, **wrong)
    with pytest.raises(ValueError, match="batchnorm is 'train'"):
        DeepLab(Tiny(), ASPP(96, 3), 'train')


def test_training_where_few_pixels_are_known(mine, tmp_path):
    "Masks that are all unknown, and classes that no mask shows."
    data = TagFolder(mine)
    for n, i in enumerate(data.ids):
        write_mask(tmp_path/'masks'/f'{i}.png', np.full(data.mask(n).shape, 255 if n % 2 else 3))
    r = replace(RECIPE_SSC_ASPP, width=16, dilation=4, batch_size=4, epochs=1, crop=61)
    net = deeplab(Tiny(), len(data.classes), r)
    steps = []

    def losses(model, batch):
        steps.append(batch)
        return {'ce': segmentation_loss(model(batch['image']), batch['mask'], r.full)}

    transform = augmentation(r.resize, r.crop, r.jitter, relative=True)
    views = TrainingViews(data, transform, masks=tmp_path/'masks')
    optimizer = torch.optim.SGD(recipe_groups(net, r), momentum=r.momentum)
    (tmp_path/'run').mkdir()
    fit(net, losses, views, optimizer, tmp_path/'run', r.epochs, r.batch_size, device='cpu')
    assert len(steps) == 4 and all(p.isfinite().all() for p in net.parameters())


# --- test time ------------------------------------------------------------------------------------

@pytest.fixture
def odd_sizes(mine):
    "Scenes of which one is a single pixel, one 13x7 and one 7x13."
    data = TagFolder(mine)
    for i, size in zip(data.ids, ((1, 1), (13, 7), (7, 13))):
        data.image(0).resize(size).save(data.files[i])
    return data


@torch.no_grad()
def literal_mean_of_logits(net, picture, scales):
    "Over scales and mirror images, at the image's size, in float64 (classes, H, W)."
    W, H = picture.size
    total = 0
    for s in scales:
        size = (max(1, round(s*H)), max(1, round(s*W)))
        x = literal_bilinear(normalise(picture).double(), size).float()
        plain, mirrored = literal_resize(net.eval()(torch.stack([x, x.flip(-1)])), (H, W))
        total = total + plain + mirrored.flip(-1)
    return total


def test_predictions_are_the_mean_of_logits(odd_sizes, tmp_path):
    torch.manual_seed(0)
    net, scales = deeplab(Tiny(), 7, replace(RECIPE_SSC, width=8, dilation=2)), (.5, 1.25)
    write_predictions(net, odd_sizes, tmp_path, scales)
    for n, i in enumerate(odd_sizes.ids[:6]):
        picture = odd_sizes.image(n)
        total = literal_mean_of_logits(net, picture, scales)
        got = read_mask(tmp_path/f'{i}.png')
        best, second = total.topk(2, 0).values
        sure = (best - second > 1e-3).numpy()
        assert got.shape == picture.size[::-1]
        assert (got == total.argmax(0).numpy())[sure].all() and sure.mean() > .95
    with Image.open(tmp_path/f'{i}.png') as im:
        assert im.mode == 'P'
        assert np.array_equal(np.reshape(im.getpalette(), (-1, 3)), voc_palette())


def test_predictions_continue_where_they_stopped(scenes, tmp_path):
    data, net = TagFolder(scenes, 'val'), deeplab(Tiny(), 7, replace(RECIPE_SSC, width=8))
    write_mask(tmp_path/f'{data.ids[0]}.png', np.full((2, 2), 9))
    write_predictions(net, data, tmp_path, (1,))
    assert read_mask(tmp_path/f'{data.ids[0]}.png').shape == (2, 2)
    assert {p.stem for p in tmp_path.iterdir()} == set(data.ids)


def test_large_photographs_are_segmented_at_the_limit(scenes, tmp_path):
    "As if they had been shrunk before; the mask is enlarged. Smaller ones are left alone."
    data, net = TagFolder(scenes, 'val'), deeplab(Tiny(), 7, replace(RECIPE_SSC, width=8))
    write_predictions(net, data, tmp_path/'limit', (.5, 1), limit=80)
    write_predictions(net, data, tmp_path/'other', (.5, 1), limit=2048)
    write_predictions(net, data, tmp_path/'none', (.5, 1), limit=0)
    class Small(TagFolder):
        def image(self, i, edge=0): return super().image(i, edge).resize((80, 80), Image.BICUBIC)
    small = Small(scenes, 'val')
    write_predictions(net, small, tmp_path/'small', (.5, 1), limit=0)
    for i in data.ids:
        mask, own = (read_mask(tmp_path/name/f'{i}.png') for name in ('limit', 'small'))
        assert mask.shape == (128, 128) and own.shape == (80, 80)
        assert (mask == np.array(Image.fromarray(own).resize((128, 128), Image.NEAREST))).all()
        whole = [read_mask(tmp_path/name/f'{i}.png') for name in ('other', 'none')]
        assert (whole[0] == whole[1]).all()


def test_the_crf_gets_the_softmax(monkeypatch, odd_sizes, tmp_path):
    "Of the mean logits, with the image, and its result is written."
    calls = []

    def crf(image, scores, pairwise):
        calls.append(pairwise)
        assert image.shape[:2] == scores.shape[1:] and image.dtype == np.uint8
        assert abs(scores.sum(0) - 1).max() < 1e-5
        return np.roll(scores, 1, 0)

    monkeypatch.setattr(module, 'crf_scores', crf)
    torch.manual_seed(0)   # no pixel whose logits are all equal
    net = deeplab(Tiny(), 7, replace(RECIPE_SSC, width=8))
    write_predictions(net, odd_sizes, tmp_path/'plain', (1,))
    write_predictions(net, odd_sizes, tmp_path/'crf', (1,), pairwise=RECIPE_DLP.pairwise)
    assert calls == [RECIPE_DLP.pairwise]*len(odd_sizes)
    for i in odd_sizes.ids:
        plain = read_mask(tmp_path/'plain'/f'{i}.png')
        assert (read_mask(tmp_path/'crf'/f'{i}.png') == (plain + 1) % 7).all()


def test_the_crf_itself():
    "Certain logits stay as they are; a single pixel is allowed."
    torch.manual_seed(0)
    image = np.full((12, 10, 3), 90, np.uint8)
    image[:, 5:] = 200
    y = np.zeros((12, 10), np.int64)
    y[:, 5:] = 2
    logits = 8*F.one_hot(torch.from_numpy(y), 4).permute(2, 0, 1).float()
    assert (logits_to_mask(logits, image, RECIPE_SSC.pairwise) == y).all()
    assert (logits_to_mask(logits, image) == y).all()
    assert logits_to_mask(logits[:, :1, :1], image[:1, :1], RECIPE_SSC.pairwise).shape == (1, 1)


@pytest.mark.parametrize('recipe', [RECIPE_SSC, RECIPE_SSC_ASPP, RECIPE_DLP])
def test_any_size_at_test_time(recipe):
    net = deeplab(Tiny(), 3, replace(recipe, width=8)).eval()
    for size in ((1, 1), (1, 9), (17, 31)):
        assert net(torch.randn(1, 3, *size)).isfinite().all()


# --- the archive ----------------------------------------------------------------------------------

WHERE = 'results/VOC2012/Segmentation/comp5_test_cls'


@pytest.fixture(scope='module')
def masks(scenes, tmp_path_factory):
    "Predictions of the validation scenes: the true masks without their unknown pixels."
    data, out = TagFolder(scenes, 'val'), tmp_path_factory.mktemp('masks')
    for n, i in enumerate(data.ids):
        write_mask(out/f'{i}.png', np.where(data.mask(n) == 255, 0, data.mask(n)))
    return data, out


def png_bytes(mask, mode='P', palette=None):
    im = Image.fromarray(np.asarray(mask, np.uint8)).convert(mode)
    if mode == 'P':
        im.putpalette((voc_palette() if palette is None else palette).tobytes())
    f = io.BytesIO()
    im.save(f, 'PNG')
    return f.getvalue()


def pack(path, entries, **kw):
    "Write an archive of entries: (name, bytes), or `TarInfo` without content."
    with tarfile.open(path, 'w:gz', **kw) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                name, data = entry
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_archive(masks, tmp_path):
    "Built, read back, the same bytes from the same masks, and nothing about who built it."
    data, folder = masks
    for name in ('a.tgz', 'b.tar.gz'):
        voc_archive(folder, reversed(data.ids) if name == 'a.tgz' else data.ids, tmp_path/name)
        check_archive(tmp_path/name, data)
    assert (tmp_path/'a.tgz').read_bytes() == (tmp_path/'b.tar.gz').read_bytes()
    assert (tmp_path/'a.tgz').read_bytes()[3:8] == bytes(5)   # neither name nor time of the packing
    with tarfile.open(tmp_path/'a.tgz') as tar:
        entries = tar.getmembers()
        assert [e.name for e in entries] == [f'{WHERE}/{i}.png' for i in sorted(data.ids)]
        found = {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode) for e in entries}
        assert found == {(0, 0, 0, '', '', 0o644)}
    voc_archive(folder, data.ids, tmp_path/'c.tgz', 2010, 'comp6')
    check_archive(tmp_path/'c.tgz', data, 2010, 'comp6')
    with pytest.raises(DataError, match='no mask of'):
        check_archive(tmp_path/'c.tgz', data)
    assert {p.name for p in tmp_path.iterdir()} == {'a.tgz', 'b.tar.gz', 'c.tgz'}


def test_archive_of_missing_masks(masks, tmp_path):
    data, folder = masks
    with pytest.raises(DataError, match='nobody.png is missing, and 0 more'):
        voc_archive(folder, [*data.ids, 'nobody'], tmp_path/'a.tgz')
    with pytest.raises(ValueError, match=r'a\.zip should end in'):
        voc_archive(folder, data.ids, tmp_path/'a.zip')
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match='a.tgz'):
        check_archive(tmp_path/'a.tgz', data)


def link(name, to, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def test_directories_in_an_archive_do_no_harm(masks, tmp_path):
    data, folder = masks
    directory = tarfile.TarInfo('results')
    directory.type = tarfile.DIRTYPE
    files = [(f'{WHERE}/{i}.png', (folder/f'{i}.png').read_bytes()) for i in data.ids]
    check_archive(pack(tmp_path/'a.tgz', [directory, *files]), data)


def test_wrong_archives(masks, tmp_path):
    "Each is refused by name, and nothing is written anywhere."
    data, folder = masks
    good = {f'{WHERE}/{i}.png': (folder/f'{i}.png').read_bytes() for i in data.ids}
    first = next(iter(good))
    mask = np.zeros(data.image(0).size[::-1])
    wrong = {
        'lacks': list(good.items())[1:],
        'and once more': [*good.items(), (first, good[first])],
        'no mask of': [*good.items(), (f'{WHERE}/other.png', good[first])],
        r"'\.\./": [('../' + first, good[first])],
        "'/etc/x.png'": [('/etc/x.png', good[first])],
        'is no plain file': [link(first, '/etc/passwd')],
        'no plain file': [*good.items(), link('x', first, tarfile.LNKTYPE)],
        'plain file': [link(first, '', tarfile.FIFOTYPE)],
        'they must agree': [(first, png_bytes(np.zeros((5, 6))))],
        'palette': [(first, png_bytes(mask, 'L'))],
        "VOC's": [(first, png_bytes(mask, palette=voc_palette()[::-1]))],
        'the value 255': [(first, png_bytes(mask + 255))],
        'the value 7': [(first, png_bytes(mask + 7))],
        'as a PNG': [(first, b'no picture')],
        'it holds more than': [(first, bytes(10**7))],
    }
    for message, entries in wrong.items():
        with pytest.raises(DataError, match=message) as e:
            check_archive(pack(tmp_path/'a.tgz', entries), data)
        assert 'a.tgz' in str(e.value)
        assert [p.name for p in tmp_path.iterdir()] == ['a.tgz']
    jpeg = io.BytesIO()
    data.image(0).save(jpeg, 'JPEG')
    with pytest.raises(DataError, match='as a PNG'):
        check_archive(pack(tmp_path/'a.tgz', [(first, jpeg.getvalue())]), data)


def test_archive_bombs(masks, tmp_path):
    "Neither zeros that compress well, nor headers that claim terabytes, are unpacked."
    data, _ = masks
    name = f'{WHERE}/{data.ids[0]}.png'
    with gzip.open(tmp_path/'a.tgz', 'wb') as z:
        z.write(bytes(30*2**20))
    with pytest.raises(DataError, match='holds more than'):
        check_archive(tmp_path/'a.tgz', data)
    hole, huge = tarfile.TarInfo(name), tarfile.TarInfo(name)
    hole.pax_headers = {'GNU.sparse.map': '0,0', 'GNU.sparse.size': str(2**28)}
    huge.pax_headers = {'size': str(2**42)}
    for entry, message in ((hole, 'no plain file'), (huge, 'a.tgz is no archive')):
        with pytest.raises(DataError, match=message):
            check_archive(pack(tmp_path/'a.tgz', [entry], format=tarfile.PAX_FORMAT), data)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_archives_are_named_or_valid(masks, tmp_path_factory, draw):
    "With any bytes changed, compressed or not, the check passes or raises a `DataError`."
    data, folder = masks
    path = tmp_path_factory.mktemp('damaged')/'a.tgz'
    voc_archive(folder, data.ids, path)
    raw = bytearray(path.read_bytes())
    inside = draw.draw(st.booleans())
    if inside:
        raw = bytearray(gzip.decompress(raw))
    for _ in range(draw.draw(st.integers(1, 4))):
        raw[draw.draw(st.integers(0, min(len(raw), 3000) - 1))] = draw.draw(st.integers(0, 255))
    if draw.draw(st.booleans()):
        raw = raw[:draw.draw(st.integers(0, len(raw)))]
    path.write_bytes(gzip.compress(raw) if inside else raw)
    try:
        check_archive(path, data)
    except DataError as e:
        assert 'a.tgz' in str(e)


# --- export ---------------------------------------------------------------------------------------

def exported(net, path):
    "Export the network and return it as a function of (N, 3, H, W) uint8."
    export(net, path)
    if path.suffix == '.pt2':
        return torch.export.load(path).module()
    session = pytest.importorskip('onnxruntime').InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(['logits'], {'image': x.numpy()})[0])


def assert_same_masks(net, run, sizes):
    "The exported network and this one agree on random images."
    net.eval()
    for n, h, w in sizes:
        images = torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8)
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        with torch.no_grad():
            logits = net(torch.stack([normalise(picture) for picture in pictures]))
        want = literal_resize(logits, (h, w))
        got = run(images)
        assert got.shape == want.shape
        assert_near(got, want, 1e-4, 0)
        assert (got.argmax(1) == want.argmax(1)).float().mean() >= .999


NETWORKS = {
    'tiny': (Tiny, replace(RECIPE_SSC, width=8)),
    'timm': (lambda: Timm('test_efficientnet', 16), replace(RECIPE_SSC_ASPP, width=8)),
    'resnet50': (lambda: ResNet('resnet50', 16), replace(RECIPE_DLP, msc=())),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_the_same_masks_in_onnxruntime(name, tmp_path):
    torch.manual_seed(0)
    backbone, recipe = NETWORKS[name]
    net = deeplab(backbone(), 5, recipe)
    for m in net.head.modules():   # small logits as after training, instead of random hundreds
        if isinstance(m, nn.Conv2d) and len(m.weight) == 5:
            nn.init.normal_(m.weight, std=.01)
    assert_same_masks(net, exported(net, tmp_path/'net.onnx'), ((1, 64, 64), (2, 45, 83)))


@pytest.mark.slow
def test_the_same_masks_from_torch_export(tmp_path):
    "Also where several sizes are fused; and the network is not changed."
    torch.manual_seed(0)
    net = deeplab(Tiny(), 5, RECIPE_DLP)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    run = exported(net, tmp_path/'net.pt2')
    after = net.state_dict()
    assert net.training and after.keys() == before.keys()
    assert all(torch.equal(before[k], v) for k, v in after.items())
    assert_same_masks(net, run, ((1, 64, 64), (2, 45, 83)))
    assert [p.name for p in tmp_path.iterdir()] == ['net.pt2']


@pytest.mark.slow
@pytest.mark.parametrize('backbone, least', [
    (Tiny, 9), (lambda: Timm('test_efficientnet', 16), 17)])
def test_the_smallest_image_of_torch_export(backbone, least, tmp_path):
    "Sides longer than the stride, as the docstring and the help say; smaller ones are refused."
    net = deeplab(backbone(), 5, replace(RECIPE_SSC, width=8))
    run = exported(net, tmp_path/'net.pt2')
    assert_same_masks(net, run, ((1, least, least), (2, least, 40), (1, 40, least)))
    for h, w in ((least - 1, 40), (40, least - 1), (1, 1)):
        with pytest.raises(AssertionError):
            run(torch.zeros(1, 3, h, w, dtype=torch.uint8))
    assert f'{least} ' in export.__doc__


def test_export_without_onnx(monkeypatch, tmp_path):
    for name in ('onnx', 'onnxscript'):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, name, None)
            with pytest.raises(ImportError, match='pip install onnx onnxscript'):
                export(DeepLab(Tiny(), ASPP(96, 3)), tmp_path/'net.onnx')
    with pytest.raises(ValueError, match=r'net\.pth should end in'):
        export(DeepLab(Tiny(), ASPP(96, 3)), tmp_path/'net.pth')
    assert not list(tmp_path.iterdir())
