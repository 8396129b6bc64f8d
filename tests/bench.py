"""Speed of the fast forms, each against the plain loop that it replaces.

Run by `make bench`; writes runs/bench/<device>.json."""
import importlib.util
import json
import platform
import re
import tempfile
import time
from contextlib import contextmanager
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


def synchronize():
    "Wait until the device has finished."
    if DEVICE.type == 'cuda':
        torch.cuda.synchronize()


def seconds(work, repeats, warm=1):
    "Median, after `warm` calls to warm up."
    taken = []
    for _ in range(repeats + warm):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken[warm:])[repeats//2]


def extra_memory(work):
    "Peak of what is allocated beyond the inputs, in MB."
    if DEVICE.type == 'cuda':
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before)/2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == '[memory]']
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak/2**20


@contextmanager
def one_thread():
    "PyTorch on one core."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def seeded_rand(generator_seed):
    "A `torch.rand` that gives both forms the same numbers in the same order."
    generator = torch.Generator(DEVICE).manual_seed(generator_seed)
    return lambda *size: torch.rand(*size, generator=generator, device=DEVICE)


# ---- the contrast, class by class


def loop_maps(view, tags):
    "Confidences (N, C+1, h, w), one image and one class after the other."
    N, C1, h, w = view.cam.shape
    m = torch.zeros(N, C1, h, w, device=DEVICE)
    for n in range(N):
        for c in range(1, C1):
            x = view.cam[n, c].detach()
            m[n, c] = x.relu()/(x.max().relu() + 1e-5)
        m[n, 0] = 1 - (m[n, 1:]*tags[n, :, None, None]).amax(0)
    return m


def loop_labels(m, tags):
    "Labels (N, h, w): of the classes present, the one with the highest confidence."
    N, _, h, w = m.shape
    y = torch.zeros(N, h, w, dtype=torch.long, device=DEVICE)
    best = m[:, 0].clone()
    for n in range(N):
        for c in tags[n].nonzero().flatten().tolist():
            better = m[n, c + 1] > best[n]
            y[n][better] = c + 1
            best[n][better] = m[n, c + 1][better]
    return y


def loop_view(view, tags, K):
    "Unit embeddings (n, D), labels (n,), {class: prototype}."
    m = loop_maps(view, tags)
    y = loop_labels(m, tags).flatten()
    D = view.embedding.shape[1]
    v = F.normalize(view.embedding.permute(0, 2, 3, 1).reshape(-1, D), dim=1)
    P = {}
    for c in range(m.shape[1]):
        mine = (y == c).nonzero().flatten()
        if not len(mine):
            continue
        weight = m[:, c].flatten()[mine]
        top = weight.argsort(descending=True, stable=True)[:K]
        total = (weight[top][:, None]*v[mine[top]]).sum(0)
        P[c] = F.normalize(total/weight[top].sum(), dim=0)
    return v, y, P


def loop_cross(v, y, P, tau=.1):
    "Eqs. 6 and 7."
    names, rows = list(P), torch.stack(list(P.values()))
    loss, count = 0, 0
    for c in P:
        similarity = v[y == c] @ rows.t()/tau
        target = torch.full((len(similarity),), names.index(c), device=DEVICE)
        loss = loss + F.cross_entropy(similarity, target, reduction='sum')
        count += len(similarity)
    return loss/count


