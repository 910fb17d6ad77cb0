#include "threads.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace megalm {
namespace {

struct Work {
    std::int64_t pieces;
    const std::function<void(std::int64_t)>& piece;
    std::atomic<std::int64_t> next{0};

    static void run(void* self) {
        auto& work = *static_cast<Work*>(self);
        for (std::int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.pieces;) work.piece(i);
    }
};

// The entry of the OpenMP library that torch has loaded, GNU's or LLVM's: its threads exist already, and spin for a
// while after each of torch's own operations, so that threads beside them would wait for a core.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
Parallel openmp() {
    static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

}  // namespace

void in_pieces(std::int64_t pieces, std::int64_t threads, const std::function<void(std::int64_t)>& piece) {
    Work work{pieces, piece};
    threads = std::min(threads, pieces);
    if (threads <= 1) {
        Work::run(&work);
    } else if (const Parallel parallel = openmp()) {
        parallel(Work::run, &work, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (std::int64_t i = 1; i < threads; i++) others.emplace_back(Work::run, &work);
        Work::run(&work);
        for (auto& other : others) other.join();
    }
}

}  // namespace megalm
