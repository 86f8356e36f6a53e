// The six weights of a block's prompters, converted and laid side by side for the products:
// [W | D] and its bias, U and its bias, each at an offset that keeps it aligned.
//
// Macros: ACT (of the copies), W_T (of the weights).
#include "common.cuh"

struct Args {
  const W_T* weight[6];  // W, b, D, c, U, d
  ACT* out;
  int begin[6];          // offset of each in `out`
  int count[6];
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

extern "C" __global__ void __launch_bounds__(256) pack_prompters(const __grid_constant__ Args args) {
  const int i = blockIdx.x * 256 + threadIdx.x;
#pragma unroll
  for (int k = 0; k < 6; k++)
    if (blockIdx.y == k && i < args.count[k])
      narrow(widen(args.weight[k][i]), args.out[args.begin[k] + i]);
}
