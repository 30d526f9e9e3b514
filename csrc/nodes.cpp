// Autograd nodes whose parameter gradients are weighted sums over samples.
//
// Sample n of the batch (row n of x) carries the weight s_n. With E the gradient at the output,
//   dX = the ordinary input gradient, from the unweighted E
//   dW = sum_n s_n E_n^T A_n, db = sum_n s_n sum_t E_nt
// and the ordinary weight gradient is never formed. A node either holds the weights ("scale") or a "sink": a Python
// callable that receives (A, E) when, and only when, a parameter gradient is asked for.
//
// dX is again a linear map of the same weight, so backward builds it from the same node: the nodes are differentiable
// any number of times and every use of a weight, also inside a derivative, reaches the scale or the sink.

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/extension.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace py = pybind11;

// In scale.cpp.
namespace fngd {
bool scales_fused(const at::Tensor& e, const at::Tensor& s);
std::tuple<at::Tensor, at::Tensor> scale_bias(
    const at::Tensor& e, const at::Tensor& s, int64_t channel, bool scaled, bool bias);
}  // namespace fngd

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using Gradients = std::pair<Tensor, Tensor>;  // of the weight and of the bias; undefined where not asked for

// Input positions of every node's differentiable arguments.
constexpr size_t kInput = 0, kWeight = 1, kBias = 2;

struct Sink : torch::CustomClassHolder {
  explicit Sink(py::object function) : function(std::move(function)) {}

  ~Sink() override {
    if (!Py_IsInitialized()) {
      function.release();
      return;
    }
    py::gil_scoped_acquire gil;
    function = py::object();
  }

  // Calls function(a, e, biased, selective). `biased` tells that the bias takes part in this use, as it does in no
  // derivative of a map. `selective` tells that only some gradients were asked for (autograd.grad, or backward with
  // inputs), so that the caller must return them instead of writing .grad later.
  Gradients operator()(const Tensor& a, const Tensor& e, bool biased) const {
    const bool selective = !torch::autograd::get_current_graph_task_exec_info()->empty();
    py::gil_scoped_acquire gil;
    const py::object result = function(a, e, biased, selective);
    if (result.is_none()) {
      return {};
    }
    const auto gradients = result.cast<std::tuple<OptionalTensor, OptionalTensor>>();
    return {std::get<0>(gradients).value_or(Tensor()), std::get<1>(gradients).value_or(Tensor())};
  }

  py::object function;
};

using SinkPtr = c10::intrusive_ptr<Sink>;

void remember(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const SinkPtr& sink) {
  ctx->save_for_backward({x, weight, scale.value_or(Tensor())});
  if (sink) {
    ctx->saved_data["sink"] = c10::IValue::make_capsule(sink);
  }
}

SinkPtr saved_sink(AutogradContext* ctx) {
  const auto found = ctx->saved_data.find("sink");
  if (found == ctx->saved_data.end()) {
    return {};
  }
  return c10::static_intrusive_pointer_cast<Sink>(found->second.toCapsule());
}

OptionalTensor saved_scale(const variable_list& saved) {
  return saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
}

bool has_bias(AutogradContext* ctx) {
  return ctx->saved_data["has_bias"].toBool();
}

// Whether the gradient of the bias is asked for; edges exist only for tensors that were given.
bool needs_bias(AutogradContext* ctx) {
  return has_bias(ctx) && ctx->needs_input_grad(kBias);
}

// s_n x_n, rounded once to x's dtype.
Tensor scaled(const Tensor& x, const OptionalTensor& scale) {
  if (!scale) {
    return x;
  }
  if (x.dim() > 1 && fngd::scales_fused(x, *scale)) {
    return std::get<0>(fngd::scale_bias(x, *scale, 1, true, false));
  }
  std::vector<int64_t> shape(x.dim(), 1);
  shape[0] = -1;
  return (x * scale->view(shape)).to(x.scalar_type());
}

// The factors of the weighted weight gradient, one of them scaled, and the gradient of the bias; in fused passes.
struct Weighted {
  Weighted(const Tensor& input, const Tensor& gradient, const Tensor& scale, int64_t channel, bool need_w, bool need_b)
      : a(input), e(gradient) {
    // Scaling the input reads it once more than scaling the gradient does, where the gradient is summed for the bias.
    const bool scale_input = need_w && (need_b ? 2 : 1) * a.numel() < e.numel();
    if (scale_input) a = scaled(input, scale);
    if (need_b || !scale_input) {
      const auto [scaled_e, sum] = fngd::scale_bias(gradient, scale, channel, need_w && !scale_input, need_b);
      if (scaled_e.defined()) e = scaled_e;
      bias = sum;
    }
  }

