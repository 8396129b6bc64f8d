"""The contrast against both readings written out literally in float64.

Its properties and corner cases, its form for labelled pixels, compilation, and two processes.
"""
import math
import os
import shutil
from dataclasses import asdict, fields, replace
import literal
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ppc import mining
from ppc.cam import normalise_maps
from ppc.contrast import (
    OFFICIAL_READING,
    PAPER_READING,
    READINGS,
    PixelToPrototypeContrast,
    Reading,
    prototype_contrast,
    view_pixels,
)
from ppc.prototypes import Prototypes, prototypes
from ppc.views import View

# --- both readings, literally -------------------------------------------------------------------

def views(seed, N, C, h, w, D):
    "Two random views, and tags."
    g = torch.Generator().manual_seed(seed)
    tags = (torch.rand(N, C, generator=g) < .5).float()
    def one():
        v = torch.randn(N, D, h, w, generator=g).relu()
        cam = torch.randn(N, C + 1, h, w, generator=g)
        v = v.add(torch.rand(N, D, h, w, generator=g)*.1)
        return View(cam, v.requires_grad_())
    return one(), one(), tags


shapes = dict(
    seed=st.integers(0, 2**31), N=st.integers(1, 3), C=st.integers(1, 7), h=st.integers(1, 4),
    w=st.integers(1, 4), D=st.integers(2, 6), K=st.integers(1, 9))


def same(got, want, a, b):
    "Every term, and its gradient in both views, to 1e-5."
    for x, y in zip(got, want):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-5)
        if not y.requires_grad:
            continue
        leaves = a.embedding, b.embedding
        grads = [torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True,
                                     materialize_grads=True) for loss in (x, y)]
        for g1, g2 in zip(*grads):
            torch.testing.assert_close(g1, g2, atol=1e-5, rtol=1e-4)


def untied(views, tags, K, reading):
    """Whether no choice depends on rounding.

    No two prototypes are equally near to a pixel, no two pixels of a class to its prototype; and
    no two confidences differ by less than float32 resolves: the best pixels of two images are
    1 - 1e-5/max, which differ very little, and the K best are chosen.
    """
    for x in views:
        fg = normalise_maps(x.cam[:, 1:].double(), reading.norm, clip=False)
        bg = 1 - (fg*tags[:, :, None, None]).amax(1, keepdim=True)
        m = torch.cat([bg, fg], 1).transpose(0, 1).flatten(1)
        gaps = m.sort(0).values.diff(dim=0), m.sort(1).values.diff(dim=1)
        if any(((g > 0) & (g < 3e-7)).any() for g in gaps):
            return False
    for p in (view_pixels(x, tags, K, reading) for x in views):
        s = p.v.double() @ p.proto.p[p.proto.exists].double().t()
        own = (p.v.double()*p.proto.p[p.y].double()).sum(1)
        by_class = [own[p.y == c].sort().values.diff() for c in p.y.unique()]
        if any((g < 1e-6).any() for g in (s.sort(1).values.diff(dim=1), *by_class)):
            return False
    return True


LAX = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


@LAX
@given(**shapes)
def test_paper_is_the_equations(seed, N, C, h, w, D, K):
    a, b, tags = views(seed, N, C, h, w, D)
    assume(untied((a, b), tags, K, PAPER_READING))
    n = N*h*w
    torch.manual_seed(seed)
    got = PixelToPrototypeContrast(K, reading=PAPER_READING)(a, b, tags)[1:]
    torch.manual_seed(seed)
    draws = [torch.rand(*size) for size in ((n, C + 1), (n,), (n, C + 1), (n,))]
    same(got, literal.paper(a, b, tags, K, draws), a, b)


@LAX
@given(**shapes)
def test_official_is_the_code(seed, N, C, h, w, D, K):
    a, b, tags = views(seed, N, C, h, w, D)
    assume(untied((a, b), tags, K, OFFICIAL_READING))
    torch.manual_seed(seed)
    got = PixelToPrototypeContrast(K, reading=OFFICIAL_READING)(a, b, tags)[1:]
    torch.manual_seed(seed)
    draws = [torch.rand(N*h*w) for _ in range(2)]
    same(got, literal.official(a, b, tags, K, draws), a, b)


