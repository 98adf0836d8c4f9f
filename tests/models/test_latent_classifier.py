"""Classifiers of latent maps: the seed's numbers, torch against Flax layer by layer, training, misuse."""

import pytest
import torch
import torch.nn.functional as F

from fourdperf.convert.flax_tree import flat
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.latent_classifier import Config, LatentClassifier
from tests.models.latent_classifier_cases import FORWARD, LIVE, SIZES, TRAJECTORY, Case, build, in_flax, latents
from tests.models.scaling4d_cases import TOLERANCE, difference

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
flax_classifier = pytest.importorskip("fourdperf.jax.models.latent_classifier")


def to_flax(model):
    return flax_classifier.LatentClassifier(model.config), {
        "params": flax_classifier.flax_params(model.state_dict(), model.config)
    }


# The seed's numbers


@pytest.mark.parametrize("name", FORWARD)
def test_logits_and_gradients_of_the_seed(name):
    case = Case(name)
    model = case.model()
    logits = model(case.input("x"))
    case.check("out/logits", logits)
    (logits * case.input("weight")).sum().backward()
    grads = in_flax(model.config, {key: x.grad for key, x in model.named_parameters()})
    assert {f"params/{key}" for key in grads} == {key for key in case.grads if key.startswith("params/")}
    for key, grad in grads.items():
        case.check(f"grad/params/{key}", grad)


@pytest.mark.parametrize("name", FORWARD)
def test_the_seeds_numbers_in_flax(name):
    case = Case(name)
    model, variables = to_flax(case.model())
    x, weight = case.inputs["x"], case.inputs["weight"]

    def loss(variables):
        logits = model.apply(variables, x)
        return (logits * weight).sum(), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(variables)
    case.check("out/logits", logits)
    for key, grad in flat(grads["params"]).items():
        case.check(f"grad/params/{key}", grad)


def seed_optimizer(case, batch):
    """The seed divides the gradient of the mean loss by the batch size once more."""
    adamw = optax.adamw(case.config["lr"], weight_decay=case.config["train"]["weight_decay"])
    return optax.chain(optax.scale(1 / batch), adamw)


def test_the_seeds_training_in_flax():
    case = Case(TRAJECTORY)
    model, variables = to_flax(case.model())
    train, x, labels = case.config["train"], case.inputs["x"], case.inputs["labels"]
    optimizer = seed_optimizer(case, len(x))
    state = flax_classifier.State(variables["params"], variables["params"], optimizer.init(variables["params"]))

    @jax.jit
    def step(state):
        smoothing, decay = train["label_smoothing_factor"], train["exp_mov_avg_beta"]
        return flax_classifier.train_step(model, optimizer, state, x, labels, smoothing=smoothing, decay=decay)

    losses = []
    for _ in range(case.config["steps"]):
        state, loss = step(state)
        losses.append(loss)
    case.check("out/loss", jnp.stack(losses))
    for name, tree in (("final", state.params), ("ema", state.average)):
        for key, x in flat(tree).items():
            case.check(f"out/{name}/{key}", x)


def test_the_seeds_training_in_torch():
    case = Case(TRAJECTORY)
    model, train = case.model(), case.config["train"]
    x, labels = case.input("x"), case.input("labels").long()
    optimizer = torch.optim.AdamW(model.parameters(), case.config["lr"], weight_decay=train["weight_decay"])
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(train["exp_mov_avg_beta"])
    )
    average.update_parameters(model)  # the first one copies
    losses = []
    for _ in range(case.config["steps"]):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels, label_smoothing=train["label_smoothing_factor"])
        (loss / len(x)).backward()
        optimizer.step()
        average.update_parameters(model)
        losses.append(loss.detach())
    case.check("out/loss", torch.stack(losses))
    for name, states in (("final", model), ("ema", average.module)):
        for key, x in in_flax(model.config, states.state_dict()).items():
            case.check(f"out/{name}/{key}", x)


# Torch against Flax


@pytest.mark.parametrize("name", LIVE)
def test_torch_matches_flax_layer_by_layer(name):
    model = build(name)
    x, ours = latents(model), {}
    logits = model(x, ours)
    flax_model, variables = to_flax(model)

    @jax.jit
    def apply(variables, x):
        taps = {}
        return flax_model.apply(variables, x, taps), taps

    reference, theirs = apply(variables, x.numpy())
    depth = range(model.config.num_layers)
    expected = {
        "mlp": [f"layers/{i:02d}" for i in depth],
        "transformer": ["tokens", *(f"blocks/{i:02d}" for i in depth), "norm"],
        "resnet": ["stem", *(f"blocks/{i:02d}" for i in depth), "norm"],
    }[model.config.kind]
    assert set(ours) == set(theirs) and list(ours) == [*expected, "logits"]
    for tap in ours:
        assert difference(ours[tap], theirs[tap]) <= TOLERANCE, tap
    assert logits.shape == reference.shape == (4, 7) and torch.equal(logits, ours["logits"])


