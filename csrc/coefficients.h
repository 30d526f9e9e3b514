// From the Gram matrix K of a layer to the coefficients s of its samples, by a team of threads: scaling, damped solve,
// normalisation and guards in one pass. Host and device share this file.
#pragma once

#include "solve.h"

namespace fngd {

// What is added to K's diagonal: alpha tr(K) + beta.
struct Damping {
  double alpha, beta;
};

// How s follows from v, where (lam I + N K) v = 1 and lam is N times the damping of K: v / mean(v), lam v, v, or v
// scaled to the length of the plain gradient.
enum class Normalization : int32_t { mean, lambda, raw, graft };

// Sum of values[0 .. count), with the same bits for every size of team. Overwrites the values.
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

// A power of two that brings the trace near 1, so that neither the size of the gradient nor a loss scale influences the
// solve. Multiplying by it is exact, and it is a normal number.
template <typename T>
FNGD_INLINE T power_of_two_below_inverse(T trace) {
  constexpr int LIMIT = sizeof(T) == 4 ? 126 : 1022;
  const int exponent = -std::ilogb(trace);
  return std::ldexp(T(1), exponent < -LIMIT ? -LIMIT : exponent > LIMIT ? LIMIT : exponent);
}

// How often the damping of an unsolvable matrix is raised, tenfold each time, before the matrix is given up.
constexpr int RAISES = 3;

// The smallest trace at which the elements of the matrix do not underflow.
template <typename T>
FNGD_INLINE T least_trace(int n) {
  constexpr T SMALLEST = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308);
  return n * (SMALLEST / epsilon<T>());
}

// Scales the solution v, which is in s, in place and returns 0. Returns n + 1 and leaves s alone where mean(v) <= 0 or
// a value is not finite.
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

// Writes s and returns what became of the matrix:
//   0      solved
//   -r     solved after the damping was raised r times
// In all other cases s = 1:
//   j <= n  with the highest damping, too, the leading minor of order j is not positive definite or not finite
//   n + 1   the trace is not positive and finite, mean(v) <= 0, or s is not finite
//   n + 2   the trace is zero, or so small that elements of K underflow
template <typename Solver, typename Team, typename T>
FNGD_INLINE int coefficients(const Team& team, const Solver& solver, const Symmetric<T>& k, const Damping& damping,
                             Normalization normalization, T* s) {
  const int n = k.n;
  T* work = solver.workspace();
  for (int i = team.rank(); i < n; i += team.size()) work[i] = k(i, i);
  const T trace = sum(team, work, n);

  int info = trace >= T(0) && trace < least_trace<T>(n) ? n + 2 : n + 1;
  if (trace >= least_trace<T>(n) && trace < T(INFINITY)) {
    const T scale = power_of_two_below_inverse(trace);
    const T unit_trace = scale * trace;
    T shift = static_cast<T>(damping.alpha * unit_trace + damping.beta * scale);
    const T rounding = n * epsilon<T>() * unit_trace;
    FNGD_ROLLED
    for (int raises = 0; raises <= RAISES; ++raises) {
      if (raises > 0) shift = T(10) * (shift > rounding ? shift : rounding);
      info = solver.solve(team, System<T>{k, scale, shift, nullptr, 0}, s);
      if (info == 0) info = normalize(team, k, scale, shift, normalization, work, s);
      if (info == 0) return -raises;
      team.sync();
    }
  }
  for (int i = team.rank(); i < n; i += team.size()) s[i] = T(1);
  return info;
}

}  // namespace fngd
