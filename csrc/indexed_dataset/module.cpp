// The Python module megalm._indexed_dataset.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <limits>
#include <stdexcept>
#include <string>

#include "batch_memory.hpp"
#include "gather.hpp"
#include "merge.hpp"
#include "reader.hpp"
#include "writer.hpp"

namespace py = pybind11;

namespace {

using megalm::BatchMemory;
using megalm::Index;
using megalm::OpenFiles;
using megalm::Reader;
using megalm::Stream;
using megalm::TokenType;
using megalm::Writer;
using Path = std::filesystem::path;
using Unlocked = py::call_guard<py::gil_scoped_release>;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

TokenType token_type(const std::string& name) {
    if (name == "uint16") return TokenType::kUint16;
    if (name == "int32") return TokenType::kInt32;
    throw std::invalid_argument("dtype '" + name + "' is neither 'uint16' nor 'int32'");
}

const char* type_name(TokenType type) {
    switch (type) {
        case TokenType::kUint8: return "uint8";
        case TokenType::kInt8: return "int8";
        case TokenType::kInt16: return "int16";
        case TokenType::kInt64: return "int64";
        case TokenType::kUint16: return "uint16";
        case TokenType::kInt32: break;
    }
    return "int32";
}

// As void pointers, because an array made from a buffer may be unaligned.
const void* data_of(const py::array& array) { return array.data(); }

template <typename T>
std::size_t flat_size(const Array<T>& array, const char* name) {
    if (array.ndim() != 1) throw std::invalid_argument(std::string(name) + " must be flat");
    return static_cast<std::size_t>(array.size());
}

template <typename Token>
void append(Writer& writer, const Array<Token>& tokens, const Array<std::int64_t>& lengths) {
    if (tokens.ndim() != 1 || lengths.ndim() != 1) throw std::invalid_argument("tokens and lengths must be flat");
    const auto num_tokens = static_cast<std::size_t>(tokens.size());
    const auto num_documents = static_cast<std::size_t>(lengths.size());
    const void *const token_data = data_of(tokens), *const length_data = data_of(lengths);
    const py::gil_scoped_release release;
    writer.append<Token>(token_data, num_tokens, length_data, num_documents);
}

// A part of an index array, the rest of it if no count is given.
template <typename T, typename Read>
Array<T> entries(std::uint64_t first, std::optional<std::uint64_t> count, std::uint64_t length, Read read) {
    const std::uint64_t wanted = count ? *count : length - std::min(first, length);
    if (first > length || wanted > length - first) {
        throw std::out_of_range("entries " + std::to_string(first) + " to " + std::to_string(first + wanted) + " of " +
                                std::to_string(length));
    }
    Array<T> result(static_cast<py::ssize_t>(wanted));
    T* const out = result.mutable_data();
    const py::gil_scoped_release release;
    read(first, wanted, out);
    return result;
}

Array<std::int64_t> read_range(const Reader& reader, std::uint64_t start, std::uint64_t count) {
    if (start > reader.tokens() || count > reader.tokens() - start) {
        throw std::out_of_range(reader.bin().path() + ": tokens " + std::to_string(start) + " to " +
                                std::to_string(start + count) + " of " + std::to_string(reader.tokens()));
    }
    Array<std::int64_t> result(static_cast<py::ssize_t>(count));
    std::int64_t* const out = result.mutable_data();
    const py::gil_scoped_release release;
    reader.read(start, count, out);
    return result;
}

void merge(const std::vector<Path>& inputs, const Path& output, const py::object& on_progress) {
    std::vector<std::string> prefixes;
    for (const Path& input : inputs) prefixes.push_back(input.string());
    const auto progress = [&on_progress](std::uint64_t done, std::uint64_t total) {
        const py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // an interrupt ends a long merge
        if (!on_progress.is_none()) on_progress(done, total);
    };
    const py::gil_scoped_release release;
    megalm::merge(prefixes, output.string(), progress);
}

void gather(const std::unordered_map<std::int64_t, std::shared_ptr<Stream>>& streams,
            const Array<std::int64_t>& source_P, const Array<std::int64_t>& start_P,
            const Array<std::int64_t>& length_P, std::int64_t eod, Array<std::int64_t>& out) {
    const std::size_t count = flat_size(source_P, "source_P"), total = flat_size(out, "out");
    if (flat_size(start_P, "start_P") != count || flat_size(length_P, "length_P") != count) {
        throw std::invalid_argument("each piece has a source, a start and a length");
    }
    if (!out.writeable()) throw std::invalid_argument("out is read-only");
    const megalm::Pieces pieces{data_of(source_P), data_of(start_P), data_of(length_P), count};
    void* const place = static_cast<py::array&>(out).mutable_data();
    const py::gil_scoped_release release;
    megalm::gather(streams, pieces, eod, place, total);
}

// An array whose memory goes back to where it is from when the array, and all views of it, are gone.
template <typename T>
Array<T> empty(const std::shared_ptr<BatchMemory>& memory, const std::vector<py::ssize_t>& shape) {
    struct Loan {
        std::shared_ptr<BatchMemory> memory;
        BatchMemory::Block block;
        std::size_t size;
    };
    std::size_t size = sizeof(T);
    for (const py::ssize_t dim : shape) {
        if (dim < 0 || __builtin_mul_overflow(size, static_cast<std::size_t>(dim), &size)) {
            throw std::invalid_argument("an array of no possible shape");
        }
    }
    auto loan = std::make_unique<Loan>(Loan{memory, memory->take(size), size});
    const auto* const data = reinterpret_cast<const T*>(loan->block.get());
    const py::capsule owner(loan.release(), [](void* pointer) {
        const std::unique_ptr<Loan> loan(static_cast<Loan*>(pointer));
        loan->memory->give_back(std::move(loan->block), loan->size);
    });
    return Array<T>(shape, data, owner);
}

py::tuple assemble(const Array<std::int64_t>& tokens_BS1, std::optional<std::int64_t> eod,
                   const std::shared_ptr<BatchMemory>& memory) {
    if (tokens_BS1.ndim() != 2 || tokens_BS1.shape(1) < 2) {
        throw std::invalid_argument("tokens_BS1 has B rows of S + 1 tokens, S at least 1");
    }
    const auto sequences = static_cast<std::size_t>(tokens_BS1.shape(0));
    const auto length = static_cast<std::size_t>(tokens_BS1.shape(1)) - 1;
    const auto total = static_cast<py::ssize_t>(sequences * length);
    if (total > std::numeric_limits<std::int32_t>::max()) {
        throw std::invalid_argument("a micro-batch has at most 2147483647 tokens");
    }
    auto tokens_T = empty<std::int64_t>(memory, {total}), labels_T = empty<std::int64_t>(memory, {total});
    auto positions_T = empty<std::int64_t>(memory, {total});
    auto loss_mask_T = empty<bool>(memory, {total});
    const void* const rows = data_of(tokens_BS1);
    const megalm::Assembled out{tokens_T.mutable_data(), labels_T.mutable_data(), loss_mask_T.mutable_data(),
                                positions_T.mutable_data()};
    std::vector<std::int32_t> segments;
    {
        const py::gil_scoped_release release;
        segments = megalm::assemble(rows, sequences, length, eod, out);
    }
    const Array<std::int32_t> ends(static_cast<py::ssize_t>(segments.size()), segments.data());
    return py::make_tuple(tokens_T, labels_T, loss_mask_T, positions_T, ends);
}

py::object decoded(const std::string& path) {
    return py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(path.c_str()));
}

