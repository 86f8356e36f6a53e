// TensorIterator::for_each is at::parallel_for as libtorch compiled it. The template of the same
// name in ATen/Parallel.h would use the OpenMP of the compiler at hand: none under Apple's clang,
// and a second pool of threads, deaf to torch.set_num_threads, wherever that OpenMP is another
// library than the one PyTorch was linked with.

#include "parallel.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>

#include <algorithm>
#include <atomic>

namespace svp {

void run_tasks(int64_t count, void (*task)(int64_t, void*), void* context) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i = next++; i < count; i = next++) task(i, context);
  };
  const int64_t workers = std::min<int64_t>(count, at::get_num_threads());
  if (workers <= 1) {
    work();
    return;
  }
  // one element per worker; what it holds is never read
  at::TensorBase elements = at::detail::empty_cpu({workers}, at::kByte);
  auto iterator = at::TensorIterator::nullary_op(elements);
  iterator.for_each(
      [&](char**, const int64_t*, int64_t size, int64_t) {
        if (size > 0) work();
      },
      1);
}

}  // namespace svp
