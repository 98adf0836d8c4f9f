"""Warps and torus: the original's numbers, and what homographies, Moebius maps and Laplacians are."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fourdperf.data import toric, warps

GOLDENS = Path(__file__).parents[1] / "goldens" / "niso"


class Golden(dict):
    """A case: its arrays as tensors, and the tolerance that its README gives each of them."""

    def __init__(self, name):
        with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as file:
            super().__init__({key: torch.from_numpy(file[key]) for key in file.files if key != "config"})
            self.config = json.loads(str(file["config"]))

    def check(self, key, mine):
        noise = self.config["float32_noise"][key]
        allowed = 30 * noise["max_abs"] + 3e-6 * noise["ref_max"]
        assert mine.shape == self[key].shape
        error = (mine.double() - self[key].double()).abs().max().item()
        assert error <= allowed, f"{key}: error {error:.2e}, allowed {allowed:.2e}"


# Homographies


@pytest.mark.parametrize("name", ["homography_16x24", "homography_20x20"])
def test_homography_golden(name):
    golden = Golden(name)
    torch.testing.assert_close(golden["in/basis"], warps.homography_basis(), rtol=0, atol=1e-7)
    torch.testing.assert_close(golden["in/scales"], torch.tensor(warps.HOMOGRAPHY_SCALES), rtol=0, atol=0)
    coefficients = warps.homography_coefficients(golden["in/normal"])
    torch.testing.assert_close(coefficients, golden["in/coeff"], rtol=1e-6, atol=0)
    a = warps.homographies(coefficients)
    golden.check("out/A", a)
    rows, columns = warps.homography_positions(a, golden["in/x"].shape[1:3]).unbind(-1)
    golden.check("out/AI", rows)
    golden.check("out/AJ", columns)
    golden.check("out/warped", warps.warp_homography(golden["in/x"], a, upstream_border=True))


def test_sampler_golden_and_its_border():
    golden = Golden("image_interp")
    image, positions = golden["in/image"][None], torch.stack([golden["in/x"], golden["in/y"]], -1)[None]
    golden.check("out/value", warps.sample(image, positions, upstream_border=True).view(8, 9, 2))
    ends = torch.tensor([[[7.0, 8.0], [7.0, 2.0], [3.0, 8.0], [0.0, 0.0], [7.001, 2.0], [3.0, -0.001]]])
    corner = [image[0, 7, 8], image[0, 7, 2], image[0, 3, 8], image[0, 0, 0], 0 * image[0, 0, 0], 0 * image[0, 0, 0]]
    assert torch.equal(warps.sample(image, ends)[0], torch.stack(corner))
    assert warps.sample(image, ends, upstream_border=True)[0, :3].abs().max() == 0


def test_identity_shows_the_image_itself():
    images = torch.rand(2, 7, 9, 3)
    identity = torch.eye(3).expand(2, 3, 3)
    torch.testing.assert_close(warps.warp_homography(images, identity), images, rtol=0, atol=1e-5)
    lost, background = warps.warp_homography(images, identity, upstream_border=True), images.amin((1, 2))
    torch.testing.assert_close(lost[:, :-1, :-1], images[:, :-1, :-1], rtol=0, atol=1e-5)
    assert torch.equal(lost[:, -1], background[:, None].expand(-1, 9, -1))
    ends_meet = torch.cat([images[:, :, :-1], images[:, :, :1]], 2)
    ends_meet[:, [0, -1]] = ends_meet[:, [0, -1], :1]  # a pole is one point
    torch.testing.assert_close(warps.warp_mobius(ends_meet, torch.zeros(2, 6)), ends_meet, rtol=0, atol=1e-5)


def test_homographies_are_of_determinant_one():
    coefficients = warps.homography_coefficients(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(torch.linalg.det(warps.homographies(coefficients)), torch.ones(5))
    assert torch.equal(warps.homographies(torch.zeros(2, 8)), torch.eye(3).expand(2, 3, 3))


def test_a_point_at_infinity_is_outside():
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])[None]  # the middle row goes to infinity
    image = torch.ones(1, 5, 5, 1)
    image[0, 0, 0] = 0.25
    warped = warps.warp_homography(image, matrix)
    assert warped.isfinite().all() and (warped[0, 2] == 0.25).all()


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"images, positions: wanted \(B, H, W, C\) and \(B, N, 2\), got \(2, 3, 4\)"):
        warps.sample(torch.zeros(2, 3, 4), torch.zeros(2, 5, 2))
    with pytest.raises(ValueError, match=r"shift: wanted a radius in \[0, 1\), got 1"):
        warps.mobius_parameters(torch.zeros(6), shift=1)


# Moebius maps


@pytest.mark.parametrize("name", ["mobius_16x32_strong", "mobius_24x48"])
def test_mobius_golden(name):
    golden = Golden(name)
    parameters = warps.mobius_parameters(golden["in/uniform"], golden.config["shift"], upstream_angles=True)
    torch.testing.assert_close(parameters, golden["in/params"], rtol=1e-6, atol=0)
    golden.check("out/warped", warps.warp_mobius(golden["in/x"], parameters))


def test_mobius_maps_keep_angles_and_circles():
    """Cross-ratios of four points stay, as of the points' images on the plane (stereographic projection)."""
    size, uniform = (9, 17), torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    parameters = warps.mobius_parameters(uniform.double(), 0.8)
    before = _plane(warps.sphere_grid(size, torch.float64)[2:7, 1:6].reshape(-1, 3))
    positions = warps.mobius_positions(parameters, size).unflatten(1, size)[:, 2:7, 1:6].flatten(1, 2)
    polar, azimuth = positions[..., 0] / 8 * math.pi, positions[..., 1] / 16 * 2 * math.pi
    there = torch.stack([polar.sin() * azimuth.cos(), polar.sin() * azimuth.sin(), polar.cos()], -1)
    torch.testing.assert_close(_cross_ratio(_plane(there)), _cross_ratio(before).expand(4, -1))


