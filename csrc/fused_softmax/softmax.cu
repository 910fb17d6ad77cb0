// Scaled masked softmax on a GPU, forward and backward; the formulas are in mask.hpp and softmax.h.
//
// Two ways, by the most keys that a row may see:
//
//     up to 2,048 (float32: 1,024)    one warp a row, which stays in registers: read once, written once. A template for
//                                     each number of packs a lane holds, so that short rows do not pay for registers
//                                     that they do not need.
//     more                            one block a row, of any length: a first pass finds the largest score and the sum,
//                                     a second reads again (from a cache, where the rows in flight fit) and writes.
//
// Keys outside a row's range are never read; their probabilities and gradients are cleared. Each thread writes only
// where it alone has read, after reading, so a result may be the memory of what it is computed from.
#include <algorithm>
#include <type_traits>

#include "rows.cuh"

namespace megalm {
namespace {

constexpr int kMostPacks = 8;  // of a lane: with more, registers would leave a multiprocessor too few warps
constexpr int kWarpRows = 4;   // rows, and warps, of a block
constexpr int kThreads = 256;  // of a block that has one row

// One row: where it is, what it sees, and how raw scores become s.
template <typename T>
struct Row {
    static constexpr int kSize = Pack<T>::kSize;
    std::int64_t offset, head;
    int keys;
    Span seen;
    const std::uint8_t *padding, *allowed;
    float scale, softcap;

    __device__ Row(const Mask& mask, std::int64_t row)
        : offset(row * mask.keys),
          head(mask.head_of(row)),
          keys(static_cast<int>(mask.keys)),
          seen(span_of(mask.visible(row))),
          padding(mask.padding_of(row)),
          allowed(mask.allowed_of(row)),
          scale(mask.scale),
          softcap(mask.softcap) {}

    __device__ static Span span_of(Range range) {  // begin <= end, so that what is hidden is [0, begin) and [end, keys)
        const std::int64_t end = range.end > range.begin ? range.end : range.begin;
        return {static_cast<int>(range.begin), static_cast<int>(end)};
    }
    __device__ bool spans(int key) const { return key >= seen.begin && key < seen.end; }

    // s of the pack at key `at`, -inf where the row does not see. What few rows need is asked once a pack.
    __device__ void load_scores(float (&s)[kSize], const T* row, int at) const {
        Pack<T> pack;
        load(pack, row, at, seen);
#pragma unroll
        for (int i = 0; i < kSize; ++i) s[i] = spans(at + i) ? scale * to_float(pack.element[i]) : -INFINITY;
        if (softcap != 0.0f) {
#pragma unroll
            for (int i = 0; i < kSize; ++i)
                if (spans(at + i)) s[i] = softcap * tanhf(s[i] / softcap);
        }
        hide(s, padding, at);
        hide(s, allowed, at);
    }
    __device__ void hide(float (&s)[kSize], const std::uint8_t* shown, int at) const {
        if (!shown) return;
#pragma unroll
        for (int i = 0; i < kSize; ++i)
            if (spans(at + i) && !shown[at + i]) s[i] = -INFINITY;
    }
};

// The optional results of a row, and how its denominator gives them.
struct Statistics {
    float *lse, *largest, *entropy;

