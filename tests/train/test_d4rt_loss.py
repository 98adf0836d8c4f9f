"""D4RT's loss: the ports' numbers by their formulas, and what the paper's formula promises."""

import pytest
import torch

from fourdperf.data.queries import Targets
from fourdperf.models.d4rt import Prediction
from fourdperf.train.d4rt_loss import Weights, d4rt_loss, signed_log
from tests.models.d4rt_cases import Case

A_NAMES = {
    "xyz": "loss_3d",
    "uv": "loss_2d",
    "confidence": "loss_confidence",
    "visibility": "loss_visibility",
    "displacement": "loss_motion",
    "normal": "loss_normal",
}
A_INPUTS = {"xyz": "3d", "uv": "2d", "displacement": "motion", "normal": "normal"}


def port_a(case: Case):
    """The inputs of A as ours; leaves as A has them, so that gradients are with respect to the same numbers."""
    leaves = {name: x.clone().requires_grad_() for name, x in case.inputs.items() if name.startswith("pred_")}
    confidence = leaves["pred_confidence"].squeeze(-1).logit()
    visibility = leaves["pred_visibility_logits"].squeeze(-1)
    outputs = [leaves.get(f"pred_{A_INPUTS[name]}") for name in ("xyz", "uv", "displacement", "normal")]
    prediction = Prediction(outputs[0], outputs[1], visibility, outputs[2], outputs[3], confidence)
    mask = case.inputs.get("mask", torch.ones(visibility.shape)).bool()
    truth, has = {}, {}
    for name, port in (A_INPUTS | {"visibility": "visibility"}).items():
        known = f"gt_{port}" in case.inputs
        truth[name] = case.inputs[f"gt_{port}"] if known else torch.zeros_like(getattr(prediction, name))
        has[f"has_{name}"] = mask & known
    return leaves, prediction, Targets(**truth, **has)


@pytest.mark.parametrize("kind", ["masked", "nomask", "partial", "negdepth_conf2d", "plain"])
def test_seed_a(kind):
    case = Case(f"a_losses_{kind}")
    leaves, prediction, targets = port_a(case)
    options = dict(case.config["loss"])
    switches = {
        "normalize": options.pop("depth_normalize", True),
        "log": options.pop("use_log_transform", True),
    }
    port_defaults = {"lambda_3d": 1.0, "lambda_2d": 0.1, "lambda_confidence": 0.01}
    values = {name: (port_defaults | options).get(A_NAMES[name].replace("loss", "lambda"), 0.1) for name in A_NAMES}
    terms = d4rt_loss(prediction, targets, Weights(**values), "seed_a", **switches)
    terms["loss"].backward()
    for ours, theirs in (A_NAMES | {"loss": "loss"}).items():
        if theirs in case.outputs:
            case.check(f"out/{theirs}", terms[ours])
        else:
            assert terms[ours] == 0
    for name, leaf in leaves.items():
        if name in case.grads:
            case.check(f"grad/{name}", leaf.grad)
    assert len([name for name in leaves if name in case.grads]) >= 4


B_NAMES = {
    "xyz": "pos_3d",
    "uv": "pos_2d",
    "visibility": "visibility",
    "displacement": "displacement",
    "normal": "normal",
    "confidence": "confidence",
}
B_MASKS = {"xyz": "3d", "uv": "2d", "visibility": "vis", "displacement": "disp", "normal": "normal"}
B_TERMS = B_MASKS | {"confidence": "conf"}


@pytest.mark.parametrize("kind", ["masked", "negdepth", "nomask"])
def test_seed_b(kind):
    case = Case(f"b_losses_{kind}")
    leaves = {name: case.inputs[f"pred/{port}"].clone().requires_grad_() for name, port in B_NAMES.items()}
    raw = {name: leaf.squeeze(-1) if leaf.shape[-1] == 1 else leaf for name, leaf in leaves.items()}
    prediction = Prediction(**raw | {"confidence": raw["confidence"].logit()})
    everywhere = torch.ones(prediction.visibility.shape)
    truth, has = {}, {}
    for name, mask in B_MASKS.items():
        truth[name] = case.inputs[f"tgt/{B_NAMES[name]}"]
        otherwise = case.inputs.get("tgt/mask_3d", everywhere)  # B's fallback where a term has no mask of its own
        has[f"has_{name}"] = case.inputs.get(f"tgt/mask_{mask}", otherwise).bool()
    terms = d4rt_loss(prediction, Targets(**truth, **has), formula="seed_b")
    # Without masks B leaves out the confidence's weight and two terms: not a formula, and not reproduced.
    names = ("uv", "visibility", "confidence") if kind == "nomask" else (*B_TERMS, "loss")
    for name in names:
        case.check(f"out/loss_{B_TERMS[name]}" if name != "loss" else "out/loss", terms[name])
    if kind != "nomask":
        terms["loss"].backward()
        for name, leaf in leaves.items():
            case.check(f"grad/pred/{B_NAMES[name]}", leaf.grad)


# The paper's


