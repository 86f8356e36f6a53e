// Arguments of the convolution kernels, as Python fills them in (svp_peft/ops/cpu/conv.py).
#pragma once

#include <cstdint>

#include "rows.h"

namespace svp {

struct ConvShape {
  int64_t batch, length, d_inner, width, directions;
};

struct ConvDirection {
  const float *weight, *bias;  // (d_inner, width), (d_inner); bias may be null
  int64_t reverse;
};

struct ConvForwardArguments {
  ConvShape shape;
  ConvDirection direction[2];
  Input x;
  Output u[2];
};

struct ConvBackwardArguments {
  ConvShape shape;
  ConvDirection direction[2];
  Input x, grad[2];
  Output dx;            // null where it is not wanted
  float* dweight[2];    // (d_inner, width), likewise
  float* dbias[2];      // (d_inner), likewise
};

}  // namespace svp
