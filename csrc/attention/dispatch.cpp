#include "dispatch.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace megalm::attention {

#if defined(__x86_64__)

namespace {

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// By cpuid's bits: not every compiler's __builtin_cpu_supports knows these names.
bool has_tiles_of_bfloat16() {
    constexpr unsigned kTile = 1u << 24, kBfloat16 = 1u << 22;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kBfloat16);
}

// Linux lets a process use tiles once it has asked; threads and children inherit it.
bool has_amx() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return has_avx512_bf16() && has_tiles_of_bfloat16() &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace

std::vector<Kernels> kernels() {
    std::vector<Kernels> found;
    if (has_amx()) found.push_back({"amx", true, amx::forward, amx::backward});
    if (has_avx512_bf16()) found.push_back({"avx512_bf16", true, avx512_bf16::forward, avx512_bf16::backward});
    if (has_avx512()) found.push_back({"avx512", false, avx512::forward, avx512::backward});
    return found;
}

#else

std::vector<Kernels> kernels() { return {}; }

#endif

}  // namespace megalm::attention
