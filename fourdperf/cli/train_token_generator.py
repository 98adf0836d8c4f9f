"""``fourdperf train token_generator``: new pictures as codes of a tokenizer, MaskGIT's way of filling them in."""

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
    from torch.utils.data import Dataset

    from fourdperf.models.titok import TiTok
    from fourdperf.models.tokenizer import Tokenizer

__all__ = ["token_generator"]

TINY = {"hidden_size": 192, "num_layers": 6, "num_heads": 3, "mlp_size": 768, "temperature": 4.5}


def token_generator(
    tokenizer: Path = Path("tokenizer_run"),
    data_path: str | None = None,
    tokens: Path | None = None,
    variant: str = "tiny",
    model: dict[str, Any] | None = None,
    label_dropout: float = 0.1,
    label_smoothing: float = 0.1,
    unmasked: float = 0.1,
    augment: bool = True,
    batch_size: int = 32,
    max_steps: int = 2000,
    minutes: float | None = None,
    lr: float = 1e-3,
    final_lr: float | None = None,
    warmup_steps: int | None = None,
    weight_decay: float = 0.03,
    clip: float = 1.0,
    ema: float = 0.999,
    devices: int = 1,
    num_nodes: int = 1,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    accumulate_grad_batches: int = 1,
    ckpt: Path | None = None,
    out: Path = Path("token_generator_run"),
    seed: int = 0,
    workers: int = 0,
    log_every: int = 20,
    val_every: int = 250,
    val_items: int = 256,
    save_every: int = 250,
) -> None:
    """Trains a generator of a tokenizer's codes, by classes where the pictures have some.

    Writes to the folder --out: last.ckpt (everything, to go on from with --ckpt), model (config and averaged weights
    for from_pretrained), train.csv, val.csv, samples.png, curves, TensorBoard logs where that is installed, and
    options.json.

    Args:
        tokenizer: The folder of a tokenizer, or of its run; it stays as it is.
        data_path: Pictures, as of fourdperf train tokenizer, which are read anew in every step; by default those made
            here.
        tokens: Or a file of the tokenizer's codes (fourdperf tokenize); a tenth of it is for validation.
        variant: The size of the model: tiny, or a release's: s128, b64 or l32.
        model: Fields of the model's config that differ from the variant's: --model.kind uvit, --model.steps.
        label_dropout: How often the class is not told.
        label_smoothing: The share of a code that goes to all codes alike.
        unmasked: What a place that is not masked counts in the loss.
        augment: Cut and mirror pictures at random.
        batch_size: Pictures per process and batch.
        max_steps: Optimiser steps.
        minutes: Stop after this time with a checkpoint; the learning rate still follows the steps.
        lr: The peak learning rate, of AdamW; TiTok's is 2e-4.
        final_lr: The learning rate at the first and the last step; by default a tenth of --lr.
        warmup_steps: Steps to the peak; by default 2500, but at most a tenth of all.
        weight_decay: Of AdamW.
        clip: The gradient's largest L2 norm.
        ema: How much of the parameters' moving average stays in a step; 0 for no averaging.
        devices: Processes per node, one per device.
        num_nodes: Nodes, under torchrun or SLURM.
        accelerator: Where to train.
        strategy: How several devices share the work: ddp, each with the whole model; fsdp, each with a part of the
            parameters, on GPUs or CPUs. A single process can go on from a checkpoint of either.
        precision: Number type of the computation.
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

    from fourdperf.models.token_generator import MODEL, Config, TokenGenerator
    from fourdperf.models.tokenizers import check_pictures, fingerprint, load_tokenizer
    from fourdperf.train.data import Shuffled
    from fourdperf.train.module import RunData
    from fourdperf.train.schedule import warmup_within
    from fourdperf.train.token_generator import TokenGeneratorTraining
    from fourdperf.train.tokenizer_pictures import GeneratorPictures

    seed_everything(seed, verbose=False)
    reader = load_tokenizer(tokenizer)
    if reader.quantizer is None:
        raise ValueError(f"--tokenizer: wanted one with codes, got a VAE: {tokenizer}")
    check_pictures(reader)
    given = {"codebook_size": reader.config.codebook_size, "num_tokens": reader.config.num_latents}
    given["tokenizer"] = fingerprint(reader)
    fields = {**given, **(model or {})}
    for name, value in given.items():
        if fields[name] != value:
            raise ValueError(f"--model.{name}: wanted {value}, as the tokenizer has it, got {fields[name]}")
    train, val, classes = _items(options, reader)
    fields = {"num_classes": max(1, len(classes)), **fields}
    config = Config.from_dict({**TINY, **fields}) if variant == "tiny" else Config.from_variant(variant, **fields)
    if config.num_classes < len(classes):
        wanted = f"at least {len(classes)}, as the pictures have"
        raise ValueError(f"--model.num_classes: wanted {wanted}, got {config.num_classes}")
    network = TokenGenerator(config)
    module = TokenGeneratorTraining(
        network,
        max_steps,
        tokenizer=reader,
        label_dropout=label_dropout,
        smoothing=label_smoothing,
        unmasked=unmasked,
        lr=lr,
        final_lr=options["final_lr"],
        warmup_steps=warmup_within(max_steps) if warmup_steps is None else warmup_steps,
        weight_decay=weight_decay,
        clip=clip,
        ema=ema,
        seed=seed,
    )
    data = RunData(Shuffled(train, seed), val, batch_size, workers, val_items)
    with output_folder(out):
        trainer = make_trainer(options, max_steps, [GeneratorPictures(out, reader, classes)], MODEL, "images")
        parameters = sum(p.numel() for p in network.parameters())
        told = (
            f"{config.kind}, {parameters / 1e6:.1f} M parameters, {config.num_tokens} codes of "
            f"{config.codebook_size}, {config.num_classes} classes: {len(train):,} pictures, {max_steps} steps of "
            f"{batch_size * accumulate_grad_batches}; results in {out}"
        )
        fit_run(trainer, module, data, options, told)
    if trainer.is_global_zero:
        right = trainer.callback_metrics.get("val/accuracy")
        told = "not validated" if right is None else f"{100 * float(right):.1f}% of masked codes right on held-out data"
        print(f"{trainer.global_step} steps done; {told}; wrote {out}")


def _check(options: dict[str, Any]) -> None:
    counts = ("batch_size", "max_steps", "devices", "num_nodes", "accumulate_grad_batches", "log_every", "val_every")
    check_at_least_one(options, *counts, "val_items", "save_every")
    check_positive(options, "lr", "final_lr", "clip")
    check_shares(options, "ema", "label_dropout", "label_smoothing")
    if not 0 <= options["unmasked"] <= 1:
        raise ValueError(f"--unmasked: wanted a number in [0, 1], got {options['unmasked']}")
    if options["tokens"] is not None and options["data_path"] is not None:
        raise ValueError("--tokens, --data_path: wanted one of the two, got both")
    check_run("train", options)


def _items(options: dict[str, Any], tokenizer: "Tokenizer | TiTok") -> tuple["Dataset", "Dataset", tuple[str, ...]]:
    """Pictures or codes with labels, to train on and to validate on; and the names of the labels of both."""
    from torch.utils.data import Subset

    from fourdperf.data.image_sets import open_image_set
    from fourdperf.data.images import part
    from fourdperf.data.token_file import TokenFile
    from fourdperf.models.tokenizers import fingerprint

    seed, size = options["seed"], tokenizer.config.image_size
    if options["tokens"] is None:
        train = open_image_set(options["data_path"], "train", size, augment=options["augment"], seed=seed)
        val = open_image_set(options["data_path"], "val", size, seed=seed)
        return train, val, max(train.classes, val.classes, key=len)
    file = TokenFile(options["tokens"])
    file.check_made_by(str(options["tokenizer"]), fingerprint(tokenizer))
    parts = (Subset(file, part(len(file), split, ("train", "val"), seed).tolist()) for split in ("train", "val"))
    numbers = tuple(map(str, range(max(file.description.labels or (0,)) + 1)))
    return *parts, max(file.description.classes, numbers, key=len)
