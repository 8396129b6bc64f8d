"""VOC 2012 and SBD from small originals in their own formats.

Lists, tags and masks, and everything that may be wrong with them."""
import io
import os
import pickle
import resource
import shutil
import struct
import tarfile
import tempfile
import zipfile
from functools import partial
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import sparse
from scipy.io import savemat
from ppc import voc
from ppc.data import DataError, TagFolder, check, read_mask, write_mask
from ppc.folders import folder_report
from ppc.scenes import scene
from ppc.voc import (
    VOC_CLASSES,
    VOC_SIZES,
    check_splits,
    make_voc,
    read_cls_labels,
    read_ids,
    read_objects,
    read_sbd_mask,
    train_aug,
)

ANIMALS = ['background', 'cat', 'dog', 'horse', 'cow', 'sheep', 'bird']   # for those of a scene
VOC_NUMBERS = np.array([VOC_CLASSES.index(name) for name in ANIMALS], np.uint8)


def image_id(n): return f'20{7 + n//10:02}_{37*n + 2:06}'


def small_voc(folder, archives=False, seed=0):
    """VOC 2012 with its test images, and SBD, of 24 scenes, in the original formats.

    Returns the sources for `make_voc`: VOCdevkit and benchmark_RELEASE, or the three archives.
    VOC train has 8 images, val 6, test 4; SBD has 4 of train, 3 of val and 6 more; train_aug is 14.
    """
    folder = Path(folder)
    ids = [image_id(n) for n in range(24)]
    train, val, test, more = ids[:8], ids[8:14], ids[14:18], ids[18:]
    devkit, sbd = folder/'VOCdevkit', folder/'benchmark_RELEASE'
    voc, dataset = devkit/'VOC2012', sbd/'dataset'
    for n, i in enumerate(ids):
        image, mask = _picture(seed, n)
        _save(voc/'JPEGImages'/f'{i}.jpg', image)
        if i not in test:
            _text(voc/'Annotations'/f'{i}.xml', _annotation(mask, n))
        if i in train + val:
            write_mask(_with_parent(voc/'SegmentationClass'/f'{i}.png'), _bordered(mask))
        if i in train[4:] + val[3:] + more:
            _save(dataset/'img'/f'{i}.jpg', image)
            _save_mat(dataset/'cls'/f'{i}.mat', mask)
    for name, part in dict(train=train, val=val, trainval=train + val, test=test).items():
        _text(voc/'ImageSets'/'Segmentation'/f'{name}.txt', '\n'.join(part) + '\n')
    _text(dataset/'train.txt', '\n'.join(train[4:] + val[3:5] + more[:3]) + '\n')
    _text(dataset/'val.txt', '\n'.join(val[5:] + more[3:]))     # without a last line end
    return _packed(folder, devkit, sbd, test) if archives else [devkit, sbd]


def _picture(seed, n):
    "Image and mask of a scene: 96 high and 120 wide, or for every third the other way round."
    image, mask, _ = scene(np.random.default_rng([seed, 7, n]))
    h, w = (96, 120) if n % 3 else (120, 96)
    return image[-h:, :w], VOC_NUMBERS[mask[-h:, :w]]


def _annotation(mask, n):
    """An object of each class, in every third image two.

    In every other image the objects of the last class are difficult."""
    present = [c for c in np.unique(mask) if c] or [8]
    objects = []
    for k, c in enumerate(present):
        ys, xs = np.where(mask == c)
        if not len(ys):
            ys, xs = np.array([3, 9]), np.array([2, 8])
        hard = int(n % 2 and k == len(present) - 1)
        for _ in range(2 if n % 3 == 0 else 1):
            objects.append(_object(VOC_CLASSES[c], hard, ys, xs))
    size = f'<width>{mask.shape[1]}</width><height>{mask.shape[0]}</height><depth>3</depth>'
    return (f'<annotation><folder>VOC2012</folder><size>{size}</size><segmented>1</segmented>'
            f'{"".join(objects)}</annotation>')


def _object(name, hard, ys, xs):
    return f'''<object><name>{name}</name><pose>Left</pose><truncated>0</truncated>
      <difficult>{hard}</difficult>
      <bndbox><xmin>{xs.min() + 1}</xmin><ymin>{ys.min() + 1}</ymin>
      <xmax>{xs.max() + 1}</xmax><ymax>{ys.max() + 1}</ymax></bndbox>
      <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin>
      <xmax>4</xmax><ymax>4</ymax></bndbox></part></object>'''


