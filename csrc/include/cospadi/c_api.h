/* The C interface of cospadi: reading compressed checkpoints, running their layers, and the
 * kernels beneath. C99 and C++.
 *
 * Every function that can fail returns a cospadi_status; on failure its outputs are untouched and
 * cospadi_last_error() has one line that says what was wrong. No C++ exception leaves a function,
 * and none aborts the process. Unless a function says otherwise, handles may be used from several
 * threads at once, and pointers that a caller passes are borrowed for the call.
 *
 * Matrices are row-major; strides count elements. `n_threads` is the number of threads to use, 0
 * for OpenMP's default; results are the same bits for any number.
 */
#ifndef COSPADI_C_API_H
#define COSPADI_C_API_H

#include <stdint.h>

#include "cospadi/export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* C has no namespaces: NOLINTBEGIN(readability-identifier-naming) */

/* ---- errors and versions ------------------------------------------------------------------- */

typedef int32_t cospadi_status;

enum {
  COSPADI_OK = 0,
  COSPADI_INVALID_ARGUMENT = 1, /* a shape, size, value, name or pointer that the caller can fix */
  COSPADI_OUT_OF_MEMORY = 2,
  COSPADI_NO_CUDA = 3,
  COSPADI_CUDA = 4,
  COSPADI_CHECKPOINT = 5,     /* a checkpoint that is damaged, inconsistent or cannot be read */
  COSPADI_NEWER_FORMAT = 6,   /* a checkpoint that a newer version made */
  COSPADI_NOT_COMPRESSED = 7, /* no folder, no config, or a config without our compression */
  COSPADI_INTERNAL = 8        /* anything else: a defect of the library */
};

/* What the last failed call of this thread said, "" before the first; valid until the next failure
 * in the same thread. Successes leave it. */
COSPADI_API const char* cospadi_last_error(void);

/* Name of a status, for example "COSPADI_CHECKPOINT"; "unknown" for other numbers. Static. */
COSPADI_API const char* cospadi_status_name(cospadi_status status);

/* Version of the library, "major.minor.patch". Static. */
COSPADI_API const char* cospadi_version(void);

/* The same as 10000 major + 100 minor + patch. */
COSPADI_API int32_t cospadi_version_number(void);

/* Instruction set in use ("generic", "avx2", "avx512") in *name, which is static. Fails if the
 * environment variable COSPADI_ISA names one that is not available. */
COSPADI_API cospadi_status cospadi_isa_name(const char** name);

/* Threads used where n_threads is 0. */
COSPADI_API int32_t cospadi_default_thread_count(void);

/* ---- operands ------------------------------------------------------------------------------- */

/* Element types of activations, and of the operands of the kernels. */
typedef int32_t cospadi_dtype;

enum { COSPADI_FLOAT32 = 0, COSPADI_BFLOAT16 = 1, COSPADI_FLOAT16 = 2 };

/* [rows x cols], stride >= cols. */
typedef struct cospadi_matrix {
  void* data;
  cospadi_dtype dtype;
  int64_t rows;
  int64_t cols;
  int64_t stride;
} cospadi_matrix;

typedef struct cospadi_const_matrix {
  const void* data;
  cospadi_dtype dtype;
  int64_t rows;
  int64_t cols;
  int64_t stride;
} cospadi_const_matrix;

/* ---- checkpoints ---------------------------------------------------------------------------- */

/* An open checkpoint folder (FORMAT.md), which is taken for hostile. Its files are mapped and must
 * not be changed while the handle, or a layer of it, is open. */
typedef struct cospadi_checkpoint cospadi_checkpoint;

/* A layer that is ready to run. It outlives the handle of its checkpoint. */
typedef struct cospadi_layer cospadi_layer;

/* Opens a folder and checks everything but the values of tensors. Close it with
 * cospadi_checkpoint_close. */
COSPADI_API cospadi_status cospadi_checkpoint_open(const char* folder,
                                                   cospadi_checkpoint** checkpoint);

/* NULL is allowed. No call on the handle may be running, and what was borrowed from it is gone. */
COSPADI_API void cospadi_checkpoint_close(cospadi_checkpoint* checkpoint);

/* Number of compressed modules. */
COSPADI_API cospadi_status cospadi_checkpoint_module_count(const cospadi_checkpoint* checkpoint,
                                                           int64_t* count);

