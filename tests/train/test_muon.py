"""Muon and AdamW as one optimiser."""

import copy

import pytest
import torch

from fourdperf.models.d4rt import D4RT, Config
from fourdperf.train.muon import Muon, MuonAdamW

CONFIG = Config(16, 1, 2, num_frames=2, image_size=8, patch_size=(2, 8, 8), decoder_layers=1)


def _step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_matrices_of_blocks_move_by_muon_and_the_rest_by_adamw():
    torch.manual_seed(0)
    model = D4RT(CONFIG)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.03)
    _step(model, MuonAdamW(model, 1e-2), 1)
    _step(twin, adamw, 1)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        moved = ours.detach() - before[name] * (1 - 1e-2 * 0.03)
        if ours.ndim == 2 and ("layers." in name or "blocks." in name):
            values = torch.linalg.svdvals(moved)
            assert values.max() / values.min() < 2.5, name  # orthogonal, as far as five Newton-Schulz steps go
            assert moved.square().mean().sqrt() == pytest.approx(0.2e-2, rel=0.35), name  # AdamW's usual size
        else:
            torch.testing.assert_close(ours, theirs)


def test_steps_are_those_of_torch_up_to_its_bf16():
    """Wide, tall and square matrices, two of one shape, momentum over three steps; one parameter never has a gradient."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 24), (8, 24), (24, 8), (16, 16), (5, 5))]
    theirs = copy.deepcopy(ours)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizers = [
        Muon(ours, **options),
        torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw"),
    ]
    before = copy.deepcopy(ours)
    for _ in range(3):
        for a, b in zip(ours[:-1], theirs[:-1]):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours[:-1], theirs[:-1], before):
        moved = (b - start).norm()
        assert (a - b).norm() < 0.02 * moved
    assert torch.equal(ours[-1], before[-1])
    assert all("momentum_buffer" in optimizers[0].state[p] for p in ours[:-1])


def test_a_schedule_reaches_both_parts_and_a_saved_state_goes_on_exactly():
    torch.manual_seed(0)
    model = D4RT(CONFIG)
    optimizer = MuonAdamW(model, 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for seed in range(3):
        _step(model, optimizer, seed)
        schedule.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [2.5e-3, 2.5e-3]

    other = copy.deepcopy(model)
    resumed = MuonAdamW(other, 1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in resumed.param_groups] == [2.5e-3, 2.5e-3]
    _step(model, optimizer, 9)
    _step(other, resumed, 9)
    for ours, theirs in zip(model.parameters(), other.parameters()):
        assert torch.equal(ours, theirs)
