// A few tokens without gradients, in one call after the base layer: the router's product too, and no packing.

#pragma once

#include "native_gate.h"

namespace {

// All that decoding takes. indices may be null.
struct DecodeCall : Call {
    const void *x, *A, *B, *weight;
    const float *bias;
    void *y;
    int64_t *indices;
};

// The sum of each of LANES vectors.
inline Floats sums(const Floats *v) {
    Floats found;
#ifdef __AVX512F__
    __m512 pairs[8], fours[4];
    for (int i = 0; i < 8; i++) {
        __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    auto fold = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    };
    found = (Floats)fold(fold(fours[0], fours[1]), fold(fours[2], fours[3]));
#else
    for (int i = 0; i < LANES; i++) found[i] = sum(v[i]);
#endif
    return found;
}

// out[i · TOKENS + n] = rows[i] · x[n, :] for LANES = ROWS · TOKENS pairs
template <class T, int ROWS>
inline Floats block_of_dots(const T *const *rows, const float *x, int64_t x_stride, int64_t d) {
    constexpr int TOKENS = LANES / ROWS;
    Floats total[LANES] = {};
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) {
        Floats v[TOKENS];
        for (int n = 0; n < TOKENS; n++) v[n] = load(x + n * x_stride + c);
        for (int i = 0; i < ROWS; i++) {
            Floats w = load(rows[i] + c);
            for (int n = 0; n < TOKENS; n++) total[i * TOKENS + n] += w * v[n];
        }
    }
    Floats found = sums(total);
    for (; c < d; c++)
        for (int i = 0; i < ROWS; i++)
            for (int n = 0; n < TOKENS; n++) found[i * TOKENS + n] += widen(rows[i][c]) * x[n * x_stride + c];
    return found;
}

// out[n, row] = matrix[row, :] · x[n, :] for rows first … last of a contiguous matrix. A block that reaches beyond the
// last row or token repeats it.
template <class T>
void few_dots(const T *matrix, int64_t first, int64_t last, const float *x, int64_t x_stride, int64_t num_tokens,
              int64_t d, float *out, int64_t out_stride) {
    const T *rows[LANES];
    float found[LANES];
    int64_t n = 0;
    for (; n + 4 <= num_tokens; n += 4)
        for (int64_t row = first; row < last; row += LANES / 4) {
            for (int i = 0; i < LANES / 4; i++) rows[i] = matrix + (row + i < last ? row + i : last - 1) * d;
            store(found, block_of_dots<T, LANES / 4>(rows, x + n * x_stride, x_stride, d));
            for (int i = 0; i < LANES / 4 && row + i < last; i++)
                for (int t = 0; t < 4; t++) out[(n + t) * out_stride + row + i] = found[i * 4 + t];
        }
    for (; n < num_tokens; n++)
        for (int64_t row = first; row < last; row += LANES) {
            int64_t count = last - row < LANES ? last - row : LANES;
            for (int i = 0; i < LANES; i++) rows[i] = matrix + (i < count ? row + i : last - 1) * d;
            store(found, block_of_dots<T, LANES>(rows, x + n * x_stride, x_stride, d));
            std::memcpy(out + n * out_stride + row, found, count * sizeof(float));
        }
}

// The same for `count` rows anywhere and one token.
template <class T>
void few_dots(const T *const *rows, int64_t count, const float *x, int64_t d, float *out) {
    for (int64_t start = 0; start < count; start += LANES / 2) {
        int64_t here = count - start < LANES / 2 ? count - start : LANES / 2;
        const T *some[LANES / 2];
        float found[LANES];
        for (int i = 0; i < LANES / 2; i++) some[i] = rows[start + (i < here ? i : 0)];
        store(found, block_of_dots<T, LANES / 2>(some, x, 0, d));
        for (int i = 0; i < here; i++) out[start + i] = found[i * 2];
    }
}

}  // namespace