    // With d = s - base: the denominator is `sum` = sum of exp(d), the sink's included, and `weighted` the sum of
    // d exp(d) over the keys; so the entropy, - sum of p log p, is log(sum) - weighted / sum.
    __device__ void write(std::int64_t row, float most, float base, float sum, float weighted, float sink) const {
        if (lse) lse[row] = sum == 0.0f ? -INFINITY : base + logf(sum);
        if (largest) largest[row] = sum == sum || base == INFINITY ? most : sum;  // a NaN, which maxima pass over
        if (!entropy) return;
        if (sink != -INFINITY) weighted += expf(sink - base) * (sink - base);
        entropy[row] = sum == 0.0f ? 0.0f : logf(sum) - weighted / sum;
    }
};

__device__ inline float inverse(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// d exp(d), where 0 times -inf would be a NaN.
__device__ inline float weighted(float exponential, float d) { return exponential == 0.0f ? 0.0f : exponential * d; }

// No sink is one of -inf, whose exponential is 0.
__device__ inline float sink_of(const Mask& mask, std::int64_t head) {
    return mask.sinks ? mask.sinks[head] : -INFINITY;
}

template <typename T, int PACKS>
__global__ void __launch_bounds__(kLanes* kWarpRows)
    warp_forward(Mask mask, const T* scores, T* probabilities, Statistics statistics) {
    constexpr int kSize = Pack<T>::kSize;
    const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kWarpRows + threadIdx.y;
    if (number >= mask.rows()) return;
    const int lane = threadIdx.x;
    const Row<T> row(mask, number);
    const T* from = scores + row.offset;
    T* to = probabilities + row.offset;
    const int first = first_pack(from, row.seen.begin) + lane * kSize;

    float s[PACKS][kSize], largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        row.load_scores(s[i], from, first + i * kLanes * kSize);
#pragma unroll
        for (int j = 0; j < kSize; ++j) largest = fmaxf(largest, s[i][j]);
    }
    largest = warp_max(largest);
    const float sink = sink_of(mask, row.head), base = Online::base(fmaxf(largest, sink));
    float sum = 0.0f, entropy = 0.0f;
#pragma unroll
    for (int i = 0; i < PACKS; ++i)
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
            const float d = s[i][j] - base;
            s[i][j] = expf(d);
            sum += s[i][j];
            entropy += weighted(s[i][j], d);
        }
    sum = warp_sum(sum) + expf(sink - base);

    const float factor = inverse(sum);
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        Pack<T> pack;
#pragma unroll
        for (int j = 0; j < kSize; ++j) pack.element[j] = from_float<T>(s[i][j] * factor);
        store(pack, to, first + i * kLanes * kSize, row.seen);
    }
    clear_hidden(to, row.seen, row.keys, lane, kLanes);
    entropy = warp_sum(entropy);
    if (lane == 0) statistics.write(number, largest, base, sum, entropy, sink);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    block_forward(Mask mask, const T* scores, T* probabilities, Statistics statistics) {
    constexpr int kSize = Pack<T>::kSize;
    const std::int64_t number = blockIdx.x;
    const Row<T> row(mask, number);
    const T* from = scores + row.offset;
    T* to = probabilities + row.offset;
    const int first = first_pack(from, row.seen.begin) + threadIdx.x * kSize;

    Online online;
    for (int at = first; at < row.seen.end; at += kThreads * kSize) {
        float s[kSize];
        row.load_scores(s, from, at);
        online.add(s);
    }
    online = block_merge<kThreads>(online);
    const float sink = sink_of(mask, row.head), base = Online::base(fmaxf(online.largest, sink));
    const float sum = online.sum * expf(online.largest - base) + expf(sink - base);

    float entropy = 0.0f;
    const float factor = inverse(sum);
    for (int at = first; at < row.seen.end; at += kThreads * kSize) {
        Pack<T> pack;
        float s[kSize];
        row.load_scores(s, from, at);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            const float d = s[i] - base, exponential = expf(d);
            entropy += weighted(exponential, d);
            pack.element[i] = from_float<T>(exponential * factor);
        }
        store(pack, to, at, row.seen);
    }
    clear_hidden(to, row.seen, row.keys, threadIdx.x, kThreads);
    if (statistics.entropy) entropy = block_sum<kThreads>(entropy);
    if (threadIdx.x == 0) statistics.write(number, online.largest, base, sum, entropy, sink);
}

// A pack of the gradient of the scores.
template <typename T>
__device__ Pack<T> score_gradients(const Row<T>& row, const Pack<T>& p, const Pack<T>& g, float dot, const T* scores,
                                   int at) {
    constexpr int kSize = Pack<T>::kSize;
    float gradient[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) gradient[i] = row.scale * to_float(p.element[i]) * (to_float(g.element[i]) - dot);
    if (scores) {
        Pack<T> raw;
        load(raw, scores, at, row.seen);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            const float bent = tanhf(row.scale * to_float(raw.element[i]) / row.softcap);
            gradient[i] *= 1.0f - bent * bent;
        }
    }
    Pack<T> result;
