// The CPU core on its own, for the sanitizers: operations on exactly sized heap buffers against plain loops in double.
// core_test.cpp runs them over chosen shapes, core_fuzz.cpp over random ones.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "../../csrc/cpu/attention.h"
#include "../../csrc/cpu/decoder.h"
#include "../../csrc/cpu/drawing.h"
#include "../../csrc/cpu/filter.h"
#include "../../csrc/cpu/operations.h"
#include "../../csrc/philox.h"

using namespace bandit_rft;
using namespace bandit_rft::cpu;

namespace {

int checks = 0;
long long current_example = -1;  // of core_fuzz.cpp

bool is_near(double x, double exact) { return std::fabs(x - exact) < 1e-4 * (1 + std::fabs(exact)); }

void check(bool condition, const char* what, int64_t rows, int64_t vocabulary) {
    ++checks;
    if (condition) return;
    std::printf("FAILED: %s (rows %lld, vocabulary %lld, %s)\n", what, (long long)rows, (long long)vocabulary,
                instruction_set().c_str());
    if (current_example >= 0) std::printf("core_fuzz 0 %lld runs this example alone\n", current_example);
    std::exit(1);
}

uint16_t narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

float wide(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

void rows_case(int64_t n, int64_t v, DType dtype, bool transformed, std::mt19937& random) {
    std::normal_distribution<float> normal(0, 3);
    std::vector<float> z(size_t(n * v));
    std::vector<uint16_t> z16(size_t(n * v));
    for (size_t i = 0; i < z.size(); ++i) {
        z[i] = normal(random);
        if (dtype == DType::bf16) z[i] = wide(z16[i] = narrow(z[i]));
    }
    const std::vector<float> raw = z;
    std::vector<float> temperatures(size_t(n), 0.7f), logp(n), entropy(n), advantages(n), weights(n, 0.5f), behavior(n),
        ref(n);
    std::vector<int64_t> targets(n), ids(n), positions(n), tokens(n);
    for (int64_t i = 0; i < n; ++i) {
        targets[i] = int64_t(random() % uint64_t(v));
        advantages[i] = normal(random);
        ids[i] = int64_t(random()) << 20;
        positions[i] = i;
        behavior[i] = ref[i] = -std::log(float(v)) + normal(random) * 0.1f;
    }
    Rows rows{dtype == DType::f32 ? static_cast<void*>(z.data()) : z16.data(),
              dtype,
              n,
              v,
              v,
              transformed ? Scaling{1.5f, 4.0f} : Scaling{},
              1.0f,
              transformed ? temperatures.data() : nullptr};
    const auto scaled = [&](int64_t i, int64_t j) {
        const double x = raw[size_t(i * v + j)];
        return transformed ? 4.0 * std::tanh(1.5 * x / 4.0) / 0.7 : x;
    };
    logprob_rows(rows, targets.data(), logp.data(), entropy.data(), 3);
    std::vector<double> lse(n);
    for (int64_t i = 0; i < n; ++i) {
        double m = -INFINITY, s = 0, t = 0;
        for (int64_t j = 0; j < v; ++j) m = std::fmax(m, scaled(i, j));
        for (int64_t j = 0; j < v; ++j)
            s += std::exp(scaled(i, j) - m), t += std::exp(scaled(i, j) - m) * (scaled(i, j) - m);
        lse[i] = m + std::log(s);
        check(std::fabs(logp[i] - (scaled(i, targets[i]) - lse[i])) < 1e-4, "log-probability", n, v);
        check(std::fabs(entropy[i] - (std::log(s) - t / s)) < 1e-4, "entropy", n, v);
    }
    TiledLogprobs tiles(n);
    std::vector<float> tiled_logp(n), tiled_entropy(n);
    for (int64_t first = 0; first < v; first += 100) {
        Rows tile = rows;
        tile.logits = rows.row(0) + first * (rows.dtype == DType::f32 ? 4 : 2);
        tile.vocabulary = std::min<int64_t>(100, v - first);
        tiles.add(tile, targets.data(), first, 3);
    }
    tiles.finish(tiled_logp.data(), tiled_entropy.data());
    for (int64_t i = 0; i < n; ++i) {
        check(std::fabs(tiled_logp[i] - logp[i]) < 1e-4, "log-probability, tile by tile", n, v);
        check(std::fabs(tiled_entropy[i] - entropy[i]) < 1e-4, "entropy, tile by tile", n, v);
    }
    std::vector<float> l(n), h(n), s(n), kept(n);
    for (const auto& filter : {SampleInputs{7, ids.data(), positions.data(), 0, 1.0, 0.0},
                               SampleInputs{7, ids.data(), positions.data(), 5, 0.9, 0.01}}) {
        sample_rows(rows, filter, {tokens.data(), l.data(), s.data(), h.data(), kept.data()}, 3);
        for (int64_t i = 0; i < n; ++i) {
            check(tokens[i] >= 0 && tokens[i] < v, "token range", n, v);
            check(std::fabs(l[i] - (scaled(i, tokens[i]) - lse[i])) < 1e-4, "sampled log-probability", n, v);
            check(std::fabs(s[i] - (l[i] - std::log(kept[i]))) < 1e-3, "kept mass", n, v);
            if (filter.top_k) continue;
            double best = -INFINITY, second = -INFINITY;
            int64_t winner = 0;
            for (int64_t j = 0; j < v; ++j) {
                const auto words = philox4x32_10(uint32_t(j / 4), uint32_t(positions[i]), uint32_t(ids[i]),
                                                 uint32_t(uint64_t(ids[i]) >> 32), {7, 0});
                const double x = scaled(i, j) + gumbel_from_word(words.word[j % 4]);
                if (x > best)
                    second = best, best = x, winner = j;
                else if (x > second)
                    second = x;
            }
            check(best - second < 1e-3 || tokens[i] == winner, "the draw is the argmax", n, v);
        }
    }
    PolicyInputs in{};
    in.objective = {ObjectiveKind::ppo, 0.8f, 1.2f, 3.0f, KlKind::k3, 0.1f, 0.01f};
    in.advantages = advantages.data(), in.weights = weights.data(), in.behavior = behavior.data(),
    in.reference = ref.data();
    policy_rows(rows, targets.data(), in, logp.data(), entropy.data(), 3);
    for (int64_t i = 0; i < n; ++i) {  // a softmax's gradient sums to zero where nothing follows the softmax
        double sum = 0, size = 0;
        for (int64_t j = 0; j < v; ++j) {
            const double dz = dtype == DType::f32 ? z[size_t(i * v + j)] : wide(z16[size_t(i * v + j)]);
            sum += dz, size += std::fabs(dz);
        }
        check(std::isfinite(sum), "gradient is finite", n, v);
        const double tolerance = (dtype == DType::f32 ? 1e-4 : 1e-2) * (size + 1e-2);
        if (!transformed) check(std::fabs(sum) <= tolerance, "gradient sums to zero", n, v);
    }
}

// A row of ties, infinities, NaN and magnitudes far apart, against the full sort that filter_row does without.
void filter_case(int64_t v, int mix, int64_t top_k, double top_p, double min_p, std::mt19937& random) {
    const float odd[] = {0.0f, -INFINITY, -1e9f, NAN, 1.5f, -3e38f, 3e38f, INFINITY};
    std::normal_distribution<float> normal(0, 2);
    std::vector<float> z(static_cast<size_t>(v));
    for (float& x : z) x = random() % 2 ? normal(random) : odd[random() % uint32_t(mix)];
    float m = -INFINITY;
    for (float x : z) m = std::fmax(m, x);
    std::vector<int64_t> order;
    for (int64_t j = 0; j < v; ++j)
        if (z[size_t(j)] > -INFINITY) order.push_back(j);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return z[size_t(a)] > z[size_t(b)]; });
    const auto relative = [&](int64_t id) { return std::exp(double(z[size_t(id)] - m)); };
    if (top_k > 0 && top_k < int64_t(order.size())) order.resize(size_t(top_k));
    double mass = 0, reached = 0, margin = INFINITY;
    for (int64_t id : order) mass += relative(id);
    size_t prefix = 0;
    for (; prefix < order.size() && (top_p == 1.0 || reached < top_p * mass); ++prefix) {
        reached += relative(order[prefix]);
        margin = std::fmin(margin, std::fabs(reached - top_p * mass));
    }
    order.resize(prefix);
    std::vector<float> want(z);
    if (std::isfinite(m)) {
        for (float& x : want) x = std::isnan(x) ? x : -INFINITY;
        for (int64_t id : order)
            if (relative(id) >= min_p) want[size_t(id)] = z[size_t(id)];
    }
    std::vector<RankedToken> scratch;
    filter_row(z.data(), v, m, top_k, top_p, min_p, scratch);
    bool same = top_p < 1.0 && margin < 1e-12 * mass;  // within rounding of top_p one token more or less is right
    if (!same) same = std::memcmp(z.data(), want.data(), z.size() * sizeof(float)) == 0;
    check(same, "filters", 1, v);
}

