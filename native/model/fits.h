// Which weight a compute dtype cannot hold, once a device has found that there is one.
#pragma once
#include "core/dtype.h"
#include "core/safetensors.h"

namespace codefuse {

// LoadError names file, tensor, place, value and limit of the first such weight of a matrix, in the order of names; reads every matrix if
// there is none. Vectors are float32 on every device.
void check_fits(const Weights& files, DType act);

}  // namespace codefuse
