#include "ops/bandwidth.h"

#include <cstdlib>

#include "core/check.h"

namespace codefuse {

double read_bandwidth(const std::string& device, int threads) {
  if (threads < 0) throw ValueError(cat("threads is ", threads, "; expected 0 (all cores) or more"));
  if (device == "cpu") return cpu_read_bandwidth(threads);
  const bool numbered = device.rfind("cuda:", 0) == 0;
  if (device != "cuda" && !numbered) throw ValueError(cat("device is '", device, "'; expected cpu, cuda or cuda:N"));
#ifdef CODEFUSE_WITH_CUDA
  char* end = nullptr;
  const char* digits = numbered ? device.c_str() + 5 : "0";
  const long index = std::strtol(digits, &end, 10);
  if (*digits < '0' || *digits > '9' || *end != '\0' || index > 1023)
    throw ValueError(cat("device is '", device, "'; expected cuda:N with N in 0..1023"));
  return cuda_read_bandwidth(int(index));
#else
  throw ValueError(cat("device is '", device, "'; this build has no CUDA"));
#endif
}

}  // namespace codefuse
