// The scan, both directions: a task takes 64 channels of one image, so that both directions' sums
// meet in it; the first leaves y where the second finds it.
#include <algorithm>

#include "parallel.h"
#include "scan.h"

namespace svp {
namespace {

constexpr int64_t TASK_CHANNELS = 64;

// STATES states of LANES channels over one tile; adds C . h to y.
void advance(int steps, int64_t states, const vec* delta, const vec* input, const float* B,
             const float* C, const vec* decay, vec* state, vec* y) {
  vec h[STATES];
  for (int n = 0; n < STATES; ++n) h[n] = state[n];
  for (int s = 0; s < steps; ++s, B += states, C += states) {
    const vec dt = delta[s], x = input[s];
    vec total = y[s];
    for (int n = 0; n < STATES; ++n) {
      h[n] = exp2(dt * decay[n]) * h[n] + x * B[n];
      total = total + h[n] * C[n];
    }
    y[s] = total;
  }
  for (int n = 0; n < STATES; ++n) state[n] = h[n];
}

void scan_channels(const ForwardArguments& a, int k, const Parameters& parameters, float scale,
                   int64_t b, int64_t first, int64_t end) {
  const Shape& shape = a.shape;
  const Direction& direction = a.direction[k];
  const bool last = k + 1 == shape.directions;
  const int64_t states = parameters.states();
  const Output& sums = a.y ? a.y : a.out;
  Buffer state(TASK_CHANNELS / LANES * states);
  state.clear();
  Buffer rows(ceil_div(2 * TILE * states, LANES));
  float* B = reinterpret_cast<float*>(rows.at(0));
  float* C = B + TILE * states;

  for (int64_t step = 0; step < shape.length; step += TILE) {
    const int steps = static_cast<int>(std::min<int64_t>(TILE, shape.length - step));
    state_rows_tile(shape, direction, direction.B, b, step, steps, states, B);
    state_rows_tile(shape, direction, direction.C, b, step, steps, states, C);
    for_channels(first, end, [&](int64_t c, auto lanes) {
      vec delta[TILE], input[TILE], y[TILE];
      time_step_tile(shape, direction, parameters, b, step, steps, c, lanes, delta);
      const vec skip = parameters.skip(c / LANES);
      for (int s = 0; s < steps; ++s) {
        const int64_t t = direction.token(step + s, shape.length);
        const vec u = load(direction.u.at(b, t) + c, lanes);
        const int64_t ahead = direction.token_ahead(step + s + TILE, shape.length);
        __builtin_prefetch(direction.u.at(b, ahead) + c);
        if (k > 0) __builtin_prefetch(sums.at(b, ahead) + c);
        if (a.z && last) __builtin_prefetch(a.z.at(b, ahead) + c);
        if (shape.softplus) delta[s] = softplus(delta[s]);
        input[s] = delta[s] * u;
        y[s] = skip * u;
        if (k > 0) y[s] = y[s] + load(sums.at(b, t) + c, lanes);
      }
      vec* h = state.at((c - first) / LANES * states);
      for (int64_t n = 0; n < states; n += STATES)
        advance(steps, states, delta, input, B + n, C + n, parameters.decay(c / LANES) + n, h + n,
                y);
      for (int s = 0; s < steps; ++s) {
        const int64_t t = direction.token(step + s, shape.length);
        if (!last || a.y) store(sums.at(b, t) + c, y[s], lanes);
        if (!last) continue;
        vec gated = y[s] * scale;
        if (a.z) gated = gated * silu(load(a.z.at(b, t) + c, lanes));
        store(a.out.at(b, t) + c, gated, lanes);
      }
    });
  }
}

void forward(const ForwardArguments& a, float scale) {
  const Shape& shape = a.shape;
  const Parameters first(shape, a.direction[0]);
  const Parameters second(shape, a.direction[shape.directions - 1]);
  const int64_t groups = ceil_div(shape.d_inner, TASK_CHANNELS);
  auto task = [&](int64_t i) {
    const FlushDenormals guard;
    const int64_t b = i / groups, begin = i % groups * TASK_CHANNELS;
    const int64_t end = std::min(begin + TASK_CHANNELS, shape.d_inner);
    for (int k = 0; k < shape.directions; ++k)
      scan_channels(a, k, k == 0 ? first : second, scale, b, begin, end);
  };
  run_tasks(shape.batch * groups, task);
}

}  // namespace
}  // namespace svp

extern "C" int svp_scan_forward(const svp::ForwardArguments* a, int64_t fields, double scale) {
  return svp::called_from_python<svp::ForwardArguments>(
      fields, [&] { svp::forward(*a, static_cast<float>(scale)); });
}
