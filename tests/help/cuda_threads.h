// SPDX-License-Identifier: Apache-2.0
// Runs a CUDA kernel on the CPU: each thread of a block is a std::thread, blocks run one after the
// other. Wrong use of a barrier, a shuffle or an address stops the run with a message.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <ctime>
#endif

namespace harness {

struct Fault : std::runtime_error { using std::runtime_error::runtime_error; };

inline std::mutex fault_mutex;
inline std::string fault_text;
inline std::atomic<bool> faulted;

[[noreturn]] inline void fail(const std::string& text) {
  {
    std::lock_guard lock(fault_mutex);
    if (!faulted) fault_text = text;
    faulted = true;
  }
  throw Fault(text);
}

// Sleeps for some milliseconds, or until another thread changes the number and wakes this one. The
// standard library's wait would order threads beyond that, as a mutex does: see below.
#ifdef __linux__
inline void sleep_while(std::atomic<int>& number, int value) {
  const timespec most = {0, 20'000'000};
  syscall(SYS_futex, &number, FUTEX_WAIT_PRIVATE, value, &most, nullptr, 0);
}
inline void wake(std::atomic<int>& number) {
  syscall(SYS_futex, &number, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}
#else
inline void sleep_while(std::atomic<int>&, int) {
  std::this_thread::sleep_for(std::chrono::microseconds(50));
}
inline void wake(std::atomic<int>&) {}
#endif

// Waits for a number of threads. A thread that will not come any more makes the others fail. Those
// who wait only look at the generation: taking a mutex on the way out would order them after threads
// that are already further on, and hide races from ThreadSanitizer.
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait(const char* what) {
    const int generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      wake(generation_);
      return;
    }
    for (int turn = 0; generation_.load(std::memory_order_acquire) == generation; ++turn) {
      if (faulted) throw Fault("stopped");
      const int left = left_.load(std::memory_order_relaxed);
      if (left && arrived_.load(std::memory_order_relaxed) + left == count_ &&
          generation_.load(std::memory_order_acquire) == generation)
        fail(std::string(what) + ": " + std::to_string(left) + " threads have returned");
      if (turn < 4) std::this_thread::yield();
      else sleep_while(generation_, generation);
    }
  }
  void leave() { left_.fetch_add(1, std::memory_order_relaxed); }
  void reset() { left_.store(0, std::memory_order_relaxed); }

 private:
  const int count_;
  std::atomic<int> arrived_ = 0, left_ = 0;
  std::atomic<int> generation_ = 0;
};

// The lanes that shuffle together under one mask. Two sets of slots take turns, so that one barrier
// is enough for each shuffle.
struct Group {
  explicit Group(int count) : barrier(count) {}
  Barrier barrier;
  unsigned char slots[2][32][16];
  int turn[32] = {};
};

struct Warp {
  std::mutex mutex;
  std::map<unsigned, Group> groups;
  unsigned returned = 0;
  Group& group(unsigned mask) {
    std::lock_guard lock(mutex);
    const auto [found, is_new] = groups.try_emplace(mask, __builtin_popcount(mask));
    if (is_new)
      for (unsigned lanes = mask & returned; lanes; lanes &= lanes - 1) found->second.barrier.leave();
    return found->second;
  }
  void leave(int lane) {
    std::lock_guard lock(mutex);
    returned |= 1u << lane;
    for (auto& [mask, group] : groups)
      if (mask >> lane & 1) group.barrier.leave();
  }
  void reset() {
    std::lock_guard lock(mutex);
    groups.clear(), returned = 0;
  }
};

struct Block {
  explicit Block(int threads) : barrier(threads), warps((threads + 31) / 32), size(threads) {}
  Barrier barrier;
  std::vector<Warp> warps;
  int size;
};

inline Block* block;
inline thread_local int thread;

// Shared memory, found when the first thread comes by, and filled with NaN before every block.
inline std::mutex shared_mutex;
inline std::map<void*, std::size_t> shared;
inline bool share(void* address, std::size_t bytes) {
  std::lock_guard lock(shared_mutex);
  shared[address] = bytes;
  std::memset(address, 0xff, bytes);
  return true;
}

