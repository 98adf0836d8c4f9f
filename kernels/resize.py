"""resize in Triton.

maths     out[o, r, i] = sum_k weights[r, k] x[o, first[r] + k, i]        (see csrc/resize/resize.h for the weights)
shapes    x (outer, columns, inner), out (outer, rows, inner), contiguous; first, count (rows,) int32; weights (rows, room)
work      one program = one outer index, ROWS rows, BLOCK inner elements; neighbouring rows find their sources in cache.
          Where the inner axis is short, a program owns BLOCK elements of the whole output (resize_narrow_kernel).
numerics  weights and sums in float64 for float64, float32 otherwise; one rounding at the store; deterministic
limits    64-bit addressing; the tables are made once per shape and kept on the device
"""

import functools

import torch
import triton
import triton.language as tl

METHODS = ("nearest", "linear", "cubic", "lanczos3", "lanczos5")
ROWS = 8


@triton.jit
def resize_wide_kernel(
    p_x,
    p_out,
    p_first,
    p_count,
    p_weights,
    columns,
    rows,
    inner,
    room,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    o = tl.program_id(2).to(tl.int64)
    o_i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < inner
    for step in range(ROWS):
        r = tl.program_id(1).to(tl.int64) * ROWS + step
        if r < rows:
            count = tl.load(p_count + r)
            p_row = p_x + (o * columns + tl.load(p_first + r)) * inner
            b_sum = tl.zeros([BLOCK], dtype=ACC)
            for k in range(count):
                b_sum += tl.load(p_weights + r * room + k) * tl.load(p_row + o_i, mask=m_i).to(ACC)
                p_row += inner
            tl.store(p_out + (o * rows + r) * inner + o_i, b_sum.to(p_out.dtype.element_ty), mask=m_i)


@triton.jit
def resize_narrow_kernel(
    p_x,
    p_out,
    p_first,
    p_count,
    p_weights,
    columns,
    rows,
    inner,
    room,
    elements,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    o_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    o_i, o_r, o = o_e % inner, o_e // inner % rows, o_e // inner // rows
    b_count = tl.load(p_count + o_r, mask=m_e, other=0)
    p_row = p_x + (o * columns + tl.load(p_first + o_r, mask=m_e, other=0)) * inner + o_i
    b_sum = tl.zeros([BLOCK], dtype=ACC)
    for k in range(room):
        m_k = m_e & (k < b_count)
        b_weight = tl.load(p_weights + o_r * room + k, mask=m_k, other=0.0)
        b_sum += b_weight * tl.load(p_row, mask=m_k, other=0.0).to(ACC)
        p_row += inner
    tl.store(p_out + o_e, b_sum.to(p_out.dtype.element_ty), mask=m_e)


@functools.lru_cache(maxsize=64)
def _tables(n_in, n_out, method, antialias, adjoint, device, dtype):
    """first (rows,), count (rows,) int32 and weights (rows, room) of the operator or of its transpose."""
    from fourdperf.ops.resize import resize_matrix

    matrix = resize_matrix(n_in, n_out, METHODS[method], antialias)
    matrix = matrix.T if adjoint else matrix
    used = matrix != 0
    first = used.int().argmax(1)
    count = torch.where(used.any(1), matrix.shape[1] - used.flip(1).int().argmax(1) - first, 0)
    column = first[:, None] + torch.arange(max(int(count.max()), 1))
    weights = torch.where(
        column < (first + count)[:, None], matrix.gather(1, column.clamp_max(matrix.shape[1] - 1)), 0.0
    )
    return first.int().to(device), count.int().to(device), weights.to(device, dtype).contiguous()


def resize_axis(x, out, outer, n_in, n_out, inner, method, antialias, adjoint):
    """Launches over x (outer, n, inner) -> out (outer, rows, inner), both contiguous and not empty. Allocates the tables."""
    dtype, acc = (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)
    first, count, weights = _tables(n_in, n_out, method, antialias, adjoint, x.device, dtype)
    rows, columns = (n_in, n_out) if adjoint else (n_out, n_in)
    if inner < 32 or max(outer, triton.cdiv(rows, ROWS)) > 65535:  # programs along the second and third axis
        elements, block = outer * rows * inner, 256
        resize_narrow_kernel[(triton.cdiv(elements, block),)](
            x, out, first, count, weights, columns, rows, inner, weights.shape[1], elements, BLOCK=block, ACC=acc
        )
        return
    block = min(1024, triton.next_power_of_2(inner))
    resize_wide_kernel[(triton.cdiv(inner, block), triton.cdiv(rows, ROWS), outer)](
        x, out, first, count, weights, columns, rows, inner, weights.shape[1], ROWS=ROWS, BLOCK=block, ACC=acc
    )


def aot():
    """(kernel, signature, constexprs, options) of what runs on a GPU, for compilation ahead of time."""
    tables = {"p_first": "*i32", "p_count": "*i32", "columns": "i64", "rows": "i64", "inner": "i64", "room": "i64"}
    for dtype, acc in (("fp32", tl.float32), ("bf16", tl.float32), ("fp16", tl.float32), ("fp64", tl.float64)):
        weights = "*fp64" if dtype == "fp64" else "*fp32"
        pointers = {"p_x": f"*{dtype}", "p_out": f"*{dtype}", "p_weights": weights}
        constants = {"ROWS": ROWS, "BLOCK": 1024, "ACC": acc}
        yield (
            resize_wide_kernel,
            _signature(resize_wide_kernel, tables | pointers, constants),
            constants,
            {"num_warps": 4},
        )
        constants = {"BLOCK": 256, "ACC": acc}
        types = tables | pointers | {"elements": "i64"}
        yield resize_narrow_kernel, _signature(resize_narrow_kernel, types, constants), constants, {"num_warps": 4}


def _signature(kernel, types, constants):
    return {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
