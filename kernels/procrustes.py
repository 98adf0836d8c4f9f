"""procrustes in Triton.

maths     one-sided Jacobi: the rows of g are turned in pairs until they are orthogonal, those of the identity with them
          (see csrc/procrustes/procrustes.h for the turn); v g0 = g. The products that remain are torch's batched matmul
shapes    g0, g, v (batch, n, n), contiguous; n padded with zeros to a power of two, K, from 4 to 64
work      one program = one matrix, in registers. The K rows lie in two halves; row i of the one meets row i of the other,
          all K / 2 pairs at once; then the rows move on by one place, round a ring in which the first stays
numerics  float32; a fixed order of sums. After K - 1 moves every row is in its place again
limits    n <= 64: four halves of a matrix fill the registers of a program. No float64: its roots call functions, with a
          stack of their own
"""

import triton
import triton.language as tl

LARGEST = 64
SWEEPS, EPSILON = 24, 2.0**-23
WARPS = {2: 1, 4: 1, 8: 1, 16: 4, 32: 8}  # by rows in a half


@triton.jit
def _row(b_x, o_i, i):
    """Row i of b_x, as (1, K)."""
    return tl.sum(tl.where(o_i == i, b_x, 0.0), 0)[None, :]


@triton.jit
def _move(b_top, b_low, o_i, HALF: tl.constexpr, K: tl.constexpr):
    """Everybody's next partner."""
    up = tl.broadcast_to(tl.maximum(o_i - 1, 0), (HALF, K))
    down = tl.broadcast_to(tl.minimum(o_i + 1, HALF - 1), (HALF, K))
    top = tl.where(o_i == 1, _row(b_low, o_i, 0), tl.gather(b_top, up, 0))
    low = tl.where(o_i == HALF - 1, _row(b_top, o_i, HALF - 1), tl.gather(b_low, down, 0))
    return top, low


@triton.jit
def _jacobi(b_top, b_low, o_i, o_j, EPSILON: tl.constexpr, SWEEPS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr):
    """Rows turned until they are orthogonal, and the identity with them."""
    v_top = tl.where(o_i == o_j, 1.0, 0.0).to(b_top.dtype)
    v_low = tl.where(o_i + HALF == o_j, 1.0, 0.0).to(b_top.dtype)
    turned, sweep = 1, 0
    while (turned > 0) & (sweep < SWEEPS):
        turned = 0
        for _ in range(K - 1):
            pp, qq, pq = tl.sum(b_top * b_top, 1), tl.sum(b_low * b_low, 1), tl.sum(b_top * b_low, 1)
            turns = tl.abs(pq) > 2 * EPSILON * tl.sqrt(pp) * tl.sqrt(qq)
            zeta = (qq - pp) / tl.where(turns, 2 * pq, 1.0)
            tangent = tl.where(zeta < 0, -1.0, 1.0) / (tl.abs(zeta) + tl.sqrt(1 + zeta * zeta))
            small = 1 / tl.sqrt(1 + tangent * tangent)
            cosine = tl.where(turns, small, 1.0)[:, None]
            sine = tl.where(turns, small * tangent, 0.0)[:, None]
            turned += tl.sum(turns.to(tl.int32), 0)
            b_top, b_low = cosine * b_top - sine * b_low, sine * b_top + cosine * b_low
            v_top, v_low = cosine * v_top - sine * v_low, sine * v_top + cosine * v_low
            b_top, b_low = _move(b_top, b_low, o_i, HALF, K)
            v_top, v_low = _move(v_top, v_low, o_i, HALF, K)
        sweep += 1
    return b_top, b_low, v_top, v_low


@triton.jit
def jacobi_kernel(p_g, p_out, p_v, n, EPSILON: tl.constexpr, SWEEPS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * n * n
    o_i, o_j = tl.arange(0, HALF)[:, None], tl.arange(0, K)[None, :]
    m_top, m_low = (o_i < n) & (o_j < n), (o_i + HALF < n) & (o_j < n)
    b_top = tl.load(p_g + first + o_i * n + o_j, mask=m_top, other=0.0)
    b_low = tl.load(p_g + first + (o_i + HALF) * n + o_j, mask=m_low, other=0.0)
    b_top, b_low, v_top, v_low = _jacobi(b_top, b_low, o_i, o_j, EPSILON, SWEEPS, HALF, K)
    tl.store(p_out + first + o_i * n + o_j, b_top, mask=m_top)
    tl.store(p_out + first + (o_i + HALF) * n + o_j, b_low, mask=m_low)
    tl.store(p_v + first + o_i * n + o_j, v_top, mask=m_top)
    tl.store(p_v + first + (o_i + HALF) * n + o_j, v_low, mask=m_low)


def jacobi(g, out, v):
    """Launches over g (batch, n, n) -> out and v, all contiguous and not empty: the rows of out are orthogonal, v g = out."""
    batch, n = g.shape[:2]
    half = max(2, triton.next_power_of_2(n) // 2)
    jacobi_kernel[(batch,)](g, out, v, n, EPSILON=EPSILON, SWEEPS=SWEEPS, HALF=half, K=2 * half, num_warps=WARPS[half])


def aot():
    """(kernel, signature, constexprs, options) of what runs on a GPU, for compilation ahead of time."""
    for half, warps in WARPS.items():
        constants = {"EPSILON": EPSILON, "SWEEPS": SWEEPS, "HALF": half, "K": 2 * half}
        types = {"n": "i32"} | dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "*fp32") for name in jacobi_kernel.arg_names}
        yield jacobi_kernel, signature, constants, {"num_warps": warps}
