"""D4RT's own promises: torch against Flax layer by layer, independent queries, clips of every kind, misuse."""

import itertools
import json
import re

import pytest
import torch
import torch.nn.functional as F

from fourdperf.data.queries import Queries
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.d4rt import D4RT as Model
from fourdperf.models.d4rt import VARIANTS, Config, Prediction
from tests.models.scaling4d_cases import TOLERANCE, difference, flax_apply, randomize

SMALL = {
    **{"hidden_size": 48, "num_layers": 3, "num_heads": 3, "num_frames": 6, "image_size": (32, 48)},
    **{"patch_size": (2, 8, 8), "decoder_size": 32, "decoder_layers": 2, "decoder_heads": 4},
}
LIVE = {
    "paper": {},
    "window": {"local_attention": "window", "window": 3},
    "window, even, shifted": {"local_attention": "window", "window": 4, "window_border": "shift"},
    "window, zeros": {"local_attention": "window", "window": 5, "window_border": "zero", "centered": False},
    "global, joint positions": {"local_attention": "none", "positions": "joint", "gelu": "none", "norm_eps": 1e-5},
    "head size 88": {"hidden_size": 176, "num_heads": 2, "num_layers": 2, "decoder_size": 88, "decoder_heads": 1},
    "patch 1x16x8": {"patch_size": (1, 16, 8), "num_frames": 3, "rgb_size": 4, "num_bands": 5},
    "seed": {"seed": True, "query_parts": (12, 8, 16), "rgb_size": 5},
}


def build(name="paper", **fields):
    """A model with random parameters."""
    fields = {**SMALL, **LIVE[name], **fields}
    config = Config.seed(**fields) if fields.pop("seed", False) else Config(**fields)
    torch.manual_seed(1)
    return randomize(Model(config))


def clip(model, frames=None, batch=2, queries=20, patches=None):
    """Video, queries and aspect ratio; with `patches`, frames of that height and width to cut patches from."""
    torch.manual_seed(2)
    frames = frames or model.config.num_frames
    inputs = {"video": torch.rand(batch, frames, *model.config.image_size, 3)}
    times = (torch.randint(0, frames, (batch, queries)) for _ in range(3))
    inputs["queries"] = Queries(torch.rand(batch, queries, 2), *times)
    inputs["aspect_ratio"] = 0.5 + torch.rand(batch)
    if patches:
        inputs["patch_video"] = torch.rand(batch, frames, *patches, 3)
    return inputs


def equal(a: Prediction, b: Prediction) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


def close(a: Prediction, b: Prediction, tolerance=TOLERANCE) -> bool:
    return all(difference(x, y) <= tolerance for x, y in zip(a, b))


# Torch against Flax


jax = pytest.importorskip("jax")
jnp = jax.numpy
flax_d4rt = pytest.importorskip("fourdperf.jax.models.d4rt")


def to_flax(model, inputs):
    params = flax_d4rt.flax_params({name: x.detach().numpy() for name, x in model.state_dict().items()}, model.config)
    arrays = {name: jax.tree.map(lambda x: jnp.asarray(x.numpy()), x) for name, x in inputs.items()}
    return flax_d4rt.D4RT(model.config), {"params": params}, arrays


@pytest.mark.parametrize(
    "name, frames, patches",
    [*((name, None, (70, 50)) for name in LIVE), ("paper", 3, None), ("seed", 3, None), ("paper", 1, "bytes")],
)
def test_torch_matches_flax_layer_by_layer(name, frames, patches):
    """Clips shorter than the longest, odd ones too; patches from larger frames, from the video's, from 8-bit ones."""
    model = build(name)
    inputs = clip(model, frames, patches=(40, 60) if patches == "bytes" else patches)
    if patches == "bytes":
        inputs["patch_video"] = (255 * inputs["patch_video"]).byte()
        del inputs["aspect_ratio"]
    ours, theirs = {}, {}
    prediction = model(**inputs, taps=ours)
    flax_model, variables, arrays = to_flax(model, inputs)
    reference = flax_apply(flax_model, variables, arrays, theirs)
    config = model.config
    expected = ["tokens", *(f"encoder/{i:02d}" for i in range(config.num_layers)), "encoder/norm", "queries"]
    expected += [*(f"decoder/{i:02d}" for i in range(config.decoder_layers)), "decoder/norm", "outputs"]
    assert list(ours) == list(theirs) == expected
    for tap in expected:
        assert difference(ours[tap], theirs[tap]) <= TOLERANCE, tap
    for field, x in prediction._asdict().items():
        assert x.shape == getattr(reference, field).shape == (2, 20, *{"uv": (2,)}.get(field, (3,)))[: x.ndim]
        assert difference(x, getattr(reference, field)) <= TOLERANCE, field


