#include "input_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace megalm {

FileError::FileError(int code, std::string path)
    : std::runtime_error(path + ": " + std::strerror(code)), code(code), path(std::move(path)) {}

BadFile::BadFile(std::string path, std::string reason)
    : std::runtime_error(path + ": " + reason), path(std::move(path)), reason(std::move(reason)) {}

InputFile::InputFile(std::string path) : path_(std::move(path)) {
    do {
        descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // or a pipe would wait for a writer
    } while (descriptor_ < 0 && errno == EINTR);
    if (descriptor_ < 0 && errno == ENOENT) throw BadFile(path_, "the file is missing");
    if (descriptor_ < 0) throw FileError(errno, path_);
    struct stat status;
    if (::fstat(descriptor_, &status) < 0) {
        const int code = errno;
        ::close(descriptor_);
        throw FileError(code, path_);
    }
    if (!S_ISREG(status.st_mode)) {
        ::close(descriptor_);
        throw BadFile(path_, "this is not a regular file");
    }
    size_ = static_cast<std::uint64_t>(status.st_size);
}

InputFile::~InputFile() { ::close(descriptor_); }

void InputFile::read_at(std::uint64_t offset, void* out, std::size_t size) const {
    char* place = static_cast<char*>(out);
    while (size > 0) {
        const ssize_t count = ::pread(descriptor_, place, size, static_cast<off_t>(offset));
        if (count < 0) {
            if (errno == EINTR) continue;
            throw FileError(errno, path_);
        }
        if (count == 0) throw BadFile(path_, "too short: it ends at byte " + std::to_string(offset));
        place += count;
        offset += static_cast<std::uint64_t>(count);
        size -= static_cast<std::size_t>(count);
    }
}

}  // namespace megalm
