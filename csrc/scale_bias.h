// s_n e_n and sum_n s_n sum_p e_np of a tensor e with samples n, channels and positions p, in one pass over e.
//
// A thread block takes a tile of channels, and one part of the items of all samples. Where channels are contiguous in
// memory, an item is a position, of which a thread reads VECTOR channels. Where positions are contiguous, a tile has
// one channel, and an item is VECTOR of its positions. Threads and parts are summed in a fixed order.
// Host and device share this file.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(FNGD_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

#include "inline.h"

namespace fngd {

constexpr uint32_t kScaleBiasThreads = 256;

struct ScaleBiasParams {
  const void* e;
  const void* s;  // (samples,), of the type that is summed in; null for ones
  void* scaled;   // With the strides of e, or null.
  void* bias;     // (channels,), or null
  void* partial;  // (parts, channels), of the type that is summed in; only for a bias of several parts

  uint32_t samples, channels, positions;
  int64_t stride_sample, stride_channel, stride_position, stride_s;  // In elements.

  // The rest is set by plan_scale_bias.
  bool channels_inside;
  uint32_t vector, columns, tiles, parts, part_items;  // columns: how many threads of a block lie along channels
};

// Whether a vector of that many elements always has an aligned address and never extends over two items.
inline bool fits_vector(const ScaleBiasParams& p, int64_t vector, int64_t itemsize) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(p.e) | reinterpret_cast<uintptr_t>(p.scaled);
  const int64_t length = p.channels_inside ? p.channels : p.positions;
  const int64_t outer = p.channels_inside ? (p.positions > 1 ? p.stride_position : 0) : p.stride_channel;
  return addresses % (vector * itemsize) == 0 && length % vector == 0 && outer % vector == 0 &&
         p.stride_sample % vector == 0;
}

// Divides the work among thread blocks. Returns false where neither channels nor positions are contiguous, or where
// there are too many items to count in 32 bits.
inline bool plan_scale_bias(ScaleBiasParams& p, int64_t itemsize, uint32_t multiprocessors) {
  p.channels_inside = p.stride_channel == 1 && (p.channels > 1 || p.stride_position != 1);
  if (!p.channels_inside && p.stride_position != 1) return false;
  p.vector = static_cast<uint32_t>(16 / itemsize);
  if (!fits_vector(p, p.vector, itemsize)) p.vector = 1;
  const int64_t items = int64_t{p.samples} * (p.channels_inside ? p.positions : p.positions / p.vector);
  if (items >= int64_t{1} << 31) return false;

  p.columns = 1;
  if (p.channels_inside) {
    // At least a cache line of channels. A sum wants few columns: then few parts are enough to keep all blocks busy.
    const uint32_t most = !p.bias ? kScaleBiasThreads : p.vector == 1 ? 32 : 8;
    while (p.columns < most && p.columns * p.vector < p.channels) p.columns *= 2;
  }
  const uint32_t width = p.channels_inside ? p.columns * p.vector : 1;
  p.tiles = (p.channels + width - 1) / width;
  // A thread keeps several vectors in flight. One part needs no second launch, which costs more than a short loop.
  const int64_t in_flight = int64_t{kScaleBiasThreads} / p.columns * (p.vector == 1 ? 8 : 4);
  const int64_t wanted = (int64_t{16} * multiprocessors + p.tiles - 1) / p.tiles;
  const int64_t useful = p.bias && items <= 4 * in_flight ? 1 : (items + in_flight - 1) / in_flight;
  const int64_t parts = wanted < useful ? wanted : useful;
  p.part_items = static_cast<uint32_t>((items + parts - 1) / parts);
  p.parts = static_cast<uint32_t>((items + p.part_items - 1) / p.part_items);
  return true;
}

// How numbers of type T are summed. Specialised for half precision where the device's types are known.
template <typename T>
struct Number {
  using Sum = T;
  static FNGD_INLINE Sum widen(T x) { return x; }
  static FNGD_INLINE T round(Sum x) { return x; }
};

// The work of one thread of a block. What is summed is rounded to Out.
template <typename In, typename Out, int VECTOR, bool CHANNELS_INSIDE>
struct ScaleBiasThread {
  using Sum = typename Number<In>::Sum;
  static constexpr int kSums = CHANNELS_INSIDE ? VECTOR : 1;
  static constexpr int kUnroll = VECTOR == 1 ? 8 : 4;

  const ScaleBiasParams& p;
  uint32_t tile, part, thread;

  FNGD_INLINE uint32_t channel() const {
    return CHANNELS_INSIDE ? (tile * p.columns + thread % p.columns) * VECTOR : tile;
  }

