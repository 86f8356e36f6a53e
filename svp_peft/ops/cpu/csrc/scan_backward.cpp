// The gradients of the scan. A task takes one direction of one image and a group of channels.
//
// Sweep 1, in scan order, keeps the state at the start of every tile of TILE steps. Sweep 2 walks
// the tiles backwards: it computes the tile's states and decays again, which fit the L1 cache, and
// then carries the adjoint g of the state from its last step to its first:
//
//     g_t      = gy_t C_t + exp(delta_{t+1} A) g_{t+1}              gy: gradient of y
//     du_t     = D gy_t + delta_t (B_t . g_t)
//     ddelta_t = u_t (B_t . g_t) + A . (exp(delta_t A) g_t h_{t-1})
//     dB_t, dC_t = sums over channels of delta_t u_t g_t and of gy_t h_t
//
// Sums over channels, and over images for the parameters, are made in two fixed steps, so that they
// are the same whatever the number of threads.
#include <algorithm>
#include <vector>

#include "parallel.h"
#include "scan.h"

namespace svp {
namespace {

struct Tile {
  vec delta[TILE], input[TILE], gy[TILE], u[TILE], slope[TILE];
  vec input_gradient[TILE], delta_gradient[TILE];  // B . g and A . (...) / ln 2
};

// What one task keeps between tiles and between blocks of channels.
struct Workspace {
  Workspace(int64_t blocks, int64_t tiles, int64_t states)
      : starts(tiles * blocks * states),
        adjoint(blocks * states),
        dB(TILE * states),
        dC(TILE * states),
        dA(blocks * states),
        dD(blocks),
        dt_bias(blocks),
        rows(ceil_div(2 * TILE * states, LANES)) {
    for (Buffer* zeroed : {&adjoint, &dA, &dD, &dt_bias}) zeroed->clear();
  }

  float* B() { return reinterpret_cast<float*>(rows.at(0)); }

  Buffer starts, adjoint, dB, dC, dA, dD, dt_bias, rows;
};

// the state over one tile, for STATES states
void advance(int steps, int64_t states, const vec* delta, const vec* input, const float* B,
             const vec* decay, vec* state) {
  vec h[STATES];
  for (int n = 0; n < STATES; ++n) h[n] = state[n];
  for (int s = 0; s < steps; ++s, B += states)
    for (int n = 0; n < STATES; ++n) h[n] = exp2(delta[s] * decay[n]) * h[n] + input[s] * B[n];
  for (int n = 0; n < STATES; ++n) state[n] = h[n];
}

// One tile backwards, for STATES states: `carried` is exp(delta_{t+1} A) g_{t+1}.
template <bool NEED_A>
void retreat(int steps, int64_t states, Tile& tile, const float* B, const float* C,
             const vec* decay, const vec* start, vec* carried, vec* dB, vec* dC, vec* dA) {
  vec h[TILE + 1][STATES], a[TILE][STATES];
  for (int n = 0; n < STATES; ++n) h[0][n] = start[n];
  for (int s = 0; s < steps; ++s) {
    const vec dt = tile.delta[s], x = tile.input[s];
    for (int n = 0; n < STATES; ++n) {
      a[s][n] = exp2(dt * decay[n]);
      h[s + 1][n] = a[s][n] * h[s][n] + x * B[s * states + n];
    }
  }
  vec v[STATES];
  for (int n = 0; n < STATES; ++n) v[n] = carried[n];
  for (int s = steps - 1; s >= 0; --s) {
    const vec gy = tile.gy[s], x = tile.input[s];
    vec through_B = tile.input_gradient[s], through_A = tile.delta_gradient[s];
    for (int n = 0; n < STATES; ++n) {
      const int64_t i = s * states + n;
      const vec g = v[n] + gy * C[i];
      through_B = through_B + g * B[i];
      dB[i] = dB[i] + x * g;
      dC[i] = dC[i] + gy * h[s + 1][n];
      v[n] = a[s][n] * g;
      const vec meeting = v[n] * h[s][n];
      through_A = through_A + meeting * decay[n];
      if (NEED_A) dA[n] = dA[n] + meeting * tile.delta[s];
    }
    tile.input_gradient[s] = through_B;
    tile.delta_gradient[s] = through_A;
  }
  for (int n = 0; n < STATES; ++n) carried[n] = v[n];
}

// Where a task leaves its part of the sums that other tasks share.
struct Shares {
  float *dB, *dC;     // (L, d_state), of this group of channels
  float* parameters;  // per block of LANES channels dA [states], dD, ddt_bias, of this image
};

class Task {
 public:
  Task(const BackwardArguments& a, int k, const Parameters& parameters, float scale, int64_t b,
       int64_t first, int64_t end, const Shares& shares)
      : a_(a), shape_(a.shape), direction_(a.direction[k]), wanted_(a.gradients[k]),
        parameters_(parameters), scale_(scale), b_(b), first_(first), end_(end), shares_(shares),
        gates_(k == 0), states_(parameters.states()), blocks_(ceil_div(end - first, LANES)),
        space_(blocks_, ceil_div(a.shape.length, TILE), states_) {}

