"""Kernels of the fits as torch operators, for tensors that do not lie on the CPU.

The functions of `cospadi.native` come here with such tensors. Every operator has an implementation for CUDA (this
build's kernels, on the current stream), one for the CPU, which is its definition, and one for shapes alone. Nothing
here reads a value from the device: what a kernel finds wrong shows in its result.
"""

from __future__ import annotations

from typing import Any

import torch

from cospadi import _C
from cospadi.errors import CudaUnavailableError
from cospadi.native.support import native_errors

_SCHEMAS = (
    "select_largest(Tensor scores, SymInt count) -> Tensor",
    "project_rows(Tensor solution, Tensor(a!) sparse, Tensor(b!) dual, Tensor indices, SymInt count, "
    "float relaxation) -> (Tensor, Tensor)",
    "gradient_step(Tensor product, Tensor mask, Tensor inverse_diagonal, Tensor enough, Tensor(a!) x, "
    "Tensor(b!) residual, Tensor(c!) direction, Tensor(d!) energy) -> ()",
    "omp_encode(Tensor gram, Tensor correlations, SymInt sparsity, bool is_ormp) -> (Tensor, Tensor, Tensor)",
)

OMP_WORKSPACE_BYTES = 4 << 30
"""Most memory that the pursuit holds on a GPU: histories of as many signals as fit are built at a time."""


