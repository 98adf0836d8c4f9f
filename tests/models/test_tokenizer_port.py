"""Tokenizers and generators of pictures against the numbers of the seed's code and of TiTok's, real sizes included."""

import pytest
import torch
import torch.nn.functional as F

from fourdperf.convert.tokenizer import GENERATOR, MASKGIT_VQGAN, TITOK, TOKENIZER
from fourdperf.models import tokenizer
from fourdperf.models.quantizer import VectorQuantizer, entropy, soft_choices
from fourdperf.models.titok import TiTok
from fourdperf.models.token_blocks import Block, sincos_positions
from fourdperf.models.token_generator import mask_tokens
from fourdperf.models.tokenizer import Decoder
from tests.models.tokenizer_cases import Case, first, last, names


def gradients(module, renamed):
    """The parameters' gradients by upstream's names: `renamed` takes tensors by our names to those."""
    return renamed({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()})


def weighted(case, outputs):
    """The scalar that the file's gradients belong to."""
    return sum((x * case.inputs[f"cot/{name}"]).sum() for name, x in outputs.items())


def check_norms(case, grads, prefix=""):
    """Norms of gradients, to the file's tolerance as in the README's table.

    That is the worst of all arrays relative to their largest values: a norm's own figure is one draw of noise, not the
    largest of many. Where that of a norm is next to nothing the gradient is zero but for rounding.
    """
    atol = {key: x for key, x in case.spec["atol"].items() if key.startswith("grad/")}
    arrays = {f"grad/{key}": x for key, x in case.grads.items() if x.ndim}
    relative = max(atol[key] / x.abs().max().item() for key, x in arrays.items())
    largest = max(x.item() for key, x in case.grads.items() if key.startswith("norm/"))
    assert relative < 5e-5
    for key, want in case.grads.items():
        if key.startswith("norm/"):
            norm = grads[prefix + key.removeprefix("norm/")].norm().item()
            zero = atol[f"grad/{key}"] < 1e-8 * largest
            assert abs(norm - want.item()) <= relative * (largest if zero else want.item()), key


# ---- the seed's


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (16, 16)], ids=str)
def test_positions(size):
    Case("c_pos_embed").check(f"pos_{size[0]}x{size[1]}", sincos_positions(32, *size))


@pytest.mark.parametrize("name", names("c_encoder_vit"))
def test_encoder(name):
    case = Case(name)
    spec = case.spec
    config = tokenizer.Config.upstream(
        pretrained=False,
        **{
            "image_size": spec["image_size"],
            "patch_size": spec["patch_size"],
            "num_latents": spec["num_latent_tokens"],
        },
        **{"latent_channels": spec["token_size"], "hidden_size": spec["model_width"], "num_layers": spec["depth"]},
        **{"num_heads": spec["heads"], "mlp_size": spec["mlp_dim"], "head_dim": spec["dim_head"], "grid": 1},
    )
    encoder = tokenizer.Tokenizer(config).encoder
    load(encoder, TOKENIZER, config, {f"encoder.{key}": x for key, x in case.params.items()}, "encoder.")
    images = case.inputs["img"].requires_grad_()
    latents = last(encoder(first(images)))
    case.check("latent", latents)
    weighted(case, {"latent": latents}).backward()
    case.check("img", images.grad, "grad")


def load(module, family, config, state, prefix):
    """Fill a part of a model from upstream's tensors by the table's rows below `prefix`."""
    rows = [row for row in family.table(config) if row.key.startswith(prefix)]
    assert {name for row in rows for name, _ in row.sources} == set(state)
    packed = {row.key: row.pack([state[name].numpy() for name, _ in row.sources]) for row in rows}
    module.load_state_dict({key.removeprefix(prefix): torch.from_numpy(x) for key, x in packed.items()})
    return rows


