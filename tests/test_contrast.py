"The contrast against both readings written out literally in float64, its properties, its corners, and two processes."
import math
from dataclasses import asdict, fields, replace
import literal
import pytest
import torch
import torch.multiprocessing as mp
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
    view_pixels,
)
from ppc.views import View

# --- both readings, literally ----------------------------------------------------------------------------------------------

def views(seed, N, C, h, w, D):
    g = torch.Generator().manual_seed(seed)
    tags = (torch.rand(N, C, generator=g) < .5).float()
    def one():
        v = torch.randn(N, D, h, w, generator=g).relu()
        return View(torch.randn(N, C + 1, h, w, generator=g), v.add(torch.rand(N, D, h, w, generator=g)*.1).requires_grad_())
    return one(), one(), tags


shapes = dict(seed=st.integers(0, 2**31), N=st.integers(1, 3), C=st.integers(1, 7), h=st.integers(1, 4), w=st.integers(1, 4), D=st.integers(2, 6), K=st.integers(1, 9))


def same(got, want, a, b):
    "Every term, and its gradient in both views, to 1e-5."
    for x, y in zip(got, want):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-5)
        if not y.requires_grad:
            continue
        grads = [torch.autograd.grad(l, (a.embedding, b.embedding), retain_graph=True, allow_unused=True, materialize_grads=True) for l in (x, y)]
        for g1, g2 in zip(*grads):
            torch.testing.assert_close(g1, g2, atol=1e-5, rtol=1e-4)


def untied(views, tags, K, reading):
    """Rounding decides nothing. No two prototypes are equally near to a pixel, no two pixels of a class to its prototype; and no two
    confidences differ by less than float32 can tell: the best pixels of two images are 1 - 1e-5/max, a hair apart, and the K best are chosen."""
    for x in views:
        fg = normalise_maps(x.cam[:, 1:].double(), reading.norm, clip=False)
        m = torch.cat([1 - (fg*tags[:, :, None, None]).amax(1, keepdim=True), fg], 1).transpose(0, 1).flatten(1)
        if any(((g > 0) & (g < 3e-7)).any() for g in (m.sort(0).values.diff(dim=0), m.sort(1).values.diff(dim=1))):
            return False
    for p in (view_pixels(x, tags, K, reading) for x in views):
        s = p.v.double() @ p.proto.p[p.proto.exists].double().t()
        own = (p.v.double()*p.proto.p[p.y].double()).sum(1)
        gaps = [s.sort(1).values.diff(dim=1), *(own[p.y == c].sort().values.diff() for c in p.y.unique())]
        if any((g < 1e-6).any() for g in gaps):
            return False
    return True


LAX = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


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


@pytest.mark.parametrize('name, shape', [('paper', (3, 20, 6, 6, 8, 12)), ('official', (3, 20, 6, 6, 8, 12))])
def test_readings_at_the_paper_s_number_of_classes(name, shape):
    a, b, tags = views(5, *shape[:-1])
    n = shape[0]*shape[2]*shape[3]
    torch.manual_seed(1)
    got = PixelToPrototypeContrast(shape[-1], reading=READINGS[name])(a, b, tags)[1:]
    torch.manual_seed(1)
    draws = [torch.rand(*size) for size in (((n, 21), (n,), (n, 21), (n,)) if name == 'paper' else ((n,), (n,)))]
    same(got, getattr(literal, name)(a, b, tags, shape[-1], draws), a, b)


@pytest.mark.parametrize('field', [f.name for f in fields(Reading) if f.name not in ('refined', 'grid')])
def test_every_option_matters(field):
    "Switching one option of a preset to the other's changes the loss: nothing is dead, and `official` ignores nothing that the code ignores."
    a, b, tags = views(7, 4, 6, 6, 6, 8)
    def loss(reading):
        torch.manual_seed(0)
        terms = PixelToPrototypeContrast(6, reading=reading)(a, b, tags)
        return torch.cat([x.flatten() for x in (*terms, *torch.autograd.grad(terms.total, (a.embedding, b.embedding)))])
    base = replace(PAPER_READING, background='constant') if field == 'level' else PAPER_READING
    if field in ('absent', 'ranked'):
        tags[:, 0] = 0
        base = replace(PAPER_READING, negatives='band')
    other = .5 if field == 'level' else asdict(OFFICIAL_READING)[field]
    assert asdict(base)[field] != other and not torch.allclose(loss(base), loss(replace(base, **{field: other})))


