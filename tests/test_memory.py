"Photographs of 12 million pixels, from tags to masks, in less than 3 GB."
import json
import os
import re
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from ppc import inference, pipeline
from ppc.backbones import Tiny
from ppc.cam import CamNet
from ppc.data import DataError, TagFolder, read_mask
from ppc.inference import read_cam, write_cams
from ppc.pipeline import run
from ppc.planning import dry_run
from ppc.predicting import load_model, predict
from ppc.scenes import make_scenes
from ppc.seam import PCM

SIZE = 4000, 3000
RUN = """
import json, resource, sys, time
from ppc.pipeline import run
began = time.time()
run(sys.argv[1], ['seam+ppc'], **json.loads(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024, round(time.time() - began))
"""


def photographs(root, n):
    "Stripes or rings on a gradient, each with a tag; photographs lie on their side, too."
    (root/'JPEGImages').mkdir(parents=True)
    y, x = np.mgrid[:SIZE[1], :SIZE[0]].astype(np.float32)
    rows = ['image,tags']
    for i in range(n):
        rng = np.random.default_rng(i)
        cy, cx = rng.uniform(.3, .7, 2)*SIZE[::-1]
        d = np.hypot(y - cy, x - cx)
        wave = np.sin((x if i % 2 else d)/rng.uniform(30, 60))
        image = np.stack([x/16, y/12, (x + y)/28], -1)
        image[d < 900] = (128 + 100*wave[d < 900])[:, None]*rng.uniform(.5, 1, 3)
        picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        picture = picture.rotate(90, expand=True) if i % 5 == 4 else picture
        picture.save(root/'JPEGImages'/f'{i}.jpg')
        rows.append(f'{i},{("rings", "stripes")[i % 2]}')
    (root/'classes.txt').write_text('background\nrings\nstripes\n')
    (root/'tags.csv').write_text('\n'.join(rows) + '\n')


def measured(folder, **parameters):
    "Megabytes and seconds of a run in a process of its own."
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'TQDM_DISABLE': '1'}
    command = [sys.executable, '-c', RUN, str(folder), json.dumps(parameters)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return *map(int, done.stdout.split()[-2:]), done.stderr


TINY = dict(
    backbone='tiny', epochs=1, resize=[320, 512], crop=320, target=128, batch_size=8,
    val_split='', threshold=.25, crf=False)
SEGMENTER = dict(segmenter='largefov', recipe='ssc', seg_options=dict(
    optimizer='AdamW', lr=3e-4, epochs=1, batch_size=2, crop=320, scales=[.75, 1., 1.25]))


@pytest.mark.slow
@pytest.mark.parametrize('refine, n, scales, segmenter', [
    ('crf', 20, [.5, 1.], SEGMENTER),
    ('psa', 2, [1.5], dict(segmenter='none')),
    ('irn', 2, [.5], dict(segmenter='none')),
])
def test_photographs_of_12_megapixels(tmp_path, capsys, refine, n, scales, segmenter):
    "The masks have the size of the photographs, and the output says that these were shrunk."
    photographs(tmp_path/'data', n)
    parameters = {**TINY, **segmenter, 'refine': refine, 'scales': scales}
    mb, seconds, said = measured(tmp_path/'run', data=str(tmp_path/'data'), **parameters)
    with capsys.disabled():
        print(f'\n{n} photographs of 12 MP, {refine}: {mb} MB, {seconds/60:.1f} minutes')
    assert mb < 3*1024
    assert f'{n} of {n} photographs are larger than 1024 pixels' in said
    for path in Path(tmp_path/'data'/'JPEGImages').iterdir():
        with Image.open(path) as image:
            assert read_mask(tmp_path/'run'/'masks'/f'{path.stem}.png').shape == image.size[::-1]


# --- the same on small images, with a low limit ---------------------------------------------------

QUICK = dict(
    seed=0, scenes=12, pretrain_epochs=1, epochs=1, batch_size=4, resize=[64, 96], crop=64,
    target=32, scales=[.5, 1.])


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp('scenes')/'made', 8, 4, seed=5)


def settings(scenes, **parameters):
    seg_options = dict(batch_size=4, crop=64)
    return QUICK | dict(data=str(scenes), seg_options=seg_options) | parameters


@pytest.mark.parametrize('refine, options', [
    ('crf', {}), ('psa', dict(crop=64, batch_size=4)), ('irn', dict(crop=64, batch_size=4))])