void translate(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const megalm::FileError& error) {
        const auto arguments = py::make_tuple(error.code, std::strerror(error.code), decoded(error.path));
        PyErr_SetObject(PyExc_OSError, arguments.ptr());
    } catch (const megalm::BadFile& error) {
        const auto message = decoded(error.path + ": " + error.reason + ": prepare the data again");
        PyErr_SetObject(py::module_::import("megalm.errors").attr("UserError").ptr(), message.ptr());
    }
}

constexpr const char* kAppend = R"(Appends documents; `lengths` says how many tokens each has.

`tokens` is int32 or uint32, `lengths` is int64. Nothing is written if a token does not fit the dtype or the lengths do
not add up (ValueError that names the file). After an OSError (a full disk) the shard is discarded.)";

constexpr const char* kGather = R"(Copies pieces of token streams into `out`, one after the other, without the GIL.

Piece p is `length_P[p]` tokens from token `start_P[p]` of `streams[source_P[p]]`; source -1 stands for as many times
`eod`. All arrays are int64. ValueError if the pieces do not fill `out` or are not in their streams, UserError that
names the file if a file is missing or damaged.)";

void bind_writer(py::module_& m) {
    py::class_<Writer>(m, "Writer", "Writes one shard; the files appear under their names when it is finished.")
        .def(py::init([](const Path& prefix, const std::string& dtype) {
                 return std::make_unique<Writer>(prefix.string(), token_type(dtype));
             }),
             py::arg("prefix"), py::arg("dtype"), "PREFIX.bin and PREFIX.idx, tokens as 'uint16' or 'int32'.")
        .def("append", &append<std::int32_t>, py::arg("tokens").noconvert(), py::arg("lengths").noconvert(), kAppend)
        .def("append", &append<std::uint32_t>, py::arg("tokens").noconvert(), py::arg("lengths").noconvert())
        .def("finish", &Writer::finish, Unlocked(), "Writes the index, syncs both files and gives them their names.")
        .def("discard", &Writer::discard, Unlocked(), "Removes what was written, unless the shard is finished.")
        .def("__enter__", [](py::object self) { return self; })
        .def("__exit__",
             [](Writer& writer, const py::object& kind, const py::object&, const py::object&) {
                 const bool failed = !kind.is_none();
                 const py::gil_scoped_release release;
                 if (failed) {
                     writer.discard();
                 } else {
                     writer.finish();
                 }
             })
        .def_property_readonly("documents", &Writer::documents)
        .def_property_readonly("tokens", &Writer::tokens);
}

