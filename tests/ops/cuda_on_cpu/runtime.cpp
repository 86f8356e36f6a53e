// Threads, barriers, exchanges of a warp, asynchronous copies and the check of every access.
//
// A thread of the block is a fiber. The scheduler runs one until it waits for others (a barrier, a
// shuffle, a matrix product) or ends, then the next; a warp is run as far as it gets before another.
#include "device.h"
#include "memory.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <ucontext.h>

extern char __ehdr_start[] __attribute__((visibility("hidden")));  // where this library lies
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

namespace emulator {

constexpr int MOST_COPIES = 256, WORDS = 8, POISON = 0xff;  // NaN in every format
constexpr size_t STACK = 256 * 1024, ARENA = 256 * 1024;

enum Wait { RUNS, SYNCTHREADS, SYNCWARP, SHUFFLE, MMA, ENDED };
static const char* const NAMES[] = {"work", "__syncthreads", "__syncwarp", "a shuffle", "mma", "its end"};

struct Copy {
  char* to;
  const char* from;
  int bytes, zeros, group;
};
struct Fiber {
  jmp_buf at;
  bool begun;  // there is a place to go on from
  Wait waits;
  int exchanges, syncs, group, count;
  Copy copies[MOST_COPIES];  // issued and not waited for
};

Index index;
static char* stacks;  // of a launch: for each thread its Fiber, then its stack
static jmp_buf scheduler, failed;
static char message[640];
static void (*kernel)(const void*);
static const void* arguments;
static unsigned threads, barriers;
// two, so that one barrier per exchange will do
alignas(16) static uint32_t slots[32][2][LANES][WORDS];
// 16 bytes are all the alignment that is promised: the arena starts 16 behind a multiple of 64
alignas(64) static char memory[16 + ARENA];
static char* const arena = memory + 16;

char* dynamic_shared() { return arena; }

static Fiber& fiber_of(unsigned thread) { return *(Fiber*)(stacks + thread * STACK); }
static Fiber& me() { return fiber_of(threadIdx.x); }
static unsigned block_number() {
  return (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
}

void fail(const char* format, ...) {
  const int used = snprintf(message, sizeof message, "block (%u, %u, %u), thread %u: ", blockIdx.x,
                            blockIdx.y, blockIdx.z, threadIdx.x);
  va_list list;
  va_start(list, format);
  vsnprintf(message + used, sizeof message - used, format, list);
  va_end(list);
  _longjmp(failed, 1);
}

// An access by the thread that runs, from the code at `code`.
static void access(const void* address, size_t size, bool writes, const void* code,
                   size_t alignment = 1) {
  const char* from = (const char*)address;
  if (from >= stacks && from < stacks + threads * STACK) return;
  if (from >= (char*)&index && from < (char*)(&index + 1)) return;
  const ptrdiff_t place = (const char*)code - __ehdr_start;
  const char* does = writes ? "writes" : "reads";
  const Range* range = range_of(from, size);
  if (!range || (writes && !range->cells))
    fail("@%tx %s %zu bytes %s", place, does, size,
         from >= arena && from < arena + ARENA ? "behind its dynamic shared memory"
                                               : "outside of every tensor it was given");
  if (!range->cells) return;
  if ((uintptr_t)address % alignment)
    fail("@%tx %s %zu bytes at %p, which is no multiple of it", place, does, size, address);
  const Moment now = {block_number(), threadIdx.x, barriers, (unsigned)me().syncs};
  if (!now.can_be_told()) fail("more barriers or blocks than the check for races can count");
  const Conflict with = note(*range, from - range->begin, size, writes, now);
  if (with.stamp)
    fail("@%tx a race: %s what thread %u of block %u %s, with no barrier between them (byte %td of %s)",
         place, does, Moment(with.stamp).thread, Moment(with.stamp).block,
         with.written ? "wrote" : "read", from - range->begin,
         range->shared ? "shared memory" : "a tensor");
}

// ------------------------------------------------------------------------------------------ fibers
static void suspend(Wait why) {
  Fiber& self = me();
  self.waits = why;
  if (!_setjmp(self.at)) _longjmp(scheduler, 1);
}
static void live() {
  kernel(arguments);
  suspend(ENDED);
}
static void resume(unsigned thread) {
  Fiber& fiber = fiber_of(thread);
  threadIdx.x = thread;
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  constexpr size_t HEAD = (sizeof(Fiber) + 63) / 64 * 64;
  ucontext_t context;
  getcontext(&context);
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
    if (other == why || (why % ENDED <= SYNCTHREADS && other % ENDED <= SYNCTHREADS)) continue;
    threadIdx.x = i;
    fail("the warp is split: this thread is at %s, thread %u at %s", NAMES[other], first, NAMES[why]);
  }
  if (why == SYNCTHREADS || why == ENDED) return false;
  for (unsigned i = first; i < end; i++) fiber_of(i).waits = RUNS;
  return true;
}
static void run_block(unsigned kind, unsigned salt) {
  for (int i = 0; i < range_count; i++)
    if (ranges[i].shared) memset((char*)ranges[i].begin, POISON, ranges[i].end - ranges[i].begin);
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = fiber_of(i);
    fiber.begun = false, fiber.waits = RUNS, fiber.exchanges = fiber.syncs = 0, fiber.group = fiber.count = 0;
  }
  barriers = 0;
  const unsigned count = (threads + LANES - 1) / LANES;
  const Order warp_order(count, kind, salt), lane_order(LANES, kind, salt + 1);
  for (bool all_ended = false; !all_ended; barriers++) {
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
}

// ----------------------------------------------------------------------------- exchanges of a warp
// Every lane leaves `count` words and finds those of all lanes.
static uint32_t (*exchange(Wait why, const uint32_t* words, int count))[WORDS] {
  uint32_t(*all)[WORDS] = slots[threadIdx.x / LANES][me().exchanges++ % 2];
  memcpy(all[threadIdx.x % LANES], words, 4 * count);
  suspend(why);
  return all;
}
void wait_for_block() { suspend(SYNCTHREADS); }
void wait_for_warp() {  // the others only exchange registers: they promise nothing about memory
  exchange(SYNCWARP, nullptr, 0);
  me().syncs++;
}
uint32_t shuffle(uint32_t mask, uint32_t word, int from) {
  if (mask != ~0u) fail("a shuffle with the mask %x: only whole warps are emulated", mask);
  uint32_t(*all)[WORDS] = exchange(SHUFFLE, &word, 1);
  return from >= 0 && from < LANES ? all[from][0] : word;
}

float from_fp16(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  return copysignf(__uint_as_float(rest << 13) * 0x1p112f, __uint_as_float(sign));
}
uint16_t to_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
uint16_t to_fp16(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
  const float size = fabsf(value);
  if (value != value) return 0x7fff;
  if (size >= 65520.f) return sign | 0x7c00u;
  if (size < 0x1p-14f) return sign | (uint32_t)rintf(size * 0x1p24f);
  const uint32_t rest = bits & 0x7fffffffu;
  return sign | (((rest + 0xfff + (rest >> 13 & 1)) >> 13) - (112u << 10));
}

// c += a b with the operands spread over the warp as the instruction wants them. K: columns of a, of
// which a register holds PER; the products are summed in double.
template <int K, int PER, float (*DECODE)(uint32_t)>
static void multiply(float* c, const uint32_t* words) {
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
static float low_bf16(uint32_t word) { return __uint_as_float(word << 16); }
static float low_fp16(uint32_t word) { return from_fp16(word & 0xffffu); }
static float as_tf32(uint32_t word) { return __uint_as_float(word & 0xffffe000u); }
void multiply_bf16(float* c, const uint32_t* words) { multiply<16, 2, low_bf16>(c, words); }
void multiply_fp16(float* c, const uint32_t* words) { multiply<16, 2, low_fp16>(c, words); }
void multiply_tf32(float* c, const uint32_t* words) { multiply<8, 1, as_tf32>(c, words); }

// ----------------------------------------------------------------------------- asynchronous copies
// What is on its way is neither the old nor the new content: NaN until its thread has waited.
void copy(uint32_t shared, const void* global, int bytes, int wanted) {
  char* to = arena + (int32_t)shared;
  Fiber& self = me();
  access(to, bytes, true, __builtin_return_address(0), bytes);
  if (wanted && (uintptr_t)global % bytes)
    fail("an asynchronous copy of %d bytes from %p, which is no multiple of it", bytes, global);
  if (self.count == MOST_COPIES) fail("more than %d asynchronous copies without a wait", MOST_COPIES);
  memset(to, POISON, bytes);
  self.copies[self.count++] = {to, (const char*)global, wanted, bytes - wanted, self.group};
}
void commit_copies() { me().group++; }
void wait_for_copies(int pending) {
  Fiber& self = me();
  int left = 0;
  for (int i = 0; i < self.count; i++) {
    const Copy& copy = self.copies[i];
    if (copy.group >= self.group - pending) {
      self.copies[left++] = copy;
      continue;
    }
    if (copy.bytes) access(copy.from, copy.bytes, false, __builtin_return_address(0));
    access(copy.to, copy.bytes + copy.zeros, true, __builtin_return_address(0));
    memcpy(copy.to, copy.from, copy.bytes);
    memset(copy.to + copy.bytes, 0, copy.zeros);
  }
  self.count = left;
}

}  // namespace emulator

using namespace emulator;

// What the launcher packs as pointers are addresses in `tensors`: pairs of a begin and a number of bytes.
extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_launch(
    void (*entry)(const void*), const void* given, size_t given_bytes, const size_t* tensors, int count,
    const unsigned* grid, unsigned block, unsigned shared, unsigned order, char* told, size_t room) {
  stacks = fresh(STACK * block);
  kernel = entry, arguments = given, threads = block;
  blockDim = {block, 1, 1}, gridDim = {grid[0], grid[1], grid[2]};
  message[0] = 0;
  if (!_setjmp(failed)) {
    if (shared > ARENA || count > 100) fail("more shared memory or tensors than are emulated");
    know(arena, shared, true, true);
    if (__start_cuda_shared)
      know(__start_cuda_shared, __stop_cuda_shared - __start_cuda_shared, true, true);
    know(given, given_bytes, false, false);
    for (int i = 0; i < count; i++) know((const void*)tensors[2 * i], tensors[2 * i + 1], false, true);
    const unsigned blocks = grid[0] * grid[1] * grid[2];
    for (unsigned i = 0; i < blocks; i++) {
      const unsigned b = order == 1 ? blocks - 1 - i : i;
      blockIdx = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
      run_block(order, b);
    }
  }
  forget();
  munmap(stacks, STACK * block);
  snprintf(told, room, "%s", message);
}

// What the compiler calls at every access (-fsanitize=thread) and where it finds an index outside of
// its array (-fsanitize=bounds). With these no library of the sanitizers is needed.
#define HOOK extern "C" __attribute__((visibility("hidden"))) void
#define HERE __builtin_return_address(0)
#define ACCESSES(SIZE)                                                                                \
  HOOK __tsan_read##SIZE(const void* at) { access(at, SIZE, false, HERE, SIZE); }                     \
  HOOK __tsan_write##SIZE(void* at) { access(at, SIZE, true, HERE, SIZE); }                           \
  HOOK __tsan_unaligned_read##SIZE(const void* at) { access(at, SIZE, false, HERE); }                 \
  HOOK __tsan_unaligned_write##SIZE(void* at) { access(at, SIZE, true, HERE); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
HOOK __tsan_read_range(const void* at, size_t size) { access(at, size, false, HERE); }
HOOK __tsan_write_range(void* at, size_t size) { access(at, size, true, HERE); }
extern "C" __attribute__((visibility("hidden"))) void* __tsan_memcpy(void* to, const void* from, size_t n) {
  access(from, n, false, HERE);
  access(to, n, true, HERE);
  return memcpy(to, from, n);
}
extern "C" __attribute__((visibility("hidden"))) void* __tsan_memset(void* to, int byte, size_t n) {
  access(to, n, true, HERE);
  return memset(to, byte, n);
}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
HOOK __tsan_init() {}
struct Place { const char* file; unsigned line, column; };
HOOK __ubsan_handle_out_of_bounds(const Place* place, intptr_t index) {
  fail("%s:%u: the index %td is outside of its array", place->file, place->line, index);
}