def _plane(points):
    return torch.complex(points[..., 0], points[..., 1]) / (1 - points[..., 2])


def _cross_ratio(z):
    a, b, c, d = (z[..., i : i + 22] for i in range(4))
    return (a - c) * (b - d) / ((a - d) * (b - c))


def test_random_rotations_are_uniform():
    uniform = torch.rand(20000, 6, generator=torch.Generator().manual_seed(0))
    for upstream, second_moment in ((False, 1 / 3), (True, 1 / 2)):
        parameters = warps.mobius_parameters(uniform, 0.3, upstream_angles=upstream)
        for polar in (1, 4):
            assert abs(parameters[:, polar].cos().square().mean() - second_moment) < 0.01
        assert parameters[:, 5].max() < 0.3


# The torus


@pytest.mark.parametrize("n", [8, 16])
def test_toric_eigs_golden(n):
    golden = Golden(f"toric_eigs_{n}x{n}")
    values, vectors, mass = toric.toric_eigs(n, n)
    laplacian = toric.toric_laplacian(n, n)
    golden.check("out/evals", values)
    golden.check("out/laplacian", laplacian)
    golden.check("out/laplacian", vectors * values @ vectors.mT)
    golden.check("out/mass", mass)
    if n == 8:
        golden.check("out/heat_kernel", toric.heat_kernel(values, vectors))
    # the original's eigenvectors span the same spaces
    for space in toric.eigenspaces(values):
        theirs = golden["out/evecs"][:, space].double()
        torch.testing.assert_close(theirs @ theirs.mT, vectors[:, space] @ vectors[:, space].mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 6), (1, 4), (2, 3), (7, 2)])
def test_toric_eigs_of_other_sizes(size):
    values, vectors, _ = toric.toric_eigs(*size)
    laplacian = toric.toric_laplacian(*size)
    torch.testing.assert_close(laplacian @ vectors, vectors * values, rtol=0, atol=1e-12)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(len(values)).double(), rtol=0, atol=1e-12)
    assert (values.diff() >= -1e-15).all() and laplacian.sum(1).abs().max() < 1e-12
    x = torch.rand(1, *size, 1).double()
    shifted = toric.shift_images(x, [(1, 2)])
    moved = toric.shift_images((laplacian @ x.flatten()).view(x.shape), [(1, 2)])
    torch.testing.assert_close((laplacian @ shifted.flatten()).view(x.shape), moved)


def test_eigenspaces_of_the_square_torus():
    sizes = [space.stop - space.start for space in toric.eigenspaces(toric.toric_eigs(16, 16)[0])]
    assert sizes[:4] == [1, 4, 4, 4] and sum(sizes) == 256
    assert toric.eigenspaces(torch.tensor([0.0, 1.0, 1.0, 2.0])) == [slice(0, 1), slice(1, 3), slice(3, 4)]


def test_shift_golden():
    golden = Golden("laplacian_get_shift")
    x = toric.stack_images(golden["in/images"], 3)
    assert torch.equal(x, golden["out/x"])
    shifts = torch.stack([golden["in/shift_rows"], golden["in/shift_cols"]], -1)
    assert torch.equal(toric.shift_images(x, shifts), golden["out/Tx"])
    with pytest.raises(ValueError, match=r"images: wanted \(K 5, H, W, C\), got \(12, 5, 6, 3\)"):
        toric.stack_images(golden["in/images"], 5)
