"""The emulator finds what it is there to find: each kernel here has one fault, or none."""

import ctypes

import numpy as np
import pytest

from tests.cuda_emulator import build as emulator

SOURCE = """
#include <stdexcept>

constexpr int kThreads = 64;

template <bool kWaits> __global__ void reverse(const float* x, float* out) {
  __shared__ float line[kThreads];
  line[threadIdx.x] = x[blockIdx.x * kThreads + threadIdx.x];
  if (kWaits) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = line[kThreads - 1 - threadIdx.x];
}

__global__ void sum(const float* x, float* out) {
  float v = x[blockIdx.x * kThreads + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  extern __shared__ __align__(16) unsigned char memory[];
  float* of_warp = reinterpret_cast<float*>(memory);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = of_warp[0] + of_warp[1];
}

__global__ void early(float* out) {
  if (threadIdx.x < 40) return;
  out[threadIdx.x] = float(__popc(__ballot_sync(0xffffffffu, threadIdx.x % 2)));
}

__global__ void apart(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  else __syncwarp();
  if (threadIdx.x == 5) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, out[threadIdx.x], 1);
}

__global__ void forgotten(float* out) {
  __shared__ float line[kThreads];
  if (threadIdx.x > 0) line[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = line[threadIdx.x];
}

extern "C" __attribute__((visibility("default"))) const char* run(int which, float* x, float* out, int blocks, int bytes) {
  if (which == 0) reverse<true><<<blocks, kThreads, 0, nullptr>>>(x, out);
  if (which == 1) reverse<false><<<blocks, kThreads, 0, nullptr>>>(x, out);
  if (which == 2) sum<<<unsigned(blocks), kThreads, bytes, nullptr>>>(x, out);
  if (which == 3) early<<<1, kThreads, 0, nullptr>>>(out);
  if (which == 4) apart<<<1, kThreads, 0, nullptr>>>(out);
  if (which == 5) forgotten<<<1, kThreads, 0, nullptr>>>(out);
  return cudaGetLastError() == cudaSuccess ? "" : cudaGetErrorString(cudaGetLastError());
}
"""
REVERSE, NO_BARRIER, SUM, EARLY, APART, FORGOTTEN = range(6)

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "kernels.cpp").write_text(emulator.translate(SOURCE))
    library = ctypes.CDLL(str(emulator.link([folder / "kernels.cpp"], folder)))
    library.run.restype = ctypes.c_char_p
    address = lambda x: ctypes.c_void_p(x.ctypes.data)

    def call(which, x, out, blocks=3, shared=8):
        return library.run(which, address(x), address(out), blocks, shared).decode()

    return call


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)


def test_barriers_shuffles_and_shared_memory(run, x):
    out = np.zeros_like(x)
    assert run(REVERSE, x, out) == ""
    np.testing.assert_array_equal(out, x[:, ::-1])
    out = np.zeros(3, np.float32)
    assert run(SUM, x, out) == ""
    np.testing.assert_allclose(out, x.sum(1), rtol=1e-5)


def test_a_missing_barrier_changes_the_result(run, x):
    out = np.zeros_like(x)
    assert run(NO_BARRIER, x, out) == ""
    assert not np.array_equal(out, x[:, ::-1])


def test_threads_that_have_returned_are_not_waited_for(run, x):
    out = np.zeros(64, np.float32)
    assert run(EARLY, x, out) == ""
    np.testing.assert_array_equal(out, [0] * 40 + [12] * 24)  # lanes 8 to 31 of the second warp vote, the odd ones yes


def test_a_barrier_that_not_all_reach_is_a_deadlock(run, x):
    assert "apart" in (found := run(APART, x, np.zeros(64, np.float32)))
    assert "deadlock" in found or "different lines" in found
    assert run(REVERSE, x, np.zeros_like(x)) == ""  # and harms nobody afterwards


def test_shared_memory_begins_as_nan(run, x):
    out = np.zeros(64, np.float32)
    assert run(FORGOTTEN, x, out) == ""
    assert np.isnan(out[0]) and (out[1:] == 1).all()


def test_launches_that_a_gpu_refuses(run, x):
    assert "the grid does not fit" in run(SUM, x, np.zeros(3, np.float32), blocks=0)
    assert "dynamic shared memory" in run(SUM, x, np.zeros(3, np.float32), shared=60_000)
