// The CUDA operators, as the Python module calls them. Pointers are to contiguous device memory; each call runs on
// `device` and is queued on `stream`. They throw std::runtime_error with CUDA's message.
#pragma once

#include <stdint.h>

namespace spikedecoder {
namespace cuda {

enum class Type : int { float32 = 0, float16 = 1, bfloat16 = 2, byte = 3 };

struct Queue {
  int device;
  void* stream;
};

// values [rows, C] -> words [rows, ceil(C / 64)]: bit i of word w is channel 64 w + i, set where not 0.
void pack(const void* values, Type type, uint64_t* words, int64_t rows, int64_t C, Queue queue);

// words [rows, ceil(C / 64)] -> values [rows, C] of 0 and 1, of any type but byte.
void unpack(const uint64_t* words, void* values, Type type, int64_t rows, int64_t C, Queue queue);

// words [rows, ceil(C / 64)] -> transposed [C, ceil(rows / 64)].
void transpose_bits(const uint64_t* words, uint64_t* transposed, int64_t rows, int64_t C, Queue queue);

// out[r, :] = bias + sum of source[q, :] over the bits q set in row r of words [rows, ceil(bits / 64)];
// source [bits, columns], bias [columns] or null, out [rows, columns], all of `type`; summed in float32.
void gather(const uint64_t* words, const void* source, const void* bias, void* out, Type type, int64_t rows,
            int64_t bits, int64_t columns, Queue queue);

}  // namespace cuda
}  // namespace spikedecoder
