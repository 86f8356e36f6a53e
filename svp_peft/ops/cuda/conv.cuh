// What the kernels of the short convolution share: its taps and its sliding window.
//
// Macros: ACT, TAPS, PACK, DIRECTIONS, REVERSED (of direction 0), HAS_BIAS.
#include "common.cuh"

constexpr int REACH = TAPS - 1;
constexpr int WINDOW = 2 * REACH + 1;  // x[t - REACH] .. x[t + REACH]

DEVICE bool is_reversed(int k) { return (REVERSED != 0) != (k == 1); }

struct Taps {
  float weight[DIRECTIONS][TAPS][PACK], bias[DIRECTIONS][PACK];
  template <class Args> DEVICE Taps(const Args& args, int channel) {
#pragma unroll
    for (int k = 0; k < DIRECTIONS; k++)
#pragma unroll
      for (int p = 0; p < PACK; p++) {
        bias[k][p] = HAS_BIAS ? widen(args.bias[k][channel + p]) : 0.f;
#pragma unroll
        for (int j = 0; j < TAPS; j++)
          weight[k][j][p] = widen(args.weight[k][(channel + p) * TAPS + j]);
      }
  }
  // window[REACH] is x_t
  DEVICE float pre(int k, int p, const float (*window)[PACK]) const {
    float sum = bias[k][p];
#pragma unroll
    for (int j = 0; j < TAPS; j++) {
      const int at = is_reversed(k) ? REACH + REACH - j : j;
      sum = fmaf(weight[k][j][p], window[at][p], sum);
    }
    return sum;
  }
};

template <int N> DEVICE void shift(float (*window)[PACK]) {
#pragma unroll
  for (int i = 0; i + 1 < N; i++)
#pragma unroll
    for (int p = 0; p < PACK; p++) window[i][p] = window[i + 1][p];
}
