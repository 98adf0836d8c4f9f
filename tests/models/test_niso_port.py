"""Neural Isometries against the original's own numbers: every part, its gradients, the losses, the training."""

import pytest
import torch

from fourdperf.convert import niso as convert
from fourdperf.models import niso, niso_nets
from fourdperf.models.niso import IsometricOperator, inverse_se3, lift_se3
from fourdperf.train import niso_loss
from fourdperf.train.schedule import learning_rate
from tests.models.niso_cases import Case, names


def check_part(name, module, rows, x="x"):
    """y and the gradients of sum(weight * y)."""
    case = Case(name)
    case.fill(module, rows)
    x = case.inputs["x"].requires_grad_()
    y = module(x)
    case.check("out/y", y)
    (y * case.inputs["weight"]).sum().backward()
    case.check("grad/x", x.grad)
    case.check_gradients(module, rows)


# ---- parts


@pytest.mark.parametrize("name", names("operator_iso_"))
def test_operator(name):
    case = Case(name)
    sizes = case.model
    rows = convert.operator("", "", sizes["spatial"], sizes["op_dim"])
    module = IsometricOperator(
        sizes["op_dim"], sizes["spatial"], clustered=sizes["clustered_init"], gradient="regularized"
    )
    case.fill(module, rows)
    a, b = (case.inputs[x].requires_grad_() for x in "AB")
    basis = module.basis()
    tau = module.isometry(a, b, basis)
    found = {"tauOmega": tau, "Phi": basis.functions, "Lambda": basis.eigenvalues, "M": basis.mass}
    for key, x in {**found, "delta_mask": basis.mask, "det_of_tauOmega": torch.linalg.det(tau)}.items():
        case.check(f"out/{key}", x)
    (tau * case.inputs["weight"]).sum().backward(retain_graph=True)
    case.check("grad/A", a.grad)
    case.check("grad/B", b.grad)
    case.check_gradients(module, rows)
    module.zero_grad()
    weighted = (basis.functions * case.inputs["weight_phi"]).sum()
    (weighted + (basis.eigenvalues * case.inputs["weight_lambda"]).sum() + basis.mass.sum()).backward()
    case.check_gradients(module, rows, "basis/")


def test_instance_norm():
    check_part("conv_layernorm", niso_nets.InstanceNorm(4), _renamed(convert.instance_norm("", "", 4)))


def _renamed(rows):
    """Rows of a module that has no name."""
    return [row._replace(key=row.key[1:], sources=tuple((k[1:], s) for k, s in row.sources)) for row in rows]


def test_res_block():
    rows = convert.res_block("", "", 4, 9, 3, True)
    check_part("conv_resblock", niso_nets.ResBlock(4, 9, 3, bias=True), rows)


@pytest.mark.parametrize("name", names("conv_encoder"))
def test_encoder(name):
    sizes = Case(name).model
    inputs = Case(name).inputs["x"].shape[-1]
    args = (inputs, sizes["channels"], sizes["block_depth"], sizes["out_dim"], sizes["kernel_size"])
    check_part(name, niso_nets.ConvEncoder(*args, bias=True), convert.encoder("", "", *args, 48, True))


@pytest.mark.parametrize("name", names("conv_decoder"))
def test_decoder(name):
    sizes = Case(name).model
    inputs = Case(name).inputs["x"].shape[-1]
    args = (inputs, sizes["channels"], sizes["block_depth"], sizes["out_dim"], sizes["kernel_size"])
    check_part(name, niso_nets.ConvDecoder(*args, bias=True), convert.decoder("", "", *args, True))


def test_orthogonal_neuron():
    check_part("equiv_orth_neuron", niso_nets.OrthogonalNeuron(6, 9), _renamed(convert.orthogonal_neuron("", "", 6, 9)))


def test_orthogonal_norm():
    check_part("equiv_orth_norm", niso_nets.OrthogonalNorm(6), _renamed(convert.orthogonal_norm("", "", 6)))


@pytest.mark.parametrize("name", names("equiv_orth_mlp"))
def test_orthogonal_mlp(name):
    sizes = Case(name).model
    width, layers = sizes["features"] * sizes.get("factor", 1), sizes["num_layers"]
    module = niso_nets.OrthogonalMLP(5, width, layers, upstream_modules=True)
    check_part(name, module, convert.orthogonal_mlp("", "", 5, width, layers))


