"The two readings of the contrast written out, pixel by pixel and class by class, from the equations and the facts. Slow on purpose."
import math
import torch


def flat(view, dtype=torch.float64):
    "Raw maps [c][i] and embeddings [i] of the pixels i of all images, in order; how many pixels an image has."
    N, C1, h, w = view.cam.shape
    cam = view.cam.detach().to(dtype).permute(1, 0, 2, 3).reshape(C1, N*h*w)
    return cam, view.embedding.to(dtype).permute(0, 2, 3, 1).reshape(N*h*w, -1), h*w


def unit(x): return x/x.norm().clamp(min=1e-12)


def F4(v, positive, denominator, P, tau):
    "Eq. 4; a prototype that is listed twice counts twice."
    return -torch.log(torch.exp(v @ P[positive]/tau)/sum(torch.exp(v @ P[c]/tau) for c in denominator))


def mean(terms, like): return sum(terms)/len(terms) if terms else like.sum()*0


def least(key, items): return sorted(items, key=key)   # Python's sort keeps the order of equals


# --- the paper ------------------------------------------------------------------------------------------------------------

def paper_view(view, tags, K):
    "§3.2 and Eq. 5: pixels have confidences and a label; a class has a prototype if a pixel has its label."
    cam, v, size = flat(view)
    C, pixels = len(cam) - 1, range(len(v))
    m = torch.zeros_like(cam)
    for c in range(1, C + 1):
        for i in pixels:
            image = slice(i//size*size, i//size*size + size)
            m[c, i] = cam[c, i].relu()/(cam[c, image].max().relu() + 1e-5)
    y = []
    for i in pixels:
        present = [c for c in range(1, C + 1) if tags[i//size, c-1]]
        m[0, i] = 1 - max([m[c, i].item() for c in present], default=0)
        y.append(least(lambda c: -m[c, i].item(), [0, *present])[0])
    v = torch.stack([unit(e) for e in v])
    P = {}
    for c in range(C + 1):
        top = least(lambda i: -m[c, i].item(), [i for i in pixels if y[i] == c])[:K]
        if top and sum(m[c, i] for i in top) > 0:
            P[c] = unit(sum(m[c, i]*v[i] for i in top)/sum(m[c, i] for i in top))
    return v, y, P


def share(n, f): return min(n, max(1, math.floor(f*n + .5)))


def paper_intra(v, y, P, tau, lot, chance):
    "Eq. 9 with §3.5; `lot` (pixels, C+1) and `chance` (pixels,) are the draws."
    part = [i for i in range(len(v)) if y[i] in P]
    s = {i: {c: (v[i] @ P[c]).item() for c in P} for i in part}
    loss = {}
    for i in part:
        hard = least(lambda c: -s[i][c], [c for c in sorted(P) if c != y[i]])
        hard = hard[:share(len(hard), .6)]
        chosen = least(lambda c: -lot[i, c].item(), hard)[:share(len(hard), .5)]
        loss[i] = F4(v[i], y[i], [y[i], *chosen], P, tau)
    terms = []
    for c in P:
        mine = [i for i in part if y[i] == c]
        terms += [loss[i] for i in least(lambda i: -chance[i].item(), mine)[:len(mine)//2]]
        terms += [loss[i] for i in least(lambda i: s[i][c], mine)[:len(mine) - len(mine)//2]]
    return mean(terms, v)


def paper(a, b, tags, K, draws, tau=.1):
    "The three terms, views added together (Eqs. 6, 7, 9)."
    cross = lambda v, y, P: mean([F4(v[i], y[i], P, P, tau) for i in range(len(v)) if y[i] in P], v)
    (va, ya, Pa), (vb, yb, Pb) = (paper_view(x, tags, K) for x in (a, b))
    return (cross(va, ya, Pb) + cross(vb, yb, Pa), cross(va, yb, Pa) + cross(vb, ya, Pb),
            paper_intra(va, ya, Pa, tau, *draws[:2]) + paper_intra(vb, yb, Pb, tau, *draws[2:]))


# --- the authors' code (facts, section 5) ------------------------------------------------------------------------------------

def official_view(view, tags, K, background=.2):
    "Steps 1 to 4: no label is looked at for a prototype, and none of them is without one."
    cam, v, size = flat(view)
    C, pixels = len(cam) - 1, range(len(v))
    m = cam.relu()
    for c in range(1, C + 1):
        for n in range(len(v)//size):
            x = m[c, n*size:(n + 1)*size]
            lo, hi = x.min().item(), x.max().item()
            for j in range(size):
                kept = x[j].item() if x[j] >= lo + 1e-5 else 0.
                x[j] = (kept - lo - 1e-5)/(hi - lo + 1e-5)
    m[0] = background
    y = [least(lambda c: -(m[c, i].item() if c == 0 else m[c, i].item()*tags[i//size, c-1].item()), range(C + 1))[0] for i in pixels]
    P = []
    for c in range(C + 1):
        top = least(lambda i: -m[c, i].item(), pixels)[:K]
        P.append(unit(sum(m[c, i]*v[i].detach() for i in top)/sum(m[c, i] for i in top)))
    return torch.stack([unit(e) for e in v]), y, P


def official_intra(v, y, P, tau, chance):
    "Step 6: ranks 4 to 13 of 21, the positive wherever it falls; per class half by lot and the band from 10 to 60 %."
    classes = len(P)
    hard, keep = math.floor(.6*classes + .5), classes//2
    hard = max(1, hard)
    total = 0
    for c in sorted(set(y)):
        mine, s = [i for i in range(len(v)) if y[i] == c], {}
        for i in mine:
            s[i] = [(v[i] @ p).item() for p in P]
        n = len(mine)
        band = least(lambda i: s[i][c], mine)[:int(.6*n)]
        chosen = least(lambda i: -chance[i].item(), mine)[:n//2] + band[int(.6*n) - n//2:]
        loss = []
        for i in chosen:
            ranked = least(lambda q: -s[i][q], range(classes))
            loss.append(F4(v[i], c, [c, *ranked[hard - keep:hard]], P, tau))
        total = total + mean(loss, v)
    return total/len(set(y))


def official(a, b, tags, K, draws, tau=.1):
    "The three terms, each the mean of the two views (steps 5 to 7)."
    cross = lambda v, y, P: mean([F4(v[i], y[i], range(len(P)), P, tau) for i in range(len(v))], v)
    (va, ya, Pa), (vb, yb, Pb) = (official_view(x, tags, K) for x in (a, b))
    return ((cross(va, ya, Pb) + cross(vb, yb, Pa))/2, (cross(va, yb, Pa) + cross(vb, ya, Pb))/2,
            (official_intra(va, ya, Pa, tau, draws[0]) + official_intra(vb, yb, Pb, tau, draws[1]))/2)