@pytest.mark.parametrize('name', READINGS)
def test_readings_at_the_paper_s_number_of_classes(name):
    N, C, h, w, D, K = 3, 20, 6, 6, 8, 12
    a, b, tags = views(5, N, C, h, w, D)
    n = N*h*w
    torch.manual_seed(1)
    got = PixelToPrototypeContrast(K, reading=READINGS[name])(a, b, tags)[1:]
    torch.manual_seed(1)
    sizes = {'paper': ((n, C + 1), (n,), (n, C + 1), (n,)), 'official': ((n,), (n,))}[name]
    draws = [torch.rand(*size) for size in sizes]
    same(got, getattr(literal, name)(a, b, tags, K, draws), a, b)


OPTIONS = [f.name for f in fields(Reading) if f.name not in ('refined', 'grid')]


def outcome(contrast, a, b, tags, seed=0):
    "The terms, and the gradients of the total."
    torch.manual_seed(seed)
    terms = contrast(a, b, tags)
    return [*terms, *torch.autograd.grad(terms.total, (a.embedding, b.embedding))]


@pytest.mark.parametrize('field', OPTIONS)
def test_every_option_matters(field):
    """Switching one option of a preset to the other's changes the loss.

    No option is dead, and `official` ignores only what the authors' code ignores.
    """
    a, b, tags = views(7, 4, 6, 6, 6, 8)
    def loss(reading):
        found = outcome(PixelToPrototypeContrast(6, reading=reading), a, b, tags)
        return torch.cat([x.flatten() for x in found])
    base = replace(PAPER_READING, background='constant') if field == 'level' else PAPER_READING
    if field in ('absent', 'ranked'):
        tags[:, 0] = 0
        base = replace(PAPER_READING, negatives='band')
    if field == 'ties':
        base = replace(PAPER_READING, background='constant')  # all of it tied
    other = {'level': .5, 'ties': 'all'}.get(field, asdict(OFFICIAL_READING)[field])
    changed = replace(base, **{field: other})
    assert changed != base and not torch.allclose(loss(base), loss(changed))


def test_official_sees_images_without_the_class():
    "Its prototypes change with the map of a class in an image that lacks it; the paper's do not."
    a, b, tags = views(8, 2, 3, 4, 4, 8)
    tags = torch.tensor([[1., 0, 0], [0, 1, 0]])
    louder = a.cam.clone()
    louder[1, 1] = a.cam[1, 1].flip(0)   # class 1, in the image that has only class 2
    for reading, changes in ((PAPER_READING, False), (OFFICIAL_READING, True)):
        p, q = (view_pixels(View(cam, a.embedding), tags, 4, reading).proto.p[1]
                for cam in (a.cam, louder))
        assert torch.equal(p, q) != changes


def test_unknown_choice_is_refused():
    with pytest.raises(ValueError, match='rest, constant, lowest'):
        Reading(background='median')
    with pytest.raises(TypeError, match='backgruond'):
        Reading(backgruond='rest')


def literal_mining(similarity, y, exists, draw, hardest=.6, keep=.5):
    """The hardest 60 % of the negatives, of them the half with the largest draw.

    Shares are rounded, at least one.
    """
    chosen = []
    for i in range(len(y)):
        negatives = [c for c in range(len(exists)) if exists[c] and c != y[i]]
        hard = sorted(negatives, key=lambda c, i=i: -similarity[i][c])
        hard = hard[:literal_share(len(hard), hardest)]
        random = sorted(hard, key=lambda c, i=i: -draw[i][c])
        chosen.append(set(random[:literal_share(len(hard), keep)]))
    return chosen


