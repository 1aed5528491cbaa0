// pybind11 exports, nothing else: DLPack capsules in, checked views out, the GIL released while the kernels run.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>

#include <chrono>
#include <numeric>

#include "capsules.h"
#include "cpu/attention.h"
#include "cpu/decoder.h"
#include "cpu/drawing.h"
#include "cpu/layers.h"
#include "cpu/operations.h"
#include "cpu/products.h"
#include "cpu/threads.h"
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
    return {z.data,       z.dtype,
            z.shape[0],   z.shape[1],
            z.row_stride, Scaling{logit_scale, softcap},
            temperature,  memory.floats(temperatures, "temperature", z.shape[0])};
}

// A target outside its row would be read, and written to, wherever it points.
const int64_t* targets_of(const py::capsule& targets, const cpu::Rows& rows) {
    const int64_t* t = memory.integers(targets, "targets", rows.count);
    for (int64_t i = 0; i < rows.count; ++i)
        require(t[i] >= 0 && t[i] < rows.vocabulary, [&] {
            return "targets must lie in [0, " + std::to_string(rows.vocabulary) + "); targets[" + std::to_string(i) +
                   "] is " + std::to_string(t[i]);
        });
    return t;
}

void logprob_rows(const py::capsule& logits, const py::capsule& targets, float temperature,
                  const OptionalCapsule& temperatures, float softcap, float logit_scale, const py::capsule& logprobs,
                  const py::capsule& entropy, int threads) {
    const cpu::Rows rows = rows_of(logits, temperature, temperatures, softcap, logit_scale);
    const int64_t* t = targets_of(targets, rows);
    auto* l = memory.vector(logprobs, "logprobs", DType::f32, rows.count).as<float>();
    auto* h = memory.vector(entropy, "entropy", DType::f32, rows.count).as<float>();
    py::gil_scoped_release release;
    cpu::logprob_rows(rows, t, l, h, threads);
}

void add_tile(cpu::TiledLogprobs& self, const py::capsule& logits, const py::capsule& targets, int64_t first,
              float temperature, const OptionalCapsule& temperatures, float softcap, float logit_scale, int threads) {
    const cpu::Rows tile = rows_of(logits, temperature, temperatures, softcap, logit_scale);
    require(tile.count == self.rows(), "logits must have as many rows as the sums");
    require(first >= 0, "first must be 0 or more");
    const int64_t* t = memory.integers(targets, "targets", tile.count);
    py::gil_scoped_release release;
    self.add(tile, t, first, threads);
}

void finish_tiles(const cpu::TiledLogprobs& self, const py::capsule& logprobs, const py::capsule& entropy) {
    auto* l = memory.vector(logprobs, "logprobs", DType::f32, self.rows()).as<float>();
    auto* h = memory.vector(entropy, "entropy", DType::f32, self.rows()).as<float>();
    self.finish(l, h);
}

void gradient_rows(const py::capsule& logits, const py::capsule& targets, float temperature,
                   const OptionalCapsule& temperatures, float softcap, float logit_scale,
                   const py::capsule& grad_logprobs, const OptionalCapsule& grad_entropy, const py::capsule& logprobs,
                   const py::capsule& entropy, int threads) {
    const cpu::Rows rows = rows_of(logits, temperature, temperatures, softcap, logit_scale);
    const int64_t* t = targets_of(targets, rows);
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
                 const OptionalCapsule& reference, const py::capsule& logprobs, const py::capsule& entropy,
                 int threads) {
    const cpu::Rows rows = rows_of(logits, temperature, temperatures, softcap, logit_scale);
    const int64_t* t = targets_of(targets, rows);
    auto* l = memory.vector(logprobs, "logprobs", DType::f32, rows.count).as<float>();
    auto* h = memory.vector(entropy, "entropy", DType::f32, rows.count).as<float>();
    require(kind >= 1 && kind <= 5 && kl >= 0 && kl <= 3, "kind or kl is out of range");
    cpu::PolicyInputs in{};
    in.objective = {ObjectiveKind(kind), ratio_low, ratio_high, dual_clip, KlKind(kl), kl_coef, entropy_coef};
    in.advantages = memory.floats(advantages, "advantages", rows.count);
    in.weights = memory.floats(weights, "weights", rows.count);
    in.behavior = memory.floats(behavior, "behavior_logprobs", rows.count);
    in.reference = memory.floats(reference, "reference_logprobs", rows.count);
    require(kl == 0 || reference.has_value(), "reference_logprobs is needed for a KL term");
    py::gil_scoped_release release;
    cpu::policy_rows(rows, t, in, l, h, threads);
}

