"ResNet38 against its equations; weights from elsewhere: MXNet, released checkpoints, torchvision."
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
    BACKBONES,
    Backbone,
    ResNet,
    ResNet38,
    Timm,
    Tiny,
    build_backbone,
    load_backbone,
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
    "Fill every tensor with random numbers, statistics of batch normalisation included."
    g = torch.Generator().manual_seed(seed)
    for k, v in net.state_dict().items():
        if k.endswith('var'):
            v.copy_(torch.rand(v.shape, generator=g) + .5)
        elif v.is_floating_point():
            v.copy_(torch.randn(v.shape, generator=g)*.1)
    return net


@pytest.fixture(scope='module')
def small(): return randomise(ResNet38(shrink=SMALL)).eval()


@pytest.fixture
def image(): return torch.randn(2, 3, 40, 32, generator=torch.Generator().manual_seed(1))


# --- ResNet38, literally --------------------------------------------------------------------------

def literal(s, x):
    "conv4, conv5, conv6 from a state dict, with dilations and strides written out part by part."
    def act(name, x):
        parts = (s[f'{name}.{part}'] for part in ('running_mean', 'running_var', 'weight', 'bias'))
        return F.relu(F.batch_norm(x, *parts, eps=1e-5))
    def conv(name, x, stride=1, dilation=1):
        w = s[f'{name}.weight']
        return F.conv2d(x, w, None, stride, dilation if w.shape[-1] == 3 else 0, dilation)
    def unit(b, x, stride=1, first=1, second=1):
        a = act(f'{b}.bn_branch2a', x)
        y = conv(f'{b}.conv_branch2a', a, stride, first)
        y = conv(f'{b}.conv_branch2b1', act(f'{b}.bn_branch2b1', y), 1, second)
        if f'{b}.conv_branch1.weight' in s:
            x = conv(f'{b}.conv_branch1', a, stride)
        return y + x, a
    def bottleneck(b, x):
        a = act(f'{b}.bn_branch2a', x)
        y = conv(f'{b}.conv_branch2a', a)
        y = conv(f'{b}.conv_branch2b1', act(f'{b}.bn_branch2b1', y), 1, 4)
        y = conv(f'{b}.conv_branch2b2', act(f'{b}.bn_branch2b2', y))
        return y + conv(f'{b}.conv_branch1', a), a
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
    millions = [sum(p.numel() for p in n.parameters())/1e6 for n in (net, full)]
    assert [round(m, 2) for m in millions] == [105.07, 105.88]
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
    assert net.training and net.b6.dropout.training and not net.bn7.training
    assert not net.b2.conv_branch2a.weight.requires_grad
    torch.testing.assert_close(net(image)[1], small(image)[1])   # low-level maps: no dropout
    assert not torch.equal(net(image)[2], small(image)[2])


# --- MXNet's file, byte by byte -------------------------------------------------------------------

CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.uint8: 3,
    torch.int32: 4,
    torch.int8: 5,
    torch.int64: 6,
}
MAGIC = {'v1': 0xF993FAC8, 'v2': 0xF993FAC9, 'v3': 0xF993FACA}


def array_bytes(t, generation='v2', storage=0, shape=None, ndim=None, kind=None):
    "An array as in a file; what is given besides `t` stands in the header instead of the truth."
    shape = tuple(t.shape) if shape is None else shape
    ndim = len(shape) if ndim is None else ndim
    kind = CODES[t.dtype] if kind is None else kind
    if generation == 'legacy':
        head = struct.pack(f'<I{len(shape)}I', ndim, *shape)
    else:
        head = struct.pack('<I', MAGIC[generation])
        if generation != 'v1':
            head += struct.pack('<i', storage)
        head += struct.pack(f'<I{len(shape)}q', ndim, *shape)
    return head + struct.pack('<3i', 2, 3, kind) + t.contiguous().numpy().tobytes()


def file_bytes(arrays, names, n=None, m=None, magic=0x112):
    "A whole file; `n` arrays and `m` names are announced, or as many as there are."
    n = len(arrays) if n is None else n
    m = len(names) if m is None else m
    out = struct.pack('<3Q', magic, 0, n) + b''.join(arrays) + struct.pack('<Q', m)
    return out + b''.join(struct.pack('<Q', len(s)) + s for s in names)


