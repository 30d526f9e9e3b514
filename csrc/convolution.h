// torch's convolutions, called so that they avoid torch's faults on a CPU (docs/reliability.md).
// fngd_kernels/backends/torch/convolution.py does the same in Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace fngd {

// What at::convolution is told beside its tensors.
struct ConvolutionArguments {
  std::vector<int64_t> stride, padding, dilation;
  bool transposed;
  std::vector<int64_t> output_padding;
  int64_t groups;

  at::Tensor forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) const;

  // The gradient by x, of which only the shape is read.
  at::Tensor input_gradient(const at::Tensor& e, const at::Tensor& x, const at::Tensor& weight) const;

  // The gradient by the weight, of which only shape and memory format are read.
  at::Tensor weight_gradient(const at::Tensor& e, const at::Tensor& x, const at::Tensor& weight) const;

 private:
  bool skips_pixels(const at::Tensor& weight) const;
  at::Tensor pixels_read(const at::Tensor& fine, const at::Tensor& coarse) const;
  std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
      const at::Tensor& e, const at::Tensor& x, const at::Tensor& weight, std::array<bool, 3> mask) const;
};

}  // namespace fngd
