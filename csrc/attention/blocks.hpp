// What the two passes, forward.hpp and backward.hpp, share for any matrix unit M: how attention is cut into blocks.
//
// Scores stand on their side, keys in rows and queries in columns, so that a vector holds 16 queries: the softmax's
// maxima and sums are of whole vectors, one beside another, and a query's numbers are never spread or gathered. Columns
// go in groups of 32 (g), and what has a column a query lies group by group:
//
//     forward, keys block by block:   S = K Q^T   P = exp(S - max)   O^T = O^T · rescaled + V^T P
//     backward, for a block of keys,  S = K Q^T   P = exp(S - lse)   dP = V dO^T   dS = P (dP - delta)
//       queries block by block:       dV += P dO   dK += dS Q   dQ^T += K^T dS          delta = rowsum(dO O)
//
// All right-hand sides (Q^T, P, dO^T, dO, dS, Q) are words with the summed dim in rows, all left-hand sides (K, V^T, V,
// P, dS, K^T) words as rows lie; vectors.hpp explains. Rows beyond the segment's end are zeros, and no query sees them.
//
// A unit of the queue is a segment and a key/value head. Its keys' gradients are summed by one task a block of keys; to
// a block of queries' gradient these tasks add in the order of the keys, each when it is its turn. So every sum has one
// order and the results are the same bits for any number of threads.
//
// A unit's packed operands lie in a slot while it is worked on. There are threads + 1 slots, so that nobody waits for
// one, but no more than fit in 256 MiB: a unit that large, of which there is one slot then, has tasks enough for all.
//
// Shapes: W words of a padded row, E its elements, in blocks of J keys and I queries.

#pragma once

#include <math.h>

#include <cstring>
#include <initializer_list>

#include "attention.hpp"
#include "tasks.hpp"
#include "vectors.hpp"

namespace {

using megalm::attention::allocate;
using megalm::attention::Call;
using megalm::attention::Queue;
using megalm::attention::release;
using megalm::attention::Segment;
using megalm::attention::wait_until;

constexpr std::size_t kSlotBytes = std::size_t{256} << 20;  // of all slots together, unless it is one

inline int blocks_of(int length, int block) { return (length + block - 1) / block; }
inline int lesser(int a, int b) { return a < b ? a : b; }
inline int greater(int a, int b) { return a > b ? a : b; }

// The keys of [first, end) that any query of the group from `query` on sees: multiples of 32.
struct Seen {
    int begin, end;
    bool edge;  // some query of the group does not see some of them

    Seen(int query, int first, int end_, int window)
        : begin(greater(first, greater(0, query - window + 1) / kGroup * kGroup)), end(lesser(end_, query + kGroup)) {
        edge = end > query || begin <= query + kGroup - 1 - window;
    }
    int count() const { return end - begin; }
};

// How products become scores in units of log 2.
struct Scores {
    __m512 factor, inner, cap;
    __m512i window;

    explicit Scores(const Call& call) {
        const float scale = 1 / sqrtf(static_cast<float>(call.head_dim)), log2e = 1.44269504f;
        factor = _mm512_set1_ps(call.softcap > 0 ? log2e : scale * log2e);
        inner = _mm512_set1_ps(call.softcap > 0 ? scale / call.softcap : 0);
        cap = _mm512_set1_ps(call.softcap);
        window = _mm512_set1_epi32(call.window);
    }
    __mmask16 seen(__m512i query, int key) const {
        return _mm512_cmplt_epu32_mask(_mm512_sub_epi32(query, _mm512_set1_epi32(key)), window);
    }
};

// Memory in pieces, each on a cache line's boundary. First measured from address 0, then laid out.
class Layout {
public:
    explicit Layout(void* base = nullptr) : next_(reinterpret_cast<std::uintptr_t>(base)) {}
    template <class T>
    T* take(std::size_t count) {
        const std::uintptr_t place = next_;
        next_ += (count * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T*>(place);
    }
    std::size_t next() const { return next_; }

private:
    std::uintptr_t next_;
};

struct Sizes {
    int E, W, longest, repeats;  // repeats: query heads of a key/value head
    std::size_t words(int rows) const { return static_cast<std::size_t>(rows) * static_cast<std::size_t>(W); }
    std::size_t floats(int rows) const { return static_cast<std::size_t>(rows) * static_cast<std::size_t>(E); }
};

// What both passes share: the queue, memory a unit (in slots) and a thread, and how rows come and go.
template <class M, class Slot, class Local>
class Pass {
protected:
    using Element = typename M::Element;