def literal_share(n, share): return min(n, max(1, math.floor(share*n + .5)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(2, 22))
def test_semi_hard_negatives_are_those_of_the_text(seed, n, classes):
    torch.manual_seed(seed)
    similarity, y = torch.rand(n, classes)*2 - 1, torch.randint(0, classes, (n,))
    exists = torch.rand(classes) < .7
    torch.manual_seed(seed + 1)
    got = mining.semi_hard_negatives(similarity, y, exists)
    torch.manual_seed(seed + 1)
    draw = torch.rand_like(similarity)
    want = literal_mining(similarity.tolist(), y.tolist(), exists.tolist(), draw.tolist())
    assert [set(r.nonzero().flatten().tolist()) for r in got] == want


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 8))
def test_hard_pixels_are_those_of_the_text(seed, n, classes):
    torch.manual_seed(seed)
    similarity, y = torch.rand(n), torch.randint(0, classes, (n,))
    torch.manual_seed(seed + 1)
    got = mining.hard_pixels(similarity, y, classes)
    torch.manual_seed(seed + 1)
    draw, want = torch.rand(n), torch.zeros(n)
    for c in range(classes):
        mine = [i for i in range(n) if y[i] == c]
        for i in sorted(mine, key=lambda i: -draw[i])[:len(mine)//2]:
            want[i] += 1
        for i in sorted(mine, key=lambda i: similarity[i])[:len(mine) - len(mine)//2]:
            want[i] += 1
    assert got.tolist() == want.tolist()


# --- properties ---------------------------------------------------------------------------------

PLAIN = {   # no random choices
    'paper': replace(PAPER_READING, negatives='all', pixels='all'),
    'official': replace(OFFICIAL_READING, pixels='all'),
}


def total(a, b, tags, reading=PLAIN['paper'], k=4):
    return PixelToPrototypeContrast(k, reading=reading)(a, b, tags).total


@pytest.mark.parametrize('name', READINGS)
@pytest.mark.parametrize('seed', range(3))
def test_order_of_images_pixels_and_classes_changes_nothing(name, seed):
    """Where confidences are not tied: of equal ones the first are taken.

    All pixels of the authors' background are tied, so there all pixels are taken.
    """
    a, b, tags = views(seed, 4, 5, 4, 4, 8)
    a, b = (View(x.cam.abs(), x.embedding) for x in (a, b))
    tags = tags.index_fill(1, torch.tensor(seed), 1)
    options = PLAIN[name], 4 if name == 'paper' else 64
    want = total(a, b, tags, *options)
    images, classes = torch.tensor([2, 0, 3, 1]), torch.tensor([0, 3, 5, 1, 4, 2])
    order = torch.randperm(16)
    mixed = [View(x.cam[images], x.embedding[images]) for x in (a, b)]
    torch.testing.assert_close(total(*mixed, tags[images], *options), want)
    mixed = [View(x.cam[:, classes], x.embedding) for x in (a, b)]
    torch.testing.assert_close(total(*mixed, tags[:, classes[1:] - 1], *options), want)
    mixed = [View(*(t.flatten(2)[..., order].view_as(t) for t in x[:2])) for x in (a, b)]
    torch.testing.assert_close(total(*mixed, tags, *options), want)


@pytest.mark.parametrize('name', READINGS)
@pytest.mark.parametrize('seed', range(3))
def test_with_all_ties_the_order_of_the_batch_changes_nothing(name, seed):
    "Also where the background is a constant; and `first` does depend on the order there."
    a, b, tags = views(seed, 4, 5, 6, 6, 8)
    reading = replace(PLAIN[name], background='constant', level=.2)
    orders = [torch.randperm(4) for _ in range(6)]
    def totals(ties):
        chosen, found = replace(reading, ties=ties), []
        for order in orders:
            mixed = [View(x.cam[order], x.embedding[order]) for x in (a, b)]
            found.append(total(*mixed, tags[order], chosen))
        return torch.stack(found)
    found = totals('all')
    torch.testing.assert_close(found, found[:1].expand(6), atol=1e-6, rtol=1e-6)
    first = totals('first')
    assert first.max() - first.min() > 1e-4


def test_official_draws_do_not_hide_the_order():
    "The whole of `official` with all ties, where each pixel keeps its random number."
    a, b, tags = views(0, 4, 5, 6, 6, 8)
    reading, old = replace(OFFICIAL_READING, ties='all'), torch.rand_like
    found = []
    for order in (torch.arange(4), torch.tensor([2, 0, 3, 1])):
        def draw(x, dtype=None, order=order):
            numbers = torch.rand(4, len(x)//4, generator=torch.Generator().manual_seed(3))
            return numbers[order].flatten()
        torch.rand_like = draw
        try:
            mixed = [View(x.cam[order], x.embedding[order]) for x in (a, b)]
            found.append(total(*mixed, tags[order], reading))
        finally:
            torch.rand_like = old
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)


def literal_shares(m, y, k, assigned):
    "The mean over all ways to choose k pixels, of the tied ones at the boundary each as likely."
    C1, n = m.shape
    weight = torch.zeros(C1, n)
    for c in range(C1):
        mine = [i for i in range(n) if (y[i] == c if assigned else y[i] >= 0)]
        mine.sort(key=lambda i, c=c: -m[c, i])
        if len(mine) <= k:
            weight[c, mine] = 1
            continue
        edge = m[c, mine[k - 1]]
        above, at = ([i for i in mine if m[c, i] > edge], [i for i in mine if m[c, i] == edge])
        weight[c, above] = 1
        weight[c, at] = (k - len(above))/len(at)
    return weight*m


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30), st.booleans(), st.booleans())
def test_ties_that_share(seed, k, assigned, unit):
    torch.manual_seed(seed)
    v, y = torch.randn(2, 5, 3, 4), torch.randint(-1, 4, (2, 3, 4))
    m = torch.randint(0, 4, (2, 4, 3, 4))/4    # many ties
    got = prototypes(v, m, y, k, assigned, unit, ties='all')
    flat_v, flat_m = (x.transpose(0, 1).flatten(1) for x in (v, m))
    weight = literal_shares(flat_m, y.flatten(), k, assigned)
    rows = F.normalize(flat_v.t(), dim=1) if unit else flat_v.t()
    torch.testing.assert_close(got.p, F.normalize(weight @ rows, dim=1), atol=1e-5, rtol=1e-5)
    assert (got.exists == (weight > 0).any(1)).all()


