"""SEAM and EPS against their definitions written out literally, in float64.

Map by map and pixel by pixel: values and gradients.
"""
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal import gradients
from ppc import seam
from ppc.backbones import Tiny
from ppc.cam import CamNet, Maps, class_loss, masked_average_pool
from ppc.eps import eps_losses, saliency_estimate, saliency_loss, saliency_losses
from ppc.seam import PCM, affinity_columns, seam_losses, spread
from ppc.views import random_transformation, resize

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**20)


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, check_dtype=False)


def same_gradients(got, want, leaves):
    "Two scalars have the same gradient at every leaf (none counts as zero)."
    for g, w in zip(gradients(got, leaves), gradients(want, leaves)):
        close(g, w)


def reached(net):
    "The parts of a network that have a gradient."
    names = [n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()]
    return {n.split('.')[0] for n in names}


# --- SEAM, literally ----------------------------------------------------------------------------

def bilinear(n, out):
    "(out, n): the weight of each old pixel in each new one, first on first and last on last."
    m = torch.zeros(out, n, dtype=torch.float64)
    for i in range(out):
        p = i*(n - 1)/(out - 1)
        k = min(int(p), n - 2)
        m[i, k], m[i, k + 1] = 1 - (p - k), p - k
    return m


def to(x, size):
    "Resize the last two dimensions."
    return bilinear(x.shape[-2], size) @ x @ bilinear(x.shape[-1], size).T


def literal_pcm(cam, image, taps, reducers, mix):
    "Section 3's table, one image at a time."
    N, C1, h, w = cam.shape
    refined = []
    for n in range(N):
        m = torch.zeros(C1, h*w, dtype=torch.float64)
        fg = [cam[n, c].detach().clamp(min=0).flatten() for c in range(1, C1)]
        fg = [x/(x.max() + 1e-5) for x in fg]
        for i in range(h*w):
            best = max(x[i].item() for x in fg)
            m[0, i] = 1 - best
            for c in range(1, C1):
                if fg[c-1][i] >= best:
                    m[c, i] = fg[c-1][i]
        low = [to(t[n].detach(), h).flatten(1) for t in taps]   # (channels, hw)
        reduced = [(r @ x).clamp(min=0) for r, x in zip(reducers, low)]
        g = mix @ torch.cat([to(image[n], h).flatten(1), *reduced])
        refined.append(literal_spread(m, g.T).view(C1, h, w))
    return torch.stack(refined)


def literal_spread(m, g):
    "Maps (C+1, n) spread over pixels of similar features (n, channels)."
    g = [v/((v*v).sum().sqrt() + 1e-5) for v in g]
    spread = []
    for g_j in g:
        a = [(g_i*g_j).sum().clamp(min=0) for g_i in g]
        spread.append(sum(m[:, i]*a_i for i, a_i in enumerate(a))/(sum(a) + 1e-5))
    return torch.stack(spread, 1)


def literal_stretch(x, seen):
    "One map: ReLU, from its smallest to its largest value among the seen."
    x = x.clamp(min=0)
    lo, hi = x[seen].min(), x[seen].max()
    return (x - lo - 1e-5).clamp(min=0)/(hi - lo + 1e-5)


def literal_class_loss(cam, tags, valid):
    "Multi-label soft margin of one image's pooled maps; `tags` has the background in front."
    total, C1 = 0., len(cam)
    for c in range(1, C1):
        p = 1/(1 + torch.exp(-cam[c][valid].mean()))
        total = total - (tags[c]*torch.log(p) + (1 - tags[c])*torch.log(1 - p))/(C1 - 1)
    return total


def literal_low_sum(refined, tags, valid):
    "Min-pooling of one image: sum over the lowest quarter of its best tagged scores, and count."
    best = torch.stack([refined[c]*tags[c] for c in range(1, len(refined))]).amax(0)[valid]
    k = len(best)//4
    return best.sort().values[:k].clamp(min=0).sum(), k


