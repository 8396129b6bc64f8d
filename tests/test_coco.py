"""COCO 2014: a small original of it, made of scenes.

Masks against painting pixel by pixel; files with wrong content."""
import json
import zipfile
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from ppc import coco as module
from ppc.coco import coco_classes, decode_runs, make_coco, paint, read_instances
from ppc.data import DataError, TagFolder, check, read_mask
from ppc.scenes import scene

# pycocotools 2.0.11 with NumPy 2
pytestmark = pytest.mark.filterwarnings('ignore:__array__ implementation')

# The ids have gaps; no image has a person or a cup
CATEGORIES = {1: 'person', 17: 'cat', 18: 'dog', 20: 'sheep', 23: 'bear', 24: 'zebra', 47: 'cup',
              88: 'teddy bear'}
ANIMALS = [17, 18, 23, 20, 24, 88]   # for cat, fox, bear, rabbit, zebra, panda of the scenes


def strips(inside):
    "Polygons that are boxes of one row each, and follow the pixels of a region."
    polygons = []
    for y, row in enumerate(inside):
        edges = np.flatnonzero(np.diff([0, *row.astype(int), 0]))
        for left, right in zip(edges[::2].tolist(), edges[1::2].tolist()):
            polygons.append([left, y, right, y, right, y + 1, left, y + 1])
    return polygons


def runs(inside):
    "The run-length code of a region, counted pixel by pixel down the columns."
    counts, last = [0], 0
    for v in inside.T.ravel().tolist():
        if v != last:
            counts.append(0)
        counts[-1] += 1
        last = v
    return {'size': list(inside.shape), 'counts': counts}


def _scene_rows(i, seed, tables, truth):
    """One scene as rows of a json: polygons, codes, and in every fifth a crowd.

    Returns the name and the image; adds to the tables and to the true masks."""
    image, mask, _ = scene(np.random.default_rng([14, seed, i]))
    image, mask = image[8:104], mask[8:104]
    name = f"COCO_{'train' if seed == 0 else 'val'}2014_{i:012}"
    want = np.zeros(mask.shape, np.uint8)
    for k, c in enumerate(c for c in np.unique(mask) if c):
        shape, category = mask == c, ANIMALS[c-1]
        crowd = i % 5 == 4 and k == 0
        outline = runs(shape) if crowd or i % 3 == 2 else strips(shape)
        tables['annotations'].append(dict(
            id=1000*seed + 10*i + k, image_id=i, category_id=category, iscrowd=int(crowd),
            area=float(shape.sum()), bbox=[0, 0, 1, 1], segmentation=outline))
        want[shape] = 255 if crowd else sorted(CATEGORIES).index(category) + 1
    tables['images'].append(_image_row(i, name) | dict(license=1))
    truth[name] = want
    return name, image


def _image_row(i, name): return dict(id=i, file_name=f'{name}.jpg', height=96, width=128)


def small_coco(folder, train=16, val=8, packed=False):
    """COCO 2014 in miniature, of scenes of 128 x 96.

    Each split has one more image without annotations. Returns the sources for `make_coco`, and
    the true masks by id."""
    folder, truth = Path(folder), {}
    (folder/'annotations').mkdir(parents=True)
    for seed, (split, n) in enumerate({'train': train, 'val': val}.items()):
        categories = [dict(id=k, name=v, supercategory='thing')
                      for k, v in reversed(CATEGORIES.items())]
        tables = dict(info={}, licenses=[], images=[], annotations=[], categories=categories)
        (folder/f'{split}2014').mkdir()
        for i in range(n):
            name, image = _scene_rows(i, seed, tables, truth)
            Image.fromarray(image).save(folder/f'{split}2014'/f'{name}.jpg', quality=92)
        empty = f'COCO_{split}2014_{n:012}'
        tables['images'].insert(0, _image_row(n, empty))
        Image.new('RGB', (128, 96), 'gray').save(folder/f'{split}2014'/f'{empty}.jpg')
        (folder/'annotations'/f'instances_{split}2014.json').write_text(json.dumps(tables))
    sources = [folder/'train2014', folder/'val2014', folder/'annotations']
    if packed:
        sources = [_zipped(source, folder) for source in sources]
    return sources, truth