  void run() {
    const int64_t tiles = ceil_div(shape_.length, TILE);
    for (int64_t i = 0; i < tiles; ++i) keep_start(i);
    for (int64_t i = tiles - 1; i >= 0; --i) go_back(i);
    write_parameters();
  }

 private:
  int steps(int64_t tile) const {
    return static_cast<int>(std::min<int64_t>(TILE, shape_.length - tile * TILE));
  }
  int64_t token(int64_t tile, int s) const {
    return direction_.token(tile * TILE + s, shape_.length);
  }
  int64_t ahead(int64_t tile, int s) const {
    return direction_.token_ahead(tile * TILE + s, shape_.length);
  }
  int64_t block(int64_t c) const { return (c - first_) / LANES; }

  // sweep 1
  void keep_start(int64_t tile) {
    const int n = steps(tile);
    float* B = space_.B();
    state_rows_tile(shape_, direction_, direction_.B, b_, tile * TILE, n, states_, B);
    for_channels(first_, end_, [&](int64_t c, auto lanes) {
      vec delta[TILE], input[TILE];
      time_step_tile(shape_, direction_, parameters_, b_, tile * TILE, n, c, lanes, delta);
      for (int s = 0; s < n; ++s) {
        const int64_t t = token(tile, s);
        __builtin_prefetch(direction_.u.at(b_, ahead(tile + 1, s)) + c);
        store(wanted_.delta.at(b_, t) + c, delta[s], lanes);
        if (shape_.softplus) delta[s] = softplus(delta[s]);
        input[s] = delta[s] * load(direction_.u.at(b_, t) + c, lanes);
      }
      vec* start = space_.starts.at((tile * blocks_ + block(c)) * states_);
      if (tile == 0) std::fill(start, start + states_, vec{});
      if (tile * TILE + n == shape_.length) return;
      vec* next = start + blocks_ * states_;
      std::copy(start, start + states_, next);
      for (int64_t i = 0; i < states_; i += STATES)
        advance(n, states_, delta, input, B + i, parameters_.decay(c / LANES) + i, next + i);
    });
  }

  // sweep 2
  void go_back(int64_t tile) {
    const int n = steps(tile);
    float* B = space_.B();
    float* C = B + TILE * states_;
    state_rows_tile(shape_, direction_, direction_.B, b_, tile * TILE, n, states_, B);
    state_rows_tile(shape_, direction_, direction_.C, b_, tile * TILE, n, states_, C);
    space_.dB.clear();
    space_.dC.clear();
    for_channels(first_, end_, [&](int64_t c, auto lanes) {
      Tile values;
      read(tile, c, lanes, values);
      const vec* decay = parameters_.decay(c / LANES);
      const vec* start = space_.starts.at((tile * blocks_ + block(c)) * states_);
      vec* adjoint = space_.adjoint.at(block(c) * states_);
      vec* dA = space_.dA.at(block(c) * states_);
      for (int64_t i = 0; i < states_; i += STATES) {
        auto* step = wanted_.A ? retreat<true> : retreat<false>;
        step(n, states_, values, B + i, C + i, decay + i, start + i, adjoint + i,
             space_.dB.at(i), space_.dC.at(i), dA + i);
      }
      write(tile, c, lanes, values);
    });
    for (int s = 0; s < n; ++s) {
      const int64_t row = token(tile, s) * shape_.d_state;
      for (int64_t i = 0; i < shape_.d_state; ++i) {
        if (wanted_.B) shares_.dB[row + i] = sum(space_.dB[s * states_ + i]);
        if (wanted_.C) shares_.dC[row + i] = sum(space_.dC[s * states_ + i]);
      }
    }
  }

