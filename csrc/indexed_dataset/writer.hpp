// Writes one shard of an indexed dataset: PREFIX.bin and PREFIX.idx, Megatron's format byte for byte.
//
// Each document is one sequence, so S = D and the last table counts 0, 1, ..., D. Offsets are the running sum of the
// lengths: what is kept in memory is 4 bytes a document, and the rest is computed when the shard is finished.

#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <string>

#include "atomic_file.hpp"
#include "format.hpp"

namespace megalm {

// The first kHeaderSize bytes of an .idx.
void write_header(AtomicFile& idx, TokenType type, std::uint64_t sequences, std::uint64_t documents);

class Writer {
   public:
    Writer(const std::string& prefix, TokenType type);  // kUint16 or kInt32

    // Appends documents: `lengths[i]` of the tokens each, in order. Token and length arrays may be unaligned.
    // Nothing is written if a token does not fit the type or the lengths do not add up (std::invalid_argument);
    // after a FileError nothing of the shard is left. Safe to call from several threads, which take turns.
    template <typename Token>
    void append(const void* tokens, std::size_t num_tokens, const void* lengths, std::size_t num_documents);

    void finish();            // both files are on the disk under their names
    void discard() noexcept;  // nothing is left, unless the shard was finished

    std::uint64_t documents() const;
    std::uint64_t tokens() const;

   private:
    AtomicFile& open_bin();
    void write_index();

    mutable std::mutex mutex_;
    std::string prefix_;
    TokenType type_;
    std::optional<AtomicFile> bin_;
    std::optional<AtomicFile> idx_;
    std::deque<std::int32_t> lengths_;  // a deque grows by blocks: no doubling of gigabytes
    std::uint64_t tokens_ = 0;
};

}  // namespace megalm
