"""The quantizer of tokenizers: codes, losses and their gradients; moving averages, restarts, processes, compilation."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from fourdperf.models import quantizer as module
from fourdperf.models import titok
from fourdperf.models.quantizer import VectorQuantizer, entropy, entropy_loss, soft_choices
from fourdperf.models.titok import TiTok
from tests.models.goldens import close
from tests.models.tokenizer_cases import PIXELS, TITOK


def quantizer_and_z(**options):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(9, 4, **options).double()
    nn.init.normal_(quantizer.codebook)
    return quantizer, F.normalize(torch.randn(2, 7, 4, dtype=torch.float64), dim=-1).requires_grad_()


@pytest.mark.parametrize("beta_on", ["commitment", "codebook"])
def test_quantizer(beta_on):
    """Codes are the nearest directions; the gradient goes straight through; both losses have their own."""
    quantizer, z = quantizer_and_z(beta_on=beta_on, beta=0.1)
    found = quantizer(z)
    codes = F.normalize(quantizer.codebook.detach(), dim=-1)
    assert torch.equal(found.indices, (z @ codes.T).argmax(-1))
    close(found.quantized, codes[found.indices])
    assert set(found.losses) == {"commitment", "codebook"}
    factors = {"commitment": 1.0, "codebook": 1.0, beta_on: 0.1}
    error = (z - codes[found.indices]).square().mean()
    for name, loss in found.losses.items():
        close(loss, factors[name] * error)
    cotangent = torch.randn_like(z)
    grads = torch.autograd.grad(
        found.quantized, (z, quantizer.codebook), cotangent, allow_unused=True, retain_graph=True
    )
    assert torch.equal(grads[0], cotangent) and grads[1] is None
    (grad,) = torch.autograd.grad(found.losses["commitment"], z, retain_graph=True)
    close(grad, factors["commitment"] * 2 * (z - codes[found.indices]).detach() / z.numel())
    assert torch.autograd.grad(found.losses["codebook"], z, allow_unused=True, retain_graph=True) == (None,)
    (grad,) = torch.autograd.grad(found.losses["codebook"], quantizer.codebook)
    assert (grad * quantizer.codebook).sum(1).abs().max() < 1e-15 and grad.any()  # along the sphere alone


def test_in_place():
    """The stored codes become those in force; elsewhere they stay."""
    for in_place in (True, False):
        quantizer, z = quantizer_and_z(in_place=in_place)
        before = quantizer.codebook.detach().clone()
        quantizer(z)
        close(quantizer.codebook.detach(), F.normalize(before, dim=-1) if in_place else before, 1e-15)


def test_entropy_loss():
    """In train mode alone; least where choices are sure and use is even."""
    quantizer, z = quantizer_and_z(entropy_gamma=0.7)
    assert "entropy" in quantizer.train()(z).losses and "entropy" not in quantizer.eval()(z).losses
    quantizer = VectorQuantizer(4, 4, entropy_gamma=0.7).double()
    quantizer.codebook.data = torch.eye(4, dtype=torch.float64)
    even, one = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[:1]
    close(quantizer(even).losses["entropy"], torch.tensor(-0.7 * math.log(4)).double(), 1e-6)
    assert quantizer(one).losses["entropy"].abs() < 1e-6
    unsure = F.normalize(torch.ones(1, 4, dtype=torch.float64), dim=-1)
    close(quantizer(unsure).losses["entropy"], torch.tensor(0.3 * math.log(4)).double(), 1e-6)


@pytest.mark.parametrize("choices", [1, 40, 10**6])
def test_entropy_loss_in_bounded_memory(choices, monkeypatch):
    """Some rows at a time: the value and gradients of all at once, and nothing of rows x codes numbers is kept."""
    monkeypatch.setattr(module, "ENTROPY_CHOICES", choices)
    torch.manual_seed(0)
    z, codes = (F.normalize(torch.randn(n, 4, dtype=torch.float64), dim=-1).requires_grad_() for n in (23, 9))
    plain = soft_choices(z, codes, 0.01)
    plain = entropy(plain).mean() - 0.7 * entropy(plain.mean(0))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = entropy_loss(z, codes, 0.7)
    assert max(kept) <= max(z.numel(), codes.numel())
    close(loss, plain)
    for a, b in zip(torch.autograd.grad(loss, (z, codes)), torch.autograd.grad(plain, (z, codes))):
        close(a, b, 1e-10)


# ---- moving averages and restarts


def batches(count, rows=14):
    generator = torch.Generator().manual_seed(1)
    return [F.normalize(torch.randn(rows, 4, generator=generator, dtype=torch.float64), dim=-1) for _ in range(count)]


def test_moving_averages():
    """counts and counts * codebook are the averages of counts and sums; a code without use stays; eval mode moves nothing."""
    quantizer, _ = quantizer_and_z(ema=0.9, normalize=False)
    codebook = quantizer.codebook.clone()
    codebook[3] += 100
    quantizer.codebook.copy_(codebook)
    counts, sums = torch.ones(9, dtype=torch.float64), codebook.clone()
    for z in batches(4):
        one_hot = F.one_hot(torch.cdist(z, sums / counts[:, None]).argmin(1), 9).double()
        found = quantizer(z)
        assert torch.equal(found.indices, one_hot.argmax(1)) and set(found.losses) == {"commitment"}
        counts, sums = 0.9 * counts + 0.1 * one_hot.sum(0), 0.9 * sums + 0.1 * one_hot.T @ z
        close(quantizer.counts, counts)
        close(quantizer.codebook, sums / counts[:, None])
    assert torch.equal(quantizer.codebook[3], codebook[3]) and not dict(quantizer.named_parameters())
    before = quantizer.codebook.clone()
    quantizer.eval()(z)
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_restarts(ema):
    """A code that nothing was nearest to in three passes is a row of the next; the others are left to training."""
    quantizer, _ = quantizer_and_z(ema=ema, restart=3, normalize=False)
    with torch.no_grad():
        quantizer.codebook[[2, 5]] = 50 + torch.rand(2, 4, dtype=torch.float64)
    unused = torch.zeros(9, dtype=torch.int64)
    for number, z in enumerate(batches(4)):
        before, dead = quantizer.codebook.detach().clone(), unused >= 3
        assert dead[[2, 5]].all() == (number == 3)
        found = quantizer(z)
        used = torch.bincount(found.indices, minlength=9) > 0
        unused = torch.where(used, 0, torch.where(dead, 0, unused) + 1)
        assert torch.equal(quantizer.unused, unused) and quantizer.steps == number + 1
        if ema is None:
            assert torch.equal((quantizer.codebook != before).any(1), dead)
    rows = quantizer.codebook.detach()[[2, 5]]
    if ema is None:
        assert all((row == z).all(1).any() for row in rows) and not torch.equal(*rows)
    assert rows.norm(dim=1).max() < 1.5


@pytest.mark.parametrize("in_place", [False, True])
def test_two_passes_before_one_backward(in_place):
    """What a second pass changes in the codebook is not seen by the gradients of the first."""
    quantizer, _ = quantizer_and_z(restart=1, entropy_gamma=1.0, in_place=in_place)
    first, second = (z.requires_grad_() for z in batches(2))
    loss = sum(quantizer(first).losses.values())
    wanted = torch.autograd.grad(loss, (first, quantizer.codebook), retain_graph=True)
    quantizer(second)
    for a, b in zip(torch.autograd.grad(loss, (first, quantizer.codebook)), wanted):
        assert torch.equal(a, b)


def test_frozen_codes_stay():
    """A TiTok with a pixel decoder keeps the state of its moving averages, and moves nothing in train mode."""
    codes = {"target": "codes", "target_codes": 12, "pixels": PIXELS}
    model = TiTok(titok.Config(**TITOK, **codes, ema=0.5, restart=1)).train()
    before = {name: x.clone() for name, x in model.quantizer.state_dict().items()}
    model(torch.rand(2, *model.config.image_size, 3))
    assert model.decoder.training and set(before) == {"codebook", "counts", "unused", "steps"}
    assert all(torch.equal(x, before[name]) for name, x in model.quantizer.state_dict().items())


def test_resumes_exactly():
    """From the state alone, which has no more than the options need."""
    assert set(VectorQuantizer(9, 4).state_dict()) == {"codebook"}
    assert set(VectorQuantizer(9, 4, ema=0.5).state_dict()) == {"codebook", "counts"}
    assert set(VectorQuantizer(9, 4, restart=2).state_dict()) == {"codebook", "unused", "steps"}
    torch.manual_seed(3)
    quantizer, _ = quantizer_and_z(ema=0.7, restart=2)
    other, _ = quantizer_and_z(ema=0.7, restart=2)
    for number, z in enumerate(batches(9)):
        if number == 4:
            torch.manual_seed(number)  # the generator's state is no part of it
            other.load_state_dict(quantizer.state_dict())
        quantizer(z)
        if number >= 4:
            other(z)
    for name, x in quantizer.state_dict().items():
        assert torch.equal(x, other.state_dict()[name]), name


def _process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for options in ({"ema": 0.8}, {"ema": 0.8, "restart": 2}, {"restart": 2}):
        quantizer, _ = quantizer_and_z(**options)
        for z in batches(6):
            quantizer(z[7 * rank :][:7])
        torch.save(quantizer.state_dict(), f"{folder}/{rank}-{len(options)}-{'ema' in options}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """They stay alike, and average as one with all rows does."""
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    read = lambda name: torch.load(tmp_path / name, weights_only=True)
    for case in ("1-True", "2-True", "1-False"):
        first, second = read(f"0-{case}.pt"), read(f"1-{case}.pt")
        assert all(torch.equal(first[name], second[name]) for name in first)
    alone, _ = quantizer_and_z(ema=0.8)
    for z in batches(6):
        alone(z)
    for name, x in read("0-1-True.pt").items():
        close(x, alone.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_codes_of_any_integers(dtype):
    """And of none of the codes, which is an error."""
    quantizer, _ = quantizer_and_z()
    indices = torch.tensor([[0, 8, 1], [1, 0, 3]])
    assert torch.equal(quantizer.lookup(indices.to(dtype)), quantizer.lookup(indices))
    assert quantizer.lookup(indices[:0]).shape == (0, 3, 4)
    for wrong in (-1, 9):
        with pytest.raises(ValueError, match=rf"indices: expected numbers in 0 .. 8, got {wrong} .. {wrong}"):
            quantizer.lookup(torch.tensor([wrong]))


def test_compiled():
    options = {"ema": 0.7, "restart": 2, "entropy_gamma": 1.0}
    (plain, _), (ours, _) = quantizer_and_z(**options), quantizer_and_z(**options)
    compiled = torch.compile(ours, fullgraph=True)
    for z in batches(4):
        a, b = (z.clone().requires_grad_() for _ in range(2))
        found, wanted = compiled(a), plain(b)
        assert torch.equal(found.indices, wanted.indices)
        for name, loss in wanted.losses.items():
            close(found.losses[name], loss, 1e-10)
        sum(found.losses.values()).backward()
        sum(wanted.losses.values()).backward()
        close(a.grad, b.grad, 1e-9)
    for name, x in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], x)


@pytest.mark.parametrize(
    "options, message",
    [({"ema": 1.0}, r"ema: expected a decay in \[0, 1\), got 1.0"), ({"restart": 0}, "restart: expected at least 1")],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(9, 4, **options)
