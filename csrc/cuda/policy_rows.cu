// Rows of logits on a GPU: log-probability and entropy, and dL/dlogits written over the logits.
//
//   pass 1   (m, s, t) of each lane's logits, merged over warps, blocks and the cluster        -> lse, logp, entropy
//   pass 2   dz_j = 2^y_j (a + b y_j), p_j being 2^y_j / s                                     -> over the logits
//            a = chain (-c - e ln2 E[y]) / s, b = chain e ln2 / s, chain = dz / dlogit; the target's is stored last
//
// Never in memory: probabilities, or anything of the row's length but the row. On sm_90 and later a row is read from
// global memory once and written once: in between a cluster of up to eight blocks holds it in shared memory (V =
// 151,936 in float32 is 76 KiB a block, two blocks a multiprocessor; up to 450,000 logits fit with one). Before sm_90 a
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

struct alignas(16) PolicyShared {
    SharedStates states;
    float logit;  // of the target, raw: kept here, since the first pass has no register to spare
    struct {
        float m, constant, slope, at_target;  // m, a, b, and dz of the target
        float unit;                           // z times this is tanh(...): temperature / softcap, 0 without
    } row;
};
static_assert(sizeof(PolicyShared) % 16 == 0);

BRFT_DEVICE bool has_target(const PolicyArguments& a, int64_t index) {
    return uint64_t(a.targets[index]) < uint64_t(a.rows.vocabulary);
}

template <class In, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads, 2) score(PolicyArguments a) {
    auto* states = reinterpret_cast<SharedStates*>(shared_memory());
    cluster_arrive_first();
    const int64_t index = blockIdx.x;
    const RowShare<In, kPlain> share(a.rows, a.plan, index, 0, nullptr);
    const float k = share.scale.k;
    ThreadState own(a.rows);
    share.template each<Pass::only>([&](int, const float* v) {
        float x[kLogits];
        add_to_state(own, v, k, x);
    });
    share_state(own, k, states, 1, 0);
    if (share.warp > 0) return;
    const RowSoftmax softmax(whole_state(states, k, share.warps), share.scale);
    if (share.lane > 0) return;
    a.logprobs[index] = has_target(a, index) ? softmax.logprob(share.v_of(a.targets[index])) : NAN;
    a.entropy[index] = softmax.entropy();
}

// dL/dlogp and -dL/dentropy of a row.
struct Coefficients {
    float c, e;

    BRFT_DEVICE Coefficients(const PolicyInputs& in, int64_t index, float logp) {
        if (in.objective.kind == ObjectiveKind::given) {
            c = in.given_logprob[index];
            e = in.given_entropy ? -in.given_entropy[index] : 0.0f;
        } else {
            const float ratio = in.behavior ? expf(logp - in.behavior[index]) : 1.0f;
            c = token_coefficient(in.objective, logp, ratio, in.advantages[index], in.weights[index],
                                  in.reference ? in.reference[index] : 0.0f);
            e = in.objective.entropy_coef * in.weights[index];
        }
    }
};