def literal_ecr_sum(cam, refined, valid):
    "ECR of one image and one direction: sum over the largest fifth of the entries, and count."
    entries, C1 = [], len(cam)
    for i, j in valid.nonzero().tolist():
        fg = [cam[c, i, j].item() for c in range(1, C1)]
        for c in range(C1):
            if c == 0:
                kept = 1 - max(fg)
            else:
                kept = fg[c-1] if fg[c-1] == max(fg) else 0.
            entries.append((kept - refined[c, i, j]).abs())
    k = int(.2*len(entries))
    return torch.stack(entries).sort(descending=True).values[:k].sum(), k


def literal_seam(source, target, sizes, tags, move=None, seen=None):
    """Section 4, one image, one channel, one pixel at a time.

    `move` maps one stretched map of the source to the target's size, default: resize.
    """
    N, C1, (S, T) = *source.cam.shape[:2], sizes
    move = move or (lambda n, x: to(x, T))
    everywhere = torch.ones(N, S, S, dtype=torch.bool)
    seen = torch.ones(N, T, T, dtype=torch.bool) if seen is None else seen
    cls = er_sum = 0.
    er_count, ecr_count, low_counts, ecr_sums, low_sums = 0, 0, [0, 0], [0., 0.], [0., 0.]
    for n in range(N):
        tagged, cams, refineds = [1., *tags[n].tolist()], [], []
        views = (source, S, everywhere[n]), (target, T, seen[n])
        for view, (maps, size, valid) in enumerate(views):
            cam, refined = to(maps.cam[n], size), to(maps.refined[n], size)
            cls = cls + literal_class_loss(cam, tagged, valid)/N/2
            low, k = literal_low_sum(refined, tagged, valid)
            low_sums[view] = low_sums[view] + low
            low_counts[view] += k
            for stretched, x in ((cams, cam), (refineds, refined)):
                channels = [literal_stretch(x[c], valid)*tagged[c] for c in range(C1)]
                stretched.append(torch.stack(channels))
        cams[0], refineds[0] = move(n, cams[0]), move(n, refineds[0])
        for c in range(1, C1):
            er_sum = er_sum + (cams[0][c] - cams[1][c])[seen[n]].abs().sum()
        er_count += (C1 - 1)*int(seen[n].sum())
        for way, pair in enumerate(((cams[1], refineds[0]), (cams[0], refineds[1]))):
            largest, k = literal_ecr_sum(*pair, seen[n])
            ecr_sums[way] = ecr_sums[way] + largest
            ecr_count += k if way == 0 else 0
    zero = source.cam.sum()*0
    lowest = sum(total/max(k, 1) for total, k in zip(low_sums, low_counts))/2
    return {'cls': cls, 'er': er_sum/max(er_count, 1) + zero,
            'ecr': sum(ecr_sums)/max(ecr_count, 1) + zero, 'min': lowest + zero}


def random_maps(N, C, h, refined=True):
    "Float64 leaves, as a network might give them."
    def leaf(c): return torch.randn(N, c, h, h, dtype=torch.float64).requires_grad_()
    return Maps(leaf(C + 1), leaf(C + 1) if refined else None, None)


def random_tags(N, C): return torch.randint(0, 2, (N, C)).double()


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 4000))
def test_pcm_in_parts_is_the_whole(seed, N, C1, n, entries):
    torch.manual_seed(seed)
    m, g = torch.rand(N, C1, n), torch.nn.functional.normalize(torch.randn(N, 6, n), dim=1)
    whole = m @ affinity_columns(g, g)
    torch.testing.assert_close(spread(m, g, entries), whole, atol=1e-6, rtol=0)
    g.requires_grad_()
    parts = spread(m, g, entries)
    assert torch.equal(parts, m @ affinity_columns(g, g))   # where there is a gradient: at once
    same_gradients((parts**2).sum(), ((m @ affinity_columns(g, g))**2).sum(), [g])


