"""Native kernels on torch tensors: the only package that imports the extension ``_C``.

Functions here check dtype, device and layout, pass addresses, and turn the extension's errors into cospadi's. Shapes
follow the learner's convention: signals and atoms are rows. Every function has a slow twin in `cospadi.reference`.
"""

from cospadi.native.atoms import AtomUpdateStats, update_atoms
from cospadi.native.device_ops import gradient_step, has_cuda_kernels, project_rows
from cospadi.native.gemm import gemm
from cospadi.native.linear import linear
from cospadi.native.omp import OmpResult, omp_encode
from cospadi.native.packed import (
    CODE_FORMATS,
    CodeFormat,
    decode_coeffs,
    pack_fields,
    packed_gemm,
    unpack_fields,
)
from cospadi.native.round_code import RoundCodeResult, round_code
from cospadi.native.runtime import runtime_info
from cospadi.native.select import select_largest
from cospadi.native.sparse import pack_mask, sparse_gemm, unpack_mask, validate_mask

__all__ = [
    "CODE_FORMATS",
    "AtomUpdateStats",
    "CodeFormat",
    "OmpResult",
    "RoundCodeResult",
    "decode_coeffs",
    "gemm",
    "gradient_step",
    "has_cuda_kernels",
    "linear",
    "omp_encode",
    "pack_fields",
    "pack_mask",
    "packed_gemm",
    "project_rows",
    "round_code",
    "runtime_info",
    "select_largest",
    "sparse_gemm",
    "unpack_fields",
    "unpack_mask",
    "update_atoms",
    "validate_mask",
]
