"One transformation A for images, features and CAMs of any size: a literal sampler, invariances."
import math
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ppc.cam import Maps
from ppc.views import paired_views, random_transformation, resize, transformation

quick = settings(max_examples=25, deadline=None)
sides, seeds = st.integers(2, 24), st.integers(0, 2**20)


any_degrees, any_pixels = st.floats(-20, 20), st.integers(-16, 16)


@st.composite
def moves(draw, n=2, side=33, degrees=any_degrees, shift=any_pixels):
    "The arguments of `transformation` for n images."
    rows = draw(st.lists(st.tuples(st.booleans(), degrees, shift, shift), min_size=n, max_size=n))
    flips = torch.tensor([r[0] for r in rows])
    angles = torch.tensor([float(r[1]) for r in rows])
    return flips, angles, torch.tensor([r[2:] for r in rows]), side


def literal(x, flip, degrees, pixels, side, size):
    """Pixel by pixel: its point in the source, and the four pixels around that point.
    One image (C, H, W), float64."""
    C, H, W = x.shape
    out = torch.zeros(C, size, size, dtype=x.dtype)
    seen = torch.zeros(size, size, dtype=torch.bool)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    for i in range(size):
        for j in range(size):
            u = j*2/(size - 1) - 1 - pixels[0]*2/(side - 1)   # undo the shift
            v = i*2/(size - 1) - 1 - pixels[1]*2/(side - 1)
            u, v = cos*u + sin*v, -sin*u + cos*v              # the rotation
            if flip:                                          # the flip
                u = -u
            px, py = (u + 1)/2*(W - 1), (v + 1)/2*(H - 1)
            if not (-1e-4 <= px <= W - 1 + 1e-4 and -1e-4 <= py <= H - 1 + 1e-4):
                continue
            seen[i, j] = True
            px, py = min(max(px, 0), W - 1), min(max(py, 0), H - 1)
            left, top = min(int(px), W - 2), min(int(py), H - 2)
            fx, fy = px - left, py - top
            above = (1-fx)*x[:, top, left] + fx*x[:, top, left+1]
            below = (1-fx)*x[:, top+1, left] + fx*x[:, top+1, left+1]
            out[:, i, j] = (1-fy)*above + fy*below
    return out, seen


@quick
@given(moves(), sides, st.integers(3, 12), seeds)
def test_literal_sampler(move, source, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, source, source, dtype=torch.float64, generator=generator)
    a, (flips, degrees, pixels, side) = transformation(*move), move
    got, valid = a(x, size), a.valid(size)
    edge = ((a.source_points(size).abs() - 1).abs() < 1e-4).any(-1)   # rounding decides there
    for n in range(2):
        arguments = bool(flips[n]), float(degrees[n]), pixels[n].tolist(), side
        want, seen = literal(x[n], *arguments, size)
        assert torch.equal(valid[n, 0][~edge[n]], seen[~edge[n]])
        torch.testing.assert_close((got*valid)[n], want*valid[n], atol=1e-4, rtol=0)
        assert not got[n][:, ~valid[n, 0]].any()


@quick
@given(st.tuples(sides, sides), st.tuples(sides, sides), seeds)
def test_without_a_kind_it_is_resize_bit_for_bit(source, size, seed):
    torch.manual_seed(seed)
    x, a = torch.randn(3, 2, *source), random_transformation(3, 64)
    assert torch.equal(a(x, size), resize(x, size)) and a.valid(size).all()
    assert torch.equal(a(x, size[0]), resize(x, size[0]))


@quick
@given(sides, seeds)
def test_an_image_that_stays_in_a_batch_that_is_moved(size, seed):
    torch.manual_seed(seed)
    x, pixels = torch.randn(2, 2, 17, 17), torch.tensor([[0, 0], [3, -2]])
    a = transformation(torch.tensor([False, True]), torch.tensor([0., 9]), pixels, 17)
    assert torch.equal(a(x, size)[0], resize(x, size)[0]) and a.valid(size)[0].all()


