// The six weights of the prompters of some blocks, converted and laid side by side for the products:
// per block [W | D] and its bias, U and its bias, each at an offset that keeps it aligned.
//
// Macros: ACT (of the copies), W_T (of the weights), BLOCKS, EACH (elements of a thread).
#include "common.cuh"

struct Args {
  const W_T* weight[BLOCKS][6];  // W, b, D, c, U, d
  ACT* out;
  int begin[6];                  // offset of each in a block's share of `out`
  int count[6];
  int share;                     // elements of `out` per block
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

extern "C" __global__ void __launch_bounds__(256) pack_prompters(const __grid_constant__ Args args) {
  const int first = blockIdx.x * 256 * EACH + threadIdx.x, block = blockIdx.z;
  ACT* out = args.out + (i64)block * args.share;
#pragma unroll
  for (int k = 0; k < 6; k++) {
    if (blockIdx.y != k) continue;
    float several[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int i = first + j * 256;
      several[j] = i < args.count[k] ? widen(args.weight[block][k][i]) : 0.f;
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int i = first + j * 256;
      if (i < args.count[k]) narrow(several[j], out[args.begin[k] + i]);
    }
  }
}
