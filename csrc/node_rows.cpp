// The node that copies a parameter for every sample, so that its gradient arrives per sample.
#include <vector>

#include "bindings.h"
#include "node.h"
#include "scale_bias_op.h"

namespace fngd {
namespace {

Tensor copies(const Tensor& parameter, int64_t samples) {
  std::vector<int64_t> shape = parameter.sizes().vec();
  shape.insert(shape.begin(), samples);
  return parameter.unsqueeze(0).expand(shape).contiguous();
}

// sum_n s_n e_n
Tensor weighted_sum(const Tensor& e, const OptionalTensor& coefficients) {
  if (!coefficients) {
    return e.sum(0);
  }
  if (scale_kernel_serves(e, *coefficients)) {
    const Tensor rows = e.unsqueeze(-1).flatten(1);
    return std::get<1>(scale_bias(rows, *coefficients, 1, false, true)).view(e.sizes().slice(1));
  }
  return scaled(e, *coefficients).sum(0);
}

struct Rows : Function<Rows> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& parameter, int64_t samples, const OptionalTensor& coefficients,
      const UseHandlerPtr& on_use) {
    remember(ctx, Tensor(), Tensor(), coefficients, on_use);
    return copies(parameter, samples);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const UseHandlerPtr on_use = saved_use_handler(ctx);
    const Tensor gradient = on_use ? (*on_use)(Tensor(), outputs[0], false).first
                                   : weighted_sum(outputs[0], saved_coefficients(ctx->get_saved_variables()));
    return {gradient, Tensor(), Tensor(), Tensor()};
  }
};

Tensor rows(const Tensor& parameter, int64_t samples, const OptionalTensor& coefficients) {
  return Rows::apply(parameter, samples, coefficients, UseHandlerPtr());
}

// Where no gradient is recorded.
Tensor forward_alone(const Tensor& parameter, int64_t samples, const OptionalTensor&) {
  return copies(parameter, samples);
}

Tensor from_python(
    const Tensor& parameter, int64_t samples, const OptionalTensor& coefficients, std::optional<py::object> on_use) {
  return Rows::apply(parameter, samples, coefficients, make_use_handler(std::move(on_use)));
}

}  // namespace

void bind_rows(py::module_& m) {
  m.def(
      "rows", from_python, py::arg("parameter"), py::arg("samples"), py::arg("coefficients"), py::arg("on_use"),
      py::call_guard<py::gil_scoped_release>());
}

TORCH_LIBRARY_IMPL(fngd, CompositeExplicitAutograd, m) { m.impl("rows", forward_alone); }
TORCH_LIBRARY_IMPL(fngd, Autograd, m) { m.impl("rows", rows); }

}  // namespace fngd
