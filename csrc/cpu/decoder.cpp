#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace bandit_rft::cpu {
namespace {

constexpr int64_t kWorthAThread = 1 << 21;  // multiply-adds of a pass; some 50 microseconds
constexpr int64_t kReadAtOnce = 256;        // tokens of prompts in one pass

void require(bool condition, const std::string& what) {
    if (!condition) throw std::invalid_argument(what);
}

int64_t up_to(int64_t multiple, int64_t x) { return (x + multiple - 1) / multiple * multiple; }

struct Share {
    int64_t begin, end;
    Share(int64_t count, int index, int size) : begin(count * index / size), end(count * (index + 1) / size) {}
};

}  // namespace

float* Decoder::Buffer::of(size_t floats) {
    if (floats > size) {
        memory = lines(floats);
        size = floats;
    }
    return memory.get();
}

Decoder::Decoder(const DecoderModel& model) : model_(model), kernels_(kernels().decoder) {
    require(!model.layers.empty(), "a decoder needs a layer");
    require(model.head_size > 0 && model.head_size % 2 == 0, "head_size must be even and positive");
    require(model.key_value_heads > 0 && model.heads % model.key_value_heads == 0,
            "heads must be a multiple of key_value_heads");
}

Stride Decoder::stride(int which) const {
    const int64_t head_size = model_.head_size;
    if (!alone()) return {model_.key_value_heads * head_size * lanes_, lanes_};
    return which == 0 ? Stride{1, up_to(kernels_->line, capacity_)} : Stride{up_to(kernels_->line, head_size), 1};
}

size_t Decoder::block_size() const {
    const int64_t heads = model_.key_value_heads;
    if (!alone()) return size_t(capacity_ * heads * model_.head_size * lanes_);
    // A vector of columns may begin at any: a line more.
    return size_t(up_to(kernels_->line, capacity_) * heads * up_to(kernels_->line, model_.head_size) + kernels_->line);
}

float* Decoder::block(int64_t layer, int64_t index, int which) const {
    return cache_.memory.get() + ((layer * blocks_ + index) * 2 + which) * int64_t(block_size());
}

float* Decoder::cache(int64_t layer, int64_t sequence, int64_t head, int which) const {
    const int64_t width = kernels_->wide.panel, head_size = model_.head_size;
    if (!alone()) return block(layer, sequence / width, which) + head * head_size * lanes_ + sequence % width;
    const Stride at = stride(which);
    return block(layer, sequence, which) + head * (which == 0 ? head_size * at.element : capacity_ * at.column);
}

void Decoder::prefill(const int64_t* tokens, const int64_t* lengths, int64_t batch, int64_t room, int64_t capacity,
                      const float* cos, const float* sin, int64_t positions, float* hidden, int threads) {
    require(batch > 0 && room >= batch, "a batch needs a sequence, and room for all");
    for (int64_t b = 0; b < batch; ++b) require(lengths[b] > 0, "a prompt needs a token");
    const int64_t width = *std::max_element(lengths, lengths + batch);
    require(width <= capacity, "the cache is full");
    require(width <= positions, "positions must lie in the table of rotations");
    require_tokens(tokens, std::accumulate(lengths, lengths + batch, int64_t(0)));
    batch_ = 0;  // until there is memory for it
    room_ = room;
    blocks_ = alone() ? room : panels_of(room);
    lanes_ = kernels_->computed_lanes(int(std::min<int64_t>(room, kernels_->wide.panel)));
    columns_ = capacity_ = capacity;
    cache_.of(model_.layers.size() * 2 * block_size() * size_t(blocks_));
    batch_ = batch;
    columns_ = width;  // all prompts end in the same column
    first_.assign(size_t(panels_of(room) * kernels_->wide.panel), 0);
    for (int64_t b = 0; b < batch; ++b) first_[size_t(b)] = int32_t(columns_ - lengths[b]);
    positions_ = positions;
    cos_.assign(cos, cos + positions * model_.head_size);
    sin_.assign(sin, sin + positions * model_.head_size);
    // Columns before a sequence have the weight 0, and 0 times a NaN that an earlier batch left there would be NaN.
    const int64_t before = columns_ - *std::min_element(lengths, lengths + batch);
    const size_t floats = size_t(before * model_.key_value_heads * model_.head_size * lanes_);
    for (int64_t layer = 0; !alone() && layer < int64_t(model_.layers.size()); ++layer)
        for (int64_t panel = 0; panel < panels_of(batch); ++panel)
            std::memset(block(layer, panel, 1), 0, floats * sizeof(float));

    int64_t sequence = 0, begin = 0;
    std::vector<int64_t> places;
    while (sequence < batch) {
        Pass pass{0, tokens, nullptr, {}, {}, hidden, &kernels_->wide};
        places.clear();
        while (sequence < batch && pass.rows < kReadAtOnce) {
            const int64_t count = std::min(lengths[sequence] - begin, kReadAtOnce - pass.rows);
            pass.runs.push_back({sequence, begin, pass.rows, count});
            for (int64_t i = 0; i < count; ++i) places.push_back(begin + i);
            pass.rows += count;
            begin += count;
            if (begin < lengths[sequence]) continue;
            pass.last.push_back({sequence, pass.rows - 1});
            ++sequence, begin = 0;
        }
        pass.positions = places.data();
        tokens += pass.rows;
        run(pass, threads);
    }
}