def test_pcm_never_holds_all_pairs(monkeypatch):
    "Of eight images of 40 x 40, mirrored, at most so many entries at once."
    largest, columns = [], seam.affinity_columns
    def counted(g, part):
        largest.append(len(g)*g.shape[2]*part.shape[2])
        return columns(g, part)
    monkeypatch.setattr(seam, 'affinity_columns', counted)
    with torch.no_grad():
        PCM([3, 5], (4, 6))(torch.randn(16, 3, 40, 40), torch.randn(16, 3, 320, 320),
                            [torch.randn(16, 3, 40, 40), torch.randn(16, 5, 40, 40)])
    assert max(largest) <= seam.AFFINITY_ENTRIES < sum(largest) == 16*1600*1600



@settings(max_examples=12, deadline=None)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(2, 5),
       st.tuples(st.integers(2, 7), st.integers(2, 5)), seeds)
def test_pcm_is_the_literal_one(N, C, h, sides, seed):
    """Value, gradient of the three convolutions, and none elsewhere.

    Low-level maps of any size are brought to the map's.
    """
    torch.manual_seed(seed)
    pcm = PCM([3, 5], (4, 6)).double()
    cam = torch.randn(N, C + 1, h, h, dtype=torch.float64)
    image = torch.randn(N, 3, 9, 9, dtype=torch.float64)
    low_level = [torch.randn(N, c, s, s, dtype=torch.float64) for c, s in zip((3, 5), sides)]
    leaves = [x.requires_grad_() for x in (cam, *low_level)]
    got = pcm(cam, image, low_level)
    reducers = [c.weight[:, :, 0, 0] for c in pcm.reduce]
    want = literal_pcm(cam, image, low_level, reducers, pcm.mix.weight[:, :, 0, 0])
    close(got, want)
    weight = torch.randn_like(got)
    same_gradients((got*weight).sum(), (want*weight).sum(), list(pcm.parameters()))
    assert all(g is None for g in torch.autograd.grad(got.sum(), leaves, allow_unused=True))


@quick
@given(st.integers(1, 3), st.integers(1, 4), st.tuples(st.integers(2, 5), st.integers(2, 4)),
       st.tuples(st.integers(2, 8), st.integers(2, 6)), seeds)
def test_seam_is_the_literal_one(N, C, grids, sizes, seed):
    torch.manual_seed(seed)
    source, target = random_maps(N, C, grids[0]), random_maps(N, C, grids[1])
    tags = random_tags(N, C)
    got = seam_losses(source, target, sizes, tags)
    want = literal_seam(source, target, sizes, tags)
    leaves = [*source[:2], *target[:2]]
    for k in want:
        close(got[k], want[k])
        same_gradients(got[k], want[k], leaves)


@quick
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 5), st.integers(4, 7), st.booleans(),
       st.sampled_from([0, 20]), st.sampled_from([0, 16]), seeds)
def test_transformed_seam_is_the_literal_one_over_valid_pixels(
        N, C, h, size, flip, rotate, translate, seed):
    torch.manual_seed(seed)
    source, target, tags = random_maps(N, C, h), random_maps(N, C, h), random_tags(N, C)
    a = random_transformation(N, 64, flip, rotate, translate)
    def move(n, x): return type(a)(a.theta[n:n+1])(x[None], size)[0]
    got = seam_losses(source, target, (6, size), tags, a)
    want = literal_seam(source, target, (6, size), tags, move, a.valid(size)[:, 0])
    for k in want:
        close(got[k], want[k])
        same_gradients(got[k], want[k], [*source[:2], *target[:2]])


@quick
@given(st.integers(1, 3), st.integers(1, 3), seeds)
def test_a_transformation_that_does_nothing(N, C, seed):
    torch.manual_seed(seed)
    source, target, tags = random_maps(N, C, 5), random_maps(N, C, 4), random_tags(N, C)
    plain = seam_losses(source, target, (8, 6), tags)
    still = seam_losses(source, target, (8, 6), tags, random_transformation(N, 64))
    for k in plain:
        close(still[k], plain[k])
        same_gradients(still[k], plain[k], [*source[:2], *target[:2]])


