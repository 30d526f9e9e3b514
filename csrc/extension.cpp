// The Python module fngd_kernels._C.
#include "bindings.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
#ifdef FNGD_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  fngd::bind_add_gram(m);
  fngd::bind_solve(m);
  fngd::bind_scale_bias(m);
  fngd::bind_linear(m);
  fngd::bind_conv(m);
  fngd::bind_embedding(m);
  fngd::bind_rows(m);
}
