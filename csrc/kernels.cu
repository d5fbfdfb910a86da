// All CUDA kernels in one file: nvcc reads its own headers for each file and architecture, which takes longer than
// everything else.
#include "pack_spikes.cu"
#include "spike_linear.cu"
