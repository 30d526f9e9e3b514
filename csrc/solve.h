// Solves (scale K + damping I) x = rhs for one symmetric positive definite matrix, by a team of threads: a left-looking
// Cholesky factorisation L L^T = scale K + damping I in panels of COLS columns, which does the forward substitution on
// the way.
//
// Host and device share this file. On a CPU the team is one thread and Pack a SIMD vector of T; on a GPU the team is
// a thread block and Pack is T itself.
//
// L is stored in tiles of TILE rows. A tile holds its columns one after the other, from 0 up to the diagonal. A loop
// over columns then reads contiguous memory, both for the rows being updated and for the panel's rows, and of the upper
// triangle only the part inside the diagonal tiles is stored. Rows past n are rows of the identity matrix, so no loop
// has a remainder.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "symmetric.h"

namespace fngd {

template <typename T>
struct System {
  Symmetric<T> k;
  T scale, damping;
  const T* rhs;  // Null for ones.
  int64_t rhs_stride;

  FNGD_INLINE T right(int i) const { return rhs ? rhs[i * rhs_stride] : T(1); }
};

template <typename T, typename Pack, int TILE, int COLS>
class DampedCholesky {
  static constexpr int LANES = sizeof(Pack) / sizeof(T);
  // Products are summed over this many columns before they are subtracted, which halves the rounding error.
  static constexpr int BLOCK = 64;
  // Substitution takes this many rows at a time; every thread solves their diagonal block for itself.
  static constexpr int ROWS = LANES > 1 ? TILE : COLS;
  static_assert(TILE % COLS == 0, "a panel's rows lie in one tile");
  static_assert(TILE % LANES == 0, "a pack's rows lie in one tile");

 public:
  // Number of T that the caller provides as scratch memory for order n, aligned to 16 bytes and to Pack.
  static FNGD_INLINE int64_t scratch_size(int n) { return tile_offset(tiles(n)) + 3 * int64_t{tiles(n)} * TILE; }

  // n rounded up to whole tiles. More threads than this would have nothing to do.
  static FNGD_INLINE int padded_order(int n) { return tiles(n) * TILE; }

  FNGD_INLINE DampedCholesky(int order, T* scratch)
      : n(order),
        padded(padded_order(order)),
        lower(scratch),
        right(scratch + tile_offset(tiles(order))),
        solution(right + padded),
        inverse_diagonal(solution + padded) {}

  // Memory for n numbers that the caller may use before and after a solve.
  FNGD_INLINE T* workspace() const { return right; }

  // Returns 0 and writes x, or returns j > 0 and fills x with NaN when the leading minor of order j is not positive
  // definite or not finite.
  template <typename Team>
  FNGD_INLINE int solve(const Team& team, const System<T>& system, T* x) const {
    load(team, system);
    team.sync();
    const int info = factor(team);
    if (info == 0) back_substitute(team);
    for (int i = team.rank(); i < n; i += team.size()) x[i] = info == 0 ? right[i] : static_cast<T>(NAN);
    return info;
  }

 private:
  static FNGD_INLINE int tiles(int n) { return (n + TILE - 1) / TILE; }
  static FNGD_INLINE int64_t tile_offset(int tile) { return int64_t{TILE} * TILE * tile * (tile + 1) / 2; }

  // Element (i, j) is at row(i)[j * TILE]; the next row of the same tile is next to it.
  FNGD_INLINE T* row(int i) const { return lower + tile_offset(i / TILE) + i % TILE; }

  // Without memcpy for a single T: the compiler, which does not know the alignment, would copy byte by byte.
  static FNGD_INLINE void read(Pack& pack, const T* from) {
    if constexpr (LANES == 1) {
      pack = *from;
    } else {
      memcpy(&pack, from, sizeof(Pack));
    }
  }

  static FNGD_INLINE void write(T* to, const Pack& pack) {
    if constexpr (LANES == 1) {
      *to = pack;
    } else {
      memcpy(to, &pack, sizeof(Pack));
    }
  }

  // COLS rows of a column, on a GPU in loads of 16 bytes.
  static FNGD_INLINE void read_rows(T (&rows)[COLS], const T* column) {
#if defined(__CUDACC__)
    using Wide = std::conditional_t<sizeof(T) == 4, float4, double2>;
    FNGD_UNROLL
    for (int c = 0; c < COLS; c += sizeof(Wide) / sizeof(T)) {
      const Wide wide = *reinterpret_cast<const Wide*>(column + c);
      memcpy(rows + c, &wide, sizeof(Wide));
    }
#else
    FNGD_UNROLL
    for (int c = 0; c < COLS; ++c) rows[c] = column[c];
#endif
  }

