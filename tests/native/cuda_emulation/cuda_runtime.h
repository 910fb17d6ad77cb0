// Runs CUDA device code on the CPU, for tests: a .cu file, compiled as C++ with this folder first on the include path.
//
// A launch runs its blocks one after another, in one host thread. Each thread of a block is a fiber with a stack of its
// own, so barriers, shuffles and votes are what they are on a GPU: a lane that reaches one stops there until the others
// have come. In between, lanes run one at a time, in an order that `cuda_emulation_order` chooses (ascending,
// descending or shuffled anew each round), so that what needs a barrier and has none gives another result in one.
//
// What hardware leaves undefined ends the launch with cudaErrorLaunchFailure and a line on standard error: a warp's
// lanes at different shuffles or with different masks, a lane outside its own mask, a barrier that some threads never
// reach. Limits of a launch (threads a block, blocks a grid) are checked as the driver does.
//
// Not emulated: memory operations of lanes that overtake each other, streams, speed, and shuffles of two parts of one
// warp at a time, each with a mask of its own.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

enum cudaError_t : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719,
};
using cudaStream_t = struct CUstream_st*;

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the lane that runs
constexpr int warpSize = 32;

namespace cuda_emulation {

constexpr size_t kStack = 128 * 1024;

struct Warp {
    uint64_t slots[2][warpSize];  // in turn: a lane may write its next value while others still read the last
    unsigned present = 0;      // lanes of this warp that have not returned
    unsigned arrived = 0;
    unsigned mask = 0;
    const char* operation = nullptr;
    uint64_t turn = 0;
};

struct Lane {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    dim3 thread;
    unsigned warp = 0, number = 0;
    const uint64_t* awaited = nullptr;  // runs on when this has left `seen`
    uint64_t seen = 0;
    bool returned = false;
};

struct Block {
    std::vector<Warp> warps;
    size_t threads = 0, at_barrier = 0, returned = 0;
    uint64_t barrier_turn = 0;
    std::string failure;
    std::function<void()> body;
    ucontext_t scheduler;
};

inline std::vector<Lane> lanes;  // kept from launch to launch, with their stacks
inline Block block;
inline Lane* current = nullptr;
inline int order = 0;  // 0 ascending, 1 descending, else the seed of a shuffle
inline const void* last_kernel = nullptr;

inline void to_scheduler() { swapcontext(&current->context, &block.scheduler); }

inline void fail(const std::string& message) {
    if (block.failure.empty()) block.failure = message;
    to_scheduler();  // and never back
}

inline void wait_for_change(const uint64_t& turn, uint64_t seen) {
    current->awaited = &turn;
    current->seen = seen;
    while (turn == seen) to_scheduler();
    current->awaited = nullptr;
}

/// All lanes of `mask` bring a value; each then sees everyone's.
inline const uint64_t* exchange(const char* operation, unsigned mask, uint64_t value) {
    Warp& warp = block.warps[current->warp];
    const unsigned own = 1u << current->number;
    if (!(mask & own)) fail(std::string(operation) + ": a lane is not in its own mask");
    if (mask & ~warp.present) fail(std::string(operation) + ": the mask names lanes that have returned or never were");
    if (warp.arrived && (warp.mask != mask || std::strcmp(warp.operation, operation) != 0))
        fail(std::string(operation) + ": other lanes of the warp are at " + warp.operation + " or have another mask");
    warp.mask = mask;
    warp.operation = operation;
    warp.arrived |= own;
    const uint64_t turn = warp.turn;
    uint64_t* slots = warp.slots[turn % 2];
    slots[current->number] = value;
    if (warp.arrived == mask) {
        warp.arrived = 0;
        ++warp.turn;
    }
    wait_for_change(warp.turn, turn);
    return slots;
}

template <typename T>
T from_lane(const uint64_t* slots, int lane) {
    T value;
    std::memcpy(&value, &slots[lane], sizeof(T));
    return value;
}

template <typename T>
const uint64_t* exchange_value(const char* operation, unsigned mask, T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return exchange(operation, mask, bits);
}

inline void enter() {
    block.body();
    current->returned = true;
    Warp& warp = block.warps[current->warp];
    warp.present &= ~(1u << current->number);
    if (warp.arrived & warp.mask & ~(1u << current->number) && warp.mask >> current->number & 1)
        fail(std::string(warp.operation) + ": a lane returned while others of its mask wait");
    ++block.returned;
    if (block.at_barrier) fail("__syncthreads: a thread of the block has returned while others wait");
    to_scheduler();
}

inline void start(Lane& lane, unsigned number) {
    const dim3 size = blockDim;
    lane.thread = dim3(number % size.x, number / size.x % size.y, number / (size.x * size.y));
    lane.warp = number / warpSize;
    lane.number = number % warpSize;
    lane.awaited = nullptr;
    lane.returned = false;
    block.warps[lane.warp].present |= 1u << lane.number;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get();
    lane.context.uc_stack.ss_size = kStack;
    lane.context.uc_link = nullptr;
    makecontext(&lane.context, enter, 0);
}

/// Runs the lanes of the block in turn until all have returned, one has failed, or none can go on.
inline void run_block() {
    block.warps.assign((block.threads + warpSize - 1) / warpSize, Warp());
    block.at_barrier = block.returned = 0;
    for (size_t i = 0; i < block.threads; ++i) start(lanes[i], static_cast<unsigned>(i));
    std::vector<size_t> turns(block.threads);
    std::iota(turns.begin(), turns.end(), size_t{0});
    if (order == 1) std::reverse(turns.begin(), turns.end());
    std::mt19937 random(static_cast<unsigned>(order));
    while (block.returned < block.threads) {
        if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
        bool any_ran = false;
        for (const size_t i : turns) {
            Lane& lane = lanes[i];
            if (lane.returned || (lane.awaited && *lane.awaited == lane.seen)) continue;
            any_ran = true;
            current = &lane;
            threadIdx = lane.thread;
            swapcontext(&block.scheduler, &lane.context);
            if (!block.failure.empty()) return;
        }
        if (!any_ran) {
            block.failure = "threads wait at a barrier or shuffle that others never reach";
            return;
        }
    }
}

inline cudaError_t launch(dim3 grid, dim3 size, std::function<void()> body) {
    const uint64_t threads = uint64_t{size.x} * size.y * size.z;
    if (threads == 0 || threads > 1024 || size.z > 64 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 ||
        grid.y > 65535 || grid.z == 0 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    blockDim = size;
    gridDim = grid;
    block.threads = threads;
    block.failure.clear();
    block.body = std::move(body);
    while (lanes.size() < threads) lanes.emplace_back();
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                run_block();
                if (!block.failure.empty()) {
                    std::fprintf(stderr, "block (%u, %u, %u): %s\n", x, y, z, block.failure.c_str());
                    return cudaErrorLaunchFailure;
                }
            }
    return cudaSuccess;
}

}  // namespace cuda_emulation

