/* The C interface from C99, compiled with -pedantic -Werror and linked with the library alone. */
#include <stdio.h>
#include <string.h>

#include "cospadi/c_api.h"

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #condition, cospadi_last_error()); \
      return 1;                                                                          \
    }                                                                                    \
  } while (0)

int main(void) {
  const uint8_t mask[4] = {0x01, 0x02, 0x06, 0x00};
  const float coeffs[4] = {2.0F, 3.0F, 4.0F, 5.0F};
  const float z[10] = {1.0F, 2.0F, 3.0F, 4.0F, 5.0F, 6.0F, 7.0F, 8.0F, 9.0F, 10.0F};
  float y[2] = {0.0F, 0.0F};
  cospadi_const_matrix in;
  cospadi_matrix out;
  cospadi_sparse_code code;
  cospadi_checkpoint* checkpoint = NULL;

  CHECK(cospadi_version_number() > 0);
  CHECK(strlen(cospadi_version()) >= 5);
  CHECK(cospadi_checkpoint_open("/absent", &checkpoint) == COSPADI_NOT_COMPRESSED);
  CHECK(checkpoint == NULL);
  CHECK(strstr(cospadi_last_error(), "/absent") != NULL);
  cospadi_checkpoint_close(checkpoint);

  in.data = z;
  in.dtype = COSPADI_FLOAT32;
  in.rows = 1;
  in.cols = 10;
  in.stride = 10;
  out.data = y;
  out.dtype = COSPADI_FLOAT32;
  out.rows = 1;
  out.cols = 2;
  out.stride = 2;
  code.n_atoms = 10;
  code.mask = mask;
  code.mask_stride = 2;
  code.coeffs.data = coeffs;
  code.coeffs.dtype = COSPADI_FLOAT32;
  code.coeffs.rows = 2;
  code.coeffs.cols = 2;
  code.coeffs.stride = 2;
  CHECK(cospadi_validate_mask(mask, 2, 2, 10, 2) == COSPADI_OK);
  CHECK(cospadi_sparse_gemm(&in, &code, NULL, COSPADI_FLOAT32, &out, 1) == COSPADI_OK);
  CHECK(y[0] == 32.0F && y[1] == 23.0F);
  return 0;
}