extern "C" {

// All tensors are contiguous.
void rank_experts_decode(const DecodeCall *arguments) {
    const DecodeCall &s = *arguments;
    const Gate gate = gate_of(s);
    const int64_t num_tokens = s.num_tokens, d_in = s.d_in, d_out = s.d_out;
    const int64_t num_ranks = s.num_ranks, num_experts = s.num_experts;
    const int k = int(s.top_k), rho = s.rho();
    // Kept by the thread, so that a call allocates nothing.
    static thread_local std::vector<float> kept;
    static thread_local std::vector<int64_t> order;
    size_t needed = size_t(num_tokens * (d_in + 2 * num_experts + num_ranks + k));
    if (kept.size() < needed) kept.resize(needed);
    if (order.size() < size_t(num_tokens * (num_experts + k))) order.resize(num_tokens * (num_experts + k));
    float *wide = kept.data(), *logits = wide + num_tokens * d_in, *keys = logits + num_tokens * num_experts;
    float *u = keys + num_tokens * num_experts, *weights = u + num_tokens * num_ranks;
    int64_t *places = order.data(), *indices = s.indices ? s.indices : places + num_tokens * num_experts;
    const float *source = wide;
    if (s.flags & 8)
        for (int64_t i = 0; i < num_tokens * d_in; i++) wide[i] = widen(((const bfloat16 *)s.x)[i]);
    else
        source = (const float *)s.x;
    // Waking threads costs some microseconds.
    const int asked = num_tokens * num_experts * d_in < 65536 ? 1 : int(s.threads);
#pragma omp parallel num_threads(asked) if (asked > 1)
    {
        const int self = thread(), team = team_size();
        int64_t first, last;
        split(num_experts, self, team, first, last);
        s.tensor(s.weight, 256).typed([&](auto *matrix) {
            few_dots(matrix, first, last, source, d_in, num_tokens, d_in, logits, num_experts);
        });
#pragma omp barrier
        split(num_tokens, self, team, first, last);
        for (int64_t n = first; n < last; n++) {
            const float *z = logits + n * num_experts;
            float *key = keys + n * num_experts, *own = weights + n * k, *gated = u + n * num_ranks;
            map(z, num_experts, key, [&](Floats v) { return gate.sigmoid ? sigmoid(v) : v; });
            for (int64_t e = 0; e < num_experts; e++) key[e] += s.bias[e];
            gate.select(key, 1, places + n * num_experts, indices + n * k);
            std::memset(gated, 0, num_ranks * sizeof(float));
            float *value = keys + n * num_experts;  // the keys are done with
            for (int j = 0; j < k; j++) value[j] = z[indices[n * k + j]];
            gate.to_values(value, indices + n * k, k, s.bias);
            gate.weigh(value, own);
            s.tensor(s.A, 64).typed([&](auto *matrix) {
                using T = std::remove_pointer_t<decltype(matrix)>;
                const T *rows[LANES];
                float found[LANES];
                for (int start = 0; start < k * rho; start += LANES) {
                    int count = k * rho - start < LANES ? k * rho - start : LANES;
                    for (int i = 0; i < count; i++) {
                        int64_t j = (start + i) / rho, q = (start + i) % rho;
                        rows[i] = matrix + (indices[n * k + j] * rho + q) * d_in;
                    }
                    few_dots(rows, count, source + n * d_in, d_in, found);
                    for (int i = 0; i < count; i++) {
                        int64_t j = (start + i) / rho, q = (start + i) % rho;
                        gated[indices[n * k + j] * rho + q] = found[i] * own[j] * gate.factor;
                    }
                }
            });
        }
#pragma omp barrier
        split(d_out, self, team, first, last);
        s.tensor(s.B, 128).typed([&](auto *matrix) {
            s.tensor(s.y, 32).typed([&](auto *to) {
                using T = std::remove_pointer_t<decltype(matrix)>;
                for (int64_t o = first; o < last; o += LANES) {
                    int count = int(last - o < LANES ? last - o : LANES);
                    const T *rows[LANES];
                    for (int i = 0; i < LANES; i++) rows[i] = matrix + (i < count ? o + i : last - 1) * num_ranks;
                    for (int64_t n = 0; n < num_tokens; n++) {
                        Floats update = block_of_dots<T, LANES>(rows, u + n * num_ranks, 0, num_ranks);
                        auto *place = to + n * d_out + o;
                        if (count == LANES) {
                            store(place, load(place) + update);
                        } else {
                            for (int i = 0; i < count; i++) put(place + i, widen(place[i]) + update[i]);
                        }
                    }
                }
            });
        });
    }
}
}
