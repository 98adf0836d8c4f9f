"""4DS in torch and in Flax against upstream's numbers, against each other, and against misuse."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fourdperf.models import checkpoint, layers
from fourdperf.models.scaling4d import VARIANTS, Config, ReadoutConfig, Scaling4D, parse_variant, random_masking
from tests.models.scaling4d_cases import (
    GOLDENS,
    TOLERANCE,
    case,
    difference,
    flax_apply,
    names,
    randomize,
    tree,
    unpack,
)

jax = pytest.importorskip("jax")
jnp = jax.numpy
flax4d = pytest.importorskip("fourdperf.jax.models.scaling4d")

ENCODERS = names("encoder_", "extra_encoder_")
DEPTHS = names("depth_")
READOUTS = names("readout_")
MASKED = names("masked_")
VARIANT_FACTS = json.loads((GOLDENS / "variants.json").read_text())


def test_every_golden_file_is_asserted():
    resize = names("resize_")  # asserted with the op
    assert len(names("")) == len(ENCODERS + DEPTHS + READOUTS + MASKED + resize) == 35


# Upstream's numbers


@pytest.mark.parametrize("name", ENCODERS + DEPTHS)
def test_features_match_upstream(name):
    golden = case(name)
    features = golden.model().encode(torch.from_numpy(golden.inputs["video"]))
    wanted = [key for key in golden.outputs if key.startswith("features_")]
    assert len(features) == len(wanted)
    for index, feature in enumerate(features):
        assert difference(feature, golden.outputs[f"features_{index}"]) <= TOLERANCE, f"features_{index}"


@pytest.mark.parametrize("name", ENCODERS + DEPTHS)
def test_flax_features_match_upstream(name):
    golden = case(name)
    model = flax4d.Scaling4D(golden.config)
    features = flax_apply(model, {"params": tree(golden.parameters)}, golden.inputs, method="encode")
    for index, feature in enumerate(features):
        assert difference(feature, golden.outputs[f"features_{index}"]) <= TOLERANCE, f"features_{index}"


@pytest.mark.parametrize("name", DEPTHS)
def test_depth_matches_upstream(name):
    golden, taps = case(name), {}
    prediction = golden.model()(torch.from_numpy(golden.inputs["video"]), taps)
    assert difference(taps["readout/features"], golden.outputs["readout_features"]) <= TOLERANCE
    assert difference(prediction, golden.outputs["prediction"]) <= TOLERANCE


@pytest.mark.parametrize("name", DEPTHS)
def test_flax_depth_matches_upstream(name):
    golden, taps = case(name), {}
    model = flax4d.Scaling4D(golden.config)
    prediction = flax_apply(model, {"params": tree(golden.parameters)}, golden.inputs, taps)
    assert difference(taps["readout/features"], golden.outputs["readout_features"]) <= TOLERANCE
    assert difference(prediction, golden.outputs["prediction"]) <= TOLERANCE


@pytest.mark.parametrize("name", READOUTS)
def test_readout_matches_upstream(name):
    golden = case(name)
    inputs = {key: torch.from_numpy(value) for key, value in golden.inputs.items()}
    readout = golden.readout()
    assert difference(readout(**inputs), golden.outputs["prediction"]) <= TOLERANCE
    if "prediction_training" in golden.outputs:
        assert difference(readout.train()(**inputs), golden.outputs["prediction_training"]) <= TOLERANCE


@pytest.mark.parametrize("name", READOUTS)
def test_flax_readout_matches_upstream(name):
    golden = case(name)
    readout = flax4d.AttentionReadout(golden.readout_config)
    variables = {"params": tree(golden.parameters)["layers_2"]}
    assert difference(flax_apply(readout, variables, golden.inputs), golden.outputs["prediction"]) <= TOLERANCE
    if "prediction_training" in golden.outputs:
        prediction = flax_apply(readout, variables, golden.inputs, training=True)
        assert difference(prediction, golden.outputs["prediction_training"]) <= TOLERANCE


@pytest.mark.parametrize("name", MASKED)
def test_masked_encoding_matches_upstream(name):
    golden = case(name)
    model, video = golden.model(), torch.from_numpy(golden.inputs["video"])
    ids = torch.from_numpy(golden.inputs["ids_keep"]).long()
    assert difference(model.encode(video, layers=[0])[0], golden.outputs["tokens"]) <= TOLERANCE
    for index, feature in enumerate(model.encode(video, ids_keep=ids)):
        assert difference(feature, golden.outputs[f"features_{index}"]) <= TOLERANCE, f"features_{index}"


@pytest.mark.parametrize("name", MASKED)
def test_flax_masked_encoding_matches_upstream(name):
    golden = case(name)
    model, variables = flax4d.Scaling4D(golden.config), {"params": tree(golden.parameters)}
    features = flax_apply(model, variables, golden.inputs, method="encode")
    for index, feature in enumerate(features):
        assert difference(feature, golden.outputs[f"features_{index}"]) <= TOLERANCE, f"features_{index}"


# Torch against Flax, layer by layer

SMALL = {"hidden_size": 48, "num_layers": 3, "num_heads": 3, "video_size": (4, 32, 48)}
LIVE = {
    "patch 2x16x16": SMALL,
    "patch 1x8x8, 4 channels": SMALL | {"patch_size": (1, 8, 8), "channels": 4, "video_size": (3, 16, 24)},
    "head size 88": SMALL | {"hidden_size": 176, "num_heads": 2, "num_layers": 5},
    "head size 112": SMALL | {"hidden_size": 224, "num_heads": 2, "mlp_size": 100},
    "three iterations": SMALL | {"n_iter": 3},
    "post norm": SMALL | {"block": "post_norm", "qk_features": 96},
    "parallel": SMALL | {"block": "parallel", "v_features": 24},
    "one patch": SMALL | {"video_size": (2, 16, 16)},
    "depth": SMALL | {"readout": ReadoutConfig.dense((4, 32, 48, 2), (2, 4, 8), num_params=64, num_heads=4)},
    "external queries": SMALL
    | {"readout": ReadoutConfig(7, 64, 4, 5, query_features=20, depth=0.5, match_vjepa_implementation=False)},
    "one query": SMALL | {"readout": ReadoutConfig(7, 64, 4, num_frames=1, depth=1.0)},
}


def build(options: dict, batch: int = 2) -> tuple[Scaling4D, dict[str, torch.Tensor]]:
    """A model with random parameters, and inputs for it."""
    torch.manual_seed(1)
    config = Config(**options)
    inputs = {"video": torch.randn(batch, *config.video_size, config.channels)}
    if config.readout and config.readout.query_features:
        inputs["queries"] = torch.randn(batch, 6, config.readout.query_features)
    return randomize(Scaling4D(config)), inputs


def to_flax(model: Scaling4D, inputs: dict[str, torch.Tensor], dtype=jnp.float32) -> tuple:
    variables = {"params": tree(unpack(model, model.state_dict()))}
    flax_model = flax4d.Scaling4D(model.config, dtype=dtype)
    cast = lambda x: jnp.asarray(x, dtype)  # noqa: E731
    return flax_model, jax.tree.map(cast, variables), {k: cast(v.numpy()) for k, v in inputs.items()}


@pytest.mark.parametrize("name", LIVE)
def test_torch_matches_flax_layer_by_layer(name):
    model, inputs = build(LIVE[name])
    ours, theirs = {}, {}
    model(**inputs, taps=ours)
    model.encode(inputs["video"], layers=["final"], taps=ours)
    flax_model, variables, arrays = to_flax(model, inputs)
    flax_apply(flax_model, variables, arrays, theirs)
    expected = ["tokens", *(f"encoder/{i:02d}" for i in range(model.config.num_layers))]
    if model.config.readout:
        expected += ["readout/features", "readout/prediction"]
    assert sorted(ours) == sorted(theirs) == sorted(expected)
    for tap in expected:
        assert difference(ours[tap], theirs[tap]) <= TOLERANCE, tap


def test_flax_initialises_the_parameters_of_the_checkpoints():
    model, inputs = build(LIVE["depth"])
    flax_model, variables, arrays = to_flax(model, inputs)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(flax_model.init, jax.random.key(0), **arrays))
    assert shapes == jax.tree.map(jnp.shape, variables)


@pytest.mark.parametrize("name", ["patch 2x16x16", "depth", "external queries"])
def test_gradients_match_flax(name):
    model, inputs = build(LIVE[name])
    taps = {}
    weights = torch.randn_like(model(**inputs))
    (model(**inputs) * weights).sum().backward()
    grads = unpack(model, {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()})

    flax_model, variables, arrays = to_flax(model, inputs)
    loss = lambda v: (flax_model.apply(v, **arrays) * weights.numpy()).sum()  # noqa: E731
    expected = jax.device_get(jax.jit(jax.grad(loss))(variables)["params"])
    largest = max(abs(x).max() for x in jax.tree.leaves(expected))
    for key, grad in grads.items():
        node = expected
        for part in key.split("/"):
            node = node[part]
        # Gradients of key biases are zero but for rounding, so the scale is that of the whole gradient.
        assert abs(grad - node).max() <= TOLERANCE * largest, key
    assert not taps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["head size 88", "depth"])
def test_half_types_err_no_more_than_twice_flax(name, dtype):
    model, inputs = build(LIVE[name])
    exact = model(**inputs)
    flax_model, variables, arrays = to_flax(model, inputs, jnp.dtype(str(dtype).removeprefix("torch.")))
    theirs = difference(flax_model.apply(variables, **arrays), exact)
    output = model.to(dtype)(**inputs)
    assert output.dtype == dtype
    assert difference(output, exact) <= 2 * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(dtype):
    model, inputs = build(LIVE["depth"])
    exact = model(**inputs)
    with torch.autocast("cpu", dtype):
        prediction = model(**inputs)
    prediction.float().sum().backward()
    assert difference(prediction, exact) <= 16 * torch.finfo(dtype).eps
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())


# The encoder's list of features


def test_features_come_in_the_order_asked_for():
    model, inputs = build(SMALL)
    every = model.encode(**inputs)
    some = model.encode(**inputs, layers=[2, -1, 0, 2, "final"])
    for got, index in zip(some, (2, 3, 0, 2)):
        assert torch.equal(got, every[index])
    assert torch.equal(some[-1], model.encoder.processor.layers[2](every[3]))
    assert torch.equal(model(**inputs), every[-1])
    assert model.encode(**inputs, layers=[]) == []


@pytest.mark.parametrize(
    "layers, run", [([0], 0), ([1], 0), ([2], 1), ([0, 3], 2), ([-1], 2), (["final"], 3), (None, 2)], ids=str
)
def test_layers_that_nothing_reads_are_not_run(layers, run):
    model, inputs = build(SMALL)
    calls = []
    for layer in model.encoder.processor.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    model.encode(**inputs, layers=layers)
    assert len(calls) == run


def test_last_layer_is_not_run_for_a_readout():
    model, inputs = build(LIVE["depth"])
    model.encoder.processor.layers[2].register_forward_hook(lambda *_: pytest.fail("layer 2 was run"))
    model(**inputs)


# Variants and configs


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_has_upstreams_sizes(name):
    facts = VARIANT_FACTS["variants"][name]
    config = Config.from_variant(name)
    assert config.variant == name
    for field in ("hidden_size", "num_layers", "num_heads", "mlp_size"):
        assert getattr(config, field) == facts[field]
    with torch.device("meta"):
        model = Scaling4D(config)
    assert sum(p.numel() for p in model.parameters()) == facts["encoder_parameters"]
    assert config.num_tokens == facts["tokens"]
    for depth, index in facts["readout_index"].items():
        readout = ReadoutConfig.dense(depth=float(depth))
        assert Config.from_variant(name, readout=readout).feature_index == index % facts["features_returned"]


@pytest.mark.parametrize("name", VARIANT_FACTS["variant_strings"])
def test_variant_strings_are_those_that_upstream_accepts(name):
    facts = VARIANT_FACTS["variant_strings"][name]
    if "error" in facts:
        with pytest.raises(ValueError, match="variant: expected one of mu, Ti, S, M, B, L, H, g, G, e"):
            parse_variant(name)
        return
    key, patch = parse_variant(name)
    assert VARIANTS[key]._asdict() == {k: v for k, v in facts.items() if k != "patch_size"}
    assert patch == facts.get("patch_size")
    assert Config.from_variant(name).patch_size == (2, patch or 16, patch or 16)


def test_config_survives_json():
    config = Config(**LIVE["depth"])
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_size": 0}, "hidden_size: expected a positive integer, got 0"),
        ({"num_layers": 2.0}, "num_layers: expected a positive integer, got 2.0"),
        ({"num_heads": 5}, "qk_features: expected a multiple of num_heads 5, got 48"),
        ({"patch_size": 16}, "patch_size: expected 3 positive integers, got 16"),
        ({"patch_size": (16, 16)}, "patch_size: expected 3 positive integers"),
        ({"video_size": (1, 32, 32)}, "video_size: expected at least one patch"),
        ({"block": "sandwich"}, "block: expected one of pre_norm, post_norm, parallel, got 'sandwich'"),
        ({"depth": 12}, "depth: no such option"),
        ({"readout": 3}, "readout: expected a ReadoutConfig or None, got int"),
        ({"readout": {"num_params": 64, "num_heads": 4, "num_frames": 4}}, "readout.num_classes: missing"),
        ({"n_iter": 2, "readout": ReadoutConfig(7, 64, 4, 4)}, "n_iter: a readout needs"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(SMALL | options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_params": 63}, "num_params: expected a multiple of num_heads 4, got 63"),
        ({"depth": 1.5}, r"depth: expected a number in \(0, 1\], got 1.5"),
        ({"output_shape": (4, 8, 8)}, "give both or neither"),
        ({"output_shape": (4, 8, 8), "decoding_patch_size": (3, 4, 4)}, "expected multiples of the patch"),
        ({"output_shape": (4, 8, 8), "decoding_patch_size": (2, 4, 4)}, "num_classes: patches .* need 32, got 7"),
        (
            {"num_classes": 32, "output_shape": (4, 8, 8), "decoding_patch_size": (2, 4, 4)},
            r"num_queries: \(2, 2, 2\) patches need 8, got 1",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_readout_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ReadoutConfig(**{"num_classes": 7, "num_params": 64, "num_heads": 4, "num_frames": 4} | options)


def test_patch_of_the_variant_must_agree_with_patch_size():
    assert Config.from_variant("B/14", video_size=(16, 224, 224)).grid == (8, 16, 16)
    with pytest.raises(ValueError, match="patch_size: the variant 'B/14' says 14x14"):
        Config.from_variant("B/14", patch_size=(2, 16, 16))


# Masking


@pytest.mark.parametrize("ratio, kept", [(0, 12), (0.25, 9), (0.9, 1), (0.999, 1)])
def test_random_masking(ratio, kept):
    masking = random_masking(5, 12, ratio, generator=torch.Generator().manual_seed(0))
    assert masking.ids_keep.shape == (5, kept)
    removed = masking.mask.nonzero()[:, 1].reshape(5, 12 - kept)
    assert torch.equal(torch.cat([masking.ids_keep, removed], 1).sort(1).values, torch.arange(12).expand(5, -1))
    again = random_masking(5, 12, ratio, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(masking, again))
    x = torch.randn(5, 12)
    order = masking.ids_restore.argsort(1)
    assert torch.equal(order[:, :kept], masking.ids_keep)
    assert torch.equal(x.gather(1, order).gather(1, masking.ids_restore), x)


def test_masking_ratio_is_exact():
    assert random_masking(1, 10, 0.9).ids_keep.shape == (1, 1)  # int(10 * (1 - 0.9)) is 0
    assert random_masking(1, 1568, 0.95).ids_keep.shape == (1, 78)


@pytest.mark.parametrize(
    "arguments, message",
    [((0, 4, 0.5), "batch_size"), ((2, 0, 0.5), "num_tokens"), ((2, 4, 1.0), r"ratio: expected a number in \[0, 1\)")],
    ids=str,
)
def test_random_masking_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_masking(*arguments)


def test_masked_tokens_are_those_of_the_video():
    model, inputs = build(SMALL)
    ids = random_masking(2, model.config.num_tokens, 0.5).ids_keep
    tokens, kept = model.encode(**inputs, layers=[0])[0], model.encode(**inputs, layers=[0], ids_keep=ids)[0]
    assert difference(kept, torch.stack([t[i] for t, i in zip(tokens, ids)])) <= TOLERANCE


# Other clip lengths and sizes


def test_another_grid_is_refused_unless_asked_for():
    model, _ = build(SMALL)
    with pytest.raises(ValueError, match=r"grid of \(3, 2, 3\), the position embedding has \(2, 2, 3\); pass interp"):
        model(torch.zeros(1, 6, 32, 48, 3))
    assert model(torch.zeros(1, 5, 40, 60, 3)).shape == (1, 12, 48)  # the same grid: what is left over is dropped
    with pytest.raises(ValueError, match=r"patch grid of \(2, 0, 3\)"):
        model(torch.zeros(1, 4, 8, 48, 3), interpolate=True)


@pytest.mark.parametrize("interpolate", [True, "linear", "cubic"])
def test_position_embedding_is_resized_as_jax_does(interpolate):
    model, _ = build(SMALL)
    video = torch.randn(1, 10, 64, 32, 3)
    posenc = jnp.asarray(model.encoder.tokenizer.posenc.detach().numpy())
    method = "linear" if interpolate is True else interpolate
    resized = copy.deepcopy(model)
    resized.encoder.tokenizer.posenc = torch.nn.Parameter(
        torch.tensor(jax.image.resize(posenc, (5, 4, 2, 48), method).tolist())
    )
    assert difference(model(video, interpolate=interpolate), resized(video)) <= TOLERANCE


def test_linear_interpolation_is_trilinear():
    model, _ = build(SMALL)
    posenc = model.encoder.tokenizer.posenc.permute(3, 0, 1, 2)[None]
    expected = F.interpolate(posenc, (4, 4, 6), mode="trilinear")[0].permute(1, 2, 3, 0)
    actual = model.encoder.tokenizer.positions(torch.zeros(1, 8, 64, 96, 3), "linear")
    assert difference(actual, expected) <= TOLERANCE


def test_readout_of_another_video_size():
    model, _ = build(LIVE["depth"])
    assert model(torch.randn(2, 8, 64, 64, 3), interpolate="cubic").shape == (2, 4, 32, 48, 2)


# Training


def test_readout_trains_on_frozen_features():
    model, inputs = build(LIVE["depth"])
    model.encoder.requires_grad_(False)
    model(**inputs).sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.readout.parameters())


def test_masked_encoding_has_gradients():
    model, inputs = build(SMALL)
    ids = random_masking(2, model.config.num_tokens, 0.75).ids_keep
    model.encode(**inputs, layers=["final"], ids_keep=ids)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_new_parameters_follow_upstreams_distributions():
    torch.manual_seed(0)
    model = Scaling4D(Config.from_variant("Ti", num_layers=1, readout=ReadoutConfig.dense()))
    block, tokenizer = model.encoder.processor.layers[0], model.encoder.tokenizer
    assert block.attention.qkv.weight.std().item() == pytest.approx(192**-0.5, rel=0.02)
    assert block.mlp.dense_in.weight.std().item() == pytest.approx((2 / (192 + 768)) ** 0.5, rel=0.02)
    assert tokenizer.posenc.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.readout.query.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.readout.mlp.dense_in.weight.std().item() == pytest.approx(1024**-0.5, rel=0.02)
    assert not block.attention.out.bias.any()


# torch.compile


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.heavy)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_compiles_as_one_graph(backend, dtype):
    model, inputs = build(LIVE["depth"])
    model.to(dtype)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        exact = model.float()(**inputs)
        plain = difference(model.to(dtype)(**inputs), exact)
        assert difference(compiled(**inputs), exact) <= max(2 * plain, TOLERANCE)
    compiled(**inputs).sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.heavy)])
def test_masked_encoding_compiles_as_one_graph(backend):
    model, inputs = build(SMALL)
    ids = random_masking(2, model.config.num_tokens, 0.5).ids_keep
    compiled = torch.compile(
        lambda video, ids: model.encode(video, layers=[2, "final"], ids_keep=ids), fullgraph=True, backend=backend
    )
    for ours, plain in zip(compiled(inputs["video"], ids), model.encode(**inputs, layers=[2, "final"], ids_keep=ids)):
        assert difference(ours, plain) <= TOLERANCE


# Attention


@pytest.mark.parametrize("head_size", [16, 64, 80, 88, 96, 104, 112, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_attention_errs_no_more_than_twice_plain_attention(head_size, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, head_size, dtype=torch.float64) for n in (37, 29, 29))

    def plain(q, k, v):
        weights = torch.einsum("bqhd,bkhd->bhqk", q / head_size**0.5, k).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    exact = plain(q, k, v)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    allowed = 2 * (plain(q, k, v) - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (layers.attention(q, k, v) - exact).abs().max() <= allowed
    with torch.no_grad():
        assert (layers.attention(q, k, v) - exact).abs().max() <= allowed


def test_attention_without_the_library_is_sdpa(monkeypatch):
    q, k, v = (torch.randn(1, n, 2, 16, requires_grad=True) for n in (5, 7, 7))
    ours = layers.attention(q, k, v)
    gradients = torch.autograd.grad(ours.square().sum(), (q, k, v))
    monkeypatch.setattr(layers, "native_why_not", lambda *_: "not built")
    plain = layers.attention(q, k, v)
    assert plain.grad_fn.name() != ours.grad_fn.name()
    for mine, theirs in zip(gradients, torch.autograd.grad(plain.square().sum(), (q, k, v))):
        assert difference(mine, theirs) <= TOLERANCE


@pytest.mark.parametrize("batch", [0, 1])
def test_few_and_no_clips(batch):
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs = build(LIVE["depth"], batch)
        with torch.no_grad():
            assert model.to(dtype)(**inputs).shape == (batch, 4, 32, 48, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", LIVE)
def test_cuda_matches_cpu(name):
    model, inputs = build(LIVE[name])
    exact = model(**inputs)
    model.cuda()
    assert difference(model(**{k: v.cuda() for k, v in inputs.items()}).cpu(), exact) <= TOLERANCE
    with torch.autocast("cuda", torch.bfloat16):
        model(**{k: v.cuda() for k, v in inputs.items()}).sum().backward()


# Misuse

VIDEO = torch.zeros(2, 4, 32, 48, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"video": VIDEO[0]}, r"video: expected \(B, T, H, W, 3\), got \(4, 32, 48, 3\): the batch axis is missing"),
        ({"video": VIDEO.movedim(-1, 1)}, r"video: expected \(B, T, H, W, 3\), got \(2, 3, 4, 32, 48\)"),
        ({"video": VIDEO[None]}, r"video: expected \(B, T, H, W, 3\), got \(1, 2, 4, 32, 48, 3\)"),
        ({"video": VIDEO[..., :1]}, r"video: expected \(B, T, H, W, 3\), got \(2, 4, 32, 48, 1\)"),
        (
            {"video": VIDEO.byte()},
            r"video: expected a floating point dtype, got torch.uint8; 8-bit .* x.float\(\) / 255",
        ),
        ({"video": VIDEO.numpy()}, "video: expected a tensor .*, got ndarray"),
        ({"video": VIDEO.to("meta")}, "video: expected it on cpu like the parameters, got meta"),
        ({"layers": [4]}, r"layers: expected integers in \[-4, 3\] or 'final', got 4"),
        ({"layers": ["last"]}, "layers: expected integers .* got 'last'"),
        ({"interpolate": "nearest"}, "interpolate: expected False, True, 'linear' or 'cubic', got 'nearest'"),
        ({"ids_keep": torch.zeros(3, 1).long()}, r"ids_keep: expected int64 \(B=2, K\), got torch.int64 \(3, 1\)"),
        ({"ids_keep": torch.zeros(2, 1)}, r"ids_keep: expected int64 \(B=2, K\), got torch.float32 \(2, 1\)"),
        ({"ids_keep": torch.full((2, 1), 12)}, r"ids_keep: expected values in \[0, 11\], got 12 to 12"),
        ({"ids_keep": torch.full((2, 1), -1)}, r"ids_keep: expected values in \[0, 11\], got -1 to -1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_encode_refuses(arguments, message):
    model, _ = build(SMALL)
    with pytest.raises(ValueError, match=message):
        model.encode(**{"video": VIDEO} | arguments)


@pytest.mark.parametrize(
    "name, queries, message",
    [
        ("patch 2x16x16", (2, 6, 20), r"queries: this model has no readout, got \(2, 6, 20\)"),
        ("depth", (2, 6, 20), r"queries: this readout has learned queries, got \(2, 6, 20\)"),
        ("external queries", None, r"queries: this readout needs queries \(B=2, Q, 20\), got none"),
        ("external queries", (2, 6, 21), r"queries: expected \(B=2, Q, 20\), got \(2, 6, 21\)"),
        ("external queries", (1, 6, 20), r"queries: expected \(B=2, Q, 20\), got \(1, 6, 20\)"),
    ],
    ids=str,
)
def test_forward_refuses_queries(name, queries, message):
    model, inputs = build(LIVE[name])
    with pytest.raises(ValueError, match=message):
        model(inputs["video"], queries=queries and torch.zeros(queries))


@pytest.mark.parametrize(
    "features, message",
    [
        ((2, 5, 48), r"features: expected \(B, T, N, 48\), got \(2, 5, 48\)"),
        ((2, 4, 6, 40), r"features: expected \(B, T, N, 48\), got \(2, 4, 6, 40\)"),
        ((2, 3, 6, 48), r"features: expected T=4 frames, got \(2, 3, 6, 48\)"),
    ],
    ids=str,
)
def test_readout_refuses(features, message):
    model, _ = build(LIVE["depth"])
    with pytest.raises(ValueError, match=message):
        model.readout(torch.zeros(features))


def test_clips_must_divide_the_batch():
    golden = case("readout_two_clips")
    with pytest.raises(ValueError, match="multiple of 2 clips, got 5"):
        golden.readout()(torch.from_numpy(golden.inputs["features"])[:5])


def test_nan_stays_in_its_clip():
    model, inputs = build(SMALL)
    clean = model(**inputs)
    inputs["video"][0, 0, 0, 0, 0] = float("nan")
    features = model(**inputs)
    assert features[0].isnan().all() and torch.equal(features[1], clean[1])


# On disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_pretrained_round_trip(tmp_path, dtype):
    model, inputs = build(LIVE["depth"])
    model.to(dtype).save_pretrained(tmp_path / "a")
    loaded = Scaling4D.from_pretrained(tmp_path / "a")
    assert loaded.config == model.config and not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(loaded(**inputs), model(**inputs))
    double = Scaling4D.from_pretrained(tmp_path / "a", dtype=torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    loaded.save_pretrained(tmp_path / "a")  # over itself
    assert torch.equal(Scaling4D.from_pretrained(tmp_path / "a")(**inputs), model(**inputs))


def damage(path, name):
    """One kind of damage to a checkpoint directory."""
    weights, config = path / "model.safetensors", path / "config.json"
    state = load_file(weights) if name.startswith("key") else None
    match name:
        case "no directory":
            weights.unlink(), config.unlink(), path.rmdir()
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "empty weights":
            weights.write_bytes(b"")
        case "not JSON":
            config.write_text("{")
        case "a list":
            config.write_text("[]")
        case "another model":
            config.write_text('{"model": "d4rt"}')
        case "unknown field":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"depth": 3}))
        case "key missing":
            del state["encoder.processor.layers.1.mlp.dense_in.bias"]
            save_file(state, weights)
        case "key unknown":
            save_file(state | {"extra": torch.zeros(1)}, weights)
        case "key misshapen":
            save_file(state | {"encoder.processor.layers.1.mlp.dense_in.bias": torch.zeros(7)}, weights)


@pytest.mark.parametrize(
    "name, message",
    {
        "no directory": "no config.json here; expected a directory",
        "no weights": "no model.safetensors here",
        "no config": "no config.json here",
        "truncated weights": "model.safetensors: not a complete safetensors file",
        "empty weights": "model.safetensors: not a complete safetensors file",
        "not JSON": "config.json: not JSON",
        "a list": "expected a config with model 'scaling4d', got None",
        "another model": "expected a config with model 'scaling4d', got 'd4rt'",
        "unknown field": "depth: no such option",
        "key missing": "missing encoder.processor.layers.1.mlp.dense_in.bias",
        "key unknown": "unknown extra",
        "key misshapen": r"layers.1.mlp.dense_in.bias: expected shape \(192,\), got \(7,\)",
    }.items(),
    ids=lambda x: x if " " in x else "",
)
def test_damaged_checkpoints_are_refused(tmp_path, name, message):
    build(SMALL)[0].save_pretrained(tmp_path / "a")
    damage(tmp_path / "a", name)
    with pytest.raises(ValueError, match=message):
        Scaling4D.from_pretrained(tmp_path / "a")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    model, inputs = build(SMALL)
    model.save_pretrained(tmp_path / "old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="cannot write .*model.safetensors: No space left on device"):
            model.save_pretrained(tmp_path / name)
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before
    assert not (tmp_path / "new").exists()
