"""Discriminators against the numbers of the seed's code and of TiTok's."""

import pytest
import torch

from fourdperf.models.discriminators import DISCRIMINATORS, BlurPool, PatchDiscriminator, TiTokDiscriminator
from tests.models.tokenizer_cases import Case, first

TITOK = {"block_in.0": "stem", "to_logits.0": "dense", "to_logits.2": "out"}


def titok_name(theirs: str) -> str:
    """Our name of a parameter of TiTok's discriminator."""
    stem, _, kind = theirs.rpartition(".")
    if stem in TITOK:
        return f"{TITOK[stem]}.{kind}"
    _, stage, part = stem.split(".")
    return f"{'convolutions' if part == '0' else 'norms'}.{stage}.{kind}"


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_patches(mode):
    case = Case(f"c_discriminator_{mode}")
    model = PatchDiscriminator(case.spec["ndf"], case.spec["n_layers"])
    model.load_state_dict({name.replace("main.", "layers."): x for name, x in case.params.items()})
    model.train(mode == "train")
    x = case.inputs["x"].requires_grad_()
    logits = model((first(x) + 1) / 2)[:, None]
    case.check("logits", logits)
    (logits * case.inputs["cot/logits"]).sum().backward()
    case.check("x", x.grad, "grad")
    for name, p in model.named_parameters():
        case.check(f"params/{name.replace('layers.', 'main.')}", p.grad, "grad")
    after = {name: x for name, x in model.named_buffers() if "running" in name}
    for name, x in after.items():
        theirs = name.replace("layers.", "main.")
        if mode == "train":
            case.check(f"after/{theirs}", x)
        else:
            assert torch.equal(x, case.params[theirs])


def test_patches_begin_as_they_do_upstream():
    torch.manual_seed(0)
    model = PatchDiscriminator(64, 3)
    assert [tuple(x.weight.shape) for x in model.layers if isinstance(x, torch.nn.Conv2d)] == [
        (64, 3, 4, 4),
        (128, 64, 4, 4),
        (256, 128, 4, 4),
        (512, 256, 4, 4),
        (1, 512, 4, 4),
    ]
    assert model.layers[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    norm = model.layers[3].weight
    assert norm.mean().item() == pytest.approx(1, abs=0.01) and norm.std().item() == pytest.approx(0.02, rel=0.2)


def test_titok():
    case = Case("d_losses")
    model = TiTokDiscriminator(case.spec["hidden_channels"], case.spec["num_stages"])
    kernels = [x for name, x in case.params.items() if name.endswith(".kernel")]
    assert all(torch.equal(model.pool.kernel, kernel) for kernel in kernels) and len(kernels) == 2
    named = {name: titok_name(name) for name in case.params if not name.endswith(".kernel")}
    model.load_state_dict({ours: case.params[theirs] for theirs, ours in named.items()})
    x = case.inputs["x"].requires_grad_()
    logits = model(first(x))[:, None]
    case.check("logits_disc", logits)
    (logits * case.inputs["cot/logits_disc"]).sum().backward()
    case.check("x", x.grad, "grad")
    parameters = dict(model.named_parameters())
    grads = {theirs: parameters[ours].grad for theirs, ours in named.items()}
    stored = {key.removeprefix("params/"): x for key, x in case.grads.items() if key.startswith("params/")}
    for key in stored:
        case.check(f"params/{key}", grads[key], "grad")
    # a norm's own noise is one draw: the worst of the arrays' counts, about 1e-4 in the README's table
    relative = max(case.spec["atol"][f"grad/params/{key}"] / x.abs().max().item() for key, x in stored.items())
    norms = {key.removeprefix("norm/"): x.item() for key, x in case.grads.items() if key.startswith("norm/")}
    assert relative < 1.5e-4 and set(norms) == set(named)
    assert {key: grads[key].norm().item() for key in norms} == pytest.approx(norms, rel=relative)


def test_blurred_pooling_of_odd_sizes():
    assert BlurPool()(torch.ones(1, 2, 5, 8)).shape == (1, 2, 3, 4)
    assert BlurPool()(torch.ones(1, 1, 8, 8))[0, 0, 1, 1] == 1


def test_titok_width():
    with pytest.raises(ValueError, match="width: expected a multiple of 32, got 48"):
        TiTokDiscriminator(48)


@pytest.mark.parametrize(("kind", "shape"), [("patch", (2, 2, 4)), ("titok", (2, 16, 16))])
def test_logits_of_patches(kind, shape):
    assert DISCRIMINATORS[kind](32)(torch.rand(2, 32, 48, 3)).shape == shape
