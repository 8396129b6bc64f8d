"The threshold curve equals sixty separate evaluations, count by count."
import time
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ppc.metrics import ThresholdCurve, confusion, iou, miou


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
])
def test_misfit_is_refused(truth, pred):
    with pytest.raises(ValueError):
        confusion(truth, pred, 2)


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
