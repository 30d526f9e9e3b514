// The arguments of a batch of solves: pointers, sizes and strides (in elements). CPU and CUDA launchers share them.
#pragma once

#include <cstdint>

#include "coefficients.h"

namespace fngd {

struct Batch {
  const void* k;  // (size, n, n)
  void* out;      // (size, n), contiguous
  int32_t* info;  // (size,), contiguous
  int64_t size;
  int n;
  int64_t k_batch_stride, k_row_stride, k_col_stride;
};

struct SolveParams : Batch {
  const void* damping;  // (size,)
  const void* rhs;      // (size, n), or null for ones
  int64_t damping_stride;
  int64_t rhs_batch_stride, rhs_row_stride;
};

struct CoefficientsParams : Batch {
  Damping damping;
  Normalization normalization;
};

// Matrix b of the batch, by one team.
template <typename Solver, typename Team, typename T>
FNGD_INLINE void run(const Team& team, const SolveParams& p, int64_t b, T* scratch) {
  const Symmetric<T> k{static_cast<const T*>(p.k) + b * p.k_batch_stride, p.k_row_stride, p.k_col_stride, p.n};
  const T* rhs = p.rhs ? static_cast<const T*>(p.rhs) + b * p.rhs_batch_stride : nullptr;
  const T damping = static_cast<const T*>(p.damping)[b * p.damping_stride];
  const System<T> system{k, T(1), damping, rhs, p.rhs_row_stride};
  const int info = Solver(p.n, scratch).solve(team, system, static_cast<T*>(p.out) + b * p.n);
  if (team.rank() == 0) p.info[b] = info;
}

template <typename Solver, typename Team, typename T>
FNGD_INLINE void run(const Team& team, const CoefficientsParams& p, int64_t b, T* scratch) {
  const Symmetric<T> k{static_cast<const T*>(p.k) + b * p.k_batch_stride, p.k_row_stride, p.k_col_stride, p.n};
  const int info = coefficients(team, Solver(p.n, scratch), k, p.damping, p.normalization,
                                static_cast<T*>(p.out) + b * p.n);
  if (team.rank() == 0) p.info[b] = info;
}

// T is float or double, Params SolveParams or CoefficientsParams.
template <typename T, typename Params>
void run_cpu(const Params& params, int threads);

}  // namespace fngd
