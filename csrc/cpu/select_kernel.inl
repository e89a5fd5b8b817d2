// The largest scores of one row.
//
// Non-negative IEEE numbers order like the integers with their bits ("keys"), so the threshold is
// found by narrowing a range of keys, one count of the row per step, and one more pass writes the
// indices. Integer comparisons also keep denormals apart where the caller's thread flushes them.

namespace select {

/// Keys of one vector of scores.
template <class T>
using Keys = decltype(Vec<T>{} > Vec<T>{});

template <class T>
using Key = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

/// Elements handled together: one vector of int32 indices.
inline constexpr int kGroup = kWidth<float>;

template <class T>
inline constexpr int kGroupVectors = kGroup / kWidth<T>;

template <class T>
inline Keys<T> keys_at(const T* scores) {
  return reinterpret_cast<Keys<T>>(load(scores));
}

template <class T>
inline Keys<T> splat_key(Key<T> key) {
  return key - Keys<T>{};
}

template <class T>
inline Key<T> key_of(T score) {
  Key<T> key;
  std::memcpy(&key, &score, sizeof(key));
  return key;
}

/// One row, cut into whole groups and a padded rest. -0.0 pads: its key, the smallest integer, is
/// above no threshold, and as a zero at the end of the row it wins no tie against a real score.
template <class T>
struct Row {
  const T* scores;
  int64_t n;
  int64_t n_whole;  // elements in whole groups
  T rest[kGroup];

  Row(const T* scores_, int64_t n_) : scores(scores_), n(n_), n_whole(n_ / kGroup * kGroup) {
    std::fill_n(rest, kGroup, T(-0.0));
    std::copy_n(scores + n_whole, n - n_whole, rest);
  }

