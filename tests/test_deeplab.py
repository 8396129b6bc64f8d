"DeepLab against its definitions written out pixel by pixel in float64; batch-norm modes, recipes, hostile archives, and networks that leave for onnxruntime."
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
    Recipe,
    check_archive,
    deeplab,
    export,
    predict,
    recipe_groups,
    segmentation_loss,
    voc_archive,
    write_predictions,
)
from ppc.training import fit

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**20)


def close(got, want): torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, check_dtype=False)


# --- literally -----------------------------------------------------------------------------------------------------------

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
    parts = [literal_block(x, b) for b in head.branches] + [literal_block(mean, head.pooled).expand(-1, *x.shape[1:])]
    return literal_conv(literal_block(torch.cat(parts), head.mix[0]), head.mix[2])


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([LargeFOV, ASPP, ConcatASPP]), st.booleans(), st.integers(1, 5), st.tuples(st.integers(1, 6), st.integers(1, 6)), seeds)
@torch.no_grad()
def test_heads_are_the_literal_ones(kind, norm, dilation, size, seed):
    torch.manual_seed(seed)
    head = (ASPP(3, 4, dilation) if kind is ASPP else kind(3, 4, 5, dilation, norm)).double().eval()
    for m in head.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(.5, 2)
        if isinstance(m, nn.Conv2d):
            m.bias.normal_()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    close(head(x), torch.stack([literal_head(one, head) for one in x]))


def test_dilations():
    "The pyramid is 6, 12, 18, 24 at output stride 8 and half of it at 16; it never becomes 0."
    found = lambda net: [m.dilation[0] for m in net.head.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    for stride, pyramid in ((8, [6, 12, 18, 24]), (16, [3, 6, 9, 12])):
        backbone = Timm('test_efficientnet', 16) if stride == 16 else Tiny()
        assert found(deeplab(backbone, 5, replace(RECIPE_SSC, width=8))) == [pyramid[1]]
        for recipe in (RECIPE_DLP, RECIPE_SSC_ASPP):
            assert found(deeplab(backbone, 5, replace(recipe, width=8))) == pyramid
    assert found(deeplab(backbone, 5, replace(RECIPE_DLP, dilation=1))) == [1, 1, 1, 2]


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
    total, count, (H, W), (h, w) = 0., 0, mask.shape[1:], logits.shape[2:]
    for n in range(len(logits)):
        up = literal_bilinear(logits[n], (H, W)) if full else logits[n]
        for y in range(up.shape[1]):
            for x in range(up.shape[2]):
                c = int(mask[n, y, x] if full else mask[n, int((y + .5)*H/h), int((x + .5)*W/w)])
                if c == 255:
                    continue
                total, count = total + torch.log(sum(torch.exp(v) for v in up[:, y, x])) - up[c, y, x], count + 1
    return total/max(count, 1)


@quick
@given(st.integers(1, 2), st.integers(2, 5), st.tuples(st.integers(2, 4), st.integers(2, 4)), st.tuples(st.integers(2, 9), st.integers(2, 9)), st.booleans(),
       st.sampled_from([0., .3, 1.]), seeds)
def test_the_loss_is_the_literal_one(N, classes, small, big, full, unknown, seed):
    "Value and gradient; classes without a pixel and images without a known one are among the examples."
    torch.manual_seed(seed)
    logits, mask = torch.randn(N, classes, *small, requires_grad=True), torch.randint(0, classes, (N, *big), dtype=torch.uint8)
    mask[torch.rand(N, *big) < unknown] = 255
    exact = logits.detach().double().requires_grad_()
    got, want = segmentation_loss(logits, mask, full), literal_loss(exact, mask, full)
    close(got, torch.as_tensor(want))
    want = torch.autograd.grad(want, exact)[0] if torch.is_tensor(want) else torch.zeros_like(exact)
    close(torch.autograd.grad(got, logits)[0], want)


def test_a_list_of_logits_has_the_sum_of_their_losses():
    torch.manual_seed(0)
    maps, mask = [torch.randn(2, 3, s, s) for s in (8, 6, 4)], torch.randint(0, 3, (2, 20, 20))
    for full in (True, False):
        close(segmentation_loss(maps, mask, full), sum(segmentation_loss(m, mask, full) for m in maps))


# --- batch normalisation -------------------------------------------------------------------------------------------------

def statistics(module): return {k: v.clone() for k, v in module.state_dict().items() if 'running' in k}


@pytest.mark.parametrize('make', [lambda: ResNet38(shrink=16), lambda: Timm('test_efficientnet', 16)], ids=['resnet38', 'timm'])
@pytest.mark.parametrize('mode', ['frozen', 'batch'])
def test_batchnorm_modes(mode, make):
    "Which statistics move, by how much, and what learns: in training, at test time, and back in training."
    torch.manual_seed(0)
    backbone = make()
    net = DeepLab(backbone, LargeFOV(backbone.channels[-1], 3, 8, norm=True), mode, momentum=.01)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    inputs = {}
    for m in norms:
        m.register_forward_hook(lambda m, x, y: inputs.update({m: x[0].detach()}))
    image = torch.randn(3, 3, 48, 40)
    for _ in range(2):
        before, head = statistics(backbone), statistics(net.head)
        net.train()(image).square().mean().backward()
        assert all(torch.equal(before[k], v) == (mode == 'frozen') for k, v in statistics(backbone).items())
        assert not any(torch.equal(head[k], v) for k, v in statistics(net.head).items())
        after = statistics(net)
        net.eval()(image)
        assert all(torch.equal(after[k], v) for k, v in statistics(net).items())
    first, before = norms[0], norms[0].running_mean.clone()
    net.train()(image)
    close(first.running_mean, (.99*before + .01*inputs[first].mean((0, 2, 3)) if mode == 'batch' else before))
    affine = [p for m in norms for p in m.parameters(recurse=False)]
    assert affine and not any(p.requires_grad or p.grad is not None for p in affine)
    others = {id(p) for p in net.parameters()} - {id(p) for p in affine}
    learning = {id(p) for p in net.parameters() if p.grad is not None}
    stem = {id(p) for name in getattr(backbone, 'stem', ()) for p in getattr(backbone, name).parameters()}
    assert learning == (others if mode == 'batch' else others - stem)


def test_what_a_normalised_head_needs():
    "More than one image a batch for the mean of the map, in training; at test time none."
    net = deeplab(Tiny(), 3, replace(RECIPE_SSC_ASPP, width=8))
    with pytest.raises(ValueError, match='more than 1 value'):
        net(torch.randn(1, 3, 32, 32))
    assert net.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3, 4, 4)
    assert deeplab(Tiny(), 3, replace(RECIPE_SSC_ASPP, width=8, norm=False))(torch.randn(1, 3, 32, 32)).isfinite().all()


