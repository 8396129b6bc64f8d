"The random walk against its dense form, what it conserves, and little and bad input."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ppc.walk import neighbours, random_walk, transition

seeds = st.integers(0, 2**31)


def literal_neighbours(radius):
    "Offsets nearer than the radius; of each pair the one to the pixel later in reading order."
    return [(dy, dx) for dy in range(-radius, radius + 1) for dx in range(-radius, radius + 1)
            if (dy > 0 or dy == 0 and dx > 0) and (dy**2 + dx**2)**.5 < radius]


def literal_walk(scores, affinity, radius, beta, t):
    "The papers' dense form, and A: A pair by pair, T = A / column sums, scores · T^t."
    P, H, W = scores.shape
    A = torch.eye(H*W, dtype=torch.float64)
    for k, (dy, dx) in enumerate(literal_neighbours(radius)):
        for y in range(H):
            for x in range(W):
                if 0 <= y + dy < H and 0 <= x + dx < W:
                    i, j = y*W + x, (y + dy)*W + x + dx
                    A[i, j] = A[j, i] = affinity[k, y, x].item()**beta
    T = A/A.sum(0, keepdim=True)
    return (scores.double().reshape(P, H*W) @ torch.linalg.matrix_power(T, t)).view(P, H, W), A


def random_input(P, H, W, radius, seed, dtype=torch.float64):
    "Scores (P, H, W) and affinities (K, H, W)."
    torch.manual_seed(seed)
    K = len(literal_neighbours(radius))
    return torch.rand(P, H, W, dtype=dtype), torch.rand(K, H, W, dtype=dtype)


@pytest.mark.parametrize('radius', [1, 2, 3, 5, 10])
def test_neighbours(radius):
    assert neighbours(radius).tolist() == [list(o) for o in literal_neighbours(radius)]


@pytest.mark.parametrize('beta, t', [(8, 64), (8, 256), (10, 256)], ids=['psa-seam', 'psa', 'irn'])
@pytest.mark.parametrize('H, W', [(16, 13), (7, 24)])
def test_is_the_dense_power(H, W, beta, t):
    "With the papers' settings, for high affinities, which walk far, and for low ones."
    for power in (1, 1/8):
        scores, affinity = random_input(3, H, W, 5, H)
        raised = affinity**power
        got = random_walk(scores, raised, 5, beta, t)
        want, _ = literal_walk(scores, raised, 5, beta, t)
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
        single = random_walk(scores.float(), raised.float(), 5, beta, t)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), want, atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(1, 7), st.integers(1, 7), st.integers(1, 6),
       st.floats(0, 12), st.integers(0, 40), seeds)
def test_any_size_is_the_dense_power(P, H, W, radius, beta, t, seed):
    "Maps may be smaller than the radius; affinities to pixels outside do not matter."
    scores, affinity = random_input(P, H, W, radius, seed)
    want, A = literal_walk(scores, affinity, radius, beta, t)
    for k, (dy, dx) in enumerate(literal_neighbours(radius)):
        for y in range(H):
            for x in range(W):
                if not (0 <= y + dy < H and 0 <= x + dx < W):
                    affinity[k, y, x] = torch.nan
    got = random_walk(scores, affinity, radius, beta, t)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    degree = A.sum(0)
    torch.testing.assert_close((got.flatten(1)*degree).sum(1), (scores.flatten(1)*degree).sum(1))
    if P:   # a step averages
        assert got.max() <= scores.max() + 1e-12 and got.min() >= scores.min() - 1e-12
    flat = torch.full((1, H, W), .3, dtype=torch.float64)
    torch.testing.assert_close(random_walk(flat, affinity, radius, beta, t), flat)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 9), st.integers(0, 9), seeds)
def test_steps_add_up_and_channels_are_independent(H, W, s, t, seed):
    scores, affinity = random_input(3, H, W, 4, seed)
    whole = random_walk(scores, affinity, 4, 8, s + t)
    half = random_walk(scores, affinity, 4, 8, s)
    torch.testing.assert_close(random_walk(half, affinity, 4, 8, t), whole)
    singly = torch.cat([random_walk(c[None], affinity, 4, 8, s + t) for c in scores])
    torch.testing.assert_close(singly, whole)
    assert torch.equal(random_walk(scores, affinity, 4, 8, 0), scores)


def test_a_mirrored_image_walks_mirrored():
    "Affinities belong to pairs: turning map and pairs by 180 degrees turns the result."
    scores, affinity = random_input(2, 9, 11, 5, 0)
    turned = torch.zeros_like(affinity)
    for k, (dy, dx) in enumerate(literal_neighbours(5)):
        turned[k] = affinity[k].roll((dy, dx), (0, 1)).flip(0, 1)
    got = random_walk(scores.flip(1, 2), turned, 5, 8, 32)
    torch.testing.assert_close(got, random_walk(scores, affinity, 5, 8, 32).flip(1, 2))


def test_input_is_not_changed():
    scores, affinity = random_input(2, 6, 6, 5, 0)
    before = scores.clone(), affinity.clone()
    random_walk(scores, affinity, 5, 8, 0).zero_()
    random_walk(scores, affinity, 5, 8, 3).zero_()
    assert torch.equal(scores, before[0]) and torch.equal(affinity, before[1])


def test_no_affinity_no_walk():
    scores, affinity = random_input(2, 5, 8, 5, 0)
    assert torch.equal(random_walk(scores, 0*affinity, 5, 8, 256), scores)
    assert random_walk(scores[:0], affinity, 5, 8, 256).shape == (0, 5, 8)
    assert random_walk(torch.ones(2, 1, 1), torch.rand(34, 1, 1), 5, 8, 256).tolist() == [[[1.]]]*2


def test_transition_is_sparse():
    step = transition(torch.rand(34, 30, 40), 5, 8)
    assert step.layout == torch.sparse_csr and step.values().numel() <= 69*30*40
    torch.testing.assert_close(step.to_dense().sum(1), torch.ones(30*40))


@pytest.mark.parametrize('change, words', [
    (dict(affinity=torch.rand(33, 6, 7)), r'\(33, 6, 7\).*\(34, H, W\)'),
    (dict(affinity=torch.rand(34, 7, 6)), 'for radius 5'),
    (dict(scores=torch.rand(6, 7)), r'\(P, H, W\)'),
    (dict(scores=torch.rand(2, 6, 7).half()), 'float16'),
    (dict(scores=torch.ones(2, 6, 7).long()), 'int64'),
    (dict(radius=0), 'radius is 0'),
    (dict(t=-1), 't is -1'),
    (dict(scores=torch.full((2, 6, 7), torch.nan)), 'NaN'),
    (dict(t=2.5), 't is 2.5'),
])
def test_wrong_input_is_named(change, words):
    right = dict(scores=torch.rand(2, 6, 7), affinity=torch.rand(34, 6, 7), radius=5, beta=8, t=4)
    with pytest.raises(ValueError, match=words):
        random_walk(**right | change)
