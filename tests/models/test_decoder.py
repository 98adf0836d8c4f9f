"""CrossDecoder of models/layers.py: the goldens of two D4RT ports, chunks, gradients, its Flax mirror, compile, autocast."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fourdperf.models.layers import CrossBlock, CrossDecoder

GOLDENS = Path(__file__).parents[1] / "goldens" / "d4rt"
PORT_A = (
    ("norm1", "attention_norm"),
    ("norm2", "mlp_norm"),
    ("cross_attn.out_proj", "attention.out"),
    ("ffn.0", "mlp.dense_in"),
    ("ffn.3", "mlp.dense_out"),
)
PORT_B = (
    ("norm1", "attention_norm"),
    ("norm2", "mlp_norm"),
    ("norm_kv", "memory_norm"),
    ("cross_attn.q_proj", "attention.query"),
    ("cross_attn.k_proj", "attention.key"),
    ("cross_attn.v_proj", "attention.value"),
    ("cross_attn.proj", "attention.out"),
    ("mlp.fc1", "mlp.dense_in"),
    ("mlp.fc2", "mlp.dense_out"),
)


def load(name):
    with np.load(GOLDENS / f"{name}.npz") as golden:
        arrays = {key: torch.from_numpy(golden[key]) for key in golden.files if key != "config"}
        return json.loads(str(golden["config"])), arrays


def ours(key, names):
    """Our name of a port's parameter; the fused projection of port A is split by the caller."""
    for theirs, mine in names:
        key = key.replace(theirs + ".", mine + ".")
    return key.replace("layers.", "blocks.")


def converted(params, names):
    """A port's parameters, or their gradients, under our names."""
    result = {}
    for key, x in params.items():
        if "in_proj" in key:
            stem, kind = key.split("cross_attn.in_proj_")
            for part, name in zip(x.chunk(3), ("query", "key", "value")):
                result[f"{stem.replace('layers.', 'blocks.')}attention.{name}.{kind}"] = part
        else:
            result[ours(key, names)] = x
    return result


def prefixed(arrays, prefix):
    return {key.removeprefix(prefix): x for key, x in arrays.items() if key.startswith(prefix)}


def check(name, got, want, allowed):
    error = (got.detach() - want).abs().max().item()
    assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("budget", [2**28, 1], ids=["one_chunk", "small_chunks"])
@pytest.mark.parametrize("name", ["a_decoder", "a_decoder_mask"])
def test_port_a(name, budget):
    """Outputs and every gradient of the genuine decoder; its head is one linear layer."""
    config, golden = load(name)
    params = prefixed(golden, "params/")
    decoder = CrossDecoder(
        config["d_model"],
        config["num_layers"],
        config["nhead"],
        config["dim_feedforward"],
        eps=1e-5,
        approximate="none",
        memory_budget=budget,
    )
    head = {key: params.pop(f"output_proj.{key}").requires_grad_() for key in ("weight", "bias")}
    decoder.load_state_dict(converted(params, PORT_A))
    queries, features = (golden[f"in/{key}"].requires_grad_() for key in ("queries", "encoder_features"))
    mask = golden["in/encoder_mask"].bool() if "in/encoder_mask" in golden else None
    tokens = decoder(queries, decoder.prepare(features, mask))
    outputs = F.linear(tokens, **head)
    check("query_features", tokens, golden["out/query_features"], config["atol"]["out/query_features"])
    check("outputs", outputs, golden["out/outputs"], config["atol"]["out/outputs"])
    cotangents = [
        golden.get(f"in/cot/{key}", torch.zeros_like(x))
        for key, x in (("outputs", outputs), ("query_features", tokens))
    ]
    torch.autograd.backward([outputs, tokens], cotangents)
    check("d_queries", queries.grad, golden["grad/queries"], config["atol"]["grad/queries"])
    check("d_features", features.grad, golden["grad/encoder_features"], config["atol"]["grad/encoder_features"])
    grads = converted({k: x for k, x in prefixed(golden, "grad/params/").items() if "output_proj" not in k}, PORT_A)
    allowed = converted({k: torch.full_like(params[k], config["atol"][f"grad/params/{k}"]) for k in params}, PORT_A)
    for key, parameter in decoder.named_parameters():
        check(key, parameter.grad, grads[key], allowed[key].flatten()[0].item())


