// Where in the sources of kernels something happened.
#pragma once
#include <string>
#include <vector>

namespace emu {

std::vector<void*> call_stack();

// "\n  at csrc/cuda/file.cuh:12 in function" for those calls that are in .cu and .cuh files, innermost first.
std::string source_lines(const std::vector<void*>& call_stack);

}  // namespace emu
