// Exact OMP / ORMP of one signal.
//
// A row cache makes the exact greedy method run at BLAS-3 speed: when the chosen atom has no row
// yet, one pass over the history computes the rows of the best `block_size` atoms, most of which
// are chosen within the next steps. A row stays valid however long it waits: the steps taken since
// then are subtracted when it is used. Every row thus gets the same sums in the same order as in
// the plain algorithm, whatever the block size: speculation costs time, never exactness.

namespace omp {

/// Scores of one vector of slots; -1 where the atom may not be chosen.
template <class T, bool kIsOrmp>
inline Vec<T> score_of(Vec<T> correlation, Vec<T> energy, Vec<T> tolerance) {
  Vec<T> score = correlation * correlation;
  if constexpr (kIsOrmp) score /= energy;
  return energy > tolerance ? score : splat(T(-1));
}

/// Keeps the best score per lane and the first slot that reached it.
template <class T>
struct RunningBest {
  using Index = decltype(Vec<T>{} > Vec<T>{});

  Vec<T> score = splat(T(-1));
  Index slot{};

  void add(Vec<T> candidate, Index candidate_slot) {
    const Index better = candidate > score;
    score = better ? candidate : score;
    slot = better ? candidate_slot : slot;
  }

  /// The lowest slot among the equal best ones.
  Best<T> result() const {
    Best<T> best{T(-1), -1};
    for (int i = 0; i < kWidth<T>; ++i) {
      const bool is_lower = score[i] == best.score && slot[i] < best.slot;
      if (score[i] > best.score || is_lower) best = {score[i], slot[i]};
    }
    return best;
  }
};

template <class T>
inline typename RunningBest<T>::Index first_slots() {
  typename RunningBest<T>::Index slots{};
  for (int i = 0; i < kWidth<T>; ++i) slots[i] = i;
  return slots;
}

template <class T, bool kIsOrmp>
Best<T> best_slot(const OmpState<T>& state) {
  RunningBest<T> best;
  auto slots = first_slots<T>();
  const Vec<T> tolerance = splat(state.problem->tolerance);
  for (int64_t v = 0; v < state.n_vectors(); ++v) {
    const Vec<T> energy = load(state.energy + v * kWidth<T>);
    const Vec<T> correlation = load(state.correlation + v * kWidth<T>);
    best.add(score_of<T, kIsOrmp>(correlation, energy, tolerance), slots);
    slots += kWidth<T>;
  }
  return best.result();
}

/// Epsilons of rounding error that every energy starts with.
inline constexpr int kEnergyNoise = 64;

/// One step after an atom was chosen: finishes its history row, stores it, and updates
/// correlations, energies and the best atom in the same sweep. V vectors of atoms at a time.
template <class T, bool kIsOrmp, int V>
inline void sweep_vectors(OmpState<T>& state,
                          const T* row,
                          const T* weights,
                          int64_t first_step,
                          int64_t step,
                          T inverse_pivot,
                          T explained,
                          T pivot_noise,
                          int64_t first_vector,
                          typename RunningBest<T>::Index& slots,
                          RunningBest<T>& best) {
  constexpr int64_t kLanes = kWidth<T>;
  T* source[V];
  Vec<T> value[V];
  for (int v = 0; v < V; ++v) {
    const int64_t at = first_vector + v;
    source[v] =
        state.history + at / kPanelVectors * state.panel_stride + at % kPanelVectors * kLanes;
    value[v] = load(row + at * kLanes);
  }
  for (int64_t t = first_step; t < step; ++t) {
    const Vec<T> weight = splat(weights[t]);
    for (int v = 0; v < V; ++v) value[v] -= weight * load(source[v] + t * kPanelLanes<T>);
  }
  const Vec<T> tolerance = splat(state.problem->tolerance);
  // The pivot's energy is known to a relative error, which goes into every h_j^2 and stays there.
  const Vec<T> pivot_error = splat(pivot_noise * inverse_pivot * inverse_pivot);
  for (int v = 0; v < V; ++v) {
    const int64_t at = (first_vector + v) * kLanes;
    const Vec<T> h = value[v] * splat(inverse_pivot);
    store(source[v] + step * kPanelLanes<T>, h);
    const Vec<T> correlation = load(state.correlation + at) - h * splat(explained);
    Vec<T> energy = load(state.energy + at) - h * h;
    const Vec<T> noise = load(state.noise + at) + h * h * pivot_error;
    store(state.noise + at, noise);
    energy = energy > noise ? energy : Vec<T>{};
    store(state.correlation + at, correlation);
    store(state.energy + at, energy);
    best.add(score_of<T, kIsOrmp>(correlation, energy, tolerance), slots);
    slots += kLanes;
  }
}

template <class T, bool kIsOrmp>
Best<T> sweep(
    OmpState<T>& state, int64_t id, int64_t step, T inverse_pivot, T explained, T pivot_noise) {
  const int64_t n_vectors = state.n_vectors();
  const int64_t first_step = state.candidates[id].n_steps;
  const T* row = state.row(id);
  const T* weights = state.column(id);
  RunningBest<T> best;
  auto slots = first_slots<T>();
  // Two panels at once hide the latency of the sums, which may not be split (see the top).
  constexpr int kBoth = 2 * kPanelVectors;
  int64_t v = 0;
  for (; v + kBoth <= n_vectors; v += kBoth) {
    sweep_vectors<T, kIsOrmp, kBoth>(state,
                                     row,
                                     weights,
                                     first_step,
                                     step,
                                     inverse_pivot,
                                     explained,
                                     pivot_noise,
                                     v,
                                     slots,
                                     best);
  }
  for (; v < n_vectors; ++v) {
    sweep_vectors<T, kIsOrmp, 1>(state,
                                 row,
                                 weights,
                                 first_step,
                                 step,
                                 inverse_pivot,
                                 explained,
                                 pivot_noise,
                                 v,
                                 slots,
                                 best);
  }
  return best.result();
}

/// Starts candidate rows for `slot` and the next best slots without one, `n_wanted` in all.
template <class T, bool kIsOrmp>
int64_t choose_candidates(OmpState<T>& state, int64_t slot, int64_t n_wanted) {
  constexpr int64_t kLanes = kWidth<T>;
  const auto start = [&](int64_t chosen) {
    const int32_t id = state.free_rows[--state.n_free];
    state.row_of_slot[chosen] = id;
    state.candidates[id].slot = chosen;
    return id;
  };
  state.chosen_rows[0] = start(slot);
  // Sorted by falling score; insertions become rare once the list is full.
  T* scores = state.top_scores;
  int32_t* slots = state.top_slots;
  const int64_t n_others = n_wanted - 1;
  int64_t n_found = 0;
  T threshold = T(-1);
  const Vec<T> tolerance = splat(state.problem->tolerance);
  for (int64_t v = 0; n_others > 0 && v < state.n_vectors(); ++v) {
    const Vec<T> score = score_of<T, kIsOrmp>(
        load(state.correlation + v * kLanes), load(state.energy + v * kLanes), tolerance);
    for (uint32_t mask = lane_mask(score > splat(threshold)); mask != 0; mask &= mask - 1) {
      const int64_t lane = __builtin_ctz(mask);
      const int64_t candidate = v * kLanes + lane;
      if (state.row_of_slot[candidate] >= 0 || !(score[lane] > threshold)) continue;
      int64_t at = n_found < n_others ? n_found++ : n_others - 1;
      for (; at > 0 && scores[at - 1] < score[lane]; --at) {
        scores[at] = scores[at - 1];
        slots[at] = slots[at - 1];
      }
      scores[at] = score[lane];
      slots[at] = static_cast<int32_t>(candidate);
      if (n_found == n_others) threshold = scores[n_others - 1];
    }
  }
  for (int64_t i = 0; i < n_found; ++i) state.chosen_rows[i + 1] = start(slots[i]);
  return n_found + 1;
}

/// Frees rows until `n_wanted` are free: those whose atoms score lowest now.
template <class T, bool kIsOrmp>
void evict_candidates(OmpState<T>& state, int64_t n_wanted) {
  while (state.n_free < n_wanted) {
    int64_t worst = -1;
    T worst_score = std::numeric_limits<T>::infinity();
    for (int64_t id = 0; id < state.cache_capacity; ++id) {
      const int64_t slot = state.candidates[id].slot;
      if (slot < 0) continue;
      const T energy = state.energy[slot];
      T score = state.correlation[slot] * state.correlation[slot];
      if (kIsOrmp) score /= energy;
      if (!(energy > state.problem->tolerance)) score = T(-1);
      if (worst < 0 || score < worst_score) {
        worst = id;
        worst_score = score;
      }
    }
    state.release(worst);
  }
}

/// One pass: computes the rows of `slot` and of the atoms likely to be chosen next; returns how
/// many.
template <class T, bool kIsOrmp>
int64_t fill_rows(OmpState<T>& state, int64_t slot, int64_t step, int64_t n_wanted) {
  evict_candidates<T, kIsOrmp>(state, n_wanted);
  const int64_t n_ids = choose_candidates<T, kIsOrmp>(state, slot, n_wanted);
  for (int64_t i = 0; i < n_ids; ++i) {
    prefetch_gram_row(state, state.slot_atom[state.candidates[state.chosen_rows[i]].slot]);
  }
  T* interleaved = state.interleaved;
  for (int64_t done = 0; done < n_ids;) {
    const int64_t group = group_rows(n_ids - done);
    gather_columns(state, state.chosen_rows + done, group, step, interleaved);
    interleaved += group * step;
    done += group;
  }
  for (int64_t i = 0; i < n_ids; ++i) {
    CandidateRow& candidate = state.candidates[state.chosen_rows[i]];
    candidate.n_steps = step;
    load_gram_row(state, state.slot_atom[candidate.slot], state.row(state.chosen_rows[i]));
  }
  reduce_rows(state, state.chosen_rows, n_ids, step);
  return n_ids;
}

/// Sets the state to "nothing chosen"; correlations are scaled by `scale` and the atoms' own
/// scales.
template <class T>
void reset(OmpState<T>& state, const T* correlations, T scale) {
  const OmpProblem<T>& p = *state.problem;
  const int64_t n_slots = OmpState<T>::padded(p.n_atoms) + kWidth<T>;
  state.n_slots = p.n_atoms;
  state.is_squeezed = false;
  for (int64_t j = 0; j < p.n_atoms; ++j) {
    state.correlation[j] = correlations[j] * scale * p.scales[j];
    state.energy[j] = p.scales[j] > T(0) ? T(1) : T(0);
    state.noise[j] = kEnergyNoise * std::numeric_limits<T>::epsilon();
    state.slot_atom[j] = static_cast<int32_t>(j);
    state.row_of_slot[j] = -1;
    state.rank_of_atom[j] = -1;
  }
  for (int64_t j = p.n_atoms; j < n_slots; ++j) {
    state.correlation[j] = T(0);
    state.energy[j] = T(0);
    state.noise[j] = T(0);
  }
  state.n_free = 0;
  for (int64_t id = state.cache_capacity - 1; id >= 0; --id) {
    state.candidates[id] = {-1, 0};
    state.free_rows[state.n_free++] = static_cast<int32_t>(id);
  }
}

/// Power of two that brings the largest correlation to about 1, so that squares neither overflow
/// nor vanish. Exact, so a scaled signal gets the same support and exactly scaled coefficients.
template <class T>
int correlation_exponent(const T* correlations, int64_t n) {
  T largest = T(0);
  for (int64_t j = 0; j < n; ++j) {
    const T size = correlations[j] < T(0) ? -correlations[j] : correlations[j];
    largest = size > largest ? size : largest;
  }
  int exponent = 0;
  std::frexp(largest, &exponent);
  // The inverse must be finite; subnormal correlations stay small then, but their squares do not
  // vanish.
  constexpr int kSmallest = std::numeric_limits<T>::min_exponent + 3;
  return exponent > kSmallest ? exponent : kSmallest;
}

/// Coefficients of the chosen atoms by back-substitution, written in ascending order of atoms;
/// missing support entries are padded.
template <class T>
void write_code(OmpState<T>& state, int64_t n_chosen, int exponent, OmpSignal<T>& signal) {
  const OmpProblem<T>& p = *state.problem;
  T* x = state.explained;
  for (int64_t t = n_chosen - 1; t >= 0; --t) {
    const T* factor_row = state.factor + t * (t - 1) / 2;
    x[t] /= state.pivots[t];
    for (int64_t i = 0; i < t; ++i) x[i] -= x[t] * factor_row[i];
  }
  int64_t n_written = 0;
  int64_t n_missing = p.sparsity - n_chosen;
  signal.n_padded = n_missing;
  for (int64_t atom = 0; atom < p.n_atoms; ++atom) {
    const int64_t rank = state.rank_of_atom[atom];
    if (rank < 0 && n_missing == 0) continue;
    if (rank < 0) --n_missing;
    signal.indices[n_written] = static_cast<int32_t>(atom);
    signal.coeffs[n_written] = rank < 0 ? T(0) : std::ldexp(x[rank] * p.scales[atom], exponent);
    ++n_written;
  }
}

/// Squeezing costs about as much per history element as kSqueezeCost multiplications save; waiting
/// for `n_dead` slots has cost n_dead^2 / 2 of them. The square root rule balances the two.
template <class T>
bool is_squeeze_due(const OmpState<T>& state, int64_t n_dead, int64_t n_remaining) {
  constexpr int64_t kSqueezeCost = 3;
  return n_dead * n_dead >= 2 * kSqueezeCost * state.n_slots &&
         n_dead * n_remaining >= 2 * kSqueezeCost * state.n_slots;
}

template <class T, bool kIsOrmp>
void encode_signal(const OmpProblem<T>& problem, OmpSignal<T>& signal, std::byte* arena) {
  OmpState<T> state;
  state.place(problem, arena);
  const int exponent = correlation_exponent(signal.correlations, problem.n_atoms);
  reset(state, signal.correlations, std::ldexp(T(1), -exponent));
  signal.n_passes = signal.n_rows = 0;
  double explained_energy = 0.0;
  int64_t n_dead = 0;
  int64_t step = 0;
  Best<T> best = best_slot<T, kIsOrmp>(state);
  for (; step < problem.sparsity && best.slot >= 0 && best.score >= T(0); ++step) {
    const int64_t slot = best.slot;
    const bool is_last = step + 1 == problem.sparsity;
    T* factor_row = state.factor + step * (step - 1) / 2;
    int64_t id = state.row_of_slot[slot];
    if (id < 0 && !is_last) {
      const int64_t n_left = problem.sparsity - 1 - step;
      const int64_t n_wanted = n_left < problem.block_size ? n_left : problem.block_size;
      signal.n_rows += fill_rows<T, kIsOrmp>(state, slot, step, n_wanted);
      id = state.row_of_slot[slot];
      ++signal.n_passes;
    }
    if (id >= 0) {
      T* column = state.column(id);
      gather_column(state, slot, state.candidates[id].n_steps, step, column);
      std::memcpy(factor_row, column, static_cast<size_t>(step) * sizeof(T));
    } else {
      gather_column(state, slot, 0, step, factor_row);
    }
    const T pivot = std::sqrt(state.energy[slot]);
    const T explained = state.correlation[slot] / pivot;
    const int32_t atom = state.slot_atom[slot];
    state.pivots[step] = pivot;
    state.explained[step] = explained;
    state.rank_of_atom[atom] = static_cast<int32_t>(step);
    explained_energy += static_cast<double>(explained) * static_cast<double>(explained);
    if (is_last) continue;
    state.energy[slot] = T(0);
    best = sweep<T, kIsOrmp>(state, id, step, T(1) / pivot, explained, state.noise[slot]);
    state.release(id);
    ++n_dead;
    if (is_squeeze_due(state, n_dead, problem.sparsity - 1 - step)) {
      squeeze(state, step + 1);
      n_dead = 0;
      best = best_slot<T, kIsOrmp>(state);
    }
  }
  signal.explained = std::ldexp(explained_energy, 2 * exponent);
  write_code(state, step, exponent, signal);
}

template <class T>
OmpEntry<T> make_entry() {
  OmpEntry<T> entry{};
  entry.gram_stride = [](int64_t n_atoms) {
    return skewed_stride<T>(OmpState<T>::padded(n_atoms));
  };
  entry.arena_bytes = [](int64_t n_atoms, int64_t sparsity, int64_t block_size) {
    OmpProblem<T> problem{};
    problem.n_atoms = n_atoms;
    problem.sparsity = sparsity;
    problem.block_size = block_size;
    OmpState<T> state;
    return state.place(problem, nullptr);
  };
  entry.default_block_size = kDefaultBlockSize;
  entry.encode = [](const OmpProblem<T>& problem, OmpSignal<T>& signal, std::byte* arena) {
    if (problem.is_ormp) {
      encode_signal<T, true>(problem, signal, arena);
    } else {
      encode_signal<T, false>(problem, signal, arena);
    }
  };
  return entry;
}

}  // namespace omp
