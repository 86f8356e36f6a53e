// What a kernel finds on a GPU, as C++: included before a translated source. See __init__.py.
//
// Here is what costs nothing to get inline; what a thread shares with others is in runtime.cpp.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(MOST, ...) MOST
// all blocks share one place, since they run one after another; the section says where it is
#define __shared__ static __attribute__((section("cuda_shared"), used))

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

#define threadIdx emulator::index.thread
#define blockIdx emulator::index.block
#define blockDim emulator::index.threads
#define gridDim emulator::index.blocks

namespace emulator {

constexpr int LANES = 32;
extern struct Index { uint3 thread, block, threads, blocks; } index;
char* dynamic_shared();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void wait_for_block();
void wait_for_warp();
uint32_t shuffle(uint32_t mask, uint32_t word, int from);  // the word of lane `from`, if there is one
void multiply_bf16(float* c, const uint32_t* words);       // words: a0 .. a3, b0, b1
void multiply_fp16(float* c, const uint32_t* words);
void multiply_tf32(float* c, const uint32_t* words);
void copy(uint32_t shared, const void* global, int bytes, int wanted);
void commit_copies();
void wait_for_copies(int pending);
float from_fp16(uint32_t bits);
uint16_t to_fp16(float value);
uint16_t to_bf16(float value);

// Results and arguments below the normal numbers are zero.
static inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.f, x) : x; }

template <class T> static inline T shuffled(unsigned mask, T value, int from) {
  static_assert(sizeof(T) == 4, "only numbers of 32 bits are exchanged");
  uint32_t word;
  memcpy(&word, &value, 4);
  word = shuffle(mask, word, from);
  memcpy(&value, &word, 4);
  return value;
}

}  // namespace emulator

static inline void __syncthreads() { emulator::wait_for_block(); }
static inline void __syncwarp() { emulator::wait_for_warp(); }
template <class T> static inline T __shfl_sync(unsigned mask, T v, int from) {
  return emulator::shuffled(mask, v, from % emulator::LANES);
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T v, int bits) {
  return emulator::shuffled(mask, v, int(threadIdx.x % emulator::LANES) ^ bits);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T v, int by) {
  return emulator::shuffled(mask, v, int(threadIdx.x % emulator::LANES) - by);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T v, int by) {
  return emulator::shuffled(mask, v, int(threadIdx.x % emulator::LANES) + by);
}
static inline ptrdiff_t __cvta_generic_to_shared(const void* p) {
  return (const char*)p - emulator::dynamic_shared();
}

// ------------------------------------------------- PTX: named after the instruction, operands in order
static inline void ptx_cvt_f32_f16(float& to, uint16_t from) { to = emulator::from_fp16(from); }
static inline void ptx_cvt_rn_bf16_f32(uint16_t& to, float from) { to = emulator::to_bf16(from); }
static inline void ptx_cvt_rn_f16_f32(uint16_t& to, float from) { to = emulator::to_fp16(from); }
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)b << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; i++)
    out |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return out;
}
template <class T> static inline void ptx_mov_b64(T*& to, T* from) { to = from; }
static inline void ptx_mul_wide_s32(long long& to, int a, int b) { to = (long long)a * b; }
static inline void ptx_cvt_rn_bf16x2_f32(uint32_t& to, float upper, float lower) {
  to = (uint32_t)emulator::to_bf16(upper) << 16 | emulator::to_bf16(lower);
}
static inline void ptx_cvt_rn_f16x2_f32(uint32_t& to, float upper, float lower) {
  to = (uint32_t)emulator::to_fp16(upper) << 16 | emulator::to_fp16(lower);
}
static inline void ptx_ex2_approx_ftz_f32(float& to, float x) {
  to = emulator::flushed(exp2f(emulator::flushed(x)));
}
static inline void ptx_lg2_approx_ftz_f32(float& to, float x) { to = log2f(emulator::flushed(x)); }
static inline void ptx_rcp_approx_ftz_f32(float& to, float x) {
  to = emulator::flushed(1.f / emulator::flushed(x));
}
static inline void ptx_cp_async_ca_shared_global(uint32_t to, const void* from, int bytes, int wanted) {
  emulator::copy(to, from, bytes, wanted);
}
static inline void ptx_cp_async_ca_shared_global(uint32_t to, const void* from, int bytes) {
  emulator::copy(to, from, bytes, bytes);
}
static inline void ptx_cp_async_commit_group() { emulator::commit_copies(); }
static inline void ptx_cp_async_wait_group(int pending) { emulator::wait_for_copies(pending); }
#define PTX_MMA(NAME, MULTIPLY)                                                                      \
  static inline void NAME(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1,      \
                          uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {                      \
    float c[4] = {c0, c1, c2, c3};                                                                   \
    const uint32_t words[6] = {a0, a1, a2, a3, b0, b1};                                              \
    emulator::MULTIPLY(c, words);                                                                    \
    c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];                                                      \
  }
PTX_MMA(ptx_mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, multiply_bf16)
PTX_MMA(ptx_mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, multiply_fp16)
PTX_MMA(ptx_mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32, multiply_tf32)
#undef PTX_MMA
