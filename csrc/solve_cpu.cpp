// The damped solve on the CPU: one matrix per thread, on the widest vectors the processor has.
#include "solve_params.h"

#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "solve.h"

namespace fngd {
namespace {

constexpr int CACHE_LINE = 64;
constexpr int PANEL_COLUMNS = 8;

struct OneThread {
  FNGD_INLINE int rank() const { return 0; }
  FNGD_INLINE int size() const { return 1; }
  FNGD_INLINE void sync() const {}
};

template <typename T, typename Pack>
using Solver = DampedCholesky<T, Pack, CACHE_LINE / sizeof(T), PANEL_COLUMNS>;

template <typename T, typename Pack>
FNGD_INLINE void solve_matrix(const SolveParams& p, int64_t b, T* scratch) {
  const T* k = static_cast<const T*>(p.k) + b * p.k_batch_stride;
  const T* rhs = p.rhs ? static_cast<const T*>(p.rhs) + b * p.rhs_batch_stride : nullptr;
  const T damping = static_cast<const T*>(p.damping)[b * p.damping_stride];
  p.info[b] = Solver<T, Pack>(p.n, scratch)
                  .solve(OneThread(), k, p.k_row_stride, p.k_col_stride, damping, rhs, p.rhs_row_stride,
                         static_cast<T*>(p.x) + b * p.n);
}

template <typename T>
using Entry = void (*)(const SolveParams&, int64_t, T*);

#if defined(__GNUC__)

template <typename T, int BYTES>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES)));
};

// 16 bytes are what every x86-64 and ARMv8 processor has.
template <typename T>
void solve_baseline(const SolveParams& p, int64_t b, T* scratch) {
  solve_matrix<T, typename Vector<T, 16>::type>(p, b, scratch);
}

#if defined(__x86_64__)

template <typename T>
__attribute__((target("avx2,fma"))) void solve_avx2(const SolveParams& p, int64_t b, T* scratch) {
  solve_matrix<T, typename Vector<T, 32>::type>(p, b, scratch);
}

template <typename T>
__attribute__((target("avx512f"))) void solve_avx512(const SolveParams& p, int64_t b, T* scratch) {
  solve_matrix<T, typename Vector<T, 64>::type>(p, b, scratch);
}

template <typename T>
Entry<T> choose() {
  if (__builtin_cpu_supports("avx512f")) return solve_avx512<T>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return solve_avx2<T>;
  return solve_baseline<T>;
}

#else

template <typename T>
Entry<T> choose() {
  return solve_baseline<T>;
}

#endif
#else

template <typename T>
Entry<T> choose() {
  return solve_matrix<T, T>;
}

#endif

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{CACHE_LINE}); }
};

}  // namespace

template <typename T>
void solve_cpu(const SolveParams& params, int threads) {
  static const Entry<T> solve = choose<T>();
  const int64_t size = Solver<T, T>::scratch_size(params.n);
  std::unique_ptr<void, AlignedDelete> memory(
      ::operator new(threads * size * sizeof(T), std::align_val_t{CACHE_LINE}));
  T* scratch = static_cast<T*>(memory.get());
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
  for (int64_t b = 0; b < params.batch; ++b) {
#if defined(_OPENMP)
    T* mine = scratch + omp_get_thread_num() * size;
#else
    T* mine = scratch;
#endif
    solve(params, b, mine);
  }
}

template void solve_cpu<float>(const SolveParams&, int);
template void solve_cpu<double>(const SolveParams&, int);

}  // namespace fngd