/* Name of compressed module 0 .. count - 1, in the order of the file; borrowed from the
 * checkpoint. */
COSPADI_API cospadi_status cospadi_checkpoint_module_name(const cospadi_checkpoint* checkpoint,
                                                          int64_t index,
                                                          const char** name);

/* Storage of a dictionary. */
enum {
  COSPADI_DICTIONARY_FLOAT32 = 0,
  COSPADI_DICTIONARY_BFLOAT16 = 1,
  COSPADI_DICTIONARY_FLOAT16 = 2,
  COSPADI_DICTIONARY_INT8 = 3
};

/* Storage of coefficients. */
enum {
  COSPADI_COEFFS_FLOAT32 = 0,
  COSPADI_COEFFS_BFLOAT16 = 1,
  COSPADI_COEFFS_FLOAT16 = 2,
  COSPADI_COEFFS_BFLOAT14 = 3,
  COSPADI_COEFFS_INT8 = 4,
  COSPADI_COEFFS_INT6 = 5,
  COSPADI_COEFFS_INT5 = 6,
  COSPADI_COEFFS_INT4 = 7,
  COSPADI_COEFFS_INT3 = 8
};

/* Sizes and storage of a compressed module (FORMAT.md section 4). */
typedef struct cospadi_layer_info {
  int64_t d_in;
  int64_t d_out;
  int64_t n_atoms;    /* learned atoms; 0 without a dictionary */
  int64_t n_identity; /* 0 or d_in: the inputs are atoms, too */
  int64_t sparsity;   /* coefficients per output */
  int64_t coeffs_group;
  int32_t dictionary_type; /* COSPADI_DICTIONARY_... */
  int32_t coeffs_type;     /* COSPADI_COEFFS_... */
  int32_t has_mask;        /* 0 or 1, as those below */
  int32_t has_bias;
  int32_t is_conv1d;
  int32_t is_member; /* it uses the dictionary of another module */
} cospadi_layer_info;

/* Sizes of the compressed module `name`. */
COSPADI_API cospadi_status cospadi_checkpoint_module_info(const cospadi_checkpoint* checkpoint,
                                                          const char* name,
                                                          cospadi_layer_info* info);

/* Element types of safetensors. */
enum {
  COSPADI_TENSOR_BOOL = 0,
  COSPADI_TENSOR_U8 = 1,
  COSPADI_TENSOR_I8 = 2,
  COSPADI_TENSOR_I16 = 3,
  COSPADI_TENSOR_U16 = 4,
  COSPADI_TENSOR_I32 = 5,
  COSPADI_TENSOR_U32 = 6,
  COSPADI_TENSOR_I64 = 7,
  COSPADI_TENSOR_U64 = 8,
  COSPADI_TENSOR_F16 = 9,
  COSPADI_TENSOR_BF16 = 10,
  COSPADI_TENSOR_F32 = 11,
  COSPADI_TENSOR_F64 = 12,
  COSPADI_TENSOR_F8_E4M3 = 13,
  COSPADI_TENSOR_F8_E5M2 = 14
};

/* A stored tensor, row-major, as it lies in the file. Borrowed from the checkpoint; its values are
 * not checked. */
typedef struct cospadi_tensor {
  const char* name;
  const void* data;
  int64_t bytes;
  const int64_t* shape; /* [n_dims] */
  int32_t n_dims;
  int32_t type; /* COSPADI_TENSOR_... */
} cospadi_tensor;

/* Number of stored tensors, those of compressed modules among them. */
COSPADI_API cospadi_status cospadi_checkpoint_tensor_count(const cospadi_checkpoint* checkpoint,
                                                           int64_t* count);

/* Tensor 0 .. count - 1, by ascending name. */
COSPADI_API cospadi_status cospadi_checkpoint_tensor_at(const cospadi_checkpoint* checkpoint,
                                                        int64_t index,
                                                        cospadi_tensor* tensor);

/* The tensor `name`. */
COSPADI_API cospadi_status cospadi_checkpoint_tensor(const cospadi_checkpoint* checkpoint,
                                                     const char* name,
                                                     cospadi_tensor* tensor);

/* A number of config.json by its keys joined by dots ("rope_parameters.rope_theta"). Fails with
 * COSPADI_INVALID_ARGUMENT if it is not there or is no number. */