@pytest.mark.parametrize("name", LIVE)
def test_flax_initialises_the_same_parameters(name):
    model = build(name)
    inputs = clip(model)
    flax_model, variables, arrays = to_flax(model, inputs)
    shapes = jax.eval_shape(lambda key: flax_model.init(key, **arrays), jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)


@pytest.mark.parametrize("name", ["paper", pytest.param("seed", marks=pytest.mark.heavy)])
def test_gradients_match_flax(name):
    model = build(name)
    inputs = clip(model, patches=(40, 60))
    weights = [torch.randn_like(x) for x in model(**inputs)]
    sum((x * w).sum() for x, w in zip(model(**inputs), weights)).backward()
    flax_model, variables, arrays = to_flax(model, inputs)

    def loss(variables):
        return sum((x * w.numpy()).sum() for x, w in zip(flax_model.apply(variables, **arrays), weights))

    expected = jax.tree.leaves_with_path(jax.device_get(jax.jit(jax.grad(loss))(variables)["params"]))
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    got = dict(jax.tree.leaves_with_path(jax.device_get(flax_d4rt.flax_params(grads, model.config))))
    largest = max(abs(x).max() for _, x in expected)
    assert len(got) == len(expected)
    for path, want in expected:
        assert abs(got[path] - want).max() <= TOLERANCE * largest, jax.tree_util.keystr(path)


# A clip is encoded once, queries are independent


def test_encode_once_decode_often():
    model = build()
    inputs = clip(model)
    queries = inputs.pop("queries")
    calls = []
    for block in model.decoder.blocks:
        block.attention.key.register_forward_hook(lambda *_: calls.append(1))
    encoded = model.encode(**inputs)
    whole = model.decode(encoded, queries)
    halves = [model.decode(encoded, Queries(*(x[:, part] for x in queries))) for part in (slice(0, 7), slice(7, None))]
    assert len(calls) == model.config.decoder_layers
    assert close(whole, Prediction(*(torch.cat(parts, 1) for parts in zip(*halves))), 1e-6)
    assert equal(whole, model(queries=queries, **inputs))


def test_chunks_change_nothing_and_bound_the_memory():
    model = build()
    inputs = clip(model, queries=300)
    taps, chunked, widths = {}, {}, []
    want = model(**inputs, taps=taps)
    for module in (model.query_builder, *model.decoder.blocks):
        module.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    model.decoder.memory_budget = 128 * 2 * model.decoder.floats_per_query * 4
    got = model(**inputs, taps=chunked)
    assert set(widths) == {128, 300 - 2 * 128} and len(widths) == 9
    assert close(got, want, 1e-6)
    assert list(chunked) == list(taps) and all(chunked[name].shape == x.shape for name, x in taps.items())