  /// Calls f(group, position of its first element) for every group; false from f stops.
  template <class F>
  void for_each_group(const F& f) const {
    for (int64_t i = 0; i < n_whole; i += kGroup) {
      if (!f(scores + i, i)) return;
    }
    if (n_whole < n) f(rest, n_whole);
  }
};

template <class T>
int64_t first_invalid(const T* scores, int64_t n) noexcept {
  constexpr Key<T> kNegativeZero = std::numeric_limits<Key<T>>::min();
  const Keys<T> infinity = splat_key<T>(key_of(std::numeric_limits<T>::infinity()));
  const Row<T> row(scores, n);
  int64_t position = n;
  row.for_each_group([&](const T* group, int64_t first) {
    for (int v = 0; v < kGroupVectors<T>; ++v) {
      const Keys<T> key = keys_at(group + v * kWidth<T>);
      // Negative numbers are negative keys; the key above every other number is a NaN's.
      const Keys<T> is_invalid =
          (key > infinity) | ((key < Keys<T>{}) & (key != splat_key<T>(kNegativeZero)));
      const uint32_t mask = lane_mask(is_invalid);
      if (mask == 0) continue;
      position = first + v * kWidth<T> + __builtin_ctz(mask);
      return false;
    }
    return true;
  });
  return position;
}

template <class T>
struct KeyRange {
  Key<T> lowest;
  Key<T> highest;
};

/// Calls f(key) for every lane. Through memory: picking lanes out of a loop's accumulator would
/// keep the accumulator itself there.
template <class T, class F>
inline void for_each_lane(Keys<T> keys, const F& f) {
  Key<T> lanes[kWidth<T>];
  std::memcpy(lanes, &keys, sizeof(lanes));
  for (const Key<T> key : lanes) f(key);
}

/// Smallest and largest key of a row; -0.0 counts as 0.
template <class T>
KeyRange<T> key_range(const Row<T>& row) {
  KeyRange<T> range{std::numeric_limits<Key<T>>::max(), 0};
  const auto add = [&](Key<T> key) {
    range.lowest = std::min(range.lowest, std::max(key, Key<T>{0}));
    range.highest = std::max(range.highest, key);
  };
  if (row.n < kWidth<T>) {
    for (int64_t i = 0; i < row.n; ++i) add(key_of(row.scores[i]));
    return range;
  }
  Keys<T> lowest = splat_key<T>(range.lowest);
  Keys<T> highest{};
  const auto add_vector = [&](int64_t i) {
    const Keys<T> key = keys_at(row.scores + i);
    lowest = key < lowest ? key : lowest;
    highest = key > highest ? key : highest;
  };
  for (int64_t i = 0; i + kWidth<T> < row.n; i += kWidth<T>) add_vector(i);
  add_vector(row.n - kWidth<T>);  // overlaps the one before
  for_each_lane<T>(lowest, add);
  for_each_lane<T>(highest, add);
  return range;
}

/// How many scores have a key above `threshold`, which is not negative.
template <class T>
int64_t count_above(const Row<T>& row, Key<T> threshold) {
  constexpr int kStep = 4;  // vectors per turn: shorter turns are bound by the loop itself
  const Keys<T> limit = splat_key<T>(threshold);
  Keys<T> count[kStep] = {};
  int64_t i = 0;
  for (; i + kStep * kWidth<T> <= row.n_whole; i += kStep * kWidth<T>) {
#pragma GCC unroll 4
    for (int v = 0; v < kStep; ++v) count[v] -= keys_at(row.scores + i + v * kWidth<T>) > limit;
  }
  for (; i < row.n_whole; i += kWidth<T>) count[0] -= keys_at(row.scores + i) > limit;
  for (int v = 0; v < kGroupVectors<T>; ++v) {
    count[v] -= keys_at(row.rest + v * kWidth<T>) > limit;
  }
  const Keys<T> total = (count[0] + count[1]) + (count[2] + count[3]);
  int64_t sum = 0;
  for_each_lane<T>(total, [&](Key<T> lane) { sum += lane; });
  return sum;
}

template <class T>
struct Threshold {
  Key<T> key;
  int64_t n_above;  // scores above it, at most the wanted count; ties fill the rest
};

/// The smallest key with at most `count` < n scores above it, or any key with exactly `count`.
template <class T>
Threshold<T> find_threshold(const Row<T>& row, int64_t count) {
  const KeyRange<T> range = key_range(row);
  Key<T> low = range.lowest;
  Key<T> high = range.highest;
  int64_t n_from_low = row.n;  // scores at or above `low`, more than `count`
  int64_t n_above_high = 0;    // fewer than `count`
  bool interpolates = true;
  while (low < high) {
    const Key<T> width = high - low;
    Key<T> step = width / 2;
    if (interpolates) {
      // Counts fall about evenly with the key, once the range is a few powers of two.
      const double share =
          static_cast<double>(n_from_low - count) / static_cast<double>(n_from_low - n_above_high);
      step = std::min(static_cast<Key<T>>(static_cast<double>(width) * share), width - 1);
    }
    const Key<T> middle = low + step;
    const int64_t n_above = count_above(row, middle);
    if (n_above == count) return {middle, count};
    if (n_above < count) {
      high = middle;
      n_above_high = n_above;
    } else {
      low = middle + 1;
      n_from_low = n_above;
    }
    // A guess that kept more than half of the range is followed by a plain halving.
    interpolates = high - low <= width / 2;
  }
  return {high, n_above_high};
}

/// Writes the lanes of `group`, ascending indices, that `mask` names; `n_room` indices fit at
/// `out`.
inline void write_indices(int32_t* out, int64_t n_room, Keys<float> group, uint32_t mask) {
  if (n_room >= kGroup) {
    compress_store(reinterpret_cast<float*>(out), reinterpret_cast<Vec<float>>(group), mask);
    return;
  }
  int32_t lanes[kGroup];
  std::memcpy(lanes, &group, sizeof(lanes));
  for (; mask != 0; mask &= mask - 1) *out++ = lanes[__builtin_ctz(mask)];
}

template <class T>
void select_row(const T* scores, int64_t n, int64_t count, int32_t* indices) noexcept {
  if (count == n) {
    for (int64_t i = 0; i < n; ++i) indices[i] = static_cast<int32_t>(i);
    return;
  }
  const Row<T> row(scores, n);
  const Threshold<T> threshold = find_threshold(row, count);
  const Keys<T> limit = splat_key<T>(threshold.key);
  int64_t n_ties = count - threshold.n_above;
  int64_t n_written = 0;
  Keys<float> group_indices{};
  for (int i = 0; i < kGroup; ++i) group_indices[i] = i;
  row.for_each_group([&](const T* group, int64_t) {
    uint32_t above = 0;
    uint32_t ties = 0;
    for (int v = 0; v < kGroupVectors<T>; ++v) {
      const Keys<T> found = keys_at(group + v * kWidth<T>);
      const Keys<T> key = found > Keys<T>{} ? found : Keys<T>{};
      above |= lane_mask(key > limit) << (v * kWidth<T>);
      ties |= lane_mask(key == limit) << (v * kWidth<T>);
    }
    if (n_ties == 0) ties = 0;
    int64_t n_here = __builtin_popcount(ties);
    for (; n_here > n_ties; --n_here) ties &= ~(1U << (31 - __builtin_clz(ties)));
    n_ties -= n_here;
    const uint32_t chosen = above | ties;
    write_indices(indices + n_written, count - n_written, group_indices, chosen);
    n_written += __builtin_popcount(chosen);
    group_indices += kGroup;
    return n_written < count;
  });
}

template <class T>
constexpr SelectEntry<T> make_entry() {
  return {.first_invalid = first_invalid<T>, .select = select_row<T>};
}

}  // namespace select