  // Scales this thread's items and adds them up.
  FNGD_INLINE void scale(Sum (&sums)[kSums]) const {
    if (channel() >= p.channels) return;
    const uint32_t rows = kScaleBiasThreads / p.columns;
    const uint32_t per_sample = CHANNELS_INSIDE ? p.positions : p.positions / VECTOR;
    const int64_t stride_item = CHANNELS_INSIDE ? p.stride_position : VECTOR;
    const uint32_t first = part * p.part_items, items = p.samples * per_sample;
    const uint32_t end = items - first < p.part_items ? items : first + p.part_items;
    const int64_t offset = channel() * p.stride_channel;
    const In* e = static_cast<const In*>(p.e);
    const Sum* s = static_cast<const Sum*>(p.s);

    uint32_t item = first + thread / p.columns;
    uint32_t sample = item / per_sample, position = item % per_sample;
    const uint32_t next_sample = rows / per_sample, next_position = rows % per_sample;
    for (; item < end; item += kUnroll * rows) {
      Pack packs[kUnroll];
      Sum coefficients[kUnroll];
      int64_t offsets[kUnroll];
      // Past the end the first item is read again. Without a branch, all loads are issued at once.
      const int64_t start = offset + sample * p.stride_sample + position * stride_item;
      FNGD_UNROLL
      for (uint32_t u = 0; u < kUnroll; ++u) {
        const bool inside = item + u * rows < end;
        offsets[u] = inside ? offset + sample * p.stride_sample + position * stride_item : start;
        packs[u] = *reinterpret_cast<const Pack*>(e + offsets[u]);
        coefficients[u] = s ? s[inside ? sample * p.stride_s : 0] : Sum(1);
        sample += next_sample;
        position += next_position;
        if (position >= per_sample) {
          position -= per_sample;
          ++sample;
        }
      }
      FNGD_UNROLL
      for (uint32_t u = 0; u < kUnroll; ++u) {
        if (item + u * rows < end) {
          FNGD_UNROLL
          for (int l = 0; l < VECTOR; ++l) {
            const Sum product = coefficients[u] * Number<In>::widen(packs[u].lanes[l]);
            sums[CHANNELS_INSIDE ? l : 0] += product;
            packs[u].lanes[l] = Number<In>::round(product);
          }
          if (p.scaled) *reinterpret_cast<Pack*>(static_cast<In*>(p.scaled) + offsets[u]) = packs[u];
        }
      }
    }
  }

  // A block's sums are stored lane by lane, so that no two threads access one bank.
  FNGD_INLINE void put(Sum* block, const Sum (&sums)[kSums]) const {
    FNGD_UNROLL
    for (int l = 0; l < kSums; ++l) block[l * kScaleBiasThreads + thread] = sums[l];
  }

  // Halves the number of threads that hold sums. Called for half = kScaleBiasThreads / 2, ..., columns, each time after
  // a barrier.
  FNGD_INLINE void fold(Sum* block, uint32_t half) const {
    if (thread >= half) return;
    FNGD_UNROLL
    for (int l = 0; l < kSums; ++l) {
      Sum* lane = block + l * kScaleBiasThreads;
      lane[thread] += lane[thread + half];
    }
  }

  // Needs no barrier: a thread reads only what it folded itself.
  FNGD_INLINE void write(const Sum* block) const {
    if (thread >= p.columns || channel() >= p.channels) return;
    FNGD_UNROLL
    for (int l = 0; l < kSums; ++l) {
      const Sum sum = block[l * kScaleBiasThreads + thread];
      if (p.parts == 1) {
        static_cast<Out*>(p.bias)[channel() + l] = Number<Out>::round(sum);
      } else {
        static_cast<Sum*>(p.partial)[int64_t{part} * p.channels + channel() + l] = sum;
      }
    }
  }

 private:
  struct alignas(sizeof(In) * VECTOR) Pack {
    In lanes[VECTOR];
  };
};

// The sum over parts is a bias again: the parts are its samples, with coefficients 1, and one block sums each tile.
inline ScaleBiasParams sum_of_parts(const ScaleBiasParams& p) {
  ScaleBiasParams sum{};
  sum.e = p.partial;
  sum.bias = p.bias;
  sum.samples = p.parts;
  sum.channels = p.channels;
  sum.positions = 1;
  sum.stride_sample = p.channels;
  sum.stride_channel = 1;
  sum.channels_inside = true;
  sum.vector = 1;
  sum.columns = 8;
  sum.tiles = (p.channels + 7) / 8;
  sum.parts = 1;
  sum.part_items = p.parts;
  return sum;
}

#if defined(FNGD_WITH_CUDA)
enum class ScaleBiasType { kDouble, kFloat, kBFloat16, kHalf };

// Expects parameters that plan_scale_bias filled in.
cudaError_t launch_scale_bias(const ScaleBiasParams& p, ScaleBiasType type, cudaStream_t stream);
#endif

}  // namespace fngd
