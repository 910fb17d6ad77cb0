// Causal grouped-query attention within documents, forward and backward, on token-major tensors.
//
//     q, out, grad_q, grad_out: [tokens, heads, head_dim]      k, v, grad_k, grad_v: [tokens, kv_heads, head_dim]
//     lse2: float32 [2, heads, tokens], of each row the largest score (without a soft-cap: as q k, not scaled yet) and
//           log2 of the sum of exponentials relative to it; in one number, a large score would leave the sum no digits
//
// Token i of a segment sees its tokens j with 0 <= i - j < window. Blocks of keys go past blocks of queries with the
// softmax's maximum and sum kept up to date (FlashAttention, arXiv 2205.14135 and 2307.08691); the backward pass
// computes the probabilities again. How the blocks are cut up is in blocks.hpp, the arithmetic in one file a matrix
// unit: avx512.cpp (float32), avx512_bf16.cpp and amx.cpp (bfloat16).

#pragma once

#include <cstdint>

namespace megalm::attention {

struct Segment {
    std::int64_t start;  // its first token
    int length;
};

struct Call {
    const Segment* segments;  // none of them empty
    std::int64_t segment_count;
    int longest;
    std::int64_t tokens;
    int heads, kv_heads, head_dim;
    int window;     // tokens that a token sees, itself included
    float softcap;  // 0: none
    int threads;
    const void *q, *k, *v;
    void* out;    // written by forward, read by backward
    float* lse2;  // likewise
    const void* grad_out;
    void *grad_q, *grad_k, *grad_v;
};

// Each defined in the file of its name; to be called where the processor has the instructions.
namespace avx512 {
void forward(const Call& call);
void backward(const Call& call);
}  // namespace avx512
namespace avx512_bf16 {
void forward(const Call& call);
void backward(const Call& call);
}  // namespace avx512_bf16
namespace amx {
void forward(const Call& call);
void backward(const Call& call);
}  // namespace amx

}  // namespace megalm::attention
