"""``fourdperf fit``: learn a field that fits images in a few steps, from the command line or a YAML file, and go on
after any interruption."""

from pathlib import Path
from typing import Any, Literal

from fourdperf.cli.training import check_at_least_one, check_positive, check_run, fit_run, make_trainer, quiet
from fourdperf.data.files import output_folder

__all__ = ["fit", "functa"]

MODELS: dict[str, dict[str, Any]] = {
    "digits": {"hidden_size": 64, "num_layers": 5, "latent_size": 2, "latent_channels": 8},
    "mnist": {"hidden_size": 128, "num_layers": 6, "latent_size": 4, "latent_channels": 16},
    "cifar10": {},
    "folder": {},
}
# A step of Adam is as long for any weight, and a wide SIREN has small ones.
LR = {"digits": 5e-4, "mnist": 3e-4, "cifar10": 1e-4, "folder": 1e-4}
# Step sizes that start in 0.0015 .. 0.03: near 0.1, where functa's end, runs with --lr 1e-3 could diverge.
LEARNED, CONSTANT = {"rates": "full", "rate_multiplier": 0.3}, {"inner_rate": 0.03}


def functa(
    dataset: Literal["digits", "mnist", "cifar10", "folder"] = "digits",
    data_path: Path | None = None,
    model: dict[str, Any] | None = None,
    batch_size: int = 16,
    max_steps: int = 2000,
    minutes: float | None = None,
    lr: float | None = None,
    final_lr: float | None = None,
    warmup_steps: int = 0,
    rates_lr: float = 10.0,
    clip: float = 1.0,
    inner_steps: int | None = None,
    order: Literal[1, 2] = 2,
    chunk: int | None = None,
    devices: int = 1,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    strategy: Literal["auto", "ddp"] = "auto",
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    accumulate_grad_batches: int = 1,
    ckpt: Path | None = None,
    out: Path = Path("functa_run"),
    seed: int = 0,
    workers: int = 0,
    log_every: int = 20,
    val_every: int = 200,
    val_images: int = 256,
    save_every: int = 200,
) -> None:
    """Learns a (spatial) functa: one network that a few gradient steps on a small map of latents fit to any image.

    Writes to the folder --out: last.ckpt (everything, to go on from with --ckpt), model (config and weights for
    from_pretrained), train.csv, val.csv, pictures (reconstructions.png, latents.png, coordinates.png, psnr.png, and
    those of every validation), TensorBoard logs where that is installed, and options.json.

    Args:
        dataset: digits come with scikit-learn; mnist and cifar10 are read from their usual files below --data_path;
            folder is any folder of images, with the labels as sub-folders if there are any.
        data_path: Where the files are; by default the environment's DATA_PATH.
        model: Fields of the model's config that differ from the data set's usual one, such as --model.num_layers=12
            --model.omega_0=15 --model.latent_size=8 --model.interpolation=linear; image_size and channels are the data
            set's, but for a folder they say what its images are brought to.
        batch_size: Images per process and batch.
        max_steps: Outer (optimiser) steps.
        minutes: Stop after this time with a checkpoint; the learning rate still follows the steps.
        lr: The outer learning rate, of Adam; by default 5e-4 for digits, 3e-4 for mnist and 1e-4 for the others, whose
            networks are wider.
        final_lr: The learning rate at the last step; by default a hundredth of --lr.
        warmup_steps: Steps from --final_lr to --lr.
        rates_lr: The learning rate of the learned step sizes, as a multiple of --lr.
        clip: The gradient's largest L2 norm.
        inner_steps: Gradient steps on an image's latent, in place of model.inner_steps.
        order: 2 differentiates through the inner steps; 1 takes their gradients as constants.
        chunk: Images at a time in an inner step: less memory, the same result.
        devices: Processes, one per device.
        accelerator: Where to train.
        strategy: How several devices share the work.
        precision: Number type of the computation.
        accumulate_grad_batches: Batches per optimiser step.
        ckpt: The checkpoint to go on from; the other options must be those of its run.
        out: The folder for the results.
        seed: Of the initial weights and of the images' order.
        workers: Processes that read images, per device.
        log_every: Steps from one line of train.csv to the next.
        val_every: Steps from one validation to the next.
        val_images: Images per validation, at most.
        save_every: Steps from one checkpoint to the next.
    """
    options = dict(locals())
    options["val_every"] = min(val_every, max_steps)
    lr = options["lr"] = LR[dataset] if lr is None else lr
    final_lr = options["final_lr"] = lr / 100 if final_lr is None else final_lr
    counts = ("batch_size", "max_steps", "inner_steps", "chunk", "devices", "accumulate_grad_batches")
    check_at_least_one(options, *counts, "log_every", "val_every", "val_images", "save_every")
    check_positive(options, "lr", "final_lr", "clip")
    check_run("fit", options)
    quiet()
    from lightning import seed_everything

    from fourdperf.models.functa import MODEL, Functa
    from fourdperf.train.functa import FunctaTraining, ImageData
    from fourdperf.train.functa_pictures import FunctaPictures

    seed_everything(seed, verbose=False)
    model = model or {}
    fields = {**(CONSTANT if model.get("rates") == "none" else LEARNED), **MODELS[dataset], **model}
    if inner_steps is not None:
        fields["inner_steps"] = inner_steps
    train, val, config = _open(dataset, data_path, fields)
    network = Functa(config)
    rates = {"lr": lr, "final_lr": final_lr, "warmup_steps": warmup_steps, "rates_lr": rates_lr}
    module = FunctaTraining(network, max_steps, **rates, clip=clip, order=order, chunk=chunk)
    parameters = sum(p.numel() for p in network.parameters())
    data = ImageData(train, val, batch_size, workers, seed, val_images)
    with output_folder(out):
        trainer = make_trainer(options, max_steps, [FunctaPictures(out, val)], MODEL, "images")
        latents = " x ".join(map(str, config.latent_shape))
        told = f"functa, {parameters / 1e3:.0f} k parameters, latents {latents}; {len(train)} images of {dataset}; "
        fit_run(trainer, module, data, options, f"{told}{max_steps} steps; results in {out}")
    if trainer.is_global_zero:
        found = trainer.callback_metrics.get("val/psnr")
        reached = "" if found is None else f", at last {float(found):.2f} dB on {len(data.val)} images held out"
        print(f"{trainer.global_step} steps done{reached}; wrote {out}:")
        for path in sorted(path for path in out.iterdir() if not path.name.startswith(".")):
            print(f"  {path.name}{'/' * path.is_dir()}")


fit = {"functa": functa}


def _open(dataset: str, data_path: Path | None, fields: dict[str, Any]):
    """The images to train on and to validate on, and the config that fits them."""
    from fourdperf.data.images import open_images
    from fourdperf.models.functa import Config

    config = Config.from_dict({"channels": 3, "image_size": 32, **fields})
    own = {}
    if dataset == "folder":
        own = {"image_size": config.image_size, "channels": config.channels}
    train, val = (open_images(dataset, split, data_path, **own) for split in ("train", "val"))
    for name, found in (("image_size", train.image_size), ("channels", train.channels)):
        if name in fields and getattr(config, name) != found:
            raise ValueError(f"--model.{name}: wanted {found}, as {dataset} has it, got {fields[name]}")
    return train, val, Config.from_dict({**fields, "image_size": train.image_size, "channels": train.channels})
