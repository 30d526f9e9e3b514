// What a batched solve needs, in pointers, sizes and strides (in elements); shared by every backend's launcher.
#pragma once

#include <cstdint>

namespace fngd {

struct SolveParams {
  const void* k;        // (batch, n, n)
  const void* damping;  // (batch,)
  const void* rhs;      // (batch, n), or null for ones
  void* x;              // (batch, n), contiguous
  int32_t* info;        // (batch,), contiguous

  int64_t batch;
  int n;

  int64_t k_batch_stride, k_row_stride, k_col_stride;
  int64_t damping_stride;
  int64_t rhs_batch_stride, rhs_row_stride;
};

// T is float or double.
template <typename T>
void solve_cpu(const SolveParams& params, int threads);

}  // namespace fngd