def peak_of_tensors(function):
    """Bytes that live at once in a call, beyond what lived before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("name", ["paper", "seed"])
@torch.inference_mode()
def test_memory_does_not_grow_with_the_queries(name):
    model = build(name).eval()
    inputs = clip(model, batch=1, queries=4096)
    encoded = model.encode(inputs["video"])
    model.decoder.memory_budget = 2**20
    peak = peak_of_tensors(lambda: model.decode(encoded, inputs["queries"]))
    joined = 2 * 4096 * 13 * 4  # the chunks' outputs, and all of them
    assert 2**20 / 4 < peak <= 1.1 * 2**20 + joined


def test_a_query_hears_of_no_other():
    model = build()
    inputs = clip(model)
    want = model(**inputs)
    order = torch.randperm(20)
    got = model(**{**inputs, "queries": Queries(*(x[:, order] for x in inputs["queries"]))})
    assert close(got, Prediction(*(x[:, order] for x in want)), 1e-6)
    spoiled = inputs["queries"]._replace(uv=inputs["queries"].uv.clone())
    spoiled.uv[:, 5] = float("nan")
    got = model(**{**inputs, "queries": spoiled})
    others = torch.arange(20) != 5
    assert got.xyz[:, 5].isnan().all() and all(torch.equal(x[:, others], y[:, others]) for x, y in zip(got, want))


def test_a_clip_hears_of_no_other():
    model = build()
    inputs = clip(model)
    want = model(**inputs)
    video = inputs["video"].clone()
    video[1, 2, 3, 4] = float("nan")
    got = model(**{**inputs, "video": video})
    assert got.xyz[1].isnan().all() and torch.equal(got.xyz[0], want.xyz[0])


def test_no_queries():
    model = build()
    prediction = model(**clip(model, queries=0))
    assert prediction.xyz.shape == (2, 0, 3) and prediction.confidence.shape == (2, 0)


# The encoder


@pytest.mark.parametrize("name", ["paper", "window"])
def test_local_layers_keep_to_their_frame(name):
    model = build(name)
    local, everything = model.encoder.layers[:2]
    tokens = torch.randn(1, 3 * 24 + 1, 48)
    other = tokens.clone()
    other[:, 24:48] += 1  # the second of three frames
    same = [slice(0, 24), slice(48, 72), slice(72, 73)]  # the first, the third, the aspect-ratio token
    before, after = local(tokens), local(other)
    assert all(torch.equal(before[:, part], after[:, part]) for part in same)
    assert not torch.equal(before[:, 24:48], after[:, 24:48])
    before, after = everything(tokens), everything(other)
    assert all((before[:, part] != after[:, part]).any(-1).all() for part in same)


def test_frame_attention_is_full_attention_of_one_frame():
    model = build()
    layer = model.encoder.layers[0]
    frames = torch.randn(2, 3 * 24, 48)
    token = torch.randn(2, 1, 48)
    got = layer(torch.cat([frames, token], 1))
    alone = super(type(layer), layer).forward(frames.unflatten(1, (3, 24)).flatten(0, 1))
    assert difference(got[:, :-1], alone.unflatten(0, (2, 3)).flatten(1, 2)) <= 1e-6


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_the_last_frame_is_repeated_to_fill_its_patch(frames):
    model = build()
    inputs = clip(model, frames)
    longer = torch.cat([inputs["video"], inputs["video"][:, -1:]], 1)
    ratio = inputs["aspect_ratio"]
    assert torch.equal(model.encode(inputs["video"], ratio).features, model.encode(longer, ratio).features)
    assert model.encode(inputs["video"]).features.shape == (2, (frames + 1) // 2 * 24 + 1, 48)


def test_the_aspect_ratio_matters_and_is_that_of_the_frames_by_default():
    model = build()
    inputs = clip(model)
    video = inputs["video"]
    plain = model.encode(video).features
    assert torch.equal(plain, model.encode(video, torch.full((2,), 48 / 32)).features)
    assert not torch.equal(plain, model.encode(video, torch.full((2,), 2.0)).features)


# Patches


def test_patches_at_pixel_centres_are_the_pixels():
    model = build(centered=False)
    frames = torch.rand(1, 3, 30, 40, 3)
    y, x, t = torch.tensor([[4, 20, 25]]), torch.tensor([[4, 10, 35]]), torch.tensor([[0, 2, 1]])
    uv = torch.stack([(x + 0.5) / 40, (y + 0.5) / 30], -1)
    patches = model.query_builder.patches(Queries(uv, t, t, t), frames)
    for n in range(3):
        rows, columns = slice(y[0, n] - 4, y[0, n] + 5), slice(x[0, n] - 4, x[0, n] + 5)
        assert torch.allclose(patches[0, n], frames[0, t[0, n], rows, columns], atol=1e-5)


def test_patches_come_from_the_frames_given():
    model = build()
    inputs = clip(model, patches=(64, 96))
    frames = inputs.pop("patch_video")
    assert equal(model(**inputs), model(**inputs, patch_video=inputs["video"]))
    assert not equal(model(**inputs), model(**inputs, patch_video=frames))
    whole = (255 * frames).round()
    assert close(model(**inputs, patch_video=whole.byte()), model(**inputs, patch_video=whole / 255), 1e-6)


# Numbers


def test_autocast_answers_in_fp32():
    model = build()
    inputs = clip(model)
    want = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**inputs)
    sum(x.sum() for x in got).backward()
    assert all(x.dtype == torch.float32 for x in got)
    assert close(got, want, 16 * torch.finfo(torch.bfloat16).eps)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype(dtype):
    model = build()
    inputs = clip(model, patches=(40, 60))
    want = model(**inputs)
    got = model.to(dtype)(**inputs)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(x.dtype == wide for x in got)
    assert close(got, want, max(32 * torch.finfo(dtype).eps, 1e-5))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.heavy)])
@pytest.mark.parametrize("name", ["paper", "seed", pytest.param("window", marks=pytest.mark.heavy)])
def test_compiles_as_one_graph(name, backend):
    model = build(name)
    inputs = clip(model, patches=(40, 60))
    want = model(**inputs)
    sum(x.square().sum() for x in want).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    got = compiled(**inputs)
    sum(x.square().sum() for x in got).backward()
    assert close(got, want)
    largest = max(g.abs().max() for g in grads.values())
    for name, p in model.named_parameters():
        assert (p.grad - grads[name]).abs().max() <= TOLERANCE * largest, name


def test_compiled_under_autocast():
    model = build()
    inputs = clip(model)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(**inputs)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    assert all(x.dtype == torch.float32 for x in got) and close(got, want, 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", LIVE)
def test_cuda_matches_the_cpu(name):
    model = build(name)
    inputs = clip(model, patches=(40, 60))
    want = model(**inputs)
    got = model.cuda()(
        **{k: Queries(*(y.cuda() for y in x)) if k == "queries" else x.cuda() for k, x in inputs.items()}
    )
    assert all(difference(x.cpu(), y) <= 1e-4 for x, y in zip(got, want))


# Starting from scratch


def test_a_new_model_answers_the_middle_of_what_is_seen():
    torch.manual_seed(0)
    model = Model(Config(**SMALL))
    prediction = model(**clip(model))
    for field, start in {"xyz": [0.0, 0.0, 1.0], "uv": [0.5, 0.5], "visibility": 0.0, "normal": 0.0}.items():
        assert torch.allclose(getattr(prediction, field), torch.tensor(start), atol=0.1), field
    loss = sum(F.l1_loss(x, torch.ones_like(x)) for x in prediction)
    loss.backward()
    silent = [name for name, p in model.named_parameters() if not (p.grad.isfinite().all() and p.grad.any())]
    assert silent == []
    assert model.encoder.layers[0].mlp.dense_in.weight.std().item() == pytest.approx(0.0176, rel=0.05)  # 0.02, cut


def test_it_learns():
    """Answers that hang on every part of the query, learned from scratch to a third of where a constant stays."""
    torch.manual_seed(0)
    model = Model(Config(**{**SMALL, "num_layers": 2, "image_size": 16, "num_frames": 4}))
    inputs = clip(model, queries=128, batch=1)
    q = inputs["queries"]
    shade = inputs["video"][0, q.t_src[0], (q.uv[0, :, 1] * 16).long(), (q.uv[0, :, 0] * 16).long(), 0]
    want = torch.stack([q.uv[..., 0] + 0.3 * q.t_tgt, q.uv[..., 1] - 0.3 * q.t_cam, 1 + shade[None]], -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = F.l1_loss(model(**inputs).xyz, want)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    constant = F.l1_loss(want.median(1, keepdim=True).values.expand_as(want), want).item()
    assert losses[-1] < constant / 3


# Configs and files


def test_variants():
    """The paper's ViT-g has about 1 B parameters, and its eight decoder layers 144 M."""
    with torch.device("meta"):
        model = Model(Config.from_variant("g"))
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert model.config.grid == (24, 16, 16) and model.config.decoder_layers == 8
    assert count(model.encoder) == pytest.approx(1.0e9, rel=0.02)
    assert count(model.decoder) == pytest.approx(144e6, rel=0.02)
    for name in VARIANTS:
        config = Config.from_variant(name, num_frames=16)
        assert config.num_frames == 16 and 64 <= config.hidden_size // config.num_heads <= 88
        assert config.decoder_size // config.decoder_heads == 64 and 6 <= config.decoder_layers <= 8