void head_case(int64_t b, int64_t hidden_size, int64_t v, DType dtype, std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<float> h(size_t(b * hidden_size)), w(size_t(v * hidden_size)), bias(static_cast<size_t>(v)),
        out(size_t(b * v)), alone(static_cast<size_t>(v));
    std::vector<uint16_t> h16(h.size()), w16(w.size());
    for (size_t i = 0; i < h.size(); ++i) h[i] = wide(h16[i] = narrow(normal(random)));
    for (size_t i = 0; i < w.size(); ++i) w[i] = wide(w16[i] = narrow(normal(random)));
    for (auto& x : bias) x = normal(random);
    const bool f32 = dtype == DType::f32;
    const void *hidden = f32 ? static_cast<void*>(h.data()) : h16.data(),
               *weight = f32 ? static_cast<void*>(w.data()) : w16.data();
    head_logits({hidden, weight, dtype, dtype, b, hidden_size, v, hidden_size, hidden_size, bias.data()}, out.data(),
                3);
    for (int64_t i = 0; i < b; ++i)
        for (int64_t j = 0; j < v; ++j) {
            double sum = bias[size_t(j)];
            for (int64_t k = 0; k < hidden_size; ++k)
                sum += double(h[size_t(i * hidden_size + k)]) * w[size_t(j * hidden_size + k)];
            check(std::fabs(out[size_t(i * v + j)] - sum) < 1e-4 * (1 + std::sqrt(double(hidden_size))), "head logits",
                  b, v);
        }
    if (b == 0) return;
    const int64_t last = b - 1, bytes = f32 ? 4 : 2;
    head_logits({static_cast<const char*>(hidden) + last * hidden_size * bytes, weight, dtype, dtype, 1, hidden_size, v,
                 hidden_size, hidden_size, bias.data()},
                alone.data(), 1);
    check(std::memcmp(alone.data(), out.data() + last * v, size_t(v) * 4) == 0, "a row is the same bits alone", b, v);
}

