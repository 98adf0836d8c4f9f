"""``fourdperf train image_mae``: a masked autoencoder of pictures, whose encoder a tokenizer can start from.

Without --data_path and --variant it learns from pictures made here, with sizes for minutes on two cores.
"""

from pathlib import Path
from typing import Any, Literal

from fourdperf.cli.training import check_at_least_one, check_positive, check_run, fit_run, make_trainer, quiet
from fourdperf.data.files import output_folder

__all__ = ["image_mae"]

TINY = {  # the encoder of a tiny tokenizer
    **{"patch_size": 8, "hidden_size": 192, "num_layers": 4, "num_heads": 3, "mlp_size": 768},
    **{"decoder_size": 96, "decoder_layers": 2, "decoder_heads": 3},
}


def image_mae(
    data_path: str | None = None,
    variant: Literal["tiny", "small", "base", "large"] = "tiny",
    image_size: int | None = None,
    model: dict[str, Any] | None = None,
    augment: bool = True,
    batch_size: int = 64,
    max_steps: int = 2000,
    minutes: float | None = None,
    lr: float = 1e-3,
    final_lr: float | None = None,
    warmup_steps: int | None = None,
    weight_decay: float = 0.05,
    clip: float = 1.0,
    devices: int = 1,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    strategy: Literal["auto", "ddp"] = "auto",
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    accumulate_grad_batches: int = 1,
    ckpt: Path | None = None,
    out: Path = Path("image_mae_run"),
    seed: int = 0,
    workers: int = 0,
    log_every: int = 20,
    val_every: int = 250,
    val_items: int = 256,
    save_every: int = 250,
) -> None:
    """Trains a masked autoencoder, for `fourdperf train tokenizer --init_encoder image_mae --init_weights OUT`.

    Writes to the folder --out: last.ckpt (everything, to go on from with --ckpt), model (config and weights for
    from_pretrained), train.csv, val.csv, guesses.png, loss.png, TensorBoard logs where that is installed, and
    options.json.

    Args:
        data_path: A folder of images, a list of files (.txt), WebDataset shards (.tar) or HDF5 (.h5); without it,
            synthetic scenes and photographs that come with scikit-learn.
        variant: The size of the encoder, as of a tokenizer.
        image_size: Height and width; by default 64 for tiny, else 224.
        model: Fields of the model's config that differ from the variant's: --model.patch_size, --model.mask_ratio,
            --model.decoder_layers.
        augment: Cut and mirror pictures at random.
        batch_size: Pictures per process and batch.
        max_steps: Optimiser steps.
        minutes: Stop after this time with a checkpoint; the learning rate still follows the steps.
        lr: The peak learning rate, of AdamW.
        final_lr: The learning rate at the first and the last step; by default a hundredth of --lr.
        warmup_steps: Steps to the peak; by default 2500, but at most a tenth of all.
        weight_decay: Of AdamW.
        clip: The largest L2 norm of the gradient.
        devices: Processes, one per device.
        accelerator: Where to train.
        strategy: How several devices share the work.
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
    options["final_lr"] = lr / 100 if final_lr is None else final_lr
    options["val_every"] = min(val_every, max_steps)
    counts = ("batch_size", "max_steps", "devices", "accumulate_grad_batches", "log_every", "val_every", "val_items")
    check_at_least_one(options, *counts, "save_every", "image_size")
    check_positive(options, "lr", "final_lr", "clip")
    check_run("train", options)
    quiet()
    from lightning import seed_everything

    from fourdperf.data.image_sets import open_image_set
    from fourdperf.models.image_mae import MODEL, Config, ImageMAE
    from fourdperf.models.tokenizer import VARIANTS
    from fourdperf.train.data import Shuffled
    from fourdperf.train.image_mae import ImageMAEPictures, ImageMAETraining
    from fourdperf.train.module import RunData
    from fourdperf.train.schedule import warmup_within

    seed_everything(seed, verbose=False)
    sizes = TINY if variant == "tiny" else VARIANTS[variant]
    size = image_size or (64 if variant == "tiny" else 224)
    network = ImageMAE(Config.from_dict({**sizes, "image_size": size, **(model or {})}))
    size = network.config.image_size
    train = open_image_set(data_path, "train", size, augment=augment, seed=seed)
    val = open_image_set(data_path, "val", size, seed=seed)
    rates = {"lr": lr, "final_lr": options["final_lr"]}
    rates["warmup_steps"] = warmup_within(max_steps) if warmup_steps is None else warmup_steps
    module = ImageMAETraining(network, max_steps, **rates, weight_decay=weight_decay, clip=clip, seed=seed)
    data = RunData(Shuffled(train, seed), val, batch_size, workers, val_items)
    with output_folder(out):
        trainer = make_trainer(options, max_steps, [ImageMAEPictures(out, val)], MODEL, "images")
        parameters = sum(p.numel() for p in network.parameters())
        told = (
            f"masked autoencoder, {parameters / 1e6:.1f} M parameters, {network.config.kept} of "
            f"{network.config.grid[0] * network.config.grid[1]} patches shown: {len(train):,} pictures "
            f"({train.name}), {max_steps} steps; results in {out}"
        )
        fit_run(trainer, module, data, options, told)
    if trainer.is_global_zero:
        print(f"{trainer.global_step} steps done; wrote {out / 'last.ckpt'} and {out / 'model'}")
