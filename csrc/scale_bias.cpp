// The samples of a tensor times their coefficients: checks, the layouts that the kernels of scale_bias_cuda.cu take,
// and the same with torch's operators.
#include "scale_bias.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "scale_bias_op.h"

#ifdef FNGD_WITH_CUDA
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
// Not ATen/cuda: it includes headers of libraries that many toolkits come without.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fngd {
namespace {

namespace py = pybind11;

using at::Tensor;
using Results = std::tuple<Tensor, Tensor>;  // s_n e_n and the bias; undefined where not asked for.

// s_n e_n in the common dtype of both.
Tensor product(const Tensor& e, const Tensor& s) {
  std::vector<int64_t> shape(e.dim(), 1);
  shape[0] = -1;
  return e * s.view(shape);
}

Results plain_scale_bias(const Tensor& e, const Tensor& s, int64_t channel, bool scaled, bool bias) {
  std::vector<int64_t> others;
  for (int64_t i = 0; i < e.dim(); ++i) {
    if (i != channel) others.push_back(i);
  }
  const auto wide = at::promoteTypes(e.scalar_type(), at::kFloat);
  const Tensor wide_e = product(e.to(wide), s.to(wide));
  return {scaled ? wide_e.to(e.scalar_type()) : Tensor(), bias ? wide_e.sum(others).to(e.scalar_type()) : Tensor()};
}

#ifdef FNGD_WITH_CUDA
std::optional<ScaleBiasType> scale_type(const Tensor& e) {
  switch (e.scalar_type()) {
    case at::kDouble: return ScaleBiasType::kDouble;
    case at::kFloat: return ScaleBiasType::kFloat;
    case at::kBFloat16: return ScaleBiasType::kBFloat16;
    case at::kHalf: return ScaleBiasType::kHalf;
    default: return std::nullopt;
  }
}

// Describes e as samples, channels and positions; returns false where no single stride leads from each position to the
// next.
bool describe(const Tensor& e, int64_t channel, ScaleBiasParams& params) {
  int64_t positions = 1, stride = 1;
  std::vector<std::pair<int64_t, int64_t>> axes;  // Stride and size.
  for (int64_t i = 1; i < e.dim(); ++i) {
    if (i != channel && e.size(i) > 1) axes.emplace_back(e.stride(i), e.size(i));
  }
  std::sort(axes.begin(), axes.end());
  for (const auto& [axis_stride, size] : axes) {
    if (positions == 1) stride = axis_stride;
    if (axis_stride != stride * positions) return false;
    positions *= size;
  }
  if (e.size(0) > INT32_MAX || e.size(channel) > INT32_MAX || positions > INT32_MAX) return false;
  params.samples = static_cast<uint32_t>(e.size(0));
  params.channels = static_cast<uint32_t>(e.size(channel));
  params.positions = static_cast<uint32_t>(positions);
  params.stride_sample = e.stride(0);
  params.stride_channel = e.size(channel) > 1 ? e.stride(channel) : 1;
  params.stride_position = stride;
  return true;
}

// Returns nothing where the kernels do not support the dtype or the layout.
std::optional<Results> kernel_scale_bias(const Tensor& e, const Tensor& s, int64_t channel, bool scaled, bool bias) {
  const auto type = scale_type(e);
  ScaleBiasParams params{};
  if (!type || e.numel() == 0 || !e.is_non_overlapping_and_dense() || !describe(e, channel, params)) return {};
  if (!bias && e.numel() == int64_t{params.samples} * params.stride_sample && e.numel() <= INT32_MAX) {
    // Samples lie one after the other, and nothing is summed: the layout within a sample does not matter.
    params.channels = static_cast<uint32_t>(params.stride_sample);
    params.positions = 1;
    params.stride_channel = params.stride_position = 1;
  }
  const c10::cuda::CUDAGuard guard(e.device());
  const auto wide = at::promoteTypes(e.scalar_type(), at::kFloat);
  const Tensor coefficients = s.to(wide);
  Results result{
      scaled ? at::empty_like(e) : Tensor(), bias ? at::empty({e.size(channel)}, e.options()) : Tensor()};
  params.e = e.const_data_ptr();
  params.s = coefficients.const_data_ptr();
  params.stride_s = coefficients.stride(0);
  params.scaled = scaled ? std::get<0>(result).mutable_data_ptr() : nullptr;
  params.bias = bias ? std::get<1>(result).mutable_data_ptr() : nullptr;
  int multiprocessors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, e.get_device()));
  if (!plan_scale_bias(params, e.element_size(), multiprocessors)) return {};
  Tensor partial;
  if (bias && params.parts > 1) {
    partial = at::empty({int64_t{params.parts}, int64_t{params.channels}}, e.options().dtype(wide));
    params.partial = partial.mutable_data_ptr();
  }
  C10_CUDA_CHECK(launch_scale_bias(params, *type, c10::cuda::getCurrentCUDAStream()));
  return result;
}
#endif

}  // namespace

bool scale_kernel_serves(const Tensor& e, const Tensor& s) {
#ifdef FNGD_WITH_CUDA
  return e.is_cuda() && !at::GradMode::is_enabled() && !at::isTensorSubclassLike(e) && !at::isTensorSubclassLike(s);
#else
  return false;
#endif
}

Tensor scaled(const Tensor& e, const Tensor& s) {
  if (e.dim() > 1 && scale_kernel_serves(e, s)) return std::get<0>(scale_bias(e, s, 1, true, false));
  return product(e, s).to(e.scalar_type());
}

Results scale_bias(const Tensor& e, const Tensor& s, int64_t channel, bool scaled, bool bias) {
  TORCH_CHECK_VALUE(
      0 < channel && channel < e.dim(), "channel: expected a dimension of e after the first, got ", channel);
  TORCH_CHECK_VALUE(s.dim() == 1 && s.size(0) == e.size(0), "s: expected shape (", e.size(0), "), got ", s.sizes());
  TORCH_CHECK_VALUE(s.device() == e.device(), "s: expected the device of e, ", e.device(), ", got ", s.device());
#ifdef FNGD_WITH_CUDA
  if (const auto results = kernel_scale_bias(e, s, channel, scaled, bias)) return *results;
#endif
  return plain_scale_bias(e, s, channel, scaled, bias);
}

void bind_scale_bias(py::module_& m) { m.def("scale_bias", torch::wrap_pybind_function_no_gil(scale_bias)); }

}  // namespace fngd
