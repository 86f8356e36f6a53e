// What a CUDA kernel finds on a GPU, for g++: included before a translated source. See __init__.py.
//
// A thread of the block is a fiber. The scheduler runs one until it waits for others (a barrier, a
// shuffle, a matrix product) or ends, then the next; a warp is run as far as it gets before another.
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict
// all blocks share one place, since they run one after another; the section says where it is
#define __shared__ static __attribute__((section("cuda_shared")))

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct uint3 { unsigned x, y, z; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}
static inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
template <class T> static inline T __ldg(const T* from) { return *from; }

static uint3 threadIdx, blockIdx, blockDim, gridDim;
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

namespace emulator {

constexpr int LANES = 32, MOST_THREADS = 1024, MOST_COPIES = 256, WORDS = 8;
constexpr size_t STACK = 256 * 1024, ARENA = 256 * 1024, GUARD = 4096;
constexpr int POISON = 0xff;  // NaN in every format: float, bf16, fp16

enum Wait { RUNS, SYNCTHREADS, SYNCWARP, SHUFFLE, MMA, ENDED };
static const char* const NAMES[] = {"runs", "__syncthreads", "__syncwarp", "a shuffle", "mma", "end"};

struct Copy {
  char* to;
  const char* from;
  int bytes, zeros, group;
};
struct Fiber {
  jmp_buf at;
  bool begun;          // there is a place to go on from
  Wait waits;
  int turn, group, count;
  Copy copies[MOST_COPIES];  // issued and not waited for
};
struct Warp {
  alignas(16) uint32_t slots[2][LANES][WORDS];  // two, so that one barrier per exchange will do
};

static Warp warps[MOST_THREADS / LANES];
static char* stacks;  // of a launch: for each thread its Fiber, then its stack
static jmp_buf scheduler;
static sigjmp_buf failed;
static char message[512];
static void (*kernel)(const void*);
static const void* arguments;
static unsigned threads, dynamic_bytes;

static Fiber& fiber_of(unsigned thread) { return *(Fiber*)(stacks + thread * STACK); }
// 16 bytes are all the alignment that is promised: the arena starts 16 behind a multiple of 64
alignas(64) static char memory[16 + ARENA + GUARD];
static char* const arena = memory + 16;

[[noreturn]] __attribute__((noinline, format(printf, 1, 2))) static void fail(const char* format, ...) {
  const int used = snprintf(message, sizeof message, "block (%u, %u, %u), thread %u: ", blockIdx.x,
                            blockIdx.y, blockIdx.z, threadIdx.x);
  va_list list;
  va_start(list, format);
  vsnprintf(message + used, sizeof message - used, format, list);
  va_end(list);
  siglongjmp(failed, 1);
}

// ------------------------------------------------------------------------------------------ fibers
__attribute__((noinline)) static void suspend(Wait why) {
  Fiber& self = fiber_of(threadIdx.x);
  self.waits = why;
  asm volatile("" ::: "memory");  // other threads run now: nothing is known about memory afterwards
  if (!_setjmp(self.at)) _longjmp(scheduler, 1);
}
static void live() {
  for (;;) {
    kernel(arguments);
    suspend(ENDED);
  }
}
__attribute__((noinline)) static void resume(unsigned thread) {
  Fiber& fiber = fiber_of(thread);
  threadIdx.x = thread;
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  ucontext_t context;
  getcontext(&context);
  constexpr size_t HEAD = (sizeof(Fiber) + 63) / 64 * 64;
  context.uc_stack.ss_sp = stacks + thread * STACK + HEAD;
  context.uc_stack.ss_size = STACK - HEAD;
  context.uc_link = nullptr;
  makecontext(&context, live, 0);
  setcontext(&context);
}

// Positions 0 .. count - 1 in the order asked for: 0 as they are, 1 backwards, else shuffled.
struct Order {
  unsigned at[LANES];
  Order(unsigned count, unsigned kind, unsigned salt) {
    for (unsigned i = 0; i < count; i++) at[i] = kind == 1 ? count - 1 - i : i;
    uint32_t state = kind * 2654435761u + salt * 40503u + 1;
    for (unsigned i = count; kind > 1 && i > 1; i--) {
      state = state * 1664525u + 1013904223u;
      const unsigned j = (state >> 8) % i, other = at[j];
      at[j] = at[i - 1];
      at[i - 1] = other;
    }
  }
};

// Whether all lanes of a warp have come to the same exchange and may go on.
static bool released(unsigned first, unsigned end) {
  const Wait why = fiber_of(first).waits;
  for (unsigned i = first; i < end; i++) {
    const Wait other = fiber_of(i).waits;
    if (other != why && ((other > SYNCTHREADS && other < ENDED) || (why > SYNCTHREADS && why < ENDED))) {
      threadIdx.x = i;
      fail("the warp is split: this lane is at %s and lane 0 at %s", NAMES[other], NAMES[why]);
    }
  }
  if (why == SYNCTHREADS || why == ENDED) return false;
  for (unsigned i = first; i < end; i++) fiber_of(i).waits = RUNS;
  return true;
}
static void run_block(unsigned kind, unsigned salt) {
  memset(arena, POISON, dynamic_bytes + GUARD);
  if (__start_cuda_shared)
    memset(__start_cuda_shared, POISON, __stop_cuda_shared - __start_cuda_shared);
  for (unsigned i = 0; i < threads; i++)
    fiber_of(i).waits = RUNS, fiber_of(i).turn = fiber_of(i).group = fiber_of(i).count = 0;
  const unsigned count = (threads + LANES - 1) / LANES;
  const Order warp_order(count, kind, salt), lane_order(LANES, kind, salt + 1);
  for (bool all_ended = false; !all_ended;) {
    for (unsigned w = 0; w < count; w++) {
      const unsigned first = warp_order.at[w] * LANES;
      const unsigned end = first + LANES < threads ? first + LANES : threads;
      do {
        for (unsigned lane : lane_order.at)
          if (first + lane < end && fiber_of(first + lane).waits == RUNS) resume(first + lane);
      } while (released(first, end));
    }
    all_ended = true;
    for (unsigned i = 0; i < threads; i++)
      if (fiber_of(i).waits == SYNCTHREADS) fiber_of(i).waits = RUNS, all_ended = false;
  }
  for (size_t i = 0; i < GUARD; i++)
    if ((unsigned char)arena[dynamic_bytes + i] != POISON)
      fail("wrote %zu bytes behind its %u bytes of dynamic shared memory", i, dynamic_bytes);
}

static void on_signal(int number) {
  fail("%s", number == SIGFPE ? "an integer division by zero" : "an access to an address that does not exist");
}
static int launch(void (*entry)(const void*), const void* given, const unsigned* grid, unsigned count,
                  unsigned shared, unsigned kind, char* told, size_t room) {
  struct sigaction mine = {}, before[3];
  const int signals[3] = {SIGSEGV, SIGBUS, SIGFPE};
  mine.sa_handler = on_signal;
  for (int i = 0; i < 3; i++) sigaction(signals[i], &mine, &before[i]);
  stacks = (char*)mmap(nullptr, STACK * count, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  kernel = entry, arguments = given, threads = count, dynamic_bytes = shared;
  blockDim = {count, 1, 1}, gridDim = {grid[0], grid[1], grid[2]};
  message[0] = 0;
  if (!sigsetjmp(failed, 1)) {
    const unsigned blocks = grid[0] * grid[1] * grid[2];
    for (unsigned i = 0; i < blocks; i++) {
      const unsigned b = kind == 1 ? blocks - 1 - i : i;
      blockIdx = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
      run_block(kind, b);
    }
  }
  munmap(stacks, STACK * count);
  for (int i = 0; i < 3; i++) sigaction(signals[i], &before[i], nullptr);
  snprintf(told, room, "%s", message);
  return message[0] != 0;
}

// ----------------------------------------------------------------------------- exchanges of a warp
// Every lane leaves `count` words and finds those of all lanes.
static uint32_t (*exchange(Wait why, const uint32_t* words, int count))[WORDS] {
  Fiber& self = fiber_of(threadIdx.x);
  uint32_t(*slots)[WORDS] = warps[threadIdx.x / LANES].slots[self.turn ^= 1];
  memcpy(slots[threadIdx.x % LANES], words, 4 * count);
  suspend(why);
  return slots;
}
template <class T> static T shuffled(unsigned mask, T value, int from) {
  static_assert(sizeof(T) == 4, "only numbers of 32 bits are exchanged");
  if (mask != ~0u) fail("a shuffle with the mask %x: only whole warps are emulated", mask);
  uint32_t word;
  memcpy(&word, &value, 4);
  uint32_t(*all)[WORDS] = exchange(SHUFFLE, &word, 1);
  if (from >= 0 && from < LANES) memcpy(&value, all[from], 4);
  return value;
}

static float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
static float from_fp16(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  return copysignf(__uint_as_float(rest << 13) * 0x1p112f, __uint_as_float(sign));
}
static uint16_t to_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static uint16_t to_fp16(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
  const float size = fabsf(value);
  if (value != value) return 0x7fff;
  if (size >= 65520.f) return sign | 0x7c00u;
  if (size < 0x1p-14f) return sign | (uint32_t)rintf(size * 0x1p24f);
  const uint32_t rest = bits & 0x7fffffffu;
  return sign | ((rest + 0xfff + (rest >> 13 & 1)) >> 13) - (112u << 10);
}
// Results and arguments below the normal numbers are zero.
static float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.f, x) : x; }

