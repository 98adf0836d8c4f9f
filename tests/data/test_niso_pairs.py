"""Pairs and windows: what they show, and that they depend on the seed and the number alone."""

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fourdperf.data import niso, warps
from fourdperf.data.homnist import PlacedImages
from fourdperf.data.images import open_images
from fourdperf.data.toric import shift_images

GOLDENS = Path(__file__).parents[1] / "goldens" / "niso"


class Source:
    """Random items; number i always the same."""

    def __init__(self, length=7, shape=(6, 8, 2)):
        self.x = torch.rand(length, *shape, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "label": index % 3}


class Videos:
    """Frame t of video i is i everywhere but for t in its pose."""

    lengths = (5, 12, 9)

    def __len__(self):
        return len(self.lengths)

    def frames(self, index):
        return self.lengths[index]

    def read(self, index, numbers):
        assert max(numbers) < self.lengths[index]
        poses = torch.eye(4).repeat(len(numbers), 1, 1)
        poses[:, 0, 3] = torch.tensor(list(numbers)).float()
        video = torch.full((len(numbers), 4, 4, 3), float(index))
        return {"video": video, "poses": poses, "intrinsics": torch.eye(3).repeat(len(numbers), 1, 1)}


MAKERS = {
    "shifts": lambda **options: niso.ShiftedImages(Source(), stack=3, **options),
    "homographies": lambda **options: niso.HomographyPairs(Source(), **options),
    "images": lambda **options: niso.WarpedImages(Source(), **options),
    "shapes": lambda **options: niso.ShapePairs(Source(shape=(4, 6, 8, 2)), **options),
    "warped shapes": lambda **options: niso.WarpedShapes(Source(), **options),
    "windows": lambda **options: niso.SequenceWindows(Videos(), 3, stride=2, **options),
    "augmented windows": lambda **options: niso.SequenceWindows(Videos(), 3, augment=True, **options),
}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


@pytest.mark.parametrize("kind", MAKERS)
def test_items_depend_on_seed_and_number_only(kind):
    one, other = MAKERS[kind](seed=1), MAKERS[kind](seed=1)
    numbers = [0, 5, 30, 2, 9, 31]
    batch = one.__getitems__(numbers)
    assert all(same(item, other[number]) for item, number in zip(reversed(batch), reversed(numbers)))
    assert all(same(item, pickle.loads(pickle.dumps(one))[number]) for item, number in zip(batch, numbers))
    assert not all(same(item, MAKERS[kind](seed=2)[number]) for item, number in zip(batch, numbers))
    loaded = next(iter(DataLoader(one, batch_size=3)))
    assert same({key: value[1] for key, value in loaded.items()}, one[1])


def test_passes_show_every_item_in_new_orders_and_warps():
    source = Source()
    pairs = niso.HomographyPairs(source)
    order = lambda visit: [
        int((source.x == pairs[n]["x"]).flatten(1).all(1).nonzero()) for n in range(7 * visit, 7 * visit + 7)
    ]
    orders = [order(visit) for visit in range(4)]
    assert all(sorted(one) == list(range(7)) for one in orders) and len(set(map(tuple, orders))) > 1
    fixed = niso.HomographyPairs(source, shuffle=False)
    assert all(torch.equal(fixed[n]["x"], source.x[n % 7]) for n in range(21))
    assert not torch.equal(fixed[3]["Tx"], fixed[10]["Tx"]) and torch.equal(fixed[3]["x"], fixed[10]["x"])


def test_homography_pairs_and_warped_images():
    source = Source()
    pairs, images = niso.HomographyPairs(source, shuffle=False), niso.WarpedImages(source, shuffle=False)
    for i in range(7):
        assert torch.equal(pairs[i]["Tx"], images[i]["x"]) and images[i]["label"] == pairs[i]["label"] == i % 3
    still = niso.HomographyPairs(source, spread=0)[0]
    torch.testing.assert_close(still["x"], still["Tx"], rtol=0, atol=1e-5)


def test_shifted_images():
    images = niso.ShiftedImages(Source(30), shuffle=False)
    assert images.stack == 29  # (6 * 8 + 10) / 2 channels
    item = images[4]
    assert item["x"].shape == (6, 8, 58) and torch.equal(item["x"][..., :2], images.source.x[4])
    assert torch.equal(shift_images(item["x"][None], item["shift"][None])[0], item["Tx"])
    shifts = torch.stack([images[i]["shift"] for i in range(200)])
    assert shifts.amin(0).tolist() == [0, 0] and shifts.amax(0).tolist() == [5, 7]
    parts = {tuple(part.flatten().tolist()) for part in item["x"].unflatten(-1, (29, 2)).unbind(2)}
    assert len(parts) == 29
    for stack in (0, 8):
        with pytest.raises(ValueError, match=f"stack: wanted from 1 to the 7 images there are, got {stack}"):
            niso.ShiftedImages(Source(), stack=stack)


@pytest.mark.parametrize("name", ["uniform", "weighted"])
def test_draw_pairs_golden(name):
    with np.load(GOLDENS / f"shrec_pairs_{name}.npz", allow_pickle=False) as golden:
        pairs = niso.draw_pairs(torch.from_numpy(golden["in/batch"]), torch.from_numpy(golden["in/indices"]).long())
        assert torch.equal(pairs, torch.from_numpy(golden["out/pairs"]))


def test_pair_indices():
    generator = torch.Generator().manual_seed(0)
    for weight, share in ((None, 0.2), (0.6, 0.6), (1, 1)):
        first, second = niso.pair_indices(20000, 5, weight, generator).T
        assert abs((first == 0).double().mean() - share) < 0.015
        assert abs((second == 0).double().mean() - 0.2) < 0.015
        for k in range(1, 5):
            assert abs((first == k).double().mean() - (1 - share) / 4) < 0.015
    with pytest.raises(ValueError, match="base_weight: wanted a probability, got 2"):
        niso.pair_indices(1, 5, 2)


