"ResNet38 against its equations; weights of other people: MXNet byte by byte, released checkpoints, torchvision's."
import re
import struct
import tracemalloc
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import models
from ppc.backbones import (
    ResNet,
    ResNet38,
    Timm,
    load_released,
    mxnet_to_resnet38,
    parameter_groups,
    rename_released,
)
from ppc.cam import CamNet
from ppc.data import DataError
from ppc.seam import PCM
from ppc.weights import read_mxnet, read_weights

SMALL = 16


def randomise(net, seed=0):
    "Every tensor its own, statistics of batch normalisation included."
    g = torch.Generator().manual_seed(seed)
    for k, v in net.state_dict().items():
        if v.is_floating_point():
            v.copy_(torch.rand(v.shape, generator=g) + .5 if k.endswith('var') else torch.randn(v.shape, generator=g)*.1)
    return net


@pytest.fixture(scope='module')
def small(): return randomise(ResNet38(shrink=SMALL)).eval()


@pytest.fixture
def image(): return torch.randn(2, 3, 40, 32, generator=torch.Generator().manual_seed(1))


# --- ResNet38, literally -------------------------------------------------------------------------------------------------

def literal(s, x):
    "conv4, conv5, conv6 from a state dict; the dilations and strides of the facts, part by part."
    def act(name, x): return F.relu(F.batch_norm(x, s[f'{name}.running_mean'], s[f'{name}.running_var'], s[f'{name}.weight'], s[f'{name}.bias'], eps=1e-5))
    def conv(name, x, stride=1, dilation=1):
        w = s[f'{name}.weight']
        return F.conv2d(x, w, None, stride, dilation if w.shape[-1] == 3 else 0, dilation)
    def unit(b, x, stride=1, first=1, second=1):
        a = act(f'{b}.bn_branch2a', x)
        y = conv(f'{b}.conv_branch2a', a, stride, first)
        y = conv(f'{b}.conv_branch2b1', act(f'{b}.bn_branch2b1', y), 1, second)
        return y + (conv(f'{b}.conv_branch1', a, stride) if f'{b}.conv_branch1.weight' in s else x), a
    def bottleneck(b, x):
        a = act(f'{b}.bn_branch2a', x)
        y = conv(f'{b}.conv_branch2b1', act(f'{b}.bn_branch2b1', conv(f'{b}.conv_branch2a', a)), 1, 4)
        return conv(f'{b}.conv_branch2b2', act(f'{b}.bn_branch2b2', y)) + conv(f'{b}.conv_branch1', a), a
    x = conv('conv1a', x)
    for level, n in (('b2', 3), ('b3', 3), ('b4', 6)):
        x, _ = unit(level, x, stride=2)
        for u in range(1, n):
            x, _ = unit(f'{level}_{u}', x)
    x, conv4 = unit('b5', x, 1, 1, 2)
    for u in ('b5_1', 'b5_2'):
        x, _ = unit(u, x, 1, 2, 2)
    x, conv5 = bottleneck('b6', x)
    return [conv4, conv5, act('bn7', bottleneck('b7', x)[0])]


def test_resnet38_is_the_equations(small, image):
    net = randomise(ResNet38(shrink=SMALL)).double().eval()
    for a, b in zip(net(image.double()), literal(net.state_dict(), image.double())):
        torch.testing.assert_close(a, b)


def test_resnet38_has_the_authors_size():
    with torch.device('meta'):
        net = ResNet38()
        maps = net(torch.zeros(1, 3, 70, 64))
        full = CamNet(net, 21, refine=PCM(net.channels[:2]))
    assert [round(sum(p.numel() for p in n.parameters())/1e6, 2) for n in (net, full)] == [105.07, 105.88]
    assert [tuple(m.shape) for m in maps] == [(1, c, 9, 8) for c in net.channels]
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout2d) and m.p] == [.3, .5]


