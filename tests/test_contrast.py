"The contrast against the paper's equations written out literally, pixel by pixel, in float64."
import math
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st
from ppc import mining
from ppc.contrast import PixelToPrototypeContrast, cross_cam_loss, cross_prototype_loss, intra_loss, pixels
from ppc.prototypes import prototypes
from ppc.views import View


# --- Eqs. 4-9, literally -------------------------------------------------------------------------------------------------

def ready(view, tags, K):
    "List of (image, y, x) pixels with unit embedding and label; prototypes {c: vector} (§3.2, Eq. 5)."
    N, C1, h, w = view.cam.shape
    cam = view.cam.detach().double().relu()
    m = torch.zeros(N, C1, h, w, dtype=torch.float64)
    for n in range(N):
        for c in range(1, C1):
            lo, hi = cam[n, c].min(), cam[n, c].max()
            m[n, c] = tags[n, c-1]*((cam[n, c] - lo - 1e-5)/(hi - lo + 1e-5)).relu()
        m[n, 0] = 1 - m[n, 1:].max(0).values
    v, y, where = [], [], []
    for n in range(N):
        for i in range(h):
            for j in range(w):
                e = view.embedding[n, :, i, j].double()
                v.append(e/e.norm().clamp(min=1e-12))
                fg = m[n, 1:, i, j]
                y.append(int(fg.argmax()) + 1 if fg.max() > .2 else 0)
                where.append((n, i, j))
    found = {}
    for c in range(C1):
        mine = [k for k in range(len(y)) if y[k] == c]
        mine = sorted(mine, key=lambda k: -m[where[k][0], c, where[k][1], where[k][2]].item())[:K]
        if not mine: continue
        p = sum(m[where[k][0], c, where[k][1], where[k][2]]*v[k].detach() for k in mine)
        found[c] = p/p.norm()
    return v, y, found


def F4(v, positive, P, negatives, tau):
    "Eq. 4 with the denominator over the positive and the negatives given."
    e = {c: torch.exp(v @ P[c]/tau) for c in {positive, *negatives}}
    return -torch.log(e[positive]/sum(e.values()))


def mean_over(v, y, P, tau):
    terms = [F4(v[i], y[i], P, P, tau) for i in range(len(v)) if y[i] in P]
    return sum(terms)/len(terms) if terms else torch.zeros((), dtype=torch.float64)


def views(seed, N, C, h, w, D):
    g = torch.Generator().manual_seed(seed)
    tags = (torch.rand(N, C, generator=g) < .5).float()
    tags[torch.arange(N), torch.randint(0, C, (N,), generator=g)] = 1
    def one(): return View(torch.rand(N, C + 1, h, w, generator=g), torch.rand(N, D, h, w, generator=g).requires_grad_())
    return one(), one(), tags


