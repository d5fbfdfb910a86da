// Looks at tensors, and makes them. Why not always in torch's memory: spikedecoder/ext/cpu/_memory.py.
#include "tensors.h"

#include <pybind11/stl.h>

#include <memory>
#include <vector>

namespace {

// The structs of DLPack's version 1 that are not in tensors.h.
struct DLVersion {
  uint32_t major, minor;
};
struct DLManagedTensor {
  DLVersion version;
  void* manager;
  void (*deleter)(DLManagedTensor*);
  uint64_t flags;
  DLTensor tensor;
};
struct DLExchange {
  DLVersion version;
  DLExchange* older;
  int (*allocate)(DLTensor*, DLManagedTensor**, void* context, void (*fail)(void*, const char*, const char*));
  int (*manage)(void* object, DLManagedTensor**);
  int (*to_object)(DLManagedTensor*, void** object);
  int (*look_at)(void* object, DLTensor*);
  int (*stream)(int32_t device_type, int32_t device, void**);
};

constexpr DLVersion kVersion{1, 0};
constexpr DLDevice kCPU{1, 0};

// What `use_torch` found. Never freed: tensors outlive modules.
struct {
  const DLExchange* exchange;
  PyTypeObject *tensor, *parameter;
  PyObject *is_neg, *requires_grad;
} torch;

bool use_torch(const py::object& interface, const py::type& tensor, const py::type& parameter) {
  const auto* found = static_cast<const DLExchange*>(PyCapsule_GetPointer(interface.ptr(), "dlpack_exchange_api"));
  if (!found) throw py::error_already_set();
  while (found && found->version.major != kVersion.major) found = found->older;
  if (!found || !found->look_at) return false;
  torch = {found, reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr()),
           reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr()), PyUnicode_InternFromString("is_neg"),
           PyUnicode_InternFromString("requires_grad")};
  return true;
}

// A tensor's memory that is our own, and its description for torch.
struct Owned {
  Owned(const DLTensor& t, size_t bytes) : shape(t.shape, t.shape + t.ndim), memory(bytes) {
    managed.version = kVersion;
    managed.manager = this;
    managed.deleter = [](DLManagedTensor* self) { delete static_cast<Owned*>(self->manager); };
    managed.tensor = t;
    managed.tensor.data = memory.get();
    managed.tensor.shape = shape.data();
  }

  DLManagedTensor managed{};
  std::vector<int64_t> shape;
  Scratch memory;
};

void throw_error(void*, const char* kind, const char* message) {
  PyErr_SetString(PyExc_MemoryError, (std::string(kind) + ": " + message).c_str());
}

bool is_true(PyObject* found) {
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found).ptr() == Py_True;
}

py::object empty(const std::vector<int64_t>& shape, int type) {
  return new_tensor(shape, make_element(type, 1) == Element::float32 ? kFloat32 : kBFloat16, true).tensor;
}

}  // namespace

bool look_at(py::handle x, DLTensor& seen) {
  const PyTypeObject* const type = Py_TYPE(x.ptr());
  if (!torch.exchange || (type != torch.tensor && type != torch.parameter)) return false;
  if (is_true(PyObject_CallMethodNoArgs(x.ptr(), torch.is_neg))) return false;
  if (torch.exchange->look_at(x.ptr(), &seen)) {
    PyErr_Clear();  // it has no memory that can be read from here
    return false;
  }
  if (!seen.data) return false;  // zeros that are not stored, or empty
  seen.data = static_cast<char*>(seen.data) + seen.byte_offset;
  return seen.device.type == kCPU.type;
}

bool is_contiguous(const DLTensor& x) {
  int64_t apart = 1;
  for (int32_t i = x.ndim; i-- > 0;) {
    if (x.shape[i] == 0) return true;
    if (x.shape[i] != 1 && x.strides[i] != apart) return false;
    apart *= x.shape[i];
  }
  return true;
}

bool Values::look(py::handle x, bool timesteps, int32_t dims) {
  require(dims > timesteps, "dims: takes those of the timesteps and the channels");
  DLTensor seen;
  if (!look_at(x, seen) || seen.ndim < dims || !is_contiguous(seen)) return false;
  if (!(seen.dtype == kFloat32) && !(seen.dtype == kBFloat16)) return false;
  shape.assign(seen.shape, seen.shape + seen.ndim);
  type = seen.dtype;
  int64_t n = 1;
  for (int64_t size : shape) n = elements({n, size});
  if (!n) return false;
  if (timesteps) T = shape.front();
  C = shape.back();
  rows = n / (T * C);
  data = typed_array(reinterpret_cast<uintptr_t>(seen.data), element(), T * rows, C, "values");
  return true;
}

const float* floats_of(py::handle x, int64_t n) {
  DLTensor seen;
  if (!n || !look_at(x, seen) || !(seen.dtype == kFloat32) || !is_contiguous(seen)) return nullptr;
  int64_t found = 1;
  for (int32_t i = 0; i < seen.ndim; i++) found = elements({found, seen.shape[i]});
  return found == n ? array<const float>(reinterpret_cast<uintptr_t>(seen.data), n, "tensor") : nullptr;
}

bool requires_grad(py::handle tensor) { return is_true(PyObject_GetAttr(tensor.ptr(), torch.requires_grad)); }

NewTensor new_tensor(const std::vector<int64_t>& shape, DLDataType type, bool own_memory) {
  require(torch.exchange, "tensors: use_torch has not been called");
  int64_t n = 1;
  for (int64_t size : shape) n = elements({n, size});
  DLTensor like{nullptr, kCPU, static_cast<int32_t>(shape.size()), type, const_cast<int64_t*>(shape.data()), nullptr, 0};
  DLManagedTensor* made = nullptr;
  if (own_memory) {
    made = &(new Owned(like, static_cast<size_t>(n) * type.bits / 8))->managed;
    ask_for_huge_pages();
  } else if (torch.exchange->allocate(&like, &made, nullptr, &throw_error)) {
    throw py::error_already_set();
  }
  void* const data = static_cast<char*>(made->tensor.data) + made->tensor.byte_offset;
  void* tensor = nullptr;
  if (torch.exchange->to_object(made, &tensor)) throw py::error_already_set();
  return {py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor)), data};
}

void bind_tensors(py::module_& m) {
  m.def("use_torch", &use_torch);
  m.def("empty", &empty);
}
