// The two prompts of SVP in a batch whose rows belong to several adapters, forward:
//
//   out[row] = x[row] + alpha[a] silu(cross[p]) + beta[a] silu(inner[p])    a = p / most
//
// at every token but the skipped ones, where p = place[row] is where the row stands in a batch sorted
// by adapter and padded to `most` rows each. Rows with p >= places have no prompt.
//
// Macros: ACT, D_MODEL, PACK (divides D_MODEL), IS_SKIPPED(t).
#include "common.cuh"

constexpr int LANES = D_MODEL / PACK;  // threads that share a token
using Elements = Pack<ACT, PACK>;

struct Args {
  const ACT *x, *cross, *inner;
  const float *alpha, *beta;  // [adapter][D_MODEL]
  const i64* place;
  ACT* out;
  int tokens, length, cross_row, inner_row, most, places;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

extern "C" __global__ void __launch_bounds__(256) prompt_rows(const __grid_constant__ Args args) {
  const i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
  const int token = i / LANES, column = i % LANES * PACK;
  if (token >= args.tokens) return;
  Elements x = *(const Elements*)(args.x + (i64)token * D_MODEL + column);
  const int t = token % args.length, place = (int)args.place[token / args.length];
  if (place < args.places && !(IS_SKIPPED(t))) {
    const i64 from = (i64)place * args.length + t, scale = (i64)(place / args.most) * D_MODEL + column;
    const Elements cross = *(const Elements*)(args.cross + from * args.cross_row + column);
    const Elements inner = *(const Elements*)(args.inner + from * args.inner_row + column);
#pragma unroll
    for (int p = 0; p < PACK; p++) {
      const float c = widen(cross.v[p]), v = widen(inner.v[p]);
      const float sum = args.beta[scale + p] * (v * sigmoid(v));
      narrow(widen(x.v[p]) + fmaf(args.alpha[scale + p], c * sigmoid(c), sum), x.v[p]);
    }
  }
  *(Elements*)(args.out + (i64)token * D_MODEL + column) = x;
}