  Tensor a, e, bias;
};

Tensor flat(const Tensor& x) {
  return x.dim() == 2 ? x : x.flatten(0, -2);
}

// ---- linear: y = x W^T (+ b), or its adjoint y = x W ------------------------------------------------------------

// a (N, ..., I), e (N, ..., O)
Gradients linear_gradients(const Tensor& a, const Tensor& e, const OptionalTensor& scale, bool need_w, bool need_b) {
  if (scale && fngd::scales_fused(e, *scale)) {
    const Weighted weighted(a, e, *scale, e.dim() - 1, need_w, need_b);
    return {need_w ? flat(weighted.e).t().matmul(flat(weighted.a)) : Tensor(), weighted.bias};
  }
  Gradients result;
  if (!scale || e.size(-1) <= a.size(-1)) {
    const Tensor weighted = flat(scaled(e, scale));
    if (need_w) {
      result.first = weighted.t().matmul(flat(a));
    }
    if (need_b) {
      result.second = weighted.sum(0);
    }
    return result;
  }
  // The input is the smaller operand: one shorter pass.
  if (need_w) {
    result.first = flat(e).t().matmul(flat(scaled(a, scale)));
  }
  if (need_b && at::isReducedFloatingType(e.scalar_type())) {
    result.second = flat(scaled(e, scale)).sum(0);  // weights are not rounded to the low precision
  } else if (need_b) {
    const Tensor columns = flat(e);
    const int64_t positions = columns.size(0) / std::max(scale->size(0), int64_t{1});
    const Tensor weights = scale->to(e.scalar_type());
    result.second = columns.t().mv(positions == 1 ? weights : weights.repeat_interleave(positions));
  }
  return result;
}

struct Linear : Function<Linear> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
      const OptionalTensor& scale, bool adjoint, const SinkPtr& sink) {
    remember(ctx, x, weight, scale, sink);
    ctx->saved_data["adjoint"] = adjoint;
    ctx->saved_data["has_bias"] = bias.has_value() && bias->defined();
    return adjoint ? at::matmul(x, weight) : at::linear(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const Tensor& gradient = outputs[0];
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const OptionalTensor scale = saved_scale(saved);
    const SinkPtr sink = saved_sink(ctx);
    const bool adjoint = ctx->saved_data["adjoint"].toBool();
    const bool need_w = ctx->needs_input_grad(kWeight), need_b = needs_bias(ctx);

    Tensor dx;
    if (ctx->needs_input_grad(kInput)) {
      dx = at::GradMode::is_enabled() ? apply(gradient, weight, OptionalTensor(), scale, !adjoint, sink)
           : adjoint                  ? at::linear(gradient, weight)
                                      : at::matmul(gradient, weight);
    }
    Gradients parameters;
    if (need_w || need_b) {
      const Tensor &a = adjoint ? gradient : x, &e = adjoint ? x : gradient;
      parameters = sink ? (*sink)(a, e, has_bias(ctx)) : linear_gradients(a, e, scale, need_w, need_b);
    }
    return {dx, parameters.first, parameters.second, Tensor(), Tensor(), Tensor()};
  }
};

// ---- convolution, 1-3 d, transposed or not, or its adjoint with respect to the input ----------------------------

