// (K + damping I) x = rhs for one symmetric positive definite matrix, by a team of threads: L L^T = K + damping I,
// left-looking in panels of COLS columns, forward substitution on the way.
//
// Host and device share this file. On a CPU the team is one thread and Pack a SIMD vector of T; on a GPU the team is
// a thread block and Pack is T itself. A team has rank(), size() and sync().
//
// L lies in tiles of TILE rows; a tile holds its columns 0 .. up to the diagonal one after the other. Walking along k
// then reads contiguous memory for the rows being updated and for the panel's rows alike, and nothing is stored for
// the upper triangle but the diagonal tiles' own. Rows past n are rows of the identity, so no loop has a remainder.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FNGD_INLINE __host__ __device__ __forceinline__
#define FNGD_UNROLL _Pragma("unroll")
#elif defined(__clang__)
#define FNGD_INLINE inline __attribute__((always_inline))
#define FNGD_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
// Forced, because only inlined code takes on the instruction set of the function that calls it.
#define FNGD_INLINE inline __attribute__((always_inline))
#define FNGD_UNROLL _Pragma("GCC unroll 16")
#else
#define FNGD_INLINE __forceinline
#define FNGD_UNROLL
#endif

namespace fngd {

template <typename T, typename Pack, int TILE, int COLS>
class DampedCholesky {
  static constexpr int LANES = sizeof(Pack) / sizeof(T);
  // Products are added up over this many columns before they are subtracted, which halves the rounding error.
  static constexpr int BLOCK = 64;
  static_assert(TILE % COLS == 0, "a panel's rows lie in one tile");
  static_assert(TILE % LANES == 0, "a pack's rows lie in one tile");

 public:
  // Number of T that the caller provides as scratch memory for order n.
  static FNGD_INLINE int64_t scratch_size(int n) { return tile_offset(tiles(n)) + 3 * int64_t{tiles(n)} * TILE; }

  FNGD_INLINE DampedCholesky(int order, T* scratch)
      : n(order),
        padded(tiles(order) * TILE),
        lower(scratch),
        residual(scratch + tile_offset(tiles(order))),
        solution(residual + padded),
        inverse_diagonal(solution + padded) {}

  // Returns 0 and writes x, or returns j > 0 and fills x with NaN when the leading minor of order j is not positive
  // definite or not finite. Only the lower triangle of k is read.
  template <typename Team>
  FNGD_INLINE int solve(const Team& team, const T* k, int64_t row_stride, int64_t col_stride, T damping, const T* rhs,
                        int64_t rhs_stride, T* x) {
    load(team, k, row_stride, col_stride, damping, rhs, rhs_stride);
    team.sync();
    const int info = factor(team);
    if (info == 0) back_substitute(team);
    for (int i = team.rank(); i < n; i += team.size()) x[i] = info == 0 ? solution[i] : static_cast<T>(NAN);
    return info;
  }

 private:
  static FNGD_INLINE int tiles(int n) { return (n + TILE - 1) / TILE; }
  static FNGD_INLINE int64_t tile_offset(int tile) { return int64_t{TILE} * TILE * tile * (tile + 1) / 2; }

  // Element (i, j) is at row(i)[j * TILE]; the next row of the same tile is next to it.
  FNGD_INLINE T* row(int i) const { return lower + tile_offset(i / TILE) + i % TILE; }

  static FNGD_INLINE void read(Pack& pack, const T* from) { memcpy(&pack, from, sizeof(Pack)); }
  static FNGD_INLINE void write(T* to, const Pack& pack) { memcpy(to, &pack, sizeof(Pack)); }

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

  template <typename Team>
  FNGD_INLINE void load(const Team& team, const T* k, int64_t row_stride, int64_t col_stride, T damping, const T* rhs,
                        int64_t rhs_stride) {
    for (int i = 0; i < padded; ++i) {
      const T* from = k + i * row_stride;
      T* to = row(i);
      const int below = i < n ? i : 0, end = (i / TILE + 1) * TILE;
      for (int j = team.rank(); j < below; j += team.size()) to[int64_t{j} * TILE] = from[j * col_stride];
      for (int j = below + team.rank(); j < end; j += team.size()) to[int64_t{j} * TILE] = T(0);
    }
    team.sync();
    for (int i = team.rank(); i < padded; i += team.size()) {
      residual[i] = i < n ? (rhs ? rhs[i * rhs_stride] : T(1)) : T(0);
      row(i)[int64_t{i} * TILE] = i < n ? k[i * (row_stride + col_stride)] + damping : T(1);
      solution[i] = T(0);
      inverse_diagonal[i] = T(1);
    }
  }

