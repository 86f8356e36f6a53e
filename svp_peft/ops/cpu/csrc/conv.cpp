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
constexpr int64_t TASK_CHANNELS = 128;

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

// How many taps have a token to read, seen from t.
int64_t reach(const ConvShape& shape, bool reverse, int64_t t) {
  return std::min<int64_t>(shape.width, reverse ? shape.length - t : t + 1);
}

// sum over the first `count` taps of value(i), unrolled where they are all WIDTH
template <int WIDTH, class F>
vec sum_taps(vec total, int64_t count, const F& value) {
  if (WIDTH && count == WIDTH) {
    for (int i = 0; i < WIDTH; ++i) total = total + value(i);
  } else {
    for (int64_t i = 0; i < count; ++i) total = total + value(i);
  }
  return total;
}

template <int WIDTH>
void forward(const ConvForwardArguments& a) {
  const ConvShape& shape = a.shape;
  const Taps taps[2] = {{shape, a.direction[0]}, {shape, a.direction[shape.directions - 1]}};
  const int64_t chunks = ceil_div(shape.length, TASK_TOKENS);
  auto convolve = [&](int k, int64_t b, int64_t t, int64_t first, int64_t end) {
    const bool reverse = a.direction[k].reverse;
    const int64_t count = reach(shape, reverse, t);
    const int64_t step = reverse ? a.x.row_stride : -a.x.row_stride;
    const float* x = a.x.at(b, t);
    float* u = a.u[k].at(b, t);
    for_channels(first, end, [&](int64_t c, auto lanes) {
      const vec* tap = taps[k].of(c);
      const vec p = sum_taps<WIDTH>(taps[k].bias(c), count, [&](int64_t i) {
        return tap[i] * load(x + i * step + c, lanes);
      });
      store(u + c, silu(p), lanes);
    });
  };
  auto task = [&](int64_t i) {
    const int64_t b = i / chunks, begin = i % chunks * TASK_TOKENS;
    const int64_t end = std::min(begin + TASK_TOKENS, shape.length);
    for (int64_t first = 0; first < shape.d_inner; first += TASK_CHANNELS)
      for (int64_t t = begin; t < end; ++t)
        for (int k = 0; k < shape.directions; ++k)
          convolve(k, b, t, first, std::min(first + TASK_CHANNELS, shape.d_inner));
  };
  run_tasks(shape.batch * chunks, task);
}

// The gradient by p of the last tokens, one ring of rows per direction: dx[t] needs those from
// t - width + 1 to t + width - 1.
class Ring {
 public:
  explicit Ring(int64_t width) : size_(1) {
    while (size_ < 2 * width - 1) size_ *= 2;
    rows_ = std::make_unique<Buffer>(size_ * BLOCKS);
    rows_->clear();
  }

  vec* at(int64_t t) { return rows_->at((t & (size_ - 1)) * BLOCKS); }

 private:
  static constexpr int64_t BLOCKS = TASK_CHANNELS / LANES;
  int64_t size_;
  std::unique_ptr<Buffer> rows_;
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
  // the gradient by p[t], zero beyond the last token, and what it adds to the parameters'
  void fill(int k, int64_t t) {
    vec* row = rings_[k].at(t);
    if (t >= shape_.length) {
      std::fill(row, row + blocks_, vec{});
      return;
    }
    const bool reverse = a_.direction[k].reverse;
    const int64_t count = reach(shape_, reverse, t);
    const int64_t step = reverse ? a_.x.row_stride : -a_.x.row_stride;
    const float *x = a_.x.at(b_, t), *grad = a_.grad[k].at(b_, t);
    for_channels(first_, end_, [&](int64_t c, auto lanes) {
      const int64_t block = (c - first_) / LANES;
      const vec* tap = taps_[k].of(c);
      auto read = [&](int64_t i) { return load(x + i * step + c, lanes); };
      const vec p = sum_taps<WIDTH>(taps_[k].bias(c), count,
                                    [&](int64_t i) { return tap[i] * read(i); });
      const vec gradient = load(grad + c, lanes) * silu_slope(p, sigmoid(p));
      row[block] = gradient;
      if (!shares_[k]) return;
      vec* sums = sums_.at((k * blocks_ + block) * (width_ + 1));
      for (int64_t i = 0; i < count; ++i) sums[i] = sums[i] + gradient * read(i);
      sums[width_] = sums[width_] + gradient;
    });
  }

  // dx[t]: what tap i of token s read as x[t], for every s whose gradient is in the ring
  void write(int64_t t) {
    float* dx = a_.dx.at(b_, t);
    for_channels(first_, end_, [&](int64_t c, auto lanes) {
      const int64_t block = (c - first_) / LANES;
      vec total = {};
      for (int k = 0; k < shape_.directions; ++k) {
        const bool reverse = a_.direction[k].reverse;
        const int64_t count = reverse ? std::min(width_, t + 1) : width_;
        const vec* tap = taps_[k].of(c);
        total = sum_taps<WIDTH>(total, count, [&](int64_t i) {
          return tap[i] * rings_[k].at(reverse ? t - i : t + i)[block];
        });
      }
      store(dx + c, total, lanes);
    });
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
