// How bfloat16 tensors become words, two elements each; see vectors.hpp.

#pragma once

#include <cstring>

#include "vectors.hpp"

namespace {

struct Bfloat16 {
    using Element = std::uint16_t;
    static constexpr int kPair = 2;  // elements of a word
    static constexpr int kDegree = 3;

    static __m512 load(const Element* from) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }

    static void store(Element* to, __m512 x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    }

    // Rows p and p + 1 as 16 words, to be summed over p.
    static void store_pair(Word* to, __m512 row, __m512 next) { _mm512_storeu_si512(to, paired(both(row, next))); }

    // The same, and the two rows by themselves.
    static void store_pair_and_rows(Word* to, Word* row_to, std::ptrdiff_t row_size, __m512 row, __m512 next) {
        const __m512i x = both(row, next);
        _mm512_storeu_si512(to, paired(x));
        store_halves(row_to, row_size, x);
    }

    static void store_rows(Word* row_to, std::ptrdiff_t row_size, __m512 row, __m512 next) {
        store_halves(row_to, row_size, both(row, next));
    }

    // From rows of words [rows][columns] to [rows / 2][2 · columns], to be summed over rows.
    static void pair_rows(const Word* in, int rows, int columns, Word* out) {
        const __m512i lane = lane_numbers(), high = _mm512_set1_epi32(32 << 16);
        const __m512i one_each = _mm512_or_si512(_mm512_or_si512(lane, _mm512_slli_epi32(lane, 16)), high);
        const __m512i first = one_each, second = _mm512_add_epi16(one_each, _mm512_set1_epi16(16));
        for (int r = 0; r < rows; r += 2, in += 2 * columns) {
            for (int c = 0; c < columns; c += kLanes, out += 2 * kLanes) {
                const __m512i a = _mm512_loadu_si512(in + c), b = _mm512_loadu_si512(in + columns + c);
                _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, first, b));
                _mm512_storeu_si512(out + kLanes, _mm512_permutex2var_epi16(a, second, b));
            }
        }
    }

private:
    static __m512i both(__m512 row, __m512 next) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(next, row)); }

    static __m512i paired(__m512i x) {
        const __m512i lane = lane_numbers();
        const __m512i next = _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16);
        return _mm512_permutexvar_epi16(_mm512_or_si512(lane, next), x);
    }

    static void store_halves(Word* row_to, std::ptrdiff_t row_size, __m512i x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row_to), _mm512_castsi512_si256(x));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row_to + row_size), _mm512_extracti64x4_epi64(x, 1));
    }
};

}  // namespace
