// Calls every function of the CPU library on memory of exactly the size that it may touch, which the address sanitizer
// watches: each element type, lengths around those of vectors, each kind of mask. Prints the instruction set.
#include <cstdio>
#include <initializer_list>
#include <memory>

#include "softmax.h"

using namespace megalm;
template <class T>
std::unique_ptr<T[]> filled(std::int64_t n, T value) {
    auto memory = std::make_unique<T[]>(n);
    for (std::int64_t i = 0; i < n; i++) memory[i] = value;
    return memory;
}

extern "C" const char* megalm_instruction_set();

int main() {
    for (int dtype = 0; dtype < 3; dtype++)
        for (std::int64_t keys : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 100, 2047, 2049})
            for (int kind = 0; kind < 8; kind++) {
                const std::int64_t B = 2, H = 2, Q = 3, rows = B * H * Q, bytes = rows * keys * (dtype ? 2 : 4);
                auto x = filled<char>(bytes, 0), p = filled<char>(bytes, 1), g = filled<char>(bytes, 1);
                auto padding = filled<std::uint8_t>(B * keys, kind & 1), allowed = filled<std::uint8_t>(keys, 1);
                auto sinks = filled<float>(H, 0.5f), lse = filled<float>(rows, 0), a = filled<float>(rows, 0),
                     b = filled<float>(rows, 0), sink = filled<float>(rows, 0);
                auto first = filled<std::int32_t>(B * Q, 1);
                const bool with_sinks = kind & 2;
                Mask mask{B, H, Q, keys, kind & 4 ? first.get() : nullptr, padding.get(), allowed.get(), 0, 0, 0,
                          with_sinks ? sinks.get() : nullptr, kind & 4 ? 5 : 0, kind & 1, 0.5f, kind & 2 ? 3.f : 0.f};
                int error = megalm_softmax_forward(&mask, dtype, x.get(), p.get(), lse.get(), a.get(), b.get(), 2);
                error |= megalm_softmax_backward(&mask, dtype, g.get(), p.get(), x.get(), lse.get(), g.get(),
                                                 with_sinks ? sink.get() : nullptr, 2);
                auto targets = filled<std::int64_t>(rows, kind % 2 ? keys - 1 : keys);
                auto weight = filled<float>(rows, 1);
                error |= megalm_cross_entropy_statistics(rows, keys, dtype, x.get(), targets.get(), mask.softcap,
                                                         a.get(), b.get(), lse.get(), sink.get(), 2);
                error |= megalm_cross_entropy_backward(rows, keys, dtype, x.get(), targets.get(), a.get(), weight.get(),
                                                       mask.softcap, 0.1f, 0.9f, 0.01f, x.get(), 2);
                if (error) return 1;
            }
    std::puts(megalm_instruction_set());
}