@pytest.mark.parametrize("name", ["paper", "window", "seed"])
def test_on_meta(name):
    """Shapes alone, as a plan of memory wants them: a device without kernels and without autocast."""
    model = build(name).to("meta")
    inputs = clip(model)
    queries = Queries(*(x.to("meta") for x in inputs["queries"]))
    answers = model(inputs["video"].to("meta"), queries, inputs["aspect_ratio"].to("meta"))
    assert answers.xyz.is_meta and answers.xyz.shape == (*queries.t_src.shape, 3)


@pytest.mark.parametrize("name", ["global, joint positions", "seed"])
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_saved_and_loaded(tmp_path, name, dtype):
    model = build(name)
    inputs = clip(model)
    model.save_pretrained(tmp_path / "model", dtype=dtype)
    loaded = Model.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config and not loaded.training
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert Model.from_pretrained(tmp_path / "model", dtype=torch.float16).head.weight.dtype == torch.float16
    assert json.loads((tmp_path / "model/config.json").read_text())["model"] == "d4rt"
    got, want = loaded(**inputs), model(**inputs)
    assert equal(got, want) if dtype is None else close(got, want, 0.02) and not equal(got, want)
    reference, variables = flax_d4rt.from_pretrained(tmp_path / "model")
    theirs = flax_apply(reference, variables, to_flax(model, inputs)[2])
    assert all(difference(x, y) <= TOLERANCE for x, y in zip(got, theirs))


