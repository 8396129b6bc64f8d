"Invalid input raises an error that names the file; unusual input is read correctly."
import errno
import importlib.util
import io
import os
import resource
import shutil
import signal
import struct
import unicodedata
import zlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from ppc.data import (
    DataError,
    RandomLongEdge,
    TagFolder,
    TrainingViews,
    WriteError,
    atomic,
    augmentation,
    check,
    read_classes,
    read_image,
    read_mask,
    read_saliency,
    write_mask,
)
from ppc.folders import folder_report
from ppc.training import Batches


def fails(call, *words):
    "The call raises a `DataError` whose message holds all the words."
    with pytest.raises(DataError) as e:
        call()
    for word in words:
        assert word in str(e.value), str(e.value)


def edit(path, old, new): path.write_text(path.read_text().replace(old, new))


def test_good_folder(mine):
    folder = TagFolder(mine)
    check(folder, masks=True)
    assert len(folder) == 16
    assert folder.classes[0] == 'background' and folder.tags.shape == (16, 6)


def test_missing_image(mine):
    (mine/'JPEGImages'/'train00003.jpg').unlink()
    fails(lambda: TagFolder(mine), 'train00003', 'missing')


def test_missing_image_of_a_tag_row(mine):
    edit(mine/'tags.csv', 'image,tags\n', 'image,tags\nnobody,cat\n')
    fails(lambda: TagFolder(mine), 'tags.csv', 'nobody')


@pytest.mark.parametrize('content', [b'', b'\xff\xd8\xff\xe0 not a photograph'])
def test_unreadable_image(mine, content):
    (mine/'JPEGImages'/'train00003.jpg').write_bytes(content)
    fails(lambda: check(TagFolder(mine)), 'train00003.jpg', 'cannot be read')


def test_truncated_image(mine):
    path = mine/'JPEGImages'/'train00003.jpg'
    path.write_bytes(path.read_bytes()[:900])
    fails(lambda: check(TagFolder(mine)), 'train00003.jpg', 'cannot be read')


def test_mask_of_another_size(mine):
    write_mask(mine/'SegmentationClass'/'train00002.png', np.zeros((8, 9), np.uint8))
    fails(lambda: check(TagFolder(mine), masks=True), 'train00002.png', '9x8', '128x128')


def test_mask_value_outside_the_classes(mine):
    write_mask(mine/'SegmentationClass'/'train00002.png', np.full((128, 128), 7, np.uint8))
    fails(lambda: check(TagFolder(mine), masks=True), 'train00002.png', '7')


def test_colour_mask(mine):
    Image.new('RGB', (128, 128)).save(mine/'SegmentationClass'/'train00002.png')
    fails(lambda: check(TagFolder(mine), masks=True), 'train00002.png', 'palette')


def test_unknown_tag(mine):
    edit(mine/'tags.csv', 'image,tags\n', 'image,tags\ntrain00000,unicorn\n')
    fails(lambda: TagFolder(mine), 'tags.csv line 2', 'unicorn')


def test_image_without_a_row(mine):
    lines = (mine/'tags.csv').read_text().splitlines()
    lines = [line for line in lines if not line.startswith('train00005')]
    (mine/'tags.csv').write_text('\n'.join(lines))
    fails(lambda: TagFolder(mine), 'tags.csv', 'train00005')


def test_row_twice(mine):
    edit(mine/'tags.csv', 'image,tags\n', 'image,tags\ntrain00000,cat\n')
    fails(lambda: TagFolder(mine), 'repeats', 'train00000')


def test_wrong_header(mine):
    edit(mine/'tags.csv', 'image,tags\n', '')
    fails(lambda: TagFolder(mine), 'tags.csv line 1')


def test_empty_and_missing_split(mine):
    (mine/'ImageSets'/'val.txt').write_text('\n')
    fails(lambda: TagFolder(mine, 'val'), "'val'", 'empty')
    fails(lambda: TagFolder(mine, 'test'), 'test.txt')


@pytest.mark.parametrize('name', ['classes.txt', 'tags.csv'])
def test_missing_file(mine, name):
    (mine/name).unlink()
    fails(lambda: TagFolder(mine), name, 'missing')


def test_not_utf8(mine):
    (mine/'tags.csv').write_bytes('image,tags\ntrain00000,büffel\n'.encode('latin1'))
    fails(lambda: TagFolder(mine), 'tags.csv', 'UTF-8')


