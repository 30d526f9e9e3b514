// Launchers of the batched solve on CUDA. They use no torch types, so that nvcc compiles them without torch.
#pragma once

#include <cuda_runtime_api.h>

#include "solve_params.h"

namespace fngd {

// Bytes of device memory that run_cuda needs as scratch: none while a matrix fits the device's shared memory.
template <typename T>
cudaError_t cuda_scratch_bytes(const Batch& batch, int device, int64_t* bytes);

// One launch on the stream, without synchronising; `device` is the current one. T and Params as for run_cpu.
template <typename T, typename Params>
cudaError_t run_cuda(const Params& params, void* scratch, int device, cudaStream_t stream);

}  // namespace fngd
