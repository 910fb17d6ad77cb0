// bfloat16 by AVX-512's dot products of pairs: 32 multiply-adds an instruction, summed in float32.

#if defined(__AVX512BF16__)

#include "attention.hpp"
#include "backward.hpp"
#include "bfloat16.hpp"
#include "forward.hpp"

namespace {

struct DotProducts : Bfloat16 {
    static __m512 add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    __attribute__((noinline)) static void multiply(const Word* a, std::ptrdiff_t a_row, const Word* b,
                                                   std::ptrdiff_t b_row, float* c, std::ptrdiff_t c_row, int m,
                                                   int n, int k, bool add) {
        multiply_in_registers<DotProducts>(a, a_row, b, b_row, c, c_row, m, n, k, add);
    }
    static void begin() {}
    static void end() {}
};

}  // namespace

namespace megalm::attention::avx512_bf16 {

void forward(const Call& call) { ForwardPass<DotProducts>::run(call); }
void backward(const Call& call) { BackwardPass<DotProducts>::run(call); }

}  // namespace megalm::attention::avx512_bf16

#endif
