"SEAM and EPS against their definitions written out literally, map by map and pixel by pixel, in float64: values and gradients."
import math
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ppc.backbones import Tiny
from ppc.cam import CamNet, Maps, class_loss, masked_average_pool
from ppc.eps import eps_losses, saliency_estimate, saliency_loss, saliency_losses
from ppc.seam import PCM, seam_losses
from ppc.views import random_transformation, resize

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**20)


def close(got, want): torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, check_dtype=False)


def same_gradients(got, want, leaves):
    "Two scalars have the same gradient at every leaf (none counts as zero)."
    pairs = zip(*[torch.autograd.grad(x, leaves, allow_unused=True, retain_graph=True) if x.requires_grad else [None]*len(leaves) for x in (got, want)])
    for leaf, (g, w) in zip(leaves, pairs):
        close(torch.zeros_like(leaf) if g is None else g, torch.zeros_like(leaf) if w is None else w)


# --- SEAM, literally -----------------------------------------------------------------------------------------------------

def bilinear(n, out):
    "(out, n): the weight of each old pixel in each new one, first on first and last on last."
    m = torch.zeros(out, n, dtype=torch.float64)
    for i in range(out):
        p = i*(n - 1)/(out - 1)
        k = min(int(p), n - 2)
        m[i, k], m[i, k + 1] = 1 - (p - k), p - k
    return m


def to(x, size): return bilinear(x.shape[-2], size) @ x @ bilinear(x.shape[-1], size).T   # the last two dimensions of anything


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
        low = [to(t[n].detach(), h).flatten(1) for t in taps]                      # (channels, hw)
        g = mix @ torch.cat([to(image[n], h).flatten(1)] + [(r @ x).clamp(min=0) for r, x in zip(reducers, low)])
        g = torch.stack([v/((v*v).sum().sqrt() + 1e-5) for v in g.T])              # (hw, channels)
        a = torch.stack([torch.stack([(g[i]*g[j]).sum().clamp(min=0) for j in range(h*w)]) for i in range(h*w)])
        out = [sum(m[:, i]*a[i, j] for i in range(h*w))/(sum(a[i, j] for i in range(h*w)) + 1e-5) for j in range(h*w)]
        refined.append(torch.stack(out, 1).view(C1, h, w))
    return torch.stack(refined)


def literal_stretch(x, seen):
    "One map: ReLU, from its smallest to its largest value among the seen."
    x = x.clamp(min=0)
    lo, hi = x[seen].min(), x[seen].max()
    return (x - lo - 1e-5).clamp(min=0)/(hi - lo + 1e-5)


def literal_seam(source, target, sizes, tags, move=None, seen=None):
    "Section 4, one image, one channel, one pixel at a time. `move` maps one stretched map of the source to the target's size, default: resize."
    N, C1, (S, T) = *source.cam.shape[:2], sizes
    move = move or (lambda n, x: to(x, T))
    everywhere = torch.ones(N, S, S, dtype=torch.bool)
    seen = torch.ones(N, T, T, dtype=torch.bool) if seen is None else seen
    cls = low = er = ecr = 0.
    er_count, ecr_count, low_counts, er_sum, ecr_sums, low_sums = 0, 0, [0, 0], 0., [0., 0.], [0., 0.]
    for n in range(N):
        l = [1.] + tags[n].tolist()
        cams, refineds = [], []
        for view, (maps, size, valid) in enumerate(((source, S, everywhere[n]), (target, T, seen[n]))):
            cam, refined = to(maps.cam[n], size), to(maps.refined[n], size)
            for c in range(1, C1):                                                  # multi-label soft margin on the pooled map
                s = cam[c][valid].mean()
                p = 1/(1 + torch.exp(-s))
                cls = cls - (l[c]*torch.log(p) + (1 - l[c])*torch.log(1 - p))/(C1 - 1)/N/2
            best = torch.stack([refined[c]*l[c] for c in range(1, C1)]).amax(0)[valid]
            k = len(best)//4                                                        # min-pooling
            low_sums[view] = low_sums[view] + best.sort().values[:k].clamp(min=0).sum()
            low_counts[view] += k
            cams.append(torch.stack([literal_stretch(cam[c], valid)*l[c] for c in range(C1)]))
            refineds.append(torch.stack([literal_stretch(refined[c], valid)*l[c] for c in range(C1)]))
        cams[0], refineds[0] = move(n, cams[0]), move(n, refineds[0])
        for c in range(1, C1):
            er_sum = er_sum + (cams[0][c] - cams[1][c])[seen[n]].abs().sum()
        er_count += (C1 - 1)*int(seen[n].sum())
        for way, (cam, refined) in enumerate(((cams[1], refineds[0]), (cams[0], refineds[1]))):
            entries = []
            for i, j in seen[n].nonzero().tolist():
                fg = [cam[c, i, j].item() for c in range(1, C1)]
                for c in range(C1):
                    kept = 1 - max(fg) if c == 0 else fg[c-1] if fg[c-1] == max(fg) else 0.
                    entries.append((kept - refined[c, i, j]).abs())
            k = int(.2*len(entries))
            ecr_sums[way] = ecr_sums[way] + torch.stack(entries).sort(descending=True).values[:k].sum()
            ecr_count += k if way == 0 else 0
    zero = source.cam.sum()*0
    return {'cls': cls, 'er': er_sum/max(er_count, 1) + zero, 'ecr': sum(ecr_sums)/max(ecr_count, 1) + zero,
            'min': sum(s/max(k, 1) for s, k in zip(low_sums, low_counts))/2 + zero}


