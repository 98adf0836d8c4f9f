"""D4RT against the numbers of the seed's port: every part of it, its full model, a step of its training."""

import pytest
import torch
import torch.nn.functional as F

from fourdperf.convert.d4rt import FREQUENCIES, Rule, block_table, converted, encoder_table, query_table, table
from fourdperf.data.queries import Queries, Targets
from fourdperf.models.d4rt import Config, Encoder, EncoderBlock, QueryBuilder
from fourdperf.ops import fourier_columns, fourier_embed, gather_patches, octaves
from fourdperf.train.d4rt_loss import Weights, d4rt_loss
from tests.models.d4rt_cases import Case

BLOCKS = ("a_block_local_t3", "a_block_local_t1_ar", "a_block_global")
ENCODERS = (
    "a_encoder_global_noar",
    "a_encoder_global_ar",
    "a_encoder_global_arfloat",
    "a_encoder_alternate_1patch",
    "a_encoder_alternate_1patch_ar",
    "a_encoder_alternate_multi_composed",
)
MODELS = ("a_model", "a_model_highres", "a_model_same_dim_noar", "a_model_mid_recipe")


def shapes(state):
    return {name: tuple(x.shape) for name, x in state.items()}


def filled(module, rules, state, prefix=""):
    """The module with the port's tensors, whose rules say our names with that prefix."""
    module.load_state_dict({key.removeprefix(prefix): x for key, x in converted(rules, state).items()})
    return module


def port_block(case):
    """A block of the port, under the names that its encoder would give it."""
    c = case.config
    config = Config.seed(
        **{"hidden_size": c["dim"], "num_heads": c["num_heads"], "mlp_size": c["mlp_hidden"]},
        **{"local_attention": "window" if c["use_local_attn"] else "none", "window": c["local_window_size"]},
        **{"num_frames": 2 * c["T"], "image_size": (16 * c["H"], 16 * c["W"])},
    )
    rules = block_table(config, "", "b", shapes({f"b.{name}": x for name, x in case.params.items()}))
    strip = lambda name: name and name.removeprefix("b.")
    return config, [Rule(rule.key[1:], strip(rule.source), *rule[2:]) for rule in rules]


@pytest.mark.parametrize("name", BLOCKS)
def test_port_block(name):
    """Local and global blocks, forward and every gradient; where the golden has no extra token, one is put and cut."""
    case = Case(name)
    config, rules = port_block(case)
    block = filled(EncoderBlock(config, case.config["use_local_attn"]), rules, case.params)
    x = case.inputs["x"].requires_grad_()
    extra = 0 if case.config["aspect_ratio_token"] else 1
    y = block(F.pad(x, (0, 0, 0, extra)))[:, : x.shape[1]]
    y.backward(case.inputs["cot/y"])
    case.check("out/y", y)
    case.check("grad/x", x.grad)
    grads = {name.removeprefix("params/"): g for name, g in case.grads.items() if name.startswith("params/")}
    wanted, gradients = converted(rules, grads), dict(block.named_parameters())
    for rule in rules:
        if rule.source:  # the bias that the port's local attention lacks has no counterpart
            case.check(f"grad/params/{rule.source}", gradients[rule.key].grad, wanted[rule.key])


