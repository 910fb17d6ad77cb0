#include "writer.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <type_traits>

namespace megalm {

namespace {

constexpr std::size_t kBlock = std::size_t{1} << 15;  // tokens converted at a time

// Every token fits if the bitwise or of all does: the limits are all ones, and a negative has the highest bit.
template <typename Token>
void check_tokens(const void* tokens, std::size_t count, std::uint32_t limit, const std::string& path) {
    std::uint32_t all = 0;
    for (std::size_t i = 0; i < count; ++i) all |= static_cast<std::uint32_t>(load<Token>(tokens, i));
    if (all <= limit) return;
    for (std::size_t i = 0; i < count; ++i) {
        const Token token = load<Token>(tokens, i);
        if (static_cast<std::uint32_t>(token) > limit) {
            throw std::invalid_argument(path + ": token " + std::to_string(token) + " at place " + std::to_string(i) +
                                        " is outside of 0 to " + std::to_string(limit));
        }
    }
}

void check_lengths(const void* lengths, std::size_t count, std::size_t num_tokens, const std::string& path) {
    std::uint64_t left = num_tokens;
    for (std::size_t i = 0; i < count; ++i) {
        const auto length = load<std::int64_t>(lengths, i);
        if (length < 1 || length > std::numeric_limits<std::int32_t>::max()) {
            throw std::invalid_argument(path + ": document " + std::to_string(i) + " has " + std::to_string(length) +
                                        " tokens, outside of 1 to 2147483647");
        }
        if (static_cast<std::uint64_t>(length) > left) {
            throw std::invalid_argument(path + ": the documents have more tokens than the " +
                                        std::to_string(num_tokens) + " given");
        }
        left -= static_cast<std::uint64_t>(length);
    }
    if (left != 0) {
        throw std::invalid_argument(path + ": " + std::to_string(left) + " of " + std::to_string(num_tokens) +
                                    " tokens belong to no document");
    }
}

template <typename Stored, typename Token>
void write_converted(AtomicFile& file, const void* tokens, std::size_t count) {
    if constexpr (sizeof(Stored) == sizeof(Token)) {  // same bits: 0 to 2^31 - 1
        file.write(tokens, count * sizeof(Token));
    } else {
        std::array<Stored, kBlock> block;
        for (std::size_t first = 0; first < count; first += kBlock) {
            const std::size_t size = std::min(kBlock, count - first);
            for (std::size_t i = 0; i < size; ++i) block[i] = static_cast<Stored>(load<Token>(tokens, first + i));
            file.write(block.data(), size * sizeof(Stored));
        }
    }
}

}  // namespace

void write_header(AtomicFile& idx, TokenType type, std::uint64_t sequences, std::uint64_t documents) {
    idx.write(kMagic.data(), kMagic.size());
    idx.put(kVersion);
    idx.put(static_cast<std::uint8_t>(type));
    idx.put(sequences);
    idx.put(documents + 1);
}

Writer::Writer(const std::string& prefix, TokenType type) : prefix_(prefix), type_(type) {
    bin_.emplace(prefix + ".bin");
}

AtomicFile& Writer::open_bin() {
    if (!bin_) throw std::invalid_argument(prefix_ + ".bin: the shard was already finished or discarded");
    return *bin_;
}

template <typename Token>
void Writer::append(const void* tokens, std::size_t num_tokens, const void* lengths, std::size_t num_documents) {
    static_assert(std::is_integral_v<Token> && sizeof(Token) == 4);
    const std::lock_guard lock(mutex_);
    AtomicFile& bin = open_bin();
    const bool small = type_ == TokenType::kUint16;
    const std::uint32_t limit = small ? std::numeric_limits<std::uint16_t>::max()
                                      : static_cast<std::uint32_t>(std::numeric_limits<std::int32_t>::max());
    check_tokens<Token>(tokens, num_tokens, limit, bin.path());
    check_lengths(lengths, num_documents, num_tokens, bin.path());
    try {
        if (small) {
            write_converted<std::uint16_t, Token>(bin, tokens, num_tokens);
        } else {
            write_converted<std::int32_t, Token>(bin, tokens, num_tokens);
        }
        for (std::size_t i = 0; i < num_documents; ++i) {
            lengths_.push_back(static_cast<std::int32_t>(load<std::int64_t>(lengths, i)));
        }
        tokens_ += num_tokens;
    } catch (...) {  // part of the documents may be in the file: the shard cannot go on
        bin_.reset();
        throw;
    }
}

template void Writer::append<std::int32_t>(const void*, std::size_t, const void*, std::size_t);
template void Writer::append<std::uint32_t>(const void*, std::size_t, const void*, std::size_t);

void Writer::write_index() {
    AtomicFile& idx = idx_.emplace(prefix_ + ".idx");
    const std::uint64_t documents = lengths_.size();
    write_header(idx, type_, documents, documents);
    for (const std::int32_t length : lengths_) idx.put(length);
    std::int64_t offset = 0;
    for (const std::int32_t length : lengths_) {
        idx.put(offset);
        offset += length * static_cast<std::int64_t>(token_size(type_));
    }
    for (std::uint64_t document = 0; document <= documents; ++document) idx.put(static_cast<std::int64_t>(document));
    idx.sync();
}

void Writer::finish() {
    const std::lock_guard lock(mutex_);
    AtomicFile& bin = open_bin();
    try {
        bin.sync();
        write_index();
        publish_pair(bin, *idx_);
    } catch (...) {
        idx_.reset();
        bin_.reset();
        throw;
    }
    idx_.reset();
    bin_.reset();
}

void Writer::discard() noexcept {
    const std::lock_guard lock(mutex_);
    bin_.reset();
}

std::uint64_t Writer::documents() const {
    const std::lock_guard lock(mutex_);
    return lengths_.size();
}

std::uint64_t Writer::tokens() const {
    const std::lock_guard lock(mutex_);
    return tokens_;
}

}  // namespace megalm
