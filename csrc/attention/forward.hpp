// The forward pass: a task is a block of queries of a head, which blocks of keys go past; blocks.hpp explains.

#pragma once

#include "blocks.hpp"

namespace {

constexpr int kQueries = 64, kKeys = 256;  // of a block
constexpr float kBelowAll = -3.4028235e38f;  // no score is lower; finite, since -inf - -inf is NaN

struct ForwardSlot {
    Word *keys, *values;  // [N][W]; each block [E][J / pair]
    ForwardSlot(Layout& layout, const Sizes& sizes) {
        const int rows = blocks_of(sizes.longest, kKeys) * kKeys;
        keys = layout.take<Word>(sizes.words(rows)), values = layout.take<Word>(sizes.words(rows));
    }
};

struct ForwardLocal {
    Word *rows, *pairs, *queries, *p;  // [J][W], [J / pair][E], groups of [W][32], [J / pair][32]
    float *scores, *out, *turned, *top, *sum;  // [J][32], groups of [E][32], [32][E], [I], [I]
    ForwardLocal(Layout& layout, const Sizes& sizes) {
        rows = layout.take<Word>(sizes.words(kKeys)), pairs = layout.take<Word>(sizes.words(kKeys));
        queries = layout.take<Word>(sizes.words(kQueries)), p = layout.take<Word>(kKeys * kGroup);
        scores = layout.take<float>(kKeys * kGroup), out = layout.take<float>(sizes.floats(kQueries));
        turned = layout.take<float>(sizes.floats(kGroup));
        top = layout.take<float>(kQueries), sum = layout.take<float>(kQueries);
    }
};

template <class M>
class ForwardPass : Pass<M, ForwardSlot, ForwardLocal> {
    using Base = Pass<M, ForwardSlot, ForwardLocal>;
    using Base::call_, Base::E_, Base::W_, Base::queue_, Base::repeats_;
    friend Base;

    explicit ForwardPass(const Call& call) : Base(call) {
        for (std::int64_t u = 0; u < this->units_; ++u) {
            const int length = this->segment(u).length, packs = blocks_of(length, kKeys);
            queue_.set(u, packs, packs + repeats_ * blocks_of(length, kQueries));
        }
    }

    void work() {
        M::begin();
        const ForwardLocal local = this->local();
        for (Queue::Task task{0, 0}; queue_.claim(task); queue_.finish(task)) {
            const ForwardSlot slot = this->slot(task.unit);
            const int length = this->segment(task.unit).length, packs = blocks_of(length, kKeys);
            if (task.number < packs) {
                pack(slot, local, task.unit, task.number);
                continue;
            }
            const int blocks = blocks_of(length, kQueries), number = task.number - packs;
            const int head = this->kv_head(task.unit) * repeats_ + number / blocks;
            if (call_.softcap > 0)
                attend<true>(slot, local, task.unit, head, number % blocks * kQueries);
            else
                attend<false>(slot, local, task.unit, head, number % blocks * kQueries);
        }
        M::end();
    }

    Word* from(Word* rows, int first) const { return rows + static_cast<std::ptrdiff_t>(first) * W_; }

    void pack(const ForwardSlot& slot, const ForwardLocal& local, std::int64_t unit, int block) const {
        const int first = block * kKeys, rows = lesser(kKeys, this->segment(unit).length - first);
        const int heads = call_.kv_heads, head = this->kv_head(unit);
        this->copy_rows(this->row_of(call_.k, unit, first, head, heads), heads, rows, from(slot.keys, first));
        this->copy_rows(this->row_of(call_.v, unit, first, head, heads), heads, rows, local.rows);
        M::pair_rows(local.rows, padded(rows), W_, local.pairs);
        transpose(local.pairs, E_, padded(rows) / M::kPair, E_, from(slot.values, first), kKeys / M::kPair);
    }

