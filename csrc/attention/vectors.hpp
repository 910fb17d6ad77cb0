// Vectors of 16 words (32 bits each): exponentials, transposition, and the product of matrices in AVX-512 registers.
//
// All matrix products here are of words. A word is a float32, or two bfloat16 that are neighbours along the summed dim,
// low half first:
//
//     c[m][n] += sum over k of a[m][k] · b[k][n]        a: words, rows of a tensor as they lie
//                                                       b: words, k in rows      c: float32
//
// Everything is in an anonymous namespace: each file that includes this compiles it for its own processor.

#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace {

using Word = std::uint32_t;

constexpr int kLanes = 16;
constexpr int kGroup = 32;  // columns of a product's block: two vectors, or two tiles of AMX. Every size is a multiple.

inline int padded(int size) { return (size + kGroup - 1) / kGroup * kGroup; }

// 2^x for x <= 0 or so, -inf included: 2^floor(x) by the exponent, 2^(x - floor(x)) by the polynomial of least relative
// error on [0, 1): 7.5e-8 of degree 5, 7.5e-5 of degree 3 (bfloat16 rounds by 2e-3).
template <int degree>
inline __m512 exp2(__m512 x) {
    static_assert(degree == 3 || degree == 5);
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 y;
    if constexpr (degree == 5) {
        y = _mm512_fmadd_ps(_mm512_set1_ps(0.00187757665f), f, _mm512_set1_ps(0.00898934016f));
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.055826318f));
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.240153617f));
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.693153073f));
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.999999925f));
    } else {
        y = _mm512_fmadd_ps(_mm512_set1_ps(0.07802452f), f, _mm512_set1_ps(0.226067159f));
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.695833539f));
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.999925219f));
    }
    return _mm512_scalef_ps(y, x);
}

// 1 - 2 / (1 + e^2x), and near 0, where that cancels, the Taylor series.
inline __m512 tanh(__m512 x) {
    const __m512 one = _mm512_set1_ps(1), two = _mm512_set1_ps(2);
    const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(20), x);  // beyond, it is 1
    const __m512 e = exp2<5>(_mm512_mul_ps(bounded, _mm512_set1_ps(2.88539008f)));
    const __m512 far = _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(one, e)));
    const __m512 z = _mm512_mul_ps(x, x);
    __m512 near = _mm512_fmadd_ps(_mm512_set1_ps(62.f / 2835), z, _mm512_set1_ps(-17.f / 315));
    near = _mm512_fmadd_ps(near, z, _mm512_set1_ps(2.f / 15));
    near = _mm512_fmadd_ps(near, z, _mm512_set1_ps(-1.f / 3));
    near = _mm512_fmadd_ps(_mm512_mul_ps(near, z), x, x);
    return _mm512_mask_mov_ps(far, _mm512_cmp_ps_mask(z, _mm512_set1_ps(0.0625f), _CMP_LT_OQ), near);
}

inline __m512i lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// out[c][r] = in[r][c] of 16 × 16 words: blocks beside the diagonal change places, of 1, 2, 4 and 8 words.
inline void transpose16(const Word* in, std::ptrdiff_t in_row, Word* out, std::ptrdiff_t out_row) {
    __m512i x[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = _mm512_loadu_si512(in + i * in_row);
    const __m512i lane = lane_numbers();
#pragma GCC unroll 4
    for (int size = 1; size < kLanes; size *= 2) {
        const __mmask16 right = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(size));
        const __m512i upper = _mm512_mask_add_epi32(lane, right, lane, _mm512_set1_epi32(kLanes - size));
        const __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(size)), right, lane,
                                                    _mm512_set1_epi32(kLanes));
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            if (i & size) continue;
            const __m512i a = x[i], b = x[i + size];
            x[i] = _mm512_permutex2var_epi32(a, upper, b);
            x[i + size] = _mm512_permutex2var_epi32(a, lower, b);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) _mm512_storeu_si512(out + i * out_row, x[i]);
}

// out[c][r] = in[r][c]; rows and columns are multiples of 16.
inline void transpose(const Word* in, std::ptrdiff_t in_row, int rows, int columns, Word* out, std::ptrdiff_t out_row) {
    for (int r = 0; r < rows; r += kLanes)
        for (int c = 0; c < columns; c += kLanes)
            transpose16(in + r * in_row + c, in_row, out + c * out_row + r, out_row);
}

// The product in registers, 8 rows × 2 vectors at a time; `Multiply` says what a word times a word is. m is a multiple
// of 8, n of 32.
template <class Multiply>
inline void multiply_in_registers(const Word* a, std::ptrdiff_t a_row, const Word* b, std::ptrdiff_t b_row, float* c,
                                  std::ptrdiff_t c_row, int m, int n, int k, bool add) {
    constexpr int kRows = 8;
    for (int j = 0; j < n; j += kGroup) {
        for (int i = 0; i < m; i += kRows) {
            __m512 sum[kRows][2];
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const float* const row = c + (i + r) * c_row + j;
                sum[r][0] = add ? _mm512_loadu_ps(row) : _mm512_setzero_ps();
                sum[r][1] = add ? _mm512_loadu_ps(row + kLanes) : _mm512_setzero_ps();
            }
            const Word *x = a + i * a_row, *y = b + j;
            for (int p = 0; p < k; ++p, ++x, y += b_row) {
                const __m512i left = _mm512_loadu_si512(y), right = _mm512_loadu_si512(y + kLanes);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    const __m512i word = _mm512_set1_epi32(static_cast<int>(x[r * a_row]));
                    sum[r][0] = Multiply::add(sum[r][0], word, left);
                    sum[r][1] = Multiply::add(sum[r][1], word, right);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                float* const row = c + (i + r) * c_row + j;
                _mm512_storeu_ps(row, sum[r][0]);
                _mm512_storeu_ps(row + kLanes, sum[r][1]);
            }
        }
    }
}

}  // namespace