// c += a b with the operands spread over the warp as the instruction wants them. K: columns of a, of
// which a register holds PER; the products are summed in double.
template <int K, int PER, float (*DECODE)(uint32_t)>
static void multiply(float* c, const uint32_t (&words)[6]) {
  uint32_t(*all)[WORDS] = exchange(MMA, words, 6);
  const int lane = threadIdx.x % LANES, half = K / 2;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < K; k++) {
      const int lane_k = k % half / PER, shift = PER == 2 ? k % 2 * 16 : 0;
      const uint32_t a = all[row % 8 * 4 + lane_k][row / 8 + k / half * 2] >> shift;
      const uint32_t b = all[column * 4 + lane_k][4 + k / half] >> shift;
      sum += (double)DECODE(a) * DECODE(b);
    }
    c[i] = (float)sum;
  }
}
static float low_fp16(uint32_t word) { return from_fp16(word & 0xffffu); }
static float as_tf32(uint32_t word) { return __uint_as_float(word & 0xffffe000u); }

// ----------------------------------------------------------------------------- asynchronous copies
static bool is_shared(const char* from, int bytes) {
  return (from >= arena && from + bytes <= arena + dynamic_bytes) ||
         (__start_cuda_shared && from >= __start_cuda_shared && from + bytes <= __stop_cuda_shared);
}
// What is on its way is neither the old nor the new content: NaN until its thread has waited.
static void issue(uint32_t shared, const void* global, int bytes, int wanted) {
  char* to = arena + (int32_t)shared;
  Fiber& self = fiber_of(threadIdx.x);
  if (!is_shared(to, bytes)) fail("an asynchronous copy to an address outside of shared memory");
  if ((uintptr_t)to % bytes) fail("an asynchronous copy to an address that is no multiple of %d", bytes);
  if (wanted && (uintptr_t)global % bytes)
    fail("an asynchronous copy from an address that is no multiple of %d", bytes);
  if (self.count == MOST_COPIES) fail("more than %d asynchronous copies without a wait", MOST_COPIES);
  memset(to, POISON, bytes);
  self.copies[self.count++] = {to, (const char*)global, wanted, bytes - wanted, self.group};
}
static void land(int pending) {
  Fiber& self = fiber_of(threadIdx.x);
  int left = 0;
  for (int i = 0; i < self.count; i++) {
    const Copy& copy = self.copies[i];
    if (copy.group >= self.group - pending) {
      self.copies[left++] = copy;
      continue;
    }
    memcpy(copy.to, copy.from, copy.bytes);
    memset(copy.to + copy.bytes, 0, copy.zeros);
  }
  self.count = left;
}

}  // namespace emulator

