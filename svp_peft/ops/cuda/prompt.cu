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
  float* partial;  // backward: [block][4][D_MODEL], sums for alpha, beta, and biases of cross, inner
  int tokens, length, cross_row, inner_row, dcross_row;
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

// Beside the gradients of cross and inner, the sums over tokens of what arrives at the scales and at
// the biases in front of the activations. A thread keeps one group of columns, so that these add up in
// registers; a block takes ROWS tokens at once.
constexpr int ROWS = LANES >= 192 ? 1 : 192 / LANES;
constexpr int THREADS = ROWS * LANES < 1024 ? ROWS * LANES : 1024;
constexpr int WIDE = THREADS / ROWS;  // threads per token; below LANES only for very wide models

extern "C" __global__ void __launch_bounds__(THREADS)
    prompt_backward(const __grid_constant__ Args args) {
  __shared__ float sums[4][ROWS][WIDE * PACK];
  const int row = threadIdx.x / WIDE;
  for (int first = 0; first < LANES; first += WIDE) {
    const int lane = first + threadIdx.x % WIDE, column = lane * PACK;
    float total[4][PACK], alpha[PACK], beta[PACK];  // of alpha, beta, cross, inner
#pragma unroll
    for (int p = 0; p < PACK; p++) {
      total[0][p] = total[1][p] = total[2][p] = total[3][p] = 0.f;
      alpha[p] = HAS_CROSS && lane < LANES ? args.alpha[column + p] : 0.f;
      beta[p] = HAS_INNER && lane < LANES ? args.beta[column + p] : 0.f;
    }
    if (lane < LANES) {
#pragma unroll 2
      for (int token = blockIdx.x * ROWS + row; token < args.tokens; token += gridDim.x * ROWS) {
        const int t = token % args.length;
        const bool kept = !(IS_SKIPPED(t));
        const Elements g = *(const Elements*)(args.x + (i64)token * D_MODEL + column);
        auto one = [&](const ACT* from, int from_row, const float* scale, float* dscale, float* dbias,
                       ACT* to, int to_row) {
          const Elements e = *(const Elements*)(from + (i64)token * from_row + column);
          Elements result;
#pragma unroll
          for (int p = 0; p < PACK; p++) {
            const float v = widen(e.v[p]), s = sigmoid(v), grad = kept ? widen(g.v[p]) : 0.f;
            const float before = grad * scale[p] * silu_slope(v, s);
            dscale[p] = fmaf(grad, v * s, dscale[p]);
            dbias[p] += before;
            narrow(before, result.v[p]);
          }
          *(Elements*)(to + (i64)token * to_row + column) = result;
        };
        if constexpr (HAS_CROSS)
          one(args.cross, args.cross_row, alpha, total[0], total[2], args.dcross, args.dcross_row);
        if constexpr (HAS_INNER)
          one(args.inner, args.inner_row, beta, total[1], total[3], args.dinner, D_MODEL);
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int p = 0; p < PACK; p++) sums[k][row][threadIdx.x % WIDE * PACK + p] = total[k][p];
    __syncthreads();
    for (int i = threadIdx.x; i < 4 * WIDE * PACK; i += THREADS) {
      const int k = i / (WIDE * PACK), c = i % (WIDE * PACK);
      float sum = 0.f;
#pragma unroll
      for (int r = 0; r < ROWS; r++) sum += sums[k][r][c];
      if (first * PACK + c < D_MODEL)
        args.partial[((i64)blockIdx.x * 4 + k) * D_MODEL + first * PACK + c] = sum;
    }
  }
}
