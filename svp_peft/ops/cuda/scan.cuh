// What the scan kernels share: their arguments, the decay rates, and dt_proj on the tensor cores.
//
// Macros of a scan kernel
//   ACT                     type of u, dt, B, C, z and of everything written: float, bf16 or fp16
//   A_T, D_T, W_T, BIAS_T   types of the parameters A (or A_log), D, dt_weight, dt_bias
//   D_INNER                 channels, or 0 where they are only known at run time
//   D_STATE                 8, 16, 32 or 64
//   DIRECTIONS, REVERSED    1 or 2; whether direction 0 is reversed (direction 1 is its opposite)
//   RANK                    dt_rank where dt_proj is folded in (16-bit ACT only), 0 where dt is given
//   HAS_Z, HAS_D, HAS_BIAS, SOFTPLUS, A_IS_LOG      0 or 1
//   COPY_TILE, COPY_ROWS    bytes of one asynchronous copy from u, z, dt, y and from B, C and low-rank
//                           dt rows: what their alignment allows, 0 for none
// Tensors are channels-last; an image's rows follow each other, `*_row` elements apart.
#include "common.cuh"

constexpr bool EXACT = is_float32<ACT>::value;
constexpr int TILE = 8;                          // time steps that are loaded at once
constexpr int CHANNELS = 32;                     // per warp
constexpr int TILE_ELEMENTS = TILE * CHANNELS;
constexpr int DT_PITCH = 36;                     // floats: 4 apart modulo 32 spreads the banks
constexpr int RANK_PADDED = (RANK + 15) / 16 * 16;
constexpr int RANK_PITCH = RANK_PADDED + 8;      // 8 apart: fragment loads without bank conflicts

struct ScanInputs {
  const ACT *u[2], *dt[2], *B[2], *C[2], *z;
  const A_T* A[2];
  const D_T* D[2];
  const W_T* dt_weight[2];
  const BIAS_T* dt_bias[2];
  int batch, length, channels, u_row, dt_row, b_row, c_row, z_row;
  float scale;
};

DEVICE bool is_reversed(int direction) { return (REVERSED != 0) != (direction == 1); }

// A * log2(e), so that the decay exp(dt A) is one ex2.
DEVICE float decay_rate(const A_T* A, i64 index) {
  const float a = widen(A[index]);
  return (A_IS_LOG ? -expf(a) : a) * LOG2E;
}

DEVICE float step_size(float raw) {
  if constexpr (SOFTPLUS) return softplus<EXACT>(raw);
  return raw;
}

// Eight 16-bit numbers side by side in shared memory.
template <class T> DEVICE void widen_eight(float* to, const T* from) {
  const Pack<u32, 4> pairs = *(const Pack<u32, 4>*)from;
#pragma unroll
  for (int j = 0; j < 4; j++) widen_pair(T{}, pairs.v[j], to[2 * j], to[2 * j + 1]);
}

#if RANK > 0
// dt of 32 channels and 8 steps = dt_weight (32 x RANK) times the transposed low-rank rows, on the
// tensor cores. The weight's fragments wait in shared memory: once per tile they cost a few loads,
// in registers they would cost occupancy.
struct StepProjection {
  alignas(16) uint4 weight[2][RANK_PADDED / 16][32];
  float bias[CHANNELS];

  DEVICE u32 pair(const W_T* w, int channel, int k, int channels) const {
    u32 bits = 0;
#pragma unroll
    for (int j = 0; j < 2; j++)
      if (channel < channels && k + j < RANK)
        bits |= (u32)narrowed<ACT>(widen(w[(i64)channel * RANK + k + j])).bits << (16 * j);
    return bits;
  }
  DEVICE void load(const W_T* w, const BIAS_T* b, int first_channel, int channels, int lane) {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int k = 0; k < RANK_PADDED / 16; k++) {
        const int c = first_channel + m * 16 + g, r = k * 16 + 2 * q;
        weight[m][k][lane] = make_uint4(pair(w, c, r, channels), pair(w, c + 8, r, channels),
                                        pair(w, c, r + 8, channels), pair(w, c + 8, r + 8, channels));
      }
    const bool present = HAS_BIAS && first_channel + lane < channels;
    bias[lane] = present ? widen(b[first_channel + lane]) : 0.f;
  }
  // rows: TILE rows of RANK_PITCH elements; dt: TILE rows of DT_PITCH floats
  DEVICE void run(const ACT* rows, float* dt, int lane) const {
    const int g = lane / 4, q = lane % 4;
    const u32* words = (const u32*)rows + g * (RANK_PITCH / 2) + q;
#pragma unroll
    for (int m = 0; m < 2; m++) {
      const float low = bias[m * 16 + g], high = bias[m * 16 + g + 8];
      float c[4] = {low, low, high, high};
#pragma unroll
      for (int k = 0; k < RANK_PADDED / 16; k++) {
        const uint4 w = weight[m][k][lane];
        mma_16(ACT{}, c, w.x, w.y, w.z, w.w, words[k * 8], words[k * 8 + 4]);
      }
#pragma unroll
      for (int j = 0; j < 4; j++)
        dt[(2 * q + j % 2) * DT_PITCH + m * 16 + g + j / 2 * 8] = step_size(c[j]);
    }
  }
};
// Columns from RANK on are never loaded, and must not be NaN.
DEVICE void clear_rank_padding(ACT* rows, int lane) {
  for (int i = lane; i < TILE * RANK_PITCH; i += 32) rows[i] = ACT{0};
}
#endif

// ------------------------------------------------------------ sums over the channels of a block
// The order of states in which quad_sum takes and gives sums such that its products and those of
// add_up have their four operands, and their results, in registers side by side.
DEVICE constexpr int middle_swapped(int n) { return n / 4 * 4 + n % 2 * 2 + n / 2 % 2; }

// Per step of a tile: 8 quads of lanes x 16 states.
typedef float4 QuadSums[TILE][32];

// Where the sums of a quad over states 4q .. 4q + 3 wait: so that neither those who write a step nor
// those who add it up meet in a bank.
DEVICE int place_of(int quad, int q) { return quad * 4 + (q ^ (quad & 2)); }

// Adds the 8 quads x COUNT warps of every step and state of a tile, two steps at a time on the
// tensor cores: a row is one of two states of a step, a column one of two pairs, and the quads are
// summed over. This swaps the middle two of four states, and so undoes `middle_swapped`. To halves it
// adds what tf32 cuts off; the coarser bf16 does not notice.
// to: where the warp's first two steps have their sums; exists: how many steps of the tile do.
template <int COUNT>
DEVICE void add_up(const QuadSums* sums, float* to, int step_stride, int exists,
                   const Selector& one, int warp, int lane) {
  const int half = lane / 16, quarter = lane / 4 % 4, quad = lane % 4;
#pragma unroll
  for (int turn = 0; turn < 4 / COUNT; turn++) {
    const int i = turn * COUNT * 2;
    float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int w = 0; w < COUNT; w++) {
      const float4* rows = sums[w][i + warp * 2 + half];
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const float4 v = rows[place_of(quad + j, quarter)];
        add_selected<is_fp16<ACT>::value>(c, v.x, v.y, v.z, v.w, one.e[0], one.e[1]);
      }
    }
    if (quad == 0 && quarter * 4 < D_STATE && i + warp * 2 + half < exists)
      *(Pack<u32, 4>*)(to + i * step_stride) = {__float_as_uint(c[0]), __float_as_uint(c[1]),
                                                __float_as_uint(c[2]), __float_as_uint(c[3])};
  }
}