def test_random_ties_are_a_draw():
    "Another seed chooses other pixels of equal confidence, and none of lower confidence."
    torch.manual_seed(0)
    v, y = torch.eye(16)[None].transpose(1, 2)[..., None], torch.zeros(1, 16, 1, dtype=torch.long)
    m = torch.ones(1, 1, 16, 1)
    m[0, 0, :8] = .5
    chosen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        p = prototypes(v, m, y, 3, ties='random').p[0]
        assert (p > 0).sum() == 3 and not p[:8].any()
        chosen.add(tuple(p.nonzero().flatten().tolist()))
    assert len(chosen) > 10
    with pytest.raises(ValueError, match='first, random, all'):
        prototypes(v, m, y, 3, ties='last')


@pytest.mark.parametrize('name', READINGS)
def test_length_of_embeddings_and_maps_changes_nothing(name):
    "One factor for all; in the paper's reading also one for each pixel."
    a, b, tags = views(1, 2, 5, 4, 4, 8)
    want = total(a, b, tags, PLAIN[name])
    longer = total(View(3*a.cam, 7*a.embedding), b, tags, PLAIN[name])
    torch.testing.assert_close(longer, want, atol=1e-4, rtol=1e-4)
    factors = torch.rand(2, 1, 4, 4) + .1
    uneven = total(View(a.cam, a.embedding*factors), b, tags, PLAIN[name])
    assert torch.allclose(uneven, want, atol=1e-5) == (name == 'paper')


@pytest.mark.parametrize('name', READINGS)
@pytest.mark.parametrize(
    'N, C, tagged', [(1, 1, True), (1, 1, False), (3, 4, False), (1, 20, True)])
def test_corner_cases_are_finite(name, N, C, tagged):
    "One class only, no tag at all, a batch of one."
    a, b, _ = views(2, N, C, 3, 3, 8)
    tags = torch.full((N, C), float(tagged))
    losses = PixelToPrototypeContrast(k=100, reading=READINGS[name])(a, b, tags)
    assert all(x.isfinite() for x in losses)
    losses.total.backward()
    assert a.embedding.grad.isfinite().all()


@pytest.mark.parametrize('name', READINGS)
def test_invalid_pixels_take_no_part(name):
    "Neither their embeddings nor their maps, and no gradient reaches them."
    a, b, tags = views(3, 2, 3, 4, 4, 8)
    valid = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < .5
    def loss(cam, embedding):
        torch.manual_seed(0)
        source, target = View(cam, embedding, valid), View(b.cam, b.embedding, valid)
        return total(source, target, tags, READINGS[name])
    garbage = [torch.where(valid, x, 9*torch.randn_like(x)) for x in a[:2]]
    torch.testing.assert_close(loss(*garbage), loss(*a[:2]))
    grad, = torch.autograd.grad(loss(*a[:2]), a.embedding)
    assert (grad[~valid.expand_as(grad)] == 0).all() and (grad != 0).any()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', READINGS)
