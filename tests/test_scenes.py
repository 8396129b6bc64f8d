"Generated scenes: what their two settings change, and what stays."
import hashlib
import json
import numpy as np
import pytest
from ppc.scenes import CLASSES, COATS, closeup, make_closeups, make_scenes, scene


def drawn(count, **look):
    return [scene(np.random.default_rng([5, i]), **look) for i in range(count)]


def test_scenes_of_earlier_editions_are_drawn_again():
    "At the default settings every pixel is that of 0.1; the hash was taken there."
    found = hashlib.sha256()
    for parts in drawn(3):
        for part in parts:
            found.update(np.ascontiguousarray(part).tobytes())
    found.update(closeup(np.random.default_rng(7))[0].tobytes())
    assert found.hexdigest() == (
        '9e77a87084462356d49abc02cd2d73f09e818efcaede663b6a621655400c81ba')


@pytest.mark.parametrize('coats, share', [(1., 1.), (0., 1/6)])
def test_coats_are_those_of_the_class(coats, share):
    "A body's median colour is nearest to the coat of its class, or to any."
    colours, own = np.array([colour for colour, _ in COATS], dtype=float), []
    for image, mask, parts in drawn(120, coats=coats):
        for c in range(1, len(CLASSES)):
            body = image[(mask == c) & (parts == 2)]
            if len(body) > 400:
                colour = np.median(body, axis=0)
                own.append(np.abs(colours - colour).sum(1).argmin() == c - 1)
    assert len(own) > 60 and abs(np.mean(own) - share) < .2


def test_zoom_enlarges_animals():
    "By the square of the factor, less what leaves the picture or hides behind another."
    small, large = (np.mean([(m > 0).mean() for _, m, _ in drawn(80, zoom=z)]) for z in (1., 1.3))
    assert 1.4 < large/small < 1.69


@pytest.mark.parametrize('make, settings', [
    (make_scenes, {'train': 2, 'val': 1}), (make_closeups, {'train': 2})])
def test_a_folder_of_an_earlier_edition_is_known_again(make, settings, tmp_path):
    made = make(tmp_path/'made', **settings)/'made.json'
    found = json.loads(made.read_text())
    made.write_text(json.dumps({k: v for k, v in found.items() if k not in ('coats', 'zoom')}))
    assert make(tmp_path/'made', **settings) == tmp_path/'made'
    with pytest.raises(ValueError, match='choose another folder'):
        make(tmp_path/'made', **settings, coats=1.)
