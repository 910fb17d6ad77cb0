// Tasks that threads claim in order, and what they need to wait for one another. Plain functions, defined in tasks.cpp:
// the files that include this one are compiled for processors that others may not be.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace megalm::attention {

// ../threads/fan_out.hpp's.
void fan_out(int threads, void (*body)(void*), void* context);

// Memory on a cache line's boundary; throws std::bad_alloc.
void* allocate(std::size_t bytes);
void release(void* memory);

// Until `value` is at least `target`. Gives the core away after a while: the thread waited for may need it.
void wait_until(const std::atomic<int>& value, int target);

// Units of work one after the other, each of `packs` tasks that prepare its operands and then tasks that use them. The
// operands of `slots` units are held at a time. Any thread may run any task, in the order in which they are claimed; a
// task waits for lower numbers only, so that the lowest that is not done never waits, with however many threads.
class Queue {
public:
    struct Task {
        std::int64_t unit;
        int number;  // of the unit's tasks
    };

    Queue(std::int64_t units, std::int64_t slots);
    ~Queue();
    Queue(const Queue&) = delete;
    Queue& operator=(const Queue&) = delete;

    // Before the first claim: the tasks of each unit.
    void set(std::int64_t unit, int packs, int tasks);

    // The next task, or false; `task` is the thread's last one, or zeros. Waits until the unit's slot is free and, for
    // a task that is no pack, until the unit's packs are done.
    bool claim(Task& task);
    void finish(const Task& task);

private:
    std::int64_t units_, slots_;
    std::int64_t* first_;  // units + 1: number of each unit's first task
    int* packs_;
    std::atomic<int>* done_;
    std::atomic<std::int64_t> next_{0};
};

}  // namespace megalm::attention
