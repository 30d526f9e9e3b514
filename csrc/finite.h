// Search for NaN and infinity: the numbers whose exponent bits are all ones.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define FNGD_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FNGD_VECTOR_CLONES
#endif

namespace fngd {

// Without an early exit, in integers: the compiler vectorises it.
template <typename Bits>
FNGD_VECTOR_CLONES Bits non_finite(const Bits* numbers, int64_t count, Bits exponent) {
  Bits found = 0;
  for (int64_t i = 0; i < count; ++i) {
    found |= (numbers[i] & exponent) == exponent ? Bits{1} : Bits{0};
  }
  return found;
}

}  // namespace fngd