def test_a_step_leaves_the_frozen_parts_alone(image):
    torch.manual_seed(0)
    net = CamNet(randomise(ResNet38(shrink=SMALL)), 4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    opt = torch.optim.SGD(parameter_groups(net.train(), .1), momentum=.9, weight_decay=.1)
    for _ in range(2):
        maps = net(image)
        opt.zero_grad()
        (maps.cam.square().mean() + maps.embedding.mean()).backward()
        opt.step()
    after = net.state_dict()
    same = {k for k in after if torch.equal(before[k], after[k])}
    frozen = {k for k in after if re.match(r'backbone\.(conv1a|b2)|.*(\.bn_|\.bn7)', k)}
    assert same == frozen


def test_eval_and_train_again(small, image):
    net = randomise(ResNet38(shrink=SMALL)).train().eval().train()
    assert net.training and net.b6.dropout.training and not net.bn7.training and not net.b2.conv_branch2a.weight.requires_grad
    torch.testing.assert_close(net(image)[1], small(image)[1])     # the taps come before any dropout
    assert not torch.equal(net(image)[2], small(image)[2])


# --- MXNet's file, byte by byte ------------------------------------------------------------------------------------------

CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.uint8: 3, torch.int32: 4, torch.int8: 5, torch.int64: 6}
MAGIC = {'v1': 0xF993FAC8, 'v2': 0xF993FAC9, 'v3': 0xF993FACA}


def array_bytes(t, generation='v2', storage=0, shape=None, ndim=None, kind=None):
    shape = tuple(t.shape) if shape is None else shape
    ndim = len(shape) if ndim is None else ndim
    if generation == 'legacy':
        head = struct.pack(f'<I{len(shape)}I', ndim, *shape)
    else:
        head = struct.pack('<I', MAGIC[generation]) + (b'' if generation == 'v1' else struct.pack('<i', storage)) + struct.pack(f'<I{len(shape)}q', ndim, *shape)
    return head + struct.pack('<3i', 2, 3, CODES[t.dtype] if kind is None else kind) + t.contiguous().numpy().tobytes()


def file_bytes(arrays, names, n=None, m=None, magic=0x112):
    out = struct.pack('<3Q', magic, 0, len(arrays) if n is None else n) + b''.join(arrays) + struct.pack('<Q', len(names) if m is None else m)
    return out + b''.join(struct.pack('<Q', len(s)) + s for s in names)


def write_params(path, tensors, generation='v2'):
    path.write_bytes(file_bytes([array_bytes(t, generation) for t in tensors.values()], [k.encode() for k in tensors]))


@pytest.mark.parametrize('generation', ['legacy', 'v1', 'v2', 'v3'])
def test_every_generation_and_type_is_read(generation, tmp_path):
    want = {f'arg:{d}': (torch.arange(24).reshape(2, 3, 4) - (0 if d == torch.uint8 else 9)).to(d) for d in CODES}
    write_params(tmp_path/'a.params', want, generation)
    got = read_mxnet(tmp_path/'a.params')
    assert list(got) == list(want)
    for k in want:
        assert got[k].dtype == want[k].dtype and torch.equal(got[k], want[k])
    got['arg:torch.float32'] += 1                                  # memory of its own, that may be written to


def test_generations_may_be_mixed(tmp_path):
    t = torch.randn(3, 2)
    (tmp_path/'a.params').write_bytes(file_bytes([array_bytes(t, g) for g in ('v1', 'legacy', 'v2')], [b'a', b'b', 'ö'.encode()]))
    assert list(read_mxnet(tmp_path/'a.params')) == ['a', 'b', 'ö']


@pytest.mark.parametrize('generation', ['legacy', 'v1', 'v2'])
def test_cut_anywhere_is_refused(generation, tmp_path):
    path = tmp_path/'cut.params'
    write_params(path, {'arg:a': torch.randn(2, 3), 'aux:b': torch.randn(1).half()}, generation)
    whole = path.read_bytes()
    read_mxnet(path)
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(DataError, match=r'cut\.params at byte \d+'):
            read_mxnet(path)
    path.write_bytes(whole + b'\0')
    with pytest.raises(DataError, match='1 bytes after the last name'):
        read_mxnet(path)