def test_what_spreadsheet_programs_write(mine):
    "A byte-order mark, Windows line ends, names with their ending, an image without any tag."
    text = (mine/'tags.csv').read_text().replace('train00004,', 'train00004.jpg,')
    lines = ['train00006,' if line.startswith('train00006') else line for line in text.splitlines()]
    (mine/'tags.csv').write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(lines).encode())
    assert TagFolder(mine).tags[6].sum() == 0


def test_without_lists_all_images_are_train(mine):
    shutil.rmtree(mine/'ImageSets')
    assert len(TagFolder(mine)) == 20


def test_worker_count_changes_nothing(scenes):
    views = TrainingViews(TagFolder(scenes), augmentation((96, 160), 112), seed=3)
    a, b = (list(DataLoader(views, batch_sampler=Batches(16, 4, 2, seed=3), num_workers=n))
            for n in (0, 2))
    assert len(a) == len(b) == 8
    for x, y in zip(a, b):
        assert all(torch.equal(x[k], y[k]) for k in ('image', 'tags', 'index'))


def test_mask_follows_its_image(mine):
    "Where the picture is painted by its own mask, the two agree after every augmentation."
    folder = TagFolder(mine)
    for i in folder.ids:
        mask = read_mask(mine/'SegmentationClass'/f'{i}.png')
        painting = np.repeat((mask > 0).astype(np.uint8)[..., None]*255, 3, -1)
        Image.fromarray(painting).save(mine/'JPEGImages'/f'{i}.jpg', quality=100)
    transform = augmentation((128, 128), 144, jitter=(0, 0, 0, 0))
    views = TrainingViews(TagFolder(mine), transform, masks=mine/'SegmentationClass')
    for epoch in range(3):
        item = views[epoch, 5]
        inside = item['mask'] != 255
        bright = item['image'][0] > 0
        assert ((item['mask'] > 0) == bright)[inside].float().mean() > .99
        assert (item['image'][:, ~inside] == 0).all()


def test_relative_resize(scenes):
    "A factor on each image's own size, the same for its mask; a factor of 1 changes no pixel."
    image = torch.arange(48.).view(1, 6, 8)
    mask = tv_tensors.Mask(torch.arange(48).view(6, 8))
    same_image, same_mask = RandomLongEdge(1., 1., True)(tv_tensors.Image(image), mask)
    assert torch.equal(same_image, image) and torch.equal(same_mask, mask)
    torch.manual_seed(0)
    large = tv_tensors.Image(image.repeat(1, 10, 10)), tv_tensors.Mask(mask.repeat(10, 10))
    sizes = [RandomLongEdge(.5, 1.5, True)(*large) for _ in range(40)]
    edges = [a.shape[-1] for a, b in sizes]
    assert all(a.shape[-2:] == b.shape for a, b in sizes)
    assert 40 <= min(edges) < 50 and 110 < max(edges) <= 120


@pytest.mark.parametrize('content', [None, b'', b'\x89PNG\r\n\x1a\n no map'])
def test_missing_or_unreadable_saliency(mine, content):
    "Rejected by `check` before training, and on reading; only where saliency is requested."
    path = mine/'Saliency'/'train00003.png'
    path.unlink()
    problem = 'missing'
    if content is not None:
        path.write_bytes(content)
        problem = 'cannot be read'
    folder, words = TagFolder(mine), ('Saliency', 'train00003.png', problem)
    check(folder)
    fails(lambda: check(folder, saliency=True), *words)
    views = TrainingViews(folder, augmentation((96, 160), 112), saliency=True)
    fails(lambda: views[0, 3], *words)


def test_truncated_saliency(mine):
    path = mine/'Saliency'/'train00003.png'
    path.write_bytes(path.read_bytes()[:200])
    fails(lambda: check(TagFolder(mine), saliency=True), 'train00003.png', 'cannot be read')


def test_deep_saliency(mine):
    deep = Image.fromarray(np.full((128, 128), 40000, np.uint16))
    deep.save(mine/'Saliency'/'train00003.png')
    fails(lambda: check(TagFolder(mine), saliency=True), 'train00003.png', '8-bit')


def test_saliency_of_another_size_and_in_colour(mine):
    "It is resized to its image's size; colours are averaged."
    Image.new('RGB', (40, 30), (255, 0, 51)).save(mine/'Saliency'/'train00002.png')
    folder = TagFolder(mine)
    check(folder, saliency=True)
    torch.testing.assert_close(folder.saliency(2, (128, 120)), torch.full((1, 120, 128), .4))


