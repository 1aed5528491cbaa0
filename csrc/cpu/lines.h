// Floats that begin with a cache line: a SIMD vector that lies across two lines is loaded and stored in halves.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <new>

namespace bandit_rft::cpu {

constexpr std::align_val_t kLine{64};

struct FreeLines {
    void operator()(float* memory) const { ::operator delete(memory, kLine); }
};
using Lines = std::unique_ptr<float[], FreeLines>;

// So many zeros.
inline Lines lines(size_t floats) {
    void* memory = ::operator new(floats * sizeof(float), kLine);
    return Lines(static_cast<float*>(std::memset(memory, 0, floats * sizeof(float))));
}

}  // namespace bandit_rft::cpu
