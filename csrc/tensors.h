// torch's tensors as C++ sees them without a header of torch's: through DLPack's exchange interface, a table of C
// functions that torch.Tensor offers (https://dmlc.github.io/dlpack/latest/c_api.html, version 1).
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

constexpr DLDataType kFloat32{2, 32, 1}, kBFloat16{4, 16, 1}, kInt64{0, 64, 1};

inline bool operator==(DLDataType a, DLDataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

// Whether x is a tensor whose values lie on the CPU as they are read, which `seen` then describes until Python runs
// again. None, a subclass, an empty tensor, a sparse one, and one that is negated when it is read are not.
bool look_at(py::handle x, DLTensor& seen);

// Whether its elements lie one after another, the last dimension first.
bool is_contiguous(const DLTensor& x);

bool requires_grad(py::handle tensor);

struct NewTensor {
  py::object tensor;
  void* data;
};

// Uninitialised and contiguous; in memory of our own or of torch's (spikedecoder/ext/cpu/_memory.py).
NewTensor new_tensor(const std::vector<int64_t>& shape, DLDataType type, bool own_memory);