def _bordered(mask):
    "The mask with 255 along the outlines, as VOC's."
    around = np.pad(mask, 1, mode='edge')
    near = np.stack([around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]])
    return np.where((near != mask).any(0), 255, mask)


def _save_mat(path, mask):
    "A mask in all fields of SBD's files."
    edges = np.empty((20, 1), object)
    for c in range(20):
        edges[c, 0] = sparse.csc_matrix(_bordered(mask == c + 1) == 255)
    present = np.array([c for c in np.unique(mask) if c], np.uint8)[:, None]
    content = {'Boundaries': edges, 'Segmentation': mask, 'CategoriesPresent': present}
    savemat(_with_parent(path), {'GTcls': content}, do_compression=True)


def _packed(folder, devkit, sbd, test):
    "The three archives as they are published."
    trainval, test_only = folder/'VOCtrainval_11-May-2012.tar', folder/'VOC2012test.tar'
    benchmark = folder/'benchmark.tgz'
    with tarfile.open(trainval, 'w') as a, tarfile.open(test_only, 'w') as b:
        for path in sorted(p for p in devkit.rglob('*') if p.is_file()):
            archive = b if path.stem in ('test', *test) else a
            archive.add(path, path.relative_to(folder))
    with tarfile.open(benchmark, 'w:gz') as c:
        c.add(sbd, sbd.name)
    return [trainval, test_only, benchmark]


