// The depthwise convolution with its SiLU, both directions in one pass over x.
//
//     u[t] = SiLU(p[t]),   p[t] = bias + sum_i weight[width - 1 - i] x[t - i]      i = 0 .. width-1
//
// and x[t + i] in place of x[t - i] where the direction is reversed. `before` below is i with that
// sign: the token that tap i reads, seen from t.
#include "conv.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "vec.h"

namespace svp {
namespace {

constexpr int64_t TASK_TOKENS = 32;
constexpr int64_t TASK_CHANNELS = 64;

// One direction's parameters with the channels of a vector side by side, per block of LANES
// channels: tap i as above [width], bias.
class Taps {
 public:
  Taps(const ConvShape& shape, const ConvDirection& direction)
      : width_(shape.width), data_(ceil_div(shape.d_inner, LANES) * (shape.width + 1)) {
    data_.clear();
    for (int64_t c = 0; c < shape.d_inner; ++c) {
      vec* to = data_.at(c / LANES * (width_ + 1));
      for (int64_t i = 0; i < width_; ++i)
        to[i][c % LANES] = direction.weight[c * width_ + width_ - 1 - i];
      if (direction.bias) to[width_][c % LANES] = direction.bias[c];
    }
  }

  const vec* of(int64_t channel) const { return data_.at(channel / LANES * (width_ + 1)); }
  vec bias(int64_t channel) const { return of(channel)[width_]; }

 private:
  int64_t width_;
  Buffer data_;
};

// p[t]; WIDTH is the number of taps where the compiler shall unroll them, else 0
template <int WIDTH>
vec convolve(const ConvShape& shape, bool reverse, const Taps& taps, const Input& x, int64_t b,
             int64_t t, int64_t c, int lanes) {
  const int64_t width = WIDTH ? WIDTH : shape.width;
  const vec* tap = taps.of(c);
  vec total = taps.bias(c);
  for (int64_t i = 0; i < width; ++i) {
    const int64_t from = reverse ? t + i : t - i;
    if (from < 0 || from >= shape.length) break;
    total = total + tap[i] * load(x.at(b, from) + c, lanes);
  }
  return total;
}

template <int WIDTH>
void forward(const ConvForwardArguments& a) {
  const ConvShape& shape = a.shape;
  const Taps taps[2] = {{shape, a.direction[0]}, {shape, a.direction[shape.directions - 1]}};
  const int64_t chunks = ceil_div(shape.length, TASK_TOKENS);
  auto task = [&](int64_t i) {
    const int64_t b = i / chunks, begin = i % chunks * TASK_TOKENS;
    const int64_t end = std::min(begin + TASK_TOKENS, shape.length);
    for (int64_t first = 0; first < shape.d_inner; first += TASK_CHANNELS)
      for (int64_t t = begin; t < end; ++t)
        for (int64_t c = first; c < std::min(first + TASK_CHANNELS, shape.d_inner); c += LANES) {
          const int lanes = static_cast<int>(std::min<int64_t>(LANES, shape.d_inner - c));
          for (int k = 0; k < shape.directions; ++k) {
            const bool reverse = a.direction[k].reverse;
            const vec p = convolve<WIDTH>(shape, reverse, taps[k], a.x, b, t, c, lanes);
            store(a.u[k].at(b, t) + c, silu(p), lanes);
          }
        }
  };
  run_tasks(shape.batch * chunks, task);
}

// The gradient by p of the last tokens, one ring of rows per direction: dx[t] needs those from
// t - width + 1 to t + width - 1.
class Ring {
 public:
  explicit Ring(int64_t width) : size_(2 * width - 1), rows_(size_ * BLOCKS) { rows_.clear(); }

  vec* at(int64_t t) { return rows_.at(t % size_ * BLOCKS); }

 private:
  static constexpr int64_t BLOCKS = TASK_CHANNELS / LANES;
  int64_t size_;
  Buffer rows_;
};

template <int WIDTH>
class BackwardTask {
 public:
  BackwardTask(const ConvBackwardArguments& a, const Taps* taps, int64_t b, int64_t first,
               int64_t end, float* const* shares)
      : a_(a), shape_(a.shape), taps_(taps), b_(b), first_(first), end_(end), shares_(shares),
        width_(WIDTH ? WIDTH : shape_.width), blocks_(ceil_div(end - first, LANES)),
        rings_{Ring(width_), Ring(width_)}, sums_(2 * blocks_ * (width_ + 1)) {
    sums_.clear();
  }

  void run() {
    for (int64_t t = 0; t < shape_.length + width_ - 1; ++t) {
      for (int k = 0; k < shape_.directions; ++k) fill(k, t);
      if (a_.dx && t >= width_ - 1) write(t - width_ + 1);
    }
    for (int k = 0; k < shape_.directions; ++k)
      if (shares_[k])
        for (int64_t i = 0; i < blocks_ * (width_ + 1); ++i)
          store(shares_[k] + (first_ / LANES * (width_ + 1) + i) * LANES,
                sums_[k * blocks_ * (width_ + 1) + i]);
  }