template <class In, class Out, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads, 2) differentiate(PolicyArguments a) {
    using Stored = typename Out::Stored;
    constexpr int kVector = 16 / int(sizeof(Stored));  // In is never narrower than Out
    using Share = RowShare<In, kPlain, kVector>;
    auto* shared = reinterpret_cast<PolicyShared*>(shared_memory());
    cluster_arrive_first();
    const int64_t index = blockIdx.x / unsigned(a.plan.blocks);
    const int rank = int(blockIdx.x % unsigned(a.plan.blocks));
    const Share share(a.rows, a.plan, index, rank, after_header(shared));
    const float k = share.scale.k;
    if (threadIdx.x == 0)  // before it is written over
        shared->logit = has_target(a, index) ? In::widen(share.row[a.targets[index]]) : NAN;
    ThreadState own(a.rows);
    share.template each<Pass::first>([&](int, const float* v) {
        float x[kLogits];
        add_to_state(own, v, k, x);
    });
    share_state(own, k, &shared->states, a.plan.blocks, rank);
    if (share.warp == 0) {  // a row's own numbers cost more than a span: one warp finds them for its block
        const RowSoftmax softmax(whole_state(&shared->states, k, a.plan.blocks * share.warps), share.scale);
        const float v = share.scale.value(shared->logit), logp = softmax.logprob(v), entropy = softmax.entropy();
        Coefficients of(a.in, index, logp);
        if (!has_target(a, index)) of.c = NAN;  // must be seen, not taken for a gradient
        const double chain = double(a.rows.scaling.logit_scale) / double(share.scale.temperature);
        const double slope = double(of.e) * kLn2 / softmax.s * chain;
        const float p = expf(logp);  // 0 where the target's logit is -inf: 0 * -inf must not become NaN
        const float pull = p == 0.0f ? 0.0f : of.e * p * (logp + entropy);
        float at_target = (-of.c * expm1f(logp) + pull) * float(chain);
        const float cap = a.rows.scaling.softcap, unit = cap == 0.0f ? 0.0f : share.scale.temperature / cap;
        if (unit != 0.0f) at_target *= 1.0f - (v * unit) * (v * unit);
        if (share.lane == 0) {
            shared->row = {softmax.m, float(double(-of.c) / softmax.s * chain - slope * softmax.mean), float(slope),
                           at_target, unit};
            if (rank == 0) {
                a.logprobs[index] = logp;
                a.entropy[index] = entropy;
            }
        }
    }
    block_barrier();
    const auto term = shared->row;

    Stored* const row = static_cast<Stored*>(a.gradient) + index * a.gradient_stride;
    Stored* const start = row + share.column(0);
    const bool aligned = reinterpret_cast<uintptr_t>(start) % 16 == 0;
    BRFT_NO_UNROLL
    for (int base = (share.count - 1) / share.warps * share.warps; base >= 0; base -= share.warps) {
        const int i = base + share.warp;
        typename Share::Raw raw;
        if (i < share.count) raw = share.load_kept(i);
        if (a.overlaid) block_barrier();
        if (i >= share.count) continue;
        float v[kLogits], g[kLogits];
        share.values(i, raw, v);
        BRFT_UNROLL
        for (int l = 0; l < kLogits; ++l) {
            const float y = fmaxf((v[l] - term.m) * k, kExponentFloor);
            g[l] = exp2_approximate(y) * fmaf(term.slope, y, term.constant);
            if constexpr (!kPlain) g[l] *= term.unit == 0.0f ? 1.0f : 1.0f - (v[l] * term.unit) * (v[l] * term.unit);
        }
        Stored* to = start + int64_t(i) * kSpan;
        if (aligned && share.edgeless(i)) {
            BRFT_UNROLL
            for (int l = 0; l < kLogits; l += kVector)
                store_streaming(reinterpret_cast<uint4*>(to + Share::offset(l)), Out::pack(g + l));
        } else {
            const auto extent = share.extent(i);
            BRFT_UNROLL
            for (int l = 0; l < kLogits; ++l)
                if (extent.inside(l)) to[Share::offset(l)] = Out::narrow(g[l]);
        }
    }
    if (has_target(a, index) && share.owns(a.targets[index]))
        row[a.targets[index]] = Out::narrow(shared->row.at_target);
}

PolicyArguments arguments_of(const Logits& logits, const int64_t* targets, float* logprobs, float* entropy) {
    PolicyArguments a{};
    a.rows = {logits.data,
              logits.count,
              logits.vocabulary,
              logits.stride,
              logits.scaling,
              logits.temperature,
              logits.temperatures,
              0.0f,
              0.0f,
              0.0f};
    a.targets = targets;
    a.logprobs = logprobs;
    a.entropy = entropy;
    return a;
}

template <bool kPlain>
auto* score_for(DType in) {
    return in == DType::f32 ? score<F32, kPlain> : in == DType::bf16 ? score<Bf16, kPlain> : score<F16, kPlain>;
}
template <bool kPlain>
auto* differentiate_for(DType in, DType out) {
    if (in == DType::f32)
        return out == DType::f32    ? differentiate<F32, F32, kPlain>
               : out == DType::bf16 ? differentiate<F32, Bf16, kPlain>
                                    : differentiate<F32, F16, kPlain>;
    return out == DType::bf16 ? differentiate<Bf16, Bf16, kPlain> : differentiate<F16, F16, kPlain>;
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
        const cudaError_t status = cudaFuncGetAttributes(&found, score<F32, true>);
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
    a.plan = plan_rows(logits.vocabulary, width_of(logits.dtype), kHeaderBytes<SharedStates>, 1, false, kBlocksOfSm,
                       on.limits());
    const bool plain = set_scaling(a.rows, true);
    launch(plain ? score_for<true>(logits.dtype) : score_for<false>(logits.dtype), a.plan, logits.count, where.stream,
           a);
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
    a.plan = plan_rows(logits.vocabulary, int(width), kHeaderBytes<PolicyShared>, 2, overlay, kBlocksOfSm, on.limits());
    a.overlaid = overlay && a.plan.cached < a.plan.share;
    const bool plain = set_scaling(a.rows, true);
    launch(plain ? differentiate_for<true>(logits.dtype, out) : differentiate_for<false>(logits.dtype, out), a.plan,
           logits.count, where.stream, a);
}

}  // namespace bandit_rft::cuda
