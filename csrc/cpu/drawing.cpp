#include "drawing.h"

#include <algorithm>

namespace bandit_rft::cpu {
namespace {

// The token, log-probability and entropy of every sequence, some rows of logits at a time.
void draw_once(const Drawing& d, const float* hidden, const std::vector<int64_t>& positions, const Drawn& to,
               float* unused, int threads) {
    const int64_t batch = d.head.batch;
    for (int64_t first = 0; first < batch; first += d.rows) {
        Head head = d.head;
        head.batch = std::min(d.rows, batch - first);
        head.hidden = hidden + first * head.hidden_stride;
        head_logits(head, d.logits, threads);
        const Rows rows{d.logits,        DType::f32, head.batch,    head.vocabulary,
                        head.vocabulary, d.scaling,  d.temperature, nullptr};
        SampleInputs in = d.stream;
        in.sequence_ids += first;
        in.positions = positions.data() + first;
        sample_rows(
            rows, in,
            {to.tokens + first, to.logprobs + first, unused + first, to.entropy + first, unused + batch + first},
            threads);
    }
}

}  // namespace

int64_t draw(Decoder& decoder, const Drawing& d, float* hidden, int64_t steps, const Drawn& drawn, int threads,
             const std::function<void()>& between) {
    const int64_t batch = d.head.batch;
    std::vector<int64_t> positions(d.stream.positions, d.stream.positions + batch), places(d.places, d.places + batch);
    std::vector<float> unused(size_t(2 * batch));
    for (int64_t step = 0;; ++step) {
        const Drawn now{drawn.tokens + step * batch, drawn.logprobs + step * batch, drawn.entropy + step * batch};
        draw_once(d, hidden, positions, now, unused.data(), threads);
        int64_t left = 0;
        for (int64_t b = 0; b < batch; ++b) {
            if (std::find(d.stops.begin(), d.stops.end(), now.tokens[b]) != d.stops.end()) d.going[b] = 0;
            left += d.going[b];
        }
        if (step + 1 == steps || 4 * decoder.computed(left) <= 3 * decoder.computed(batch)) return step + 1;
        between();
        decoder.step(now.tokens, places.data(), hidden, threads);
        for (int64_t b = 0; b < batch; ++b) ++positions[size_t(b)], ++places[size_t(b)];
    }
}

}  // namespace bandit_rft::cpu