void bind_reader(py::module_& m) {
    using Count = std::optional<std::uint64_t>;
    const auto first = py::arg("first") = 0, count = py::arg("count") = py::none();
    py::class_<Reader>(m, "Reader", "Reads one shard, PREFIX.bin and PREFIX.idx, whoever wrote it.")
        .def(py::init([](const Path& prefix) {
                 const std::string text = prefix.string();
                 const py::gil_scoped_release release;
                 return std::make_unique<Reader>(text);
             }),
             py::arg("prefix"), "Checks the header and both sizes; UserError that names the file.")
        .def_property_readonly("dtype", [](const Reader& reader) { return type_name(reader.index().type()); })
        .def_property_readonly("sequences", [](const Reader& reader) { return reader.index().sequences(); })
        .def_property_readonly("documents", [](const Reader& reader) { return reader.index().documents(); })
        .def_property_readonly("tokens", &Reader::tokens)
        .def_property_readonly("has_modes", [](const Reader& reader) { return reader.index().has_modes(); })
        .def("lengths",
             [](const Reader& reader, std::uint64_t first, Count count) {
                 const Index& index = reader.index();
                 return entries<std::int32_t>(first, count, index.sequences(),
                                              [&](auto... range) { index.lengths(range...); });
             },
             first, count, "Tokens of each sequence: int32[count], from sequence `first` on.")
        .def("offsets",
             [](const Reader& reader, std::uint64_t first, Count count) {
                 const Index& index = reader.index();
                 return entries<std::int64_t>(first, count, index.sequences(),
                                              [&](auto... range) { index.offsets(range...); });
             },
             first, count, "Byte offset of each sequence in the .bin: int64[count], from sequence `first` on.")
        .def("document_starts",
             [](const Reader& reader, std::uint64_t first, Count count) {
                 const Index& index = reader.index();
                 return entries<std::int64_t>(first, count, index.documents() + 1,
                                              [&](auto... range) { index.document_starts(range...); });
             },
             first, count, "First sequence of each document, and the number of sequences at the end: int64[count].")
        .def("modes",
             [](const Reader& reader, std::uint64_t first, Count count) {
                 const Index& index = reader.index();
                 return entries<std::int8_t>(first, count, index.has_modes() ? index.sequences() : 0,
                                             [&](auto... range) { index.modes(range...); });
             },
             first, count, "Mode of each sequence, in multimodal data: int8[count].")
        .def("read", &read_range, py::arg("start"), py::arg("count"), "Tokens from token `start` on: int64[count].")
        .def("document",
             [](const Reader& reader, std::uint64_t number) {
                 const auto [start, length] = reader.document(number);
                 return read_range(reader, start, length);
             },
             py::arg("number"), "A document's tokens, those of all its sequences: int64.")
        .def("documents_between",
             [](const Reader& reader, std::int64_t first, std::int64_t end) {
                 std::vector<std::int64_t> starts;
                 {
                     const py::gil_scoped_release release;
                     starts = reader.documents_between(first, end);
                 }
                 return Array<std::int64_t>(static_cast<py::ssize_t>(starts.size()), starts.data());
             },
             py::arg("first"), py::arg("end"), "First tokens of all documents that start in [first, end): int64.")
        .def("verify", &Reader::verify, Unlocked(), "Reads the whole index; UserError names the first wrong entry.");
}

