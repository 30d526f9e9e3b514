// Search for NaN and infinity: the numbers whose exponent bits are all ones.
#pragma once

#include <cstdint>

namespace fngd {

template <typename Bits>
bool any_non_finite(const Bits* numbers, int64_t count, Bits exponent) {
  // Integer comparisons without an early exit inside a block: the compiler vectorises them.
  constexpr int64_t kBlock = 4096;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t stop = count < start + kBlock ? count : start + kBlock;
    Bits found = 0;
    for (int64_t i = start; i < stop; ++i) {
      found |= static_cast<Bits>((numbers[i] & exponent) == exponent);
    }
    if (found != 0) return true;
  }
  return false;
}

}  // namespace fngd
