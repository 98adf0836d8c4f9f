// Which build of a CPU kernel runs: one per instruction set, chosen when the library is loaded.
//
//   FOURDPERF_DECLARE_CPU(resize_axis, ResizeArgs)   in <op>.h declares
//     baseline::resize_axis, avx2::resize_axis ...   (the builds of <op>_cpu.cpp, one namespace each), and
//     resize_axis_cpu(const ResizeArgs&)             which calls the chosen one.
//   FOURDPERF_DECLARE_CPU_AMX is for the ops of which CMakeLists.txt makes an amx_bf16 build; avx512_bf16 serves the others.
#pragma once
#include <string>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#define FOURDPERF_X86 1
#endif

namespace fourdperf {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx_bf16 = 4 };

Isa cpu_isa();                             // the one in use
void set_cpu_isa(const std::string& name);  // throws std::invalid_argument where the processor lacks it
std::string cpu_isa_name();
std::vector<std::string> cpu_isas();       // those that this processor can run, slowest first

}  // namespace fourdperf

#ifdef FOURDPERF_X86
#define FOURDPERF_DECLARE_CPU(name, Args) FOURDPERF_DECLARE_CPU_BUILDS(name, Args, avx512_bf16)
#define FOURDPERF_DECLARE_CPU_AMX(name, Args) \
  namespace amx_bf16 { void name(const Args&); } \
  FOURDPERF_DECLARE_CPU_BUILDS(name, Args, amx_bf16)
#define FOURDPERF_DECLARE_CPU_BUILDS(name, Args, with_amx)                  \
  namespace baseline { void name(const Args&); }                            \
  namespace avx2 { void name(const Args&); }                                \
  namespace avx512 { void name(const Args&); }                              \
  namespace avx512_bf16 { void name(const Args&); }                         \
  inline void name##_cpu(const Args& args) {                                \
    switch (cpu_isa()) {                                                    \
      case Isa::amx_bf16: return with_amx::name(args);                      \
      case Isa::avx512_bf16: return avx512_bf16::name(args);                \
      case Isa::avx512: return avx512::name(args);                          \
      case Isa::avx2: return avx2::name(args);                              \
      case Isa::baseline: return baseline::name(args);                      \
    }                                                                       \
  }
#else
#define FOURDPERF_DECLARE_CPU_AMX FOURDPERF_DECLARE_CPU
#define FOURDPERF_DECLARE_CPU(name, Args)          \
  namespace baseline { void name(const Args&); }   \
  inline void name##_cpu(const Args& args) { baseline::name(args); }
#endif
