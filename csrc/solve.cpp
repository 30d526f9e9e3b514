// The damped solve and the coefficients: checks, and dispatch on device and dtype.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

#include "bindings.h"
#include "solve_params.h"

#ifdef FNGD_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "solve_cuda.h"
#endif

namespace fngd {
namespace {

using at::Tensor;

#ifdef FNGD_WITH_CUDA
template <typename T, typename Params>
void run_cuda(const Tensor& k, const Params& params) {
  const c10::cuda::CUDAGuard guard(k.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  int64_t bytes = 0;
  C10_CUDA_CHECK(cuda_scratch_bytes<T>(params, k.get_device(), &bytes));
  const Tensor scratch = at::empty({bytes}, k.options().dtype(at::kByte));
  void* memory = bytes > 0 ? scratch.mutable_data_ptr() : nullptr;
  C10_CUDA_CHECK(fngd::run_cuda<T>(params, memory, k.get_device(), stream.stream()));
}
#endif

// The kernels count rows in 32 bits.
constexpr int64_t kMaxOrder = int64_t{1} << 20;

// Fills in the batch of matrices k (L,N,N), out (L,N) and info (L,), and runs it where k is.
template <typename Params>
void run(const Tensor& k, const Tensor& out, const Tensor& info, Params& params) {
  TORCH_CHECK_VALUE(k.size(1) <= kMaxOrder, "k: expected matrices of order ", kMaxOrder, " or less, got ", k.size(1));
  params.k = k.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.info = info.mutable_data_ptr<int32_t>();
  params.size = k.size(0);
  params.n = static_cast<int>(k.size(1));
  params.k_batch_stride = k.stride(0);
  params.k_row_stride = k.stride(1);
  params.k_col_stride = k.stride(2);
  AT_DISPATCH_FLOATING_TYPES(k.scalar_type(), "fngd::solve", [&] {
#ifdef FNGD_WITH_CUDA
    if (k.is_cuda()) return run_cuda<scalar_t>(k, params);
#endif
    const int64_t available = at::in_parallel_region() ? 1 : at::get_num_threads();
    run_cpu<scalar_t>(params, static_cast<int>(std::min(available, params.size)));
  });
}

void check_solve(const Tensor& k, const Tensor& damping, const std::optional<Tensor>& rhs) {
  TORCH_CHECK_VALUE(k.dim() >= 2 && k.size(-1) == k.size(-2), "k: expected shape (..., N, N), got ", k.sizes());
  const auto batch = k.sizes().slice(0, k.dim() - 2), rows = k.sizes().slice(0, k.dim() - 1);
  TORCH_CHECK_VALUE(damping.sizes() == batch, "damping: expected shape ", batch, ", got ", damping.sizes());
  TORCH_CHECK_TYPE(damping.scalar_type() == k.scalar_type() && damping.device() == k.device(),
                   "damping: expected the dtype and device of k");
  if (rhs) {
    TORCH_CHECK_VALUE(rhs->sizes() == rows, "rhs: expected shape ", rows, ", got ", rhs->sizes());
    TORCH_CHECK_TYPE(rhs->scalar_type() == k.scalar_type() && rhs->device() == k.device(),
                     "rhs: expected the dtype and device of k");
  }
}

std::tuple<Tensor, Tensor> solve_batch(const Tensor& k, const Tensor& damping, const std::optional<Tensor>& rhs) {
  check_solve(k, damping, rhs);
  const int64_t n = k.size(-1), size = damping.numel();
  const Tensor x = at::empty(k.sizes().slice(0, k.dim() - 1), k.options());
  const Tensor info = at::empty(k.sizes().slice(0, k.dim() - 2), k.options().dtype(at::kInt));
  if (x.numel() == 0) return {x, info.zero_()};

  // Views unless the batch dimensions cannot be merged.
  const Tensor dampings = damping.reshape({size}), targets = rhs ? rhs->reshape({size, n}) : Tensor();
  SolveParams params{};
  params.damping = dampings.const_data_ptr();
  params.damping_stride = dampings.stride(0);
  if (rhs) {
    params.rhs = targets.const_data_ptr();
    params.rhs_batch_stride = targets.stride(0);
    params.rhs_row_stride = targets.stride(1);
  }
  run(k.reshape({size, n, n}), x, info, params);
  return {x, info};
}

Normalization normalization_named(std::string_view name) {
  if (name == "mean") return Normalization::mean;
  if (name == "lambda") return Normalization::lambda;
  if (name == "raw") return Normalization::raw;
  if (name == "graft") return Normalization::graft;
  TORCH_CHECK_VALUE(false, "normalize: expected a known name, got ", name);
}

std::tuple<Tensor, Tensor> coefficients_batch(const Tensor& k, double alpha, double beta, std::string_view normalize) {
  TORCH_CHECK_VALUE(k.dim() == 3 && k.size(1) == k.size(2), "k: expected shape (L, N, N), got ", k.sizes());
  CoefficientsParams params{};
  params.damping = {alpha, beta};
  params.normalization = normalization_named(normalize);
  const Tensor s = at::empty({k.size(0), k.size(1)}, k.options());
  const Tensor info = at::empty({k.size(0)}, k.options().dtype(at::kInt));
  if (s.numel() == 0) return {s, info.zero_()};
  run(k, s, info, params);
  return {s, info};
}

}  // namespace

void bind_solve(pybind11::module_& m) {
  m.def("solve", torch::wrap_pybind_function_no_gil(solve_batch));
  m.def("coefficients", torch::wrap_pybind_function_no_gil(coefficients_batch));
}

}  // namespace fngd