@quick
@given(st.integers(1, 3), st.integers(1, 3), seeds)
def test_invalid_pixels_enter_no_loss(N, C, seed):
    """Losses and gradients do not depend on the target's maps at invalid pixels.

    No gradient reaches those pixels.
    """
    torch.manual_seed(seed)
    source, tags = random_maps(N, C, 6), random_tags(N, C)
    a = random_transformation(N, 64, True, 20, 16)
    seen, s = a.valid(8), torch.rand(N, 1, 16, 16, dtype=torch.float64)
    quiet = random_maps(N, C, 8)
    noisy = [torch.where(seen, x, 100*torch.randn_like(x)).detach() for x in quiet[:2]]
    loud = Maps(*(x.requires_grad_() for x in noisy), None)
    losses = [seam_losses(source, t, (8, 8), tags, a)
              | {'sal': saliency_losses(source, t, s, tags, a=a)} for t in (quiet, loud)]
    for k in losses[0]:
        close(losses[0][k], losses[1][k])
        for x, y in zip(quiet[:2], loud[:2]):
            (g,), (h,) = [torch.autograd.grad(terms[k], z, allow_unused=True, retain_graph=True)
                          for terms, z in zip(losses, (x, y))]
            if g is None:
                assert h is None
                continue
            close(g*seen, h*seen)
            assert not h[~seen.expand_as(h)].any()


def small_net(dropout=0.):
    torch.manual_seed(0)
    backbone = Tiny()
    return CamNet(backbone, 4, 8, PCM(backbone.channels[:2]), dropout)


def test_gradients_of_each_loss():
    """ER and classification reach backbone and classifier, ECR and min-pooling only the PCM.

    The background's classifier row gets a gradient from none of them.
    """
    net, image = small_net(), torch.randn(2, 3, 64, 64)
    tags = torch.tensor([[1., 0, 1], [0, 1, 0]])
    for a in (None, random_transformation(2, 64, True, 20, 8)):
        target = net(resize(image, 32) if a is None else a(image, 32))
        terms = seam_losses(net(image), target, (64, 32), tags, a)
        for k, v in terms.items():
            net.zero_grad()
            v.backward(retain_graph=True)
            outside = k in ('cls', 'er')
            assert reached(net) == ({'backbone', 'classifier'} if outside else {'refine'}), k
            if outside:
                assert not net.classifier.weight.grad[0].any()
            if k in ('ecr', 'min'):
                assert all(p.grad.any() for p in net.refine.parameters())


def test_dropout_feeds_both_heads_the_same():
    "The same random channels, whole ones, none at test time or by default."
    net, plain = small_net(.5).train(), small_net().train()
    image, seen = torch.randn(2, 3, 64, 64), {}
    for head in ('classifier', 'projector'):
        def hook(module, inputs, output, head=head): seen[head] = inputs[0]
        getattr(net, head).register_forward_hook(hook)
    net(image)
    assert seen['classifier'] is seen['projector']
    last = net.backbone(image)[-1]
    kept = (seen['classifier'] == 2*last).all(-1).all(-1)
    gone = (seen['classifier'] == 0).all(-1).all(-1)
    assert (kept | gone).all() and .3 < (gone & ~kept).float().mean() < .7
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    maps = plain(image)
    assert torch.equal(torch.rand(2), expected)   # default: no random number is used
    for x, y in zip(net.eval()(image), maps):
        close(x, y)
    assert net.state_dict().keys() == plain.state_dict().keys()


def test_class_loss_pools_valid_pixels():
    torch.manual_seed(0)
    cam, tags = torch.randn(2, 4, 6, 6), random_tags(2, 3)
    valid = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    valid[0, :, 2:, 1:4] = True
    close(masked_average_pool(cam, valid)[0], cam[0, :, 2:, 1:4].mean((1, 2)))
    assert not masked_average_pool(cam, valid)[1].any()
    assert torch.equal(class_loss(cam, tags, None), class_loss(cam, tags))
    close(class_loss(cam, tags, torch.ones_like(valid)), class_loss(cam, tags))
    close(class_loss(cam[:1], tags[:1], valid[:1]), class_loss(cam[:1, :, 2:, 1:4], tags[:1]))


# --- EPS, literally -----------------------------------------------------------------------------

