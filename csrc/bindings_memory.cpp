// Memory of large results, handed to torch as DLPack does: a struct of plain C, so that nothing depends on a version of
// torch. Why not torch's own: spikedecoder/ext/cpu/_memory.py.
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "bindings.h"

namespace {

// DLPack's structs, version 0 of its interface (https://dmlc.github.io/dlpack/latest/c_api.html).
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
struct DLManagedTensor {
  DLTensor tensor;
  void* manager;
  void (*deleter)(DLManagedTensor*);
};

struct Result {
  DLManagedTensor managed{};
  std::vector<int64_t> shape;
  Scratch memory;
};

constexpr int32_t kCPU = 1;
constexpr DLDataType kTypes[] = {{2, 32, 1}, {4, 16, 1}};  // as Element numbers them: float32, bfloat16

// A capsule that nobody took frees its memory; one that was taken carries another name.
void release_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

py::object result(const std::vector<int64_t>& shape, int type) {
  require(type == 0 || type == 1, "type: takes 0 (float32) or 1 (bfloat16)");
  int64_t n = 1;
  for (int64_t size : shape) n = elements({n, size});
  std::unique_ptr<Result> made(new Result{{}, shape, Scratch(static_cast<size_t>(n) * kTypes[type].bits / 8)});
  ask_for_huge_pages();
  DLTensor& t = made->managed.tensor;
  t.data = made->memory.get();
  t.device = {kCPU, 0};
  t.ndim = static_cast<int32_t>(shape.size());
  t.dtype = kTypes[type];
  t.shape = made->shape.data();
  made->managed.manager = made.get();
  made->managed.deleter = [](DLManagedTensor* self) { delete static_cast<Result*>(self->manager); };
  PyObject* capsule = PyCapsule_New(&made->managed, "dltensor", &release_capsule);
  if (!capsule) throw py::error_already_set();
  made.release();
  return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace

void bind_memory(py::module_& m) { m.def("result", &result); }
