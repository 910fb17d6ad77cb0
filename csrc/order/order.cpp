#include "order.hpp"

#include <algorithm>
#include <functional>
#include <queue>
#include <set>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace megalm {

namespace {

// splitmix64's finaliser (Stafford's variant 13): every input bit changes every output bit half of the time.
std::uint64_t mix(std::uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

struct Piece {
    std::int64_t item, skip, length;
};

class Packer {
public:
    Packer(std::int64_t bins, std::int64_t slots) : bins_(bins) {
        for (std::int64_t bin = 0; bin < bins; ++bin) room_.emplace(slots, bin);
    }

    // Into the bin with the least room that takes it whole; false if there is none.
    bool fit(const Piece& piece) {
        const auto found = room_.lower_bound({piece.length, 0});
        if (found == room_.end()) return false;
        put(piece, found->first, found->second);
        return true;
    }

    // Fills the emptiest bin with the piece's start; returns what is left of it.
    Piece cut(const Piece& piece) {
        const std::int64_t most = room_.empty() ? 0 : room_.rbegin()->first;
        if (most < 2) throw std::invalid_argument("the documents do not fit in the bins");
        const auto found = room_.lower_bound({most, 0});
        put({piece.item, piece.skip, most}, most, found->second);
        return {piece.item, piece.skip + most - 1, piece.length - most + 1};
    }

    // Whole if it fits, else in as few pieces as can be.
    void place(Piece piece) {
        while (!fit(piece)) piece = cut(piece);
    }

    Packed sorted() const {
        Packed result;
        const std::size_t count = pieces_.size();
        result.item.resize(count), result.skip.resize(count), result.length.resize(count);
        result.first.assign(static_cast<std::size_t>(bins_) + 1, 0);
        for (const std::int64_t bin : bin_of_piece_) ++result.first[bin + 1];
        for (std::int64_t bin = 0; bin < bins_; ++bin) result.first[bin + 1] += result.first[bin];
        std::vector<std::int64_t> next(result.first.begin(), result.first.end() - 1);
        for (std::size_t i = 0; i < count; ++i) {
            const std::int64_t at = next[bin_of_piece_[i]]++;
            result.item[at] = pieces_[i].item;
            result.skip[at] = pieces_[i].skip;
            result.length[at] = pieces_[i].length;
        }
        return result;
    }

private:
    void put(const Piece& piece, std::int64_t room, std::int64_t bin) {
        pieces_.push_back(piece);
        bin_of_piece_.push_back(bin);
        room_.erase({room, bin});
        if (room > piece.length) room_.emplace(room - piece.length, bin);
    }

    std::set<std::pair<std::int64_t, std::int64_t>> room_;  // (tokens free, bin) of the bins that are not full
    std::vector<Piece> pieces_;
    std::vector<std::int64_t> bin_of_piece_;
    std::int64_t bins_;
};

}  // namespace

Packed pack(const std::int64_t* lengths, std::int64_t count, std::int64_t bins, std::int64_t slots, bool open_end) {
    if (bins < 0 || slots < 2) throw std::invalid_argument("a bin has at least 2 slots");
    std::int64_t room = bins * (slots - 1);
    for (std::int64_t i = 0; i < count; ++i) {
        if (lengths[i] < 1) throw std::invalid_argument("a document has at least 1 token");
        if (lengths[i] > room) throw std::invalid_argument("the documents do not fit in the bins");
        room -= lengths[i];
    }
    Packer packer(bins, slots);
    const std::int64_t closed = count - (open_end && count > 0 ? 1 : 0);
    std::vector<Piece> pieces;
    for (std::int64_t i = 0; i < closed; ++i) {
        Piece piece{i, 0, lengths[i]};
        while (piece.length > slots) piece = packer.cut(piece);  // nothing but whole sequences are in bins yet
        pieces.push_back(piece);
    }
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.length > b.length; });
    std::vector<Piece> left;
    for (const Piece& piece : pieces) {
        if (!packer.fit(piece)) left.push_back(piece);
    }
    for (const Piece& piece : left) packer.place(piece);
    if (closed < count) packer.place({closed, 0, lengths[closed]});
    return packer.sorted();
}

bool interleave(const std::int64_t* counts, std::int64_t sources, std::int32_t* source, std::int32_t* rank) {
    using Job = std::tuple<std::int64_t, std::int64_t, std::int64_t>;  // release or deadline, source, number
    std::int64_t period = 0;
    for (std::int64_t s = 0; s < sources; ++s) period += counts[s];
    std::priority_queue<Job, std::vector<Job>, std::greater<Job>> waiting, ready;
    for (std::int64_t s = 0; s < sources; ++s) waiting.emplace(0, s, 0);
    for (std::int64_t slot = 0; slot < period; ++slot) {
        while (!waiting.empty() && std::get<0>(waiting.top()) <= slot) {
            const auto [release, s, job] = waiting.top();
            waiting.pop();
            ready.emplace(((job + 1) * period + counts[s] - 1) / counts[s] - 1, s, job);
        }
        if (ready.empty()) return false;
        const auto [deadline, s, job] = ready.top();
        ready.pop();
        if (deadline < slot) return false;
        source[slot] = static_cast<std::int32_t>(s);
        rank[slot] = static_cast<std::int32_t>(job);
        // The next of the source is never due before this slot: its release is at or after this one's deadline.
        if (job + 1 < counts[s]) waiting.emplace((job + 1) * period / counts[s], s, job + 1);
    }
    return true;
}

std::int64_t permute(const std::uint64_t* index, const std::uint64_t* size, const std::uint64_t* key,
                     std::int64_t count, int rounds, std::int64_t* out) {
    std::vector<std::uint64_t> keys(static_cast<std::size_t>(rounds));
    for (std::int64_t i = 0; i < count; ++i) {
        if (size[i] > std::uint64_t{1} << 62 || index[i] >= size[i]) return i;
        if (i == 0 || key[i] != key[i - 1]) {
            for (int r = 0; r < rounds; ++r) keys[r] = mix(key[i] + (r + 1) * 0x9E3779B97F4A7C15u);
        }
        int bits = 0;
        while ((size[i] - 1) >> bits != 0) ++bits;
        const int half = std::max(1, (bits + 1) / 2);
        const std::uint64_t mask = (std::uint64_t{1} << half) - 1;
        std::uint64_t value = index[i];
        do {
            std::uint64_t left = value >> half, right = value & mask;
            for (const std::uint64_t round : keys) {
                const std::uint64_t next = left ^ (mix(right ^ round) & mask);
                left = right;
                right = next;
            }
            value = left << half | right;
        } while (value >= size[i]);
        out[i] = static_cast<std::int64_t>(value);
    }
    return -1;
}

void blend(const double* weights, std::int64_t sources, std::int64_t size, std::int16_t* source, std::int64_t* rank) {
    std::vector<std::int64_t> drawn(static_cast<std::size_t>(sources), 0);
    for (std::int64_t i = 0; i < size; ++i) {
        const double samples = std::max(static_cast<double>(i), 1.0);
        std::int64_t farthest = 0;
        double most = weights[0] * samples - static_cast<double>(drawn[0]);
        for (std::int64_t s = 1; s < sources; ++s) {
            const double behind = weights[s] * samples - static_cast<double>(drawn[s]);
            if (behind > most) {
                most = behind;
                farthest = s;
            }
        }
        source[i] = static_cast<std::int16_t>(farthest);
        rank[i] = drawn[farthest]++;
    }
}

}  // namespace megalm
