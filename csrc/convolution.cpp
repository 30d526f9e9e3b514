#include "convolution.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>

#include <algorithm>

namespace fngd {
namespace {

using at::Tensor;

bool onednn_serves_bfloat16() {
  static const bool has = [] {
    const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""});
    return found && found->typed<bool()>().call();
  }();
  return has && at::globalContext().userEnabledMkldnn();
}

// oneDNN misreads some other orders in grouped convolutions.
Tensor in_usual_order(const Tensor& weight) {
  return weight.is_cpu() ? weight.contiguous(weight.suggest_memory_format()) : weight;
}

}  // namespace

Tensor ConvolutionArguments::forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) const {
  // at::convolution leaves this check to its callers.
  TORCH_CHECK(!bias || !bias->defined() || bias->scalar_type() == x.scalar_type(), "bias: expected the dtype of x, ",
              x.scalar_type(), ", got ", bias->scalar_type());
  return at::convolution(
      x, in_usual_order(weight), bias, stride, padding, dilation, transposed, output_padding, groups);
}

Tensor ConvolutionArguments::input_gradient(const Tensor& e, const Tensor& x, const Tensor& weight) const {
  return std::get<0>(backward(e, x, in_usual_order(weight), {true, false, false}));
}

Tensor ConvolutionArguments::weight_gradient(const Tensor& e, const Tensor& x, const Tensor& weight) const {
  const std::array<bool, 3> mask{false, true, false};
  if (x.is_cpu() && skips_pixels(weight)) {
    // The same convolution on only those pixels that it reads. oneDNN copies them, too, but writes past the end of its
    // scratch memory where channels come last and fill no vector register.
    ConvolutionArguments unstrided = *this;
    unstrided.stride.assign(stride.size(), 1);
    unstrided.output_padding.assign(stride.size(), 0);
    return transposed ? unstrided.weight_gradient(pixels_read(e, x), x, weight)
                      : unstrided.weight_gradient(e, pixels_read(x, e), weight);
  }
  if (x.is_cpu() &&
      (x.scalar_type() == at::kHalf || (x.scalar_type() == at::kBFloat16 && !onednn_serves_bfloat16()))) {
    // Torch by itself rounds the sum to 16 bits after every sample.
    const auto wide = [](const Tensor& t) {
      return t.to(t.options().dtype(at::kFloat), /*non_blocking=*/false, /*copy=*/false, at::MemoryFormat::Contiguous);
    };
    return weight_gradient(wide(e), wide(x), wide(weight)).to(x.scalar_type());
  }
  if (x.is_cpu() && x.scalar_type() == at::kBFloat16) {
    // oneDNN leaves parts of the result unwritten in some other memory formats.
    return std::get<1>(backward(e.contiguous(), x.contiguous(), weight.contiguous(), mask));
  }
  return std::get<1>(backward(e, x, in_usual_order(weight), mask));
}

// Whether the kernel has one offset, and steps over pixels that it never reads.
bool ConvolutionArguments::skips_pixels(const Tensor& weight) const {
  const auto is_one = [](int64_t size) { return size == 1; };
  const at::IntArrayRef kernel = weight.sizes().slice(2);
  return !std::all_of(stride.begin(), stride.end(), is_one) && std::all_of(kernel.begin(), kernel.end(), is_one) &&
         std::all_of(padding.begin(), padding.end(), [](int64_t size) { return size == 0; });
}

// The pixels of the larger image that a kernel with one offset reads, one for each pixel of the smaller image.
Tensor ConvolutionArguments::pixels_read(const Tensor& fine, const Tensor& coarse) const {
  Tensor result = fine;
  for (size_t d = 0; d < stride.size(); ++d) {
    const int64_t dim = static_cast<int64_t>(d) + 2;
    result = result.slice_symint(dim, 0, coarse.sym_size(dim) * stride[d], stride[d]);
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor> ConvolutionArguments::backward(
    const Tensor& e, const Tensor& x, const Tensor& weight, std::array<bool, 3> mask) const {
  return at::convolution_backward(
      e, x, weight, std::nullopt, stride, padding, dilation, transposed, output_padding, groups, mask);
}

}  // namespace fngd
