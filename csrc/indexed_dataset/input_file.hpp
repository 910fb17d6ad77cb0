// A file that is read at given places. Read and not mapped: where a mapped file ends early or its disk fails, the
// process is killed by a signal; a read returns, so that the error can name the file.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "errors.hpp"

namespace megalm {

class InputFile {
   public:
    explicit InputFile(std::string path);  // BadFile if it is missing
    ~InputFile();
    InputFile(const InputFile&) = delete;
    InputFile& operator=(const InputFile&) = delete;

    // Fills `out`; BadFile if the file ends before. Safe to call from several threads.
    void read_at(std::uint64_t offset, void* out, std::size_t size) const;

    std::uint64_t size() const { return size_; }  // when it was opened
    const std::string& path() const { return path_; }

   private:
    std::string path_;
    int descriptor_ = -1;
    std::uint64_t size_ = 0;
};

}  // namespace megalm