static inline void __syncthreads() { emulator::suspend(emulator::SYNCTHREADS); }
static inline void __syncwarp() { emulator::suspend(emulator::SYNCWARP); }
template <class T> static T __shfl_sync(unsigned mask, T v, int from) {
  return emulator::shuffled(mask, v, from % emulator::LANES);
}
template <class T> static T __shfl_xor_sync(unsigned mask, T v, int bits) {
  return emulator::shuffled(mask, v, int(threadIdx.x % emulator::LANES) ^ bits);
}
template <class T> static T __shfl_up_sync(unsigned mask, T v, int by) {
  return emulator::shuffled(mask, v, int(threadIdx.x % emulator::LANES) - by);
}
template <class T> static T __shfl_down_sync(unsigned mask, T v, int by) {
  return emulator::shuffled(mask, v, int(threadIdx.x % emulator::LANES) + by);
}
static inline size_t __cvta_generic_to_shared(const void* p) { return (const char*)p - emulator::arena; }

// ------------------------------------------------- PTX: named after the instruction, operands in order
static inline void ptx_cvt_f32_f16(float& to, uint16_t from) { to = emulator::from_fp16(from); }
static inline void ptx_cvt_rn_bf16_f32(uint16_t& to, float from) { to = emulator::to_bf16(from); }
static inline void ptx_cvt_rn_f16_f32(uint16_t& to, float from) { to = emulator::to_fp16(from); }
static inline void ptx_ex2_approx_ftz_f32(float& to, float x) {
  to = emulator::flushed(exp2f(emulator::flushed(x)));
}
static inline void ptx_lg2_approx_ftz_f32(float& to, float x) { to = log2f(emulator::flushed(x)); }
static inline void ptx_rcp_approx_ftz_f32(float& to, float x) {
  to = emulator::flushed(1.f / emulator::flushed(x));
}
static inline void ptx_cp_async_ca_shared_global(uint32_t to, const void* from, int bytes, int wanted) {
  emulator::issue(to, from, bytes, wanted);
}
static inline void ptx_cp_async_ca_shared_global(uint32_t to, const void* from, int bytes) {
  emulator::issue(to, from, bytes, bytes);
}
static inline void ptx_cp_async_commit_group() { emulator::fiber_of(threadIdx.x).group++; }
static inline void ptx_cp_async_wait_group(int pending) { emulator::land(pending); }
#define PTX_MMA(NAME, K, PER, DECODE, T)                                                             \
  static inline void NAME(float& c0, float& c1, float& c2, float& c3, T a0, T a1, T a2, T a3, T b0,  \
                          T b1) {                                                                    \
    float c[4] = {c0, c1, c2, c3};                                                                   \
    emulator::multiply<K, PER, DECODE>(c, {a0, a1, a2, a3, b0, b1});                                 \
    c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];                                                      \
  }
PTX_MMA(ptx_mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, 16, 2, emulator::from_bf16, uint32_t)
PTX_MMA(ptx_mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, 16, 2, emulator::low_fp16, uint32_t)
PTX_MMA(ptx_mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32, 8, 1, emulator::as_tf32, uint32_t)
#undef PTX_MMA

// What g++ calls where -fsanitize=alignment,bounds finds something; with these no library is needed.
struct Place { const char* file; unsigned line, column; };
extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(
    const Place* place, uintptr_t address) {
  emulator::fail("%s:%u: an access to %p, which is null or not aligned", place->file, place->line,
                 (void*)address);
}
extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_out_of_bounds(
    const Place* place, intptr_t index) {
  emulator::fail("%s:%u: the index %td is outside of its array", place->file, place->line, index);
}
