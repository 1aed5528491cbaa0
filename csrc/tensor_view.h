// A borrowed DLPack tensor as a checked, typed view. No framework's header is needed, so one build serves every torch.
//
// The structures below are DLPack's published ABI (version 0 capsules, "dltensor"); only their layout matters.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace bandit_rft {

namespace dlpack {
struct Device {
    int32_t type;  // 1 CPU, 2 CUDA
    int32_t id;
};
struct DataType {
    uint8_t code;  // 0 int, 1 uint, 2 float, 4 bfloat
    uint8_t bits;
    uint16_t lanes;
};
struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // null when contiguous
    uint64_t byte_offset;
};
struct ManagedTensor {
    Tensor tensor;
    void* manager;
    void (*deleter)(ManagedTensor*);
};
}  // namespace dlpack

enum class DType : int { f32, bf16, f16, i64, i32, other };

struct TensorView {
    void* data = nullptr;
    DType dtype = DType::other;
    int device_type = 1, device_id = 0;
    std::vector<int64_t> shape;
    int64_t row_stride = 0;  // elements between rows; the last dimension is contiguous

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

inline DType dtype_of(const dlpack::DataType& type) {
    if (type.lanes == 1) {
        if (type.code == 2 && type.bits == 32) return DType::f32;
        if (type.code == 4 && type.bits == 16) return DType::bf16;
        if (type.code == 2 && type.bits == 16) return DType::f16;
        if (type.code == 0 && type.bits == 64) return DType::i64;
        if (type.code == 0 && type.bits == 32) return DType::i32;
    }
    return DType::other;
}

// Throws std::invalid_argument naming the argument unless it has `ndim` dimensions and contiguous rows.
inline TensorView view_of(const dlpack::Tensor& tensor, const char* name, int ndim) {
    const std::string who(name);
    if (tensor.ndim != ndim)
        throw std::invalid_argument(who + " must have " + std::to_string(ndim) + " dimensions; got " +
                                    std::to_string(tensor.ndim));
    TensorView view;
    view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    view.dtype = dtype_of(tensor.dtype);
    view.device_type = tensor.device.type;
    view.device_id = tensor.device.id;
    view.shape.assign(tensor.shape, tensor.shape + ndim);
    if (ndim > 0) {
        const int64_t columns = view.shape[ndim - 1];
        const bool empty = ndim == 2 && view.shape[0] == 0;  // whatever its strides are
        if (tensor.strides && columns > 1 && !empty && tensor.strides[ndim - 1] != 1)
            throw std::invalid_argument(who + " must be contiguous in its last dimension");
        // A single row has no next one, and torch 2.8 exports its stride as 1, whatever it was.
        view.row_stride = ndim == 2 && tensor.strides && view.shape[0] > 1 ? tensor.strides[0] : columns;
    }
    return view;
}

inline void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

// The message is put together only if it is needed.
template <class Message, class = decltype(std::declval<Message>()())>
void require(bool condition, const Message& message) {
    if (!condition) throw std::invalid_argument(message());
}

}  // namespace bandit_rft
