// What goes wrong with files. Each error names the file.

#pragma once

#include <stdexcept>
#include <string>

namespace megalm {

// A system call on `path` failed with errno `code`; becomes Python's OSError(code, strerror, path).
class FileError : public std::runtime_error {
   public:
    FileError(int code, std::string path);
    int code;
    std::string path;
};

// The file is not what it should be, or not there; becomes a megalm.errors.UserError that tells how to mend it.
class BadFile : public std::runtime_error {
   public:
    BadFile(std::string path, std::string reason);
    std::string path;
    std::string reason;
};

}  // namespace megalm
