// csrc/scale_bias.h, every thread of the grid in turn, against loops in double: layouts, dtypes, odd sizes, starts that are
// not aligned, one part and many. Prints one line per failure; the exit status is the number of failures, at most 1.
#include "../../csrc/scale_bias.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

namespace fngd {

template <>
struct Number<BFloat16> {
  using Sum = float;
  static float widen(BFloat16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
  }
  static BFloat16 round(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
  }
};

}  // namespace fngd

namespace {

using fngd::kScaleBiasThreads, fngd::Number, fngd::ScaleBiasParams, fngd::ScaleBiasThread;

int failures = 0, vector_plans = 0, scalar_plans = 0, one_part = 0, many_parts = 0;

template <typename In, typename Out, int VECTOR, bool CHANNELS_INSIDE>
void run_grid(const ScaleBiasParams& p) {
  using Thread = ScaleBiasThread<In, Out, VECTOR, CHANNELS_INSIDE>;
  using Sum = typename Thread::Sum;
  for (uint32_t tile = 0; tile < p.tiles; ++tile) {
    for (uint32_t part = 0; part < p.parts; ++part) {
      std::vector<Sum> block(Thread::kSums * kScaleBiasThreads);
      for (uint32_t thread = 0; thread < kScaleBiasThreads; ++thread) {
        Sum sums[Thread::kSums] = {};
        const Thread worker{p, tile, part, thread};
        worker.scale(sums);
        worker.put(block.data(), sums);
      }
      if (!p.bias) continue;
      for (uint32_t half = kScaleBiasThreads / 2; half >= p.columns; half /= 2) {
        for (uint32_t thread = 0; thread < kScaleBiasThreads; ++thread) Thread{p, tile, part, thread}.fold(block.data(), half);
      }
      for (uint32_t thread = 0; thread < kScaleBiasThreads; ++thread) Thread{p, tile, part, thread}.write(block.data());
    }
  }
}

template <typename T>
void run(const ScaleBiasParams& p) {
  constexpr int kVector = 16 / sizeof(T);
  if (p.channels_inside) {
    p.vector == 1 ? run_grid<T, T, 1, true>(p) : run_grid<T, T, kVector, true>(p);
  } else {
    p.vector == 1 ? run_grid<T, T, 1, false>(p) : run_grid<T, T, kVector, false>(p);
  }
  if (p.bias && p.parts > 1) run_grid<typename Number<T>::Sum, T, 1, true>(fngd::sum_of_parts(p));
}

struct Shape {
  uint32_t samples, channels, positions;
};

enum class Layout { kChannelsInside, kPositionsInside, kSamplesBetween };  // the last one: (positions, samples, channels)

template <typename T>
void check(Shape shape, Layout layout, int64_t start, bool scaled, bool bias, uint32_t multiprocessors) {
  using Sum = typename Number<T>::Sum;
  const auto [n, o, t] = shape;
  ScaleBiasParams p{};
  p.samples = n, p.channels = o, p.positions = t, p.stride_s = 2;
  p.stride_sample = layout == Layout::kSamplesBetween ? o : int64_t{o} * t;
  p.stride_channel = layout == Layout::kPositionsInside ? t : 1;
  p.stride_position = layout == Layout::kPositionsInside ? 1 : layout == Layout::kSamplesBetween ? int64_t{n} * o : o;

  std::mt19937 engine(7);
  std::normal_distribution<float> normal;
  const int64_t count = int64_t{n} * o * t;
  // Vectors of T are aligned as the allocator aligns, to 16 bytes.
  std::vector<T> e(start + count), out(start + count + 1, Number<T>::round(Sum(-77)));
  for (T& x : e) x = Number<T>::round(Sum(normal(engine)));
  std::vector<Sum> s(2 * n), partial;
  for (Sum& x : s) x = Sum(normal(engine));
  std::vector<T> sums(o, Number<T>::round(Sum(-77)));
  p.e = e.data() + start;
  p.s = s.data();
  p.scaled = scaled ? out.data() + start : nullptr;
  p.bias = bias ? sums.data() : nullptr;
  const bool planned = fngd::plan_scale_bias(p, sizeof(T), multiprocessors);
  partial.resize(size_t{p.parts} * o, std::numeric_limits<Sum>::quiet_NaN());
  p.partial = partial.data();
  ++(p.vector == 1 ? scalar_plans : vector_plans);
  ++(p.parts == 1 ? one_part : many_parts);
  if (planned) run<T>(p);

  bool right = planned && Number<T>::widen(out.back()) == -77;
  const double rounding = std::is_same_v<T, BFloat16> ? 0x1p-8 : std::is_same_v<T, float> ? 0x1p-22 : 0x1p-50;
  for (uint32_t c = 0; c < o; ++c) {
    double sum = 0, magnitude = 0;
    for (uint32_t i = 0; i < n; ++i) {
      for (uint32_t j = 0; j < t; ++j) {
        const int64_t at = i * p.stride_sample + c * p.stride_channel + j * p.stride_position;
        const double exact = double(s[2 * i]) * double(Number<T>::widen(e[start + at]));
        sum += exact;
        magnitude += std::abs(exact);
        if (scaled) right &= std::abs(double(Number<T>::widen(out[start + at])) - exact) <= rounding * std::abs(exact);
      }
    }
    if (bias) {
      const double error = std::abs(double(Number<T>::widen(sums[c])) - sum);
      right &= error <= rounding * std::abs(sum) + (sizeof(T) == 8 ? 1e-14 : 1e-6) * magnitude;
    }
  }
  if (right) return;
  std::printf("%zu bytes, %u x %u x %u, layout %d, start %d, scaled %d, bias %d, %u multiprocessors\n", sizeof(T), n, o,
              t, int(layout), int(start), scaled, bias, multiprocessors);
  ++failures;
}

template <typename T>
void check_all() {
  const Shape shapes[] = {{1, 1, 1},  {1, 63, 1},   {129, 10, 1}, {3, 129, 5},  {5, 64, 49},
                          {7, 24, 8}, {300, 40, 1}, {2, 16, 4100}, {40, 8, 64}, {3, 1, 33}};
  for (const Shape& shape : shapes) {
    for (Layout layout : {Layout::kChannelsInside, Layout::kPositionsInside, Layout::kSamplesBetween}) {
      for (int64_t start : {0, 1}) {
        check<T>(shape, layout, start, true, true, 132);
        check<T>(shape, layout, start, false, true, 2);
        check<T>(shape, layout, start, true, false, 2);
      }
    }
  }
}

}  // namespace

int main() {
  check_all<double>();
  check_all<float>();
  check_all<BFloat16>();
  if (!vector_plans || !scalar_plans || !one_part || !many_parts) {
    std::printf("a kind of plan was never tried\n");
    ++failures;
  }
  return failures != 0;
}
