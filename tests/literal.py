"""The two readings of the contrast, written out pixel by pixel and class by class.

From the equations and the facts; slow on purpose."""
import math
import torch


def raw_pixels(view, dtype=torch.float64):
    "Raw maps [c][i] and embeddings [i] of the pixels i of all images in order; pixels per image."
    N, C1, h, w = view.cam.shape
    cam = view.cam.detach().to(dtype).permute(1, 0, 2, 3).reshape(C1, N*h*w)
    return cam, view.embedding.to(dtype).permute(0, 2, 3, 1).reshape(N*h*w, -1), h*w


def unit(x): return x/x.norm().clamp(min=1e-12)


def equation_4(v, positive, denominator, P, tau):
    "Eq. 4; a prototype that is listed twice counts twice."
    total = sum(torch.exp(v @ P[c]/tau) for c in denominator)
    return -torch.log(torch.exp(v @ P[positive]/tau)/total)


def mean(terms, like):
    "Mean of a list; zero, with a gradient to `like`, where it is empty."
    return sum(terms)/len(terms) if terms else like.sum()*0


def smallest_first(values):
    "Keys of a dict by their values; Python's sort keeps the order of equals."
    return sorted(values, key=values.get)


def largest_first(values):
    "Keys of a dict by their negated values, so that equals stay in order."
    return smallest_first({key: -value for key, value in values.items()})


# ---- the paper


