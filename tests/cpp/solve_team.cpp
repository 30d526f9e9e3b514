// The solver's core and the coefficients with teams of several threads, groups and packs of several widths, against a
// plain double Cholesky. Prints one line per failure; the exit status is 1 where there was one.
#include "../../csrc/coefficients.h"

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <limits>
#include <random>
#include <thread>
#include <vector>

namespace {

int failures = 0;

// What a team's threads share; groups add up through `slots`.
struct Shared {
  explicit Shared(int threads) : barrier(threads), slots(threads) {}
  std::barrier<> barrier;
  std::vector<double> slots;
};

template <int WIDTH>
class ThreadTeam {
 public:
  static constexpr int GROUP = WIDTH;
  ThreadTeam(int rank, int size, Shared& shared) : rank_(rank), size_(size), shared_(&shared) {}
  int rank() const { return rank_; }
  int size() const { return size_; }
  void sync() const { shared_->barrier.arrive_and_wait(); }
  double add(double value) const {
    if constexpr (GROUP == 1) return value;
    sync();
    shared_->slots[rank_] = value;
    sync();
    double sum = 0;
    for (int i = 0; i < GROUP; ++i) sum += shared_->slots[rank_ / GROUP * GROUP + i];
    return sum;
  }

 private:
  int rank_, size_;
  Shared* shared_;
};

template <typename T, int LANES>
struct Vector {
  typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};
template <typename T>
struct Vector<T, 1> {
  typedef T type;
};

template <typename T>
struct Problem {
  int n;
  T damping;
  std::vector<T> k, rhs;
  std::vector<double> exact;
};

// Row by row, in double and in the textbook's order: L L^T x = rhs.
template <typename T>
std::vector<double> solve_exactly(const Problem<T>& p) {
  const int n = p.n;
  std::vector<double> l(size_t(n) * n), x(p.rhs.begin(), p.rhs.end());
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) {
      double sum = double(p.k[i * n + j]) + (i == j ? double(p.damping) : 0.0);
      for (int m = 0; m < j; ++m) sum -= l[i * n + m] * l[j * n + m];
      l[i * n + j] = i == j ? std::sqrt(sum) : sum / l[j * n + j];
    }
    for (int j = 0; j < i; ++j) x[i] -= l[i * n + j] * x[j];
    x[i] /= l[i * n + i];
  }
  for (int i = n - 1; i >= 0; --i) {
    for (int j = i + 1; j < n; ++j) x[i] -= l[j * n + i] * x[j];
    x[i] /= l[i * n + i];
  }
  return x;
}

template <typename T>
Problem<T> make_problem(int n) {
  std::mt19937 generator(n);
  std::normal_distribution<double> normal;
  std::vector<double> features(size_t(n) * 2 * n);
  for (double& value : features) value = normal(generator);
  Problem<T> p{n, T(0.125), std::vector<T>(size_t(n) * n), std::vector<T>(n), {}};
  for (int i = 0; i < n; ++i) {
    p.rhs[i] = T(normal(generator));
    for (int j = 0; j <= i; ++j) {
      double sum = 0;
      for (int m = 0; m < 2 * n; ++m) sum += features[i * 2 * n + m] * features[j * 2 * n + m];
      p.k[i * n + j] = T(sum / (2 * n));
      // Must never count.
      p.k[j * n + i] = i == j ? p.k[j * n + i] : std::numeric_limits<T>::quiet_NaN();
    }
  }
  p.exact = solve_exactly(p);
  return p;
}

// How a matrix is worked on. On CUDA: one lane, tiles of 128 bytes, panels of 8 columns, groups of 4 threads.
template <typename Number, int LANES, int TILE, int COLS, int WIDTH>
struct Shape {
  using T = Number;
  using Solver = fngd::DampedCholesky<T, typename Vector<T, LANES>::type, TILE, COLS>;
  using Team = ThreadTeam<WIDTH>;
  static constexpr int GROUP = WIDTH;
};

void fail(const char* what, int n, int threads, double got) {
  std::printf("%s: n=%d threads=%d: %g\n", what, n, threads, got);
  ++failures;
}