def write_params(path, tensors, generation='v2'):
    arrays = [array_bytes(t, generation) for t in tensors.values()]
    path.write_bytes(file_bytes(arrays, [k.encode() for k in tensors]))


@pytest.mark.parametrize('generation', ['legacy', 'v1', 'v2', 'v3'])
def test_every_generation_and_type_is_read(generation, tmp_path):
    numbers = torch.arange(24).reshape(2, 3, 4)
    want = {f'arg:{d}': (numbers if d == torch.uint8 else numbers - 9).to(d) for d in CODES}
    write_params(tmp_path/'a.params', want, generation)
    got = read_mxnet(tmp_path/'a.params')
    assert list(got) == list(want)
    for k in want:
        assert got[k].dtype == want[k].dtype and torch.equal(got[k], want[k])
    got['arg:torch.float32'] += 1   # its memory may be written to


def test_generations_may_be_mixed(tmp_path):
    t = torch.randn(3, 2)
    arrays = [array_bytes(t, g) for g in ('v1', 'legacy', 'v2')]
    (tmp_path/'a.params').write_bytes(file_bytes(arrays, [b'a', b'b', 'ö'.encode()]))
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


BY_MXNET = bytes.fromhex(   # what mxnet.nd.save of 1.9.1 wrote
    '120100000000000000000000000000000200000000000000c9fa93f90000000002000000020000000000000002000000'
    '000000000100000000000000000000000000c03f000000c00000000000004040c9fa93f9000000000100000003000000'
    '000000000100000000000000060000000700000000000000080000000000000009000000000000000200000000000000'
    '05000000000000006172673a7705000000000000006175783a6d')


def test_a_file_that_mxnet_wrote(tmp_path):
    (tmp_path/'a.params').write_bytes(BY_MXNET)
    got = read_mxnet(tmp_path/'a.params')
    assert torch.equal(got['arg:w'], torch.tensor([[1.5, -2], [0, 3]]))
    assert torch.equal(got['aux:m'], torch.tensor([7, 8, 9]))
    write_params(tmp_path/'b.params', got)
    assert len((tmp_path/'b.params').read_bytes()) == len(BY_MXNET)   # only the device differs


one, name = torch.ones(2, 3), [b'arg:a']


def one_array(**header): return file_bytes([array_bytes(one, **header)], name)


