// The token gate's op on a CPU, multiplying only the chosen ranks.
//
// What `backends/pytorch.py` does with dense products over all r ranks, this does over the k chosen ones: forward is
// select → x·Aᵀ at the chosen rows → gates → y += u·Bᵀ; backward is dy·B and dB tile by tile of dy, the gate's
// derivative, and dx, dA, dW_g tile by tile of x. The router's x·W_gᵀ, which needs all experts, stays a matrix product
// of the caller's. Threads share the tokens where tokens are written, and the tiles where matrices are; the order of
// every sum depends on the number of threads alone.
//
// A plain C interface, so that compiling needs no headers of PyTorch's. `token.py` beside it calls it.

#include "native_decode.h"
#include "native_given.h"
#include "native_logits.h"

namespace {

// What backward does with one input of the adapter: its gradient, and those of the one or two matrices that it met.
struct Side {
    Tensor src, dst;  // (N, d), of one type; dst.data null: no gradient
    int64_t d;
    int num_matrices;
    Tensor matrices[2];  // (rows, d)
    int64_t rows[2];
    Tensor gradients[2];  // data null: none
};

void backward_of_side(const Side &side, bool fresh, int64_t num_tokens, int self, int threads, const int32_t *rows,
                      int m, const float *coefficients, float *tile) {
    const int64_t num_rows = side.rows[0] + (side.num_matrices > 1 ? side.rows[1] : 0);
    float *gradient = side.gradients[0].data || side.gradients[1].data ? tile + num_rows * COLUMNS : nullptr;
    if (!gradient && !side.dst.data) return;
    for (int64_t t = self; t < num_tiles(side.d); t += threads) {
        const int64_t start = t * COLUMNS;
        const int width = width_of(t, side.d);
        float *to = tile;
        for (int i = 0; side.dst.data && i < side.num_matrices; to += side.rows[i++] * COLUMNS)
            pack(side.matrices[i], side.rows[i], side.d, t, to);
        if (gradient) std::memset(gradient, 0, num_rows * COLUMNS * sizeof(float));
        side.src.typed([&](auto *src) {
            using T = std::remove_pointer_t<decltype(src)>;
            // One after the other, so that of tile and gradient only one must find room in the cache.
            if (side.dst.data)
                axpys((T *)side.dst.data + start, fresh, side.d, width, 0, num_tokens, rows, m, m, coefficients, tile);
            if (gradient) outers(src + start, side.d, width, num_tokens, rows, m, m, coefficients, gradient);
        });
        const float *from = gradient;
        for (int i = 0; gradient && i < side.num_matrices; i++)
            side.gradients[i].typed([&](auto *to) {
                Tile<std::remove_pointer_t<decltype(to)>> made;
                for (int64_t row = 0; row < side.rows[i]; row++, from += COLUMNS) {
                    for (int v = 0; v < VECTORS; v++) made.v[v] = load(from + v * LANES);
                    if (to) made.write(to + row * side.d + start, width);
                }
            });
    }
}

}  // namespace