def test_shape_pairs_are_copies_under_mobius_maps():
    source = Source(shape=(4, 6, 8, 2))
    unwarped = niso.ShapePairs(source, shift=None, base_weight=1, shuffle=False)
    seen = set()
    for n in range(70):
        item = unwarped[n]
        assert torch.equal(item["x"], source.x[n % 7, 0])
        seen |= {k for k in range(4) if torch.equal(item["Tx"], source.x[n % 7, k])}
    assert seen == {0, 1, 2, 3}
    constant = Source(shape=(6, 8, 2))
    constant.x[:] = torch.tensor([0.3, 0.8])
    item = niso.ShapePairs(constant, shift=0.9)[0]
    torch.testing.assert_close(item["Tx"], torch.tensor([0.3, 0.8]).expand(6, 8, 2))
    assert not torch.equal(*(niso.ShapePairs(source, seed=1)[0][key] for key in ("x", "Tx")))


def test_windows_fit_into_their_videos():
    windows = niso.SequenceWindows(Videos(), 4, stride=3)
    starts, strides = set(), set()
    for n in range(300):
        item = windows[n]
        numbers, index = item["poses"][:, 0, 3].int().tolist(), int(item["video"][0, 0, 0, 0])
        assert len(set(np.diff(numbers))) == 1 and numbers[-1] < Videos.lengths[index]
        strides.add((index, numbers[1] - numbers[0]))
        starts.add((index, numbers[0]))
    assert strides == {(0, 1), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2)}
    assert {(0, 0), (0, 1), (1, 0), (1, 8), (2, 5)} <= starts
    first = niso.SequenceWindows(Videos(), 4, stride=3, first_frame=True, shuffle=False)
    assert [first[n]["poses"][:, 0, 3].tolist() for n in range(3)] == [[0, 1, 2, 3], [0, 3, 6, 9], [0, 2, 4, 6]]
    with pytest.raises(ValueError, match="video 0: wanted at least 6 frames, got 5"):
        niso.SequenceWindows(Videos(), 6, shuffle=False)[0]


def test_windows_backwards_and_in_a_mirror():
    """Each of the four ways, a quarter of the time; the mirror's cameras see the mirrored points where they are seen."""
    windows = niso.SequenceWindows(Videos(), 3, augment=True)
    ways = [(n[-1] > n[0], n[0] < 0 or n[-1] < 0) for n in (windows[i]["poses"][:, 0, 3].tolist() for i in range(200))]
    assert all(20 < ways.count(way) < 80 for way in itertools.product((False, True), repeat=2))
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    poses = torch.eye(4).repeat(5, 1, 1)
    poses[:, :3, :3], poses[:, :3, 3] = torch.linalg.qr(random(5, 3, 3)).Q, random(5, 3)
    intrinsics = torch.tensor([[1.2, 0, 0.375], [0, 1.5, 0.6], [0, 0, 1]]).repeat(5, 1, 1)
    given = {"video": random(5, 4, 6, 3), "poses": poses, "intrinsics": intrinsics}
    found = niso.mirrored(given)
    assert torch.equal(found["video"], given["video"].flip(2))

    def seen(window, points):
        uv = (torch.linalg.inv(window["poses"]) @ points)[:, :3].mT @ window["intrinsics"].mT
        return uv[..., :2] / uv[..., 2:]

    points = torch.cat([random(3, 7), torch.ones(1, 7)])
    there, mirror = seen(given, points), seen(found, points * torch.tensor([-1.0, 1, 1, 1])[:, None])
    torch.testing.assert_close(mirror, there * torch.tensor([-1, 1]) + torch.tensor([1, 0]), rtol=1e-3, atol=1e-3)
    assert same(niso.mirrored(found), given)


def test_digits_in_the_middle_of_nothing():
    digits = open_images("digits", "test")
    placed = PlacedImages(digits, size=40, digit=28)
    x = placed[3]["x"]
    assert x.shape == (40, 40, 1) and x.dtype == torch.float32 and 0 <= x.min() and 0.8 < x.max() <= 1
    assert x[[0, 1, -1]].max() < 0.01 and placed[3]["label"] == digits[3][1]
    # the middle of every pixel of 8 x 8 lies where the bicubic surface goes through it
    centre = torch.from_numpy(
        np.array([x.numpy()[6 + int(3.5 * i + 1.75), 6 + int(3.5 * j + 1.75), 0] for i in range(8) for j in range(8)])
    )
    assert np.corrcoef(centre, digits[3][0].flatten())[0, 1] > 0.95
    same = PlacedImages(digits, size=8, digit=None)
    assert torch.equal(same[3]["x"], digits[3][0])
    assert PlacedImages(digits, size=6, digit=4)[0]["x"].shape == (6, 6, 1)
    memory = niso.InMemory(placed)
    assert torch.equal(memory[3]["x"], x) and memory[3]["label"] == placed[3]["label"] and len(memory) == len(placed)
    with pytest.raises(ValueError, match="digit: wanted from 1 to size 20, got 28"):
        PlacedImages(digits, size=20)


def test_warps_of_a_test_set_move_digits():
    placed = PlacedImages(open_images("digits", "test"))
    warped = niso.WarpedImages(placed, shuffle=False)
    differences = [(warped[i]["x"] - placed[i]["x"]).abs().mean() for i in range(20)]
    assert min(differences) > 0.001 and warps.SPREAD == 0.5
