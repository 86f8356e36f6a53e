// The two prompts of SVP added to the tokens, and the sum added to the residual stream and normalised:
// prompt_forward of prompt.cu and add_norm_forward of norm.cu in one pass, to the same bits. One warp
// per token.
//
// Macros: ACT (of x, cross, inner, y), RESIDUAL_T, W_T, BIAS_T, D_MODEL, PACK, RMS, HAS_BIAS, HAS_MASK,
// IS_SKIPPED(t).
#include "norm.cuh"

struct Args {
  const ACT *x, *cross, *inner;  // cross, inner: before their activation
  const float *alpha, *beta;
  const RESIDUAL_T* residual;
  const W_T* weight;
  const BIAS_T* bias;
  ACT* y;
  RESIDUAL_T* total;
  const float* mask;  // one number per image that the prompted tokens are multiplied with, or null
  int tokens, length, cross_row, inner_row;
  float eps, mask_scale;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    prompt_norm_forward(const __grid_constant__ Args args) {
  const int lane = threadIdx.x % 32, token = blockIdx.x * WARPS + threadIdx.x / 32;
  if (token >= args.tokens) return;
  const i64 row = (i64)token * D_MODEL;
  float total[ACCESSES][PACK], before[ACCESSES][PACK], weight[ACCESSES][PACK];
  read_row(args.x + row, lane, total);
  const int t = token % args.length;
  if (!(IS_SKIPPED(t))) {
    float sum[ACCESSES][PACK];
    read_row(args.inner + (i64)token * args.inner_row, lane, before);
    read_row(args.beta, lane, weight);
    EACH(i, p) sum[i][p] = weight[i][p] * (before[i][p] * sigmoid(before[i][p]));
    read_row(args.cross + (i64)token * args.cross_row, lane, before);
    read_row(args.alpha, lane, weight);
    EACH(i, p) sum[i][p] = fmaf(weight[i][p], before[i][p] * sigmoid(before[i][p]), sum[i][p]);
    // rounded as where the prompted tokens are a tensor of their own
    EACH(i, p) total[i][p] = widen(narrowed<ACT>(total[i][p] + sum[i][p]));
  }
  if constexpr (HAS_MASK) {
    const float keep = args.mask[token / args.length] * args.mask_scale;
    EACH(i, p) total[i][p] *= keep;
  }
  read_row(args.residual + row, lane, before);
  EACH(i, p) total[i][p] += before[i][p];
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
