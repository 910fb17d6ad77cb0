#include "gather.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "tokens.hpp"

namespace megalm {

namespace {

constexpr std::uint64_t kMostTokens = std::uint64_t{1} << 56;

}  // namespace

OpenFiles::OpenFiles(std::size_t limit) : limit_(limit) {
    if (limit == 0) throw std::invalid_argument("at least one file must be open");
}

std::shared_ptr<const InputFile> OpenFiles::get(const std::string& path) {
    const std::lock_guard lock(mutex_);
    const auto found = places_.find(path);
    if (found != places_.end()) {
        files_.splice(files_.begin(), files_, found->second);
    } else {
        if (files_.size() == limit_) {
            places_.erase(files_.back()->path());
            files_.pop_back();
        }
        files_.push_front(std::make_shared<const InputFile>(path));
        places_.emplace(files_.front()->path(), files_.begin());
    }
    return files_.front();
}

Stream::Stream(std::shared_ptr<OpenFiles> files, std::string directory, std::vector<std::string> names,
               const std::vector<std::uint64_t>& tokens, TokenType type, std::uint64_t vocab_size)
    : files_(std::move(files)),
      directory_(std::move(directory)),
      names_(std::move(names)),
      type_(type),
      vocab_size_(vocab_size) {
    if (names_.size() != tokens.size()) throw std::invalid_argument("each shard has a name and a number of tokens");
    std::uint64_t end = 0;
    for (const std::uint64_t count : tokens) {
        // Below, sums of places and sizes in bytes must not overflow.
        if (count > kMostTokens - end) throw BadFile(directory_, "damaged: it tells of more tokens than a disk holds");
        ends_.push_back(end += count);
    }
}

void Stream::read(std::uint64_t start, std::uint64_t count, void* out, char* scratch) const {
    auto shard = static_cast<std::size_t>(std::upper_bound(ends_.begin(), ends_.end(), start) - ends_.begin());
    char* place = static_cast<char*>(out);
    for (; count > 0; ++shard) {
        const std::uint64_t first = shard == 0 ? 0 : ends_[shard - 1];
        const std::uint64_t here = std::min(count, ends_[shard] - start);
        if (here == 0) continue;
        const auto file = files_->get(directory_ + "/" + names_[shard] + ".bin");
        const std::uint64_t expected = (ends_[shard] - first) * token_size(type_);
        if (file->size() != expected) {
            throw BadFile(file->path(), std::string("too ") + (file->size() < expected ? "short" : "long") + ": " +
                                            std::to_string(file->size()) + " bytes, while the manifest tells of " +
                                            std::to_string(expected));
        }
        read_tokens(*file, type_, vocab_size_, start - first, here, place, scratch);
        place += here * sizeof(std::int64_t);
        start += here;
        count -= here;
    }
}

namespace {

[[noreturn]] void refuse(std::size_t piece, const std::string& reason) {
    throw std::invalid_argument("piece " + std::to_string(piece) + " " + reason);
}

void check(const std::unordered_map<std::int64_t, std::shared_ptr<Stream>>& streams, const Pieces& pieces,
           std::size_t total) {
    std::uint64_t left = total;
    for (std::size_t i = 0; i < pieces.count; ++i) {
        const auto source = load<std::int64_t>(pieces.source, i);
        const auto start = load<std::int64_t>(pieces.start, i);
        const auto length = load<std::int64_t>(pieces.length, i);
        if (length < 0 || static_cast<std::uint64_t>(length) > left) {
            refuse(i, "has " + std::to_string(length) + " tokens, while " + std::to_string(left) + " are left to fill");
        }
        left -= static_cast<std::uint64_t>(length);
        if (source == -1) continue;
        const auto stream = streams.find(source);
        if (stream == streams.end()) refuse(i, "is of source " + std::to_string(source) + ", which is not there");
        const std::uint64_t tokens = stream->second->tokens();
        if (start < 0 || static_cast<std::uint64_t>(start) > tokens ||
            static_cast<std::uint64_t>(length) > tokens - static_cast<std::uint64_t>(start)) {
            refuse(i, "is " + std::to_string(length) + " tokens from token " + std::to_string(start) +
                          ", while source " + std::to_string(source) + " has " + std::to_string(tokens));
        }
    }
    if (left != 0) throw std::invalid_argument("the pieces leave " + std::to_string(left) + " tokens to fill");
}

}  // namespace

void gather(const std::unordered_map<std::int64_t, std::shared_ptr<Stream>>& streams, const Pieces& pieces,
            std::int64_t eod, void* out, std::size_t total) {
    check(streams, pieces, total);
    std::vector<char> scratch(kReadBytes);
    char* place = static_cast<char*>(out);
    for (std::size_t i = 0; i < pieces.count; ++i) {
        const auto source = load<std::int64_t>(pieces.source, i);
        const auto length = static_cast<std::size_t>(load<std::int64_t>(pieces.length, i));
        if (source == -1) {
            for (std::size_t token = 0; token < length; ++token) store(place, token, eod);
        } else {
            const auto start = static_cast<std::uint64_t>(load<std::int64_t>(pieces.start, i));
            streams.at(source)->read(start, length, place, scratch.data());
        }
        place += length * sizeof(std::int64_t);
    }
}

std::vector<std::int32_t> assemble(const void* tokens_BS1, std::size_t sequences, std::size_t length,
                                   std::optional<std::int64_t> eod, const Assembled& out) {
    std::vector<std::int32_t> segments = {0};
    const auto close_segment = [&](std::size_t end) {
        const auto start = static_cast<std::size_t>(segments.back());
        std::iota(out.positions_T + start, out.positions_T + end, std::int64_t{0});
        segments.push_back(static_cast<std::int32_t>(end));
    };
    for (std::size_t sequence = 0; sequence < sequences; ++sequence) {
        const std::size_t first = sequence * length;
        const char* const row = static_cast<const char*>(tokens_BS1) + sequence * (length + 1) * sizeof(std::int64_t);
        std::memcpy(out.tokens_T + first, row, length * sizeof(std::int64_t));
        std::memcpy(out.labels_T + first, row + sizeof(std::int64_t), length * sizeof(std::int64_t));
        bool* const mask = out.loss_mask_T + first;
        if (eod) {
            // The mask is false at the documents' ends, so the library's search for a zero byte finds these.
            for (std::size_t i = 0; i < length; ++i) mask[i] = out.tokens_T[first + i] != *eod;
            const bool* next = mask;
            while (const void* end = std::memchr(next, 0, static_cast<std::size_t>(mask + length - next))) {
                next = static_cast<const bool*>(end) + 1;
                close_segment(first + static_cast<std::size_t>(next - mask));
                if (next == mask + length) break;
            }
        } else {
            std::memset(mask, 1, length);
        }
        const std::size_t last = first + length;
        if (static_cast<std::size_t>(segments.back()) != last) close_segment(last);
    }
    return segments;
}

}  // namespace megalm
