// Stored tokens to int64.

#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "format.hpp"
#include "input_file.hpp"

namespace megalm {

inline constexpr std::size_t kReadBytes = std::size_t{1} << 16;  // what is read at a time stays in a cache

// Reads `count` tokens from token `start` of `file` on into `out`, int64[count], which may be unaligned; `scratch`
// holds kReadBytes. BadFile names the first token that is not in [0, vocab_size), if that is given.
void read_tokens(const InputFile& file, TokenType type, std::optional<std::uint64_t> vocab_size, std::uint64_t start,
                 std::uint64_t count, void* out, char* scratch);

}  // namespace megalm
