#include "atomic_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <utility>

namespace megalm {

namespace {

int open_retrying(const std::string& path, int flags, const std::string& shown) {
    int descriptor;
    do {
        descriptor = ::open(path.c_str(), flags | O_CLOEXEC, 0666);
    } while (descriptor < 0 && errno == EINTR);
    if (descriptor < 0) throw FileError(errno, shown);
    return descriptor;
}

void sync_descriptor(int descriptor, const std::string& path) {
    int status;
    do {
        status = ::fsync(descriptor);
    } while (status < 0 && errno == EINTR);
    if (status < 0) throw FileError(errno, path);
}

// Makes renames inside the directory of `path` durable.
void sync_directory_of(const std::string& path) {
    const std::string parent = std::filesystem::path(path).parent_path().string();
    const std::string directory = parent.empty() ? "." : parent;
    const int descriptor = open_retrying(directory, O_RDONLY | O_DIRECTORY, directory);
    try {
        sync_descriptor(descriptor, directory);
    } catch (...) {
        ::close(descriptor);
        throw;
    }
    ::close(descriptor);
}

}  // namespace

AtomicFile::AtomicFile(const std::string& path) : path_(path) {
    const std::filesystem::path whole(path);
    const std::string name = "." + whole.filename().string() + ".tmp-" + std::to_string(::getpid());
    temporary_ = (whole.parent_path() / name).string();
    buffer_.reserve(kBuffer);
    descriptor_ = open_retrying(temporary_, O_WRONLY | O_CREAT | O_TRUNC, path_);
}

AtomicFile::~AtomicFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
    if (!published_) ::unlink(temporary_.c_str());
}

void AtomicFile::write(const void* bytes, std::size_t size) {
    if (size == 0) return;
    if (size > kBuffer - buffer_.size()) flush();
    const char* const first = static_cast<const char*>(bytes);
    if (size >= kBuffer) {
        write_through(first, size);
    } else {
        buffer_.insert(buffer_.end(), first, first + size);
    }
}

void AtomicFile::flush() {
    write_through(buffer_.data(), buffer_.size());
    buffer_.clear();
}

void AtomicFile::write_through(const char* bytes, std::size_t size) {
    while (size > 0) {
        const ssize_t written = ::write(descriptor_, bytes, size);
        if (written < 0) {
            if (errno == EINTR) continue;
            throw FileError(errno, path_);
        }
        bytes += written;
        size -= static_cast<std::size_t>(written);
    }
}

void AtomicFile::sync() {
    flush();
    sync_descriptor(descriptor_, path_);
    // Some file systems report a failed write only here. The descriptor is gone whatever close returns.
    const int status = ::close(std::exchange(descriptor_, -1));
    if (status < 0 && errno != EINTR) throw FileError(errno, path_);
}

void AtomicFile::publish() {
    if (::rename(temporary_.c_str(), path_.c_str()) < 0) throw FileError(errno, path_);
    published_ = true;
}

void AtomicFile::withdraw() noexcept {
    if (published_) ::unlink(path_.c_str());
}

void publish_pair(AtomicFile& bin, AtomicFile& idx) {
    try {
        bin.publish();
        idx.publish();
        sync_directory_of(bin.path());
    } catch (...) {
        bin.withdraw();
        idx.withdraw();
        throw;
    }
}

}  // namespace megalm
