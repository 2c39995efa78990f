// How the kernels share work among the OpenMP team that torch uses too. Knows nothing of the work itself.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace wg {

// Run body(counter) on a team. Threads take work from the counter rather than owning a share of it: a thread that
// wakes late, or is descheduled by another process, then holds up nobody.
class WorkCounter {
 public:
  WorkCounter(int64_t num_items, int64_t chunk) : end_(num_items), chunk_(chunk < 1 ? 1 : chunk) {}
  // The next range [begin, end); false when there is none.
  bool take(int64_t* begin, int64_t* end) {
    *begin = next_.fetch_add(chunk_, std::memory_order_relaxed);
    if (*begin >= end_) return false;
    *end = *begin + chunk_ < end_ ? *begin + chunk_ : end_;
    return true;
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t end_, chunk_;
};

// Call body(item) for every item, on `threads` threads; a single thread opens no parallel region.
template <class Body>
void parallel_for(int64_t num_items, int64_t chunk, int threads, Body body) {
  if (threads <= 1 || num_items <= chunk) {
    for (int64_t i = 0; i < num_items; i++) body(i);
    return;
  }
  WorkCounter work(num_items, chunk);
#pragma omp parallel num_threads(threads)
  {
    int64_t begin, end;
    while (work.take(&begin, &end))
      for (int64_t i = begin; i < end; i++) body(i);
  }
}

// A buffer that grows and is kept; one per thread and use.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <class T>
  T* get(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > bytes_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) std::abort();
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace wg
