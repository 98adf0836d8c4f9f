"""Convolutions with less work than written give what is written, gradients too."""

import pytest
import torch
import torch.nn.functional as F

from fourdperf.models.convolutions import Conv3x3, ResBlock, UpConv3x3, channels_last
from tests.models.goldens import close, gradients

SIZES = [(4, 5, (6, 7)), (3, 8, (5, 1)), (8, 3, (1, 9)), (4, 40, (6, 7)), (2, 3, (2, 2))]


def written(module, x):
    """As F.conv2d and F.interpolate have it."""
    if isinstance(module, UpConv3x3):
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.conv2d(x, module.weight, module.bias, padding=1)


@pytest.mark.parametrize("kind", [Conv3x3, UpConv3x3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs, outputs, size", SIZES)
def test_the_same_numbers_and_gradients(kind, bias, inputs, outputs, size):
    torch.manual_seed(0)
    module = kind(inputs, outputs, bias).double()
    x = torch.randn(2, inputs, *size, dtype=torch.float64, requires_grad=True)
    for picture in (x, channels_last(x)):
        got, want = module(picture), written(module, picture)
        close(got, want)
        cotangent = torch.randn_like(want)
        sums = [(out * cotangent).sum() for out in (got, want)]
        ours, theirs = (torch.autograd.grad(total, x, retain_graph=True)[0] for total in sums)
        close(ours, theirs)
        ours, theirs = (gradients(module, total) for total in sums)
        for name in theirs:
            close(ours[name], theirs[name])


def test_narrow_and_large_pictures_do_less():
    """By counting multiplications."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(module, x):
        with FlopCounterMode(display=False) as counter:
            module(x)
        return counter.get_total_flops()

    assert count(Conv3x3(4, 4), torch.randn(1, 4, 50, 1)) * 3 == 2 * 9 * 16 * 50
    doubled = count(UpConv3x3(4, 4), torch.randn(1, 4, 50, 50))
    assert doubled == 4 * 2 * 4 * 16 * 51**2 < 0.47 * (2 * 9 * 16 * 100**2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_err_no_more_than_twice_the_written_ones(dtype):
    torch.manual_seed(0)
    module = UpConv3x3(32, 16).to(dtype)
    x = torch.randn(1, 32, 9, 9).to(dtype)
    exact = written(module.double(), x.double())
    module = module.to(dtype)
    error, plain = ((f(x).double() - exact).abs().max().item() for f in (module, lambda x: written(module, x)))
    assert module(x).dtype == dtype and error <= 2 * plain + torch.finfo(dtype).eps * exact.abs().max().item()


def test_autocast_gives_its_own_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert UpConv3x3(3, 4)(torch.randn(1, 3, 8, 8)).dtype == torch.bfloat16


def test_channels_stay_together():
    x = channels_last(torch.randn(1, 32, 12, 12))
    for module in (Conv3x3(32, 32), UpConv3x3(32, 32), torch.nn.GroupNorm(32, 32)):
        assert module(x).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("outputs, shortcut", [(32, "input"), (64, "input"), (64, "output")])
def test_what_a_hook_keeps_stays_as_it_was(outputs, shortcut):
    torch.manual_seed(0)
    block, x = ResBlock(32, outputs, shortcut=shortcut), torch.randn(1, 32, 6, 7)
    want, kept, copies = block(x), [], []

    def keep(module, args, output):
        kept.append(output)
        copies.append(output.clone())

    for module in block.children():
        module.register_forward_hook(keep)
    torch.testing.assert_close(block(x), want)
    assert len(kept) >= 4 and all(torch.equal(a, b) for a, b in zip(kept, copies))


@torch.no_grad()
def test_autocast_sums_in_the_wider_dtype():
    torch.manual_seed(0)
    block, x = ResBlock(32, 32), torch.randn(1, 32, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        got = block(x)
        with torch.enable_grad():
            want = block(x)
    assert got.dtype == want.dtype == torch.float32 and torch.equal(got, want)