def test_port_b_block():
    """Its keys and values come from normed features, every block with its own norm."""
    config, golden = load("b_decoder_block")
    width = config["dim"]
    block = CrossBlock(width, config["num_heads"], int(width * config["mlp_ratio"]), width, True, 1e-5, "none")
    block.load_state_dict(converted(prefixed(golden, "params/"), PORT_B))
    query, features = (golden[f"in/{key}"].requires_grad_() for key in ("query", "encoder_features"))
    y = block(query, *block.prepare(features))
    y.backward(golden["in/cot/y"])
    check("y", y, golden["out/y"], config["atol"]["out/y"])
    check("d_query", query.grad, golden["grad/query"], config["atol"]["grad/query"])
    check("d_features", features.grad, golden["grad/encoder_features"], config["atol"]["grad/encoder_features"])


def test_port_b_decoder():
    """From its query embedding to its first head (the activations of the others are the model's)."""
    config, golden = load("b_decoder")
    width, params = config["embed_dim"], prefixed(golden, "params/")
    decoder = CrossDecoder(
        width,
        config["depth"],
        config["num_heads"],
        int(width * config["mlp_ratio"]),
        norm_memory=True,
        eps=1e-5,
        approximate="none",
    )
    blocks = {key: x for key, x in params.items() if key.startswith(("blocks.", "norm."))}
    decoder.load_state_dict(converted(blocks, PORT_B))
    tokens = decoder(golden["out/query"], decoder.prepare(golden["in/encoder_features"]))
    position = F.linear(tokens, params["head_3d.weight"], params["head_3d.bias"])
    check("pos_3d", position, golden["out/pos_3d"], config["atol"]["out/pos_3d"])


def small(**options):
    torch.manual_seed(0)
    return CrossDecoder(32, 2, 4, 48, memory_features=24, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_chunks_change_nothing(dtype):
    decoder = small().to(dtype).eval()
    memory = decoder.prepare(torch.randn(2, 50, 24, dtype=dtype))
    queries = torch.randn(2, 300, 32, dtype=dtype)
    want = decoder(queries, memory)
    per_query = 2 * decoder.floats_per_query * queries.element_size()
    for chunk in (64, 128, 192):
        decoder.memory_budget = chunk * per_query
        got = decoder(queries, memory)
        # attention is bit-identical; a linear layer of another number of rows may add in another order
        assert (got - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def test_memory_is_projected_once_and_padding_is_ignored():
    decoder = small()
    features, queries = torch.randn(2, 50, 24), torch.randn(2, 9, 32)
    mask = torch.zeros(2, 50, dtype=torch.bool)
    mask[:, 40:] = True
    calls = []
    for block in decoder.blocks:
        block.attention.key.register_forward_hook(lambda *args: calls.append(1))
    memory = decoder.prepare(features, mask)
    want = decoder(queries, memory)
    decoder(queries, memory)
    assert len(calls) == len(decoder.blocks)
    assert torch.allclose(decoder(queries, decoder.prepare(features[:, :40])), want, atol=1e-6)


def test_flax_mirror_layer_by_layer():
    jnp, layers = pytest.importorskip("jax.numpy"), pytest.importorskip("fourdperf.jax.models.layers")
    decoder = small(norm_memory=True)
    mirror = layers.CrossDecoder(32, 2, 4, 48, norm_memory=True)
    features, queries = torch.randn(2, 50, 24), torch.randn(2, 9, 32)
    mask = torch.rand(2, 50) < 0.3
    tree = {}
    for key, x in decoder.state_dict().items():
        *path, kind = key.replace("blocks.", "blocks_").split(".")
        x = x.numpy()
        if path[-1].endswith("norm"):
            kind = {"weight": "scale"}.get(kind, kind)
        elif kind == "weight":
            x, kind = x.T, "kernel"
        if path[-1] in ("query", "key", "value"):
            x = x.reshape(*x.shape[:-1], 4, 8)
        elif path[-1] == "out" and kind == "kernel":
            x = x.reshape(4, 8, 32)
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node[kind] = jnp.asarray(x)
    want, got = {}, {}
    decoder(queries, decoder.prepare(features, mask), taps=want)
    mirror.apply({"params": tree}, *(jnp.asarray(x.numpy()) for x in (queries, features, mask)), got)
    assert list(want) == list(got) == ["decoder/00", "decoder/01", "decoder/norm"]
    for name, x in want.items():
        assert np.abs(np.asarray(got[name]) - x.detach().numpy()).max() <= 5e-6, name


def test_compile_and_autocast():
    decoder = small()
    features, queries = torch.randn(2, 50, 24), torch.randn(2, 9, 32)
    run = lambda queries, features: decoder(queries, decoder.prepare(features))
    want = run(queries, features)
    assert torch.allclose(torch.compile(run, fullgraph=True, backend="aot_eager")(queries, features), want, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = run(queries, features)
    assert torch.allclose(half.float(), want, atol=0.1)