void sample_rows(const py::capsule& logits, float temperature, const OptionalCapsule& temperatures, float softcap,
                 float logit_scale, uint64_t seed, const py::capsule& sequence_ids, const py::capsule& positions,
                 int64_t top_k, double top_p, double min_p, const py::capsule& tokens, const py::capsule& logprobs,
                 const py::capsule& sampling_logprobs, const py::capsule& entropy, const py::capsule& kept_mass,
                 int threads) {
    const cpu::Rows rows = rows_of(logits, temperature, temperatures, softcap, logit_scale);
    const int64_t n = rows.count;
    const cpu::SampleInputs in{seed,
                               memory.vector(sequence_ids, "sequence_ids", DType::i64, n).as<const int64_t>(),
                               memory.vector(positions, "positions", DType::i64, n).as<const int64_t>(),
                               top_k,
                               top_p,
                               min_p};
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
    const TensorView h = memory.view(hidden, "hidden", 2), w = memory.view(weight, "weight", 2),
                     z = memory.view(out, "out", 2);
    require(h.dtype == DType::f32 || h.dtype == DType::bf16, "hidden must be float32 or bfloat16");
    require(w.dtype == DType::f32 || w.dtype == DType::bf16, "weight must be float32 or bfloat16");
    require(h.shape[1] == w.shape[1], "hidden and weight must have the same number of columns");
    require(z.dtype == DType::f32 && z.shape[0] == h.shape[0] && z.shape[1] == w.shape[0] && z.row_stride == z.shape[1],
            "out must be a contiguous float32 [B, V]");
    const cpu::Head head{h.data,     w.data,     h.dtype,      w.dtype,      h.shape[0],
                         h.shape[1], w.shape[0], h.row_stride, w.row_stride, memory.floats(bias, "bias", w.shape[0])};
    py::gil_scoped_release release;
    cpu::head_logits(head, z.as<float>(), threads);
}

const float* contiguous(const TensorView& tensor, const char* name, int64_t rows, int64_t columns) {
    require(tensor.dtype == DType::f32 && tensor.shape[0] == rows && tensor.shape[1] == columns &&
                tensor.row_stride == columns,
            std::string(name) + " must be a contiguous float32 [" + std::to_string(rows) + ", " +
                std::to_string(columns) + "]");
    return tensor.as<float>();
}

cpu::Matrix matrix(const py::capsule& capsule, const char* name) {
    const TensorView tensor = memory.view(capsule, name, 2);
    require(tensor.dtype == DType::f32, std::string(name) + " must be float32");
    return {tensor.as<const float>(), tensor.shape[0], tensor.shape[1], tensor.row_stride, 1};
}
cpu::Matrix transposed(const cpu::Matrix& of) { return {of.data, of.columns, of.rows, of.column_step, of.row_step}; }

using Product = void (*)(const cpu::Matrix&, const cpu::Matrix&, float*, int64_t, bool, int);

