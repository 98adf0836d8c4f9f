"""The ``fourdperf`` command.

A sub-command is the function of the same name in ``fourdperf.cli.<name>``; that module is imported only when its
command runs, so that help is instant and one command's missing dependency harms no other. Options come from the
function's type hints and docstring, or from YAML (``--config``). The function returns the exit code, None meaning 0.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

__all__ = ["main"]

COMMANDS = {
    "info": "what is installed and built, and why a backend is not available",
    "convert": "a released checkpoint to ours, or back",
    "compare": "the same weights in PyTorch and JAX: error per layer, time, memory",
    "features": "a model's features of a video, as arrays and as pictures",
    "depth": "depth maps of a video, as arrays and as pictures",
    "reconstruct": "depth, cameras, points and tracks of a video, as arrays, files and a page to turn",
    "fit": "learn fields that fit images in a few steps, or go on with a run",
    "functaset": "fit every image of a data set with a functa, and look at the latents",
    "niso_data": "raw data sets, or stand-ins, as shards that Neural Isometries train on",
    "image_shards": "images as WebDataset shards, to train tokenizers on",
    "tokenize": "images as a file of tokens, a few dozen bytes each",
    "detokenize": "the images of a file of tokens",
    "reconstruct_images": "images through tokenizers of 16 to 256 tokens, beside JPEG and WebP of equal bytes",
    "generate": "new images of a class: codes from a token generator, decoded by a tokenizer",
    "train": "train a model, or go on with a run",
    "evaluate": "how good a trained model is, against baselines",
    "demo": "everything on a small model, without any download",
    "export_scenes": "synthetic scenes as files, in the layouts that recorded videos have",
    "bench": "time ops and models against the best alternatives",
}

LISTS = {
    "bench": ("names",),
    "tokenize": ("images",),
    "reconstruct_images": ("images", "models"),
    "generate": ("classes",),
}
"""Options that take several words; words before any option are the first one's."""

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (``sys.argv`` by default) and returns its exit code: 2 for a wrong use or bad input, which
    is reported in one line on stderr; ``--debug`` or FOURDPERF_DEBUG=1 shows the traceback instead."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("FOURDPERF_DEBUG", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else USER_ERROR
    name, *options = arguments
    name = name if name.startswith("-") else name.replace("-", "_")
    if name == "--version":
        from importlib.metadata import version

        print(f"fourdperf {version('fourdperf')}")
        return 0
    if name not in COMMANDS:
        return _fail("fourdperf", f"no command {name!r}; there are {', '.join(COMMANDS)}")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"fourdperf {name}: warning: {message}", file=sys.stderr)
        try:
            return _run(name, options) or 0
        except BrokenPipeError:
            # The reader of our output (head, less) has gone; Python would complain once more when it flushes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            return 130
        except (ValueError, OSError, ImportError) as error:
            if debug:
                raise
            unsaid = isinstance(error, ImportError) and "pip install" not in str(error)
            hint = "; pip install 'fourdperf[demo,train,shards]' brings what every command needs" * unsaid
            return _fail(f"fourdperf {name}", f"{error}{hint}")


def _run(name: str, options: list[str]) -> int | None:
    from jsonargparse import ArgumentError, auto_cli

    function = getattr(importlib.import_module(f"fourdperf.cli.{name}"), name)
    if name in LISTS:
        options = _spelled_out(options, LISTS[name])
    if name == "train" and options and not options[0].startswith("-"):
        options = [*options[0].split("."), *options[1:]]  # train niso.laplacian
    try:
        return auto_cli(function, args=options, prog=f"fourdperf {name}", exit_on_error=False)
    except ArgumentError as error:
        return _fail(f"fourdperf {name}", f"{error} (see fourdperf {name} --help)")


def _spelled_out(options: list[str], lists: Sequence[str]) -> list[str]:
    """`WORD --models A B` as jsonargparse has it, `--images+=WORD --models+=A --models+=B`."""
    found, into = [], lists[0]
    for option in options:
        if option.startswith("-"):
            into = option[2:] if option[2:] in lists else None
            if into:
                continue
        found.append(f"--{into}+={option}" if into else option)
    return found


def _fail(who: str, message: str) -> int:
    print(f"{who}: error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        "usage: fourdperf [--version] [--debug] COMMAND ...\n\n"
        "Compiled kernels, and PyTorch models that agree with their JAX references.\n\n"
        f"commands:\n{commands}\n\n"
        "fourdperf COMMAND --help tells its options; --debug shows the traceback of an error."
    )