// Its calls stay clear of torch's faults on a CPU (docs/reliability.md), as those of backends/torch/convolution.py do.
struct ConvGeometry {
  std::vector<int64_t> stride, padding, dilation;
  bool transposed;
  std::vector<int64_t> output_padding;
  int64_t groups;

  Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) const {
    // at::convolution leaves this check to its callers.
    TORCH_CHECK(!bias || !bias->defined() || bias->scalar_type() == x.scalar_type(), "bias: expected the dtype of x, ",
                x.scalar_type(), ", got ", bias->scalar_type());
    return at::convolution(
        x, in_usual_order(weight), bias, stride, padding, dilation, transposed, output_padding, groups);
  }

  // The gradient by x, of which the shape alone is read.
  Tensor input_gradient(const Tensor& e, const Tensor& x, const Tensor& weight) const {
    return std::get<0>(backward(e, x, in_usual_order(weight), {true, false, false}));
  }

  // The gradient by the weight, of which shape and memory format alone are read.
  Tensor weight_gradient(const Tensor& e, const Tensor& x, const Tensor& weight) const {
    const std::array<bool, 3> mask{false, true, false};
    if (x.is_cpu() && skips_pixels(weight)) {
      // The same convolution on the pixels that it reads. oneDNN copies these, too, but past the end of its scratch
      // memory where channels come last and fill no vector register.
      ConvGeometry unstrided = *this;
      unstrided.stride.assign(stride.size(), 1);
      unstrided.output_padding.assign(stride.size(), 0);
      return transposed ? unstrided.weight_gradient(pixels_read(e, x), x, weight)
                        : unstrided.weight_gradient(e, pixels_read(x, e), weight);
    }
    if (x.is_cpu() && (x.scalar_type() == at::kHalf ||
                       (x.scalar_type() == at::kBFloat16 && !onednn_serves_bfloat16()))) {
      // Torch by itself rounds the sum to 16 bits after every sample.
      const auto wide = [](const Tensor& t) {
        return t.to(t.options().dtype(at::kFloat), /*non_blocking=*/false, /*copy=*/false, at::MemoryFormat::Contiguous);
      };
      return weight_gradient(wide(e), wide(x), wide(weight)).to(x.scalar_type());
    }
    if (x.is_cpu() && x.scalar_type() == at::kBFloat16) {
      // oneDNN leaves parts of it unwritten in some other memory formats.
      return std::get<1>(backward(e.contiguous(), x.contiguous(), weight.contiguous(), mask));
    }
    return std::get<1>(backward(e, x, in_usual_order(weight), mask));
  }

 private:
  static bool onednn_serves_bfloat16() {
    static const bool has = [] {
      const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""});
      return found && found->typed<bool()>().call();
    }();
    return has && at::globalContext().userEnabledMkldnn();
  }

  // Whether the kernel has one tap and passes over pixels.
  bool skips_pixels(const Tensor& weight) const {
    const auto is_one = [](int64_t size) { return size == 1; };
    const at::IntArrayRef kernel = weight.sizes().slice(2);
    return !std::all_of(stride.begin(), stride.end(), is_one) && std::all_of(kernel.begin(), kernel.end(), is_one) &&
           std::all_of(padding.begin(), padding.end(), [](int64_t size) { return size == 0; });
  }

  // The pixels of the larger image that stand across from those of the smaller one.
  Tensor pixels_read(const Tensor& fine, const Tensor& coarse) const {
    Tensor result = fine;
    for (size_t d = 0; d < stride.size(); ++d) {
      const int64_t dim = static_cast<int64_t>(d) + 2;
      result = result.slice_symint(dim, 0, coarse.sym_size(dim) * stride[d], stride[d]);
    }
    return result;
  }

  // oneDNN misreads some other orders in grouped convolutions.
  static Tensor in_usual_order(const Tensor& weight) {
    return weight.is_cpu() ? weight.contiguous(weight.suggest_memory_format()) : weight;
  }

  std::tuple<Tensor, Tensor, Tensor> backward(
      const Tensor& e, const Tensor& x, const Tensor& weight, std::array<bool, 3> mask) const {
    return at::convolution_backward(
        e, x, weight, std::nullopt, stride, padding, dilation, transposed, output_padding, groups, mask);
  }
};

// a (N, C, *space), e (N, O, *space)
Gradients conv_gradients(
    const ConvGeometry& geometry, const Tensor& a, const Tensor& e, const Tensor& weight, const OptionalTensor& scale,
    bool need_w, bool need_b) {
  if (scale && fngd::scales_fused(e, *scale)) {
    const Weighted weighted(a, e, *scale, 1, need_w, need_b);
    return {need_w ? geometry.weight_gradient(weighted.e, weighted.a, weight) : Tensor(), weighted.bias};
  }
  Gradients result;
  const bool scale_input = scale && !need_b && a.numel() < e.numel();
  const Tensor weighted = scale_input ? e : scaled(e, scale);
  if (need_w) {
    result.first = geometry.weight_gradient(weighted, scale_input ? scaled(a, scale) : a, weight);
  }
  if (need_b) {
    result.second = weighted.transpose(0, 1).flatten(1).sum(1);
  }
  return result;
}

