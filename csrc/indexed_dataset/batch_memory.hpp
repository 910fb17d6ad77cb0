// Memory for micro-batches, used again and again.
//
// The C library gives memory of this size back to the system when it is freed, and each page of it costs a page fault
// when it comes anew: up to as much time as filling it. Here a block whose user is gone waits for the next one of its
// size.

#pragma once

#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>

namespace megalm {

class BatchMemory {
   public:
    using Block = std::unique_ptr<char[]>;

    // A block of `size` bytes, uninitialised. Safe to call from several threads, as is `give_back`.
    Block take(std::size_t size);

    void give_back(Block block, std::size_t size) noexcept;

   private:
    std::mutex mutex_;
    std::deque<std::pair<std::size_t, Block>> free_;
};

}  // namespace megalm
