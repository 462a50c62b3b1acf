// The op with given gates, for few ranks, all of which a token uses; and MoRE's gate, whose few dozen numbers are not
// worth a launch each. `given.py` and `tasks.py` beside it call it.
//
// With few ranks all of A and B fits into the caches. A block of tokens is taken through all of a pass at once, so that
// dy, which backward needs twice, comes from memory once; threads share the tokens, and add up what they have for A and
// B in the end. The order of every sum depends on the number of threads alone.

#pragma once

#include <algorithm>

#include "native_tiles.h"

namespace {

constexpr int BLOCK = 32;  // tokens that a pass over given gates takes at a time
constexpr int FEW_RANKS = 16;  // the most that it takes

// The rows of a token that uses all ranks.
struct Ranks {
    int32_t all[FEW_RANKS];
    Ranks() {
        for (int j = 0; j < FEW_RANKS; j++) all[j] = j;
    }
};

// What the rank scaling multiplies rank j with, for a task that uses ranks 0 … top.
inline float task_scale(int64_t j, int64_t top, int64_t num_ranks, int64_t num_tasks, int64_t scaling) {
    const float share = float(j + 1) / num_ranks;
    return scaling == 1 ? float(top + 1) / num_tasks : scaling == 2 ? share * share : 1.0f;
}

}  // namespace

