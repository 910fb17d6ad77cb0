#include "threads.hpp"

#include <algorithm>
#include <atomic>

#include "../threads/fan_out.hpp"

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

}  // namespace

void in_pieces(std::int64_t pieces, std::int64_t threads, const std::function<void(std::int64_t)>& piece) {
    Work work{pieces, piece};
    fan_out(static_cast<unsigned>(std::min(pieces, threads)), Work::run, &work);
}

}  // namespace megalm
