// The loops of the sample order that numpy cannot express, or only slowly: permuting, interleaving sources, packing
// documents into sequences, and Megatron's blending.

#pragma once

#include <cstdint>
#include <vector>

namespace megalm {

// Pieces of documents, sorted by the bin that they are in.
struct Packed {
    std::vector<std::int64_t> item;    // number of the document
    std::vector<std::int64_t> skip;    // tokens of the document before the piece
    std::vector<std::int64_t> length;  // tokens of the piece
    std::vector<std::int64_t> first;   // bins + 1: first piece of each bin
};

// Packs documents of `lengths` tokens into `bins` bins of `slots` tokens each: longest first, each whole into the bin
// with the least room that it fits in (the lowest-numbered of equals). What fits nowhere whole is cut, after all the
// others, into the emptiest bin; a piece that goes on elsewhere starts with the token that the one before ends with.
// With `open_end`, the last document does not end in the window: it comes after all others, so that no piece but the
// last of a bin can lack its document's end.
//
// While anything is left to place, no bin has lost more than one slot (to a token that is repeated, or to room for one
// token, which is none for a cut), so everything fits if the lengths sum to at most bins * (slots - 1). Throws
// std::invalid_argument if they do not, or if a length is not positive.
Packed pack(const std::int64_t* lengths, std::int64_t count, std::int64_t bins, std::int64_t slots, bool open_end);

// An order of a period's samples, counts[s] of them from source s, in which every prefix is within 1 of every share.
//
// Sample j of a source with share c / P is due, for the bound to hold, in the slots from floor(jP / c) to
// ceil((j + 1)P / c) - 1: earlier, the source would be a sample or more ahead; later, behind. Tijdeman's theorem says
// that an order exists; unit jobs meet their deadlines if the one with the earliest deadline among those that may come
// already is always next (of equals, the first source's). Writes source and j of each slot; false if a deadline is
// missed, which the theorem rules out. O(P log N).
bool interleave(const std::int64_t* counts, std::int64_t sources, std::int32_t* source, std::int32_t* rank);

// Where each index goes under a keyed bijection of [0, size): a balanced Feistel network over the smallest even number of
// bits that holds size - 1, applied again while its value is not below size. Round r mixes with splitmix64's r-th draw
// from the key. Every element has its own size (1 to 2**62) and key. Returns the first element whose index is not below
// its size, or whose size is out of range, or -1.
std::int64_t permute(const std::uint64_t* index, const std::uint64_t* size, const std::uint64_t* key,
                     std::int64_t count, int rounds, std::int64_t* out);

// Megatron's build_blending_indices: sample i is from the source that is farthest behind weight * max(i, 1), the first
// of equals. Writes the source of each of `size` samples and how many were drawn from it before.
void blend(const double* weights, std::int64_t sources, std::int64_t size, std::int16_t* source, std::int64_t* rank);

}  // namespace megalm
