// Residual add with norm, and the prompts: one pass over the tokens each.
//
//     r = hidden + residual,   y = (r - m) / sqrt(mean((r - m)^2) + eps) * weight + bias
//     m = mean(r), or 0 for RMSNorm
//
//     out = x + alpha SiLU(cross) + beta SiLU(inner), class tokens left alone
#include "tokens.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "vec.h"

namespace svp {
namespace {

// Tokens of a task. Sums over tokens are made per task and added in the tasks' order, so this must
// not depend on the number of threads.
constexpr int64_t TASK_TOKENS = 64;

// body(token, b, t) for every token of the task
template <class F>
void for_tokens(const TokenShape& shape, int64_t task, const F& body) {
  const int64_t end = std::min((task + 1) * TASK_TOKENS, shape.batch * shape.length);
  for (int64_t i = task * TASK_TOKENS; i < end; ++i) body(i / shape.length, i % shape.length);
}

int64_t tasks_of(const TokenShape& shape) {
  return ceil_div(shape.batch * shape.length, TASK_TOKENS);
}

// Two sums over tokens per channel, of which either may not be wanted: [task][2][d_model].
class ChannelSums {
 public:
  ChannelSums(const TokenShape& shape, float* first, float* second)
      : shape_(shape), to_{first, second},
        shares_(first || second ? tasks_of(shape) * 2 * shape.d_model : 0) {}

  bool wanted() const { return to_[0] || to_[1]; }
  template <class Lanes>
  void add(int64_t task, int which, int64_t c, vec value, Lanes lanes) {
    float* share = shares_.data() + (task * 2 + which) * shape_.d_model + c;
    store(share, load(share, lanes) + value, lanes);
  }
  void finish() {
    for (int which = 0; which < 2; ++which)
      for (int64_t c = 0; to_[which] && c < shape_.d_model; ++c) {
        float total = 0;
        for (int64_t task = 0; task < tasks_of(shape_); ++task)
          total += shares_[(task * 2 + which) * shape_.d_model + c];
        to_[which][c] = total;
      }
  }

