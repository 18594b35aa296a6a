#include "core/xxh3.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)  // GCC's own intrinsics "read" undefined registers under full masks
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

namespace codefuse {

namespace {

constexpr uint32_t kPrime32 = 0x9E3779B1;  // the names of the specification: XXH_PRIME32_1,
constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87, kPrime2 = 0xC2B2AE3D27D4EB4F, kPrime3 = 0x165667B19E3779F9;  // XXH_PRIME64_1 to _3,
constexpr uint64_t kMix1 = 0x165667919E3779F9, kMix2 = 0x9FB21C651E98DF25;                                     // PRIME_MX1, PRIME_MX2

constexpr size_t kStripe = 64, kSecretSize = 192, kStripes = Xxh3::kBlock / kStripe;
// the specification's default secret
alignas(16) constexpr uint8_t kSecret[kSecretSize] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb,
    0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc,
    0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

uint64_t read64(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, 8);
  return v;
}
uint32_t read32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}
uint64_t rotated(uint64_t x, int n) { return x << n | x >> (64 - n); }

// high and low half of the 128-bit product, xored
uint64_t folded(uint64_t a, uint64_t b) {
  const unsigned __int128 p = static_cast<unsigned __int128>(a) * b;
  return uint64_t(p) ^ uint64_t(p >> 64);
}

uint64_t avalanche(uint64_t h) {
  h = (h ^ h >> 37) * kMix1;
  return h ^ h >> 32;
}
uint64_t avalanche64(uint64_t h) {  // that of XXH64
  h = (h ^ h >> 33) * kPrime2;
  h = (h ^ h >> 29) * kPrime3;
  return h ^ h >> 32;
}

uint64_t mixed16(const uint8_t* in, const uint8_t* secret) { return folded(read64(in) ^ read64(secret), read64(in + 8) ^ read64(secret + 8)); }

uint64_t hash_to_16(const uint8_t* in, size_t n) {
  if (n > 8) {
    const uint64_t low = read64(in) ^ read64(kSecret + 24) ^ read64(kSecret + 32);
    const uint64_t high = read64(in + n - 8) ^ read64(kSecret + 40) ^ read64(kSecret + 48);
    return avalanche(n + __builtin_bswap64(low) + high + folded(low, high));
  }
  if (n >= 4) {
    uint64_t h = read32(in + n - 4) + (uint64_t(read32(in)) << 32);
    h ^= read64(kSecret + 8) ^ read64(kSecret + 16);
    h ^= rotated(h, 49) ^ rotated(h, 24);
    h *= kMix2;
    h = (h ^ ((h >> 35) + n)) * kMix2;
    return h ^ h >> 28;
  }
  if (n > 0) {
    const uint32_t all = uint32_t(in[0]) << 16 | uint32_t(in[n / 2]) << 24 | in[n - 1] | uint32_t(n) << 8;
    return avalanche64(all ^ uint64_t(read32(kSecret) ^ read32(kSecret + 4)));
  }
  return avalanche64(read64(kSecret + 56) ^ read64(kSecret + 64));
}

uint64_t hash_to_128(const uint8_t* in, size_t n) {
  uint64_t h = n * kPrime1;
  for (size_t i = (n - 1) / 32 + 1; i-- > 0;)  // pairs of 16 bytes, from both ends inwards
    h += mixed16(in + 16 * i, kSecret + 32 * i) + mixed16(in + n - 16 * (i + 1), kSecret + 32 * i + 16);
  return avalanche(h);
}

uint64_t hash_to_240(const uint8_t* in, size_t n) {
  uint64_t h = n * kPrime1;
  for (size_t i = 0; i < 8; ++i) h += mixed16(in + 16 * i, kSecret + 16 * i);
  h = avalanche(h);
  for (size_t i = 8; i < n / 16; ++i) h += mixed16(in + 16 * i, kSecret + 16 * (i - 8) + 3);
  return avalanche(h + mixed16(in + n - 16, kSecret + 136 - 17));
}

constexpr const uint8_t* kEndSecret = kSecret + kSecretSize - kStripe;  // of a block

#if defined(__x86_64__)
void accumulate(uint64_t* acc, const uint8_t* in, const uint8_t* secret) {
  auto* const a = reinterpret_cast<__m128i*>(acc);
  for (int i = 0; i < 4; ++i) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in) + i);
    const __m128i key = _mm_xor_si128(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(secret) + i));
    const __m128i product = _mm_mul_epu32(key, _mm_srli_epi64(key, 32));
    a[i] = _mm_add_epi64(_mm_add_epi64(a[i], _mm_shuffle_epi32(v, _MM_SHUFFLE(1, 0, 3, 2))), product);
  }
}

