// Which kernels this processor runs.

#pragma once

#include <vector>

#include "attention.hpp"

namespace megalm::attention {

struct Kernels {
    const char* name;
    bool bfloat16;  // else float32
    void (*forward)(const Call&);
    void (*backward)(const Call&);
};

// The fastest of a type first; none where there are none for this kind of processor.
std::vector<Kernels> kernels();

}  // namespace megalm::attention
