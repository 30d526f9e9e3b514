// The kernels of scale_bias.h: one launch, and a second one where a bias has several parts.
#include "scale_bias.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fngd {

template <>
struct Number<__nv_bfloat16> {
  using Sum = float;
  static __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 round(float x) { return __float2bfloat16_rn(x); }
};

template <>
struct Number<__half> {
  using Sum = float;
  static __device__ __forceinline__ float widen(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half round(float x) { return __float2half_rn(x); }
};

namespace {

template <typename In, typename Out, int VECTOR, bool CHANNELS_INSIDE>
__global__ void __launch_bounds__(kScaleBiasThreads) scale_bias_kernel(const __grid_constant__ ScaleBiasParams p) {
  using Thread = ScaleBiasThread<In, Out, VECTOR, CHANNELS_INSIDE>;
  using Sum = typename Thread::Sum;
  const Thread thread{p, blockIdx.x, blockIdx.y, threadIdx.x};
  Sum sums[Thread::kSums] = {};
  thread.scale(sums);
  if (p.bias == nullptr) return;
  __shared__ Sum block[Thread::kSums * kScaleBiasThreads];
  thread.put(block, sums);
  for (uint32_t half = kScaleBiasThreads / 2; half >= p.columns; half /= 2) {
    __syncthreads();
    thread.fold(block, half);
  }
  thread.write(block);
}

template <typename In, typename Out, int VECTOR, bool CHANNELS_INSIDE>
cudaError_t launch(const ScaleBiasParams& p, cudaStream_t stream) {
  scale_bias_kernel<In, Out, VECTOR, CHANNELS_INSIDE><<<dim3(p.tiles, p.parts), kScaleBiasThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t scale_bias(const ScaleBiasParams& p, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const cudaError_t error = p.channels_inside ? (p.vector == 1 ? launch<T, T, 1, true>(p, stream)
                                                               : launch<T, T, kVector, true>(p, stream))
                                              : (p.vector == 1 ? launch<T, T, 1, false>(p, stream)
                                                               : launch<T, T, kVector, false>(p, stream));
  if (error != cudaSuccess || p.bias == nullptr || p.parts == 1) return error;
  return launch<typename Number<T>::Sum, T, 1, true>(sum_of_parts(p), stream);
}

}  // namespace

cudaError_t launch_scale_bias(const ScaleBiasParams& p, ScaleBiasType type, cudaStream_t stream) {
  switch (type) {
    case ScaleBiasType::kDouble: return scale_bias<double>(p, stream);
    case ScaleBiasType::kFloat: return scale_bias<float>(p, stream);
    case ScaleBiasType::kBFloat16: return scale_bias<__nv_bfloat16>(p, stream);
    case ScaleBiasType::kHalf: return scale_bias<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fngd
