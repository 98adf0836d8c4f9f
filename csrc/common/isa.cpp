#include "common/isa.h"

#include <atomic>
#include <stdexcept>

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fourdperf {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
constexpr int kCount = 5;

// Linux lets a process use the tiles' registers once it has asked for them; what was granted holds for all threads.
bool amx_granted() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

bool supported(Isa isa) {
#ifdef FOURDPERF_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::baseline: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case Isa::amx_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") && amx_granted();
  }
#endif
  return isa == Isa::baseline;
}

Isa best() {
  for (int i = kCount - 1; i > 0; --i)
    if (supported(Isa(i))) return Isa(i);
  return Isa::baseline;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

Isa cpu_isa() { return current().load(std::memory_order_relaxed); }
std::string cpu_isa_name() { return kNames[int(cpu_isa())]; }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kCount; ++i)
    if (supported(Isa(i))) names.push_back(kNames[i]);
  return names;
}

void set_cpu_isa(const std::string& name) {
  for (int i = 0; i < kCount; ++i)
    if (name == kNames[i] && supported(Isa(i))) return current().store(Isa(i));
  std::string known;
  for (const auto& isa : cpu_isas()) known += (known.empty() ? "" : ", ") + isa;
  throw std::invalid_argument("isa must be one that this processor has (" + known + "), got '" + name + "'");
}

}  // namespace fourdperf
