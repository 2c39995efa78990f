// How the kernels share work among threads. Knows nothing of the work itself.
//
// The threads are those of the OpenMP runtime that torch brought along, so torch.set_num_threads governs both. A
// kernel called by itself opens a parallel region, which costs microseconds, or tens of them where waiting threads
// sleep. A program (cpu_program.cpp) opens one region for all its kernels: a Team. In either, threads take work from
// a counter rather than owning a share of it, so one that wakes late holds up nobody; in a team, one that does not
// come at all (because another process has its core) is not even waited for.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace wg {

// Ranges of [0, num_items), for whoever asks.
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

// Waits a little busily, then lets others run.
class Backoff {
 public:
  void pause() {
    if (++count_ > 4096) {
      sched_yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

 private:
  int count_ = 0;
};

// Helpers that wait for jobs of one master. The gate holds the job's number, whether it is open, and how many helpers
// have entered; closing it tells the master whom to wait for.
class Team {
 public:
  using Job = void (*)(const void*);

  // Master: run the job here and on every helper that comes in time.
  void run(Job job, const void* context) {
    job_ = job;
    context_ = context;
    finished_.store(0, std::memory_order_relaxed);
    number_ += NEXT;
    gate_.store(number_ | OPEN, std::memory_order_release);
    job(context);
    const uint64_t entered = gate_.fetch_and(~OPEN, std::memory_order_acq_rel) & ENTERED;
    for (Backoff wait; finished_.load(std::memory_order_acquire) < entered;) wait.pause();
  }
  // Helper: serve until the master says stop.
  void help() {
    uint64_t done = 0;
    for (Backoff wait;;) {
      uint64_t gate = gate_.load(std::memory_order_acquire);
      if (gate == STOP) return;
      if (!(gate & OPEN) || (gate & ~(OPEN | ENTERED)) == done) {
        wait.pause();
      } else if (gate_.compare_exchange_strong(gate, gate + 1, std::memory_order_acq_rel)) {
        done = gate & ~(OPEN | ENTERED);
        job_(context_);
        finished_.fetch_add(1, std::memory_order_release);
        wait = Backoff();
      }
    }
  }
  void stop() { gate_.store(STOP, std::memory_order_release); }

  static Team*& current() {  // of the calling thread, if it is a master
    static thread_local Team* team = nullptr;
    return team;
  }

 private:
  static constexpr uint64_t OPEN = 1 << 16, ENTERED = OPEN - 1, NEXT = OPEN << 1, STOP = ~uint64_t(0);
  alignas(64) std::atomic<uint64_t> gate_{0};
  alignas(64) std::atomic<uint64_t> finished_{0};
  uint64_t number_ = 0;
  Job job_ = nullptr;
  const void* context_ = nullptr;
};

// Call participant() on this thread and as many others as there are.
template <class Participant>
void run_parallel(int threads, const Participant& participant) {
  if (threads <= 1) {
    participant();
  } else if (Team* team = Team::current()) {
    team->run([](const void* p) { (*static_cast<const Participant*>(p))(); }, &participant);
  } else {
#pragma omp parallel num_threads(threads)
    participant();
  }
}

// Call body(item) for every item; work that fits one chunk is not shared.
template <class Body>
void parallel_for(int64_t num_items, int64_t chunk, int threads, Body body) {
  WorkCounter work(num_items, chunk);
  auto participant = [&] {
    int64_t begin, end;
    while (work.take(&begin, &end))
      for (int64_t i = begin; i < end; i++) body(i);
  };
  run_parallel(num_items <= chunk ? 1 : threads, participant);
}

// Call program() on this thread, in one parallel region of which every kernel it calls makes use.
template <class Program>
void with_team(int threads, const Program& program) {
  if (threads <= 1) {
    program();
    return;
  }
  Team team;
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_thread_num() == 0) {
      Team::current() = &team;
      program();
      Team::current() = nullptr;
      team.stop();
    } else {
      team.help();
    }
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