def test_official_sees_images_without_the_class():
    "Its prototypes change with the map of a class in an image that lacks it; the paper's do not."
    a, b, tags = views(8, 2, 3, 4, 4, 8)
    tags = torch.tensor([[1., 0, 0], [0, 1, 0]])
    louder = a.cam.clone()
    louder[1, 1] = a.cam[1, 1].flip(0)   # class 1, in the image that has only class 2
    for reading, changes in ((PAPER_READING, False), (OFFICIAL_READING, True)):
        p, q = (view_pixels(View(cam, a.embedding), tags, 4, reading).proto.p[1] for cam in (a.cam, louder))
        assert torch.equal(p, q) != changes


def test_unknown_choice_is_refused():
    with pytest.raises(ValueError, match='rest, constant, lowest'):
        Reading(background='median')
    with pytest.raises(TypeError, match='backgruond'):
        Reading(backgruond='rest')


def literal_mining(similarity, y, exists, draw, hardest=.6, keep=.5):
    "Top 60 % of the negatives, of them the half with the largest draw; shares rounded, at least one."
    chosen = []
    for i in range(len(y)):
        negatives = [c for c in range(len(exists)) if exists[c] and c != y[i]]
        hard = sorted(negatives, key=lambda c: -similarity[i][c])
        hard = hard[:min(len(hard), max(1, math.floor(hardest*len(hard) + .5)))]
        chosen.append(set(sorted(hard, key=lambda c: -draw[i][c])[:min(len(hard), max(1, math.floor(keep*len(hard) + .5)))]))
    return chosen


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(2, 22))
def test_semi_hard_negatives_are_those_of_the_text(seed, n, classes):
    torch.manual_seed(seed)
    similarity, y, exists = torch.rand(n, classes)*2 - 1, torch.randint(0, classes, (n,)), torch.rand(classes) < .7
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


# --- properties ----------------------------------------------------------------------------------------------------------

PLAIN = {name: replace(r, negatives='all' if name == 'paper' else r.negatives, pixels='all') for name, r in READINGS.items()}   # nothing drawn

def total(a, b, tags, reading=PLAIN['paper']): return PixelToPrototypeContrast(k=4, reading=reading)(a, b, tags).total


@pytest.mark.parametrize('name', READINGS)
@pytest.mark.parametrize('seed', range(3))
def test_order_of_images_pixels_and_classes_changes_nothing(name, seed):
    "Where confidences are not tied: of equal ones the first are taken. All of the authors' background is one tie, hence all pixels there."
    a, b, tags = views(seed, 4, 5, 4, 4, 8)
    a, b, tags = View(a.cam.abs(), a.embedding), View(b.cam.abs(), b.embedding), tags.index_fill(1, torch.tensor(seed), 1)
    def total(a, b, tags):
        return PixelToPrototypeContrast(4 if name == 'paper' else 64, reading=PLAIN[name])(a, b, tags).total
    want = total(a, b, tags)
    images, order, places = torch.tensor([2, 0, 3, 1]), torch.tensor([0, 3, 5, 1, 4, 2]), torch.randperm(16)
    torch.testing.assert_close(total(*(View(x.cam[images], x.embedding[images]) for x in (a, b)), tags[images]), want)
    torch.testing.assert_close(total(*(View(x.cam[:, order], x.embedding) for x in (a, b)), tags[:, order[1:] - 1]), want)
    mixed = [View(*(t.flatten(2)[..., places].view_as(t) for t in x[:2])) for x in (a, b)]
    torch.testing.assert_close(total(*mixed, tags), want)


@pytest.mark.parametrize('name', READINGS)
def test_length_of_embeddings_and_maps_changes_nothing(name):
    "One factor for all; in the paper's reading also one for each pixel."
    a, b, tags = views(1, 2, 5, 4, 4, 8)
    want = total(a, b, tags, PLAIN[name])
    torch.testing.assert_close(total(View(3*a.cam, 7*a.embedding), b, tags, PLAIN[name]), want, atol=1e-4, rtol=1e-4)
    uneven = total(View(a.cam, a.embedding*(torch.rand(2, 1, 4, 4) + .1)), b, tags, PLAIN[name])
    assert torch.allclose(uneven, want, atol=1e-5) == (name == 'paper')