// Runs job(team, solver) in every thread of a team, and returns the info that all of them agree on.
template <typename Shape, typename Job>
int run(int n, int threads, Job job) {
  using T = typename Shape::T;
  const T nan = std::numeric_limits<T>::quiet_NaN(), guard = T(12345);
  const int64_t size = Shape::Solver::scratch_size(n);
  // Aligned as the launchers align it.
  std::vector<T> memory(size + 128, nan);
  T* scratch = memory.data();
  while (reinterpret_cast<uintptr_t>(scratch) % 64 != 0) ++scratch;
  std::fill(scratch + size, scratch + size + 64, guard);
  std::vector<int> info(threads, -1);
  Shared shared(threads);
  std::vector<std::thread> team;
  for (int rank = 0; rank < threads; ++rank) {
    team.emplace_back([&, rank] {
      info[rank] = job(typename Shape::Team(rank, threads, shared), typename Shape::Solver(n, scratch));
    });
  }
  for (std::thread& thread : team) thread.join();
  if (std::count(scratch + size, scratch + size + 64, guard) != 64) fail("wrote past the scratch", n, threads, 0);
  if (std::count(info.begin(), info.end(), info[0]) != threads) fail("the team disagrees on info", n, threads, 0);
  return info[0];
}

template <typename T>
fngd::Symmetric<T> symmetric(const Problem<T>& p) {
  return {p.k.data(), p.n, 1, p.n};
}

template <typename Shape, typename T>
int solve(const Problem<T>& p, int threads, std::vector<T>& x) {
  x.assign(p.n, std::numeric_limits<T>::quiet_NaN());
  const fngd::System<T> system{symmetric(p), T(1), p.damping, p.rhs.data(), 1};
  return run<Shape>(p.n, threads, [&](auto team, auto solver) { return solver.solve(team, system, x.data()); });
}

double distance(const auto& values, const std::vector<double>& exact) {
  double scale = 0, error = 0;
  for (double value : exact) scale = std::max(scale, std::abs(value));
  for (size_t i = 0; i < exact.size(); ++i) error = std::max(error, std::abs(values[i] - exact[i]));
  return error / scale;
}

// Team sizes, as multiples of the group.
std::vector<int> sizes(int group) {
  return group == 1 ? std::vector<int>{1, 3} : std::vector<int>{group, 2 * group};
}

template <typename Shape, typename T>
void check_solve(const Problem<T>& p) {
  constexpr double eps = std::numeric_limits<T>::epsilon();
  // The condition number is below 30, so that only the rounding of n terms counts.
  const double rounding = 64;
  std::vector<T> first, x;
  for (int threads : sizes(Shape::GROUP)) {
    const int info = solve<Shape>(p, threads, x);
    if (first.empty()) first = x;
    const double error = distance(x, p.exact) / eps;
    if (info != 0) fail("info", p.n, threads, info);
    if (!(error <= rounding)) fail("error", p.n, threads, error);
    if (std::memcmp(first.data(), x.data(), p.n * sizeof(T)) != 0) fail("other bits", p.n, threads, 0);
  }
}

template <typename Shape, typename T>
void check_failure(const Problem<T>& p) {
  for (int minor : {1, 8, 9, p.n}) {
    Problem<T> broken = p;
    broken.k[(minor - 1) * (p.n + 1)] = T(-1);
    std::vector<T> x;
    const int info = solve<Shape>(broken, 3 * Shape::GROUP, x);
    if (info != minor) fail("info of an indefinite matrix", p.n, minor, info);
    if (!std::all_of(x.begin(), x.end(), [](T value) { return value != value; })) fail("not NaN", p.n, minor, 0);
  }
}

// s by its definition: (lam I + N K) v = 1 in double, then the scale.
template <typename T>
std::vector<double> coefficients_exactly(const Problem<T>& p, const fngd::Damping& damping,
                                         fngd::Normalization normalization) {
  const int n = p.n;
  double trace = 0;
  for (int i = 0; i < n; ++i) trace += p.k[i * n + i];
  const double lam = n * (damping.alpha * trace + damping.beta);
  Problem<double> scaled{n, lam, {}, std::vector<double>(n, 1), {}};
  for (T value : p.k) scaled.k.push_back(double(value) * n);
  std::vector<double> v = solve_exactly(scaled);
  double mean = 0, plain = 0, natural = 0;
  for (int i = 0; i < n; ++i) {
    mean += v[i] / n;
    for (int j = 0; j < n; ++j) {
      const double k = p.k[std::max(i, j) * n + std::min(i, j)];
      plain += k;
      natural += v[i] * k * v[j];
    }
  }
  const double factors[] = {1 / mean, lam, 1, std::sqrt(plain / natural)};
  for (double& value : v) value *= factors[static_cast<int>(normalization)];
  return v;
}

template <typename Shape, typename T>
int coefficients(const Problem<T>& p, int threads, const fngd::Damping& damping, int normalization, std::vector<T>& s) {
  s.assign(p.n, std::numeric_limits<T>::quiet_NaN());
  return run<Shape>(p.n, threads, [&](auto team, auto solver) {
    return fngd::coefficients(team, solver, symmetric(p), damping, fngd::Normalization(normalization), s.data());
  });
}