void Decoder::select(const int64_t* which, int64_t count) {
    bool back = true, forth = true;  // every sequence moves to an earlier lane, or every one to a later
    for (int64_t b = 0; b < count; ++b) {
        require(which[b] >= 0 && which[b] < batch_, "which names a sequence that is not there");
        back = back && which[b] >= b;
        forth = forth && which[b] <= b;
    }
    require(count > 0 && count <= room_, "which must name a sequence, and no more than there is room for");
    require(std::is_sorted(which, which + count) && (back || forth),
            "which must be ascending, to leave some out or repeat some");
    // In that order no lane is overwritten that is still to be read.
    const auto in_order = [&](const auto& move) {
        for (int64_t i = 0; i < count; ++i) move(back ? i : count - 1 - i);
    };
    const int64_t panel = kernels_->wide.panel, rows = columns_ * model_.key_value_heads * model_.head_size;
    in_order([&](int64_t b) { first_[size_t(b)] = first_[size_t(which[b])]; });
    for (int64_t layer = 0; layer < int64_t(model_.layers.size()); ++layer)
        for (int kind = 0; kind < 2; ++kind) {
            float* const base = block(layer, 0, kind);
            const int64_t next = 2 * int64_t(block_size());
            if (alone()) {
                in_order([&](int64_t b) {
                    if (which[b] != b) copy_columns(kind, base + which[b] * next, base + b * next);
                });
                continue;
            }
            for (int64_t r = 0; r < rows; ++r)
                in_order([&](int64_t b) {
                    base[b / panel * next + r * lanes_ + b % panel] =
                        base[which[b] / panel * next + r * lanes_ + which[b] % panel];
                });
        }
    batch_ = count;
}

void Decoder::copy_columns(int which, const float* from, float* to) const {
    const int64_t heads = model_.key_value_heads, head_size = model_.head_size;
    const Stride at = stride(which);
    const int64_t runs = which == 0 ? heads * head_size : heads;
    const int64_t apart = which == 0 ? at.element : capacity_ * at.column, count = columns_ * at.column;
    for (int64_t r = 0; r < runs; ++r) std::memcpy(to + r * apart, from + r * apart, size_t(count) * sizeof(float));
}

void Decoder::step(const int64_t* tokens, const int64_t* positions, float* hidden, int threads) {
    require(columns_ < capacity_, "the cache is full");
    require_tokens(tokens, batch_);
    for (int64_t b = 0; b < batch_; ++b)
        require(positions[b] >= 0 && positions[b] < positions_, "positions must lie in the table of rotations");
    ++columns_;
    run({batch_, tokens, positions, {}, {}, hidden, alone() ? &kernels_->single : &kernels_->wide}, threads);
}

int64_t Decoder::computed(int64_t sequences) const {
    if (sequences <= kernels_->few) return sequences;
    const int64_t panel = kernels_->wide.panel, rest = sequences % panel;
    return sequences - rest + (rest ? kernels_->computed_lanes(int(rest)) : 0);
}

void Decoder::require_tokens(const int64_t* tokens, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
        require(tokens[i] >= 0 && tokens[i] < model_.vocabulary, "tokens must lie in the vocabulary");
}