// out (+)= a . b, each as it is multiplied; `shapes` says what they are called.
void multiply(Product product, const cpu::Matrix& a, const cpu::Matrix& b, const py::capsule& out, bool accumulate,
              int threads, const char* shapes) {
    const TensorView to = memory.view(out, "out", 2);
    require(to.dtype == DType::f32 && a.columns == b.rows && to.shape[0] == a.rows && to.shape[1] == b.columns,
            [&] { return std::string("shapes do not fit, or out is not float32: ") + shapes; });
    py::gil_scoped_release release;
    product(a, b, to.as<float>(), to.row_stride, accumulate, threads);
}

void logits_product(const py::capsule& hidden, const py::capsule& weight, const py::capsule& out, int threads) {
    multiply(cpu::product_of_few_rows, matrix(hidden, "hidden"), transposed(matrix(weight, "weight")), out, false,
             threads, "out [n, V] = hidden [n, H] . weight [V, H]^T");
}

void hidden_gradient_product(const py::capsule& dz, const py::capsule& weight, const py::capsule& out, bool accumulate,
                             int threads) {
    multiply(cpu::product_of_few_rows, matrix(dz, "dz"), matrix(weight, "weight"), out, accumulate, threads,
             "out [n, H] (+)= dz [n, V] . weight [V, H]");
}

void weight_gradient_product(const py::capsule& dz, const py::capsule& hidden, const py::capsule& out, bool accumulate,
                             int threads) {
    multiply(cpu::product_of_many_rows, transposed(matrix(dz, "dz")), matrix(hidden, "hidden"), out, accumulate,
             threads, "out [V, H] (+)= dz [n, V]^T . hidden [n, H]");
}

float* writable(const py::capsule& capsule, const char* name, int64_t rows, int64_t columns) {
    return const_cast<float*>(contiguous(memory.view(capsule, name, 2), name, rows, columns));
}

// q, k, v and out [T, heads * head_size] each.
cpu::PackedAttention packed_attention(const py::capsule& query, const py::capsule& key, const py::capsule& value,
                                      const py::capsule& cu_seqlens, int64_t head_size, float scaling,
                                      const OptionalCapsule& cos, const OptionalCapsule& sin) {
    const TensorView q = memory.view(query, "query", 2), k = memory.view(key, "key", 2),
                     c = memory.view(cu_seqlens, "cu_seqlens", 1);
    require(head_size > 0 && q.shape[1] % head_size == 0 && k.shape[1] % head_size == 0 && k.shape[1] > 0 &&
                q.shape[1] % k.shape[1] == 0,
            "query and key must have whole heads, and query a multiple of key's");
    require(c.dtype == DType::i64 && c.shape[0] > 0, "cu_seqlens must be int64 and not empty");
    cpu::PackedAttention a{};
    a.query = writable(query, "query", q.shape[0], q.shape[1]);
    a.key = writable(key, "key", q.shape[0], k.shape[1]);
    a.value = contiguous(memory.view(value, "value", 2), "value", q.shape[0], k.shape[1]);
    a.cu_seqlens = c.as<const int64_t>();
    a.sequences = c.shape[0] - 1;
    a.heads = q.shape[1] / head_size;
    a.key_value_heads = k.shape[1] / head_size;
    a.head_size = head_size;
    a.scaling = scaling;
    require(cos.has_value() == sin.has_value(), "cos and sin go together");
    if (cos) {
        require(head_size % 2 == 0, "heads that are rotated must have an even size");
        a.cos = writable(*cos, "cos", q.shape[0], head_size);
        a.sin = writable(*sin, "sin", q.shape[0], head_size);
    }
    require(a.cu_seqlens[0] == 0 && a.cu_seqlens[a.sequences] == q.shape[0],
            "cu_seqlens must begin with 0 and end with T");
    for (int64_t s = 0; s < a.sequences; ++s)
        require(a.cu_seqlens[s] <= a.cu_seqlens[s + 1], "cu_seqlens must not decrease");
    return a;
}

