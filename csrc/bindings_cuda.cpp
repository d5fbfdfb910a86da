// The Python module spikedecoder._C_cuda. Arrays arrive as device addresses (data_ptr()) and sizes, and the
// stream as its number; the CUDA runtime is linked statically, so nothing here depends on a version of torch.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda_kernels.h"

namespace py = pybind11;
using namespace spikedecoder::cuda;

namespace {

Type make_type(int type, bool bytes_too) {
  if (type < 0 || type > (bytes_too ? 3 : 2)) throw std::invalid_argument("type: takes 0 to 2, or 3 (byte) to pack");
  return static_cast<Type>(type);
}

void check_sizes(std::initializer_list<int64_t> sizes) {
  int64_t n = 1;
  for (int64_t size : sizes) {
    if (size < 0) throw std::invalid_argument("sizes: takes numbers >= 0");
    if (size && n > (int64_t{1} << 46) / size) throw std::invalid_argument("sizes: too many elements");
    n *= size;
  }
}

template <class T>
T* array(uintptr_t address, int64_t n, const char* name) {
  if (n > 0 && !address) throw std::invalid_argument(std::string(name) + ": got a null address");
  return reinterpret_cast<T*>(address);
}

Queue queue(int device, uintptr_t stream) { return {device, reinterpret_cast<void*>(stream)}; }

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "The CUDA operators of spikedecoder; called through spikedecoder.ext.cuda.";
  m.def("pack", [](uintptr_t values, int type, uintptr_t words, int64_t rows, int64_t C, int device, uintptr_t stream) {
    check_sizes({rows, C});
    pack(array<const void>(values, rows * C, "values"), make_type(type, true),
         array<uint64_t>(words, rows * C, "words"), rows, C, queue(device, stream));
  });
  m.def("unpack",
        [](uintptr_t words, uintptr_t values, int type, int64_t rows, int64_t C, int device, uintptr_t stream) {
          check_sizes({rows, C});
          unpack(array<const uint64_t>(words, rows * C, "words"), array<void>(values, rows * C, "values"),
                 make_type(type, false), rows, C, queue(device, stream));
        });
  m.def("transpose_bits",
        [](uintptr_t words, uintptr_t transposed, int64_t rows, int64_t C, int device, uintptr_t stream) {
          check_sizes({rows, C});
          transpose_bits(array<const uint64_t>(words, rows * C, "words"),
                         array<uint64_t>(transposed, rows * C, "transposed"), rows, C, queue(device, stream));
        });
  m.def("gather", [](uintptr_t words, uintptr_t source, uintptr_t bias, uintptr_t out, int type, int64_t rows,
                     int64_t bits, int64_t columns, int device, uintptr_t stream) {
    check_sizes({rows, bits});
    check_sizes({bits, columns});
    check_sizes({rows, columns});
    gather(array<const uint64_t>(words, rows * bits, "words"), array<const void>(source, bits * columns, "source"),
           array<const void>(bias, 0, "bias"), array<void>(out, rows * columns, "out"), make_type(type, false),
           rows, bits, columns, queue(device, stream));
  });
  m.attr("architectures") = SPIKEDECODER_CUDA_ARCHS;
  m.attr("sources") = SPIKEDECODER_SOURCES;
  m.attr("compiler") = SPIKEDECODER_CUDA_COMPILER;
}
