// csrc/cuda/launch.h's device and launch on a CPU; see device_emulation.h. Included there, inside the namespace's
// reach.
#pragma once

namespace bandit_rft::cuda {

inline Limits emulated_limits{9, 232448, 233472, 64};

struct OnDevice {
    explicit OnDevice(int) {}
    Limits limits() const { return emulated_limits; }
};

template <class Arguments>
void launch(void (*kernel)(Arguments), const RowPlan& plan, int64_t rows, void*, const Arguments& arguments) {
    require(plan.shared_bytes <= emulated_limits.shared_per_block,
            "the plan takes more shared memory than a block has");
    for (int64_t row = 0; row < rows; ++row)
        emulation::run(unsigned(plan.blocks), unsigned(plan.threads), unsigned(row * plan.blocks),
                       size_t(plan.shared_bytes), [&] { kernel(arguments); });
}

}  // namespace bandit_rft::cuda
