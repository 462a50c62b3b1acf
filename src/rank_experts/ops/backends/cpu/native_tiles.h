// What the native kernels are made of: vectors, tiles of matrices, and the three loops over tokens.
//
// A matrix M (A, W_g or Bᵀ, rows of d numbers) is packed into tiles of COLUMNS numbers of all rows, so that a tile
// stays in the first-level cache while all tokens pass by. Whatever the dtype of the tensors, the arithmetic is float32.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 8;  // of 32 registers, 8 hold a token's tile and 8 its gradient's
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 4;
#else
constexpr int LANES = 4, VECTORS = 8;
#endif
constexpr int COLUMNS = LANES * VECTORS;
constexpr int AHEAD = 4;  // tokens to prefetch

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct bfloat16 {
    uint16_t bits;
};

inline Floats load(const float *p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float *p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline Floats load(const bfloat16 *p) {
    Halves half;
    std::memcpy(&half, p, sizeof half);
    Words words = __builtin_convertvector(half, Words) << 16;
    return (Floats)words;
}

inline void store(bfloat16 *p, Floats v) {
    Words words = (Words)v;
    Words rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16;  // to nearest, ties to even
    Words nan = (Words)(v != v);
    rounded = (nan & 0x7FC0) | (~nan & rounded);
    Halves half = __builtin_convertvector(rounded, Halves);
    std::memcpy(p, &half, sizeof half);
}

inline float widen(float value) { return value; }

inline float widen(bfloat16 value) {
    uint32_t word = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &word, sizeof wide);
    return wide;
}

inline void put(float *p, float value) { *p = value; }

inline void put(bfloat16 *p, float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    p->bits = value != value ? 0x7FC0 : uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

inline float sum(Floats v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

// Functions of vectors, to some units in the last place; NaN stays NaN.

inline Floats blend(Words mask, Floats yes, Floats no) { return (Floats)((mask & (Words)yes) | (~mask & (Words)no)); }

// e^x for x up to 88: 2^n · e^rest with Cephes' polynomial; 0 below the normal numbers.
inline Floats exponential(Floats x) {
    const Words vanishes = (Words)(x < -87.0f);
    x = blend(vanishes, Floats{}, x);
    const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23, so that n is in the lowest bits
    const Floats n = shifted - 12582912.0f;
    const Floats rest = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    const Floats power = (Floats)(((Words)shifted << 23) + 0x3F800000);
    return blend(vanishes, Floats{}, y * power);
}

// log(1 + t) for t from 0 to 1: twice the series of artanh(t / (2 + t)).
inline Floats log_plus_one(Floats t) {
    const Floats s = t / (t + 2.0f), q = s * s;
    Floats y = q * (2.0f / 15) + 2.0f / 13;
    y = y * q + 2.0f / 11;
    y = y * q + 2.0f / 9;
    y = y * q + 2.0f / 7;
    y = y * q + 2.0f / 5;
    y = y * q + 2.0f / 3;
    return (y * q + 2.0f) * s;
}

inline Floats log_sigmoid(Floats z) {
    const Floats magnitude = (Floats)((Words)z & 0x7FFFFFFF);
    return blend((Words)(z > 0.0f), Floats{}, z) - log_plus_one(exponential(-magnitude));
}

inline Floats sigmoid(Floats z) {
    const Floats t = exponential(-(Floats)((Words)z & 0x7FFFFFFF));
    return blend((Words)(z < 0.0f), t, Floats{} + 1.0f) / (t + 1.0f);
}

// 1 − e^x for x ≤ 0.
inline Floats one_minus_exponential(Floats x) {
    Floats y = x * (1.0f / 40320) + 1.0f / 5040;
    y = y * x + 1.0f / 720;
    y = y * x + 1.0f / 120;
    y = y * x + 1.0f / 24;
    y = y * x + 1.0f / 6;
    y = y * x + 0.5f;
    y = -(y * x + 1.0f) * x;
    return blend((Words)(x < -0.5f), 1.0f - exponential(x), y);
}

// to[i] = f(from[i]), with the same f for every place.
template <class F>
inline void map(const float *from, int64_t count, float *to, F f) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, f(load(from + i)));
    if (i == count) return;
    float rest[LANES] = {};
    std::memcpy(rest, from + i, (count - i) * sizeof(float));
    store(rest, f(load(rest)));
    std::memcpy(to + i, rest, (count - i) * sizeof(float));
}

// One tile of one token, in registers. The last tile of a row may be narrower than COLUMNS.
template <class T>
struct Tile {
    Floats v[VECTORS];

    void read(const T *p, int width) {
        if (width == COLUMNS) {
            for (int i = 0; i < VECTORS; i++) v[i] = load(p + i * LANES);
            return;
        }
        T padded[COLUMNS];
        std::memset(padded, 0, sizeof padded);
        std::memcpy(padded, p, width * sizeof(T));
        for (int i = 0; i < VECTORS; i++) v[i] = load(padded + i * LANES);
    }

    void write(T *p, int width) const {
        if (width == COLUMNS) {
            for (int i = 0; i < VECTORS; i++) store(p + i * LANES, v[i]);
            return;
        }
        T padded[COLUMNS];
        for (int i = 0; i < VECTORS; i++) store(padded + i * LANES, v[i]);
        std::memcpy(p, padded, width * sizeof(T));
    }
};

template <class T>
inline void prefetch(const T *p) {
    for (unsigned i = 0; i < COLUMNS * sizeof(T); i += 64) __builtin_prefetch((const char *)p + i);
}

inline int64_t num_tiles(int64_t d) { return (d + COLUMNS - 1) / COLUMNS; }

inline int width_of(int64_t tile, int64_t d) {
    int64_t left = d - tile * COLUMNS;
    return int(left < COLUMNS ? left : COLUMNS);
}

