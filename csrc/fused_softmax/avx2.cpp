// The kernels for AVX2, FMA and F16C: x86-64 since 2013 (Intel) and 2015 (AMD).
//
// Headers come before the switch of the instruction set: a library's inline function that was compiled for it could be
// the copy that the linker keeps for all.
#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define WIDTH 8
namespace megalm {
namespace {
#include "rows.hpp"
}
const Kernels avx2_kernels = KERNELS("avx2");
}  // namespace megalm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
