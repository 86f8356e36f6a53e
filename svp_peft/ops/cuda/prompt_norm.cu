// The two prompts of SVP added to the tokens, and the sum added to the residual stream and normalised:
// prompt_forward of prompt.cu and add_norm_forward of norm.cu in one pass, to the same bits. One warp
// per token.
//
// Macros: ACT (of x, cross, inner, y), RESIDUAL_T, W_T, BIAS_T, D_MODEL, PACK, RMS, HAS_BIAS, HAS_MASK,
// IS_SKIPPED(t).
#include "prompt_norm.cuh"

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
  const RowAt<ACT> x{args.x + row, lane}, cross{args.cross + (i64)token * args.cross_row, lane};
  const RowAt<ACT> inner{args.inner + (i64)token * args.inner_row, lane};
  const RowAt<RESIDUAL_T> residual{args.residual + row, lane};
  prompt_and_normalise(args, token, lane, x, cross, inner, residual);
}
