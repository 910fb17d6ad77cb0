// The kernels for AVX-512 (F, BW, DQ, VL): x86-64 servers since 2017 (Intel) and 2022 (AMD).
//
// Headers come before the switch of the instruction set: a library's inline function that was compiled for it could be
// the copy that the linker keeps for all.
#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define WIDTH 16
namespace megalm {
namespace {
#include "rows.hpp"
}
const Kernels avx512_kernels = KERNELS("avx512");
}  // namespace megalm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
