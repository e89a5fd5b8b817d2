// Per-signal state of the OMP kernel and the passes over it.
//
// Chosen atoms j_0, j_1, ... define history rows
//     h_t = (G[j_t, :] - sum_{i<t} H[i][j_t] h_i) / sqrt(n_{j_t}),
// the correlations of all atoms with the t-th direction of the orthonormalised support. Column j of
// the history is also row j of the Cholesky factor of the support's Gram. The history is the whole
// cost: its bytes and flops grow with the square of the sparsity.
//
// The history is kept in panels of a few vectors of atoms, [panel][step][lane], so that a pass
// streams through memory. The live atoms occupy "slots"; chosen and dependent atoms are squeezed
// out from time to time.

namespace omp {

/// Lanes, tile and panel sizes: kTileRows x kPanelVectors accumulators, kPanelVectors loads of the
/// history and one broadcast fit in the registers (32 with AVX-512, 16 otherwise).
#if defined(COSPADI_TARGET_AVX512)
inline constexpr int kPanelVectors = 3;
inline constexpr int kTileRows = 8;
#elif defined(COSPADI_TARGET_AVX2)
inline constexpr int kPanelVectors = 3;
inline constexpr int kTileRows = 4;
#else
inline constexpr int kPanelVectors = 2;
inline constexpr int kTileRows = 4;
#endif

/// Candidate rows per pass: 8 to 12 are fastest at 488 and 2016 atoms with AVX2 and AVX-512; more
/// rows wait longer and are finished by the slower sweep.
inline constexpr int64_t kDefaultBlockSize = 8;

/// Candidate rows that may wait at the same time, as a multiple of the block size: candidates that
/// were computed but not chosen yet stay valid.
inline constexpr int64_t kCacheBlocks = 3;

template <class T>
inline constexpr int64_t kPanelLanes = kPanelVectors * kWidth<T>;

/// Distance between two panels or rows, in elements: whole cache lines, and never a multiple of the
/// page size, which would put equal positions of all panels into the same few cache sets.
template <class T>
inline int64_t skewed_stride(int64_t elements) {
  constexpr int64_t kPage = 4096;
  constexpr int64_t kSkew = 320;
  const int64_t bytes = round_up(elements * static_cast<int64_t>(sizeof(T)), kPage) + kSkew;
  return bytes / static_cast<int64_t>(sizeof(T));
}

/// A candidate row: G[atom, :] minus the first `n_steps` terms of the sum, not yet divided.
struct CandidateRow {
  int64_t slot;
  int64_t n_steps;
};

template <class T>
struct Best {
  T score;
  int64_t slot;
};

template <class T>
struct OmpState {
  const OmpProblem<T>* problem;
  int64_t n_slots;       // live atoms at the last squeeze (padding not counted)
  int64_t panel_stride;  // elements between panels of the history
  int64_t row_stride;    // elements between candidate rows
  int64_t cache_capacity;

  T* history;      // [panel][sparsity][kPanelLanes]
  T* rows;         // [cache_capacity x row_stride] candidate rows
  T* columns;      // [cache_capacity x sparsity] history column of each candidate
  T* interleaved;  // [row group][sparsity][rows of the group] columns as the tile reads them
  T* factor;       // packed lower triangle of the Cholesky factor without its diagonal
  T* correlation;  // [slots] <d_j, r>
  T* energy;       // [slots] |q_j|^2; at most the tolerance: chosen, dependent or padding
  T* noise;        // [slots] rounding error of the energy; an atom with less energy is dependent
  T* scratch;      // [slots] one row while squeezing; scores while choosing candidates
  T* explained;    // [sparsity] alpha_t = <h_t direction, y>
  T* pivots;       // [sparsity] sqrt(n_{j_t})
  int32_t* slot_atom;        // [slots]
  int32_t* row_of_slot;      // [slots] candidate row or -1
  int32_t* rank_of_atom;     // [n_atoms] step at which an atom was chosen or -1
  uint32_t* live_masks;      // [vectors of atoms] atoms that still have a slot, one bit per lane
  uint32_t* squeeze_masks;   // [vectors of slots] slots that stay
  LaneIndex<T>* picks;       // [slots] lane numbers that build a squeezed vector
  int32_t* free_rows;        // [cache_capacity] stack
  CandidateRow* candidates;  // [cache_capacity]
  int32_t* chosen_rows;      // [block size] candidate rows of one pass
  T* top_scores;             // [block size] while choosing candidates
  int32_t* top_slots;        // [block size]
  int64_t n_free;
  bool is_squeezed;

