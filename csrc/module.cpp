// pybind11 exports, nothing else: DLPack capsules in, checked views out, the GIL released while the kernels run.
#include <pybind11/pybind11.h>

#include "capsules.h"
#include "cpu/operations.h"
#include "philox.h"
#if defined(BRFT_CUDA)
#include "cuda/exports.h"
#endif

namespace py = pybind11;
using namespace bandit_rft;

namespace {

const Capsules memory = Capsules::in_cpu_memory();

cpu::Rows rows_of(const py::capsule& logits, float temperature, const OptionalCapsule& temperatures, float softcap,
                  float logit_scale) {
    const TensorView z = memory.view(logits, "logits", 2);
    require(z.dtype == DType::f32 || z.dtype == DType::bf16, "logits must be float32 or bfloat16");
    require_columns(z);
    return {z.data, z.dtype, z.shape[0], z.shape[1], z.row_stride, Scaling{logit_scale, softcap}, temperature,
            memory.floats(temperatures, "temperature", z.shape[0])};
}

void logprob_rows(const py::capsule& logits, const py::capsule& targets, float temperature,
                  const OptionalCapsule& temperatures, float softcap, float logit_scale, const py::capsule& logprobs,
                  const py::capsule& entropy, int threads) {
    const cpu::Rows rows = rows_of(logits, temperature, temperatures, softcap, logit_scale);
    const auto* t = memory.vector(targets, "targets", DType::i64, rows.count).as<const int64_t>();
    auto* l = memory.vector(logprobs, "logprobs", DType::f32, rows.count).as<float>();
    auto* h = memory.vector(entropy, "entropy", DType::f32, rows.count).as<float>();
    py::gil_scoped_release release;
    cpu::logprob_rows(rows, t, l, h, threads);
}

void gradient_rows(const py::capsule& logits, const py::capsule& targets, float temperature,
                   const OptionalCapsule& temperatures, float softcap, float logit_scale,
                   const py::capsule& grad_logprobs, const OptionalCapsule& grad_entropy, const py::capsule& logprobs,
                   const py::capsule& entropy, int threads) {
    const cpu::Rows rows = rows_of(logits, temperature, temperatures, softcap, logit_scale);
    const auto* t = memory.vector(targets, "targets", DType::i64, rows.count).as<const int64_t>();
    auto* l = memory.vector(logprobs, "logprobs", DType::f32, rows.count).as<float>();
    auto* h = memory.vector(entropy, "entropy", DType::f32, rows.count).as<float>();
    cpu::PolicyInputs in{};
    in.given_logprob = memory.floats(grad_logprobs, "grad_logprobs", rows.count);
    in.given_entropy = memory.floats(grad_entropy, "grad_entropy", rows.count);
    py::gil_scoped_release release;
    cpu::policy_rows(rows, t, in, l, h, threads);
}

void policy_rows(const py::capsule& logits, const py::capsule& targets, float temperature,
                 const OptionalCapsule& temperatures, float softcap, float logit_scale, int kind, float ratio_low,
                 float ratio_high, float dual_clip, int kl, float kl_coef, float entropy_coef,
                 const py::capsule& advantages, const py::capsule& weights, const OptionalCapsule& behavior,
                 const OptionalCapsule& reference, const py::capsule& logprobs, const py::capsule& entropy, int threads) {
    const cpu::Rows rows = rows_of(logits, temperature, temperatures, softcap, logit_scale);
    const auto* t = memory.vector(targets, "targets", DType::i64, rows.count).as<const int64_t>();
    auto* l = memory.vector(logprobs, "logprobs", DType::f32, rows.count).as<float>();
    auto* h = memory.vector(entropy, "entropy", DType::f32, rows.count).as<float>();
    require(kind >= 1 && kind <= 4 && kl >= 0 && kl <= 3, "kind or kl is out of range");
    cpu::PolicyInputs in{};
    in.objective = {ObjectiveKind(kind), ratio_low, ratio_high, dual_clip, KlKind(kl), kl_coef, entropy_coef};
    in.advantages = memory.floats(advantages, "advantages", rows.count);
    in.weights = memory.floats(weights, "weights", rows.count);
    in.behavior = memory.floats(behavior, "behavior_logprobs", rows.count);
    in.reference = memory.floats(reference, "reference_logprobs", rows.count);
    require(kl == 0 || in.reference, "reference_logprobs is needed for a KL term");
    py::gil_scoped_release release;
    cpu::policy_rows(rows, t, in, l, h, threads);
}

void sample_rows(const py::capsule& logits, float temperature, const OptionalCapsule& temperatures, float softcap,
                 float logit_scale, uint64_t seed, const py::capsule& sequence_ids, const py::capsule& positions,
                 int64_t top_k, float top_p, float min_p, const py::capsule& tokens, const py::capsule& logprobs,
                 const py::capsule& sampling_logprobs, const py::capsule& entropy, const py::capsule& kept_mass,
                 int threads) {
    const cpu::Rows rows = rows_of(logits, temperature, temperatures, softcap, logit_scale);
    const int64_t n = rows.count;
    const cpu::SampleInputs in{seed, memory.vector(sequence_ids, "sequence_ids", DType::i64, n).as<const int64_t>(),
                               memory.vector(positions, "positions", DType::i64, n).as<const int64_t>(), top_k, top_p, min_p};
    const cpu::SampleOutputs out{memory.vector(tokens, "tokens", DType::i64, n).as<int64_t>(),
                                 memory.vector(logprobs, "logprobs", DType::f32, n).as<float>(),
                                 memory.vector(sampling_logprobs, "sampling_logprobs", DType::f32, n).as<float>(),
                                 memory.vector(entropy, "entropy", DType::f32, n).as<float>(),
                                 memory.vector(kept_mass, "kept_mass", DType::f32, n).as<float>()};
    py::gil_scoped_release release;
    cpu::sample_rows(rows, in, out, threads);
}

void head_logits(const py::capsule& hidden, const py::capsule& weight, const OptionalCapsule& bias,
                 const py::capsule& out, int threads) {
    const TensorView h = memory.view(hidden, "hidden", 2), w = memory.view(weight, "weight", 2), z = memory.view(out, "out", 2);
    require(h.dtype == DType::f32 || h.dtype == DType::bf16, "hidden must be float32 or bfloat16");
    require(w.dtype == DType::f32 || w.dtype == DType::bf16, "weight must be float32 or bfloat16");
    require(h.shape[1] == w.shape[1], "hidden and weight must have the same number of columns");
    require(z.dtype == DType::f32 && z.shape[0] == h.shape[0] && z.shape[1] == w.shape[0] && z.row_stride == z.shape[1],
            "out must be a contiguous float32 [B, V]");
    const cpu::Head head{h.data,     w.data,       h.dtype,      w.dtype, h.shape[0], h.shape[1],
                         w.shape[0], h.row_stride, w.row_stride, memory.floats(bias, "bias", w.shape[0])};
    py::gil_scoped_release release;
    cpu::head_logits(head, z.as<float>(), threads);
}

py::tuple philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    const PhiloxWords w = philox4x32_10(c0, c1, c2, c3, {uint32_t(key), uint32_t(key >> 32)});
    return py::make_tuple(w.word[0], w.word[1], w.word[2], w.word[3]);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "Native kernels of bandit_rft: DLPack capsules in, results written to the tensors given.";
    m.attr("version") = BRFT_VERSION;
    m.def("instruction_set", &cpu::instruction_set);
    m.def("use_openmp", &cpu::use_openmp);
    m.def("use_instruction_set", &cpu::use_instruction_set);
    m.def("logprob_rows", &logprob_rows);
    m.def("gradient_rows", &gradient_rows);
    m.def("policy_rows", &policy_rows);
    m.def("sample_rows", &sample_rows);
    m.def("head_logits", &head_logits);
#if defined(BRFT_CUDA)
    cuda::add_exports(m.def_submodule("cuda"));
#endif
    m.def("philox", &philox);
    m.def("gumbel", [](uint32_t word) { return gumbel_from_word(word); });
}
