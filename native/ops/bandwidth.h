// The physical limit of a decode step: how fast a device can only read. For tools/bench_engine.py.
#pragma once
#include <string>

namespace codefuse {

// Bytes per second of the best of several reads of a buffer far larger than any cache; device as in make_ops.
double read_bandwidth(const std::string& device, int threads);
double cpu_read_bandwidth(int threads);
double cuda_read_bandwidth(int index);
// Bytes per second of the best of several copies of one large block of pinned host memory to a CUDA device: the limit of loading weights.
double copy_bandwidth(const std::string& device);
double cuda_copy_bandwidth(int index);

}  // namespace codefuse