    template <bool capped>
    void attend(const ForwardSlot& slot, const ForwardLocal& local, std::int64_t unit, int head, int first) const {
        const int length = this->segment(unit).length, rows = lesser(kQueries, length - first);
        this->copy_rows(this->row_of(call_.q, unit, first, head, call_.heads), call_.heads, rows, local.rows);
        this->turn_groups(local.rows, rows, local.queries);
        std::memset(local.out, 0, sizeof(float) * this->sizes_.floats(kQueries));
        for (int i = 0; i < kQueries; ++i) local.top[i] = kBelowAll, local.sum[i] = 0;
        const int block = greater(0, first - call_.window + 1) / kKeys;
        for (int key = block * kKeys; key < first + rows; key += kKeys) {
            for (int i = 0; i < rows; i += kGroup) {
                const Seen seen(first + i, key, lesser(key + kKeys, padded(length)), call_.window);
                if (seen.count() <= 0) continue;
                M::multiply(from(slot.keys, seen.begin), W_, local.queries + i * W_, kGroup, local.scores, kGroup,
                            seen.count(), kGroup, W_, false);
                if (seen.edge)
                    soften<capped, true>(local, first, i, seen);
                else
                    soften<capped, false>(local, first, i, seen);
                const Word* const values = from(slot.values, key) + (seen.begin - key) / M::kPair;
                M::multiply(values, kKeys / M::kPair, local.p, kGroup, local.out + i * E_, kGroup, E_, kGroup,
                            seen.count() / M::kPair, true);
            }
        }
        for (int i = 0; i < rows; i += kGroup) finish(local, unit, head, first, i, lesser(kGroup, rows - i));
    }

    // The softmax of a group's scores, relative to the maximum so far; what is summed already is scaled down to it.
    template <bool capped, bool edge>
    void soften(const ForwardLocal& local, int first, int i, const Seen& seen) const {
        const Scores to(call_);
        for (int half = 0; half < kGroup; half += kLanes) {
            float* const scores = local.scores + half;
            const __m512i query = _mm512_add_epi32(lane_numbers(), _mm512_set1_epi32(first + i + half));
            const __m512 before = _mm512_loadu_ps(local.top + i + half);
            __m512 top = before;
            for (int j = 0; j < seen.count(); ++j) {
                __m512 x = _mm512_loadu_ps(scores + j * kGroup);
                if constexpr (capped) x = _mm512_mul_ps(to.cap, tanh(_mm512_mul_ps(x, to.inner)));
                if constexpr (edge)
                    x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), to.seen(query, seen.begin + j), x);
                if constexpr (capped || edge) _mm512_storeu_ps(scores + j * kGroup, x);
                top = _mm512_max_ps(top, x);
            }
            __m512 sum = _mm512_setzero_ps();
            for (int j = 0; j < seen.count(); j += 2) {
                const __m512 x = _mm512_loadu_ps(scores + j * kGroup), y = _mm512_loadu_ps(scores + (j + 1) * kGroup);
                const __m512 p = exp2<M::kDegree>(_mm512_mul_ps(_mm512_sub_ps(x, top), to.factor));
                const __m512 next = exp2<M::kDegree>(_mm512_mul_ps(_mm512_sub_ps(y, top), to.factor));
                sum = _mm512_add_ps(sum, _mm512_add_ps(p, next));
                M::store_pair(local.p + j / M::kPair * kGroup + half, p, next);
            }
            const __m512 rescale = exp2<5>(_mm512_mul_ps(_mm512_sub_ps(before, top), to.factor));
            sum = _mm512_fmadd_ps(_mm512_loadu_ps(local.sum + i + half), rescale, sum);
            _mm512_storeu_ps(local.sum + i + half, sum);
            _mm512_storeu_ps(local.top + i + half, top);
            if (_mm512_cmp_ps_mask(before, top, _CMP_NEQ_UQ) == 0) continue;
            float* const out = local.out + i * E_ + half;
            for (int e = 0; e < E_; ++e)
                _mm512_storeu_ps(out + e * kGroup, _mm512_mul_ps(_mm512_loadu_ps(out + e * kGroup), rescale));
        }
    }

    void finish(const ForwardLocal& local, std::int64_t unit, int head, int first, int i, int rows) const {
        this->turn_back(local.out + i * E_, local.turned);
        float* const lse2 = call_.lse2 + head * call_.tokens + this->segment(unit).start + first + i;
        auto* out = this->row_of(call_.out, unit, first + i, head, call_.heads);
        for (int r = 0; r < rows; ++r) {
            const float sum = local.sum[i + r];
            lse2[r] = local.top[i + r];
            lse2[r + call_.heads * call_.tokens] = log2f(sum);
            this->store_rows(local.turned + r * E_, 1, 1 / sum, out, call_.heads);
            out += static_cast<std::ptrdiff_t>(call_.heads) * call_.head_dim;
        }
    }

public:
    static void run(const Call& call) { Base::template run_as<ForwardPass>(call); }
};

}  // namespace
