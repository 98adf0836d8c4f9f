"""vector_quantize: codes, use and both losses at the sizes of tokenizers, and their gradients.

Floor: rows x codes x channels multiply-adds at the rate of the large matrix product (the share of that roof is printed); the
bytes of z, codes and outputs are nothing beside it. Peers: all scores by a matrix product, then argmin; the same with
128 rows at a time, whose scores stay in a cache; both compiled; the JAX mirror under jit; and, for the record, the one-hot
formulation that the seed's code descends from. z and codes are multiples of 1/64, so that every score is exact and all agree
on the nearest.
"""

import torch
import torch.nn.functional as F
from fourdperf.benchmarks.harness import Case, jax_why_not

from fourdperf.ops import vector_quantize

# name: rows, codes, channels
SHAPES = {
    "TiTok, 16 pictures of 128 tokens (2048 x 4096 x 12)": (2048, 4096, 12),
    "the seed's tokenizer, 256 pictures of 64 tokens (16384 x 4096 x 16)": (16384, 4096, 16),
    "MaskGIT-VQGAN, 8 pictures of 256 tokens (2048 x 1024 x 256)": (2048, 1024, 256),
}
CHUNK = 128


def cases(device: str):
    for name, shape in SHAPES.items():
        for dtype, backward in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            torch.compiler.reset()
            yield _case(name, shape, dtype, backward, device)


def _case(name, shape, dtype, backward, device):
    rows, codes, channels = shape
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).mul(64 / 4).round().clamp(-64, 64) / 64
    z, codebook = (x.to(device, dtype).requires_grad_(backward) for x in (draw(rows, channels), draw(codes, channels)))
    cotangent = draw(rows, channels).to(device, dtype)

    def provider(function):
        def run():
            with torch.set_grad_enabled(backward):
                out = tuple(function(z, codebook))
                if not backward:
                    return out
                loss = (out[0] * cotangent).sum() + out[3] + out[4]
                return (*out, *torch.autograd.grad(loss, (z, codebook)))

        return run

    providers = {"fourdperf": provider(vector_quantize)}
    if device == "cuda":
        providers["fourdperf triton"] = provider(lambda *args: vector_quantize(*args, backend="triton"))
    providers["matmul, argmin"] = provider(_matmul)
    providers["matmul, argmin, 128 rows"] = provider(_chunks)
    providers["matmul, argmin, compiled"] = provider(torch.compile(_matmul))
    choose = torch.compile(_choose, dynamic=False)
    providers["128 rows, compiled"] = provider(lambda *args: _chunks(*args, choose))
    providers["one-hot (seed's descent)"] = provider(_one_hot)
    providers["JAX jit"] = _jax(z.detach(), codebook.detach(), cotangent, backward)
    return Case(
        "vector_quantize",
        name,
        str(dtype).removeprefix("torch."),
        providers,
        flops=2 * rows * codes * channels,
        tolerance=1e-3,
        direction="forward+backward" if backward else "forward",
    )


def _outputs(z, codebook, indices):
    """By plain torch, for the nearest found: what vector_quantize gives."""
    wide, codes = z.float(), codebook.float()
    found = F.embedding(indices, codes)
    usage = indices.new_zeros(len(codes)).scatter_add(0, indices, torch.ones_like(indices))
    commitment, towards = (wide - found.detach()).square().mean(), (found - wide.detach()).square().mean()
    return z + (found.to(z.dtype) - z).detach(), indices, usage, commitment, towards


def _choose(z, codes, squares):
    return torch.addmm(squares, z, codes.T, alpha=-2).argmin(1)


def _matmul(z, codebook):
    codes = codebook.detach().float()
    return _outputs(z, codebook, _choose(z.detach().float(), codes, codes.square().sum(1)))


def _chunks(z, codebook, choose=_choose):
    codes = codebook.detach().float()
    squares = codes.square().sum(1)
    indices = torch.cat([choose(rows, codes, squares) for rows in z.detach().float().split(CHUNK)])
    return _outputs(z, codebook, indices)


def _one_hot(z, codebook):
    """Distances with both squares, a matrix of zeros and ones, and products with that."""
    wide, codes = z.float(), codebook.float()
    distances = wide.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * wide @ codes.T
    indices = distances.argmin(1)
    one_hot = torch.zeros_like(distances).scatter_(1, indices[:, None], 1)
    found = one_hot @ codes
    commitment, towards = (wide - found.detach()).square().mean(), (found - wide.detach()).square().mean()
    return z + (found.to(z.dtype) - z).detach(), indices, one_hot.sum(0).long(), commitment, towards


def _jax(z, codebook, cotangent, backward):
    if why_not := jax_why_not(z.device.type):
        return why_not
    import jax

    from fourdperf.jax.ops import vector_quantize as mirror

    arrays = [jax.numpy.asarray(x.float().cpu().numpy(), str(x.dtype).removeprefix("torch.")) for x in (z, codebook)]
    cotangent = jax.numpy.asarray(cotangent.float().cpu().numpy())

    def loss(z, codebook):
        out = mirror(z, codebook, backend="jnp")
        return (out.quantized * cotangent).sum() + out.commitment + out.codebook, out

    if not backward:
        function = jax.jit(lambda *args: mirror(*args, backend="jnp"))
        return lambda: tuple(function(*arrays))
    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def run():
        (_, out), grads = function(*arrays)
        return (*out, *grads)

    return run
