// What the autograd nodes share: nodes whose parameter gradients are weighted sums over samples.
//
// A node computes what its torch counterpart computes. Sample n of the batch is row n of the input x. With E the
// gradient at the output and s the coefficients of the samples, backward returns
//   dX = the ordinary input gradient, computed from E without coefficients
//   dW = sum_n s_n E_n^T A_n, db = sum_n s_n sum_t E_nt
// and the ordinary weight gradient is never formed. A node is given either the coefficients or a UseHandler: a Python
// callable that receives (A, E) when, and only when, a parameter gradient is needed.
//
// dX is again a linear map with the same weight, so backward builds it from the same node. The nodes are therefore
// differentiable any number of times, and every use of a weight, also inside a derivative, goes through the
// coefficients or the handler.
//
// The schemas of the operators are in fngd_kernels/ops/nodes.py.
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace fngd {

namespace py = pybind11;

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using Gradients = std::pair<Tensor, Tensor>;  // Of the weight and of the bias; undefined where not needed.

// Input positions of every node's differentiable arguments.
constexpr size_t kInput = 0, kWeight = 1, kBias = 2;

// A Python callable that is told of every use of a node's parameters; its contract is in fngd_kernels/ops/nodes.py.
struct C10_HIDDEN UseHandler : torch::CustomClassHolder {
  explicit UseHandler(py::object function) : function(std::move(function)) {}

  ~UseHandler() override {
    if (!Py_IsInitialized()) {
      function.release();
      return;
    }
    py::gil_scoped_acquire gil;
    function = py::object();
  }

  // Calls function(a, e, biased, must_return). `biased`: the bias takes part in this use, as it does in no derivative
  // of a map. `must_return`: only some gradients were asked for (autograd.grad, or backward with inputs), so autograd
  // wants this one returned now; writing .grad later would be too late.
  Gradients operator()(const Tensor& a, const Tensor& e, bool biased) const {
    const bool must_return = !torch::autograd::get_current_graph_task_exec_info()->empty();
    py::gil_scoped_acquire gil;
    const py::object result = function(a, e, biased, must_return);
    if (result.is_none()) {
      return {};
    }
    const auto gradients = result.cast<std::tuple<OptionalTensor, OptionalTensor>>();
    return {std::get<0>(gradients).value_or(Tensor()), std::get<1>(gradients).value_or(Tensor())};
  }

  py::object function;
};

using UseHandlerPtr = c10::intrusive_ptr<UseHandler>;

// Needs no lock of Python's: the reference moves.
inline UseHandlerPtr make_use_handler(std::optional<py::object> function) {
  return function ? c10::make_intrusive<UseHandler>(*std::move(function)) : UseHandlerPtr();
}

// Saves what every backward needs.
inline void remember(
    AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& coefficients,
    const UseHandlerPtr& on_use) {
  ctx->save_for_backward({x, weight, coefficients.value_or(Tensor())});
  if (on_use) {
    ctx->saved_data["on_use"] = c10::IValue::make_capsule(on_use);
  }
}

inline UseHandlerPtr saved_use_handler(AutogradContext* ctx) {
  const auto found = ctx->saved_data.find("on_use");
  if (found == ctx->saved_data.end()) {
    return {};
  }
  return c10::static_intrusive_pointer_cast<UseHandler>(found->second.toCapsule());
}

inline OptionalTensor saved_coefficients(const variable_list& saved) {
  return saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
}

inline bool has_bias(AutogradContext* ctx) { return ctx->saved_data["has_bias"].toBool(); }

// Whether the gradient of the bias is needed; the graph has an edge only for a tensor that was given.
inline bool needs_bias(AutogradContext* ctx) { return has_bias(ctx) && ctx->needs_input_grad(kBias); }

// Where autograd.grad is asked for several gradients at once, its vmap has no rule for at::flatten.
inline Tensor flattened(const Tensor& x, int64_t first, int64_t last) {
  if (!x.key_set().has(c10::DispatchKey::Batched)) {
    return x.flatten(first, last);
  }
  std::vector<int64_t> shape = x.sizes().vec();
  const auto begin = shape.begin() + first, end = shape.end() + last + 1;
  int64_t joined = 1;
  for (auto size = begin; size != end; ++size) joined *= *size;
  *begin = joined;
  shape.erase(begin + 1, end);
  return x.reshape(shape);
}

// Casts as torch's own linear and convolution do under autocast. Done outside of the node, so that autograd
// differentiates the casts.
struct Autocast {
  explicit Autocast(const Tensor& x)
      : device(x.device().type()),
        enabled(at::autocast::is_autocast_enabled(device)),
        exclude(c10::autocast_dispatch_keyset) {}

  template <typename T>
  T operator()(const T& x) const {
    return enabled ? at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), x, device) : x;
  }

  c10::DeviceType device;
  bool enabled;
  c10::impl::ExcludeDispatchKeyGuard exclude;
};

}  // namespace fngd
