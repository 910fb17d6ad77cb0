// What the CUDA kernels share: a row taken in packs of 16 bytes, reductions over a warp and a block, checked launches.
//
// A span [begin, end) of a row is cut at the addresses that are multiples of 16, wherever the row itself starts:
//
//     address      16        32        48        64
//                   |  begin  |         |   end   |
//                   |    [####|#########|####)    |
//                      head      packs    tail          head and tail are read and written element by element
//
// so any length and any alignment is taken, nothing outside the span is touched, and all packs but the outermost two
// move as one load or store. In memory an element is T; in registers it is always a float.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "softmax.h"

namespace megalm {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kPackBytes = 16;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float(float x) {
    return x;
}
template <>
__device__ inline __half from_float(float x) {
    return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float(float x) {
    return __float2bfloat16_rn(x);
}

// Elements of one pack, as they lie in memory.
template <typename T>
struct alignas(kPackBytes) Pack {
    static constexpr int kSize = kPackBytes / sizeof(T);
    T element[kSize];
};

template <typename T>
__device__ bool is_aligned(const T* address) {
    return reinterpret_cast<std::uintptr_t>(address) % kPackBytes == 0;
}

// A part [begin, end) of one row; within a row 32 bits do, and cost half the registers.
struct Span {
    int begin, end;
};
constexpr std::int64_t kLongestRow = std::int64_t{1} << 30;

// The index of a span's first pack: at or before `begin`, on a multiple of 16 bytes; it may lie before the row.
template <typename T>
__device__ int first_pack(const T* row, int begin) {
    const std::uintptr_t past = reinterpret_cast<std::uintptr_t>(row + begin) % kPackBytes;
    return begin - static_cast<int>(past / sizeof(T));
}

// The pack at index `at`; elements outside the span are left as they are.
template <typename T>
__device__ void load(Pack<T>& pack, const T* row, int at, Span span) {
    if (at >= span.begin && at + Pack<T>::kSize <= span.end && is_aligned(row + at)) {
        *reinterpret_cast<uint4*>(&pack) = *reinterpret_cast<const uint4*>(row + at);
        return;
    }
    if (at >= span.end || at + Pack<T>::kSize <= span.begin) return;
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i)
        if (at + i >= span.begin && at + i < span.end) pack.element[i] = row[at + i];
}

template <typename T>
__device__ void store(const Pack<T>& pack, T* row, int at, Span span) {
    if (at >= span.begin && at + Pack<T>::kSize <= span.end && is_aligned(row + at)) {
        *reinterpret_cast<uint4*>(row + at) = *reinterpret_cast<const uint4*>(&pack);
        return;
    }
    if (at >= span.end || at + Pack<T>::kSize <= span.begin) return;
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i)
        if (at + i >= span.begin && at + i < span.end) row[at + i] = pack.element[i];
}

// Zeros over a span, by `threads` threads of which this is number `thread`.
template <typename T>
__device__ void clear(T* row, Span span, int thread, int threads) {
    Pack<T> zeros;
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) zeros.element[i] = from_float<T>(0.0f);
    for (int at = first_pack(row, span.begin) + thread * Pack<T>::kSize; at < span.end; at += threads * Pack<T>::kSize)
        store(zeros, row, at, span);
}

// What lies outside a row's visible keys, on both sides.
template <typename T>
__device__ void clear_hidden(T* row, Span seen, int keys, int thread, int threads) {
    clear(row, Span{0, seen.begin}, thread, threads);
    clear(row, Span{seen.end, keys}, thread, threads);
}

__device__ inline float warp_max(float x) {
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, other));
    return x;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) x += __shfl_xor_sync(kAllLanes, x, other);
    return x;
}

// A sum over the threads of a block, whole warps all; every thread gets it. A kernel calls it once: a second call would
// need a barrier before it, behind which the values of the first have been read.
template <int THREADS>
__device__ float block_sum(float x) {
    constexpr int kWarps = THREADS / kLanes;
    static_assert(THREADS % kLanes == 0 && kWarps <= kLanes, "one warp adds up what the warps have");
    __shared__ float of_warp[kWarps];
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    x = warp_sum(x);
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    return warp_sum(lane < kWarps ? of_warp[lane] : 0.0f);
}

// Largest value and the sum of exp(value - largest), of values that come one after another (arXiv 1805.02867). A new
// largest value rescales the sum. Where all were -inf, the sum is 0; a NaN makes it NaN.
struct Online {
    float largest = -INFINITY, sum = 0.0f;

    // What exponents are relative to: -inf - -inf would be a NaN.
    __device__ static float base(float largest) { return largest == -INFINITY ? 0.0f : largest; }

    template <int N>
    __device__ void add(const float (&values)[N]) {
        float most = largest;
#pragma unroll
        for (int i = 0; i < N; ++i) most = fmaxf(most, values[i]);
        const float zero = base(most);
        sum *= expf(largest - zero);
#pragma unroll
        for (int i = 0; i < N; ++i) sum += expf(values[i] - zero);
        largest = most;
    }
    __device__ void add(Online other) {
        const float most = fmaxf(largest, other.largest), zero = base(most);
        sum = sum * expf(largest - zero) + other.sum * expf(other.largest - zero);
        largest = most;
    }
};

__device__ inline Online warp_merge(Online x) {
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) {
        Online received;
        received.largest = __shfl_xor_sync(kAllLanes, x.largest, other);
        received.sum = __shfl_xor_sync(kAllLanes, x.sum, other);
        x.add(received);
    }
    return x;
}

// The same of largest values and sums; a kernel calls it once, too.
template <int THREADS>
__device__ Online block_merge(Online x) {
    constexpr int kWarps = THREADS / kLanes;
    static_assert(THREADS % kLanes == 0 && kWarps <= kLanes, "one warp merges what the warps have");
    __shared__ float largest_of_warp[kWarps], sum_of_warp[kWarps];
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    x = warp_merge(x);
    if (lane == 0) {
        largest_of_warp[warp] = x.largest;
        sum_of_warp[warp] = x.sum;
    }
    __syncthreads();
    Online all;
    if (lane < kWarps) {
        all.largest = largest_of_warp[lane];
        all.sum = sum_of_warp[lane];
    }
    return warp_merge(all);
}

// Launches `kernel` and gives the error code of doing so. The launch is CUDA's own function instead of <<<...>>>, so
// that these sources are plain C++, and it cannot be left unchecked.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), std::int64_t blocks_x, std::int64_t blocks_y, dim3 threads,
           std::intptr_t executor, const Arguments&... arguments) {
    if (blocks_x > 0x7fffffff || blocks_y > 0xffff) return cudaErrorInvalidConfiguration;  // or they would be cut short
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
    config.blockDim = threads;
    config.stream = reinterpret_cast<cudaStream_t>(executor);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error != cudaSuccess) cudaGetLastError();  // it is told here, and not once more by whoever launches next
    return error;
}

// Calls `run` with a null pointer of the element type that `dtype` names.
template <typename Run>
int with_type(int dtype, const Run& run) {
    switch (dtype) {
        case FLOAT32:
            return run(static_cast<float*>(nullptr));
        case FLOAT16:
            return run(static_cast<__half*>(nullptr));
        case BFLOAT16:
            return run(static_cast<__nv_bfloat16*>(nullptr));
        default:
            return INVALID;
    }
}

}  // namespace megalm