LONG_NAME = one_array().replace(struct.pack('<Q', 5), struct.pack('<Q', 2**64 - 1))
HOSTILE = {
    'many arrays': (file_bytes([array_bytes(one)], name, n=2**64 - 1), 'at byte'),
    'no arrays, many names': (file_bytes([], [], m=2**63), 'as many names'),
    'more names': (file_bytes([array_bytes(one)], [b'a', b'b']), 'as many names'),
    'no names': (file_bytes([array_bytes(one)], []), 'as many names'),
    'a name twice': (file_bytes([array_bytes(one)]*2, name*2), 'two arrays'),
    'long name': (LONG_NAME, 'should follow'),
    'huge': (one_array(shape=(2**62, 2**62)), 'should follow'),
    'overflows to 6': (one_array(shape=(2**32, 2**32, 6)), 'should follow'),
    'huge, old': (one_array(generation='legacy', shape=(2**32 - 1,)*8), 'should follow'),
    'negative': (one_array(shape=(-2, -3)), 'of size'),
    'negative, V1': (one_array(generation='v1', shape=(-1,)), 'of size'),
    'empty': (one_array(shape=(0, 3)), 'of size'),
    'none': (one_array(shape=()), '0 dimensions'),
    'many dimensions': (one_array(ndim=2**32 - 1), 'dimensions'),
    'many dimensions, old': (one_array(generation='legacy', ndim=2**31), 'dimensions'),
    'sparse': (one_array(storage=1), 'sparse'),
    'type 7': (one_array(kind=7), 'element type 7'),
    'type -1': (one_array(kind=-1), 'element type -1'),
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
    "A path to write to, and the bytes of a good file."
    path = tmp_path_factory.mktemp('flips')/'flip.params'
    arrays = [array_bytes(torch.randn(2, 2), g) for g in ('legacy', 'v1', 'v2')]
    return path, file_bytes(arrays, [b'arg:a', b'arg:b', b'aux:c'])


flip = st.tuples(st.integers(0, 10**6), st.integers(0, 255))   # where, and the new value


@settings(max_examples=300, deadline=None)
@given(flips=st.lists(flip, min_size=1, max_size=6))
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


# --- ResNet38 from MXNet's file -------------------------------------------------------------------

def mxnet_names(state):
    "The other direction, written independently: our names to those of the file."
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
            layer, weight = ('res', 'weight') if op == 'conv' else ('bn', 'gamma')
            new = f'{layer}{level}_{branch}_{end or weight}'
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
    pairs = {
        'arg:conv1a_weight': 'conv1a.weight',
        'arg:res2a_branch1_weight': 'b2.conv_branch1.weight',
        'arg:res5b2_branch2b1_weight': 'b5_2.conv_branch2b1.weight',
        'arg:bn7a_branch2b2_beta': 'b7.bn_branch2b2.bias',
        'aux:bn3b1_branch2a_moving_mean': 'b3_1.bn_branch2a.running_mean',
        'aux:bn7_moving_var': 'bn7.running_var',
    }
    assert list(mxnet_to_resnet38({k: None for k in pairs})) == list(pairs.values())


@pytest.mark.parametrize('spoil, words', [
    (lambda a: a.pop('arg:res3b2_branch2a_weight'),
     r'r38\.params lacks the tensor b3_2\.conv_branch2a\.weight'),
    (lambda a: a.pop('aux:bn7_moving_var'), r'r38\.params lacks the tensor bn7\.running_var'),
    (lambda a: a.update({'arg:bn7_gamma': torch.ones(3)}), r'bn7\.weight as \(3,\)'),
    (lambda a: a.update({'arg:res9a_branch2a_weight': torch.ones(3)}),
     r'b9\.conv_branch2a\.weight, which this network lacks'),
    (lambda a: a.update({'arg:fc6_weight': torch.ones(3)}),
     "'arg:fc6_weight' is no array of ResNet38")])
def test_params_that_do_not_fit_are_named(small, spoil, words, tmp_path):
    arrays = mxnet_names(small.state_dict())
    spoil(arrays)
    write_params(tmp_path/'r38.params', arrays)
    with pytest.raises(DataError, match=words):
        ResNet38(tmp_path/'r38.params', SMALL)


# --- released checkpoints -------------------------------------------------------------------------

def camnet(seed, pcm=True):
    torch.manual_seed(seed)
    backbone = ResNet38(shrink=SMALL)
    refine = PCM(backbone.channels[:2]) if pcm else None
    return randomise(CamNet(backbone, 4, width=8, refine=refine), seed).eval()


def as_released(net, projector='fc_proj', prefix='', counters=True):
    "The state dict by the names of the authors' code."
    heads = {
        'classifier': 'fc8',
        'projector': projector,
        'refine.reduce.0': 'f8_3',
        'refine.reduce.1': 'f8_4',
        'refine.mix': 'f9',
    }
    state = {}
    for k, v in net.state_dict().items():
        layer, _, part = k.rpartition('.')
        if counters or part != 'num_batches_tracked':
            name = heads.get(layer, layer.removeprefix('backbone.'))
            state[f'{prefix}{name}.{part}'] = v
    return state


LAYOUTS = {
    'wseg': {},
    'parallel': dict(prefix='module.'),
    'esp': dict(projector='proj_fc', counters=False),
}


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before 2020'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_released_checkpoints_are_loaded(layout, zipped, image, tmp_path):
    net, other = camnet(1), camnet(2)
    state = as_released(net, **LAYOUTS[layout])
    torch.save(state, tmp_path/'w.pth', _use_new_zipfile_serialization=zipped)
    assert load_released(other, tmp_path/'w.pth') == []
    for a, b in zip(net(image), other(image)):
        torch.testing.assert_close(a, b)
    backbone = ResNet38(tmp_path/'w.pth', SMALL).eval()
    torch.testing.assert_close(backbone(image)[2], net.backbone(image)[2])


def test_a_last_background_is_moved_to_the_front(image, tmp_path):
    net, other = camnet(1), camnet(2)
    state = as_released(net)
    w = state['fc8.weight']
    state['fc8.weight'] = torch.cat([w[1:], w[:1]])
    torch.save(state, tmp_path/'w.pth')
    load_released(other, tmp_path/'w.pth', background_last=True)
    for a, b in zip(net(image), other(image)):
        torch.testing.assert_close(a, b)


def test_a_missing_projector_is_returned_and_stays_random(image, tmp_path):
    net, other = camnet(1), camnet(2)
    own = other.projector.weight.clone()
    state = as_released(net)
    del state['fc_proj.weight']
    torch.save(state, tmp_path/'seam.pth')
    assert load_released(other, tmp_path/'seam.pth') == ['projector.weight']
    assert torch.equal(other.projector.weight, own)
    torch.testing.assert_close(other(image).refined, net(image).refined)


@pytest.mark.parametrize('gone', ['fc8', 'f8_3', 'f8_4', 'f9', 'b7.conv_branch1', 'bn7'])
def test_anything_else_missing_is_an_error(gone, tmp_path):
    net, other = camnet(1), camnet(2)
    state = {k: v for k, v in as_released(net).items() if not k.startswith(gone)}
    torch.save(state, tmp_path/'w.pth')
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(DataError, match='lacks the tensor'):
        load_released(other, tmp_path/'w.pth')
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())   # nothing loaded


