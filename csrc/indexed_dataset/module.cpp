// The Python module megalm._indexed_dataset.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <stdexcept>
#include <string>

#include "writer.hpp"

namespace py = pybind11;

namespace {

using megalm::TokenType;
using megalm::Writer;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

TokenType token_type(const std::string& name) {
    if (name == "uint16") return TokenType::kUint16;
    if (name == "int32") return TokenType::kInt32;
    throw std::invalid_argument("dtype '" + name + "' is neither 'uint16' nor 'int32'");
}

template <typename Token>
void append(Writer& writer, const Array<Token>& tokens, const Array<std::int64_t>& lengths) {
    if (tokens.ndim() != 1 || lengths.ndim() != 1) throw std::invalid_argument("tokens and lengths must be flat");
    // As void pointers, because an array made from a buffer may be unaligned.
    const void* const token_data = static_cast<const py::array&>(tokens).data();
    const void* const length_data = static_cast<const py::array&>(lengths).data();
    const auto num_tokens = static_cast<std::size_t>(tokens.size());
    const auto num_documents = static_cast<std::size_t>(lengths.size());
    const py::gil_scoped_release release;
    writer.append<Token>(token_data, num_tokens, length_data, num_documents);
}

constexpr const char* kAppend = R"(Appends documents: `lengths` (int64) says how many of `tokens` (int32 or uint32) each one has.

Nothing is written if a token does not fit the dtype or the lengths do not add up (ValueError that names the file).
After an OSError (a full disk) the shard is discarded.)";

}  // namespace

PYBIND11_MODULE(_indexed_dataset, m) {
    m.doc() = "Writes Megatron's indexed datasets: PREFIX.bin and PREFIX.idx.";

    py::register_local_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const megalm::FileError& error) {
            const auto path = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.path.c_str()));
            PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code, std::strerror(error.code), path).ptr());
        }
    });

    py::class_<Writer>(m, "Writer", "Writes one shard; the files appear under their names when it is finished.")
        .def(py::init([](const std::filesystem::path& prefix, const std::string& dtype) {
                 return std::make_unique<Writer>(prefix.string(), token_type(dtype));
             }),
             py::arg("prefix"), py::arg("dtype"), "PREFIX.bin and PREFIX.idx, tokens as 'uint16' or 'int32'.")
        .def("append", &append<std::int32_t>, py::arg("tokens").noconvert(), py::arg("lengths").noconvert(), kAppend)
        .def("append", &append<std::uint32_t>, py::arg("tokens").noconvert(), py::arg("lengths").noconvert())
        .def("finish", &Writer::finish, py::call_guard<py::gil_scoped_release>(),
             "Writes the index, syncs both files and gives them their names.")
        .def("discard", &Writer::discard, py::call_guard<py::gil_scoped_release>(),
             "Removes what was written, unless the shard is finished.")
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
