// The Python module megalm._attention.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.hpp"
#include "dispatch.hpp"

namespace py = pybind11;

namespace {

using megalm::attention::Call;
using megalm::attention::Kernels;
using megalm::attention::Segment;

constexpr std::int64_t kLongest = std::int64_t{1} << 30;  // places in a segment, padded, are ints

const std::vector<Kernels>& kernels() {
    static const std::vector<Kernels> found = megalm::attention::kernels();
    return found;
}

const Kernels& kernel(const std::string& name) {
    for (const Kernels& kernel : kernels())
        if (name == kernel.name) return kernel;
    throw std::invalid_argument("this processor does not run the kernels " + name);
}

std::vector<std::string> names(bool bfloat16) {
    std::vector<std::string> found;
    for (const Kernels& kernel : kernels())
        if (kernel.bfloat16 == bfloat16) found.emplace_back(kernel.name);
    return found;
}

// Addresses come as integers: the caller, megalm.ops.cpu_attention, vouches for them.
void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

struct Shape {
    std::vector<Segment> segments;  // which `call` points to
    Call call{};

    Shape(const std::vector<std::int64_t>& ends, int heads, int kv_heads, int head_dim, int window, float softcap,
          int threads) {
        if (ends.empty() || ends[0] != 0) throw std::invalid_argument("ends must start with 0");
        if (kv_heads < 1 || heads < kv_heads || heads % kv_heads != 0)
            throw std::invalid_argument("heads must be a multiple of kv_heads");
        if (head_dim < 16 || head_dim > 256 || head_dim % 16 != 0)
            throw std::invalid_argument("head_dim must be a multiple of 16 of at most 256");
        if (window < 1) throw std::invalid_argument("window must be positive");
        for (std::size_t i = 1; i < ends.size(); ++i) {
            const std::int64_t length = ends[i] - ends[i - 1];
            if (length < 0 || length > kLongest) throw std::invalid_argument("ends must rise, by at most 2**30");
            if (length == 0) continue;
            segments.push_back({ends[i - 1], static_cast<int>(length)});
            if (length > call.longest) call.longest = static_cast<int>(length);
        }
        call.segments = segments.data();
        call.segment_count = static_cast<std::int64_t>(segments.size());
        call.tokens = ends.back();
        call.heads = heads, call.kv_heads = kv_heads, call.head_dim = head_dim;
        call.window = window, call.softcap = softcap, call.threads = threads < 1 ? 1 : threads;
    }
    Shape(const Shape&) = delete;
    Shape& operator=(const Shape&) = delete;
};

using Addresses = std::vector<std::uintptr_t>;

void need(const Addresses& addresses, std::size_t count) {
    if (addresses.size() != count) throw std::invalid_argument("needs " + std::to_string(count) + " addresses");
}

void run(void (*pass)(const Call&), const Call& call) {
    const py::gil_scoped_release release;
    if (call.segment_count > 0) pass(call);
}

void forward(const std::string& name, const Shape& shape, const Addresses& of) {
    need(of, 5);
    Call call = shape.call;
    call.q = pointer(of[0]), call.k = pointer(of[1]), call.v = pointer(of[2]);
    call.out = pointer(of[3]), call.lse2 = static_cast<float*>(pointer(of[4]));
    run(kernel(name).forward, call);
}

void backward(const std::string& name, const Shape& shape, const Addresses& of) {
    need(of, 9);
    Call call = shape.call;
    call.q = pointer(of[0]), call.k = pointer(of[1]), call.v = pointer(of[2]);
    call.out = pointer(of[3]), call.lse2 = static_cast<float*>(pointer(of[4]));
    call.grad_out = pointer(of[5]);
    call.grad_q = pointer(of[6]), call.grad_k = pointer(of[7]), call.grad_v = pointer(of[8]);
    run(kernel(name).backward, call);
}

}  // namespace

PYBIND11_MODULE(_attention, m) {
    m.doc() = "Causal grouped-query attention within documents by a processor's matrix units.";
    m.def("kernels", &names, py::arg("bfloat16"),
          "Names of the kernels that this processor runs, for bfloat16 or else float32, the fastest first.");
    py::class_<Shape>(m, "Shape", "Segments, by their ends [0, ..., tokens], and sizes; of how many threads at most.")
        .def(py::init<const std::vector<std::int64_t>&, int, int, int, int, float, int>(), py::arg("ends"),
             py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("window"), py::arg("softcap"),
             py::arg("threads"));
    m.def("forward", &forward, py::arg("kernels"), py::arg("shape"), py::arg("addresses"),
          "Of the addresses of contiguous q, k, v, writes out and lse2 (float32 [2, heads, tokens]).");
    m.def("backward", &backward, py::arg("kernels"), py::arg("shape"), py::arg("addresses"),
          "Of the addresses of q, k, v, out, lse2 and grad_out, writes grad_q, grad_k and grad_v.");
}
