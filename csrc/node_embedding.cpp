// The node of y_nt = W[ids_nt].
#include "bindings.h"
#include "node.h"
#include "scale_bias_op.h"

namespace fngd {
namespace {

struct Embedding : Function<Embedding> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& ids, const Tensor& weight, const OptionalTensor& coefficients,
      int64_t padding_idx, const UseHandlerPtr& on_use) {
    remember(ctx, ids, weight, coefficients, on_use);
    ctx->saved_data["padding_idx"] = padding_idx;
    return at::embedding(weight, ids, padding_idx);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &ids = saved[0], &weight = saved[1];
    const UseHandlerPtr on_use = saved_use_handler(ctx);
    Tensor dw;
    if (ctx->needs_input_grad(kWeight)) {
      if (on_use) {
        dw = (*on_use)(ids, outputs[0], false).first;
      } else {
        const OptionalTensor coefficients = saved_coefficients(saved);
        const Tensor e = coefficients ? scaled(outputs[0], *coefficients) : outputs[0];
        dw = gradient(e, ids, weight.size(0), ctx->saved_data["padding_idx"].toInt());
      }
    }
    return {Tensor(), dw, Tensor(), Tensor(), Tensor()};
  }

 private:
  static Tensor gradient(const Tensor& e, const Tensor& ids, int64_t rows, int64_t padding_idx) {
    // On a CPU torch by itself rounds the sum to 16 bits after every position.
    const bool widened = e.is_cpu() && at::isReducedFloatingType(e.scalar_type());
    const Tensor wide = widened ? e.to(at::kFloat) : e;
    return at::embedding_dense_backward(wide, ids, rows, padding_idx, false).to(e.scalar_type());
  }
};

Tensor embedding(const Tensor& ids, const Tensor& weight, const OptionalTensor& coefficients, int64_t padding_idx) {
  return Embedding::apply(ids, weight, coefficients, padding_idx, UseHandlerPtr());
}

// Where no gradient is recorded.
Tensor forward_alone(const Tensor& ids, const Tensor& weight, const OptionalTensor&, int64_t padding_idx) {
  return at::embedding(weight, ids, padding_idx);
}

Tensor from_python(
    const Tensor& ids, const Tensor& weight, const OptionalTensor& coefficients, std::optional<py::object> on_use,
    int64_t padding_idx) {
  return Embedding::apply(ids, weight, coefficients, padding_idx, make_use_handler(std::move(on_use)));
}

}  // namespace

void bind_embedding(py::module_& m) {
  m.def(
      "embedding", from_python, py::arg("ids"), py::arg("weight"), py::arg("coefficients"), py::arg("on_use"),
      py::arg("padding_idx"), py::call_guard<py::gil_scoped_release>());
}

TORCH_LIBRARY_IMPL(fngd, CompositeExplicitAutograd, m) { m.impl("embedding", forward_alone); }
TORCH_LIBRARY_IMPL(fngd, Autograd, m) { m.impl("embedding", embedding); }

}  // namespace fngd