  template <class Lanes>
  void read(int64_t tile, int64_t c, Lanes lanes, Tile& values) {
    for (int s = 0; s < steps(tile); ++s) {
      const int64_t t = token(tile, s), next = ahead(tile - 1, s);
      for (const Input* rows : {&direction_.u, &a_.grad, &a_.z})
        if (*rows) __builtin_prefetch(rows->at(b_, next) + c);
      __builtin_prefetch(wanted_.delta.at(b_, next) + c);
      const vec raw = load(wanted_.delta.at(b_, t) + c, lanes);
      values.delta[s] = shape_.softplus ? softplus(raw) : raw;
      values.slope[s] = shape_.softplus ? sigmoid(raw) : splat(1.0f);
      values.u[s] = load(direction_.u.at(b_, t) + c, lanes);
      values.input[s] = values.delta[s] * values.u[s];
      vec gy = load(a_.grad.at(b_, t) + c, lanes) * scale_;
      if (a_.z) {
        const vec z = load(a_.z.at(b_, t) + c, lanes);
        const vec open = sigmoid(z);
        if (gates_ && a_.z_gradient) {
          const vec y = load(a_.y.at(b_, t) + c, lanes);
          store(a_.z_gradient.at(b_, t) + c, gy * y * silu_slope(z, open), lanes);
        }
        gy = gy * z * open;
      }
      values.gy[s] = gy;
      values.input_gradient[s] = values.delta_gradient[s] = vec{};
    }
  }

  template <class Lanes>
  void write(int64_t tile, int64_t c, Lanes lanes, const Tile& values) {
    const vec skip = parameters_.skip(c / LANES);
    vec& dD = space_.dD[block(c)];
    vec& dt_bias = space_.dt_bias[block(c)];
    for (int s = 0; s < steps(tile); ++s) {
      const int64_t t = token(tile, s);
      const vec through_B = values.input_gradient[s];
      const vec delta = (values.u[s] * through_B + LN_2 * values.delta_gradient[s]) *
                        values.slope[s];
      store(wanted_.delta.at(b_, t) + c, delta, lanes);
      if (wanted_.u)
        store(wanted_.u.at(b_, t) + c, skip * values.gy[s] + values.delta[s] * through_B,
              lanes);
      dD = dD + values.gy[s] * values.u[s];
      dt_bias = dt_bias + delta;
    }
  }

  void write_parameters() {
    if (!shares_.parameters) return;
    for (int64_t c = first_; c < end_; c += LANES) {
      const vec* decay = parameters_.decay(c / LANES);
      float* to = shares_.parameters + c / LANES * (states_ + 2) * LANES;
      for (int64_t n = 0; n < states_; ++n) {
        const vec dA = space_.dA[block(c) * states_ + n];
        // d(-exp(x)) = A dx
        store(to + n * LANES, shape_.A_is_log ? dA * (LN_2 * decay[n]) : dA);
      }
      store(to + states_ * LANES, space_.dD[block(c)]);
      store(to + (states_ + 1) * LANES, space_.dt_bias[block(c)]);
    }
  }