  static int64_t padded(int64_t n) { return round_up(n, kPanelLanes<T>); }

  /// Lays the state out in the arena; returns the bytes it takes.
  int64_t place(const OmpProblem<T>& p, std::byte* arena) {
    const int64_t slots = padded(p.n_atoms) + kWidth<T>;
    const int64_t s = p.sparsity;
    problem = &p;
    panel_stride = skewed_stride<T>(s * kPanelLanes<T>);
    row_stride = skewed_stride<T>(slots);
    cache_capacity = kCacheBlocks * p.block_size;
    ArenaCursor cursor{arena};
    history = cursor.take<T>(padded(p.n_atoms) / kPanelLanes<T> * panel_stride);
    rows = cursor.take<T>(cache_capacity * row_stride);
    columns = cursor.take<T>(cache_capacity * s);
    interleaved = cursor.take<T>(round_up(p.block_size, kTileRows) * s);
    factor = cursor.take<T>(s * (s - 1) / 2 + kWidth<T>);
    correlation = cursor.take<T>(slots);
    energy = cursor.take<T>(slots);
    noise = cursor.take<T>(slots);
    scratch = cursor.take<T>(slots);
    explained = cursor.take<T>(s + kWidth<T>);
    pivots = cursor.take<T>(s);
    slot_atom = cursor.take<int32_t>(slots);
    row_of_slot = cursor.take<int32_t>(slots);
    rank_of_atom = cursor.take<int32_t>(p.n_atoms);
    live_masks = cursor.take<uint32_t>(slots / kWidth<T> + 1);
    squeeze_masks = cursor.take<uint32_t>(slots / kWidth<T> + 1);
    picks = cursor.take<LaneIndex<T>>(slots);
    free_rows = cursor.take<int32_t>(cache_capacity);
    candidates = cursor.take<CandidateRow>(cache_capacity);
    chosen_rows = cursor.take<int32_t>(p.block_size);
    top_scores = cursor.take<T>(p.block_size);
    top_slots = cursor.take<int32_t>(p.block_size);
    return cursor.used;
  }

  int64_t n_vectors() const { return (n_slots + kWidth<T> - 1) / kWidth<T>; }
  T* history_at(int64_t slot) const {
    return history + slot / kPanelLanes<T> * panel_stride + slot % kPanelLanes<T>;
  }
  T* row(int64_t id) const { return rows + id * row_stride; }
  T* column(int64_t id) const { return columns + id * problem->sparsity; }
  void release(int64_t id) {
    row_of_slot[candidates[id].slot] = -1;
    candidates[id].slot = -1;
    free_rows[n_free++] = static_cast<int32_t>(id);
  }
};

/// Rows of one tile -= columns^T history, for one panel: R candidate rows times V vectors of atoms
/// stay in registers while the panel streams by once.
template <class T, int R, int V>
inline void reduce_tile(const T* panel, const T* interleaved, int64_t n_steps, T* const* rows) {
  Vec<T> sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = load(rows[r] + v * kWidth<T>);
  }
  for (int64_t t = 0; t < n_steps; ++t) {
    Vec<T> atoms[V];
    for (int v = 0; v < V; ++v) atoms[v] = load(panel + v * kWidth<T>);
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = splat(interleaved[r]);
      for (int v = 0; v < V; ++v) sum[r][v] -= weight * atoms[v];
    }
    panel += kPanelLanes<T>;
    interleaved += R;
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(rows[r] + v * kWidth<T>, sum[r][v]);
  }
}

template <class T, int R>
inline void reduce_panel(
    const T* panel, int64_t n_vectors, const T* interleaved, int64_t n_steps, T* const* rows) {
  static_assert(kPanelVectors <= 3);
  if (n_vectors >= kPanelVectors) {
    reduce_tile<T, R, kPanelVectors>(panel, interleaved, n_steps, rows);
  } else if (n_vectors == 2) {
    reduce_tile<T, R, 2>(panel, interleaved, n_steps, rows);
  } else {
    reduce_tile<T, R, 1>(panel, interleaved, n_steps, rows);
  }
}

/// Largest power of two up to `remaining` candidates, at most one tile.
inline int64_t group_rows(int64_t remaining) {
  int64_t rows = kTileRows;
  while (rows > remaining) rows /= 2;
  return rows;
}

