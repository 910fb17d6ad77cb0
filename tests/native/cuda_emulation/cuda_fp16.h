// IEEE half precision of the emulation: its bits, and roundings to nearest even as the hardware does them.
#pragma once
#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 0x3ff;
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
        const float value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline __half __float2half_rn(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    uint32_t half;
    if (size > 0x7f800000) {
        half = 0x7fff;
    } else if (size >= 0x477ff000) {  // 65520 and more round to infinity
        half = 0x7c00;
    } else {
        // What is below 2^-14 is shifted further, as its exponent stays.
        const uint32_t exponent = size >> 23;
        const uint32_t shift = exponent >= 113 ? 13 : exponent >= 102 ? 126 - exponent : 32;
        const uint64_t fraction = exponent >= 113 ? size - (112u << 23) : (size & 0x7fffff) | 0x800000;
        const uint64_t rest = fraction & ((uint64_t{1} << shift) - 1), middle = uint64_t{1} << (shift - 1);
        half = static_cast<uint32_t>(fraction >> shift);
        half += rest > middle || (rest == middle && (half & 1));
    }
    return {static_cast<uint16_t>(sign | half)};
}
