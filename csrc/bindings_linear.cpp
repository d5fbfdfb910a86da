// Linear layers on spikes: one call counts bits, chooses among the ways to multiply, and multiplies.
#include <algorithm>

#include "tensors.h"

namespace {

// In the order of METHODS in spikedecoder/ext/cpu/_cost.py.
enum class Method : int { gather = 0, subset_sums = 1, tiles = 2, dense = 3 };

// Throws if bits are set beyond the last channel: kernels use the number of a bit as that of a row of the weight.
void refuse(uint64_t stray) { require(!stray, "words: bits are set beyond the last channel"); }

// Makes n rows from `begin` on ready and returns how many of their bits are set.
int64_t ready(const Spikes& s, int64_t begin, int64_t n, int threads) {
  const Found found = make_ready(s, begin, n, threads, kernels().pack, kernels().count_bits);
  refuse(found.stray);
  return found.count;
}

// The choice by the number of set bits: gathering up to `most` of them, else the `other` method.
struct Choice {
  int64_t count;  // of all spikes; less than 0: not known yet
  int64_t most;
  Method other;

  Choice(int64_t count_, int64_t most_, int other_) : count(count_), most(most_), other(static_cast<Method>(other_)) {
    require(other_ >= 0 && other_ <= 3, "method: takes 0 (gather), 1 (subset sums), 2 (tiles) or 3 (dense)");
  }

  Method of(const Spikes& s, int64_t rows, int threads) {
    if (count < 0) count = ready(s, 0, rows, threads);
    return count <= most ? Method::gather : other;
  }

