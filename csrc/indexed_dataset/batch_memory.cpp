#include "batch_memory.hpp"

#include <algorithm>
#include <iterator>
#include <new>

namespace megalm {

BatchMemory::Block BatchMemory::take(std::size_t size) {
    const std::lock_guard lock(mutex_);
    // The last one given back is the likeliest to be in a cache.
    const auto fits = [size](const auto& each) { return each.first == size; };
    const auto found = std::find_if(free_.rbegin(), free_.rend(), fits);
    if (found != free_.rend()) {
        Block block = std::move(found->second);
        free_.erase(std::next(found).base());
        return block;
    }
    if (!free_.empty()) free_.pop_front();  // of a size that may not be asked for again: memory stays at its peak
    return Block(new char[size]);
}

void BatchMemory::give_back(Block block, std::size_t size) noexcept {
    const std::lock_guard lock(mutex_);
    try {
        free_.emplace_back(size, std::move(block));
    } catch (const std::bad_alloc&) {  // then the system may have it
    }
}

}  // namespace megalm