@pytest.mark.parametrize('name', READINGS)
@pytest.mark.parametrize('N, C, tagged', [(1, 1, True), (1, 1, False), (3, 4, False), (1, 20, True)])
def test_corner_cases_are_finite(name, N, C, tagged):
    "One class only, no tag at all, a batch of one."
    a, b, _ = views(2, N, C, 3, 3, 8)
    losses = PixelToPrototypeContrast(k=100, reading=READINGS[name])(a, b, torch.full((N, C), float(tagged)))
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
        return PixelToPrototypeContrast(4, reading=READINGS[name])(View(cam, embedding, valid), View(b.cam, b.embedding, valid), tags).total
    garbage = [torch.where(valid, x, 9*torch.randn_like(x)) for x in a[:2]]
    torch.testing.assert_close(loss(*garbage), loss(*a[:2]))
    grad, = torch.autograd.grad(loss(*a[:2]), a.embedding)
    assert (grad[~valid.expand_as(grad)] == 0).all() and (grad != 0).any()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', READINGS)
def test_half_precision_is_finite_and_close(name, dtype):
    a, b, tags = views(4, 4, 20, 8, 8, 32)
    half = [View(x.cam.to(dtype), x.embedding.detach().to(dtype).requires_grad_()) for x in (a, b)]
    with torch.autocast('cpu', dtype):
        got = total(*half, tags, PLAIN[name])
    torch.testing.assert_close(got, total(a, b, tags, PLAIN[name]), atol=.05, rtol=.05)
    assert torch.autograd.grad(got, half[0].embedding)[0].isfinite().all()


def test_views_on_different_grids_are_refused():
    a, b, tags = views(5, 2, 3, 4, 4, 8)
    with pytest.raises(ValueError, match='paired_views'):
        PixelToPrototypeContrast()(a, View(b.cam[..., :3], b.embedding[..., :3]), tags)


def test_no_contrast_is_no_contrast():
    a, b, tags = views(6, 2, 3, 4, 4, 8)
    losses = PixelToPrototypeContrast(k=0)(a, b, tags)
    losses.total.backward()
    assert losses.total == 0 and (a.embedding.grad == 0).all()


# --- contract 2: two processes see what one sees ---------------------------------------------------------------------------

def joined_batch():
    "The last argument of each view: where it shows something. The processes hold unequal numbers of those pixels."
    a, b, tags = views(11, 4, 6, 5, 5, 8)
    tags[2:, :3] = 0
    valid = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(1)) < torch.tensor([.9, .8, .5, .4])[:, None, None, None]
    return View(*a[:2], valid), View(*b[:2], valid), tags


def fixed_draws(process, processes):
    "What `torch.rand_like` gives to one of several processes is its part of what one process would get."
    def draw(x, dtype=None):
        everything = torch.rand(processes*len(x), *x.shape[1:], generator=torch.Generator().manual_seed(3))
        return everything[process*len(x):(process + 1)*len(x)]
    return draw


def look(name, process, processes):
    "Losses, prototypes, and the gradient of the embeddings, of one process' part of the batch."
    torch.rand_like, old = fixed_draws(process, processes), torch.rand_like
    part = slice(process*4//processes, (process + 1)*4//processes)
    try:
        a, b, tags = joined_batch()
        a, b = (View(x.cam[part], x.embedding[part].detach().requires_grad_(), x.valid[part]) for x in (a, b))
        losses = PixelToPrototypeContrast(7, reading=READINGS[name])(a, b, tags[part])
        losses.total.backward()
        p = view_pixels(a, tags[part], 7, READINGS[name]).proto
    finally:
        torch.rand_like = old
    return [x.detach() for x in (torch.stack(losses), p.p, p.exists, a.embedding.grad, b.embedding.grad)]


def half(rank, port, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    for name in READINGS:
        torch.save(look(name, rank, 2), f'{out}/{name}{rank}.pt')
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    "Prototypes, losses and gradients equal those of one process on the joined batch; processes average gradients, hence the half."
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(half, (port, tmp_path), nprocs=2)
    for name in READINGS:
        losses, p, exists, *grads = look(name, 0, 1)
        parts = [torch.load(tmp_path/f'{name}{rank}.pt') for rank in range(2)]
        for part in parts:
            torch.testing.assert_close(part[1], p, atol=1e-6, rtol=0)
            assert (part[2] == exists).all()
        torch.testing.assert_close((parts[0][0] + parts[1][0])/2, losses, atol=1e-6, rtol=1e-6)
        for i, g in enumerate(grads):
            torch.testing.assert_close(torch.cat([part[3 + i] for part in parts])/2, g, atol=1e-6, rtol=0)
