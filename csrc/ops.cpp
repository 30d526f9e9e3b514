// Checks, dispatch on dtype, and registration of the native kernels; the schemas are defined in fngd_kernels/ops.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "solve_params.h"

void bind_nodes(pybind11::module_& module);

namespace {

using at::Tensor;

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

std::tuple<Tensor, Tensor> solve(const Tensor& k, const Tensor& damping, const std::optional<Tensor>& rhs) {
  check_solve(k, damping, rhs);
  const auto batch_sizes = k.sizes().slice(0, k.dim() - 2);
  const int64_t n = k.size(-1), batch = damping.numel();
  Tensor x = at::empty(k.sizes().slice(0, k.dim() - 1), k.options());
  Tensor info = at::zeros(batch_sizes, k.options().dtype(at::kInt));
  if (x.numel() == 0) return {x, info};

  // Views unless the batch dimensions cannot be merged.
  const Tensor matrices = k.reshape({batch, n, n}), dampings = damping.reshape({batch});
  const Tensor targets = rhs ? rhs->reshape({batch, n}) : Tensor();
  fngd::SolveParams params{};
  params.k = matrices.const_data_ptr();
  params.damping = dampings.const_data_ptr();
  params.rhs = rhs ? targets.const_data_ptr() : nullptr;
  params.x = x.mutable_data_ptr();
  params.info = info.mutable_data_ptr<int32_t>();
  params.batch = batch;
  params.n = static_cast<int>(n);
  params.k_batch_stride = matrices.stride(0);
  params.k_row_stride = matrices.stride(1);
  params.k_col_stride = matrices.stride(2);
  params.damping_stride = dampings.stride(0);
  params.rhs_batch_stride = rhs ? targets.stride(0) : 0;
  params.rhs_row_stride = rhs ? targets.stride(1) : 0;

  const int64_t available = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int threads = static_cast<int>(std::min(available, batch));
  AT_DISPATCH_FLOATING_TYPES(k.scalar_type(), "fngd::solve", [&] { fngd::solve_cpu<scalar_t>(params, threads); });
  return {x, info};
}

}  // namespace

TORCH_LIBRARY_IMPL(fngd, CPU, m) {
  m.impl("solve", &solve);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { bind_nodes(m); }
