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
        refuse("the last sequence has " + std::to_string(length) + " tokens from byte " + std::to_string(offset));
    }
    bin_size_ = static_cast<std::uint64_t>(offset) + static_cast<std::uint64_t>(length) * item;
}

void Index::refuse(const std::string& reason) const { throw BadFile(file_.path(), "corrupt index: " + reason); }

void Index::refuse_entry(const std::string& reason) const { throw BadFile(file_.path(), "damaged: " + reason); }

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
                                       std::to_string(bin_.size()) + " bytes, while " + index_.path() + " tells of " +
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
    const std::int64_t first = place_of(bounds[0]), end = place_of(bounds[1]);
    if (bounds[0] > bounds[1] || first > end) {
        index_.refuse_entry("document " + std::to_string(number) + " ends before it starts");
    }
    const std::uint64_t item = token_size(index_.type());
    return {static_cast<std::uint64_t>(first) / item, static_cast<std::uint64_t>(end - first) / item};
}

std::int64_t Reader::place_of(std::int64_t sequence) const {
    const auto size = static_cast<std::int64_t>(bin_.size());
    if (sequence >= 0 && static_cast<std::uint64_t>(sequence) == index_.sequences()) return size;
    if (sequence < 0 || static_cast<std::uint64_t>(sequence) > index_.sequences()) {
        index_.refuse_entry("its documents do not cover its sequences");
    }
    std::int64_t offset;
    index_.offsets(static_cast<std::uint64_t>(sequence), 1, &offset);
    if (offset < 0 || offset > size || offset % static_cast<std::int64_t>(token_size(index_.type())) != 0) {
        index_.refuse_entry("sequence " + std::to_string(sequence) + " does not start at a token of the .bin");
    }
    return offset;
}

std::int64_t Reader::start_of(std::uint64_t document) const {
    std::int64_t sequence;
    index_.document_starts(document, 1, &sequence);
    return place_of(sequence) / static_cast<std::int64_t>(token_size(index_.type()));
}

std::uint64_t Reader::first_from(std::int64_t token) const {
    std::uint64_t low = 0, high = index_.documents();
    while (low < high) {
        const std::uint64_t middle = low + (high - low) / 2;
        if (start_of(middle) < token) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

std::vector<std::int64_t> Reader::documents_between(std::int64_t first, std::int64_t end) const {
    const std::uint64_t low = first_from(first), high = first_from(end);
    if (low >= high) return {};
    std::vector<std::int64_t> starts(static_cast<std::size_t>(high - low));
    index_.document_starts(low, high - low, starts.data());
    const std::int64_t base = starts.front(), last = starts.back();
    const auto sequences = static_cast<std::int64_t>(index_.sequences());
    if (base < 0 || base > last || last > sequences) index_.refuse_entry("its documents do not cover its sequences");
    std::vector<std::int64_t> offsets(static_cast<std::size_t>(std::min(last + 1, sequences) - base));
    index_.offsets(static_cast<std::uint64_t>(base), offsets.size(), offsets.data());
    offsets.push_back(static_cast<std::int64_t>(bin_.size()));  // where a document of no sequences may start
    const auto item = static_cast<std::int64_t>(token_size(index_.type()));
    std::int64_t before = first;
    for (std::int64_t& start : starts) {
        if (start < base || start > last) index_.refuse_entry("its documents do not cover its sequences");
        const std::int64_t offset = offsets[static_cast<std::size_t>(start - base)];
        if (offset < 0 || offset % item != 0) index_.refuse_entry("a sequence does not start at a token");
        start = offset / item;
        if (start < before || start >= end) index_.refuse_entry("its documents do not lie one after the other");
        before = start;
    }
    return starts;
}

void Reader::verify() const {
    index_.check_lengths([](const std::int32_t*, std::size_t) {});
    index_.check_documents([](const std::int64_t*, std::size_t) {});
}

}  // namespace megalm
