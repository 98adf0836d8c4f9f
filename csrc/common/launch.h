// bindings.cpp and the *_ffi.cpp files are compiled twice: into _cpu, and with FOURDPERF_CUDA_MODULE into _cuda.
// FOURDPERF_LAUNCH(resize) is then the launcher resize_cpu or resize_cuda.
#pragma once

#ifdef FOURDPERF_CUDA_MODULE
#define FOURDPERF_LAUNCH(op) op##_cuda
#define FOURDPERF_FFI_CUDA
#else
#define FOURDPERF_LAUNCH(op) op##_cpu
#endif