def test_half_precision_is_finite_and_close(name, dtype):
    a, b, tags = views(4, 4, 20, 8, 8, 32)
    half = [View(x.cam.to(dtype), x.embedding.detach().to(dtype).requires_grad_())
            for x in (a, b)]
    with torch.autocast('cpu', dtype):
        got = total(*half, tags, PLAIN[name])
    torch.testing.assert_close(got, total(a, b, tags, PLAIN[name]), atol=.05, rtol=.05)
    assert torch.autograd.grad(got, half[0].embedding)[0].isfinite().all()


def test_views_on_different_grids_are_refused():
    a, b, tags = views(5, 2, 3, 4, 4, 8)
    narrow = View(b.cam[..., :3], b.embedding[..., :3])
    with pytest.raises(ValueError, match='paired_views'):
        PixelToPrototypeContrast()(a, narrow, tags)


def test_k_of_zero_is_no_contrast():
    a, b, tags = views(6, 2, 3, 4, 4, 8)
    losses = PixelToPrototypeContrast(k=0)(a, b, tags)
    losses.total.backward()
    assert losses.total == 0 and (a.embedding.grad == 0).all()


# --- pixels with labels: prototype_contrast ---------------------------------------------------

def labelled_pixels(seed=0, classes=5, ignore_index=None):
    "Embeddings (2, 6, 3, 4), labels (2, 3, 4) and prototypes (classes, 6), neither of unit length."
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(2, 6, 3, 4, generator=g).requires_grad_()
    p = torch.randn(classes, 6, generator=g).requires_grad_()
    y = torch.randint(classes, (2, 3, 4), generator=g)
    if ignore_index is not None:
        y[torch.rand(2, 3, 4, generator=g) < .4] = ignore_index
    return v, y, p


def rows(v): return v.permute(0, 2, 3, 1).flatten(0, 2)   # (N, D, h, w) -> (n, D)


def close(got, want, leaves, tol=1e-5):
    "Values, and gradients at the leaves."
    torch.testing.assert_close(got, want, atol=tol, rtol=tol)
    grads = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (got, want))
    for x, y in zip(*grads):
        torch.testing.assert_close(x, y, atol=tol, rtol=tol)


@pytest.mark.parametrize('seed, tau', [(0, .1), (1, .5), (2, 1.)])
def test_with_all_prototypes_it_is_cross_entropy(seed, tau):
    "Over unit prototypes, with a gradient for them too; a list of pixels gives the same."
    v, y, p = labelled_pixels(seed)
    cosines = F.normalize(rows(v), dim=1) @ F.normalize(p, dim=1).t()
    want = F.cross_entropy(cosines/tau, y.flatten())
    close(prototype_contrast(v, y, p, tau), want, (v, p))
    close(prototype_contrast(rows(v), y.flatten(), p, tau), want, (v, p))
    given = Prototypes(F.normalize(p, dim=1), torch.ones(5, dtype=torch.bool))
    close(prototype_contrast(v, y, given, tau), want, (v, p))


@pytest.mark.parametrize('ignore_index', [255, -1, 3])
def test_ignored_pixels_enter_neither_sum_nor_count(ignore_index):
    v, y, p = labelled_pixels(3, ignore_index=ignore_index)
    kept = y.flatten() != ignore_index
    assert kept.any() and not kept.all()
    got = prototype_contrast(v, y, p, ignore_index=ignore_index)
    want = prototype_contrast(rows(v)[kept], y.flatten()[kept], p, ignore_index=ignore_index)
    close(got, want, (v, p))
    noisy = torch.where((y == ignore_index)[:, None], 9*torch.randn_like(v), v)
    close(prototype_contrast(noisy, y, p, ignore_index=ignore_index), want, (v, p))
    grad, = torch.autograd.grad(got, v)
    assert not rows(grad)[~kept].any() and rows(grad)[kept].any(1).all()
    nothing = prototype_contrast(v, torch.full_like(y, ignore_index), p, ignore_index=ignore_index)
    assert nothing == 0 and not torch.autograd.grad(nothing, v)[0].any()