def _zipped(source, folder):
    name = 'annotations_trainval2014' if source.name == 'annotations' else source.name
    path = folder/f'{name}.zip'
    with zipfile.ZipFile(path, 'w') as z:
        for f in sorted(source.iterdir()):
            z.write(f, f'{source.name}/{f.name}')
    return path


def fails(what, *words):
    "The call raises `DataError` with all the words in its message."
    with pytest.raises(DataError) as e:
        what()
    for w in words:
        assert w in str(e.value), str(e.value)


def contents(root):
    paths = [p for p in root.rglob('*') if p.is_file() and 'originals' not in p.parts]
    return {p.relative_to(root): p.read_bytes() for p in paths}


# ---- the whole dataset


@pytest.mark.parametrize('packed', [False, True])
def test_small_coco(tmp_path, packed, capsys):
    sources, truth = small_coco(tmp_path/'original', packed=packed)
    counts = make_coco(tmp_path/'made', sources)
    assert counts == dict(classes=8, train=16, val=8, without_tags=2)
    assert capsys.readouterr().out == ''
    for split, n in (('train', 16), ('val', 8)):
        folder = TagFolder(tmp_path/'made', split)
        check(folder, masks=True)
        assert len(folder) == n and folder.ids == sorted(folder.ids) and folder.has_masks
        assert folder.classes == ['background', 'person', 'cat', 'dog', 'sheep', 'bear', 'zebra',
                                  'cup', 'teddy_bear']
        for i, name in enumerate(folder.ids):
            # polygons along pixels, and codes, are exact
            assert (folder.mask(i) == truth[name]).all()
            tags = {int(c) for c in folder.tags[i].nonzero() + 1}
            painted = {*np.unique(truth[name]).tolist()}
            # a crowd is a tag, too
            assert painted - {0, 255} <= tags and len(tags - painted) == (255 in painted)
    assert not TagFolder(tmp_path/'made').tags[:, [0, 6]].any()
    assert all(p.is_symlink() for p in (tmp_path/'made'/'JPEGImages').iterdir())


def test_again_changes_nothing_and_continues(tmp_path):
    sources, _ = small_coco(tmp_path/'original', 6, 3)
    make_coco(tmp_path/'made', sources)
    masks = sorted((tmp_path/'made'/'SegmentationClass').iterdir())
    before = contents(tmp_path/'made')
    times = [p.stat().st_mtime_ns for p in masks]
    masks[0].unlink()
    (tmp_path/'made'/'tags.csv').unlink()
    make_coco(tmp_path/'made', sources, workers=1)
    assert contents(tmp_path/'made') == before
    assert [p.stat().st_mtime_ns for p in masks[1:]] == times[1:]


def test_a_finished_mask_is_not_painted_again(tmp_path, monkeypatch):
    sources, _ = small_coco(tmp_path/'original', 2, 1)
    make_coco(tmp_path/'made', sources)
    monkeypatch.setattr(module, 'paint', lambda *a: pytest.fail('painted again'))
    make_coco(tmp_path/'made', sources)


def test_nested_and_linked_sources(tmp_path):
    "Three folders deep, behind a link that leads in a circle."
    _, truth = small_coco(tmp_path/'a'/'b'/'c', 2, 1)
    (tmp_path/'a'/'b'/'back').symlink_to(tmp_path/'a')
    (tmp_path/'door').mkdir()
    (tmp_path/'door'/'coco').symlink_to(tmp_path/'a')
    make_coco(tmp_path/'made', [tmp_path/'door'])
    for i, mask in truth.items():
        assert (read_mask(tmp_path/'made'/'SegmentationClass'/f'{i}.png') == mask).all()


