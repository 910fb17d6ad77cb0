// Joins shards: the documents of each after those of the one before it, as if one builder had been given them all.
//
// What an index needs of all inputs at once are totals and running sums, so each table is written in one more pass over
// the inputs' lengths or documents. Memory is a few blocks, whatever the size. Every entry is checked on the way.

#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace megalm {

// Told, now and then, how many bytes of the inputs' .bin files were copied, and of how many; what it throws ends the
// merge.
using MergeProgress = std::function<void(std::uint64_t done, std::uint64_t total)>;

// Writes OUTPUT.bin and OUTPUT.idx from the shards `inputs` (prefixes). BadFile if an input is damaged, or if it has
// another token type than the first, or modes while the first has none. On any error nothing is left.
void merge(const std::vector<std::string>& inputs, const std::string& output, const MergeProgress& progress);

}  // namespace megalm
