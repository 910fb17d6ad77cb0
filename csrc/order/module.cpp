// The Python module megalm._order.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "order.hpp"

namespace py = pybind11;

namespace {

using Lengths = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;
using Words = py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>;
using Weights = py::array_t<double, py::array::c_style | py::array::forcecast>;

constexpr std::int64_t kMostSlots = std::int64_t{1} << 30;  // so that a slot times a count does not overflow

// The vector's memory as an array, not copied.
py::array_t<std::int64_t> array(std::vector<std::int64_t>&& values) {
    auto* const kept = new std::vector<std::int64_t>(std::move(values));
    const py::capsule owner(kept, [](void* memory) { delete static_cast<std::vector<std::int64_t>*>(memory); });
    return py::array_t<std::int64_t>(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

py::tuple pack(const Lengths& lengths, std::int64_t bins, std::int64_t slots, bool open_end) {
    if (lengths.ndim() != 1) throw std::invalid_argument("lengths must be flat");
    const std::int64_t* const data = lengths.data();
    const auto count = static_cast<std::int64_t>(lengths.size());
    megalm::Packed packed;
    {
        const py::gil_scoped_release release;
        packed = megalm::pack(data, count, bins, slots, open_end);
    }
    return py::make_tuple(array(std::move(packed.item)), array(std::move(packed.skip)),
                          array(std::move(packed.length)), array(std::move(packed.first)));
}

py::tuple interleave(const Lengths& counts) {
    if (counts.ndim() != 1 || counts.size() < 1) throw std::invalid_argument("counts must be flat and not empty");
    const std::int64_t* const data = counts.data();
    std::int64_t period = 0;
    for (py::ssize_t s = 0; s < counts.size(); ++s) {
        if (data[s] < 1 || data[s] > kMostSlots - period) throw std::invalid_argument("a count is below 1 or too large");
        period += data[s];
    }
    py::array_t<std::int32_t> source(period), rank(period);
    if (!megalm::interleave(data, counts.size(), source.mutable_data(), rank.mutable_data()))
        throw std::logic_error("a sample missed its deadline");
    return py::make_tuple(source, rank);
}

py::array_t<std::int64_t> permute(const Words& index, const Words& size, const Words& key, int rounds) {
    if (index.ndim() != 1 || size.ndim() != 1 || key.ndim() != 1 || size.size() != index.size() ||
        key.size() != index.size())
        throw std::invalid_argument("index, size and key must be flat and of one length");
    if (rounds < 1) throw std::invalid_argument("a network has at least 1 round");
    py::array_t<std::int64_t> out(index.size());
    const std::uint64_t *const indices = index.data(), *const sizes = size.data(), *const keys = key.data();
    std::int64_t* const values = out.mutable_data();
    const auto count = static_cast<std::int64_t>(index.size());
    std::int64_t wrong = 0;
    {
        const py::gil_scoped_release release;
        wrong = megalm::permute(indices, sizes, keys, count, rounds, values);
    }
    if (wrong >= 0) throw py::index_error("index outside of the permutation's range");
    return out;
}

py::tuple blend(const Weights& weights, std::int64_t size) {
    if (weights.ndim() != 1 || weights.size() < 1) throw std::invalid_argument("weights must be flat and not empty");
    if (weights.size() > std::numeric_limits<std::int16_t>::max()) throw std::invalid_argument("too many sources");
    if (size < 0) throw std::invalid_argument("size is negative");
    py::array_t<std::int16_t> source(size);
    py::array_t<std::int64_t> rank(size);
    const double* const weight_data = weights.data();
    std::int16_t* const source_data = source.mutable_data();
    std::int64_t* const rank_data = rank.mutable_data();
    {
        const py::gil_scoped_release release;
        megalm::blend(weight_data, weights.size(), size, source_data, rank_data);
    }
    return py::make_tuple(source, rank);
}

}  // namespace

PYBIND11_MODULE(_order, m) {
    m.doc() = "Loops of the sample order: packing documents into sequences, Megatron's blending.";
    m.def("pack", &pack, py::arg("lengths"), py::arg("bins"), py::arg("slots"), py::arg("open_end"),
          "Packs documents of `lengths` (int64[n]) tokens into `bins` bins of `slots` tokens, cutting as few as can be.\n\n"
          "Returns document, tokens skipped in it and length of each piece, sorted by bin, and the first piece of each\n"
          "bin (bins + 1): all int64. ValueError if a length is not positive or they sum to more than bins * (slots - 1).");
    m.def("interleave", &interleave, py::arg("counts"),
          "Source and rank in it (both int32) of each slot of a period with `counts` (int64) slots of each source, in an\n"
          "order in which every prefix is within 1 of every share. ValueError if a count is below 1 or too large.");
    m.def("permute", &permute, py::arg("index"), py::arg("size"), py::arg("key"), py::arg("rounds"),
          "Where each index (all uint64[n]) goes under the bijection of [0, size) that the key selects: int64[n].\n\n"
          "IndexError if an index is not below its size.");
    m.def("blend", &blend, py::arg("weights"), py::arg("size"),
          "Megatron's build_blending_indices: source (int16[size]) and rank in it (int64[size]) of each sample.");
}