@pytest.mark.parametrize("name", ENCODERS)
def test_port_encoder(name):
    """Odd frame counts lose the last frame, the token is last, local blocks keep it out of the attention."""
    case = Case(name)
    c, video = case.config, case.video()
    params = {f"encoder.{key}": x for key, x in case.params.items() if key != "pos_embed"}
    config = Config.seed(
        **{"hidden_size": c["embed_dim"], "num_layers": c["depth"], "num_heads": c["num_heads"]},
        **{"mlp_size": params["encoder.blocks.0.mlp.0.weight"].shape[0], "image_size": c["img_size"]},
        **{"patch_size": (c["temporal_patch_size"], c["spatial_patch_size"], c["spatial_patch_size"])},
        **{"local_attention": "window" if c["use_local_global_alternate"] else "none"},
        window=c["local_window_size"],
    )
    encoder = filled(Encoder(config), encoder_table(config, shapes(params)), params, "encoder.")
    ratio = case.inputs.get("aspect_ratio", torch.full((c["B"],), c.get("aspect_ratio", 0.0)))
    taps = {}
    features = encoder(video, ratio, taps)
    case.check("out/features", features)
    if "embedded" in case.outputs:
        case.check("out/embedded", taps["tokens"])
    else:
        embedding = encoder.tokenizer
        case.check("out/patch_embed", embedding.norm(embedding.patch_embedding(video)))


def port_query_config(case):
    c = case.config
    return Config.seed(
        **{"num_frames": c["max_frames"], "query_parts": (c["fourier_dim"], c["time_embed_dim"], c["patch_embed_dim"])},
        **{"decoder_size": c["query_dim"], "decoder_heads": 1, "num_bands": c["num_fourier_freqs"]},
        rgb_size=c["patch_size"],
    )


@pytest.mark.parametrize("name", ["a_query_builder", "a_query_builder_highres"])
def test_port_query_builder(name):
    case = Case(name)
    config = port_query_config(case)
    params = {f"query_builder.{key}": x for key, x in case.params.items()}
    params.pop(FREQUENCIES)
    rules = query_table(config, shapes(params))
    builder = filled(QueryBuilder(config), rules, params, "query_builder.")
    frames = case.video("images").requires_grad_()
    queries = builder(case.queries(), frames)
    queries.backward(case.inputs["cot/queries"])
    case.check("out/queries", queries)
    grads = {f"query_builder.{key.removeprefix('params/')}": x for key, x in case.grads.items() if "params/" in key}
    gradients = dict(builder.named_parameters(prefix="query_builder"))
    for key, want in converted([rule for rule in rules if rule.source in grads], grads).items():
        source = next(rule.source for rule in rules if rule.key == key)
        case.check(f"grad/params/{source.removeprefix('query_builder.')}", gradients[key].grad, want)
    if "images" in case.grads:
        case.check("grad/images", frames.grad.movedim(-1, 2))


def test_port_fourier():
    case = Case("a_fourier")
    width, bands = case.config["embed_dim"] if "embed_dim" in case.config else 32, 10
    builder = QueryBuilder(Config.seed(query_parts=(width, 8, 8), num_bands=bands))
    builder.fourier.load_state_dict({kind: case.params[f"proj.{kind}"] for kind in ("weight", "bias")})
    case.check("out/embedded", builder.embed_uv(case.inputs["coords"]))


@pytest.mark.parametrize("name", ["a_patches", "a_patches_ties", "a_patches_highres", "a_patches_7"])
def test_port_patches(name):
    """Patches exactly, their embedding and its gradients to rounding."""
    case = Case(name)
    size, width = case.config["patch_size"], case.config["embedding_dim"]
    builder = QueryBuilder(Config.seed(rgb_size=size, query_parts=(8, 8, width)))
    conv = {"conv.weight": "conv.0.weight", "conv.bias": "conv.0.bias", "dense.bias": "conv.2.bias"}
    state = {ours: case.params[theirs] for ours, theirs in conv.items()}
    builder.rgb.load_state_dict(state | {"dense.weight": case.params["conv.2.weight"].flatten(1)})
    frames, uv, t = case.video("images").requires_grad_(), case.inputs["coords"], case.inputs["t_src"]
    patches = builder.patches(Queries(uv, t, t, t), frames)
    assert torch.equal(patches.movedim(-1, 2), case.outputs["patches"])
    embedded = builder.rgb(patches)
    case.check("out/embedded", embedded)
    embedded.backward(case.inputs["cot/embedded"])
    case.check("grad/images", frames.grad.movedim(-1, 2))
    for ours, theirs in conv.items():
        case.check(f"grad/params/{theirs}", builder.rgb.get_parameter(ours).grad)
    case.check("grad/params/conv.2.weight", builder.rgb.dense.weight.grad.unflatten(1, (64, size, size)))