def random_maps(N, C, h, refined=True):
    "Float64 leaves, as a network might give them."
    leaf = lambda c: torch.randn(N, c, h, h, dtype=torch.float64).requires_grad_()
    return Maps(leaf(C + 1), leaf(C + 1) if refined else None, None)


def random_tags(N, C): return torch.randint(0, 2, (N, C)).double()


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(2, 5), st.tuples(st.integers(2, 7), st.integers(2, 5)), seeds)
def test_pcm_is_the_literal_one(N, C, h, tap_sides, seed):
    "Value, gradient of the three convolutions, and none elsewhere; taps of any size are brought to the map's."
    torch.manual_seed(seed)
    pcm = PCM([3, 5], (4, 6)).double()
    cam, image = torch.randn(N, C + 1, h, h, dtype=torch.float64), torch.randn(N, 3, 9, 9, dtype=torch.float64)
    taps = [torch.randn(N, c, s, s, dtype=torch.float64) for c, s in zip((3, 5), tap_sides)]
    leaves = [x.requires_grad_() for x in (cam, *taps)]
    got = pcm(cam, image, taps)
    want = literal_pcm(cam, image, taps, [c.weight[:, :, 0, 0] for c in pcm.reduce], pcm.mix.weight[:, :, 0, 0])
    close(got, want)
    weight = torch.randn_like(got)
    same_gradients((got*weight).sum(), (want*weight).sum(), list(pcm.parameters()))
    assert all(g is None for g in torch.autograd.grad(got.sum(), leaves, allow_unused=True))


@quick
@given(st.integers(1, 3), st.integers(1, 4), st.tuples(st.integers(2, 5), st.integers(2, 4)), st.tuples(st.integers(2, 8), st.integers(2, 6)), seeds)
def test_seam_is_the_literal_one(N, C, grids, sizes, seed):
    torch.manual_seed(seed)
    source, target, tags = random_maps(N, C, grids[0]), random_maps(N, C, grids[1]), random_tags(N, C)
    got, want = seam_losses(source, target, sizes, tags), literal_seam(source, target, sizes, tags)
    leaves = [source.cam, source.refined, target.cam, target.refined]
    for k in want:
        close(got[k], want[k])
        same_gradients(got[k], want[k], leaves)


@quick
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 5), st.integers(4, 7), st.booleans(), st.sampled_from([0, 20]), st.sampled_from([0, 16]), seeds)
def test_transformed_seam_is_the_literal_one_over_what_is_seen(N, C, h, size, flip, rotate, translate, seed):
    torch.manual_seed(seed)
    source, target, tags, a = random_maps(N, C, h), random_maps(N, C, h), random_tags(N, C), random_transformation(N, 64, flip, rotate, translate)
    move = lambda n, x: type(a)(a.theta[n:n+1])(x[None], size)[0]
    got = seam_losses(source, target, (6, size), tags, a)
    want = literal_seam(source, target, (6, size), tags, move, a.valid(size)[:, 0])
    for k in want:
        close(got[k], want[k])
        same_gradients(got[k], want[k], [source.cam, source.refined, target.cam, target.refined])


