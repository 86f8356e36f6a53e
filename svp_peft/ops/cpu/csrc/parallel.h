// Tasks on PyTorch's own threads.
#pragma once

#include <cstdint>

namespace svp {

// Run task(i, context) for i in 0..count-1. A task must not depend on the thread that runs it, nor
// on the order of the tasks: then no result depends on the number of threads.
void run_tasks(int64_t count, void (*task)(int64_t, void*), void* context);

template <class F>
void run_tasks(int64_t count, F& body) {
  run_tasks(count, [](int64_t i, void* f) { (*static_cast<F*>(f))(i); }, &body);
}

}  // namespace svp
