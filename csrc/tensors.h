// Access to torch's tensors without torch's headers: through DLPack's exchange interface, a table of C functions that
// torch.Tensor provides (https://dmlc.github.io/dlpack/latest/c_api.html, version 1).
#pragma once

#include <vector>

#include "bindings.h"

struct DLDevice {
  int32_t type, id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

constexpr DLDataType kFloat32{2, 32, 1}, kBFloat16{4, 16, 1}, kInt64{0, 64, 1}, kUInt8{1, 8, 1};

inline bool operator==(DLDataType a, DLDataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

// Whether x is a torch.Tensor or Parameter whose values lie in CPU memory as they are read. `seen` then describes it,
// until Python code runs again. False for None, for other subclasses, and for tensors that are empty, sparse or negated
// when they are read.
bool look_at(py::handle x, DLTensor& seen);

// Whether the elements lie one after another, with the last dimension varying fastest.
bool is_contiguous(const DLTensor& x);

bool requires_grad(py::handle tensor);

// A tensor's values of float32 or bfloat16, one after another: [T, rows, C], a single timestep if there are none.
struct Values {
  std::vector<int64_t> shape;
  DLDataType type = kFloat32;
  const void* data = nullptr;
  int64_t T = 1, rows = 0, C = 0;

  // False if x is something else, is empty, or has fewer dimensions than `dims`.
  bool look(py::handle x, bool timesteps, int32_t dims);

  Element element() const { return type == kFloat32 ? Element::float32 : Element::bfloat16; }
  bool like(const Values& other) const { return shape == other.shape && type == other.type; }
  int64_t step() const { return rows * C; }
  const float* floats() const { return static_cast<const float*>(data); }
};

// The address of a tensor's n float32 values, which lie one after another; null if x is something else, or n is 0.
const float* floats_of(py::handle x, int64_t n);

struct NewTensor {
  py::object tensor;
  void* data;

  float* floats() const { return static_cast<float*>(data); }
};

// Uninitialised and contiguous, in our own memory or in torch's (spikedecoder/ext/cpu/_memory.py).
NewTensor new_tensor(const std::vector<int64_t>& shape, DLDataType type, bool own_memory);