# --- several sizes of the input ------------------------------------------------------------------------------------------

def test_the_largest_logit_of_all_sizes_wins():
    torch.manual_seed(0)
    net = DeepLab(Tiny(), ASPP(96, 3, 2), msc=(.5, .75))
    nn.init.normal_(net.head.branches[0].weight)
    image, mask = torch.randn(2, 3, 40, 33), torch.randint(0, 3, (2, 40, 33))
    plain = lambda x: net.head(net.backbone(x)[-1])
    sizes = [(40, 33), (20, 16), (30, 24)]
    maps = [plain(torch.stack([literal_bilinear(i.double(), s) for i in image]).float()) for s in sizes]
    best = torch.stack([torch.stack([literal_bilinear(i.double(), maps[0].shape[2:]) for i in m]) for m in maps]).amax(0)
    got = net(image)
    assert len(got) == 4
    for g, w in zip(got, [*maps, best]):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4, check_dtype=False)
    loss = segmentation_loss(got, mask, full=False)
    close(loss, sum(segmentation_loss(g, mask, full=False) for g in got))
    loss.backward()
    assert all(p.grad.any() for p in net.parameters())
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(image), best, atol=1e-4, rtol=1e-4, check_dtype=False)


# --- recipes -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', RECIPES)
def test_every_learned_parameter_is_in_one_group(name):
    r = replace(RECIPES[name], width=8)
    backbone = ResNet38(shrink=16)
    net = deeplab(backbone, 5, r)
    groups = recipe_groups(net, r)
    held = [id(p) for g in groups for p in g['params']]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in net.parameters() if p.requires_grad}
    assert [g['lr']/r.lr for g in groups] == pytest.approx([1, 10, 10 if name == 'small' else 20])
    assert [g['weight_decay'] for g in groups] == [5e-4, 5e-4, 0 if name == 'dlp' else 5e-4]
    assert all(p.ndim == 1 for p in groups[2]['params']) and all(p.ndim == 4 for p in groups[1]['params'])
    torch.optim.SGD(groups, momentum=r.momentum)


