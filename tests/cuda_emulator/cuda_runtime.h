// CUDA kernels on the CPU, for tests: what csrc/*/*_cuda.cu use of CUDA, executed thread by thread.
//
// work      a thread of a block is a fiber that runs until it waits at a barrier; blocks run one after the other. __syncthreads,
//           shuffles and votes are barriers of a block or a warp. build.py turns launches and shared arrays into calls of this
//           file.
// finds     a barrier that not all threads reach, or that they reach in different lines; a missing one (threads and blocks run
//           in an order that every launch draws anew, so that results differ); shared memory read before it is written (it
//           starts as NaN); accesses that are not aligned; launches that a GPU would refuse
// limits    shuffles and votes name all 32 lanes; arithmetic is the CPU's: nothing is said about speed, registers or the
//           memory model between threads that no barrier orders
#pragma once
#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  uint64_t count() const { return uint64_t(x) * y * z; }
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorEmulated = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulator {

inline std::string error;  // of the launches since the last cudaGetLastError
inline uint64_t launches = 0;
inline size_t dynamic_limit = 48 << 10;

struct Deadlock {};

struct Barrier {
  unsigned arrived = 0, generation = 0;
  int line = 0;
};

// Where a flow of control stands while another runs.
#if defined(__x86_64__)
using Context = void*;  // its stack pointer; swapcontext would ask the kernel for signal masks every time

__attribute__((naked, noinline)) static void change(Context* /*from*/, Context /*to*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n\t"
      "mov %rsp, (%rdi); mov %rsi, %rsp\n\t"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
inline void go(Context& from, Context& to) { change(&from, to); }
inline void begin(Context& c, char* stack, size_t bytes, void (*entry)()) {
  uintptr_t* top = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(stack + bytes) / 16 * 16);
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  c = top;
}
#else
using Context = ucontext_t;
inline void go(Context& from, Context& to) { swapcontext(&from, &to); }
inline void begin(Context& c, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&c);
  c.uc_stack.ss_sp = stack;
  c.uc_stack.ss_size = bytes;
  c.uc_link = nullptr;
  makecontext(&c, entry, 0);
}
#endif

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  bool done;
  const Barrier* waits;
  unsigned generation;
};

constexpr size_t kStack = 256 << 10;

struct Shown {
  uint64_t value;
  unsigned generation;  // of the barrier before which it was written
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Shown> slots[2];     // what a thread shows the others of its warp at every other barrier
  std::vector<Barrier> of_warp;
  std::vector<unsigned> left;      // threads of a warp that have not returned
  std::vector<const void*> seen;   // shared arrays of this block that were filled with NaN
  std::vector<char> shared;
  std::vector<unsigned char> votes;
  Barrier all;
  unsigned living = 0, current = 0;
  Context scheduler;
  const std::function<void()>* body = nullptr;
};
inline Block block;

inline void yield() { go(block.fibers[block.current].context, block.scheduler); }

inline void release(Barrier& b) {
  b.arrived = 0;
  b.line = 0;
  ++b.generation;
}

inline bool abandoned = false;  // the block is given up: fibers unwind

inline void abandon(const std::string& why) {
  abandoned = true;
  if (error.empty()) error = why;
  throw Deadlock{};
}

inline void wait(Barrier& b, unsigned expected, int line, const char* name) {
  if (abandoned) throw Deadlock{};
  if (b.arrived && b.line != line) {
    abandon(std::string(name) + ": threads meet in different lines, " + std::to_string(b.line) + " and " + std::to_string(line));
  }
  b.line = line;
  if (++b.arrived >= expected) return release(b);
  Fiber& own = block.fibers[block.current];
  own.waits = &b;
  own.generation = b.generation;
  while (own.generation == b.generation && !abandoned) yield();
  own.waits = nullptr;
  if (abandoned) throw Deadlock{};
}

inline void run_fiber() {
  const unsigned own = block.current;
  try {
    (*block.body)();
  } catch (const Deadlock&) {
  }
  block.fibers[own].done = true;
  const unsigned warp = own / 32;
  --block.living;
  --block.left[warp];
  if (block.all.arrived && block.all.arrived >= block.living) release(block.all);
  Barrier& w = block.of_warp[warp];
  if (w.arrived && w.arrived >= block.left[warp]) release(w);
  yield();
}

inline void place(unsigned thread) {
  threadIdx = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y);
}

inline void run_block(const std::function<void()>& body, size_t dynamic, const std::vector<unsigned>& order) {
  const unsigned threads = unsigned(order.size());
  block.body = &body;
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  for (auto& slots : block.slots) slots.assign(threads, {0, ~0u});
  block.votes.assign(threads, 0);
  block.of_warp.assign((threads + 31) / 32, {});
  block.left.assign((threads + 31) / 32, 0);
  for (unsigned t = 0; t < threads; ++t) ++block.left[t / 32];
  block.seen.clear();
  block.shared.assign(dynamic, char(0xff));
  block.all = {};
  block.living = threads;
  abandoned = false;
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = block.fibers[t];
    if (!f.stack) f.stack.reset(new char[kStack]);
    f.done = false;
    f.waits = nullptr;
    begin(f.context, f.stack.get(), kStack, run_fiber);
  }
  while (block.living) {
    bool moved = false;
    for (const unsigned t : order) {
      Fiber& f = block.fibers[t];
      if (f.done || (f.waits && f.generation == f.waits->generation && !abandoned)) continue;
      moved = true;
      block.current = t;
      place(t);
      go(block.scheduler, f.context);
    }
    if (moved) continue;
    abandoned = true;  // nobody can go on
    if (error.empty()) {
      error = "deadlock:";
      for (unsigned t = 0; t < threads; ++t) {
        const Fiber& f = block.fibers[t];
        if (!f.done) error += " thread " + std::to_string(t) + " waits in line " + std::to_string(f.waits->line) + ";";
        if (error.size() > 300) break;
      }
    }
  }
}

inline void launch(const char* name, dim3 grid, dim3 threads, size_t dynamic, cudaStream_t, const std::function<void()>& body) {
  const auto refuse = [&](const std::string& why) {
    if (error.empty()) error = std::string(name) + ": " + why;
  };
  if (threads.count() < 1 || threads.count() > 1024 || threads.z > 64) return refuse("a block of " + std::to_string(threads.count()) + " threads");
  if (grid.count() < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return refuse("the grid does not fit");
  if (dynamic > dynamic_limit) return refuse(std::to_string(dynamic) + " bytes of dynamic shared memory, more than was asked for");
  std::mt19937 draw(unsigned(++launches));
  std::vector<unsigned> order(threads.count());
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), draw);
  const uint64_t blocks = grid.count(), first = draw() % blocks;
  gridDim = grid;
  blockDim = threads;
  for (uint64_t i = 0; i < blocks && error.empty(); ++i) {
    const uint64_t b = (first + i) % blocks;
    blockIdx = dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    run_block(body, dynamic, order);
    if (!error.empty()) error = std::string(name) + ": " + error;
  }
}

inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(block.shared.data()); }

// A shared array begins as NaN in every block.
template <class T> inline void poison(T& array) {
  const void* at = &array;
  if (std::find(block.seen.begin(), block.seen.end(), at) != block.seen.end()) return;
  block.seen.push_back(at);
  memset(static_cast<void*>(&array), 0xff, sizeof(array));
}

inline void warp_barrier(unsigned mask, int line, const char* name) {
  if (mask != 0xffffffffu) abandon(std::string(name) + ": only all 32 lanes are emulated");
  const unsigned warp = block.current / 32;
  wait(block.of_warp[warp], block.left[warp], line, name);
}

}  // namespace emulator

inline cudaError_t cudaGetLastError() { return emulator::error.empty() ? cudaSuccess : cudaErrorEmulated; }
inline const char* cudaGetErrorString(cudaError_t) {  // and forgets it
  static std::string last;
  last.swap(emulator::error);
  emulator::error.clear();
  return last.c_str();
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}
template <class F> cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int bytes) {
  if (bytes > 227 << 10) return cudaErrorEmulated;
  emulator::dynamic_limit = std::max(emulator::dynamic_limit, size_t(bytes));
  return cudaSuccess;
}

inline void __syncthreads(int line = __builtin_LINE()) { emulator::wait(emulator::block.all, emulator::block.living, line, "__syncthreads"); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) { emulator::warp_barrier(mask, line, "__syncwarp"); }

namespace emulator {
inline unsigned votes_for(bool predicate, int line, unsigned& voters) {
  block.votes[block.current] = predicate;
  wait(block.all, block.living, line, "__syncthreads_or");
  unsigned count = 0;
  voters = 0;
  for (unsigned t = 0; t < block.votes.size(); ++t) {
    if (!block.fibers[t].done) ++voters, count += block.votes[t];
  }
  wait(block.all, block.living, line, "__syncthreads_or");
  return count;
}
}  // namespace emulator

inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  unsigned voters;
  return emulator::votes_for(predicate != 0, line, voters) != 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  unsigned voters;
  return emulator::votes_for(predicate != 0, line, voters) == voters;
}

namespace emulator {
// Shows `value` to the warp and waits until all its threads have shown theirs; then look(lane) is what a lane showed, or
// bits of a NaN for one that has returned. Who runs ahead to the next such barrier writes into the other slots.
inline auto exchange(unsigned mask, uint64_t value, int line, const char* name) {
  const unsigned warp = block.current / 32, generation = block.of_warp[warp].generation;
  auto& slots = block.slots[generation % 2];
  slots[block.current] = {value, generation};
  warp_barrier(mask, line, name);
  return [&slots, warp, generation](unsigned lane) {
    const size_t thread = warp * 32 + lane;
    return thread < slots.size() && slots[thread].generation == generation ? slots[thread].value : ~uint64_t(0);
  };
}
}  // namespace emulator

template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int offset, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(value));
  const unsigned lane = emulator::block.current % 32;
  bits = emulator::exchange(mask, bits, line, "__shfl_xor_sync")(lane ^ unsigned(offset));
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const auto look = emulator::exchange(mask, predicate != 0, line, "__ballot_sync");
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i) votes |= unsigned(look(i) == 1) << i;
  return votes;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T> inline T atomicAdd(T* p, T value) {
  const T before = *p;
  *p = before + value;
  return before;
}
inline void atomicAdd(float4* p, float4 v) { *p = {p->x + v.x, p->y + v.y, p->z + v.z, p->w + v.w}; }

inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((static_cast<unsigned __int128>(a) * b) >> 64); }
inline float __fmul_rn(float a, float b) { return __builtin_assoc_barrier(a * b); }
inline float __fadd_rn(float a, float b) { return __builtin_assoc_barrier(a + b); }
inline double __dmul_rn(double a, double b) { return __builtin_assoc_barrier(a * b); }
inline double __dadd_rn(double a, double b) { return __builtin_assoc_barrier(a + b); }

struct emulated_half { uint16_t bits; };
inline emulated_half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(emulated_half h) { return h.bits; }
inline float __half2float(emulated_half h) {
  _Float16 x;
  memcpy(&x, &h, sizeof(x));
  return float(x);
}
inline emulated_half __float2half_rn(float x) {
  const _Float16 h = _Float16(x);
  emulated_half bits;
  memcpy(&bits, &h, sizeof(h));
  return bits;
}
inline uint16_t __bfloat16_as_ushort(emulated_half h) { return h.bits; }
inline emulated_half __float2bfloat16_rn(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof(u));
  if (x != x) return {uint16_t(u >> 16 | 0x40u)};
  return {uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}