def test_saliency_follows_its_image(mine):
    "A picture painted by its own saliency agrees with it after every augmentation but of colour."
    folder = TagFolder(mine)
    soft = (255*np.linspace(0, 1, 128)[None]*np.linspace(.5, 1, 128)[:, None]).astype(np.uint8)
    painting = Image.fromarray(np.repeat(soft[..., None], 3, -1))
    for i in folder.ids:
        Image.fromarray(soft).save(mine/'Saliency'/f'{i}.png')
        painting.save(mine/'JPEGImages'/f'{i}.jpg', quality=100)
    transform = augmentation((100, 180), 144, jitter=(0, 0, 0, 0))
    plain = TrainingViews(TagFolder(mine), transform, saliency=True)
    jittered = TrainingViews(TagFolder(mine), augmentation((128, 128), 128), saliency=True)
    want = torch.from_numpy(soft/np.float32(255))
    for epoch in range(4):
        item = plain[epoch, 5]
        brightness = .229*item['image'][0] + .485
        outside = (item['image'] == 0).all(0)
        assert item['saliency'].shape == (1, 144, 144)
        assert (item['saliency'][0][outside] == 0).all()
        assert (item['saliency'][0] - brightness)[~outside].abs().max() < .03
        got = jittered[epoch, 5]['saliency'][0]
        assert torch.equal(got, want) or torch.equal(got.flip(-1), want)


def test_saliency_and_mask_do_not_change_the_image(scenes):
    "The same draws with or without mask and saliency, also through a loader's workers."
    folder, transform = TagFolder(scenes), augmentation((96, 160), 112)
    alone = TrainingViews(folder, transform)
    both = TrainingViews(folder, transform, masks=scenes/'SegmentationClass', saliency=True)
    for key in [(0, 0), (3, 7)]:
        assert torch.equal(alone[key]['image'], both[key]['image'])
    batch = next(iter(DataLoader(both, batch_sampler=Batches(16, 4, 1), num_workers=1)))
    assert batch['saliency'].shape == (4, 1, 112, 112) and type(batch['saliency']) is torch.Tensor
    assert ((batch['saliency'] > .5) == (batch['mask'] % 255 > 0)[:, None]).float().mean() > .9
    assert batch['image'].dtype == torch.uint8
    whole = both.finish(batch)['image']
    for x, i, key in zip(whole, batch['index'].tolist(), next(iter(Batches(16, 4, 1)))):
        assert key[1] == i and torch.equal(x, both[key]['image'])  # item by item the same


# Photographs as people have them. Colours are compared with the painted ones, within JPEG's loss.

RED, SKY = (200, 30, 20), (90, 160, 230)


def painted(size=(48, 32)):
    "Red on the left, sky on the right, a light stripe at the top: every turn and mirror shows."
    x = np.zeros((size[1], size[0], 3), np.uint8)
    x[:, :24] = RED
    x[:, 24:] = SKY
    x[:8] = 240
    return Image.fromarray(x)


def reads(path, want, within=0):
    "`read_image` returns this picture, up to a difference per channel."
    got = read_image(path)
    assert got.mode == 'RGB' and got.size == want.size
    assert np.abs(np.asarray(got, int) - np.asarray(want, int)).max() <= within


def cmyk(im):
    "Converted by hand: the complement of each colour, and no black."
    colours = [Image.fromarray(255 - np.asarray(im)[..., k]) for k in range(3)]
    return Image.merge('CMYK', [*colours, Image.new('L', im.size, 0)])


def test_cmyk(tmp_path):
    """Stored inverted, as Adobe does, also where a tool removed the segment that says so.

    OpenCV reads the same."""
    path = tmp_path/'print.jpg'
    cmyk(painted()).save(path, quality=100, subsampling=0)
    reads(path, painted(), 6)
    if importlib.util.find_spec('cv2'):
        import cv2
        reads(path, Image.fromarray(cv2.imread(str(path))[..., ::-1]), 2)
    data = path.read_bytes()
    at = data.index(b'\xff\xee\x00\x0eAdobe')
    path.write_bytes(data[:at] + data[at + 16:])
    reads(path, painted(), 6)


def test_grey_and_palette(tmp_path):
    for mode in ('L', '1'):
        im = painted().convert(mode)
        im.save(tmp_path/'grey.png')
        reads(tmp_path/'grey.png', im.convert('RGB'))
    painted().convert('L').save(tmp_path/'grey.jpg', quality=100)
    reads(tmp_path/'grey.jpg', painted().convert('L').convert('RGB'), 3)
    painted().quantize(3).save(tmp_path/'palette.png')
    reads(tmp_path/'palette.png', painted(), 2)


