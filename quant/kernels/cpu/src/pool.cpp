// Knows threads; see pool.h.
#include "pool.h"

#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <new>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define MOECLI_FORKS 1
#endif

namespace moecli {
namespace {

using Clock = std::chrono::steady_clock;

// A worker that finds no job looks again for so long before it sleeps: the next layer's call comes
// sooner than a sleeping thread wakes.
constexpr auto kSpin = std::chrono::microseconds(200);
// Whoever waits for others this long gives its core away: they may need it.
constexpr int kSpinsBeforeYield = 4000;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
void wait_until(Condition condition) {
  for (int spins = 0; !condition(); ++spins) {
    if (spins < kSpinsBeforeYield) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

uint8_t* allocate(int64_t nbytes) {
  return static_cast<uint8_t*>(::operator new(static_cast<size_t>(nbytes), std::align_val_t(64)));
}

void release(uint8_t* memory) { ::operator delete(memory, std::align_val_t(64)); }

struct Scratch {
  uint8_t* memory = nullptr;
  int64_t nbytes = 0;
  ~Scratch() { release(memory); }
};

Pool* the_pool = nullptr;

}  // namespace

struct Pool::Sleep {
  std::mutex mutex;
  std::condition_variable awake;
};

Pool::Pool() : sleep_(new Sleep) {}

Pool& Pool::instance() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_pool = new Pool;
#ifdef MOECLI_FORKS
    pthread_atfork(nullptr, nullptr, &Pool::after_fork);
#endif
  });
  return *the_pool;
}

// A forked process has the thread that forked, and no other; what they held is held for ever.
void Pool::after_fork() {
  Pool& pool = *the_pool;
  new (&pool.callers_) std::mutex;
  pool.sleep_ = new Sleep;
  pool.workers_ = 0;
  pool.workspace_ = nullptr;  // a thread that is gone may have been in the middle of changing it
  pool.workspace_nbytes_ = 0;
  pool.open_ = false;
  pool.inside_ = 0;
  pool.sleeping_ = 0;
}

void Pool::start(int workers) {
  for (; workers_ < workers; ++workers_) {
    std::thread(&Pool::work, this, workers_).detach();
  }
}

void Pool::run(int threads, const Phase* phases, int count) {
  if (threads <= 1) {
    for (int p = 0; p < count; ++p) {
      for (int64_t item = 0; item < phases[p].items; ++item) {
        phases[p].body(phases[p].context, item);
      }
    }
    return;
  }
  start(threads - 1);
  phases_ = phases;
  count_ = count;
  wanted_ = threads - 1;
  std::fegetenv(&environment_);
  for (int p = 0; p < count; ++p) {
    progress_[p].next.store(0, std::memory_order_relaxed);
    progress_[p].done.store(0, std::memory_order_relaxed);
  }
  open_.store(true);
  job_.fetch_add(1);
  if (sleeping_.load() > 0) {
    std::lock_guard<std::mutex> lock(sleep_->mutex);
    sleep_->awake.notify_all();
  }
  take_part();
  open_.store(false);
  wait_until([this] { return inside_.load() == 0; });
}

void Pool::take_part() {
  for (int p = 0; p < count_; ++p) {
    const Phase& phase = phases_[p];
    Progress& progress = progress_[p];
    int64_t mine = 0;
    while (true) {
      const int64_t item = progress.next.fetch_add(1, std::memory_order_relaxed);
      if (item >= phase.items) break;
      phase.body(phase.context, item);
      ++mine;
    }
    if (mine) progress.done.fetch_add(mine, std::memory_order_acq_rel);
    wait_until(
        [&] { return progress.done.load(std::memory_order_acquire) == phase.items; });
  }
}

void Pool::work(int index) {
  uint64_t seen = 0;
  while (true) {
    wait_for_job(seen);
    seen = job_.load();
    // Once this thread is counted, an open job stays open until it is counted out.
    inside_.fetch_add(1);
    if (open_.load() && index < wanted_) {
      std::fesetenv(&environment_);
      take_part();
    }
    inside_.fetch_sub(1);
  }
}

void Pool::wait_for_job(uint64_t seen) {
  const auto deadline = Clock::now() + kSpin;
  do {
    for (int spins = 0; spins < 64; ++spins) {
      if (job_.load(std::memory_order_acquire) != seen) return;
      relax();
    }
  } while (Clock::now() < deadline);
  std::unique_lock<std::mutex> lock(sleep_->mutex);
  sleeping_.fetch_add(1);
  sleep_->awake.wait(lock, [&] { return job_.load() != seen; });
  sleeping_.fetch_sub(1);
}

uint8_t* Pool::workspace(int64_t nbytes) {
  if (nbytes > workspace_nbytes_) {
    release(workspace_);
    workspace_ = nullptr;
    workspace_nbytes_ = 0;
    workspace_ = allocate(nbytes);
    workspace_nbytes_ = nbytes;
  }
  return workspace_;
}

uint8_t* thread_scratch(int64_t nbytes) {
  static thread_local Scratch scratch;
  if (nbytes > scratch.nbytes) {
    release(scratch.memory);
    scratch.memory = nullptr;
    scratch.nbytes = 0;
    scratch.memory = allocate(nbytes);
    scratch.nbytes = nbytes;
  }
  return scratch.memory;
}

}  // namespace moecli