#pragma unroll
    for (int i = 0; i < kSize; ++i) result.element[i] = from_float<T>(gradient[i]);
    return result;
}

__device__ inline float sink_gradient(float sink, float lse, float dot) {
    return sink == -INFINITY ? 0.0f : -expf(sink - lse) * dot;
}

// A pack's part of the dot product, of the keys in the row's range.
template <typename T>
__device__ float dot_of(const Row<T>& row, const Pack<T>& p, const Pack<T>& g, int at) {
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i)
        if (row.spans(at + i)) dot += to_float(p.element[i]) * to_float(g.element[i]);
    return dot;
}

template <typename T>
struct Gradients {
    const T *of_probabilities, *probabilities, *scores;
    const float* lse;
    T* of_scores;
    float* of_sink;
};

template <typename T, int PACKS>
__global__ void __launch_bounds__(kLanes* kWarpRows) warp_backward(Mask mask, Gradients<T> gradients) {
    constexpr int kSize = Pack<T>::kSize;
    const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kWarpRows + threadIdx.y;
    if (number >= mask.rows()) return;
    const int lane = threadIdx.x;
    const Row<T> row(mask, number);
    const T* probabilities = gradients.probabilities + row.offset;
    const T* scores = gradients.scores ? gradients.scores + row.offset : nullptr;
    T* to = gradients.of_scores + row.offset;
    const int first = first_pack(probabilities, row.seen.begin) + lane * kSize;

    Pack<T> p[PACKS], g[PACKS];  // as they lie in memory: floats would be twice as many registers
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        const int at = first + i * kLanes * kSize;
        load(p[i], probabilities, at, row.seen);
        load(g[i], gradients.of_probabilities + row.offset, at, row.seen);
        dot += dot_of(row, p[i], g[i], at);
    }
    dot = warp_sum(dot);
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        const int at = first + i * kLanes * kSize;
        if (at < row.seen.end) store(score_gradients(row, p[i], g[i], dot, scores, at), to, at, row.seen);
    }
    clear_hidden(to, row.seen, row.keys, lane, kLanes);
    if (lane == 0 && gradients.of_sink)
        gradients.of_sink[number] = sink_gradient(sink_of(mask, row.head), gradients.lse[number], dot);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) block_backward(Mask mask, Gradients<T> gradients) {
    constexpr int kSize = Pack<T>::kSize;
    const std::int64_t number = blockIdx.x;
    const Row<T> row(mask, number);
    const T* probabilities = gradients.probabilities + row.offset;
    const T* of_probabilities = gradients.of_probabilities + row.offset;
    const T* scores = gradients.scores ? gradients.scores + row.offset : nullptr;
    T* to = gradients.of_scores + row.offset;
    const int first = first_pack(probabilities, row.seen.begin) + threadIdx.x * kSize;

    Pack<T> p, g;
    float dot = 0.0f;
    for (int at = first; at < row.seen.end; at += kThreads * kSize) {
        load(p, probabilities, at, row.seen);
        load(g, of_probabilities, at, row.seen);
        dot += dot_of(row, p, g, at);
    }
    dot = block_sum<kThreads>(dot);
    for (int at = first; at < row.seen.end; at += kThreads * kSize) {
        load(p, probabilities, at, row.seen);
        load(g, of_probabilities, at, row.seen);
        store(score_gradients(row, p, g, dot, scores, at), to, at, row.seen);
    }
    clear_hidden(to, row.seen, row.keys, threadIdx.x, kThreads);
    if (threadIdx.x == 0 && gradients.of_sink)
        gradients.of_sink[number] = sink_gradient(sink_of(mask, row.head), gradients.lse[number], dot);
}

