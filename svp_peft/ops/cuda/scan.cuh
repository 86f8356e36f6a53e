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
  // rows: TILE rows of RANK_PITCH elements; dt: TILE rows of 33 floats
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
        dt[(2 * q + j % 2) * 33 + m * 16 + g + j / 2 * 8] = step_size(c[j]);
    }
  }
};
// Columns from RANK on are never loaded, and must not be NaN.
DEVICE void clear_rank_padding(ACT* rows, int lane) {
  for (int i = lane; i < TILE * RANK_PITCH; i += 32) rows[i] = ACT{0};
}
#endif