def paper_maps(cam, size):
    "Foreground maps, each divided by its maximum in its image."
    m = torch.zeros_like(cam)
    for c in range(1, len(cam)):
        for i in range(cam.shape[1]):
            image = slice(i//size*size, i//size*size + size)
            m[c, i] = cam[c, i].relu()/(cam[c, image].max().relu() + 1e-5)
    return m


def paper_view(view, tags, K):
    """§3.2 and Eq. 5: pixels have confidences and a label.

    A class has a prototype if a pixel has its label."""
    cam, v, size = raw_pixels(view)
    C, pixels = len(cam) - 1, range(len(v))
    m = paper_maps(cam, size)
    y = []
    for i in pixels:
        present = [c for c in range(1, C + 1) if tags[i//size, c-1]]
        m[0, i] = 1 - max([m[c, i].item() for c in present], default=0)
        y.append(largest_first({c: m[c, i].item() for c in [0, *present]})[0])
    v = torch.stack([unit(e) for e in v])
    P = {}
    for c in range(C + 1):
        top = largest_first({i: m[c, i].item() for i in pixels if y[i] == c})[:K]
        if top and sum(m[c, i] for i in top) > 0:
            P[c] = unit(sum(m[c, i]*v[i] for i in top)/sum(m[c, i] for i in top))
    return v, y, P


def rounded_share(n, share): return min(n, max(1, math.floor(share*n + .5)))


def paper_intra(v, y, P, tau, lot, chance):
    "Eq. 9 with §3.5; `lot` (pixels, C+1) and `chance` (pixels,) are the draws."
    part = [i for i in range(len(v)) if y[i] in P]
    s = {i: {c: (v[i] @ P[c]).item() for c in P} for i in part}
    loss = {}
    for i in part:
        hard = largest_first({c: s[i][c] for c in sorted(P) if c != y[i]})
        hard = hard[:rounded_share(len(hard), .6)]
        chosen = largest_first({c: lot[i, c].item() for c in hard})
        chosen = chosen[:rounded_share(len(hard), .5)]
        loss[i] = equation_4(v[i], y[i], [y[i], *chosen], P, tau)
    terms = []
    for c in P:
        mine = [i for i in part if y[i] == c]
        half = len(mine)//2
        by_chance = largest_first({i: chance[i].item() for i in mine})
        by_similarity = smallest_first({i: s[i][c] for i in mine})
        terms += [loss[i] for i in by_chance[:half]]
        terms += [loss[i] for i in by_similarity[:len(mine) - half]]
    return mean(terms, v)


def paper_cross(v, y, P, tau):
    "Eqs. 6 and 7, over the pixels whose class has a prototype."
    terms = [equation_4(v[i], y[i], P, P, tau) for i in range(len(v)) if y[i] in P]
    return mean(terms, v)


def paper(a, b, tags, K, draws, tau=.1):
    "The three terms, views added together (Eqs. 6, 7, 9)."
    va, ya, Pa = paper_view(a, tags, K)
    vb, yb, Pb = paper_view(b, tags, K)
    cross_prototype = paper_cross(va, ya, Pb, tau) + paper_cross(vb, yb, Pa, tau)
    cross_cam = paper_cross(va, yb, Pa, tau) + paper_cross(vb, ya, Pb, tau)
    intra_a = paper_intra(va, ya, Pa, tau, *draws[:2])
    intra_b = paper_intra(vb, yb, Pb, tau, *draws[2:])
    return cross_prototype, cross_cam, intra_a + intra_b


# ---- the authors' code (facts, section 5)


def official_maps(cam, size):
    "Foreground maps, each stretched from its minimum to its maximum in its image."
    m = cam.relu()
    for c in range(1, len(cam)):
        for start in range(0, cam.shape[1], size):
            x = m[c, start:start + size]
            lo, hi = x.min().item(), x.max().item()
            for j in range(size):
                kept = x[j].item() if x[j] >= lo + 1e-5 else 0.
                x[j] = (kept - lo - 1e-5)/(hi - lo + 1e-5)
    return m


def official_view(view, tags, K, background=.2):
    "Steps 1 to 4: prototypes ignore the labels, and every class has one."
    cam, v, size = raw_pixels(view)
    C, pixels = len(cam) - 1, range(len(v))
    m = official_maps(cam, size)
    m[0] = background
    y = []
    for i in pixels:
        scores = {0: m[0, i].item()}
        for c in range(1, C + 1):
            scores[c] = m[c, i].item()*tags[i//size, c-1].item()
        y.append(largest_first(scores)[0])
    P = []
    for c in range(C + 1):
        top = largest_first({i: m[c, i].item() for i in pixels})[:K]
        P.append(unit(sum(m[c, i]*v[i].detach() for i in top)/sum(m[c, i] for i in top)))
    return torch.stack([unit(e) for e in v]), y, P


def official_intra(v, y, P, tau, chance):
    """Step 6: ranks 4 to 13 of 21, the positive wherever it falls.

    Of each class half of the pixels by chance, and the rest from the band from 10 to 60 %."""
    classes = len(P)
    hard, keep = max(1, math.floor(.6*classes + .5)), classes//2
    total = 0
    for c in sorted(set(y)):
        mine = [i for i in range(len(v)) if y[i] == c]
        s = {i: [(v[i] @ p).item() for p in P] for i in mine}
        n = len(mine)
        band = smallest_first({i: s[i][c] for i in mine})[:int(.6*n)]
        by_chance = largest_first({i: chance[i].item() for i in mine})
        chosen = by_chance[:n//2] + band[int(.6*n) - n//2:]
        loss = []
        for i in chosen:
            ranked = largest_first(dict(enumerate(s[i])))
            loss.append(equation_4(v[i], c, [c, *ranked[hard - keep:hard]], P, tau))
        total = total + mean(loss, v)
    return total/len(set(y))


def official_cross(v, y, P, tau):
    "A cross term of step 5, over all pixels."
    terms = [equation_4(v[i], y[i], range(len(P)), P, tau) for i in range(len(v))]
    return mean(terms, v)


def official(a, b, tags, K, draws, tau=.1):
    "The three terms, each the mean of the two views (steps 5 to 7)."
    va, ya, Pa = official_view(a, tags, K)
    vb, yb, Pb = official_view(b, tags, K)
    cross_prototype = official_cross(va, ya, Pb, tau) + official_cross(vb, yb, Pa, tau)
    cross_cam = official_cross(va, yb, Pa, tau) + official_cross(vb, ya, Pb, tau)
    intra_a = official_intra(va, ya, Pa, tau, draws[0])
    intra_b = official_intra(vb, yb, Pb, tau, draws[1])
    return cross_prototype/2, cross_cam/2, (intra_a + intra_b)/2


def gradients(scalar, leaves):
    "The gradient at every leaf; zero where there is none."
    if not scalar.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(scalar, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found)]