@pytest.mark.parametrize("name", MODELS)
def test_port_model(name):
    case = Case(name)
    model = case.model()
    assert model.config.num_frames == min(100, case.hyper["max_frames"])
    ratio, taps = case.inputs.get("aspect_ratio"), {}
    with torch.no_grad():
        encoded = model.encode(case.video(), ratio, case.video("video_orig"), taps)
        prediction = model.decode(encoded, case.queries(), taps)
        features = model.memory_projection(encoded.features)
    case.check("out/outputs_raw", taps["outputs"])
    if "encoder_features" not in case.outputs:
        case.check("out/encoder_features_kept", features[:, case.inputs["keep"]])
        return
    case.check("out/encoder_features", features)
    case.check("out/query_features", taps["decoder/norm"])
    for theirs, x in (
        ("coords_3d", prediction.xyz),
        ("coords_2d", prediction.uv),
        ("visibility_logits", prediction.visibility[..., None]),
        ("motion", prediction.displacement),
        ("normal", prediction.normal),
        ("confidence_logits", prediction.confidence[..., None]),
    ):
        case.check(f"out/{theirs}", x)


def test_port_training_step():
    """The gradient of the port's loss in every parameter of its full model."""
    case = Case("a_model_train_step")
    model, inputs = case.model().train(), case.inputs
    known = inputs["mask"].bool()
    targets = Targets(
        xyz=inputs["gt_3d"],
        uv=inputs["gt_2d"],
        visibility=inputs["gt_visibility"].float(),
        displacement=inputs["gt_motion"],
        normal=inputs["gt_normal"],
        **{f"has_{name}": known for name in ("xyz", "uv", "visibility", "displacement", "normal")},
    )
    prediction = model(case.video(), case.queries(), inputs["aspect_ratio"], case.video("video_orig"))
    weights = Weights(xyz=1.0, uv=0.1, confidence=0.2, visibility=0.1, displacement=0.1, normal=0.5)
    loss = d4rt_loss(prediction, targets, weights, "seed_a")["loss"]
    loss.backward()
    case.check("out/loss", loss)
    grads = {key.removeprefix("params/"): x for key, x in case.grads.items() if key.startswith("params/")}
    rules = table(model.config, shapes({k: x for k, x in case.params.items() if k != "encoder.pos_embed"}))
    assert {rule.source for rule in rules} == set(grads)
    gradients, wanted = dict(model.named_parameters()), converted(rules, grads)
    for rule in rules:
        case.check(f"grad/params/{rule.source}", gradients[rule.key].grad, wanted[rule.key])


# The other port: only its formulas


def test_other_port_fourier():
    """Octaves from 2 pi on, per coordinate sines then cosines, which is our order after `fourier_columns`."""
    case = Case("b_fourier")
    bands = case.config["num_frequencies"]
    features = fourier_embed(case.inputs["coords"], octaves(bands))
    columns = fourier_columns(2, bands, ("dim", "trig", "band"))
    case.check("out/features", features, case.outputs["features"][..., columns])
    weight = case.params["proj.weight"][:, columns]
    case.check("out/embedded", F.linear(features, weight, case.params["proj.bias"]))


def test_other_port_patches():
    case = Case("b_patches")
    frames, uv, t = case.video("frames"), case.inputs["coords"], case.inputs["t_src"]
    how = {"coordinates": "corners", "border": "replicate"}
    case.check("out/fast_patches_flat", gather_patches(frames, t, uv, 9, mode="bilinear", **how).flatten(2))
    assert torch.equal(gather_patches(frames, t, uv, 9, mode="floor", **how), case.outputs["slow_patches"])
