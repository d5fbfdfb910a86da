// The decoder's part of the Python module.
#include "bindings.h"

namespace {

// A model as `decode` takes it. The arrays belong to the caller, who keeps them alive.
Decode make_decode_model(const Neuron& neuron, const py::kwargs& k) {
  const auto number = [&](const char* name) { return k[name].cast<int64_t>(); };
  const auto flag = [&](const char* name) { return k[name].cast<bool>(); };
  Decode a{};
  a.neuron = neuron;
  a.levels = k["levels"].cast<float>();
  a.per_unit = k["per_unit"].cast<float>();
  a.norm = make_kind(k["norm"].cast<int>());
  const int reunite = k["reunite"].cast<int>();
  require(reunite >= 0 && reunite <= 3, "reunite: takes 0 (average), 1 (accumulate), 2 (concatenate) or 3 (final)");
  a.reunite = static_cast<Reunite>(reunite);
  a.attention_norm = flag("attention_norm");
  a.float_reunite = flag("float_reunite");
  a.head_neuron = flag("head_neuron");
  a.eps = k["eps"].cast<float>();
  a.scale = k["scale"].cast<float>();
  a.blocks = number("blocks");
  a.T = number("T");
  a.E = number("E");
  a.hidden = number("hidden");
  a.H = number("H");
  a.V = number("V");
  a.token_shift = number("token_shift");
  a.mlp_token_shift = number("mlp_token_shift");
  a.token_width = number("token_width");
  require(a.blocks >= 1 && a.T >= 1 && a.E >= 1 && a.hidden >= 1 && a.V >= 1, "sizes: takes numbers >= 1");
  require(a.levels == 0 || a.T == 1, "levels: takes one timestep");
  require(a.H >= 1 && a.E % a.H == 0, "H: takes a divisor of E");
  require(a.E <= 65536 && a.hidden <= 65536, "sizes: takes at most 65536 channels");
  require(a.token_shift >= 1 && a.token_shift <= a.E && a.mlp_token_shift >= 1 && a.mlp_token_shift <= a.E,
          "token_shift: takes 1 to E");
  require(a.token_width >= 0 && a.token_width <= a.E, "token_width: takes 0 to E");
  elements({a.blocks, 8, a.T, larger(a.E, a.hidden), 3 * a.E + a.V});
  require(number("weight_count") == decode_weights(a), "weights: not as many as a model of these sizes has");
  const int64_t neurons = a.blocks * neurons_per_block;
  a.weights = array<const float>(k["weights"].cast<uintptr_t>(), 1, "weights");
  a.thresholds = array<const float>(k["thresholds"].cast<uintptr_t>(), neurons + 1, "thresholds");
  a.present = array<const uint8_t>(k["present"].cast<uintptr_t>(), neurons, "present");
  a.decay = optional_array<const float>(k["decay"].cast<uintptr_t>(), "decay");
  return a;
}

void check_indices(const int64_t* values, int64_t n, int64_t first, int64_t end, const char* name) {
  for (int64_t i = 0; i < n; i++) {
    if (values[i] < first || values[i] >= end) {
      throw std::invalid_argument(std::string(name) + ": got " + std::to_string(values[i]) + ", takes " +
                                  std::to_string(first) + " to " + std::to_string(end - 1));
    }
  }
}

void finish_step(Decode& a, uintptr_t states, uintptr_t logits, bool last_only, uintptr_t scratch, int64_t B, int64_t S,
                 int threads) {
  a.states = array<const DecodeState>(states, a.blocks, "states");
  a.logits = array<float>(logits, elements({B, S, a.V}), "logits");
  a.last_only = last_only;
  require(scratch % 64 == 0, "scratch: takes memory aligned to 64 bytes");
  a.scratch = array<float>(scratch, 1, "scratch");
  a.B = B;
  a.S = S;
  a.threads = checked_threads(threads);
  if (B && S) run(kernels().decode, a);
}

}  // namespace

void bind_decode(py::module_& m) {
  static_assert(sizeof(DecodeState) == 3 * sizeof(int64_t), "states arrive as rows of three addresses");
  m.def("decode_panel", &decode_panel, py::arg("inputs"));
  py::class_<Decode>(m, "DecodeModel")
      .def(py::init(&make_decode_model))
      .def("scratch_bytes",
           [](const Decode& a, int threads) { return decode_scratch(a, checked_threads(threads)); })
      .def("step_tokens",
           [](const Decode& model, uintptr_t token_rows, int64_t token_count, uintptr_t position_rows,
              int64_t position_count, int64_t first_position, uintptr_t tokens, uintptr_t positions,
              uintptr_t states, uintptr_t logits, uintptr_t scratch, int64_t B, int threads) {
             Decode a = model;
             a.token_rows = array<const float>(token_rows, a.token_width, "token_rows");
             a.position_rows = array<const float>(position_rows, a.E - a.token_width, "position_rows");
             a.tokens = array<const int64_t>(tokens, B, "tokens");
             a.positions = array<const int64_t>(positions, B, "positions");
             a.first_position = first_position;
             check_indices(a.tokens, B, 0, token_count, "tokens");
             check_indices(a.positions, B, first_position, first_position + position_count, "positions");
             finish_step(a, states, logits, true, scratch, B, 1, threads);
           })
      .def("read_embedded", [](const Decode& model, uintptr_t embedded, uintptr_t states, uintptr_t logits,
                               bool last_only, uintptr_t scratch, int64_t B, int64_t S, int threads) {
        Decode a = model;
        a.embedded = array<const float>(embedded, elements({B, S, a.E}), "embedded");
        finish_step(a, states, logits, last_only, scratch, B, S, threads);
      });
}
