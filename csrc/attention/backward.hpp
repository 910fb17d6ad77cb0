// The backward pass: a task is a block of keys, which blocks of queries of the unit's heads go past; blocks.hpp
// explains.

#pragma once

#include "blocks.hpp"

namespace {

constexpr int kBlock = 128;  // queries and keys of a block

// What all blocks of keys need of a block of queries.
struct QueryBlock {
    Word *queries, *query_pairs, *grads, *grad_pairs;  // groups of [W][32], [I / pair][E]; the same of grad_out
    float *grad_q, *top, *sum2, *delta;                // groups of [E][32], then [I] each: lse2's two
    std::atomic<int>* turn;                            // the block of keys that is next to add to grad_q
    QueryBlock(Layout& layout, const Sizes& sizes) {
        for (Word** words : {&queries, &query_pairs, &grads, &grad_pairs})
            *words = layout.take<Word>(sizes.words(kBlock));
        grad_q = layout.take<float>(sizes.floats(kBlock));
        for (float** floats : {&top, &sum2, &delta}) *floats = layout.take<float>(kBlock);
        turn = layout.take<std::atomic<int>>(1);
    }
};

// The blocks of the unit's first query head, of its second, and so on.
struct BackwardSlot {
    char* base;
    std::size_t bytes;
    BackwardSlot(Layout& layout, const Sizes& sizes) {
        Layout measure;
        QueryBlock(measure, sizes);
        bytes = measure.next();
        const int count = blocks_of(sizes.longest, kBlock) * sizes.repeats;
        base = layout.take<char>(bytes * static_cast<std::size_t>(count));
    }
};

struct BackwardLocal {
    Word *keys, *values, *turned_keys, *rows, *pairs;  // [J][W], [J][W], [E][J / pair], [I][W], [J / pair][E]
    Word *p_rows, *ds_rows, *ds;                       // [J][I / pair] twice, [J / pair][32]
    float *scores, *grad_p, *grad_k, *grad_v, *turned;  // [J][32] twice, [J][E] twice, [32][E]
    BackwardLocal(Layout& layout, const Sizes& sizes) {
        for (Word** words : {&keys, &values, &turned_keys, &rows, &pairs})
            *words = layout.take<Word>(sizes.words(kBlock));
        p_rows = layout.take<Word>(kBlock * kBlock), ds_rows = layout.take<Word>(kBlock * kBlock);
        ds = layout.take<Word>(kBlock * kGroup);
        scores = layout.take<float>(kBlock * kGroup), grad_p = layout.take<float>(kBlock * kGroup);
        grad_k = layout.take<float>(sizes.floats(kBlock)), grad_v = layout.take<float>(sizes.floats(kBlock));
        turned = layout.take<float>(sizes.floats(kGroup));
    }
};

template <class M>
class BackwardPass : Pass<M, BackwardSlot, BackwardLocal> {
    using Base = Pass<M, BackwardSlot, BackwardLocal>;
    using Base::call_, Base::E_, Base::W_, Base::queue_, Base::repeats_;
    friend Base;
    static constexpr int kRow = kBlock / M::kPair;  // words of a row of probabilities

    explicit BackwardPass(const Call& call)
        : Base(call), scale_(1 / sqrtf(static_cast<float>(call.head_dim))) {
        for (std::int64_t u = 0; u < this->units_; ++u) {
            const int blocks = blocks_of(this->segment(u).length, kBlock);
            queue_.set(u, repeats_ * blocks, repeats_ * blocks + blocks);
        }
    }

    void work() {
        M::begin();
        const BackwardLocal local = this->local();
        for (Queue::Task task{0, 0}; queue_.claim(task); queue_.finish(task)) {
            const BackwardSlot slot = this->slot(task.unit);
            const int packs = repeats_ * blocks_of(this->segment(task.unit).length, kBlock);
            if (task.number < packs)
                pack(slot, local, task.unit, task.number);
            else
                differentiate(slot, local, task.unit, (task.number - packs) * kBlock);
        }
        M::end();
    }

    QueryBlock query_block(const BackwardSlot& slot, int number) const {
        Layout layout(slot.base + slot.bytes * static_cast<std::size_t>(number));
        return QueryBlock(layout, this->sizes_);
    }

