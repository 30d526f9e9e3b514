// What each source file adds to the Python module; called once by extension.cpp.
#pragma once

// Not torch/extension.h: to read it takes the compiler longer than all of a source file.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

namespace fngd {

void bind_add_gram(pybind11::module_& module);
void bind_solve(pybind11::module_& module);
void bind_scale_bias(pybind11::module_& module);
void bind_linear(pybind11::module_& module);
void bind_conv(pybind11::module_& module);
void bind_embedding(pybind11::module_& module);
void bind_rows(pybind11::module_& module);

}  // namespace fngd
