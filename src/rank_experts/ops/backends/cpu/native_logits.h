// The router's product of bfloat16 tensors in float32, by the processor's matrix unit.

#pragma once

#include "native_tiles.h"

namespace {

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

// Returns 0 where there is no such unit, and does nothing.
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
}
