// K += C C^T on the CPU, the upper triangle alone, on the widest vectors that torch uses.
//
// Torch has no symmetric product, and the general one is slow for the few and long rows of Gram matrices. Here a tile
// of K stays in registers while its rows are read along, in panels that the caches hold. Every element is summed in the
// same order whatever the tile and the number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "bindings.h"
#include "inline.h"
#include "vector.h"

namespace fngd {
namespace {

using at::Tensor;

constexpr int64_t PANEL_BYTES = 4096;  // Of one row: the rows of a tile fit the first cache.
constexpr int64_t PANEL_ROWS = 48;     // They fit the second.
constexpr double GRAIN = 1 << 20;      // MACs that are worth a thread.

template <typename T>
struct Params {
  const T* c;
  int64_t n, d, stride;
  T* k;
  int64_t stride_k;
};

template <typename T, typename V>
FNGD_INLINE T sum_lanes(const V& vector) {
  if constexpr (sizeof(V) == sizeof(T)) {
    T lane;
    std::memcpy(&lane, &vector, sizeof(T));
    return lane;
  } else {
    typename Vector<T, sizeof(V) / 2>::type halves[2];
    std::memcpy(halves, &vector, sizeof(V));
    return sum_lanes<T>(halves[0] + halves[1]);
  }
}

// Adds the inner products of I rows from x with J rows from y.
template <typename T, typename V, int I, int J>
FNGD_INLINE void add_tile(const T* x, const T* y, int64_t stride, int64_t columns, T* k, int64_t stride_k) {
  constexpr int LANES = sizeof(V) / sizeof(T);
  V sums[I][J] = {};
  int64_t d = 0;
  for (; d + LANES <= columns; d += LANES) {
    V b[J];
    FNGD_UNROLL
    for (int j = 0; j < J; ++j) std::memcpy(&b[j], y + j * stride + d, sizeof(V));
    FNGD_UNROLL
    for (int i = 0; i < I; ++i) {
      V a;
      std::memcpy(&a, x + i * stride + d, sizeof(V));
      FNGD_UNROLL
      for (int j = 0; j < J; ++j) sums[i][j] += a * b[j];
    }
  }
  FNGD_UNROLL
  for (int i = 0; i < I; ++i) {
    FNGD_UNROLL
    for (int j = 0; j < J; ++j) {
      T sum = sum_lanes<T>(sums[i][j]);
      for (int64_t rest = d; rest < columns; ++rest) sum += x[i * stride + rest] * y[j * stride + rest];
      k[i * stride_k + j] += sum;
    }
  }
}

// Adds to I rows of K from row i, in the columns from j to end.
template <typename T, typename V, int I, int J>
FNGD_INLINE void add_rows(const Params<T>& p, int64_t i, int64_t j, int64_t end, const T* panel, int64_t columns) {
  const T* x = panel + i * p.stride;
  T* k = p.k + i * p.stride_k;
  for (; j + J <= end; j += J) {
    add_tile<T, V, I, J>(x, panel + j * p.stride, p.stride, columns, k + j, p.stride_k);
  }
  for (; j < end; ++j) add_tile<T, V, I, 1>(x, panel + j * p.stride, p.stride, columns, k + j, p.stride_k);
}

// Adds to the rows of K from begin to end; tiles on the diagonal also write below it.
template <typename T, typename V, int I, int J>
FNGD_INLINE void add_gram(const Params<T>& p, int64_t begin, int64_t end) {
  constexpr int64_t COLUMNS = PANEL_BYTES / sizeof(T);
  for (int64_t d = 0; d < p.d; d += COLUMNS) {
    const T* panel = p.c + d;
    const int64_t columns = std::min(COLUMNS, p.d - d);
    for (int64_t first = begin; first < p.n; first += PANEL_ROWS) {
      const int64_t last = std::min(p.n, first + PANEL_ROWS), rows = std::min(end, last);
      int64_t i = begin;
      for (; i + I <= rows; i += I) add_rows<T, V, I, J>(p, i, std::max(i, first), last, panel, columns);
      for (; i < rows; ++i) add_rows<T, V, 1, J>(p, i, std::max(i, first), last, panel, columns);
    }
  }
}

template <typename T>
using Entry = void (*)(const Params<T>&, int64_t, int64_t);

#if defined(__GNUC__)

// 16 bytes are what every x86-64 and ARMv8 processor has.
template <typename T>
void run_baseline(const Params<T>& p, int64_t begin, int64_t end) {
  add_gram<T, typename Vector<T, 16>::type, 4, 3>(p, begin, end);
}

#if defined(__x86_64__)

template <typename T>
__attribute__((target("avx2,fma"))) void run_avx2(const Params<T>& p, int64_t begin, int64_t end) {
  add_gram<T, typename Vector<T, 32>::type, 4, 3>(p, begin, end);
}

template <typename T>
__attribute__((target("avx512f"))) void run_avx512(const Params<T>& p, int64_t begin, int64_t end) {
  add_gram<T, typename Vector<T, 64>::type, 6, 4>(p, begin, end);
}

template <typename T>
Entry<T> choose() {
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return run_avx512<T>;
  if (capability == "AVX2") return run_avx2<T>;
  return run_baseline<T>;
}

#else

template <typename T>
Entry<T> choose() {
  return run_baseline<T>;
}

#endif
#else

template <typename T>
Entry<T> choose() {
  return add_gram<T, T, 4, 3>;
}

#endif

template <typename T>
void run(const Tensor& k, const Tensor& c) {
  static const Entry<T> entry = choose<T>();
  const Params<T> p{c.const_data_ptr<T>(), c.size(0), c.size(1), c.stride(0), k.mutable_data_ptr<T>(), k.stride(0)};
  const double macs = 0.5 * p.n * p.n * p.d;
  const int64_t parts = std::clamp<int64_t>(macs / GRAIN, 1, at::get_num_threads());
  // Rows before which lies the same part of the triangle for each thread.
  const auto row = [&](int64_t part) { return std::lround(p.n * (1 - std::sqrt(1 - double(part) / parts))); };
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) entry(p, row(part), row(part + 1));
  });
}

void add_gram_cpu(const Tensor& k, const Tensor& c) {
  TORCH_CHECK_VALUE(c.dim() == 2 && (c.size(1) <= 1 || c.stride(1) == 1),
                    "c: expected shape (N, D) with neighbouring columns, got ", c.sizes(), " with strides ", c.strides());
  TORCH_CHECK_VALUE(k.dim() == 2 && k.size(0) == c.size(0) && k.size(1) == c.size(0) && k.stride(1) == 1,
                    "k: expected shape (", c.size(0), ", ", c.size(0), ") with neighbouring columns, got ", k.sizes());
  TORCH_CHECK_TYPE(k.scalar_type() == c.scalar_type() && k.is_cpu() && c.is_cpu(),
                   "k: expected the dtype of c, ", c.scalar_type(), ", on the CPU, got ", k.scalar_type());
  AT_DISPATCH_FLOATING_TYPES(c.scalar_type(), "add_gram", [&] { run<scalar_t>(k, c); });
}

}  // namespace

void bind_add_gram(pybind11::module_& m) { m.def("add_gram", torch::wrap_pybind_function_no_gil(add_gram_cpu)); }

}  // namespace fngd
