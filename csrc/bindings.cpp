// The Python module spikedecoder._C: operators and runtime; the other bindings_*.cpp hold the rest.
#include <pybind11/stl.h>

#include <cmath>
#include <vector>
#if defined(SPIKEDECODER_X86)
#include <cpuid.h>
#endif

#include "batch_norm.h"
#include "bindings.h"

namespace {

Neuron make_neuron(double tau, py::object v_reset, bool decay_input, int surrogate, double alpha, bool detach_reset) {
  require(std::isfinite(tau) && tau >= 1, "tau: takes a finite number >= 1");
  require(surrogate >= 0 && surrogate <= 4, "surrogate: takes 0 to 4");
  require(std::isfinite(alpha) && alpha > 0, "alpha: takes a finite number > 0");
  Neuron n;
  n.tau = static_cast<float>(tau);
  n.leak = static_cast<float>(1 - 1 / tau);
  n.hard_reset = !v_reset.is_none();
  n.v_reset = n.hard_reset ? v_reset.cast<float>() : 0;
  n.decay_input = decay_input;
  n.detach_reset = detach_reset;
  n.surrogate = static_cast<Surrogate>(surrogate);
  // beyond, the least exponential of the sigmoid's derivative, 2^-110, would come to a gradient of its own
  n.alpha = static_cast<float>(alpha < 1e-30 ? 1e-30 : alpha > 1e20 ? 1e20 : alpha);
  return n;
}

Neuron make_integer_neuron(double levels, double scale, double low, double high) {
  require(levels >= 1, "levels: takes at least 1");
  Neuron n;
  n.levels = static_cast<float>(levels);
  n.scale = static_cast<float>(scale);
  n.low = static_cast<float>(low);
  n.high = static_cast<float>(high);
  return n;
}

Threshold make_threshold(double value, uintptr_t values, int kind) {
  require(kind >= 0 && kind <= 2, "threshold kind: takes 0 (scalar), 1 (channel) or 2 (element)");
  Threshold t;
  t.kind = static_cast<ThresholdKind>(kind);
  t.value = static_cast<float>(value);
  t.values = kind ? array<const float>(values, 1, "threshold") : nullptr;
  return t;
}

void bind_lif(py::module_& m) {
  m.def("lif_forward",
        [](const Neuron& neuron, const Threshold& threshold, int type, uintptr_t x, uintptr_t v_init, uintptr_t spikes,
           uintptr_t v, int64_t T, int64_t rows, int64_t C, int threads) {
          const Element of_x = make_element(type, 1);
          const int64_t step = elements({rows, C});
          LifForward a{neuron, threshold, of_x, typed_array(x, of_x, T, step, "x"),
                       optional_array<const float>(v_init, "v_init"), typed_output(spikes, of_x, T, step, "spikes"),
                       optional_array<float>(v, "v"), T, rows, C, checked_threads(threads)};
          run(kernels().lif_forward, a);
        });
  m.def("lif_backward",
        [](const Neuron& neuron, const Threshold& threshold, int type, uintptr_t grad_spikes, uintptr_t grad_v,
           uintptr_t x, uintptr_t v_init, uintptr_t grad_x, uintptr_t grad_threshold, uintptr_t grad_v_init, int64_t T,
           int64_t rows, int64_t C, int threads) {
          const Element of_x = make_element(type, 1);
          const int64_t step = elements({rows, C});
          LifBackward a{neuron, threshold, of_x, typed_array(grad_spikes, of_x, T, step, "grad_spikes"),
                        optional_array<const float>(grad_v, "grad_v"), typed_array(x, of_x, T, step, "x"),
                        optional_array<const float>(v_init, "v_init"), typed_output(grad_x, of_x, T, step, "grad_x"),
                        optional_array<float>(grad_threshold, "grad_threshold"),
                        optional_array<float>(grad_v_init, "grad_v_init"), T, rows, C, checked_threads(threads)};
          run(kernels().lif_backward, a);
        });
  m.def("binarize", [](uintptr_t x, uintptr_t grad, uintptr_t out, double alpha, int64_t n, int threads) {
    elements({n});
    Binarize a{array<const float>(x, n, "x"), optional_array<const float>(grad, "grad"),
               array<float>(out, n, "out"), static_cast<float>(alpha), n, checked_threads(threads)};
    run(kernels().binarize, a);
  });
  m.def("ilif_forward", [](uintptr_t x, uintptr_t out, uintptr_t mask, double scale, double levels, double low,
                           double high, int64_t n, int threads) {
    elements({n});
    IlifForward a{array<const float>(x, n, "x"), array<float>(out, n, "out"), optional_array<uint8_t>(mask, "mask"),
                  static_cast<float>(scale), static_cast<float>(levels), static_cast<float>(low),
                  static_cast<float>(high), n, checked_threads(threads)};
    run(kernels().ilif_forward, a);
  });
  m.def("ilif_backward", [](uintptr_t grad, uintptr_t mask, uintptr_t out, double scale, int64_t n, int threads) {
    elements({n});
    IlifBackward a{array<const float>(grad, n, "grad"), array<const uint8_t>(mask, n, "mask"),
                   array<float>(out, n, "out"), static_cast<float>(scale), n, checked_threads(threads)};
    run(kernels().ilif_backward, a);
  });
}

void bind_norm_lif(py::module_& m) {
  m.def("moments", [](int type, uintptr_t x, bool center, uintptr_t mean, uintptr_t var, int64_t rows, int64_t C,
                      int threads) {
    const Element of_x = make_element(type, 1);
    require(rows > 0, "rows: takes at least 1");
    Moments a{of_x, typed_array(x, of_x, rows, C, "x"), center, array<float>(mean, C, "mean"),
              array<float>(var, C, "var"), rows, C, checked_threads(threads)};
    run(kernels().moments, a);
  });
  m.def("batch_statistics", [](int type, uintptr_t x, uintptr_t running_mean, uintptr_t running_var, double momentum,
                               double eps, uintptr_t mean, uintptr_t rstd, int64_t rows, int64_t C, int threads) {
    const Element of_x = make_element(type, 1);
    require(rows > 1, "rows: takes at least 2");
    float* const var = array<float>(rstd, C, "rstd");  // which then replaces it
    BatchStatistics a{{of_x, typed_array(x, of_x, rows, C, "x"), true, array<float>(mean, C, "mean"), var, rows, C,
                       checked_threads(threads)},
                      array<float>(running_mean, C, "running_mean"), array<float>(running_var, C, "running_var"),
                      static_cast<float>(momentum), static_cast<float>(eps)};
    run(batch_statistics, a);
  });
  m.def("norm_lif_forward",
        [](const Neuron& neuron, const Threshold& threshold, int kind, int type, uintptr_t x, uintptr_t weight,
           uintptr_t bias, double eps, uintptr_t mean, uintptr_t rstd, uintptr_t spikes, int64_t T, int64_t rows,
           int64_t C, int64_t spikes_rows, int threads) {
          const Element of_x = make_element(type, 1);
          const int64_t step = elements({rows, C}), statistics = kind ? C : elements({T, rows});
          require(T == 1 || neuron.levels == 0, "T: takes 1 with an integer neuron");
          require(eps >= 0, "eps: takes a number >= 0");
          require(spikes_rows >= rows, "spikes_rows: takes as many as rows, or more");
          NormLifForward a{neuron, threshold, make_kind(kind), of_x, typed_array(x, of_x, T, step, "x"),
                           array<const float>(weight, C, "weight"), array<const float>(bias, C, "bias"),
                           static_cast<float>(eps), array<float>(mean, statistics, "mean"),
                           array<float>(rstd, statistics, "rstd"), typed_output(spikes, of_x, T, step, "spikes"), T,
                           rows, C, spikes_rows, checked_threads(threads)};
          run(kernels().norm_lif_forward, a);
        });
  m.def("norm_lif_backward",
        [](const Neuron& neuron, const Threshold& threshold, int kind, int part, int type, uintptr_t grad_spikes,
           uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t mean, uintptr_t rstd, uintptr_t a_, uintptr_t b,
           uintptr_t c, uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t grad_threshold,
           int64_t T, int64_t rows, int64_t C, int threads) {
          const Element of_x = make_element(type, 1);
          const int64_t step = elements({rows, C}), statistics = kind ? C : elements({T, rows});
          require(T == 1 || neuron.levels == 0, "T: takes 1 with an integer neuron");
          check_part(kind, part);
          const int64_t sums = part == APPLY ? 0 : C, coefficients = part == APPLY || part == KNOWN ? C : 0;
          NormLifBackward a{neuron, threshold, make_kind(kind), first_part(part), of_x,
                            typed_array(grad_spikes, of_x, T, step, "grad_spikes"), typed_array(x, of_x, T, step, "x"),
                            array<const float>(weight, C, "weight"), array<const float>(bias, C, "bias"),
                            array<const float>(mean, statistics, "mean"), array<const float>(rstd, statistics, "rstd"),
                            array<const float>(a_, coefficients, "a"), array<const float>(b, coefficients, "b"),
                            array<const float>(c, coefficients, "c"),
                            typed_output(grad_x, of_x, part == REDUCE ? 0 : T, step, "grad_x"),
                            array<float>(grad_weight, sums, "grad_weight"), array<float>(grad_bias, sums, "grad_bias"),
                            optional_array<float>(grad_threshold, "grad_threshold"), T, rows, C,
                            checked_threads(threads)};
          run(part == BATCH ? batch_norm_lif_backward : kernels().norm_lif_backward, a);
        });
}

void bind_pack(py::module_& m) {
  m.def(
      "pack",
      [](uintptr_t values, int type, uintptr_t words, int64_t rows, int64_t C, int threads) {
        const Element element = make_element(type, 2);
        const int64_t n = elements({rows, C});
        int64_t count = 0;
        Pack a{typed_array(values, element, rows, C, "values"), element, array<uint64_t>(words, n, "words"), &count, rows,
               C, checked_threads(threads)};
        run(kernels().pack, a);
        return count;
      },
      "Bits of values; returns how many are set.");
  m.def("unpack", [](uintptr_t words, uintptr_t values, int type, int64_t rows, int64_t C, int threads) {
    const Element element = make_element(type, 1);
    Unpack a{array<const uint64_t>(words, elements({rows, C}), "words"),
             typed_output(values, element, rows, C, "values"), element, rows, C, checked_threads(threads)};
    run(kernels().unpack, a);
  });
}

void bind_attention(py::module_& m) {
  m.def("attention_forward", [](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t decay, uintptr_t state, double scale,
                                bool integers, uintptr_t out, uintptr_t final_state, int64_t T, int64_t B, int64_t S,
                                int64_t H, int64_t d, int threads) {
    const int64_t n = elements({T, B, S, H, d});
    elements({T, B, H, d, d});
    AttentionForward a{array<const float>(q, n, "q"), array<const float>(k, n, "k"), array<const float>(v, n, "v"),
                       optional_array<const float>(decay, "decay"), optional_array<const float>(state, "state"),
                       static_cast<float>(scale), integers, array<float>(out, n, "out"),
                       optional_array<float>(final_state, "final_state"), T, B, S, H, d, checked_threads(threads)};
    run(kernels().attention_forward, a);
  });
  m.def("attention_backward", [](uintptr_t grad, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t decay,
                                 uintptr_t state, double scale, bool integers, uintptr_t grad_q, uintptr_t grad_k,
                                 uintptr_t grad_v, int64_t T, int64_t B, int64_t S, int64_t H, int64_t d,
                                 int threads) {
    const int64_t n = elements({T, B, S, H, d});
    elements({T, B, H, d, d});
    AttentionBackward a{array<const float>(grad, n, "grad"), array<const float>(q, n, "q"),
                        array<const float>(k, n, "k"), array<const float>(v, n, "v"),
                        optional_array<const float>(decay, "decay"), optional_array<const float>(state, "state"),
                        static_cast<float>(scale), integers, array<float>(grad_q, n, "grad_q"),
                        array<float>(grad_k, n, "grad_k"), array<float>(grad_v, n, "grad_v"), T, B, S, H, d,
                        checked_threads(threads)};
    run(kernels().attention_backward, a);
  });
  m.def("attention_lif_forward", [](const Neuron& neuron, const Threshold& threshold, uintptr_t q, uintptr_t k,
                                    uintptr_t v, uintptr_t decay, double scale, uintptr_t spikes, int64_t T, int64_t B,
                                    int64_t S, int64_t H, int64_t d, int threads) {
    const int64_t n = elements({T, B, S, H, d});
    elements({T, B, H, d, d});
    AttentionLifForward a{neuron, threshold, array<const float>(q, n, "q"), array<const float>(k, n, "k"),
                          array<const float>(v, n, "v"), optional_array<const float>(decay, "decay"),
                          static_cast<float>(scale), array<float>(spikes, n, "spikes"), T, B, S, H, d,
                          checked_threads(threads)};
    run(kernels().attention_lif_forward, a);
  });
  m.def("attention_lif_backward", [](const Neuron& neuron, const Threshold& threshold, uintptr_t grad_spikes,
                                     uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t decay, double scale,
                                     uintptr_t grad_q, uintptr_t grad_k, uintptr_t grad_v, uintptr_t grad_threshold,
                                     int64_t T, int64_t B, int64_t S, int64_t H, int64_t d, int threads) {
    const int64_t n = elements({T, B, S, H, d});
    elements({T, B, H, d, d});
    AttentionLifBackward a{neuron, threshold, array<const float>(grad_spikes, n, "grad_spikes"),
                           array<const float>(q, n, "q"), array<const float>(k, n, "k"), array<const float>(v, n, "v"),
                           optional_array<const float>(decay, "decay"), static_cast<float>(scale),
                           array<float>(grad_q, n, "grad_q"), array<float>(grad_k, n, "grad_k"),
                           array<float>(grad_v, n, "grad_v"), optional_array<float>(grad_threshold, "grad_threshold"),
                           T, B, S, H, d, checked_threads(threads)};
    run(kernels().attention_lif_backward, a);
  });
}

// Who made this CPU. Together with its family, this selects the costs of kernels (spikedecoder/ext/cpu/_cost.py).
const char* cpu_vendor() {
#if defined(SPIKEDECODER_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return "intel";
  if (__builtin_cpu_is("amd")) return "amd";
#endif
  return "other";
}

// The CPU's family, which distinguishes generations of one maker: 25 is Zen 3 and 4, 26 is Zen 5. 0 if there is none.
int cpu_family() {
#if defined(SPIKEDECODER_X86)
  unsigned a = 0, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const unsigned family = a >> 8 & 0xf;
  return static_cast<int>(family == 0xf ? family + (a >> 20 & 0xff) : family);
#else
  return 0;
#endif
}

// Whether the CPU computes a vector of 256 bits in two halves, as AMD's first Zen does; told by AMD's CPUs only.
bool cpu_halves_vectors() {
#if defined(SPIKEDECODER_X86)
  unsigned a = 0, b, c, d;
  __builtin_cpu_init();
  // bit 2: vectors of 256 bits in whole
  return __builtin_cpu_is("amd") && __get_cpuid(0x8000001a, &a, &b, &c, &d) && !(a & 4);
#else
  return false;
#endif
}

// Which of the features that kernels use this CPU has.
std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(SPIKEDECODER_X86)
  __builtin_cpu_init();
#define SPIKEDECODER_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.emplace_back(name);
  SPIKEDECODER_FEATURE("avx2")
  SPIKEDECODER_FEATURE("fma")
  SPIKEDECODER_FEATURE("bmi2")
  SPIKEDECODER_FEATURE("popcnt")
  SPIKEDECODER_FEATURE("avx512f")
  SPIKEDECODER_FEATURE("avx512bw")
  SPIKEDECODER_FEATURE("avx512dq")
  SPIKEDECODER_FEATURE("avx512vl")
  SPIKEDECODER_FEATURE("avx512vbmi2")
  SPIKEDECODER_FEATURE("avx512bf16")
#undef SPIKEDECODER_FEATURE
  if (variant_available("amx")) found.emplace_back("amx-bf16");
#endif
  return found;
}