// Attention against plain loops in double, forward and backward.
void attention_case(std::vector<int64_t> lengths, int64_t group, int64_t key_value_heads, int64_t size,
                    std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<int64_t> begins{0};
    for (int64_t length : lengths) begins.push_back(begins.back() + length);
    const int64_t tokens = begins.back(), heads = group * key_value_heads, queries = heads * size,
                  kv = key_value_heads * size;
    const auto filled = [&](int64_t n) {
        std::vector<float> x(static_cast<size_t>(n));
        for (float& value : x) value = normal(random);
        return x;
    };
    std::vector<float> q = filled(tokens * queries), k = filled(tokens * kv);
    const std::vector<float> v = filled(tokens * kv), g = filled(tokens * queries), given_q = q, given_k = k;
    const bool rotated = size % 2 == 0;
    const std::vector<float> cos = filled(tokens * size), sin = filled(tokens * size);
    std::vector<float> out(q.size()), lse(size_t(tokens * heads)), dq(q.size()), dk(k.size()), dv(k.size());
    const float scaling = 0.4f;
    const PackedAttention a{q.data(),
                            k.data(),
                            v.data(),
                            begins.data(),
                            int64_t(lengths.size()),
                            heads,
                            key_value_heads,
                            size,
                            scaling,
                            rotated ? cos.data() : nullptr,
                            rotated ? sin.data() : nullptr};
    attention_forward(a, out.data(), lse.data(), 3);
    for (const auto& [got, given] : {std::pair{&q, &given_q}, std::pair{&k, &given_k}})
        for (size_t i = 0; i < got->size(); ++i) {
            const int64_t width = int64_t(got->size()) / std::max<int64_t>(tokens, 1), d = int64_t(i) % size;
            const size_t at = size_t(int64_t(i) / width * size + d), half = size_t(size / 2);
            const double other = !rotated ? 0 : d < size / 2 ? -(*given)[i + half] : (*given)[i - half];
            const double want = rotated ? double((*given)[i]) * cos[at] + other * sin[at] : (*given)[i];
            check(is_near((*got)[i], want), "attention: rotation", tokens, size);
        }
    attention_backward(a, {out.data(), lse.data(), g.data(), dq.data(), dk.data(), dv.data()}, 3);
    std::vector<double> exact_dq(q.size()), exact_dk(k.size()), exact_dv(k.size());
    const auto dot = [&](const float* x, const float* y) {
        double sum = 0;
        for (int64_t d = 0; d < size; ++d) sum += double(x[d]) * y[d];
        return sum;
    };
    for (size_t s = 0; s < lengths.size(); ++s)
        for (int64_t i = begins[s]; i < begins[s + 1]; ++i)
            for (int64_t h = 0; h < heads; ++h) {
                const size_t at = size_t(i * queries + h * size);
                std::vector<double> p, dp;
                double total = 0, mean = 0;
                for (int64_t j = begins[s]; j <= i; ++j) {
                    const size_t key = size_t(j * kv + h / group * size);
                    p.push_back(std::exp(scaling * dot(&q[at], &k[key])));
                    dp.push_back(dot(&g[at], &v[key]));
                    total += p.back();
                }
                for (size_t j = 0; j < p.size(); ++j) mean += (p[j] /= total) * dp[j];
                check(std::fabs(lse[size_t(i * heads + h)] - std::log(total)) < 1e-4, "attention: lse", tokens, size);
                for (int64_t d = 0; d < size; ++d) {
                    double o = 0;
                    for (size_t j = 0; j < p.size(); ++j) {
                        const size_t key = size_t((begins[s] + int64_t(j)) * kv + h / group * size + d);
                        const double ds = scaling * p[j] * (dp[j] - mean);
                        o += p[j] * v[key];
                        exact_dq[at + size_t(d)] += ds * k[key];
                        exact_dk[key] += ds * q[at + size_t(d)];
                        exact_dv[key] += p[j] * g[at + size_t(d)];
                    }
                    check(std::fabs(out[at + size_t(d)] - o) < 1e-4, "attention: out", tokens, size);
                }
            }
    for (auto* of : {&exact_dq, &exact_dk})  // back to before the rotation
        for (size_t i = 0; rotated && i < of->size(); ++i) {
            const int64_t width = int64_t(of->size()) / tokens, d = int64_t(i) % size, half = size / 2;
            if (d >= half) continue;
            const size_t at = size_t(int64_t(i) / width * size + d), high = size_t(half);
            const double low_grad = (*of)[i], high_grad = (*of)[i + high];
            (*of)[i] = low_grad * cos[at] + high_grad * sin[at + high];
            (*of)[i + high] = high_grad * cos[at + high] - low_grad * sin[at];
        }
    for (size_t i = 0; i < q.size(); ++i) check(std::fabs(dq[i] - exact_dq[i]) < 1e-3, "attention: dq", tokens, size);
    for (size_t i = 0; i < k.size(); ++i) {
        check(std::fabs(dk[i] - exact_dk[i]) < 1e-3, "attention: dk", tokens, size);
        check(std::fabs(dv[i] - exact_dv[i]) < 1e-3, "attention: dv", tokens, size);
    }
}

