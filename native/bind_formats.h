// Weights of any format as numpy arrays.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "formats/format.h"

// weight: an array of the format's elements, or what pack() returns. Points into its arrays; ValueError names what does not fit.
codefuse::HostMatrix host_matrix(const std::string& format, const pybind11::object& weight);
