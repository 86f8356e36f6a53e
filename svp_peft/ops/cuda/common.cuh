// Shared by every kernel of this folder: number formats, fast functions, tile loads, warp sums.
//
// No header of the toolkit is included, so NVRTC needs no include path. The launcher passes the
// types and sizes of a call as macros (ACT, D_STATE, ...); each .cu file lists those it reads.

#define DEVICE __device__ __forceinline__

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct bf16 { u16 bits; };
struct fp16 { u16 bits; };

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

DEVICE float widen(float v) { return v; }
DEVICE float widen(bf16 v) { return __uint_as_float((u32)v.bits << 16); }
DEVICE float widen(fp16 v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
  return r;
}

DEVICE void narrow(float v, float& out) { out = v; }
DEVICE void narrow(float v, bf16& out) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v)); }
DEVICE void narrow(float v, fp16& out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v)); }
template <class T> DEVICE T narrowed(float v) {
  T out;
  narrow(v, out);
  return out;
}

// Two 16-bit numbers that lie side by side, the first in the lower half.
DEVICE void widen_pair(bf16, u32 bits, float& first, float& second) {
  first = __uint_as_float(bits << 16), second = __uint_as_float(bits & 0xffff0000u);
}
DEVICE void widen_pair(fp16, u32 bits, float& first, float& second) {
  first = widen(fp16{(u16)bits}), second = widen(fp16{(u16)(bits >> 16)});
}
DEVICE u32 narrow_pair(bf16, float first, float second) {
  u32 bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}
DEVICE u32 narrow_pair(fp16, float first, float second) {
  u32 bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

template <class T> struct is_float32 { static constexpr bool value = false; };
template <> struct is_float32<float> { static constexpr bool value = true; };
template <class T> struct is_fp16 { static constexpr bool value = false; };
template <> struct is_fp16<fp16> { static constexpr bool value = true; };

// N neighbouring elements that travel as one access, or as several of 16 bytes.
template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack { T v[N]; };

DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float sigmoid(float x) { return rcp(1.f + ex2(-LOG2E * x)); }
// d silu / dx, from s = sigmoid(x)
DEVICE float silu_slope(float x, float s) { return s * fmaf(x, 1.f - s, 1.f); }

// log(1 + exp(x)). EXACT keeps float32 accuracy and is the identity above 20. Otherwise the sum
// max(x, 0) + log(1 + e), e = exp(-|x|), with a polynomial for log(1 + e) / e on 0 .. 1 whose relative
// error is 8.4e-6 at most (fitted by Remez exchange): 16-bit inputs are coarser, and small results
// keep their accuracy, which the special function unit's logarithm would not give them.
template <bool EXACT> DEVICE float softplus(float x) {
  if constexpr (EXACT) return x > 20.f ? x : log1pf(ex2(x * LOG2E));
  const float e = ex2(-LOG2E * fabsf(x));
  float p = fmaf(e, -0.0238691517f, 0.101222285f);
  p = fmaf(e, p, -0.21004869f);
  p = fmaf(e, p, 0.32520668f);
  p = fmaf(e, p, -0.499361365f);
  p = fmaf(e, p, 0.999991598f);
  return fmaf(e, p, fmaxf(x, 0.f));
}
// The slope of softplus at the argument whose softplus is d: 1 - exp(-d).
template <bool EXACT> DEVICE float softplus_slope(float d) {
  if constexpr (EXACT) return -expm1f(-d);
  const float series = d * fmaf(d, -0.5f, 1.f);  // off by d^2 / 6 of the result, 1.7e-5 at 0.01
  return d < 0.01f ? series : 1.f - ex2(-LOG2E * d);
}

// ---------------------------------------------------------------------------- asynchronous copies
template <int BYTES> DEVICE void copy_async(void* shared, const void* global) {
  const u32 s = (u32)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(s), "l"(global), "n"(BYTES)
               : "memory");
}
// The same, or zeros and no access to global memory where not `wanted`.
template <int BYTES> DEVICE void copy_async_if(void* shared, const void* global, bool wanted) {
  const u32 s = (u32)__cvta_generic_to_shared(shared);
  const int bytes = wanted ? BYTES : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(s), "l"(global), "n"(BYTES),
               "r"(bytes)
               : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// The place in time of scan step s: a reversed direction walks from the last token to the first.
// Steps outside the sequence are clamped: their loads must be harmless, their values are not used.
DEVICE int token_of(int s, int length, bool reversed) {
  const int inside = min(max(s, 0), length - 1);
  return reversed ? length - 1 - inside : inside;
}

// One warp copies ROWS rows of WIDTH elements into shared memory (row stride PITCH): row r is the
// token of step first + r * direction. BYTES is the size of one asynchronous copy, or 0 where the
// alignment allows none. Columns from `valid` on become zero (BYTES == 0 only).
template <int BYTES, int ROWS, int WIDTH, int PITCH, class T>
DEVICE void load_rows(T* shared, const T* global, int row_stride, int first, int direction,
                      int length, bool reversed, int lane, int valid = WIDTH) {
  if constexpr (BYTES > 0) {
    constexpr int E = BYTES / sizeof(T), PER_ROW = WIDTH / E, TOTAL = ROWS * PER_ROW;
    static_assert(WIDTH % E == 0, "a row must be a whole number of copies");
#pragma unroll
    for (int i0 = 0; i0 < TOTAL; i0 += 32) {
      const int i = i0 + lane, r = i / PER_ROW, p = i % PER_ROW * E;
      if (TOTAL % 32 == 0 || i < TOTAL) {
        const int t = token_of(first + direction * r, length, reversed);
        copy_async<BYTES>(shared + r * PITCH + p, global + (i64)t * row_stride + p);
      }
    }
  } else {
    constexpr int TOTAL = ROWS * WIDTH;
    for (int i = lane; i < TOTAL; i += 32) {
      const int r = i / WIDTH, p = i % WIDTH;
      const int t = token_of(first + direction * r, length, reversed);
      shared[r * PITCH + p] = p < valid ? global[(i64)t * row_stride + p] : narrowed<T>(0.f);
    }
  }
}

// 32 x 32 bits: spelled out, because the compiler makes six instructions of an address otherwise.
DEVICE i64 product(int a, int b) {
  i64 r;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(r) : "r"(a), "r"(b));
  return r;
}