def test_transparent_is_white(tmp_path):
    "All of PNG's ways: a channel, a colour of the palette, one grey or one colour."
    hole = np.zeros((32, 48), bool)
    hole[20:, 10:40] = True
    want = np.where(hole[..., None], 255, np.asarray(painted()))
    alpha = Image.fromarray(np.where(hole, 0, 255).astype(np.uint8))
    Image.merge('RGBA', [*painted().split(), alpha]).save(tmp_path/'rgba.png')
    reads(tmp_path/'rgba.png', Image.fromarray(want.astype(np.uint8)))
    grey = painted().convert('L')
    Image.merge('LA', [grey, alpha]).save(tmp_path/'la.png')
    want_grey = Image.fromarray(np.where(hole, 255, np.asarray(grey)).astype(np.uint8))
    reads(tmp_path/'la.png', want_grey.convert('RGB'))
    palette = painted().quantize(3)
    numbers = Image.fromarray(np.where(hole, 3, palette).astype(np.uint8), mode=None).convert('P')
    numbers.putpalette(palette.getpalette()[:9] + [1, 2, 3])
    numbers.save(tmp_path/'p.png', transparency=3)
    reads(tmp_path/'p.png', Image.fromarray(want.astype(np.uint8)), 2)
    painted().save(tmp_path/'rgb.png', transparency=RED)
    red = (np.asarray(painted()) == RED).all(-1)[..., None]
    want_rgb = np.where(red, 255, np.asarray(painted())).astype(np.uint8)
    reads(tmp_path/'rgb.png', Image.fromarray(want_rgb))
    half = Image.new('RGBA', (4, 4), (0, 0, 0, 128))
    half.save(tmp_path/'half.png')
    reads(tmp_path/'half.png', Image.new('RGB', (4, 4), (127, 127, 127)), 1)


def png(path, width, height, depth, colour, rows=b''):
    "Write a PNG by hand, as its format is specified: signature, header, data, end."
    header = struct.pack('>2I5B', width, height, depth, colour, 0, 0, 0)
    chunks = [(b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')]
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*c) for c in chunks))
    return path


def chunk(name, data):
    "A part of a PNG: length, name, data, checksum."
    checksum = zlib.crc32(name + data)
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', checksum)


def deep_png(path, pixels, colour):
    "A PNG of 16 bits per channel, each row behind a zero that says 'no filter'."
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
    return png(path, pixels.shape[1], pixels.shape[0], 16, colour, rows)


def test_sixteen_bits(tmp_path):
    "Scaled, not cut off at 255; grey, colour, and each with transparency."
    deep = np.linspace(0, 65535, 48*32).reshape(32, 48).round().astype('>u2')
    want = np.floor(deep/257 + .5).astype(np.uint8)
    want_grey = Image.fromarray(want).convert('RGB')
    reads(deep_png(tmp_path/'grey.png', deep, 0), want_grey)
    three = np.stack([deep, deep[::-1], deep[:, ::-1]], -1)
    want_rgb = Image.fromarray(np.stack([want, want[::-1], want[:, ::-1]], -1))
    reads(deep_png(tmp_path/'rgb.png', three, 2), want_rgb, 1)
    solid = np.full((32, 48, 1), 65535, '>u2')
    opaque = np.concatenate([deep[..., None], solid], -1)
    reads(deep_png(tmp_path/'la.png', opaque, 4), want_grey, 1)
    transparent = np.concatenate([three, 0*solid], -1)
    reads(deep_png(tmp_path/'rgba.png', transparent, 6), Image.new('RGB', (48, 32), 'white'))