def test_no_sources_says_what_to_fetch(tmp_path):
    archives = 'train2014.zip', 'val2014.zip', 'annotations_trainval2014.zip'
    fails(lambda: make_coco(tmp_path/'made'), *archives, 'cocodataset.org')
    fails(lambda: make_coco(tmp_path/'made', [tmp_path/'nowhere.zip']), 'nowhere.zip', 'missing')
    assert not (tmp_path/'made').exists()


@pytest.mark.parametrize('lost', ['train2014', 'val2014', 'annotations'])
def test_a_source_is_missing(tmp_path, lost):
    sources, _ = small_coco(tmp_path/'original', 2, 1)
    word = 'instances_train2014.json' if lost == 'annotations' else 'COCO_'
    rest = [source for source in sources if source.name != lost]
    fails(lambda: make_coco(tmp_path/'made', rest), word, 'none of the sources')
    assert not (tmp_path/'made').exists()


# ---- masks


def inside_of(annotation, size):
    "The pixels inside an outline of boxes or in a code, as zeros and ones."
    outline = annotation['segmentation']
    if isinstance(outline, dict):
        flat = [v for k, n in enumerate(outline['counts']) for v in [k % 2]*n]
        return np.array(flat).reshape(size[::-1]).T
    board = Image.new('1', size[::-1])
    for x0, y0, _, _, x1, y1, _, _ in outline:
        ImageDraw.Draw(board).rectangle([x0, y0, x1 - 1, y1 - 1], fill=1)
    return np.array(board).astype(int)


def literal_mask(annotations, number, size):
    """The rule, pixel by pixel: the smallest object that covers it, of equals the one with the
    largest id; 255 where only a crowd does."""
    boards = []
    for a in annotations:
        inside = inside_of(a, size)
        boards.append((a, inside, inside.sum()))
    mask = np.zeros(size, int)
    for y in range(size[0]):
        for x in range(size[1]):
            here = [(area, -a['id'], number[a['category_id']])
                    for a, inside, area in boards if inside[y, x] and not a['iscrowd']]
            crowd = any(inside[y, x] and a['iscrowd'] for a, inside, _ in boards)
            mask[y, x] = min(here)[2] if here else 255*crowd
    return mask


@st.composite
def box(draw, h=20, w=24):
    x, y = draw(st.integers(0, w - 1)), draw(st.integers(0, h - 1))
    x1, y1 = draw(st.integers(x + 1, w)), draw(st.integers(y + 1, h))
    return [x, y, x1, y, x1, y1, x, y1]


@st.composite
def drawing(draw):
    "Up to six annotations of boxes, some in parts, some as codes, some crowds."
    rows = []
    for k in range(draw(st.integers(0, 6))):
        boxes = draw(st.lists(box(), min_size=1, max_size=3))
        inside = np.zeros((20, 24), int)
        for x, y, _, _, x1, y1, _, _ in boxes:
            inside[y:y1, x:x1] = 1
        category = draw(st.sampled_from([1, 5, 90]))
        crowd = int(draw(st.integers(0, 3)) == 0)
        outline = runs(inside) if draw(st.booleans()) else boxes
        rows.append(dict(id=k, image_id=1, category_id=category, iscrowd=crowd,
                         segmentation=outline))
    return rows


@settings(max_examples=60, deadline=None)
@given(drawing(), st.randoms())
def test_masks_are_the_literal_ones(rows, random):
    "Exactly, for boxes along the pixels and for codes; in any order of the rows."
    number = {1: 1, 5: 2, 90: 3}
    shuffled = random.sample(rows, len(rows))
    got, want = paint(shuffled, number, (20, 24)), literal_mask(rows, number, (20, 24))
    assert (got == want).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 31), st.floats(1, 23)),
                min_size=3, max_size=3, unique=True))
def test_slanted_outlines(points):
    "A triangle is right wherever a pixel's centre is more than a pixel from its outline."
    a, b, c = points
    triangle = dict(id=1, category_id=1, segmentation=[[v for p in points for v in p]])
    mask = paint([triangle], {1: 1}, (24, 32))
    for y in range(24):
        for x in range(32):
            sides = [side_and_distance(p, q, x + .5, y + .5) for p, q in ((a, b), (b, c), (c, a))]
            signed, near = zip(*sides)
            if min(near) > 1:
                assert mask[y, x] == (min(signed) > 0 or max(signed) < 0)


