// The CUDA kernels' own source, compiled for the CPU: behind C functions for tests/csrc/test_device_math.py, and behind
// their own bindings, as a Python module that reads CPU memory, for tests/csrc/test_bindings.py.
#include "../../csrc/cuda/policy_rows.cu"
#include "../../csrc/cuda/sample_rows.cu"

#if defined(BRFT_BINDINGS)
#include "../../csrc/cuda/exports.cpp"
PYBIND11_MODULE(emulated_cuda, module) { bandit_rft::cuda::add_exports(module); }
#endif

using namespace bandit_rft;

namespace {
thread_local std::string error;

template <class Call>
const char* guarded(const Call& call) {
    try {
        call();
        return nullptr;
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
}
}  // namespace

// What -fsanitize=alignment calls at an access that would fault on a GPU. Defined here, so that no sanitizer's runtime
// has to be loaded into the Python that runs the tests.
struct SanitizedAccess {
    const char* file;
    uint32_t line, column;
    const void* type;
    unsigned char log_alignment, kind;
};
extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(SanitizedAccess* access,
                                                                                      uintptr_t address) {
    const unsigned alignment = 1u << access->log_alignment;
    cuda::emulation::fault("misaligned address: " + std::to_string(address % alignment) + " modulo " +
                           std::to_string(alignment) + ", " + access->file + ":" + std::to_string(access->line));
}

extern "C" {

struct LogitsArgument {
    void* data;
    int dtype;  // 0 float32, 1 bfloat16, 2 float16
    int64_t count, vocabulary, stride;
    float logit_scale, softcap, temperature;
    const float* temperatures;
};

static cuda::Logits logits_of(const LogitsArgument& a) {
    return {a.data,        DType(a.dtype), a.count, a.vocabulary, a.stride, {a.logit_scale, a.softcap},
            a.temperature, a.temperatures};
}

void use_device(int major, int shared_per_block, int shared_per_sm, int max_threads, bool backwards) {
    cuda::emulated_limits = {major, shared_per_block, shared_per_sm, max_threads};
    cuda::emulation::backwards = backwards;
}

// What a launch of score, differentiate, sample or filtered decides.
void plan_of(int64_t vocabulary, int width, const char* kernel, bool alone, int* out) {
    const std::string name(kernel);
    const int header = name == "score"           ? cuda::kHeaderBytes<cuda::SharedStates>
                       : name == "differentiate" ? cuda::kHeaderBytes<cuda::PolicyShared>
                       : name == "sample"        ? cuda::kHeaderBytes<cuda::Shared>
                                                 : cuda::kHeaderBytes<cuda::FilterShared>;
    const int passes = name == "score" || name == "sample" ? 1 : 2;
    const auto plan =
        cuda::plan_rows(vocabulary, width, header, passes, alone,
                        name == "filtered" ? cuda::kBlocksOfSmForFilters : cuda::kBlocksOfSm, cuda::emulated_limits);
    const int fields[] = {plan.blocks, plan.threads, plan.cached, plan.share, plan.shared_bytes};
    for (int i = 0; i < 5; ++i) out[i] = fields[i];
}

// How often a warp asked whether a token may win, and how often one might, since the last call.
void votes(long* out) {
    out[0] = cuda::emulation::votes;
    out[1] = cuda::emulation::votes_for;
    cuda::emulation::votes = cuda::emulation::votes_for = 0;
}

float exp2_approximate(float x) { return cuda::exp2_approximate(x); }

// The emulation's own check: 16 bytes written `offset` bytes into shared or (`global`) other memory.
const char* write_vector(int offset, void* global) {
    return guarded([&] {
        cuda::emulation::run(1, 32, 0, 64, [&] {
            char* to = global ? static_cast<char*>(global) : cuda::shared_memory();
            *reinterpret_cast<uint4*>(to + offset) = uint4{1, 2, 3, 4};
        });
    });
}

// As above: `groups` copies of a lane, of which the last `left` (0, 1 or 3) are not waited for, from `offset` bytes
// into `global`; and what the lane then finds in shared memory.
const char* copy_vectors(int groups, int left, int offset, const void* global, void* found) {
    return guarded([&] {
        cuda::emulation::run(1, 32, 0, size_t(groups) * 512, [&] {
            const int lane = int(threadIdx.x);
            auto* shared = reinterpret_cast<uint4*>(cuda::shared_memory()) + lane;
            const auto* from = reinterpret_cast<const uint4*>(static_cast<const char*>(global) + offset);
            for (int g = 0; g < groups; ++g) {
                cuda::copy_async(shared + g * 32, from + g * 32 + lane);
                cuda::end_copy_group();
            }
            if (left == 0) cuda::wait_for_copies<0>();
            if (left == 1) cuda::wait_for_copies<1>();
            if (left == 3) cuda::wait_for_copies<3>();
            for (int g = 0; g < groups; ++g) static_cast<uint4*>(found)[g * 32 + lane] = shared[g * 32];
        });
    });
}

const char* logprob_rows(LogitsArgument logits, const int64_t* targets, float* logprobs, float* entropy) {
    return guarded([&] { cuda::logprob_rows(logits_of(logits), targets, logprobs, entropy, {}); });
}

// kind 0: advantages and weights are dL/dlogp and dL/dentropy (or null).
const char* policy_rows(LogitsArgument logits, const int64_t* targets, int kind, float low, float high, float dual_clip,
                        int kl, float kl_coef, float entropy_coef, const float* advantages, const float* weights,
                        const float* behavior, const float* reference, void* gradient, int gradient_dtype,
                        int64_t gradient_stride, float* logprobs, float* entropy) {
    return guarded([&] {
        cuda::PolicyInputs in{};
        if (kind == 0) {
            in.given_logprob = advantages;
            in.given_entropy = weights;
        } else {
            in.objective = {ObjectiveKind(kind), low, high, dual_clip, KlKind(kl), kl_coef, entropy_coef};
            in.advantages = advantages;
            in.weights = weights;
            in.behavior = behavior;
            in.reference = reference;
        }
        cuda::policy_rows(logits_of(logits), targets, in, {gradient, DType(gradient_dtype), gradient_stride}, logprobs,
                          entropy, {});
    });
}

const char* sample_rows(LogitsArgument logits, const int64_t* seed, const int64_t* sequences, const int64_t* positions,
                        int64_t top_k, double top_p, float min_p, int64_t* tokens, float* logprobs,
                        float* sampling_logprobs, float* entropy, float* kept_mass) {
    return guarded([&] {
        cuda::sample_rows(logits_of(logits), {seed, sequences, positions, top_k, top_p, min_p},
                          {tokens, logprobs, sampling_logprobs, entropy, kept_mass}, {});
    });
}
}