def test_recipes_say_what_their_sources_say():
    "Section 11 of the facts, typed again."
    assert (RECIPE_SSC.lr, RECIPE_SSC.crop, RECIPE_SSC.resize, RECIPE_SSC.epochs, RECIPE_SSC.batch_size, RECIPE_SSC.batchnorm, RECIPE_SSC.bn_momentum) == (1e-3, 448, (.5, 1.5), 18.9, 10, 'batch', 3e-4)
    assert (RECIPE_SSC.head, RECIPE_SSC.width, RECIPE_SSC.dilation, RECIPE_SSC.norm, RECIPE_SSC.full, RECIPE_SSC.msc) == ('largefov', 512, 12, True, True, ())
    assert (RECIPE_SSC_ASPP.head, RECIPE_SSC_ASPP.width, RECIPE_SSC_ASPP.lr) == ('aspp-concat', 256, 1e-3)
    assert (RECIPE_DLP.head, RECIPE_DLP.lr, RECIPE_DLP.crop, RECIPE_DLP.batchnorm, RECIPE_DLP.msc, RECIPE_DLP.full, RECIPE_DLP.bias_decay) == ('aspp', 2.5e-4, 321, 'frozen', (.5, .75), False, False)
    assert (RECIPE_R38.lr, RECIPE_R38.crop, RECIPE_R38.resize, RECIPE_R38.batch_size, RECIPE_R38.msc) == (8e-4, 512, (.5, 2), 6, (.5, .75))
    assert (RECIPE_SSC.pairwise.iterations, RECIPE_SSC.pairwise.sxy, RECIPE_SSC.pairwise.srgb, RECIPE_SSC.pairwise.compat) == (1, 32, 13, 10)
    assert (RECIPE_DLP.pairwise.iterations, RECIPE_DLP.pairwise.sxy, RECIPE_DLP.pairwise.srgb, RECIPE_DLP.pairwise.compat, RECIPE_DLP.pairwise.smooth_sxy, RECIPE_DLP.pairwise.smooth_compat) == (10, 67, 3, 4, 1, 3)


@pytest.mark.parametrize('wrong', [{'head': 'deeplab'}, {'batchnorm': 'train'}])
def test_an_unknown_choice(wrong):
    with pytest.raises(ValueError, match=f'{next(iter(wrong))} is .* choose from'):
        replace(RECIPE_SSC, **wrong)
    with pytest.raises(ValueError, match="batchnorm is 'train'"):
        DeepLab(Tiny(), ASPP(96, 3), 'train')


def test_training_where_little_is_known(mine, tmp_path):
    "Through the one loop: a mask all unknown, and classes that no mask shows."
    data = TagFolder(mine)
    for n, i in enumerate(data.ids):
        write_mask(tmp_path/'masks'/f'{i}.png', np.full(data.mask(n).shape, 255 if n % 2 else 3))
    r = replace(RECIPE_SSC_ASPP, width=16, dilation=4, batch_size=4, epochs=1, crop=61)
    net = deeplab(Tiny(), len(data.classes), r)
    seen = []
    losses = lambda m, b: seen.append((segmentation_loss(m(b['image']), b['mask'], r.full), (b['mask'] != 255).any())) or {'ce': seen[-1][0]}
    views = TrainingViews(data, augmentation(r.resize, r.crop, r.jitter, relative=True), masks=tmp_path/'masks')
    (tmp_path/'run').mkdir()
    fit(net, losses, views, torch.optim.SGD(recipe_groups(net, r), momentum=r.momentum), tmp_path/'run', r.epochs, r.batch_size, device='cpu')
    assert len(seen) == 4 and all(p.isfinite().all() for p in net.parameters())


