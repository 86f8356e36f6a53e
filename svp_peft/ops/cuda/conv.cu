// The short depthwise convolution and its SiLU, both directions at once, forward and backward.
//
//   forward direction   pre_t = bias + sum_j weight_j x[t - (TAPS - 1) + j]
//   reversed            pre_t = bias + sum_j weight_j x[t + (TAPS - 1) - j]        out = silu(pre)
//
// A thread owns PACK neighbouring channels and `chunk` tokens and walks along them with the tokens in
// reach in registers, so each element is loaded once (and again at the seams between chunks).
//
// Macros: ACT, W_T, BIAS_T, TAPS, PACK, DIRECTIONS, REVERSED (of direction 0), HAS_BIAS; backward:
// NEED_X, NEED_WEIGHT, NEED_BIAS.
#include "conv.cuh"

using Elements = Pack<ACT, PACK>;

struct Args {
  const ACT* x;
  const W_T* weight[2];
  const BIAS_T* bias[2];
  ACT* out[2];            // forward
  const ACT* grad[2];     // backward from here on
  ACT* dx;
  float* partial;         // [chunk of an image][direction][TAPS + 1][channel]: dweight, dbias
  int length, channels, x_row, dx_row, chunk;
};
static_assert(sizeof(Args) == ARGS_BYTES, "the launcher packs exactly these fields");

DEVICE Elements fetch(const ACT* from, int t, int length, int row) {
  Elements e;
#pragma unroll
  for (int p = 0; p < PACK; p++) e.v[p] = narrowed<ACT>(0.f);
  if (t >= 0 && t < length) e = *(const Elements*)(from + (i64)t * row);
  return e;
}
DEVICE void unpack(const Elements& e, float* out) {
#pragma unroll
  for (int p = 0; p < PACK; p++) out[p] = widen(e.v[p]);
}

extern "C" __global__ void __launch_bounds__(128) conv_forward(const __grid_constant__ Args args) {
  const int channel = (blockIdx.x * 128 + threadIdx.x) * PACK, length = args.length;
  if (channel >= args.channels) return;
  const int begin = blockIdx.y * args.chunk, end = min(begin + args.chunk, length);
  const ACT* x = args.x + (i64)blockIdx.z * length * args.x_row + channel;
  const Taps taps(args, channel);
  ACT* out[DIRECTIONS];
#pragma unroll
  for (int k = 0; k < DIRECTIONS; k++)
    out[k] = args.out[k] + ((i64)blockIdx.z * length + begin) * args.channels + channel;

  float window[WINDOW][PACK];
#pragma unroll
  for (int i = 1; i < WINDOW; i++)
    unpack(fetch(x, begin - REACH + i - 1, length, args.x_row), window[i]);
  constexpr int AHEAD = 8;
  for (int t0 = begin; t0 < end; t0 += AHEAD) {
    Elements next[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) next[i] = fetch(x, t0 + i + REACH, length, args.x_row);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      shift<WINDOW>(window);
      unpack(next[i], window[WINDOW - 1]);
      if (t0 + i >= end) continue;
#pragma unroll
      for (int k = 0; k < DIRECTIONS; k++) {
        Elements result;
#pragma unroll
        for (int p = 0; p < PACK; p++) {
          const float pre = taps.pre(k, p, window);
          narrow(pre * sigmoid(pre), result.v[p]);
        }
        *(Elements*)out[k] = result;
        out[k] += args.channels;
      }
    }
  }
}