  // Gathers and counts bits in one go if a sample of rows clearly favours gathering. False if the sample does not, or
  // if the count then turns out too high, so that the product has to be redone.
  bool gathered(SumRows a, const Spikes& s) {
    constexpr int64_t VALUES = 16384, ROWS_AT_LEAST = 16, ROWS = 64;
    constexpr double CLEAR = 0.9;  // the sample must stay below this share of `most`
    if (count >= 0 || !a.rows || !a.bits || !a.columns) return false;
    const int64_t wanted = std::clamp(VALUES / a.bits, ROWS_AT_LEAST, ROWS), sample = std::min(wanted, a.rows);
    int64_t set = 0;
    for (int64_t i = 0; i < sample; i++) set += ready(s, a.rows / sample * i, 1, 1);
    const double rate = static_cast<double>(set) / static_cast<double>(sample * a.bits);
    const double likely = rate * static_cast<double>(a.rows) * static_cast<double>(a.bits);
    if (likely > CLEAR * static_cast<double>(most)) return false;
    int64_t found = 0;
    uint64_t stray = 0;
    const Unready unready{s, &found, &stray, sample, rate};
    a.unready = &unready;
    kernels().gather(a);
    refuse(stray);
    count = found;
    return count <= most;
  }
};

// y = s W^T + bias, with s as words [rows, words_for(bits)]. The words are packed from `values` [rows, bits] of `type`
// unless that is null, and their bits are counted unless `count` is given (>= 0). The weight is float32 [columns,
// bits], or its transpose if by_columns.
void spike_linear(uintptr_t values, int type, uintptr_t words, int64_t count, int64_t most, int other,
                  uintptr_t weight, bool by_columns, uintptr_t bias, uintptr_t out, int out_type, int64_t rows,
                  int64_t bits, int64_t columns, int threads) {
  const Element of_out = make_element(out_type, 1), of_values = make_element(type, 2);
  const Spikes spikes{values ? typed_array(values, of_values, rows, bits, "values") : nullptr, of_values,
                      array<uint64_t>(words, elements({rows, words_for(bits)}), "words"), bits};
  SumRows a{spikes.words, array<const float>(weight, elements({bits, columns}), "weight"),
            optional_array<const float>(bias, "bias"), typed_output(out, of_out, rows, columns, "out"), of_out,
            rows, bits, columns, checked_threads(threads)};
  Choice choice(count, most, other);
  py::gil_scoped_release release;
  Scratch transposed(by_columns ? 0 : sizeof(float) * static_cast<size_t>(bits * columns));
  if (!by_columns) {
    kernels().transpose({a.source, transposed.floats(), columns, bits, threads});
    a.source = transposed.floats();
  }
  if (choice.gathered(a, spikes)) return;
  switch (choice.of(spikes, rows, threads)) {
    case Method::gather: return kernels().gather(a);
    case Method::subset_sums: return kernels().subset_sums(a);
    case Method::tiles: return kernels().tile_sums(a);
    case Method::dense:
      return kernels().matmul({a.words, a.source, a.bias, a.out, nullptr, Element::bits, Element::float32, of_out,
                               rows, bits, columns, threads});
  }
}

void weight_grad(uintptr_t words, int64_t count, int64_t most, int other, uintptr_t grad, int grad_type,
                 uintptr_t out, int64_t M, int64_t K, int64_t N, int threads) {
  const Element type = make_element(grad_type, 1);
  const Spikes spikes{nullptr, Element::float32, array<uint64_t>(words, elements({M, words_for(K)}), "words"), K};
  const WeightGrad a{spikes.words, typed_array(grad, type, M, N, "grad"), type,
                     array<float>(out, elements({N, K}), "grad_weight"), M, K, N, checked_threads(threads)};
  Choice choice(count, most, other);
  py::gil_scoped_release release;
  switch (choice.of(spikes, M, threads)) {
    case Method::gather: return kernels().gather_weight_grad(a);
    case Method::subset_sums: return kernels().subset_sums_weight_grad(a);
    case Method::tiles: return kernels().tile_weight_grad(a);
    case Method::dense:
      return kernels().dense_weight_grad({a.words, a.grad, Element::bits, type, a.grad_weight, M, K, N, a.threads});
  }
}

constexpr int64_t FEW_ROWS = 32, FEW_CHANNELS = 65536;  // the latter, since lists have 16-bit numbers

const float* floats(const DLTensor& x, const char* name) {
  return array<const float>(reinterpret_cast<uintptr_t>(x.data), 1, name);
}

// (y, words of s) for a handful of rows of float32 spikes, or (y, None) if the words are not wanted or s is words
// already. All arguments are torch's tensors, because inspecting them in Python takes longer than the product. Returns
// None if this method does not apply: more rows, another dtype, a weight that is not stored by columns, something that
// requires a gradient while the call `learns`, or a shape that is an error. Bits beyond the last channel are refused
// here as everywhere.
py::object few_rows(py::handle s, py::handle weight, py::handle bias, bool learns, bool want_words, bool own_memory,
                    int threads) {
  const bool has_bias = !bias.is_none();
  DLTensor x, w, b;
  if (!look_at(s, x) || !look_at(weight, w) || (has_bias && !look_at(bias, b))) return py::none();
  if (w.ndim != 2 || !(w.dtype == kFloat32) || x.ndim < 1) return py::none();
  const int64_t columns = w.shape[0], bits = w.shape[1], last = x.shape[x.ndim - 1];
  const bool packed = x.dtype == kInt64;
  if (w.strides[0] != 1 || w.strides[1] != columns || !columns || !bits || bits > FEW_CHANNELS) return py::none();
  if (!(packed || x.dtype == kFloat32) || last != (packed ? words_for(bits) : bits)) return py::none();
  if (has_bias && !(b.dtype == kFloat32 && b.ndim == 1 && b.shape[0] == columns && is_contiguous(b))) return py::none();
  int64_t rows = 1;
  for (int32_t i = 0; i + 1 < x.ndim; i++) rows = std::min(rows * std::min(x.shape[i], FEW_ROWS + 1), FEW_ROWS + 1);
  if (rows < 1 || rows > FEW_ROWS || !is_contiguous(x)) return py::none();
  if (learns && (requires_grad(s) || requires_grad(weight) || (has_bias && requires_grad(bias)))) return py::none();

  auto* given = packed ? array<uint64_t>(reinterpret_cast<uintptr_t>(x.data), rows, "s") : nullptr;
  if (packed) ready({nullptr, Element::float32, given, bits}, 0, rows, 1);
  std::vector<int64_t> shape(x.shape, x.shape + x.ndim);
  NewTensor words{py::none(), given};
  if (want_words && !packed) {
    shape.back() = words_for(bits);
    words = new_tensor(shape, kInt64, own_memory);
  }
  shape.back() = columns;
  const NewTensor y = new_tensor(shape, kFloat32, own_memory);
  run(kernels().gather_few,
      GatherFew{packed ? nullptr : floats(x, "s"), static_cast<uint64_t*>(words.data), floats(w, "weight"),
                has_bias ? floats(b, "bias") : nullptr, static_cast<float*>(y.data), rows, bits, columns,
                checked_threads(threads)});
  return py::make_tuple(y.tensor, words.tensor);
}

// x as float32 [rows, C].
bool look_at_rows(py::handle x, Values& found) {
  return found.look(x, false, 1) && found.type == kFloat32;
}

// y = s W^T + b as forward in spikedecoder/ext/cpu/dense_linear.py returns it, with all arguments torch's tensors for
// the reason above. Returns None for arguments that have to be prepared first, or a shape that is an error.
py::object dense_linear(py::handle s, py::handle weight, py::handle bias, bool own_memory, int threads) {
  Values x, w;
  if (!look_at_rows(s, x) || !look_at_rows(weight, w) || w.shape.size() != 2 || w.C != x.C) return py::none();
  const float* const b = bias.is_none() ? nullptr : floats_of(bias, w.rows);
  if (!bias.is_none() && !b) return py::none();
  x.shape.back() = w.rows;
  const NewTensor y = new_tensor(x.shape, kFloat32, own_memory);
  checked_threads(threads);
  constexpr Element type = Element::float32;
  {
    py::gil_scoped_release release;
    const Scratch by_columns(sizeof(float) * static_cast<size_t>(w.rows * w.C));
    kernels().transpose({w.floats(), by_columns.floats(), w.rows, w.C, threads});
    kernels().matmul({x.data, by_columns.floats(), b, y.data, nullptr, type, type, type, x.rows, x.C, w.rows, threads});
  }
  return y.tensor;
}

// The gradients of (s, weight, bias) as backward there returns them; those of s and of bias are computed if there is a
// weight, that of the weight if there is an s.
py::object dense_linear_gradients(py::handle grad, py::handle s, py::handle weight, bool want_bias, bool own_memory,
                                  int threads) {
  Values g, x, w;
  const bool of_s = !weight.is_none(), of_weight = !s.is_none();
  if (!look_at_rows(grad, g) || (want_bias && !of_s)) return py::none();
  if (of_s && (!look_at_rows(weight, w) || w.shape.size() != 2 || w.rows != g.C)) return py::none();
  if (of_weight && (!look_at_rows(s, x) || x.rows != g.rows || (of_s && x.C != w.C))) return py::none();
  NewTensor grad_s{py::none(), nullptr}, grad_weight{py::none(), nullptr}, grad_bias{py::none(), nullptr};
  std::vector<int64_t> shape = g.shape;
  if (of_s) {
    shape.back() = w.C;
    grad_s = new_tensor(shape, kFloat32, own_memory);
    grad_bias = new_tensor({g.C}, kFloat32, own_memory);
  }
  if (of_weight) grad_weight = new_tensor({g.C, x.C}, kFloat32, own_memory);
  checked_threads(threads);
  constexpr Element type = Element::float32;
  {
    py::gil_scoped_release release;
    if (of_s) {
      kernels().matmul({g.data, w.data, nullptr, grad_s.data, grad_bias.floats(), type, type, type, g.rows, g.C, w.C,
                        threads});
    }
    if (of_weight) {
      kernels().dense_weight_grad({x.data, g.data, type, type, grad_weight.floats(), g.rows, x.C, g.C, threads});
    }
  }
  return py::make_tuple(grad_s.tensor, grad_weight.tensor, want_bias ? grad_bias.tensor : py::none());
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("few_rows", &few_rows);
  m.attr("FEW_ROWS") = FEW_ROWS;
  m.def("dense_linear", &dense_linear);
  m.def("dense_linear_gradients", &dense_linear_gradients);
  m.def("spike_linear", &spike_linear);
  m.def("spike_linear_weight_grad", &weight_grad);
  m.def("count", [](uintptr_t words, int64_t rows, int64_t bits, int threads) {
    const Spikes spikes{nullptr, Element::float32, array<uint64_t>(words, elements({rows, words_for(bits)}), "words"),
                        bits};
    checked_threads(threads);
    py::gil_scoped_release release;
    return ready(spikes, 0, rows, threads);
  });
  m.def("matmul", [](uintptr_t a, int a_type, uintptr_t b, int b_type, uintptr_t bias, uintptr_t c, int c_type,
                     uintptr_t a_sums, int64_t M, int64_t K, int64_t N, int threads) {
    const Element of_a = make_element(a_type, 3), of_b = make_element(b_type, 1), of_c = make_element(c_type, 1);
    require(of_a != Element::byte, "a_type: takes 0 (float32), 1 (bfloat16) or 3 (bits)");
    const Matmul p{typed_array(a, of_a, M, of_a == Element::bits ? words_for(K) : K, "a"),
                   typed_array(b, of_b, K, N, "b"), optional_array<const float>(bias, "bias"),
                   typed_output(c, of_c, M, N, "c"),
                   optional_array<float>(a_sums, "a_sums"), of_a, of_b, of_c, M, K, N,
                   checked_threads(threads)};
    run(kernels().matmul, p);
  });
  m.def("dense_weight_grad", [](uintptr_t s, int s_type, uintptr_t grad, int grad_type, uintptr_t out, int64_t M,
                                int64_t K, int64_t N, int threads) {
    const Element of_s = make_element(s_type, 1), of_grad = make_element(grad_type, 1);
    run(kernels().dense_weight_grad,
        DenseWeightGrad{typed_array(s, of_s, M, K, "s"), typed_array(grad, of_grad, M, N, "grad"), of_s, of_grad,
                        array<float>(out, elements({N, K}), "grad_weight"), M, K, N, checked_threads(threads)});
  });
}
