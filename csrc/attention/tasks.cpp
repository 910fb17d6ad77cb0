#include "tasks.hpp"

#include <cstdlib>
#include <new>
#include <thread>

#include "../threads/fan_out.hpp"

namespace megalm::attention {

void fan_out(int threads, void (*body)(void*), void* context) {
    megalm::fan_out(threads < 1 ? 1u : static_cast<unsigned>(threads), body, context);
}

void* allocate(std::size_t bytes) {
    void* const memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

void release(void* memory) { std::free(memory); }

void wait_until(const std::atomic<int>& value, int target) {
    for (int tries = 0; value.load(std::memory_order_acquire) < target; ++tries)
        if (tries >= 256) std::this_thread::yield();
}

Queue::Queue(std::int64_t units, std::int64_t slots)
    : units_(units),
      slots_(slots),
      first_(new std::int64_t[static_cast<std::size_t>(units) + 1]()),
      packs_(new int[static_cast<std::size_t>(units)]()),
      done_(new std::atomic<int>[static_cast<std::size_t>(units)]()) {}

Queue::~Queue() {
    delete[] first_;
    delete[] packs_;
    delete[] done_;
}

void Queue::set(std::int64_t unit, int packs, int tasks) {
    packs_[unit] = packs;
    first_[unit + 1] = first_[unit] + tasks;
}

bool Queue::claim(Task& task) {
    const std::int64_t next = next_.fetch_add(1, std::memory_order_relaxed);
    if (next >= first_[units_]) return false;
    while (next >= first_[task.unit + 1]) ++task.unit;
    task.number = static_cast<int>(next - first_[task.unit]);
    const std::int64_t before = task.unit - slots_;
    if (before >= 0) wait_until(done_[before], static_cast<int>(first_[before + 1] - first_[before]));
    if (task.number >= packs_[task.unit]) wait_until(done_[task.unit], packs_[task.unit]);
    return true;
}

void Queue::finish(const Task& task) { done_[task.unit].fetch_add(1, std::memory_order_release); }

}  // namespace megalm::attention
