// Functions that host and device share, and loops that are to be unrolled.
#pragma once

#if defined(__CUDACC__)
#define FNGD_INLINE __host__ __device__ __forceinline__
#define FNGD_UNROLL _Pragma("unroll")
#elif defined(__clang__)
#define FNGD_INLINE inline __attribute__((always_inline))
#define FNGD_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
// Forced, because only inlined code takes on the instruction set of the function that calls it.
#define FNGD_INLINE inline __attribute__((always_inline))
#define FNGD_UNROLL _Pragma("GCC unroll 16")
#else
#define FNGD_INLINE __forceinline
#define FNGD_UNROLL
#endif
