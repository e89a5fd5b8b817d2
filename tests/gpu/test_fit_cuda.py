"""Fits on a GPU: kernels against the CPU's, whole fits and the main job against the CPU."""

from __future__ import annotations

import pytest
import torch

from cospadi import native
from cospadi.learn.block_update import update_atoms_in_blocks
from cospadi.learn.fit import FitInput, FitSettings, fit
from cospadi.learn.methods import FactorSize
from cospadi.learn.options import LearnOptions
from cospadi.learn.output_metric import output_metric
from cospadi.learn.quantize import StorageTypes
from cospadi.learn.whitening import whiten_gram

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and native.has_cuda_kernels()),
    reason="needs a CUDA device, torch with CUDA and a build with CUDA",
)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (3, 33), (7, 256), (50, 2704), (5, 14700), (2, 70001)])
def test_kernel_select(size, dtype):
    scores = normal(*size, dtype=dtype).abs()
    scores[:, ::3] = scores[:, :1].clone()  # ties
    for count in sorted({1, (size[1] + 1) // 2, max(size[1] - 1, 1), size[1]}):
        found = native.select_largest(scores.cuda(), count)
        assert torch.equal(found.cpu(), native.select_largest(scores, count)), count


def test_kernel_select_takes_views_and_streams():
    scores = normal(40, 90).abs()
    expected = native.select_largest(scores, 20)
    assert torch.equal(native.select_largest(scores.T.contiguous().cuda().T, 20).cpu(), expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = native.select_largest(scores.cuda(), 20)
    stream.synchronize()
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("size", [(1, 1), (9, 100), (40, 2704), (3, 26001)])
def test_kernel_project(size):
    tensors = [normal(*size, seed=seed) for seed in range(3)]
    count = max(size[1] // 3, 1)
    last = native.select_largest(normal(*size, seed=9).abs(), count)
    for support in (last[:0], last):
        here = [t.clone() for t in tensors]
        there = [t.cuda() for t in tensors]
        wanted, moved = native.project_rows(*here, support, count, 1.3)
        found, found_moved = native.project_rows(*there, support.cuda(), count, 1.3)
        assert torch.equal(found.cpu(), wanted)
        assert int(found_moved) == int(moved)
        for mine, other in zip(there, here, strict=True):
            assert torch.equal(mine.cpu(), other)
        again, rests = native.project_rows(
            tensors[0].cuda(), tensors[1].cuda(), tensors[2].cuda(), found, count, 1.3
        )
        assert torch.equal(again, found) and int(rests) == 0


def test_kernel_gradient_step():
    rows, columns = 30, 700
    mask = (normal(rows, columns) > 0).float()
    gram = normal(columns, columns, seed=1) / 40
    gram = gram @ gram.T + torch.eye(columns)
    inverse = mask / gram.diagonal()
    residual = normal(rows, columns, seed=2) * mask
    direction, x = residual * inverse, torch.zeros(rows, columns)
    energy = (residual * direction).sum(1)
    enough = torch.zeros(rows)
    enough[:5] = 2 * energy[:5]  # these rest
    state = [mask, inverse, enough, x, residual, direction, energy]
    there = [t.cuda() for t in state]
    for _ in range(6):
        for tensors, product in ((state, gram), (there, gram.cuda())):
            native.gradient_step(tensors[5] @ product, *tensors)
    for mine, other in zip(there, state, strict=True):
        active = mine.cpu()[5:], other[5:]
        torch.testing.assert_close(*active, rtol=1e-3, atol=1e-4)
    assert bool((there[3][:5] == 0).all())


@pytest.mark.parametrize("selection", ["omp", "ormp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1, 1), (40, 12, 64), (300, 140, 400), (1048, 200, 1100)])
def test_kernel_omp(size, dtype, selection):
    n_atoms, sparsity, d = size
    atoms, signals = normal(n_atoms, d, dtype=dtype), normal(6, d, dtype=dtype, seed=1)
    gram, correlations = atoms @ atoms.T, signals @ atoms.T
    energies = signals.square().sum(1)
    expected = native.omp_encode(
        gram, correlations, sparsity, selection=selection, signal_energies=energies
    )
    found = native.omp_encode(
        gram.cuda(),
        correlations.cuda(),
        sparsity,
        selection=selection,
        signal_energies=energies.cuda(),
    )
    assert found.n_padded == expected.n_padded == 0
    same = (found.indices.cpu() == expected.indices).float().mean()
    assert same > (0.99 if dtype == torch.float64 else 0.8)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(
        found.residual_energies.cpu(),
        expected.residual_energies,
        rtol=tolerance,
        atol=tolerance * float(energies.max()),
    )
    assert bool((found.indices.diff(dim=1) > 0).all())


def test_kernel_omp_pads_dependent_atoms():
    atoms = normal(4, 10)
    atoms = torch.cat([atoms, atoms, torch.zeros(1, 10)])
    signals = normal(3, 10, seed=1)
    found = native.omp_encode((atoms @ atoms.T).cuda(), (signals @ atoms.T).cuda(), 6)
    assert found.n_padded == 6


def test_wrong_arguments_are_refused_before_the_device():
    gram = torch.eye(4).cuda()
    with pytest.raises(ValueError, match="like the Gram"):
        native.omp_encode(gram, torch.ones(2, 4), 2)
    with pytest.raises(ValueError, match="count"):
        native.select_largest(gram.abs(), 5)


def test_block_update():
    signals, atoms = normal(300, 64), torch.nn.functional.normalize(normal(40, 64, seed=1), dim=1)
    code = native.omp_encode(atoms @ atoms.T, signals @ atoms.T, 8)
    results = []
    for device in ("cpu", "cuda"):
        mine, coeffs = atoms.to(device, copy=True), code.coeffs.to(device, copy=True)
        stats = update_atoms_in_blocks(
            mine,
            signals.to(device),
            code.indices.to(device),
            coeffs,
            power_iterations=1,
            block_size=16,
            sweeps=2,
            unused="skip",
        )
        results.append((mine.cpu(), coeffs.cpu(), stats.objective_after))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-4)
    assert results[0][2] == pytest.approx(results[1][2], rel=1e-5)


D_OUT, D_IN = 192, 128
OPTIONS = LearnOptions(iterations=3, tolerance=0.0)
FITS = {
    "augmented": FitSettings("cospadi", FactorSize(D_IN, 16, 56), StorageTypes(), OPTIONS),
    **{
        products: FitSettings(
            "cospadi", FactorSize(D_IN, 16, 56), StorageTypes(), LearnOptions(products=products)
        )
        for products in ("tf32", "tf32x3")
    },
    "int4": FitSettings("cospadi", FactorSize(D_IN, 16, 56), StorageTypes(coeffs="int4"), OPTIONS),
    "low rank": FitSettings("cospadi", FactorSize(0, 30, 30), StorageTypes(), OPTIONS),
    **{
        solver: FitSettings(
            "cospadi",
            FactorSize(0, 80, 32),
            StorageTypes(),
            LearnOptions(iterations=3, tolerance=0.0, solver=solver),
        )
        for solver in ("omp", "ormp", "obs", "niht", "htp", "admm")
    },
    "compot": FitSettings("compot", FactorSize(0, 80, 32), StorageTypes(), OPTIONS),
    "sparsegpt": FitSettings("sparsegpt", FactorSize(D_IN, 0, 64), StorageTypes(), OPTIONS),
    "gptq": FitSettings("gptq", FactorSize(D_IN, 0, D_IN), StorageTypes(coeffs="int4"), OPTIONS),
}


def run_fit(settings, device, *, with_fisher=False):
    weight = 0.3 * normal(D_OUT, D_IN) + normal(D_OUT, 4, seed=1) @ normal(4, D_IN, seed=2)
    mixing = normal(D_IN, D_IN, dtype=torch.float64, seed=3)
    mixing *= torch.arange(1, D_IN + 1) ** -1.0
    gram = (mixing @ mixing.T + 1e-6 * torch.eye(D_IN, dtype=torch.float64)).to(device)
    output = None
    if with_fisher:
        rows = normal(400, D_OUT, dtype=torch.float64, seed=4)
        output = output_metric((rows.T @ rows / 400).to(device), "layer")
    given = FitInput(
        "layer", weight.to(device), None, gram, whiten_gram(gram, "layer"), output=output
    )
    ((factor, report),) = fit([given], settings)
    assert factor.coeffs.is_cpu
    return report.relative_error


@pytest.mark.parametrize("name", FITS)
def test_fits(name):
    errors = [run_fit(FITS[name], device) for device in ("cpu", "cuda")]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_fit_with_an_output_metric():
    errors = [run_fit(FITS["augmented"], d, with_fisher=True) for d in ("cpu", "cuda")]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0.3},
        {"ratio": 0.3, "sequential": True},
        {"ratio": 0.3, "reconstruction": "blockwise", "reconstruction_epochs": 1},
        {"bits": 4.25, "output_metric": "fisher", "backward_samples": 4},
    ],
    ids=["fast", "sequential", "reconstruction", "integers"],
)
def test_the_main_job(settings, tiny_model_dir, tmp_path):
    from cospadi.pipeline.compress import compress

    settings = {"samples": 8, "sequence_length": 48, "batch_size": 4, **settings}
    results = [
        compress(tiny_model_dir("llama"), tmp_path / device, device=device, **settings)
        for device in ("cpu", "cuda")
    ]
    assert not results[1].failed
    for name, report in results[1].reports.items():
        expected = results[0].reports[name]["relative_error"]
        assert report["relative_error"] == pytest.approx(expected, rel=0.2, abs=1e-4), name


def test_a_model_larger_than_the_memory_runs_by_blocks(monkeypatch, tiny_model_dir):
    from cospadi.calibration import placement
    from cospadi.calibration.statistics import collect_grams
    from cospadi.model.discover import discover
    from tiny_models import make_model

    monkeypatch.setattr(placement, "RESIDENT_SHARE", 0.0)
    model = make_model("llama").requires_grad_(False)
    targets, _ = discover(model)
    ids = torch.randint(0, 384, (5, 24), generator=torch.Generator().manual_seed(0))
    found = {}
    for device in (None, torch.device("cuda", 0)):
        for finished in collect_grams(model, targets, ids, batch_size=2, device=device):
            for gram in finished.grams.values():
                found.setdefault(gram.members[0], []).append(gram.gram)
    assert next(model.parameters()).is_cpu
    for here, there in found.values():
        torch.testing.assert_close(there, here, rtol=0, atol=1e-4 * float(here.abs().max()))