extern "C" {

int64_t rank_experts_columns() { return COLUMNS; }

// Whether the processor turns float16 into float32 and back.
int64_t rank_experts_halves() {
#ifdef __F16C__
    return 1;
#else
    return 0;
#endif
}

// load[e] += how many tokens chose expert e, of those that count: mask (N) may be null, and y (N, d_out), of bfloat16
// where `narrow`, holds no NaN in its first number.
void rank_experts_count(int64_t num_tokens, int64_t d_out, int64_t top_k, int64_t narrow, const int64_t *indices,
                        const void *y, const uint8_t *mask, float *load) {
    Tensor{(void *)y, narrow != 0}.typed([&](auto *output) {
        for (int64_t n = 0; n < num_tokens; n++) {
            const float first = widen(output[n * d_out]);
            if (first != first || (mask && !mask[n])) continue;
            for (int64_t j = 0; j < top_k; j++) load[indices[n * top_k + j]]++;
        }
    });
}

// values (N, k) and projections (N, k · ρ) are kept for backward; as float16 and bfloat16 too where the pointers to those
// are not null.
// scratch: 4 bytes each of (⌈d_in / COLUMNS⌉ + ⌈d_out / COLUMNS⌉) · r · COLUMNS + N · k · ρ · 2 + threads · E · 2
void rank_experts_forward(CALL, const void *x, const void *A, const void *B, const float *logits, int64_t logits_stride,
                          const float *keys, const float *bias, void *y, int64_t *indices, void *narrow, float *values,
                          float *projections, uint16_t *half_values, bfloat16 *narrow_projections, float *scratch) {
    const Call s = CALLED;
    const Gate gate = gate_of(s);
    const Tensor tensor_x = s.tensor(x, 16), tensor_y = s.tensor(y, 32);
    const Tensor tensor_A = s.tensor(A, 64), tensor_B = s.tensor(B, 128);
    const int k = int(s.top_k), rho = s.rho(), m = k * rho;
    const int64_t tiles_in = num_tiles(s.d_in), tiles_out = num_tiles(s.d_out), step = s.num_ranks * COLUMNS;
    int64_t *order = (int64_t *)scratch;
    float *packed_A = scratch + threads * s.num_experts * 2, *packed_B = packed_A + tiles_in * step;
    float *u = packed_B + tiles_out * step;
    int32_t *rows = (int32_t *)(u + s.num_tokens * m);
#pragma omp parallel num_threads(int(threads))
    {
        const int self = thread(), team = team_size();
        for (int64_t t = self; t < tiles_in; t += team) pack(tensor_A, s.num_ranks, s.d_in, t, packed_A + t * step);
        for (int64_t t = self; t < tiles_out; t += team)
            pack_transposed(tensor_B, s.num_ranks, s.num_ranks, s.d_out, t, packed_B + t * step);
        int64_t first, last;
        split(s.num_tokens, self, team, first, last);
        gate.select(keys + first * s.num_experts, last - first, order + self * s.num_experts, indices + first * k);
        for (int64_t n = first; n < last; n++) {
            for (int j = 0; j < k; j++) {
                int64_t expert = indices[n * k + j];
                values[n * k + j] = logits[n * logits_stride + expert];
                if (s.flags & 4)
                    ((uint8_t *)narrow)[n * k + j] = uint8_t(expert);
                else
                    ((int32_t *)narrow)[n * k + j] = int32_t(expert);
                for (int q = 0; q < rho; q++) {
                    rows[n * m + j * rho + q] = int32_t(expert * rho + q);
                    projections[n * m + j * rho + q] = 0;
                }
            }
        }
        gate.to_values(values + first * k, indices + first * k, (last - first) * k, bias);
#pragma omp barrier
        for (int64_t t = 0; t < tiles_in; t++)
            tensor_x.typed([&](auto *src) {
                dots(src + t * COLUMNS, s.d_in, width_of(t, s.d_in), first, last, rows, m, m, packed_A + t * step,
                     projections);
            });
        for (int64_t i = first * k; half_values && i < last * k; i++) half_values[i] = half(values[i]);
        for (int64_t i = first * m; narrow_projections && i < last * m; i++) put(narrow_projections + i, projections[i]);
        for (int64_t n = first; n < last; n++) {
            float *weights = u + n * m;  // k of them, spread over ρ ranks each from the last one on
            gate.weigh(values + n * k, weights);
            for (int j = k - 1; j >= 0; j--) {
                float g = weights[j] * gate.factor;
                for (int q = rho - 1; q >= 0; q--) u[n * m + j * rho + q] = g * projections[n * m + j * rho + q];
            }
        }
        for (int64_t t = 0; t < tiles_out; t++)
            tensor_y.typed([&](auto *dst) {
                axpys(dst + t * COLUMNS, false, s.d_out, width_of(t, s.d_out), first, last, rows, m, m, u,
                      packed_B + t * step);
            });
    }
}

// x is what the router read, dropped what A read where that is another tensor, else null. dx may hold the base layer's
// share of the gradient; what it holds is lost where `fresh`. dA (r, d_in), dB (d_out, r), dweight (E, d_in), of their
// matrices' types, and dx and ddropped are null where they are not needed; bias may be null unless the gate divides.
// values are float16 where the flags have 512, projections bfloat16 where they have 1024.
// scratch: 4 bytes each of threads · (N · k · ρ + 2 · (r + E) · COLUMNS) + N · k · (4 · ρ + 3)
void rank_experts_backward(CALL, const void *dy, const void *x, const void *dropped, const void *A, const void *B,
                           const void *weight, const void *narrow, const void *kept_values, const void *kept_projections,
                           const float *bias, void *dx, int64_t fresh, void *ddropped, void *dA, void *dB,
                           void *dweight, float *scratch) {
    const Call s = CALLED;
    const Gate gate = gate_of(s);
    const Tensor tensor_dy = s.tensor(dy, 32), tensor_B = s.tensor(B, 128);
    const bool together = !dropped;
    const Tensor tensor_A = s.tensor(A, 64), tensor_weight = s.tensor(weight, 256);
    const Tensor gradient_A = s.tensor(dA, 64), gradient_B = s.tensor(dB, 128), gradient_router = s.tensor(dweight, 256);
    const Side both{s.tensor(x, 8),        s.tensor(dx, 8), s.d_in,       2, {tensor_A, tensor_weight},
                    {num_ranks, num_experts}, {gradient_A, gradient_router}};
    const Side of_A{s.tensor(dropped, 16), s.tensor(ddropped, 16), s.d_in, 1, {tensor_A}, {num_ranks}, {gradient_A}};
    const Side of_router{s.tensor(x, 8), s.tensor(dx, 8), s.d_in, 1, {tensor_weight}, {num_experts}, {gradient_router}};
    const int k = int(s.top_k), rho = s.rho(), m = k * rho;
    const int64_t tiles_out = num_tiles(s.d_out), count = s.num_tokens * m;
    const int64_t tile_size = 2 * (s.num_ranks + s.num_experts) * COLUMNS;
    float *du = scratch, *tiles = du + threads * count, *u = tiles + threads * tile_size;
    // Ranks, then experts: in one list for each token where they meet one input, else in two.
    float *coefficients = u + count;
    int32_t *rows = (int32_t *)(coefficients + count + s.num_tokens * k);
    const int stride = together ? m + k : m, expert_stride = together ? m + k : k;
    float *expert_coefficients = coefficients + (together ? m : count);
    int32_t *expert_rows = rows + (together ? m : count);
    float *const wide_values = (float *)(rows + count + s.num_tokens * k);
    float *const wide_projections = wide_values + s.num_tokens * k;
    const float *values = s.flags & 512 ? wide_values : (const float *)kept_values;
    const float *projections = s.flags & 1024 ? wide_projections : (const float *)kept_projections;
#pragma omp parallel num_threads(int(threads))
    {
        const int self = thread(), team = team_size();
        int64_t first, last;
        split(s.num_tokens, self, team, first, last);
        for (int64_t i = first * k; s.flags & 512 && i < last * k; i++)
            wide_values[i] = widen_half(((const uint16_t *)kept_values)[i]);
        for (int64_t i = first * m; s.flags & 1024 && i < last * m; i++)
            wide_projections[i] = widen(((const bfloat16 *)kept_projections)[i]);
        for (int64_t n = first; n < last; n++) {
            float *weights = u + n * m;
            gate.weigh(values + n * k, weights);
            for (int j = k - 1; j >= 0; j--) {
                float g = weights[j] * gate.factor;
                int64_t place = n * k + j;
                int32_t expert = s.flags & 4 ? ((const uint8_t *)narrow)[place] : ((const int32_t *)narrow)[place];
                expert_coefficients[n * expert_stride + j] = weights[j];
                expert_rows[n * expert_stride + j] = expert;
                for (int q = rho - 1; q >= 0; q--) {
                    coefficients[n * stride + j * rho + q] = g;
                    rows[n * stride + j * rho + q] = int32_t(expert * rho + q);
                    u[n * m + j * rho + q] = g * projections[n * m + j * rho + q];
                }
            }
        }
        float *own = du + self * count, *tile = tiles + self * tile_size;
        std::memset(own, 0, count * sizeof(float));
#pragma omp barrier
        for (int64_t t = self; t < tiles_out; t += team) {
            float *gradient = dB ? tile + s.num_ranks * COLUMNS : nullptr;
            int width = width_of(t, s.d_out);
            pack_transposed(tensor_B, s.num_ranks, s.num_ranks, s.d_out, t, tile);
            if (gradient) std::memset(gradient, 0, s.num_ranks * COLUMNS * sizeof(float));
            tensor_dy.typed([&](auto *src) {
                dots(src + t * COLUMNS, s.d_out, width, 0, s.num_tokens, rows, stride, m, tile, own);
                if (gradient) outers(src + t * COLUMNS, s.d_out, width, s.num_tokens, rows, stride, m, u, gradient);
            });
            gradient_B.typed([&](auto *to) {
                for (int c = 0; gradient && c < width; c++)
                    for (int64_t row = 0; row < s.num_ranks; row++)
                        put(to + (t * COLUMNS + c) * s.num_ranks + row, gradient[row * COLUMNS + c]);
            });
        }
        std::vector<float> unlikely(k);  // of a token's experts, 1 − score
#pragma omp barrier
        for (int64_t n = first; n < last; n++) {
            float *weights = expert_coefficients + n * expert_stride, shared = 0, total = 0;
            const float *value = values + n * k;
            for (int j = 0; j < k; j++) {
                float product = 0;
                for (int q = 0; q < rho; q++) {
                    int64_t place = n * m + j * rho + q;
                    for (int part = 1; part < team; part++) du[place] += du[part * count + place];
                    product += du[place] * projections[place];
                    coefficients[n * stride + j * rho + q] *= du[place];
                }
                u[n * m + j] = product;  // u itself is done with
                shared += product * weights[j];
                total += value[j];
            }
            if (gate.sigmoid && !gate.biased) map(value, k, unlikely.data(), one_minus_exponential);
            for (int j = 0; j < k; j++) {
                // d weight / d z up to the normalisation; see `_slope` in backends/gate.py.
                float slope = weights[j];
                if (gate.divides()) {
                    float score = value[j] - bias[expert_rows[n * expert_stride + j]];
                    slope = value[j] <= gate.smallest ? 0 : score * (1 - score) / total;
                } else if (gate.sigmoid) {
                    slope *= unlikely[j];
                }
                weights[j] = (u[n * m + j] - shared) * gate.factor * slope;
                if (together) expert_rows[n * expert_stride + j] += int32_t(s.num_ranks);
            }
        }
#pragma omp barrier
        if (together) {
            backward_of_side(both, fresh, s.num_tokens, self, team, rows, m + k, coefficients, tile);
        } else {
            backward_of_side(of_A, true, s.num_tokens, self, team, rows, m, coefficients, tile);
            backward_of_side(of_router, fresh, s.num_tokens, self, team, expert_rows, k, expert_coefficients, tile);
        }
    }
}
}