  // L in place of K + damping I, and solution = L^-1 rhs.
  template <typename Team>
  FNGD_INLINE int factor(const Team& team) {
    T block[COLS][COLS], inverse[COLS], forward[COLS];
    for (int j = 0; j < n; j += COLS) {
      const int first = j / LANES + team.rank(), last = padded / LANES;
      for (int pack = first; pack < last; pack += team.size()) update(pack * LANES, j);
      team.sync();

      // Every thread factors the diagonal block for itself, which is quicker than waiting for one that does.
      const T* diagonal = row(j) + int64_t{j} * TILE;
      FNGD_UNROLL
      for (int r = 0; r < COLS; ++r) {
        forward[r] = residual[j + r];
        FNGD_UNROLL
        for (int c = 0; c <= r; ++c) block[r][c] = diagonal[c * TILE + r];
      }
      FNGD_UNROLL
      for (int c = 0; c < COLS; ++c) {
        const T pivot = block[c][c];
        if (!(pivot > T(0) && pivot < T(INFINITY))) return j + c + 1;
        inverse[c] = T(1) / std::sqrt(pivot);
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

  // Columns j .. j + COLS of LANES rows, minus what the columns before j contribute.
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
        FNGD_UNROLL
        for (int c = 0; c < COLS; ++c) sums[c] += left * panel[int64_t{k} * TILE + c];
      }
      FNGD_UNROLL
      for (int c = 0; c < COLS; ++c) columns[c] -= sums[c];
    }
    FNGD_UNROLL
    for (int c = 0; c < COLS; ++c) write(target + c * TILE, columns[c]);
  }

  // The same columns and rows times the inverse of the panel's diagonal block; their share leaves the residual.
  FNGD_INLINE void finish(int i, int j, const T (&block)[COLS][COLS], const T (&inverse)[COLS],
                          const T (&forward)[COLS]) const {
    T* target = row(i) + int64_t{j} * TILE;
    Pack columns[COLS], rest;
    FNGD_UNROLL
    for (int c = 0; c < COLS; ++c) read(columns[c], target + c * TILE);
    read(rest, residual + i);
    FNGD_UNROLL
    for (int c = 0; c < COLS; ++c) {
      columns[c] *= inverse[c];
      rest -= columns[c] * forward[c];
      FNGD_UNROLL
      for (int later = c + 1; later < COLS; ++later) columns[later] -= columns[c] * block[later][c];
    }
    FNGD_UNROLL
    for (int c = 0; c < COLS; ++c) write(target + c * TILE, columns[c]);
    write(residual + i, rest);
  }

  // solution = L^-T solution, tile by tile from the last.
  template <typename Team>
  FNGD_INLINE void back_substitute(const Team& team) const {
    for (int begin = padded - TILE; begin >= 0; begin -= TILE) {
      if (team.rank() == 0) {
        const T* diagonal = row(begin) + int64_t{begin} * TILE;
        T x[TILE];
        memcpy(x, solution + begin, sizeof(x));
        FNGD_UNROLL
        for (int r = TILE - 1; r >= 0; --r) {
          x[r] *= inverse_diagonal[begin + r];
          FNGD_UNROLL
          for (int c = 0; c < r; ++c) x[c] -= diagonal[c * TILE + r] * x[r];
        }
        memcpy(solution + begin, x, sizeof(x));
      }
      team.sync();
      const T* rows = row(begin);
      for (int j = team.rank(); j < begin; j += team.size()) {
        Pack product{}, left, right;
        FNGD_UNROLL
        for (int r = 0; r < TILE; r += LANES) {
          read(left, rows + int64_t{j} * TILE + r);
          read(right, solution + begin + r);
          product += left * right;
        }
        solution[j] -= sum(product);
      }
      team.sync();
    }
  }

  int n, padded;
  T *lower, *residual, *solution, *inverse_diagonal;
};

}  // namespace fngd
