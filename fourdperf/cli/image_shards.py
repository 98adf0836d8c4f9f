"""``fourdperf image_shards``: images as WebDataset shards, for training on data that lie on network or object storage."""

import tarfile
from pathlib import Path

from fourdperf.data.image_sets import open_image_set
from fourdperf.data.image_shards import open_splits, write_image_shards
from fourdperf.data.pictures import label, side_by_side, stack, to_pixels
from fourdperf.data.video import write_png
from fourdperf.train.processes import started

__all__ = ["image_shards"]

SHOWN, PANEL = 8, 96


def image_shards(
    images: str,
    out: Path = Path("image_shards"),
    per_shard: int = 1000,
    image_size: int | None = None,
    skip_bad: bool = False,
    seed: int = 0,
) -> None:
    """Writes tar shards of images by split, with their labels where there are some.

    --data_path of fourdperf train tokenizer, train image_mae and evaluate tokenizer reads them, and so do all readers of
    WebDataset. The splits, and who is in them, are those of training on the images themselves. The same command goes on where a
    kill has stopped it; under torchrun the processes share the shards. overview.png shows some of the images.

    Args:
        images: A folder of images, a list of files (.txt), HDF5 (.h5), or other shards (.tar).
        out: The folder for the shards: new, empty, or begun with the same images and options.
        per_shard: Images per shard; a kill costs at most these. Where others stream the shards, there must be at least
            one for each process and worker.
        image_size: Make larger images smaller, as JPEG: pixels of the shorter side. By default files stay as they are.
        skip_bad: Leave out files that are missing, cut off or not images, with a line for each; by default the first one
            stops the command.
        seed: Of the order, so that a shard has images of all kinds.
    """
    sets = open_splits(images)
    rank, ranks = started()
    options = {"per_shard": per_shard, "image_size": image_size, "skip_bad": skip_bad, "seed": seed}
    written, bad = write_image_shards(out, sets, **options, rank=rank, ranks=ranks, progress=rank == 0)
    counts = ", ".join(f"{len(found):,} {split}" for split, found in sets.items())
    left = f", {bad} bad ones left out" if bad else ""
    if ranks > 1:
        print(f"process {rank} of {ranks} wrote {written} shards to {out}{left}")
        return
    rows = [_row(out, split) for split in sets if _has_images(out, split)]
    if rows:
        write_png(out / "overview.png", stack(rows))
    print(f"{counts} images{left}; wrote {written} shards to {out}; {out / 'overview.png'} shows some")


def _has_images(out: Path, split: str) -> bool:
    """False where all that a split had was bad."""
    for path in out.glob(f"{split}-*.tar"):
        with tarfile.open(path) as tar:
            if tar.next():
                return True
    return False


def _row(out: Path, split: str):
    """The first images of a split, as training reads them."""
    found = open_image_set(out, split, (PANEL, PANEL))
    return label(side_by_side([to_pixels(found[i][0]) for i in range(min(SHOWN, len(found)))]), split)
