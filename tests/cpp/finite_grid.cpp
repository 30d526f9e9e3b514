// The test for NaN and infinity of csrc/finite.h, every thread of the grid in turn.
// Prints one line per failure; the exit status is the number of failures, at most 1.
#include "../../csrc/finite.h"

#include <cstdio>
#include <memory>
#include <vector>

namespace {

int failures = 0;

bool grid_finds(const fngd::FiniteLaunch& launch) {
  bool found = false;
  for (uint32_t piece = 0; piece < launch.first_piece[launch.tensors]; ++piece) {
    for (int thread = 0; thread < fngd::FiniteLaunch::kThreads; ++thread) found |= launch.found(piece, thread);
  }
  return found;
}

void expect(bool expected, const fngd::FiniteLaunch& launch, const char* what, int64_t size, int64_t place) {
  if (grid_finds(launch) == expected) return;
  std::printf("%s: %lld numbers, place %lld: expected %d\n", what, (long long)size, (long long)place, expected);
  ++failures;
}

// Numbers at an offset from an aligned address, between neighbours that are not finite and must not be read.
template <typename Bits>
void check(const char* what, fngd::Exponents exponents, Bits largest, const std::vector<Bits>& poisons) {
  const int64_t piece = fngd::FiniteLaunch::kPiece / sizeof(Bits);
  for (int64_t size : {int64_t{1}, int64_t{5}, int64_t{63}, int64_t{129}, piece - 1, piece, 2 * piece + 3}) {
    for (int64_t offset = 0; offset < int64_t(16 / sizeof(Bits)); ++offset) {
      std::vector<Bits> memory(offset + size + 33 + 16 / sizeof(Bits), poisons[0]);
      Bits* start = memory.data();
      while (reinterpret_cast<uintptr_t>(start) % 16 != 0) ++start;
      Bits* numbers = start + offset;
      for (int64_t i = 0; i < size; ++i) numbers[i] = Bits(largest | (i % 2 ? Bits(1) << (8 * sizeof(Bits) - 1) : 0));

      auto launch = std::make_unique<fngd::FiniteLaunch>();
      const std::vector<float> other(40, 1.0f);
      const char *first = reinterpret_cast<const char*>(other.data());
      const char *begin = reinterpret_cast<const char*>(numbers);
      launch->add({first, first + 4 * other.size(), fngd::kFloatExponents});
      launch->add({begin, begin + size * sizeof(Bits), exponents});
      launch->add({first + 4, first + 8, fngd::kFloatExponents});
      expect(false, *launch, what, size, -1);
      for (int64_t place : {int64_t{0}, size / 2, size - 1}) {
        for (Bits poison : poisons) {
          const Bits sound = numbers[place];
          numbers[place] = poison;
          expect(true, *launch, what, size, place);
          numbers[place] = sound;
        }
      }
    }
  }
}

}  // namespace

int main() {
  // The largest finite number, then infinity, minus infinity, NaN with only the lowest bit, and with all bits.
  check<uint64_t>("float64", fngd::kDoubleExponents, 0x7FEFFFFFFFFFFFFF,
                  {0x7FF0000000000000, 0xFFF0000000000000, 0x7FF0000000000001, 0xFFFFFFFFFFFFFFFF});
  check<uint32_t>("float32", fngd::kFloatExponents, 0x7F7FFFFF, {0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF});
  check<uint16_t>("bfloat16", fngd::kBFloat16Exponents, 0x7F7F, {0x7F80, 0xFF80, 0x7F81, 0xFFFF});
  check<uint16_t>("float16", fngd::kHalfExponents, 0x7BFF, {0x7C00, 0xFC00, 0x7C01, 0xFFFF});
  return failures != 0;
}
