#include "products.h"

#include <algorithm>
#include <cstdlib>
#include <new>

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
constexpr int64_t kPacked = 512 << 10;  // floats of the operand that is packed once: 2 MiB
constexpr int64_t kBlocks = 10;         // of a's rows, at most, that a thread packs together and takes through all of b
constexpr int64_t kMost = kPacked / kDepth;  // rows of a, or columns of b, of which a stretch fits that

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

// The same of what will be read of the next blocks, a [some, depth], where they are one stretch of memory, or each of
// their columns is.
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

// Whether a tile may read the rows of a where they are: they are read side by side, and their lines must not all lie in
// the same sets of the first cache.
bool lies_well(const Matrix& a, int64_t rows) {
    constexpr int64_t kSets = 64, kWays = 8, kLineFloats = 16;
    if (a.row_step == 1) return false;
    if (a.row_step % kLineFloats) return true;
    int64_t sets = 1;
    while (a.row_step / kLineFloats * sets % kSets) ++sets;
    return over(rows, sets) <= kWays / 2;
}

// product_of_many_rows for columns that are packed together.
void many_rows(const Matrix& a, const Matrix& b, float* out, int64_t stride, bool accumulate, int threads) {
    const ProductKernels& kernel = *kernels().product;
    const int64_t R = kernel.rows, C = kernel.columns, panels = over(b.columns, C);
    const int64_t depth = packed_depth(b.columns, a.columns), block = depth * R + kSlack, panel = depth * C + kSlack;
    const int64_t most = std::max<int64_t>(1, kBlocks * kDepth / std::max(depth, kDepth));
    const int64_t together = std::min(most, over(a.rows, R));
    float *packed = packing(panels * panel + threads * together * block), *of_threads = packed + panels * panel;
    const bool direct = lies_well(a, R);
    Barrier barrier;
    auto member = [&](int index, int size) {
        float* rows = of_threads + index * together * block;
        const Share quarters(over(a.rows, 4), index, size);  // a tile computes 4 rows at least
        const int64_t end = std::min(quarters.end * 4, a.rows);
        for (int64_t k = 0; k < a.columns; k += depth) {
            const int64_t terms = std::min(depth, a.columns - k);
            barrier.wait(size);  // nobody reads the terms before any more
            // Both are read in the order of their memory: a few of the terms at a time where those are rows of it.
            const int64_t of_b = b.column_step == 1 ? kTerms : terms, of_a = a.row_step == 1 ? kTerms : terms;
            for (auto [piece, last] = Share(over(terms, of_b) * panels, index, size); piece < last; ++piece) {
                const int64_t l = piece / panels * of_b, p = piece % panels;
                kernel.pack_columns(b.part(k + l, p * C, std::min(of_b, terms - l), std::min(C, b.columns - p * C)),
                                    packed + p * panel + l * C);
            }
            barrier.wait(size);
            for (int64_t first = quarters.begin * 4; first < end; first += together * R) {
                const int64_t count = over(std::min(together * R, end - first), R);
                const auto blocks = [&](int64_t i) {
                    return a.part(first + i * R, k, std::min(R, end - first - i * R), terms);
                };
                for (int64_t l = 0; l < terms; l += of_a)
                    for (int64_t i = 0; i < count; ++i)
                        if (!direct || blocks(i).rows < R)
                            kernel.pack_rows(blocks(i).part(0, l, blocks(i).rows, std::min(of_a, terms - l)),
                                             rows + i * block + l * R);
                const int64_t after = first + count * R;
                const Matrix next = a.part(after, k, std::min(together * R, end - after), terms);
                const int64_t pieces = over(terms, kDepth) * panels * count;
                int64_t piece = 0;
                for (int64_t l = 0; l < terms; l += kDepth)
                    for (int64_t p = 0; p < panels; ++p)
                        for (int64_t i = 0; i < count; ++i, ++piece) {
                            Matrix of_tile = blocks(i);
                            if (!direct || of_tile.rows < R) of_tile = {rows + i * block, of_tile.rows, terms, 1, R};
                            kernel.tile(of_tile.part(0, l, of_tile.rows, std::min(kDepth, terms - l)),
                                        packed + p * panel + l * C, out + (first + i * R) * stride + p * C, stride,
                                        int(std::min(C, b.columns - p * C)), accumulate || k + l > 0,
                                        next_blocks(next, piece, pieces));
                        }
            }
        }
    };
    by_a_team(a.rows * b.columns * a.columns, over(a.rows, R), threads, member);
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
    if (b.rows * b.columns <= kPacked && blocks >= 2 * threads && lies_well(a, rows))  // then only b is packed
        return product_of_many_rows(a, b, out, out_stride, accumulate, threads);
    if (nothing_to_multiply(a, b, out, out_stride, accumulate)) return;
    for (int64_t i = 0; i < a.rows; i += kMost)
        few_rows(a.part(i, 0, std::min(kMost, a.rows - i), a.columns), b, out + i * out_stride, out_stride, accumulate,
                 std::max(1, threads));
}

void product_of_many_rows(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, bool accumulate,
                          int threads) {
    if (nothing_to_multiply(a, b, out, out_stride, accumulate)) return;
    for (int64_t j = 0; j < b.columns; j += kMost)
        many_rows(a, b.part(0, j, b.rows, std::min(kMost, b.columns - j)), out + j, out_stride, accumulate,
                  std::max(1, threads));
}

}  // namespace bandit_rft::cpu
