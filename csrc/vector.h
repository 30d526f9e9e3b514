// Vectors of some bytes, of which the compiler makes instructions of the function that they are used in.
#pragma once

namespace fngd {

template <typename T, int BYTES>
struct Vector;

#if defined(__GNUC__)
template <typename T, int BYTES>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES)));
};
#endif

}  // namespace fngd
