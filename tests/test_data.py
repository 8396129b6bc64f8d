"Bad input gets a sentence that names the file."
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from ppc.data import DataError, TagFolder, TrainingViews, augmentation, check, read_mask, write_mask
from ppc.training import Batches


def fails(what, *words):
    "The call raises a `DataError` that says all the words."
    with pytest.raises(DataError) as e: what()
    for w in words: assert w in str(e.value), str(e.value)


def edit(path, old, new): path.write_text(path.read_text().replace(old, new))


def test_good_folder(mine):
    folder = TagFolder(mine)
    check(folder, masks=True)
    assert len(folder) == 16 and folder.classes[0] == 'background' and folder.tags.shape == (16, 6)


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
    (mine/'tags.csv').write_text('\n'.join(l for l in lines if not l.startswith('train00005')))
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


def test_spreadsheet_habits(mine):
    "A byte-order mark, Windows line ends, names with their ending, an image without any tag."
    text = (mine/'tags.csv').read_text().replace('train00004,', 'train00004.jpg,').splitlines()
    text = [l if not l.startswith('train00006') else 'train00006,' for l in text]
    (mine/'tags.csv').write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(text).encode())
    assert TagFolder(mine).tags[6].sum() == 0


def test_without_lists_all_images_are_train(mine):
    import shutil
    shutil.rmtree(mine/'ImageSets')
    assert len(TagFolder(mine)) == 20


def test_worker_count_changes_nothing(scenes):
    views = TrainingViews(TagFolder(scenes), augmentation((96, 160), 112), seed=3)
    a, b = (list(DataLoader(views, batch_sampler=Batches(16, 4, 2, seed=3), num_workers=n)) for n in (0, 2))
    assert len(a) == len(b) == 8
    for x, y in zip(a, b): assert all(torch.equal(x[k], y[k]) for k in ('image', 'tags', 'index'))


def test_mask_follows_its_image(mine):
    "Where the picture is painted by its own mask, the two agree after every augmentation."
    folder = TagFolder(mine)
    for i in folder.ids:
        m = read_mask(mine/'SegmentationClass'/f'{i}.png')
        Image.fromarray(np.repeat((m > 0).astype(np.uint8)[..., None]*255, 3, -1)).save(mine/'JPEGImages'/f'{i}.jpg', quality=100)
    views = TrainingViews(TagFolder(mine), augmentation((128, 128), 144, jitter=(0, 0, 0, 0)), masks=mine/'SegmentationClass')
    for epoch in range(3):
        item = views[epoch, 5]
        inside = item['mask'] != 255
        bright = item['image'][0] > 0
        assert ((item['mask'] > 0) == bright)[inside].float().mean() > .99
        assert (item['image'][:, ~inside] == 0).all()


def test_relative_resize(scenes):
    "A factor on each image's own size, the same for its mask; one to one leaves every pixel."
    from ppc.data import RandomLongEdge
    image, mask = torch.arange(48.).view(1, 6, 8), tv_tensors.Mask(torch.arange(48).view(6, 8))
    assert all(torch.equal(x, y) for x, y in zip(RandomLongEdge(1., 1., True)(tv_tensors.Image(image), mask), (image, mask)))
    torch.manual_seed(0)
    sizes = [RandomLongEdge(.5, 1.5, True)(tv_tensors.Image(image.repeat(1, 10, 10)), tv_tensors.Mask(mask.repeat(10, 10))) for _ in range(40)]
    edges = [a.shape[-1] for a, b in sizes]
    assert all(a.shape[-2:] == b.shape for a, b in sizes) and 40 <= min(edges) < 50 and 110 < max(edges) <= 120


@pytest.mark.parametrize('content', [None, b'', b'\x89PNG\r\n\x1a\n no map'])
def test_missing_or_unreadable_saliency(mine, content):
    "Refused by `check` before training, and by whoever reads it; only where saliency is asked for."
    path = mine/'Saliency'/'train00003.png'
    path.unlink() if content is None else path.write_bytes(content)
    folder, words = TagFolder(mine), ('Saliency', 'train00003.png', 'missing' if content is None else 'cannot be read')
    check(folder)
    fails(lambda: check(folder, saliency=True), *words)
    fails(lambda: TrainingViews(folder, augmentation((96, 160), 112), saliency=True)[0, 3], *words)


def test_truncated_saliency(mine):
    path = mine/'Saliency'/'train00003.png'
    path.write_bytes(path.read_bytes()[:200])
    fails(lambda: check(TagFolder(mine), saliency=True), 'train00003.png', 'cannot be read')


def test_deep_saliency(mine):
    Image.fromarray(np.full((128, 128), 40000, np.uint16)).save(mine/'Saliency'/'train00003.png')
    fails(lambda: check(TagFolder(mine), saliency=True), 'train00003.png', '8-bit')


def test_saliency_of_another_size_and_in_colour(mine):
    "It is brought to its image's size; colours are averaged."
    Image.new('RGB', (40, 30), (255, 0, 51)).save(mine/'Saliency'/'train00002.png')
    folder = TagFolder(mine)
    check(folder, saliency=True)
    torch.testing.assert_close(folder.saliency(2, (128, 120)), torch.full((1, 120, 128), .4))


def test_saliency_follows_its_image(mine):
    "Where the picture is painted by its own saliency, the two agree after every augmentation, and colour never reaches the map."
    folder = TagFolder(mine)
    soft = (255*np.linspace(0, 1, 128)[None]*np.linspace(.5, 1, 128)[:, None]).astype(np.uint8)
    for i in folder.ids:
        Image.fromarray(soft).save(mine/'Saliency'/f'{i}.png')
        Image.fromarray(np.repeat(soft[..., None], 3, -1)).save(mine/'JPEGImages'/f'{i}.jpg', quality=100)
    plain = TrainingViews(TagFolder(mine), augmentation((100, 180), 144, jitter=(0, 0, 0, 0)), saliency=True)
    jittered = TrainingViews(TagFolder(mine), augmentation((128, 128), 128), saliency=True)
    for epoch in range(4):
        item, brightness = plain[epoch, 5], .229*plain[epoch, 5]['image'][0] + .485
        outside = (item['image'] == 0).all(0)
        assert item['saliency'].shape == (1, 144, 144) and (item['saliency'][0][outside] == 0).all()
        assert (item['saliency'][0] - brightness)[~outside].abs().max() < .03
        still = jittered[epoch, 5]['saliency'][0]
        assert any(torch.equal(x, torch.from_numpy(soft/np.float32(255))) for x in (still, still.flip(-1)))


def test_saliency_and_mask_leave_the_image_as_it_is(scenes):
    "The same draws with or without companions, and they come through a loader's workers."
    folder, transform = TagFolder(scenes), augmentation((96, 160), 112)
    alone, along = TrainingViews(folder, transform), TrainingViews(folder, transform, masks=scenes/'SegmentationClass', saliency=True)
    for key in [(0, 0), (3, 7)]: assert torch.equal(alone[key]['image'], along[key]['image'])
    batch = next(iter(DataLoader(along, batch_sampler=Batches(16, 4, 1), num_workers=1)))
    assert batch['saliency'].shape == (4, 1, 112, 112) and type(batch['saliency']) is torch.Tensor
    assert ((batch['saliency'] > .5) == (batch['mask'] % 255 > 0)[:, None]).float().mean() > .9