def side_and_distance(p, q, x, y):
    "Of a point: its signed distance from the line through p and q, and that from the segment."
    (px, py), (qx, qy) = p, q
    dx, dy = qx - px, qy - py
    length = max(np.hypot(dx, dy), 1e-9)
    signed = (dx*(y - py) - dy*(x - px))/length
    t = np.clip((dx*(x - px) + dy*(y - py))/length**2, 0, 1)
    return signed, np.hypot(px + t*dx - x, py + t*dy - y)


def test_parts_of_two_points_enclose_nothing():
    thing = dict(id=1, category_id=1, segmentation=[[1, 1, 9, 9], [2, 2, 6, 2, 6, 6, 2, 6], [3, 3]])
    assert paint([thing], {1: 1}, (12, 12)).sum() == 16


def test_equal_sizes_go_to_the_later_id():
    a = dict(id=1, category_id=1, segmentation=[[0, 0, 6, 0, 6, 6, 0, 6]])
    b = dict(id=2, category_id=2, segmentation=[[3, 0, 9, 0, 9, 6, 3, 6]])
    for rows in ([a, b], [b, a]):
        assert paint(rows, {1: 1, 2: 2}, (6, 12))[0].tolist() == [1]*3 + [2]*6 + [0]*3


def test_crowds_are_below_everything():
    crowd = dict(id=9, category_id=1, iscrowd=1, segmentation=[[0, 0, 2, 0, 2, 2, 0, 2]])
    table = dict(id=1, category_id=2, iscrowd=0, segmentation=[[1, 0, 12, 0, 12, 6, 1, 6]])
    mask = paint([crowd, table], {1: 1, 2: 2}, (6, 12))
    assert mask[0].tolist() == [255] + [2]*11 and (mask == 255).sum() == 2


def test_without_annotations_the_mask_is_empty(): assert not paint([], {}, (5, 7)).any()


# ---- files with wrong content


@pytest.fixture
def valid(tmp_path):
    "Valid tables, and a function that reads them as they are then: change them, then call it."
    outline = [[1, 1, 9, 1, 9, 9]]
    tables = dict(
        images=[dict(id=1, file_name='a.jpg', height=20, width=24)],
        categories=[dict(id=3, name='cat')],
        annotations=[dict(id=5, image_id=1, category_id=3, iscrowd=0, segmentation=outline)])

    def read():
        (tmp_path/'instances.json').write_text(json.dumps(tables))
        return read_instances(tmp_path/'instances.json')
    return tables, read


def test_valid_tables(valid):
    tables, read = valid
    got = read()
    assert got['images'] == tables['images']
    polygons = [list(p) for p in got['annotations'][0]['segmentation']]
    assert polygons == tables['annotations'][0]['segmentation']


@pytest.mark.parametrize('content', [
    b'', b'{"images": [', b'[1, 2]', b'"images"', b'null', b'\xff\xfe{}',
    b'{"images": {}, "annotations": [], "categories": []}', b'['*100000])
def test_damaged_json(tmp_path, content):
    (tmp_path/'instances.json').write_bytes(content)
    fails(lambda: read_instances(tmp_path/'instances.json'), 'instances.json')


def test_missing_json(tmp_path):
    fails(lambda: read_instances(tmp_path/'instances.json'), 'instances.json')


@pytest.mark.parametrize('table, key', [(t, k) for t, keys in module.FIELDS.items() for k in keys])
def test_a_key_is_missing_or_of_another_kind(valid, table, key):
    tables, read = valid
    for value in (None, [1], 'x', 1.5):
        if isinstance(value, module.FIELDS[table][key]):
            continue
        tables[table][0] = {**tables[table][0], key: value}
        if value is None:
            del tables[table][0][key]
        fails(read, 'instances.json', key)