def unload(rows, prefix, tensors):
    """Tensors by our names within the part, as upstream has them."""
    return {
        name: torch.from_numpy(part)
        for row in rows
        for (name, _), part in zip(row.sources, row.unpack(tensors[row.key.removeprefix(prefix)].numpy()))
    }


def test_decoder():
    """Picture, and the gradient in every parameter."""
    case = Case("c_decoder")
    spec = case.spec
    config = tokenizer.Config.upstream(
        **{
            "image_size": spec["resolution"],
            "patch_size": spec["patch_size"],
            "num_latents": spec["num_latent_tokens"],
        },
        **{"latent_channels": spec["token_size"], "decoder_size": spec["model_width"], "decoder_channels": spec["ch"]},
        **{"channel_multipliers": spec["ch_mult"], "res_blocks": spec["num_res_blocks"]},
        attention_sizes=spec["attn_resolutions"],
    )
    decoder = Decoder(config)
    rows = load(decoder, TOKENIZER, config, {f"decoder.{key}": x for key, x in case.params.items()}, "decoder.")
    z = case.inputs["z"].requires_grad_()
    image = last(decoder(first(z)))
    case.check("image", image)
    weighted(case, {"image": image}).backward()
    case.check("z", z.grad, "grad")
    grads = gradients(decoder, lambda x: unload(rows, "decoder.", x))
    assert {key for key in case.grads if key.startswith("norm/")} == {f"norm/{key}" for key in case.params}
    check_norms(case, grads, "decoder.")


@pytest.mark.parametrize("name", names("c_quantizer"))
def test_quantizer(name):
    """Codes, losses, both gradients, and the codebook that is overwritten."""
    case = Case(name)
    spec = case.spec
    quantizer = VectorQuantizer(
        *(spec["n_e"], spec["e_dim"]),
        normalize=spec.get("normalize_embedding", False),
        beta=spec["beta"],
        beta_on="codebook" if spec["legacy"] else "commitment",
        entropy_gamma=spec.get("diversity_gamma"),
        in_place=True,
    )
    quantizer.load_state_dict({"codebook": case.params["embedding.weight"]})
    quantizer.train(spec.get("train", False))
    z = case.inputs["z"].requires_grad_()
    found = quantizer(z.permute(0, 2, 3, 1))
    outputs = {
        "z_q": found.quantized.permute(0, 3, 1, 2),
        "loss": found.losses["commitment"] + found.losses["codebook"],
    }
    if "entropy" in found.losses:
        outputs["entropy_loss"] = found.losses["entropy"]
    assert set(outputs) == {key.removeprefix("cot/") for key in case.inputs if key.startswith("cot/")}
    for key, x in outputs.items():
        case.check(key, x)
    case.check("indices", found.indices.view_as(case.outputs["indices"]))
    if "entry" in case.outputs:
        case.check("entry", quantizer.lookup(found.indices).permute(0, 3, 1, 2))
    else:
        case.check("embedding_after", quantizer.codebook)
    weighted(case, outputs).backward()
    case.check("z", z.grad, "grad")
    case.check("params/embedding.weight", quantizer.codebook.grad, "grad")


def test_entropy():
    case = Case("c_small_losses")
    case.check("entropy", entropy(case.inputs["prob"]))


def test_tokenizer():
    case = Case("c_tokenizer")
    model, images, taps = TOKENIZER.load_state(case.params, {"head_dim": 8}), (first(case.inputs["x"]) + 1) / 2, {}
    recon, encoded = model(images, taps)
    case.check("encoder", last(taps["encoder/latents"]))
    case.check("quant", last(encoded.latents))
    case.check("codebook_loss", encoded.losses["commitment"] + encoded.losses["codebook"])
    case.check("indices", encoded.indices.flatten())
    case.check("reconstruction", last(2 * recon - 1))
    case.check("decode_code", last(2 * model.decode_indices(case.inputs["codes"][:, 0]) - 1))
    case.check("entropy_loss_train", model.train().encode(images).losses["entropy"])


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["c_real_scratch_recipe", "c_real_pretrainedpath_recipe"])
def test_real_tokenizer(name):
    case, taps = Case(name), {}
    model = TOKENIZER.load_state(case.params)
    with torch.no_grad():
        recon, encoded = model((first(case.inputs["x"]) + 1) / 2, taps)
        again = model.decode_indices(case.inputs["codes"][:, 0])
    case.check("pre_norm", last(taps["encoder/latents"]))
    case.check("quant", last(encoded.latents))
    case.check("indices", encoded.indices.flatten())
    case.check("reconstruction_sub", last(2 * recon - 1)[:, :, ::4, ::4])
    case.check("reconstruction_mean", (2 * recon - 1).mean((1, 2)))
    case.check("decode_code_sub", last(2 * again - 1)[:, :, ::4, ::4])


