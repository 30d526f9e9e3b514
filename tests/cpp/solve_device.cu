// The solver's core as device code: one thread block per matrix, scratch in shared memory.
#include "../../csrc/solve.h"

namespace {

struct Block {
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
};

template <typename T>
__device__ void solve_block(const T* k, T damping, const T* rhs, T* x, int* info, int n) {
  extern __shared__ double shared[];
  const int64_t matrix = blockIdx.x;
  info[matrix] = fngd::DampedCholesky<T, T, 32, 8>(n, reinterpret_cast<T*>(shared))
                     .solve(Block(), k + matrix * n * n, n, 1, damping, rhs + matrix * n, 1, x + matrix * n);
}

}  // namespace

extern "C" __global__ void solve_float(const float* k, float damping, const float* rhs, float* x, int* info, int n) {
  solve_block(k, damping, rhs, x, info, n);
}

extern "C" __global__ void solve_double(const double* k, double damping, const double* rhs, double* x, int* info,
                                        int n) {
  solve_block(k, damping, rhs, x, info, n);
}
