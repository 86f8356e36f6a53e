// The two prompts of SVP added to the tokens, forward and backward:
//
//   out = x + alpha silu(cross) + beta silu(inner)        at every token but the skipped ones
//
// Macros: ACT, D_MODEL, PACK (divides D_MODEL), HAS_CROSS, HAS_INNER, IS_SKIPPED(t).
#include "common.cuh"

constexpr int LANES = D_MODEL / PACK;  // threads that share a token
using Elements = Pack<ACT, PACK>;

struct Args {
  const ACT *x, *cross, *inner;  // backward: x is the gradient of out
  const float *alpha, *beta;
  ACT *out, *dcross, *dinner;
  float* partial;  // backward: [block][2][D_MODEL], gradients of alpha and beta
  int tokens, length, cross_row, inner_row;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

extern "C" __global__ void __launch_bounds__(256) prompt_forward(const __grid_constant__ Args args) {
  const i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
  const int token = i / LANES, column = i % LANES * PACK;
  if (token >= args.tokens) return;
  Elements x = *(const Elements*)(args.x + (i64)token * D_MODEL + column);
  const int t = token % args.length;
  if (!(IS_SKIPPED(t))) {
    float sum[PACK];
#pragma unroll
    for (int p = 0; p < PACK; p++) sum[p] = 0.f;
    if constexpr (HAS_INNER) {
      const Elements inner = *(const Elements*)(args.inner + (i64)token * args.inner_row + column);
#pragma unroll
      for (int p = 0; p < PACK; p++) {
        const float v = widen(inner.v[p]);
        sum[p] = args.beta[column + p] * (v * sigmoid(v));
      }
    }
    if constexpr (HAS_CROSS) {
      const Elements cross = *(const Elements*)(args.cross + (i64)token * args.cross_row + column);
#pragma unroll
      for (int p = 0; p < PACK; p++) {
        const float v = widen(cross.v[p]);
        sum[p] = fmaf(args.alpha[column + p], v * sigmoid(v), sum[p]);
      }
    }
#pragma unroll
    for (int p = 0; p < PACK; p++) narrow(widen(x.v[p]) + sum[p], x.v[p]);
  }
  *(Elements*)(args.out + (i64)token * D_MODEL + column) = x;
}

// A block is ROWS tokens wide; its threads keep one column group each, so that the gradients of the
// scales add up in registers.
constexpr int ROWS = LANES >= 128 ? 1 : 128 / LANES;
constexpr int THREADS = ROWS * LANES < 1024 ? ROWS * LANES : 1024;

extern "C" __global__ void __launch_bounds__(THREADS)
    prompt_backward(const __grid_constant__ Args args) {
  __shared__ float sums[2][ROWS][D_MODEL];
  for (int lane0 = 0; lane0 < LANES; lane0 += THREADS / ROWS) {
    const int lane = lane0 + threadIdx.x % (THREADS / ROWS), row = threadIdx.x / (THREADS / ROWS);
    const int column = lane * PACK;
    if (lane < LANES) {
      float dalpha[PACK], dbeta[PACK], alpha[PACK], beta[PACK];
#pragma unroll
      for (int p = 0; p < PACK; p++) {
        dalpha[p] = dbeta[p] = 0.f;
        alpha[p] = HAS_CROSS ? args.alpha[column + p] : 0.f;
        beta[p] = HAS_INNER ? args.beta[column + p] : 0.f;
      }
      for (int token = blockIdx.x * ROWS + row; token < args.tokens; token += gridDim.x * ROWS) {
        const int t = token % args.length;
        const bool kept = !(IS_SKIPPED(t));
        const i64 at = (i64)token * D_MODEL + column;
        const Elements g = *(const Elements*)(args.x + at);
        auto one = [&](const ACT* from, int from_row, const float* scale, float* dscale, ACT* to) {
          const Elements e = *(const Elements*)(from + (i64)token * from_row + column);
          Elements result;
#pragma unroll
          for (int p = 0; p < PACK; p++) {
            const float v = widen(e.v[p]), s = sigmoid(v), grad = kept ? widen(g.v[p]) : 0.f;
            dscale[p] = fmaf(grad, v * s, dscale[p]);
            narrow(grad * scale[p] * silu_slope(v, s), result.v[p]);
          }
          *(Elements*)(to + at) = result;
        };
        if constexpr (HAS_CROSS) one(args.cross, args.cross_row, alpha, dalpha, args.dcross);
        if constexpr (HAS_INNER) one(args.inner, args.inner_row, beta, dbeta, args.dinner);
      }
#pragma unroll
      for (int p = 0; p < PACK; p++) {
        sums[0][row][column + p] = dalpha[p];
        sums[1][row][column + p] = dbeta[p];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * D_MODEL; i += THREADS) {
    float total = 0.f;
#pragma unroll
    for (int r = 0; r < ROWS; r++) total += sums[i / D_MODEL][r][i % D_MODEL];
    args.partial[(i64)blockIdx.x * 2 * D_MODEL + i] = total;
  }
}
