// A file that is complete under its name or absent: written to a temporary name beside it, synced, then renamed.

#pragma once

#include <cstddef>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "errors.hpp"

namespace megalm {

class AtomicFile {
   public:
    explicit AtomicFile(const std::string& path);  // creates the temporary file
    ~AtomicFile();                                 // removes it unless it was published
    AtomicFile(const AtomicFile&) = delete;
    AtomicFile& operator=(const AtomicFile&) = delete;

    void write(const void* bytes, std::size_t size);

    // Values are copied as they lie in memory, which is the format's order on the machines that this builds for.
    template <typename T>
    void put(T value) {
        static_assert(std::is_arithmetic_v<T>);
        if (sizeof(T) > kBuffer - buffer_.size()) flush();
        const std::size_t end = buffer_.size();
        buffer_.resize(end + sizeof(T));
        std::memcpy(buffer_.data() + end, &value, sizeof(T));
    }

    void sync();     // everything written is on the disk; nothing can be written any more
    void publish();  // renames to the final name
    void withdraw() noexcept;  // removes the file if it was published

    const std::string& path() const { return path_; }

   private:
    static constexpr std::size_t kBuffer = std::size_t{1} << 20;

    void flush();
    void write_through(const char* bytes, std::size_t size);

    std::string path_;
    std::string temporary_;
    std::vector<char> buffer_;
    int descriptor_ = -1;
    bool published_ = false;
};

// Publishes a synced .bin and .idx together, durably; neither has its name if that fails.
void publish_pair(AtomicFile& bin, AtomicFile& idx);

}  // namespace megalm
