// Which keys a query sees, and what its scores become: shared by the CPU and the CUDA kernels.
//
// Scores are rows of `keys` elements, one for each (batch, head, query), contiguous in this order. A row's visible keys
// are a range [begin, end), found by arithmetic alone, so that what lies outside is never read:
//
//     causal        key <= query + keys - queries           (the last query stands at the last key)
//     window        key >  query + keys - queries - window
//     first_key     key >= first_key[batch, query]          (the first token of the query's document)
//
// and inside it `padding` and `allowed`, where given, take single keys away. With s = scale * score, or
// softcap * tanh(scale * score / softcap), a row of probabilities is
//
//     p[k] = exp(s[k]) / (exp(sinks[head]) + sum over visible j of exp(s[j]))     (without sinks: no first term)
//
// and 0 where k is not visible; a row that sees nothing is all zeros.
#pragma once
#include <cstdint>

#if defined(__CUDACC__) || defined(MEGALM_CUDA_EMULATION)
#define MEGALM_HOST_DEVICE __host__ __device__
#else
#define MEGALM_HOST_DEVICE
#endif

namespace megalm {

struct Range {
    std::int64_t begin, end;  // empty where end <= begin; both within [0, keys]
};

// Plain data: Python fills it in through ctypes, so the order of the fields is part of the interface.
struct Mask {
    std::int64_t batch, heads, queries, keys;
    const std::int32_t* first_key;  // [batch, queries], or null: 0
    const std::uint8_t* padding;    // [batch, keys], 0 where there is no key; or null
    const std::uint8_t* allowed;    // 0 where a query may not see a key; or null. Its keys are neighbours;
    std::int64_t allowed_batch, allowed_head, allowed_query;  // strides of its other dims, 0 where it is broadcast
    const float* sinks;   // [heads], or null
    std::int64_t window;  // keys that a query sees at most, its own included; 0: all
    std::int32_t causal;  // 0 or 1
    float scale;
    float softcap;  // 0: none

    MEGALM_HOST_DEVICE std::int64_t rows() const { return batch * heads * queries; }
    MEGALM_HOST_DEVICE std::int64_t head_of(std::int64_t row) const { return row / queries % heads; }

    MEGALM_HOST_DEVICE Range visible(std::int64_t row) const {
        const std::int64_t query = row % queries, key = query + keys - queries;  // the key that the query stands at
        Range range{0, keys};
        if (causal && key + 1 < range.end) range.end = key + 1 < 0 ? 0 : key + 1;
        if (window && key >= window) range.begin = key - window + 1;
        if (first_key) {
            const std::int64_t first = first_key[row / (heads * queries) * queries + query];
            if (first > range.begin) range.begin = first;
        }
        if (range.begin > keys) range.begin = keys;
        return range;
    }

    // The row's bytes of the two masks, indexed by key; null where there is no such mask.
    MEGALM_HOST_DEVICE const std::uint8_t* padding_of(std::int64_t row) const {
        return padding ? padding + row / (heads * queries) * keys : nullptr;
    }
    MEGALM_HOST_DEVICE const std::uint8_t* allowed_of(std::int64_t row) const {
        return allowed ? allowed + row / (heads * queries) * allowed_batch + head_of(row) * allowed_head +
                             row % queries * allowed_query
                       : nullptr;
    }
};

}  // namespace megalm
