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

template <class T> struct is_float32 { static constexpr bool value = false; };
template <> struct is_float32<float> { static constexpr bool value = true; };

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

// log(1 + exp(x)), the identity above 20. EXACT keeps float32 accuracy; otherwise the logarithm is
// the special function unit's, whose absolute error would drown small results, so those are summed.
template <bool EXACT> DEVICE float softplus(float x) {
  const float e = ex2(x * LOG2E);
  if constexpr (EXACT) return x > 20.f ? x : log1pf(e);
  const float series = e * fmaf(e, fmaf(e, 0.33333333f, -0.5f), 1.f);
  const float l = e < 0.02f ? series : LN2 * lg2(1.f + e);
  return x > 20.f ? x : l;
}
// The slope of softplus at the argument whose softplus is d: 1 - exp(-d).
template <bool EXACT> DEVICE float softplus_slope(float d) {
  if constexpr (EXACT) return -expm1f(-d);
  const float series = d * fmaf(d, fmaf(d, 0.16666667f, -0.5f), 1.f);
  return d < 0.05f ? series : 1.f - ex2(-LOG2E * d);
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

// load_rows for a walk: the same rows tile after tile, each lane's address kept and moved along, which
// takes a fraction of the instructions. Rows outside the sequence become zeros.
template <int BYTES, int ROWS, int WIDTH, int PITCH, class T> struct RowWalk {
  static constexpr int E = BYTES > 0 ? BYTES / sizeof(T) : 1, PER_ROW = WIDTH / E;
  static constexpr int TOTAL = ROWS * PER_ROW, SHOTS = BYTES > 0 ? (TOTAL + 31) / 32 : 1;
  const T* from;        // the lane's place in the tile that comes next
  const T* base;        // the first row of the tensor, for tiles without asynchronous copies
  int stride, row_stride;
  bool back;

  // direction: +1 where a tile's rows are steps first, first + 1, ..; -1 where they descend
  DEVICE void start(const T* tensor, int row, int first, int direction, int length, bool reversed,
                    int lane) {
    base = tensor, row_stride = row, back = reversed;
    stride = reversed ? -direction * row : direction * row;
    const int token = reversed ? length - 1 - first : first;
    from = tensor + (i64)token * row + lane / PER_ROW * stride + lane % PER_ROW * E;
  }
  // Copies the tile whose first row is step s; rows low .. high - 1 exist.
  DEVICE void load(T* shared, int s, int direction, int low, int high, int length, int lane,
                   int valid = WIDTH) {
    if constexpr (BYTES > 0) {
#pragma unroll
      for (int shot = 0; shot < SHOTS; shot++) {
        const int i = shot * 32 + lane, r = i / PER_ROW, p = i % PER_ROW * E;
        const int ahead = (r - lane / PER_ROW) * stride + p - lane % PER_ROW * E;
        if (TOTAL % 32 == 0 || i < TOTAL)
          copy_async_if<BYTES>(shared + r * PITCH + p, from + ahead, r >= low && r < high);
      }
      from += ROWS * stride;
    } else {
      load_rows<0, ROWS, WIDTH, PITCH>(shared, base, row_stride, s, direction, length, back, lane,
                                       valid);
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
    const i64 at = (i64)(reversed ? length - 1 - s : s) * row_stride + p;
    if (s < limit && (BYTES > 0 || p < valid))
      *(Pack<T, E>*)(global + at) = *(const Pack<T, E>*)(shared + r * WIDTH + p);
  }
}

// Widen COUNT staged elements (a multiple of 4) to float, by one warp.
template <int COUNT, class T> DEVICE void widen_rows(float* out, const T* in, int lane) {
#pragma unroll
  for (int i0 = 0; i0 < COUNT; i0 += 128) {
    const int i = i0 + lane * 4;
    if (COUNT % 128 == 0 || i < COUNT) {
      const Pack<T, 4> four = *(const Pack<T, 4>*)(in + i);
      *(float4*)(out + i) =
          make_float4(widen(four.v[0]), widen(four.v[1]), widen(four.v[2]), widen(four.v[3]));
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
  DEVICE explicit Selector(int lane) {
#pragma unroll
    for (int j = 0; j < 8; j++) e[j] = lane / 4 == j ? 1.f : 0.f;
  }
};

template <bool EXACT, int G> DEVICE float4 quad_sum(const float* v, const Selector& one) {
  float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < G / 4; i++) {
    const float a0 = v[4 * i], a1 = v[4 * i + 2], a2 = v[4 * i + 1], a3 = v[4 * i + 3];
    if constexpr (EXACT) {
      const float h0 = __uint_as_float(__float_as_uint(a0) & 0xffffe000u);
      const float h1 = __uint_as_float(__float_as_uint(a1) & 0xffffe000u);
      const float h2 = __uint_as_float(__float_as_uint(a2) & 0xffffe000u);
      const float h3 = __uint_as_float(__float_as_uint(a3) & 0xffffe000u);
      mma_8(c, h0, h1, h2, h3, one.e[2 * i], one.e[2 * i + 1]);
      mma_8(c, a0 - h0, a1 - h1, a2 - h2, a3 - h3, one.e[2 * i], one.e[2 * i + 1]);
    } else {
      mma_8(c, a0, a1, a2, a3, one.e[2 * i], one.e[2 * i + 1]);
    }
  }
  return make_float4(c[0], c[1], c[2], c[3]);
}
