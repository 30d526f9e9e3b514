// Damped solves and coefficients on the CPU: one matrix per thread, on the widest vectors the processor has.
#include "solve_params.h"
#include "vector.h"

#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fngd {
namespace {

constexpr int CACHE_LINE = 64;
constexpr int PANEL_COLUMNS = 8;

struct OneThread {
  static constexpr int GROUP = 1;
  FNGD_INLINE int rank() const { return 0; }
  FNGD_INLINE int size() const { return 1; }
  FNGD_INLINE void sync() const {}
  FNGD_INLINE double add(double value) const { return value; }
};

template <typename T, typename Pack>
using Solver = DampedCholesky<T, Pack, CACHE_LINE / sizeof(T), PANEL_COLUMNS>;

template <typename T, typename Params>
using Entry = void (*)(const Params&, int64_t, T*);

#if defined(__GNUC__)

// 16 bytes are what every x86-64 and ARMv8 processor has.
template <typename T, typename Params>
void run_baseline(const Params& p, int64_t b, T* scratch) {
  run<Solver<T, typename Vector<T, 16>::type>>(OneThread(), p, b, scratch);
}

#if defined(__x86_64__)

template <typename T, typename Params>
__attribute__((target("avx2,fma"))) void run_avx2(const Params& p, int64_t b, T* scratch) {
  run<Solver<T, typename Vector<T, 32>::type>>(OneThread(), p, b, scratch);
}

template <typename T, typename Params>
__attribute__((target("avx512f"))) void run_avx512(const Params& p, int64_t b, T* scratch) {
  run<Solver<T, typename Vector<T, 64>::type>>(OneThread(), p, b, scratch);
}

template <typename T, typename Params>
Entry<T, Params> choose() {
  if (__builtin_cpu_supports("avx512f")) return run_avx512<T, Params>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return run_avx2<T, Params>;
  return run_baseline<T, Params>;
}

#else

template <typename T, typename Params>
Entry<T, Params> choose() {
  return run_baseline<T, Params>;
}

#endif
#else

template <typename T, typename Params>
void run_scalar(const Params& p, int64_t b, T* scratch) {
  run<Solver<T, T>>(OneThread(), p, b, scratch);
}

template <typename T, typename Params>
Entry<T, Params> choose() {
  return run_scalar<T, Params>;
}

#endif

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{CACHE_LINE}); }
};

}  // namespace

template <typename T, typename Params>
void run_cpu(const Params& params, int threads) {
  static const Entry<T, Params> run_one = choose<T, Params>();
  const int64_t size = Solver<T, T>::scratch_size(params.n);
  std::unique_ptr<void, AlignedDelete> memory(
      ::operator new(threads * size * sizeof(T), std::align_val_t{CACHE_LINE}));
  T* scratch = static_cast<T*>(memory.get());
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
  for (int64_t b = 0; b < params.size; ++b) {
#if defined(_OPENMP)
    T* mine = scratch + omp_get_thread_num() * size;
#else
    T* mine = scratch;
#endif
    run_one(params, b, mine);
  }
}

template void run_cpu<float>(const SolveParams&, int);
template void run_cpu<double>(const SolveParams&, int);
template void run_cpu<float>(const CoefficientsParams&, int);
template void run_cpu<double>(const CoefficientsParams&, int);

}  // namespace fngd
