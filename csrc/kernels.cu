// All CUDA kernels: nvcc reads its own headers for each file and architecture, which takes longer than all else.
#include "pack_spikes.cu"
#include "spike_linear.cu"