/// One pass over the first `n_steps` history rows for the candidate rows `ids`.
template <class T>
void reduce_rows(const OmpState<T>& state, const int32_t* ids, int64_t n_ids, int64_t n_steps) {
  const int64_t n_vectors = state.n_vectors();
  for (int64_t first = 0; first < n_vectors; first += kPanelVectors) {
    const T* panel = state.history + first / kPanelVectors * state.panel_stride;
    const T* interleaved = state.interleaved;
    for (int64_t done = 0; done < n_ids;) {
      const int64_t group = group_rows(n_ids - done);
      T* rows[kTileRows];
      for (int64_t r = 0; r < group; ++r) {
        rows[r] = state.row(ids[done + r]) + first * kWidth<T>;
      }
      switch (group) {
        case 8:
          reduce_panel<T, (kTileRows >= 8 ? 8 : 1)>(
              panel, n_vectors - first, interleaved, n_steps, rows);
          break;
        case 4:
          reduce_panel<T, 4>(panel, n_vectors - first, interleaved, n_steps, rows);
          break;
        case 2:
          reduce_panel<T, 2>(panel, n_vectors - first, interleaved, n_steps, rows);
          break;
        default:
          reduce_panel<T, 1>(panel, n_vectors - first, interleaved, n_steps, rows);
      }
      interleaved += group * n_steps;
      done += group;
    }
  }
}

/// Entries `first_step` .. `step` - 1 of the history column of a slot.
template <class T>
void gather_column(
    const OmpState<T>& state, int64_t slot, int64_t first_step, int64_t step, T* column) {
  const T* source = state.history_at(slot);
  for (int64_t t = first_step; t < step; ++t) column[t] = source[t * kPanelLanes<T>];
}

/// The first `n_steps` entries of the history columns of `n_ids` candidates, each to its own place
/// and side by side as the tile reads them. All columns at once: every entry is a cache miss of its
/// own, and more of them are under way together.
template <class T>
void gather_columns(
    const OmpState<T>& state, const int32_t* ids, int64_t n_ids, int64_t n_steps, T* interleaved) {
  const T* sources[kTileRows];
  T* columns[kTileRows];
  for (int64_t r = 0; r < n_ids; ++r) {
    sources[r] = state.history_at(state.candidates[ids[r]].slot);
    columns[r] = state.column(ids[r]);
  }
  for (int64_t t = 0; t < n_steps; ++t) {
    for (int64_t r = 0; r < n_ids; ++r) {
      const T value = sources[r][t * kPanelLanes<T>];
      columns[r][t] = value;
      interleaved[t * n_ids + r] = value;
    }
  }
}

/// Rows of the Gram come from the last cache level or from memory.
template <class T>
void prefetch_gram_row(const OmpState<T>& state, int64_t atom) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  const OmpProblem<T>& p = *state.problem;
  const T* source = p.gram + atom * p.gram_stride;
  for (int64_t j = 0; j < p.n_atoms; j += kLine) __builtin_prefetch(source + j, 0, 2);
}

/// row = live entries of G[atom, :].
template <class T>
void load_gram_row(const OmpState<T>& state, int64_t atom, T* row) {
  const OmpProblem<T>& p = *state.problem;
  const T* source = p.gram + atom * p.gram_stride;
  if (!state.is_squeezed) {
    std::memcpy(row, source, static_cast<size_t>(state.n_vectors() * kWidth<T>) * sizeof(T));
    return;
  }
  T* out = row;
  for (int64_t v = 0; v * kWidth<T> < p.n_atoms; ++v) {
    const uint32_t mask = state.live_masks[v];
    compress_store(out, load(source + v * kWidth<T>), mask);
    out += __builtin_popcount(mask);
  }
  store(out, Vec<T>{});
}

