// From the Gram matrix K of a layer to the weights s of its samples, by a team of threads: scaling, damped solve,
// normalisation and guards in one pass. Host and device share this file.
#pragma once

#include "solve.h"

namespace fngd {

// lam, with K' = N^2 K the Gram matrix of the per-sample gradients: damping times tr(K') / N, tr(K') / N^2 or 1.
enum class DampingMode : int32_t { trace, mean_eig, absolute };

// s from v, (lam I + N K) v = 1: v / mean(v), lam v, v, or v scaled to the length of the plain gradient.
enum class Normalization : int32_t { mean, lambda, raw, graft };

// Sum of values[0 .. count), the same bits for every size of team; uses the values up.
template <typename Team, typename T>
FNGD_INLINE T sum(const Team& team, T* values, int count) {
  team.sync();
  while (count > 1) {
    const int half = (count + 1) / 2;
    for (int i = team.rank(); i + half < count; i += team.size()) values[i] += values[i + half];
    team.sync();
    count = half;
  }
  const T total = values[0];
  team.sync();
  return total;
}

template <typename T>
FNGD_INLINE constexpr T epsilon() {
  return sizeof(T) == 4 ? T(1.1920929e-07) : T(2.220446049250313e-16);
}

// A power of two that brings the trace near 1, so that neither the size of the gradient nor a loss scale reaches the
// solve; exact, and kept within the normal numbers.
template <typename T>
FNGD_INLINE T power_of_two_below_inverse(T trace) {
  constexpr int LIMIT = sizeof(T) == 4 ? 126 : 1022;
  const int exponent = -std::ilogb(trace);
  return std::ldexp(T(1), exponent < -LIMIT ? -LIMIT : exponent > LIMIT ? LIMIT : exponent);
}

// The damping is raised this many times, tenfold each time, before a matrix is given up.
constexpr int RAISES = 3;

// The smallest trace whose matrix is not lost to underflow.
template <typename T>
FNGD_INLINE T least_trace(int n) {
  constexpr T SMALLEST = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308);
  return n * (SMALLEST / epsilon<T>());
}

// s and 0 from a solved v in s; without touching s n + 1 where mean(v) <= 0 or a number is not finite.
template <typename Team, typename T>
FNGD_INLINE int normalize(const Team& team, const Symmetric<T>& k, T scale, T shift, Normalization normalization,
                          T* work, T* s) {
  const int n = k.n;
  for (int i = team.rank(); i < n; i += team.size()) work[i] = s[i];
  const T mean = sum(team, work, n) / n;
  if (!(mean > T(0) && mean < T(INFINITY))) return n + 1;
  T factor = T(1) / mean;
  if (normalization == Normalization::lambda) factor = shift;
  if (normalization == Normalization::raw) factor = scale / n;
  if (normalization == Normalization::graft) {
    multiply(team, k, s, [&](int i, double row) { work[i] = static_cast<T>(s[i] * (scale * row)); });
    const T natural = sum(team, work, n);
    const T* ones = nullptr;
    multiply(team, k, ones, [&](int i, double row) { work[i] = static_cast<T>(scale * row); });
    factor = std::sqrt(sum(team, work, n) / natural);
  }
  // 0 where finite, NaN otherwise.
  for (int i = team.rank(); i < n; i += team.size()) work[i] = T(0) * (s[i] * factor);
  if (sum(team, work, n) != T(0)) return n + 1;
  for (int i = team.rank(); i < n; i += team.size()) s[i] *= factor;
  return 0;
}

// Writes s and returns 0 where solved, -r where solved after the damping was raised r times. Otherwise s = 1, and the
// result is j = 1 .. n where to the last the leading minor of order j of the damped matrix is not positive definite or
// not finite, n + 1 where the trace is not positive and finite, mean(v) <= 0, or s is not finite, n + 2 where the trace
// is zero or so small that K underflows.
template <typename Solver, typename Team, typename T>
FNGD_INLINE int coefficients(const Team& team, const Solver& solver, const Symmetric<T>& k, double damping,
                             DampingMode mode, Normalization normalization, T* s) {
  const int n = k.n;
  T* work = solver.workspace();
  for (int i = team.rank(); i < n; i += team.size()) work[i] = k(i, i);
  const T trace = sum(team, work, n);

  int info = trace >= T(0) && trace < least_trace<T>(n) ? n + 2 : n + 1;
  if (trace >= least_trace<T>(n) && trace < T(INFINITY)) {
    const T scale = power_of_two_below_inverse(trace);
    const T unit = mode == DampingMode::absolute ? scale : scale * trace;
    T shift = static_cast<T>(mode == DampingMode::trace ? damping * unit : damping * unit / n);
    const T rounding = n * epsilon<T>() * (scale * trace);
    FNGD_ROLLED
    for (int raises = 0; raises <= RAISES; ++raises) {
      if (raises > 0) shift = T(10) * (shift > rounding ? shift : rounding);
      info = solver.solve(team, System<T>{k, scale, shift, nullptr, 0}, false, s);
      if (info == 0) info = normalize(team, k, scale, shift, normalization, work, s);
      if (info == 0) return -raises;
      team.sync();
    }
  }
  for (int i = team.rank(); i < n; i += team.size()) s[i] = T(1);
  return info;
}

}  // namespace fngd