def test_orthogonal_out():
    check_part("equiv_orth_out", niso_nets.OrthogonalOut(6, 7, 8), convert.orthogonal_out("", "", 6, 7, 8))


@pytest.mark.parametrize("name", names("equiv_orth_net"))
def test_orthogonal_net(name):
    case = Case(name)
    sizes = case.model
    args = (case.inputs["x"].shape[-1], sizes["features"], sizes["num_layers"], sizes["out_dim"])
    module = niso_nets.OrthogonalNet(*args, sizes["inter_features"], upstream_modules=True)
    check_part(name, module, convert.orthogonal_net("", "", *args, sizes["inter_features"], True))


@pytest.mark.parametrize("name", names("mlp_") + names("skip_mlp_"))
def test_plain_nets(name):
    sizes = Case(name).model
    args = (Case(name).inputs["x"].shape[-1], sizes["features"], sizes["num_layers"], sizes["out_dim"])
    make, rows = (niso_nets.SkipMLP, convert.skip_mlp) if name.startswith("skip") else (niso_nets.MLP, convert.mlp)
    first = not sizes["skip_init_act"]
    check_part(name, make(*args, first_activation=first), rows("", "", *args, first))


def test_poses():
    case = Case("se3_lift")
    rep = case.inputs["rep"].requires_grad_()
    pose = lift_se3(rep)
    case.check("out/lift", pose)
    (pose * case.inputs["weight"]).sum().backward()
    case.check("grad/rep", rep.grad)
    pose = case.outputs["lift"].clone().requires_grad_()
    inverse = inverse_se3(pose)
    case.check("out/inverse", inverse)
    (inverse * case.inputs["weight_inv"]).sum().backward()
    case.check("grad/pose", pose.grad)


def test_degenerate_poses():
    case = Case("se3_lift_degenerate")
    case.check("out/lift", lift_se3(case.inputs["rep"]))


# ---- losses


@pytest.mark.parametrize("name", ["loss_l1", "loss_orientation", "loss_procrustes"])
def test_losses(name):
    case = Case(name)
    a, b = (case.inputs[x].requires_grad_() for x in "ab")
    if name == "loss_procrustes":
        loss, scaled = niso_loss.scale_procrustes(a, b, negative_scale=True)
        case.check("out/scaled_b", scaled)
    else:
        loss = {"loss_l1": niso_loss.l1, "loss_orientation": niso_loss.orientation_loss}[name](a, b)
    case.check("out/loss", loss)
    loss.backward()
    case.check("grad/a", a.grad)
    case.check("grad/b", b.grad)


@pytest.mark.parametrize("name", ["spread", "unsorted", "repeated", "single_cluster", "batched"])
def test_multiplicity(name):
    case = Case("loss_multiplicity")
    eigenvalues = case.inputs[name].requires_grad_()
    mask = niso.eigenvalue_mask(eigenvalues)
    if name != "batched":
        case.check(f"out/delta_mask_{name}", mask)
    loss = niso_loss.multiplicity_loss(mask)
    case.check(f"out/{name}", loss)
    loss.backward()
    case.check(f"grad/{name}", eigenvalues.grad)


# ---- experiments


def load(case, **overrides):
    return convert.load_tree(case.tree(), {"clustered": case.spec["clustered_init"], **overrides}, case.spec["case"])


def laplacian(case):
    sizes = case.model
    return load(case, image_size=(sizes["H"], sizes["W"]), channels=sizes["C"])


def check_operator(case, related):
    found = {"tauOmega": related.tau, "Phi": related.basis.functions}
    for key, x in {**found, "Lambda": related.basis.eigenvalues, "M": related.basis.mass}.items():
        case.check(f"out/{key}", x)


@pytest.mark.parametrize("name", names("laplacian_loss"))
def test_laplacian(name):
    case = Case(name)
    model = laplacian(case)
    x, moved = case.inputs["x"], case.inputs["Tx"]
    related = model(x, moved)
    check_operator(case, related)
    case.check("out/x_p", related.recon_a)
    case.check("out/Tx_p", related.recon_b)
    parts = niso_loss.laplacian_loss(related, x, moved, beta=case.model["beta"])
    for key, part in parts.items():
        case.check("out/loss" if key == "loss" else f"out/loss_{key}", part)
    parts["loss"].backward()
    case.check_gradients(model, convert.table(model.config))