void bind_streams(py::module_& m) {
    py::class_<OpenFiles, std::shared_ptr<OpenFiles>>(m, "OpenFiles", "Files that stay open, the last used ones.")
        .def(py::init<std::size_t>(), py::arg("limit") = 256);
    py::class_<Stream, std::shared_ptr<Stream>>(m, "Stream", "A directory's shards as one; opened when they are read.")
        .def(py::init([](std::shared_ptr<OpenFiles> files, const Path& directory, std::vector<std::string> names,
                         const std::vector<std::uint64_t>& tokens, const std::string& dtype, std::uint64_t vocab_size) {
                 return std::make_shared<Stream>(std::move(files), directory.string(), std::move(names), tokens,
                                                 token_type(dtype), vocab_size);
             }),
             py::arg("files"), py::arg("directory"), py::arg("names"), py::arg("tokens"), py::arg("dtype"),
             py::arg("vocab_size"), "Shard names[i] has tokens[i] tokens, each of them below `vocab_size`.")
        .def_property_readonly("tokens", &Stream::tokens);
    m.def("gather", &gather, py::arg("streams"), py::arg("source_P").noconvert(), py::arg("start_P").noconvert(),
          py::arg("length_P").noconvert(), py::arg("eod"), py::arg("out").noconvert(), kGather);
    py::class_<BatchMemory, std::shared_ptr<BatchMemory>>(m, "BatchMemory", "Memory that batches use again and again.")
        .def(py::init<>())
        .def("empty", &empty<std::int64_t>, py::arg("shape"), "An uninitialised int64 array.");
    m.def("assemble", &assemble, py::arg("tokens_BS1").noconvert(), py::arg("eod"), py::arg("memory").none(false),
          "Tokens, labels, loss mask, positions, segments of int64[B, S + 1]; with `eod`, documents end with it.");
}

}  // namespace

PYBIND11_MODULE(_indexed_dataset, m) {
    m.doc() = "Writes, reads and joins Megatron's indexed datasets: PREFIX.bin and PREFIX.idx.";
    py::register_local_exception_translator(&translate);
    bind_writer(m);
    bind_reader(m);
    bind_streams(m);
    m.def("merge", &merge, py::arg("inputs"), py::arg("output"), py::arg("on_progress") = py::none(),
          "Joins shards, given by prefix, in memory that does not grow; `on_progress(done, total)` is told bytes.");
}
