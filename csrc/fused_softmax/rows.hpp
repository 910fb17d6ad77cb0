// The row kernels, written once. An instruction set's file defines WIDTH and includes this inside of its namespace;
// `softmax.h` says what each computes. A row goes through float32 scratch memory of its own length, which stays in the
// caches, so that each element is read once, written once and rounded once.

#include "lanes.hpp"

constexpr float NOTHING = -__builtin_inff();

// body(i, count) for each vector of n elements: all are whole (count == WIDTH) but perhaps the last.
template <class Body>
INLINE void each(std::int64_t n, Body body) {
    std::int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) body(i, std::int64_t{WIDTH});
    if (i < n) body(i, n - i);
}
#define BODY(i, count) [&](std::int64_t i, std::int64_t count) __attribute__((always_inline))

template <class T>
INLINE void clear(T* row, std::int64_t begin, std::int64_t end) {
    if (end > begin) __builtin_memset(row + begin, 0, (end - begin) * sizeof(T));
}

// The lanes from `count` on replaced.
INLINE Lanes only(Lanes x, std::int64_t count, float rest) {
    if (count < WIDTH)
        for (std::int64_t i = count; i < WIDTH; i++) x[i] = rest;
    return x;
}

// s = scale * score, soft-capped and masked, into `out`; gives the largest. Lanes beyond `n` become -infinity, too.
template <bool CAPPED, bool MASKED, class T>
INLINE float scaled(const Mask& mask, const T* scores, std::int64_t n, const std::uint8_t* padding,
                    const std::uint8_t* allowed, float* out) {
    Lanes largest = all(NOTHING);
    const float inverse = CAPPED ? mask.scale / mask.softcap : 0;
    each(n, BODY(i, count) {
        Lanes s = load(scores + i, count);
        s = CAPPED ? mask.softcap * tanh(s * inverse) : s * mask.scale;
        if (MASKED && padding) s = kept(padding + i, count) ? s : all(NOTHING);
        if (MASKED && allowed) s = kept(allowed + i, count) ? s : all(NOTHING);
        s = only(s, count, NOTHING);
        largest = larger(s, largest);
        write(out + i, s, WIDTH);
    });
    return largest_of(largest);
}

// NaN if there is one among the first n of `s`, else -infinity. Vectors' maxima pass over a NaN, so that a row of
// nothing else seems to be hidden.
INLINE float nan_or_nothing(const float* s, std::int64_t n) {
    for (std::int64_t i = 0; i < n; i++)
        if (s[i] != s[i]) return s[i];
    return NOTHING;
}

template <class T>
void softmax_forward(const SoftmaxForward& call, std::int64_t first, std::int64_t last, float* scratch) {
    const Mask& mask = call.mask;
    for (std::int64_t row = first; row < last; row++) {
        const Range range = mask.visible(row);
        const std::int64_t n = range.end > range.begin ? range.end - range.begin : 0;
        T* probabilities = (T*)call.probabilities + row * mask.keys;
        float largest = NOTHING;
        if (n) {
            const T* scores = (const T*)call.scores + row * mask.keys + range.begin;
            const std::uint8_t *padding = mask.padding_of(row), *allowed = mask.allowed_of(row);
            if (padding) padding += range.begin;
            if (allowed) allowed += range.begin;
            const auto prepare = mask.softcap != 0 ? padding || allowed ? scaled<true, true, T> : scaled<true, false, T>
                                 : padding || allowed ? scaled<false, true, T>
                                                      : scaled<false, false, T>;
            largest = prepare(mask, scores, n, padding, allowed, scratch);
            if (largest == NOTHING) largest = nan_or_nothing(scratch, n);
        }
        const float sink = mask.sinks ? mask.sinks[mask.head_of(row)] : NOTHING;
        const float top = sink > largest ? sink : largest;  // NaN stays
        float sum = 0, lse = NOTHING, entropy = 0;
        if (top == NOTHING) {
            clear(probabilities, 0, mask.keys);
        } else {
            Lanes sums{}, weighted{};  // of e^(s - top), and of it times (s - top)
            if (call.entropy)
                each(n, BODY(i, count) {
                    // 0 * -infinity, as a tail's lanes are, would be NaN; what is NaN already stays.
                    const Lanes d = read<Lanes>(scratch + i, WIDTH) - top;
                    const Lanes x = d < -100.0f ? all(-100.0f) : d, e = exp(x);
                    sums += e, weighted += e * x;
                    write(scratch + i, e, WIDTH);
                    (void)count;
                });
            else
                each(n, BODY(i, count) {
                    const Lanes e = exp(read<Lanes>(scratch + i, WIDTH) - top);
                    sums += e;
                    write(scratch + i, e, WIDTH);
                    (void)count;
                });
            const float sink_share = mask.sinks ? exp(all(sink - top))[0] : 0;
            sum = sum_of(sums) + sink_share;
            if (sum != sum && top < __builtin_inff()) largest = sum;  // a NaN, which maxima pass over
            const float inverse = 1 / sum, log_sum = __builtin_logf(sum);
            lse = top + log_sum;
            entropy = log_sum - (sum_of(weighted) + (sink_share > 0 ? sink_share * (sink - top) : 0)) * inverse;
            clear(probabilities, 0, n ? range.begin : mask.keys);
            T* out = probabilities + range.begin;
            each(n, BODY(i, count) { store(out + i, read<Lanes>(scratch + i, WIDTH) * inverse, count); });
            if (n) clear(probabilities, range.end, mask.keys);
        }
        if (call.lse) call.lse[row] = lse;
        if (call.largest) call.largest[row] = largest;
        if (call.entropy) call.entropy[row] = entropy;
    }
}

