"""Every op on the meta device, which has shapes alone, no kernels and no autocast: eager serves, forward and backward."""

import pytest
import torch

from fourdperf import ops


def gather_patches(video, points):
    t = torch.zeros(points.shape[:2], dtype=torch.int64, device=points.device)
    return ops.gather_patches(video, t, points, 3, mode="bilinear")


def vector_quantize(z, codebook):
    found = ops.vector_quantize(z, codebook)
    ops.code_sums(z, found.indices, len(codebook))
    return found.quantized + found.commitment + found.codebook


# op -> call, shapes of its tensors, shape of its output
CALLS = {
    "bilinear_sample": (ops.bilinear_sample, [(2, 4, 5, 3), (2, 7, 2)], (2, 7, 3)),
    "cross_attention": (ops.cross_attention, [(2, 5, 2, 8), (2, 7, 2, 8), (2, 7, 2, 6)], (2, 5, 2, 6)),
    "fourier_embed": (ops.fourier_linear, [(6, 2), (3,), (5, 12), (5,)], (6, 5)),
    "gather_patches": (gather_patches, [(1, 2, 6, 7, 3), (1, 4, 2)], (1, 4, 3, 3, 3)),
    "modulated_siren": (ops.modulated_siren, [(2, 6, 4), (8, 4), (8,), (2, 3, 3, 8), (6, 2)], (2, 6, 8)),
    "procrustes": (ops.procrustes, [(2, 5, 4)], (2, 5, 4)),
    "resize": (lambda x: ops.resize(x, 6, 1), [(2, 4, 3)], (2, 6, 3)),
    "vector_quantize": (vector_quantize, [(7, 4), (5, 4)], (7, 4)),
    "window_attention": (lambda *qkv: ops.window_attention(*qkv, 3), [(2, 5, 6, 2, 8)] * 3, (2, 5, 6, 2, 8)),
}


@pytest.mark.parametrize("op", ops.OPS)
def test_on_meta(op):
    function, shapes, wanted = CALLS[op]
    tensors = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
    out = function(*tensors)
    assert out.is_meta and out.shape == wanted
    assert [x.shape for x in torch.autograd.grad(out.sum(), tensors)] == [x.shape for x in tensors]
