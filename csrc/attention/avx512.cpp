// float32 by AVX-512's fused multiply-add.

#if defined(__AVX512F__)

#include "attention.hpp"
#include "backward.hpp"
#include "forward.hpp"

namespace {

struct Float32 {
    using Element = float;
    static constexpr int kPair = 1;  // elements of a word
    static constexpr int kDegree = 5;

    static __m512 load(const Element* from) { return _mm512_loadu_ps(from); }
    static void store(Element* to, __m512 x) { _mm512_storeu_ps(to, x); }
    static void store_pair(Word* to, __m512 row, __m512 next) { store_rows(to, kGroup, row, next); }
    static void store_pair_and_rows(Word* to, Word* row_to, std::ptrdiff_t row_size, __m512 row, __m512 next) {
        store_pair(to, row, next);
        store_rows(row_to, row_size, row, next);
    }
    static void store_rows(Word* row_to, std::ptrdiff_t row_size, __m512 row, __m512 next) {
        _mm512_storeu_ps(row_to, row);
        _mm512_storeu_ps(row_to + row_size, next);
    }
    static void pair_rows(const Word* in, int rows, int columns, Word* out) {
        std::memcpy(out, in, sizeof(Word) * static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns));
    }

    static __m512 add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    __attribute__((noinline)) static void multiply(const Word* a, std::ptrdiff_t a_row, const Word* b,
                                                   std::ptrdiff_t b_row, float* c, std::ptrdiff_t c_row, int m,
                                                   int n, int k, bool add) {
        multiply_in_registers<Float32>(a, a_row, b, b_row, c, c_row, m, n, k, add);
    }
    static void begin() {}
    static void end() {}
};

}  // namespace

namespace megalm::attention::avx512 {

void forward(const Call& call) { ForwardPass<Float32>::run(call); }
void backward(const Call& call) { BackwardPass<Float32>::run(call); }

}  // namespace megalm::attention::avx512

#endif
