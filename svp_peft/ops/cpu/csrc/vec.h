// Vectors of floats as wide as the target's registers, and the functions the kernels need of them.
//
// GCC's and Clang's vector extensions carry the arithmetic to any instruction set (AVX-512, AVX2,
// SSE2, NEON); intrinsics appear only where those extensions have no word for an instruction.
// Nothing here relies on -ffast-math: a NaN that goes in comes out.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace svp {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define SVP_AVX512 1
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__FMA__)
#define SVP_AVX2 1
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
// the same without a promise about alignment or about what else lies there
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const vec_unaligned*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<vec_unaligned*>(p) = v; }

// the first `lanes` floats; the rest of the vector is zero
inline vec load(const float* p, int lanes) {
  if (lanes == LANES) return load(p);
  vec v = {};
  std::memcpy(&v, p, sizeof(float) * lanes);
  return v;
}

inline void store(float* p, vec v, int lanes) {
  if (lanes == LANES) {
    store(p, v);
  } else {
    std::memcpy(p, &v, sizeof(float) * lanes);
  }
}

// body(c, lanes) for every block of channels from `first` to `end`. `lanes` is a constant for whole
// blocks, so that the compiler leaves out every test for the incomplete one.
template <class F>
void for_channels(int64_t first, int64_t end, const F& body) {
  int64_t c = first;
  for (; c + LANES <= end; c += LANES) body(c, std::integral_constant<int, LANES>());
  if (c < end) body(c, static_cast<int>(end - c));
}

inline vec splat(float s) { return s - vec{}; }

inline float sum(vec v) {
#if SVP_AVX512
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
#endif
}

inline vec abs(vec v) { return (vec)((ivec)v & 0x7fffffff); }

// v where v > low, else low; a NaN stays, which std::max would not promise
inline vec at_least(vec v, float low) {
#if SVP_AVX512
  return (vec)_mm512_max_ps((__m512)splat(low), (__m512)v);
#elif SVP_AVX2
  return (vec)_mm256_max_ps((__m256)splat(low), (__m256)v);
#elif defined(__SSE2__)
  return (vec)_mm_max_ps((__m128)splat(low), (__m128)v);
#else
  return v < splat(low) ? splat(low) : v;
#endif
}

inline vec at_most(vec v, float high) {
#if SVP_AVX512
  return (vec)_mm512_min_ps((__m512)splat(high), (__m512)v);
#elif SVP_AVX2
  return (vec)_mm256_min_ps((__m256)splat(high), (__m256)v);
#elif defined(__SSE2__)
  return (vec)_mm_min_ps((__m128)splat(high), (__m128)v);
#else
  return v > splat(high) ? splat(high) : v;
#endif
}

// 2^f for |f| <= 1/2: a minimax polynomial with 2^0 = 1 exactly, relative error 3e-9 before rounding
inline vec exp2_fraction(vec f) {
  vec p = splat(0.000155946781605f);
  p = p * f + 0.0013406643902f;
  p = p * f + 0.009617692973f;
  p = p * f + 0.0555031055101f;
  p = p * f + 0.240226527829f;
  p = p * f + 0.693147214968f;
  return p * f + 1.0f;
}

#if SVP_AVX512

inline vec round_to_integer(vec x) { return (vec)_mm512_roundscale_ps((__m512)x, 8); }
inline vec times_power_of_two(vec p, vec r) {
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)r);
}
// the instruction saturates by itself
inline vec exponent_range(vec x) { return x; }
constexpr float LOWEST_EXPONENT = -104.0f;

#else

// adding 1.5 * 2^23 leaves the rounded integer in the low bits of the mantissa
inline vec round_to_integer(vec x) { return (x + 12582912.0f) - 12582912.0f; }
// r in -127..128; the two ends make 0 and infinity
inline vec times_power_of_two(vec p, vec r) {
  return p * (vec)(((ivec)(r + 12582912.0f) + (127 - 0x4b400000)) << 23);
}
inline vec exponent_range(vec x) { return at_most(at_least(x, -127.0f), 128.0f); }
constexpr float LOWEST_EXPONENT = -88.0f;

#endif

// 2^x for finite x
inline vec exp2(vec x) {
  x = exponent_range(x);
  const vec r = round_to_integer(x);
  return times_power_of_two(exp2_fraction(x - r), r);
}

// e^x for any x; two parts of ln 2, so that a large |x| costs no accuracy
inline vec exp(vec x) {
  x = at_most(at_least(x, LOWEST_EXPONENT), 88.8f);
  const vec r = round_to_integer(x * 1.44269504f);
  vec f = x - r * 0.693359375f;
  f = f + r * 2.12194440e-4f;
  return times_power_of_two(exp2_fraction(f * 1.44269504f), r);
}

inline vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }
inline vec silu(vec x) { return x / (1.0f + exp(-x)); }
// the derivative of silu, from x and sigmoid(x)
inline vec silu_slope(vec x, vec s) { return s + x * s * (1.0f - s); }

// log(1 + e) for 0 <= e <= 1, as 2 atanh(e / (2 + e)): no digit is lost for small e
inline vec log1p_unit(vec e) {
  const vec s = e / (2.0f + e);
  const vec w = s * s;
  vec p = splat(0.121447788055f);
  p = p * w + 0.107153704404f;
  p = p * w + 0.143082983635f;
  p = p * w + 0.199994441777f;
  p = p * w + 0.333333377502f;
  return 2.0f * s + 2.0f * s * w * p;
}

// log(1 + e^x); above 20 it differs from x by less than half a unit in the last place
inline vec softplus(vec x) {
  const vec positive = (vec)((ivec)x & ~(x < vec{}));
  return positive + log1p_unit(exp(-abs(x)));
}

// While it lives, this thread takes denormal numbers for zero: a decaying state ends in them, they
// are below 1e-38, and x86 computes with them a hundred times slower.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
 public:
  FlushDenormals() {}
#endif
};

// memory for vectors; it holds anything until `clear`
class Buffer {
 public:
  explicit Buffer(int64_t vectors)
      : bytes_(sizeof(vec) * (vectors > 0 ? vectors : 1)),
        data_(static_cast<vec*>(::operator new(bytes_, std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  vec* at(int64_t i) { return data_ + i; }
  const vec* at(int64_t i) const { return data_ + i; }
  vec& operator[](int64_t i) { return data_[i]; }
  void clear() { std::memset(static_cast<void*>(data_), 0, bytes_); }

 private:
  size_t bytes_;
  vec* data_;
};

}  // namespace svp
