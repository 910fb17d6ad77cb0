// Training samples: tokens from many shards of many sources, and what a model needs to know of them.
//
//   pieces (source, start, length)  --gather-->    tokens [B, S + 1]
//   tokens [B, S + 1]               --assemble-->  tokens, labels, loss mask, positions, segments

#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "format.hpp"
#include "input_file.hpp"

namespace megalm {

// Files that stay open between reads, the `limit` last used ones: data may lie in more shards than a process may open.
class OpenFiles {
   public:
    explicit OpenFiles(std::size_t limit);

    // The open file, which lives as long as the caller holds it. Safe to call from several threads.
    std::shared_ptr<const InputFile> get(const std::string& path);

   private:
    std::mutex mutex_;
    std::size_t limit_;
    std::list<std::shared_ptr<const InputFile>> files_;  // the last used one first
    std::unordered_map<std::string_view, decltype(files_)::iterator> places_;  // by the path that the file holds
};

// The .bin files of a directory's shards, one after the other, as one run of tokens. None is opened before it is read.
class Stream {
   public:
    // Shard names[i] holds tokens[i] tokens. BadFile if that is more than can be.
    Stream(std::shared_ptr<OpenFiles> files, std::string directory, std::vector<std::string> names,
           const std::vector<std::uint64_t>& tokens, TokenType type, std::uint64_t vocab_size);

    std::uint64_t tokens() const { return ends_.empty() ? 0 : ends_.back(); }

    // Tokens [start, start + count), which must exist, into `out`, int64[count], which may be unaligned. BadFile if a
    // shard has another size, or a token is outside of the vocabulary. `scratch` holds kReadBytes.
    void read(std::uint64_t start, std::uint64_t count, void* out, char* scratch) const;

   private:
    std::shared_ptr<OpenFiles> files_;
    std::string directory_;
    std::vector<std::string> names_;
    std::vector<std::uint64_t> ends_;
    TokenType type_;
    std::uint64_t vocab_size_;
};

// Pieces as three int64 arrays, which may be unaligned, as may be the output. Source -1 is `length` times `eod`.
struct Pieces {
    const void* source;
    const void* start;
    const void* length;
    std::size_t count;
};

// The pieces' tokens, one after the other. std::invalid_argument if they do not add up to `total`, if a source is not
// in `streams`, or if a piece is not in its source; nothing is written then.
void gather(const std::unordered_map<std::int64_t, std::shared_ptr<Stream>>& streams, const Pieces& pieces,
            std::int64_t eod, void* out, std::size_t total);

// Of B sequences of S tokens and one more; `tokens_BS1` may be unaligned. With `eod`, a document ends with that token.
struct Assembled {
    std::int64_t* tokens_T;
    std::int64_t* labels_T;
    bool* loss_mask_T;
    std::int64_t* positions_T;
};
// Returns the segments: 0, then their ends; T fits in int32.
std::vector<std::int32_t> assemble(const void* tokens_BS1, std::size_t sequences, std::size_t length,
                                   std::optional<std::int64_t> eod, const Assembled& out);

}  // namespace megalm