// A decoder's step: a sequence has the same bits alone as in a batch, after others have left it, on any number of
// threads.
void decoder_case(int64_t head_size, int64_t group, bool bias, bool after, bool over_all_heads, std::mt19937& random,
                  int64_t hidden_size = 13, int64_t intermediate = 29) {
    const int64_t vocabulary = 7, key_value_heads = 3, heads = key_value_heads * group, queries = heads * head_size;
    const int64_t key_values = key_value_heads * head_size, positions = 304, batch = 37;
    std::normal_distribution<float> normal(0, 0.4f);
    std::vector<std::vector<float>> kept;
    kept.reserve(100);
    const auto weights = [&](int64_t size) {
        kept.emplace_back(static_cast<size_t>(size));
        for (float& x : kept.back()) x = normal(random);
        return static_cast<const float*>(kept.back().data());
    };
    DecoderModel model{};
    model.embedding = weights(vocabulary * hidden_size);
    model.final_norm = weights(hidden_size);
    model.vocabulary = vocabulary;
    model.hidden_size = hidden_size;
    model.intermediate_size = intermediate;
    model.heads = heads;
    model.key_value_heads = key_value_heads;
    model.head_size = head_size;
    model.norm_eps = 1e-6f;
    model.scaling = 0.3f;
    model.norms_over_all_heads = over_all_heads;
    for (int l = 0; l < 2; ++l) {
        DecoderLayer layer{};
        (after ? layer.after_attention : layer.before_attention) = weights(hidden_size);
        (after ? layer.after_mlp : layer.before_mlp) = weights(hidden_size);
        layer.q = weights(queries * hidden_size);
        layer.k = weights(key_values * hidden_size);
        layer.v = weights(key_values * hidden_size);
        layer.o = weights(hidden_size * queries);
        layer.gate = weights(intermediate * hidden_size);
        layer.up = weights(intermediate * hidden_size);
        layer.down = weights(hidden_size * intermediate);
        if (bias) {
            layer.q_bias = weights(queries);
            layer.k_bias = weights(key_values);
            layer.v_bias = weights(key_values);
            layer.o_bias = weights(hidden_size);
        } else {
            layer.q_norm = weights(over_all_heads ? queries : head_size);
            layer.k_norm = weights(over_all_heads ? key_values : head_size);
        }
        model.layers.push_back(layer);
    }
    const float* cos = weights(positions * head_size);
    const float* sin = weights(positions * head_size);
    std::vector<std::vector<int64_t>> prompts(static_cast<size_t>(batch));
    for (int64_t b = 0; b < batch; ++b)  // one of them is longer than what is read at once
        for (int64_t i = b == 5 ? 300 : 1 + b % 3 * (b % 2 ? 1 : 20); i > 0; --i)
            prompts[size_t(b)].push_back(int64_t(random() % uint64_t(vocabulary)));
    std::vector<int64_t> tokens(static_cast<size_t>(batch * 4));
    for (int64_t& token : tokens) token = int64_t(random() % uint64_t(vocabulary));

    // The hidden states [5, hidden_size] of the last of the members: after its prompt, and after four more tokens.
    const auto decode = [&](std::vector<int64_t> members, int threads, bool leave) {
        Decoder decoder(model);
        std::vector<int64_t> read, lengths;
        for (const int64_t b : members) {
            const auto& prompt = prompts[size_t(b)];
            read.insert(read.end(), prompt.begin(), prompt.end());
            lengths.push_back(int64_t(prompt.size()));
        }
        const int64_t size = int64_t(members.size());
        std::vector<float> last, hidden(members.size() * size_t(hidden_size));
        const auto keep = [&] {
            for (float x : hidden) check(std::isfinite(x), "decoder: finite", batch, head_size);
            last.insert(last.end(), hidden.end() - hidden_size, hidden.end());
        };
        decoder.prefill(read.data(), lengths.data(), size, size, positions, cos, sin, positions, hidden.data(),
                        threads);
        keep();
        for (int64_t t = 0; t < 4; ++t) {
            std::vector<int64_t> ids, at;
            for (int64_t b : members) {
                ids.push_back(tokens[size_t(t * batch + b)]);
                at.push_back(int64_t(prompts[size_t(b)].size()) + t);
            }
            hidden.resize(members.size() * size_t(hidden_size));
            decoder.step(ids.data(), at.data(), hidden.data(), threads);
            keep();
            if (!leave || members.size() < 3) continue;
            std::vector<int64_t> which,
                left;  // every other one leaves, then the first is there twice; the last stays last
            for (size_t i = members.size() % 2 ? 0 : 1; i < members.size(); i += 2) which.push_back(int64_t(i));
            decoder.select(which.data(), int64_t(which.size()));
            for (int64_t i : which) left.push_back(members[size_t(i)]);
            members.swap(left);
            left.clear(), which.clear();
            for (size_t i = 0; i < members.size(); ++i) which.push_back(int64_t(i));
            which.insert(which.begin(), 0);
            for (int64_t i : which) left.push_back(members[size_t(i)]);
            decoder.select(which.data(), int64_t(which.size()));
            members = left;
        }
        return last;
    };
    std::vector<int64_t> everyone;
    for (int64_t b = 0; b < batch; ++b) everyone.push_back(b);
    for (const int64_t b : {batch - 1, int64_t(5)}) {
        std::swap(everyone[size_t(b)], everyone.back());
        const std::vector<float> alone = decode({b}, 1, false);
        check(alone == decode(everyone, 1, false), "decoder: in a batch", b, head_size);
        check(alone == decode(everyone, 3, true), "decoder: others leave", b, head_size);
        check(alone == decode({b}, 3, false), "decoder: alone, by threads", b, head_size);
        // A few have caches of their own, of other lengths than a batch's.
        check(alone == decode({2, 9, b}, 1, false), "decoder: among a few", b, head_size);
        check(alone == decode({1, 12, 3, b}, 2, true), "decoder: a few leave", b, head_size);
    }

    // Eight tokens of `size` sequences, drawn in one call.
    const auto draw_some = [&](int64_t size, int64_t rows, int threads) {
        Decoder decoder(model);
        const std::vector<int64_t> lengths(size_t(size), 2), positions_of(size_t(size), 0), places(size_t(size), 2);
        std::vector<int64_t> ids, going(size_t(size), 1), drawn(size_t(8 * size));
        for (int64_t b = 0; b < size; ++b) ids.push_back(b);
        std::vector<float> hidden(size_t(size * hidden_size)), logits(size_t(rows * vocabulary)), logp(drawn.size()),
            entropy(drawn.size());
        decoder.prefill(tokens.data(), lengths.data(), size, size, 16, cos, sin, 16, hidden.data(), threads);
        const Drawing drawing{{hidden.data(), model.embedding, DType::f32, DType::f32, size, hidden_size, vocabulary,
                               hidden_size, hidden_size, nullptr},
                              Scaling{},
                              1.0f,
                              {7, ids.data(), positions_of.data(), 0, 1.0, 0.0},
                              places.data(),
                              {0},
                              going.data(),
                              logits.data(),
                              rows};
        const int64_t steps =
            draw(decoder, drawing, hidden.data(), 8, {drawn.data(), logp.data(), entropy.data()}, threads, [] {});
        drawn.resize(size_t(steps * size));
        for (int64_t token : drawn) check(token >= 0 && token < vocabulary, "draw: a token", size, rows);
        std::vector<int64_t> of_first;
        for (int64_t t = 0; t < steps; ++t) of_first.push_back(drawn[size_t(t * size)]);
        return of_first;
    };
    std::vector<int64_t> one = draw_some(1, 1, 1), many = draw_some(2 + batch / 4, 4, 3);
    const size_t both = std::min(one.size(), many.size());
    one.resize(both), many.resize(both);
    check(both > 0 && one == many, "draw: in a batch", int64_t(both), head_size);
}

