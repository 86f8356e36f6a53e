// Residual add with RMSNorm or LayerNorm, forward and backward. One warp per token, the token's
// numbers in registers.
//
// Macros: HIDDEN_T, RESIDUAL_IN_T, RESIDUAL_T, W_T, BIAS_T (types of hidden and y, of the residual
// read and of the residual written, of weight and bias), D_MODEL, PACK (elements of one access, divides
// D_MODEL), HAS_RESIDUAL, HAS_BIAS, HAS_MASK, RMS; backward: HAS_GRAD_RESIDUAL, NEED_WEIGHT, NEED_BIAS.
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int ACCESSES = (D_MODEL + 32 * PACK - 1) / (32 * PACK);  // of a lane per token
constexpr bool EVEN = D_MODEL % (32 * PACK) == 0;

struct Args {
  const HIDDEN_T* hidden;        // forward: hidden; backward: grad_y
  const RESIDUAL_IN_T* residual; // forward: residual or null; backward: unused
  const W_T* weight;
  const BIAS_T* bias;
  HIDDEN_T* y;                   // forward: y; backward: dhidden
  RESIDUAL_T* total;             // forward: residual_out, written; backward: read
  const RESIDUAL_T* grad_total;  // backward: gradient of residual_out, or null
  RESIDUAL_IN_T* dresidual;      // backward, or null
  float* partial;                // backward: [block][2][D_MODEL], gradients of weight and bias
  const float* mask;             // one number per image that hidden is multiplied with, or null
  int tokens, length;            // length: tokens of an image
  float eps, mask_scale;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

DEVICE float warp_sum(float v) {
#pragma unroll
  for (int m = 16; m; m /= 2) v += __shfl_xor_sync(~0u, v, m);
  return v;
}
// A lane's share of one row; columns outside become zero.
template <class T> DEVICE void read_row(const T* row, int lane, float (*out)[PACK]) {
#pragma unroll
  for (int i = 0; i < ACCESSES; i++) {
    const int column = (i * 32 + lane) * PACK;
    Pack<T, PACK> e;
    if (EVEN || column < D_MODEL) e = *(const Pack<T, PACK>*)(row + column);
#pragma unroll
    for (int p = 0; p < PACK; p++) out[i][p] = EVEN || column < D_MODEL ? widen(e.v[p]) : 0.f;
  }
}
template <class T> DEVICE void write_row(T* row, int lane, const float (*values)[PACK]) {
#pragma unroll
  for (int i = 0; i < ACCESSES; i++) {
    const int column = (i * 32 + lane) * PACK;
    Pack<T, PACK> e;
#pragma unroll
    for (int p = 0; p < PACK; p++) narrow(values[i][p], e.v[p]);
    if (EVEN || column < D_MODEL) *(Pack<T, PACK>*)(row + column) = e;
  }
}
#define EACH(i, p)                         \
  _Pragma("unroll") for (int i = 0; i < ACCESSES; i++) \
  _Pragma("unroll") for (int p = 0; p < PACK; p++)

// total - mean (LayerNorm) and 1 / sqrt(variance + eps)
DEVICE float normaliser(float (*total)[PACK], int lane, float eps) {
  if constexpr (!RMS) {
    float mean = 0.f;
    EACH(i, p) mean += total[i][p];
    mean = warp_sum(mean) / D_MODEL;
    EACH(i, p) total[i][p] = EVEN || (i * 32 + lane) * PACK < D_MODEL ? total[i][p] - mean : 0.f;
  }
  float square = 0.f;
  EACH(i, p) square = fmaf(total[i][p], total[i][p], square);
  return rsqrtf(warp_sum(square) / D_MODEL + eps);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    add_norm_forward(const __grid_constant__ Args args) {
  const int lane = threadIdx.x % 32, token = blockIdx.x * WARPS + threadIdx.x / 32;
  if (token >= args.tokens) return;
  const i64 row = (i64)token * D_MODEL;
  float total[ACCESSES][PACK], weight[ACCESSES][PACK];
  read_row(args.hidden + row, lane, total);
  if constexpr (HAS_MASK) {
    const float keep = args.mask[token / args.length] * args.mask_scale;
    EACH(i, p) total[i][p] *= keep;
  }
  if constexpr (HAS_RESIDUAL) {
    float before[ACCESSES][PACK];
    read_row(args.residual + row, lane, before);
    EACH(i, p) total[i][p] += before[i][p];
  }
  write_row(args.total + row, lane, total);
  const float scale = normaliser(total, lane, args.eps);
  read_row(args.weight, lane, weight);
  EACH(i, p) total[i][p] *= scale * weight[i][p];
  if constexpr (HAS_BIAS) {
    read_row(args.bias, lane, weight);
    EACH(i, p) total[i][p] += weight[i][p];
  }
  write_row(args.y + row, lane, total);
}

// With n = (r - mean) * scale and g = dy * weight: dr = scale (g - mean(g) - n mean(g n)) + the
// gradient of the residual stream; RMSNorm has no mean(g).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    add_norm_backward(const __grid_constant__ Args args) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float weight[ACCESSES][PACK], dweight[ACCESSES][PACK], dbias[ACCESSES][PACK];
  read_row(args.weight, lane, weight);
  EACH(i, p) dweight[i][p] = dbias[i][p] = 0.f;
  for (int token = blockIdx.x * WARPS + warp; token < args.tokens; token += gridDim.x * WARPS) {
    const i64 row = (i64)token * D_MODEL;
    float total[ACCESSES][PACK], grad[ACCESSES][PACK];
    read_row(args.total + row, lane, total);
    read_row(args.hidden + row, lane, grad);
    const float scale = normaliser(total, lane, args.eps);
    float product = 0.f, sum = 0.f;
    EACH(i, p) {
      total[i][p] *= scale;
      if constexpr (NEED_WEIGHT) dweight[i][p] = fmaf(grad[i][p], total[i][p], dweight[i][p]);
      if constexpr (NEED_BIAS) dbias[i][p] += grad[i][p];
      grad[i][p] *= weight[i][p];
      product = fmaf(grad[i][p], total[i][p], product);
      sum += grad[i][p];
    }
    product = warp_sum(product) / D_MODEL;
    sum = RMS ? 0.f : warp_sum(sum) / D_MODEL;
    EACH(i, p) grad[i][p] = scale * (grad[i][p] - sum - total[i][p] * product);
    if constexpr (HAS_GRAD_RESIDUAL) {
      read_row(args.grad_total + row, lane, total);
      EACH(i, p) grad[i][p] += total[i][p];
    }
    if constexpr (HAS_RESIDUAL) write_row(args.dresidual + row, lane, grad);
    if constexpr (HAS_MASK) {
      const float keep = args.mask[token / args.length] * args.mask_scale;
      EACH(i, p) grad[i][p] *= keep;
    }
    write_row(args.y + row, lane, grad);
  }
  if constexpr (NEED_WEIGHT || NEED_BIAS) {
    __shared__ float rows[WARPS][2][D_MODEL];
    EACH(i, p) {
      const int column = (i * 32 + lane) * PACK + p;
      if (column < D_MODEL) {
        rows[warp][0][column] = dweight[i][p];
        rows[warp][1][column] = dbias[i][p];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * D_MODEL; i += 32 * WARPS) {
      float total = 0.f;
      for (int w = 0; w < WARPS; w++) total += (&rows[w][0][0])[i];
      args.partial[(i64)blockIdx.x * 2 * D_MODEL + i] = total;
    }
  }
}
