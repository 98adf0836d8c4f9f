// Scratch memory, 64-byte aligned. (std::vector would leave weak symbols compiled for one instruction set.)
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace fourdperf {
namespace {

template <class T> class Buffer {
 public:
  explicit Buffer(int64_t n) {
    const size_t bytes = (size_t(n > 0 ? n : 1) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T* data_;
};

}  // namespace
}  // namespace fourdperf
