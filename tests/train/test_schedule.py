"""Learning rate and AdamW against the ports' numbers."""

import pytest
import torch
from torch import nn

from fourdperf.train.schedule import adamw, learning_rate, warmup_within
from tests.models.d4rt_cases import Case


@pytest.mark.parametrize("port", "ab")
def test_ports(port):
    case = Case(f"{port}_lr_schedule")
    total = case.config.get("max_steps", case.config.get("total_steps"))
    start = 0.0 if port == "b" else None
    steps = case.inputs["step"].tolist()
    rates = [learning_rate(step, total, case.config["warmup_steps"], case.config["lr"], 1e-6, start) for step in steps]
    assert rates == pytest.approx(case.config["values_float64"], rel=1e-12)
    case.check("out/lr", torch.tensor(rates))


def test_every_step_near_the_peak():
    for step, rate in Case("a_lr_schedule").config["dense_float64"]:
        assert learning_rate(step, 500_000) == pytest.approx(rate, rel=1e-12)


def test_after_the_end_and_short_runs():
    assert learning_rate(10_000, 5000) == learning_rate(5000, 5000) == pytest.approx(1e-6)
    assert learning_rate(0, 1, warmup_steps=0) == 1e-4
    assert learning_rate(3, 3, warmup_steps=3) == 1e-4  # a run that is all warm-up
    assert (warmup_within(100), warmup_within(25_000), warmup_within(500_000), warmup_within(5)) == (10, 2500, 2500, 0)


def test_adamw_steps():
    case = Case("a_adamw_steps")
    parameters = [nn.Parameter(case.inputs[f"p{i}"].clone()) for i in range(4)]
    optimizer = adamw(parameters, case.config["lr"], case.config["weight_decay"])
    for step in range(8):
        rate = learning_rate(step, case.config["max_steps"], case.config["warmup_steps"], case.config["lr"])
        assert rate == pytest.approx(case.outputs["lr"][step].item(), rel=1e-6)
        optimizer.param_groups[0]["lr"] = rate
        for i, parameter in enumerate(parameters):
            parameter.grad = case.inputs[f"g{step}_{i}"].clone()
        norm = nn.utils.clip_grad_norm_(parameters, case.config["clip"])
        assert norm.item() == pytest.approx(case.outputs["grad_norm"][step].item(), rel=1e-6)
        optimizer.step()
    for i, parameter in enumerate(parameters):
        case.check(f"out/p{i}", parameter)
