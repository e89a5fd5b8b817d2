"""Sparse coders: exactly s atoms for every signal, behind one interface (`encode`)."""

from cospadi.learn.coding.encode import SOLVERS, Solver, encode, solver_for
from cospadi.learn.coding.problem import Code, CodingProblem, coding_problem

__all__ = ["SOLVERS", "Code", "CodingProblem", "Solver", "coding_problem", "encode", "solver_for"]
