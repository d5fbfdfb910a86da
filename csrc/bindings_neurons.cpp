// Neurons, norms and the token shift on torch's tensors as they are, results included. Where caches are cold, as between
// the layers of a model, inspecting tensors and making results in Python takes longer than the kernel does on a small
// tensor. Each function returns None for arguments that have to be prepared first (other dtypes, strides, thresholds
// that are tensors, or shapes that are an error); spikedecoder/ext/cpu then does so and calls the functions that take
// addresses.
#include <vector>

#include "batch_norm.h"
#include "tensors.h"

namespace {

bool has_timesteps(const Neuron& neuron) { return neuron.levels == 0; }

// One threshold for all neurons. False for tensors.
bool scalar(py::handle threshold, Threshold& t) {
  if (!PyFloat_CheckExact(threshold.ptr())) return false;
  t.value = static_cast<float>(PyFloat_AS_DOUBLE(threshold.ptr()));
  return true;
}

// (spikes, mean, rstd) as forward in spikedecoder/ext/cpu/norm_lif.py returns them.
py::object norm_lif(const Neuron& neuron, py::handle threshold, py::object x, py::handle weight, py::handle bias,
                    py::object mean, py::object rstd, double eps, bool own_memory, int threads) {
  Values in;
  Threshold at;
  if (!scalar(threshold, at) || !in.look(x, has_timesteps(neuron), 2)) return py::none();
  const bool by_row = mean.is_none();
  const float *const w = floats_of(weight, in.C), *const b = floats_of(bias, in.C);
  const float* m = by_row ? nullptr : floats_of(mean, in.C);
  const float* r = by_row ? nullptr : floats_of(rstd, in.C);
  if (!w || !b || (!by_row && (!m || !r))) return py::none();
  if (by_row) {
    const std::vector<int64_t> of_rows(in.shape.begin(), in.shape.end() - 1);
    const NewTensor means = new_tensor(of_rows, kFloat32, own_memory), rstds = new_tensor(of_rows, kFloat32, own_memory);
    mean = means.tensor, rstd = rstds.tensor, m = means.floats(), r = rstds.floats();
  }
  const NewTensor spikes = new_tensor(in.shape, in.type, own_memory);
  run(kernels().norm_lif_forward,
      NormLifForward{neuron, at, by_row ? NormKind::row : NormKind::channel, in.element(), in.data, w, b,
                     static_cast<float>(eps), const_cast<float*>(m), const_cast<float*>(r), spikes.data, in.T, in.rows,
                     in.C, in.rows, checked_threads(threads)});
  return py::make_tuple(spikes.tensor, mean, rstd);
}

// (grad_x, grad_weight, grad_bias, an empty tensor) as _backward there returns them; coefficients: of apply and known.
py::object norm_lif_gradients(const Neuron& neuron, py::handle threshold, int kind, int part, py::handle grad_spikes,
                              py::handle x, py::handle weight, py::handle bias, py::handle mean, py::handle rstd,
                              const py::tuple& coefficients, bool own_memory, int threads) {
  check_part(kind, part);
  Values in, grad;
  Threshold at;
  if (!scalar(threshold, at) || !in.look(x, has_timesteps(neuron), 2)) return py::none();
  if (!grad.look(grad_spikes, has_timesteps(neuron), 2) || !grad.like(in)) return py::none();
  const int64_t statistics = kind ? in.C : in.T * in.rows;
  const float* of_channels[5] = {floats_of(weight, in.C), floats_of(bias, in.C), nullptr, nullptr, nullptr};
  const float *const m = floats_of(mean, statistics), *const r = floats_of(rstd, statistics);
  if (!of_channels[0] || !of_channels[1] || !m || !r) return py::none();
  const bool writes_x = part != REDUCE, needs_coefficients = part == APPLY || part == KNOWN;
  if (coefficients.size() != (needs_coefficients ? 3 : 0)) return py::none();
  for (size_t i = 0; i < coefficients.size(); i++) {
    of_channels[2 + i] = floats_of(coefficients[i], in.C);
    if (!of_channels[2 + i]) return py::none();
  }
  const NewTensor nothing = new_tensor({0}, kFloat32, own_memory);
  const NewTensor grad_x = writes_x ? new_tensor(in.shape, in.type, own_memory) : new_tensor({0}, in.type, own_memory);
  const NewTensor grad_weight = new_tensor({in.C}, kFloat32, own_memory);
  const NewTensor grad_bias = new_tensor({in.C}, kFloat32, own_memory);
  const NormLifBackward a{neuron, at, make_kind(kind), first_part(part), in.element(), grad.data, in.data,
                          of_channels[0], of_channels[1], m, r, of_channels[2], of_channels[3], of_channels[4],
                          grad_x.data, grad_weight.floats(), grad_bias.floats(), nullptr, in.T, in.rows, in.C,
                          checked_threads(threads)};
  run(part == BATCH ? batch_norm_lif_backward : kernels().norm_lif_backward, a);
  return py::make_tuple(grad_x.tensor, grad_weight.tensor, grad_bias.tensor, nothing.tensor);
}

// (spikes, v or None) as forward in spikedecoder/ext/cpu/lif.py returns them.
py::object lif(const Neuron& neuron, py::handle threshold, py::handle x, py::handle v_init, bool want_v,
               bool own_memory, int threads) {
  Values in;
  Threshold at;
  if (!scalar(threshold, at) || !in.look(x, true, 2)) return py::none();
  const float* const start = v_init.is_none() ? nullptr : floats_of(v_init, in.step());
  if (!v_init.is_none() && !start) return py::none();
  const NewTensor spikes = new_tensor(in.shape, in.type, own_memory);
  NewTensor v{py::none(), nullptr};
  if (want_v) v = new_tensor({in.shape.begin() + 1, in.shape.end()}, kFloat32, own_memory);
  run(kernels().lif_forward, LifForward{neuron, at, in.element(), in.data, start, spikes.data, v.floats(), in.T, 1,
                                        in.step(), checked_threads(threads)});
  return py::make_tuple(spikes.tensor, v.tensor);
}

// (grad_x, None, grad_v_init or None) as backward there returns them.
py::object lif_gradients(const Neuron& neuron, py::handle threshold, py::handle grad_spikes, py::handle grad_v,
                         py::handle x, py::handle v_init, bool want_grad_v_init, bool own_memory, int threads) {
  Values in, grad;
  Threshold at;
  if (!scalar(threshold, at) || !in.look(x, true, 2) || !grad.look(grad_spikes, true, 2) || !grad.like(in)) {
    return py::none();
  }
  const float* const last = grad_v.is_none() ? nullptr : floats_of(grad_v, in.step());
  const float* const start = v_init.is_none() ? nullptr : floats_of(v_init, in.step());
  if ((!grad_v.is_none() && !last) || (!v_init.is_none() && !start)) return py::none();
  const NewTensor grad_x = new_tensor(in.shape, in.type, own_memory);
  NewTensor grad_start{py::none(), nullptr};
  if (start && want_grad_v_init) {
    grad_start = new_tensor({in.shape.begin() + 1, in.shape.end()}, kFloat32, own_memory);
  }
  run(kernels().lif_backward,
      LifBackward{neuron, at, in.element(), grad.data, last, in.data, start, grad_x.data, nullptr, grad_start.floats(),
                  in.T, 1, in.step(), checked_threads(threads)});
  return py::make_tuple(grad_x.tensor, py::none(), grad_start.tensor);
}

// (s, mask or None) as forward in spikedecoder/ext/cpu/ilif.py returns them.
py::object ilif(const Neuron& neuron, py::handle x, bool want_mask, bool own_memory, int threads) {
  Values in;
  if (!in.look(x, false, 1) || !(in.type == kFloat32)) return py::none();
  const NewTensor s = new_tensor(in.shape, kFloat32, own_memory);
  NewTensor mask{py::none(), nullptr};
  if (want_mask) mask = new_tensor(in.shape, kUInt8, own_memory);
  run(kernels().ilif_forward,
      IlifForward{in.floats(), s.floats(), static_cast<uint8_t*>(mask.data), neuron.scale, neuron.levels, neuron.low,
                  neuron.high, in.step(), checked_threads(threads)});
  return py::make_tuple(s.tensor, mask.tensor);
}

// The gradient of x as backward there returns it. mask: bytes of 0 and 1.
py::object ilif_gradient(const Neuron& neuron, py::handle grad, py::handle mask, bool own_memory, int threads) {
  Values in;
  DLTensor bytes;
  if (!in.look(grad, false, 1) || !(in.type == kFloat32)) return py::none();
  if (!look_at(mask, bytes) || !(bytes.dtype == kUInt8) || !is_contiguous(bytes)) return py::none();
  if (std::vector<int64_t>(bytes.shape, bytes.shape + bytes.ndim) != in.shape) return py::none();
  const NewTensor grad_x = new_tensor(in.shape, kFloat32, own_memory);
  run(kernels().ilif_backward, IlifBackward{in.floats(), static_cast<const uint8_t*>(bytes.data), grad_x.floats(),
                                            neuron.scale, in.step(), checked_threads(threads)});
  return grad_x.tensor;
}

// (mean, rstd) as batch_statistics in spikedecoder/ext/cpu/norm_lif.py returns them.
py::object statistics_of_batch(py::handle x, py::handle running_mean, py::handle running_var, double momentum,
                               double eps, bool own_memory, int threads) {
  Values in;
  if (!in.look(x, false, 1) || in.rows < 2) return py::none();
  // which are updated
  auto* const moving_mean = const_cast<float*>(floats_of(running_mean, in.C));
  auto* const moving_var = const_cast<float*>(floats_of(running_var, in.C));
  if (!moving_mean || !moving_var) return py::none();
  const NewTensor mean = new_tensor({in.C}, kFloat32, own_memory), rstd = new_tensor({in.C}, kFloat32, own_memory);
  run(batch_statistics,
      BatchStatistics{{in.element(), in.data, true, mean.floats(), rstd.floats(), in.rows, in.C,
                       checked_threads(threads)},
                      moving_mean, moving_var, static_cast<float>(momentum), static_cast<float>(eps)});
  return py::make_tuple(mean.tensor, rstd.tensor);
}

// x [..., S, C] shifted as in spikedecoder/ext/cpu/token_shift.py.
py::object token_shift(py::handle x, int64_t groups, bool back, bool own_memory, int threads) {
  Values in;
  if (groups < 1 || !in.look(x, false, 2)) return py::none();
  const int64_t S = in.shape[in.shape.size() - 2];
  const NewTensor out = new_tensor(in.shape, in.type, own_memory);
  run(kernels().token_shift, TokenShift{in.data, out.data, in.rows / S, S, in.C, groups, in.type.bits / 8, back,
                                        checked_threads(threads)});
  return out.tensor;
}

}  // namespace

void bind_neurons(py::module_& m) {
  m.def("ilif", &ilif);
  m.def("ilif_gradient", &ilif_gradient);
  m.def("statistics_of_batch", &statistics_of_batch);
  m.def("norm_lif", &norm_lif);
  m.def("norm_lif_gradients", &norm_lif_gradients);
  m.def("lif", &lif);
  m.def("lif_gradients", &lif_gradients);
  m.def("token_shift", &token_shift);
}
