// The node of y = x W^T (+ b), and of its adjoint y = x W.
#include <algorithm>

#include "bindings.h"
#include "node.h"
#include "weighted_factors.h"

namespace fngd {
namespace {

Tensor flat(const Tensor& x) { return x.dim() == 2 ? x : flattened(x, 0, -2); }

// For a (N, ..., I) and e (N, ..., O).
WeightedFactors weighted_factors(
    const Tensor& a, const Tensor& e, const OptionalTensor& coefficients, bool need_w, bool need_b) {
  if (!coefficients) {
    return {a, e, need_b ? flat(e).sum(0) : Tensor()};
  }
  const Tensor& s = *coefficients;
  if (scale_kernel_serves(e, s)) {
    return kernel_weighted_factors(a, e, s, e.dim() - 1, need_w, need_b);
  }
  if (e.size(-1) <= a.size(-1)) {
    const Tensor weighted = flat(scaled(e, s));
    return {a, weighted, need_b ? weighted.sum(0) : Tensor()};
  }
  // The input is the smaller factor, so scaling it takes less time.
  WeightedFactors result{need_w ? scaled(a, s) : a, e, {}};
  if (need_b && at::isReducedFloatingType(e.scalar_type())) {
    // Not as below, where the coefficients would be rounded to 16 bits.
    result.bias = flat(scaled(e, s)).sum(0);
  } else if (need_b) {
    const Tensor rows = flat(e);
    const int64_t positions = rows.size(0) / std::max(s.size(0), int64_t{1});
    const Tensor of_samples = s.to(e.scalar_type());
    result.bias = rows.t().mv(positions == 1 ? of_samples : of_samples.repeat_interleave(positions));
  }
  return result;
}

// sum_n s_n E_n^T A_n and sum_n s_n sum_t E_nt.
Gradients gradients(const Tensor& a, const Tensor& e, const OptionalTensor& coefficients, bool need_w, bool need_b) {
  const WeightedFactors factors = weighted_factors(a, e, coefficients, need_w, need_b);
  return {need_w ? flat(factors.e).t().matmul(flat(factors.a)) : Tensor(), factors.bias};
}

struct Linear : Function<Linear> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
      const OptionalTensor& coefficients, bool adjoint, const UseHandlerPtr& on_use) {
    remember(ctx, x, weight, coefficients, on_use);
    ctx->saved_data["adjoint"] = adjoint;
    ctx->saved_data["has_bias"] = bias.has_value() && bias->defined();
    return adjoint ? at::matmul(x, weight) : at::linear(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const Tensor& gradient = outputs[0];
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const OptionalTensor coefficients = saved_coefficients(saved);
    const UseHandlerPtr on_use = saved_use_handler(ctx);
    const bool adjoint = ctx->saved_data["adjoint"].toBool();
    const bool need_w = ctx->needs_input_grad(kWeight), need_b = needs_bias(ctx);

    Tensor dx;
    if (ctx->needs_input_grad(kInput)) {
      dx = at::GradMode::is_enabled() ? apply(gradient, weight, OptionalTensor(), coefficients, !adjoint, on_use)
           : adjoint                  ? at::linear(gradient, weight)
                                      : at::matmul(gradient, weight);
    }
    Gradients parameters;
    if (need_w || need_b) {
      const Tensor &a = adjoint ? gradient : x, &e = adjoint ? x : gradient;
      parameters = on_use ? (*on_use)(a, e, has_bias(ctx)) : gradients(a, e, coefficients, need_w, need_b);
    }
    return {dx, parameters.first, parameters.second, Tensor(), Tensor(), Tensor()};
  }
};

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& coefficients) {
  return Linear::apply(x, weight, bias, coefficients, false, UseHandlerPtr());
}

// Where no gradient is recorded.
Tensor forward_alone(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor&) {
  return at::linear(x, weight, bias);
}

Tensor with_autocast(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& coefficients) {
  const Autocast cast(x);
  return linear(cast(x), cast(weight), cast(bias), coefficients);
}

Tensor from_python(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& coefficients,
    std::optional<py::object> on_use) {
  const Autocast cast(x);
  return Linear::apply(
      cast(x), cast(weight), cast(bias), coefficients, false, make_use_handler(std::move(on_use)));
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def(
      "linear", from_python, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("coefficients"),
      py::arg("on_use"), py::call_guard<py::gil_scoped_release>());
}

TORCH_LIBRARY_IMPL(fngd, CompositeExplicitAutograd, m) { m.impl("linear", forward_alone); }
TORCH_LIBRARY_IMPL(fngd, Autograd, m) { m.impl("linear", linear); }
TORCH_LIBRARY_IMPL(fngd, AutocastCPU, m) { m.impl("linear", with_autocast); }
TORCH_LIBRARY_IMPL(fngd, AutocastCUDA, m) { m.impl("linear", with_autocast); }

}  // namespace fngd
