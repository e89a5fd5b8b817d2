"""Every CUDA kernel once on a small, awkward size: what compute-sanitizer runs. Results are checked elsewhere."""

from __future__ import annotations

import sys

import torch

from cospadi import native, ops


def fits() -> None:
    """Kernels of the fits."""
    for rows, columns in ((3, 33), (2, 700), (1, 26001)):
        scores = torch.rand(rows, columns, device="cuda")
        for typed in (scores, scores.double()):
            native.select_largest(typed, columns // 2 or 1)
        a, b, c, d = (torch.randn(rows, columns, device="cuda") for _ in range(4))
        support = native.project_rows(a, b, c, scores.int()[:0], columns // 3, 1.3)[0]
        native.project_rows(a, b, c, support, columns // 3, 1.3)
        energy, enough = torch.ones(rows, device="cuda"), torch.zeros(rows, device="cuda")
        native.gradient_step(a, (b > 0).float(), scores, enough, a.clone(), c, d, energy)
    for dtype in (torch.float32, torch.float64):
        atoms = torch.randn(150, 200, device="cuda", dtype=dtype)
        signals = torch.randn(4, 200, device="cuda", dtype=dtype)
        for selection in ("omp", "ormp"):
            native.omp_encode(atoms @ atoms.T, signals @ atoms.T, 135, selection=selection)


def inference() -> None:
    """Kernels of compressed layers."""
    d_out, n_atoms, sparsity = 67, 130, 61
    indices = torch.rand(d_out, n_atoms).topk(sparsity, dim=1).indices.sort(1).values.int()
    mask = native.pack_mask(indices, n_atoms).cuda()
    for dtype in (torch.float32, torch.bfloat16):
        coeffs = torch.randn(d_out, sparsity, device="cuda", dtype=dtype)
        for rows in (1, 4, 17, 100):
            ops.sparse_gemm(torch.randn(rows, n_atoms, device="cuda", dtype=dtype), mask, coeffs)


def main() -> int:
    """Run what is named on the command line, both by default."""
    for name in sys.argv[1:] or ("fits", "inference"):
        {"fits": fits, "inference": inference}[name]()
        torch.cuda.synchronize()
        print(f"{name}: ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
