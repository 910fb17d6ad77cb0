#include "reader.hpp"

#include <stdexcept>

#include "tokens.hpp"

namespace megalm {

namespace {

bool is_token_type(std::uint8_t code) { return (code >= 1 && code <= 5) || code == 8; }

}  // namespace

Index::Index(const std::string& path) : file_(path) {
    const std::uint64_t size = file_.size();
    if (size < kHeaderSize) {
        refuse(std::to_string(size) + " bytes are less than a header's " + std::to_string(kHeaderSize));
    }
    std::array<char, kHeaderSize> header;
    file_.read_at(0, header.data(), header.size());
    if (std::memcmp(header.data(), kMagic.data(), kMagic.size()) != 0) {
        refuse("it does not start with 'MMIDIDX' and two zeros");
    }
    const auto version = load<std::uint64_t>(header.data() + 9, 0);
    if (version != kVersion) refuse("version " + std::to_string(version) + " is not " + std::to_string(kVersion));
    const auto code = load<std::uint8_t>(header.data() + 17, 0);
    if (!is_token_type(code)) refuse("dtype code " + std::to_string(code) + " is not one of an integer type");
    type_ = static_cast<TokenType>(code);
    sequences_ = load<std::uint64_t>(header.data() + 18, 0);
    const auto entries = load<std::uint64_t>(header.data() + 26, 0);
    if (entries == 0) refuse("it has no document table");
    documents_ = entries - 1;
    const std::uint64_t room = size - kHeaderSize;
    const bool possible = sequences_ <= room / 12 && entries <= room / 8;  // else the sum may overflow
    const std::uint64_t plain = possible ? 12 * sequences_ + 8 * entries : 0;
    if (!possible || (room != plain && room != plain + sequences_)) {
        refuse(std::to_string(size) + " bytes are not what " + std::to_string(sequences_) + " sequences and " +
               std::to_string(documents_) + " documents make");
    }
    has_modes_ = room != plain;
    if (sequences_ == 0) return;
    std::int32_t length;
    std::int64_t offset;
    lengths(sequences_ - 1, 1, &length);
    offsets(sequences_ - 1, 1, &offset);
    const std::uint64_t item = token_size(type_);
    if (length < 0 || offset < 0 || static_cast<std::uint64_t>(offset) % item != 0) {
        refuse("the last sequence has " + std::to_string(length) + " tokens from byte " + std::to_string(offset) + " on");
    }
    bin_size_ = static_cast<std::uint64_t>(offset) + static_cast<std::uint64_t>(length) * item;
}

void Index::refuse(const std::string& reason) const { throw BadFile(file_.path(), "corrupt index: " + reason); }

void Index::read(std::uint64_t array, std::size_t item, std::uint64_t length, std::uint64_t first, std::uint64_t count,
                 void* out) const {
    if (first > length || count > length - first) {
        throw std::out_of_range(file_.path() + ": entries " + std::to_string(first) + " to " +
                                std::to_string(first + count) + " of " + std::to_string(length));
    }
    file_.read_at(kHeaderSize + array + first * item, out, static_cast<std::size_t>(count) * item);
}

void Index::lengths(std::uint64_t first, std::uint64_t count, std::int32_t* out) const {
    read(0, sizeof *out, sequences_, first, count, out);
}

void Index::offsets(std::uint64_t first, std::uint64_t count, std::int64_t* out) const {
    read(4 * sequences_, sizeof *out, sequences_, first, count, out);
}

void Index::document_starts(std::uint64_t first, std::uint64_t count, std::int64_t* out) const {
    read(12 * sequences_, sizeof *out, documents_ + 1, first, count, out);
}

void Index::modes(std::uint64_t first, std::uint64_t count, std::int8_t* out) const {
    read(12 * sequences_ + 8 * (documents_ + 1), sizeof *out, has_modes_ ? sequences_ : 0, first, count, out);
}

Reader::Reader(const std::string& prefix) : index_(prefix + ".idx"), bin_(prefix + ".bin") {
    if (bin_.size() != index_.bin_size()) {
        throw BadFile(bin_.path(), std::string("too ") + (bin_.size() < index_.bin_size() ? "short" : "long") + ": " +
                                       std::to_string(bin_.size()) + " bytes, while its index tells of " +
                                       std::to_string(index_.bin_size()));
    }
}

void Reader::read(std::uint64_t start, std::uint64_t count, void* out) const {
    if (start > tokens() || count > tokens() - start) {
        throw std::out_of_range(bin_.path() + ": tokens " + std::to_string(start) + " to " +
                                std::to_string(start + count) + " of " + std::to_string(tokens()));
    }
    std::vector<char> scratch(kReadBytes);
    read_tokens(bin_, index_.type(), std::nullopt, start, count, out, scratch.data());
}

std::pair<std::uint64_t, std::uint64_t> Reader::document(std::uint64_t number) const {
    if (number >= index_.documents()) {
        throw std::out_of_range(index_.path() + ": document " + std::to_string(number) + " of " +
                                std::to_string(index_.documents()));
    }
    std::int64_t bounds[2];
    index_.document_starts(number, 2, bounds);
    const auto sequences = static_cast<std::int64_t>(index_.sequences());
    const auto place = [&](std::int64_t sequence) -> std::int64_t {  // in bytes
        if (sequence == sequences) return static_cast<std::int64_t>(bin_.size());
        std::int64_t offset;
        index_.offsets(static_cast<std::uint64_t>(sequence), 1, &offset);
        return offset;
    };
    if (bounds[0] >= 0 && bounds[0] <= bounds[1] && bounds[1] <= sequences) {
        const auto item = static_cast<std::int64_t>(token_size(index_.type()));
        const std::int64_t first = place(bounds[0]), end = place(bounds[1]);
        const auto size = static_cast<std::int64_t>(bin_.size());
        if (first >= 0 && first <= end && end <= size && first % item == 0 && end % item == 0) {
            return {static_cast<std::uint64_t>(first / item), static_cast<std::uint64_t>((end - first) / item)};
        }
    }
    throw BadFile(index_.path(), "corrupt index: document " + std::to_string(number) + " is no part of the .bin");
}

void Reader::verify() const {
    index_.check_lengths([](const std::int32_t*, std::size_t) {});
    index_.check_documents([](const std::int64_t*, std::size_t) {});
}

}  // namespace megalm
