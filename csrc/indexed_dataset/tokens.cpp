#include "tokens.hpp"

#include <algorithm>
#include <string>
#include <type_traits>

namespace megalm {

namespace {

// As unsigned numbers, so that one comparison finds negative ids too.
template <typename Stored>
std::uint64_t largest(const char* stored, std::size_t count) {
    using Unsigned = std::make_unsigned_t<Stored>;
    Unsigned result = 0;
    for (std::size_t i = 0; i < count; ++i) result = std::max(result, load<Unsigned>(stored, i));
    return result;
}

template <typename Stored>
void widen(const char* stored, std::size_t count, char* out) {
    for (std::size_t i = 0; i < count; ++i) store(out, i, static_cast<std::int64_t>(load<Stored>(stored, i)));
}

template <typename Stored>
[[noreturn]] void refuse(const InputFile& file, const char* stored, std::uint64_t start, std::uint64_t vocab_size) {
    using Unsigned = std::make_unsigned_t<Stored>;
    std::size_t i = 0;
    while (load<Unsigned>(stored, i) < vocab_size) ++i;
    throw BadFile(file.path(), "damaged: the token at byte " + std::to_string((start + i) * sizeof(Stored)) + " is " +
                                   std::to_string(load<Stored>(stored, i)) + ", outside of the tokenizer's " +
                                   std::to_string(vocab_size) + " ids");
}

}  // namespace

void read_tokens(const InputFile& file, TokenType type, std::optional<std::uint64_t> vocab_size, std::uint64_t start,
                 std::uint64_t count, void* out, char* scratch) {
    visit_type(type, [&](auto token) {
        using Stored = decltype(token);
        char* place = static_cast<char*>(out);
        while (count > 0) {
            const auto size = static_cast<std::size_t>(std::min<std::uint64_t>(count, kReadBytes / sizeof(Stored)));
            file.read_at(start * sizeof(Stored), scratch, size * sizeof(Stored));
            if (vocab_size && largest<Stored>(scratch, size) >= *vocab_size) {
                refuse<Stored>(file, scratch, start, *vocab_size);
            }
            widen<Stored>(scratch, size, place);
            place += size * sizeof(std::int64_t);
            start += size;
            count -= size;
        }
    });
}

}  // namespace megalm