// An address that the compiler takes as it is: free to, it forms it anew from the kernel's arguments
// at every use.
template <class T> DEVICE T* kept(T* address) {
  T* same;
  asm volatile("mov.b64 %0, %1;" : "=l"(same) : "l"(address));
  return same;
}

// A lane's place in tile after tile of a tensor: element `column` of row r, row r being the token of
// step first + r. Kept as the place that a tile at token 0 would have, from which one multiplication
// leads to any other.
template <class T> struct RowPlace {
  T* base;
  int row;
  bool back;

  DEVICE void start(T* tensor, int row_stride, bool reversed, int r, int column) {
    row = row_stride, back = reversed;
    base = tensor + (i64)(reversed ? -r : r) * row + column;
  }
  DEVICE T* at(int first, int length) const {
    const int token = back ? length - 1 - first : first;
    return (T*)((char*)base + product(token * (int)sizeof(T), row));
  }
};

// load_rows for a walk, which takes a fraction of the instructions. Rows outside the sequence become
// zeros.
template <int BYTES, int ROWS, int WIDTH, int PITCH, class T> struct RowWalk {
  static constexpr int E = BYTES > 0 ? BYTES / sizeof(T) : 1, PER_ROW = WIDTH / E;
  static constexpr int TOTAL = ROWS * PER_ROW, SHOTS = BYTES > 0 ? (TOTAL + 31) / 32 : 1;
  RowPlace<const T> place;
  const T* tensor;  // for tiles without asynchronous copies
  int begin;

  // begin: where in a tile the rows start
  DEVICE void start(const T* from, int row, bool reversed, int lane, int first_row = 0) {
    tensor = from, begin = first_row;
    place.start(from, row, reversed, begin + lane / PER_ROW, lane % PER_ROW * E);
    place.base = kept(place.base);
  }
  // Copies rows of the tile that starts at step s.
  DEVICE void load(T* shared, int s, int length, int lane, int valid = WIDTH) {
    if constexpr (BYTES > 0) {
      const T* from = place.at(s, length);
      const int stride = place.back ? -place.row : place.row;
#pragma unroll
      for (int shot = 0; shot < SHOTS; shot++) {
        const int i = shot * 32 + lane, r = i / PER_ROW, p = i % PER_ROW * E;
        const int ahead = (r - lane / PER_ROW) * stride + p - lane % PER_ROW * E;
        if (TOTAL % 32 == 0 || i < TOTAL)
          copy_async_if<BYTES>(shared + r * PITCH + p, from + ahead, s + begin + r < length);
      }
    } else {
      load_rows<0, ROWS, WIDTH, PITCH>(shared, tensor, place.row, s + begin, 1, length, place.back,
                                       lane, valid);
    }
  }
};

