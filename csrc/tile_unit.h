// The matrix unit (AMX): its tiles, and what the two ways to multiply with it share (tile_parts.h, tile_digits.h).
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

constexpr int64_t SIDE = 16, TILE = 1024;  // rows of a tile and its bytes: 16 rows of 16 floats, or of 32 bfloat16
constexpr int64_t DEPTH = 512;             // bits of a slice
constexpr int64_t BLOCKS = 8;              // most blocks of a panel, each as wide as a tile
constexpr int64_t ROWS = 4 * SIDE;         // most rows of a block: four tiles of sums hide the unit's latency
constexpr int64_t RANGE = 1024;            // most rows of a task

int64_t parts_of(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// While an object of this class lives, all eight tiles of this thread are 16 rows of 64 bytes.
class Tiles {
 public:
  Tiles() {
    Layout layout;
    for (int i = 0; i < 8; i++) {
      layout.row_bytes[i] = 64;
      layout.rows[i] = SIDE;
    }
    asm volatile("" : : "r"(&layout) : "memory");  // gcc assumes that only 8 bytes of it are read, and drops the rest
    _tile_loadconfig(&layout);
  }
  ~Tiles() { _tile_release(); }

 private:
  struct alignas(64) Layout {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

// Where rows of 16 floats lie, `stride` floats apart (0: all rows are the same).
struct Place {
  float* at;
  int64_t stride;
};

inline Place place_in(float* out, int64_t stride) { return {out, stride}; }
inline Place place_in(bfloat16*, int64_t) { return {nullptr, 0}; }  // cannot hold float sums

}  // namespace
}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