// d pre_s = grad_s silu'(pre_s), and dx_t collects weight_j d pre over the tokens s whose window held
// x_t: s = t .. t + REACH forward, s = t - REACH .. t reversed.
extern "C" __global__ void __launch_bounds__(128) conv_backward(const __grid_constant__ Args args) {
  const int channel = (blockIdx.x * 128 + threadIdx.x) * PACK, length = args.length;
  if (channel >= args.channels) return;
  const int begin = blockIdx.y * args.chunk, end = min(begin + args.chunk, length);
  const ACT* x = args.x + (i64)blockIdx.z * length * args.x_row + channel;
  const ACT* grad[DIRECTIONS];
#pragma unroll
  for (int k = 0; k < DIRECTIONS; k++)
    grad[k] = args.grad[k] + (i64)blockIdx.z * length * args.channels + channel;
  const Taps taps(args, channel);
  ACT* dx = NEED_X ? args.dx + ((i64)blockIdx.z * length + begin) * args.dx_row + channel : nullptr;

  float window[WINDOW][PACK], slopes[DIRECTIONS][WINDOW][PACK];  // slopes: d pre_{s - 2 REACH} .. s
  float dweight[DIRECTIONS][TAPS][PACK], dbias[DIRECTIONS][PACK];
#pragma unroll
  for (int p = 0; p < PACK; p++)
#pragma unroll
    for (int k = 0; k < DIRECTIONS; k++) {
      dbias[k][p] = 0.f;
#pragma unroll
      for (int j = 0; j < TAPS; j++) dweight[k][j][p] = 0.f;
#pragma unroll
      for (int i = 0; i < WINDOW; i++) slopes[k][i][p] = 0.f;
    }
#pragma unroll
  for (int i = 1; i < WINDOW; i++)
    unpack(fetch(x, begin - 2 * REACH + i - 1, length, args.x_row), window[i]);
  constexpr int AHEAD = 4;
  for (int s0 = begin - REACH; s0 < end + REACH; s0 += AHEAD) {
    Elements next[AHEAD], next_grad[DIRECTIONS][AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      next[i] = fetch(x, s0 + i + REACH, length, args.x_row);
#pragma unroll
      for (int k = 0; k < DIRECTIONS; k++)
        next_grad[k][i] = fetch(grad[k], s0 + i, length, args.channels);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int s = s0 + i, t = s - REACH;
      shift<WINDOW>(window);
      unpack(next[i], window[WINDOW - 1]);
      const bool own = s >= begin && s < end;
#pragma unroll
      for (int k = 0; k < DIRECTIONS; k++) {
        shift<WINDOW>(slopes[k]);
        float g[PACK];
        unpack(next_grad[k][i], g);
#pragma unroll
        for (int p = 0; p < PACK; p++) {
          const float pre = taps.pre(k, p, window);
          const float slope = g[p] * silu_slope(pre, sigmoid(pre));
          slopes[k][WINDOW - 1][p] = slope;
          const float counted = own ? slope : 0.f;
          if constexpr (NEED_BIAS) dbias[k][p] += counted;
          if constexpr (NEED_WEIGHT) {
#pragma unroll
            for (int j = 0; j < TAPS; j++) {
              const int at = is_reversed(k) ? REACH + REACH - j : j;
              dweight[k][j][p] = fmaf(counted, window[at][p], dweight[k][j][p]);
            }
          }
        }
      }
      if constexpr (NEED_X) {
        if (t < begin || t >= end) continue;
        Elements result;
#pragma unroll
        for (int p = 0; p < PACK; p++) {
          float sum = 0.f;
#pragma unroll
          for (int k = 0; k < DIRECTIONS; k++)
#pragma unroll
            for (int j = 0; j < TAPS; j++) {
              // slopes[REACH] belongs to token t
              const int at = is_reversed(k) ? REACH - (REACH - j) : REACH + (REACH - j);
              sum = fmaf(taps.weight[k][j][p], slopes[k][at][p], sum);
            }
          narrow(sum, result.v[p]);
        }
        *(Elements*)dx = result;
        dx += args.dx_row;
      }
    }
  }
  if constexpr (NEED_WEIGHT || NEED_BIAS) {
    const i64 slot = (i64)blockIdx.z * gridDim.y + blockIdx.y;
#pragma unroll
    for (int k = 0; k < DIRECTIONS; k++) {
      float* to = args.partial + (slot * DIRECTIONS + k) * (TAPS + 1) * args.channels + channel;
#pragma unroll
      for (int p = 0; p < PACK; p++) {
#pragma unroll
        for (int j = 0; j < TAPS; j++) to[j * args.channels + p] = dweight[k][j][p];
        to[TAPS * args.channels + p] = dbias[k][p];
      }
    }
  }
}
