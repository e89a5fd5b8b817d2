"""Types of the extension module; addresses are `Tensor.data_ptr()`, strides count elements."""

def version() -> str: ...
def isa_name() -> str: ...
def available_isas() -> list[str]: ...
def cuda_built() -> bool: ...
def cuda_device_count() -> int: ...
def cuda_unavailable_reason() -> str: ...
def default_thread_count() -> int: ...
def omp_encode_f32(
    gram: int,
    gram_stride: int,
    correlations: int,
    correlations_stride: int,
    signal_energies: int,
    n_signals: int,
    n_atoms: int,
    sparsity: int,
    is_ormp: bool,
    num_threads: int,
    block_size: int,
    indices: int,
    coeffs: int,
    residual_energies: int,
    /,
) -> tuple[int, int, int, int]: ...
def omp_encode_f64(
    gram: int,
    gram_stride: int,
    correlations: int,
    correlations_stride: int,
    signal_energies: int,
    n_signals: int,
    n_atoms: int,
    sparsity: int,
    is_ormp: bool,
    num_threads: int,
    block_size: int,
    indices: int,
    coeffs: int,
    residual_energies: int,
    /,
) -> tuple[int, int, int, int]: ...
def update_atoms_f32(
    atoms: int,
    atoms_stride: int,
    signals: int,
    signals_stride: int,
    indices: int,
    indices_stride: int,
    coeffs: int,
    coeffs_stride: int,
    n_atoms: int,
    dim: int,
    n_signals: int,
    sparsity: int,
    power_iterations: int,
    block_size: int,
    sweeps: int,
    is_reseeding: bool,
    num_threads: int,
    /,
) -> tuple[float, float, int, int, int, int]: ...
def update_atoms_f64(
    atoms: int,
    atoms_stride: int,
    signals: int,
    signals_stride: int,
    indices: int,
    indices_stride: int,
    coeffs: int,
    coeffs_stride: int,
    n_atoms: int,
    dim: int,
    n_signals: int,
    sparsity: int,
    power_iterations: int,
    block_size: int,
    sweeps: int,
    is_reseeding: bool,
    num_threads: int,
    /,
) -> tuple[float, float, int, int, int, int]: ...
def sparse_gemm(
    z: int,
    z_dtype: int,
    rows: int,
    z_stride: int,
    n_atoms: int,
    mask: int,
    mask_cols: int,
    coeffs: int,
    coeffs_dtype: int,
    d_out: int,
    sparsity: int,
    bias: int,
    bias_dtype: int,
    y: int,
    num_threads: int,
    /,
) -> None: ...
def pack_mask(indices: int, rows: int, sparsity: int, n_atoms: int, mask: int, /) -> None: ...
def unpack_mask(mask: int, rows: int, n_atoms: int, sparsity: int, indices: int, /) -> None: ...
def validate_mask(mask: int, rows: int, n_atoms: int, sparsity: int, /) -> None: ...
def packed_gemm(
    z: int,
    z_dtype: int,
    rows: int,
    z_stride: int,
    n_atoms: int,
    mask: int,
    mask_cols: int,
    codes: int,
    d_out: int,
    row_bytes: int,
    sparsity: int,
    kind: int,
    bits: int,
    scale: int,
    scale_dtype: int,
    n_groups: int,
    group: int,
    bias: int,
    bias_dtype: int,
    y: int,
    num_threads: int,
    /,
) -> None: ...
def decode_coeffs(
    codes: int,
    d_out: int,
    row_bytes: int,
    sparsity: int,
    kind: int,
    bits: int,
    scale: int,
    scale_dtype: int,
    n_groups: int,
    group: int,
    out: int,
    num_threads: int,
    /,
) -> None: ...
def pack_fields(
    values: int, rows: int, n: int, bits: int, packed: int, num_threads: int, /
) -> None: ...
def unpack_fields(
    packed: int, rows: int, n: int, bits: int, is_signed: bool, values: int, num_threads: int, /
) -> None: ...
def gemm_f32(
    alpha: float,
    a: int,
    m: int,
    k: int,
    a_row_stride: int,
    a_col_stride: int,
    b: int,
    n: int,
    b_row_stride: int,
    b_col_stride: int,
    beta: float,
    c: int,
    c_stride: int,
    num_threads: int,
    /,
) -> None: ...
def gemm_f64(
    alpha: float,
    a: int,
    m: int,
    k: int,
    a_row_stride: int,
    a_col_stride: int,
    b: int,
    n: int,
    b_row_stride: int,
    b_col_stride: int,
    beta: float,
    c: int,
    c_stride: int,
    num_threads: int,
    /,
) -> None: ...