def test_half_precision_halves_the_file(tmp_path):
    model = build()
    sizes = []
    for name, dtype in (("whole", None), ("half", torch.float16)):
        model.save_pretrained(tmp_path / name, dtype=dtype)
        sizes.append((tmp_path / name / "model.safetensors").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_files_that_cannot_be_loaded(tmp_path):
    for load in (Model.from_pretrained, flax_d4rt.from_pretrained):
        with pytest.raises(CheckpointError, match="no config.json"):
            load(tmp_path / "none")
        model = build()
        model.save_pretrained(tmp_path / "model")
        weights, config = tmp_path / "model/model.safetensors", tmp_path / "model/config.json"
        text, data = config.read_text(), weights.read_bytes()
        config.write_text(text.replace('"num_bands"', '"bands"'))
        with pytest.raises(CheckpointError, match="bands: no such option"):
            load(tmp_path / "model")
        config.write_text(text)
        weights.write_bytes(data[: len(data) // 2])
        with pytest.raises(CheckpointError, match="not a complete safetensors file"):
            load(tmp_path / "model")
        config.write_text(text.replace('"decoder_layers": 2', '"decoder_layers": 3'))
        weights.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"missing decoder\.blocks\.2"):
            load(tmp_path / "model")


def test_configs_survive_json():
    for name in LIVE:
        config = build(name).config
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Config(**{**SMALL, "image_size": 64}).image_size == (64, 64)
    assert Config(**{**SMALL, "num_frames": 5}).grid == (3, 4, 6)
    assert Config.seed(num_frames=5).grid[0] == 2


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 0}, "hidden_size: expected a positive integer, got 0"),
        ({"decoder_layers": True}, "decoder_layers: expected a positive integer, got True"),
        ({"num_heads": 5}, "hidden_size: expected a multiple of num_heads 5, got 48"),
        ({"decoder_heads": 5}, "decoder_size: expected a multiple of decoder_heads 5, got 32"),
        ({"image_size": (32, 44)}, "image_size: expected multiples of the patch"),
        ({"image_size": (32,)}, "image_size: expected 2 positive integers"),
        ({"patch_size": 8}, "patch_size: expected 3 positive integers, got 8"),
        ({"num_frames": 1, "drop_last_frames": True}, "num_frames: expected at least one patch"),
        ({"local_attention": "full"}, "local_attention: expected one of frame, window, none, got 'full'"),
        ({"query_parts": (8, 8)}, "query_parts: expected 3 positive integers"),
        ({"norm_eps": 0}, "norm_eps: expected a positive number, got 0"),
    ],
)
def test_configs_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**{**SMALL, **fields})


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match="variant: expected one of tiny, S, B, L, H, g, got 'XL'"):
        Config.from_variant("XL")
    with pytest.raises(ValueError, match="num_layer: no such option"):
        Config.from_variant("S", num_layer=3)
    with pytest.raises(ValueError, match="hidden_size: missing"):
        Config.from_dict({"num_layers": 2, "num_heads": 2})


