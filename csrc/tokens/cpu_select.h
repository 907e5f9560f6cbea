// Which keys are the smallest, without sorting them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace maskaccel {

// Sets kept[key & mask] for each of the `n` keys, which are all different: 1 for the `count` smallest ones, 0 for the
// others. `mask` takes the token from a key. The keys are used up.
// Counts what stands in the 8 highest bits that differ, and goes on with the keys of the one value that is cut.
inline void mark_smallest(uint64_t* keys, int64_t n, int64_t count, uint64_t mask, uint8_t* kept) {
  constexpr int64_t kFew = 64;
  while (n > kFew && count > 0 && count < n) {
    uint64_t any = 0, all = ~uint64_t{0};
    for (int64_t i = 0; i < n; ++i) {
      any |= keys[i];
      all &= keys[i];
    }
    const uint64_t differ = any ^ all;
    if (differ == 0) break;
    const int top = 63 - __builtin_clzll(differ), shift = top > 7 ? top - 7 : 0;
    const auto digit = [shift](uint64_t key) { return static_cast<int>(key >> shift & 0xff); };
    int32_t found[256] = {};
    for (int64_t i = 0; i < n; ++i) ++found[digit(keys[i])];
    int cut = 0;
    int64_t below = 0;
    while (below + found[cut] <= count) below += found[cut++];
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t key = keys[i];
      const int d = digit(key);
      kept[key & mask] = d < cut;
      keys[left] = key;
      left += d == cut;
    }
    n = left;
    count -= below;
  }
  if (count > 0 && count < n) std::nth_element(keys, keys + count, keys + n);
  for (int64_t i = 0; i < n; ++i) kept[keys[i] & mask] = i < count;
}

// The tokens that are kept, ascending, and the slot of each; slots left over hold n. Of more than `capacity` tokens the
// last ones are dropped. Returns how many are kept.
inline int64_t compact(const uint8_t* kept, int64_t n, int64_t capacity, int32_t* keep, int32_t* inverse) {
  int64_t count = 0;
  for (int64_t t = 0; t < n; ++t) {
    const bool takes = kept[t] != 0 && count < capacity;
    if (count < capacity) keep[count] = static_cast<int32_t>(t);  // overwritten unless it takes the slot
    inverse[t] = takes ? static_cast<int32_t>(count) : -1;
    count += takes;
  }
  for (int64_t i = count; i < capacity; ++i) keep[i] = static_cast<int32_t>(n);
  return count;
}

}  // namespace maskaccel
