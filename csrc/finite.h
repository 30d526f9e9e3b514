// Search for NaN and infinity: the numbers whose exponent bits are all ones. Host and device share this file.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(FNGD_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

#include "inline.h"

namespace fngd {

// The exponent bits of all numbers in a word of 8 bytes. Adding 1 to the exponent of a number carries into its sign bit
// if all exponent bits are ones, and never further. So one addition tests all numbers of a word, whatever their width.
struct Exponents {
  uint64_t bits;

  FNGD_INLINE uint64_t carries(uint64_t word) const { return (word & bits) + (bits & ~(bits << 1)); }
  FNGD_INLINE uint64_t carries(const uint64_t (&words)[2]) const { return carries(words[0]) | carries(words[1]); }
  FNGD_INLINE bool reached_sign(uint64_t carries) const { return (carries & (bits << 1) & ~bits) != 0; }
};

constexpr Exponents kDoubleExponents{0x7FF0000000000000}, kFloatExponents{0x7F8000007F800000},
    kBFloat16Exponents{0x7F807F807F807F80}, kHalfExponents{0x7C007C007C007C00};

// A tensor whose memory has no gaps: the bytes in [begin, end).
struct FiniteInput {
  const char *begin, *end;
  Exponents exponents;
};

// The tensors of one launch, divided into pieces, one for each thread block. Fits into a kernel's 4 KB of parameters.
struct FiniteLaunch {
  static constexpr int kTensors = 128, kThreads = 256, kUnroll = 8, kVector = 16;
  static constexpr int64_t kPiece = int64_t{kThreads} * kUnroll * kVector;

  int tensors = 0;
  uint32_t first_piece[kTensors + 1] = {0};  // Of each tensor; the last one is the number of all pieces.
  FiniteInput inputs[kTensors];

  void add(const FiniteInput& input) {
    const int64_t bytes = input.end - aligned(input.begin);
    inputs[tensors] = input;
    first_piece[tensors + 1] = first_piece[tensors] + static_cast<uint32_t>((bytes + kPiece - 1) / kPiece);
    ++tensors;
  }

  // Whether one thread of the block that has this piece finds NaN or infinity.
  FNGD_INLINE bool found(uint32_t piece, int thread) const {
    int tensor = 0, next = tensors;
    while (next - tensor > 1) {
      const int middle = (tensor + next) / 2;
      (first_piece[middle] <= piece ? tensor : next) = middle;
    }
    const FiniteInput& input = inputs[tensor];
    const char* first = aligned(input.begin) + (piece - first_piece[tensor]) * kPiece + thread * kVector;
    uint64_t words[kUnroll][2] = {}, carries = 0;
    FNGD_UNROLL
    for (int i = 0; i < kUnroll; ++i) {
      const char* vector = first + i * kThreads * kVector;
      if (input.begin <= vector && vector + kVector <= input.end) load(words[i], vector);
    }
    FNGD_UNROLL
    for (int i = 0; i < kUnroll; ++i) carries |= input.exponents.carries(words[i]);
    if (thread == 0 && piece == first_piece[tensor]) {
      carries |= edge(input, aligned(input.begin)) | edge(input, aligned(input.end));
    }
    return input.exponents.reached_sign(carries);
  }

 private:
  // Pieces begin at an aligned address, which may lie before the tensor.
  static FNGD_INLINE const char* aligned(const char* address) {
    return address - reinterpret_cast<uintptr_t>(address) % kVector;
  }

  static FNGD_INLINE void load(uint64_t (&words)[2], const char* vector) {
#if defined(__CUDA_ARCH__)
    const uint4 loaded = *reinterpret_cast<const uint4*>(vector);
    memcpy(words, &loaded, kVector);
#else
    memcpy(words, vector, kVector);
#endif
  }

  // Carries of a vector that lies partly outside of the tensor; the bytes outside are not read.
  static FNGD_INLINE uint64_t edge(const FiniteInput& input, const char* vector) {
    uint64_t words[2] = {0, 0};
    FNGD_UNROLL
    for (int i = 0; i < kVector; ++i) {
      if (input.begin <= vector + i && vector + i < input.end) {
        words[i / 8] |= uint64_t{static_cast<uint8_t>(vector[i])} << 8 * (i % 8);
      }
    }
    return input.exponents.carries(words);
  }
};

#if defined(FNGD_WITH_CUDA)
// Sets *found to 1 if any number of the tensors is NaN or infinite, else leaves it.
cudaError_t find_non_finite(const FiniteLaunch& launch, float* found, cudaStream_t stream);
#endif

}  // namespace fngd
