// One test of many tensors for NaN and infinity. The schema is in fngd_kernels/ops/finite.py.
#include "finite.h"

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <atomic>
#include <vector>

#ifdef FNGD_WITH_CUDA
#include <ATen/ops/maximum.h>
#include <ATen/ops/zeros.h>
// Not ATen/cuda: it includes headers of libraries that many toolkits come without.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define FNGD_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FNGD_VECTOR_CLONES
#endif

namespace {

using at::Tensor;

fngd::Exponents exponents_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return fngd::kDoubleExponents;
    case at::kFloat: return fngd::kFloatExponents;
    case at::kBFloat16: return fngd::kBFloat16Exponents;
    case at::kHalf: return fngd::kHalfExponents;
    default:
      TORCH_CHECK_TYPE(
          false, "tensors: expected float64, float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

// The same numbers without gaps between them, in any order.
Tensor dense(const Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
}

// Without an early exit, so that the compiler vectorises the loop.
FNGD_VECTOR_CLONES uint64_t carries(const char* bytes, int64_t count, fngd::Exponents exponents) {
  uint64_t found = 0, word = 0;
  const int64_t words = count / 8;
  for (int64_t i = 0; i < words; ++i) {
    memcpy(&word, bytes + 8 * i, 8);
    found |= exponents.carries(word);
  }
  word = 0;
  memcpy(&word, bytes + 8 * words, count - 8 * words);
  return found | exponents.carries(word);
}

Tensor found_non_finite_cpu(at::TensorList tensors) {
  std::atomic<bool> found{false};
  for (const Tensor& tensor : tensors) {
    const fngd::Exponents exponents = exponents_of(tensor);
    const Tensor numbers = dense(tensor);
    const char* bytes = static_cast<const char*>(numbers.const_data_ptr());
    const int64_t size = numbers.element_size();
    at::parallel_for(0, numbers.numel(), at::internal::GRAIN_SIZE, [&](int64_t begin, int64_t end) {
      if (exponents.reached_sign(carries(bytes + size * begin, size * (end - begin), exponents))) found = true;
    });
  }
  return at::full({1}, found ? 1.0f : 0.0f, at::kFloat);
}

#ifdef FNGD_WITH_CUDA
// Tensors of one device: one launch for as many as fit.
Tensor found_non_finite_device(at::TensorList tensors) {
  const c10::cuda::CUDAGuard guard(tensors[0].device());
  const Tensor found = at::zeros({1}, tensors[0].options().dtype(at::kFloat));
  std::vector<Tensor> copies;  // Must live until their launch.
  fngd::FiniteLaunch launch;
  const auto flush = [&] {
    if (launch.tensors == 0) return;
    C10_CUDA_CHECK(fngd::find_non_finite(launch, found.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
    launch.tensors = 0;
  };
  for (const Tensor& tensor : tensors) {
    const fngd::Exponents exponents = exponents_of(tensor);
    if (tensor.numel() == 0) continue;
    const Tensor& numbers = copies.emplace_back(dense(tensor));
    const char* begin = static_cast<const char*>(numbers.const_data_ptr());
    launch.add({begin, begin + numbers.numel() * numbers.element_size(), exponents});
    if (launch.tensors == fngd::FiniteLaunch::kTensors) flush();
  }
  flush();
  return found;
}

// What torch calls when any of the tensors is on a CUDA device.
Tensor found_non_finite_cuda(at::TensorList tensors) {
  const at::Device device = tensors[0].device();
  std::vector<Tensor> here, elsewhere;
  for (const Tensor& tensor : tensors) (tensor.device() == device ? here : elsewhere).push_back(tensor);
  const Tensor found = device.is_cuda() ? found_non_finite_device(here) : found_non_finite_cpu(here);
  return elsewhere.empty() ? found : at::maximum(found, found_non_finite_cuda(elsewhere).to(device));
}
#endif

}  // namespace

TORCH_LIBRARY_IMPL(fngd, CPU, m) { m.impl("found_non_finite", &found_non_finite_cpu); }

#ifdef FNGD_WITH_CUDA
TORCH_LIBRARY_IMPL(fngd, CUDA, m) { m.impl("found_non_finite", &found_non_finite_cuda); }
#endif
