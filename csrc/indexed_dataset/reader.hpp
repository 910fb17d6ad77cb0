// Reads one shard of an indexed dataset, PREFIX.bin and PREFIX.idx, whoever wrote it. Opening reads the header and the
// last sequence's entry and compares them with the sizes of both files; `verify` reads the whole index.

#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "format.hpp"
#include "input_file.hpp"

namespace megalm {

// The entries of an .idx. Ranges outside of its arrays are std::out_of_range; all else that is wrong is BadFile.
class Index {
   public:
    explicit Index(const std::string& path);

    TokenType type() const { return type_; }
    std::uint64_t sequences() const { return sequences_; }
    std::uint64_t documents() const { return documents_; }
    bool has_modes() const { return has_modes_; }
    std::uint64_t bin_size() const { return bin_size_; }  // bytes, by the last sequence's place
    const std::string& path() const { return file_.path(); }

    void lengths(std::uint64_t first, std::uint64_t count, std::int32_t* out) const;
    void offsets(std::uint64_t first, std::uint64_t count, std::int64_t* out) const;
    void document_starts(std::uint64_t first, std::uint64_t count, std::int64_t* out) const;  // of documents() + 1
    void modes(std::uint64_t first, std::uint64_t count, std::int8_t* out) const;

    // Visit all entries, block by block, after checking them: `visit(entries, count)`. Memory is one block.
    template <typename Visit>
    void check_lengths(Visit&& visit) const;
    template <typename Visit>
    void check_documents(Visit&& visit) const;

    [[noreturn]] void refuse_entry(const std::string& reason) const;

    static constexpr std::size_t kBlock = std::size_t{1} << 16;

   private:
    void read(std::uint64_t array, std::size_t item, std::uint64_t length, std::uint64_t first, std::uint64_t count,
              void* out) const;
    [[noreturn]] void refuse(const std::string& reason) const;  // the header

    InputFile file_;
    TokenType type_ = TokenType::kInt32;
    std::uint64_t sequences_ = 0;
    std::uint64_t documents_ = 0;
    bool has_modes_ = false;
    std::uint64_t bin_size_ = 0;
};

class Reader {
   public:
    explicit Reader(const std::string& prefix);

    const Index& index() const { return index_; }
    const InputFile& bin() const { return bin_; }
    std::uint64_t tokens() const { return bin_.size() / token_size(index_.type()); }

    // Tokens [start, start + count) of the .bin into `out`, int64[count], which may be unaligned.
    void read(std::uint64_t start, std::uint64_t count, void* out) const;

    // The range of a document's tokens: first, count. BadFile if its entries are not a range of the .bin.
    std::pair<std::uint64_t, std::uint64_t> document(std::uint64_t number) const;

    // The first tokens of all documents that start in tokens [first, end), rising; one without tokens starts where the
    // next one does. Two binary searches: of the index, no more is read than the entries of these documents.
    std::vector<std::int64_t> documents_between(std::int64_t first, std::int64_t end) const;

    void verify() const;  // every entry of the index

   private:
    std::int64_t place_of(std::int64_t sequence) const;  // its first byte in the .bin; BadFile if there is none
    std::int64_t start_of(std::uint64_t document) const;  // its first token
    std::uint64_t first_from(std::int64_t token) const;   // the first document that starts there or later

    Index index_;
    InputFile bin_;
};

template <typename Visit>
void Index::check_lengths(Visit&& visit) const {
    std::vector<std::int32_t> length(kBlock);
    std::vector<std::int64_t> offset(kBlock);
    std::uint64_t end = 0;  // unsigned, so that damage cannot make it overflow
    for (std::uint64_t first = 0; first < sequences_; first += kBlock) {
        const std::size_t count = static_cast<std::size_t>(std::min<std::uint64_t>(kBlock, sequences_ - first));
        lengths(first, count, length.data());
        offsets(first, count, offset.data());
        for (std::size_t i = 0; i < count; ++i) {
            if (length[i] < 0) refuse_entry("sequence " + std::to_string(first + i) + " has a negative length");
            if (static_cast<std::uint64_t>(offset[i]) != end) {
                refuse_entry("sequence " + std::to_string(first + i) + " does not start where the one before it ends");
            }
            end += static_cast<std::uint64_t>(length[i]) * token_size(type_);
        }
        visit(static_cast<const std::int32_t*>(length.data()), count);
    }
}

template <typename Visit>
void Index::check_documents(Visit&& visit) const {
    std::vector<std::int64_t> start(kBlock);
    std::int64_t last = 0;
    for (std::uint64_t first = 0; first <= documents_; first += kBlock) {
        const std::size_t count = static_cast<std::size_t>(std::min<std::uint64_t>(kBlock, documents_ + 1 - first));
        document_starts(first, count, start.data());
        bool covered = first > 0 || start[0] == 0;
        for (std::size_t i = 0; i < count; ++i) {
            covered = covered && start[i] >= last && static_cast<std::uint64_t>(start[i]) <= sequences_;
            last = start[i];
        }
        if (!covered) refuse_entry("its documents do not cover its sequences");
        visit(static_cast<const std::int64_t*>(start.data()), count);
    }
    if (static_cast<std::uint64_t>(last) != sequences_) refuse_entry("its documents do not cover its sequences");
}

}  // namespace megalm