template <class V, class Choose> V exchange(unsigned mask, V value, Choose choose) {
  static_assert(sizeof(V) <= 16);
  const int lane = thread % 32;
  if (!(mask >> lane & 1)) fail("shuffle: the mask leaves out the lane that calls");
  const int there = std::min(32, block->size - thread / 32 * 32);
  if (there < 32 && mask >> there) fail("shuffle: the mask names a lane that does not exist");
  Group& group = block->warps[thread / 32].group(mask);
  const int turn = group.turn[lane];
  group.turn[lane] = 1 - turn;
  std::memcpy(group.slots[turn][lane], &value, sizeof value);
  group.barrier.wait("shuffle");
  const int from = choose(lane);
  if (from < 0 || from > 31) return value;
  if (!(mask >> from & 1)) fail("shuffle: reads a lane that the mask leaves out");
  V result;
  std::memcpy(&result, group.slots[turn][from], sizeof result);
  return result;
}

}  // namespace harness

// ---- what a kernel sees -------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SHARED_ARRAY(type, name, count)                                                       \
  static type name##_memory[count];                                                           \
  [[maybe_unused]] static const bool name##_known = harness::share(name##_memory,             \
                                                                   sizeof name##_memory);     \
  type* const name = name##_memory

struct dim3 { unsigned x = 1, y = 1, z = 1; };
inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };

inline void __syncthreads() { harness::block->barrier.wait("__syncthreads"); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  harness::exchange(mask, 0, [](int lane) { return lane; });
}
template <class V> V __shfl_xor_sync(unsigned mask, V value, int bits) {
  return harness::exchange(mask, value, [=](int lane) { return lane ^ bits; });
}
template <class V> V __shfl_down_sync(unsigned mask, V value, int by) {
  return harness::exchange(mask, value, [=](int lane) { return lane + by > 31 ? -1 : lane + by; });
}
template <class V> V __shfl_up_sync(unsigned mask, V value, int by) {
  return harness::exchange(mask, value, [=](int lane) { return lane - by; });
}
template <class V> V __shfl_sync(unsigned mask, V value, int from) {
  return harness::exchange(mask, value, [=](int) { return from & 31; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned result = 0;
  for (int from = 0; from < 32; ++from)
    if (mask >> from & 1)
      result |= (unsigned)(__shfl_sync(mask, predicate, from) != 0) << from;
  return result;
}

template <class V> V atomicAdd(V* address, V value) {
  V old = *address;
  __atomic_load(address, &old, __ATOMIC_SEQ_CST);
  V next;
  do next = old + value;
  while (!__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_SEQ_CST,
                                    __ATOMIC_SEQ_CST));
  return old;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline void check_address(const void* p, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes) harness::fail("misaligned address");
}
template <class V> V __ldcs(const V* p) { return check_address(p, sizeof(V)), *p; }
template <class V> V __ldg(const V* p) { return check_address(p, sizeof(V)), *p; }
template <class V> void __stcs(V* p, V value) { check_address(p, sizeof(V)), *p = value; }

inline float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
inline float __int_as_float(int u) { return __uint_as_float((unsigned)u); }
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline double __hiloint2double(int high, int low) {
  const std::uint64_t u = (std::uint64_t)(unsigned)high << 32 | (unsigned)low;
  double x;
  std::memcpy(&x, &u, 8);
  return x;
}
inline int __double2loint(double x) { std::uint64_t u; std::memcpy(&u, &x, 8); return (int)u; }
inline int __double2hiint(double x) {
  std::uint64_t u;
  std::memcpy(&u, &x, 8);
  return (int)(u >> 32);
}
extern "C" inline void __assertfail(const char* condition, const char* file, unsigned line,
                                    const char*, unsigned long) {
  harness::fail(std::string(file) + ":" + std::to_string(line) + ": not so: " + condition);
}

// ---- launches -----------------------------------------------------------------------------------

namespace harness {

template <auto kernel, class... P, std::size_t... I>
void call(void (*)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<P*>(arguments[I])...);
}
template <auto kernel, class... P>
void unpack_and_call(void (*pointer)(P...), void** arguments) {
  call<kernel>(pointer, arguments, std::index_sequence_for<P...>{});
}
template <class... P> int count_of(void (*)(P...)) { return sizeof...(P); }

struct Entry {
  const char* expression;
  void (*run)(void** arguments);
  int arguments;
};
template <auto kernel> Entry entry(const char* expression) {
  return {expression, [](void** a) { unpack_and_call<kernel>(kernel, a); }, count_of(kernel)};
}

extern const std::vector<Entry> entries;  // in the file that is made for a kernel

inline std::string run(const std::string& expression, unsigned grid, unsigned threads,
                       int arguments, void** values) {
  const auto found = std::find_if(entries.begin(), entries.end(), [&](const Entry& e) {
    return expression == e.expression;
  });
  if (found == entries.end()) return "not built: " + expression;
  if (found->arguments != arguments)
    return expression + " takes " + std::to_string(found->arguments) + " arguments, got " +
           std::to_string(arguments);
  faulted = false;
  fault_text.clear();
  Block now(threads);
  block = &now;
  blockDim = {threads, 1, 1}, gridDim = {grid, 1, 1};
  Barrier between(threads);
  std::vector<std::thread> all;
  for (unsigned t = 0; t < threads; ++t)
    all.emplace_back([&, t] {
      thread = (int)t;
      threadIdx = {t, 0, 0};
      try {
        for (unsigned b = 0; b < grid; ++b) {
          blockIdx = {b, 0, 0};
          found->run(values);
          now.barrier.leave();
          now.warps[t / 32].leave((int)t % 32);
          between.wait("end of block");
          if (t == 0) {
            now.barrier.reset();
            for (Warp& warp : now.warps) warp.reset();
            for (auto& [address, bytes] : shared) std::memset(address, 0xff, bytes);
          }
          between.wait("end of block");
        }
      } catch (const Fault&) {
      }
    });
  for (std::thread& one : all) one.join();
  return faulted ? fault_text : std::string();
}

}  // namespace harness

