// Residual add with RMSNorm or LayerNorm, forward and backward. One warp per token, the token's
// numbers in registers.
//
// Macros: HIDDEN_T, RESIDUAL_IN_T, RESIDUAL_T, W_T, BIAS_T (types of hidden and y, of the residual
// read and of the residual written, of weight and bias), D_MODEL, PACK (elements of one access, divides
// D_MODEL), HAS_RESIDUAL, HAS_BIAS, HAS_MASK, RMS; backward: HAS_GRAD_RESIDUAL, NEED_WEIGHT, NEED_BIAS.
#include "norm.cuh"

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
