// Damped solves and coefficients on CUDA: one thread block per matrix, the factor in shared memory while it fits.
#include "solve_cuda.h"

#include <algorithm>
#include <atomic>

namespace fngd {
namespace {

constexpr int PANEL_COLUMNS = 8;
constexpr int WARP = 32;
// More threads would leave each of them too few registers for its copy of the diagonal block.
template <typename T>
constexpr int MAX_THREADS = sizeof(T) == 4 ? 512 : 256;

// Tiles whose columns extend over all 32 banks of shared memory.
template <typename T>
using Solver = DampedCholesky<T, T, 128 / sizeof(T), PANEL_COLUMNS>;

struct ThreadBlock {
  static constexpr int GROUP = 4;
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ double add(double value) const {
    value += __shfl_xor_sync(0xFFFFFFFF, value, 1);
    return value + __shfl_xor_sync(0xFFFFFFFF, value, 2);
  }
};

// SHARED: the factor is in shared memory, otherwise in `scratch`. The second launch bound is 1: one resident block per
// multiprocessor is enough, so it may use all registers.
template <typename T, typename Params, bool SHARED>
__global__ void __launch_bounds__(MAX_THREADS<T>, 1) run_kernel(Params params, T* scratch, int64_t scratch_size) {
  extern __shared__ double2 shared[];
  const int64_t b = blockIdx.x;
  run<Solver<T>>(ThreadBlock(), params, b, SHARED ? reinterpret_cast<T*>(shared) : scratch + b * scratch_size);
}

template <typename T>
int64_t bytes_per_matrix(int n) {
  return Solver<T>::scratch_size(n) * static_cast<int64_t>(sizeof(T));
}

cudaError_t shared_memory_limit(int device, int* bytes) {
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Allows a kernel to use all shared memory of the device, the first time that it runs there.
template <typename T, typename Params>
cudaError_t allow_shared_memory(int device, int bytes) {
  static std::atomic<uint64_t> allowed{0};
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (allowed & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(run_kernel<T, Params, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed |= bit;
  return error;
}

}  // namespace

template <typename T>
cudaError_t cuda_scratch_bytes(const Batch& batch, int device, int64_t* bytes) {
  int limit = 0;
  const cudaError_t error = shared_memory_limit(device, &limit);
  const int64_t needed = bytes_per_matrix<T>(batch.n);
  *bytes = needed > limit ? needed * batch.size : 0;
  return error;
}

template <typename T, typename Params>
cudaError_t run_cuda(const Params& params, void* scratch, int device, cudaStream_t stream) {
  // One thread for each row; more would have nothing to do.
  const int rows = Solver<T>::padded_order(params.n);
  const int threads = std::min((rows + WARP - 1) / WARP * WARP, MAX_THREADS<T>);
  const int64_t size = Solver<T>::scratch_size(params.n);
  const unsigned blocks = static_cast<unsigned>(params.size);
  if (scratch != nullptr) {
    run_kernel<T, Params, false><<<blocks, threads, 0, stream>>>(params, static_cast<T*>(scratch), size);
    return cudaGetLastError();
  }
  int limit = 0;
  cudaError_t error = shared_memory_limit(device, &limit);
  if (error == cudaSuccess) error = allow_shared_memory<T, Params>(device, limit);
  if (error != cudaSuccess) return error;
  run_kernel<T, Params, true><<<blocks, threads, bytes_per_matrix<T>(params.n), stream>>>(params, nullptr, size);
  return cudaGetLastError();
}

template cudaError_t cuda_scratch_bytes<float>(const Batch&, int, int64_t*);
template cudaError_t cuda_scratch_bytes<double>(const Batch&, int, int64_t*);
template cudaError_t run_cuda<float>(const SolveParams&, void*, int, cudaStream_t);
template cudaError_t run_cuda<double>(const SolveParams&, void*, int, cudaStream_t);
template cudaError_t run_cuda<float>(const CoefficientsParams&, void*, int, cudaStream_t);
template cudaError_t run_cuda<double>(const CoefficientsParams&, void*, int, cudaStream_t);

}  // namespace fngd