template <class T>
void softmax_backward(const SoftmaxBackward& call, std::int64_t first, std::int64_t last, float*) {
    const Mask& mask = call.mask;
    const float inverse = mask.softcap != 0 ? mask.scale / mask.softcap : 0;
    for (std::int64_t row = first; row < last; row++) {
        const Range range = mask.visible(row);
        const std::int64_t n = range.end > range.begin ? range.end - range.begin : 0, start = row * mask.keys;
        const T* g = (const T*)call.grad_probabilities + start + range.begin;
        const T* p = (const T*)call.probabilities + start + range.begin;
        T *whole = (T*)call.grad_scores + start, *out = whole + range.begin;
        Lanes dots{};
        each(n, BODY(i, count) { dots += load(p + i, count) * load(g + i, count); });
        const float dot = sum_of(dots);
        if (mask.softcap != 0) {
            const T* scores = (const T*)call.scores + start + range.begin;
            each(n, BODY(i, count) {
                const Lanes bent = tanh(load(scores + i, count) * inverse), slope = 1 - bent * bent;
                store(out + i, mask.scale * load(p + i, count) * (load(g + i, count) - dot) * slope, count);
            });
        } else {
            each(n, BODY(i, count) {
                store(out + i, mask.scale * load(p + i, count) * (load(g + i, count) - dot), count);
            });
        }
        clear(whole, 0, n ? range.begin : mask.keys);
        if (n) clear(whole, range.end, mask.keys);
        if (call.grad_sink) {
            const float sink = mask.sinks[mask.head_of(row)];
            // A row without any term has lse = -infinity, and no gradient.
            call.grad_sink[row] = dot == 0 ? 0 : -exp(all(sink - call.lse[row]))[0] * dot;
        }
    }
}

template <class T>
void statistics(const CrossEntropyStatistics& call, std::int64_t first, std::int64_t last, float* scratch) {
    const float inverse = call.softcap != 0 ? 1 / call.softcap : 0;
    for (std::int64_t row = first; row < last; row++) {
        const T* logits = (const T*)call.logits + row * call.columns;
        const std::int64_t column = call.targets[row];
        float top = NOTHING, target = 0;
        Lanes exponentials{}, sums{};
        for (std::int64_t begin = 0; begin < call.columns; begin += COLUMNS) {
            const std::int64_t n = call.columns - begin < COLUMNS ? call.columns - begin : COLUMNS;
            Lanes largest = all(NOTHING);
            each(n, BODY(i, count) {
                Lanes z = load(logits + begin + i, count);
                if (call.softcap != 0) z = call.softcap * tanh(z * inverse);
                sums += z;  // a tail's lanes are 0
                z = only(z, count, NOTHING);
                largest = larger(z, largest);
                write(scratch + i, z, WIDTH);
            });
            if (begin <= column && column < begin + n) target = scratch[column - begin];
            const float higher = largest_of(largest);
            if (higher > top || higher != higher) {
                if (top != NOTHING) exponentials *= exp(all(top - higher));
                top = higher;
            }
            if (top == NOTHING) continue;
            each(n, BODY(i, count) {
                exponentials += exp(read<Lanes>(scratch + i, WIDTH) - top);
                (void)count;
            });
        }
        const float sum = sum_of(sums);  // NaN as soon as a logit is, also where the chunk's maximum passed over it
        call.largest[row] = top, call.exponentials[row] = sum != sum ? sum : sum_of(exponentials);
        call.target[row] = target;
        if (call.sum) call.sum[row] = sum;
    }
}

template <class T>
void cross_entropy_backward(const CrossEntropyBackward& call, std::int64_t first, std::int64_t last, float*) {
    const float inverse = call.softcap != 0 ? 1 / call.softcap : 0;
    for (std::int64_t row = first; row < last; row++) {
        const T* logits = (const T*)call.logits + row * call.columns;
        T* out = (T*)call.grad_logits + row * call.columns;
        const float weight = call.weight[row], lse = call.lse[row];
        if (weight == 0) {
            clear(out, 0, call.columns);
            continue;
        }
        const std::int64_t column = call.targets[row];
        const bool here = 0 <= column && column < call.columns;
        const float probability = weight * (1 + 2 * call.z_loss * lse), spread = weight * call.spread;
        const auto gradient = [&](Lanes z, Lanes hit) __attribute__((always_inline)) {
            if (call.softcap == 0) return exp(z - lse) * probability - spread - hit;
            const Lanes bent = tanh(z * inverse);
            return (exp(call.softcap * bent - lse) * probability - spread - hit) * (1 - bent * bent);
        };
        // Before the row is overwritten, where it may be.
        const Lanes at_target = here ? gradient(load(logits + column, 1), all(weight * call.hit)) : Lanes{};
        each(call.columns, BODY(i, count) { store(out + i, gradient(load(logits + i, count), Lanes{}), count); });
        if (here) store(out + column, at_target, 1);
    }
}

#define FOR_EACH_TYPE(kernel) {kernel<Float32>, kernel<Float16>, kernel<Bfloat16>}
#define KERNELS(name) \
    {name, FOR_EACH_TYPE(softmax_forward), FOR_EACH_TYPE(softmax_backward), FOR_EACH_TYPE(statistics), \
     FOR_EACH_TYPE(cross_entropy_backward)}