def test_a_run_at_a_limit(scenes, tmp_path, capsys, refine, options):
    "CAMs have the limit's size in their files; masks and their evaluation the photograph's."
    parameters = settings(scenes, refine=refine, refine_options=options, cam_size=80)
    result = run(tmp_path/'run', ['seam+ppc'], **parameters)
    assert result['mask_miou'] > 0 and result['segmentation_miou'] > 0
    for name in TagFolder(scenes).ids:
        cam = tmp_path/'run'/'seam+ppc'/'cams-train'/f'{name}.npz'
        assert read_cam(cam, enlarge=False)[0].shape[1:] == (80, 80)
        assert read_cam(cam, (128, 128))[0].shape[1:] == (128, 128)
        assert read_mask(tmp_path/'run'/'masks'/f'{name}.png').shape == (128, 128)
        with pytest.raises(DataError, match='128x128 but its image is 80x80'):
            read_cam(cam, (80, 80))
    assert '8 of 8 photographs are larger than 80 pixels' in capsys.readouterr().err


def test_the_prediction_of_a_run_at_a_limit(scenes, tmp_path):
    "A network is asked at the size at which its run worked, and gives the run's own masks."
    off = dict(refine='none', segmenter='none')
    run(tmp_path/'run', ['cam'], **settings(scenes, cam_size=80, **off))
    model, data = load_model(tmp_path/'run'/'cam'), TagFolder(scenes)
    assert model.limit == 80
    names = [[data.classes[1 + k] for k in tags.nonzero().flatten()] for tags in data.tags]
    tags = dict(zip(data.ids, names))
    predict(model, data.files.values(), tmp_path/'out', tags | dict.fromkeys(
        {*data.files} - {*data.ids}, []))
    for name in data.ids:
        own = read_mask(tmp_path/'run'/'cam'/'crf'/f'{name}.png')
        assert (read_mask(tmp_path/'out'/'masks'/f'{name}.png') == own).mean() > .995


def test_a_limit_above_the_images_changes_no_file(scenes, tmp_path):
    torch.manual_seed(0)
    net, data = CamNet(Tiny(), 7), TagFolder(scenes)
    for name, limit in (('plain', 0), ('limit', 128)):
        write_cams(net, data, tmp_path/name, (.5, 1.), limit=limit)
    for i in data.ids:
        plain, limit = ((tmp_path/name/f'{i}.npz').read_bytes() for name in ('plain', 'limit'))
        assert plain == limit


def test_groups_are_made_by_memory(scenes, monkeypatch):
    "At most so many pixels, after shrinking; one image always; never more than asked for."
    data, todo = TagFolder(scenes), range(8)
    def sizes(pixels, batch=8, limit=0):
        monkeypatch.setattr(inference, 'GROUP_PIXELS', pixels)
        return [len(group) for group in inference.group_by_size(data, todo, batch, limit)]
    assert sizes(3*128*128) == [3, 3, 2] and sizes(3*128*128, 2) == [2, 2, 2, 2]
    assert sizes(100) == [1]*8 and sizes(3*128*128, limit=64) == [8]
    monkeypatch.undo()
    assert 8*375*500 <= inference.GROUP_PIXELS < 3*768*1024


def test_maps_in_parts_are_those_of_all(monkeypatch):
    torch.manual_seed(0)
    net, images = CamNet(Tiny(), 4).eval(), torch.randn(3, 3, 40, 56)
    seen = []
    def maps(x):
        seen.append(len(x))
        return net(x).cam
    whole = inference.multi_scale_maps(maps, images, (.5, 1))
    monkeypatch.setattr(inference, 'FORWARD_PIXELS', 2*40*56)
    parts = inference.multi_scale_maps(maps, images, (.5, 1))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert seen == [6, 6, 6, 2, 2, 2]


def test_what_will_not_fit_is_said_before_training(scenes, tmp_path, monkeypatch):
    "By a run before its first stage, and by a plan, which then probes nothing."
    sentence = 'CAMs of seam need .* GB for a photograph of 128x128 at scale 1, and there are'
    monkeypatch.setattr(pipeline, 'memory_limit', lambda gpu: 2**30)
    with pytest.raises(ValueError, match=sentence):
        run(tmp_path/'run', ['seam'], **settings(scenes))
    assert not (tmp_path/'run'/'seam').exists()
    missing, table = dry_run(['seam'], 1, **settings(scenes))
    assert table is None and len(missing) == 2   # the CAMs and the segmenter
    assert re.search(sentence, missing[0]) and 'masks of the segmenter' in missing[1]


def test_the_memory_of_a_network_grows_with_the_photograph():
    net = CamNet(Tiny(), 3, refine=PCM(Tiny().channels[:2]))
    weights = sum(p.nbytes for p in net.parameters())
    sizes = [inference.forward_memory(net, (n, n), [1.]) for n in (32, 256, 1024)]
    assert weights < sizes[0] < 2*weights and 3*sizes[0] < sizes[1] < sizes[2]/3
    everything = (1024//8)**4*4*2   # all pairs, mirrored
    assert sizes[2] < everything/4