void bind_runtime(py::module_& m) {
  py::class_<Neuron>(m, "Neuron")
      .def(py::init(&make_neuron), py::arg("tau"), py::arg("v_reset"), py::arg("decay_input"), py::arg("surrogate"),
           py::arg("alpha"), py::arg("detach_reset"))
      .def_static("integer", &make_integer_neuron, py::arg("levels"), py::arg("scale"), py::arg("low"),
                  py::arg("high"));
  py::class_<Threshold>(m, "Threshold")
      .def(py::init(&make_threshold), py::arg("value"), py::arg("values"), py::arg("kind"));
  m.def("variants", [] {
    std::vector<std::string> names;
    for (const char* name : variant_names) {
      if (variant_available(name)) names.emplace_back(name);
    }
    return names;
  });
  m.def("variant", [] { return std::string(kernels().name); });
  m.def("use_variant", [](const std::string& name) {
    if (!use_variant(name.c_str())) throw std::invalid_argument("this CPU or build has no variant " + name);
  });
  m.def("keep_freed_memory", &keep_freed_memory);
  m.def("build", [] {
    py::dict d;
    d["compiler"] = SPIKEDECODER_COMPILER;
#ifdef _OPENMP
    d["openmp"] = _OPENMP;
#else
    d["openmp"] = py::none();
#endif
    d["vendor"] = cpu_vendor();
    d["family"] = cpu_family();
    d["halves_vectors"] = cpu_halves_vectors();
    d["features"] = cpu_features();
    d["bfloat16_products"] = bfloat16_products();
    return d;
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled operators of spikedecoder; called through spikedecoder.ext.cpu.";
  m.attr("sources") = SPIKEDECODER_SOURCES;
  bind_runtime(m);
  bind_lif(m);
  bind_norm_lif(m);
  bind_pack(m);
  bind_linear(m);
  bind_neurons(m);
  bind_attention(m);
  bind_decode(m);
  bind_tensors(m);
}