shapes = dict(seed=st.integers(0, 2**31), N=st.integers(1, 3), C=st.integers(1, 6), h=st.integers(1, 4), w=st.integers(1, 4), D=st.integers(2, 6), K=st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(**shapes)
def test_cross_terms_are_the_equations(seed, N, C, h, w, D, K):
    a, b, tags = views(seed, N, C, h, w, D)
    fast = [pixels(x, tags, K) for x in (a, b)]
    (va, ya, Pa), (vb, yb, Pb) = [ready(x, tags, K) for x in (a, b)]
    for got, want in [(cross_prototype_loss(*fast), mean_over(va, ya, Pb, .1) + mean_over(vb, yb, Pa, .1)),
                      (cross_cam_loss(*fast), mean_over(va, yb, Pa, .1) + mean_over(vb, ya, Pb, .1)),
                      (intra_loss(*fast, mine=False), mean_over(va, ya, Pa, .1) + mean_over(vb, yb, Pb, .1))]:
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
        if not want.requires_grad: continue
        for x in (a, b):
            g1, g2 = (torch.autograd.grad(l, x.embedding, retain_graph=True, allow_unused=True)[0] for l in (got, want))
            if g2 is not None: torch.testing.assert_close(g1, g2, atol=1e-5, rtol=1e-4)


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
        for i in sorted(mine, key=lambda i: -draw[i])[:len(mine)//2]: want[i] += 1
        for i in sorted(mine, key=lambda i: similarity[i])[:len(mine) - len(mine)//2]: want[i] += 1
    assert got.tolist() == want.tolist()


# --- properties ----------------------------------------------------------------------------------------------------------

def total(a, b, tags, **kw): return PixelToPrototypeContrast(k=4, mine=False, **kw)(a, b, tags).total


def test_order_of_images_and_classes_changes_nothing():
    a, b, tags = views(0, 4, 5, 4, 4, 8)
    want = total(a, b, tags)
    images = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(total(*(View(x.cam[images], x.embedding[images]) for x in (a, b)), tags[images]), want)
    order = torch.tensor([0, 3, 5, 1, 4, 2])
    torch.testing.assert_close(total(*(View(x.cam[:, order], x.embedding) for x in (a, b)), tags[:, order[1:] - 1]), want)


def test_length_of_embeddings_and_maps_changes_nothing():
    a, b, tags = views(1, 2, 5, 4, 4, 8)
    torch.testing.assert_close(total(View(3*a.cam, 7*a.embedding), b, tags), total(a, b, tags), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('N, C, tagged', [(1, 1, True), (1, 1, False), (3, 4, False), (1, 20, True)])
def test_corner_cases_are_finite(N, C, tagged):
    "One class only, no tag at all, a batch of one."
    a, b, _ = views(2, N, C, 3, 3, 8)
    losses = PixelToPrototypeContrast(k=100)(a, b, torch.full((N, C), float(tagged)))
    assert all(x.isfinite() for x in losses)
    losses.total.backward()
    assert a.embedding.grad.isfinite().all()


def test_invalid_pixels_take_no_part():
    a, b, tags = views(3, 2, 3, 4, 4, 8)
    valid = torch.rand(2, 1, 4, 4) < .5
    torch.manual_seed(0); want = PixelToPrototypeContrast(k=4)(View(a.cam, a.embedding, valid), b, tags).total
    garbage = torch.where(valid, a.embedding, torch.randn_like(a.embedding))
    P = [pixels(View(a.cam, e, valid), tags, 4).proto.p for e in (a.embedding, garbage)]
    torch.testing.assert_close(*P)
    grad, = torch.autograd.grad(intra_loss(*(pixels(View(a.cam, a.embedding, valid), tags, 4),)*2), a.embedding)
    assert want.isfinite() and (grad[~valid.expand_as(grad)] == 0).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(dtype):
    a, b, tags = views(4, 4, 20, 8, 8, 32)
    half = [View(x.cam.to(dtype), x.embedding.detach().to(dtype)) for x in (a, b)]
    torch.testing.assert_close(total(*half, tags), total(a, b, tags), atol=.05, rtol=.05)


def test_views_on_different_grids_are_refused():
    a, b, tags = views(5, 2, 3, 4, 4, 8)
    with pytest.raises(ValueError, match='paired_views'): PixelToPrototypeContrast()(a, View(b.cam[..., :3], b.embedding[..., :3]), tags)


def test_no_contrast_is_no_contrast():
    a, b, tags = views(6, 2, 3, 4, 4, 8)
    losses = PixelToPrototypeContrast(k=0)(a, b, tags)
    losses.total.backward()
    assert losses.total == 0 and (a.embedding.grad == 0).all()


# --- contract 2: two processes see what one sees ---------------------------------------------------------------------------

def batch():
    g = torch.Generator().manual_seed(0)
    return torch.rand(4, 8, 5, 5, generator=g), torch.rand(4, 6, 5, 5, generator=g), torch.randint(0, 6, (4, 5, 5), generator=g)


def half(rank, port, out):
    torch.distributed.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    torch.save(prototypes(*(x[2*rank:2*rank + 2] for x in batch()), 7), f'{out}/{rank}.pt')
    torch.distributed.destroy_process_group()


def test_prototypes_see_the_global_batch(tmp_path):
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    mp.spawn(half, (port, tmp_path), nprocs=2)
    want = prototypes(*batch(), 7)
    for rank in range(2):
        p, exists = torch.load(tmp_path/f'{rank}.pt', weights_only=False)
        torch.testing.assert_close(p, want.p, atol=1e-6, rtol=0)
        assert (exists == want.exists).all()