// A contiguous tensor of either type.
struct Tensor {
    void *data;
    bool narrow;

    // Calls f with the data in its own type.
    template <class F>
    void typed(F f) const {
        narrow ? f((bfloat16 *)data) : f((float *)data);
    }
};

// Tile number t of a matrix (rows, d).
void pack(const Tensor &matrix, int64_t rows, int64_t d, int64_t t, float *tile) {
    const int width = width_of(t, d);
    matrix.typed([&](auto *data) {
        for (int64_t row = 0; row < rows; row++) {
            const auto *from = data + row * d + t * COLUMNS;
            float *to = tile + row * COLUMNS;
            for (int c = 0; c < width; c++) to[c] = widen(from[c]);
            for (int c = width; c < COLUMNS; c++) to[c] = 0;
        }
    });
}

// Tile number t of the transpose of the first `rows` columns of a matrix (d, stride).
void pack_transposed(const Tensor &matrix, int64_t rows, int64_t stride, int64_t d, int64_t t, float *tile) {
    const int width = width_of(t, d);
    matrix.typed([&](auto *data) {
        const auto *from = data + t * COLUMNS * stride;
        // By blocks of LANES rows, whose numbers in one column are neighbours in memory.
        for (int64_t start = 0; start < rows; start += LANES) {
            const int count = int(rows - start < LANES ? rows - start : LANES);
            for (int c = 0; c < width; c++)
                for (int i = 0; i < count; i++) tile[(start + i) * COLUMNS + c] = widen(from[c * stride + start + i]);
            for (int i = 0; i < count; i++)
                for (int c = width; c < COLUMNS; c++) tile[(start + i) * COLUMNS + c] = 0;
        }
    });
}

// out[n, j] += src[n, :] · tile[rows[n, j], :]
template <class T>
void dots(const T *src, int64_t d, int width, int64_t first, int64_t last, const int32_t *rows, int rows_stride,
          int m, const float *tile, float *out) {
    for (int64_t n = first; n < last; n++) {
        Tile<T> x;
        x.read(src + n * d, width);
        if (n + AHEAD < last) prefetch(src + (n + AHEAD) * d);
        for (int j = 0; j < m; j++) {
            const float *row = tile + int64_t(rows[n * rows_stride + j]) * COLUMNS;
            Floats total = x.v[0] * load(row);
            for (int i = 1; i < VECTORS; i++) total += x.v[i] * load(row + i * LANES);
            out[n * m + j] += sum(total);
        }
    }
}

// dst[n, :] += Σ_j coefficients[n, j] · tile[rows[n, j], :]; what dst held is lost where `fresh`
template <class T>
void axpys(T *dst, bool fresh, int64_t d, int width, int64_t first, int64_t last, const int32_t *rows, int rows_stride,
           int m, const float *coefficients, const float *tile) {
    for (int64_t n = first; n < last; n++) {
        Tile<T> y;
        if (fresh)
            for (int i = 0; i < VECTORS; i++) y.v[i] = Floats{};
        else
            y.read(dst + n * d, width);
        if (n + AHEAD < last) prefetch(dst + (n + AHEAD) * d);
        for (int j = 0; j < m; j++) {
            const float *row = tile + int64_t(rows[n * rows_stride + j]) * COLUMNS;
            float c = coefficients[n * m + j];
            for (int i = 0; i < VECTORS; i++) y.v[i] += c * load(row + i * LANES);
        }
        y.write(dst + n * d, width);
    }
}

// gradient[rows[n, j], :] += coefficients[n, j] · src[n, :]
template <class T>
void outers(const T *src, int64_t d, int width, int64_t num_tokens, const int32_t *rows, int rows_stride, int m,
            const float *coefficients, float *gradient) {
    for (int64_t n = 0; n < num_tokens; n++) {
        Tile<T> x;
        x.read(src + n * d, width);
        if (n + AHEAD < num_tokens) prefetch(src + (n + AHEAD) * d);
        for (int j = 0; j < m; j++) {
            float *row = gradient + int64_t(rows[n * rows_stride + j]) * COLUMNS, c = coefficients[n * m + j];
            for (int i = 0; i < VECTORS; i++) store(row + i * LANES, load(row + i * LANES) + c * x.v[i]);
        }
    }
}

template <class T>
inline float dot(const T *a, const T *b, int64_t d) {
    Floats total{};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) total += load(a + i) * load(b + i);
    float found = sum(total);
    for (; i < d; i++) found += widen(a[i]) * widen(b[i]);
    return found;
}

inline int thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// How many threads share the work, which may be fewer than were asked for.
inline int team_size() {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

inline void split(int64_t count, int part, int parts, int64_t &first, int64_t &last) {
    first = count * part / parts;
    last = count * (part + 1) / parts;
}

// What is the same for all calls. flags: 1 sigmoid, 2 biased, 4 the saved indices are bytes; bfloat16: 8 x, 16 the
// dropped x, 32 y and dy, 64 A, 128 B, 256 W_g, 1024 the kept projections; 512: the kept values are float16.
struct Call {
    int64_t num_tokens, d_in, d_out, num_ranks, num_experts, top_k, flags, threads;
    double factor;  // k · s

    int rho() const { return int(num_ranks / num_experts); }
    Tensor tensor(const void *data, int64_t flag) const { return Tensor{(void *)data, (flags & flag) != 0}; }
};

#define CALL                                                                                                   \
    int64_t num_tokens, int64_t d_in, int64_t d_out, int64_t num_ranks, int64_t num_experts, int64_t top_k,    \
        int64_t flags, int64_t threads, double factor
#define CALLED {num_tokens, d_in, d_out, num_ranks, num_experts, top_k, flags, threads, factor}

}  // namespace
