// Which memory a kernel may touch, and whether the order of two accesses is certain.
//
// Every two bytes remember their last write and their last reads. Two accesses of one address, one of
// them a write, are a race unless a barrier lies between them: of the block, or of the warp where both
// threads are of one warp. That does not depend on the order in which the threads happened to run.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

namespace emulator {

// When something happened: block and thread, barriers of the block and __syncwarps before it.
struct Moment {
  unsigned block, thread, barriers, syncs;
  Moment(unsigned block, unsigned thread, unsigned barriers, unsigned syncs)
      : block(block), thread(thread), barriers(barriers), syncs(syncs) {}
  explicit Moment(uint64_t stamp)
      : block(unsigned(stamp >> 44) - 1), thread(unsigned(stamp >> 34) & 0x3ff),
        barriers(unsigned(stamp >> 20) & 0x3fff), syncs(unsigned(stamp) & 0xfffff) {}
  bool can_be_told() const { return block < 0xfffff && barriers <= 0x3fff && syncs <= 0xfffff; }
  uint64_t stamp() const {  // never 0
    return (uint64_t)(block + 1) << 44 | (uint64_t)thread << 34 | (uint64_t)barriers << 20 | syncs;
  }
  unsigned warp() const { return thread / 32; }
};

// Stamps; 0 for none. Two reads are enough: whoever writes next and is certain to come after both
// comes after all others.
struct Cell { uint64_t write, reads[2]; };
struct Range {
  const char *begin, *end;
  Cell* cells;  // none for what may only be read
  bool shared;
};
struct Conflict {
  uint64_t stamp;  // 0 for none
  bool written;
};

static Range ranges[128];
static int range_count;

static char* fresh(size_t bytes) {
  return (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
static void know(const void* begin, size_t bytes, bool shared, bool writable) {
  if (bytes == 0) return;
  Cell* cells = writable ? (Cell*)fresh((bytes + 1) / 2 * sizeof(Cell)) : nullptr;
  ranges[range_count++] = {(const char*)begin, (const char*)begin + bytes, cells, shared};
}
static void forget() {
  for (int i = 0; i < range_count; i++)
    if (ranges[i].cells)
      munmap(ranges[i].cells, (ranges[i].end - ranges[i].begin + 1) / 2 * sizeof(Cell));
  range_count = 0;
}
static const Range* range_of(const char* from, size_t size) {
  for (int i = 0; i < range_count; i++)
    if (from >= ranges[i].begin && from + size <= ranges[i].end) return &ranges[i];
  return nullptr;
}

// Whether `before` is certain to have happened at `now`.
static bool in_order(uint64_t before, const Moment& now, bool shared) {
  if (!before) return true;
  const Moment m(before);
  if (m.block != now.block) return shared;  // every block has shared memory of its own
  return m.thread == now.thread || m.barriers < now.barriers ||
         (m.warp() == now.warp() && m.syncs < now.syncs);
}
static void note_read(uint64_t* reads, const Moment& now, bool shared) {
  const uint64_t stamp = now.stamp();
  if (reads[0] == stamp || reads[1] == stamp) return;
  if (in_order(reads[0], now, shared)) {
    reads[0] = stamp;
    if (in_order(reads[1], now, shared)) reads[1] = 0;
  } else if (in_order(reads[1], now, shared)) {
    reads[1] = stamp;
  } else {  // keep those that differ most: of two blocks, else of two warps
    const Moment a(reads[0]), b(reads[1]);
    const bool one_block = a.block == b.block, one_warp = one_block && a.warp() == b.warp();
    if (one_block && (a.block != now.block || (one_warp && a.warp() != now.warp())))
      reads[1] = stamp;
  }
}
// Remembers an access; returns an earlier one that it races with.
static Conflict note(const Range& range, size_t at, size_t size, bool writes, const Moment& now) {
  for (size_t i = at / 2; i < (at + size + 1) / 2; i++) {
    Cell& cell = range.cells[i];
    if (!in_order(cell.write, now, range.shared)) return {cell.write, true};
    if (!writes) {
      note_read(cell.reads, now, range.shared);
      continue;
    }
    for (uint64_t read : cell.reads)
      if (!in_order(read, now, range.shared)) return {read, false};
    cell = {now.stamp(), {0, 0}};
  }
  return {0, false};
}

}  // namespace emulator
