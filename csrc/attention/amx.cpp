// bfloat16 by AMX: tiles of 16 rows of 16 words, 8,192 multiply-adds an instruction, summed in float32.

#if defined(__AMX_BF16__)

#include "attention.hpp"
#include "backward.hpp"
#include "bfloat16.hpp"
#include "forward.hpp"

namespace {

struct Tiles : Bfloat16 {
    // 32 × 32 elements of c in tiles 0 to 3; a's two are 4 and 5, b's 6 and 7. The intrinsics do not tell the compiler
    // what memory they read, hence the barriers.
    __attribute__((noinline)) static void multiply(const Word* a, std::ptrdiff_t a_row, const Word* b,
                                                   std::ptrdiff_t b_row, float* c, std::ptrdiff_t c_row, int m,
                                                   int n, int k, bool add) {
        const std::ptrdiff_t a_bytes = a_row * 4, b_bytes = b_row * 4, c_bytes = c_row * 4;
        asm volatile("" ::: "memory");
        for (int i = 0; i < m; i += kGroup) {
            for (int j = 0; j < n; j += kGroup) {
                float *const top = c + i * c_row + j, *const bottom = top + kLanes * c_row;
                if (add) {
                    _tile_loadd(0, top, c_bytes);
                    _tile_loadd(1, top + kLanes, c_bytes);
                    _tile_loadd(2, bottom, c_bytes);
                    _tile_loadd(3, bottom + kLanes, c_bytes);
                } else {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                }
                for (int p = 0; p < k; p += kLanes) {
                    const Word *const left = a + i * a_row + p, *const right = b + p * b_row + j;
                    _tile_loadd(4, left, a_bytes);
                    _tile_loadd(6, right, b_bytes);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(7, right + kLanes, b_bytes);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_loadd(5, left + kLanes * a_row, a_bytes);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(0, top, c_bytes);
                _tile_stored(1, top + kLanes, c_bytes);
                _tile_stored(2, bottom, c_bytes);
                _tile_stored(3, bottom + kLanes, c_bytes);
            }
        }
        asm volatile("" ::: "memory");
    }

    // A thread's tiles are all of 16 rows of 64 bytes.
    static void begin() {
        struct alignas(64) {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        static_assert(sizeof config == 64);
        asm volatile("" ::"m"(config));
        _tile_loadconfig(&config);
    }
    static void end() { _tile_release(); }
};

}  // namespace

namespace megalm::attention::amx {

void forward(const Call& call) { ForwardPass<Tiles>::run(call); }
void backward(const Call& call) { BackwardPass<Tiles>::run(call); }

}  // namespace megalm::attention::amx

#endif