// Packs that a lane of a warp needs for any row, a power of two; 0 where that is more than a warp should hold. A row
// that starts within a pack needs one more than its length tells; where all start at one, none needs more than a whole.
template <typename T>
int packs_a_lane(const Mask& mask, const void* rows) {
    constexpr int kSize = Pack<T>::kSize;
    const bool all_aligned = reinterpret_cast<std::uintptr_t>(rows) % kPackBytes == 0 && mask.keys % kSize == 0;
    const std::int64_t seen = (mask.window ? std::min(mask.window, mask.keys) : mask.keys) + kSize - 1;
    const std::int64_t elements = all_aligned ? std::min(seen, mask.keys) : seen;
    int packs = 1;
    while (packs <= kMostPacks && packs * kLanes * kSize < elements) packs *= 2;
    return packs <= kMostPacks ? packs : 0;
}

// Launches a kernel for every row: one of `of_warp`, for 1, 2, 4 or 8 packs a lane, or `of_block` for 0.
template <typename Kernel, typename... Arguments>
int launch_rows(int packs, const Kernel (&of_warp)[4], Kernel of_block, const Mask& mask, std::intptr_t executor,
                const Arguments&... arguments) {
    const std::int64_t rows = mask.rows();
    if (mask.keys > kLongestRow) return INVALID;
    if (rows == 0) return cudaSuccess;
    if (packs == 0) return launch(of_block, rows, 1, dim3(kThreads), executor, mask, arguments...);
    int power = 0;
    while (1 << power < packs) ++power;
    const std::int64_t blocks = (rows + kWarpRows - 1) / kWarpRows;
    return launch(of_warp[power], blocks, 1, dim3(kLanes, kWarpRows), executor, mask, arguments...);
}

template <typename T>
int forward(const Mask& mask, const void* scores, void* probabilities, Statistics statistics, std::intptr_t executor) {
    using Kernel = void (*)(Mask, const T*, T*, Statistics);
    constexpr Kernel kOfWarp[] = {warp_forward<T, 1>, warp_forward<T, 2>, warp_forward<T, 4>,
                                  warp_forward<T, kMostPacks>};
    return launch_rows(packs_a_lane<T>(mask, scores), kOfWarp, &block_forward<T>, mask, executor,
                       static_cast<const T*>(scores), static_cast<T*>(probabilities), statistics);
}

template <typename T>
int backward(const Mask& mask, const Gradients<T>& gradients, std::intptr_t executor) {
    using Kernel = void (*)(Mask, Gradients<T>);
    constexpr Kernel kOfWarp[] = {warp_backward<T, 1>, warp_backward<T, 2>, warp_backward<T, 4>,
                                  warp_backward<T, kMostPacks>};
    return launch_rows(packs_a_lane<T>(mask, gradients.probabilities), kOfWarp, &block_backward<T>, mask, executor,
                       gradients);
}

}  // namespace
}  // namespace megalm

std::int64_t megalm_mask_bytes() { return sizeof(megalm::Mask); }

int megalm_kernel_image() {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, megalm::block_forward<float>);
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

int megalm_softmax_forward(const megalm::Mask* mask, int dtype, const void* scores, void* probabilities, float* lse,
                           float* largest, float* entropy, std::intptr_t executor) {
    return megalm::with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return megalm::forward<T>(*mask, scores, probabilities, {lse, largest, entropy}, executor);
    });
}

int megalm_softmax_backward(const megalm::Mask* mask, int dtype, const void* grad_probabilities,
                            const void* probabilities, const void* scores, const float* lse, void* grad_scores,
                            float* grad_sink, std::intptr_t executor) {
    return megalm::with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const megalm::Gradients<T> gradients{static_cast<const T*>(grad_probabilities),
                                             static_cast<const T*>(probabilities),
                                             mask->softcap != 0.0f ? static_cast<const T*>(scores) : nullptr,
                                             lse,
                                             static_cast<T*>(grad_scores),
                                             mask->sinks ? grad_sink : nullptr};
        return megalm::backward<T>(*mask, gradients, executor);
    });
}