def example(clips=3, queries=20, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(clips, queries, *shape, generator=g, dtype=dtype)
    mask = lambda: torch.rand(clips, queries, generator=g) < 0.7
    xyz, truth = random(3), random(3)
    xyz[..., 2] = xyz[..., 2].abs() + 0.5
    truth[..., 2] = truth[..., 2].abs() + 0.5
    prediction = Prediction(xyz, random(2), random(), random(3), random(3), random())
    visibility = (random() > 0).to(dtype)
    uv = torch.rand(clips, queries, 2, generator=g, dtype=dtype)
    normal = torch.nn.functional.normalize(random(3), dim=-1)
    targets = Targets(truth, uv, visibility, random(3), normal, *(mask() for _ in range(5)))
    return prediction, targets


def test_terms_by_hand():
    prediction, targets = example(clips=2)
    terms = d4rt_loss(prediction, targets)
    wanted = {name: 0.0 for name in terms}
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    for b in range(2):
        p, t = Prediction(*(x[b] for x in prediction)), Targets(*(x[b] for x in targets))
        z, tz = p.xyz[t.has_xyz][:, 2].mean(), t.xyz[t.has_xyz][:, 2].mean()
        error = (signed_log(p.xyz / z) - signed_log(t.xyz / tz)).abs().mean(-1)
        c = p.confidence.sigmoid()
        cosine = torch.nn.functional.cosine_similarity(p.normal, t.normal, dim=-1)
        parts = {
            "xyz": (c * error)[t.has_xyz],
            "confidence": -c.log()[t.has_xyz],
            "uv": (p.uv - t.uv).abs().mean(-1)[t.has_uv],
            "visibility": bce(p.visibility, t.visibility, reduction="none")[t.has_visibility],
            "displacement": (p.displacement / z - t.displacement / tz).abs().mean(-1)[t.has_displacement],
            "normal": 1 - cosine[t.has_normal],
        }
        for name, values in parts.items():
            wanted[name] += values.mean() / 2
    weights = {"xyz": 1, "uv": 0.1, "confidence": 0.2, "visibility": 0.1, "displacement": 0.1, "normal": 0.5}
    wanted["loss"] = sum(weight * wanted[name] for name, weight in weights.items())
    for name, value in wanted.items():
        assert terms[name].dtype == torch.float32
        torch.testing.assert_close(terms[name].double(), torch.as_tensor(value), rtol=2e-6, atol=0)


def test_what_is_not_known_is_not_read_and_gets_no_gradient():
    prediction, targets = example()
    leaves = Prediction(*(x.clone().requires_grad_() for x in prediction))
    wanted = d4rt_loss(prediction, targets)
    spoilt = targets._asdict()
    for name in ("xyz", "uv", "visibility", "displacement", "normal"):
        value = spoilt[name].clone()
        value[~spoilt[f"has_{name}"]] = torch.nan
        spoilt[name] = value
    terms = d4rt_loss(leaves, Targets(**spoilt))
    assert all(terms[name] == wanted[name] for name in terms)
    terms["loss"].backward()
    for name in ("xyz", "uv", "visibility", "displacement", "normal"):
        gradient, known = getattr(leaves, name).grad, getattr(targets, f"has_{name}")
        assert gradient.isfinite().all() and (gradient[~known] == 0).all() and (gradient[known] != 0).any()
    assert (leaves.confidence.grad[~targets.has_xyz] == 0).all()


def test_scale_of_prediction_and_truth_do_not_matter():
    prediction, targets = example()
    wanted = d4rt_loss(prediction, targets)
    larger = prediction._replace(xyz=7 * prediction.xyz, displacement=7 * prediction.displacement)
    smaller = targets._replace(xyz=0.01 * targets.xyz, displacement=0.01 * targets.displacement)
    terms = d4rt_loss(larger, smaller)
    for name in terms:
        torch.testing.assert_close(terms[name], wanted[name], rtol=1e-5, atol=0)


def test_points_behind_the_camera_neither_flip_nor_explode():
    prediction, targets = example()
    z = prediction.xyz.clone()
    z[..., 2] = torch.linspace(-1, 1, z.shape[1])  # the mean z is zero
    leaf = z.requires_grad_()
    loss = d4rt_loss(prediction._replace(xyz=leaf), targets)["xyz"]
    loss.backward()
    assert loss < 2 and leaf.grad.abs().max() < 1
    behind = leaf.detach()[..., 2] < 0
    assert (leaf.grad[..., 2][behind & targets.has_xyz] < 0).all()  # descent brings them to the front


def test_loss_of_a_batch_is_the_mean_of_its_clips():
    prediction, targets = example(clips=4)
    whole = d4rt_loss(prediction, targets)
    parts = [
        d4rt_loss(Prediction(*(x[b : b + 1] for x in prediction)), Targets(*(x[b : b + 1] for x in targets)))
        for b in range(4)
    ]
    for name in whole:
        torch.testing.assert_close(whole[name], torch.stack([part[name] for part in parts]).mean())


def test_clip_without_any_truth_gives_zero_and_finite_gradients():
    prediction, targets = example()
    never = torch.zeros_like(targets.has_xyz)
    nothing = targets._replace(**{name: never for name in Targets._fields if name.startswith("has_")})
    leaves = Prediction(*(x.clone().requires_grad_() for x in prediction))
    terms = d4rt_loss(leaves, nothing)
    assert all(value == 0 for value in terms.values())
    terms["loss"].backward()
    assert all((leaf.grad == 0).all() for leaf in leaves)


def test_far_projections_do_not_count():
    prediction, targets = example()
    far = targets.uv.clone()
    far[:, :3] = 1e4
    terms = d4rt_loss(prediction, targets._replace(uv=far))
    assert terms["uv"] < 3
    assert d4rt_loss(prediction, targets._replace(uv=far), formula="seed_a")["uv"] > 100


def test_bfloat16_predictions_are_computed_in_float32():
    prediction, targets = example(dtype=torch.float32)
    half = Prediction(*(x.bfloat16() for x in prediction))
    terms = d4rt_loss(half, targets)
    wanted = d4rt_loss(Prediction(*(x.float() for x in half)), targets)
    assert all(terms[name] == wanted[name] for name in terms)


def test_shapes_that_differ():
    prediction, targets = example()
    with pytest.raises(ValueError, match=r"wanted xyz .* got \(3, 20, 3\), \(2, 20, 3\)"):
        d4rt_loss(prediction, Targets(*(x[:2] for x in targets)))
