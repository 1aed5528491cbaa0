#include "operations.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "filter.h"
#include "kernels.h"
#include "lines.h"
#include "threads.h"

namespace bandit_rft::cpu {
namespace {

const Kernels* best_kernels() {
#if defined(BRFT_X86_DISPATCH)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
        return &kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kernels_avx2;
#endif
    return &kernels_baseline;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> kernels{best_kernels()};
    return kernels;
}

Row row_of(const Rows& rows, int64_t i) {
    return {rows.row(i), rows.dtype, rows.vocabulary, rows.scaling, rows.temperature_of(i)};
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

std::string instruction_set() { return kernels().name; }

void use_instruction_set(const std::string& name) {
    std::vector<const Kernels*> usable{&kernels_baseline};
#if defined(BRFT_X86_DISPATCH)
    if (best_kernels() != &kernels_baseline) usable.push_back(&kernels_avx2);
    if (best_kernels() == &kernels_avx512) usable.push_back(&kernels_avx512);
#endif
    for (const Kernels* candidate : usable)
        if (name == candidate->name) return chosen().store(candidate);
    throw std::invalid_argument("instruction set '" + name + "' is not one that this build and this processor have");
}

void logprob_rows(const Rows& rows, const int64_t* targets, float* logprobs, float* entropy, int threads) {
    const Kernels& k = kernels();
    parallel(rows.count, 1, rows.count * rows.vocabulary, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Row row = row_of(rows, i);
            const auto state = k.row_state(row);
            logprobs[i] = row_logprob(state, k.row_logit(row, targets[i]));
            entropy[i] = row_entropy(state);
        }
    });
}

TiledLogprobs::TiledLogprobs(int64_t rows) : states_(size_t(rows)), of_targets_(size_t(rows), NAN) {}

void TiledLogprobs::add(const Rows& tile, const int64_t* targets, int64_t first, int threads) {
    const Kernels& k = kernels();
    parallel(tile.count, 1, tile.count * tile.vocabulary, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Row row = row_of(tile, i);
            states_[size_t(i)] = merge(states_[size_t(i)], k.row_state(row));
            if (targets[i] >= first && targets[i] - first < tile.vocabulary)
                of_targets_[size_t(i)] = k.row_logit(row, targets[i] - first);
        }
    });
}

void TiledLogprobs::finish(float* logprobs, float* entropy) const {
    for (size_t i = 0; i < states_.size(); ++i) {
        logprobs[i] = row_logprob(states_[i], of_targets_[i]);
        entropy[i] = row_entropy(states_[i]);
    }
}

void policy_rows(const Rows& rows, const int64_t* targets, const PolicyInputs& in, float* logprobs, float* entropy,
                 int threads) {
    const Kernels& k = kernels();
    const bool given = in.objective.kind == ObjectiveKind::given;
    const bool no_entropy_term = given ? !in.given_entropy : in.objective.entropy_coef == 0.0f;
    const bool in_place = no_entropy_term && rows.dtype == DType::f32 && rows.scaling.softcap == 0.0f;
    parallel(rows.count, 1, rows.count * rows.vocabulary, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> block_max(in_place ? size_t(rows.vocabulary / kBlock + 1) : 0);
        for (int64_t i = begin; i < end; ++i) {
            const Row row = row_of(rows, i);
            const float z_target = k.row_logit(row, targets[i]);
            float* exponentials = reinterpret_cast<float*>(rows.row(i));
            const auto state = in_place ? k.row_exponentials(row, exponentials, block_max.data()) : k.row_state(row);
            const float logp = row_logprob(state, z_target);
            logprobs[i] = logp;
            entropy[i] = row_entropy(state);
            float c, e;  // dL/dlogp, and -dL/dentropy
            if (given) {
                c = in.given_logprob[i];
                e = in.given_entropy ? -in.given_entropy[i] : 0.0f;
            } else {
                const float ratio = in.behavior ? std::exp(logp - in.behavior[i]) : 1.0f;
                c = token_coefficient(in.objective, logp, ratio, in.advantages[i], in.weights[i],
                                      in.reference ? in.reference[i] : 0.0f);
                e = in.objective.entropy_coef * in.weights[i];
            }
            if (in_place) {
                const float chain = row.scaling.logit_scale / row.temperature;
                k.scale_exponentials(exponentials, rows.vocabulary, block_max.data(), targets[i], logp, state,
                                     c * chain);
            } else {
                k.row_gradient(row, rows.row(i), targets[i], state, c, e);
            }
        }
    });
}

void sample_rows(const Rows& rows, const SampleInputs& in, const SampleOutputs& out, int threads) {
    const Kernels& k = kernels();
    const bool filtered = in.top_k > 0 || in.top_p < 1.0 || in.min_p > 0.0;
    const PhiloxKey key{uint32_t(in.seed), uint32_t(in.seed >> 32)};
    parallel(rows.count, 1, rows.count * rows.vocabulary, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> kept(filtered ? size_t(rows.vocabulary) : 0);
        std::vector<RankedToken> scratch;
        for (int64_t i = begin; i < end; ++i) {
            const Row row = row_of(rows, i);
            const uint64_t sequence = uint64_t(in.sequence_ids[i]);
            const Stream stream{key, uint32_t(in.positions[i]), uint32_t(sequence), uint32_t(sequence >> 32)};
            Draw draw;
            SoftmaxState<double> state, kept_state;
            if (filtered) {
                state = k.row_state(row);
                k.row_scaled(row, kept.data());
                filter_row(kept.data(), rows.vocabulary, state.m, in.top_k, in.top_p, in.min_p, scratch);
                kept_state = k.row_draw({kept.data(), DType::f32, rows.vocabulary, Scaling{}, 1.0f}, stream, draw);
            } else {
                state = kept_state = k.row_draw(row, stream, draw);
            }
            if (draw.token < 0) draw.token = 0;  // no finite logit: the log-probability below is NaN and says so
            const float z = k.row_logit(row, draw.token);
            out.tokens[i] = draw.token;
            out.logprobs[i] = row_logprob(state, z);
            out.sampling_logprobs[i] = row_logprob(kept_state, z);
            out.entropy[i] = row_entropy(state);
            out.kept_mass[i] =
                filtered ? float(std::exp(double(kept_state.m) - state.m) * kept_state.s / state.s) : 1.0f;
        }
    });
}

void head_logits(const Head& head, float* out, int threads) {
    if (head.batch == 0) return;
    const Kernels& k = kernels();
    const int64_t panels = (head.batch + k.head_panel - 1) / k.head_panel;
    const int64_t width = head.batch <= k.decoder->few ? head.batch : panels * k.head_panel;
    const Lines packed = lines(size_t(width * head.hidden_size));
    k.pack_hidden(head.hidden, head.hidden_dtype, head.hidden_stride, head.batch, head.hidden_size, packed.get());
    const int64_t work = panels * k.head_panel * head.hidden_size / 16 * head.vocabulary;
    const int rows = k.rows_at_once(head.batch);
    parallel(head.vocabulary, rows, work, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(head.weight_dtype == DType::f32 ? 0 : size_t(rows * head.hidden_size));
        k.head_logits(packed.get(), head.batch, head.hidden_size, head.weight, head.weight_dtype, head.weight_stride,
                      head.bias, begin, end, out, head.vocabulary, scratch.data());
    });
}

}  // namespace bandit_rft::cpu
