// The token gate's op on a CPU, multiplying only the chosen ranks.
//
// What `gate.py` and `fused.py` do with dense products over all r ranks, this does over the k chosen ones: forward is
// select → x·Aᵀ at the chosen rows → gates → y += u·Bᵀ; backward is dy·B and dB tile by tile of dy, the gate's
// derivative, and dx, dA, dW_g tile by tile of x. The router's x·W_gᵀ, which needs all experts, stays a matrix product
// of the caller's. Threads share the tokens where tokens are written, and the tiles where matrices are; the order of
// every sum depends on the number of threads alone.
//
// A plain C interface, so that compiling needs no headers of PyTorch's. `ops/native.py` calls it.

#include "native_given.h"
#include "native_tiles.h"

namespace {

// Keys as int64 that order as (key, −expert) do; a NaN of either sign is the largest, −0 is 0.
inline int64_t packed_key(float key, int64_t expert) {
    if (key != key) return (int64_t(0x7FC00000) << 32) | (0x7FFFFFFF - expert);
    key += 0.0f;
    int32_t bits;
    std::memcpy(&bits, &key, sizeof bits);
    bits ^= (bits >> 31) & 0x7FFFFFFF;  // two's complement orders negative floats backwards: flip all but the sign
    return int64_t((uint64_t(uint32_t(bits)) << 32) | uint64_t(0x7FFFFFFF - expert));
}

#if defined(__AVX512F__) && defined(__BMI__)
#define SELECTS_IN_REGISTERS

// The same choice for TOKENS tokens side by side, of at most 64 experts, whose keys stay in registers.
template <int TOKENS>
inline void select_in_registers(const float *keys, int64_t num_experts, int64_t top_k, int64_t *chosen) {
    const __m512i none = _mm512_set1_epi32(INT32_MIN), magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i left[TOKENS][4];
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < 4; i++) {
            const int64_t count = num_experts - i * 16;
            const __mmask16 there = count >= 16 ? 0xFFFF : count > 0 ? __mmask16((1 << count) - 1) : 0;
            const __m512 key = _mm512_add_ps(_mm512_maskz_loadu_ps(there, keys + t * num_experts + i * 16),
                                             _mm512_setzero_ps());
            // As in `packed_key`, without the expert.
            __m512i bits = _mm512_castps_si512(key);
            bits = _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), magnitude));
            const __mmask16 nan = _mm512_cmp_ps_mask(key, key, _CMP_UNORD_Q);
            bits = _mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7FC00000));
            left[t][i] = _mm512_mask_mov_epi32(none, there, bits);
        }
    for (int64_t j = 0; j < top_k; j++)
        for (int t = 0; t < TOKENS; t++) {
            __m512i(&v)[4] = left[t];
            const int best = _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_max_epi32(v[0], v[1]),
                                                                      _mm512_max_epi32(v[2], v[3])));
            const __m512i all = _mm512_set1_epi32(best);
            uint64_t found = 0;
            for (int i = 0; i < 4; i++) found |= uint64_t(_mm512_cmpeq_epi32_mask(v[i], all)) << (i * 16);
            chosen[t * top_k + j] = int64_t(__builtin_ctzll(found));  // the lowest among equals
            const uint64_t first = found & -found;
            for (int i = 0; i < 4; i++) v[i] = _mm512_mask_mov_epi32(v[i], __mmask16(first >> (i * 16)), none);
        }
}

#endif

// float16, for log-scores: no lower than float16 goes. Only where `rank_experts_halves` says so.
inline uint16_t half([[maybe_unused]] float value) {
#ifdef __F16C__
    return uint16_t(_cvtss_sh(value < -6e4f ? -6e4f : value, _MM_FROUND_TO_NEAREST_INT));
#else
    return 0;
#endif
}

inline float widen_half([[maybe_unused]] uint16_t value) {
#ifdef __F16C__
    return _cvtsh_ss(value);
#else
    return 0;
#endif
}

struct Gate {
    int64_t num_experts, top_k, sigmoid, biased;
    float factor;  // k · s

    bool divides() const { return sigmoid && biased; }

    // Weights that add up to 1, from values; see `gate.gate_weights`.
    void weigh(const float *values, float *weights) const {
        int k = int(top_k);
        float total = 0;
        if (divides()) {
            for (int j = 0; j < k; j++) total += values[j];
            for (int j = 0; j < k; j++) weights[j] = values[j] / total;
            return;
        }
        float top = values[0];
        for (int j = 1; j < k; j++) top = values[j] > top ? values[j] : top;
        map(values, k, weights, [&](Floats v) { return exponential(v - top); });
        for (int j = 0; j < k; j++) total += weights[j];
        for (int j = 0; j < k; j++) weights[j] /= total;
    }

    // From the chosen logits (count) in place, whose experts' biases are at bias[experts[i]].
    template <class T>
    void to_values(float *values, const T *experts, int64_t count, const float *bias) const {
        if (sigmoid)
            map(values, count, values, [&](Floats z) { return biased ? ::sigmoid(z) : log_sigmoid(z); });
        for (int64_t i = 0; biased && i < count; i++) values[i] += bias[experts[i]];
    }

