"""One stem per op, in every folder: a missing piece fails here, unless WAIVED names it with its reason."""

from pathlib import Path

import pytest

from fourdperf.ops import OPS

ROOT = Path(__file__).parents[1]
PIECES = (
    "fourdperf/ops/{op}.py",
    "fourdperf/jax/ops/{op}.py",
    "csrc/{op}/{op}.h",
    "csrc/{op}/{op}_cpu.cpp",
    "csrc/{op}/{op}_cuda.cu",
    "csrc/{op}/{op}_ffi.cpp",
    "kernels/{op}.py",
    "benchmarks/{op}.py",
    "tests/ops/test_{op}.py",
)
WAIVED: dict[str, str] = {
    "csrc/cross_attention/cross_attention_cuda.cu": "tensor cores are left to Triton, which knows each architecture's",
}
SHARED = (
    "__init__",
    "checkpoint",
    "config",
    "convolutions",
    "layers",
    "niso_nets",
    "quantizer",
    "token_blocks",
    "tokenizers",
)
OF_TOKENIZER = ("maskgit_vqgan", "titok", "token_generator")  # one converter and test file with tokenizer.py
FOR_TRAINING = ("discriminators", "encoder_init", "encoder_weights", "image_mae", "perceptual")  # in PyTorch alone
APART = (*SHARED, *OF_TOKENIZER, *FOR_TRAINING)
MODELS = [file.stem for file in sorted((ROOT / "fourdperf/models").glob("*.py")) if file.stem not in APART]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("piece", PIECES)
def test_every_op_has_every_piece(op, piece):
    path = piece.format(op=op)
    if path in WAIVED:
        pytest.skip(f"{path}: {WAIVED[path]}")
    assert (ROOT / path).is_file(), f"{path} is missing; add it, or say in WAIVED why there is none"


def test_every_file_belongs_to_an_op():
    for folder, pattern in (("kernels", "*.py"), ("csrc", "*/*.h")):
        for file in (ROOT / folder).glob(pattern):
            stem = file.stem if folder == "kernels" else file.parent.name
            assert stem in (*OPS, "common", "__init__"), f"{file.relative_to(ROOT)} belongs to no op in OPS"


@pytest.mark.parametrize("op", OPS)
def test_the_readme_has_a_row_for_every_op(op):
    assert f"| `{op}` |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "piece",
    ["fourdperf/jax/models/{}.py", "fourdperf/convert/{}.py", "tests/models/test_{}.py", "tests/convert/test_{}.py"],
)
def test_every_model_has_every_piece(model, piece):
    assert (ROOT / piece.format(model)).is_file(), f"{piece.format(model)} is missing"


@pytest.mark.parametrize("part", [*OF_TOKENIZER, "convolutions", "quantizer", "token_blocks"])
def test_every_part_of_tokenizers_has_its_mirror(part):
    assert (ROOT / f"fourdperf/jax/models/{part}.py").is_file()