def project_rows(
    solution: torch.Tensor,
    sparse: torch.Tensor,
    dual: torch.Tensor,
    indices: torch.Tensor,
    count: int,
    relaxation: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One projection of `cospadi.learn.splitting`: over-relax, add to the multipliers, keep the largest of every row.

    Parameters
    ----------
    solution : torch.Tensor
        ``[n, A]`` float32, contiguous.
    sparse, dual : torch.Tensor
        ``[n, A]`` float32, contiguous, updated in place: ``dual += relaxation solution + (1 - relaxation) sparse``;
        sparse takes the `count` largest magnitudes of every row of it, and dual keeps the others.
    indices : torch.Tensor
        ``[n, count]`` int32, the last support; ``[0, 0]`` if there is none.
    count : int
        Entries kept per row; ties go to the lowest index.
    relaxation : float
        Over-relaxation.

    Returns
    -------
    (indices, moved)
        ``[n, count]`` int32 ascending, and a 0-d int32: not 0 where a support differs from `indices`.
    """
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.cospadi.project_rows(
        solution, sparse, dual, indices, count, relaxation
    )
    return result


def gradient_step(
    product: torch.Tensor,
    mask: torch.Tensor,
    inverse_diagonal: torch.Tensor,
    enough: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    direction: torch.Tensor,
    energy: torch.Tensor,
) -> None:
    """One step of the masked conjugate gradients of `cospadi.learn.refit`, behind its product.

    Parameters
    ----------
    product : torch.Tensor
        ``[n, A]`` float32, ``direction @ gram``, not masked.
    mask, inverse_diagonal : torch.Tensor
        ``[n, A]``: one on the supports, and the preconditioner on them.
    enough : torch.Tensor
        ``[n]``; a row whose energy is not above it rests.
    x, residual, direction : torch.Tensor
        ``[n, A]``, updated in place.
    energy : torch.Tensor
        ``[n]``, updated in place.
    """
    torch.ops.cospadi.gradient_step(
        product, mask, inverse_diagonal, enough, x, residual, direction, energy
    )


def has_cuda_kernels() -> bool:
    """Whether this build has the CUDA kernels of the fits."""
    return bool(_C.cuda_built())


def _select_cpu(scores: torch.Tensor, count: int) -> torch.Tensor:
    from cospadi.native.select import select_largest

    return select_largest(scores, count)


def _project_cpu(
    solution: torch.Tensor,
    sparse: torch.Tensor,
    dual: torch.Tensor,
    indices: torch.Tensor,
    count: int,
    relaxation: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    dual += relaxation * solution + (1.0 - relaxation) * sparse
    found = _select_cpu(dual.abs(), count)
    kept = torch.zeros_like(dual).scatter_(1, found.long(), 1.0)
    sparse.copy_(dual * kept)
    dual -= sparse
    same = indices.shape == found.shape and torch.equal(indices, found)
    return found, torch.tensor(0 if same else 1, dtype=torch.int32)


def _gradient_step_cpu(
    product: torch.Tensor,
    mask: torch.Tensor,
    inverse_diagonal: torch.Tensor,
    enough: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    direction: torch.Tensor,
    energy: torch.Tensor,
) -> None:
    active = energy > enough
    masked = product * mask
    curvature = (direction * masked).sum(1)
    step = torch.where(active & (curvature > 0), energy / curvature, torch.zeros_like(energy))
    x.addcmul_(step[:, None], direction)
    residual.addcmul_(step[:, None], masked, value=-1.0)
    scaled = residual * inverse_diagonal
    new_energy = (residual * scaled).sum(1)
    beta = torch.where(active & (energy > 0), new_energy / energy, torch.zeros_like(energy))
    direction.copy_(scaled.addcmul_(beta[:, None], direction))
    energy.copy_(torch.where(active, new_energy, energy))


def _omp_cpu(
    gram: torch.Tensor, correlations: torch.Tensor, sparsity: int, is_ormp: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from cospadi.native.omp import omp_encode

    found = omp_encode(gram, correlations, sparsity, selection="ormp" if is_ormp else "omp")
    return found.indices, found.coeffs, torch.tensor(found.n_padded, dtype=torch.int64)


def _select_cuda(scores: torch.Tensor, count: int) -> torch.Tensor:
    scores = scores.detach().contiguous()
    indices = scores.new_empty((scores.shape[0], count), dtype=torch.int32)
    select = (
        _C.cuda_select_largest_f32 if scores.dtype == torch.float32 else _C.cuda_select_largest_f64
    )
    with _on_device("select_largest", scores) as stream:
        select(
            scores.data_ptr(),
            scores.shape[0],
            scores.shape[1],
            count,
            indices.data_ptr(),
            stream,
        )
    return indices


def _project_cuda(
    solution: torch.Tensor,
    sparse: torch.Tensor,
    dual: torch.Tensor,
    indices: torch.Tensor,
    count: int,
    relaxation: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    solution = solution.contiguous()
    rows, columns = solution.shape
    found = indices.new_empty((rows, count))
    has_last = indices.shape == found.shape
    moved = indices.new_zeros(()) if has_last else indices.new_ones(())
    with _on_device("project_rows", solution, sparse, dual) as stream:
        _C.cuda_project_rows(
            solution.data_ptr(),
            sparse.data_ptr(),
            dual.data_ptr(),
            indices.data_ptr() if has_last else 0,
            rows,
            columns,
            count,
            relaxation,
            1.0 - relaxation,
            found.data_ptr(),
            moved.data_ptr(),
            stream,
        )
    return found, moved


def _gradient_step_cuda(
    product: torch.Tensor,
    mask: torch.Tensor,
    inverse_diagonal: torch.Tensor,
    enough: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    direction: torch.Tensor,
    energy: torch.Tensor,
) -> None:
    tensors = (product, mask, inverse_diagonal, enough, x, residual, direction, energy)
    if product.dtype != torch.float32 or not all(t.is_contiguous() for t in tensors):
        _gradient_step_cpu(*tensors)  # in torch's own operators, on the device
        return
    with _on_device("gradient_step", *tensors) as stream:
        _C.cuda_gradient_step(
            product.data_ptr(),
            mask.data_ptr(),
            inverse_diagonal.data_ptr(),
            enough.data_ptr(),
            x.data_ptr(),
            residual.data_ptr(),
            direction.data_ptr(),
            energy.data_ptr(),
            product.shape[0],
            product.shape[1],
            stream,
        )


def _omp_cuda(
    gram: torch.Tensor, correlations: torch.Tensor, sparsity: int, is_ormp: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gram, correlations = gram.contiguous(), correlations.contiguous()
    rows, n_atoms = correlations.shape
    indices = correlations.new_empty((rows, sparsity), dtype=torch.int32)
    coeffs = correlations.new_empty((rows, sparsity))
    n_padded = correlations.new_zeros((), dtype=torch.int64)
    if rows == 0:
        return indices, coeffs, n_padded
    diagonal = gram.diagonal()
    is_atom = diagonal >= torch.finfo(gram.dtype).tiny
    scales = torch.where(is_atom, diagonal.rsqrt(), torch.zeros_like(diagonal)).contiguous()
    scaled = (gram * scales[:, None] * scales).contiguous()
    is_single = gram.dtype == torch.float32
    encode = _C.cuda_omp_encode_f32 if is_single else _C.cuda_omp_encode_f64
    per_signal = _C.cuda_omp_signal_bytes(n_atoms, sparsity, gram.element_size())
    device = torch.cuda.get_device_properties(gram.device)
    tile = max(1, min(rows, 2 * device.multi_processor_count, OMP_WORKSPACE_BYTES // per_signal))
    workspace = torch.empty(tile * per_signal, dtype=torch.uint8, device=gram.device)
    with _on_device("omp_encode", gram, correlations) as stream:
        encode(
            scaled.data_ptr(),
            scales.data_ptr(),
            correlations.data_ptr(),
            rows,
            n_atoms,
            sparsity,
            is_ormp,
            workspace.data_ptr(),
            workspace.numel(),
            indices.data_ptr(),
            coeffs.data_ptr(),
            n_padded.data_ptr(),
            stream,
        )
    return indices, coeffs, n_padded


class _on_device:
    """Makes the tensors' device current and gives its stream; errors are those of the function named."""

    def __init__(self, function: str, *tensors: torch.Tensor) -> None:
        if not has_cuda_kernels():
            raise CudaUnavailableError(
                f"{function}: the tensors are on {tensors[0].device}, but this build has no CUDA kernels; "
                "build where nvcc is on PATH, or use the CPU"
            )
        self._errors = native_errors(function)
        self._guard = torch.cuda.device(tensors[0].device)

    def __enter__(self) -> int:
        self._errors.__enter__()
        self._guard.__enter__()
        return int(torch.cuda.current_stream().cuda_stream)

    def __exit__(self, *details: Any) -> None:  # noqa: ANN401
        self._guard.__exit__(*details)
        self._errors.__exit__(*details)


def _select_fake(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.new_empty((scores.shape[0], count), dtype=torch.int32)


def _project_fake(
    solution: torch.Tensor,
    sparse: torch.Tensor,
    dual: torch.Tensor,
    indices: torch.Tensor,
    count: int,
    relaxation: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return indices.new_empty((solution.shape[0], count)), indices.new_empty(())


def _gradient_step_fake(*tensors: torch.Tensor) -> None:
    return None


def _omp_fake(
    gram: torch.Tensor, correlations: torch.Tensor, sparsity: int, is_ormp: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (correlations.shape[0], sparsity)
    return (
        correlations.new_empty(shape, dtype=torch.int32),
        correlations.new_empty(shape),
        correlations.new_empty((), dtype=torch.int64),
    )


def _register() -> None:
    """Define the operators once per process, also when this module is imported a second time."""
    namespace: Any = torch.ops.cospadi
    if hasattr(namespace, "select_largest"):
        return
    library = torch.library.Library("cospadi", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    for name, cpu, cuda, fake in (
        ("select_largest", _select_cpu, _select_cuda, _select_fake),
        ("project_rows", _project_cpu, _project_cuda, _project_fake),
        ("gradient_step", _gradient_step_cpu, _gradient_step_cuda, _gradient_step_fake),
        ("omp_encode", _omp_cpu, _omp_cuda, _omp_fake),
    ):
        library.impl(name, cpu, "CPU")
        library.impl(name, cuda, "CUDA")
        torch.library.register_fake(f"cospadi::{name}", fake, lib=library)
    # The registration ends with this object, so it must outlive a reloaded or re-imported module.
    namespace._fit_library = library


_register()