    // The top_k experts of each token, best first.
    void select(const float *keys, int64_t num_tokens, int64_t *scratch, int64_t *chosen) const {
        const int64_t experts = num_experts;
        int64_t n = 0;
#ifdef SELECTS_IN_REGISTERS
        if (experts <= 64) {
            for (; n + 4 <= num_tokens; n += 4)
                select_in_registers<4>(keys + n * experts, experts, top_k, chosen + n * top_k);
            for (; n < num_tokens; n++)
                select_in_registers<1>(keys + n * experts, experts, top_k, chosen + n * top_k);
        }
#endif
        for (; n < num_tokens; n++) {
            for (int64_t e = 0; e < experts; e++) scratch[e] = packed_key(keys[n * experts + e], e);
            for (int64_t j = 0; j < top_k; j++) {
                int64_t best = scratch[0];
#pragma omp simd reduction(max : best)
                for (int64_t e = 0; e < experts; e++) best = scratch[e] > best ? scratch[e] : best;
                int64_t expert = 0x7FFFFFFF - (best & 0x7FFFFFFF);
                chosen[n * top_k + j] = expert;
                scratch[expert] = INT64_MIN;
            }
        }
    }
};

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

Gate gate_of(const Call &s) { return Gate{s.num_experts, s.top_k, s.flags & 1, s.flags & 2, float(s.factor)}; }

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

#ifdef HAS_TILES

// The processor's matrix unit multiplies tiles of 16 rows of 32 bfloat16, and adds up in float32.
constexpr int TILE_ROWS = 16, TILE_DEPTH = 32;

bool may_use_tiles() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

struct TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

// Two tiles of tokens by two of experts: out[n, e] for 32 of each. `experts` is packed; see `tiled_logits`.
inline void tile_block(const bfloat16 *x, int64_t x_stride, const uint32_t *experts, int64_t experts_stride,
                       int64_t depth, float *out) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < depth; t++) {
        _tile_loadd(4, x + t * TILE_DEPTH, x_stride * 2);
        _tile_loadd(5, x + TILE_ROWS * x_stride + t * TILE_DEPTH, x_stride * 2);
        _tile_loadd(6, experts + t * 256, 64);
        _tile_loadd(7, experts + experts_stride + t * 256, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, 128);
    _tile_stored(1, out + 16, 128);
    _tile_stored(2, out + 16 * 32, 128);
    _tile_stored(3, out + 16 * 32 + 16, 128);
}

// logits[n, e] = x[n, :] · weight[e, :]; d is a multiple of TILE_DEPTH, packed holds ⌈E / 32⌉ · 32 · d / 2 words.
void tiled_logits(int64_t num_tokens, int64_t d, int64_t num_experts, int threads, const bfloat16 *x,
                  const bfloat16 *weight, uint32_t *packed, float *logits) {
    const int64_t depth = d / TILE_DEPTH, expert_tiles = (num_experts + 31) / 32 * 2, stride = depth * 256;
#pragma omp parallel num_threads(threads)
    {
        const int self = thread(), team = team_size();
        // A tile of experts has pairs along the depth in rows, and experts in columns.
        for (int64_t tile = self; tile < expert_tiles * depth; tile += team) {
            const int64_t expert = tile / depth * 16, t = tile % depth;
            for (int e = 0; e < 16; e++)
                for (int pair = 0; pair < 16; pair++) {
                    uint32_t word = 0;
                    if (expert + e < num_experts)
                        std::memcpy(&word, weight + (expert + e) * d + t * TILE_DEPTH + 2 * pair, sizeof word);
                    packed[tile * 256 + pair * 16 + e] = word;
                }
        }
        // What the thread had set up is put back: the vendor's library keeps its shapes from call to call.
        alignas(64) TileShapes before, shapes{};
        _tile_storeconfig(&before);
        shapes.palette = 1;
        for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = 16;
        _tile_loadconfig(&shapes);
        alignas(64) float block[32 * 32];
        std::vector<bfloat16> rest;
#pragma omp barrier
        for (int64_t n = self * 32; n < num_tokens; n += team * 32) {
            const int64_t count = num_tokens - n < 32 ? num_tokens - n : 32;
            const bfloat16 *source = x + n * d;
            if (count < 32) {
                rest.assign(32 * d, bfloat16{0});
                std::memcpy(rest.data(), source, count * d * sizeof(bfloat16));
                source = rest.data();
            }
            for (int64_t tile = 0; tile < expert_tiles; tile += 2) {
                tile_block(source, d, packed + tile * stride, stride, depth, block);
                const int64_t width = num_experts - tile * 16 < 32 ? num_experts - tile * 16 : 32;
                for (int64_t i = 0; i < count; i++)
                    std::memcpy(logits + (n + i) * num_experts + tile * 16, block + i * 32, width * sizeof(float));
            }
        }
        if (before.palette)
            _tile_loadconfig(&before);
        else
            _tile_release();
    }
}

#endif

}  // namespace

extern "C" {

// The router's product of bfloat16 tensors in float32, where the processor has a unit for it; 0 where not.
// packed: 4 bytes each of ⌈E / 32⌉ · 16 · d
int64_t rank_experts_logits(int64_t num_tokens, int64_t d, int64_t num_experts, int64_t threads, const void *x,
                            const void *weight, void *packed, float *logits) {
#ifdef HAS_TILES
    if (d % TILE_DEPTH == 0 && may_use_tiles()) {
        tiled_logits(num_tokens, d, num_experts, int(threads), (const bfloat16 *)x, (const bfloat16 *)weight,
                     (uint32_t *)packed, logits);
        return 1;
    }
#endif
    return 0;
}

// For a few tokens without gradients: the router's product too, and no packing. All tensors are contiguous.
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
// share of the gradient; what it holds is lost where `fresh`. dA (r, d_in), dB (d_out, r), dweight (E, d_in), of their matrices' types, and the
// gradients dx and ddropped are null where they are not needed; bias may be null unless the gate divides.
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
                // d weight / d z up to the normalisation; see `gate._slope`.
                float slope = weights[j];
                if (gate.divides()) {
                    float score = value[j] - bias[expert_rows[n * expert_stride + j]];
                    slope = score * (1 - score) / total;
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
