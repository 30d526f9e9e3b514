// Search for NaN and infinity: the numbers whose exponent bits are all ones. Host and device share this file.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FNGD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FNGD_HOST_DEVICE inline
#endif

namespace fngd {

// The exponent bits of all numbers in a word of 8 bytes. Adding the lowest of them to a number's exponent carries into
// its sign bit if all are ones, and never further: one test for all numbers of a word, whatever their width.
struct Exponents {
  uint64_t bits;

  FNGD_HOST_DEVICE uint64_t carries(uint64_t word) const { return (word & bits) + (bits & ~(bits << 1)); }
  FNGD_HOST_DEVICE bool reached_sign(uint64_t carries) const { return (carries & (bits << 1) & ~bits) != 0; }
};

constexpr Exponents kDoubleExponents{0x7FF0000000000000}, kFloatExponents{0x7F8000007F800000},
    kBFloat16Exponents{0x7F807F807F807F80}, kHalfExponents{0x7C007C007C007C00};

constexpr int kVectorBytes = 16;

// Carries of the 16 bytes at an aligned address, of which only those in [begin, end) are read.
FNGD_HOST_DEVICE uint64_t vector_carries(const char* vector, const char* begin, const char* end, Exponents exponents) {
  uint64_t words[2] = {0, 0};
  if (begin <= vector && vector + kVectorBytes <= end) {
#if defined(__CUDA_ARCH__)
    const uint4 loaded = *reinterpret_cast<const uint4*>(vector);
    memcpy(words, &loaded, kVectorBytes);
#else
    memcpy(words, vector, kVectorBytes);
#endif
  } else {
    for (int i = 0; i < kVectorBytes; ++i) {
      if (begin <= vector + i && vector + i < end) words[i / 8] |= uint64_t{uint8_t(vector[i])} << 8 * (i % 8);
    }
  }
  return exponents.carries(words[0]) | exponents.carries(words[1]);
}

}  // namespace fngd
