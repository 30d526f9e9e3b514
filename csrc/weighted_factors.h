// The two factors of a layer's weighted gradient, and the gradient of its bias.
#pragma once

#include "scale_bias_op.h"

namespace fngd {

// The weight gradient is the ordinary one of `a` and `e`, one of which holds the coefficients already.
struct WeightedFactors {
  at::Tensor a, e;
  at::Tensor bias;  // sum_n s_n sum_t E_nt; undefined where not needed
};

// By the CUDA kernel; expects scale_kernel_serves(e, s).
inline WeightedFactors kernel_weighted_factors(
    const at::Tensor& a, const at::Tensor& e, const at::Tensor& s, int64_t channel, bool need_w, bool need_b) {
  WeightedFactors result{a, e, {}};
  // Scale the smaller factor. For the bias e is read in any case, so that scaling it costs only the writing.
  const bool scale_input = need_w && (need_b ? 2 : 1) * a.numel() < e.numel();
  if (scale_input) result.a = scaled(a, s);
  if (need_b || !scale_input) {
    const auto [scaled_e, sum] = scale_bias(e, s, channel, need_w && !scale_input, need_b);
    if (scaled_e.defined()) result.e = scaled_e;
    result.bias = sum;
  }
  return result;
}

}  // namespace fngd