@quick
@given(st.integers(1, 3), st.integers(1, 3), seeds)
def test_a_transformation_that_does_nothing(N, C, seed):
    torch.manual_seed(seed)
    source, target, tags = random_maps(N, C, 5), random_maps(N, C, 4), random_tags(N, C)
    plain, still = seam_losses(source, target, (8, 6), tags), seam_losses(source, target, (8, 6), tags, random_transformation(N, 64))
    for k in plain:
        close(still[k], plain[k])
        same_gradients(still[k], plain[k], [source.cam, source.refined, target.cam, target.refined])


@quick
@given(st.integers(1, 3), st.integers(1, 3), seeds)
def test_what_is_not_seen_enters_no_loss(N, C, seed):
    "Whatever the target's maps say there, every loss and its gradient is the same, and there is none for what is said there."
    torch.manual_seed(seed)
    source, tags, a = random_maps(N, C, 6), random_tags(N, C), random_transformation(N, 64, True, 20, 16)
    seen, s = a.valid(8), torch.rand(N, 1, 16, 16, dtype=torch.float64)
    quiet = random_maps(N, C, 8)
    loud = Maps(*(torch.where(seen, x, 100*torch.randn_like(x)).detach().requires_grad_() for x in quiet[:2]), None)
    losses = [seam_losses(source, t, (8, 8), tags, a) | {'sal': saliency_losses(source, t, s, tags, a=a)} for t in (quiet, loud)]
    for k in losses[0]:
        close(losses[0][k], losses[1][k])
        for x, y in ((quiet.cam, loud.cam), (quiet.refined, loud.refined)):
            (g,), (h,) = [torch.autograd.grad(l[k], z, allow_unused=True, retain_graph=True) for l, z in zip(losses, (x, y))]
            if g is None:
                assert h is None
                continue
            close(g*seen, h*seen)
            assert not h[~seen.expand_as(h)].any()


def small_net(dropout=0.):
    torch.manual_seed(0)
    backbone = Tiny()
    return CamNet(backbone, 4, 8, PCM(backbone.channels[:2]), dropout)


