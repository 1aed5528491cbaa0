// pybind11 exports of the CUDA kernels: those of module.cpp with a raw stream handle in place of a number of threads.
#include "exports.h"

#include "../capsules.h"
#include "operations.h"

namespace py = pybind11;

namespace bandit_rft::cuda {
namespace {

Logits logits_of(const Capsules& on, const py::capsule& logits, float temperature, const OptionalCapsule& temperatures,
                 float softcap, float logit_scale) {
    const TensorView z = on.view(logits, "logits", 2);
    require(z.dtype == DType::f32 || z.dtype == DType::bf16 || z.dtype == DType::f16,
            "logits must be float32, bfloat16 or float16");
    require_columns(z);
    return {z.data,       z.dtype,
            z.shape[0],   z.shape[1],
            z.row_stride, Scaling{logit_scale, softcap},
            temperature,  on.floats(temperatures, "temperature", z.shape[0])};
}

Gradient gradient_of(const Capsules& on, const OptionalCapsule& out, const Logits& rows) {
    if (!out) return {nullptr, rows.dtype, rows.stride};
    const TensorView g = on.view(*out, "gradient", 2);
    require(g.shape[0] == rows.count && g.shape[1] == rows.vocabulary, "gradient must have the shape of logits");
    return {g.data, g.dtype, g.row_stride};
}

void* handle(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

void py_logprob_rows(const py::capsule& logits, const py::capsule& targets, float temperature,
                     const OptionalCapsule& temperatures, float softcap, float logit_scale, const py::capsule& logprobs,
                     const py::capsule& entropy, uintptr_t stream) {
    const auto on = Capsules::beside(logits, "logits");
    const Logits rows = logits_of(on, logits, temperature, temperatures, softcap, logit_scale);
    logprob_rows(rows, on.integers(targets, "targets", rows.count), on.floats(logprobs, "logprobs", rows.count),
                 on.floats(entropy, "entropy", rows.count), {on.device(), handle(stream)});
}

void py_gradient_rows(const py::capsule& logits, const py::capsule& targets, float temperature,
                      const OptionalCapsule& temperatures, float softcap, float logit_scale,
                      const py::capsule& grad_logprobs, const OptionalCapsule& grad_entropy,
                      const py::capsule& logprobs, const py::capsule& entropy, const OptionalCapsule& out,
                      uintptr_t stream) {
    const auto on = Capsules::beside(logits, "logits");
    const Logits rows = logits_of(on, logits, temperature, temperatures, softcap, logit_scale);
    PolicyInputs in{};
    in.given_logprob = on.floats(grad_logprobs, "grad_logprobs", rows.count);
    in.given_entropy = on.floats(grad_entropy, "grad_entropy", rows.count);
    policy_rows(rows, on.integers(targets, "targets", rows.count), in, gradient_of(on, out, rows),
                on.floats(logprobs, "logprobs", rows.count), on.floats(entropy, "entropy", rows.count),
                {on.device(), handle(stream)});
}

void py_policy_rows(const py::capsule& logits, const py::capsule& targets, float temperature,
                    const OptionalCapsule& temperatures, float softcap, float logit_scale, int kind, float ratio_low,
                    float ratio_high, float dual_clip, int kl, float kl_coef, float entropy_coef,
                    const py::capsule& advantages, const py::capsule& weights, const OptionalCapsule& behavior,
                    const OptionalCapsule& reference, const py::capsule& logprobs, const py::capsule& entropy,
                    const OptionalCapsule& out, uintptr_t stream) {
    const auto on = Capsules::beside(logits, "logits");
    const Logits rows = logits_of(on, logits, temperature, temperatures, softcap, logit_scale);
    require(kind >= 1 && kind <= 5 && kl >= 0 && kl <= 3, "kind or kl is out of range");
    PolicyInputs in{};
    in.objective = {ObjectiveKind(kind), ratio_low, ratio_high, dual_clip, KlKind(kl), kl_coef, entropy_coef};
    in.advantages = on.floats(advantages, "advantages", rows.count);
    in.weights = on.floats(weights, "weights", rows.count);
    in.behavior = on.floats(behavior, "behavior_logprobs", rows.count);
    in.reference = on.floats(reference, "reference_logprobs", rows.count);
    require(kl == 0 || reference.has_value(), "reference_logprobs is needed for a KL term");
    policy_rows(rows, on.integers(targets, "targets", rows.count), in, gradient_of(on, out, rows),
                on.floats(logprobs, "logprobs", rows.count), on.floats(entropy, "entropy", rows.count),
                {on.device(), handle(stream)});
}

void py_sample_rows(const py::capsule& logits, float temperature, const OptionalCapsule& temperatures, float softcap,
                    float logit_scale, const py::capsule& seed, const py::capsule& sequence_ids,
                    const py::capsule& positions, int64_t top_k, double top_p, float min_p, const py::capsule& tokens,
                    const py::capsule& logprobs, const py::capsule& sampling_logprobs, const py::capsule& entropy,
                    const py::capsule& kept_mass, uintptr_t stream) {
    const auto on = Capsules::beside(logits, "logits");
    const Logits rows = logits_of(on, logits, temperature, temperatures, softcap, logit_scale);
    const int64_t n = rows.count;
    const SampleInputs in{on.integers(seed, "seed", 1),
                          on.integers(sequence_ids, "sequence_ids", n),
                          on.integers(positions, "positions", n),
                          top_k,
                          top_p,
                          min_p};
    sample_rows(rows, in,
                {on.integers(tokens, "tokens", n), on.floats(logprobs, "logprobs", n),
                 on.floats(sampling_logprobs, "sampling_logprobs", n), on.floats(entropy, "entropy", n),
                 on.floats(kept_mass, "kept_mass", n)},
                {on.device(), handle(stream)});
}

}  // namespace

void add_exports(py::module_ m) {
    m.doc() = "The row kernels on a GPU: the arguments of the CPU's, with a raw CUDA stream handle last; none waits.";
    m.attr("version") = BRFT_CUDA_VERSION;
    m.attr("architectures") = BRFT_CUDA_NAMES;
    using py::arg;
    m.def("refusal", &refusal, arg("device"));
    m.def("logprob_rows", &py_logprob_rows, arg("logits"), arg("targets"), arg("temperature"), arg("temperatures"),
          arg("softcap"), arg("logit_scale"), arg("logprobs"), arg("entropy"), arg("stream"));
    m.def("gradient_rows", &py_gradient_rows, arg("logits"), arg("targets"), arg("temperature"), arg("temperatures"),
          arg("softcap"), arg("logit_scale"), arg("grad_logprobs"), arg("grad_entropy"), arg("logprobs"),
          arg("entropy"), arg("out"), arg("stream"));
    m.def("policy_rows", &py_policy_rows, arg("logits"), arg("targets"), arg("temperature"), arg("temperatures"),
          arg("softcap"), arg("logit_scale"), arg("kind"), arg("ratio_low"), arg("ratio_high"), arg("dual_clip"),
          arg("kl"), arg("kl_coef"), arg("entropy_coef"), arg("advantages"), arg("weights"), arg("behavior"),
          arg("reference"), arg("logprobs"), arg("entropy"), arg("out"), arg("stream"));
    m.def("sample_rows", &py_sample_rows, arg("logits"), arg("temperature"), arg("temperatures"), arg("softcap"),
          arg("logit_scale"), arg("seed"), arg("sequence_ids"), arg("positions"), arg("top_k"), arg("top_p"),
          arg("min_p"), arg("tokens"), arg("logprobs"), arg("sampling_logprobs"), arg("entropy"), arg("kept_mass"),
          arg("stream"));
}

}  // namespace bandit_rft::cuda
