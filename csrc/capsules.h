// DLPack capsules from Python as checked views, in the memory of one device.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "tensor_view.h"

namespace bandit_rft {

using OptionalCapsule = std::optional<pybind11::capsule>;

class Capsules {
  public:
    static Capsules in_cpu_memory() { return {1, 0, "must be in CPU memory"}; }
    // Of the same device as `first`, which must be a CUDA one. The emulated device's memory is the CPU's.
    static Capsules beside(const pybind11::capsule& first, const char* name) {
#if defined(BRFT_EMULATED_DEVICE)
        Capsules any{1, -1, "must be in CPU memory, which the emulated device reads"};
#else
        Capsules any{2, -1, "must be in CUDA memory, on the device of logits"};
#endif
        any.device_ = any.view(first, name, 2).device_id;
        return any;
    }

    int device() const { return device_; }

    // The capsule stays unconsumed: the view is borrowed for the duration of the call that was given it.
    TensorView view(const pybind11::capsule& capsule, const char* name, int ndim) const {
        require(std::string(capsule.name()) == "dltensor", std::string(name) + " must be an unconsumed DLPack capsule");
        const TensorView tensor = view_of(capsule.get_pointer<dlpack::ManagedTensor>()->tensor, name, ndim);
        require(tensor.device_type == type_ && (device_ < 0 || tensor.device_id == device_),
                std::string(name) + " " + need_);
        return tensor;
    }

    TensorView vector(const pybind11::capsule& capsule, const char* name, DType dtype, int64_t length) const {
        const TensorView tensor = view(capsule, name, 1);
        require(tensor.dtype == dtype,
                std::string(name) + (dtype == DType::f32 ? " must be float32" : " must be int64"));
        require(tensor.shape[0] == length, std::string(name) + " must have length " + std::to_string(length) +
                                               "; got " + std::to_string(tensor.shape[0]));
        return tensor;
    }

    float* floats(const pybind11::capsule& capsule, const char* name, int64_t length) const {
        return vector(capsule, name, DType::f32, length).as<float>();
    }
    const float* floats(const OptionalCapsule& capsule, const char* name, int64_t length) const {
        return capsule ? floats(*capsule, name, length) : nullptr;
    }
    int64_t* integers(const pybind11::capsule& capsule, const char* name, int64_t length) const {
        return vector(capsule, name, DType::i64, length).as<int64_t>();
    }

  private:
    Capsules(int type, int device, const char* need) : type_(type), device_(device), need_(need) {}
    int type_, device_;
    const char* need_;
};

inline void require_columns(const TensorView& logits) {
    require(logits.shape[1] > 0 || logits.shape[0] == 0, "logits must have at least one column");
    require(logits.shape[1] < (int64_t(1) << 32), "logits must have fewer than 2^32 columns");
}

}  // namespace bandit_rft