void attention_forward(const py::capsule& query, const py::capsule& key, const py::capsule& value,
                       const py::capsule& cu_seqlens, int64_t head_size, float scaling, const OptionalCapsule& cos,
                       const OptionalCapsule& sin, const py::capsule& out, const py::capsule& lse, int threads) {
    const cpu::PackedAttention a = packed_attention(query, key, value, cu_seqlens, head_size, scaling, cos, sin);
    const int64_t tokens = a.cu_seqlens[a.sequences];
    float *to = writable(out, "out", tokens, a.queries()), *l = writable(lse, "lse", tokens, a.heads);
    py::gil_scoped_release release;
    cpu::attention_forward(a, to, l, threads);
}

void attention_backward(const py::capsule& query, const py::capsule& key, const py::capsule& value,
                        const py::capsule& cu_seqlens, int64_t head_size, float scaling, const OptionalCapsule& cos,
                        const OptionalCapsule& sin, const py::capsule& out, const py::capsule& lse,
                        const py::capsule& grad_out, const py::capsule& grad_query, const py::capsule& grad_key,
                        const py::capsule& grad_value, int threads) {
    const cpu::PackedAttention a = packed_attention(query, key, value, cu_seqlens, head_size, scaling, cos, sin);
    const int64_t tokens = a.cu_seqlens[a.sequences];
    const cpu::AttentionGradients g{writable(out, "out", tokens, a.queries()),
                                    writable(lse, "lse", tokens, a.heads),
                                    writable(grad_out, "grad_out", tokens, a.queries()),
                                    writable(grad_query, "grad_query", tokens, a.queries()),
                                    writable(grad_key, "grad_key", tokens, a.key_values()),
                                    writable(grad_value, "grad_value", tokens, a.key_values())};
    py::gil_scoped_release release;
    cpu::attention_backward(a, g, threads);
}

cpu::Norm norm_of(const py::capsule& x, const py::capsule& weight, float eps) {
    const TensorView given = memory.view(x, "x", 2);
    const int64_t rows = given.shape[0], size = given.shape[1];
    return {contiguous(given, "x", rows, size), memory.vector(weight, "weight", DType::f32, size).as<float>(), rows,
            size, eps};
}

void norm_forward(const py::capsule& x, const py::capsule& weight, float eps, const py::capsule& out, int threads) {
    const cpu::Norm norm = norm_of(x, weight, eps);
    float* to = writable(out, "out", norm.rows, norm.size);
    py::gil_scoped_release release;
    cpu::norm_forward(norm, to, threads);
}

void norm_backward(const py::capsule& x, const py::capsule& weight, float eps, const py::capsule& dy,
                   const OptionalCapsule& add, const py::capsule& dx, const OptionalCapsule& dweight, int threads) {
    const cpu::Norm norm = norm_of(x, weight, eps);
    const float *d = writable(dy, "dy", norm.rows, norm.size),
                *more = add ? writable(*add, "add", norm.rows, norm.size) : nullptr;
    float *to = writable(dx, "dx", norm.rows, norm.size),
          *w = dweight ? memory.vector(*dweight, "dweight", DType::f32, norm.size).as<float>() : nullptr;
    py::gil_scoped_release release;
    cpu::norm_backward(norm, d, more, to, w, threads);
}

void gated_silu_forward(const py::capsule& gate, const py::capsule& up, const py::capsule& out, int threads) {
    const TensorView given = memory.view(gate, "gate", 2);
    const int64_t rows = given.shape[0], size = given.shape[1];
    const float *g = contiguous(given, "gate", rows, size), *u = writable(up, "up", rows, size);
    float* to = writable(out, "out", rows, size);
    py::gil_scoped_release release;
    cpu::gated_silu_forward(g, u, rows * size, to, threads);
}

