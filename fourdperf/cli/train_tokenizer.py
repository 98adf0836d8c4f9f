"""``fourdperf train tokenizer``: pictures to a short sequence of codes and back, the seed's way or TiTok's.

Without --data_path and --variant it learns from pictures made here, with sizes for minutes on two cores.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fourdperf.cli.training import (
    check_at_least_one,
    check_positive,
    check_run,
    check_shares,
    fit_run,
    make_trainer,
    quiet,
)
from fourdperf.data.files import output_folder

if TYPE_CHECKING:
    from fourdperf.models.maskgit_vqgan import MaskGITVQGAN
    from fourdperf.models.titok import TiTok
    from fourdperf.models.tokenizer import Tokenizer

__all__ = ["tokenizer"]

SMALL = {"patch_size": 8, "num_latents": 32, "hidden_size": 192, "num_layers": 4, "num_heads": 3}
SMALL |= {"codebook_size": 1024, "latent_channels": 8, "restart": 20}
TINY: dict[str, Mapping[str, Any]] = {
    "tokenizer": {
        **SMALL,
        **{"mlp_size": 768, "decoder_size": 192, "decoder_channels": 32},
        **{"channel_multipliers": (1, 1, 2, 2), "res_blocks": 1, "attention_sizes": (8,)},
    },
    "titok": {**SMALL, "decoder_size": 192, "decoder_layers": 4, "decoder_heads": 3},
}


def tokenizer(
    data_path: str | None = None,
    family: Literal["tokenizer", "titok"] = "tokenizer",
    variant: str = "tiny",
    image_size: int | None = None,
    model: dict[str, Any] | None = None,
    stage: Literal["1", "2"] | None = None,
    target: Path | None = None,
    init_encoder: str | None = None,
    init_weights: Path | None = None,
    pretrained: Path | None = None,
    loss: dict[str, Any] | None = None,
    lpips_vgg: Path | None = None,
    lpips_linear: Path | None = None,
    features: str | None = None,
    features_weights: Path | None = None,
    discriminator: Literal["patch", "titok", "none"] = "patch",
    discriminator_width: int | None = None,
    discriminator_layers: int | None = None,
    discriminator_lr: float = 1.0,
    augment: bool = True,
    batch_size: int = 16,
    max_steps: int = 1500,
    minutes: float | None = None,
    lr: float = 1e-3,
    final_lr: float | None = None,
    warmup_steps: int | None = None,
    weight_decay: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    optimizer: Literal["adamw", "muon"] = "adamw",
    clip: float = 1.0,
    ema: float = 0.0,
    devices: int = 1,
    num_nodes: int = 1,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    accumulate_grad_batches: int = 1,
    ckpt: Path | None = None,
    out: Path = Path("tokenizer_run"),
    seed: int = 0,
    workers: int = 0,
    log_every: int = 20,
    val_every: int = 250,
    val_items: int = 256,
    save_every: int = 250,
) -> None:
    """Trains a one-dimensional tokenizer of pictures.

    Writes to the folder --out: last.ckpt (everything, to go on from with --ckpt), model (config and weights for
    from_pretrained), train.csv, val.csv, reconstructions.png, codes.png, curves, TensorBoard logs where that is
    installed, and options.json.

    Args:
        data_path: A folder of images, a list of files (.txt), WebDataset shards (.tar; fourdperf image_shards writes
            them) or HDF5 (.h5); without it, synthetic scenes and photographs that come with scikit-learn.
        family: tokenizer, the seed's (ViT, convolutional decoder); or titok (a ViT on either side).
        variant: The size of the model: tiny; small, base or large for tokenizer, of TiTok a release's such as b64.
        image_size: Height and width; by default 64 for tiny, else 256.
        model: Fields of the model's config that differ from the variant's: --model.num_latents, --model.codebook_size,
            --model.mode vae.
        stage: For titok, 1 to learn the codes of --target, 2 to learn pixels with its decoder on --pretrained, a run
            of stage 1; by default pixels at once.
        target: A folder with MaskGIT's VQGAN (fourdperf convert maskgit_vqgan).
        init_encoder: Start the encoder from mae, clip, dino, dinov2, depth_anything_v2, 4ds or image_mae.
        init_weights: The file or folder with its weights; by default in the caches of torch and Hugging Face.
        pretrained: A folder with a model, or a run, to start from, in place of --family, --variant and --model.
        loss: Weights of the loss that differ from the seed's: --loss.l1, l2, perceptual, features, codebook, entropy,
            entropy_final, entropy_steps, kl, adversarial, adaptive, start, discriminator_loss, lecam. start and
            entropy_steps are 5000 steps, but at most half of all.
        lpips_vgg: torchvision's vgg16-397923af.pth for the perceptual loss; by default in torch's cache. Without it an
            L1 of Laplacian pyramids stands in, and a warning says so.
        lpips_linear: richzhang's vgg.pth; by default of the packages lpips or torchmetrics.
        features: A frozen encoder for --loss.features, named as --init_encoder; of the sizes of tiny, small, base or
            large as --variant says, else base.
        features_weights: Its weights.
        discriminator: patch (the seed's, BatchNorm), titok (TiTok's own, GroupNorm), or none.
        discriminator_width: Channels of its first layer; by default 32 for tiny, else 64, of titok 128.
        discriminator_layers: How often it halves the picture; by default 2 for tiny, else 3.
        discriminator_lr: Its learning rate, as a multiple of --lr.
        augment: Cut and mirror pictures at random.
        batch_size: Pictures per process and batch.
        max_steps: Optimiser steps.
        minutes: Stop after this time with a checkpoint; the learning rate still follows the steps.
        lr: The peak learning rate; the seed's and TiTok's is 1e-4.
        final_lr: The learning rate at the first and the last step; by default a tenth of --lr.
        warmup_steps: Steps to the peak; by default 2500, but at most a tenth of all.
        weight_decay: Of either optimiser.
        betas: Of AdamW; the seed's are 0.5 and 0.9.
        optimizer: adamw, or muon for the blocks' matrices and adamw for the rest: a small model learns in far fewer
            steps, with --lr of about 2e-3.
        clip: The largest L2 norm of the gradient, of each of the two networks.
        ema: How much of the parameters' moving average stays in a step; 0 for no averaging.
        devices: Processes per node, one per device.
        num_nodes: Nodes, under torchrun or SLURM.
        accelerator: Where to train.
        strategy: How several devices share the work: ddp, each with the whole model; fsdp, each with a part of the
            parameters, on GPUs or CPUs. A single process can go on from a checkpoint of either.
        precision: Number type of the computation; codes are searched for in fp32.
        accumulate_grad_batches: Batches per optimiser step.
        ckpt: The checkpoint to go on from; the other options must be those of its run.
        out: The folder for the results.
        seed: Of the initial weights and of all random choices.
        workers: Processes that read pictures, per device.
        log_every: Steps from one line of train.csv to the next.
        val_every: Steps from one validation to the next.
        val_items: Pictures per validation, at most.
        save_every: Steps from one checkpoint to the next.
    """
    options = dict(locals())
    options["final_lr"] = lr / 10 if final_lr is None else final_lr
    options["val_every"] = min(val_every, max_steps)
    _check(options)
    quiet()
    from lightning import seed_everything

    from fourdperf.data.image_sets import open_image_set
    from fourdperf.models.maskgit_vqgan import MaskGITVQGAN
    from fourdperf.models.perceptual import perceptual_or_substitute
    from fourdperf.train.data import Shuffled
    from fourdperf.train.module import RunData
    from fourdperf.train.schedule import warmup_within
    from fourdperf.train.tokenizer import TokenizerTraining
    from fourdperf.train.tokenizer_loss import Weights
    from fourdperf.train.tokenizer_pictures import TokenizerPictures

    seed_everything(seed, verbose=False)
    vqgan = None if target is None else MaskGITVQGAN.from_pretrained(target)
    network, told = _network(options, vqgan)
    steps = min(5000, max(1, max_steps // 2))
    weights = Weights.from_dict({"start": steps, "entropy_steps": steps, **(loss or {})})
    perceptual = perceptual_or_substitute(lpips_vgg, lpips_linear) if weights.perceptual and stage != "1" else None
    size = network.config.image_size
    train = open_image_set(data_path, "train", size, augment=augment, seed=seed)
    val = open_image_set(data_path, "val", size, seed=seed)
    module = TokenizerTraining(
        network,
        max_steps,
        weights=weights,
        perceptual=perceptual,
        features=_features(options, size) if weights.features else None,
        target=vqgan if stage == "1" else None,
        discriminator=_discriminator(options),
        lr=lr,
        final_lr=options["final_lr"],
        warmup_steps=warmup_within(max_steps) if warmup_steps is None else warmup_steps,
        discriminator_lr=discriminator_lr,
        weight_decay=weight_decay,
        betas=betas,
        optimizer=optimizer,
        clip=clip,
        ema=ema,
        accumulate=accumulate_grad_batches,
        seed=seed,
    )
    data = RunData(Shuffled(train, seed), val, batch_size * accumulate_grad_batches, workers, val_items)
    names = {"perceptual_loss": None if perceptual is None else perceptual.name}
    options |= {"loss": dataclasses.asdict(weights), **names}
    with output_folder(out):
        trainer = make_trainer(
            _lightning(options, module), max_steps, [TokenizerPictures(out, val)], network.MODEL, "images"
        )
        parameters = sum(p.numel() for p in network.parameters())
        begin = (
            f"{network.MODEL}, {parameters / 1e6:.1f} M parameters, {network.config.num_latents} latents of "
            f"{size[0]} x {size[1]}: {len(train):,} pictures ({train.name}), {max_steps} steps of "
            f"{batch_size * accumulate_grad_batches}; results in {out}"
        )
        fit_run(trainer, module, data, options, begin, *told)
    if trainer.is_global_zero:
        print(f"{trainer.global_step} steps done; {_summary(trainer.callback_metrics)}; wrote {out}")


def _check(options: dict[str, Any]) -> None:
    counts = ("batch_size", "max_steps", "devices", "num_nodes", "accumulate_grad_batches", "log_every", "val_every")
    own = ("val_items", "save_every", "image_size", "discriminator_width", "discriminator_layers")
    check_at_least_one(options, *counts, *own)
    check_positive(options, "lr", "final_lr", "clip", "discriminator_lr")
    check_shares(options, "ema")
    if options["stage"] is not None and options["target"] is None:
        raise ValueError(f"--target: wanted the folder of MaskGIT's VQGAN for --stage {options['stage']}, got none")
    if options["stage"] == "1" and options["family"] != "titok":
        raise ValueError("--stage: wanted --family titok, which alone learns in stages")
    if options["stage"] == "2" and options["pretrained"] is None:
        raise ValueError("--pretrained: wanted a run of stage 1 for --stage 2, got none")
    check_run("train", options)


def _network(options: dict[str, Any], vqgan: "MaskGITVQGAN | None") -> tuple["Tokenizer | TiTok", list[str]]:
    """The model to train, and what it starts from, in words."""
    from fourdperf.models.encoder_init import encoder_fields, init_encoder
    from fourdperf.models.tokenizers import FAMILIES, load_tokenizer
    from fourdperf.train.tokenizer import with_pixel_decoder

    told = []
    if options["pretrained"] is not None:
        network = load_tokenizer(options["pretrained"])
        if options["stage"] is not None:
            _check_first_stage(network, options, vqgan)
        if options["stage"] == "2":
            network = with_pixel_decoder(network, vqgan)
        told.append(f"starts from {options['pretrained']}")
    else:
        family, tiny = options["family"], options["variant"] == "tiny"
        fields = {"image_size": options["image_size"] or (64 if tiny else 256)}
        if family == "titok":  # releases are of the last stage, and the first ones have reshaped latents
            fields |= {"target": "pixels", "pixels": None, "latent_layout": "token"}
        if options["stage"] == "1":
            fields |= {"target": "codes", "target_codes": vqgan.config.codebook_size}
        if options["init_encoder"] is not None and family == "tokenizer":
            fields |= encoder_fields(options["init_encoder"])
        fields |= options["model"] or {}
        config = FAMILIES[family].CONFIG
        config = (
            config.from_dict({**TINY[family], **fields}) if tiny else config.from_variant(options["variant"], **fields)
        )
        network = FAMILIES[family](config)
    if options["stage"] is not None and network.config.patch_size != vqgan.config.factor:
        wanted = f"codes {network.config.patch_size} pixels wide, the model's patch_size"
        raise ValueError(f"--target: wanted {wanted}, got one of {vqgan.config.factor}")
    c = network.config
    if options["strategy"] == "fsdp" and c.restart is not None and c.ema is None:
        raise ValueError(
            "--strategy: fsdp shards the codebook; wanted --model.ema 0.99 or --model.restart null with it"
        )
    if options["init_encoder"] is not None:
        told.append(init_encoder(network, options["init_encoder"], options["init_weights"]))
    return network.train(), told


def _check_first_stage(network: "Tokenizer | TiTok", options: dict[str, Any], vqgan: "MaskGITVQGAN") -> None:
    """Raises ValueError unless a model to start a stage from is of stage 1, with the codes of this VQGAN."""
    c, codes = network.config, vqgan.config.codebook_size
    if network.MODEL != "titok":
        got = "no TiTok"
    elif c.pixels is not None:
        got = "one of stage 2"
    elif c.target != "codes":
        got = "one that learned pixels at once"
    elif c.target_codes != codes:
        got = f"one of {c.target_codes} codes"
    else:
        return
    wanted = f"a TiTok of stage 1 with the {codes} codes of --target for --stage {options['stage']}"
    raise ValueError(f"--pretrained: wanted {wanted}, got {got}: {options['pretrained']}")


def _features(options: dict[str, Any], size: tuple[int, int]):
    """The frozen encoder of the feature loss."""
    from fourdperf.models.encoder_init import encoder_fields, init_encoder
    from fourdperf.models.tokenizer import VARIANTS, Config, Tokenizer
    from fourdperf.train.tokenizer import PatchFeatures

    if options["features"] is None:
        raise ValueError("--features: wanted the name of an encoder for --loss.features, got none")
    sizes = TINY["tokenizer"] if options["variant"] == "tiny" else VARIANTS.get(options["variant"], VARIANTS["base"])
    network = Tokenizer(Config(**{**sizes, **encoder_fields(options["features"]), "image_size": size}))
    init_encoder(network, options["features"], options["features_weights"])
    return PatchFeatures(network.encoder)


def _discriminator(options: dict[str, Any]):
    from fourdperf.models.discriminators import DISCRIMINATORS

    kind, tiny = options["discriminator"], options["variant"] == "tiny"
    if kind == "none":
        return None
    width = options["discriminator_width"] or (32 if tiny else {"patch": 64, "titok": 128}[kind])
    return DISCRIMINATORS[kind](width, options["discriminator_layers"] or (2 if tiny else 3))


def _lightning(options: dict[str, Any], module) -> dict[str, Any]:
    """The options as the Trainer wants them: a step is one batch, and DDP knows that networks do not all take part."""
    strategy, several = options["strategy"], options["devices"] * options["num_nodes"] > 1
    if module.adversary is not None and (strategy == "ddp" or strategy == "auto" and several):
        strategy = "ddp_find_unused_parameters_true"
    return {**options, "accumulate_grad_batches": 1, "strategy": strategy}


def _summary(metrics: Mapping[str, Any]) -> str:
    """The last validation in a line."""
    units = {"psnr": " dB PSNR", "accuracy": " of the VQGAN's codes right", "perplexity": " perplexity of the codes"}
    found = {name: float(metrics[f"val/{name}"]) for name in units if f"val/{name}" in metrics}
    return ", ".join(f"{value:.4g}{units[name]}" for name, value in found.items()) or "not validated"