@pytest.mark.parametrize("name", LIVE)
def test_gradients_match_flax(name):
    model = build(name)
    x = latents(model).requires_grad_()
    weight = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))
    (model(x) * weight).sum().backward()
    flax_model, variables = to_flax(model)
    loss = lambda variables, x: (flax_model.apply(variables, x) * weight.numpy()).sum()
    grads, grad_x = jax.jit(jax.grad(loss, (0, 1)))(variables, x.detach().numpy())
    assert difference(x.grad, grad_x) <= TOLERANCE
    ours = in_flax(model.config, {key: p.grad for key, p in model.named_parameters()})
    largest = max(abs(x).max() for x in ours.values())
    for key, grad in flat(grads["params"]).items():
        assert abs(ours[key] - grad).max() <= TOLERANCE * largest, key


@pytest.mark.parametrize("name", LIVE)
def test_flax_initialises_the_same_parameters(name):
    model = build(name)
    flax_model, variables = to_flax(model)
    shapes = jax.eval_shape(lambda key: flax_model.init(key, latents(model).numpy()), jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)


def test_flax_reads_what_torch_saves(tmp_path):
    model = build("resnet")
    model.save_pretrained(tmp_path)
    flax_model, variables = flax_classifier.from_pretrained(tmp_path)
    x = latents(model)
    assert flax_model.config == model.config
    assert difference(model(x), flax_model.apply(variables, x.numpy())) <= TOLERANCE
    (tmp_path / "config.json").write_text('{"model": "latent_classifier", "kind": "svm"}')
    with pytest.raises(CheckpointError, match="kind: expected one of mlp, transformer, resnet, got 'svm'"):
        flax_classifier.from_pretrained(tmp_path)


# Ours


@pytest.mark.parametrize("kind", ["mlp", "transformer", "resnet"])
def test_it_learns_what_a_latent_shows(kind):
    """Which of three channels is largest on average; chance is a third."""
    torch.manual_seed(0)
    model = LatentClassifier(Config(kind, 2, 3, 3, 32, 2, 4, dropout=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    x = torch.randn(768, 2, 2, 3)
    labels = x.mean((1, 2)).argmax(-1)
    for step in range(40):
        part = slice(step % 8 * 64, step % 8 * 64 + 64)
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), labels[part]).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model.eval()(x[512:]).argmax(-1) == labels[512:]).float().mean()
    assert accuracy > 0.8


@pytest.mark.parametrize("name", ["mlp", "transformer", "resnet"])
def test_dropout_is_for_training_alone(name):
    model = build(name, dropout=0.5)
    x = latents(model)
    assert torch.equal(model(x), model(x)) and torch.equal(model(x), build(name)(x))
    assert not torch.equal(model.train()(x), model(x))
    flax_model, variables = to_flax(model)
    apply = jax.jit(
        lambda key: flax_model.apply(variables, x.numpy(), train=True, rngs={"dropout": jax.random.key(key)})
    )
    assert jnp.array_equal(apply(0), apply(0)) and not jnp.array_equal(apply(0), apply(1))


@pytest.mark.parametrize("name", ["mlp", "transformer", "resnet"])
def test_answers_of_a_latent_depend_on_no_other(name):
    model = build(name)
    x = latents(model)
    assert difference(model(x[1:2]), model(x)[1:2]) <= TOLERANCE


@pytest.mark.parametrize("name", ["mlp", "transformer", "resnet"])
def test_compiled_and_in_half_precision(name):
    model = build(name)
    x = latents(model)
    want = model(x)
    assert difference(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want) <= TOLERANCE
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(model(x), want) <= 0.05
    assert difference(model.bfloat16()(x), want) <= 0.1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", LIVE)
def test_saved_and_loaded(tmp_path, name, dtype):
    model = build(name)
    model.save_pretrained(tmp_path, dtype=dtype)
    again = LatentClassifier.from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    for key, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], x.to(dtype or x.dtype).float()), key


def test_a_functa_with_one_latent_and_maps_of_other_sizes():
    x = torch.randn(2, 1, 1, 1, 5)  # of a voxel functa
    for kind in ("mlp", "transformer"):
        assert LatentClassifier(Config(**{**SIZES, "kind": kind, "latent_size": 1}))(x).shape == (2, 7)
    assert build("resnet")(torch.randn(2, 6, 4, 5)).shape == (2, 7)
    assert build("transformer")(torch.randn(2, 2, 3, 5)).shape == (2, 7)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("mlp", (2, 3, 3, 6)),
        ("transformer", (2, 4, 4, 5)),
        ("transformer", (2, 3, 3, 6)),
        ("transformer", (2, 0, 3, 5)),
        ("transformer", (5,)),
        ("resnet", (2, 9, 5)),
        ("resnet", (2, 3, 3, 6)),
    ],
)
def test_wrong_latents(name, shape):
    with pytest.raises(ValueError, match=r"latent: expected \(B, 3, 3, 5\), got"):
        build(name)(torch.zeros(shape))


def test_latents_that_are_no_floats():
    with pytest.raises(ValueError, match="latent: expected a floating point dtype"):
        build("mlp")(torch.zeros(2, 3, 3, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "svm"}, "kind: expected one of mlp, transformer, resnet, got 'svm'"),
        ({"num_heads": 5}, "hidden_size: expected a multiple of num_heads 5, got 24"),
        ({"latent_size": 0}, "latent_size: expected a positive integer, got 0"),
        ({"mlp_size": 1.5}, "mlp_size: expected a positive integer"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"normalizing_factor": 0.0}, "normalizing_factor: expected a positive number, got 0.0"),
        ({"width": 3}, "width: no such option"),
    ],
)
def test_wrong_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict({**SIZES, **fields})
