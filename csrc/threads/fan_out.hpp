// Several threads at once, for native code beside torch.
#pragma once

#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace megalm {

// Calls body(context) on up to `threads` threads at once, of which this one is the first; on this one alone, others are
// neither started nor woken. `body` must not throw.
//
// The threads are those of the OpenMP library that torch has loaded, through the entry point of GCC's, which LLVM's and
// Intel's have as well: they are awake from torch's own loops (and spin for a while after each), so that threads of ours
// beside them would share cores with them.
inline void fan_out(unsigned threads, void (*body)(void*), void* context) {
    if (threads <= 1) return body(context);
#if defined(__linux__)
    using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
    static const auto openmp = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (openmp) return openmp(body, context, threads, 0);
#endif
    std::vector<std::thread> others;
    try {
        for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, context);
    } catch (const std::system_error&) {
        // Those that there are do all of the work.
    }
    body(context);
    for (std::thread& other : others) other.join();
}

}  // namespace megalm
