// Exchanges between GPUs of one process: each rank writes to mailboxes in the others' memory, over NVLink or PCIe, and waits for what
// comes to its own. Nothing of it needs the host, so that it is recorded with a step and replayed. A wait ends after kPatienceNs, or soon
// after another has ended or the host has said so: results are then wrong and CommGroup::check() throws.
#pragma once
#include <cstdint>

#include "cuda/device.cuh"

namespace codefuse::cuda {

constexpr int kRanksMost = 8;
constexpr uint64_t kPatienceNs = 20'000'000'000;

// Blocks of a launch, always as many: block b waits for block b of the other ranks, and counts the launches it has been in.
// All of a launch must be resident at once: two of the large ones fit on a multiprocessor (64 registers a thread or fewer).
constexpr int kSmallBlocks = 32, kSmallThreads = 256, kSmallPairs = 4;  // pairs of floats a thread
constexpr int kLargeBlocks = 64, kLargeThreads = 512;
constexpr int kMultiprocessorsLeast = kLargeBlocks / 2;
constexpr int kSmallFloats = kSmallBlocks * kSmallThreads * kSmallPairs * 2;  // of one exchange: value and round together, sent to all
constexpr int kLargeFloats = 1 << 20;                                         // of one exchange: each rank adds its share of them

// What all ranks see. A mailbox: flags and rounds | small [2, world, kSmallFloats] (round, value) | shares [world, of kLargeFloats] |
// sums [kLargeFloats] | columns [2, world, of kLargeFloats].
struct Mail {
  char* box[kRanksMost];  // [world]
  int32_t* failed;        // in pinned host memory, one for all ranks: 1 + the rank whose wait ended, or -1; 0: none
  int rank, world;
};
size_t mailbox_bytes(int world);  // zero before the first exchange

// As Comm; all ranks call them in the same order with the same sizes.
void add_sum(const Stream& s, const Mail& m, float* y, float* data, int64_t n);
void gather_columns(const Stream& s, const Mail& m, float* out, const float* in, int64_t rows, int64_t total);

}  // namespace codefuse::cuda