# ---- TiTok


def test_blocks():
    case, case_x = Case("d_blocks"), {}
    x, skip = (case.inputs[name].requires_grad_() for name in ("x", "skip"))
    for name, options in (("res", {}), ("uvit", {"qkv_bias": False}), ("uvit_skip", {"qkv_bias": False, "skip": True})):
        mlp = 128 if name == "res" else 64
        block, names_ = Block(32, 4, mlp, **options), block_names(name == "res", name == "uvit_skip")
        state = {key.removeprefix(f"{name}."): y for key, y in case.params.items() if key.startswith(f"{name}.")}
        assert set(state) == set(names_.values())
        block.load_state_dict({ours: state[theirs] for ours, theirs in names_.items()})
        case_x[name] = block, names_, block(x, skip) if name == "uvit_skip" else block(x)
        case.check(name, case_x[name][2])
    weighted(case, {name: out for name, (_, _, out) in case_x.items()}).backward()
    case.check("x", x.grad, "grad")
    case.check("skip", skip.grad, "grad")
    for name, (block, names_, _) in case_x.items():
        for ours, p in block.named_parameters():
            case.check(f"params/{name}.{names_[ours]}", p.grad, "grad")


def block_names(clip, skip):
    """Our names of a block's parameters to TiTok's."""
    modules = {
        "attention_norm": ("ln_1", "norm1"),
        "mlp_norm": ("ln_2", "norm2"),
        "attention.out": ("attn.out_proj", "attn.proj"),
    }
    modules |= {"mlp.dense_in": ("mlp.c_fc", "mlp.fc1"), "mlp.dense_out": ("mlp.c_proj", "mlp.fc2")}
    found = {f"{a}.{k}": f"{b[0 if clip else 1]}.{k}" for a, b in modules.items() for k in ("weight", "bias")}
    if clip:
        found |= {f"attention.qkv.{kind}": f"attn.in_proj_{kind}" for kind in ("weight", "bias")}
    else:
        found |= {"attention.qkv.weight": "attn.qkv.weight"}
    return found | {f"skip.{kind}": f"skip_linear.{kind}" for kind in ("weight", "bias") if skip}


def titok(case):
    heads = case.spec.get("heads", 4)
    return TITOK.load_state(case.params, {"num_heads": heads, "decoder_heads": heads, **titok_quantizer(case)})


def titok_quantizer(case):
    return {"normalize": case.spec["config"]["model"]["vq_model"]["use_l2_norm"]}


@pytest.mark.parametrize("name", ["d_titok_vq_legacy", "d_titok_vq_finetuned", "d_titok_vq_nonlegacy"])
def test_titok(name):
    case, taps = Case(name), {}
    model = titok(case)
    out, encoded = model(first(case.inputs["x"]), taps)
    case.check("z", last(taps["encoder/latents"]))
    case.check("z_quantized", last(encoded.latents))
    case.check("indices", encoded.indices[:, None])
    case.check("decoder", last(taps["decoder/out"]))
    case.check("image", last(out))
    case.check("decode_tokens", last(model.decode_indices(case.inputs["codes"])))
    finetuned = "finetuned" in name
    assert (encoded.losses == {}) == finetuned
    frozen = {key.partition(".")[0] for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"encoder", "quantizer"} if finetuned else set())
    if not finetuned:
        case.check("commitment_loss", encoded.losses["commitment"])
        case.check("codebook_loss", encoded.losses["codebook"])
        case.check("quantizer_loss", sum(encoded.losses.values()))