def test_classes_without_a_prototype_take_no_part():
    "Neither their pixels nor they themselves in the denominator."
    v, y, p = labelled_pixels(4)
    exists = torch.tensor([True, False, True, True, True])
    given = Prototypes(F.normalize(p, dim=1), exists)
    kept = exists[y.flatten()]
    cosines = F.normalize(rows(v), dim=1) @ F.normalize(p[exists], dim=1).t()
    number = exists.cumsum(0) - 1   # of a class among those with a prototype
    want = F.cross_entropy(cosines[kept]/.1, number[y.flatten()[kept]])
    close(prototype_contrast(v, y, given), want, (v, p))


@pytest.mark.parametrize('ignore_index', [255, -1])
def test_without_reduction_it_has_the_shape_of_the_labels(ignore_index):
    "It averages to the mean, and is 0 at ignored pixels."
    v, y, p = labelled_pixels(5, ignore_index=ignore_index)
    options = dict(ignore_index=ignore_index)
    each = prototype_contrast(v, y, p, reduction='none', **options)
    kept = y != ignore_index
    assert each.shape == y.shape and (each[~kept] == 0).all() and (each[kept] > 0).all()
    close(each[kept].mean(), prototype_contrast(v, y, p, **options), (v, p))
    flat = prototype_contrast(rows(v), y.flatten(), p, reduction='none', **options)
    assert flat.shape == (24,)
    torch.testing.assert_close(flat.view_as(y), each)


def literal_class_means_contrast(v, y, ignore_index, tau):
    "One pixel at a time: prototypes are the classes' unit mean embeddings, without gradient."
    units = [x/x.norm() for x in rows(v)]
    labels = y.flatten().tolist()
    members = {}
    for unit, label in zip(units, labels):
        if label != ignore_index:
            members.setdefault(label, []).append(unit.detach())
    means = {c: sum(m)/len(m) for c, m in members.items()}
    p = {c: m/m.norm() for c, m in means.items()}
    losses = []
    for unit, label in zip(units, labels):
        if label != ignore_index:
            exps = {c: torch.exp(unit @ p[c]/tau) for c in p}
            losses.append(-torch.log(exps[label]/sum(exps.values())))
    return sum(losses)/len(losses)


@pytest.mark.parametrize('ignore_index', [255, -1])
def test_without_prototypes_it_takes_the_class_means(ignore_index):
    "Also where a class between others has no pixel."
    v, y, _ = labelled_pixels(6, ignore_index=ignore_index)
    y = torch.where(y == 1, 2, y)
    assert {*y.unique().tolist()} == {0, 2, 3, 4, ignore_index}
    v = v.detach().double().requires_grad_()
    got = prototype_contrast(v, y, tau=.2, ignore_index=ignore_index)
    close(got.double(), literal_class_means_contrast(v, y, ignore_index, .2), [v])


def test_unknown_reduction_is_refused():
    v, y, p = labelled_pixels()
    with pytest.raises(ValueError, match="reduction is 'sum': choose from 'mean', 'none'"):
        prototype_contrast(v, y, p, reduction='sum')


@pytest.mark.parametrize('name', READINGS)
def test_the_cross_prototype_term_is_that_of_labelled_pixels(name):
    "Each view's pixels with the other view's prototypes; invalid pixels have the label -1."
    reading = READINGS[name]
    a, b, tags = views(9, 3, 4, 4, 4, 8)
    valid = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(2)) < .7
    b = b._replace(valid=valid)
    got = PixelToPrototypeContrast(5, .2, reading=reading)(a, b, tags).cross_prototype
    pixels = [view_pixels(x, tags, 5, reading) for x in (a, b)]
    assert (pixels[1].y == -1).any() and not (pixels[0].y == -1).any()
    terms = [prototype_contrast(x.embedding, mine.y.view(3, 4, 4), other.proto, .2, reading,
                                ignore_index=-1)
             for x, mine, other in ((a, *pixels), (b, *reversed(pixels)))]
    close(got, sum(terms)/(2 if reading.mean_views else 1), (a.embedding, b.embedding))


# --- contract 1: it compiles --------------------------------------------------------------------

COMPILERS = {
    'eager': dict(backend='eager'),
    # without this option inductor draws other random numbers for the same seed
    'inductor': dict(backend='inductor', options={'fallback_random': True}),
}


