// What the kernels of the residual add and norm share: a token's row in the registers of one warp.
//
// Macros: D_MODEL, PACK (elements of one access, divides D_MODEL), RMS.
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int ACCESSES = (D_MODEL + 32 * PACK - 1) / (32 * PACK);  // of a lane per token
constexpr bool EVEN = D_MODEL % (32 * PACK) == 0;

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