TURNS = {  # EXIF's orientation -> how the picture is stored
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize('note', TURNS)
@pytest.mark.parametrize('ending', ['jpg', 'png'])
def test_stored_on_its_side(mine, note, ending):
    "Stored turned or mirrored, with EXIF's note: read upright, and its mask has the upright size."
    stored = painted()
    if TURNS[note] is not None:
        stored = stored.transpose(TURNS[note])
    exif = Image.Exif()
    exif[0x0112] = note
    (mine/'JPEGImages'/'train00003.jpg').unlink()
    path = mine/'JPEGImages'/f'train00003.{ending}'
    stored.save(path, exif=exif, quality=100, subsampling=0)
    reads(path, painted(), 4)
    write_mask(mine/'SegmentationClass'/'train00003.png', np.zeros((32, 48)))
    check(TagFolder(mine), masks=True)
    if note > 4:
        write_mask(mine/'SegmentationClass'/'train00003.png', np.zeros((48, 32)))
        fails(lambda: check(TagFolder(mine), masks=True), 'train00003.png', '32x48', '48x32')


def test_other_formats_behind_the_ending(tmp_path):
    "A WebP, PNG or GIF called .jpg is read; PostScript, which starts a program, and text are not."
    path = tmp_path/'a.jpg'
    options = {'PNG': {}, 'WEBP': {'lossless': True}, 'GIF': {}, 'BMP': {}}
    for fmt, how in options.items():
        painted().save(path, fmt, **how)
        reads(path, painted(), 2)
    two = {'save_all': True, 'append_images': [painted()]}
    painted().save(path, 'MPO', quality=100, subsampling=0, **two)
    reads(path, painted(), 4)
    for fmt in ('EPS', 'TIFF'):
        painted().save(path, fmt)
        fails(lambda: read_image(path), 'a.jpg', 'cannot be read as an image')
    path.write_text('a text')
    fails(lambda: read_image(path), 'a.jpg', 'cannot be read as an image')


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('read', [read_image, read_mask, read_saliency])
@pytest.mark.parametrize('size', [(60_000, 60_000), (12_000, 9_000), (2**31 - 1, 2**31 - 1)])
def test_bombs(tmp_path, read, size):
    "A small file that claims many pixels, even where Pillow only warns: rejected undecoded."
    resource = pytest.importorskip('resource', reason='only Unix measures the largest memory')
    path = png(tmp_path/'bomb.png', *size, 8, 0, bytes(10**6))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fails(lambda: read(path), 'bomb.png', 'pixels')
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert used < 30_000  # kB; decoding would take 108 MB and more


def test_jpeg_bomb(tmp_path):
    buffer = io.BytesIO()
    painted().save(buffer, 'JPEG')
    data = buffer.getvalue()
    at = data.index(b'\xff\xc0') + 5  # height and width in the header
    data = data[:at] + struct.pack('>2H', 65_000, 65_000) + data[at + 4:]
    (tmp_path/'bomb.jpg').write_bytes(data)
    fails(lambda: read_image(tmp_path/'bomb.jpg'), 'bomb.jpg', 'pixels')


def sample(im, fmt):
    "The bytes of a picture with notes in its EXIF."
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010e] = 'a note'
    buffer = io.BytesIO()
    im.save(buffer, fmt, exif=exif)
    return buffer.getvalue()


SAMPLES = {
    'JPEG': sample(painted(), 'JPEG'),
    'PNG': sample(painted().convert('LA'), 'PNG'),
    'GIF': sample(painted(), 'GIF'),
    'WEBP': sample(painted(), 'WEBP'),
}


@pytest.mark.filterwarnings('ignore::UserWarning:PIL')
@given(
    st.sampled_from(sorted(SAMPLES)),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    st.one_of(st.none(), st.integers(0, 1000)))
def test_damaged_files_are_read_or_named(tmp_path_factory, fmt, changes, length):
    "Whatever bytes change or are missing: a picture, or a `DataError` with the file's name."
    data = bytearray(SAMPLES[fmt])
    for at, value in changes:
        data[at % len(data)] = value
    path = tmp_path_factory.getbasetemp()/'damaged.png'
    path.write_bytes(data[:length])
    for read in (read_image, read_mask, read_saliency):
        try:
            read(path)
        except DataError as e:
            assert str(path) in str(e)


@pytest.mark.parametrize('mode, fmt, message', [
    ('RGBA', 'PNG', 'colour'),
    ('LA', 'PNG', 'colour'),
    ('CMYK', 'JPEG', 'cannot be read'),
])
def test_masks_with_channels(mine, mode, fmt, message):
    Image.new(mode, (128, 128)).save(mine/'SegmentationClass'/'train00002.png', fmt)
    fails(lambda: check(TagFolder(mine), masks=True), 'train00002.png', message)