def literal_saliency(cam, saliency, tags, lam, tau, seen=None):
    "Section 10, pixel by pixel: list of estimates (h, w), and the loss."
    N, C1, h, w = cam.shape
    H, W = saliency.shape[2:]
    estimates, total, count = [], 0., 0
    for n in range(N):
        pixels = [(i, j) for i in range(h) for j in range(w)]
        s = {(i, j): saliency[n, 0, i*H//h, j*W//w] for i, j in pixels}   # nearest, as in torch
        p = {ij: literal_softmax(cam[n, :, ij[0], ij[1]]) for ij in pixels}
        inside = [ij for ij in pixels if seen is None or seen[n, 0][ij]]
        fg, bg = [], [0]
        for c in range(1, C1):
            wins = [round(p[ij][c].item()) for ij in inside]
            both = [win*round(s[ij].item()) for win, ij in zip(wins, inside)]
            if tags[n, c-1] == 1:
                salient = inside and sum(both)/(sum(wins) + 1e-4*len(inside)) > tau
                (fg if salient else bg).append(c)
        e = {ij: lam*sum(p[ij][c] for c in fg) + (1 - lam)*(1 - sum(p[ij][c] for c in bg))
             for ij in pixels}
        estimates.append(torch.stack([torch.as_tensor(e[ij]) for ij in pixels]).view(h, w))
        for ij in inside:
            total, count = total + (e[ij] - s[ij])**2, count + 1
    return estimates, total/max(count, 1)


def literal_softmax(x):
    total = sum(torch.exp(v) for v in x)
    return [torch.exp(v)/total for v in x]


def random_saliency(kind, N, H):
    "Random, or all zero, or all one."
    maps = {'soft': torch.rand(N, 1, H, H), 'zero': torch.zeros(N, 1, H, H),
            'one': torch.ones(N, 1, H, H)}
    return maps[kind].double()


sharpness = st.sampled_from([.5, 2., 8.])
kinds = st.sampled_from(['soft', 'zero', 'one'])
taus = st.one_of(st.sampled_from([0., .4, 1.]), st.floats(0, 1))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9),
       sharpness, kinds, st.floats(0, 1), taus, seeds)
def test_eps_is_the_literal_one(N, C, h, H, sharp, kind, lam, tau, seed):
    torch.manual_seed(seed)
    cam = (sharp*torch.randn(N, C + 1, h, h, dtype=torch.float64)).requires_grad_()
    tags, s = random_tags(N, C), random_saliency(kind, N, H)
    estimates, want = literal_saliency(cam, s, tags, lam, tau)
    got = saliency_loss(cam, s, tags, lam, tau)
    near = torch.nn.functional.interpolate(s, size=(h, h))
    close(saliency_estimate(cam, near, tags, lam, tau)[:, 0], torch.stack(estimates))
    close(got, want)
    same_gradients(got, want, [cam])


@quick
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 5), st.floats(0, 1), taus, seeds)
def test_eps_over_valid_pixels(N, C, h, lam, tau, seed):
    torch.manual_seed(seed)
    cam = (3*torch.randn(N, C + 1, h, h, dtype=torch.float64)).requires_grad_()
    tags, s = random_tags(N, C), random_saliency('soft', N, h)
    seen = torch.rand(N, 1, h, h) < .6
    got = saliency_loss(cam, s, tags, lam, tau, seen)
    _, want = literal_saliency(cam, s, tags, lam, tau, seen)
    close(got, torch.as_tensor(want))
    if seen.any():
        same_gradients(got, want, [cam])


@quick
@given(st.integers(1, 2), st.integers(1, 3), st.booleans(), st.booleans(), st.booleans(), seeds)
def test_saliency_of_views_and_kinds_of_maps(N, C, two, refined, moved, seed):
    """The mean over the views of the CAMs' loss plus that of the refined maps.

    The target's saliency is the source's through A.
    """
    torch.manual_seed(seed)
    source, target = random_maps(N, C, 4, refined), random_maps(N, C, 3, refined)
    tags, s = random_tags(N, C), random_saliency('soft', N, 10)
    a = random_transformation(N, 64, True, 20, 16) if moved else None
    second, views = None, [(source, s, None)]
    if two:
        second = target
        views.append((target, a(s, 3), a.valid(3)) if moved else (target, to(s, 3), None))
    got = saliency_losses(source, second, s, tags, .3, .2, a)
    maps = [(m, x, seen) for v, x, seen in views for m in v[:2] if m is not None]
    want = sum(literal_saliency(m, x, tags, .3, .2, seen)[1] for m, x, seen in maps)/len(views)
    close(got, want)
    same_gradients(got, want, [m for m, *_ in maps])
    if not moved:
        still = random_transformation(N, 64)
        close(saliency_losses(source, second, s, tags, .3, .2, still), got)


