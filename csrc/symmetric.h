// A symmetric matrix, and its product with a vector by a team of threads; host and device share this file.
//
// A team of threads has rank(), size() and sync(). GROUP neighbouring threads read a row together, and add(v) is the
// sum of v over such a group. On a CPU a team is one thread, on a GPU a thread block.
#pragma once

#include <cstdint>

#include "inline.h"

namespace fngd {

// A symmetric matrix of which only the lower triangle is read.
template <typename T>
struct Symmetric {
  const T* data;
  int64_t row_stride, col_stride;
  int n;

  // Expects j <= i.
  FNGD_INLINE const T& operator()(int i, int j) const { return data[i * row_stride + j * col_stride]; }
};

// Calls write(i, sum_j K_ij x_j) for every row i, summed in double. Where x is null, it is a vector of ones.
template <typename Team, typename T, typename Write>
FNGD_INLINE void multiply(const Team& team, const Symmetric<T>& k, const T* x, Write write) {
  // A thread that has no group takes several rows, so that it reads whole cache lines of a column.
  constexpr int GROUP = Team::GROUP, ROWS = GROUP == 1 ? 8 : 1;
  const int group = team.rank() / GROUP, groups = team.size() / GROUP, last = k.n - 1;
  for (int begin = 0; begin < k.n; begin += groups * ROWS) {
    const int first = begin + group * ROWS;
    double sums[ROWS] = {};
    if (first < k.n) {
      for (int j = team.rank() % GROUP; j < k.n; j += GROUP) {
        FNGD_UNROLL
        for (int r = 0; r < ROWS; ++r) {
          const int i = first + r < last ? first + r : last;
          sums[r] += double(i < j ? k(j, i) : k(i, j)) * (x ? double(x[j]) : 1.0);
        }
      }
    }
    FNGD_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const double sum = team.add(sums[r]);
      if (first + r < k.n && team.rank() % GROUP == 0) write(first + r, sum);
    }
  }
}

}  // namespace fngd