def test_an_unexpected_pcm_is_an_error(tmp_path):
    torch.save(as_released(camnet(1)), tmp_path/'w.pth')
    with pytest.raises(DataError, match=r'refine\.\S+, which this network lacks'):
        load_released(camnet(2, pcm=False), tmp_path/'w.pth')


def test_names_of_a_camnet_stay():
    state = camnet(1).state_dict()
    renamed = rename_released(as_released(camnet(1)))
    assert set(renamed) == set(state) == set(rename_released(renamed))
    assert rename_released({'foo': 1}) == {'backbone.foo': 1}


def test_resnet38_from_its_own_names(small, image, tmp_path):
    from safetensors.torch import save_file
    save_file(small.state_dict(), tmp_path/'w.safetensors')
    net = ResNet38(tmp_path/'w.safetensors', SMALL).eval()
    torch.testing.assert_close(net(image)[2], small(image)[2])
    with pytest.raises(DataError, match='this network needs'):
        ResNet38(tmp_path/'w.safetensors', SMALL//2)


@pytest.mark.parametrize('content, words', [
    ({'state_dict': {}, 'epoch': 3}, "dict under 'state_dict'"),
    ([torch.ones(1)], 'holds a list')])
def test_files_that_are_no_state_dict_are_refused(content, words, tmp_path):
    torch.save(content, tmp_path/'w.pth')
    with pytest.raises(DataError, match=words):
        read_weights(tmp_path/'w.pth')


# --- torchvision ----------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def resnet50():
    torch.manual_seed(0)
    return randomise(models.resnet50()).eval()


@pytest.mark.parametrize('counters', [True, False], ids=['today', 'before counters'])
def test_torchvision_file(resnet50, counters, tmp_path):
    state = resnet50.state_dict()
    if not counters:
        state = {k: v for k, v in state.items() if 'num_batches' not in k}
    torch.save(state, tmp_path/'r50.pth')
    net = ResNet('resnet50', 16, tmp_path/'r50.pth').eval()
    x = torch.randn(1, 3, 64, 64)
    maps = net(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(512, 8, 8), (1024, 4, 4), (2048, 4, 4)]
    r = resnet50
    want = r.layer2(r.layer1(r.maxpool(r.relu(r.bn1(r.conv1(x))))))
    torch.testing.assert_close(maps[0], want)
    torch.testing.assert_close(maps[1], r.layer3(want))   # up to the first stride made a dilation
    (tmp_path/'r50.pth').unlink()


def test_torchvision_is_frozen_where_it_should_be():
    net = ResNet('resnet50', 8).train()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert net.net.layer4.training and not any(m.training or m.weight.requires_grad for m in norms)
    assert net.net.layer3[1].conv2.dilation == (2, 2)
    assert net.net.layer4[1].conv2.dilation == (4, 4)


def test_torchvision_refusals(resnet50, tmp_path):
    with torch.device('meta'):
        with pytest.raises(ValueError, match='8 or 16, not 32'):
            ResNet('resnet50', 32)
        with pytest.raises(ValueError, match='neither resnet50 nor resnet101'):
            ResNet('resnet18', 8)
    with pytest.raises(DataError, match='is missing'):
        ResNet('resnet50', 8, tmp_path/'none.pth')
    state = resnet50.state_dict()
    del state['layer4.2.conv3.weight']
    torch.save(state, tmp_path/'r50.pth')
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
    assert asked['weights_only'] and asked['check_hash']
    assert torch.equal(net.net.conv1.weight, resnet50.conv1.weight)
    def offline(url, **kw): raise OSError('no route')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', offline)
    with pytest.raises(DataError, match=r'resnet101 could not be fetched \(no route\): connect'):
        ResNet('resnet101', 8, 'hub')


def test_unreachable_timm_weights_are_an_error(monkeypatch):
    def offline(*a, **kw): raise OSError('')
    monkeypatch.setattr('timm.models.load_pretrained', offline)
    with pytest.raises(DataError, match='resnet18 could not be fetched'):
        Timm('resnet18', 16, 'hub')


# --- backbones by name ----------------------------------------------------------------------------

class Strided(nn.Module):
    "A backbone written outside the package."
    def __init__(self, stride, width=8):
        super().__init__()
        self.channels, self.stride = [width]*3, stride
        self.conv = nn.Conv2d(3, width, stride, stride)

    def forward(self, x): return [self.conv(x)]*3


def test_one_record_adds_a_backbone(monkeypatch, image):
    built = []
    def build(output_stride, weights):
        built.append((output_stride, weights))
        return Strided(output_stride)
    monkeypatch.setitem(BACKBONES, 'strided', Backbone('strided', build))
    net = build_backbone('strided', 8, 'mine.pth')
    assert built == [(8, 'mine.pth')] and isinstance(net, Strided)
    assert CamNet(net, 4)(image).cam.shape == (2, 4, 5, 4)


@pytest.mark.parametrize('name, kind, stride', [
    ('tiny', Tiny, 8),
    ('resnet38', ResNet38, 8),
    ('resnet50', ResNet, 16),
    ('resnet101', ResNet, 16)])
def test_records_build_the_networks_they_name(name, kind, stride):
    assert BACKBONES[name].name == name
    with torch.device('meta'):
        net = build_backbone(name)
    assert type(net) is kind and net.stride == stride
    assert not hasattr(net, 'net') or len(net.net.layer3) == {'resnet50': 6, 'resnet101': 23}[name]


def test_other_names_are_networks_of_timm():
    net = build_backbone('test_resnet', 16)
    assert type(net) is Timm and net.stride == 16
    with pytest.raises(ValueError, match='timm knows no network'):
        build_backbone('nothing')


def test_a_tiny_backbone_starts_from_a_camnet(tmp_path):
    torch.manual_seed(0)
    state = CamNet(Tiny(), 4).state_dict()
    torch.save(state, tmp_path/'w.pth')
    other = Tiny()
    load_backbone(other, tmp_path/'w.pth')
    for net in (build_backbone('tiny', weights=str(tmp_path/'w.pth')), other):
        assert all(torch.equal(v, state[f'backbone.{k}']) for k, v in net.state_dict().items())
    torch.save(Tiny(16).state_dict(), tmp_path/'bare.pth')
    with pytest.raises(DataError, match='lacks the tensor'):
        load_backbone(other, tmp_path/'bare.pth')