void gated_silu_backward(const py::capsule& gate, const py::capsule& up, const py::capsule& dy,
                         const py::capsule& dgate, const py::capsule& dup, const py::capsule& out, int threads) {
    const TensorView given = memory.view(gate, "gate", 2);
    const int64_t rows = given.shape[0], size = given.shape[1];
    const float *g = contiguous(given, "gate", rows, size), *u = writable(up, "up", rows, size),
                *d = writable(dy, "dy", rows, size);
    float *dg = writable(dgate, "dgate", rows, size), *du = writable(dup, "dup", rows, size),
          *to = writable(out, "out", rows, size);
    py::gil_scoped_release release;
    cpu::gated_silu_backward(g, u, d, rows * size, dg, du, to, threads);
}

// The weights of a layer by the names they have in transformers; one that is missing or None is absent.
class LayerWeights {
  public:
    explicit LayerWeights(py::dict weights) : weights_(std::move(weights)) {}
    const float* matrix(const char* name, int64_t rows, int64_t columns) const {
        const py::object value = find(name);
        require(!value.is_none(), std::string(name) + " is missing");
        return contiguous(memory.view(value.cast<py::capsule>(), name, 2), name, rows, columns);
    }
    const float* vector(const char* name, int64_t length) const {
        const py::object value = find(name);
        return value.is_none() ? nullptr : memory.floats(value.cast<py::capsule>(), name, length);
    }

  private:
    py::object find(const char* name) const {
        return weights_.contains(name) ? py::object(weights_[name]) : py::none();
    }
    py::dict weights_;
};

std::unique_ptr<cpu::Decoder> decoder(const py::dict& outside, const std::vector<py::dict>& layers, int64_t vocabulary,
                                      int64_t hidden_size, int64_t intermediate_size, int64_t heads,
                                      int64_t key_value_heads, int64_t head_size, float norm_eps, float scaling,
                                      bool norms_over_all_heads) {
    const int64_t queries = heads * head_size, key_values = key_value_heads * head_size;
    const LayerWeights model(outside);
    cpu::DecoderModel m{};
    m.embedding = model.matrix("embed_tokens", vocabulary, hidden_size);
    m.final_norm = model.vector("norm", hidden_size);
    m.vocabulary = vocabulary;
    m.hidden_size = hidden_size;
    m.intermediate_size = intermediate_size;
    m.heads = heads;
    m.key_value_heads = key_value_heads;
    m.head_size = head_size;
    m.norm_eps = norm_eps;
    m.scaling = scaling;
    m.norms_over_all_heads = norms_over_all_heads;
    for (const py::dict& weights : layers) {
        const LayerWeights w(weights);
        cpu::DecoderLayer layer{};
        layer.before_attention = w.vector("before_attention", hidden_size);
        layer.after_attention = w.vector("after_attention", hidden_size);
        layer.before_mlp = w.vector("before_mlp", hidden_size);
        layer.after_mlp = w.vector("after_mlp", hidden_size);
        layer.q = w.matrix("q_proj", queries, hidden_size);
        layer.k = w.matrix("k_proj", key_values, hidden_size);
        layer.v = w.matrix("v_proj", key_values, hidden_size);
        layer.o = w.matrix("o_proj", hidden_size, queries);
        layer.gate = w.matrix("gate_proj", intermediate_size, hidden_size);
        layer.up = w.matrix("up_proj", intermediate_size, hidden_size);
        layer.down = w.matrix("down_proj", hidden_size, intermediate_size);
        layer.q_bias = w.vector("q_bias", queries);
        layer.k_bias = w.vector("k_bias", key_values);
        layer.v_bias = w.vector("v_bias", key_values);
        layer.o_bias = w.vector("o_bias", hidden_size);
        layer.q_norm = w.vector("q_norm", norms_over_all_heads ? queries : head_size);
        layer.k_norm = w.vector("k_norm", norms_over_all_heads ? key_values : head_size);
        m.layers.push_back(layer);
    }
    return std::make_unique<cpu::Decoder>(m);
}

