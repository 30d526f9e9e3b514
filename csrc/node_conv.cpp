// The node of the 1-3 d convolution, transposed or not, and of its adjoint with respect to the input.
#include <vector>

#include "bindings.h"
#include "convolution.h"
#include "node.h"
#include "weighted_factors.h"

namespace fngd {
namespace {

// For a (N, C, *space) and e (N, O, *space).
WeightedFactors weighted_factors(
    const Tensor& a, const Tensor& e, const OptionalTensor& coefficients, bool need_w, bool need_b) {
  const auto sum = [](const Tensor& t) { return flattened(t.transpose(0, 1), 1, -1).sum(1); };
  if (!coefficients) {
    return {a, e, need_b ? sum(e) : Tensor()};
  }
  const Tensor& s = *coefficients;
  if (scale_kernel_serves(e, s)) {
    return kernel_weighted_factors(a, e, s, 1, need_w, need_b);
  }
  if (!need_b && a.numel() < e.numel()) {
    return {scaled(a, s), e, Tensor()};
  }
  const Tensor weighted = scaled(e, s);
  return {a, weighted, need_b ? sum(weighted) : Tensor()};
}

Gradients gradients(
    const ConvolutionArguments& arguments, const Tensor& a, const Tensor& e, const Tensor& weight,
    const OptionalTensor& coefficients, bool need_w, bool need_b) {
  const WeightedFactors factors = weighted_factors(a, e, coefficients, need_w, need_b);
  return {need_w ? arguments.weight_gradient(factors.e, factors.a, weight) : Tensor(), factors.bias};
}

void remember_arguments(AutogradContext* ctx, const ConvolutionArguments& arguments) {
  ctx->saved_data["stride"] = arguments.stride;
  ctx->saved_data["padding"] = arguments.padding;
  ctx->saved_data["dilation"] = arguments.dilation;
  ctx->saved_data["groups"] = arguments.groups;
  ctx->saved_data["transposed"] = arguments.transposed;
  ctx->saved_data["output_padding"] = arguments.output_padding;
}

ConvolutionArguments saved_arguments(AutogradContext* ctx) {
  return {
      ctx->saved_data["stride"].toIntVector(), ctx->saved_data["padding"].toIntVector(),
      ctx->saved_data["dilation"].toIntVector(), ctx->saved_data["transposed"].toBool(),
      ctx->saved_data["output_padding"].toIntVector(), ctx->saved_data["groups"].toInt()};
}

struct Conv : Function<Conv> {
  // `like` has the shape of the convolution's input; only the adjoint is given it.
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
      const OptionalTensor& coefficients, const ConvolutionArguments& arguments, const OptionalTensor& like,
      const UseHandlerPtr& on_use) {
    remember(ctx, x, weight, coefficients, on_use);
    remember_arguments(ctx, arguments);
    ctx->saved_data["adjoint"] = like.has_value();
    ctx->saved_data["has_bias"] = bias.has_value() && bias->defined();
    return like ? arguments.input_gradient(x, *like, weight) : arguments.forward(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const Tensor& gradient = outputs[0];
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const OptionalTensor coefficients = saved_coefficients(saved);
    const UseHandlerPtr on_use = saved_use_handler(ctx);
    const ConvolutionArguments arguments = saved_arguments(ctx);
    const bool adjoint = ctx->saved_data["adjoint"].toBool();
    const bool need_w = ctx->needs_input_grad(kWeight), need_b = needs_bias(ctx);

    Tensor dx;
    if (ctx->needs_input_grad(kInput)) {
      const OptionalTensor like = adjoint ? OptionalTensor() : OptionalTensor(x.detach());
      dx = at::GradMode::is_enabled() ? apply(gradient, weight, OptionalTensor(), coefficients, arguments, like, on_use)
           : adjoint                  ? arguments.forward(gradient, weight, OptionalTensor())
                                      : arguments.input_gradient(gradient, x, weight);
    }
    Gradients parameters;
    if (need_w || need_b) {
      const Tensor &a = adjoint ? gradient : x, &e = adjoint ? x : gradient;
      parameters = on_use ? (*on_use)(a, e, has_bias(ctx))
                          : gradients(arguments, a, e, weight, coefficients, need_w, need_b);
    }
    return {dx, parameters.first, parameters.second, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

ConvolutionArguments arguments_of(
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups) {
  return {stride.vec(), padding.vec(), dilation.vec(), transposed, output_padding.vec(), groups};
}

Tensor conv(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& coefficients,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups) {
  const auto arguments = arguments_of(stride, padding, dilation, transposed, output_padding, groups);
  return Conv::apply(x, weight, bias, coefficients, arguments, OptionalTensor(), UseHandlerPtr());
}

// Where no gradient is recorded.
Tensor forward_alone(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor&, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
    int64_t groups) {
  return arguments_of(stride, padding, dilation, transposed, output_padding, groups).forward(x, weight, bias);
}

Tensor with_autocast(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& coefficients,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups) {
  const Autocast cast(x);
  return conv(
      cast(x), cast(weight), cast(bias), coefficients, stride, padding, dilation, transposed, output_padding, groups);
}

Tensor from_python(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& coefficients,
    std::optional<py::object> on_use, std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    bool transposed, std::vector<int64_t> output_padding, int64_t groups) {
  const Autocast cast(x);
  const ConvolutionArguments arguments{
      std::move(stride), std::move(padding), std::move(dilation), transposed, std::move(output_padding), groups};
  return Conv::apply(
      cast(x), cast(weight), cast(bias), coefficients, arguments, OptionalTensor(),
      make_use_handler(std::move(on_use)));
}

}  // namespace

void bind_conv(py::module_& m) {
  m.def(
      "conv", from_python, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("coefficients"),
      py::arg("on_use"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("transposed"),
      py::arg("output_padding"), py::arg("groups"), py::call_guard<py::gil_scoped_release>());
}

TORCH_LIBRARY_IMPL(fngd, CompositeExplicitAutograd, m) { m.impl("conv", forward_alone); }
TORCH_LIBRARY_IMPL(fngd, Autograd, m) { m.impl("conv", conv); }
TORCH_LIBRARY_IMPL(fngd, AutocastCPU, m) { m.impl("conv", with_autocast); }
TORCH_LIBRARY_IMPL(fngd, AutocastCUDA, m) { m.impl("conv", with_autocast); }

}  // namespace fngd
