"""Neural Isometries: what its parts compute, from their definitions, and misuse."""

import json
import math

import pytest
import torch
from torch import nn

from fourdperf.models import niso, niso_nets
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.niso import Autoencoder, Classifier, Config, IsometricOperator, PosePredictor
from fourdperf.train import niso_loss
from tests.models.niso_cases import ENCODER, LIVE, build, inputs, loss, targets
from tests.models.scaling4d_cases import TOLERANCE, difference

SMALL = {"image_size": (4, 6), "channels": 5, "op_dim": 8}


def operator(clustered=False, spatial=24, op_dim=8, seed=0, **options):
    torch.manual_seed(seed)
    made = IsometricOperator(op_dim, spatial, clustered=clustered, **options).double()
    with torch.no_grad():
        made.M.uniform_(0.5, 1.5)
        made.Phi.normal_()
    return made


def rotation(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * torch.cat([torch.linalg.det(q)[None], torch.ones(size - 1)])


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- config


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"kind": "svm"}, "kind: expected one of autoencoder, classifier, pose, got 'svm'"),
        ({"procrustes_gradient": "none"}, "procrustes_gradient: expected one of exact, regularized"),
        ({"op_dim": 25}, r"op_dim: expected at most 24, the points of the grid \(4, 6\), got 25"),
        ({"op_dim": 0}, "op_dim: expected a positive integer"),
        ({"image_size": (4, 4, 4)}, "image_size: expected 2 positive integers"),
        ({"encoder_channels": (4, 4), "encoder_depth": (1,)}, "encoder_depth: expected 2 positive integers"),
        ({"encoder_channels": (4,), "encoder_depth": (0,)}, "encoder_depth: expected a positive integer"),
        ({**ENCODER, "decoder_channels": (4,)}, "decoder_channels: expected 2 positive integers"),
        ({**ENCODER, "image_size": (12, 21)}, r"image_size: expected multiples of 2, got \(12, 21\)"),
        ({**ENCODER, "image_size": 1, "kind": "pose"}, "image_size: expected at least 2 pixels each way"),
        ({"clustered": 1}, "clustered: expected True or False, got 1"),
        ({"kind": "pose", "head_layers": 1}, "head_layers: expected at least 2 for poses"),
        ({"head_input": "flow"}, "head_input: expected one of tau, motion, got 'flow'"),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        Config(**{**SMALL, **overrides})


def test_config_round_trip():
    config = Config.upstream(**ENCODER)
    assert config.grid == (6, 10) and config.spatial == 60 and config.decoder_channels == (9, 6)
    assert config.biases and config.upstream_modules and config.train_basis and config.negative_scale
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Config(**SMALL, latent_channels=9).latent_channels == 5
    with pytest.raises(ValueError, match="no_such: no such option"):
        Config.from_dict({"no_such": 1})


# ---- the operator


@pytest.mark.parametrize("clustered", [False, True])
def test_basis(clustered):
    """Orthonormal in the mass; the functions follow their eigenvalues, which ascend."""
    made = operator(clustered)
    basis = made.basis()
    gram = basis.functions.T @ (basis.mass[:, None] * basis.functions)
    assert (gram - torch.eye(8)).abs().max() < 1e-12
    assert torch.equal(basis.mass, made.M.square() + 1e-8) and (basis.eigenvalues.diff() >= 0).all()
    want = made.Lambda.square()
    assert torch.equal(basis.eigenvalues, want.sort().values if clustered else want.cumsum(0))
    assert not clustered or not torch.equal(basis.eigenvalues, want)
    gap = (basis.eigenvalues[2] - basis.eigenvalues[5]).abs()
    assert (basis.mask[2, 5] - torch.exp(-gap)).abs() < 1e-15 and torch.equal(basis.mask, basis.mask.T)
    if clustered:
        with torch.no_grad():
            order = made.Lambda.square().argsort()
            made.Lambda.copy_(made.Lambda[order])
            made.Phi.copy_(made.Phi[:, order])
        assert (made.basis().functions - basis.functions).abs().max() < 1e-12


def test_projection():
    """Onto the span: what is in it stays, and coefficients keep the mass's inner product."""
    made = operator()
    basis, x = made.basis(), random(3, 24, 5)
    coefficients = made.project(x, basis)
    again = made.unproject(coefficients, basis)
    assert coefficients.shape == (3, 8, 5)
    assert (made.project(again, basis) - coefficients).abs().max() < 1e-12
    inner = (again.mT * basis.mass) @ again
    assert (inner - coefficients.mT @ coefficients).abs().max() < 1e-12


