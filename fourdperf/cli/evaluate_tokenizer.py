"""``fourdperf evaluate tokenizer``: how good a tokenizer of images is, in numbers and pictures."""

import json
from pathlib import Path

from fourdperf.cli.checkpoints import Device, open_tokenizer
from fourdperf.cli.training import check_at_least_one, plain_error
from fourdperf.data.files import output_folder, write_text
from fourdperf.data.images import Split
from fourdperf.data.video import write_png

__all__ = ["tokenizer"]


def tokenizer(
    run: Path,
    data_path: str | None = None,
    split: Split = "test",
    out: Path | None = None,
    items: int = 5000,
    views: int = 8,
    features: Path | None = None,
    vgg: Path | None = None,
    linear: Path | None = None,
    batch_size: int = 16,
    workers: int = 0,
    device: Device = "auto",
) -> None:
    """Prints rFID, PSNR, SSIM, LPIPS, codebook usage and perplexity on held-out images; writes JSON and pictures.

    The pictures are reconstructions, the histogram of codes, usage by place, clusters of codes that come together,
    where in a picture a token matters, and patches by code. Where weights of Inception or LPIPS are absent, another
    measure stands in under a name of its own. Under torchrun (torchrun --nproc_per_node 2 -m fourdperf evaluate
    tokenizer ...) the processes share the images, and the numbers are those of one.

    Args:
        run: The folder of a run of fourdperf train tokenizer, or of a tokenizer.
        data_path: The set of images, as for training; by default the run's, or else the offline set.
        split: Of the set.
        out: The folder for the results; by default <run>/evaluation.
        items: Images, at most.
        views: Images in which tokens are replaced, one after the other, for the pictures of what they are about; 0 for
            none of these.
        features: What the Frechet distance is measured on: pytorch-fid's Inception weights, or the folder of a 4DS.
        vgg: VGG16's weights for LPIPS, as torchvision has them.
        linear: LPIPS' own weights.
        batch_size: Images at once.
        workers: Processes that read images.
        device: Where to compute.
    """
    check_at_least_one(locals(), "batch_size")
    if items < 2 or views < 0 or views == 1:
        raise ValueError(f"--items, --views: wanted at least 2 each, or no views, got {items} and {views}")
    import torch

    from fourdperf.data.image_sets import open_image_set
    from fourdperf.metrics.features import open_features
    from fourdperf.models.perceptual import perceptual_or_substitute
    from fourdperf.train.evaluate_d4rt import format_table
    from fourdperf.train.evaluate_tokenizer import influence, measure
    from fourdperf.train.processes import processes
    from fourdperf.train.tokenizer_views import evaluation_pictures

    with processes() as (rank, _):
        model = open_tokenizer(run, device, "run")
        where = model.encoder.positions.device
        data_path = data_path or _data_of(run)
        images = open_image_set(data_path, split, model.config.image_size)
        means = open_features(features, where), perceptual_or_substitute(vgg, linear).to(where)
        try:
            found = measure(model, images, *means, count=items, batch_size=batch_size, workers=workers)
        except (ValueError, OSError) as error:
            raise plain_error(error) from error
    if rank:
        return
    changes = None
    if views:
        sample = torch.stack([images[index][0] for index in range(min(views, len(images)))])
        changes = influence(model, sample.to(where), batch_size)
    out = out or run / "evaluation"
    told = {"run": str(run), "data": f"{data_path or 'offline'}, {split} split", "tokens": model.config.num_latents}
    with output_folder(out):
        for name, picture in evaluation_pictures(images, *found[1:], changes).items():
            write_png(out / f"{name}.png", picture)
        write_text(out / "evaluation.json", json.dumps({**told, **found.measures}, indent=2) + "\n")
    numbers = {name: {"": value} for name, value in found.measures.items() if not isinstance(value, list)}
    print(f"{run}, {told['data']}\n{format_table(numbers)}\nwrote {out}")


def _data_of(run: Path) -> str | None:
    """What a run was trained on, where it says so."""
    try:
        return json.loads((run / "options.json").read_bytes()).get("data_path")
    except (OSError, ValueError, AttributeError):
        return None
