// dB and dC: the partial sums of the scan's blocks, added in a fixed order and written to their rows.
//
// Macros: ACT, D_STATE, DIRECTIONS, NEED_B, NEED_C.
#include "common.cuh"

struct Args {
  const float *parts_B, *parts_C;  // [part][direction][token][state]
  ACT *dB[2], *dC[2];              // rows of D_STATE elements, b_row and c_row apart
  int parts, tokens, b_row, c_row;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

DEVICE void reduce(const float* parts, int count, i64 stride, i64 at, ACT* out) {
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
  for (int p = 0; p < count; p++) {
    const float4 v = *(const float4*)(parts + p * stride + at);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  narrow(sum.x, out[0]);
  narrow(sum.y, out[1]);
  narrow(sum.z, out[2]);
  narrow(sum.w, out[3]);
}

extern "C" __global__ void __launch_bounds__(256) reduce_BC(const __grid_constant__ Args args) {
  constexpr int QUADS = D_STATE / 4;
  const i64 i = (i64)blockIdx.x * 256 + threadIdx.x, per_direction = (i64)args.tokens * QUADS;
  if (i >= per_direction * DIRECTIONS) return;
  const int direction = i / per_direction;
  const i64 token = i % per_direction / QUADS;
  const int n = i % QUADS * 4;
  const i64 stride = per_direction * DIRECTIONS * 4;
  if constexpr (NEED_B)
    reduce(args.parts_B, args.parts, stride, i * 4, args.dB[direction] + token * args.b_row + n);
  if constexpr (NEED_C)
    reduce(args.parts_C, args.parts, stride, i * 4, args.dC[direction] + token * args.c_row + n);
}