def test_masks_of_other_depths(mine):
    "Sixteen bits may hold class numbers, but 256 must not become 0; one bit is classes 0 and 1."
    path = mine/'SegmentationClass'/'train00002.png'
    numbers = np.tile(np.arange(128)//32, (128, 1))
    numbers[0, 0] = 255
    Image.fromarray(numbers.astype(np.uint16)).save(path)
    assert (read_mask(path) == numbers).all() and read_mask(path).dtype == np.uint8
    check(TagFolder(mine), masks=True)
    Image.fromarray((numbers + 256).astype(np.uint16)).save(path)
    fails(lambda: check(TagFolder(mine), masks=True), 'train00002.png', '511')
    Image.fromarray(numbers > 1).save(path)
    assert Image.open(path).mode == '1' and (read_mask(path) == (numbers > 1)).all()
    Image.fromarray(numbers.astype(np.uint8)).save(path, 'JPEG')
    fails(lambda: read_mask(path), 'train00002.png', 'cannot be read as a mask')


def test_a_folder_and_a_broken_link_among_the_images(mine):
    (mine/'JPEGImages'/'x.jpg').mkdir()
    fails(lambda: TagFolder(mine), 'x.jpg', 'folder')
    (mine/'JPEGImages'/'x.jpg').rmdir()
    (mine/'JPEGImages'/'x.jpg').symlink_to(mine/'moved away.jpg')
    fails(lambda: TagFolder(mine), 'x.jpg', 'link')


def test_names_with_spaces(mine):
    "And with commas, which a spreadsheet puts in quotation marks."
    def new(text): return text.replace('train', 'my photo, no. ')
    for old in (mine/'JPEGImages').iterdir():
        old.rename(old.with_name(new(old.name)))
    rows = [line.split(',') for line in (mine/'tags.csv').read_text().splitlines()]
    (mine/'tags.csv').write_text('\n'.join(f'"{new(name)}",{tags}' for name, tags in rows))
    (mine/'ImageSets'/'train.txt').write_text(new((mine/'ImageSets'/'train.txt').read_text()))
    folder = TagFolder(mine)
    assert folder.ids[3] == 'my photo, no. 00003' and folder.tags.sum() > 0
    check(folder)


@pytest.mark.parametrize('name', [
    '../secret',
    '../secret.jpg',
    '../../mine/JPEGImages/train00000.jpg',
    '/etc/passwd',
    '..\\secret',
    'C:\\secret.jpg',
    'sub/train00000',
    '.',
])
def test_names_that_lead_out(mine, name):
    "Rejected even if the file exists, even if it is one of the folder's own."
    Image.new('RGB', (8, 8)).save(mine.parent/'secret.jpg')
    Image.new('RGB', (8, 8)).save(mine/'secret.jpg')
    good = (mine/'tags.csv').read_text()
    edit(mine/'tags.csv', 'image,tags\n', f'image,tags\n{name},cat\n')
    fails(lambda: TagFolder(mine), 'tags.csv line 2', repr(name))
    (mine/'tags.csv').write_text(good)
    (mine/'ImageSets'/'val.txt').write_text(f'val00000\n{name}\n')
    fails(lambda: TagFolder(mine, 'val'), 'val.txt line 2', repr(name))


def test_windows_text_files(mine):
    "Byte-order marks, Windows line ends, ids with endings, semicolons, rows of separators only."
    for f in (mine/'classes.txt', mine/'tags.csv', *(mine/'ImageSets').glob('*.txt')):
        lines = f.read_text().splitlines()
        if f.suffix == '.csv':
            lines = [line.replace(',', ';') for line in lines] + [';', '', ' ; ']
        elif f.parent.name == 'ImageSets':
            lines = [line + ('.jpg' if k % 2 else '.JPG') for k, line in enumerate(lines)]
            lines += ['', '']
        f.write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(lines).encode())
    folder = TagFolder(mine)
    assert len(folder) == 16 and folder.ids[0] == 'train00000' and folder.tags.sum() > 0
    check(folder, masks=True)


def test_id_twice_in_a_list(mine):
    (mine/'ImageSets'/'val.txt').write_text('val00000\nval00001\nval00000.jpg\n')
    fails(lambda: TagFolder(mine, 'val'), 'val.txt', "'val00000' 2 times")


def test_class_with_a_space(mine):
    edit(mine/'classes.txt', 'cat\n', 'traffic light\n')
    fails(lambda: TagFolder(mine), 'classes.txt', "'traffic light'", "'traffic_light'")


def test_more_classes_than_a_mask_can_hold(mine):
    (mine/'classes.txt').write_text('\n'.join(f'c{k}' for k in range(255)))
    assert len(read_classes(mine)) == 255
    (mine/'classes.txt').write_text('\n'.join(f'c{k}' for k in range(256)))
    fails(lambda: read_classes(mine), 'classes.txt', '256')


