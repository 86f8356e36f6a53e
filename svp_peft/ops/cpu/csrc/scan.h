// Arguments of the scan kernels, as Python fills them in (svp_peft/ops/cpu/scan.py): every field
// takes eight bytes. Names and shapes are those of svp_peft/ops/reference/scan.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rows.h"
#include "vec.h"

namespace svp {

struct Shape {
  int64_t batch, length, d_inner, d_state, dt_rank, directions;
  int64_t softplus, A_is_log;
};

// an absent tensor is null
struct Direction {
  Input u, dt, B, C;
  const float *A, *D, *dt_weight, *dt_bias;
  int64_t reverse;

  int64_t token(int64_t step, int64_t length) const { return reverse ? length - 1 - step : step; }
  // the token whose turn comes a tile later; rows lie too far apart for the processor to guess it
  int64_t token_ahead(int64_t step, int64_t length) const {
    return token(std::max<int64_t>(0, std::min(step, length - 1)), length);
  }
};

// one direction's gradients; a null one is not wanted, except `delta`
struct Gradients {
  Output u, B, C;
  Output delta;  // of softplus' argument; always there, it also keeps that argument for a while
  float *A, *D, *dt_bias;
};

struct ForwardArguments {
  Shape shape;
  Direction direction[2];
  Input z;
  Output out, y;
};

struct BackwardArguments {
  Shape shape;
  Direction direction[2];
  Gradients gradients[2];
  Input grad, z, y;
  Output z_gradient;
};

// States per block of registers and steps per tile: what a tile keeps should fit the L1 cache.
#if SVP_AVX512 || defined(__aarch64__)
constexpr int STATES = 8;
#else
constexpr int STATES = 4;
#endif
constexpr int TILE = 16;

constexpr float LOG2_E = 1.44269504f;
constexpr float LN_2 = 0.69314718f;

// One direction's parameters with the channels of a vector side by side:
// per block of LANES channels A * log2(e) [states], W_dt [dt_rank], bias, D.
class Parameters {
 public:
  Parameters(const Shape& shape, const Direction& direction);

  const vec* decay(int64_t block) const { return data_.at(block * stride_); }
  const vec* dt_weight(int64_t block) const { return decay(block) + states_; }
  vec dt_bias(int64_t block) const { return decay(block)[stride_ - 2]; }
  vec skip(int64_t block) const { return decay(block)[stride_ - 1]; }
  // d_state rounded up to whole blocks of registers; the states added have A = B = C = 0
  int64_t states() const { return states_; }

 private:
  int64_t states_, stride_;
  Buffer data_;
};

// What softplus is applied to, for `steps` steps from `step` on: [TILE] vectors.
void time_step_tile(const Shape& shape, const Direction& direction, const Parameters& parameters,
                    int64_t b, int64_t step, int steps, int64_t channel, int lanes, vec* result);

// Rows of B or C for the same steps, with zeros for the added states: [TILE][states] floats.
void state_rows_tile(const Shape& shape, const Direction& direction, const Input& rows, int64_t b,
                     int64_t step, int steps, int64_t states, float* result);

}  // namespace svp
