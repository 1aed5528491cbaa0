#include "products.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <numeric>

#if defined(BRFT_X86_DISPATCH)
#include <cpuid.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "threads.h"

namespace bandit_rft::cpu {
namespace {

constexpr int64_t kDepth = 384;  // of a stretch: a packed panel of b is 48 KiB at most, and stays in the second cache
constexpr int64_t kDepths = 5;   // stretches that are packed together
constexpr int64_t kPacked = 512 << 10;   // floats of few rows, which are packed once, and of a small b: 2 MiB
constexpr int64_t kBlocks = 10;          // of a's rows, at most, that a thread takes through all of its b together
constexpr int64_t kOfThreads = 1 << 20;  // floats that all threads together pack of columns, but kFewPanels each
constexpr int64_t kFewPanels = 4;
constexpr int64_t kMost = kPacked / kDepth;  // rows of a, of which a stretch fits kPacked

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory of a thread's own, asked of the system: kept on the C library's heap it would keep what was freed below it. In
// large pages where there are any: what is packed lies in the second cache, and small ones would share out its lines by
// chance.
class Pages {
  public:
    Pages() = default;
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    ~Pages() { release(); }

    float* floats(int64_t count) {
        const size_t bytes = size_t(count) * sizeof(float);
        if (bytes > size_) {
            release();
            take(size_t(over(int64_t(bytes), kLarge) * kLarge));
        }
        return data_;
    }

