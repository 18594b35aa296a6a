// Which tiles of a prefill product are whose, and in what order (linear_prefill_wgmma.cuh).
#pragma once
#include "cuda/tiles.cuh"

namespace codefuse::cuda::prefill {

// What unit u of G works on, a team of clusters: chunks [begin, end) of a tile, in this order. First whole waves, in which all units keep
// step; tiles short of a full wave, and a wave of full ones with them, are cut into G equal parts; a part holds at least a tile's worth
// of chunks, so a tile has at most two pieces. The first piece of a tile (ends early) comes before its unit's other parts and the second
// (begins late) last in the next unit: by the time the second begins, the first is done.
struct Item {
  int tile, begin, end;
};
struct Work {
  int unit, units, chunks, waves, first_full, full, head, tail, head_tile, tail_tile, count;
  CODEFUSE_HD Work(int unit, int units, int tiles, int chunks, bool relay) : unit(unit), units(units), chunks(chunks), first_full(0), full(0), head(0), tail(0), head_tile(0), tail_tile(0) {
    if (tiles <= units || tiles % units == 0 || !relay) {
      waves = (tiles - unit + units - 1) / units;
    } else {
      waves = tiles / units - 1;
      const int64_t shared = int64_t(units + tiles % units) * chunks;
      const int from = int(unit * shared / units), to = int((unit + 1) * shared / units), base = waves * units;
      head = to % chunks;
      head_tile = base + to / chunks;
      tail = from % chunks;
      tail_tile = base + from / chunks;
      first_full = base + (from + chunks - 1) / chunks;
      full = head_tile - first_full;
    }
    count = (head != 0) + waves + full + (tail != 0);
  }
  [[maybe_unused]] CODEFUSE_HD Item item(int i) const {
    if (i < waves) return {i * units + unit, 0, chunks};
    i -= waves;
    if (head && i-- == 0) return {head_tile, 0, head};
    if (i < full) return {first_full + i, 0, chunks};
    return {tail_tile, tail, chunks};
  }
};

}  // namespace codefuse::cuda::prefill