@quick
@given(sides, sides, seeds)
def test_flip(source, size, seed):
    torch.manual_seed(seed)
    x, yes = torch.randn(2, 3, source, source), torch.ones(2, dtype=torch.bool)
    a = transformation(yes, torch.zeros(2), torch.zeros(2, 2), source)
    assert a.valid(size).all()
    torch.testing.assert_close(a(x, size), resize(x, size).flip(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a(a(x, source), source), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('side', [8, 9, 112, 448])
@pytest.mark.parametrize('turns', [1, 2, -1])
def test_rotation_is_one_in_pixels(side, turns):
    "Quarter turns, clockwise, hit pixels exactly, and everything stays in sight."
    x, degrees = torch.rand(1, 2, side, side), torch.tensor([90.*turns])
    a = transformation(torch.tensor([False]), degrees, torch.zeros(1, 2), side)
    assert a.valid(side).all()
    torch.testing.assert_close(a(x, side), x.rot90(-turns, (2, 3)), atol=2e-4, rtol=0)


@quick
@given(st.integers(-16, 16), st.integers(-16, 16), seeds)
def test_translation_in_pixels_of_the_source(right, down, seed):
    torch.manual_seed(seed)
    x = torch.rand(1, 2, 40, 40)
    a = transformation(torch.tensor([False]), torch.zeros(1), torch.tensor([[right, down]]), 40)
    def shifted(x):
        return F.pad(x, (16, 16, 16, 16))[..., 16 - down:56 - down, 16 - right:56 - right]
    assert torch.equal(a.valid(40), shifted(torch.ones_like(x[:, :1])) > 0)
    torch.testing.assert_close(a(x, 40), shifted(x), atol=1e-5, rtol=0)


@quick
@given(moves(n=3), sides, sides)
def test_invalid_is_where_an_image_of_ones_is_below_one(move, source, size):
    "The same holds for a sampler that reads zeros outside, up to rounding on the very border."
    a, ones = transformation(*move), torch.ones(3, 1, source, source)
    assert torch.equal(a.valid(size), a(ones, size) > 1 - 1e-5)
    zeros_outside = F.grid_sample(ones.double(), a.source_points(size), align_corners=True)
    assert torch.equal(a.valid(size), zeros_outside > 1 - 1e-5*source)


@quick
@given(moves(), sides, sides, sides)
def test_one_definition_for_every_size(move, large, small, size):
    "Interpolation keeps a linear ramp: from any size, its value is the point it came from."
    a = transformation(*move)
    def ramp(side):
        line = torch.linspace(-1, 1, side, dtype=torch.float64)
        return torch.stack(torch.meshgrid(line, line, indexing='xy')).expand(2, 2, side, side)
    seen, points = a.valid(size), a.source_points(size).permute(0, 3, 1, 2)
    for x in (ramp(large), ramp(small)):
        torch.testing.assert_close(a(x, size)*seen, points*seen, atol=1e-4, rtol=0)


def pixelwise(x): return torch.cat([x.square(), (7*x).sin(), (x > .5).to(x)], 1)


@quick
@given(moves(degrees=st.just(0), shift=st.integers(-2, 2).map(lambda k: 8*k)), seeds)
def test_flip_and_shift_by_strides_commute_with_an_encoder(move, seed):
    "A network of stride 8 that looks at every eighth pixel, on 33 pixels: exact."
    torch.manual_seed(seed)
    x, a = torch.rand(2, 1, 33, 33).round(decimals=1), transformation(*move)
    x = (x + .05).clamp(max=1)   # no colour where the encoder jumps
    def encode(x): return pixelwise(x[..., ::8, ::8])
    seen = a.valid(5)
    assert torch.equal(seen, a.valid(33)[..., ::8, ::8])
    torch.testing.assert_close(encode(a(x, 33))*seen, a(encode(x), 5)*seen, atol=1e-4, rtol=0)


@quick
@given(st.integers(1, 5), st.sampled_from([2, 4, 8]), seeds)
def test_flip_commutes_with_pooling_by_the_stride(h, stride, seed):
    torch.manual_seed(seed)
    x = torch.rand(2, 3, (h + 1)*stride, (h + 1)*stride)
    a = transformation(torch.tensor([True, False]), torch.zeros(2), torch.zeros(2, 2), 16)
    def encode(x): return F.avg_pool2d(x, stride).square()
    torch.testing.assert_close(encode(a(x, x.shape[-1])), a(encode(x), h + 1), atol=1e-5, rtol=0)


@quick
@given(moves(side=65), st.integers(10, 70), seeds)
def test_any_move_commutes_with_an_encoder_away_from_borders(move, size, seed):
    "Regions of one colour each: inside a region, where valid, the order does not matter."
    torch.manual_seed(seed)
    regions = F.one_hot(torch.randint(0, 4, (2, 5, 5)), 4).permute(0, 3, 1, 2)
    regions = regions.repeat_interleave(13, 2).repeat_interleave(13, 3).float()
    image = (regions*torch.rand(4)[:, None, None]).sum(1, keepdim=True)
    a = transformation(*move)
    inside = a.valid(size) & (a(regions, size).amax(1, keepdim=True) > 1 - 1e-5)
    near_jump = (a(image, size) - .5).abs() < 1e-3
    compared = inside & ~near_jump
    moved_first, encoded_first = pixelwise(a(image, size)), a(pixelwise(image), size)
    torch.testing.assert_close(moved_first*compared, encoded_first*compared, atol=1e-3, rtol=0)
    assert inside.float().mean() > .1


def test_draws():
    """In range, whole pixels, uniform, one per image; a switch does not change the other draws;
    without a switch there is no move."""
    n, side = 4000, 448
    def numbers(**kw):
        torch.manual_seed(0)
        return random_transformation(n, side, **kw).theta.double()
    flip, turn, shift = numbers(flip=True), numbers(rotate=20), numbers(translate=16)
    every = numbers(flip=True, rotate=20, translate=16)
    assert .45 < (flip[:, 0, 0] < 0).double().mean() < .55
    angle = torch.rad2deg(torch.atan2(turn[:, 0, 1], turn[:, 0, 0]))
    assert 19 < angle.max() <= 20.0001 and -20.0001 <= angle.min() < -19
    assert abs(angle.mean()) < 1
    pixels = -shift[:, :, 2]*(side - 1)/2
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)
    counts = torch.stack([torch.bincount(p.round().long() + 16, minlength=33) for p in pixels.T])
    assert counts.shape == (2, 33) and counts.min() > 70 and counts.max() < 180
    m = torch.diag_embed(torch.stack([flip[:, 0, 0], torch.ones(n)], 1).double())
    linear, offset = every[:, :, :2], every[:, :, 2:]
    torch.testing.assert_close(linear, m @ turn[:, :, :2], atol=1e-6, rtol=0)
    torch.testing.assert_close(offset, linear @ shift[:, :, 2:], atol=1e-6, rtol=0)
    assert torch.equal(numbers(), torch.eye(2, 3).double().expand(n, 2, 3))


def test_same_seed_same_views():
    x = torch.rand(3, 3, 32, 32)
    def draw():
        torch.manual_seed(5)
        return random_transformation(3, 32, True, 20, 16)(x, 16)
    assert torch.equal(draw(), draw())


def test_gradient():
    "Right by finite differences; pixels that the target does not show get none."
    torch.manual_seed(0)
    flips, degrees = torch.tensor([True, False]), torch.tensor([13., -20])
    a = transformation(flips, degrees, torch.tensor([[2, 0], [0, -3]]), 9)
    x = torch.rand(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: a(x, 7), x)
    shift = transformation(torch.tensor([False]), torch.zeros(1), torch.tensor([[3, 0]]), 9)
    x = torch.rand(1, 1, 9, 9, requires_grad=True)
    shift(x, 9).sum().backward()
    want = torch.ones(9).index_fill(0, torch.arange(6, 9), 0).expand(1, 1, 9, 9)
    torch.testing.assert_close(x.grad, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precision_is_kept(dtype):
    "Maps in half precision are sampled at points that are not rounded to half precision."
    torch.manual_seed(0)
    x, a = torch.rand(2, 3, 64, 64), random_transformation(2, 64, True, 20, 16)
    got = a(x.to(dtype), 32)
    assert got.dtype == dtype
    atol = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(got.float(), a(x, 32), atol=atol, rtol=0)


def test_paired_views():
    torch.manual_seed(0)
    def maps(s):
        return Maps(torch.randn(2, 4, s, s), torch.randn(2, 4, s, s), torch.randn(2, 8, s, s))
    source, target, a = maps(14), maps(8), random_transformation(2, 112, True, 20, 16)
    s, t = paired_views(source, target, 6, True, a)
    for view, want, transform in ((s, source, a), (t, target, resize)):
        assert torch.equal(view.cam, transform(want.refined, 6))
        assert torch.equal(view.embedding, transform(want.embedding, 6))
        assert torch.equal(view.valid, a.valid(6)) and not view.valid.all()
    plain_cams, _ = paired_views(source, target, a=a, refined=False)
    assert torch.equal(plain_cams.cam, a(source.cam, 8))
    rescaled = paired_views(source, target, 6)
    still = paired_views(source, target, 6, a=random_transformation(2, 112))
    for p, q in zip(rescaled, still):
        assert p.valid is None and q.valid.all()
        assert torch.equal(p.cam, q.cam) and torch.equal(p.embedding, q.embedding)