  // ROWS rows of a column times x.
  static FNGD_INLINE T dot(const T* column, const T (&x)[ROWS]) {
    Pack product{};
    if constexpr (LANES == 1) {
      T rows[COLS];
      read_rows(rows, column);
      FNGD_UNROLL
      for (int r = 0; r < ROWS; ++r) product += rows[r] * x[r];
    } else {
      Pack left, unknowns;
      FNGD_UNROLL
      for (int r = 0; r < ROWS; r += LANES) {
        read(left, column + r);
        read(unknowns, x + r);
        product += left * unknowns;
      }
    }
    return sum(product);
  }

  static FNGD_INLINE void copy(T* to, const T* from) {
    FNGD_UNROLL
    for (int r = 0; r < ROWS; ++r) to[r] = from[r];
  }

  static FNGD_INLINE T sum(const Pack& pack) {
    T lane[LANES];
    memcpy(lane, &pack, sizeof(Pack));
    FNGD_UNROLL
    for (int width = LANES / 2; width > 0; width /= 2) {
      FNGD_UNROLL
      for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
    }
    return lane[0];
  }

  static FNGD_INLINE T inverse_sqrt(T value) {
#if defined(__CUDA_ARCH__)
    // The processor's estimate and a Newton step, because every panel would wait for a square root and a division.
    const T estimate = rsqrt(value);
    return estimate + T(0.5) * estimate * (T(1) - value * estimate * estimate);
#else
    return T(1) / std::sqrt(value);
#endif
  }

  template <typename Team>
  FNGD_INLINE void load(const Team& team, const System<T>& system) const {
    // A group of threads takes a row of a tile. In a warp of 8 groups of 4, a load then touches 8 cache lines and a
    // store has 4-way bank conflicts. A warp that takes whole rows or whole columns would have 32 of one or the other.
    constexpr int GROUP = Team::GROUP;
    const Symmetric<T>& k = system.k;
    for (int top = 0; top < padded; top += TILE) {
      for (int item = team.rank(); item < (top + TILE) * GROUP; item += team.size()) {
        const int i = top + item / GROUP % TILE, first = item / (GROUP * TILE) * TILE + item % GROUP;
        T* to = row(i) + int64_t{first} * TILE;
        if (first < top && i < n) {
          const T* from = &k(i, first);
          T values[TILE / GROUP];
          FNGD_UNROLL
          for (int c = 0; c < TILE / GROUP; ++c) values[c] = from[c * GROUP * k.col_stride];
          FNGD_UNROLL
          for (int c = 0; c < TILE / GROUP; ++c) to[c * GROUP * TILE] = system.scale * values[c];
        } else {
          for (int c = 0; c < TILE; c += GROUP) {
            const int j = first + c;
            T value = j == i ? T(1) : T(0);
            if (i < n && j <= i) value = system.scale * k(i, j) + (j == i ? system.damping : T(0));
            to[c * TILE] = value;
          }
        }
      }
    }
    for (int i = team.rank(); i < padded; i += team.size()) {
      right[i] = i < n ? system.right(i) : T(0);
      solution[i] = T(0);
      inverse_diagonal[i] = T(1);
    }
  }