def loop_intra(v, y, P, rand, step, tau=.1):
    """Eq. 9 with §3.5: for each class, `step` of its pixels at a time.

    Each pixel is pushed from hard prototypes of other classes, chosen by chance."""
    names, rows = torch.tensor(list(P), device=DEVICE), torch.stack(list(P.values()))
    lot, chance = rand(len(y), 21), rand(len(y))
    total, count = 0, 0
    for positive, c in enumerate(P):
        mine = (y == c).nonzero().flatten()
        others = (names != c).nonzero().flatten()
        n = int(rounded_share(torch.tensor(len(others)), .6))
        keep = int(rounded_share(torch.tensor(n), .5))
        own = v[mine] @ rows[positive]
        loss = []
        for some in torch.arange(len(mine), device=DEVICE).split(step):
            s = v[mine[some]] @ rows.t()
            ranked = s.detach()[:, others].argsort(dim=1, descending=True, stable=True)
            hard = others[ranked[:, :n]]
            chances = lot[mine[some][:, None], names[hard]]
            negatives = hard.gather(1, chances.argsort(dim=1, descending=True)[:, :keep])
            terms = torch.cat([own[some][:, None], s.gather(1, negatives)], 1)
            loss.append(terms.div(tau).logsumexp(1) - own[some]/tau)
        loss, half = torch.cat(loss), len(mine)//2
        by_chance = chance[mine].argsort(descending=True)[:half]
        by_similarity = own.detach().argsort(stable=True)[:len(mine) - half]
        chosen = torch.cat([by_chance, by_similarity])
        total = total + loss[chosen].sum()
        count += len(chosen)
    return total/count


def loop_contrast(a, b, tags, K, rand, step):
    "The weighted sum of all terms."
    va, ya, Pa = loop_view(a, tags, K)
    vb, yb, Pb = loop_view(b, tags, K)
    loss = loop_cross(va, ya, Pb) + loop_cross(vb, yb, Pa)   # cross-prototype
    loss = loss + loop_cross(va, yb, Pa) + loop_cross(vb, ya, Pb)   # cross-CAM
    loss = loss + loop_intra(va, ya, Pa, rand, step) + loop_intra(vb, yb, Pb, rand, step)
    return .1*loss


def fast_contrast(a, b, tags, K, rand):
    "The same from the package, with the same random numbers."
    rand_like = torch.rand_like
    torch.rand_like = lambda x, dtype=None: rand(*x.shape)
    try:
        return PixelToPrototypeContrast(K, reading=PAPER_READING)(a, b, tags).total
    finally:
        torch.rand_like = rand_like


def random_views(N, C, D, side):
    "Two views and tags of two classes an image."
    g = torch.Generator().manual_seed(0)
    present = [torch.randperm(C, generator=g)[:2] for _ in range(N)]
    tags = torch.stack([torch.zeros(C).index_fill(0, classes, 1) for classes in present]).to(DEVICE)
    tags[:, 0] = 1   # so that both views know a class for every pixel of the other
    views = []
    for _ in range(2):
        cam = torch.rand(N, C + 1, side, side, generator=g).to(DEVICE)
        embedding = torch.rand(N, D, side, side, generator=g).to(DEVICE)
        views.append(View(cam, embedding.requires_grad_()))
    return *views, tags


def contrast(step, N=8, D=128, side=16, C=20, K=32):
    """Forward and backward of all terms, against a loop over classes.

    In each class the loop takes `step` pixels at a time."""
    a, b, tags = random_views(N, C, D, side)

    def with_gradient(loss):
        return loss.detach(), *torch.autograd.grad(loss, (a.embedding, b.embedding))

    def ours(): return with_gradient(fast_contrast(a, b, tags, K, seeded_rand(1)))
    def baseline(): return with_gradient(loop_contrast(a, b, tags, K, seeded_rand(1), step))
    differences = [(x - y).abs().max().item() for x, y in zip(ours(), baseline())]
    name = 'contrast against a loop over classes'
    if step == 1:
        name += ' and pixels'
    return dict(name=name, baseline_s=seconds(baseline, 3), ours_s=seconds(ours, 15),
                max_abs_diff=max(differences), extra_mb=extra_memory(ours))


# ---- the dense CRF


def crf_inputs(H, W, L):
    "Scenes side by side as one image (H, W, 3), and energies (L, H, W) of noisy labels."
    rng = np.random.default_rng(0)
    tiles = [np.dstack(scene(rng)[:2]) for _ in range(12)]
    rows = [np.concatenate(tiles[i:i + 4], 1) for i in range(0, 12, 4)]
    both = np.concatenate(rows)[:H, :W]
    image, mask = np.ascontiguousarray(both[..., :3]), both[..., 3]
    labels = np.where(rng.random((H, W)) < .2, rng.integers(0, L, (H, W)), mask % L)
    probability = np.where(np.arange(L)[:, None, None] == labels, .7, .3/(L - 1))
    return image, -np.log(probability).astype(np.float32)


