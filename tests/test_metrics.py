"The threshold curve equals sixty separate evaluations, count by count."
import time
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ppc.metrics import BINS, ThresholdCurve, confusion, iou, miou, otsu, score_counts


def literal(cam, present, truth, thresholds, classes):
    "One evaluation for each threshold: argmax over [t, scores], ties to the background."
    counts = []
    for t in thresholds:
        stack = np.concatenate([np.full((1, *truth.shape), t, np.float32), cam])
        pred = np.concatenate([[0], present]).astype(int)[stack.argmax(0)]
        counts.append(confusion(truth, pred, classes))
    return np.stack(counts)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(1, 17), st.integers(1, 17))
def test_curve_is_exact(seed, classes, h, w):
    rng = np.random.default_rng(seed)
    curve, total = ThresholdCurve(classes), 0
    for _ in range(2):
        present = rng.permutation(np.arange(1, classes))[:rng.integers(0, classes)]
        levels = np.r_[curve.thresholds, rng.random(20).astype(np.float32), 0, 1].astype(np.float32)
        cam = rng.choice(levels, (len(present), h, w))
        truth = rng.choice(np.r_[np.arange(classes), 255], (h, w))
        curve.add(cam, present, truth)
        total = total + literal(cam, present, truth, curve.thresholds, classes)
    assert (curve.counts() == total).all()
    if total.sum():
        assert curve.best()[1] == miou(total).max()


def test_255_is_not_counted():
    assert confusion(np.full((3, 3), 255), np.ones((3, 3), int), 2).sum() == 0


def test_no_overflow():
    "More pixels than 32 bits can count."
    counts = sum(np.array([[2**31, 5], [0, 2**31]]) for _ in range(4))
    assert counts.dtype == np.int64 and miou(counts) > .999


def test_absent_class_has_no_iou():
    counts = confusion(np.array([[0, 1]]), np.array([[0, 1]]), 3)
    assert np.isnan(iou(counts)[2]) and miou(counts) == 1


@pytest.mark.parametrize('truth, pred', [
    (np.zeros((2, 2), int), np.zeros((2, 3), int)),
    (np.zeros((1, 1), int), np.full((1, 1), 2)),
    (np.zeros((1, 1), int), np.full((1, 1), -1)),     # would count as class 1 of the row above
    (np.full((1, 1), -1), np.zeros((1, 1), int)),
    (np.full((1, 1), 2), np.zeros((1, 1), int)),
    (np.zeros((1, 1), int), np.full((1, 1), 255)),    # unknown is a truth, no prediction
    (np.zeros((1, 1), int), np.full((1, 1), np.nan)),
])
def test_misfit_is_refused(truth, pred):
    with pytest.raises(ValueError):
        confusion(truth, pred, 2)


@pytest.mark.parametrize('cam, present, truth', [
    (.5, [1], -1), (.5, [1], 3), (.5, [1], 254), (np.nan, [1], 0), (.5, [3], 0), (.5, [-1], 0)])
def test_curve_refuses_what_would_count_elsewhere(cam, present, truth):
    curve = ThresholdCurve(3)
    with pytest.raises(ValueError, match='class|NaN'):
        curve.add(np.full((1, 2, 2), cam), np.array(present), np.full((2, 2), truth))
    assert not curve.hist.any()


@pytest.mark.parametrize('wrong', [3, 128, 254, 256, -1])
def test_truth_of_a_class_that_does_not_exist(wrong):
    "The curve refuses it, as `confusion` does, and does not count it as unknown."
    truth = np.array([[0, 2], [255, wrong]])
    for cam, present in ((np.zeros((1, 2, 2)), [1]), (np.zeros((0, 2, 2)), [])):
        curve = ThresholdCurve(3)
        with pytest.raises(ValueError):
            curve.add(cam, present, truth)
        assert not curve.counts().any()
        curve.add(cam, present, np.where(truth == wrong, 255, truth))
        assert (curve.counts().sum((1, 2)) == 2).all()


def timed(work):
    "Seconds that one call takes."
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def test_hundred_times_faster_than_sixty_passes():
    """375x500, 21 classes of which two are tagged.

    The plain way scores all 21 at each threshold, as the field's scripts do.
    """
    rng = np.random.default_rng(0)
    present, truth = np.array([3, 15]), rng.choice([0, 3, 15, 255], (375, 500))
    cam = rng.random((2, 375, 500), dtype=np.float32)
    dense = np.zeros((20, 375, 500), np.float32)
    dense[present - 1] = cam

    def sixty_passes():
        literal(dense, np.arange(1, 21), truth, np.arange(60)/100, 21)

    def one_pass():
        ThresholdCurve(21).add(cam, present, truth)

    slow = min(timed(sixty_passes) for _ in range(3))
    fast = min(timed(one_pass) for _ in range(30))
    print(f'60 passes {slow:.3f} s, one pass {1000*fast:.1f} ms, ratio {slow/fast:.0f}')
    assert slow/fast >= 100


def literal_otsu(counts):
    "The variance between the groups at each cut, from the values themselves."
    middles = (np.arange(len(counts)) + .5)/len(counts)
    values = np.repeat(middles, counts)
    cuts = np.arange(1, len(counts))/len(counts)
    def between(cut):
        low, high = values[values < cut], values[values >= cut]
        if not len(low) or not len(high):
            return 0
        return len(low)*len(high)*(high.mean() - low.mean())**2/len(values)**2
    return cuts, np.array([between(cut) for cut in cuts])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=3, max_size=30).filter(lambda n: sum(map(bool, n)) > 1))
def test_otsu_cuts_where_the_variance_between_the_groups_is_largest(counts):
    cuts, variance = literal_otsu(counts)
    chosen = otsu(np.array(counts))
    best = cuts[np.isclose(variance, variance.max(), rtol=1e-12, atol=0)]
    assert best.min() - 1e-12 <= chosen <= best.max() + 1e-12


def test_otsu_cuts_in_the_middle_of_a_gap():
    counts = np.zeros(10)
    counts[[0, 1, 8]] = 5, 5, 2
    assert otsu(counts) == pytest.approx(.5)


@pytest.mark.parametrize('counts', [np.zeros(BINS), np.eye(BINS)[3]])
def test_otsu_needs_two_kinds_of_scores(counts):
    with pytest.raises(ValueError, match='no threshold between'):
        otsu(counts)


def test_an_image_without_a_class_has_no_scores():
    assert score_counts(np.zeros((0, 5, 5))).sum() == 0
    assert score_counts(np.ones((2, 5, 5)))[-1] == 25
