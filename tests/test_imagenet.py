"ImageNet's classifier as a CAM network: its maps are the classifier's scores, place by place."
from pathlib import Path
import numpy as np
import pytest
import skimage
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from typer.testing import CliRunner
from ppc.cli import app
from ppc.data import normalise, read_mask
from ppc.lite import lite_path, lite_state
from ppc.predicting import (
    IMAGENET_BACKBONE,
    find_imagenet,
    imagenet_guess,
    imagenet_model,
    imagenet_names,
)

pytestmark = pytest.mark.skipif(
    lite_path(IMAGENET_BACKBONE) is None, reason=f'{IMAGENET_BACKBONE} is not installed')
CAT = Path(skimage.__file__).parent/'data'/'chelsea.png'


@pytest.fixture(scope='module')
def classifier():
    net = timm.create_model(IMAGENET_BACKBONE).eval()
    net.load_state_dict(lite_state(IMAGENET_BACKBONE, [len(level) for level in net.blocks]))
    return net


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_every_synonym_finds_its_class():
    names = imagenet_names()
    assert len(names) == 1000
    for i in range(0, 1000, 37):
        assert all(i in find_imagenet(name.upper()) for name in names[i])
    assert find_imagenet('crane') == [134, 517]


@pytest.mark.parametrize('tag, words', [
    ('cat', 'tiger cat.*egyptian cat'), ('tabbi', 'tabby'), ('qqqqqq', r"class 'qqqqqq'\.")])
def test_an_unknown_name_gets_those_like_it(tag, words):
    with pytest.raises(ValueError, match=words):
        find_imagenet(tag)


@torch.no_grad()
def test_pooled_maps_are_the_classifiers_scores(classifier):
    "A map's mean over places is the score of its class, without the bias (Eq. 2)."
    tags = ['Egyptian cat', 'espresso']
    model = imagenet_model(tags)
    x = normalise(Image.open(CAT).convert('RGB').resize((224, 224)))[None]
    maps = model.network(x).cam[0]
    features = model.network.backbone(x)[-1].mean((2, 3))
    rows = [find_imagenet(tag)[0] for tag in tags]
    want = features @ classifier.classifier.weight[rows].T
    torch.testing.assert_close(maps[1:].mean((1, 2)), want[0], rtol=1e-4, atol=1e-4)
    assert want[0, 0] > want[0, 1]


@torch.no_grad()
def test_guesses_are_the_classifiers(classifier):
    image = Image.open(CAT).convert('RGB')
    prepare = create_transform(**resolve_data_config(model=classifier))
    want = classifier(prepare(image)[None]).softmax(1)[0]
    found = imagenet_guess(image, 3)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    for name, p in found.items():
        assert abs(sum(want[i].item() for i in find_imagenet(name)) - p) < 1e-4


def test_a_name_of_two_classes_is_either():
    weight = imagenet_model(['crane']).network.classifier.weight[1].flatten()
    rows = lite_state(IMAGENET_BACKBONE, [1, 2, 2, 3, 3, 4, 1])['classifier.weight'][[134, 517]]
    torch.testing.assert_close(weight, rows.mean(0))


def test_the_command_makes_a_mask(tmp_path):
    out = tmp_path/'out'
    done = call('predict', 'imagenet', CAT, '--tag', 'tabby', '--out', out)
    assert done.exit_code == 0, done.output
    mask = read_mask(out/'masks'/'chelsea.png')
    assert mask.shape == np.asarray(Image.open(CAT)).shape[:2]
    assert .5 < (mask == 1).mean() < .95   # the cat fills most of the photograph
    assert mask[150, 220] == 1 and mask[20, 440] == 0   # its forehead; the wall
    assert 'chelsea,tabby,' in (out/'areas.csv').read_text()


def test_the_command_without_a_tag_says_what_it_sees(tmp_path):
    done = call('predict', 'imagenet', CAT, '--out', tmp_path/'out')
    assert done.exit_code == 1 and '--tag' in done.output and 'Egyptian cat' in done.output
    assert not (tmp_path/'out').exists()


def test_a_table_of_tags_is_for_each_photograph(tmp_path):
    (tmp_path/'tags.csv').write_text('image,tags\nchelsea,tabby\ncoffee,espresso\n')
    cup = CAT.with_name('coffee.png')
    tags = '--tags', tmp_path/'tags.csv', '--out', tmp_path/'out'
    done = call('predict', 'imagenet', CAT, cup, *tags)
    assert done.exit_code == 0, done.output
    table = (tmp_path/'out'/'areas.csv').read_text()
    assert 'chelsea,tabby' in table and 'coffee,espresso' in table and 'coffee,tabby' not in table