# --- test time -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def oddly(mine):
    "Scenes of which one is a single pixel, one 13x7 and one 7x13."
    data = TagFolder(mine)
    for i, size in zip(data.ids, ((1, 1), (13, 7), (7, 13))):
        data.image(0).resize(size).save(data.files[i])
    return data


def test_predictions_are_the_mean_of_logits(oddly, tmp_path):
    torch.manual_seed(0)
    net, scales = deeplab(Tiny(), 7, replace(RECIPE_SSC, width=8, dilation=2)), (.5, 1.25)
    write_predictions(net, oddly, tmp_path, scales)
    for n, i in enumerate(oddly.ids[:6]):
        picture = oddly.image(n)
        H, W = picture.size[::-1]
        total = torch.zeros(7, H, W, dtype=torch.float64)
        for s in scales:
            x = literal_bilinear(normalise(picture).double(), (max(1, round(s*H)), max(1, round(s*W)))).float()
            for mirrored in (False, True):
                with torch.no_grad():
                    l = literal_bilinear(net.eval()((x.flip(-1) if mirrored else x)[None])[0].double(), (H, W))
                total += l.flip(-1) if mirrored else l
        got = read_mask(tmp_path/f'{i}.png')
        best, second = total.topk(2, 0).values
        sure = (best - second > 1e-3).numpy()
        assert got.shape == (H, W) and (got == total.argmax(0).numpy())[sure].all() and sure.mean() > .95
    with Image.open(tmp_path/f'{i}.png') as im:
        assert im.mode == 'P' and np.array_equal(np.reshape(im.getpalette(), (-1, 3)), voc_palette())


def test_predictions_go_on_where_they_stopped(scenes, tmp_path):
    data, net = TagFolder(scenes, 'val'), deeplab(Tiny(), 7, replace(RECIPE_SSC, width=8))
    write_mask(tmp_path/f'{data.ids[0]}.png', np.full((2, 2), 9))
    write_predictions(net, data, tmp_path, (1,))
    assert read_mask(tmp_path/f'{data.ids[0]}.png').shape == (2, 2)
    assert {p.stem for p in tmp_path.iterdir()} == set(data.ids)


def test_the_crf_gets_the_softmax(monkeypatch, oddly, tmp_path):
    "Of the mean logits, with the photograph, and what it says is written."
    seen = []
    def crf(image, scores, pairwise):
        seen.append((image.shape[:2] == scores.shape[1:], image.dtype, abs(scores.sum(0) - 1).max(), pairwise))
        return np.roll(scores, 1, 0)
    monkeypatch.setattr(module, 'crf_scores', crf)
    net = deeplab(Tiny(), 7, replace(RECIPE_SSC, width=8))
    write_predictions(net, oddly, tmp_path/'plain', (1,))
    write_predictions(net, oddly, tmp_path/'crf', (1,), pairwise=RECIPE_DLP.pairwise)
    assert len(seen) == len(oddly) and all(s[0] and s[1] == np.uint8 and s[2] < 1e-5 and s[3] == RECIPE_DLP.pairwise for s in seen)
    for i in oddly.ids:
        assert (read_mask(tmp_path/'crf'/f'{i}.png') == (read_mask(tmp_path/'plain'/f'{i}.png') + 1) % 7).all()


def test_the_crf_itself():
    "Certain logits stay as they are; a single pixel is allowed."
    torch.manual_seed(0)
    image, y = np.full((12, 10, 3), 90, np.uint8), np.zeros((12, 10), np.int64)
    image[:, 5:], y[:, 5:] = 200, 2
    logits = 8*F.one_hot(torch.from_numpy(y), 4).permute(2, 0, 1).float()
    assert (predict(logits, image, RECIPE_SSC.pairwise) == y).all() and (predict(logits, image) == y).all()
    assert predict(logits[:, :1, :1], image[:1, :1], RECIPE_SSC.pairwise).shape == (1, 1)


