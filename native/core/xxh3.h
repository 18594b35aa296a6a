// XXH3, 64 bits, seed 0 (the xxHash specification, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md): fast enough to check a
// weights file while it is being uploaded.
#pragma once
#include <cstddef>
#include <cstdint>

namespace codefuse {

// Instructions that the hash can use; each value includes those before it.
enum class Simd : uint8_t { none, avx2, avx512 };
Simd best_simd();  // of this processor

class Xxh3 {
 public:
  // Blocks of kBlock bytes in order, then the rest of the input by end().
  static constexpr size_t kBlock = 1024, kSums = 8;

  explicit Xxh3(Simd simd = best_simd()) : simd_(simd) {}  // not more than best_simd()
  void blocks(const uint8_t* data, size_t count);
  // The same in two steps: sums of any blocks at any time, and in order what these do to the hash.
  static void sums(const uint8_t* data, size_t count, uint64_t* out /*[count, kSums]*/, Simd simd = best_simd());
  void add(const uint64_t* sums /*[count, kSums]*/, size_t count);
  // The hash of an input of `total` bytes > 240 whose first blocks have been given, (total - 1) / kBlock of them; input: all of it.
  uint64_t end(const uint8_t* input, size_t total);

 private:
  const Simd simd_;
  alignas(16) uint64_t acc_[kSums] = {0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
                                  0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, 0x9E3779B1};
};

uint64_t xxh3_64(const void* data, size_t size, Simd simd = best_simd());

}  // namespace codefuse
