#pragma once

#include <pybind11/pybind11.h>

namespace bandit_rft::cuda {

void add_exports(pybind11::module_ m);  // to the submodule bandit_rft._C.cuda

}  // namespace bandit_rft::cuda
