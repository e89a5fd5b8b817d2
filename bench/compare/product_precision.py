"""Augmented fits with the product of every step in other arithmetics, emulated: what tensor cores would cost.

Operands are rounded to nearest with 10 (TF32) or 7 (bfloat16) bits of mantissa, sums stay in float32. Weights and
activations are drawn at random. Relative errors of the unrounded fits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
from models import make_problem

from cospadi.learn import splitting
from cospadi.learn.augmented import fit_augmented
from cospadi.learn.member import Member
from cospadi.learn.methods import factor_size
from cospadi.learn.precision import Products, in_three_products
from cospadi.learn.whitening import whiten_gram
from cospadi.pipeline.plan import storage_widths
from cospadi.pipeline.recipe import Recipe

SHAPES = [(512, 256), (768, 512)]
"""d_out, d_in; with fewer outputs than atoms a step solves and multiplies nothing large."""

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Nearest float32 with `bits` bits of mantissa, ties to even."""
    dropped = 23 - bits
    integers = x.contiguous().view(torch.int32)
    integers = integers + ((1 << (dropped - 1)) - 1) + (integers >> dropped & 1)
    return (integers >> dropped << dropped).view(torch.float32)


def product_of(bits: int) -> Product:
    """Product of rounded operands."""
    return lambda a, b: rounded(a, bits) @ rounded(b, bits)


ARITHMETICS: dict[str, Product] = {
    "float32": torch.matmul,
    "tf32x3": lambda a, b: in_three_products(a, b, product_of(10)),
    "tf32": product_of(10),
    "bfloat16": product_of(7),
}


def error_with(product: Product, d_out: int, d_in: int, ratio: float) -> float:
    """Relative error of one fit whose steps multiply by `product`."""
    weight, gram = make_problem(d_in, d_out, torch.device("cpu"))
    recipe = Recipe(ratio=ratio)
    size = factor_size(
        recipe.method,
        d_in,
        d_out,
        ratio,
        widths=storage_widths(recipe.types_at(ratio, d_in)),
        dictionary=recipe.atoms,
        learned_share=recipe.learned_share,
    )
    member = Member(weight, whiten_gram(gram, "weight"))

    def multiply(a: torch.Tensor, b: torch.Tensor, _: Products) -> torch.Tensor:
        return product(a, b)

    original, splitting.multiply = splitting.multiply, multiply
    try:
        fit = fit_augmented(
            [member], member.whitening, size.n_atoms, size.sparsity, recipe.learn_options()
        )
    finally:
        splitting.multiply = original
    return fit.exact_errors[0]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    args = parser.parse_args()
    print("d_out x d_in, ratio  " + "  ".join(f"{name:>9s}" for name in ARITHMETICS))
    for d_out, d_in in SHAPES:
        for ratio in args.ratios:
            errors = [error_with(p, d_out, d_in, ratio) for p in ARITHMETICS.values()]
            text = "  ".join(f"{error:9.5f}" for error in errors)
            print(f"{d_out} x {d_in}, {ratio:<10}  {text}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