def test_eps_terms():
    torch.manual_seed(0)
    source, tags = random_maps(2, 3, 4, refined=False), random_tags(2, 3)
    s = random_saliency('soft', 2, 8)
    terms = eps_losses(source, s, tags, .3, .2)
    assert list(terms) == ['cls', 'sal']
    close(terms['cls'], class_loss(source.cam, tags))
    close(terms['sal'], saliency_loss(source.cam, s, tags, .3, .2))


def test_eps_corner_cases():
    "The definition where maps, tags or saliency are extreme."
    torch.manual_seed(0)
    cam, s = 5*torch.randn(1, 4, 6, 6), torch.rand(1, 1, 6, 6)
    p, every, none, one = cam.softmax(1), torch.ones(1, 3), torch.zeros(1, 3), torch.ones(1, 1)
    zero, full = torch.zeros(1, 1, 6, 6), torch.ones(1, 1, 6, 6)
    close(saliency_estimate(cam, s, none, .3), .7*(1 - p[:, :1]))   # no tag: not background
    close(saliency_estimate(cam, 0*s, every, .3, 0.), zero)   # nothing salient: all background
    close(saliency_estimate(cam, s, every, .3, 1.), zero)   # tau 1: no class can
    salient = saliency_estimate(cam, full, every, .3, .9)   # every winner is foreground
    close(salient, 1 - p[:, :1])
    two = 5*torch.randn(1, 2, 6, 6)
    single = saliency_estimate(two, full, one, .3)   # one class: its probability
    close(single, two.softmax(1)[:, 1:])
    half = torch.zeros(1, 2, 6, 6, requires_grad=True)
    close(saliency_estimate(half, full, one, .3, 0.), zero)   # one half wins nothing, as by round()
    lone = torch.zeros(1, 2, 6, 6).index_fill_(1, torch.tensor(0), 9.)
    lone[0, 1, 2, 2] = 20   # one pixel of 36 won, and salient: 1/(1 + 36e-4)
    for tau, won in ((.9963, 1.), (.9965, 0.)):
        found = saliency_estimate(lone, full, one, 1., tau)[0, 0, 2, 2]
        close(found.round(), torch.tensor(won))
    nowhere = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    assert saliency_loss(cam, s, every, valid=nowhere) == 0


def test_untagged_classes_do_not_count():
    """An untagged class gets its gradient only through the softmax.

    Exchanging two untagged channels changes nothing.
    """
    torch.manual_seed(0)
    cam, s = 3*torch.randn(2, 5, 6, 6), torch.rand(2, 1, 6, 6)
    tags = torch.tensor([[1., 0, 0, 1]]*2)
    close(saliency_loss(cam, s, tags), saliency_loss(cam[:, [0, 1, 3, 2, 4]], s, tags))


def test_saliency_trains_backbone_and_classifier_of_all_channels():
    """On the refined map it trains the PCM too.

    The classifier's background row gets a gradient here, as it does from no loss of SEAM.
    """
    net, image = small_net(), torch.randn(2, 3, 64, 64)
    tags, s = torch.tensor([[1., 0, 1], [0, 1, 0]]), torch.rand(2, 1, 64, 64)
    maps, always = net(image), {'backbone', 'classifier'}
    for view, parts in ((maps._replace(refined=None), always), (maps, always | {'refine'})):
        net.zero_grad()
        saliency_losses(view, None, s, tags).backward(retain_graph=True)
        assert reached(net) == parts
        assert net.classifier.weight.grad[0].any()