def _with_parent(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _text(path, text): _with_parent(path).write_text(text)
def _save(path, image): Image.fromarray(image).save(_with_parent(path), quality=92)


# ---- tests


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The folder, its sources, and the counts; not to be written to."
    folder = tmp_path_factory.mktemp('voc')
    sources = small_voc(folder/'originals')
    return folder/'voc', sources, make_voc(folder/'voc', sources)


@pytest.fixture
def sources(made, tmp_path):
    "A copy of the sources that a test may damage."
    shutil.copytree(made[1][0].parent, tmp_path/'originals')
    return [tmp_path/'originals'/s.name for s in made[1]]


COUNTS = {'train': 8, 'val': 6, 'train_aug': 14, 'test': 4, 'masks': 20, 'without a tag': 0}


def fails(what, *words):
    "The call raises `DataError` with all the words in its message."
    with pytest.raises(DataError) as e:
        what()
    for w in words:
        assert str(w) in str(e.value), str(e.value)


def list_file(sources, name, dataset='voc'):
    "The list of a split, of VOC or of SBD."
    folders = {'voc': sources[0]/'VOC2012'/'ImageSets'/'Segmentation', 'sbd': sources[1]/'dataset'}
    return folders[dataset]/f'{name}.txt'


def listed(sources, name, dataset='voc'):
    "The ids in the list of a split."
    return list_file(sources, name, dataset).read_text().split()


def test_counts_and_folder(made):
    root, _, counts = made
    assert counts == COUNTS
    for split in ('train', 'val', 'train_aug'):
        folder = TagFolder(root, split)
        check(folder, masks=True)
        assert len(folder) == COUNTS[split] and folder.has_masks
        assert folder.classes == VOC_CLASSES and (folder.tags.sum(1) > 0).all()
    test = TagFolder(root, 'test')
    check(test)
    assert test.tags.sum() == 0 and not test.has_masks


def test_report_agrees(made):
    "The general check counts the same; its only problems are the 14 classes no image has."
    table, problems = folder_report(made[0])
    for split in VOC_SIZES:
        assert table.loc['images', split] == COUNTS[split]
    assert table.loc['masks'].to_dict() == dict(train=8, val=6, train_aug=14, test=0)
    assert len(problems) == 14 and all('classes.txt' in p for p in problems)


def test_train_aug_follows_the_rule(made):
    "Built again from the originals, image by image."
    root, sources, _ = made
    train, val = listed(sources, 'train'), listed(sources, 'val')
    sbd = listed(sources, 'train', 'sbd') + listed(sources, 'val', 'sbd')
    want = []
    for i in sorted(train + sbd):
        if i not in val and i not in want:
            want.append(i)
    assert TagFolder(root, 'train_aug').ids == want
    leaks = [i for i in sbd if i in val]
    assert len(leaks) == 3 and not {*leaks} & {*want}


def test_photographs_and_official_masks_are_links(made):
    root, sources, _ = made
    folder = TagFolder(root, 'train_aug')
    train = listed(sources, 'train')
    for k, i in enumerate(folder.ids):
        original = sources[0]/'VOC2012'/'JPEGImages'/f'{i}.jpg'
        assert folder.files[i].resolve() == original.resolve()
        assert folder.mask_path(k).is_symlink() == (i in train) == (255 in folder.mask(k))


def test_converted_masks_are_those_drawn(made):
    root, _, _ = made
    for n in range(18, 24):
        path = root/'SegmentationClass'/f'{image_id(n)}.png'
        assert (read_mask(path) == _picture(0, n)[1]).all()
        with Image.open(path) as im:
            assert im.mode == 'P' and im.getpalette()[3:6] == [128, 0, 0]


def test_archives_give_the_same(made, tmp_path):
    root, _, _ = made
    sources = small_voc(tmp_path/'there', archives=True)
    for _ in range(2):
        assert make_voc(tmp_path/'voc', sources) == COUNTS     # again: nothing changes
    for name in ('tags.csv', 'classes.txt', *(f'ImageSets/{split}.txt' for split in VOC_SIZES)):
        assert (root/name).read_text() == (tmp_path/'voc'/name).read_text()
    for f in (root/'SegmentationClass').iterdir():
        assert (read_mask(f) == read_mask(tmp_path/'voc'/'SegmentationClass'/f.name)).all()


def test_again_converts_only_what_is_missing(sources, tmp_path, monkeypatch):
    make_voc(tmp_path/'voc', sources)
    masks = (tmp_path/'voc'/'SegmentationClass').iterdir()
    converted = sorted(f for f in masks if not f.is_symlink())
    converted[2].unlink()
    read = []

    def recording(path):
        read.append(path.stem)
        return read_sbd_mask(path)
    monkeypatch.setattr(voc, 'read_sbd_mask', recording)
    assert make_voc(tmp_path/'voc', sources) == COUNTS
    assert read == [converted[2].stem] and converted[2].is_file()


@pytest.mark.parametrize('nest', ['here', 'devkit', 'inside', 'circle', 'linked'])
def test_any_nesting(sources, tmp_path, nest):
    "Folders are recognised by their content, at any depth, also with links that lead in a circle."
    there = tmp_path/'originals'
    if nest == 'here':
        given = [sources[0]/'VOC2012', sources[1]/'dataset']
    if nest == 'devkit':
        given = [there]
    if nest == 'inside':
        (tmp_path/'a'/'b').mkdir(parents=True)
        there.rename(tmp_path/'a'/'b'/'c')
        given = [tmp_path/'a']
    if nest == 'circle':
        (there/'VOCdevkit'/'up').symlink_to(there)
        given = [there]
    if nest == 'linked':
        (tmp_path/'links').mkdir()
        for s in sources:
            (tmp_path/'links'/s.name[:3]).symlink_to(s)
        given = [tmp_path/'links']
    assert make_voc(tmp_path/'voc', given) == COUNTS


def test_without_test_and_without_sbd(sources, tmp_path, capsys):
    "What cannot be made is left out and reported; lists of an earlier call are removed."
    make_voc(tmp_path/'voc', sources)
    list_file(sources, 'test').unlink()
    counts = make_voc(tmp_path/'voc', sources[:1])
    assert counts == {'train': 8, 'val': 6, 'masks': 14, 'without a tag': 0}
    output = capsys.readouterr().out
    assert 'train_aug is left out' in output
    assert 'test is left out' in output and 'VOC2012test.tar' in output
    assert sorted(p.stem for p in (tmp_path/'voc'/'ImageSets').iterdir()) == ['train', 'val']
    assert len(TagFolder(tmp_path/'voc')) == 8


def test_segmentationclassaug_stands_in_for_sbd(made, tmp_path):
    root, sources, _ = made
    with zipfile.ZipFile(tmp_path/'SegmentationClassAug.zip', 'w') as z:
        for f in (root/'SegmentationClass').iterdir():
            z.write(f.resolve(), f'SegmentationClassAug/{f.name}')
            for folder in ('', '__MACOSX/'):
                z.writestr(f'{folder}SegmentationClassAug/._{f.name}', b'what a Mac adds')
    archive = tmp_path/'SegmentationClassAug.zip'
    assert make_voc(tmp_path/'voc', [sources[0], archive]) == COUNTS
    again = TagFolder(tmp_path/'voc', 'train_aug')
    assert again.ids == TagFolder(root, 'train_aug').ids
    assert all(again.mask_path(k).is_symlink() for k in range(14))


def test_a_list_is_used_unchanged(made, tmp_path):
    "In the field's two columns; without SBD there are no masks for what it adds."
    root, sources, _ = made
    ids = TagFolder(root, 'train_aug').ids
    path = tmp_path/'train_aug.txt'
    rows = [f'/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png' for i in ids[:-1]]
    path.write_text('\n'.join(rows))
    assert make_voc(tmp_path/'voc', [sources[0], path]) == COUNTS | {'train_aug': 13, 'masks': 14}
    assert TagFolder(tmp_path/'voc', 'train_aug').ids == ids[:-1]
    path.write_text('\n'.join(ids[1:]))
    fails(lambda: make_voc(tmp_path/'voc', [sources[0], path]), ids[0], 'train', 'not in train_aug')
    val = listed(sources, 'val')
    path.write_text('\n'.join(ids + val[:2]))
    fails(lambda: make_voc(tmp_path/'voc', [*sources, path]), val[0], 'train_aug', 'val')


def test_windows_line_ends_and_a_byte_order_mark(sources, tmp_path):
    for name, dataset in (('train', 'voc'), ('val', 'voc'), ('train', 'sbd')):
        f = list_file(sources, name, dataset)
        f.write_bytes(b'\xef\xbb\xbf' + f.read_bytes().replace(b'\n', b'\r\n') + b'\r\n')
    assert make_voc(tmp_path/'voc', sources) == COUNTS


def test_an_image_that_only_sbd_has(sources, tmp_path):
    i = listed(sources, 'val', 'sbd')[-1]
    (sources[0]/'VOC2012'/'JPEGImages'/f'{i}.jpg').unlink()
    assert make_voc(tmp_path/'voc', sources) == COUNTS
    assert 'benchmark_RELEASE' in str((tmp_path/'voc'/'JPEGImages'/f'{i}.jpg').resolve())


# ---- tags


def test_tags_are_the_classes_drawn(made):
    "Where every class of a mask is an object, tags and masks agree."
    folder = TagFolder(made[0], 'train_aug')
    drawn = {image_id(n): {*np.unique(_picture(0, n)[1])} - {0} for n in range(24)}
    for i, tags in zip(folder.ids, folder.tags):
        assert {*(tags.nonzero().flatten() + 1).tolist()} == (drawn[i] or {8})


def test_difficult_objects(made, tmp_path):
    """Without them every other image loses its last tag, and no image gains one.

    An image without other objects stays in its list, tagged as empty."""
    _, sources, _ = made
    counts = make_voc(tmp_path/'voc', sources, difficult=False)
    full, easy = TagFolder(made[0], 'train_aug'), TagFolder(tmp_path/'voc', 'train_aug')
    assert full.ids == easy.ids and (easy.tags <= full.tags).all()
    odd = np.array([(int(i[5:]) - 2)//37 % 2 for i in full.ids])
    assert ((full.tags - easy.tags).sum(1).numpy() == odd).all()
    empty = 0
    for split in ('train_aug', 'val'):
        empty += int((TagFolder(tmp_path/'voc', split).tags.sum(1) == 0).sum())
    assert counts == COUNTS | {'without a tag': empty} and empty > 2


@pytest.mark.parametrize('key', [str, int, np.int32, np.int64])
@pytest.mark.parametrize('kind', [np.float32, np.float64, np.int64, np.uint8, bool, '>f4'])
def test_cls_labels_agree_with_the_annotations(made, tmp_path, key, kind):
    "The field's file in all its layouts gives the same folder."
    root, sources, _ = made
    rows, want = {}, {}
    for split in ('train_aug', 'val'):
        folder = TagFolder(root, split)
        for i, tags in zip(folder.ids, folder.tags):
            rows[i if key is str else key(i.replace('_', ''))] = tags.numpy().astype(kind)
            want[i] = read_objects(sources[0]/'VOC2012'/'Annotations'/f'{i}.xml')
    path = tmp_path/'cls_labels.npy'
    np.save(path, rows)
    assert read_cls_labels(path) == want
    if key is str and kind is np.float32:
        assert make_voc(tmp_path/'voc', sources, labels=path) == COUNTS
        assert (tmp_path/'voc'/'tags.csv').read_text() == (root/'tags.csv').read_text()


def save_npy(path, program):
    "A .npy of one object, with a pickle of our own."
    with path.open('wb') as f:
        header = {'descr': '|O', 'fortran_order': False, 'shape': ()}
        np.lib.format.write_array_header_1_0(f, header)
        f.write(program)
    return path


def good_pickle(n=3, protocol=4):
    "Of n images, the first with the first class and so on."
    rows = np.eye(20, dtype=np.float32)
    return pickle.dumps(np.array({f'2007_{i:06}': rows[i] for i in range(n)}), protocol)


@pytest.mark.parametrize('protocol', [2, 3, 4])
@pytest.mark.parametrize('old', [False, True])
def test_cls_labels_of_numpy_1_and_2(tmp_path, protocol, old):
    program = good_pickle(protocol=protocol)
    if old:
        program = program.replace(b'\x16numpy._core.multiarray', b'\x15numpy.core.multiarray')
        program = program.replace(b'numpy._core.', b'numpy.core.')
    if old and protocol == 4:   # the length of the program stands in it, and is one less
        length, = struct.unpack('<Q', program[3:11])
        program = program.replace(program[3:11], struct.pack('<Q', length - 1))
    assert (b'numpy.core.' in program) == old
    want = {f'2007_{i:06}': [VOC_CLASSES[i + 1]] for i in range(3)}
    assert read_cls_labels(save_npy(tmp_path/'l.npy', program)) == want


class Call:
    "Calls a function when it is unpickled."
    def __init__(self, function, *args):
        self.function = function
        self.args = args

    def __reduce__(self): return self.function, self.args


def attack(what, ran):
    "A call; those of the first four kinds create the file `ran`."
    touch = Call(os.system, f'touch {ran}')
    return {
        'system': touch,
        'eval': Call(eval, f'open({str(ran)!r}, "w")'),
        'open': Call(io.open, str(ran), 'w'),
        'load': Call(pickle.loads, pickle.dumps(touch)),
        'getattr': Call(getattr, 'text', 'upper'),
        'import': Call(__import__, 'this'),
    }[what]


@pytest.mark.parametrize('where', ['whole', 'key', 'value', 'row'])
@pytest.mark.parametrize('what', ['system', 'eval', 'open', 'load', 'getattr', 'import'])
def test_code_in_cls_labels_does_not_run(tmp_path, where, what):
    "Wherever it is hidden. Opened with NumPy, the same file does run it."
    ran = tmp_path/'ran'
    call = attack(what, ran)
    row = np.zeros(20, np.float32)
    hidden = {
        'key': {('a', call): row},
        'value': {'2007_000001': call},
        'row': {'2007_000001': np.array([call]*20, object)},
    }
    content = call if where == 'whole' else np.array({'2007_000000': row} | hidden[where])
    path = save_npy(tmp_path/'l.npy', pickle.dumps(content, 4))
    fails(lambda: read_cls_labels(path), 'l.npy', 'refused', 'asks to run')
    assert not ran.exists()
    if what in ('system', 'eval', 'open', 'load') and where == 'value':
        np.load(path, allow_pickle=True)
        assert ran.exists()


def test_records_cannot_be_changed_by_a_file(tmp_path):
    "A file that sets attributes of the records' class is refused; the next file is read as usual."
    for state in (b'}\x8c\x04argsK\x01s', b'N}\x8c\x08__init__K\x01s\x86'):
        program = b'\x80\x04\x8c\x05numpy\x8c\x05dtype\x93' + state + b'b.'
        path = save_npy(tmp_path/'l.npy', program)
        fails(partial(read_cls_labels, path), 'l.npy')
    assert len(read_cls_labels(save_npy(tmp_path/'l.npy', good_pickle()))) == 3


def test_truncated_cls_labels(tmp_path):
    path = save_npy(tmp_path/'l.npy', good_pickle())
    whole = path.read_bytes()
    for n in range(0, len(whole), 3):
        path.write_bytes(whole[:n])
        fails(lambda: read_cls_labels(path), 'l.npy')


@given(at=st.integers(0, 500), to=st.integers(0, 255))
def test_damaged_cls_labels(at, to):
    "With one byte changed, the file is read as something or refused."
    with tempfile.TemporaryDirectory() as d:
        path = save_npy(Path(d)/'l.npy', good_pickle(protocol=4))
        whole = bytearray(path.read_bytes())
        whole[at % len(whole)] = to
        path.write_bytes(whole)
        try:
            for classes in read_cls_labels(path).values():
                assert {*classes} <= {*VOC_CLASSES[1:]}
        except DataError as e:
            assert 'l.npy' in str(e)


@pytest.mark.parametrize('row', [
    np.zeros(21, np.float32), np.zeros(0, np.float32), np.zeros((20, 1), np.float32),
    np.full(20, .5, np.float32), np.full(20, np.nan), np.zeros(20, 'S1'), np.zeros(20, object),
    np.zeros(20, [('a', 'f4')]), [0]*20, None])
def test_rows_that_are_not_twenty_zeros_and_ones(tmp_path, row):
    np.save(tmp_path/'l.npy', {'2007_000001': row})
    fails(lambda: read_cls_labels(tmp_path/'l.npy'), 'l.npy')


@pytest.mark.parametrize('holds', [np.zeros((3, 20)), np.array(3), np.array(['a'], object),
                                   np.array([1, 2]), np.array('text', object)])
def test_arrays_that_hold_no_dict(tmp_path, holds):
    np.save(tmp_path/'l.npy', holds)
    fails(lambda: read_cls_labels(tmp_path/'l.npy'), 'l.npy')


def test_sizes_in_the_file_allocate_nothing(tmp_path):
    "A shape of 2^40, and the number of an object that needs gigabytes: refused with little memory."
    program = good_pickle(1, protocol=2)
    shape = program.replace(b'K\x14\x85', b'\x8a\x06\x00\x00\x00\x00\x00\x01\x85', 1)
    assert shape != program
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shape_file = save_npy(tmp_path/'shape.npy', shape)
    memo_file = save_npy(tmp_path/'memo.npy', b'\x80\x02Nr\xff\xff\xff\x0f.')
    fails(lambda: read_cls_labels(shape_file), 'shape.npy', '1099511627776')
    fails(lambda: read_cls_labels(memo_file), 'memo.npy', '268435455')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000   # kB


def test_cls_labels_without_an_image(made, tmp_path):
    make = partial(make_voc, tmp_path/'voc', made[1])
    np.save(tmp_path/'l.npy', {'2007_000001': np.zeros(20)})
    fails(lambda: make(labels=tmp_path/'l.npy'), 'l.npy', '2007_000002')
    fails(lambda: make(labels=tmp_path/'none.npy'), 'none.npy', 'missing')
    with pytest.raises(ValueError, match='not both'):
        make(difficult=False, labels=tmp_path/'l.npy')


# ---- what may be wrong with the originals


ENTITIES = [f'<!ENTITY {b} "{f"&{a};"*10}">' for a, b in zip('abcdefgh', 'bcdefghi')]
LAUGHS = f'<!DOCTYPE l [<!ENTITY a "ha">{"".join(ENTITIES)}]>'
PLAIN = '<annotation><object><name>cat</name></object></annotation>'
BAD_ANNOTATIONS = [
    LAUGHS + '<annotation><object><name>&i;</name></object></annotation>',
    '<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/hostname">]>'
    '<annotation><object><name>&f;</name></object></annotation>',
    '<!DOCTYPE a SYSTEM "http://localhost/x.dtd">' + PLAIN,
    '<!DOCTYPE a>' + PLAIN,
    '',
    '<annotation><object>',
    'no XML',
    PLAIN.replace('annotation', 'html'),
    PLAIN.replace('cat', 'unicorn'),
    PLAIN.replace('cat', ''),
    PLAIN.replace('cat', 'background'),
    '<annotation><object/></annotation>',
    '<?xml version="1.0" encoding="klingon"?>' + PLAIN,
]


@pytest.mark.parametrize('xml', BAD_ANNOTATIONS, ids=range(13))
def test_annotations_that_are_refused(sources, tmp_path, xml):
    path = sources[0]/'VOC2012'/'Annotations'/'2007_000039.xml'
    path.write_text(xml)
    fails(lambda: make_voc(tmp_path/'voc', sources), '2007_000039.xml')
    assert not (tmp_path/'voc'/'tags.csv').exists()


def test_annotation_missing(sources, tmp_path):
    (sources[0]/'VOC2012'/'Annotations'/'2007_000039.xml').unlink()
    fails(lambda: make_voc(tmp_path/'voc', sources), '2007_000039.xml', 'missing')


@pytest.mark.parametrize('name', ['JPEGImages/2007_000039.jpg', 'SegmentationClass/2007_000039.png',
                                  'ImageSets/Segmentation/val.txt'])
def test_file_missing(sources, tmp_path, name):
    (sources[0]/'VOC2012'/name).unlink()
    fails(lambda: make_voc(tmp_path/'voc', sources), Path(name).name, 'missing')
    assert not (tmp_path/'voc').exists()      # known before anything is written


def test_list_with_an_image_twice_or_empty(sources, tmp_path):
    path = list_file(sources, 'train')
    path.write_text(path.read_text() + '2007_000039\n')
    fails(lambda: make_voc(tmp_path/'voc', sources), 'train.txt', '2007_000039', 'more than once')
    path.write_text('\r\n')
    fails(lambda: make_voc(tmp_path/'voc', sources), 'train.txt', 'empty')
    path.write_text('../2007_000039\n2007_000002')
    assert read_ids(path) == ['2007_000039', '2007_000002']


def test_lists_that_overlap(sources, tmp_path):
    val = list_file(sources, 'val')
    val.write_text(val.read_text() + '2007_000039\n')
    fails(lambda: make_voc(tmp_path/'voc', sources), '2007_000039', 'train', 'val')


def test_test_images_in_another_list(sources, tmp_path):
    leak = listed(sources, 'test')[0]
    for dataset, name, split in (('voc', 'val', 'val'), ('sbd', 'train', 'train_aug')):
        path = list_file(sources, name, dataset)
        text = path.read_text()
        path.write_text(text + leak)
        fails(lambda: make_voc(tmp_path/'voc', sources), leak, split, 'test')
        path.write_text(text)


@pytest.mark.parametrize('mask', [
    np.zeros((3, 4, 5), np.uint8), np.full((4, 4), 21, np.uint8), np.full((4, 4), -1, np.int16),
    np.zeros((4, 4)), np.zeros((0, 4), np.uint8), 'text'])
def test_mat_that_holds_no_mask(tmp_path, mask):
    savemat(tmp_path/'m.mat', {'GTcls': {'Segmentation': mask}})
    fails(lambda: read_sbd_mask(tmp_path/'m.mat'), 'm.mat')


def test_mat_damaged_or_missing(sources, tmp_path):
    last = listed(sources, 'val', 'sbd')[-1]
    path = sources[1]/'dataset'/'cls'/f'{last}.mat'
    whole = path.read_bytes()
    for content in (b'', whole[:200], whole[:-30], b'\x89HDF\r\n\x1a\n' + whole, b'not MATLAB'*100):
        path.write_bytes(content)
        fails(lambda: make_voc(tmp_path/'voc', sources), path.name)
    savemat(path, {'GTinst': {'Segmentation': np.zeros((4, 4), np.uint8)}})
    fails(lambda: make_voc(tmp_path/'voc', sources), path.name, 'GTcls')
    path.unlink()
    fails(lambda: make_voc(tmp_path/'voc', sources), path.name, 'missing')
    path.write_bytes(whole)
    assert make_voc(tmp_path/'voc', sources) == COUNTS      # continues where it stopped


@given(at=st.integers(0, 10**6), to=st.integers(0, 255))
def test_mat_with_a_byte_changed(tmp_path_factory, at, to):
    path = tmp_path_factory.getbasetemp()/'byte.mat'
    _save_mat(path, _picture(0, 3)[1])
    whole = bytearray(path.read_bytes())
    whole[at % len(whole)] = to
    path.write_bytes(whole)
    try:
        assert read_sbd_mask(path).max() < 21
    except DataError as e:
        assert 'byte.mat' in str(e)


def test_archive_that_leads_out(tmp_path):
    archive = tmp_path/'VOCtrainval_11-May-2012.tar'
    with tarfile.open(archive, 'w') as t:
        member = tarfile.TarInfo('VOCdevkit/../../../escaped.txt')
        member.size = 2
        t.addfile(member, io.BytesIO(b'hi'))
    fails(lambda: make_voc(tmp_path/'voc', [archive]), archive.name, 'leads out')
    assert not list(tmp_path.rglob('escaped.txt'))


def test_sources_that_are_no_sources(sources, tmp_path):
    fails(lambda: make_voc(tmp_path/'voc', [tmp_path/'nowhere']), 'nowhere', 'missing')
    (tmp_path/'empty').mkdir()
    fails(lambda: make_voc(tmp_path/'voc', [*sources, tmp_path/'empty']), 'empty', 'nothing of VOC')
    fails(lambda: make_voc(tmp_path/'voc', sources[1:]), 'None of the sources', 'VOC 2012')
    (tmp_path/'a.tar').write_bytes(b'no archive')
    fails(lambda: make_voc(tmp_path/'voc', [tmp_path/'a.tar']), 'a.tar')
    second, _ = small_voc(tmp_path/'second')
    fails(lambda: make_voc(tmp_path/'voc', [*sources, second]), "'voc'", 'second', 'give one')


# ---- the lists of the real size, and the download


def numbered_ids(n, start=0): return [f'2008_{i:06}' for i in range(start, start + n)]


def real_size():
    "Ids with the overlaps of the real lists: 2,237 of SBD's 11,355 are VOC's."
    train, val, more = numbered_ids(1464), numbered_ids(1449, 1464), numbered_ids(9118, 5000)
    return train, val, train[:1200] + val[:1037] + more


def test_10582():
    train, val, sbd = real_size()
    assert len(sbd) == 11355 and len({*sbd} | {*train} | {*val}) == 12031
    test = numbered_ids(1456, 20000)
    splits = dict(train=train, val=val, train_aug=train_aug(train, val, sbd), test=test)
    assert {s: len(i) for s, i in splits.items()} == VOC_SIZES
    check_splits(splits)
    for split in ('train_aug', 'test'):
        short = splits | {split: splits[split][:-1]}
        fails(partial(check_splits, short), split, VOC_SIZES[split] - 1, VOC_SIZES[split])


@given(st.lists(st.sets(st.integers(0, 30)), min_size=3, max_size=3))
def test_rule_for_lists_of_any_size(sets):
    train, val, sbd = sets
    train = train - val
    aug = train_aug(train, val, sbd)
    check_splits(dict(train=sorted(train), val=sorted(val), train_aug=aug))
    for i in range(31):
        assert (i in aug) == ((i in train or i in sbd) and i not in val)
    assert aug == sorted(aug)


def test_without_sources_the_archives_are_downloaded(tmp_path, monkeypatch):
    "Through torchvision, from its addresses, into originals; a second call works with these files."
    small = small_voc(tmp_path/'server', archives=True)
    asked = []

    def fetch(url, folder, name, md5):
        asked.append((url, name, md5))
        target = Path(folder)/name
        if not target.exists():
            _with_parent(target).write_bytes((tmp_path/'server'/name).read_bytes())
    monkeypatch.setattr(voc, 'download_url', fetch)
    for _ in range(2):
        assert make_voc(tmp_path/'voc') == {k: n for k, n in COUNTS.items() if k != 'test'}
    assert [name for _, name, _ in asked[:2]] == [small[0].name, small[2].name]
    assert all(len(md5) == 32 and 'http' in url for url, _, md5 in asked)
    assert (tmp_path/'voc'/'originals'/'benchmark.tgz').is_file()
    assert make_voc(tmp_path/'voc', [tmp_path/'voc'/'originals', small[1]]) == COUNTS


def test_download_that_fails(tmp_path, monkeypatch):
    def fetch(*_): raise OSError('no network')
    monkeypatch.setattr(voc, 'download_url', fetch)
    name = 'VOCtrainval_11-May-2012.tar'
    fails(lambda: make_voc(tmp_path/'voc'), name, 'no network', 'give it as a source')
