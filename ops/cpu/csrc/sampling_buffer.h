// A growable array. Unlike std::vector it never initialises its values, which nobody would read, and never throws:
// exceptions must not cross the C interface.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace octavo::sampling {

template <class T>
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    // Makes room for `count` values and keeps the present ones.
    void reserve(size_t count) {
        if (count <= capacity_) return;
        const size_t grown = count > 2 * capacity_ ? count : 2 * capacity_;
        void* data = std::realloc(data_, grown * sizeof(T));
        if (data == nullptr) std::abort();
        data_ = static_cast<T*>(data);
        capacity_ = grown;
    }
    void release() {
        std::free(data_);
        data_ = nullptr;
        capacity_ = 0;
    }

    T* data() { return data_; }
    const T* data() const { return data_; }
    size_t capacity() const { return capacity_; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }

private:
    T* data_ = nullptr;
    size_t capacity_ = 0;
};

}  // namespace octavo::sampling
