// Weight normalization at the memory's speed: what `slm/weight_norm.py` does to a large matrix.
//
// A matrix is read from memory once: its vectors are measured and, while the caches still hold
// them, divided by their norms. Rows and columns are read as they lie, for memory likes nothing
// else.

#include <algorithm>
#include <cmath>
#include <memory>

#include <omp.h>

// How far ahead of its use memory is asked for: 8 KB.
constexpr long AHEAD = 2048;
// A cache line.
constexpr long LINE = 16;
// What of a matrix a core's own cache keeps between measuring and dividing: 512 KB.
constexpr long KEPT = 131072;

namespace {

float scale(float square, float smallest_norm)
{
    return 1 / std::max(std::sqrt(square), smallest_norm);
}

// sums[c] += the squares of `num_rows` rows, four at a time.
void add_squares(const float *rows, long num_rows, long stride, long num_columns, float *sums)
{
    for (; num_rows >= 4; num_rows -= 4, rows += 4 * stride) {
        const float *a = rows, *b = a + stride, *c = b + stride, *d = c + stride;
#pragma omp simd
        for (long i = 0; i < num_columns; i++)
            sums[i] += a[i] * a[i] + b[i] * b[i] + c[i] * c[i] + d[i] * d[i];
    }
    for (; num_rows > 0; num_rows--, rows += stride)
#pragma omp simd
        for (long i = 0; i < num_columns; i++)
            sums[i] += rows[i] * rows[i];
}

} // namespace

extern "C" {

// Rows of weight [num_rows, num_columns].
void unit_rows(float *weight, long num_rows, long num_columns, float smallest_norm, int num_threads)
{
#pragma omp parallel for num_threads(num_threads)
    for (long r = 0; r < num_rows; r++) {
        float *row = weight + r * num_columns;
        float square = 0;
#pragma omp simd reduction(+ : square)
        for (long i = 0; i < num_columns; i++)
            square += row[i] * row[i];
        const float by = scale(square, smallest_norm);
#pragma omp simd
        for (long i = 0; i < num_columns; i++)
            row[i] *= by;
        for (long i = 0; i < num_columns; i += LINE)
            __builtin_prefetch(row + AHEAD + i, 1);
    }
}

// Columns of weight [num_rows, num_columns]. Each thread has a share of the rows; the shares' sums
// are added in their order, so that the result is the same each time.
void unit_columns(float *weight, long num_rows, long num_columns, float smallest_norm, int num_threads)
{
    const long kept = std::max(LINE, num_threads * KEPT / num_rows / LINE * LINE);
    const long band = std::min(num_columns, kept);
    const std::unique_ptr<float[]> sums(new float[num_threads * band]);
#pragma omp parallel num_threads(num_threads)
    {
        // Of whom there may be fewer than were asked for.
        const int num_shares = omp_get_num_threads();
        const int thread = omp_get_thread_num();
        const long begin = num_rows * thread / num_shares;
        const long end = num_rows * (thread + 1) / num_shares;
        const std::unique_ptr<float[]> by(new float[band]);
        for (long first = 0; first < num_columns; first += band) {
            const long width = std::min(band, num_columns - first);
            float *share = weight + begin * num_columns + first;
            float *own = sums.get() + thread * band;
            std::fill_n(own, width, 0.0f);
            add_squares(share, end - begin, num_columns, width, own);
#pragma omp barrier
            std::copy_n(sums.get(), width, by.get());
            for (int other = 1; other < num_shares; other++)
                for (long i = 0; i < width; i++)
                    by[i] += sums[other * band + i];
            for (long i = 0; i < width; i++)
                by[i] = scale(by[i], smallest_norm);
            for (long r = 0; r < end - begin; r++)
#pragma omp simd
                for (long i = 0; i < width; i++)
                    share[r * num_columns + i] *= by[i];
#pragma omp barrier
        }
    }
}

}