@pytest.mark.parametrize("optimizer, dtype", [("adam", torch.float32), ("upstream_adamw", torch.float64)])
def test_laplacian_training(optimizer, dtype):
    """Five steps; the original's AdamW decays the mass and the eigenvalues too.

    That one in fp64: where a gradient is nearly zero, Adam makes a step of the rounding of LAPACK's SVD in fp32.
    """
    case = Case("laplacian_trajectory")
    model, spec = laplacian(case).to(dtype), case.spec[optimizer]
    if optimizer == "adam":
        rates = [spec["lr"]] * 5
        adam = torch.optim.Adam(model.parameters(), betas=(spec["b1"], spec["b2"]), eps=spec["eps"])
    else:
        schedule = (spec["NUM_TRAIN_STEPS"], spec["WARMUP_STEPS"], spec["LR"], spec["END_LR"], spec["INIT_LR"])
        rates = [learning_rate(step, *schedule) for step in range(5)]
        case.check("out/lr_upstream_adamw", torch.tensor(rates))
        groups = niso_loss.parameter_groups(model, spec["weight_decay"], decay_basis=True)
        adam = torch.optim.AdamW(groups, betas=(spec["ADAM_B1"], spec["ADAM_B2"]), eps=spec["eps"])
    losses = []
    for step, rate in enumerate(rates):
        for group in adam.param_groups:
            group["lr"] = rate
        adam.zero_grad()
        x, moved = (case.inputs[f"{name}/{step}"].to(dtype) for name in ("x", "Tx"))
        parts = niso_loss.laplacian_loss(model(x, moved), x, moved, beta=case.model["beta"])
        parts["loss"].backward()
        adam.step()
        losses.append(torch.stack([parts[key] for key in case.spec["loss_columns"]]))
    case.check(f"out/loss_{optimizer}", torch.stack(losses))
    case.check_tree(f"out/final_{optimizer}/", convert.table(model.config), model.state_dict())


@pytest.mark.parametrize("name", names("hmnist_encode") + names("cshrec11_encode") + names("pose_encode"))
def test_encode(name):
    case = Case(name)
    sizes = case.model
    model = load(case, image_size=(sizes["H"], sizes["W"]))
    a, b = case.inputs["x"][0::2], case.inputs["x"][1::2]
    related = model(a, b)
    check_operator(case, related)
    plain = [model.operator.unproject(x, related.basis) for x in (related.coefficients_a, related.coefficients_b)]
    taken = [related.tau.mT @ related.coefficients_b, related.tau @ related.coefficients_a]
    fields = [*plain, *(model.operator.unproject(x, related.basis) for x in taken)]
    case.check("out/z", torch.stack(fields, 1).flatten(0, 1).unflatten(1, model.config.grid))
    recon = [*(model.decode(x) for x in plain), related.recon_a, related.recon_b]
    case.check("out/x_out", torch.stack(recon, 1))
    parts = niso_loss.encode_loss(related, a, b, alpha=sizes["alpha"], beta=sizes["beta"])
    for key, part in parts.items():
        case.check("out/loss" if key == "loss" else f"out/loss_{key}", part)
    parts["loss"].backward()
    case.check_gradients(model, convert.table(model.config))


@pytest.mark.parametrize("name", ["hmnist_pred_loss", "cshrec11_pred_loss"])
def test_classifier(name):
    case = Case(name)
    model = load(case, image_size=(case.model["H"], case.model["W"]))
    assert model.config.head_layers == case.model["layers"]
    parts = niso_loss.classification_loss(model(case.inputs["x"]), case.inputs["labels"].long())
    for key, part in parts.items():
        if key == "acc":
            assert part == case.outputs["acc"]
        else:
            case.check(f"out/{key}", part)
    parts["loss"].backward()
    case.check_gradients(model, convert.table(model.config))


def test_pose():
    case = Case("pose_pred_loss")
    sizes = case.model
    model = load(case, image_size=(sizes["H"], sizes["W"]))
    assert model.config.head_layers == sizes["layers"]
    poses = model(case.inputs["x"].unflatten(0, (sizes["B"], sizes["seq_len"])))
    case.check("out/relative_poses_first", poses[0])
    parts = niso_loss.pose_loss(poses, case.inputs["g"], negative_scale=model.config.negative_scale)
    for key, part in parts.items():
        case.check("out/loss" if key == "loss" else f"out/loss_{key}", part)
    parts["loss"].backward()
    case.check_gradients(model, convert.table(model.config))