# Misuse


def _video(x):
    return {"video": x}


def _queries(**fields):
    return lambda inputs: {
        "queries": inputs["queries"]._replace(**{k: f(inputs["queries"]) for k, f in fields.items()})
    }


MISUSE = {
    "no batch axis": (lambda i: _video(i["video"][0]), "got (6, 32, 48, 3): the batch axis is missing"),
    "channels first": (lambda i: _video(i["video"].movedim(-1, 2)), "got (2, 6, 3, 32, 48)"),
    "size": (lambda i: _video(i["video"][:, :, :16]), "(B, 1 <= T <= 6, 32, 48, 3), got (2, 6, 16, 48, 3)"),
    "too long": (lambda i: _video(i["video"].repeat(1, 2, 1, 1, 1)), "got (2, 12, 32, 48, 3)"),
    "no frames": (lambda i: _video(i["video"][:, :0]), "got (2, 0, 32, 48, 3)"),
    "bytes": (lambda i: _video(i["video"].byte()), "video: expected a floating point dtype, got torch.uint8"),
    "array": (lambda i: _video(i["video"].numpy()), "video: expected a tensor"),
    "ratio's shape": (lambda i: {"aspect_ratio": torch.ones(3)}, "aspect_ratio: expected a tensor (B=2,)"),
    "ratio a number": (lambda i: {"aspect_ratio": 1.5}, "aspect_ratio: expected a tensor (B=2,), got 1.5"),
    "ratio below 0": (lambda i: {"aspect_ratio": torch.tensor([1.0, -1.0])}, "expected width / height above 0"),
    "ratio nan": (lambda i: {"aspect_ratio": torch.tensor([1.0, float("nan")])}, "expected width / height above 0"),
    "patches' frames": (lambda i: {"patch_video": i["video"][:, :3]}, "patch_video: expected (B=2, T=6, H, W, 3)"),
    "patches' axes": (lambda i: {"patch_video": i["video"][0]}, "patch_video: expected a tensor (B=2, T=6, H, W, 3)"),
    "uv's axes": (_queries(uv=lambda q: q.uv[0]), "queries.uv: expected floating (B=2, N, 2)"),
    "uv's dtype": (_queries(uv=lambda q: q.uv.long()), "queries.uv: expected floating (B=2, N, 2), got torch.int64"),
    "another batch": (lambda i: {"queries": Queries(*(x[:1] for x in i["queries"]))}, "got torch.float32 (1, 20, 2)"),
    "float times": (_queries(t_tgt=lambda q: q.t_tgt.float()), "queries.t_tgt: expected int64 (B, N) = (2, 20)"),
    "fewer times": (_queries(t_cam=lambda q: q.t_cam[:, :3]), "queries.t_cam: expected int64 (B, N) = (2, 20)"),
    "after the end": (_queries(t_src=lambda q: q.t_src + 6), "queries.t_src: expected frames in [0, 5], got"),
    "before the start": (_queries(t_tgt=lambda q: q.t_tgt - 6), "queries.t_tgt: expected frames in [0, 5], got"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_named(name):
    spoil, message = MISUSE[name]
    model = build()
    inputs = clip(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**{**inputs, **spoil(inputs)})