 private:
  int lanes(int64_t c) const { return static_cast<int>(std::min<int64_t>(LANES, end_ - c)); }

  // the gradient by p[t], zero beyond the last token, and what it adds to the parameters'
  void fill(int k, int64_t t) {
    vec* row = rings_[k].at(t);
    if (t >= shape_.length) {
      std::fill(row, row + blocks_, vec{});
      return;
    }
    const bool reverse = a_.direction[k].reverse;
    for (int64_t c = first_; c < end_; c += LANES) {
      const int64_t block = (c - first_) / LANES;
      const vec p = convolve<WIDTH>(shape_, reverse, taps_[k], a_.x, b_, t, c, lanes(c));
      const vec gradient = load(a_.grad[k].at(b_, t) + c, lanes(c)) * silu_slope(p, sigmoid(p));
      row[block] = gradient;
      if (!shares_[k]) continue;
      vec* sums = sums_.at((k * blocks_ + block) * (width_ + 1));
      for (int64_t i = 0; i < width_; ++i) {
        const int64_t from = reverse ? t + i : t - i;
        if (from < 0 || from >= shape_.length) break;
        sums[i] = sums[i] + gradient * load(a_.x.at(b_, from) + c, lanes(c));
      }
      sums[width_] = sums[width_] + gradient;
    }
  }

  // dx[t]: what tap i of token s read as x[t], for every s whose gradient is in the ring
  void write(int64_t t) {
    for (int64_t c = first_; c < end_; c += LANES) {
      const int64_t block = (c - first_) / LANES;
      vec total = {};
      for (int k = 0; k < shape_.directions; ++k) {
        const vec* tap = taps_[k].of(c);
        for (int64_t i = 0; i < width_; ++i) {
          const int64_t reader = a_.direction[k].reverse ? t - i : t + i;
          if (reader < 0) break;
          total = total + tap[i] * rings_[k].at(reader)[block];
        }
      }
      store(a_.dx.at(b_, t) + c, total, lanes(c));
    }
  }

  const ConvBackwardArguments& a_;
  const ConvShape& shape_;
  const Taps* taps_;
  const int64_t b_, first_, end_;
  float* const* shares_;  // per direction, this image's; laid out as `Taps`; null: not wanted
  const int64_t width_, blocks_;
  Ring rings_[2];
  Buffer sums_;
};

template <int WIDTH>
void backward(const ConvBackwardArguments& a) {
  const ConvShape& shape = a.shape;
  const Taps taps[2] = {{shape, a.direction[0]}, {shape, a.direction[shape.directions - 1]}};
  const int64_t groups = ceil_div(shape.d_inner, TASK_CHANNELS);
  const int64_t image = ceil_div(shape.d_inner, LANES) * (shape.width + 1) * LANES;
  const bool wanted = a.dweight[0] || a.dbias[0];
  std::vector<float> shares(wanted ? shape.directions * shape.batch * image : 0);
  auto task = [&](int64_t i) {
    const int64_t b = i / groups, begin = i % groups * TASK_CHANNELS;
    float* mine[2] = {nullptr, nullptr};
    for (int k = 0; wanted && k < shape.directions; ++k)
      mine[k] = shares.data() + (k * shape.batch + b) * image;
    const int64_t end = std::min(begin + TASK_CHANNELS, shape.d_inner);
    BackwardTask<WIDTH>(a, taps, b, begin, end, mine).run();
  };
  run_tasks(shape.batch * groups, task);
  if (!wanted) return;

  // the images' shares are added in their order, whatever the number of threads
  auto add_up = [&](int64_t k) {
    for (int64_t c = 0; c < shape.d_inner; ++c)
      for (int64_t i = 0; i <= shape.width; ++i) {
        const int64_t at = (c / LANES * (shape.width + 1) + i) * LANES + c % LANES;
        float total = 0;
        for (int64_t b = 0; b < shape.batch; ++b)
          total += shares[(k * shape.batch + b) * image + at];
        if (i < shape.width && a.dweight[k])
          a.dweight[k][c * shape.width + shape.width - 1 - i] = total;
        if (i == shape.width && a.dbias[k]) a.dbias[k][c] = total;
      }
  };
  run_tasks(shape.directions, add_up);
}

}  // namespace
}  // namespace svp

extern "C" int svp_conv_forward(const svp::ConvForwardArguments* a, int64_t fields, double) {
  return svp::called_from_python<svp::ConvForwardArguments>(
      fields, [&] { a->shape.width == 4 ? svp::forward<4>(*a) : svp::forward<0>(*a); });
}

extern "C" int svp_conv_backward(const svp::ConvBackwardArguments* a, int64_t fields, double) {
  return svp::called_from_python<svp::ConvBackwardArguments>(
      fields, [&] { a->shape.width == 4 ? svp::backward<4>(*a) : svp::backward<0>(*a); });
}
