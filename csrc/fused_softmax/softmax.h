// What the CPU and the CUDA library both export, with the same names and meanings: raw pointers, sizes and an executor.
//
// Tensors lie contiguously in the executor's memory; `Mask` itself is read on the host during the call. Elements are of
// `dtype`, all arithmetic and all per-row results are float32. An executor is a cudaStream_t, or on the CPU the number
// of threads to use. Every function returns 0, or an error code (CUDA's, or INVALID for what no kernel takes).
#pragma once
#include <cstdint>

#include "mask.hpp"

#define MEGALM_EXPORT extern "C" __attribute__((visibility("default")))

namespace megalm {
enum Dtype : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
enum : int { INVALID = -1 };
}  // namespace megalm

// The size of `Mask`, by which who fills it in knows that both mean the same fields.
MEGALM_EXPORT std::int64_t megalm_mask_bytes();

// In CUDA alone: 0 if the kernels were built for the GPU at hand, else CUDA's code.
MEGALM_EXPORT int megalm_kernel_image();

// probabilities = masked softmax of scores, both [rows, keys]; they may be the same memory. Optional results, [rows]
// each, or null: `lse` = log of the denominator (-inf for a row without any term), `largest` = largest visible s (-inf
// if there is none), `entropy` = - sum of p log p, the sink's share included (0 for a row without any term).
MEGALM_EXPORT int megalm_softmax_forward(const megalm::Mask* mask, int dtype, const void* scores, void* probabilities,
                                         float* lse, float* largest, float* entropy, std::intptr_t executor);

// With g = grad_probabilities and dot = sum over k of p[k] g[k]:
//
//     grad_scores[k] = scale * p[k] * (g[k] - dot) * slope,   slope = 1 - (s[k] / softcap)^2, or 1 without a soft-cap
//     grad_sink[row] = - exp(sinks[head] - lse[row]) * dot    (to be summed over the rows of a head)
//
// `grad_scores` may be the memory of `grad_probabilities`, and is written whole: 0 where nothing is visible. `scores`
// is read with a soft-cap only (else null); `lse` and `grad_sink` with sinks only (else null).
MEGALM_EXPORT int megalm_softmax_backward(const megalm::Mask* mask, int dtype, const void* grad_probabilities,
                                          const void* probabilities, const void* scores, const float* lse,
                                          void* grad_scores, float* grad_sink, std::intptr_t executor);

// Statistics of logits [rows, columns] in one pass, [rows] each: the largest z, the sum of exp(z - largest), the
// target's z (0 where `targets` is outside [0, columns)), and the sum of all z unless `sum` is null; z is the logit, or
// softcap * tanh(logit / softcap) where softcap is not 0.
MEGALM_EXPORT int megalm_cross_entropy_statistics(std::int64_t rows, std::int64_t columns, int dtype,
                                                  const void* logits, const std::int64_t* targets, float softcap,
                                                  float* largest, float* exponentials, float* target, float* sum,
                                                  std::intptr_t executor);

// grad_logits = weight[row] * (exp(z - lse[row]) * (1 + 2 z_loss lse[row]) - hit * (column is target) - spread) * slope,
// which may be the memory of `logits`. `lse` is over the whole vocabulary, of which these columns may be a part; rows
// of weight 0 become zeros whatever their logits are. With label smoothing e over V words: hit = 1 - e, spread = e / V.
MEGALM_EXPORT int megalm_cross_entropy_backward(std::int64_t rows, std::int64_t columns, int dtype, const void* logits,
                                                const std::int64_t* targets, const float* lse, const float* weight,
                                                float softcap, float z_loss, float hit, float spread,
                                                void* grad_logits, std::intptr_t executor);