void decoder_prefill(cpu::Decoder& self, const py::capsule& tokens, const py::capsule& lengths, int64_t room,
                     int64_t capacity, const py::capsule& cos, const py::capsule& sin, const py::capsule& hidden,
                     int threads) {
    const TensorView t = memory.view(tokens, "tokens", 1), l = memory.view(lengths, "lengths", 1);
    const TensorView c = memory.view(cos, "cos", 2), s = memory.view(sin, "sin", 2);
    require(t.dtype == DType::i64 && l.dtype == DType::i64, "tokens and lengths must be int64");
    const auto *ids = t.as<const int64_t>(), *counts = l.as<const int64_t>();
    const int64_t batch = l.shape[0], positions = c.shape[0], size = self.model().head_size;
    require(std::accumulate(counts, counts + batch, int64_t(0)) == t.shape[0],
            "lengths must add up to the number of tokens");
    const float *from_cos = contiguous(c, "cos", positions, size), *from_sin = contiguous(s, "sin", positions, size);
    float* h = writable(hidden, "hidden", batch, self.model().hidden_size);
    py::gil_scoped_release release;
    self.prefill(ids, counts, batch, room, capacity, from_cos, from_sin, positions, h, threads);
}

void decoder_step(cpu::Decoder& self, const py::capsule& tokens, const py::capsule& positions,
                  const py::capsule& hidden, int threads) {
    const auto* t = memory.vector(tokens, "tokens", DType::i64, self.batch()).as<const int64_t>();
    const auto* p = memory.vector(positions, "positions", DType::i64, self.batch()).as<const int64_t>();
    float* h = writable(hidden, "hidden", self.batch(), self.model().hidden_size);
    py::gil_scoped_release release;
    self.step(t, p, h, threads);
}

// Lets Python handle what was signalled (Ctrl-C), some times a second; called without the GIL.
class LookForSignals {
  public:
    void operator()() {
        const auto now = std::chrono::steady_clock::now();
        if (now - last_ < std::chrono::milliseconds(200)) return;
        last_ = now;
        py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }

  private:
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

int64_t decoder_draw(cpu::Decoder& self, const py::capsule& hidden, const py::capsule& weight,
                     const OptionalCapsule& bias, float temperature, float softcap, float logit_scale, uint64_t seed,
                     const py::capsule& sequence_ids, const py::capsule& positions, int64_t top_k, double top_p,
                     double min_p, const py::capsule& places, const std::vector<int64_t>& stops,
                     const py::capsule& going, const py::capsule& logits, const py::capsule& tokens,
                     const py::capsule& logprobs, const py::capsule& entropy, int threads) {
    const int64_t n = self.batch(), size = self.model().hidden_size;
    float* h = writable(hidden, "hidden", n, size);
    const TensorView w = memory.view(weight, "weight", 2), z = memory.view(logits, "logits", 2),
                     t = memory.view(tokens, "tokens", 2);
    require(w.dtype == DType::f32 && w.shape[1] == size, "weight must be a float32 [V, H]");
    const int64_t steps = t.shape[0], vocabulary = w.shape[0];
    contiguous(z, "logits", z.shape[0], vocabulary);
    require(z.shape[0] > 0 && steps > 0, "logits and tokens must have a row");
    require(t.dtype == DType::i64 && t.shape[1] == n && t.row_stride == n,
            "tokens must be a contiguous int64 [steps, B]");
    const auto whole = [&](const py::capsule& c, const char* name) { return writable(c, name, steps, n); };
    const cpu::Drawing drawing{{h, w.data, DType::f32, DType::f32, n, size, vocabulary, size, w.row_stride,
                                memory.floats(bias, "bias", vocabulary)},
                               Scaling{logit_scale, softcap},
                               temperature,
                               {seed, memory.integers(sequence_ids, "sequence_ids", n),
                                memory.integers(positions, "positions", n), top_k, top_p, min_p},
                               memory.integers(places, "places", n),
                               stops,
                               memory.integers(going, "going", n),
                               z.as<float>(),
                               z.shape[0]};
    const cpu::Drawn drawn{t.as<int64_t>(), whole(logprobs, "logprobs"), whole(entropy, "entropy")};
    py::gil_scoped_release release;
    return cpu::draw(self, drawing, h, steps, drawn, threads, LookForSignals());
}

void decoder_select(cpu::Decoder& self, const py::capsule& which) {
    const TensorView w = memory.view(which, "which", 1);
    require(w.dtype == DType::i64, "which must be int64");
    py::gil_scoped_release release;
    self.select(w.as<const int64_t>(), w.shape[0]);
}

py::tuple philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    const PhiloxWords w = philox4x32_10(c0, c1, c2, c3, {uint32_t(key), uint32_t(key >> 32)});
    return py::make_tuple(w.word[0], w.word[1], w.word[2], w.word[3]);
}