def test_titok_vae():
    case, taps = Case("d_titok_vae"), {}
    model, images = titok(case), first(case.inputs["x"])
    out = model(images, taps)
    case.check("moments", last(taps["encoder/latents"]))
    mean, log_variance = out.encoded.moments
    case.check("mean", last(mean))
    case.check("logvar", last(log_variance))
    case.check("std", last((0.5 * log_variance).exp()))
    case.check("kl", out.encoded.losses["kl"])
    case.check("image", last(out.recon))  # upstream decodes the mean too
    assert torch.equal(out.encoded.latents, mean) and out.encoded.indices is None
    case.check("sample", last(model.encode(images, noise=first(case.inputs["noise"])).latents))


def test_titok_gradients():
    case = Case("d_titok_grads")
    config = titok_grads_config(case)
    model = TiTok(config)
    rows = [row for row in TITOK.table(config) if not row.key.startswith("quantizer.")]
    state = {
        row.key: torch.from_numpy(row.pack([case.params[name].numpy() for name, _ in row.sources])) for row in rows
    }
    assert model.load_state_dict(state, strict=False).missing_keys == ["quantizer.codebook"]
    x, latents = (case.inputs[name].requires_grad_() for name in ("x", "zq"))
    outputs = {"z": last(model.encoder(first(x))), "dec": last(model.decode(first(latents)))}
    for name, out in outputs.items():
        case.check(name, out)
    weighted(case, outputs).backward()
    case.check("x", x.grad, "grad")
    case.check("zq", latents.grad, "grad")
    grads = gradients(model, lambda tensors: unload(rows, "", tensors))
    for key in case.grads:
        if key.startswith("params/"):
            case.check(key, grads[key.removeprefix("params/")], "grad")
    assert {key for key in case.grads if key.startswith("norm/")} == {f"norm/{key}" for key in case.params}
    check_norms(case, grads)


def titok_grads_config(case):
    spec, vq = case.spec, case.spec["config"]["model"]["vq_model"]
    return TiTok.CONFIG(
        **{
            "image_size": 24,
            "patch_size": 8,
            "num_latents": vq["num_latent_tokens"],
            "latent_channels": vq["token_size"],
        },
        **{"hidden_size": spec["width"], "num_layers": spec["layers"], "num_heads": spec["heads"]},
        **{"decoder_size": spec["width"], "decoder_layers": spec["layers"], "decoder_heads": spec["heads"]},
    )


@pytest.mark.parametrize("name", names("d_quantizer"))
def test_titok_quantizer(name):
    case = Case(name)
    spec = case.spec
    options = {"normalize": spec["use_l2_norm"], "beta": spec["commitment_cost"]}
    quantizer = VectorQuantizer(spec["codebook_size"], spec["token_size"], **options)
    quantizer.load_state_dict({"codebook": case.params["embedding.weight"]})
    z = case.inputs["z"].requires_grad_()
    flat = z.permute(0, 2, 3, 1)
    found = quantizer(F.normalize(flat, dim=-1) if spec["use_l2_norm"] else flat)
    outputs = {"z_q": found.quantized.permute(0, 3, 1, 2), "quantizer_loss": sum(found.losses.values())}
    for key, x in outputs.items():
        case.check(key, x)
    case.check("commitment_loss", found.losses["commitment"])
    case.check("codebook_loss", found.losses["codebook"])
    case.check("min_encoding_indices", found.indices)
    weighted(case, outputs).backward()
    case.check("z", z.grad, "grad")
    case.check("params/embedding.weight", quantizer.codebook.grad, "grad")