template <typename Shape, typename T>
void check_coefficients(const Problem<T>& p) {
  std::vector<T> first, s;
  for (const fngd::Damping& damping : {fngd::Damping{0.125, 0}, {0, 0.125}, {0.03, 0.05}}) {
    for (int normalization : {0, 1, 2, 3}) {
      const auto exact = coefficients_exactly(p, damping, fngd::Normalization(normalization));
      first.clear();
      for (int threads : sizes(Shape::GROUP)) {
        const int info = coefficients<Shape>(p, threads, damping, normalization, s);
        if (first.empty()) first = s;
        const double error = distance(s, exact) / std::numeric_limits<T>::epsilon();
        if (info != 0) fail("info of coefficients", p.n, threads, info);
        if (!(error <= 256)) fail("coefficients", p.n, threads, error);
        if (std::memcmp(first.data(), s.data(), p.n * sizeof(T)) != 0) fail("other bits", p.n, threads, 0);
      }
    }
  }
}

// A matrix that is definite only once the damping was raised, and one that never is.
template <typename Shape, typename T>
void check_raises(Problem<T> p) {
  std::vector<T> first, s;
  const fngd::Damping damping{0, 0.125};
  T& element = p.k[(p.n / 2) * (p.n + 1)];
  element = T(-2);
  const auto exact = coefficients_exactly(p, {0, 100 * damping.beta}, fngd::Normalization::lambda);
  for (int threads : sizes(Shape::GROUP)) {
    const int info = coefficients<Shape>(p, threads, damping, 1, s);
    if (first.empty()) first = s;
    const double error = distance(s, exact) / std::numeric_limits<T>::epsilon();
    if (info != -2) fail("info after raises", p.n, threads, info);
    if (!(error <= 256)) fail("coefficients after raises", p.n, threads, error);
    if (std::memcmp(first.data(), s.data(), p.n * sizeof(T)) != 0) fail("other bits", p.n, threads, 0);
  }
  p.k[p.n * p.n - 2] = std::numeric_limits<T>::infinity();
  element = T(1);
  const int info = coefficients<Shape>(p, 2 * Shape::GROUP, damping, 1, s);
  if (info != p.n) fail("info of what is not finite", p.n, 2 * Shape::GROUP, info);
  if (std::count(s.begin(), s.end(), T(1)) != p.n) fail("not 1", p.n, 2 * Shape::GROUP, 0);
}

template <typename T>
using Cuda = Shape<T, 1, 128 / sizeof(T), 8, 4>;
template <typename T>
using Vectors = Shape<T, 32 / sizeof(T), 64 / sizeof(T), 8, 1>;

template <typename T>
void check_all() {
  for (int n : {1, 7, 8, 9, 31, 64, 65, 129}) {
    const Problem<T> p = make_problem<T>(n);
    check_solve<Cuda<T>>(p);
    check_solve<Vectors<T>>(p);
    check_solve<Shape<T, 1, 16, 4, 1>>(p);
    check_solve<Shape<T, 16 / sizeof(T), 64 / sizeof(T), 8, 1>>(p);
    check_solve<Shape<T, 64 / sizeof(T), 64 / sizeof(T), 8, 1>>(p);
  }
  check_failure<Cuda<T>>(make_problem<T>(65));
  check_failure<Vectors<T>>(make_problem<T>(65));
  for (int n : {1, 8, 37}) {
    check_coefficients<Cuda<T>>(make_problem<T>(n));
    check_coefficients<Vectors<T>>(make_problem<T>(n));
  }
  check_raises<Cuda<T>>(make_problem<T>(37));
  check_raises<Vectors<T>>(make_problem<T>(37));
}

// Every step of the algorithm once by several threads, for a thread sanitizer.
void check_races() {
  std::vector<float> out;
  const Problem<float> p = make_problem<float>(41);
  if (solve<Cuda<float>>(p, 8, out) != 0) fail("info", p.n, 8, 1);
  if (solve<Vectors<float>>(p, 3, out) != 0) fail("info", p.n, 3, 1);
  if (coefficients<Cuda<float>>(p, 8, {0.125, 0}, 3, out) != 0) fail("info of coefficients", p.n, 8, 1);
  check_failure<Cuda<float>>(make_problem<float>(17));
  check_raises<Cuda<float>>(make_problem<float>(17));
}

}  // namespace

// With any argument: the races alone.
int main(int count, char**) {
  if (count > 1) {
    check_races();
  } else {
    check_all<float>();
    check_all<double>();
  }
  return failures != 0;
}