    explicit Pass(const Call& call)
        : call_(call),
          E_(padded(call.head_dim)),
          W_(E_ / M::kPair),
          repeats_(call.heads / call.kv_heads),
          sizes_{E_, W_, call.longest, repeats_},
          units_(call.segment_count * call.kv_heads),
          slot_bytes_(bytes_of<Slot>(sizes_)),
          local_bytes_(bytes_of<Local>(sizes_)),
          slots_(slots_within(kSlotBytes / slot_bytes_)),
          queue_(units_, slots_),
          memory_(static_cast<char*>(allocate(slot_bytes_ * static_cast<std::size_t>(slots_) +
                                              local_bytes_ * static_cast<std::size_t>(call.threads)))) {}

    ~Pass() { release(memory_); }
    Pass(const Pass&) = delete;
    Pass& operator=(const Pass&) = delete;

    template <class Derived>
    static void run_as(const Call& call) {
        Derived pass(call);
        megalm::attention::fan_out(
            call.threads, [](void* self) { static_cast<Derived*>(self)->work(); }, &pass);
    }

    Slot slot(std::int64_t unit) const {
        Layout layout(memory_ + slot_bytes_ * static_cast<std::size_t>(unit % slots_));
        return Slot(layout, sizes_);
    }
    Local local() {
        const auto number = static_cast<std::size_t>(workers_.fetch_add(1, std::memory_order_relaxed));
        Layout layout(memory_ + slot_bytes_ * static_cast<std::size_t>(slots_) + local_bytes_ * number);
        return Local(layout, sizes_);
    }

    const Segment& segment(std::int64_t unit) const { return call_.segments[unit / call_.kv_heads]; }
    int kv_head(std::int64_t unit) const { return static_cast<int>(unit % call_.kv_heads); }

    // Row `row` of the unit's segment, of a head, in a tensor of so many heads.
    template <class T>
    T* row_of(T* tensor, std::int64_t unit, int row, int head, int heads) const {
        return tensor + ((segment(unit).start + row) * heads + head) * call_.head_dim;
    }
    const Element* row_of(const void* tensor, std::int64_t unit, int row, int head, int heads) const {
        return row_of(static_cast<const Element*>(tensor), unit, row, head, heads);
    }
    Element* row_of(void* tensor, std::int64_t unit, int row, int head, int heads) const {
        return row_of(static_cast<Element*>(tensor), unit, row, head, heads);
    }

    // Rows of a head, padded with zeros: [padded(rows)][W].
    void copy_rows(const Element* from, int heads, int rows, Word* to) const {
        const auto size = sizeof(Element) * static_cast<std::size_t>(call_.head_dim), whole = sizeof(Word) * W_;
        for (int r = 0; r < padded(rows); ++r, to += W_) {
            if (r < rows) std::memcpy(to, from + static_cast<std::ptrdiff_t>(r) * heads * call_.head_dim, size);
            const std::size_t filled = r < rows ? size : 0;
            if (filled < whole) std::memset(reinterpret_cast<char*>(to) + filled, 0, whole - filled);
        }
    }

    // [padded(rows)][W] to groups of [W][32].
    void turn_groups(const Word* from, int rows, Word* to) const {
        for (int r = 0; r < rows; r += kGroup) transpose(from + r * W_, W_, kGroup, W_, to + r * W_, kGroup);
    }

    // float32 [rows][E], times `factor`, to rows of a head.
    void store_rows(const float* from, int rows, float factor, Element* to, int heads) const {
        for (int r = 0; r < rows; ++r, from += E_, to += static_cast<std::ptrdiff_t>(heads) * call_.head_dim)
            for (int e = 0; e < call_.head_dim; e += kLanes)
                M::store(to + e, _mm512_mul_ps(_mm512_loadu_ps(from + e), _mm512_set1_ps(factor)));
    }

    // A group [E][32] to float32 [32][E].
    void turn_back(const float* from, float* to) const {
        transpose(reinterpret_cast<const Word*>(from), kGroup, E_, kGroup, reinterpret_cast<Word*>(to), E_);
    }

    const Call& call_;
    const int E_, W_, repeats_;
    const Sizes sizes_;
    const std::int64_t units_;
    const std::size_t slot_bytes_, local_bytes_;
    const std::int64_t slots_;
    Queue queue_;

private:
    template <class Part>
    static std::size_t bytes_of(const Sizes& sizes) {
        Layout measure;
        Part(measure, sizes);
        return measure.next();
    }
    std::int64_t slots_within(std::size_t most) const {
        const auto wanted = units_ < call_.threads + 1 ? units_ : call_.threads + std::int64_t{1};
        return most < 1 ? 1 : static_cast<std::size_t>(wanted) < most ? wanted : static_cast<std::int64_t>(most);
    }

    char* const memory_;
    std::atomic<int> workers_{0};
};

}  // namespace