COSPADI_API cospadi_status cospadi_checkpoint_config_number(const cospadi_checkpoint* checkpoint,
                                                            const char* path,
                                                            double* number);

/* ---- layers --------------------------------------------------------------------------------- */

/* Checks the values of the compressed module `name` and makes a layer of it. Close it with
 * cospadi_layer_close. */
COSPADI_API cospadi_status cospadi_layer_load(const cospadi_checkpoint* checkpoint,
                                              const char* name,
                                              int32_t n_threads,
                                              cospadi_layer** layer);

/* NULL is allowed. No call on the handle may be running. */
COSPADI_API void cospadi_layer_close(cospadi_layer* layer);

COSPADI_API cospadi_status cospadi_layer_get_info(const cospadi_layer* layer,
                                                  cospadi_layer_info* info);

/* y [n_tokens x d_out] = layer(x [n_tokens x d_in]). Types may differ; sums are in float, y is
 * rounded once. y must not overlap x. */
COSPADI_API cospadi_status cospadi_layer_forward(const cospadi_layer* layer,
                                                 const cospadi_const_matrix* x,
                                                 const cospadi_matrix* y,
                                                 int32_t n_threads);

/* ---- kernels -------------------------------------------------------------------------------- */

/* S [n_atoms x d_out] with exactly `coeffs.cols` coefficients in every column. */
typedef struct cospadi_sparse_code {
  int64_t n_atoms;
  /* [d_out x ceil(n_atoms / 8)]: bit (a & 7) of byte (a >> 3) of row n is set if output n uses atom
   * a. NULL: every output uses every atom, and there are n_atoms coefficients. */
  const uint8_t* mask;
  int64_t mask_stride;
  cospadi_const_matrix coeffs; /* [d_out x sparsity], ascending by atom */
} cospadi_sparse_code;

/* What packed fields mean. */
enum {
  COSPADI_CODE_BFLOAT = 0, /* the upper bits of a bfloat16 */
  COSPADI_CODE_INTEGER = 1 /* a two's complement integer, times its scale */
};

/* As cospadi_sparse_code, with coefficients in fields of `bits` bits: field j of a row is its bits
 * [bits j, bits (j + 1)), least significant first; zero bits pad the row to whole bytes. */
typedef struct cospadi_packed_code {
  int64_t n_atoms;
  const uint8_t* mask;
  int64_t mask_stride;
  int64_t d_out;
  int64_t sparsity;
  int32_t kind;         /* COSPADI_CODE_... */
  int32_t bits;         /* 9 .. 16 for COSPADI_CODE_BFLOAT, 2 .. 8 for COSPADI_CODE_INTEGER */
  const uint8_t* codes; /* [d_out x ceil(bits sparsity / 8)] */
  int64_t codes_stride;
  /* [d_out x ceil(sparsity / group)], one column if group is 0; data NULL unless integers. */
  cospadi_const_matrix scale;
  int64_t group; /* coefficients per scale; 0: one scale per output */
} cospadi_packed_code;

/* Checks that every row of a mask [d_out x ceil(n_atoms / 8)] has `sparsity` bits and no padding
 * bit. The products below rely on it: check once, when a matrix is made or loaded. With another
 * mask their result is wrong, but nothing outside the operands is read. */
COSPADI_API cospadi_status cospadi_validate_mask(
    const uint8_t* mask, int64_t d_out, int64_t stride, int64_t n_atoms, int64_t sparsity);

/* y [rows x d_out] = z [rows x n_atoms] S + bias. `bias` [d_out] of type bias_dtype, or NULL. y
 * must not overlap the inputs. */
COSPADI_API cospadi_status cospadi_sparse_gemm(const cospadi_const_matrix* z,
                                               const cospadi_sparse_code* code,
                                               const void* bias,
                                               cospadi_dtype bias_dtype,
                                               const cospadi_matrix* y,
                                               int32_t n_threads);

/* The same with packed coefficients. */
COSPADI_API cospadi_status cospadi_packed_gemm(const cospadi_const_matrix* z,
                                               const cospadi_packed_code* code,
                                               const void* bias,
                                               cospadi_dtype bias_dtype,
                                               const cospadi_matrix* y,
                                               int32_t n_threads);

/* NOLINTEND(readability-identifier-naming) */

#ifdef __cplusplus
}
#endif

#endif /* COSPADI_C_API_H */