@pytest.mark.parametrize('recipe', [RECIPE_SSC, RECIPE_SSC_ASPP, RECIPE_DLP])
def test_any_size_at_test_time(recipe):
    net = deeplab(Tiny(), 3, replace(recipe, width=8)).eval()
    for size in ((1, 1), (1, 9), (17, 31)):
        assert net(torch.randn(1, 3, *size)).isfinite().all()


# --- the archive ---------------------------------------------------------------------------------------------------------

WHERE = 'results/VOC2012/Segmentation/comp5_test_cls'


@pytest.fixture(scope='module')
def masks(scenes, tmp_path_factory):
    "Predictions of the validation scenes: the true masks without their unknown pixels."
    data, out = TagFolder(scenes, 'val'), tmp_path_factory.mktemp('masks')
    for n, i in enumerate(data.ids):
        write_mask(out/f'{i}.png', np.where(data.mask(n) == 255, 0, data.mask(n)))
    return data, out


def png(mask, mode='P', palette=None):
    im = Image.fromarray(np.asarray(mask, np.uint8)).convert(mode)
    if mode == 'P':
        im.putpalette((voc_palette() if palette is None else palette).tobytes())
    f = io.BytesIO()
    im.save(f, 'PNG')
    return f.getvalue()


def pack(path, entries, **kw):
    "entries: (name, bytes) or `TarInfo` without content."
    with tarfile.open(path, 'w:gz', **kw) as tar:
        for e in entries:
            info = e if isinstance(e, tarfile.TarInfo) else tarfile.TarInfo(e[0])
            if info is not e:
                info.size = len(e[1])
            tar.addfile(info, None if info is e else io.BytesIO(e[1]))
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
        assert {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode) for e in entries} == {(0, 0, 0, '', '', 0o644)}
    voc_archive(folder, data.ids, tmp_path/'c.tgz', 2010, 'comp6')
    check_archive(tmp_path/'c.tgz', data, 2010, 'comp6')
    with pytest.raises(DataError, match='no mask of'):
        check_archive(tmp_path/'c.tgz', data)
    assert {p.name for p in tmp_path.iterdir()} == {'a.tgz', 'b.tar.gz', 'c.tgz'}


def test_archive_of_what_is_not_there(masks, tmp_path):
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
    check_archive(pack(tmp_path/'a.tgz', [directory, *((f'{WHERE}/{i}.png', (folder/f'{i}.png').read_bytes()) for i in data.ids)]), data)


def test_wrong_archives(masks, tmp_path):
    "Each is refused by name, and nothing is written anywhere."
    data, folder = masks
    good = {f'{WHERE}/{i}.png': (folder/f'{i}.png').read_bytes() for i in data.ids}
    first, mask = next(iter(good)), np.zeros(data.image(0).size[::-1])
    values = lambda v: mask + v
    wrong = {
        'lacks': list(good.items())[1:],
        'and once more': [*good.items(), (first, good[first])],
        'no mask of': [*good.items(), (f'{WHERE}/other.png', good[first])],
        r"'\.\./": [('../' + first, good[first])],
        "'/etc/x.png'": [('/etc/x.png', good[first])],
        'is no plain file': [link(first, '/etc/passwd')],
        'no plain file': [*good.items(), link('x', first, tarfile.LNKTYPE)],
        'plain file': [link(first, '', tarfile.FIFOTYPE)],
        'they must agree': [(first, png(np.zeros((5, 6))))],
        'palette': [(first, png(mask, 'L'))],
        "VOC's": [(first, png(mask, palette=voc_palette()[::-1]))],
        'the value 255': [(first, png(values(255)))],
        'the value 7': [(first, png(values(7)))],
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


def test_an_archive_that_unfolds_without_end(masks, tmp_path):
    "A header or a hole that claims terabytes is not believed."
    data, _ = masks
    name = f'{WHERE}/{data.ids[0]}.png'
    with gzip.open(tmp_path/'a.tgz', 'wb') as z:
        z.write(bytes(30*2**20))
    with pytest.raises(DataError, match='holds more than'):
        check_archive(tmp_path/'a.tgz', data)
    hole, huge = tarfile.TarInfo(name), tarfile.TarInfo(name)
    hole.pax_headers, huge.pax_headers = {'GNU.sparse.map': '0,0', 'GNU.sparse.size': str(2**28)}, {'size': str(2**42)}
    for one, message in ((hole, 'no plain file'), (huge, 'a.tgz is no archive')):
        with pytest.raises(DataError, match=message):
            check_archive(pack(tmp_path/'a.tgz', [one], format=tarfile.PAX_FORMAT), data)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_archives_are_named_or_whole(masks, tmp_path_factory, draw):
    "Whatever bytes are changed in the stream, compressed or not: it is right, or a `DataError`."
    data, folder = masks
    path = tmp_path_factory.mktemp('damaged')/'a.tgz'
    voc_archive(folder, data.ids, path)
    raw = bytearray(path.read_bytes())
    inside = draw.draw(st.booleans())
    if inside:
        raw = bytearray(gzip.decompress(raw))
    for _ in range(draw.draw(st.integers(1, 4))):
        raw[draw.draw(st.integers(0, min(len(raw), 3000) - 1))] = draw.draw(st.integers(0, 255))
    raw = raw[:draw.draw(st.integers(0, len(raw)))] if draw.draw(st.booleans()) else raw
    path.write_bytes(gzip.compress(raw) if inside else raw)
    try:
        check_archive(path, data)
    except DataError as e:
        assert 'a.tgz' in str(e)


# --- export --------------------------------------------------------------------------------------------------------------

def exported(net, path):
    "Calls the exported network with (N, 3, H, W) uint8."
    export(net, path)
    if path.suffix == '.pt2':
        return torch.export.load(path).module()
    session = pytest.importorskip('onnxruntime').InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(['logits'], {'image': x.numpy()})[0])