def test_first_class_is_the_background(mine):
    "A missing background raises an error that mentions it."
    edit(mine/'classes.txt', 'background\n', '')
    fails(lambda: TagFolder(mine), 'tags.csv', "'cat'", 'background')


@pytest.mark.parametrize('text', [
    'image,tags\n"train00000,cat\n',
    'image,tags\n' + 'x'*200_000 + ',cat\n',
    'image,tags\ntrain00000,cat,dog\n',
    'a\0b,tags\n',
])
def test_damaged_spreadsheets(mine, text):
    (mine/'tags.csv').write_text(text)
    fails(lambda: TagFolder(mine), 'tags.csv line')


# Masks that show no object, masks that are missing.

def paint(folder, values):
    "Make all masks anew: the k-th shows `values[k]` on its left half."
    for i, value in zip(folder.ids, values, strict=True):
        mask = np.zeros((128, 128), np.uint8)
        mask[:, :64] = value
        write_mask(folder.root/'SegmentationClass'/f'{i}.png', mask)


@pytest.mark.parametrize('values, words', [
    ([255]*20, ('20 of the 20', 'train00000.png', '255 means unknown', '--mask-values 255=1')),
    ([1]*9 + [255]*11, ('11 of the 20', 'train00009.png', '255 means unknown')),
    ([1]*9 + [0]*10 + [255], ('11 of the 20', 'val00003.png', '255 means unknown')),
    ([0]*20, ('20 of the 20', 'train00000.png', 'number of its class')),
])
def test_masks_without_an_object(mine, values, words):
    "Found before a run and by the report."
    shutil.rmtree(mine/'ImageSets')
    folder = TagFolder(mine)
    paint(folder, values)
    fails(lambda: check(folder, masks=True), *words)
    check(folder)
    problems = folder_report(mine)[1]
    assert len(problems) == 1 and all(word in problems[0] for word in words)


def test_some_masks_may_be_empty(mine):
    "Half of the tagged images, as crowds are unknown in COCO; and images without tags."
    shutil.rmtree(mine/'ImageSets')
    folder = TagFolder(mine)
    paint(folder, [1]*10 + [255]*10)
    check(folder, masks=True)
    assert not folder_report(mine)[1]
    rows = [f'{i},{"cat" if k < 5 else ""}\n' for k, i in enumerate(folder.ids)]
    (mine/'tags.csv').write_text('image,tags\n' + ''.join(rows))
    paint(folder, [1]*5 + [255]*15)
    check(TagFolder(mine), masks=True)


@pytest.mark.parametrize('lacking', [1, 3, 15])
def test_masks_that_are_missing_are_counted(mine, lacking):
    folder = TagFolder(mine)
    for i in folder.ids[:lacking]:
        (mine/'SegmentationClass'/f'{i}.png').unlink()
    with pytest.warns(UserWarning, match=f"{lacking} of 16 photographs in the list 'train' lack"):
        assert not folder.has_masks


def test_all_masks_or_none_are_not_worth_a_warning(mine, recwarn):
    assert TagFolder(mine).has_masks
    shutil.rmtree(mine/'SegmentationClass')
    assert not TagFolder(mine).has_masks and not recwarn.list


# Names.

def test_names_of_240_bytes(mine):
    "82 Chinese characters; temporary files are as short as file systems demand."
    name = '猫'*82
    for old in mine.glob('*/train00002.*'):
        old.rename(old.with_stem(name))
    for path in (mine/'tags.csv', mine/'ImageSets'/'train.txt'):
        edit(path, 'train00002', name)
    folder = TagFolder(mine)
    check(folder, masks=True, saliency=True)
    write_mask(mine/'out'/f'{name}.png', folder.mask(folder.ids.index(name)))
    both = [mine/'out'/f'{"ü"*100}{end}.txt' for end in 'ab']
    with atomic(both[0]) as a, atomic(both[1]) as b:
        assert a != b and a.suffix == '.txt'
        a.write_text('a')
        b.write_text('b')
    assert [path.read_text() for path in both] == ['a', 'b']
    with pytest.raises(DataError, match='too long'):
        write_mask(mine/'out'/f'{"猫"*85}.png', np.zeros((2, 2)))


