// Macros: a function that host and device share, a loop to unroll, and a loop that a device must not unroll.
#pragma once

#if defined(__CUDACC__)
#define FNGD_INLINE __host__ __device__ __forceinline__
#define FNGD_UNROLL _Pragma("unroll")
#define FNGD_ROLLED _Pragma("unroll 1")
#elif defined(__clang__)
#define FNGD_INLINE inline __attribute__((always_inline))
#define FNGD_UNROLL _Pragma("unroll")
#define FNGD_ROLLED
#elif defined(__GNUC__)
// Forced, because only inlined code is compiled for the instruction set of the calling function.
#define FNGD_INLINE inline __attribute__((always_inline))
#define FNGD_UNROLL _Pragma("GCC unroll 16")
#define FNGD_ROLLED
#else
#define FNGD_INLINE __forceinline
#define FNGD_UNROLL
#define FNGD_ROLLED
#endif
