// Arguments of the kernels that treat every token by itself, as Python fills them in
// (svp_peft/ops/cpu/norm.py and prompt.py).
#pragma once

#include <cstdint>

#include "rows.h"

namespace svp {

struct TokenShape {
  int64_t batch, length, d_model;
};

struct NormForwardArguments {
  TokenShape shape;
  int64_t rms;
  Input hidden, residual;  // residual may be null
  const float *weight, *bias;
  Output y, total;
};

struct NormBackwardArguments {
  TokenShape shape;
  int64_t rms;
  Input grad, grad_total, total;  // grad_total may be null
  const float* weight;
  Output dtotal;
  float *dweight, *dbias;  // null where they are not wanted
};

struct PromptForwardArguments {
  TokenShape shape;
  Input x, cross, inner;  // cross or inner may be null
  const float *alpha, *beta;
  const int64_t* skip;
  int64_t skips;
  Output out;
};

struct PromptBackwardArguments {
  TokenShape shape;
  Input grad, cross, inner;
  const float *alpha, *beta;
  const int64_t* skip;
  int64_t skips;
  Output dcross, dinner;
  float *dalpha, *dbeta;
};

}  // namespace svp
