// How rows are laid over blocks, and how a kernel is started: on the caller's stream, waiting for nothing.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../tensor_view.h"
#include "rows.h"

namespace bandit_rft::cuda {

struct Limits {
    int major;             // compute capability
    int shared_per_block;  // bytes, with opt-in
    int shared_per_sm;
    int max_threads;  // kMaxThreads, less in tests
};

// Blocks that should share a multiprocessor, of kernels with 64 registers a thread, which serve 1024 threads, and of
// the filters, with 128: they look at their row in shared memory again and again. On an H200 two blocks of 8 warps took
// one and a half times what one of 16 had taken (before rows were copied ahead), so these have one, of all its warps.
constexpr int kBlocksOfSm = 4, kBlocksOfSmForFilters = 1;

// How many warps share `share` spans, of at most `most`: the fewest that need no more rounds. A round costs the same
// however many warps take part, and warps left over would hold registers and lengthen every barrier. With R rounds
// at most R - 1 places are empty beside more than `most` (R - 1) that are taken: 16 of 17 at least, or 8 of 9.
inline int64_t warps_for(int64_t share, int64_t most) {
    const int64_t rounds = (share + most - 1) / most;
    return (share + rounds - 1) / rounds;
}

// A row of `vocabulary` logits of `width` bytes. With `passes` > 1 its shares are kept in shared memory, beside
// `header` bytes: on sm_90 and later by the smallest cluster that leaves room for two blocks on a multiprocessor, or by
// eight (as the filters', whose header is large). Where even eight blocks cannot hold the row (or before sm_90 one),
// the rest is read again, latest first, from L2 as far as it is there. `alone`: a block may only write where no other
// reads, so a row that does not fit belongs to one block.
//
// Blocks that keep their rows have phases: one loads while another waits for its cluster and a third stores. So as many
// are wanted as shared memory holds, up to `blocks_of_sm`, and their threads are bounded by what registers are left to
// each of them: the bytes under way do not depend on threads, since copies need no registers.
inline RowPlan plan_rows(int64_t vocabulary, int width, int header, int passes, bool alone, int blocks_of_sm,
                         const Limits& limits) {
    // A row may start up to 32 bytes, less one logit, after an aligned address.
    const int64_t spans = (vocabulary + 32 / width - 1 + kSpan - 1) / kSpan;
    const int64_t half = std::max(0, (limits.shared_per_sm / 2 - 1024 - header) / (kSpan * width)),
                  full = std::max(0, (limits.shared_per_block - header) / (kSpan * width));
    int64_t blocks = 1;
    if (passes > 1 && limits.major >= 9) {
        while (blocks < kMaxCluster && (spans + blocks - 1) / blocks > half) blocks *= 2;
        if (alone && (spans + blocks - 1) / blocks > full) blocks = 1;
    }
    RowPlan plan;
    const int64_t share = (spans + blocks - 1) / blocks;
    plan.blocks = int(blocks);
    plan.share = int(share);
    plan.cached = passes > 1 ? int(std::min(share, share <= half ? half : full)) : 0;
    plan.shared_bytes = header + kSpan * width * plan.cached;
    int most = limits.max_threads;
    if (passes > 1 && blocks_of_sm > 1) {
        const int fit = std::clamp(limits.shared_per_sm / (plan.shared_bytes + 1024), 1, blocks_of_sm);
        most = std::min(most, 2 * kMaxThreads / fit);
    }
    plan.threads = int(32 * (blocks_of_sm > 1 ? warps_for(share, most / 32) : std::min<int64_t>(share, most / 32)));
    return plan;
}

#if defined(BRFT_EMULATED_DEVICE)
}  // namespace bandit_rft::cuda
#include "launch_emulation.h"
namespace bandit_rft::cuda {
#else
inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// The device that the tensors are on, current for as long as this lives.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
        device_ = device;
    }
    ~OnDevice() {
        if (device_ != before_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

    Limits limits() const {
        Limits limits{};
        check(cudaDeviceGetAttribute(&limits.major, cudaDevAttrComputeCapabilityMajor, device_), "device");
        check(cudaDeviceGetAttribute(&limits.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_),
              "device");
        check(cudaDeviceGetAttribute(&limits.shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device_),
              "device");
        limits.max_threads = kMaxThreads;
        return limits;
    }

  private:
    int before_ = 0, device_ = 0;
};

template <class Arguments>
void launch(void (*kernel)(Arguments), const RowPlan& plan, int64_t rows, void* stream, const Arguments& arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(rows * plan.blocks));
    config.blockDim = dim3(unsigned(plan.threads));
    config.dynamicSmemBytes = size_t(plan.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute cluster[1];
    cluster[0].id = cudaLaunchAttributeClusterDimension;
    cluster[0].val.clusterDim.x = unsigned(plan.blocks);
    cluster[0].val.clusterDim.y = cluster[0].val.clusterDim.z = 1;
    config.attrs = cluster;
    config.numAttrs = plan.blocks > 1 ? 1 : 0;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes), "kernel");
    check(cudaLaunchKernelEx(&config, kernel, arguments), "kernel launch");
}
#endif

inline void require_grid(int64_t rows) {
    require(rows < (int64_t(1) << 31) / kMaxCluster, "logits must have fewer than 2^28 rows");
}

}  // namespace bandit_rft::cuda
