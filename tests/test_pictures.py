"Which images a run shows, and what stands on the picture."
import numpy as np
import pytest
import torch
from ppc.data import TagFolder, write_mask
from ppc.plots import image_grid
from ppc.work import RANKS, first_images, ranked_images, some_images


@pytest.fixture
def data(scenes):
    return TagFolder(scenes, 'train')


def test_images_by_name_have_their_tags(data):
    names = [data.ids[5], data.ids[2]]
    few = some_images(data, names)
    assert few.ids == names and torch.equal(few.tags, data.tags[[5, 2]])
    assert (few.mask(0) == data.mask(5)).all() and len(data) == 16
    assert first_images(data, 3).ids == data.ids[:3]


def test_the_best_and_the_worst_are_shown(data, tmp_path):
    "Of each true mask a share of the foreground is erased."
    order, score = [7, 0, 3, 11, 5, 1, 15, 2, 9, 4, 13, 6, 8, 12, 10, 14], {}
    for rank, i in enumerate(order):
        truth = data.mask(i)
        mask, pixels = truth.copy(), np.flatnonzero(truth)
        mask.flat[pixels[:len(pixels)*rank//15]] = 0
        write_mask(tmp_path/f'{data.ids[i]}.png', mask)
        ious = [((truth == c) & (mask == c)).sum()/((truth == c) | (mask == c)).sum()
                for c in np.unique(truth)]
        score[data.ids[i]] = 100*np.mean(ious)
    shown = ranked_images(data, tmp_path)
    assert [rank.split(',')[0] for rank in shown.values()] == [*RANKS]
    assert shown[data.ids[7]] == 'best, 100 %'
    ranked = sorted(score, key=lambda i: -score[i])
    assert list(shown) == [ranked[k] for k in (0, 4, 8, 11, 15)]
    assert [rank.split(', ')[1] for rank in shown.values()] == [f'{score[i]:.0f} %' for i in shown]


def test_without_masks_the_first_are_shown(data, tmp_path):
    assert ranked_images(data, tmp_path) == dict.fromkeys(data.ids[:5], '')


def test_without_truth_the_largest_and_the_smallest_objects_are_shown(data, tmp_path, monkeypatch):
    monkeypatch.setattr(type(data), 'has_masks', False)
    for n, name in enumerate(data.ids):
        mask = np.zeros((20, 32), np.uint8)
        mask.flat[:40*n] = 1
        write_mask(tmp_path/f'{name}.png', mask)
    shown = ranked_images(data, tmp_path)
    assert list(shown) == [data.ids[k] for k in (15, 11, 7, 4, 0)]
    assert [*shown.values()] == [f'{n} % object' for n in (94, 69, 44, 25, 0)]


def test_an_image_of_unknown_truth_has_no_rank(data, tmp_path, monkeypatch):
    truth = [data.mask(i) for i in range(16)]
    truth[3][:] = 255
    monkeypatch.setattr(type(data), 'mask', lambda self, i: truth[i])
    for name, mask in zip(data.ids, truth):
        write_mask(tmp_path/f'{name}.png', np.where(mask == 255, 0, mask))
    assert data.ids[3] not in ranked_images(data, tmp_path)


def test_few_images_are_shown_once(data, tmp_path):
    few = first_images(data, 2)
    for i in range(2):
        write_mask(tmp_path/f'{few.ids[i]}.png', few.mask(i))
    assert {*ranked_images(few, tmp_path)} == {*few.ids}


@pytest.mark.parametrize('classes', [2, 6, 20, 79])
def test_a_legend_has_room_for_every_class(classes):
    names = ['background', *(f'some class {i}' for i in range(classes))]
    figure = image_grid({'image': [np.zeros((8, 8, 3), np.uint8)]}, 4, classes=names)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.y1 <= figure.axes[0].get_window_extent().y0 + 2
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0


def test_a_grid_has_its_notes_and_a_legend_below_the_pictures():
    pictures = [np.zeros((8, 8, 3), np.uint8)]*2
    figure = image_grid({'image': pictures, 'mask': pictures}, 4, ['cat', 'fox'],
                        ['one', 'two'], ['background', 'cat', 'fox'])
    figure.canvas.draw()
    left = [ax for ax in figure.axes if ax.get_position().x0 < .1]
    assert [[t.get_text() for t in ax.texts] for ax in left] == [['cat', 'one'], ['fox', 'two']]
    assert all(ax.texts[1].get_window_extent().x0 >= 0 for ax in left)
    legend, = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ['background', 'cat', 'fox']
    box = legend.get_window_extent()
    assert box.y1 <= min(ax.get_window_extent().y0 for ax in figure.axes) + 2
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