def same_masks(net, run, sizes):
    net.eval()
    for n, h, w in sizes:
        bytes_ = torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8)
        images = torch.stack([normalise(Image.fromarray(b.permute(1, 2, 0).numpy())) for b in bytes_])
        with torch.no_grad():
            want = torch.stack([literal_bilinear(l.double(), (h, w)) for l in net(images)])
        got = run(bytes_)
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0, check_dtype=False)
        assert (got.argmax(1) == want.argmax(1)).float().mean() >= .999


NETWORKS = {'tiny': (Tiny, replace(RECIPE_SSC, width=8)), 'timm': (lambda: Timm('test_efficientnet', 16), replace(RECIPE_SSC_ASPP, width=8)),
            'resnet50': (lambda: ResNet('resnet50', 16), replace(RECIPE_DLP, msc=()))}


@pytest.mark.parametrize('name', NETWORKS)
def test_the_same_masks_in_onnxruntime(name, tmp_path):
    torch.manual_seed(0)
    backbone, recipe = NETWORKS[name]
    net = deeplab(backbone(), 5, recipe)
    for m in net.head.modules():   # logits of a trained network's size, not the hundreds that random ones have
        if isinstance(m, nn.Conv2d) and len(m.weight) == 5:
            nn.init.normal_(m.weight, std=.01)
    same_masks(net, exported(net, tmp_path/'net.onnx'), ((1, 64, 64), (2, 45, 83)))


def test_the_same_masks_from_torch_export(tmp_path):
    "Also where several sizes are fused; and the network is left as it was."
    torch.manual_seed(0)
    net = deeplab(Tiny(), 5, RECIPE_DLP)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    run = exported(net, tmp_path/'net.pt2')
    assert net.training and net.state_dict().keys() == before.keys() and all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    same_masks(net, run, ((1, 64, 64), (2, 45, 83)))
    assert [p.name for p in tmp_path.iterdir()] == ['net.pt2']


def test_export_without_onnx(monkeypatch, tmp_path):
    for name in ('onnx', 'onnxscript'):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, name, None)
            with pytest.raises(ImportError, match='pip install onnx onnxscript'):
                export(DeepLab(Tiny(), ASPP(96, 3)), tmp_path/'net.onnx')
    with pytest.raises(ValueError, match=r'net\.pth should end in'):
        export(DeepLab(Tiny(), ASPP(96, 3)), tmp_path/'net.pth')
    assert not list(tmp_path.iterdir())