BY_MXNET = bytes.fromhex(                                          # what mxnet.nd.save of 1.9.1 wrote
    '120100000000000000000000000000000200000000000000c9fa93f90000000002000000020000000000000002000000000000000100000000000000'
    '000000000000c03f000000c00000000000004040c9fa93f9000000000100000003000000000000000100000000000000060000000700000000000000'
    '08000000000000000900000000000000020000000000000005000000000000006172673a7705000000000000006175783a6d')


def test_a_file_that_mxnet_wrote(tmp_path):
    (tmp_path/'a.params').write_bytes(BY_MXNET)
    got = read_mxnet(tmp_path/'a.params')
    assert torch.equal(got['arg:w'], torch.tensor([[1.5, -2], [0, 3]])) and torch.equal(got['aux:m'], torch.tensor([7, 8, 9]))
    write_params(tmp_path/'b.params', got)
    assert len((tmp_path/'b.params').read_bytes()) == len(BY_MXNET)     # as the files of these tests are, but for the device


one, name = torch.ones(2, 3), [b'arg:a']
HOSTILE = {
    'many arrays': (file_bytes([array_bytes(one)], name, n=2**64 - 1), 'at byte'),
    'no arrays, many names': (file_bytes([], [], m=2**63), 'as many names'),
    'more names': (file_bytes([array_bytes(one)], [b'a', b'b']), 'as many names'),
    'no names': (file_bytes([array_bytes(one)], []), 'as many names'),
    'a name twice': (file_bytes([array_bytes(one)]*2, name*2), 'two arrays'),
    'long name': (file_bytes([array_bytes(one)], name).replace(struct.pack('<Q', 5), struct.pack('<Q', 2**64 - 1)), 'should follow'),
    'huge': (file_bytes([array_bytes(one, shape=(2**62, 2**62))], name), 'should follow'),
    'overflows to 6': (file_bytes([array_bytes(one, shape=(2**32, 2**32, 6))], name), 'should follow'),
    'huge, old': (file_bytes([array_bytes(one, 'legacy', shape=(2**32 - 1,)*8)], name), 'should follow'),
    'negative': (file_bytes([array_bytes(one, shape=(-2, -3))], name), 'of size'),
    'negative, V1': (file_bytes([array_bytes(one, 'v1', shape=(-1,))], name), 'of size'),
    'empty': (file_bytes([array_bytes(one, shape=(0, 3))], name), 'of size'),
    'none': (file_bytes([array_bytes(one, shape=())], name), '0 dimensions'),
    'many dimensions': (file_bytes([array_bytes(one, ndim=2**32 - 1)], name), 'dimensions'),
    'many dimensions, old': (file_bytes([array_bytes(one, 'legacy', ndim=2**31)], name), 'dimensions'),
    'sparse': (file_bytes([array_bytes(one, storage=1)], name), 'sparse'),
    'type 7': (file_bytes([array_bytes(one, kind=7)], name), 'element type 7'),
    'type -1': (file_bytes([array_bytes(one, kind=-1)], name), 'element type -1'),
    'other magic': (file_bytes([array_bytes(one)], name, magic=0x113), '0x112'),
    'nothing': (b'', 'at byte 0'),
    'a zip': (b'PK\x03\x04' + bytes(100), '0x112'),
    'text': (b'<html>404</html>', 'at byte 0'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_files_are_refused(case, tmp_path):
    data, words = HOSTILE[case]
    (tmp_path/'bad.params').write_bytes(data)
    tracemalloc.start()
    with pytest.raises(DataError, match=words) as e:
        read_mxnet(tmp_path/'bad.params')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 'bad.params' in str(e.value) and peak < 1e6


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path/'none.params', tmp_path):
        with pytest.raises(DataError, match='is missing'):
            read_mxnet(path)


@pytest.fixture(scope='module')
def flipped(tmp_path_factory):
    path = tmp_path_factory.mktemp('flips')/'flip.params'
    return path, file_bytes([array_bytes(torch.randn(2, 2), g) for g in ('legacy', 'v1', 'v2')], [b'arg:a', b'arg:b', b'aux:c'])


@settings(max_examples=300, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_bytes_give_tensors_or_an_error(flipped, flips):
    path, whole = flipped
    data = bytearray(whole)
    for at, value in flips:
        data[at % len(data)] = value
    path.write_bytes(data)
    try:
        arrays = read_mxnet(path)
    except DataError:
        return
    assert sum(a.numel()*a.element_size() for a in arrays.values()) <= len(whole)


# --- ResNet38 out of it --------------------------------------------------------------------------------------------------

def mxnet_names(state):
    "The other direction, written for itself: our names to those of the file."
    out = {}
    for k, v in state.items():
        *where, part = k.split('.')
        end = {'running_mean': 'moving_mean', 'running_var': 'moving_var', 'bias': 'beta'}.get(part)
        if part == 'num_batches_tracked':
            continue
        kind = 'aux' if part.startswith('running') else 'arg'
        if where[0] in ('conv1a', 'bn7'):
            new = f"{where[0]}_{end or ('weight' if where[0] == 'conv1a' else 'gamma')}"
        else:
            unit, (op, branch) = where[0][1:].split('_'), where[1].split('_')
            level = unit[0] + (f'b{unit[1]}' if len(unit) == 2 else 'a')
            new = f"{'res' if op == 'conv' else 'bn'}{level}_{branch}_{end or ('weight' if op == 'conv' else 'gamma')}"
        out[f'{kind}:{new}'] = v
    return out


def test_resnet38_from_mxnet(small, image, tmp_path):
    head = {'arg:linear1000_weight': torch.randn(1000, 8), 'arg:linear1000_bias': torch.randn(1000)}
    write_params(tmp_path/'r38.params', mxnet_names(small.state_dict()) | head, 'v1')
    net = ResNet38(tmp_path/'r38.params', SMALL).eval()
    for k, v in small.state_dict().items():
        assert torch.equal(net.state_dict()[k], v), k
    for a, b in zip(net(image), small(image)):
        torch.testing.assert_close(a, b)


def test_known_names():
    pairs = {'arg:conv1a_weight': 'conv1a.weight', 'arg:res2a_branch1_weight': 'b2.conv_branch1.weight', 'arg:res5b2_branch2b1_weight': 'b5_2.conv_branch2b1.weight',
             'arg:bn7a_branch2b2_beta': 'b7.bn_branch2b2.bias', 'aux:bn3b1_branch2a_moving_mean': 'b3_1.bn_branch2a.running_mean', 'aux:bn7_moving_var': 'bn7.running_var'}
    assert list(mxnet_to_resnet38({k: None for k in pairs})) == list(pairs.values())


@pytest.mark.parametrize('spoil, words', [
    (lambda a: a.pop('arg:res3b2_branch2a_weight'), r'r38\.params lacks the tensor b3_2\.conv_branch2a\.weight'),
    (lambda a: a.pop('aux:bn7_moving_var'), r'r38\.params lacks the tensor bn7\.running_var'),
    (lambda a: a.update({'arg:bn7_gamma': torch.ones(3)}), r'bn7\.weight as \(3,\)'),
    (lambda a: a.update({'arg:res9a_branch2a_weight': torch.ones(3)}), r'b9\.conv_branch2a\.weight, which this network lacks'),
    (lambda a: a.update({'arg:fc6_weight': torch.ones(3)}), "'arg:fc6_weight' is no array of ResNet38")])
def test_params_that_do_not_fit_are_named(small, spoil, words, tmp_path):
    arrays = mxnet_names(small.state_dict())
    spoil(arrays)
    write_params(tmp_path/'r38.params', arrays)
    with pytest.raises(DataError, match=words):
        ResNet38(tmp_path/'r38.params', SMALL)


# --- released checkpoints ------------------------------------------------------------------------------------------------

def camnet(seed, pcm=True):
    torch.manual_seed(seed)
    backbone = ResNet38(shrink=SMALL)
    return randomise(CamNet(backbone, 4, width=8, refine=PCM(backbone.channels[:2]) if pcm else None), seed).eval()


def as_released(net, projector='fc_proj', prefix='', counters=True):
    "The state dict as the authors' code would have named it."
    there = {'classifier': 'fc8', 'projector': projector, 'refine.reduce.0': 'f8_3', 'refine.reduce.1': 'f8_4', 'refine.mix': 'f9'}
    state = {}
    for k, v in net.state_dict().items():
        layer, _, part = k.rpartition('.')
        if counters or part != 'num_batches_tracked':
            state[f"{prefix}{there.get(layer, layer.removeprefix('backbone.'))}.{part}"] = v
    return state


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before 2020'])
@pytest.mark.parametrize('layout', [{}, dict(prefix='module.'), dict(projector='proj_fc', counters=False)], ids=['wseg', 'parallel', 'esp'])
def test_released_checkpoints_are_loaded(layout, zipped, image, tmp_path):
    net, other = camnet(1), camnet(2)
    torch.save(as_released(net, **layout), tmp_path/'w.pth', _use_new_zipfile_serialization=zipped)
    assert load_released(other, tmp_path/'w.pth') == []
    for a, b in zip(net(image), other(image)):
        torch.testing.assert_close(a, b)
    backbone = ResNet38(tmp_path/'w.pth', SMALL).eval()
    torch.testing.assert_close(backbone(image)[2], net.backbone(image)[2])


def test_a_last_background_comes_first(image, tmp_path):
    net, other = camnet(1), camnet(2)
    state = as_released(net)
    w = state['fc8.weight']
    state['fc8.weight'] = torch.cat([w[1:], w[:1]])
    torch.save(state, tmp_path/'w.pth')
    load_released(other, tmp_path/'w.pth', background_last=True)
    for a, b in zip(net(image), other(image)):
        torch.testing.assert_close(a, b)


def test_seam_has_no_projector_and_says_so(image, tmp_path):
    net, other = camnet(1), camnet(2)
    own = other.projector.weight.clone()
    state = as_released(net)
    del state['fc_proj.weight']
    torch.save(state, tmp_path/'seam.pth')
    assert load_released(other, tmp_path/'seam.pth') == ['projector.weight'] and torch.equal(other.projector.weight, own)
    torch.testing.assert_close(other(image).refined, net(image).refined)


@pytest.mark.parametrize('gone', ['fc8', 'f8_3', 'f8_4', 'f9', 'b7.conv_branch1', 'bn7'])
def test_anything_else_missing_is_an_error(gone, tmp_path):
    net, other = camnet(1), camnet(2)
    state = {k: v for k, v in as_released(net).items() if not k.startswith(gone)}
    torch.save(state, tmp_path/'w.pth')
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(DataError, match='lacks the tensor'):
        load_released(other, tmp_path/'w.pth')
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())       # nothing half loaded


def test_a_pcm_is_not_dropped_in_silence(tmp_path):
    torch.save(as_released(camnet(1)), tmp_path/'w.pth')
    with pytest.raises(DataError, match=r'refine\.\S+, which this network lacks'):
        load_released(camnet(2, pcm=False), tmp_path/'w.pth')


def test_names_of_our_own_are_left_alone():
    state = camnet(1).state_dict()
    once = rename_released(as_released(camnet(1)))
    assert set(once) == set(state) == set(rename_released(once)) and rename_released({'foo': 1}) == {'backbone.foo': 1}


def test_resnet38_from_its_own_names(small, image, tmp_path):
    from safetensors.torch import save_file
    save_file(small.state_dict(), tmp_path/'w.safetensors')
    torch.testing.assert_close(ResNet38(tmp_path/'w.safetensors', SMALL).eval()(image)[2], small(image)[2])
    with pytest.raises(DataError, match='this network needs'):
        ResNet38(tmp_path/'w.safetensors', SMALL//2)


@pytest.mark.parametrize('content, words', [({'state_dict': {}, 'epoch': 3}, "dict under 'state_dict'"), ([torch.ones(1)], 'holds a list')])
def test_files_that_are_no_state_dict_are_told(content, words, tmp_path):
    torch.save(content, tmp_path/'w.pth')
    with pytest.raises(DataError, match=words):
        read_weights(tmp_path/'w.pth')


# --- torchvision ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def resnet50():
    torch.manual_seed(0)
    return randomise(models.resnet50()).eval()


@pytest.mark.parametrize('counters', [True, False], ids=['today', 'before counters'])
def test_torchvision_file(resnet50, counters, tmp_path):
    torch.save({k: v for k, v in resnet50.state_dict().items() if counters or 'num_batches' not in k}, tmp_path/'r50.pth')
    net = ResNet('resnet50', 16, tmp_path/'r50.pth').eval()
    x = torch.randn(1, 3, 64, 64)
    maps = net(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(512, 8, 8), (1024, 4, 4), (2048, 4, 4)]
    r = resnet50
    want = r.layer2(r.layer1(r.maxpool(r.relu(r.bn1(r.conv1(x))))))
    torch.testing.assert_close(maps[0], want)
    torch.testing.assert_close(maps[1], r.layer3(want))           # up to the first stride that became a dilation
    (tmp_path/'r50.pth').unlink()


def test_torchvision_is_frozen_where_it_should_be():
    net = ResNet('resnet50', 8).train()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert net.net.layer4.training and not any(m.training or m.weight.requires_grad for m in norms)
    assert net.net.layer3[1].conv2.dilation == (2, 2) and net.net.layer4[1].conv2.dilation == (4, 4)


def test_torchvision_refusals(resnet50, tmp_path):
    with torch.device('meta'):
        with pytest.raises(ValueError, match='8 or 16, not 32'):
            ResNet('resnet50', 32)
        with pytest.raises(ValueError, match='neither resnet50 nor resnet101'):
            ResNet('resnet18', 8)
    with pytest.raises(DataError, match='is missing'):
        ResNet('resnet50', 8, tmp_path/'none.pth')
    torch.save({k: v for k, v in resnet50.state_dict().items() if k != 'layer4.2.conv3.weight'}, tmp_path/'r50.pth')
    with pytest.raises(DataError, match=r'r50\.pth lacks the tensor layer4\.2\.conv3\.weight'):
        ResNet('resnet50', 8, tmp_path/'r50.pth')
    (tmp_path/'r50.pth').unlink()


def test_hub_weights_run_no_code_and_say_when_unreachable(resnet50, monkeypatch):
    asked = {}
    def fetch(url, **kw):
        asked.update(kw)
        return resnet50.state_dict()
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', fetch)
    net = ResNet('resnet50', 8, 'hub')
    assert asked['weights_only'] and asked['check_hash'] and torch.equal(net.net.conv1.weight, resnet50.conv1.weight)
    def offline(url, **kw): raise OSError('no route')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', offline)
    with pytest.raises(DataError, match=r'resnet101 could not be fetched \(no route\): connect'):
        ResNet('resnet101', 8, 'hub')


def test_timm_unreachable_is_told_alike(monkeypatch):
    def offline(*a, **kw): raise OSError('')
    monkeypatch.setattr('timm.models.load_pretrained', offline)
    with pytest.raises(DataError, match='resnet18 could not be fetched'):
        Timm('resnet18', 16, 'hub')
