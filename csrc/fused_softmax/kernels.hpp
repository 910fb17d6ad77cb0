// The row kernels of one instruction set, behind function pointers: `library.cpp` takes the best that the machine has.
//
// Each computes the rows [first, last) of a call. `scratch` is one thread's own memory, 64-byte aligned, of
// `scratch_floats` float32.
#pragma once
#include <cstdint>

#include "softmax.h"

namespace megalm {

constexpr std::int64_t COLUMNS = 2048;  // logits that are looked at together: twice 8 KiB, which the first cache holds

struct SoftmaxForward {
    const Mask& mask;
    const void* scores;
    void* probabilities;
    float *lse, *largest, *entropy;
    std::int64_t scratch_floats() const { return mask.keys; }
};

struct SoftmaxBackward {
    const Mask& mask;
    const void *grad_probabilities, *probabilities, *scores;
    const float* lse;
    void* grad_scores;
    float* grad_sink;
    std::int64_t scratch_floats() const { return 0; }
};

struct CrossEntropyStatistics {
    std::int64_t columns;
    const void* logits;
    const std::int64_t* targets;
    float softcap;
    float *largest, *exponentials, *target, *sum;
    std::int64_t scratch_floats() const { return COLUMNS; }
};

struct CrossEntropyBackward {
    std::int64_t columns;
    const void* logits;
    const std::int64_t* targets;
    const float *lse, *weight;
    float softcap, z_loss, hit, spread;
    void* grad_logits;
    std::int64_t scratch_floats() const { return 0; }
};

template <class Call>
using Kernel = void (*)(const Call& call, std::int64_t first, std::int64_t last, float* scratch);

// Indexed by Dtype.
struct Kernels {
    const char* name;
    Kernel<SoftmaxForward> softmax_forward[3];
    Kernel<SoftmaxBackward> softmax_backward[3];
    Kernel<CrossEntropyStatistics> statistics[3];
    Kernel<CrossEntropyBackward> cross_entropy_backward[3];
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif

}  // namespace megalm