  const BackwardArguments& a_;
  const Shape& shape_;
  const Direction& direction_;
  const Gradients& wanted_;
  const Parameters& parameters_;
  const float scale_;
  const int64_t b_, first_, end_;
  const Shares shares_;
  const bool gates_;
  const int64_t states_, blocks_;
  Workspace space_;
};

// Channels of a task: many, so that the sums over channels stay in registers, but enough tasks for
// a machine of many cores. A function of the shape alone, as the order of summation must be.
int64_t channels_per_task(const Shape& shape) {
  int64_t channels = 256;
  while (channels > 64 && shape.batch * shape.directions * ceil_div(shape.d_inner, channels) < 16)
    channels /= 2;
  return channels;
}

// the parameters' gradients: the sum of the images' shares, in their order
void add_up_parameters(const Shape& shape, const Gradients& wanted, int64_t states, int64_t block,
                       const float* shares, int64_t image_stride) {
  const int64_t fields = states + 2;
  const int64_t first = block * LANES;
  const int lanes = static_cast<int>(std::min<int64_t>(LANES, shape.d_inner - first));
  for (int64_t f = 0; f < fields; ++f) {
    vec total = {};
    for (int64_t b = 0; b < shape.batch; ++b)
      total = total + load(shares + b * image_stride + (block * fields + f) * LANES);
    if (f < shape.d_state && wanted.A)
      for (int i = 0; i < lanes; ++i) wanted.A[(first + i) * shape.d_state + f] = total[i];
    if (f == states && wanted.D) store(wanted.D + first, total, lanes);
    if (f == states + 1 && wanted.dt_bias) store(wanted.dt_bias + first, total, lanes);
  }
}

// dB and dC of one image and direction: the sum of the groups' shares, in their order
void add_up_rows(const Shape& shape, const Output& to, int64_t b, const float* shares,
                 int64_t groups, int64_t group_stride) {
  for (int64_t t = 0; t < shape.length; ++t)
    for (int64_t n = 0; n < shape.d_state; ++n) {
      float total = 0;
      for (int64_t g = 0; g < groups; ++g)
        total += shares[g * group_stride + t * shape.d_state + n];
      to.at(b, t)[n] = total;
    }
}

void backward(const BackwardArguments& a, float scale) {
  const Shape& shape = a.shape;
  const Parameters first(shape, a.direction[0]);
  const Parameters second(shape, a.direction[shape.directions - 1]);
  const int64_t channels = channels_per_task(shape);
  const int64_t groups = ceil_div(shape.d_inner, channels);
  const int64_t blocks = ceil_div(shape.d_inner, LANES);
  const int64_t rows = shape.length * shape.d_state;
  const int64_t image = blocks * (first.states() + 2) * LANES;
  const Gradients& wanted = a.gradients[0];
  const bool need_rows = wanted.B || wanted.C;
  const bool need_parameters = wanted.A || wanted.D || wanted.dt_bias;
  // shares of B and C: [batch][direction][group][2][L][d_state]; [direction][batch][image]
  std::vector<float> row_shares(need_rows ? shape.batch * shape.directions * groups * 2 * rows : 0);
  std::vector<float> parameter_shares(need_parameters ? shape.directions * shape.batch * image : 0);

  auto task = [&](int64_t i) {
    const FlushDenormals guard;
    const int64_t b = i / groups / shape.directions, begin = i % groups * channels;
    const int k = static_cast<int>(i / groups % shape.directions);
    const int64_t end = std::min(begin + channels, shape.d_inner);
    Shares shares = {};
    if (need_rows) shares.dB = row_shares.data() + i * 2 * rows;
    if (need_rows) shares.dC = shares.dB + rows;
    if (need_parameters) shares.parameters = parameter_shares.data() + (k * shape.batch + b) * image;
    Task(a, k, k == 0 ? first : second, scale, b, begin, end, shares).run();
  };
  run_tasks(shape.batch * shape.directions * groups, task);

  auto add_rows = [&](int64_t i) {
    const Gradients& to = a.gradients[i % shape.directions];
    const float* shares = row_shares.data() + i * groups * 2 * rows;
    const int64_t b = i / shape.directions;
    if (to.B) add_up_rows(shape, to.B, b, shares, groups, 2 * rows);
    if (to.C) add_up_rows(shape, to.C, b, shares + rows, groups, 2 * rows);
  };
  if (need_rows) run_tasks(shape.batch * shape.directions, add_rows);

  auto add_parameters = [&](int64_t i) {
    const int64_t k = i / blocks;
    add_up_parameters(shape, a.gradients[k], first.states(), i % blocks,
                      parameter_shares.data() + k * shape.batch * image, image);
  };
  if (need_parameters) run_tasks(shape.directions * blocks, add_parameters);
}

}  // namespace
}  // namespace svp

extern "C" int svp_scan_backward(const svp::BackwardArguments* a, int64_t fields, double scale) {
  return svp::called_from_python<svp::BackwardArguments>(
      fields, [&] { svp::backward(*a, static_cast<float>(scale)); });
}