@pytest.mark.parametrize('files, texts', [('NFD', 'NFC'), ('NFC', 'NFD'), ('NFD', 'NFD')])
def test_names_of_a_mac(mine, files, texts):
    "Photographs, masks and saliency maps are found whichever form a file or a text has."
    def name(form): return unicodedata.normalize(form, 'Frühstück à Orléans')
    for old in mine.glob('*/train00002.*'):
        old.rename(old.with_stem(name(files)))
    for path in (mine/'tags.csv', mine/'ImageSets'/'train.txt'):
        edit(path, 'train00002', name(texts))
    folder = TagFolder(mine)
    assert folder.ids[2] == name('NFC') and folder.has_masks
    check(folder, masks=True, saliency=True)
    assert not folder_report(mine)[1]
    views = TrainingViews(folder, augmentation((64, 80), 48), masks=mine/'SegmentationClass')
    assert views[0, 2]['mask'].shape == (48, 48)


def test_two_photographs_whose_names_look_the_same(mine):
    for form in ('NFC', 'NFD'):
        shutil.copy(mine/'JPEGImages'/'train00000.jpg',
                    mine/'JPEGImages'/f'{unicodedata.normalize(form, "é")}.jpg')
    fails(lambda: TagFolder(mine), 'same name')


# Texts in a PNG, and writing.

def noted(path, **notes):
    "A PNG with an orientation and texts, some of them compressed."
    info = PngImagePlugin.PngInfo()
    for key, (text, packed) in notes.items():
        info.add_text(key, text, zip=packed)
        info.add_itxt(f'international {key}', text, zip=packed)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (20, 10), (200, 30, 10)).save(path, pnginfo=info, exif=exif)


@pytest.mark.parametrize('size, packed', [
    (3_000_000, True), (3_000_000, False), (80_000_000, False), (1_000_001, True)])
def test_texts_in_a_png(tmp_path, size, packed):
    "An editor's history of megabytes; it is read without, and is upright."
    noted(tmp_path/'a.png', history=('x'*size, packed), author=('me', False))
    image = read_image(tmp_path/'a.png')
    assert image.size == (10, 20) and image.getpixel((5, 5)) == (200, 30, 10)


def test_a_damaged_png_with_texts_is_named(tmp_path):
    noted(tmp_path/'a.png', history=('x'*3_000_000, True))
    whole = (tmp_path/'a.png').read_bytes()
    for part in (whole[:-40], whole[:len(whole)//2], whole[:3000]):
        (tmp_path/'a.png').write_bytes(part)
        fails(lambda: read_image(tmp_path/'a.png'), 'a.png', 'cannot be read')


WRITERS = {
    'text': lambda path: path.write_text('x'*10**6),
    'numpy': lambda path: np.save(path, np.zeros(10**6)),
    'archive': lambda path: np.savez(path, a=np.zeros(10**6)),
    'torch': lambda path: torch.save(torch.zeros(10**6), path),
    'safetensors': lambda path: save_file({'a': torch.zeros(10**6)}, path),
    'picture': lambda path: Image.effect_noise((900, 900), 50).save(path),
}
ENDINGS = {'numpy': '.npy', 'archive': '.npz', 'picture': '.png'}


@pytest.mark.parametrize('writer', WRITERS)
def test_a_full_disk_is_said(tmp_path, writer):
    "By a limit on the size of files, which every library meets as it would a full disk."
    path = tmp_path/f'new{ENDINGS.get(writer, ".bin")}'
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        with pytest.raises(WriteError, match='disk or a quota is full'), atomic(path) as part:
            WRITERS[writer](part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('number', [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_is_not_writable_is_said(tmp_path, monkeypatch, number):
    def refuse(path, mode=0o777): raise OSError(number, os.strerror(number), str(path))
    monkeypatch.setattr(os, 'mkdir', refuse)
    with pytest.raises(WriteError, match='mask.png cannot be written'):
        write_mask(tmp_path/'out'/'mask.png', np.zeros((2, 2)))


def test_a_file_where_a_folder_should_be_is_said(tmp_path):
    (tmp_path/'out').write_text('')
    for path in (tmp_path/'out'/'mask.png', tmp_path/'out'/'masks'/'mask.png'):
        fails(lambda path=path: write_mask(path, np.zeros((2, 2))), 'mask.png cannot be written')


@pytest.mark.parametrize('error', [
    OSError(errno.EACCES, 'no', '/elsewhere/a'), FileNotFoundError(errno.ENOENT, 'no', 'a'),
    OSError('no number'), RuntimeError('shapes differ'), KeyboardInterrupt()])
def test_an_error_that_has_nothing_to_do_with_writing_stays(tmp_path, error):
    with pytest.raises(type(error)) as e, atomic(tmp_path/'a'):
        raise error
    assert e.value is error
