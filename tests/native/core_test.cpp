// Every operation, instruction set and dtype of the CPU core over ragged shapes, under the sanitizers. `make sanitize`
// builds and runs it.
#include "core_cases.h"
#include "layer_cases.h"
#include "product_cases.h"

int main() {
    std::mt19937 random(5);
    single_row_case();
    for (int64_t v : {1, 2, 300, 3001}) nothing_finite_case(v);
    for (int64_t v : {1, 2, 255, 257, 2999})
        for (int mix = 1; mix <= 8; ++mix)
            for (int64_t top_k : {0, 1, 40, 400, 2900})  // 2900 of 2999: more than are finite
                for (double top_p : {1.0, std::nextafter(1.0, 0.0), 0.9, 0.3})
                    for (double min_p : {0.0, 0.05}) filter_case(v, mix, top_k, top_p, min_p, random);
    for (const char* isa : {"baseline", "avx2", "avx512"}) {
        try {
            use_instruction_set(isa);
        } catch (const std::invalid_argument&) {
            std::printf("%s: not on this processor\n", isa);
            continue;
        }
        for (const DType dtype : {DType::f32, DType::bf16}) {
            for (const int64_t v : {1, 2, 5, 63, 64, 65, 767, 768, 769, 1537, 3001})
                for (const int64_t n : {1, 3, 200})
                    for (const bool transformed : {false, true}) rows_case(n, v, dtype, transformed, random);
            for (const int64_t b : {0, 1, 2, 3, 4, 8, 9, 16, 17, 33, 70})
                for (const int64_t hidden_size : {1, 255, 257})
                    for (const int64_t v : {1, 7, 8, 11, 12, 16, 100}) head_case(b, hidden_size, v, dtype, random);
        }
        for (const int64_t size : {1, 2, 6, 7, 16, 33, 40, 64})
            for (const int64_t group : {1, 3}) attention_case({31, 1, 40, 65, 0, 2}, group, 2, size, random);
        for (const int64_t head_size : {2, 6, 16, 20})
            for (const int64_t group : {1, 3}) {
                decoder_case(head_size, group, true, false, false, random);
                decoder_case(head_size, group, false, false, false, random);
                decoder_case(head_size, group, false, true, true, random);
            }
        // A model that is worth a second thread, also for few: what one has of a panel, another may be changing.
        decoder_case(64, 2, false, true, true, random, 64, 1200);
        // Three threads have a head each, of whole tiles: they attend without waiting for each other.
        decoder_case(96, 2, true, false, false, random, 64, 1200);
        for (const int64_t size : {1, 7, 16, 33, 128})
            for (const int64_t rows : {0, 1, 9, 300}) norm_case(rows, size, 3, random);
        norm_case(3000, 96, 3, random);
        norm_case(200, 300, 3, random);
        norm_case(3, 20000, 3, random);
        for (const int64_t count : {0, 1, 15, 17, 8192, 100001}) gated_silu_case(count, 3, random);
        for (const int64_t m : {0, 1, 4, 5, 12, 13, 25, 130})
            for (const int64_t n : {1, 15, 32, 33})
                for (const int64_t k : {0, 1, 16, 31, 385})
                    for (int way = 0; way < 8; ++way)
                        product_case(m, n, k, way & 1, way & 2, way & 4 ? 3 : 0, 1 + way % 3, random);
        product_case(1400, 3, 400, false, true, 0, 2, random);  // more rows, and more terms, than are packed together
        product_case(40, 3, 2000, true, false, 0, 3, random);
        for (const bool transposed : {false, true}) {  // enough for three threads, with many columns and with few
            product_case(130, 300, 400, transposed, !transposed, 0, 3, random);
            product_case(900, 40, 400, transposed, transposed, 3, 3, random);
            product_case(900, 40, 1024, transposed, transposed, 0, 2, random);  // rows in the same sets of the cache
        }
        product_case(30, 1400, 400, true, false, 5, 3, random);
        product_case(20, 1000, 400, true, false, 0, 3, random);    // columns are shared out, too
        product_case(100, 1400, 100, false, false, 0, 2, random);  // more columns than a thread packs together
        product_case(1024, 40, 400, true, false, 0, 3, random);    // columns in the same sets of the second cache
        std::printf("%s: fine\n", isa);
    }
    std::printf("%d passed, 0 failed\n", checks);
    return 0;
}