def test_a_rotation_is_recovered():
    """With one eigenspace the mask lets all rotations through; with eigenvalues apart, almost the identity alone."""
    made, turn = operator(clustered=True), rotation(8)
    with torch.no_grad():
        made.Lambda.fill_(1.0)
    basis = made.basis()
    a = made.unproject(random(2, 8, 30), basis)
    b = made.unproject(turn @ made.project(a, basis), basis)
    tau = made.isometry(a, b, basis)
    assert (tau - turn).abs().max() < 1e-10
    assert (tau @ made.project(a, basis) - made.project(b, basis)).abs().max() < 1e-9
    with torch.no_grad():
        made.Lambda.copy_(torch.arange(8) + 5)
    basis = made.basis()
    tau = made.isometry(a, b, basis)
    off = tau - torch.diag_embed(tau.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-2 and (torch.linalg.det(tau) - 1).abs().max() < 1e-10


def test_eigenspaces_are_kept():
    """Two clusters far apart: tau does not mix them."""
    made = operator(clustered=True)
    with torch.no_grad():
        made.Lambda.copy_(torch.tensor([1.0] * 3 + [6.0] * 5))
    basis = made.basis()
    tau = made.isometry(random(2, 24, 30), random(2, 24, 30, seed=2), basis)
    assert tau[:, :3, 3:].abs().max() < 1e-10 and tau[:, 3:, :3].abs().max() < 1e-10
    assert (tau.mT @ tau - torch.eye(8)).abs().max() < 1e-12


def test_motion():
    """A field that moves as a whole moves every window as far; tau back in time is the opposite."""
    grid = (16, 20)
    made = IsometricOperator(320, 320).double()
    basis = made.basis()
    shift = torch.einsum("ij,kl->ikjl", torch.eye(16).roll(1, 0), torch.eye(20).roll(-1, 0)).reshape(320, 320).double()
    tau = basis.functions.T @ shift @ basis.functions
    motion = made.motion(tau[None], basis, grid)
    assert motion.shape == (1, 2, 36)
    inner = motion.unflatten(-1, (6, 6))[0, :, 2:4, 2:4]  # others see the field come back on the other side
    d = torch.tensor([6 / 16, -6 / 20]).double()
    wanted = (d * (-d.square().sum() / (4 * niso.WINDOW_WIDTH**2)).exp())[:, None, None]  # of Gaussians, in closed form
    assert ((inner - wanted).abs() < 0.01 * wanted.abs()).all()
    assert (made.motion(tau.T, basis, grid) + motion[0]).abs().max() < 1e-12
    assert made.motion(torch.eye(320).double(), basis, grid).abs().max() == 0
    windows, offsets = niso.gaussian_windows(grid, basis.functions)
    assert windows.shape == (320, 36) and offsets.shape == (2, 320, 36)
    assert windows.argmax(0)[[0, -1]].tolist() == [1 * 20 + 1, 14 * 20 + 18]
    assert offsets.sum(1)[:, [0, -1]].sign().tolist() == [[1, -1], [1, -1]]  # cut off outside of the grid


@pytest.mark.parametrize("clustered", [False, True])
def test_gradcheck(clustered):
    made = operator(clustered, spatial=6, op_dim=4)
    a, b = random(1, 6, 9).requires_grad_(), random(1, 6, 9, seed=2).requires_grad_()
    parameters = [p.detach().clone().requires_grad_() for p in (made.M, made.Phi, made.Lambda)]

    def tau(a, b, M, Phi, Lambda):
        state = {"M": M, "Phi": Phi, "Lambda": Lambda}
        return torch.func.functional_call(Isometry(made), {f"made.{k}": x for k, x in state.items()}, (a, b))

    assert torch.autograd.gradcheck(tau, (a, b, *parameters))


class Isometry(nn.Module):
    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, a, b):
        return self.made.isometry(a, b, self.made.basis())


def test_start():
    """Orthonormal functions have a useful gradient with the exact rule; the regularized one is zero there."""
    made = IsometricOperator(6, 20, clustered=True)
    assert torch.equal(made.M, torch.ones(20)) and (made.Phi.T @ made.Phi - torch.eye(6)).abs().max() < 1e-5
    assert 0 <= made.Lambda.min() and made.Lambda.max() <= 1
    other = IsometricOperator(6, 20, gradient="regularized")
    assert (other.Phi.T @ other.Phi - torch.eye(6)).abs().max() > 1
    weight = torch.randn(20, 6)
    (made.basis().functions * weight).sum().backward()
    assert made.Phi.grad.isfinite().all() and made.Phi.grad.abs().max() > 0.1


