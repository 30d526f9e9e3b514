// The samples of a tensor times their coefficients, as operations on torch tensors; scale_bias.h has the kernel's core.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace fngd {

// Whether a node may call scale_bias, which is not differentiable and not traced: the tensors are on a CUDA device for
// which kernels were built, nothing is being traced, and nobody records derivatives.
bool scale_kernel_serves(const at::Tensor& e, const at::Tensor& s);

// s_n e_n, rounded once to e's dtype, and its sum over all dimensions but `channel`, summed before it is rounded.
// Each is computed only if asked for, otherwise undefined.
std::tuple<at::Tensor, at::Tensor> scale_bias(
    const at::Tensor& e, const at::Tensor& s, int64_t channel, bool scaled, bool bias);

// s_n e_n, rounded once to e's dtype; differentiable.
at::Tensor scaled(const at::Tensor& e, const at::Tensor& s);

}  // namespace fngd