struct Conv : Function<Conv> {
  // `like` has the shape of the convolution's input; only the adjoint reads it.
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
      const OptionalTensor& scale, const ConvGeometry& geometry, const OptionalTensor& like, const SinkPtr& sink) {
    remember(ctx, x, weight, scale, sink);
    ctx->saved_data["stride"] = geometry.stride;
    ctx->saved_data["padding"] = geometry.padding;
    ctx->saved_data["dilation"] = geometry.dilation;
    ctx->saved_data["groups"] = geometry.groups;
    ctx->saved_data["transposed"] = geometry.transposed;
    ctx->saved_data["output_padding"] = geometry.output_padding;
    ctx->saved_data["adjoint"] = like.has_value();
    ctx->saved_data["has_bias"] = bias.has_value() && bias->defined();
    return like ? geometry.input_gradient(x, *like, weight) : geometry.forward(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const Tensor& gradient = outputs[0];
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const OptionalTensor scale = saved_scale(saved);
    const SinkPtr sink = saved_sink(ctx);
    const ConvGeometry geometry{
        ctx->saved_data["stride"].toIntVector(), ctx->saved_data["padding"].toIntVector(),
        ctx->saved_data["dilation"].toIntVector(), ctx->saved_data["transposed"].toBool(),
        ctx->saved_data["output_padding"].toIntVector(), ctx->saved_data["groups"].toInt()};
    const bool adjoint = ctx->saved_data["adjoint"].toBool();
    const bool need_w = ctx->needs_input_grad(kWeight), need_b = needs_bias(ctx);

    Tensor dx;
    if (ctx->needs_input_grad(kInput)) {
      const OptionalTensor like = adjoint ? OptionalTensor() : OptionalTensor(x.detach());
      dx = at::GradMode::is_enabled() ? apply(gradient, weight, OptionalTensor(), scale, geometry, like, sink)
           : adjoint                  ? geometry.forward(gradient, weight, OptionalTensor())
                                      : geometry.input_gradient(gradient, x, weight);
    }
    Gradients parameters;
    if (need_w || need_b) {
      const Tensor &a = adjoint ? gradient : x, &e = adjoint ? x : gradient;
      parameters = sink ? (*sink)(a, e, has_bias(ctx)) : conv_gradients(geometry, a, e, weight, scale, need_w, need_b);
    }
    return {dx, parameters.first, parameters.second, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

// ---- embedding: y_nt = W[ids_nt] --------------------------------------------------------------------------------

struct Embedding : Function<Embedding> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& ids, const Tensor& weight, const OptionalTensor& scale, int64_t padding_idx,
      const SinkPtr& sink) {
    remember(ctx, ids, weight, scale, sink);
    ctx->saved_data["padding_idx"] = padding_idx;
    return at::embedding(weight, ids, padding_idx);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &ids = saved[0], &weight = saved[1];
    const SinkPtr sink = saved_sink(ctx);
    Tensor dw;
    if (ctx->needs_input_grad(kWeight)) {
      dw = sink ? (*sink)(ids, outputs[0], false).first
                : gradient(scaled(outputs[0], saved_scale(saved)), ids, weight.size(0),
                           ctx->saved_data["padding_idx"].toInt());
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

// ---- rows: one copy of a parameter for every sample, so that its gradient arrives per sample --------------------

Tensor copies(const Tensor& parameter, int64_t samples) {
  std::vector<int64_t> shape = parameter.sizes().vec();
  shape.insert(shape.begin(), samples);
  return parameter.unsqueeze(0).expand(shape).contiguous();
}

struct Rows : Function<Rows> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& parameter, int64_t samples, const OptionalTensor& scale, const SinkPtr& sink) {
    remember(ctx, Tensor(), Tensor(), scale, sink);
    return copies(parameter, samples);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const SinkPtr sink = saved_sink(ctx);
    const Tensor& e = outputs[0];
    if (sink) {
      return {(*sink)(Tensor(), e, false).first, Tensor(), Tensor(), Tensor()};
    }
    const OptionalTensor scale = saved_scale(ctx->get_saved_variables());
    const Tensor gradient = scale && fngd::scales_fused(e, *scale)
                                ? std::get<1>(fngd::scale_bias(e.unsqueeze(-1).flatten(1), *scale, 1, false, true))
                                      .view(e.sizes().slice(1))
                                : scaled(e, scale).sum(0);
    return {gradient, Tensor(), Tensor(), Tensor()};
  }
};

// ---- entry points -----------------------------------------------------------------------------------------------

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& scale) {
  return Linear::apply(x, weight, bias, scale, false, SinkPtr());
}

Tensor conv(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups) {
  const ConvGeometry geometry{stride.vec(), padding.vec(), dilation.vec(), transposed, output_padding.vec(), groups};
  return Conv::apply(x, weight, bias, scale, geometry, OptionalTensor(), SinkPtr());
}

Tensor embedding(const Tensor& ids, const Tensor& weight, const OptionalTensor& scale, int64_t padding_idx) {
  return Embedding::apply(ids, weight, scale, padding_idx, SinkPtr());
}

Tensor rows(const Tensor& parameter, int64_t samples, const OptionalTensor& scale) {
  return Rows::apply(parameter, samples, scale, SinkPtr());
}

// Forward alone, where no gradient is recorded.
Tensor linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor&) {
  return at::linear(x, weight, bias);
}