def test_who_learns_what():
    "ER and classification reach backbone and classifier, ECR and min-pooling the PCM alone; the background's classifier row learns from none."
    net, image, tags = small_net(), torch.randn(2, 3, 64, 64), torch.tensor([[1., 0, 1], [0, 1, 0]])
    for a in (None, random_transformation(2, 64, True, 20, 8)):
        target = net(resize(image, 32) if a is None else a(image, 32))
        terms = seam_losses(net(image), target, (64, 32), tags, a)
        for k, v in terms.items():
            net.zero_grad()
            v.backward(retain_graph=True)
            reached = {name.split('.')[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
            assert reached == ({'backbone', 'classifier'} if k in ('cls', 'er') else {'refine'}), k
            if k in ('cls', 'er'):
                assert not net.classifier.weight.grad[0].any()
            if k in ('ecr', 'min'):
                assert all(p.grad.any() for p in net.refine.parameters())


def test_dropout_feeds_both_heads_the_same():
    "One draw, whole channels, none at test time or by default."
    net, plain, image, seen = small_net(.5).train(), small_net().train(), torch.randn(2, 3, 64, 64), {}
    for head in ('classifier', 'projector'):
        getattr(net, head).register_forward_hook(lambda m, x, y, head=head: seen.update({head: x[0]}))
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
    assert torch.equal(torch.rand(2), expected)            # default: nothing is drawn
    for x, y in zip(net.eval()(image), maps):
        close(x, y)
    assert net.state_dict().keys() == plain.state_dict().keys()


def test_class_loss_pools_what_is_seen():
    torch.manual_seed(0)
    cam, tags = torch.randn(2, 4, 6, 6), random_tags(2, 3)
    valid = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    valid[0, :, 2:, 1:4] = True
    close(masked_average_pool(cam, valid)[0], cam[0, :, 2:, 1:4].mean((1, 2)))
    assert not masked_average_pool(cam, valid)[1].any()
    assert torch.equal(class_loss(cam, tags, None), class_loss(cam, tags))
    close(class_loss(cam, tags, torch.ones_like(valid)), class_loss(cam, tags))
    close(class_loss(cam[:1], tags[:1], valid[:1]), class_loss(cam[:1, :, 2:, 1:4], tags[:1]))


# --- EPS, literally ------------------------------------------------------------------------------------------------------

def literal_saliency(cam, saliency, tags, lam, tau, seen=None):
    "Section 10, pixel by pixel: list of estimates (h, w), and the loss."
    N, C1, h, w = cam.shape
    H, W = saliency.shape[2:]
    estimates, total, count = [], 0., 0
    for n in range(N):
        pixels = [(i, j) for i in range(h) for j in range(w)]
        s = {(i, j): saliency[n, 0, i*H//h, j*W//w] for i, j in pixels}                # the nearest pixel, as torch counts
        p = {(i, j): [torch.exp(cam[n, c, i, j])/sum(torch.exp(x) for x in cam[n, :, i, j]) for c in range(C1)] for i, j in pixels}
        inside = [ij for ij in pixels if seen is None or seen[n, 0][ij]]
        fg, bg = [], [0]
        for c in range(1, C1):
            wins, both = sum(round(p[ij][c].item()) for ij in inside), sum(round(p[ij][c].item())*round(s[ij].item()) for ij in inside)
            if tags[n, c-1] == 1:
                (fg if inside and both/(wins + 1e-4*len(inside)) > tau else bg).append(c)
        e = {ij: lam*sum(p[ij][c] for c in fg) + (1 - lam)*(1 - sum(p[ij][c] for c in bg)) for ij in pixels}
        estimates.append(torch.stack([torch.as_tensor(e[ij]) for ij in pixels]).view(h, w))
        for ij in inside:
            total, count = total + (e[ij] - s[ij])**2, count + 1
    return estimates, total/max(count, 1)


def saliency_like(kind, N, H):
    return {'soft': torch.rand(N, 1, H, H), 'zero': torch.zeros(N, 1, H, H), 'one': torch.ones(N, 1, H, H)}[kind].double()


sharpness, maps_of = st.sampled_from([.5, 2., 8.]), st.sampled_from(['soft', 'zero', 'one'])
taus = st.one_of(st.sampled_from([0., .4, 1.]), st.floats(0, 1))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), sharpness, maps_of, st.floats(0, 1), taus, seeds)
def test_eps_is_the_literal_one(N, C, h, H, sharp, kind, lam, tau, seed):
    torch.manual_seed(seed)
    cam, tags, s = (sharp*torch.randn(N, C + 1, h, h, dtype=torch.float64)).requires_grad_(), random_tags(N, C), saliency_like(kind, N, H)
    estimates, want = literal_saliency(cam, s, tags, lam, tau)
    got = saliency_loss(cam, s, tags, lam, tau)
    near = torch.nn.functional.interpolate(s, size=(h, h))
    close(saliency_estimate(cam, near, tags, lam, tau)[:, 0], torch.stack(estimates))
    close(got, want)
    same_gradients(got, want, [cam])


@quick
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 5), st.floats(0, 1), taus, seeds)
def test_eps_over_what_is_seen(N, C, h, lam, tau, seed):
    torch.manual_seed(seed)
    cam, tags, s = (3*torch.randn(N, C + 1, h, h, dtype=torch.float64)).requires_grad_(), random_tags(N, C), saliency_like('soft', N, h)
    seen = torch.rand(N, 1, h, h) < .6
    got, (_, want) = saliency_loss(cam, s, tags, lam, tau, seen), literal_saliency(cam, s, tags, lam, tau, seen)
    close(got, torch.as_tensor(want))
    if seen.any():
        same_gradients(got, want, [cam])


@quick
@given(st.integers(1, 2), st.integers(1, 3), st.booleans(), st.booleans(), st.booleans(), seeds)
def test_saliency_of_views_and_kinds_of_maps(N, C, two, refined, moved, seed):
    "The mean over the views of the CAMs' loss plus that of the refined maps'; the target's saliency is the source's through A."
    torch.manual_seed(seed)
    source, target, tags, s = random_maps(N, C, 4, refined), random_maps(N, C, 3, refined), random_tags(N, C), saliency_like('soft', N, 10)
    a = random_transformation(N, 64, True, 20, 16) if moved else None
    got = saliency_losses(source, target if two else None, s, tags, .3, .2, a)
    views = [(source, s, None)] + [(target, a(s, 3) if moved else to(s, 3), a.valid(3) if moved else None)]*two
    want = sum(literal_saliency(m, x, tags, .3, .2, seen)[1] for v, x, seen in views for m in v[:2] if m is not None)/len(views)
    close(got, want)
    same_gradients(got, want, [m for v, *_ in views for m in v[:2] if m is not None])
    if not moved:
        close(saliency_losses(source, target if two else None, s, tags, .3, .2, random_transformation(N, 64)), got)


