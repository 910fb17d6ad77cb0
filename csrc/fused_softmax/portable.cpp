// The kernels for what every machine of the target has: SSE2 on x86-64, NEON on 64-bit ARM.
#include "kernels.hpp"

#define WIDTH 4
namespace megalm {
namespace {
#include "rows.hpp"
}
const Kernels portable_kernels = KERNELS("portable");
}  // namespace megalm