@pytest.mark.parametrize('table', module.FIELDS)
def test_a_table_is_missing_or_holds_no_rows(valid, table):
    tables, read = valid
    for value in ([], {}, 3, [7]):
        tables[table] = value
        fails(read, 'instances.json', table)
    del tables[table]
    fails(read, 'instances.json', table)


@pytest.mark.parametrize('table', module.FIELDS)
def test_the_same_id_twice(valid, table):
    tables, read = valid
    tables[table].append(dict(tables[table][0]))
    fails(read, 'instances.json', table, 'same id')


@pytest.mark.parametrize('change, word', [
    (dict(image_id=2), 'image 2'), (dict(category_id=4), 'category 4')])
def test_an_annotation_of_nothing(valid, change, word):
    tables, read = valid
    tables['annotations'][0].update(change)
    fails(read, 'instances.json', 'annotation 5', word)


OUTLINES = [
    ([], 'three points'),
    ([[]], 'three points'),
    ([[1, 1, 9, 9]], 'three points'),
    ([[1, 1, 9, 1, 9, 9, 2]], 'half a point'),
    ([[0, 0, 9, 0, 1e9, 9]], 'far outside'),
    ([[0, 0, 9, 0, float('nan'), 9]], 'far outside'),
    ([[0, 0, 9, 0, 9, float('-inf')]], 'far outside'),
    ([['1', 1, 9, 1, 9, 9]], 'segmentation'),
    (['abcdef'], 'segmentation'),
    ([5], 'segmentation'),
    ([[[1, 1], [9, 1], [9, 9]]], 'segmentation'),
    ([[10**400, 1, 9, 1, 9, 9]], 'segmentation'),
    ('polygon', 'segmentation'),
    ({}, 'runs'),
    ({'size': [20, 24]}, 'runs'),
    ({'size': [24, 20], 'counts': [480]}, 'runs'),
    ({'size': [20, 24], 'counts': 'PQ1'}, 'runs'),
    ({'size': [20, 24], 'counts': [5, 5]}, 'add up'),
    ({'size': [20, 24], 'counts': [500, -20]}, 'add up'),
    ({'size': [20, 24], 'counts': [479.5, .5]}, 'add up'),
    ({'size': [20, 24], 'counts': [2**32, 480]}, 'add up'),
]


@pytest.mark.parametrize('outline, word', OUTLINES)
def test_invalid_outlines(valid, outline, word):
    tables, read = valid
    tables['annotations'][0]['segmentation'] = outline
    fails(read, 'instances.json', word)


@pytest.mark.parametrize('name', [
    '../a.jpg', '/etc/passwd', 'val2014/../a.jpg', 'a/../../b.jpg', '..\\a.jpg', 'C:\\a.jpg',
    'c:a.jpg', '', '..', '.'])
def test_a_name_that_leads_out_of_the_folder(valid, name):
    tables, read = valid
    tables['images'][0]['file_name'] = name
    fails(read, 'instances.json', repr(name))


def test_classes_of_any_number():
    def tables(n):
        return {'categories': [dict(id=i, name=f'thing {i}') for i in range(3*n, 0, -3)]}
    names, number = coco_classes(tables(254))
    assert len(names) == 255 and names[254] == 'thing_762'
    assert number == {3*c: c for c in range(1, 255)}
    fails(lambda: coco_classes(tables(255)), '255', '254')


def damaged(tmp_path, change, split='train'):
    "Make a small COCO with one json changed, and return the call of `make_coco` on it."
    sources, _ = small_coco(tmp_path/'original', 3, 2)
    path = tmp_path/'original'/'annotations'/f'instances_{split}2014.json'
    tables = json.loads(path.read_text())
    change(tables)
    path.write_text(json.dumps(tables))
    return lambda: make_coco(tmp_path/'made', sources)


def test_a_photograph_is_missing(tmp_path):
    run = damaged(tmp_path, lambda t: None)
    (tmp_path/'original'/'train2014'/'COCO_train2014_000000000002.jpg').unlink()
    fails(run, 'COCO_train2014_000000000002.jpg', 'missing', 'train2014.zip')
    assert not (tmp_path/'made').exists()