void Decoder::run(const Pass& pass, int threads) {
    const int64_t hidden_size = model_.hidden_size, head_size = model_.head_size, panels = pass.panels();
    const int64_t width = pass.kernels->panel, queries = model_.heads * head_size,
                  key_values = model_.key_value_heads * head_size;
    const int64_t weights =
        int64_t(model_.layers.size()) * hidden_size * (2 * queries + 2 * key_values + 3 * model_.intermediate_size);
    const int64_t worthwhile =
        std::max<int64_t>(computed(pass.rows), kernels_->computed_lanes(1)) * weights / kWorthAThread;
    const int team = int(std::max<int64_t>(1, std::min<int64_t>(threads, worthwhile)));
    const auto in_panels = [&](int64_t size) { return size_t(panels * size * width); };
    qkv_.of(in_panels(queries + 2 * key_values));
    attended_.of(in_panels(queries));
    projected_.of(in_panels(hidden_size));
    activated_.of(in_panels(model_.intermediate_size));
    rotation_.of(in_panels(2 * head_size));
    inverses_.of(in_panels(2));
    if (members_.size() < size_t(team)) members_.resize(size_t(team));
    for (Member& member : members_) {
        member.residual.of(in_panels(hidden_size));
        member.normed.of(in_panels(hidden_size));
        const int64_t attention = (head_size + capacity_) * width + 2 * (capacity_ + kernels_->line) * head_size;
        const int64_t longest = std::max({hidden_size, queries, model_.intermediate_size});
        member.scratch.of(size_t(std::max(attention, 2 * kernels_->few * longest)));
    }
    for (int64_t r = 0; r < panels * width; ++r) {  // cos and sin of each lane, [2 head_size, panel]
        float* to = rotation_.memory.get() + r / width * 2 * head_size * width + r % width;
        const int64_t position = r < pass.rows ? pass.positions[r] : 0;
        for (int64_t d = 0; d < head_size; ++d) {
            to[d * width] = cos_[size_t(position * head_size + d)];
            to[(head_size + d) * width] = sin_[size_t(position * head_size + d)];
        }
    }
    auto task = [&](int index, int size) { work(pass, members_[size_t(index)], index, size); };
    run_team(team, task);
}