  // L in place of scale K + damping I, and solution = L^-1 right.
  template <typename Team>
  FNGD_INLINE int factor(const Team& team) const {
    T block[COLS][COLS], inverse[COLS], forward[COLS];
    for (int j = 0; j < n; j += COLS) {
      const int first = j / LANES + team.rank(), last = padded / LANES;
      for (int pack = first; pack < last; pack += team.size()) update(pack * LANES, j);
      team.sync();

      // Every thread factors the diagonal block for itself, which takes less time than waiting for one thread.
      const T* diagonal = row(j) + int64_t{j} * TILE;
      FNGD_UNROLL
      for (int r = 0; r < COLS; ++r) {
        forward[r] = right[j + r];
        FNGD_UNROLL
        for (int c = 0; c <= r; ++c) block[r][c] = diagonal[c * TILE + r];
      }
      FNGD_UNROLL
      for (int c = 0; c < COLS; ++c) {
        const T pivot = block[c][c];
        if (!(pivot > T(0) && pivot < T(INFINITY))) return j + c + 1;
        inverse[c] = inverse_sqrt(pivot);
        forward[c] *= inverse[c];
        FNGD_UNROLL
        for (int r = c + 1; r < COLS; ++r) {
          block[r][c] *= inverse[c];
          forward[r] -= block[r][c] * forward[c];
        }
        FNGD_UNROLL
        for (int r = c + 1; r < COLS; ++r) {
          FNGD_UNROLL
          for (int s = c + 1; s <= r; ++s) block[r][s] -= block[r][c] * block[s][c];
        }
      }
      team.sync();

      for (int pack = first; pack < last; pack += team.size()) finish(pack * LANES, j, block, inverse, forward);
      FNGD_UNROLL
      for (int c = 0; c < COLS; ++c) {
        if (team.rank() == 0) {
          solution[j + c] = forward[c];
          inverse_diagonal[j + c] = inverse[c];
        }
      }
      team.sync();
    }
    return 0;
  }

  // Subtracts from columns j .. j + COLS of LANES rows what the columns before j contribute.
  FNGD_INLINE void update(int i, int j) const {
    T* rows = row(i);
    T* target = rows + int64_t{j} * TILE;
    const T* panel = row(j);
    Pack columns[COLS], left;
    FNGD_UNROLL
    for (int c = 0; c < COLS; ++c) read(columns[c], target + c * TILE);
    for (int begin = 0; begin < j; begin += BLOCK) {
      const int end = begin + BLOCK < j ? begin + BLOCK : j;
      Pack sums[COLS] = {};
      for (int k = begin; k < end; ++k) {
        read(left, rows + int64_t{k} * TILE);
        T values[COLS];
        read_rows(values, panel + int64_t{k} * TILE);
        FNGD_UNROLL
        for (int c = 0; c < COLS; ++c) sums[c] += left * values[c];
      }
      FNGD_UNROLL
      for (int c = 0; c < COLS; ++c) columns[c] -= sums[c];
    }
    FNGD_UNROLL
    for (int c = 0; c < COLS; ++c) write(target + c * TILE, columns[c]);
  }

  // Multiplies the same columns and rows by the inverse of the panel's diagonal block, and subtracts their contribution
  // from `right`.
  FNGD_INLINE void finish(int i, int j, const T (&block)[COLS][COLS], const T (&inverse)[COLS],
                          const T (&forward)[COLS]) const {
    T* target = row(i) + int64_t{j} * TILE;
    Pack columns[COLS], rest;
    FNGD_UNROLL
    for (int c = 0; c < COLS; ++c) read(columns[c], target + c * TILE);
    read(rest, right + i);
    FNGD_UNROLL
    for (int c = 0; c < COLS; ++c) {
      columns[c] *= inverse[c];
      rest -= columns[c] * forward[c];
      FNGD_UNROLL
      for (int later = c + 1; later < COLS; ++later) columns[later] -= columns[c] * block[later][c];
    }
    FNGD_UNROLL
    for (int c = 0; c < COLS; ++c) write(target + c * TILE, columns[c]);
    write(right + i, rest);
  }

  // right = L^-T solution, block by block from the last one. Overwrites `solution`.
  template <typename Team>
  FNGD_INLINE void back_substitute(const Team& team) const {
    for (int begin = padded - ROWS; begin >= 0; begin -= ROWS) {
      // Other threads have no columns left in this step.
      if (team.rank() == 0 || team.rank() < begin) {
        const T *rows = row(begin), *diagonal = rows + int64_t{begin} * TILE;
        T x[ROWS];
        copy(x, solution + begin);
        FNGD_UNROLL
        for (int r = ROWS - 1; r >= 0; --r) {
          x[r] *= inverse_diagonal[begin + r];
          FNGD_UNROLL
          for (int c = 0; c < r; ++c) x[c] -= diagonal[c * TILE + r] * x[r];
        }
        if (team.rank() == 0) copy(right + begin, x);
        for (int j = team.rank(); j < begin; j += team.size()) solution[j] -= dot(rows + int64_t{j} * TILE, x);
      }
      team.sync();
    }
  }

  int n, padded;
  T *lower, *right, *solution, *inverse_diagonal;
};

}  // namespace fngd
