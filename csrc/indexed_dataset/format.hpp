// Megatron's indexed dataset: the numbers of its format, and access to values that may lie unaligned.
//
//   .bin   token ids, sequences back to back, no header
//   .idx   0   9 bytes    "MMIDIDX\0\0"
//          9   u64        version, 1
//         17   u8         the tokens' type (TokenType)
//         18   u64        S, sequences
//         26   u64        D + 1, documents and one
//         34   i32[S]     tokens of each sequence
//              i64[S]     byte offset of each sequence in the .bin
//              i64[D+1]   first sequence of each document, and S at the end
//              i8[S]      modes, in multimodal data only; nothing but the file's size tells
//
// All little-endian. Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the indexed dataset is little-endian, and so must be the machine that reads and writes it"
#endif

namespace megalm {

inline constexpr std::array<char, 9> kMagic = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
inline constexpr std::uint64_t kVersion = 1;
inline constexpr std::size_t kHeaderSize = 34;

// Megatron's codes, less those of floating-point numbers (6 and 7), which are no token ids.
enum class TokenType : std::uint8_t { kUint8 = 1, kInt8 = 2, kInt16 = 3, kInt32 = 4, kInt64 = 5, kUint16 = 8 };

// Calls `visit` with a value of the C++ type that `type` stands for; undefined for other codes.
template <typename Visit>
decltype(auto) visit_type(TokenType type, Visit&& visit) {
    switch (type) {
        case TokenType::kUint8: return visit(std::uint8_t{});
        case TokenType::kInt8: return visit(std::int8_t{});
        case TokenType::kInt16: return visit(std::int16_t{});
        case TokenType::kInt64: return visit(std::int64_t{});
        case TokenType::kUint16: return visit(std::uint16_t{});
        case TokenType::kInt32: break;
    }
    return visit(std::int32_t{});
}

inline std::size_t token_size(TokenType type) {
    return visit_type(type, [](auto token) { return sizeof token; });
}

template <typename T>
T load(const void* array, std::size_t index) {
    static_assert(std::is_trivially_copyable_v<T>);
    T value;
    std::memcpy(&value, static_cast<const char*>(array) + index * sizeof(T), sizeof(T));
    return value;
}

template <typename T>
void store(void* array, std::size_t index, T value) {
    static_assert(std::is_trivially_copyable_v<T>);
    std::memcpy(static_cast<char*>(array) + index * sizeof(T), &value, sizeof(T));
}

}  // namespace megalm
