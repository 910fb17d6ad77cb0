// Work in pieces on several threads.
#pragma once
#include <cstdint>
#include <functional>

namespace megalm {

// Calls `piece(i)` for each i in [0, pieces), on up to `threads` threads, the caller's among them. Whoever is free takes
// the next piece, so these may differ in size.
void in_pieces(std::int64_t pieces, std::int64_t threads, const std::function<void(std::int64_t)>& piece);

}  // namespace megalm
