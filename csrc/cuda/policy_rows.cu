// Rows of logits on a GPU: log-probability and entropy, and dL/dlogits written over the logits.
//
//   pass 1   (m, s, t) of each thread's vectors, merged over warps, blocks and the cluster     -> lse, logp, entropy
//   pass 2   dz_j = p_j (-c + e (log p_j + entropy)) + c [j = target]                          -> over the logits
//
// Never in memory: probabilities, or anything of the row's length but the row. On sm_90 and later a row is read from
// global memory once and written once: in between a cluster of up to eight blocks holds it in shared memory (V =
// 151,936 in float32 is 74 KiB a block, two blocks a multiprocessor; up to 464,000 logits fit with one). Before sm_90 a
// block holds the first 160 KiB (sm_80) of the row; the rest is read a second time, latest first: from L2 where it is
// still there. float32 a thread, double across threads; p_target - 1 is formed as expm1(logp), without cancellation.
#include "launch.h"
#include "operations.h"

namespace bandit_rft::cuda {
namespace {

struct PolicyArguments {
    Rows rows;
    RowPlan plan;
    const int64_t* targets;
    PolicyInputs in;
    void* gradient;
    int64_t gradient_stride;
    bool overlaid;  // gradients lie over logits that are still to be read: a barrier goes before each tile's stores
    float *logprobs, *entropy;
};

BRFT_DEVICE void write_statistics(const PolicyArguments& a, int64_t index, float logp, float entropy, int rank) {
    if (threadIdx.x == 0 && rank == 0) {
        a.logprobs[index] = logp;
        a.entropy[index] = entropy;
    }
}

template <class In>
__global__ void __launch_bounds__(kMaxThreads, 2) score(PolicyArguments a) {
    auto* states = reinterpret_cast<SharedStates*>(shared_memory());
    cluster_arrive();
    const int64_t index = blockIdx.x;
    const RowShare<In> share(a.rows, a.plan, index, 0, nullptr);
    const int64_t target = a.targets[index];
    const bool exists = uint64_t(target) < uint64_t(a.rows.vocabulary);
    SoftmaxState<float> own;
    share.template each<true>([&](int, const float* z) { add_to_state<RowShare<In>::kWidth>(own, z); });
    const auto state = merged_over_cluster(own, states, 1, 0);
    const float z_target = exists ? share.scale(In::widen(share.row[target])) : NAN;
    write_statistics(a, index, row_logprob(state, z_target), row_entropy(state), 0);
}

template <class In, class Out>
__global__ void __launch_bounds__(kMaxThreads, 2) differentiate(PolicyArguments a) {
    using Share = RowShare<In>;
    constexpr int kWidth = Share::kWidth;
    auto* states = reinterpret_cast<SharedStates*>(shared_memory());
    cluster_arrive();
    const int64_t index = int64_t(blockIdx.x) / a.plan.blocks;
    const int rank = int(blockIdx.x) % a.plan.blocks;
    const Share share(a.rows, a.plan, index, rank, after_header(states));
    const int64_t target = a.targets[index];
    const bool exists = uint64_t(target) < uint64_t(a.rows.vocabulary);
    const float z_target = exists ? share.scale(In::widen(share.row[target])) : NAN;  // before it is written over
    SoftmaxState<float> own;
    share.template each<true>([&](int, const float* z) { add_to_state<kWidth>(own, z); });
    const auto state = merged_over_cluster(own, states, a.plan.blocks, rank);

    const float logp_target = row_logprob(state, z_target), entropy = row_entropy(state);
    write_statistics(a, index, logp_target, entropy, rank);
    float c, e;  // dL/dlogp, and -dL/dentropy
    if (a.in.objective.kind == ObjectiveKind::given) {
        c = a.in.given_logprob[index];
        e = a.in.given_entropy ? -a.in.given_entropy[index] : 0.0f;
    } else {
        const float ratio = a.in.behavior ? expf(logp_target - a.in.behavior[index]) : 1.0f;
        c = token_coefficient(a.in.objective, logp_target, ratio, a.in.advantages[index], a.in.weights[index],
                              a.in.reference ? a.in.reference[index] : 0.0f);
        e = a.in.objective.entropy_coef * a.in.weights[index];
    }
    if (!exists) c = NAN;  // must be seen, not taken for a gradient
    const float m = state.m, log_s = float(log(state.s));
    const float chain = a.rows.scaling.logit_scale / share.scale.temperature;
    const float constant = (-c + e * entropy) * chain, slope = e * chain;
    const float cap = a.rows.scaling.softcap, unit = cap != 0.0f ? share.scale.temperature / cap : 0.0f;
    float at_target = (-c * expm1f(logp_target) + e * expf(logp_target) * (logp_target + entropy)) * chain;
    if (cap != 0.0f) at_target *= 1.0f - (z_target * unit) * (z_target * unit);

    auto* out = static_cast<typename Out::Stored*>(a.gradient) + index * a.gradient_stride;
    constexpr int kOutBytes = kWidth * int(sizeof(typename Out::Stored));
    const bool aligned = reinterpret_cast<uintptr_t>(out - share.shift) % kOutBytes == 0;
    const int tile = Share::kUnroll * int(blockDim.x);
    for (int start = (share.count - 1) / tile * tile; start >= 0 && share.count > 0; start -= tile) {
        uint4 raw[Share::kUnroll];
        BRFT_UNROLL
        for (int u = 0; u < Share::kUnroll; ++u) {
            const int i = start + u * int(blockDim.x) + int(threadIdx.x);
            if (i < share.count) raw[u] = share.load_cached(i);
        }
        if (a.overlaid) block_barrier();
        BRFT_UNROLL
        for (int u = 0; u < Share::kUnroll; ++u) {
            const int i = start + u * int(blockDim.x) + int(threadIdx.x);
            if (i >= share.count) continue;
            float z[kWidth];
            share.scaled(i, raw[u], z);
            const int64_t column = share.column(i);
            typename Out::Stored dz[kWidth];
            BRFT_UNROLL
            for (int l = 0; l < kWidth; ++l) {
                const float logp = exp_domain((z[l] - m) - log_s);
                float g = expf(logp) * (slope == 0.0f ? constant : constant + slope * logp);
                if (cap != 0.0f) g *= 1.0f - (z[l] * unit) * (z[l] * unit);
                if (column + l == target) g = at_target;
                dz[l] = Out::narrow(g);
            }
            if (aligned && share.whole(i)) {
                if constexpr (kOutBytes == 16) {
                    uint4 packed;
                    memcpy(&packed, dz, 16);
                    store_streaming(reinterpret_cast<uint4*>(out + column), packed);
                } else {
                    uint2 packed;
                    memcpy(&packed, dz, 8);
                    *reinterpret_cast<uint2*>(out + column) = packed;
                }
            } else {
                for (int l = 0; l < kWidth; ++l)
                    if (share.inside(i, l)) out[column + l] = dz[l];
            }
        }
    }
}

PolicyArguments arguments_of(const Logits& logits, const int64_t* targets, float* logprobs, float* entropy) {
    PolicyArguments a{};
    a.rows = {logits.data,    logits.count,       logits.vocabulary,  logits.stride,
              logits.scaling, logits.temperature, logits.temperatures};
    a.targets = targets;
    a.logprobs = logprobs;
    a.entropy = entropy;
    return a;
}

int width_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace

std::string refusal(int device) {
#if !defined(BRFT_EMULATED_DEVICE)
    int driver = 0;
    cudaDriverGetVersion(&driver);
    const auto number = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    const std::string built =
        "these kernels are built with CUDA " + number(CUDART_VERSION) + " for sm_" BRFT_CUDA_NAMES;
    if (driver < CUDART_VERSION / 1000 * 1000)
        return built + ", which need a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) +
               ".0 or later; this machine " + (driver ? "has one for " + number(driver) : "has no NVIDIA driver");
    try {
        const OnDevice on(device);
        cudaFuncAttributes found;
        const cudaError_t status = cudaFuncGetAttributes(&found, score<F32>);
        if (status == cudaSuccess) return "";
        cudaGetLastError();  // not for the next caller to find
        int major = 0, minor = 0;
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
        return built + " and later; this GPU is sm_" + std::to_string(major) + std::to_string(minor) + " (" +
               cudaGetErrorString(status) + ")";
    } catch (const std::exception& error) {
        cudaGetLastError();
        return built + "; " + error.what();
    }
#else
    (void)device;
    return "";
#endif
}

void logprob_rows(const Logits& logits, const int64_t* targets, float* logprobs, float* entropy, const Where& where) {
    if (logits.count == 0) return;
    require_grid(logits.count);
    const OnDevice on(where.device);
    PolicyArguments a = arguments_of(logits, targets, logprobs, entropy);
    a.plan = plan_rows(logits.vocabulary, width_of(logits.dtype), kHeaderBytes<SharedStates>, 1, false, on.limits());
    auto* kernel = logits.dtype == DType::f32 ? score<F32> : logits.dtype == DType::bf16 ? score<Bf16> : score<F16>;
    launch(kernel, a.plan, logits.count, where.stream, a);
}

void policy_rows(const Logits& logits, const int64_t* targets, const PolicyInputs& in, const Gradient& gradient,
                 float* logprobs, float* entropy, const Where& where) {
    const DType out = gradient.data ? gradient.dtype : logits.dtype;
    require(out == logits.dtype || (logits.dtype == DType::f32 && out != DType::f32),
            "gradient must have the dtype of logits, or bfloat16 or float16 for float32 logits");
    PolicyArguments a = arguments_of(logits, targets, logprobs, entropy);
    a.in = in;
    a.gradient = gradient.data ? gradient.data : logits.data;
    a.gradient_stride = gradient.data ? gradient.stride : logits.stride;
    const int64_t width = width_of(logits.dtype), narrow = width_of(out);
    const auto *from = static_cast<const char*>(logits.data), *to = static_cast<const char*>(a.gradient);
    bool overlay = false;
    if (to != from || narrow != width || a.gradient_stride != logits.stride) {
        const auto bytes = [&](int64_t stride, int64_t each) {
            return ((logits.count - 1) * stride + logits.vocabulary) * each;
        };
        const bool apart = logits.count == 0 || to >= from + bytes(logits.stride, width) ||
                           from >= to + bytes(a.gradient_stride, narrow);
        overlay = !apart;
        require(apart || (narrow < width && to == from + logits.vocabulary * narrow &&
                          (logits.count == 1 || a.gradient_stride * narrow == logits.stride * width)),
                "gradient must be the logits' own memory, the second half of each of their rows, or other memory");
    }
    if (logits.count == 0) return;
    require_grid(logits.count);
    const OnDevice on(where.device);
    a.plan = plan_rows(logits.vocabulary, int(width), kHeaderBytes<SharedStates>, 2, overlay, on.limits());
    a.overlaid = overlay && a.plan.cached < a.plan.share;
    void (*kernel)(PolicyArguments);
    if (logits.dtype == DType::f32)
        kernel = out == DType::f32    ? differentiate<F32, F32>
                 : out == DType::bf16 ? differentiate<F32, Bf16>
                                      : differentiate<F32, F16>;
    else
        kernel = out == DType::bf16 ? differentiate<Bf16, Bf16> : differentiate<F16, F16>;
    launch(kernel, a.plan, logits.count, where.stream, a);
}

}  // namespace bandit_rft::cuda