inline void __syncthreads() {
    using namespace cuda_emulation;
    if (block.returned) fail("__syncthreads: a thread of the block has returned");
    const uint64_t turn = block.barrier_turn;
    if (++block.at_barrier == block.threads) {
        block.at_barrier = 0;
        ++block.barrier_turn;
    }
    wait_for_change(block.barrier_turn, turn);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return cuda_emulation::from_lane<T>(cuda_emulation::exchange_value("__shfl_sync", mask, value), lane & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    const uint64_t* slots = cuda_emulation::exchange_value("__shfl_xor_sync", mask, value);
    return cuda_emulation::from_lane<T>(slots, static_cast<int>(cuda_emulation::current->number) ^ (lanes & 31));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    const uint64_t* slots = cuda_emulation::exchange_value("__shfl_down_sync", mask, value);
    const unsigned lane = cuda_emulation::current->number + by;
    return cuda_emulation::from_lane<T>(slots, static_cast<int>(lane < 32 ? lane : cuda_emulation::current->number));
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
    const uint64_t* slots = cuda_emulation::exchange_value("__ballot_sync", mask, vote);
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1 && cuda_emulation::from_lane<bool>(slots, i)) votes |= 1u << i;
    return votes;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_emulation::exchange("__syncwarp", mask, 0); }

/// The launch that CUDA's own headers offer as a function, so that the sources need no <<<...>>>.
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
    cuda_emulation::last_kernel = reinterpret_cast<const void*>(kernel);
    return cuda_emulation::launch(config->gridDim, config->blockDim, [=] { kernel(Parameters(given)...); });
}
struct cudaFuncAttributes {};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

/// For tests: the order in which lanes run, and the kernel that was launched last.
#define CUDA_EMULATION_EXPORT extern "C" __attribute__((used, visibility("default"))) inline
CUDA_EMULATION_EXPORT void cuda_emulation_order(int order) { cuda_emulation::order = order; }
CUDA_EMULATION_EXPORT const void* cuda_emulation_last_kernel() { return cuda_emulation::last_kernel; }
