// Files that are read and checked, for tests/test_checksums.py and tests/test_fits.py.
#include "bind_testing.h"

#include <pybind11/stl.h>

#include "core/checksums.h"
#include "core/xxh3.h"
#include "model/fits.h"

namespace py = pybind11;
using namespace codefuse;

namespace {

const char* name_of(Simd s) { return s == Simd::avx512 ? "avx512" : s == Simd::avx2 ? "avx2" : "none"; }

std::vector<std::string> hash_kernels() {
  std::vector<std::string> names;
  for (Simd s : {Simd::avx512, Simd::avx2, Simd::none})
    if (s <= best_simd()) names.push_back(name_of(s));
  return names;
}

uint64_t hash_by(const std::string& kernels, const py::bytes& data) {
  const std::string_view bytes(data);
  for (Simd s : {Simd::avx512, Simd::avx2, Simd::none})
    if (s <= best_simd() && kernels == name_of(s)) return xxh3_64(bytes.data(), bytes.size(), s);
  throw ValueError(cat("kernels is '", kernels, "'; expected one of hash_kernels()"));
}

class TestVerification {
 public:
  TestVerification(const std::string& directory, int threads, size_t ahead_bytes)
      : files_(directory), verification_(files_, parse_file_records(read_text(directory + "/config.json"), directory), threads, ahead_bytes) {}

  py::bytes read(size_t file, size_t begin, size_t bytes) {
    const MappedFile& memory = files_.files().at(file)->memory;
    if (begin > memory.size() || bytes > memory.size() - begin)
      throw ValueError(cat("begin is ", begin, " and bytes is ", bytes, "; the file has ", memory.size()));
    std::vector<uint8_t> out(bytes);
    {
      py::gil_scoped_release unlocked;
      verification_.read(out.data(), memory.data() + begin, bytes);
    }
    return py::bytes(reinterpret_cast<const char*>(out.data()), bytes);
  }
  void wait() { verification_.wait(); }

 private:
  const Weights files_;
  Verification verification_;
};

}  // namespace

void bind_testing_files(py::module_& m) {
  using namespace py::literals;
  m.def("hash_kernels", &hash_kernels, "Instruction sets that checksums can use here, best first.");
  m.def("xxh3_64", &hash_by, "kernels"_a, "data"_a, "XXH3 by one of hash_kernels().");
  m.def("check_fits", [](const std::string& directory, const std::string& dtype) { check_fits(Weights(directory), parse_dtype(dtype)); }, "weights"_a, "dtype"_a,
        "LoadError for a weight that dtype cannot hold.");
  py::class_<TestVerification>(m, "Verification", "The files of a weights directory, read and held to their checksums as by a device that uploads them.")
      .def(py::init<const std::string&, int, size_t>(), "weights"_a, "threads"_a, "ahead_bytes"_a = size_t(64) << 20)
      .def("read", &TestVerification::read, "file"_a, "begin"_a, "bytes"_a, "Runs without the GIL.")
      .def("wait", &TestVerification::wait, py::call_guard<py::gil_scoped_release>(), "LoadError for a damaged file.");
}