void Decoder::work(const Pass& pass, Member& member, int index, int size) {
    const StepKernels& kernel = *pass.kernels;
    const int64_t width = kernel.panel, hidden_size = model_.hidden_size;
    int64_t rows = pass.rows, panels = pass.panels(), tile = kernels_->rows_at_once(rows);
    const int64_t queries = model_.heads * model_.head_size, key_values = model_.key_value_heads * model_.head_size;
    const auto in_panels = [&](float* data, int64_t rows) { return Panels{data, rows * width}; };
    const Panels residual = in_panels(member.residual.memory.get(), hidden_size);
    const Panels normed = in_panels(member.normed.memory.get(), hidden_size);
    const Panels qkv = in_panels(qkv_.memory.get(), queries + 2 * key_values);
    const Panels attended = in_panels(attended_.memory.get(), queries);
    const Panels projected = in_panels(projected_.memory.get(), hidden_size);
    const Panels activated = in_panels(activated_.memory.get(), model_.intermediate_size);
    float* const scratch = member.scratch.memory.get();
    const auto members_of = [&](int64_t p) { return int(std::min(width, rows - p * width)); };

    const auto norm = [&](const Panels& x, const float* weight) {
        if (!weight) return x;
        for (int64_t p = 0; p < panels; ++p)
            kernel.rms_norm(x.data + p * x.stride, weight, model_.norm_eps, hidden_size, members_of(p),
                            normed.data + p * normed.stride);
        return normed;
    };
    const auto add = [&](const Panels& y) {
        for (int64_t p = 0; p < panels; ++p)
            kernel.add(residual.data + p * residual.stride, y.data + p * y.stride, hidden_size, members_of(p));
    };
    const auto tiles = [&](int64_t outputs) { return (outputs + tile - 1) / tile; };
    // Calls work(begin, end) with this member's outputs of a matrix that comes after `before` others' tiles, of `all`
    // in total.
    const auto outputs_of = [&](int64_t outputs, int64_t before, int64_t all, const auto& compute) {
        const Share share(all, index, size);
        const int64_t begin = std::max<int64_t>(share.begin - before, 0);
        const int64_t end = std::min(share.end - before, tiles(outputs));
        if (begin < end) compute(begin * tile, std::min(end * tile, outputs));
        return before + tiles(outputs);
    };
    // Where every member has as many heads, of whole tiles, it attends with those that it multiplied itself, and waits
    // for nobody.
    const bool own_heads =
        model_.key_value_heads % size == 0 && model_.head_size % tile == 0 && !model_.norms_over_all_heads;

    for (int64_t r = 0; r < panels * width; ++r) {
        const float* from = r < rows ? model_.embedding + pass.tokens[r] * hidden_size : nullptr;
        float* to = residual.data + r / width * residual.stride + r % width;
        for (int64_t k = 0; k < hidden_size; ++k) to[k * width] = from ? from[k] : 0.0f;
    }
    for (size_t l = 0; l < model_.layers.size(); ++l) {
        const DecoderLayer& layer = model_.layers[l];
        Panels in = norm(residual, layer.before_attention);
        const struct {
            const float *weight, *bias;
            int64_t outputs, at;
        } products[] = {{layer.q, layer.q_bias, queries, 0},
                        {layer.k, layer.k_bias, key_values, queries},
                        {layer.v, layer.v_bias, key_values, queries + key_values}};
        const int64_t all = tiles(queries) + 2 * tiles(key_values);
        int64_t before = 0;
        for (const auto& m : products) {
            const auto some = [&](int64_t begin, int64_t end) {
                kernel.product(m.weight, m.bias, hidden_size, begin, end, in, rows,
                               {qkv.data + m.at * width, qkv.stride}, scratch);
            };
            if (own_heads)
                some(m.outputs * index / size, m.outputs * (index + 1) / size);
            else
                before = outputs_of(m.outputs, before, all, some);
        }
        if (!own_heads) barrier_.wait(size);
        if (model_.norms_over_all_heads) {  // which reads what others rotate where it is
            inverses_of_heads(pass, layer, index, size);
            barrier_.wait(size);
        }
        attend(pass, layer, int64_t(l), member, index, size);
        barrier_.wait(size);
        if (!pass.runs.empty()) {
            read_runs(pass, int64_t(l), member, index, size);
            barrier_.wait(size);
            if (l + 1 == model_.layers.size()) {  // the others' keys and values were all that is wanted of them
                if (pass.last.empty()) return;
                const Share mine(queries, index, size);
                keep_last(pass, residual, 0, hidden_size);
                keep_last(pass, attended, mine.begin, mine.end);
                rows = int64_t(pass.last.size());
                panels = (rows + width - 1) / width;
                tile = kernels_->rows_at_once(rows);
                barrier_.wait(size);
            }
        }
        outputs_of(hidden_size, 0, tiles(hidden_size), [&](int64_t begin, int64_t end) {
            kernel.product(layer.o, layer.o_bias, queries, begin, end, attended, rows, projected, scratch);
        });
        barrier_.wait(size);
        add(norm(projected, layer.after_attention));
        in = norm(residual, layer.before_mlp);
        outputs_of(model_.intermediate_size, 0, tiles(model_.intermediate_size), [&](int64_t begin, int64_t end) {
            kernel.gated_product(layer.gate, layer.up, hidden_size, begin, end, in, rows, activated, scratch);
        });
        barrier_.wait(size);
        outputs_of(hidden_size, 0, tiles(hidden_size), [&](int64_t begin, int64_t end) {
            kernel.product(layer.down, nullptr, model_.intermediate_size, begin, end, activated, rows, projected,
                           scratch);
        });
        barrier_.wait(size);
        add(norm(projected, layer.after_mlp));
    }
    const Panels last = norm(residual, model_.final_norm);
    const Share mine(rows, index, size);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
        const float* from = last.data + r / width * last.stride + r % width;
        float* to = pass.hidden + (pass.last.empty() ? r : pass.last[size_t(r)].sequence) * hidden_size;
        for (int64_t k = 0; k < hidden_size; ++k) to[k] = from[k * width];
    }
}

// Moves the last tokens of prompts to the first lanes, of the elements [begin, end) of each.
void Decoder::keep_last(const Pass& pass, const Panels& x, int64_t begin, int64_t end) const {
    const int64_t width = pass.kernels->panel;
    const auto lane = [&](int64_t row) { return x.data + row / width * x.stride + row % width; };
    for (size_t i = 0; i < pass.last.size(); ++i)
        for (int64_t k = begin; k < end; ++k) lane(int64_t(i))[k * width] = lane(pass.last[i].row)[k * width];
}

// 1 / rms of each lane's queries and keys, for norms over all heads.
void Decoder::inverses_of_heads(const Pass& pass, const DecoderLayer& layer, int index, int size) {
    const int64_t width = pass.kernels->panel, queries = model_.heads * model_.head_size;
    const int64_t key_values = model_.key_value_heads * model_.head_size;
    const Share share(pass.panels(), index, size);
    for (int64_t p = share.begin; p < share.end; ++p) {
        const float* qkv = qkv_.memory.get() + p * (queries + 2 * key_values) * width;
        float* to = inverses_.memory.get() + p * 2 * width;
        const int members = int(std::min(width, pass.rows - p * width));
        if (layer.q_norm) pass.kernels->inverse_rms(qkv, model_.norm_eps, queries, members, to);
        if (layer.k_norm)
            pass.kernels->inverse_rms(qkv + queries * width, model_.norm_eps, key_values, members, to + width);
    }
}

