#include "merge.hpp"

#include <algorithm>
#include <stdexcept>

#include "atomic_file.hpp"
#include "reader.hpp"
#include "writer.hpp"

namespace megalm {

namespace {

constexpr std::uint64_t kReportBytes = std::uint64_t{1} << 26;

struct Totals {
    TokenType type = TokenType::kInt32;
    bool has_modes = false;
    std::uint64_t sequences = 0;
    std::uint64_t documents = 0;
    std::uint64_t bytes = 0;
};

// Opens one input after the other, so that no more than one is open at a time.
Totals add_up(const std::vector<std::string>& inputs) {
    Totals totals;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        const Reader reader(inputs[i]);
        const Index& index = reader.index();
        if (i == 0) {
            totals.type = index.type();
            totals.has_modes = index.has_modes();
        }
        if (index.type() != totals.type) {
            throw BadFile(index.path(), "its tokens are of another type than those of " + inputs[0] + ".idx");
        }
        if (index.has_modes() != totals.has_modes) {
            throw BadFile(index.path(), "only one of it and " + inputs[0] + ".idx is multimodal");
        }
        totals.sequences += index.sequences();
        totals.documents += index.documents();
        totals.bytes += reader.bin().size();
    }
    return totals;
}

void write_index(AtomicFile& idx, const Totals& totals, const std::vector<std::string>& inputs) {
    write_header(idx, totals.type, totals.sequences, totals.documents);
    for (const std::string& input : inputs) {
        Index(input + ".idx").check_lengths([&](const std::int32_t* lengths, std::size_t count) {
            idx.write(lengths, count * sizeof *lengths);
        });
    }
    std::vector<std::int64_t> shifted(Index::kBlock);
    std::int64_t offset = 0;
    const auto item = static_cast<std::int64_t>(token_size(totals.type));
    for (const std::string& input : inputs) {
        Index(input + ".idx").check_lengths([&](const std::int32_t* lengths, std::size_t count) {
            for (std::size_t i = 0; i < count; ++i) {
                shifted[i] = offset;
                offset += lengths[i] * item;
            }
            idx.write(shifted.data(), count * sizeof shifted[0]);
        });
    }
    std::int64_t sequences = 0;
    for (const std::string& input : inputs) {  // the end of one table is the start of the next
        const Index index(input + ".idx");
        std::uint64_t left = index.documents();
        index.check_documents([&](const std::int64_t* starts, std::size_t count) {
            for (std::size_t i = 0; i < count; ++i) shifted[i] = sequences + starts[i];
            const std::size_t wanted = static_cast<std::size_t>(std::min<std::uint64_t>(count, left));
            idx.write(shifted.data(), wanted * sizeof shifted[0]);
            left -= wanted;
        });
        sequences += static_cast<std::int64_t>(index.sequences());
    }
    idx.put(sequences);
    std::vector<std::int8_t> modes(totals.has_modes ? Index::kBlock : 0);
    for (const std::string& input : inputs) {
        if (!totals.has_modes) break;
        const Index index(input + ".idx");
        for (std::uint64_t first = 0; first < index.sequences(); first += modes.size()) {
            const std::uint64_t count = std::min<std::uint64_t>(modes.size(), index.sequences() - first);
            index.modes(first, count, modes.data());
            idx.write(modes.data(), static_cast<std::size_t>(count));
        }
    }
}

void copy_tokens(AtomicFile& bin, std::uint64_t total, const std::vector<std::string>& inputs,
                 const MergeProgress& progress) {
    std::vector<char> block(std::size_t{1} << 20);
    std::uint64_t done = 0, reported = 0;
    for (const std::string& input : inputs) {
        const Reader reader(input);
        const std::uint64_t size = reader.bin().size();
        for (std::uint64_t offset = 0; offset < size; offset += block.size()) {
            const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(block.size(), size - offset));
            reader.bin().read_at(offset, block.data(), count);
            bin.write(block.data(), count);
            done += count;
            if (done - reported >= kReportBytes || done == total) progress(reported = done, total);
        }
    }
}

}  // namespace

void merge(const std::vector<std::string>& inputs, const std::string& output, const MergeProgress& progress) {
    if (inputs.empty()) throw std::invalid_argument(output + ": there is nothing to merge");
    const Totals totals = add_up(inputs);
    AtomicFile bin(output + ".bin");
    AtomicFile idx(output + ".idx");
    write_index(idx, totals, inputs);
    copy_tokens(bin, totals.bytes, inputs, progress);
    idx.sync();
    bin.sync();
    publish_pair(bin, idx);
}

}  // namespace megalm
