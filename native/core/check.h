// Errors. User input -> ValueError (Python's ValueError) naming field, value and limit; a file that is not what was
// expected -> LoadError; a device that failed -> DeviceError (every request is then answered with an error).
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace codefuse {

struct ValueError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct LoadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct OverflowError : LoadError {  // a weight that the compute dtype cannot hold
  using LoadError::LoadError;
};
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// cat("top_p ", p, " is above 1") -> std::string
template <class... Args>
std::string cat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

}  // namespace codefuse
