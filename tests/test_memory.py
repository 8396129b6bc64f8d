"Photographs of 12 million pixels, from tags to masks, in less than 3 GB."
import os
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from ppc.data import read_mask

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
    import json
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