 private:
  const TokenShape& shape_;
  float* to_[2];
  std::vector<float> shares_;
};

// mean (0 for RMSNorm) and 1 / standard deviation of one token
struct Moments {
  float mean, inverse;
};

Moments moments(const float* row, int64_t count, bool rms, float eps) {
  vec total = {};
  if (!rms) for_channels(0, count, [&](int64_t c, auto n) { total = total + load(row + c, n); });
  const float mean = sum(total) / static_cast<float>(count);
  vec squares = {};
  for_channels(0, count, [&](int64_t c, auto n) {
    const vec centred = load(row + c, n) - mean;
    // the lanes beyond the last channel are no data: there, -mean is not a deviation
    if (n == LANES) {
      squares = squares + centred * centred;
    } else {
      for (int i = 0; i < n; ++i) squares[i] += centred[i] * centred[i];
    }
  });
  const float variance = sum(squares) / static_cast<float>(count);
  return {mean, 1.0f / std::sqrt(variance + eps)};
}

void norm_forward(const NormForwardArguments& a, float eps) {
  auto task = [&](int64_t index) {
    for_tokens(a.shape, index, [&](int64_t b, int64_t t) {
      const float* hidden = a.hidden.at(b, t);
      float* total = a.total.at(b, t);
      for_channels(0, a.shape.d_model, [&](int64_t c, auto n) {
        vec r = load(hidden + c, n);
        if (a.residual) r = r + load(a.residual.at(b, t) + c, n);
        store(total + c, r, n);
      });
      const Moments m = moments(total, a.shape.d_model, a.rms, eps);
      for_channels(0, a.shape.d_model, [&](int64_t c, auto n) {
        vec y = (load(total + c, n) - m.mean) * m.inverse * load(a.weight + c, n);
        if (a.bias) y = y + load(a.bias + c, n);
        store(a.y.at(b, t) + c, y, n);
      });
    });
  };
  run_tasks(tasks_of(a.shape), task);
}

// With x = (r - m) / std and g = grad * weight: dr = (g - mean(g x) x - mean(g)) / std, the last
// mean only where m is one.
void norm_backward(const NormBackwardArguments& a, float eps) {
  ChannelSums sums(a.shape, a.dweight, a.dbias);
  const float count = static_cast<float>(a.shape.d_model);
  auto task = [&](int64_t index) {
    for_tokens(a.shape, index, [&](int64_t b, int64_t t) {
      const float *total = a.total.at(b, t), *grad = a.grad.at(b, t);
      const Moments m = moments(total, a.shape.d_model, a.rms, eps);
      auto normalised = [&](int64_t c, auto n) { return (load(total + c, n) - m.mean) * m.inverse; };
      vec g_sum = {}, gx_sum = {};
      for_channels(0, a.shape.d_model, [&](int64_t c, auto n) {
        const vec x = normalised(c, n), dy = load(grad + c, n);
        const vec g = dy * load(a.weight + c, n);
        g_sum = g_sum + g;
        gx_sum = gx_sum + g * x;
        if (a.dweight) sums.add(index, 0, c, dy * x, n);
        if (a.dbias) sums.add(index, 1, c, dy, n);
      });
      const float g_mean = a.rms ? 0.0f : sum(g_sum) / count, gx_mean = sum(gx_sum) / count;
      for_channels(0, a.shape.d_model, [&](int64_t c, auto n) {
        const vec g = load(grad + c, n) * load(a.weight + c, n);
        vec dr = (g - normalised(c, n) * gx_mean - g_mean) * m.inverse;
        if (a.grad_total) dr = dr + load(a.grad_total.at(b, t) + c, n);
        store(a.dtotal.at(b, t) + c, dr, n);
      });
    });
  };
  run_tasks(tasks_of(a.shape), task);
  sums.finish();
}

void prompt_forward(const PromptForwardArguments& a) {
  auto task = [&](int64_t index) {
    for_tokens(a.shape, index, [&](int64_t b, int64_t t) {
      const bool skip = std::find(a.skip, a.skip + a.skips, t) != a.skip + a.skips;
      for_channels(0, a.shape.d_model, [&](int64_t c, auto n) {
        vec out = load(a.x.at(b, t) + c, n);
        if (a.cross && !skip)
          out = out + load(a.alpha + c, n) * silu(load(a.cross.at(b, t) + c, n));
        if (a.inner && !skip) out = out + load(a.beta + c, n) * silu(load(a.inner.at(b, t) + c, n));
        store(a.out.at(b, t) + c, out, n);
      });
    });
  };
  run_tasks(tasks_of(a.shape), task);
}

void prompt_backward(const PromptBackwardArguments& a) {
  ChannelSums sums(a.shape, a.dalpha, a.dbeta);
  const Input from[2] = {a.cross, a.inner};
  const Output to[2] = {a.dcross, a.dinner};
  const float* scale[2] = {a.alpha, a.beta};
  auto task = [&](int64_t index) {
    for_tokens(a.shape, index, [&](int64_t b, int64_t t) {
      const bool skip = std::find(a.skip, a.skip + a.skips, t) != a.skip + a.skips;
      for_channels(0, a.shape.d_model, [&](int64_t c, auto n) {
        const vec grad = skip ? vec{} : load(a.grad.at(b, t) + c, n);
        for (int which = 0; which < 2; ++which) {
          if (!from[which]) continue;
          const vec p = load(from[which].at(b, t) + c, n), open = sigmoid(p);
          const vec through = skip ? vec{} : grad * load(scale[which] + c, n) * silu_slope(p, open);
          store(to[which].at(b, t) + c, through, n);
          if (!skip) sums.add(index, which, c, grad * p * open, n);
        }
      });
    });
  };
  run_tasks(tasks_of(a.shape), task);
  sums.finish();
}

}  // namespace
}  // namespace svp

extern "C" int svp_norm_forward(const svp::NormForwardArguments* a, int64_t fields, double eps) {
  return svp::called_from_python<svp::NormForwardArguments>(
      fields, [&] { svp::norm_forward(*a, static_cast<float>(eps)); });
}

extern "C" int svp_norm_backward(const svp::NormBackwardArguments* a, int64_t fields, double eps) {
  return svp::called_from_python<svp::NormBackwardArguments>(
      fields, [&] { svp::norm_backward(*a, static_cast<float>(eps)); });
}

extern "C" int svp_prompt_forward(const svp::PromptForwardArguments* a, int64_t fields, double) {
  return svp::called_from_python<svp::PromptForwardArguments>(fields,
                                                              [&] { svp::prompt_forward(*a); });
}

extern "C" int svp_prompt_backward(const svp::PromptBackwardArguments* a, int64_t fields, double) {
  return svp::called_from_python<svp::PromptBackwardArguments>(fields,
                                                               [&] { svp::prompt_backward(*a); });
}