def test_a_photograph_without_annotations_may_be_missing(tmp_path):
    run = damaged(tmp_path, lambda t: None)
    (tmp_path/'original'/'train2014'/'COCO_train2014_000000000003.jpg').unlink()
    assert run()['without_tags'] == 2


def test_other_categories_in_val(tmp_path):
    more = dict(id=90, name='toothbrush')
    run = damaged(tmp_path, lambda tables: tables['categories'].append(more), 'val')
    fails(run, 'instances_train2014.json', 'instances_val2014.json', 'categories')


def test_an_image_of_both_splits(tmp_path):
    other = 'COCO_train2014_000000000001.jpg'
    run = damaged(tmp_path, lambda tables: tables['images'][1].update(file_name=other), 'val')
    folder = tmp_path/'original'/'val2014'
    for i in (0, 1):
        image = (folder/f'COCO_val2014_{i:012}.jpg').read_bytes()
        (folder/f'COCO_train2014_{i:012}.jpg').write_bytes(image)
    fails(run, 'COCO_train2014_000000000001', 'train', 'val')


def test_two_photographs_of_one_name(tmp_path):
    other = 'COCO_train2014_000000000000.png'
    run = damaged(tmp_path, lambda tables: tables['images'][2].update(file_name=other))
    Image.new('RGB', (128, 96)).save(tmp_path/'original'/'train2014'/other)
    fails(run, 'instances_train2014.json', 'same name')


@pytest.mark.parametrize('size', [dict(height=128), dict(width=10**9), dict(height=-96)])
def test_the_size_is_not_that_of_the_photograph(tmp_path, size):
    "The photograph is compared before a mask is allocated."
    def change(tables):
        tables['images'][1].update(size)
        for a in tables['annotations']:
            a['segmentation'] = [[1, 1, 9, 1, 9, 9]]
    fails(damaged(tmp_path, change), 'COCO_train2014_000000000000.jpg', '128x96')


def test_a_photograph_that_cannot_be_read(tmp_path):
    run = damaged(tmp_path, lambda t: None)
    name = 'COCO_val2014_000000000001.jpg'
    (tmp_path/'original'/'val2014'/name).write_bytes(b'GIF89a no photograph')
    fails(run, name, 'cannot be read')


def test_a_class_name_that_cannot_be_one(tmp_path):
    run = damaged(tmp_path, lambda t: t['categories'][0].update(name=' '))
    path = tmp_path/'original'/'annotations'/'instances_val2014.json'
    path.write_text(path.read_text().replace('"teddy bear"', '" "'))
    fails(run, 'class')


def test_an_archive_that_leads_out(tmp_path):
    sources, _ = small_coco(tmp_path/'original', 2, 1, packed=True)
    with zipfile.ZipFile(sources[0], 'a') as z:
        z.writestr('../../escaped.txt', 'here')
    fails(lambda: make_coco(tmp_path/'made', sources), 'train2014.zip', 'escaped.txt')
    assert not list(tmp_path.rglob('escaped.txt'))


# ---- what CVAT and Roboflow write

def pack(counts):
    "A code compressed by pycocotools."
    code = rle.frPyObjects({'size': [1, sum(counts)], 'counts': [*counts]}, 1, sum(counts))
    return code['counts'].decode()


@pytest.mark.parametrize('text, counts', [
    ('0', [0]),
    ('5', [5]),
    ('o0', [31]),  # 15 and a continuation, then 0: without it bit 5 would be the sign
    ('P1', [32]),
    ('3242', [3, 2, 4, 4]),  # the fourth is 2 more than the second
    ('324N4', [3, 2, 4, 0, 8]),  # N is -2
    ('PPP1', [2**15]),
])
def test_compressed_codes_by_hand(text, counts):
    assert decode_runs(text) == counts
    if sum(counts) and 0 not in counts[1:]:
        assert pack(counts) == text


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=60), st.booleans())
def test_compressed_codes_as_pycocotools_writes_them(counts, begins_inside):
    counts = [0, *counts] if begins_inside else counts
    assert decode_runs(pack(counts)) == counts


