// Vectors of WIDTH float32 in the compiler's own vector types, which every instruction set has; and what the kernels
// need of them: reading and writing the three element types, exp, tanh, sums. Included inside of an instruction set's
// namespace, after WIDTH; without include guard, on purpose.

#define INLINE __attribute__((always_inline)) inline

typedef float Lanes __attribute__((vector_size(4 * WIDTH)));
typedef std::int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef std::uint8_t Bytes __attribute__((vector_size(WIDTH)));

struct Float32 { float value; };
struct Float16 { std::uint16_t bits; };
struct Bfloat16 { std::uint16_t bits; };

template <class To, class From>
INLINE To cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

INLINE Lanes all(float value) { return Lanes{} + value; }
INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

// The first `count` (1 to WIDTH) elements at `from`, as raw vectors; the other lanes are zero.
template <class Raw, class Element>
INLINE Raw read(const Element* from, std::int64_t count) {
    Raw raw{};
    if (count == WIDTH)
        __builtin_memcpy(&raw, from, sizeof raw);
    else
        for (std::int64_t i = 0; i < count; i++) __builtin_memcpy((char*)&raw + i * sizeof *from, from + i, sizeof *from);
    return raw;
}
template <class Raw, class Element>
INLINE void write(Element* to, Raw raw, std::int64_t count) {
    if (count == WIDTH)
        __builtin_memcpy(to, &raw, sizeof raw);
    else
        for (std::int64_t i = 0; i < count; i++) __builtin_memcpy(to + i, (char*)&raw + i * sizeof *to, sizeof *to);
}

INLINE Lanes load(const Float32* from, std::int64_t count) { return read<Lanes>(from, count); }
INLINE void store(Float32* to, Lanes x, std::int64_t count) { write(to, x, count); }

INLINE Lanes load(const Bfloat16* from, std::int64_t count) {
    return cast<Lanes>(__builtin_convertvector(read<Halves>(from, count), Bits) << 16);
}
// To the nearest, ties to even. A NaN's low bits could carry into its sign.
INLINE void store(Bfloat16* to, Lanes x, std::int64_t count) {
    const Bits bits = cast<Bits>(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    write(to, __builtin_convertvector(x == x ? rounded : Bits{} + 0x7fc0, Halves), count);
}

INLINE Lanes load(const Float16* from, std::int64_t count) {
    const Halves half = read<Halves>(from, count);
#if WIDTH == 16
    // Without a mask GCC 12 warns of its own header.
    return cast<Lanes>(_mm512_maskz_cvtph_ps(0xffff, cast<__m256i>(half)));
#elif WIDTH == 8
    return cast<Lanes>(_mm256_cvtph_ps(cast<__m128i>(half)));
#else
    const Bits bits = __builtin_convertvector(half, Bits), size = bits & 0x7fff;
    Lanes x = cast<Lanes>(size << 13) * 0x1p112f;  // float32's exponent is biased by 112 more
    x = size >= 0x7c00 ? cast<Lanes>(cast<Bits>(x) | 0x7f800000) : x;  // infinity and NaN
    return cast<Lanes>(cast<Bits>(x) | (bits & 0x8000) << 16);
#endif
}
INLINE void store(Float16* to, Lanes x, std::int64_t count) {
#if WIDTH == 16
    write(to, cast<Halves>(_mm512_maskz_cvtps_ph(0xffff, cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT)), count);
#elif WIDTH == 8
    write(to, cast<Halves>(_mm256_cvtps_ph(cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT)), count);
#else
    const Bits bits = cast<Bits>(x), size = bits & 0x7fffffff;
    const Bits normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    // Adding 0.5 makes the addition round where a float16 without a leading one ends.
    const Bits small = cast<Bits>(cast<Lanes>(size) + 0.5f) - 0x3f000000u;
    Bits half = size < 0x38800000u ? small : normal;
    half = size >= 0x477ff000u ? Bits{} + 0x7c00 : half;  // from 65520 on: infinity
    half = size > 0x7f800000u ? Bits{} + 0x7e00 : half;
    write(to, __builtin_convertvector(half | (bits >> 16 & 0x8000), Halves), count);
#endif
}

// Which lanes of a byte mask are not zero.
INLINE Ints kept(const std::uint8_t* from, std::int64_t count) {
    return __builtin_convertvector(read<Bytes>(from, count), Ints) != 0;
}

// e^x = scale * (1 + rest): x = n ln 2 + r, scale = 2^n and rest = e^r - 1 = r + r^2 q(r), with |r| <= ln 2 / 2 and q the
// minimax polynomial of degree 4, which makes e^r right to 5e-9. For -87 < x < 88.
struct Exponential {
    Lanes scale, rest;
};
INLINE Exponential exponential(Lanes x) {
    const float round = 0x1.8p23f;  // to this, a float32 adds whole numbers only
    const Lanes shifted = x * 1.44269504f + round, n = shifted - round;
    const Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first short: n times it is exact
    const Lanes q = ((((1.3813147e-3f * r + 8.3694188e-3f) * r + 4.1668456e-2f) * r + 0.16666515f) * r) + 0.49999994f;
    return {cast<Lanes>((cast<Bits>(shifted) + 127) << 23), r + r * r * q};
}

// e^x for x up to 88; 0 below -87, where float32 runs out of normal numbers, and for -infinity.
INLINE Lanes exp(Lanes x) {
    const Exponential e = exponential(x);
    return x < -87.0f ? Lanes{} : e.scale + e.scale * e.rest;
}

// By way of e^-2|x| - 1, which keeps the digits of a small x.
INLINE Lanes tanh(Lanes x) {
    const Lanes size = cast<Lanes>(cast<Bits>(x) & 0x7fffffff);
    const Exponential e = exponential(-2.0f * (size > 10.0f ? all(10.0f) : size));
    const Lanes m = e.scale * e.rest + (e.scale - 1.0f), t = -m / (2.0f + m);
    return x < 0.0f ? -t : t;
}

INLINE float sum_of(Lanes x) {
    float sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += x[i];
    return sum;
}
INLINE float largest_of(Lanes x) {
    float largest = x[0];
    for (int i = 1; i < WIDTH; i++) largest = x[i] > largest || x[i] != x[i] ? x[i] : largest;
    return largest;
}
