// The CPU core over random shapes, values and parameters, under the sanitizers, for as long as asked:
//
//     core_fuzz SECONDS [SEED]
//
// Everything follows from the number of the example, which a failure prints: `core_fuzz 0 N` runs example N alone. With
// clang, -DBRFT_LIBFUZZER gives the entry point of libFuzzer instead, whose input picks the example.
#include <chrono>
#include <limits>

#include "core_cases.h"
#include "product_cases.h"

namespace {

struct Random {
    std::mt19937 bits;
    int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
    int64_t size(int64_t most) { return 1 + below(below(3) ? std::min<int64_t>(most, 70) : most); }
    bool once_in(int64_t n) { return below(n) == 0; }
    double uniform() { return double(bits()) / 4294967296.0; }
    float log_uniform(double low, double high) {
        return float(std::exp(std::log(low) + uniform() * std::log(high / low)));
    }
};

// Rows of anything: infinities, NaN, zeros of both signs, the largest and the smallest numbers.
void wild_rows_case(Random& random) {
    const int64_t n = random.size(9), v = random.size(4000), stride = v + random.below(3);
    const bool narrow_dtype = random.once_in(2), tame = random.once_in(2);
    const float odd[] = {0.0f, -0.0f, -INFINITY, INFINITY, NAN, 3.4e38f, -3.4e38f, 1e-45f, -1e9f, 88.8f};
    std::normal_distribution<float> normal(0, random.log_uniform(1e-3, 1e3));
    std::vector<float> z(size_t((n - 1) * stride + v));
    std::vector<uint16_t> z16(z.size());
    const int64_t mix = 1 + random.below(10), share = 1 + random.below(50);
    for (size_t i = 0; i < z.size(); ++i) {
        z[i] = !tame && random.once_in(share) ? odd[random.below(mix)] : normal(random.bits);
        if (narrow_dtype) z16[i] = narrow(std::isnan(z[i]) ? 1.0f : z[i]);
        if (narrow_dtype) z[i] = wide(z16[i]);
    }
    const std::vector<float> raw = z;
    const size_t count = size_t(n);
    std::vector<float> temperatures(count), logp(count), entropy(count), kept(count), sampling(count);
    std::vector<float> advantages(count), weights(count), behavior(count), ref(count);
    std::vector<int64_t> targets(count), ids(count), positions(count), tokens(count);
    for (size_t i = 0; i < size_t(n); ++i) {
        temperatures[i] = random.log_uniform(1e-2, 1e2);
        advantages[i] = random.once_in(4) ? 0.0f : normal(random.bits);
        weights[i] = random.log_uniform(1e-6, 1.0);
        behavior[i] = ref[i] = -random.log_uniform(1e-3, 1e3);
        targets[i] = random.below(v);
        ids[i] = int64_t((uint64_t(random.bits()) << 32) | random.bits());
        positions[i] = int64_t(random.bits());
    }
    const Scaling scaling{random.once_in(2) ? 1.0f : random.log_uniform(0.1, 10.0),
                          random.once_in(2) ? 0.0f : random.log_uniform(1.0, 100.0)};
    const bool own_temperatures = random.once_in(2);
    Rows rows{narrow_dtype ? static_cast<void*>(z16.data()) : z.data(),
              narrow_dtype ? DType::bf16 : DType::f32,
              n,
              v,
              stride,
              scaling,
              random.once_in(2) ? 1.0f : temperatures[0],
              own_temperatures ? temperatures.data() : nullptr};
    const int threads = int(1 + random.below(3));
    const auto scaled = [&](int64_t i, int64_t j) {
        double x = raw[size_t(i * stride + j)] * scaling.logit_scale;  // in float32: what overflows there is infinite
        if (scaling.softcap != 0) x = scaling.softcap * std::tanh(x / scaling.softcap);
        x /= rows.temperature_of(i);
        return std::fabs(x) > std::numeric_limits<float>::max() ? std::copysign(INFINITY, x) : x;
    };
    logprob_rows(rows, targets.data(), logp.data(), entropy.data(), threads);
    std::vector<double> lse(count, NAN), largest(count);
    for (int64_t i = 0; i < n; ++i) {
        double m = -INFINITY, s = 0, t = 0, most = 0;
        bool usable = true;
        for (int64_t j = 0; j < v; ++j) {
            const double x = scaled(i, j);
            usable = usable && x < 1e38;  // neither NaN nor what float32 cannot hold
            m = std::fmax(m, x);
            if (x > -1e38) most = std::fmax(most, std::fabs(x));
        }
        largest[size_t(i)] = most;
        if (!usable || !(m > -1e38)) {
            check(!usable || std::isfinite(m) || !std::isfinite(logp[size_t(i)]),
                  "no finite logit, and a finite log-probability", i, v);
            continue;
        }
        for (int64_t j = 0; j < v; ++j) {
            const double d = scaled(i, j) - m;
            if (d > -700) s += std::exp(d), t += std::exp(d) * d;
        }
        lse[size_t(i)] = m + std::log(s);
        const double tolerance = 1e-4 + 2e-6 * most, want = scaled(i, targets[size_t(i)]) - lse[size_t(i)];
        check(std::isinf(want) ? logp[size_t(i)] < -1e37f
                               : std::fabs(logp[size_t(i)] - want) < tolerance + 1e-6 * std::fabs(want),
              "wild: log-probability", i, v);
        check(std::fabs(entropy[size_t(i)] - (std::log(s) - t / s)) < tolerance * (1 + std::log(double(v))),
              "wild: entropy", i, v);
    }
    const int64_t top_ks[] = {0, 1, 2, 40, v, v + 5, std::numeric_limits<int64_t>::max()};
    const double top_ps[] = {1.0, 0.9, 0.3, 1e-9, std::nextafter(1.0, 0.0)}, min_ps[] = {0.0, 0.05, 1.0};
    const SampleInputs filter{random.bits(),           ids.data(),
                              positions.data(),        top_ks[random.below(7)],
                              top_ps[random.below(5)], min_ps[random.below(3)]};
    sample_rows(rows, filter, {tokens.data(), logp.data(), sampling.data(), entropy.data(), kept.data()}, threads);
    for (size_t i = 0; i < size_t(n); ++i) {
        check(tokens[i] >= 0 && tokens[i] < v, "wild: token range", int64_t(i), v);
        if (std::isnan(lse[i])) continue;
        const double tolerance = 1e-4 + 4e-6 * largest[i], want = scaled(int64_t(i), tokens[i]) - lse[i];
        check(std::fabs(logp[i] - want) < tolerance + 1e-6 * std::fabs(want), "wild: drawn log-probability", int64_t(i),
              v);
        check(kept[i] > 0 && kept[i] < 1 + 1e-4, "wild: kept mass", int64_t(i), v);
        check(sampling[i] > logp[i] - 1e-3 - tolerance && sampling[i] < 1e-3 + tolerance, "wild: sampled from the kept",
              int64_t(i), v);
    }
    PolicyInputs in{};
    in.objective = {
        ObjectiveKind(1 + random.below(5)), 0.8f, 1.2f, random.once_in(2) ? 0.0f : 3.0f, KlKind(random.below(4)), 0.1f,
        random.once_in(2) ? 0.0f : 0.01f};
    in.advantages = advantages.data(), in.weights = weights.data(), in.reference = ref.data();
    in.behavior = random.once_in(3) ? nullptr : behavior.data();
    policy_rows(rows, targets.data(), in, logp.data(), entropy.data(), threads);
    for (int64_t i = 0; i < n; ++i) {
        if (std::isnan(lse[size_t(i)]) || logp[size_t(i)] < -80 || std::fabs(logp[size_t(i)] - ref[size_t(i)]) > 80 ||
            std::fabs(logp[size_t(i)] - behavior[size_t(i)]) > 80)
            continue;  // exp(80) is near the end of float32
        for (int64_t j = 0; j < v; ++j) {
            const size_t at = size_t(i * stride + j);
            check(std::isfinite(narrow_dtype ? wide(z16[at]) : z[at]), "wild: the gradient is finite", i, v);
        }
    }
}

void example(uint32_t number) {
    Random random{std::mt19937(number)};
    static const char* const sets[] = {"baseline", "avx2", "avx512"};
    try {
        use_instruction_set(sets[random.below(3)]);
    } catch (const std::invalid_argument&) {
    }
    const DType dtype = random.once_in(2) ? DType::f32 : DType::bf16;
    switch (random.below(9)) {
        case 0: {
            const int64_t n = random.size(20), v = random.size(3000);
            return rows_case(n, v, dtype, random.once_in(2), random.bits);
        }
        case 1: {
            const int64_t v = random.size(3000), top_k = random.once_in(2) ? 0 : random.size(3000);
            const double top_p = random.once_in(3) ? 1.0 : random.uniform() * 0.999 + 0.0005;
            return filter_case(v, int(1 + random.below(8)), top_k, top_p, random.once_in(2) ? 0.0 : random.uniform(),
                               random.bits);
        }
        case 2: {
            const int64_t b = random.size(40), hidden_size = random.size(200);
            return head_case(b, hidden_size, random.size(60), dtype, random.bits);
        }
        case 3: {
            std::vector<int64_t> lengths;
            for (int64_t s = random.size(5); s > 0; --s) lengths.push_back(random.below(40));
            const int64_t group = 1 + random.below(3), heads = 1 + random.below(3);
            return attention_case(lengths, group, heads, random.size(40), random.bits);
        }
        case 4:
            return nothing_finite_case(random.size(2000));
        case 5: {
            const int64_t m = random.below(60), n = random.size(90), k = random.below(900), gap = random.below(20);
            const bool a = random.once_in(2), b = random.once_in(2);
            return product_case(m, n, k, a, b, gap, int(1 + random.below(4)), random.bits);
        }
        default:
            return wild_rows_case(random);
    }
}

}  // namespace

#if defined(BRFT_LIBFUZZER)
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    uint32_t number = uint32_t(size);
    for (size_t i = 0; i < size; ++i) number = number * 16777619u ^ data[i];
    example(number);
    return 0;
}
#else
int main(int count, char** arguments) {
    const double seconds = count > 1 ? std::atof(arguments[1]) : 10;
    const uint32_t first = count > 2 ? uint32_t(std::strtoul(arguments[2], nullptr, 10)) : 0;
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    uint32_t number = first;
    do {
        current_example = number;
        example(number++);
    } while (std::chrono::steady_clock::now() < end);
    std::printf("%u examples from %u on, %d checks, 0 failed\n", number - first, first, checks);
    return 0;
}
#endif