// As a shared library: null, or what went wrong.
extern "C" __attribute__((used)) inline const char* harness_run(const char* expression, unsigned grid, unsigned threads,
                                          int arguments, void** values) {
  static std::string result;
  result = harness::run(expression, grid, threads, arguments, values);
  return result.empty() ? nullptr : result.c_str();
}

// As a program, because a library built with ThreadSanitizer cannot be loaded into Python:
// `program FILE` reads one launch from the file and writes the buffers back after the run. The file
// holds 64-bit integers, doubles and bytes: number of buffers; each one's size, address modulo 16,
// bytes; length of the expression, its bytes; grid; threads; number of arguments; each one's kind
// (0 integer, 1 double, 2 address) and value (an address: buffer and offset, or -1 and 0 for null).
inline int harness_main(int count, char** names) {
  std::FILE* file = count == 2 ? std::fopen(names[1], "r+b") : nullptr;
  if (!file) return std::fprintf(stderr, "usage: program FILE\n"), 2;
  const auto read = [&](void* p, std::size_t bytes) {
    if (bytes && std::fread(p, bytes, 1, file) != 1) std::perror("read"), std::exit(2);
  };
  const auto integer = [&] { std::int64_t i; read(&i, 8); return i; };
  struct Buffer { std::vector<char> memory; char* start; std::int64_t bytes; long place; };
  std::vector<Buffer> buffers(integer());
  for (Buffer& b : buffers) {
    b.bytes = integer();
    const std::int64_t modulo = integer();
    b.memory.resize(b.bytes + 32);
    b.start = b.memory.data();
    while (reinterpret_cast<std::uintptr_t>(b.start) % 16 != (std::uintptr_t)modulo) ++b.start;
    b.place = std::ftell(file);
    read(b.start, b.bytes);
  }
  std::string expression(integer(), ' ');
  read(expression.data(), expression.size());
  const unsigned grid = integer(), threads = integer();
  struct Value { std::int64_t word; };
  std::vector<Value> values(integer());
  for (Value& value : values) {
    const std::int64_t kind = integer();
    value.word = integer();
    if (kind == 2) {
      const std::int64_t which = value.word, offset = integer();
      const char* p = which < 0 ? nullptr : buffers[which].start + offset;
      std::memcpy(&value.word, &p, 8);
    }
  }
  std::vector<void*> pointers;
  for (Value& value : values) pointers.push_back(&value.word);
  const std::string fault =
      harness::run(expression, grid, threads, (int)pointers.size(), pointers.data());
  if (!fault.empty()) return std::fprintf(stderr, "%s\n", fault.c_str()), 3;
  for (Buffer& b : buffers) {
    std::fseek(file, b.place, SEEK_SET);
    std::fwrite(b.start, 1, b.bytes, file);
  }
  return std::fclose(file);
}
