#include "ops/bandwidth.h"

#include <cstdlib>

#include "core/check.h"
#include "ops/ops.h"

namespace codefuse {

namespace {

// cuda, cuda:N
double on_cuda(const std::string& device, const char* expected, double (*measure)(int index)) {
  const bool numbered = device.rfind("cuda:", 0) == 0;
  if (device != "cuda" && !numbered) throw ValueError(cat("device is '", device, "'; expected ", expected));
  char* end = nullptr;
  const char* digits = numbered ? device.c_str() + 5 : "0";
  const long index = std::strtol(digits, &end, 10);
  if (*digits < '0' || *digits > '9' || *end != '\0' || index > 1023)
    throw ValueError(cat("device is '", device, "'; expected cuda:N with N in 0..1023"));
  const Devices d = devices();
  if ((d.names + ",").find(cat(",cuda:", index, ",")) == std::string::npos)
    throw ValueError(cat("device is '", device, "', but only ", d.names, " can be used here", d.why_no_cuda.empty() ? "" : cat(" (", d.why_no_cuda, ")")));
  return measure(int(index));
}

}  // namespace

#ifndef CODEFUSE_WITH_CUDA
double cuda_read_bandwidth(int) { return 0; }  // on_cuda() does not come to call them
double cuda_copy_bandwidth(int) { return 0; }
#endif

double read_bandwidth(const std::string& device, int threads) {
  if (threads < 0) throw ValueError(cat("threads is ", threads, "; expected 0 (all cores) or more"));
  return device == "cpu" ? cpu_read_bandwidth(threads) : on_cuda(device, "cpu, cuda or cuda:N", cuda_read_bandwidth);
}

double copy_bandwidth(const std::string& device) { return on_cuda(device, "cuda or cuda:N", cuda_copy_bandwidth); }

}  // namespace codefuse
