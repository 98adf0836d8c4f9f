"""``fourdperf evaluate niso``: how good a run of Neural Isometries is, against baselines."""

import json
from pathlib import Path

from fourdperf.cli.training import check_at_least_one
from fourdperf.data.files import write_text

__all__ = ["niso"]


def niso(
    run: Path = Path("laplacian_run"),
    items: int = 512,
    baseline_steps: int | None = None,
    out: Path | None = None,
    seed: int = 0,
) -> None:
    """Prints how good a run of fourdperf train niso.EXPERIMENT is on its held-out data, and writes it as JSON.

    Learned functions are compared with the toric Laplacian's eigenspaces; views that tau makes of each other with those
    that the wrong tau makes; classifiers with plain convolutional nets of as many parameters, trained here on images as
    they are and on warped ones; poses with those of a camera that stands still or goes to the right, and of essential
    matrices from SIFT matches and the true intrinsics.

    Args:
        run: The folder of the run.
        items: Pairs, images or sequences of the test split, at most.
        baseline_steps: Batches, of the run's size, that a plain net learns from; by default as many as the run and its
            encoder have had.
        out: The JSON file.
        seed: Of the plain nets.
    """
    check_at_least_one(locals(), "items", "baseline_steps")
    from fourdperf.train.evaluate_niso import format_tables, measure, measure_plain
    from fourdperf.train.niso_runs import load_run

    options, model = load_run(run)
    tables = measure(options, model, items)
    if "accuracy" in tables:
        tables["accuracy"] |= measure_plain(options, model, items, baseline_steps, seed)
    print(f"niso.{options['experiment']}, {run}\n{format_tables(tables)}")
    if out is not None:
        write_text(out, json.dumps({"experiment": options["experiment"], "run": str(run), **tables}, indent=2) + "\n")
        print(f"\nwrote {out}")
