// What host code may know of the CUDA device; make_cuda_ops and cuda_read_bandwidth are declared in ops/.
#pragma once
#include <string>

namespace codefuse {

int cuda_device_count();         // 0 where there is no driver
std::string cuda_unavailable();  // "" when cuda:0 can be used, else the reason

}  // namespace codefuse