def test_maskgit_vqgan():
    case, taps = Case("d_maskgit_vqgan"), {}
    model = MASKGIT_VQGAN.load_state(case.params)
    recon, encoded = model(first(case.inputs["x"]), taps)
    case.check("h", last(taps["latents"]))
    case.check("z_q", last(encoded.latents))
    case.check("indices", encoded.indices.flatten(1))
    case.check("loss", sum(encoded.losses.values()))
    case.check("image", last(recon))
    case.check("codes_image", last(model.decode_indices(encoded.indices)))
    soft = soft_choices(taps["latents"].flatten(0, 2), model.quantizer.codes(), 2.0)  # upstream's temperature
    case.check("soft_code", soft.view(2, 64, -1))


@pytest.mark.heavy
@pytest.mark.parametrize("name", names("d_real_titok"))
def test_real_titok(name):
    case, taps = Case(name), {}
    model = TITOK.load_state(case.params)
    with torch.no_grad():
        out = model(first(case.inputs["x"]), taps)
        again = model.decode_indices(case.inputs["codes"])
    case.check("z", last(taps["encoder/latents"]))
    case.check("indices", out.encoded.indices[:, None])
    case.check("decoder_sub", last(taps["decoder/out"])[:, ::8, ::2, ::2])
    case.check("image_sub", last(out.recon)[:, :, ::4, ::4])
    case.check("decode_tokens_sub", last(again)[:, :, ::4, ::4])


# ---- generators


def generator(case, **overrides):
    heads = case.spec["config"]["model"]["generator"]["num_attention_heads"]
    return GENERATOR.load_state(case.params, {"num_heads": heads, **overrides})


@pytest.mark.parametrize("name", ["d_imagebert", "d_uvit"])
def test_logits(name):
    case = Case(name)
    model, ids, classes = generator(case), case.inputs["input_ids"], case.inputs["condition"]
    case.check("logits_cond", model(ids, classes))
    case.check("logits_uncond", model(ids))
    drop = torch.tensor([True, False, True])
    mixed, (cond, uncond) = model(ids, classes, drop=drop), (case.outputs[f"logits_{x}"] for x in ("cond", "uncond"))
    case.outputs["logits_cond"] = torch.where(drop[:, None, None], uncond, cond)
    case.check("logits_cond", mixed)


@pytest.mark.parametrize("name", names("d_generate"))
def test_generation(name):
    """The ids that enter every step, and the last."""
    case, taps = Case(name), {}
    spec = case.spec["generate"]
    steps = spec["num_sample_steps"]
    options = {
        **{"steps": steps, "guidance": spec["guidance_scale"], "schedule": spec["guidance_decay"]},
        **{"temperature": spec["randomize_temperature"], "anneal": spec.get("softmax_temperature_annealing", False)},
        "guidance_power": spec.get("guidance_scale_pow", 1.0),
    }
    uniforms = [[case.inputs[f"uniform_{2 * step + part}"] for part in range(2)] for step in range(steps)]
    ids = generator(case).generate(case.inputs["condition"], **options, uniforms=uniforms, taps=taps)
    for step in range(steps):
        case.check(f"ids_step_{step}", taps[f"ids/{step:02d}"])
    case.check("ids", ids)
    again = generator(case, **options).generate(case.inputs["condition"], uniforms=uniforms)
    assert torch.equal(again, ids)


def test_training_mask():
    case = Case("d_masking")
    options = {"timesteps": case.inputs["timesteps"], "random": case.inputs["random"]}
    masked, masks = mask_tokens(case.inputs["ids"], case.spec["mask_token_id"], **options)
    case.check("masked", masked)
    case.check("masks", masks.long())


def test_real_generator():
    case = Case("d_real_generator_l32_recipe")
    with torch.no_grad():
        logits = GENERATOR.load_state(case.params)(case.inputs["input_ids"], case.inputs["condition"])
    case.check("logits_sub", logits[..., ::16])