// A single row is contiguous whatever stride its exporter gives: torch 2.8 gives 1.
void single_row_case() {
    int64_t shape[] = {1, 7}, strides[] = {1, 1};
    const dlpack::Tensor row{nullptr, {1, 0}, 2, {2, 32, 1}, shape, strides, 0};
    check(view_of(row, "row", 2).row_stride == 7, "view: a single row", 1, 7);
    shape[0] = 3, strides[0] = 9;
    check(view_of(row, "row", 2).row_stride == 9, "view: three rows", 3, 7);
    shape[0] = 0, strides[1] = 2;  // nothing in it: torch calls it contiguous and leaves the stride
    check(view_of(row, "row", 2).shape[0] == 0, "view: no rows", 0, 7);
}

// Rows without a finite logit are left alone by every filter, and drawn from without reading outside of them.
void nothing_finite_case(int64_t v) {
    for (const float fill : {-INFINITY, NAN, INFINITY})
        for (const int64_t top_k : {0, 1, 5})
            for (const double top_p : {1.0, 0.5}) {
                std::vector<float> z(size_t(v), fill), before;
                if (std::isnan(fill) && v > 1) z[size_t(v / 2)] = -INFINITY;
                before = z;
                const int64_t id = 3, position = 4;
                int64_t token = -1;
                float logp, sampling, entropy, kept;
                const Rows rows{z.data(), DType::f32, 1, v, v, Scaling{}, 1.0f, nullptr};
                sample_rows(rows, {7, &id, &position, top_k, top_p, 0.0}, {&token, &logp, &sampling, &entropy, &kept},
                            1);
                check(token >= 0 && token < v, "nothing finite: token range", 1, v);
                check(!std::isfinite(logp), "nothing finite: log-probability", 1, v);
                std::vector<RankedToken> scratch;
                float m = kLowest;
                for (float x : z) m = x > m ? x : m;
                filter_row(z.data(), v, m, top_k, top_p, 0.0, scratch);
                check(std::memcmp(z.data(), before.data(), z.size() * sizeof(float)) == 0, "nothing finite: left alone",
                      1, v);
            }
}

}  // namespace