def pydensecrf_field(image, unary, p):
    "The marginals (L, H, W) by pydensecrf."
    from pydensecrf import densecrf
    L, H, W = unary.shape
    field = densecrf.DenseCRF2D(W, H, L)
    field.setUnaryEnergy(unary.reshape(L, -1))
    field.addPairwiseGaussian(sxy=p.smooth_sxy, compat=p.smooth_compat)
    field.addPairwiseBilateral(sxy=p.sxy, srgb=p.srgb, rgbim=image, compat=p.compat)
    return torch.from_numpy(np.array(field.inference(p.iterations)).reshape(L, H, W))


def crf(H=375, W=500, L=4, pairs=7):
    """Ten steps of mean field against pydensecrf, one core each, called in turn.

    A list of one row, or of none where pydensecrf is not installed."""
    if importlib.util.find_spec('pydensecrf') is None:
        return []
    image, unary = crf_inputs(H, W, L)
    image_tensor = torch.from_numpy(image)[None].to(DEVICE)
    energy = torch.from_numpy(unary)[None].to(DEVICE)

    def ours(p=CRF_IRN): return mean_field(image_tensor, energy, p)[0]
    def lattices(): return ours(Pairwise(iterations=0))
    def baseline(): return pydensecrf_field(image, unary, CRF_IRN)
    with one_thread():
        want, got = baseline(), ours().cpu()
        works = (baseline, ours, lattices)
        taken = [[seconds(work, 1, 0) for work in works] for _ in range(pairs)]
        baseline_s, ours_s, lattices_s = (sorted(column)[pairs//2] for column in zip(*taken))
        return [dict(name='dense CRF against pydensecrf on one core', baseline_s=baseline_s,
                     ours_s=ours_s, of_it_lattices_s=lattices_s,
                     max_abs_diff=(got - want).abs().max().item(),
                     same_label=(got.argmax(0) == want.argmax(0)).double().mean().item(),
                     extra_mb=extra_memory(ours))]


# ---- the walk, with a dense matrix


def dense_transition(affinity, radius, beta):
    "T as a dense matrix (n, n)."
    _, H, W = affinity.shape
    A, at = torch.eye(H*W, device=DEVICE), torch.arange(H*W, device=DEVICE).view(H, W)
    for k, (dy, dx) in enumerate(neighbours(radius).tolist()):
        rows = slice(0, max(0, H - dy))
        here, there = slice(max(0, -dx), W - max(0, dx)), slice(max(0, dx), W + min(0, dx))
        i, j = at[rows, here], at[dy:, there]
        A[i, j] = A[j, i] = affinity[k, rows, here]**beta
    return A/A.sum(0)


def walk(name, h, w, channels, beta, rows=None):
    """256 steps, on one image of 375 x 500, against squaring the dense matrix 8 times.

    With `rows`, only so many rows of one squaring are timed, and the time is scaled up."""
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(channels, h, w, generator=g).to(DEVICE)
    affinity = torch.rand(34, h, w, generator=g).to(DEVICE)
    T = dense_transition(affinity, 5, beta)

    def ours(): return random_walk(scores, affinity, 5, beta, 256)
    def some_rows(): return T[:rows] @ T
    def square():
        S = T
        for _ in range(8):
            S = S @ S
        return S
    if rows is None:
        taken = seconds(square, 1)
    else:
        taken = seconds(some_rows, 1)*8*len(T)/rows
    want = scores.flatten(1)
    for _ in range(256):
        want = want @ T
    return dict(name=name, baseline_s=taken, ours_s=seconds(ours, 5),
                max_abs_diff=(ours().flatten(1) - want).abs().max().item(),
                dense_mb=T.nbytes/1e6, extra_mb=extra_memory(ours))


# ---- loading photographs, on one core


def photographs(root, n=40):
    "A dataset of scenes as large as VOC's photographs, with a camera's noise, and their masks."
    rng = np.random.default_rng(0)
    (root/'JPEGImages').mkdir()
    for i in range(n):
        image, mask, _ = scene(rng)
        large = np.asarray(Image.fromarray(image).resize((500, 375), Image.BICUBIC))
        large = large + rng.normal(0, 8, (375, 500, 3))
        photograph = Image.fromarray(large.clip(0, 255).astype(np.uint8))
        photograph.save(root/'JPEGImages'/f'{i}.jpg', quality=92)
        large_mask = Image.fromarray(mask).resize((500, 375), Image.NEAREST)
        write_mask(root/'SegmentationClass'/f'{i}.png', np.asarray(large_mask))
    (root/'classes.txt').write_text('\n'.join(CLASSES) + '\n')
    rows = [f'{i},{" ".join(CLASSES[1:])}\n' for i in range(n)]
    (root/'tags.csv').write_text('image,tags\n' + ''.join(rows))
    return TagFolder(root)


def loader_steps(data, views):
    "Milliseconds of each step for one photograph."
    def decode(i, _): return data.image(i)
    def finish(_, x): return finish_batch(x)
    steps = {'decode': decode}
    for transform in views.transform.transforms:
        steps[type(transform).__name__] = lambda _, x, transform=transform: transform(x)
    steps['finish'] = finish
    found, ms = [None]*len(data), {}
    for name, step in steps.items():
        began = time.perf_counter()
        found = [step(i, x) for i, x in enumerate(found)]
        ms[f'{name}_ms'] = 1000*(time.perf_counter() - began)/len(data)
    return ms


def per_second(work, n):
    "How many of n a call does in a second."
    began = time.perf_counter()
    work()
    return n/(time.perf_counter() - began)


def loader():
    """Milliseconds of each step from a JPEG of 500 x 375 to a view of 448 x 448.

    Also images per second of all steps together, and of `ppc data check`."""
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        data = photographs(Path(folder))
        views = TrainingViews(data, augmentation(), edge=768)

        def load_all():
            for k in range(0, len(data), 8):
                views.__getitems__([(0, i) for i in range(k, k + 8)])
        ms = loader_steps(data, views)
        loaded = per_second(load_all, len(data))
        checked = per_second(lambda: folder_report(folder, workers=1), len(data))
        large = Path(folder)/'large.jpg'
        data.image(0).resize((4000, 3000)).save(large)
        return dict(name='training views of 448 x 448 from JPEGs of 500 x 375, one core',
                    images_per_s=loaded, checked_per_s=checked, **ms,
                    large_ms=1000*seconds(lambda: read_image(large), 5),
                    large_reduced_ms=1000*seconds(lambda: read_image(large, 768), 5))


def rounded(row):
    "Three significant digits are enough for a file."
    return {k: v if isinstance(v, str) else float(f'{v:.3g}') for k, v in row.items()}


def device_name():
    if DEVICE.type == 'cuda':
        return torch.cuda.get_device_name()
    return f'{platform.machine()}, {torch.get_num_threads()} threads'


def main():
    device = device_name()
    rows = [
        loader(),
        contrast(step=1),
        contrast(step=10**6),
        *crf(),
        walk('PSA walk (stride 8) against a dense matrix squared 8 times', 47, 63, 4, 8),
        walk('IRN walk (stride 4) against the same, '
             'counted up from 1000 rows of the first squaring', 94, 125, 4, 10, rows=1000),
    ]
    for row in rows[1:]:
        row['ratio'] = row['baseline_s']/row['ours_s']
    rows = [rounded(row) for row in rows]
    name = re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')
    path = Path('runs/bench')/f'{name}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + '\n')
    for row in rows:
        print('   '.join(f'{k} {v}' for k, v in row.items()))


if __name__ == '__main__':
    main()
