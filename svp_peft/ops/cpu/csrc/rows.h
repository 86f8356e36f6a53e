// How tensors reach the kernels.
#pragma once

#include <cstdint>

namespace svp {

// (batch, L, columns): the columns lie side by side, batch and token have any stride
template <class T>
struct Rows {
  T* data;
  int64_t batch_stride, row_stride;

  T* at(int64_t b, int64_t t) const { return data + b * batch_stride + t * row_stride; }
  explicit operator bool() const { return data != nullptr; }
};
using Input = Rows<const float>;
using Output = Rows<float>;

// The body of a function that Python calls: 0 when it ran, 1 where Python wrote another number of
// 8-byte fields than the struct has, 2 where memory ran out. No exception may cross into Python.
template <class Arguments, class F>
int called_from_python(int64_t fields, const F& body) {
  if (fields * 8 != static_cast<int64_t>(sizeof(Arguments))) return 1;
  try {
    body();
  } catch (...) {
    return 2;
  }
  return 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace svp