// A step: attention of one new token each. Reading: the rotation only, for read_runs.
void Decoder::attend(const Pass& pass, const DecoderLayer& layer, int64_t which, Member& member, int index, int size) {
    const int64_t width = pass.kernels->panel, panels = pass.panels(), head_size = model_.head_size;
    const int64_t heads = model_.key_value_heads, group = model_.heads / heads;
    const int64_t queries = model_.heads * head_size, key_values = heads * head_size;
    const Share share(panels * heads, index, size);
    for (int64_t unit = share.begin; unit < share.end; ++unit) {
        const int64_t p = unit % panels, head = unit / panels;
        float* qkv = qkv_.memory.get() + p * (queries + 2 * key_values) * width;
        const float* rotation = rotation_.memory.get() + p * 2 * head_size * width;
        const int members = int(std::min(width, pass.rows - p * width));
        const bool whole = model_.norms_over_all_heads;
        const float* inverses = inverses_.memory.get() + p * 2 * width;
        HeadAttention a{};
        a.members = members;
        a.head_size = head_size;
        a.group = group;
        a.scaling = model_.scaling;
        a.norm_eps = model_.norm_eps;
        a.query = qkv + head * group * head_size * width;
        a.key = qkv + (queries + head * head_size) * width;
        a.value = qkv + (queries + key_values + head * head_size) * width;
        a.query_norm = layer.q_norm ? layer.q_norm + (whole ? head * group * head_size : 0) : nullptr;
        a.key_norm = layer.k_norm ? layer.k_norm + (whole ? head * head_size : 0) : nullptr;
        a.query_inverse = whole && layer.q_norm ? inverses : nullptr;
        a.key_inverse = whole && layer.k_norm ? inverses + width : nullptr;
        a.cos = rotation;
        a.sin = rotation + head_size * width;
        if (!pass.runs.empty()) {
            kernels_->rotate(a);
            continue;
        }
        a.columns = columns_;
        a.keys = cache(which, p * width, head, 0);
        a.values = cache(which, p * width, head, 1);
        a.key_stride = stride(0);
        a.value_stride = stride(1);
        a.first = first_.data() + p * width;
        a.lowest_first = *std::min_element(a.first, a.first + members);
        a.highest_first = *std::max_element(a.first, a.first + members);
        a.scratch = member.scratch.memory.get();
        a.out = attended_.memory.get() + (p * model_.heads + head * group) * head_size * width;
        pass.kernels->attend(a);
    }
}

void Decoder::read_runs(const Pass& pass, int64_t which, Member& member, int index, int size) {
    const int64_t width = kernels_->wide.panel, head_size = model_.head_size, heads = model_.key_value_heads;
    const int64_t group = model_.heads / heads, queries = model_.heads * head_size, key_values = heads * head_size;
    const int64_t between = (queries + 2 * key_values) * width;
    const int64_t runs = int64_t(pass.runs.size());
    const Share share(runs * heads, index, size);  // by heads: lanes of a cache line are several sequences'
    for (int64_t unit = share.begin; unit < share.end; ++unit) {
        const Run& run = pass.runs[size_t(unit % runs)];
        const int64_t head = unit / runs, first = first_[size_t(run.sequence)];
        HeadPrefill a{};
        a.head_size = head_size;
        a.group = group;
        a.row = run.row;
        a.count = run.count;
        a.begin = run.begin;
        a.key_stride = stride(0);
        a.value_stride = stride(1);
        a.query = {qkv_.memory.get() + head * group * head_size * width, between};
        a.key = {qkv_.memory.get() + (queries + head * head_size) * width, between};
        a.value = {qkv_.memory.get() + (queries + key_values + head * head_size) * width, between};
        a.out = {attended_.memory.get() + head * group * head_size * width, queries * width};
        a.keys = cache(which, run.sequence, head, 0) + first * a.key_stride.column;
        a.values = cache(which, run.sequence, head, 1) + first * a.value_stride.column;
        a.scratch = member.scratch.memory.get();
        kernels_->prefill(a);
    }
}

}  // namespace bandit_rft::cpu
