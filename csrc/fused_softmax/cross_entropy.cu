// Softmax cross-entropy on a GPU: statistics of the logits in one pass, and the gradient over them; the formulas are in
// softmax.h.
//
// A vocabulary is long, so one block has a row. The gradient needs nothing of its neighbours: a row is cut into pieces
// besides, so that few tokens with a large vocabulary still fill the machine.
#include <type_traits>

#include "rows.cuh"

namespace megalm {
namespace {

constexpr int kStatisticsThreads = 512;
constexpr int kGradientThreads = 256;
constexpr int kPacks = 4;  // that a thread of the gradient has

struct Statistics {
    float *largest, *exponentials, *target, *sum;
};

struct Gradient {
    const std::int64_t* targets;
    const float *lse, *weight;
    float softcap, z_loss, hit, spread;
};

__device__ inline float capped(float logit, float softcap) {
    return softcap != 0.0f ? softcap * tanhf(logit / softcap) : logit;
}

template <typename T>
__global__ void __launch_bounds__(kStatisticsThreads)
    row_statistics(int columns, const T* logits, const std::int64_t* targets, float softcap, Statistics to) {
    constexpr int kSize = Pack<T>::kSize;
    const std::int64_t row = blockIdx.x;
    const T* from = logits + row * columns;
    const Span all{0, columns};
    Online online;
    float sum = 0.0f;
    for (int at = first_pack(from, 0) + threadIdx.x * kSize; at < columns; at += kStatisticsThreads * kSize) {
        Pack<T> pack;
        load(pack, from, at, all);
        float z[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            const bool is_inside = at + i >= 0 && at + i < columns;
            z[i] = is_inside ? capped(to_float(pack.element[i]), softcap) : -INFINITY;
            if (is_inside) sum += z[i];
        }
        online.add(z);
    }
    online = block_merge<kStatisticsThreads>(online);
    if (to.sum) sum = block_sum<kStatisticsThreads>(sum);
    if (threadIdx.x != 0) return;
    to.largest[row] = online.largest;
    to.exponentials[row] = online.sum;
    const std::int64_t target = targets[row];
    to.target[row] = target >= 0 && target < columns ? capped(to_float(from[target]), softcap) : 0.0f;
    if (to.sum) to.sum[row] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kGradientThreads)
    logit_gradients(int columns, const T* logits, Gradient given, T* grad_logits) {
    constexpr int kSize = Pack<T>::kSize;
    const std::int64_t row = blockIdx.x, target = given.targets[row];
    const T* from = logits + row * columns;
    T* to = grad_logits + row * columns;
    const Span all{0, columns};
    const float weight = given.weight[row], lse = given.lse[row], factor = 1.0f + 2.0f * given.z_loss * lse;
    const int first = first_pack(from, 0) + (blockIdx.y * kPacks * kGradientThreads + threadIdx.x) * kSize;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int at = first + i * kGradientThreads * kSize;
        if (at >= columns) return;
        Pack<T> pack;
        load(pack, from, at, all);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
            const float z = capped(to_float(pack.element[j]), given.softcap);
            const float bent = given.softcap != 0.0f ? z / given.softcap : 0.0f;
            const float hit = at + j == target ? given.hit : 0.0f;
            const float gradient = weight * (expf(z - lse) * factor - hit - given.spread) * (1.0f - bent * bent);
            pack.element[j] = from_float<T>(weight == 0.0f ? 0.0f : gradient);
        }
        store(pack, to, at, all);
    }
}

}  // namespace
}  // namespace megalm

int megalm_cross_entropy_statistics(std::int64_t rows, std::int64_t columns, int dtype, const void* logits,
                                    const std::int64_t* targets, float softcap, float* largest, float* exponentials,
                                    float* target, float* sum, std::intptr_t executor) {
    return megalm::with_type(dtype, [&](auto* type) -> int {
        using T = std::remove_pointer_t<decltype(type)>;
        if (columns > megalm::kLongestRow) return megalm::INVALID;
        if (rows == 0) return cudaSuccess;
        const megalm::Statistics to{largest, exponentials, target, sum};
        return megalm::launch(&megalm::row_statistics<T>, rows, 1, dim3(megalm::kStatisticsThreads), executor,
                              static_cast<int>(columns), static_cast<const T*>(logits), targets, softcap, to);
    });
}

int megalm_cross_entropy_backward(std::int64_t rows, std::int64_t columns, int dtype, const void* logits,
                                  const std::int64_t* targets, const float* lse, const float* weight, float softcap,
                                  float z_loss, float hit, float spread, void* grad_logits, std::intptr_t executor) {
    return megalm::with_type(dtype, [&](auto* type) -> int {
        using T = std::remove_pointer_t<decltype(type)>;
        if (columns > megalm::kLongestRow) return megalm::INVALID;
        if (rows == 0 || columns == 0) return cudaSuccess;
        constexpr int kSize = megalm::Pack<T>::kSize, kPiece = megalm::kPacks * megalm::kGradientThreads * kSize;
        const std::int64_t elements = columns + kSize - 1;  // a row may start within a pack
        const megalm::Gradient given{targets, lse, weight, softcap, z_loss, hit, spread};
        return megalm::launch(&megalm::logit_gradients<T>, rows, (elements + kPiece - 1) / kPiece,
                              dim3(megalm::kGradientThreads), executor, static_cast<int>(columns),
                              static_cast<const T*>(logits), given, static_cast<T*>(grad_logits));
    });
}