/// Squeezes the history in place, one vector of the result after another so that memory is read and
/// written in order. The order of slots is kept, so no source lies before its target.
template <class T>
void squeeze_history(OmpState<T>& state, const uint32_t* masks, int64_t n_live, int64_t n_steps) {
  constexpr int64_t kLanes = kWidth<T>;
  const auto vector_at = [&](int64_t v) {
    return state.history + v / kPanelVectors * state.panel_stride + v % kPanelVectors * kLanes;
  };
  int64_t source = 0;        // vector of the next live slot
  uint32_t mask = masks[0];  // its live slots that are not placed yet
  for (int64_t target = 0; target * kLanes < n_live; ++target) {
    const int64_t n_lanes = n_live - target * kLanes < kLanes ? n_live - target * kLanes : kLanes;
    while (mask == 0) mask = masks[++source];
    if (source == target && __builtin_popcount(mask) == kLanes) {
      mask = 0;
      continue;
    }
    const int64_t first = source;
    // Lane numbers of one pick per source after the first; what is already there stays in place.
    LaneIndex<T>* picks = state.picks;
    int64_t n_picks = 0;
    const auto start_pick = [&] {
      for (int64_t i = 0; i < kLanes; ++i) {
        picks[n_picks * kLanes + i] = static_cast<LaneIndex<T>>(i);
      }
      ++n_picks;
    };
    start_pick();
    for (int64_t i = 0; i < n_lanes; ++i) {
      while (mask == 0) mask = masks[++source];
      for (int64_t behind = source - first - n_picks; behind > 0; --behind) start_pick();
      const int64_t lane = __builtin_ctz(mask);
      mask &= mask - 1;
      picks[(n_picks - 1) * kLanes + i] =
          static_cast<LaneIndex<T>>(source == first ? lane : lane + kLanes);
    }
    T* out = vector_at(target);
    const T* in = vector_at(first);
    const T* next = vector_at(source == first ? first : first + 1);
    if (n_picks == 1) {
      for (int64_t t = 0; t < n_steps; ++t) {
        const int64_t at = t * kPanelLanes<T>;
        store(out + at, pick<T>(load(in + at), load(next + at), picks));
      }
      continue;
    }
    for (int64_t t = 0; t < n_steps; ++t) {
      const int64_t at = t * kPanelLanes<T>;
      Vec<T> value = load(in + at);
      for (int64_t p = 0; p < n_picks; ++p) {
        value = pick<T>(value, load(vector_at(first + 1 + p) + at), picks + p * kLanes);
      }
      store(out + at, value);
    }
  }
}

/// Removes the slots of chosen and dependent atoms from the whole state. The order is kept, so the
/// lowest slot stays the lowest atom.
template <class T>
void squeeze(OmpState<T>& state, int64_t n_steps) {
  constexpr int64_t kLanes = kWidth<T>;
  const int64_t n_vectors = state.n_vectors();
  const T tolerance = state.problem->tolerance;
  for (int64_t id = 0; id < state.cache_capacity; ++id) {
    CandidateRow& candidate = state.candidates[id];
    // An atom may have become dependent while its row was waiting.
    if (candidate.slot >= 0 && !(state.energy[candidate.slot] > tolerance)) state.release(id);
  }
  uint32_t* masks = state.squeeze_masks;
  int64_t n_live = 0;
  for (int64_t v = 0; v < n_vectors; ++v) {
    masks[v] = lane_mask(load(state.energy + v * kLanes) > splat(tolerance));
    n_live += __builtin_popcount(masks[v]);
  }
  const int64_t n_live_vectors = (n_live + kLanes - 1) / kLanes;
  const auto squeeze_row = [&](auto&& source, auto&& target) {
    T* out = state.scratch;
    for (int64_t v = 0; v < n_vectors; ++v) {
      compress_store(out, load(source(v)), masks[v]);
      out += __builtin_popcount(masks[v]);
    }
    store(out, Vec<T>{});
    for (int64_t v = 0; v < n_live_vectors; ++v) store(target(v), load(state.scratch + v * kLanes));
  };
  const auto flat = [&](T* data) {
    const auto at = [=](int64_t v) { return data + v * kLanes; };
    squeeze_row(at, at);
  };
  squeeze_history(state, masks, n_live, n_steps);
  flat(state.correlation);
  flat(state.noise);
  for (int64_t id = 0; id < state.cache_capacity; ++id) {
    if (state.candidates[id].slot >= 0) flat(state.row(id));
  }
  flat(state.energy);

  std::memset(state.live_masks,
              0,
              static_cast<size_t>(state.problem->n_atoms / kLanes + 1) * sizeof(uint32_t));
  int64_t next = 0;
  for (int64_t v = 0; v < n_vectors; ++v) {
    for (uint32_t mask = masks[v]; mask != 0; mask &= mask - 1) {
      const int64_t slot = v * kLanes + __builtin_ctz(mask);
      const int32_t atom = state.slot_atom[slot];
      const int32_t row = state.row_of_slot[slot];
      state.slot_atom[next] = atom;
      state.row_of_slot[next] = row;
      state.live_masks[atom / kLanes] |= 1U << (atom % kLanes);
      if (row >= 0) state.candidates[row].slot = next;
      ++next;
    }
  }
  state.n_slots = n_live;
  state.is_squeezed = true;
}

}  // namespace omp