    void pack(const BackwardSlot& slot, const BackwardLocal& local, std::int64_t unit, int number) const {
        const int length = this->segment(unit).length, blocks = blocks_of(length, kBlock), heads = call_.heads;
        const int head = this->kv_head(unit) * repeats_ + number / blocks, first = number % blocks * kBlock;
        const int rows = lesser(kBlock, length - first);
        const QueryBlock block = query_block(slot, number);
        this->copy_rows(this->row_of(call_.q, unit, first, head, heads), heads, rows, local.rows);
        this->turn_groups(local.rows, rows, block.queries);
        M::pair_rows(local.rows, padded(rows), W_, block.query_pairs);
        const auto* grad = this->row_of(call_.grad_out, unit, first, head, heads);
        this->copy_rows(grad, heads, rows, local.rows);
        this->turn_groups(local.rows, rows, block.grads);
        M::pair_rows(local.rows, padded(rows), W_, block.grad_pairs);
        std::memset(block.grad_q, 0, sizeof(float) * this->sizes_.floats(kBlock));
        const auto* out = this->row_of(static_cast<const void*>(call_.out), unit, first, head, heads);
        const float* const lse2 = call_.lse2 + head * call_.tokens + this->segment(unit).start + first;
        for (int r = 0; r < kBlock; ++r) {
            block.top[r] = r < rows ? lse2[r] : 0;
            block.sum2[r] = r < rows ? lse2[r + call_.heads * call_.tokens] : 0;
            block.delta[r] = 0;
            if (r >= rows) continue;
            __m512 sum = _mm512_setzero_ps();
            for (int e = 0; e < call_.head_dim; e += kLanes)
                sum = _mm512_fmadd_ps(M::load(grad + e), M::load(out + e), sum);
            block.delta[r] = _mm512_reduce_add_ps(sum);
            grad += static_cast<std::ptrdiff_t>(heads) * call_.head_dim;
            out += static_cast<std::ptrdiff_t>(heads) * call_.head_dim;
        }
        block.turn->store(greater(0, first - call_.window + 1) / kBlock, std::memory_order_relaxed);
    }

    // All that the block of keys from `first` on has part in.
    void differentiate(const BackwardSlot& slot, const BackwardLocal& local, std::int64_t unit, int first) const {
        const int length = this->segment(unit).length, rows = lesser(kBlock, length - first), heads = call_.kv_heads;
        const int head = this->kv_head(unit), blocks = blocks_of(length, kBlock);
        this->copy_rows(this->row_of(call_.k, unit, first, head, heads), heads, rows, local.keys);
        this->copy_rows(this->row_of(call_.v, unit, first, head, heads), heads, rows, local.values);
        M::pair_rows(local.keys, padded(rows), W_, local.pairs);
        transpose(local.pairs, E_, padded(rows) / M::kPair, E_, local.turned_keys, kRow);
        const std::size_t bytes = sizeof(float) * this->sizes_.floats(kBlock);
        std::memset(local.grad_k, 0, bytes), std::memset(local.grad_v, 0, bytes);
        const std::int64_t last_query = std::int64_t{first} + kBlock + call_.window - 2;
        for (int repeat = 0; repeat < repeats_; ++repeat) {
            for (int b = first / kBlock; b < blocks && std::int64_t{b} * kBlock <= last_query; ++b) {
                const QueryBlock block = query_block(slot, repeat * blocks + b);
                const int groups = padded(lesser(kBlock, length - b * kBlock)) / kGroup;
                if (call_.softcap > 0)
                    add_queries<true>(block, local, first, padded(rows), b * kBlock, groups);
                else
                    add_queries<false>(block, local, first, padded(rows), b * kBlock, groups);
                if (b * kBlock == first)
                    finish(block, local, unit, this->kv_head(unit) * repeats_ + repeat, first, rows);
                else
                    block.turn->store(first / kBlock + 1, std::memory_order_release);
            }
        }
        this->store_rows(local.grad_k, rows, scale_, this->row_of(call_.grad_k, unit, first, head, heads), heads);
        this->store_rows(local.grad_v, rows, 1, this->row_of(call_.grad_v, unit, first, head, heads), heads);
    }