def compiled(function, name):
    "Compile in one graph; skips inductor where there is no C++ compiler."
    if name == 'inductor' and not shutil.which(os.environ.get('CXX', 'g++')):
        pytest.skip('inductor needs a C++ compiler')
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, **COMPILERS[name])


@pytest.mark.slow
@pytest.mark.parametrize('name', READINGS)
@pytest.mark.parametrize('compiler', COMPILERS)
def test_the_module_compiles(compiler, name):
    "Values and gradients equal those without compilation, random choices included."
    a, b, tags = views(12, 2, 3, 4, 4, 8)
    contrast = PixelToPrototypeContrast(4, reading=READINGS[name])
    got = outcome(compiled(contrast, compiler), a, b, tags)
    for x, y in zip(got, outcome(contrast, a, b, tags)):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('mining', [False, True])
@pytest.mark.parametrize('compiler', COMPILERS)
def test_the_functional_form_compiles(compiler, mining):
    "With given prototypes, and some pixels ignored."
    v, y, p = labelled_pixels(13, ignore_index=255)
    def loss(contrast):
        torch.manual_seed(0)
        return contrast(v, y, p, mining=mining)
    close(loss(compiled(prototype_contrast, compiler)), loss(prototype_contrast), (v, p))


# --- contract 2: two processes equal one --------------------------------------------------------

def joined_batch():
    "Two views of four images; the two processes hold unequal numbers of valid pixels."
    a, b, tags = views(11, 4, 6, 5, 5, 8)
    tags[2:, :3] = 0
    shares = torch.tensor([.9, .8, .5, .4])[:, None, None, None]
    valid = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(1)) < shares
    return View(*a[:2], valid), View(*b[:2], valid), tags


SPREAD = {**READINGS, 'ties': replace(OFFICIAL_READING, ties='all')}  # over processes


def fixed_draws(process, processes):
    "A `torch.rand_like` that gives a process its part of the numbers that one process would get."
    def draw(x, dtype=None):
        size, g = (processes*len(x), *x.shape[1:]), torch.Generator().manual_seed(3)
        return torch.rand(size, generator=g)[process*len(x):(process + 1)*len(x)]
    return draw


def part_of_batch(name, process, processes):
    "Losses, prototypes, and the gradient of the embeddings, of one process's part of the batch."
    old = torch.rand_like
    torch.rand_like = fixed_draws(process, processes)
    part = slice(process*4//processes, (process + 1)*4//processes)
    try:
        a, b, tags = joined_batch()
        a, b = (View(x.cam[part], x.embedding[part].detach().requires_grad_(), x.valid[part])
                for x in (a, b))
        losses = PixelToPrototypeContrast(7, reading=SPREAD[name])(a, b, tags[part])
        losses.total.backward()
        p = view_pixels(a, tags[part], 7, SPREAD[name]).proto
    finally:
        torch.rand_like = old
    found = torch.stack(losses), p.p, p.exists, a.embedding.grad, b.embedding.grad
    return [x.detach() for x in found]


def one_of_two(rank, port, out):
    "The work of one process."
    torch.set_num_threads(1)
    address = f'tcp://127.0.0.1:{port}'
    torch.distributed.init_process_group('gloo', init_method=address, rank=rank, world_size=2)
    for name in SPREAD:
        torch.save(part_of_batch(name, rank, 2), f'{out}/{name}{rank}.pt')
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    """Prototypes, losses and gradients equal those of one process on the joined batch.

    Processes average gradients, hence the half.
    """
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(one_of_two, (port, tmp_path), nprocs=2)
    for name in SPREAD:
        losses, p, exists, *grads = part_of_batch(name, 0, 1)
        parts = [torch.load(tmp_path/f'{name}{rank}.pt') for rank in range(2)]
        for part in parts:
            torch.testing.assert_close(part[1], p, atol=1e-6, rtol=0)
            assert (part[2] == exists).all()
        torch.testing.assert_close((parts[0][0] + parts[1][0])/2, losses, atol=1e-6, rtol=1e-6)
        for i, g in enumerate(grads):
            joined = torch.cat([part[3 + i] for part in parts])
            torch.testing.assert_close(joined/2, g, atol=1e-6, rtol=0)
