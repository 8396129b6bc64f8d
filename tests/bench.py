"What the fast forms are worth: each against the plain loop it replaces. Run by `make bench`; writes runs/bench/<device>.json."
import importlib.util
import json
import platform
import re
import tempfile
import time
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from ppc.contrast import PAPER_READING, PixelToPrototypeContrast
from ppc.crf import CRF_IRN, Pairwise, mean_field
from ppc.data import TagFolder, TrainingViews, augmentation, finish_batch, read_image, write_mask
from ppc.folders import folder_report
from ppc.mining import rounded_share
from ppc.scenes import CLASSES, scene
from ppc.views import View
from ppc.walk import neighbours, random_walk

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def seconds(work, repeats, warm=1):
    "Median, after `warm` calls to warm up."
    taken = []
    for _ in range(repeats + warm):
        if DEVICE.type == 'cuda':
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if DEVICE.type == 'cuda':
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken[warm:])[repeats//2]


def draws_of(generator_seed):
    "The draws of one call, in the order in which they are asked for, the same for both forms."
    generator = torch.Generator(DEVICE).manual_seed(generator_seed)
    return lambda *size: torch.rand(*size, generator=generator, device=DEVICE)


# --- the contrast, class by class ------------------------------------------------------------------------------------------

def loop_view(view, tags, K):
    "Unit embeddings (n, D), labels (n,), {class: prototype}; one class after the other, one image after the other."
    N, C1, h, w = view.cam.shape
    m = torch.zeros(N, C1, h, w, device=DEVICE)
    for n in range(N):
        for c in range(1, C1):
            m[n, c] = view.cam[n, c].detach().relu()/(view.cam[n, c].detach().max().relu() + 1e-5)
        m[n, 0] = 1 - (m[n, 1:]*tags[n, :, None, None]).amax(0)
    y = torch.zeros(N, h, w, dtype=torch.long, device=DEVICE)
    best = m[:, 0].clone()
    for n in range(N):
        for c in tags[n].nonzero().flatten().tolist():
            better = m[n, c + 1] > best[n]
            y[n][better], best[n][better] = c + 1, m[n, c + 1][better]
    v, y = F.normalize(view.embedding.permute(0, 2, 3, 1).reshape(-1, view.embedding.shape[1]), dim=1), y.flatten()
    P = {}
    for c in range(C1):
        mine = (y == c).nonzero().flatten()
        if not len(mine):
            continue
        weight = m[:, c].flatten()[mine]
        top = weight.argsort(descending=True, stable=True)[:K]
        P[c] = F.normalize((weight[top][:, None]*v[mine[top]]).sum(0)/weight[top].sum(), dim=0)
    return v, y, P


def loop_cross(v, y, P, tau=.1):
    "Eqs. 6 and 7."
    names, rows = list(P), torch.stack(list(P.values()))
    loss = [F.cross_entropy(v[y == c] @ rows.t()/tau, torch.full((int((y == c).sum()),), names.index(c), device=DEVICE), reduction='sum') for c in P]
    return sum(loss)/sum(int((y == c).sum()) for c in P)


def loop_intra(v, y, P, draw, step, tau=.1):
    "Eq. 9 with §3.5: for each class, and `step` of its pixels at a time, the prototypes that they are pushed from."
    names, rows = torch.tensor(list(P), device=DEVICE), torch.stack(list(P.values()))
    lot, chance, total, count = draw(len(y), 21), draw(len(y)), 0, 0
    for positive, c in enumerate(P):
        mine, loss = (y == c).nonzero().flatten(), []
        others = (names != c).nonzero().flatten()
        n = int(rounded_share(torch.tensor(len(others)), .6))
        keep = int(rounded_share(torch.tensor(n), .5))
        own = v[mine] @ rows[positive]
        for some in torch.arange(len(mine), device=DEVICE).split(step):
            s = v[mine[some]] @ rows.t()
            pool = others[s.detach()[:, others].argsort(dim=1, descending=True, stable=True)[:, :n]]
            chances = lot[mine[some][:, None], names[pool]]
            chosen = pool.gather(1, chances.argsort(dim=1, descending=True)[:, :keep])
            loss.append(torch.cat([own[some][:, None], s.gather(1, chosen)], 1).div(tau).logsumexp(1) - own[some]/tau)
        loss, half = torch.cat(loss), len(mine)//2
        chosen = torch.cat([chance[mine].argsort(descending=True)[:half], own.detach().argsort(stable=True)[:len(mine) - half]])
        total, count = total + loss[chosen].sum(), count + len(chosen)
    return total/count


def loop(a, b, tags, K, draw, step):
    (va, ya, Pa), (vb, yb, Pb) = (loop_view(x, tags, K) for x in (a, b))
    cross = loop_cross(va, ya, Pb) + loop_cross(vb, yb, Pa) + loop_cross(va, yb, Pa) + loop_cross(vb, ya, Pb)
    return .1*(cross + loop_intra(va, ya, Pa, draw, step) + loop_intra(vb, yb, Pb, draw, step))


def contrast(step, N=8, D=128, side=16, C=20, K=32):
    "Forward and backward of all terms, against a loop over classes and, in it, over `step` pixels at a time."
    g = torch.Generator().manual_seed(0)
    tags = torch.stack([torch.zeros(C).index_fill(0, torch.randperm(C, generator=g)[:2], 1) for _ in range(N)]).to(DEVICE)
    tags[:, 0] = 1   # so that both views know a class for every pixel of the other
    a, b = (View(torch.rand(N, C + 1, side, side, generator=g).to(DEVICE), torch.rand(N, D, side, side, generator=g).to(DEVICE).requires_grad_()) for _ in range(2))
    def gradient(loss): return torch.autograd.grad(loss, (a.embedding, b.embedding))
    def ours():
        rand_like, draw = torch.rand_like, draws_of(1)
        torch.rand_like = lambda x, dtype=None: draw(*x.shape)
        try:
            loss = PixelToPrototypeContrast(K, reading=PAPER_READING)(a, b, tags).total
        finally:
            torch.rand_like = rand_like
        return loss.detach(), *gradient(loss)
    def baseline():
        loss = loop(a, b, tags, K, draws_of(1), step)
        return loss.detach(), *gradient(loss)
    diff = max((x - y).abs().max().item() for x, y in zip(ours(), baseline()))
    return dict(name=f'contrast against a loop over classes{" and pixels" if step == 1 else ""}', baseline_s=seconds(baseline, 3), ours_s=seconds(ours, 15),
                max_abs_diff=diff, extra_mb=extra_memory(ours))


# --- the dense CRF ----------------------------------------------------------------------------------------------------------

def crf(H=375, W=500, L=4, pairs=7):
    "[Ten steps of mean field against pydensecrf, one core each, call by call in turn], on scenes side by side; [] where it is not installed."
    if importlib.util.find_spec('pydensecrf') is None:
        return []
    from pydensecrf import densecrf
    rng = np.random.default_rng(0)
    tiles = [np.dstack(scene(rng)[:2]) for _ in range(12)]
    both = np.concatenate([np.concatenate(tiles[i:i + 4], 1) for i in range(0, 12, 4)])[:H, :W]
    image, seed = np.ascontiguousarray(both[..., :3]), np.where(rng.random((H, W)) < .2, rng.integers(0, L, (H, W)), both[..., 3] % L)
    unary = -np.log(np.where(np.arange(L)[:, None, None] == seed, .7, .3/(L - 1))).astype(np.float32)
    here, energy = torch.from_numpy(image)[None].to(DEVICE), torch.from_numpy(unary)[None].to(DEVICE)
    def ours(p=CRF_IRN): return mean_field(here, energy, p)[0]
    def baseline():
        field = densecrf.DenseCRF2D(W, H, L)
        field.setUnaryEnergy(unary.reshape(L, -1))
        field.addPairwiseGaussian(sxy=CRF_IRN.smooth_sxy, compat=CRF_IRN.smooth_compat)
        field.addPairwiseBilateral(sxy=CRF_IRN.sxy, srgb=CRF_IRN.srgb, rgbim=image, compat=CRF_IRN.compat)
        return torch.from_numpy(np.array(field.inference(CRF_IRN.iterations)).reshape(L, H, W))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        want, got = baseline(), ours().cpu()
        taken = [[seconds(work, 1, 0) for work in (baseline, ours, lambda: ours(Pairwise(iterations=0)))] for _ in range(pairs)]
        before, now, lattices = (sorted(column)[pairs//2] for column in zip(*taken))
        return [dict(name='dense CRF against pydensecrf on one core', baseline_s=before, ours_s=now, of_it_lattices_s=lattices, max_abs_diff=(got - want).abs().max().item(),
                     same_label=(got.argmax(0) == want.argmax(0)).double().mean().item(), extra_mb=extra_memory(ours))]
    finally:
        torch.set_num_threads(threads)


# --- the walk, with a dense matrix -------------------------------------------------------------------------------------------

def dense_transition(affinity, radius, beta):
    "T as a dense matrix (n, n)."
    K, H, W = affinity.shape
    A, at = torch.eye(H*W, device=DEVICE), torch.arange(H*W, device=DEVICE).view(H, W)
    for k, (dy, dx) in enumerate(neighbours(radius).tolist()):
        rows, here, there = slice(0, max(0, H - dy)), slice(max(0, -dx), W - max(0, dx)), slice(max(0, dx), W + min(0, dx))
        i, j, a = at[rows, here], at[dy:, there], affinity[k, rows, here]**beta
        A[i, j] = A[j, i] = a
    return A/A.sum(0)


def walk(name, h, w, channels, beta, rows=None):
    "256 steps, on one image of 375 x 500, against squaring the dense matrix 8 times; with `rows`, those of one squaring are timed and counted up."
    g = torch.Generator().manual_seed(0)
    scores, affinity = torch.rand(channels, h, w, generator=g).to(DEVICE), torch.rand(34, h, w, generator=g).to(DEVICE)
    T = dense_transition(affinity, 5, beta)
    def ours(): return random_walk(scores, affinity, 5, beta, 256)
    def square():
        S = T
        for _ in range(8):
            S = S @ S
        return S
    taken = seconds(square, 1) if rows is None else seconds(lambda: T[:rows] @ T, 1)*8*len(T)/rows
    want = scores.flatten(1)
    for _ in range(256):
        want = want @ T
    return dict(name=name, baseline_s=taken, ours_s=seconds(ours, 5), max_abs_diff=(ours().flatten(1) - want).abs().max().item(),
                dense_mb=T.nbytes/1e6, extra_mb=extra_memory(ours))


def extra_memory(work):
    "Peak of what is allocated beyond the inputs, in MB."
    if DEVICE.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before)/2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        work()
    now = peak = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    return peak/2**20


# --- loading photographs, on one core ------------------------------------------------------------------------------------------

def photographs(root, n=40):
    "A dataset of scenes as large as VOC's photographs, with noise as cameras have it, and their masks."
    rng = np.random.default_rng(0)
    for i in range(n):
        image, mask, _ = scene(rng)
        large = np.asarray(Image.fromarray(image).resize((500, 375), Image.BICUBIC)) + rng.normal(0, 8, (375, 500, 3))
        path = root/'JPEGImages'/f'{i}.jpg'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(path, quality=92)
        write_mask(root/'SegmentationClass'/f'{i}.png', np.asarray(Image.fromarray(mask).resize((500, 375), Image.NEAREST)))
    (root/'classes.txt').write_text('\n'.join(CLASSES) + '\n')
    (root/'tags.csv').write_text('image,tags\n' + ''.join(f'{i},{" ".join(CLASSES[1:])}\n' for i in range(n)))
    return TagFolder(root)

def loader():
    "Milliseconds of each step from a JPEG of 500 x 375 to a view of 448 x 448; images per second altogether, and of `ppc data check`."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = photographs(Path(folder))
            views, ms, found = TrainingViews(data, augmentation(), edge=768), {}, [None]*len(data)
            steps = {'decode': lambda i, x: data.image(i), **{type(t).__name__: lambda i, x, t=t: t(x) for t in views.transform.transforms},
                     'finish': lambda i, x: finish_batch(x)}
            for name, step in steps.items():
                began = time.perf_counter()
                found = [step(i, x) for i, x in enumerate(found)]
                ms[f'{name}_ms'] = 1000*(time.perf_counter() - began)/len(data)
            began = time.perf_counter()
            for k in range(0, len(data), 8):
                views.__getitems__([(0, i) for i in range(k, k + 8)])
            loaded = len(data)/(time.perf_counter() - began)
            began = time.perf_counter()
            folder_report(folder, workers=1)
            checked = len(data)/(time.perf_counter() - began)
            large = Path(folder)/'large.jpg'
            data.image(0).resize((4000, 3000)).save(large)
            return dict(name='training views of 448 x 448 from JPEGs of 500 x 375, one core', images_per_s=loaded, checked_per_s=checked, **ms,
                        large_ms=1000*seconds(lambda: read_image(large), 5), large_reduced_ms=1000*seconds(lambda: read_image(large, 768), 5))
    finally:
        torch.set_num_threads(threads)


def main():
    device = torch.cuda.get_device_name() if DEVICE.type == 'cuda' else f'{platform.machine()}, {torch.get_num_threads()} threads'
    rows = [loader(), contrast(step=1), contrast(step=10**6), *crf(),
            walk('PSA walk (stride 8) against a dense matrix squared 8 times', 47, 63, 4, 8),
            walk('IRN walk (stride 4) against the same, counted up from 1000 rows of the first squaring', 94, 125, 4, 10, rows=1000)]
    for r in rows[1:]:
        r['ratio'] = r['baseline_s']/r['ours_s']
    rows = [{k: v if isinstance(v, str) else float(f'{v:.3g}') for k, v in r.items()} for r in rows]
    path = Path('runs/bench')/f'{re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + '\n')
    for r in rows:
        print('   '.join(f'{k} {v}' for k, v in r.items()))


if __name__ == '__main__':
    main()
