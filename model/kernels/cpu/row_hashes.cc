// Hashes of the rows of a matrix, for the fingerprint of a model: model/fingerprint.py says what they are.

#include <cstdint>

namespace {

inline uint32_t mix(uint32_t x) {  // Wellons' lowbias32, https://nullprogram.com/blog/2018/07/31/
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

template <typename Word>
void hash_rows(const Word* bits, int64_t rows, int64_t columns, const uint32_t* salts, uint32_t* hashes) {
  for (int64_t row = 0; row < rows; ++row, bits += columns) {
    uint32_t first = 0, second = 0;
    for (int64_t i = 0; i < columns; ++i) {
      first += mix(bits[i] ^ salts[i]);
      second += mix(bits[i] ^ salts[columns + i]);
    }
    hashes[row] = first;
    hashes[rows + row] = second;
  }
}

}  // namespace

// `bits` is [rows, columns] of `bytes` each, 1, 2 or 4; `salts` is [2, columns], `hashes` [2, rows].
extern "C" void tokenzero_row_hashes(const void* bits, int bytes, int64_t rows, int64_t columns, const uint32_t* salts,
                                     uint32_t* hashes) {
  if (bytes == 1) hash_rows(static_cast<const uint8_t*>(bits), rows, columns, salts, hashes);
  if (bytes == 2) hash_rows(static_cast<const uint16_t*>(bits), rows, columns, salts, hashes);
  if (bytes == 4) hash_rows(static_cast<const uint32_t*>(bits), rows, columns, salts, hashes);
}