float gumbel_from_word_of(uint32_t word) { return gumbel_from_word(word); }

// The numbers that `kind` and `kl` of policy_rows are, as Python's IntEnum.
void add_enumerations(py::module_& m) {
    py::native_enum<ObjectiveKind>(m, "ObjectiveKind", "enum.IntEnum")
        .value("given", ObjectiveKind::given)
        .value("reinforce", ObjectiveKind::reinforce)
        .value("importance", ObjectiveKind::importance)
        .value("ppo", ObjectiveKind::ppo)
        .value("cispo", ObjectiveKind::cispo)
        .value("importance_mask", ObjectiveKind::importance_mask)
        .finalize();
    py::native_enum<KlKind>(m, "KLKind", "enum.IntEnum")
        .value("none", KlKind::none)
        .value("k1", KlKind::k1)
        .value("k2", KlKind::k2)
        .value("k3", KlKind::k3)
        .finalize();
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    using py::arg;
    m.doc() = "Native kernels of bandit_rft: DLPack capsules in, results written to the tensors given.";
    m.attr("version") = BRFT_VERSION;
    add_enumerations(m);
    m.def("instruction_set", &cpu::instruction_set);
    m.def("use_openmp", &cpu::use_openmp, arg("library"));
    m.def("use_instruction_set", &cpu::use_instruction_set, arg("name"));
    m.def("logprob_rows", &logprob_rows, arg("logits"), arg("targets"), arg("temperature"), arg("temperatures"),
          arg("softcap"), arg("logit_scale"), arg("logprobs"), arg("entropy"), arg("threads"));
    py::class_<cpu::TiledLogprobs>(m, "TiledLogprobs")
        .def(py::init([](int64_t rows) {
                 require(rows >= 0, [&] { return "rows must be 0 or more; got " + std::to_string(rows); });
                 return std::make_unique<cpu::TiledLogprobs>(rows);
             }),
             arg("rows"))
        .def("add", &add_tile, arg("logits"), arg("targets"), arg("first"), arg("temperature"), arg("temperatures"),
             arg("softcap"), arg("logit_scale"), arg("threads"))
        .def("finish", &finish_tiles, arg("logprobs"), arg("entropy"));
    m.def("gradient_rows", &gradient_rows, arg("logits"), arg("targets"), arg("temperature"), arg("temperatures"),
          arg("softcap"), arg("logit_scale"), arg("grad_logprobs"), arg("grad_entropy"), arg("logprobs"),
          arg("entropy"), arg("threads"));
    m.def("policy_rows", &policy_rows, arg("logits"), arg("targets"), arg("temperature"), arg("temperatures"),
          arg("softcap"), arg("logit_scale"), arg("kind"), arg("ratio_low"), arg("ratio_high"), arg("dual_clip"),
          arg("kl"), arg("kl_coef"), arg("entropy_coef"), arg("advantages"), arg("weights"), arg("behavior"),
          arg("reference"), arg("logprobs"), arg("entropy"), arg("threads"));
    m.def("sample_rows", &sample_rows, arg("logits"), arg("temperature"), arg("temperatures"), arg("softcap"),
          arg("logit_scale"), arg("seed"), arg("sequence_ids"), arg("positions"), arg("top_k"), arg("top_p"),
          arg("min_p"), arg("tokens"), arg("logprobs"), arg("sampling_logprobs"), arg("entropy"), arg("kept_mass"),
          arg("threads"));
    m.def("head_logits", &head_logits, arg("hidden"), arg("weight"), arg("bias"), arg("out"), arg("threads"));
    m.def("products_pay", &cpu::products_pay);
    m.def("logits_product", &logits_product, arg("hidden"), arg("weight"), arg("out"), arg("threads"));
    m.def("hidden_gradient_product", &hidden_gradient_product, arg("dz"), arg("weight"), arg("out"), arg("accumulate"),
          arg("threads"));
    m.def("weight_gradient_product", &weight_gradient_product, arg("dz"), arg("hidden"), arg("out"), arg("accumulate"),
          arg("threads"));
    m.def("attention_forward", &attention_forward, arg("query"), arg("key"), arg("value"), arg("cu_seqlens"),
          arg("head_size"), arg("scaling"), arg("cos"), arg("sin"), arg("out"), arg("lse"), arg("threads"));
    m.def("attention_backward", &attention_backward, arg("query"), arg("key"), arg("value"), arg("cu_seqlens"),
          arg("head_size"), arg("scaling"), arg("cos"), arg("sin"), arg("out"), arg("lse"), arg("grad_out"),
          arg("grad_query"), arg("grad_key"), arg("grad_value"), arg("threads"));
    m.def("norm_forward", &norm_forward, arg("x"), arg("weight"), arg("eps"), arg("out"), arg("threads"));
    m.def("norm_backward", &norm_backward, arg("x"), arg("weight"), arg("eps"), arg("dy"), arg("add"), arg("dx"),
          arg("dweight"), arg("threads"));
    m.def("gated_silu_forward", &gated_silu_forward, arg("gate"), arg("up"), arg("out"), arg("threads"));
    m.def("gated_silu_backward", &gated_silu_backward, arg("gate"), arg("up"), arg("dy"), arg("dgate"), arg("dup"),
          arg("out"), arg("threads"));
    py::class_<cpu::Decoder>(m, "Decoder")
        .def(py::init(&decoder), arg("outside"), arg("layers"), arg("vocabulary"), arg("hidden_size"),
             arg("intermediate_size"), arg("heads"), arg("key_value_heads"), arg("head_size"), arg("norm_eps"),
             arg("scaling"), arg("norms_over_all_heads"))
        .def("prefill", &decoder_prefill, arg("tokens"), arg("lengths"), arg("room"), arg("capacity"), arg("cos"),
             arg("sin"), arg("hidden"), arg("threads"))
        .def("step", &decoder_step, arg("tokens"), arg("positions"), arg("hidden"), arg("threads"))
        .def("draw", &decoder_draw, arg("hidden"), arg("weight"), arg("bias"), arg("temperature"), arg("softcap"),
             arg("logit_scale"), arg("seed"), arg("sequence_ids"), arg("positions"), arg("top_k"), arg("top_p"),
             arg("min_p"), arg("places"), arg("stops"), arg("going"), arg("logits"), arg("tokens"), arg("logprobs"),
             arg("entropy"), arg("threads"))
        .def("select", &decoder_select, arg("which"))
        .def("computed", &cpu::Decoder::computed, arg("sequences"));
#if defined(BRFT_CUDA)
    cuda::add_exports(m.def_submodule("cuda"));
#endif
    m.def("philox", &philox, arg("c0"), arg("c1"), arg("c2"), arg("c3"), arg("key"));
    m.def("gumbel", &gumbel_from_word_of, arg("word"));
}