# ---- values that make no sense


def test_operator_errors():
    made = operator()
    basis, x = made.basis(), random(2, 24, 5)
    nan, zero = x.clone(), x.clone()
    nan[1, 3, 2] = math.nan
    zero[1] = 0
    for call, message in (
        (lambda: IsometricOperator(25, 24), "op_dim: expected at most spatial, 24, got 25"),
        (lambda: IsometricOperator(5, 24, gradient="none"), "gradient: expected one of exact, regularized"),
        (lambda: made.project(x[:, 1:], basis), r"x: expected fields \(B, 24, C\), got \(2, 23, 5\)"),
        (lambda: made.unproject(x, basis), r"coefficients: expected \(B, 8, C\), got \(2, 24, 5\)"),
        (lambda: made.isometry(x, x[:1], basis), "a and b: expected one shape"),
        (lambda: made.isometry(nan, x, basis), "a: expected finite numbers, got NaN or infinity"),
        (lambda: made.isometry(x, nan, basis), "b: expected finite numbers, got NaN or infinity"),
        (lambda: made.isometry(zero, x, basis), "a: expected fields that are not zero, got one at sample 1"),
        (lambda: made.isometry(x, zero, basis), "b: expected fields that are not zero, got one at sample 1"),
        (lambda: made.isometry(x * 1e-200, x * 1e-200, basis), "a and b: expected products of their coefficients"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for name, value, message in (
        ("M", 0.0, "M: expected a mass at every point, got zero at point 2"),
        ("M", math.nan, "M: expected finite numbers, got nan"),
        ("Phi", math.inf, "Phi: expected finite numbers, got inf"),
        ("Lambda", math.nan, "Lambda: expected finite numbers, got nan"),
    ):
        made = operator()
        with torch.no_grad():
            getattr(made, name)[2] = value
        with pytest.raises(ValueError, match=message):
            made.basis()


def test_model_errors():
    model = build("autoencoder")
    a, b = inputs(model)
    nan, (video,) = a.clone(), inputs(build("pose"))
    nan[0, 0, 0, 0] = video[1, 2, 3, 4, 0] = math.nan
    for call, message in (
        (lambda: model(a, b[:1]), "a and b: expected one shape"),
        (lambda: model(a[:, 1:], b[:, 1:]), r"a: expected a tensor \(B, 12, 20, 3\), got"),
        (lambda: model(nan, b), "a: expected finite numbers, got NaN or infinity"),
        (lambda: model(a, nan), "b: expected finite numbers, got NaN or infinity"),
        (lambda: build("pose")(video), "video: expected finite numbers, got NaN or infinity"),
        (lambda: model.encode((a * 9).byte()), "x: expected a floating point dtype"),
        (lambda: build("pose")(a), r"video: expected \(B, T >= 2, H, W, C\), got \(3, 12, 20, 3\)"),
        (lambda: Classifier(model.config), "config: expected kind 'classifier' for Classifier, got 'autoencoder'"),
        (lambda: niso.lift_se3(a), r"x: expected nine numbers \(.., 9\)"),
        (lambda: niso.inverse_se3(a), r"pose: expected \(.., 4, 4\)"),
        (lambda: niso_nets.SkipMLP(3, 4, 1, 5), "num_layers: expected at least 2"),
        (lambda: niso_loss.l1(a, b[:1]), "a and b: expected one shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- nets


def test_instance_norm():
    norm = niso_nets.InstanceNorm(3).double()
    x = random(2, 5, 7, 3)
    y = norm(4 * x + 3)
    assert y.mean((1, 2)).abs().max() < 1e-12 and (y.std((1, 2), unbiased=False) - 1).abs().max() < 1e-6
    assert not norm(torch.ones(1, 1, 1, 3).double()).any()


def test_biases_do_nothing():
    """What the original's nets have more than ours: constants in space that the last norm removes."""
    name = "autoencoder, upstream"
    model = build(name)
    given = inputs(model)
    want = model(*given)
    with torch.no_grad():
        for key, x in model.named_parameters():
            if ("conv_" in key or "skip" in key) and key.endswith("bias"):
                x.add_(1)
    assert difference(model(*given).recon_b, want.recon_b) < 1e-4
    assert not any("conv_in.bias" in key or "skip.bias" in key for key in build("autoencoder").state_dict())


def test_odd_sizes():
    """Pixels that do not fill a mean are dropped, as the golden of three levels has it; a decoder doubles."""
    encoder = niso_nets.ConvEncoder(3, (4, 5, 6), (1, 1, 1), 7)
    decoder = niso_nets.ConvDecoder(7, (6, 5, 4), (1, 1, 1), 3)
    fields = encoder(torch.randn(2, 11, 14, 3))
    assert fields.shape == (2, 2, 3, 7) and decoder(fields).shape == (2, 8, 12, 3)


@pytest.mark.parametrize("upstream_modules", [False, True])
def test_equivariance(upstream_modules):
    """Rotated vectors give rotated vectors, and at the end the same numbers."""
    torch.manual_seed(0)
    net = niso_nets.OrthogonalNet(6, 5, 4, 3, 7, upstream_modules=upstream_modules).double()
    x, turn = random(2, 9, 6), rotation(9)
    mlp = net.mlp_in
    assert (mlp(turn @ x) - turn @ mlp(x)).abs().max() < 1e-12
    assert (net(turn @ x) - net(x)).abs().max() < 1e-10
    assert (net(2 * x) - net(x)).abs().max() > 1e-4


def test_all_modules_run():
    """Ours are pairs; the original's, for the same number of layers, about half of them."""
    pairs = lambda n, half: [type(x).__name__ for x in niso_nets.OrthogonalMLP(3, 4, n, upstream_modules=half).layers]
    assert pairs(2, False) == ["OrthogonalNorm", "OrthogonalNeuron"] * 2
    assert pairs(3, True) == ["OrthogonalNorm", "OrthogonalNeuron", "OrthogonalNorm"]
    net = niso_nets.OrthogonalNet(3, 4, 5, 2, 6)
    assert len(net.mlp_in.layers) == 6 and len(net.mlp_out.layers) == 4


def test_neuron():
    """From the definition: the part of q along k goes through SiLU's gate."""
    torch.manual_seed(0)
    neuron = niso_nets.OrthogonalNeuron(4, 1).double()
    x = random(1, 6, 4)
    q, k = (x @ w.weight.T for w in (neuron.query, neuron.key))
    q, k = q.flatten(), k.flatten()
    along = (q @ k) / (k @ k) * k
    want = q - along + torch.sigmoid(q @ k) * along
    assert (neuron(x).flatten() - want).abs().max() < 1e-8
    assert neuron(torch.zeros(1, 6, 4).double()).eq(0).all()


def test_poses():
    """A rotation and its inverse, whatever the nine numbers."""
    pose = niso.lift_se3(random(5, 9))
    eye = torch.eye(4).double()
    assert (pose[:, :3, :3] @ pose[:, :3, :3].mT - torch.eye(3)).abs().max() < 1e-12
    assert (torch.linalg.det(pose) - 1).abs().max() < 1e-12
    assert (pose @ niso.inverse_se3(pose) - eye).abs().max() < 1e-12
    assert niso.lift_se3(torch.zeros(2, 9)).isfinite().all()


# ---- losses


def test_multiplicity_counts_clusters():
    """Zero where all eigenvalues are far apart, largest where all are one."""
    value = lambda *x: niso_loss.multiplicity_loss(niso.eigenvalue_mask(torch.tensor(x)))
    assert value(0.0, 50.0, 100.0, 150.0) < 1e-4
    assert value(0.0, 1.0, 2.0) < value(0.0, 0.1, 0.2) < value(1.0, 1.0, 1.0)
    assert abs(value(1.0, 1.0, 1.0).item() - 18**0.5 / 3) < 1e-6  # 3 on the diagonal less 1 everywhere


def test_contrast_wants_invariants_that_tell_things_apart():
    """Small where b's are rotations of a's, large where they are another's or all Gram matrices are one."""
    a = random(6, 9, 4)
    turned = torch.linalg.qr(random(6, 9, 9)).Q @ a
    right, wrong = niso_loss.contrast_loss(a, turned), niso_loss.contrast_loss(a, turned.roll(1, 0))
    assert right < 0.1 and wrong > 5
    assert niso_loss.contrast_loss(3 * a, turned).item() == pytest.approx(right.item())
    same = torch.linalg.qr(a).Q.requires_grad_()
    chance = niso_loss.contrast_loss(same, same)
    assert chance.item() > math.log(11) - 0.1
    (gradient,) = torch.autograd.grad(chance, same)
    assert gradient.isfinite().all()


def test_pose_loss_does_not_see_the_scale():
    poses = niso.lift_se3(random(2, 4, 9))
    relative = niso.inverse_se3(poses[:, :-1]) @ poses[:, 1:]
    scaled = relative.clone()
    scaled[..., :3, 3] *= torch.tensor([3.0, 0.2])[:, None, None]
    parts = niso_loss.pose_loss(scaled, poses)
    assert all(abs(x) < 1e-12 for x in parts.values())
    scaled[..., :3, :3] = torch.eye(3)
    assert niso_loss.pose_loss(scaled, poses)["rotation"] > 0.1
    still = relative.clone()
    still[..., :3, 3] = 0
    assert niso_loss.pose_loss(still, poses)["loss"].isfinite()


def test_the_scale_never_makes_positions_shorter():
    """The gradient of each sequence's positions is across them: the smaller they are, the larger it is."""
    a, b = random(3, 4, 3), random(3, 4, 3, seed=2).requires_grad_()
    found, scaled = niso_loss.scale_procrustes(a, b)
    assert (scaled.flatten(1).norm(dim=1) - a.flatten(1).norm(dim=1)).abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(found, b)
    assert gradient.abs().amax((1, 2)).min() > 1e-3 and (gradient * b).sum((1, 2)).abs().max() < 1e-12
    still, _ = niso_loss.scale_procrustes(torch.zeros_like(a), b)
    assert torch.autograd.grad(still, b)[0].isfinite().all()


@pytest.mark.parametrize("negative_scale", [False, True])
def test_pose_loss_sees_which_way_the_camera_moves(negative_scale):
    """By default the opposite direction costs twice the positions' size and can be left; the original takes it."""
    poses = niso.lift_se3(random(2, 4, 9))
    back = niso.inverse_se3(poses[:, :-1]) @ poses[:, 1:]
    size = back[..., :3, 3].abs().mean().item()
    back[..., :3, 3] *= -3
    back.requires_grad_()
    found = niso_loss.pose_loss(back, poses, negative_scale=negative_scale)["position"]
    assert found.item() == pytest.approx(0 if negative_scale else 2 * size, abs=1e-12)
    (gradient,) = torch.autograd.grad(found, back)
    assert negative_scale or gradient[..., :3, 3].all()


def test_what_decays():
    model = build("autoencoder")
    decayed, kept = niso_loss.parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0
    assert {id(p) for p in kept["params"]} == {id(model.operator.M), id(model.operator.Lambda)}
    assert len(decayed["params"]) + 2 == len(list(model.parameters()))
    (everything,) = niso_loss.parameter_groups(model, 0.1, decay_basis=True)
    assert len(everything["params"]) == len(list(model.parameters()))
    frozen = niso_loss.parameter_groups(build("pose"), 0.1)
    assert len(frozen) == 1 and all(p.requires_grad for p in frozen[0]["params"])


# ---- models


@pytest.mark.parametrize("cls, trained", [(Classifier, False), (Classifier, True), (PosePredictor, False)])
def test_on_a_frozen_backbone(cls, trained):
    """Copies it; what is frozen gets no gradient, and the gradient of the rest does not reach it."""
    backbone = build("autoencoder")
    model = cls.on(backbone, head_features=6, num_classes=4, train_basis=trained)
    assert model.config.kind == cls.kind and model.config.head_features == 6
    for key, x in model.state_dict().items():
        assert key.startswith("head.") or torch.equal(x, backbone.state_dict()[key])
    given = inputs(build("pose"), 2)[0].new_empty(2, 3, 12, 20, 3).normal_()
    model(given if cls is PosePredictor else given[:, 0]).square().sum().backward()
    moved = {key.split(".")[0] for key, x in model.named_parameters() if x.grad is not None}
    assert moved == ({"head", "operator"} if trained else {"head"})
    assert all(x.grad is not None for x in model.parameters() if x.requires_grad)
    assert backbone.operator.M.data_ptr() != model.operator.M.data_ptr()


def test_backwards_is_the_opposite_motion():
    """By default a head sees motion: of the video run backwards, poses differ from standing still by the opposite."""
    model = PosePredictor.on(build("autoencoder"), head_features=6).double()
    assert model.config.head_input == "motion" and Config(**SMALL).head_input == "tau"
    video, taps, back = random(2, 3, 12, 20, 3), {}, {}
    model(video, taps)
    model(video.flip(1), back)
    still = torch.tensor(niso.STILL).double()
    assert (taps["pose"] - still).abs().max() > 1e-3
    assert difference(back["pose"].flip(1) - still, still - taps["pose"]) <= 1e-6
    assert torch.equal(niso.lift_se3(still), torch.eye(4).double())


def test_tau_between_frames():
    """A predictor sees frames in their order: each pair alone gives the same."""
    model = build("pose")
    (video,) = inputs(model)
    whole = model(video)
    assert whole.shape == (3, 3, 4, 4)
    for t in range(3):
        assert difference(model(video[:, t : t + 2])[:, 0], whole[:, t]) <= 1e-4


def test_shifts_are_learnt():
    """A few steps on shifted noise: the loss falls by a quarter, with nothing but the operator."""
    torch.manual_seed(0)
    model = Autoencoder(Config(image_size=4, channels=48, op_dim=16, clustered=True))
    adam = torch.optim.Adam(model.parameters(), 5e-2)
    losses = []
    for _ in range(40):
        x = torch.randn(8, 4, 4, 48)
        moved = x.roll((1, 2), (1, 2))
        parts = niso_loss.laplacian_loss(model(x, moved), x, moved, beta=0.1)
        adam.zero_grad()
        parts["loss"].backward()
        adam.step()
        losses.append(parts["loss"].item())
    assert losses[-1] < 3 / 4 * losses[0]


# ---- how it runs


@pytest.mark.parametrize("name", LIVE)
def test_compile(name):
    """One graph, the same numbers and gradients."""
    torch.compiler.reset()
    model = build(name)
    given, wanted = inputs(model), targets(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        value = loss(run(*given), model, niso_loss, wanted)["loss"]
        value.backward()
        grads.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    largest = max(x.abs().max() for x in grads[0][1:])
    assert difference(grads[1][0], grads[0][0]) <= TOLERANCE
    assert all((a - b).abs().max() <= 1e-4 * largest for a, b in zip(*(x[1:] for x in grads), strict=True))


@pytest.mark.parametrize("name", ["operator alone", "autoencoder", "classifier", "pose"])
def test_autocast(name):
    """bf16 nets near those of fp32; the operator computes in fp32, and gradients arrive."""
    model = build(name)
    given, wanted = inputs(model), targets(model)
    want = loss(model(*given), model, niso_loss, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(*given)
        got = loss(found, model, niso_loss, wanted)
    assert got["loss"].dtype == torch.float32
    assert abs(got["loss"] - want["loss"]) < 0.05 * want["loss"].abs()
    if model.config.kind == "autoencoder":
        assert found.tau.dtype == torch.float32 and found.coefficients_a.dtype == torch.float32
        eye = torch.eye(model.config.op_dim)
        assert (found.tau.mT @ found.tau - eye).abs().max() < 1e-5
    got["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["operator alone", "autoencoder", "classifier", "pose"])
def test_other_dtypes(name):
    """fp64 agrees with fp32; a half model is near it."""
    model = build(name)
    given, wanted = inputs(model), targets(model)
    want = loss(model(*given), model, niso_loss, wanted)["loss"]
    double = loss(build(name).double()(*(x.double() for x in given)), model, niso_loss, wanted)["loss"]
    assert double.dtype == torch.float64 and difference(want, double) <= TOLERANCE
    half = loss(build(name).bfloat16()(*given), model, niso_loss, wanted)["loss"]
    assert half.dtype == torch.float32 and abs(half - want) < 0.1 * want.abs()


@pytest.mark.parametrize("name", LIVE)
def test_save_and_load(tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    frozen = lambda m: [key for key, p in m.named_parameters() if not p.requires_grad]
    assert frozen(again) == frozen(model)


def test_load_errors(tmp_path):
    model = build("autoencoder")
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert Autoencoder.from_pretrained(tmp_path).operator.M.dtype == torch.float32
    with pytest.raises(CheckpointError, match="expected kind 'classifier' for Classifier, got 'autoencoder'"):
        Classifier.from_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"op_dim": 61}))
    with pytest.raises(CheckpointError, match="op_dim: expected at most 60"):
        Autoencoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields | {"biases": True}))
    with pytest.raises(CheckpointError, match="missing encoder.levels.0.0.conv_in.bias"):
        Autoencoder.from_pretrained(tmp_path)
