// The column-sparse GEMM's entries of the kernel table (see cpu/sparse_gemm_types.hpp).

inline void prepare(const StoredRows& z, const SparseColumns& s, void* out) noexcept {
  with_format(z.dtype, s.type, [&](auto format) {
    using Format = decltype(format);
    prepare_rows<Format>(z, s.n_atoms, static_cast<typename Format::Element*>(out));
  });
}

inline void multiply_few(const SparseColumns& s,
                         int64_t first,
                         int64_t n_columns,
                         const StoredRows& z,
                         const void* prepared,
                         float* out,
                         int64_t out_stride) noexcept {
  with_format(z.dtype, s.type, [&](auto format) {
    using Format = decltype(format);
    with_support(s, [&](auto all_atoms) {
      multiply_few_rows<Format, all_atoms.value>(
          s,
          first,
          n_columns,
          z.rows,
          static_cast<const typename Format::Element*>(prepared),
          out,
          out_stride);
    });
  });
}

inline int64_t word_elements(DType z_dtype, CoeffType type) noexcept {
  return with_format(
      z_dtype, type, [](auto format) -> int64_t { return decltype(format)::kWordElements; });
}

inline void pack_rows(const StoredRows& z,
                      const SparseColumns& s,
                      int64_t word,
                      int64_t n_words,
                      void* panel) noexcept {
  with_format(z.dtype, s.type, [&](auto format) {
    using Format = decltype(format);
    pack_row_panel<Format>(
        z, s.n_atoms, word, n_words, static_cast<typename Format::Element*>(panel));
  });
}

inline void expand_columns(const SparseColumns& s,
                           DType z_dtype,
                           int64_t first,
                           int64_t n_columns,
                           int64_t word,
                           int64_t n_words,
                           int64_t* offsets,
                           void* panel) noexcept {
  with_format(z_dtype, s.type, [&](auto format) {
    with_support(s, [&](auto all_atoms) {
      expand_to_panel<decltype(format), all_atoms.value>(
          s, first, n_columns, word, n_words, offsets, static_cast<float*>(panel));
    });
  });
}

inline void multiply_panels(DType z_dtype,
                            CoeffType type,
                            int64_t rows,
                            int64_t cols,
                            int64_t n_words,
                            const void* a,
                            const void* b,
                            float beta,
                            float* c,
                            int64_t c_stride) noexcept {
  with_format(z_dtype, type, [&](auto format) {
    using Format = decltype(format);
    using Element = typename Format::Element;
    gemm_tile<Element>(rows,
                       cols,
                       n_words * Format::kWordElements,
                       1.0F,
                       static_cast<const Element*>(a),
                       static_cast<const Element*>(b),
                       beta,
                       c,
                       c_stride);
  });
}

static_assert(kTileCols<float> <= kMaxPanelCols);

constexpr SparseGemmKernels make_sparse_gemm_kernels() {
  return {.max_few_rows = kFewRows,
          .max_byte_rows = kByteRows,
          .prepared_size = prepared_size,
          .prepare = prepare,
          .multiply_few = multiply_few,
          .panel_rows = kTileRows,
          .panel_cols = kTileCols<float>,
          .word_elements = word_elements,
          .pack_rows = pack_rows,
          .expand_columns = expand_columns,
          .multiply_panels = multiply_panels,
          .load_floats = load_floats,
          .store_floats = store_floats,
          .decode_columns = decode_columns,
          .scale_values = scale_values};
}
