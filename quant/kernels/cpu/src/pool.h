// Knows threads: who runs the items of a job, and when; not what an item is.
//
// A job is a list of phases, a phase a number of items. Threads take items one by one, in order;
// a phase begins when all items of the one before are done. Nobody waits for a thread that has not
// come: a worker that wakes late, or that the system has taken off its core, takes what is left.
#pragma once

#include <atomic>
#include <cfenv>
#include <cstdint>
#include <mutex>

namespace moecli {

struct Phase {
  int64_t items = 0;
  void (*body)(void* context, int64_t item) = nullptr;
  void* context = nullptr;

  // `body(item)`; the callable must outlive the run.
  template <class Body>
  static Phase of(int64_t items, Body& body) {
    return {items, [](void* self, int64_t item) { (*static_cast<Body*>(self))(item); }, &body};
  }
};

constexpr int kMaxPhases = 64;

class Pool {
 public:
  // The one pool of this process. It is never destroyed: its threads end with the process.
  static Pool& instance();

  // Held by whoever calls `run`, for as long as memory of `workspace` is in use. Jobs of several
  // callers follow each other, so that no core has two threads.
  std::unique_lock<std::mutex> acquire() { return std::unique_lock<std::mutex>(callers_); }

  // All phases, on the calling thread and up to threads - 1 others, who compute with floats as that
  // one does: whether a denormal is taken for zero does not depend on who takes an item.
  void run(int threads, const Phase* phases, int count);

  // Memory for the caller, kept for the next one; aligned to 64 bytes.
  uint8_t* workspace(int64_t nbytes);

 private:
  Pool();
  void start(int workers);
  void work(int index);
  void take_part();
  void wait_for_job(uint64_t seen);
  static void after_fork();

  struct alignas(64) Progress {
    std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };

  std::mutex callers_;
  int workers_ = 0;  // threads that exist; only ever more
  uint8_t* workspace_ = nullptr;
  int64_t workspace_nbytes_ = 0;

  const Phase* phases_ = nullptr;
  int count_ = 0;
  int wanted_ = 0;  // workers that may take part
  std::fenv_t environment_;
  alignas(64) std::atomic<uint64_t> job_{0};
  alignas(64) std::atomic<bool> open_{false};
  alignas(64) std::atomic<int> inside_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  Progress progress_[kMaxPhases];
  struct Sleep;
  Sleep* sleep_;
};

// Memory of the calling thread, kept between calls; aligned to 64 bytes. What it held is lost.
uint8_t* thread_scratch(int64_t nbytes);

}  // namespace moecli