    // What a block of queries adds to the gradients of a block of `rows` keys, and these to its gradient.
    template <bool capped>
    void add_queries(const QueryBlock& block, const BackwardLocal& local, int first, int rows, int first_query,
                     int groups) const {
        for (int g = 0; g < groups; ++g) {
            const Seen seen(first_query + g * kGroup, first, first + rows, call_.window);
            if (seen.count() <= 0) continue;
            const int skipped = seen.begin - first, i = g * kGroup;
            M::multiply(local.keys + skipped * W_, W_, block.queries + i * W_, kGroup, local.scores, kGroup,
                        seen.count(), kGroup, W_, false);
            M::multiply(local.values + skipped * W_, W_, block.grads + i * W_, kGroup, local.grad_p, kGroup,
                        seen.count(), kGroup, W_, false);
            if (seen.edge)
                differentiate_softmax<capped, true>(block, local, first, first_query, i, seen);
            else
                differentiate_softmax<capped, false>(block, local, first, first_query, i, seen);
            wait_until(*block.turn, first / kBlock);
            M::multiply(local.turned_keys + skipped / M::kPair, kRow, local.ds, kGroup, block.grad_q + i * E_, kGroup,
                        E_, kGroup, seen.count() / M::kPair, true);
        }
        for (int j = 0; j < rows; j += kGroup) {  // over the groups that see these keys
            const int key = first + j, from = lesser(groups, greater(0, key - first_query) / kGroup);
            int end = groups;
            while (end > from && first_query + (end - 1) * kGroup - (key + kGroup - 1) >= call_.window) --end;
            if (end == from) continue;
            const int skipped = from * kGroup / M::kPair, summed = (end - from) * kGroup / M::kPair;
            M::multiply(local.p_rows + j * kRow + skipped, kRow, block.grad_pairs + skipped * E_, E_,
                        local.grad_v + j * E_, E_, kGroup, E_, summed, true);
            M::multiply(local.ds_rows + j * kRow + skipped, kRow, block.query_pairs + skipped * E_, E_,
                        local.grad_k + j * E_, E_, kGroup, E_, summed, true);
        }
    }

    // P and dS of a group's scores.
    template <bool capped, bool edge>
    void differentiate_softmax(const QueryBlock& block, const BackwardLocal& local, int first, int first_query, int i,
                               const Seen& seen) const {
        const Scores to(call_);
        for (int half = 0; half < kGroup; half += kLanes) {
            const __m512i query = _mm512_add_epi32(lane_numbers(), _mm512_set1_epi32(first_query + i + half));
            const __m512 top = _mm512_loadu_ps(block.top + i + half), sum2 = _mm512_loadu_ps(block.sum2 + i + half);
            const __m512 delta = _mm512_loadu_ps(block.delta + i + half);
            const std::ptrdiff_t skipped = static_cast<std::ptrdiff_t>(seen.begin - first) * kRow;
            Word* const p_rows = local.p_rows + skipped + (i + half) / M::kPair;
            Word* const ds_rows = local.ds_rows + skipped + (i + half) / M::kPair;
            for (int j = 0; j < seen.count(); j += 2) {
                __m512 p[2], ds[2];
#pragma GCC unroll 2
                for (int n = 0; n < 2; ++n) {
                    __m512 x = _mm512_loadu_ps(local.scores + (j + n) * kGroup + half), t;
                    if constexpr (capped) {
                        t = tanh(_mm512_mul_ps(x, to.inner));
                        x = _mm512_mul_ps(to.cap, t);
                    }
                    p[n] = exp2<M::kDegree>(_mm512_fmsub_ps(_mm512_sub_ps(x, top), to.factor, sum2));
                    if constexpr (edge) p[n] = _mm512_maskz_mov_ps(to.seen(query, seen.begin + j + n), p[n]);
                    const __m512 grad_p = _mm512_loadu_ps(local.grad_p + (j + n) * kGroup + half);
                    ds[n] = _mm512_mul_ps(p[n], _mm512_sub_ps(grad_p, delta));
                    if constexpr (capped) ds[n] = _mm512_mul_ps(ds[n], _mm512_fnmadd_ps(t, t, _mm512_set1_ps(1)));
                }
                M::store_rows(p_rows + j * kRow, kRow, p[0], p[1]);
                M::store_pair_and_rows(local.ds + j / M::kPair * kGroup + half, ds_rows + j * kRow, kRow, ds[0], ds[1]);
            }
        }
    }

    void finish(const QueryBlock& block, const BackwardLocal& local, std::int64_t unit, int head, int first,
                int rows) const {
        for (int i = 0; i < rows; i += kGroup) {
            this->turn_back(block.grad_q + i * E_, local.turned);
            this->store_rows(local.turned, lesser(kGroup, rows - i), scale_,
                             this->row_of(call_.grad_q, unit, first + i, head, call_.heads), call_.heads);
        }
    }

    const float scale_;

public:
    static void run(const Call& call) { Base::template run_as<BackwardPass>(call); }
};

}  // namespace
