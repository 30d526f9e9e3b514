// Samples of a tensor scaled by their weights, and the weighted sum: which layouts the kernels of scale_cuda.cu take. The
// schema and the definition stand in fngd_kernels/ops/scale_bias.py.
#include "scale.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/extension.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#ifdef FNGD_WITH_CUDA
// Not ATen/cuda: it includes headers of libraries that many toolkits come without.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace {

using at::Tensor;
using Results = std::tuple<Tensor, Tensor>;  // scaled and bias; undefined where not asked for

Results plain(const Tensor& e, const Tensor& s, int64_t channel, bool scaled, bool bias) {
  std::vector<int64_t> shape(e.dim(), 1), others;
  shape[0] = -1;
  for (int64_t i = 0; i < e.dim(); ++i) {
    if (i != channel) others.push_back(i);
  }
  const auto wide = at::promoteTypes(e.scalar_type(), at::kFloat);
  const Tensor product = e.to(wide) * s.to(wide).view(shape);
  return {scaled ? product.to(e.scalar_type()) : Tensor(), bias ? product.sum(others).to(e.scalar_type()) : Tensor()};
}

#ifdef FNGD_WITH_CUDA
std::optional<fngd::ScaleType> scale_type(const Tensor& e) {
  switch (e.scalar_type()) {
    case at::kDouble: return fngd::ScaleType::kDouble;
    case at::kFloat: return fngd::ScaleType::kFloat;
    case at::kBFloat16: return fngd::ScaleType::kBFloat16;
    case at::kHalf: return fngd::ScaleType::kHalf;
    default: return std::nullopt;
  }
}

// Sizes and strides of e as samples, channels and positions; false where the positions do not lie evenly.
bool describe(const Tensor& e, int64_t channel, fngd::ScaleParams& params) {
  int64_t positions = 1, stride = 1;
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
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

// Nothing where the kernels do not know the dtype or the layout.
std::optional<Results> fused(const Tensor& e, const Tensor& s, int64_t channel, bool scaled, bool bias) {
  const auto type = scale_type(e);
  fngd::ScaleParams params{};
  if (!type || e.numel() == 0 || !e.is_non_overlapping_and_dense() || !describe(e, channel, params)) return {};
  if (!bias && e.numel() == int64_t{params.samples} * params.stride_sample && e.numel() <= INT32_MAX) {
    // Samples one after the other: without a sum their inner layout does not matter.
    params.channels = static_cast<uint32_t>(params.stride_sample);
    params.positions = 1;
    params.stride_channel = params.stride_position = 1;
  }
  const c10::cuda::CUDAGuard guard(e.device());
  const auto wide = at::promoteTypes(e.scalar_type(), at::kFloat);
  const Tensor weights = s.to(wide);
  Results result{
      scaled ? at::empty_like(e) : Tensor(), bias ? at::empty({e.size(channel)}, e.options()) : Tensor()};
  params.e = e.const_data_ptr();
  params.s = weights.const_data_ptr();
  params.stride_s = weights.stride(0);
  params.scaled = scaled ? std::get<0>(result).mutable_data_ptr() : nullptr;
  params.bias = bias ? std::get<1>(result).mutable_data_ptr() : nullptr;
  int multiprocessors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, e.get_device()));
  if (!fngd::plan_scale(params, e.element_size(), multiprocessors)) return {};
  Tensor partial;
  if (bias && params.parts > 1) {
    partial = at::empty({int64_t{params.parts}, int64_t{params.channels}}, e.options().dtype(wide));
    params.partial = partial.mutable_data_ptr();
  }
  C10_CUDA_CHECK(fngd::launch_scale_bias(params, *type, c10::cuda::getCurrentCUDAStream()));
  return result;
}
#endif

}  // namespace

namespace fngd {

// Whether a node may call scale_bias: real CUDA tensors, outside of traces, whose derivatives nobody records.
bool scales_fused(const Tensor& e, const Tensor& s) {
#ifdef FNGD_WITH_CUDA
  return e.is_cuda() && !at::GradMode::is_enabled() && !at::isTensorSubclassLike(e) && !at::isTensorSubclassLike(s);
#else
  return false;
#endif
}

// s_n e_n, rounded once to e's dtype, and its sum over all dimensions but the channels', summed before it is rounded.
Results scale_bias(const Tensor& e, const Tensor& s, int64_t channel, bool scaled, bool bias) {
  TORCH_CHECK_VALUE(0 < channel && channel < e.dim(), "channel: expected a dimension of e after the first, got ", channel);
  TORCH_CHECK_VALUE(s.dim() == 1 && s.size(0) == e.size(0), "s: expected shape (", e.size(0), "), got ", s.sizes());
  TORCH_CHECK_VALUE(s.device() == e.device(), "s: expected the device of e, ", e.device(), ", got ", s.device());
#ifdef FNGD_WITH_CUDA
  if (const auto results = fused(e, s, channel, scaled, bias)) return *results;
#endif
  return plain(e, s, channel, scaled, bias);
}

}  // namespace fngd

#ifdef FNGD_WITH_CUDA
TORCH_LIBRARY_IMPL(fngd, CUDA, m) { m.impl("scale_bias", &fngd::scale_bias); }
#endif
