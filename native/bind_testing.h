// _native.testing, for tests and for tools that measure a model: one file per part, each with its own bind function.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>

#include "core/config.h"
#include "core/dtype.h"
#include "model/runner.h"
#include "ops/batch.h"

using Floats = pybind11::array_t<float, pybind11::array::c_style | pybind11::array::forcecast>;

void bind_testing_ops(pybind11::module_& m);        // bind_testing_ops.cpp: ops on any device
void bind_testing_engine(pybind11::module_& m);     // bind_testing_engine.cpp: an Engine over a fake runner
void bind_testing_ranks(pybind11::module_& m);      // bind_testing_ranks.cpp: exchanges between the ranks of a model
void bind_testing_scheduler(pybind11::module_& m);  // bind_testing_scheduler.cpp: scheduler, KV pages, prefix cache
void bind_testing_files(pybind11::module_& m);      // bind_testing_files.cpp: reading and checking files
void bind_testing_layers(pybind11::module_& m);     // bind_testing_layers.cpp: what the ops of a model's layers take
void bind_testing_text(pybind11::module_& m);       // bind_testing_text.cpp: beams, spelling, the text cut

// bind_testing_values.cpp: arguments. ValueError for a name that there is not.
codefuse::Batch to_batch(const pybind11::dict& d);  // its fields by their names; what is missing is empty
codefuse::Activation parse_activation(const std::string& s);
codefuse::NormKind parse_norm(const std::string& s);
std::string packed(const Floats& a, codefuse::DType t);  // the elements of a as t

// bind_testing_fake.cpp
struct FakeOptions {
  int fail_launch = -1, fail_collect = -1;  // step that fails
  int64_t step_us = 0;                      // device time of a step
  int64_t launch_us = 0;                    // host time of launch
  bool rows_alike = false;                  // the kind of a row does not count
};
std::unique_ptr<codefuse::Runner> make_fake_runner(const codefuse::Limits& limits, int vocab, const std::string& device, const FakeOptions& options);
int64_t fake_bubbles(const codefuse::Runner& runner);  // times the device had nothing to do