  private:
    static constexpr int64_t kLarge = 2 << 20;
#if defined(__unix__) || defined(__APPLE__)
    void take(size_t bytes) {
        whole_ = mmap(nullptr, bytes + kLarge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
        if (whole_ == MAP_FAILED) throw std::bad_alloc();
        data_ = reinterpret_cast<float*>(over(int64_t(reinterpret_cast<intptr_t>(whole_)), kLarge) * kLarge);
        size_ = bytes;
#if defined(MADV_HUGEPAGE)
        madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    void release() {
        if (size_) munmap(whole_, size_ + kLarge);
        size_ = 0;
    }
#else
    void take(size_t bytes) {
        if (!(whole_ = std::malloc(bytes))) throw std::bad_alloc();
        data_ = static_cast<float*>(whole_);
        size_ = bytes;
    }
    void release() {
        if (size_) std::free(whole_);
        size_ = 0;
    }
#endif
    void* whole_ = nullptr;
    float* data_ = nullptr;
    size_t size_ = 0;
};

// Memory for so many floats, kept by the calling thread for its next product: the pages of new memory would cost a
// small product as much as its multiplications.
float* packing(int64_t count) {
    thread_local Pages pages;
    return pages.floats(count);
}

// How many terms are packed together of an operand `width` wide: whole stretches.
int64_t packed_depth(int64_t width, int64_t depth) {
    const int64_t stretches = std::clamp<int64_t>(kPacked / (width * kDepth), 1, kDepths);
    return std::min(depth, stretches * kDepth);
}

// The index-th of `size` members' share of [0, count).
struct Share {
    int64_t begin, end;
    Share(int64_t count, int64_t index, int64_t size) : begin(count * index / size), end(count * (index + 1) / size) {}
};

// work(index, size) by as many threads as a product of so many multiplications, in so many pieces, is worth.
template <class Work>
void by_a_team(int64_t multiplications, int64_t pieces, int threads, Work& work) {
    const int64_t worthwhile = multiplications / 16 / worth_a_thread();
    run_team(int(std::max<int64_t>(1, std::min<int64_t>({int64_t(threads), pieces, worthwhile}))), work);
}

constexpr int64_t kTerms = 16;   // that are packed at once of an operand whose rows they are
constexpr int64_t kLines = 128;  // bytes that are asked for at once

// What pack_columns will read of the next panel, b [depth, some]: the `piece`-th of `pieces` parts.
Ahead next_panel(const Matrix& b, int64_t piece, int64_t pieces) {
    if (b.columns <= 0) return {};
    if (b.column_step == 1) {  // a row of the panel is two lines
        const Share some(b.rows, piece, pieces);
        return {reinterpret_cast<const char*>(b.at(some.begin, 0)), b.row_step * 4, some.end - some.begin};
    }
    if (b.row_step == 1 && b.column_step == b.rows) {  // the panel is one stretch of memory
        const Share some(b.rows * b.columns * 4 / kLines, piece, pieces);
        return {reinterpret_cast<const char*>(b.data) + some.begin * kLines, kLines, some.end - some.begin};
    }
    return {};
}

// The same of what will be read of the next blocks of a, or of the next stretch of b, where it is one stretch of
// memory, or each of its columns is.
Ahead next_blocks(const Matrix& a, int64_t piece, int64_t pieces) {
    if (a.rows <= 0) return {};
    if (a.row_step == a.columns) {
        const Share some(a.rows * a.columns * 4 / kLines, piece, pieces);
        return {reinterpret_cast<const char*>(a.data) + some.begin * kLines, kLines, some.end - some.begin};
    }
    if (a.row_step != 1) return {};
    const int64_t parts = over(a.rows * 4, kLines), each = over(pieces, parts), part = piece / each;
    const Share some(a.columns, piece % each, each);
    return {reinterpret_cast<const char*>(a.at(0, some.begin)) + part * kLines, a.column_step * 4,
            some.end - some.begin};
}

// product_of_few_rows for rows that are packed together.
void few_rows(const Matrix& a, const Matrix& b, float* out, int64_t stride, bool accumulate, int threads) {
    const ProductKernels& kernel = *kernels().product;
    const int64_t R = kernel.rows, C = kernel.columns, blocks = over(a.rows, R), panels = over(b.columns, C);
    const int64_t depth = packed_depth(a.rows, a.columns), block = depth * R + kSlack, panel = depth * C + kSlack;
    // Where there are few panels for the threads, several work at one, on some blocks of rows each.
    const int64_t enough = over(2 * threads, panels);
    const int64_t groups = std::min(blocks, enough), units = panels * groups;
    float *packed = packing(blocks * block + threads * panel), *of_threads = packed + blocks * block;
    Barrier barrier;
    auto member = [&](int index, int size) {
        float* columns = of_threads + index * panel;
        for (int64_t k = 0; k < a.columns; k += depth) {
            const int64_t terms = std::min(depth, a.columns - k);
            barrier.wait(size);  // nobody reads the terms before any more
            for (auto [i, end] = Share(blocks, index, size); i < end; ++i)
                kernel.pack_rows(a.part(i * R, k, std::min(R, a.rows - i * R), terms), packed + i * block);
            barrier.wait(size);
            for (auto [unit, last] = Share(units, index, size); unit < last; ++unit) {
                const int64_t j = unit / groups * C, width = std::min(C, b.columns - j);
                const Share some(blocks, unit % groups, groups);
                kernel.pack_columns(b.part(k, j, terms, width), columns);
                const Matrix next = b.part(k, j + C, terms, std::min(C, b.columns - j - C));
                const int64_t pieces = over(terms, kDepth) * (some.end - some.begin);
                int64_t piece = 0;
                for (int64_t l = 0; l < terms; l += kDepth)
                    for (int64_t i = some.begin; i < some.end; ++i, ++piece)
                        kernel.tile({packed + i * block + l * R, std::min(R, a.rows - i * R),
                                     std::min(kDepth, terms - l), 1, R},
                                    columns + l * C, out + i * R * stride + j, stride, int(width),
                                    accumulate || k + l > 0, next_panel(next, piece, pieces));
            }
        }
    };
    by_a_team(a.rows * b.columns * a.columns, units, threads, member);
}

// Whether tiles may read a where it is: rows side by side, whose lines must not all lie in the same sets of the first
// cache; or a stretch of columns, whose lines must not in the second's.
bool lies_well(const Matrix& a, int64_t rows) {
    constexpr int64_t kSets = 64, kWays = 8, kLineFloats = 16;
    if (a.row_step == 1) return a.column_step % (kSets * kLineFloats) != 0;
    if (a.row_step % kLineFloats) return true;
    int64_t sets = 1;
    while (a.row_step / kLineFloats * sets % kSets) ++sets;
    return over(rows, sets) <= kWays / 2;
}

// product_of_many_rows. Threads share out rows of a, and columns of b where the rows are too few for that. Each packs
// its columns for itself: what another has packed would have to come out of its cache.
void many_rows(const Matrix& a, const Matrix& b, float* out, int64_t stride, bool accumulate, int threads) {
    const ProductKernels& kernel = *kernels().product;
    const int64_t R = kernel.rows, C = kernel.columns, panels = over(b.columns, C), depth = std::min(kDepth, a.columns);
    const int64_t panel = depth * C + kSlack, block = depth * R + kSlack;
    const int64_t most = std::max(kFewPanels, kOfThreads / threads / (kDepth * C));
    const int64_t parts = std::max(over(panels, most), std::min(panels, over(2 * R * threads, a.rows)));
    const int64_t shares = std::min<int64_t>(threads / std::gcd<int64_t>(parts, threads), over(a.rows, 2 * R));
    const int64_t of_rows = kBlocks * block, of_thread = of_rows + over(panels, parts) * panel;
    float* packed = packing(threads * of_thread);
    const bool in_place = lies_well(a, R);
    // Operands are packed in the order of their memory: a few of the terms at a time where those are rows of it.
    const int64_t a_few = a.row_step == 1 ? kTerms : depth, b_few = b.column_step == 1 ? kTerms : depth;

    // The k-th stretch of terms of some blocks, times columns that are packed.
    const auto multiply = [&](const Matrix& some, const float* columns, int64_t width, float* rows, float* to, bool add,
                              const Matrix& next) {
        const auto of_block = [&](int64_t i) {
            return some.part(i * R, 0, std::min(R, some.rows - i * R), some.columns);
        };
        const auto is_packed = [&](int64_t i) {  // also what is less than a tile computes
            return !in_place || (a.row_step == 1 ? of_block(i).rows % 4 : of_block(i).rows < R);
        };
        const int64_t blocks = over(some.rows, R), terms = some.columns, pieces = blocks * over(width, C);
        for (int64_t l = 0; l < terms; l += a_few)
            for (int64_t i = 0; i < blocks; ++i)
                if (is_packed(i))
                    kernel.pack_rows(of_block(i).part(0, l, of_block(i).rows, std::min(a_few, terms - l)),
                                     rows + i * block + l * R);
        int64_t piece = 0;
        for (int64_t j = 0; j < width; j += C)
            for (int64_t i = 0; i < blocks; ++i, ++piece)
                kernel.tile(is_packed(i) ? Matrix{rows + i * block, of_block(i).rows, terms, 1, R} : of_block(i),
                            columns + j / C * panel, to + i * R * stride + j, stride, int(std::min(C, width - j)), add,
                            next_blocks(next, piece, pieces));
    };
    const auto unit = [&](const Share& some, const Share& quarters, float* rows, float* columns) {
        const int64_t begin = some.begin * C, width = std::min(some.end * C, b.columns) - begin;
        const int64_t end = std::min(quarters.end * 4, a.rows);  // a tile computes 4 rows at least
        for (int64_t k = 0; k < a.columns; k += depth) {
            const int64_t terms = std::min(depth, a.columns - k);
            for (int64_t l = 0; l < terms; l += b_few)
                for (int64_t j = 0; j < width; j += C)
                    kernel.pack_columns(b.part(k + l, begin + j, std::min(b_few, terms - l), std::min(C, width - j)),
                                        columns + j / C * panel + l * C);
            for (int64_t i = quarters.begin * 4, stop; i < end; i = stop) {
                stop = std::min(end, i + kBlocks * R);
                const Matrix next = stop < end ? a.part(stop, k, std::min(kBlocks * R, end - stop), terms)
                                               : b.part(k + terms, begin, std::min(depth, b.rows - k - terms), width);
                multiply(a.part(i, k, stop - i, terms), columns, width, rows, out + i * stride + begin,
                         accumulate || k > 0, next);
            }
        }
    };
    auto member = [&](int index, int size) {
        float* own = packed + index * of_thread;
        for (auto [i, end] = Share(parts * shares, index, size); i < end; ++i)
            unit(Share(panels, i % parts, parts), Share(over(a.rows, 4), i / parts, shares), own, own + of_rows);
    };
    by_a_team(a.rows * b.columns * a.columns, parts * shares, threads, member);
}

// Whether there is nothing to multiply; a sum of no terms is 0.
bool nothing_to_multiply(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, bool accumulate) {
    if (a.columns == 0 && !accumulate)
        for (int64_t i = 0; i < a.rows; ++i) std::fill_n(out + i * out_stride, b.columns, 0.0f);
    return a.rows == 0 || b.columns == 0 || a.columns == 0;
}

}  // namespace

bool products_pay() {
#if defined(BRFT_X86_DISPATCH)
    // Measured on Zen 4, AMD's family 25 with AVX-512, against oneMKL (docs/performance.md), and nowhere else.
    static const bool measured = [] {
        unsigned version = 0, unused = 0;
        __get_cpuid(1, &version, &unused, &unused, &unused);  // takes microseconds in a virtual machine
        return __builtin_cpu_is("amd") && (version >> 8 & 0xF) + (version >> 20 & 0xFF) == 25;
    }();
    return measured && &kernels() == &kernels_avx512;
#else
    return false;
#endif
}

void product_of_few_rows(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, bool accumulate,
                         int threads) {
    const int64_t rows = kernels().product->rows, blocks = over(a.rows, rows);
    if (b.rows * b.columns <= kPacked && blocks >= 2 * threads)
        return product_of_many_rows(a, b, out, out_stride, accumulate, threads);
    if (nothing_to_multiply(a, b, out, out_stride, accumulate)) return;
    for (int64_t i = 0; i < a.rows; i += kMost)
        few_rows(a.part(i, 0, std::min(kMost, a.rows - i), a.columns), b, out + i * out_stride, out_stride, accumulate,
                 std::max(1, threads));
}

void product_of_many_rows(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, bool accumulate,
                          int threads) {
    if (nothing_to_multiply(a, b, out, out_stride, accumulate)) return;
    many_rows(a, b, out, out_stride, accumulate, std::max(1, threads));
}

}  // namespace bandit_rft::cpu