// Sums of whole blocks: what they add to acc.
__attribute__((target("avx2"))) void sums_avx2(const uint8_t* in, size_t count, uint64_t* out) {
  for (; count > 0; --count, in += Xxh3::kBlock, out += Xxh3::kSums) {
    __m256i a[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (size_t s = 0; s < kStripes; ++s)
      for (int i = 0; i < 2; ++i) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + s * kStripe) + i);
        const __m256i key = _mm256_xor_si256(v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kSecret + s * 8) + i));
        const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
        a[i] = _mm256_add_epi64(_mm256_add_epi64(a[i], _mm256_shuffle_epi32(v, _MM_SHUFFLE(1, 0, 3, 2))), product);
      }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), a[0]), _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + 1, a[1]);
  }
}
__attribute__((target("avx2"))) void add_avx2(uint64_t* acc, const uint64_t* sums, size_t count) {
  auto* const to = reinterpret_cast<__m256i*>(acc);
  const auto* const ends = reinterpret_cast<const __m256i*>(kEndSecret);
  __m256i a[2] = {_mm256_loadu_si256(to), _mm256_loadu_si256(to + 1)};
  const __m256i key[2] = {_mm256_loadu_si256(ends), _mm256_loadu_si256(ends + 1)}, prime = _mm256_set1_epi64x(kPrime32);
  for (; count > 0; --count, sums += Xxh3::kSums)
    for (int i = 0; i < 2; ++i) {
      const __m256i v = _mm256_add_epi64(a[i], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums) + i));
      const __m256i mixed = _mm256_xor_si256(_mm256_xor_si256(v, key[i]), _mm256_srli_epi64(v, 47));
      const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
      a[i] = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
    }
  _mm256_storeu_si256(to, a[0]), _mm256_storeu_si256(to + 1, a[1]);
}


__attribute__((target("avx512f"))) void sums_avx512(const uint8_t* in, size_t count, uint64_t* out) {
  __m512i secret[kStripes];
  for (size_t s = 0; s < kStripes; ++s) secret[s] = _mm512_loadu_si512(kSecret + s * 8);
  for (; count > 0; --count, in += Xxh3::kBlock, out += Xxh3::kSums) {
    __m512i a = _mm512_setzero_si512();
    for (size_t s = 0; s < kStripes; ++s) {
      const __m512i v = _mm512_loadu_si512(in + s * kStripe), key = _mm512_xor_si512(v, secret[s]);
      const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
      a = _mm512_add_epi64(_mm512_add_epi64(a, _mm512_shuffle_epi32(v, _MM_PERM_BADC)), product);
    }
    _mm512_storeu_si512(out, a);
  }
}
#else
void accumulate(uint64_t* acc, const uint8_t* in, const uint8_t* secret) {
  for (int i = 0; i < 8; ++i) {
    const uint64_t v = read64(in + 8 * i), key = v ^ read64(secret + 8 * i);
    acc[i ^ 1] += v;
    acc[i] += uint64_t(uint32_t(key)) * (key >> 32);
  }
}
#endif

}  // namespace

Simd best_simd() {
#if defined(__x86_64__)
  static const Simd best = __builtin_cpu_supports("avx512f") ? Simd::avx512 : __builtin_cpu_supports("avx2") ? Simd::avx2 : Simd::none;
  return best;
#else
  return Simd::none;
#endif
}

void Xxh3::sums(const uint8_t* data, size_t count, uint64_t* out, [[maybe_unused]] Simd simd) {
#if defined(__x86_64__)
  if (simd == Simd::avx512) return sums_avx512(data, count, out);
  if (simd == Simd::avx2) return sums_avx2(data, count, out);
#endif
  for (; count > 0; --count, data += kBlock, out += kSums) {
    alignas(16) uint64_t acc[kSums] = {};  // stays in registers
    for (size_t s = 0; s < kStripes; ++s) accumulate(acc, data + s * kStripe, kSecret + s * 8);
    std::memcpy(out, acc, sizeof acc);
  }
}

void Xxh3::add(const uint64_t* sums, size_t count) {
#if defined(__x86_64__)
  if (simd_ >= Simd::avx2) return add_avx2(acc_, sums, count);
#endif
  for (; count > 0; --count, sums += kSums)
    for (size_t i = 0; i < kSums; ++i) {
      const uint64_t v = acc_[i] + sums[i];
      acc_[i] = (v ^ v >> 47 ^ read64(kEndSecret + 8 * i)) * kPrime32;
    }
}

void Xxh3::blocks(const uint8_t* data, size_t count) {
  constexpr size_t kAtOnce = 16;  // their sums do not wait for each other
  uint64_t sum[kAtOnce * kSums];
  for (size_t n; count > 0; count -= n, data += n * kBlock) {
    n = count < kAtOnce ? count : kAtOnce;
    sums(data, n, sum, simd_);
    add(sum, n);
  }
}

uint64_t Xxh3::end(const uint8_t* input, size_t total) {
  const size_t done = (total - 1) / kBlock * kBlock;
  for (size_t s = 0; s < (total - 1 - done) / kStripe; ++s) accumulate(acc_, input + done + s * kStripe, kSecret + s * 8);
  accumulate(acc_, input + total - kStripe, kSecret + kSecretSize - kStripe - 7);
  uint64_t h = total * kPrime1;
  for (int i = 0; i < 4; ++i) h += folded(acc_[2 * i] ^ read64(kSecret + 11 + 16 * i), acc_[2 * i + 1] ^ read64(kSecret + 11 + 16 * i + 8));
  return avalanche(h);
}

uint64_t xxh3_64(const void* data, size_t size, Simd simd) {
  const auto* in = static_cast<const uint8_t*>(data);
  if (size <= 16) return hash_to_16(in, size);
  if (size <= 128) return hash_to_128(in, size);
  if (size <= 240) return hash_to_240(in, size);
  Xxh3 h(simd);
  h.blocks(in, (size - 1) / Xxh3::kBlock);
  return h.end(in, size);
}

}  // namespace codefuse
