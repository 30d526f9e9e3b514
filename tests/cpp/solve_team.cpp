// The solver's core with teams of several threads and packs of several widths, against a plain double Cholesky.
// Prints one line per failure; the exit status is the number of failures, at most 1.
#include "../../csrc/solve.h"

#include <barrier>
#include <cstdio>
#include <limits>
#include <random>
#include <thread>
#include <vector>

namespace {

int failures = 0;

class ThreadTeam {
 public:
  ThreadTeam(int rank, int size, std::barrier<>& barrier) : rank_(rank), size_(size), barrier_(&barrier) {}
  int rank() const { return rank_; }
  int size() const { return size_; }
  void sync() const { barrier_->arrive_and_wait(); }

 private:
  int rank_, size_;
  std::barrier<>* barrier_;
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

template <typename T, int LANES, int TILE, int COLS>
int run(const Problem<T>& p, int threads, std::vector<T>& x) {
  using Solver = fngd::DampedCholesky<T, typename Vector<T, LANES>::type, TILE, COLS>;
  const T nan = std::numeric_limits<T>::quiet_NaN(), guard = T(12345);
  const int64_t size = Solver::scratch_size(p.n);
  std::vector<T> scratch(size + 64, nan);
  for (int i = 0; i < 64; ++i) scratch[size + i] = guard;
  x.assign(p.n, nan);
  std::vector<int> info(threads, -1);
  std::barrier<> barrier(threads);
  std::vector<std::thread> team;
  for (int rank = 0; rank < threads; ++rank) {
    team.emplace_back([&, rank] {
      info[rank] = Solver(p.n, scratch.data())
                       .solve(ThreadTeam(rank, threads, barrier), p.k.data(), p.n, 1, p.damping, p.rhs.data(), 1,
                              x.data());
    });
  }
  for (std::thread& thread : team) thread.join();
  for (int i = 0; i < 64; ++i) {
    if (scratch[size + i] != guard) {
      std::printf("n=%d lanes=%d tile=%d cols=%d threads=%d: wrote past the scratch\n", p.n, LANES, TILE, COLS, threads);
      ++failures;
      break;
    }
  }
  for (int value : info) {
    if (value != info[0]) {
      std::printf("n=%d threads=%d: the team disagrees on info\n", p.n, threads);
      ++failures;
    }
  }
  return info[0];
}

template <typename T, int LANES, int TILE, int COLS>
void check(const Problem<T>& p) {
  double scale = 0;
  for (double value : p.exact) scale = std::max(scale, std::abs(value));
  std::vector<T> alone, together;
  for (int threads : {1, 2, 5, 33}) {
    const int info = run<T, LANES, TILE, COLS>(p, threads, together);
    if (threads == 1) alone = together;
    double error = 0;
    // The condition number is below 30, so this is the rounding of n terms and no more.
    for (int i = 0; i < p.n; ++i) error = std::max(error, std::abs(together[i] - p.exact[i]) / scale);
    const bool same = std::memcmp(alone.data(), together.data(), p.n * sizeof(T)) == 0;
    if (info != 0 || !(error <= 64 * std::numeric_limits<T>::epsilon()) || !same) {
      std::printf("n=%d bytes=%zu lanes=%d tile=%d cols=%d threads=%d: info %d, error %g, same bits %d\n", p.n,
                  sizeof(T), LANES, TILE, COLS, threads, info, error, same);
      ++failures;
    }
  }
}

template <typename T, int LANES, int TILE, int COLS>
void check_failure(Problem<T> p) {
  for (int minor : {1, 8, 9, p.n}) {
    Problem<T> broken = p;
    broken.k[(minor - 1) * (p.n + 1)] = T(-1);
    std::vector<T> x;
    const int info = run<T, LANES, TILE, COLS>(broken, 3, x);
    bool all_nan = true;
    for (T value : x) all_nan = all_nan && value != value;
    if (info != minor || !all_nan) {
      std::printf("n=%d: expected info %d and NaN, got %d, NaN %d\n", p.n, minor, info, all_nan);
      ++failures;
    }
  }
}

template <typename T>
void check_all() {
  for (int n : {1, 2, 7, 8, 9, 31, 64, 65, 129}) {
    const Problem<T> p = make_problem<T>(n);
    check<T, 1, 32, 8>(p);
    check<T, 1, 16, 4>(p);
    check<T, 16 / sizeof(T), 64 / sizeof(T), 8>(p);
    check<T, 32 / sizeof(T), 64 / sizeof(T), 8>(p);
    check<T, 64 / sizeof(T), 64 / sizeof(T), 8>(p);
  }
  check_failure<T, 1, 32, 8>(make_problem<T>(65));
  check_failure<T, 32 / sizeof(T), 64 / sizeof(T), 8>(make_problem<T>(65));
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  return failures != 0;
}
