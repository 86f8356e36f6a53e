#include "parallel.h"
#include "scan.h"

#include <algorithm>

namespace svp {

Parameters::Parameters(const Shape& shape, const Direction& direction)
    : states_(ceil_div(shape.d_state, STATES) * STATES),
      stride_(states_ + shape.dt_rank + 2),
      data_(ceil_div(shape.d_inner, LANES) * stride_) {
  data_.clear();
  auto pack = [&](int64_t block) {
    const int64_t first = block * LANES;
    const int lanes = static_cast<int>(std::min<int64_t>(LANES, shape.d_inner - first));
    vec* to = data_.at(block * stride_);
    for (int i = 0; i < lanes; ++i) {
      const int64_t channel = first + i;
      for (int64_t n = 0; n < shape.d_state; ++n)
        to[n][i] = direction.A[channel * shape.d_state + n];
      if (direction.dt_weight)
        for (int64_t r = 0; r < shape.dt_rank; ++r)
          to[states_ + r][i] = direction.dt_weight[channel * shape.dt_rank + r];
      if (direction.dt_bias) to[stride_ - 2][i] = direction.dt_bias[channel];
      if (direction.D) to[stride_ - 1][i] = direction.D[channel];
    }
    for (int64_t n = 0; n < shape.d_state; ++n)
      to[n] = shape.A_is_log ? -LOG2_E * exp(to[n]) : LOG2_E * to[n];
  };
  run_tasks(ceil_div(shape.d_inner, LANES), pack);
}

void time_step_tile(const Shape& shape, const Direction& direction, const Parameters& parameters,
                    int64_t b, int64_t step, int steps, int64_t channel, int lanes, vec* result) {
  const int64_t block = channel / LANES;
  const vec bias = parameters.dt_bias(block);
  if (!direction.dt_weight) {
    for (int s = 0; s < steps; ++s) {
      const int64_t t = direction.token(step + s, shape.length);
      result[s] = load(direction.dt.at(b, t) + channel, lanes) + bias;
    }
    return;
  }
  // a small matrix product, four steps to a block of registers; the last block repeats a row
  constexpr int ROWS = 4;
  const vec* weight = parameters.dt_weight(block);
  for (int s = 0; s < steps; s += ROWS) {
    const float* row[ROWS];
    vec total[ROWS];
    for (int i = 0; i < ROWS; ++i) {
      const int64_t last = step + std::min(s + i, steps - 1);
      row[i] = direction.dt.at(b, direction.token(last, shape.length));
      total[i] = bias;
    }
    for (int64_t r = 0; r < shape.dt_rank; ++r)
      for (int i = 0; i < ROWS; ++i) total[i] = total[i] + weight[r] * row[i][r];
    for (int i = 0; i < ROWS; ++i) result[s + i] = total[i];
  }
}

void state_rows_tile(const Shape& shape, const Direction& direction, const Input& rows, int64_t b,
                     int64_t step, int steps, int64_t states, float* result) {
  for (int s = 0; s < steps; ++s) {
    const float* row = rows.at(b, direction.token(step + s, shape.length));
    std::copy(row, row + shape.d_state, result + s * states);
    std::fill(result + s * states + shape.d_state, result + (s + 1) * states, 0.0f);
  }
}

}  // namespace svp
