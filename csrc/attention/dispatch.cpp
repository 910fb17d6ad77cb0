#include "dispatch.hpp"

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

// Linux lets a process use tiles once it has asked; threads and children inherit it.
bool has_amx() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return has_avx512_bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
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
