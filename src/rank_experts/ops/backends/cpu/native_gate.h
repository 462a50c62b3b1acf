// The token gate: which experts a token activates, and how much each counts.

#pragma once

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

    static constexpr float smallest = 1.0f / (1 << 20);  // SMALLEST_KEY of routing/token.py

    bool divides() const { return sigmoid && biased; }

    // Weights that add up to 1, from values; see `gate.weights` in backends.
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
        for (int64_t i = 0; divides() && i < count; i++) values[i] = values[i] < smallest ? smallest : values[i];
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

Gate gate_of(const Call &s) { return Gate{s.num_experts, s.top_k, s.flags & 1, s.flags & 2, float(s.factor)}; }

}  // namespace