// The reverse of load_rows for finished tiles: row r goes to the token of step first + r * direction
// where that step is below `limit`.
template <int BYTES, int ROWS, int WIDTH, class T>
DEVICE void store_rows(T* global, const T* shared, int row_stride, int first, int direction,
                       int limit, int length, bool reversed, int lane, int valid = WIDTH) {
  constexpr int E = BYTES > 0 ? 16 / sizeof(T) : 1, PER_ROW = WIDTH / E, TOTAL = ROWS * PER_ROW;
#pragma unroll
  for (int i0 = 0; i0 < TOTAL; i0 += 32) {
    const int i = i0 + lane, r = i / PER_ROW, p = i % PER_ROW * E, s = first + direction * r;
    const int token = reversed ? length - 1 - s : s;
    T* at = (T*)((char*)(global + p) + product(token * (int)sizeof(T), row_stride));
    if (s < limit && (BYTES > 0 || p < valid))
      *(Pack<T, E>*)at = *(const Pack<T, E>*)(shared + r * WIDTH + p);
  }
}

// Widen COUNT staged elements (a multiple of 4) to float, by one warp.
template <int COUNT, class T> DEVICE void widen_rows(float* out, const T* in, int lane) {
#pragma unroll
  for (int i0 = 0; i0 < COUNT; i0 += 128) {
    const int i = i0 + lane * 4;
    if (COUNT % 128 == 0 || i < COUNT) {
      float4 four;
      if constexpr (sizeof(T) == 2) {
        const Pack<u32, 2> pairs = *(const Pack<u32, 2>*)(in + i);
        widen_pair(T{}, pairs.v[0], four.x, four.y);
        widen_pair(T{}, pairs.v[1], four.z, four.w);
      } else {
        four = *(const float4*)(in + i);
      }
      *(float4*)(out + i) = four;
    }
  }
}

// ----------------------------------------------------------------------------------- tensor cores
// c (16 x 8) += a (16 x 16) b (16 x 8), 16-bit operands, float32 sums
DEVICE void mma_16(bf16, float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma_16(fp16, float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// c (16 x 8) += a (16 x 8) b (8 x 8), operands read as tf32
DEVICE void mma_8(float* c, float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
        "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Sums over channels. Each lane holds G values, one per state, G = 8 or 16. quad_sum leaves in lane
// (group g, place q) = (lane / 4, lane % 4) the sums over its quad of the values 4q .. 4q + 3 (zero
// where 4q >= G). The values are the A operand (row = lane / 4, k = lane % 4), a selector matrix of
// zeros and ones is B, so G / 4 instructions do it. EXACT splits each value into two tf32 numbers.
struct Selector {
  float e[8];
  // Through shuffles that change nothing, because the compiler cannot do those over again: left free
  // it forms the numbers anew for every product, 16 instructions each time.
  DEVICE explicit Selector(int lane) {
#pragma unroll
    for (int j = 0; j < 8; j++) e[j] = __shfl_sync(~0u, lane / 4 == j ? 1.f : 0.f, lane);
  }
};

template <bool EXACT>
DEVICE void add_selected(float* c, float a0, float a1, float a2, float a3, float b0, float b1) {
  if constexpr (EXACT) {
    const float h0 = __uint_as_float(__float_as_uint(a0) & 0xffffe000u);
    const float h1 = __uint_as_float(__float_as_uint(a1) & 0xffffe000u);
    const float h2 = __uint_as_float(__float_as_uint(a2) & 0xffffe000u);
    const float h3 = __uint_as_float(__float_as_uint(a3) & 0xffffe000u);
    mma_8(c, h0, h1, h2, h3, b0, b1);
    a0 -= h0, a1 -= h1, a2 -= h2, a3 -= h3;
  }
  mma_8(c, a0, a1, a2, a3, b0, b1);
}
template <bool EXACT, int G> DEVICE float4 quad_sum(const float* v, const Selector& one) {
  float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < G / 4; i++)
    add_selected<EXACT>(c, v[4 * i], v[4 * i + 2], v[4 * i + 1], v[4 * i + 3], one.e[2 * i],
                        one.e[2 * i + 1]);
  return make_float4(c[0], c[1], c[2], c[3]);
}