extern "C" {

// The op with given gates, for few ranks: all tokens use ranks 1 … m of r. `gates` is (G, m), a row for N / G tokens in
// turn; null: all are 1. The calls' num_experts is m, their factor the scale.

// projections (N, m) in float32. scratch: 4 bytes each of m · COLUMNS · (⌈d_in / COLUMNS⌉ + ⌈d_out / COLUMNS⌉)
void rank_experts_given_forward(CALL, const void *x, const void *A, const void *B, const float *gates,
                                int64_t num_gates, void *y, float *projections, float *scratch) {
    const Call s = CALLED;
    const Tensor tensor_x = s.tensor(x, 16), tensor_y = s.tensor(y, 32);
    const Tensor tensor_A = s.tensor(A, 64), tensor_B = s.tensor(B, 128);
    const int m = int(num_experts);
    const int64_t tiles_in = num_tiles(d_in), tiles_out = num_tiles(d_out), step = m * COLUMNS;
    const int64_t rows = num_tokens / num_gates;
    float *packed_A = scratch, *packed_B = packed_A + tiles_in * step;
    const Ranks ranks;
#pragma omp parallel num_threads(int(threads))
    {
        const int self = thread(), team = team_size();
        for (int64_t t = self; t < tiles_in; t += team) pack(tensor_A, m, d_in, t, packed_A + t * step);
        for (int64_t t = self; t < tiles_out; t += team)
            pack_transposed(tensor_B, m, num_ranks, d_out, t, packed_B + t * step);
        int64_t first, last;
        split(num_tokens, self, team, first, last);
#pragma omp barrier
        for (int64_t start = first; start < last; start += BLOCK) {
            const int64_t count = last - start < BLOCK ? last - start : BLOCK;
            float u[BLOCK * FEW_RANKS], *own = projections + start * m;
            std::memset(own, 0, count * m * sizeof(float));
            tensor_x.typed([&](auto *src) {
                for (int64_t t = 0; t < tiles_in; t++)
                    dots(src + start * d_in + t * COLUMNS, d_in, width_of(t, d_in), 0, count, ranks.all, 0, m,
                         packed_A + t * step, own);
            });
            for (int64_t n = 0; n < count; n++) {
                const float *gate = gates ? gates + (start + n) / rows * m : nullptr;
                for (int j = 0; j < m; j++) u[n * m + j] = own[n * m + j] * float(factor) * (gate ? gate[j] : 1.0f);
            }
            tensor_y.typed([&](auto *dst) {
                for (int64_t t = 0; t < tiles_out; t++)
                    axpys(dst + start * d_out + t * COLUMNS, false, d_out, width_of(t, d_out), 0, count, ranks.all, 0, m,
                          u, packed_B + t * step);
            });
        }
    }
}

// x is what A read. dx may hold the base layer's share of the gradient; what it holds is lost where `fresh`. dx, dA
// (r, d_in), dB (d_out, r), of their matrices' types, and dgates (G, m) are null where they are not needed.
// scratch: 4 bytes each of m · COLUMNS · (⌈d_in / COLUMNS⌉ + ⌈d_out / COLUMNS⌉) · (1 + threads) + N · m
void rank_experts_given_backward(CALL, const void *dy, const void *x, const void *A, const void *B, const float *gates,
                                 int64_t num_gates, const float *projections, void *dx, int64_t fresh, void *dA,
                                 void *dB, float *dgates, float *scratch) {
    const Call s = CALLED;
    const Tensor tensor_dy = s.tensor(dy, 32), tensor_x = s.tensor(x, 16);
    const Tensor tensor_A = s.tensor(A, 64), tensor_B = s.tensor(B, 128);
    const Tensor gradient_A = s.tensor(dA, 64), gradient_B = s.tensor(dB, 128);
    const int m = int(num_experts);
    const int64_t tiles_in = num_tiles(d_in), tiles_out = num_tiles(d_out), step = m * COLUMNS;
    const int64_t size = (tiles_in + tiles_out) * step, rows = num_tokens / num_gates;
    float *packed_A = scratch, *packed_B = packed_A + tiles_in * step, *parts = scratch + size;
    float *products = parts + threads * size;
    const Ranks ranks;
#pragma omp parallel num_threads(int(threads))
    {
        const int self = thread(), team = team_size();
        for (int64_t t = self; t < tiles_in; t += team) pack(tensor_A, m, d_in, t, packed_A + t * step);
        for (int64_t t = self; t < tiles_out; t += team)
            pack_transposed(tensor_B, m, num_ranks, d_out, t, packed_B + t * step);
        float *own_A = parts + self * size, *own_B = own_A + tiles_in * step;
        std::memset(own_A, 0, size * sizeof(float));
        int64_t first, last;
        split(num_tokens, self, team, first, last);
#pragma omp barrier
        // A block's rows of dy are read twice, and stay in the caches in between.
        for (int64_t start = first; start < last; start += BLOCK) {
            const int64_t count = last - start < BLOCK ? last - start : BLOCK;
            const float *projection = projections + start * m;
            float u[BLOCK * FEW_RANKS], du[BLOCK * FEW_RANKS] = {}, weights[BLOCK * FEW_RANKS];
            for (int64_t n = 0; n < count; n++) {
                const float *gate = gates ? gates + (start + n) / rows * m : nullptr;
                for (int j = 0; j < m; j++) {
                    weights[n * m + j] = float(factor) * (gate ? gate[j] : 1.0f);
                    u[n * m + j] = projection[n * m + j] * weights[n * m + j];
                }
            }
            tensor_dy.typed([&](auto *src) {
                for (int64_t t = 0; t < tiles_out; t++) {
                    const auto *from = src + start * d_out + t * COLUMNS;
                    const int width = width_of(t, d_out);
                    dots(from, d_out, width, 0, count, ranks.all, 0, m, packed_B + t * step, du);
                    if (dB) outers(from, d_out, width, count, ranks.all, 0, m, u, own_B + t * step);
                }
            });
            for (int64_t i = 0; i < count * m; i++) {
                products[start * m + i] = du[i] * projection[i];
                du[i] *= weights[i];
            }
            tensor_x.typed([&](auto *src) {
                using T = std::remove_pointer_t<decltype(src)>;
                for (int64_t t = 0; t < tiles_in; t++) {
                    const int64_t place = start * d_in + t * COLUMNS;
                    const int width = width_of(t, d_in);
                    if (dx)
                        axpys((T *)dx + place, fresh, d_in, width, 0, count, ranks.all, 0, m, du, packed_A + t * step);
                    if (dA) outers(src + place, d_in, width, count, ranks.all, 0, m, du, own_A + t * step);
                }
            });
        }
#pragma omp barrier
        for (int64_t t = self; t < tiles_in + tiles_out; t += team) {
            float *total = parts + t * step;
            for (int part = 1; part < team; part++)
                for (int64_t i = 0; i < step; i += LANES)
                    store(total + i, load(total + i) + load(total + part * size + i));
        }
#pragma omp barrier
        if (dA)
            gradient_A.typed([&](auto *to) {
                for (int64_t row = self; row < num_ranks; row += team)
                    for (int64_t c = 0; c < d_in; c++)
                        put(to + row * d_in + c,
                            row < m ? parts[c / COLUMNS * step + row * COLUMNS + c % COLUMNS] : 0.0f);
            });
        if (dB)
            gradient_B.typed([&](auto *to) {
                const float *total = parts + tiles_in * step;
                split(d_out, self, team, first, last);
                for (int64_t c = first; c < last; c++)
                    for (int64_t row = 0; row < num_ranks; row++)
                        put(to + c * num_ranks + row,
                            row < m ? total[c / COLUMNS * step + row * COLUMNS + c % COLUMNS] : 0.0f);
            });
        for (int64_t g = self; dgates && g < num_gates; g += team) {
            for (int j = 0; j < m; j++) {
                double total = 0;
                for (int64_t n = g * rows; n < (g + 1) * rows; n++) total += products[n * m + j];
                dgates[g * m + j] = float(total * factor);
            }
        }
    }
}

// MoRE's gate, see `routing.TaskGate`: embedding (T, e), weight (r, e) and bias (r), of bfloat16 where `narrow`, to
// probabilities (G, r), best (G), the chosen ranks less one, and gates (G, m) in the place of (G, r). scaling: 0 none,
// 1 linear, 2 quadratic. Returns m, how many ranks are used at most, or −1 where a task does not exist.
int64_t rank_experts_task_gates(int64_t num_gates, int64_t num_ranks, int64_t num_tasks, int64_t scaling, int64_t dim,
                                int64_t narrow, const int64_t *task_ids, const void *embedding, const void *weight,
                                const void *bias, float *probabilities, int64_t *best, float *gates) {
    std::vector<int64_t> rows(num_tasks, -1);  // where a task's row is computed already
    int64_t used = 0;
    for (int64_t g = 0; g < num_gates; g++) {
        const int64_t task = task_ids[g];
        if (task < 0 || task >= num_tasks) return -1;
        float *p = probabilities + g * num_ranks, *gate = gates + g * num_ranks;
        if (rows[task] >= 0) {
            best[g] = best[rows[task]];
            std::memcpy(p, probabilities + rows[task] * num_ranks, num_ranks * sizeof(float));
            std::memcpy(gate, gates + rows[task] * num_ranks, num_ranks * sizeof(float));
            continue;
        }
        rows[task] = g;
        Tensor{(void *)embedding, narrow != 0}.typed([&](auto *e) {
            const auto *w = (decltype(e))weight, *c = (decltype(e))bias;
            for (int64_t j = 0; j < num_ranks; j++) p[j] = widen(c[j]) + dot(e + task * dim, w + j * dim, dim);
        });
        // As torch.argmax: the lowest index among equals, and a NaN is the largest.
        int64_t top = 0;
        for (int64_t j = 1; j < num_ranks && p[top] == p[top]; j++)
            if (p[j] > p[top] || p[j] != p[j]) top = j;
        const float largest = p[top];
        float total = 0;
        for (int64_t j = 0; j < num_ranks; j++) total += p[j] = std::exp(p[j] - largest);
        for (int64_t j = 0; j < num_ranks; j++) p[j] /= total;
        for (int64_t j = 0; j < num_ranks; j++)
            gate[j] = (j <= top) * (1 + (p[top] - p[top])) * task_scale(j, top, num_ranks, num_tasks, scaling);
        best[g] = top;
        used = top + 1 > used ? top + 1 : used;
    }
    for (int64_t g = 1; g < num_gates; g++) std::memmove(gates + g * used, gates + g * num_ranks, used * sizeof(float));
    return used;
}

// From dgates (G, m) to the gradients of embedding, weight and bias, each null where it is not needed.
void rank_experts_task_gates_backward(int64_t num_gates, int64_t num_ranks, int64_t num_tasks, int64_t scaling,
                                      int64_t dim, int64_t narrow, int64_t m, const int64_t *task_ids,
                                      const void *embedding, const void *weight, const float *dgates,
                                      const float *probabilities, const int64_t *best, void *dembedding,
                                      void *dweight, void *dbias) {
    // The rows of one task are the same, so that the gradients of their logits may be added up first.
    std::vector<float> dlogits(num_tasks * num_ranks);
    for (int64_t g = 0; g < num_gates; g++) {
        const float *p = probabilities + g * num_ranks;
        const int64_t top = best[g];
        float chosen = 0;
        for (int64_t j = 0; j <= top; j++)
            chosen += dgates[g * m + j] * task_scale(j, top, num_ranks, num_tasks, scaling);
        float *own = dlogits.data() + task_ids[g] * num_ranks;
        for (int64_t j = 0; j < num_ranks; j++) own[j] += chosen * p[top] * ((j == top) - p[j]);
    }
    std::vector<float> row(dim);
    // row = Σ of `count` rows of a matrix, each times its own number; where a number is 0 its row is left out.
    auto combine = [&](const auto *matrix, const float *numbers, int64_t stride, int64_t count) {
        std::fill(row.begin(), row.end(), 0.0f);
        for (int64_t k = 0; k < count; k++) {
            const float c = numbers[k * stride];
            for (int64_t i = 0; c != 0 && i < dim; i++) row[i] += c * widen(matrix[k * dim + i]);
        }
    };
    Tensor{(void *)embedding, narrow != 0}.typed([&](auto *e) {
        auto *w = (decltype(e))weight, *de = (decltype(e))dembedding, *dw = (decltype(e))dweight, *dc = (decltype(e))dbias;
        for (int64_t task = 0; de && task < num_tasks; task++) {
            combine(w, dlogits.data() + task * num_ranks, 1, num_ranks);
            for (int64_t i = 0; i < dim; i++) put(de + task * dim + i, row[i]);
        }
        for (int64_t j = 0; j < num_ranks; j++) {
            float total = 0;
            for (int64_t task = 0; task < num_tasks; task++) total += dlogits[task * num_ranks + j];
            if (dc) put(dc + j, total);
            if (!dw) continue;
            combine(e, dlogits.data() + j, num_ranks, num_tasks);
            for (int64_t i = 0; i < dim; i++) put(dw + j * dim + i, row[i]);
        }
    });
}
}
