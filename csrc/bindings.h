// What the bindings share: arrays arrive as addresses (data_ptr()) and sizes, so that nothing depends on a version of
// torch. Everything is checked before the GIL is released; kernels check nothing.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "runtime.h"

namespace py = pybind11;
using namespace spikedecoder;

void bind_decode(py::module_& m);
void bind_linear(py::module_& m);
void bind_neurons(py::module_& m);
void bind_tensors(py::module_& m);

constexpr int64_t kMostElements = int64_t{1} << 46;

inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

// The product of sizes, each checked to be >= 0 and the whole to fit in memory.
inline int64_t elements(std::initializer_list<int64_t> sizes) {
  int64_t n = 1;
  for (int64_t size : sizes) {
    require(size >= 0, "sizes: takes numbers >= 0");
    require(size == 0 || n <= kMostElements / size, "sizes: too many elements");
    n *= size;
  }
  return n;
}

// The array at an address, which must be aligned for its type, and may be null only if nothing is read or written.
template <class T>
T* array(uintptr_t address, int64_t n, const char* name) {
  if (n > 0 && !address) throw std::invalid_argument(std::string(name) + ": got a null address");
  if (address % alignof(T)) throw std::invalid_argument(std::string(name) + ": address is not aligned");
  return reinterpret_cast<T*>(address);
}

template <class T>
T* optional_array(uintptr_t address, const char* name) {
  return address ? array<T>(address, 1, name) : nullptr;
}

inline Element make_element(int type, int most) {
  require(type >= 0 && type <= most, "type: takes 0 (float32), 1 (bfloat16), or 2 (byte) or 3 (bits) where they can be");
  return static_cast<Element>(type);
}

// An array of float32, bfloat16, bytes, or rows of bits.
inline const void* typed_array(uintptr_t address, Element type, int64_t rows, int64_t columns, const char* name) {
  const int64_t n = elements({rows, columns});
  switch (type) {
    case Element::float32: return array<const float>(address, n, name);
    case Element::bfloat16: return array<const uint16_t>(address, n, name);
    case Element::byte: return array<const uint8_t>(address, n, name);
    case Element::bits: break;
  }
  return array<const uint64_t>(address, n, name);
}

inline void* typed_output(uintptr_t address, Element type, int64_t rows, int64_t columns, const char* name) {
  return const_cast<void*>(typed_array(address, type, rows, columns, name));
}

inline int checked_threads(int threads) {
  require(threads >= 1 && threads <= 4096, "threads: takes 1 to 4096");
  return threads;
}

inline NormKind make_kind(int kind) {
  require(kind == 0 || kind == 1, "kind: takes 0 (row) or 1 (channel)");
  return static_cast<NormKind>(kind);
}

// Which gradients of norm_lif are computed: NormLifPart, and reduce followed by apply.
enum Part : int { WHOLE = 0, REDUCE = 1, APPLY = 2, KNOWN = 3, BATCH = 4 };

inline void check_part(int kind, int part) {
  require(part >= WHOLE && part <= BATCH, "part: takes 0 (whole), 1 (reduce), 2 (apply), 3 (known) or 4 (batch)");
  require((part == WHOLE) == (make_kind(kind) == NormKind::row),
          "part: whole is for row statistics, the others are for those of channels");
}

// The part that the kernel starts with.
inline NormLifPart first_part(int part) {
  return part == BATCH ? NormLifPart::reduce : static_cast<NormLifPart>(part);
}

template <class Arguments>
void run(void (*kernel)(const Arguments&), const Arguments& arguments) {
  py::gil_scoped_release release;
  kernel(arguments);
}