Tensor conv_forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor&, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
    int64_t groups) {
  return ConvGeometry{stride.vec(), padding.vec(), dilation.vec(), transposed, output_padding.vec(), groups}.forward(
      x, weight, bias);
}

Tensor embedding_forward(const Tensor& ids, const Tensor& weight, const OptionalTensor&, int64_t padding_idx) {
  return at::embedding(weight, ids, padding_idx);
}

Tensor rows_forward(const Tensor& parameter, int64_t samples, const OptionalTensor&) {
  return copies(parameter, samples);
}

// Casts as torch's own linear and convolution do; outside the node, so that the casts are differentiated by autograd.
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

Tensor linear_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& scale) {
  const Autocast cast(x);
  return linear(cast(x), cast(weight), cast(bias), scale);
}

Tensor conv_autocast(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups) {
  const Autocast cast(x);
  return conv(
      cast(x), cast(weight), cast(bias), scale, stride, padding, dilation, transposed, output_padding, groups);
}

Tensor captured_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, py::object sink) {
  const Autocast cast(x);
  return Linear::apply(
      cast(x), cast(weight), cast(bias), OptionalTensor(), false, c10::make_intrusive<Sink>(std::move(sink)));
}

Tensor captured_conv(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, py::object sink, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, bool transposed, std::vector<int64_t> output_padding,
    int64_t groups) {
  const Autocast cast(x);
  const ConvGeometry geometry{
      std::move(stride), std::move(padding), std::move(dilation), transposed, std::move(output_padding), groups};
  return Conv::apply(
      cast(x), cast(weight), cast(bias), OptionalTensor(), geometry, OptionalTensor(),
      c10::make_intrusive<Sink>(std::move(sink)));
}

Tensor captured_embedding(const Tensor& ids, const Tensor& weight, py::object sink, int64_t padding_idx) {
  return Embedding::apply(ids, weight, OptionalTensor(), padding_idx, c10::make_intrusive<Sink>(std::move(sink)));
}

Tensor captured_rows(const Tensor& parameter, int64_t samples, py::object sink) {
  return Rows::apply(parameter, samples, OptionalTensor(), c10::make_intrusive<Sink>(std::move(sink)));
}

}  // namespace

TORCH_LIBRARY_IMPL(fngd, CompositeExplicitAutograd, m) {
  m.impl("linear", linear_forward);
  m.impl("conv", conv_forward);
  m.impl("embedding", embedding_forward);
  m.impl("rows", rows_forward);
}

TORCH_LIBRARY_IMPL(fngd, Autograd, m) {
  m.impl("linear", linear);
  m.impl("conv", conv);
  m.impl("embedding", embedding);
  m.impl("rows", rows);
}

TORCH_LIBRARY_IMPL(fngd, AutocastCPU, m) {
  m.impl("linear", linear_autocast);
  m.impl("conv", conv_autocast);
}

TORCH_LIBRARY_IMPL(fngd, AutocastCUDA, m) {
  m.impl("linear", linear_autocast);
  m.impl("conv", conv_autocast);
}

// The schemas of the four ops stand in fngd_kernels/ops/nodes.py.
void bind_nodes(py::module_& m) {
  m.def("captured_linear", captured_linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("sink"));
  m.def(
      "captured_conv", captured_conv, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("sink"),
      py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("transposed"), py::arg("output_padding"),
      py::arg("groups"));
  m.def(
      "captured_embedding", captured_embedding, py::arg("ids"), py::arg("weight"), py::arg("sink"),
      py::arg("padding_idx"));
  m.def("captured_rows", captured_rows, py::arg("parameter"), py::arg("samples"), py::arg("sink"));
}