def test_eps_terms():
    torch.manual_seed(0)
    source, tags, s = random_maps(2, 3, 4, refined=False), random_tags(2, 3), saliency_like('soft', 2, 8)
    terms = eps_losses(source, s, tags, .3, .2)
    assert list(terms) == ['cls', 'sal']
    close(terms['cls'], class_loss(source.cam, tags))
    close(terms['sal'], saliency_loss(source.cam, s, tags, .3, .2))


def test_eps_edges():
    "What the definition says where there is little to say."
    torch.manual_seed(0)
    cam, s = 5*torch.randn(1, 4, 6, 6), torch.rand(1, 1, 6, 6)
    p, every, none = cam.softmax(1), torch.ones(1, 3), torch.zeros(1, 3)
    close(saliency_estimate(cam, s, none, .3), .7*(1 - p[:, :1]))                                       # no tag: only not-background
    close(saliency_estimate(cam, 0*s, every, .3, 0.), torch.zeros(1, 1, 6, 6))                          # nothing salient: all is background
    close(saliency_estimate(cam, s, every, .3, 1.), torch.zeros(1, 1, 6, 6))                            # tau 1: no class can
    close(saliency_estimate(cam, 0*s + 1, every, .3, .9), 1 - p[:, :1])                                 # all salient: every winner is foreground
    one = torch.randn(1, 2, 6, 6)
    close(saliency_estimate(5*one, 0*s + 1, torch.ones(1, 1), .3), (5*one).softmax(1)[:, 1:])           # one class: its probability
    half = torch.zeros(1, 2, 6, 6, requires_grad=True)                                                   # exactly one half wins nothing, as round() has it
    close(saliency_estimate(half, 0*s + 1, torch.ones(1, 1), .3, 0.), torch.zeros(1, 1, 6, 6))
    lone = torch.zeros(1, 2, 6, 6).index_fill_(1, torch.tensor(0), 9.)                                  # one pixel of 36 won, and salient: 1/(1 + 36e-4)
    lone[0, 1, 2, 2] = 20
    for tau, won in ((.9963, 1), (.9965, 0)):
        close(saliency_estimate(lone, 0*s + 1, torch.ones(1, 1), 1., tau)[0, 0, 2, 2].round(), torch.tensor(1.*won))
    assert saliency_loss(cam, s, every, valid=torch.zeros(1, 1, 6, 6, dtype=torch.bool)) == 0           # nothing seen: nothing lost


def test_untagged_classes_do_not_count():
    "An untagged class gets its gradient through the softmax alone: exchanging two untagged channels changes nothing."
    torch.manual_seed(0)
    cam, s, tags = 3*torch.randn(2, 5, 6, 6), torch.rand(2, 1, 6, 6), torch.tensor([[1., 0, 0, 1]]*2)
    close(saliency_loss(cam, s, tags), saliency_loss(cam[:, [0, 1, 3, 2, 4]], s, tags))


def test_saliency_teaches_backbone_and_classifier_of_all_channels():
    "On the CAM; on the refined map it teaches the PCM. The classifier's background row learns here, as it does nowhere in SEAM."
    net, image, tags, s = small_net(), torch.randn(2, 3, 64, 64), torch.tensor([[1., 0, 1], [0, 1, 0]]), torch.rand(2, 1, 64, 64)
    maps = net(image)
    for one, reached in ((maps._replace(refined=None), {'backbone', 'classifier'}), (maps, {'backbone', 'classifier', 'refine'})):
        net.zero_grad()
        saliency_losses(one, None, s, tags).backward(retain_graph=True)
        assert {k.split('.')[0] for k, p in net.named_parameters() if p.grad is not None and p.grad.any()} == reached
        assert net.classifier.weight.grad[0].any()
