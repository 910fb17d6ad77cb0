// The CPU's side of softmax.h: takes the kernels of the best instruction set, and shares the rows between threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "../threads/fan_out.hpp"
#include "kernels.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace megalm {
namespace {

constexpr std::int64_t PIECE = 1 << 15;  // elements a thread takes at a time: some microseconds
constexpr std::int64_t PADDING = 64;     // floats: a vector's tail, and the alignment

// The best that the machine has, and that ATEN_CPU_CAPABILITY, which limits torch's own kernels, too, allows.
const Kernels& kernels() {
#if defined(__x86_64__)
    static const Kernels& best = []() -> const Kernels& {
        const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
        const bool old = limit && !std::strcmp(limit, "default"), avx2 = limit && !std::strcmp(limit, "avx2");
        unsigned a, b, c = 0, d;  // not every compiler's __builtin_cpu_supports knows F16C
        const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
        if (old || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !f16c) return portable_kernels;
        if (avx2 || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
            !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
            return avx2_kernels;
        return avx512_kernels;
    }();
    return best;
#else
    return portable_kernels;
#endif
}

// Rows in pieces of `height`: whichever thread is free takes the next, so these may differ in work.
template <class Call>
struct Work {
    Kernel<Call> kernel;
    const Call& call;
    std::int64_t rows, height;
    std::atomic<std::int64_t> next{0};

    static void run(void* self) {
        auto& work = *static_cast<Work*>(self);
        const std::unique_ptr<float[]> memory(new (std::nothrow) float[work.call.scratch_floats() + PADDING]);
        if (!memory) return;  // threads that have some do all of the work
        const auto address = reinterpret_cast<std::uintptr_t>(memory.get());
        float* scratch = memory.get() + (64 - address % 64) % 64 / sizeof(float);
        for (std::int64_t first; (first = work.next.fetch_add(work.height, std::memory_order_relaxed)) < work.rows;)
            work.kernel(work.call, first, std::min(work.rows, first + work.height), scratch);
    }
};

template <class Call>
int run(Kernel<Call> kernel, const Call& call, std::int64_t rows, std::int64_t columns, std::intptr_t threads) {
    const std::int64_t height = std::max<std::int64_t>(1, PIECE / std::max<std::int64_t>(1, columns));
    Work<Call> work{kernel, call, rows, height};
    fan_out(static_cast<unsigned>(std::min<std::int64_t>((rows + height - 1) / height, threads)), Work<Call>::run, &work);
    return work.next < rows ? INVALID : 0;
}

bool is_known(int dtype) { return dtype == FLOAT32 || dtype == FLOAT16 || dtype == BFLOAT16; }

}  // namespace
}  // namespace megalm

using namespace megalm;

MEGALM_EXPORT const char* megalm_instruction_set() { return kernels().name; }

std::int64_t megalm_mask_bytes() { return sizeof(Mask); }

int megalm_softmax_forward(const Mask* mask, int dtype, const void* scores, void* probabilities, float* lse,
                           float* largest, float* entropy, std::intptr_t executor) {
    if (!is_known(dtype)) return INVALID;
    const SoftmaxForward call{*mask, scores, probabilities, lse, largest, entropy};
    return run(kernels().softmax_forward[dtype], call, mask->rows(), mask->keys, executor);
}

int megalm_softmax_backward(const Mask* mask, int dtype, const void* grad_probabilities, const void* probabilities,
                            const void* scores, const float* lse, void* grad_scores, float* grad_sink,
                            std::intptr_t executor) {
    if (!is_known(dtype) || (mask->softcap != 0 && !scores) || (grad_sink && !(lse && mask->sinks))) return INVALID;
    const SoftmaxBackward call{*mask, grad_probabilities, probabilities, scores, lse, grad_scores, grad_sink};
    return run(kernels().softmax_backward[dtype], call, mask->rows(), mask->keys, executor);
}

int megalm_cross_entropy_statistics(std::int64_t rows, std::int64_t columns, int dtype, const void* logits,
                                    const std::int64_t* targets, float softcap, float* largest, float* exponentials,
                                    float* target, float* sum, std::intptr_t executor) {
    if (!is_known(dtype)) return INVALID;
    const CrossEntropyStatistics call{columns, logits, targets, softcap, largest, exponentials, target, sum};
    return run(kernels().statistics[dtype], call, rows, columns, executor);
}

int megalm_cross_entropy_backward(std::int64_t rows, std::int64_t columns, int dtype, const void* logits,
                                  const std::int64_t* targets, const float* lse, const float* weight, float softcap,
                                  float z_loss, float hit, float spread, void* grad_logits, std::intptr_t executor) {
    if (!is_known(dtype)) return INVALID;
    const CrossEntropyBackward call{columns, logits, targets, lse, weight, softcap, z_loss, hit, spread, grad_logits};
    return run(kernels().cross_entropy_backward[dtype], call, rows, columns, executor);
}