@given(st.text(st.characters(min_codepoint=0, max_codepoint=300), max_size=40))
def test_any_text_as_a_code(text):
    "It is a list of runs or none; nothing is raised."
    found = decode_runs(text)
    assert found is None or all(isinstance(n, int) for n in found)


@pytest.mark.parametrize('text', ['', 'o', 'PPP', 'p', '/', ' ', 'é', 'P'*9 + '1', 'o'*100 + '0'])
def test_texts_that_are_no_code(valid, text):
    tables, read = valid
    tables['annotations'][0]['segmentation'] = {'size': [20, 24], 'counts': text}
    assert decode_runs(text) is None
    fails(read, 'instances.json', 'runs')


def test_compressed_codes_give_the_same_masks(tmp_path):
    sources, truth = small_coco(tmp_path/'original', 6, 3)
    for split in ('train', 'val'):
        path = tmp_path/'original'/'annotations'/f'instances_{split}2014.json'
        tables = json.loads(path.read_text())
        for a in tables['annotations']:
            if isinstance(a['segmentation'], dict):
                code = rle.frPyObjects(a['segmentation'], *a['segmentation']['size'])
                a['segmentation']['counts'] = code['counts'].decode()
        assert any(isinstance(a['segmentation'], dict) for a in tables['annotations'])
        path.write_text(json.dumps(tables))
    make_coco(tmp_path/'made', sources)
    for i, want in truth.items():
        assert (read_mask(tmp_path/'made'/'SegmentationClass'/f'{i}.png') == want).all()


@pytest.mark.parametrize('prefix, moved', [
    ('images/{}/', False),  # as CVAT writes, the folders are not there
    ('images/{}/', True),
    ('{}2014/', False),  # the folder of the source
    ('images\\{}\\', True),
    ('./', False),
])
def test_names_with_a_folder(tmp_path, prefix, moved):
    sources, truth = small_coco(tmp_path/'original', 4, 2)
    for split in ('train', 'val'):
        path = tmp_path/'original'/'annotations'/f'instances_{split}2014.json'
        tables = json.loads(path.read_text())
        for image in tables['images']:
            image['file_name'] = prefix.format(split) + image['file_name']
        path.write_text(json.dumps(tables))
        if moved:
            (tmp_path/'original'/f'{split}2014'/'images').mkdir()
            for f in (tmp_path/'original'/f'{split}2014').glob('*.jpg'):
                new = f.parent/'images'/split/f.name
                new.parent.mkdir(exist_ok=True)
                f.rename(new)
    counts = make_coco(tmp_path/'made', sources)
    assert counts == dict(classes=8, train=4, val=2, without_tags=2)
    for i, want in truth.items():
        assert (read_mask(tmp_path/'made'/'SegmentationClass'/f'{i}.png') == want).all()


def test_a_name_with_a_folder_that_is_missing_or_there_twice(tmp_path):
    def rename(tables):
        for image in tables['images']:
            image['file_name'] = 'deep/' + image['file_name']
    run = damaged(tmp_path, rename)
    name = 'COCO_train2014_000000000001.jpg'
    folder = tmp_path/'original'/'train2014'
    photograph = (folder/name).read_bytes()
    (folder/'other').mkdir()
    (folder/'other'/name).write_bytes(photograph)
    fails(run, f'deep/{name} is 2 times in the sources')
    (folder/'deep').mkdir()
    (folder/name).rename(folder/'deep'/name)
    assert run()['train'] == 3  # the folder decides
    (folder/'deep'/name).unlink()
    (folder/'other'/name).unlink()
    fails(run, f'deep/{name} is in none of them')


def test_codes_are_counted_as_pycocotools_does():
    "`runs` of this file against the library."
    inside = scene(np.random.default_rng(3))[1] > 0
    code = rle.frPyObjects(runs(inside), *inside.shape)
    assert (rle.decode(code).astype(bool) == inside).all() and rle.area(code) == inside.sum()
