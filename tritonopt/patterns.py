"""The terms of a step of torch.optim.RMSprop and Rprop, taken apart into tensors and constants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tritonopt.values import Terms


class Mismatch(Exception):
    """The term is not the pattern's."""


@dataclass
class Update:
    """What a parameter's new value says of the step."""

    name: str  # of the op
    grad: int  # its term
    state: dict[str, tuple[int, int]]  # leaf and new term, by the op's argument
    hyper: dict[str, Any]
    lr: int | None = None  # the term of a tensor or symbolic lr
    maximize: bool = field(default=False)


class Reader:
    """Takes terms apart."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms

    def open(self, term: int, kind: str) -> Any:
        found, *parts = self.terms.parts[term]
        if found != kind:
            raise Mismatch(f"{found} instead of {kind}")
        return parts if len(parts) > 1 else parts[0]

    def is_a(self, term: int, kind: str) -> bool:
        return bool(self.terms.parts[term][0] == kind)

    def scaled(self, term: int) -> tuple[int, float]:
        return tuple(self.open(term, "scale")) if self.is_a(term, "scale") else (term, 1.0)

    def leaf(self, term: int) -> int:
        self.open(term, "leaf")
        return term

    def factor(self, term: int, base: int) -> float:
        """c of c * base."""
        inner, factor = self.scaled(term)
        if term == base:
            return 1.0
        if inner != base:
            raise Mismatch("another product")
        return factor

    def require(self, holds: bool, why: str) -> None:
        if not holds:
            raise Mismatch(why)


def step(terms: Terms, param: int, term: int) -> Update | None:
    """The update that makes `term` of a parameter whose value is the leaf `param`; None if none."""
    for pattern in (_rmsprop, _rprop):
        try:
            return pattern(Reader(terms), param, term)
        except Mismatch:
            continue
    return None


def is_count(terms: Terms, leaf: int, term: int) -> bool:
    return term == terms.make("add", leaf, terms.const(1))


def _rmsprop(read: Reader, param: int, term: int) -> Update:
    base, change = read.open(term, "add")
    read.require(base == param, "another tensor is added to")
    amount, lr = read.scaled(change)
    choices: list[tuple[int, Any, int | None]] = [(amount, -lr, None)]
    if lr == -1 and read.is_a(amount, "mul"):  # momentum_buffer * lr
        one, other = read.open(amount, "mul")
        choices += [(one, None, other), (other, None, one)]
    if lr == -1 and read.is_a(amount, "div"):  # grad / (avg / lr)
        grad, avg = read.open(amount, "div")
        if read.is_a(avg, "div"):
            avg, lr_term = read.open(avg, "div")
            choices.append((read.terms.div(grad, avg), None, lr_term))
        if read.is_a(grad, "mul"):
            one, other = read.open(grad, "mul")
            choices += [(read.terms.div(one, avg), None, other)]
            choices += [(read.terms.div(other, avg), None, one)]
    for quotient, number, lr_term in choices:
        try:
            update = _quotient(read, param, quotient)
        except Mismatch:
            continue
        if number is not None:
            update.hyper["lr"] = number
        update.lr = lr_term
        return update
    raise Mismatch("not a quotient")


def _quotient(read: Reader, param: int, term: int) -> Update:
    """grad / (sqrt(square_avg) + eps), or the momentum of it."""
    state: dict[str, tuple[int, int]] = {}
    momentum = 0.0
    if read.is_a(term, "add"):
        old, quotient = read.open(term, "add")
        buffer, momentum = read.scaled(old)
        state["momentum_buffers"] = read.leaf(buffer), term
        term = quotient
    grad, avg = read.open(term, "div")
    root, eps = read.open(avg, "add")
    eps = read.open(eps, "const")
    variance = read.open(root, "sqrt")

    square_avg = variance
    if read.is_a(read.open(variance, "add")[0], "add"):  # square_avg - grad_avg^2
        square_avg, square = read.open(variance, "add")
        grad_avg, sign = read.scaled(square)
        grad_avg, again = read.open(grad_avg, "mul")
        read.require(sign == -1 and grad_avg == again, "not centered")
        old, _ = read.open(grad_avg, "add")
        state["grad_avgs"] = read.leaf(old), grad_avg
    old, _ = read.open(square_avg, "add")
    leaf, alpha = read.scaled(old)
    state["square_avgs"] = read.leaf(leaf), square_avg

    terms, weight = read.terms, 1 - alpha
    squares = terms.scale(terms.mul(grad, grad), weight)
    read.require(square_avg == terms.add(terms.scale(leaf, alpha), squares), "other averages")
    if "grad_avgs" in state:
        old, new = state["grad_avgs"]
        read.require(new == terms.lerp(old, grad, terms.const(weight)), "other averages")

    grad, weight_decay = _without_decay(read, param, grad)
    plain, sign = read.scaled(grad)
    grad = plain if sign == -1 else grad
    hyper = {"alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
    return Update("rmsprop_", grad, state, hyper, maximize=sign == -1)


def _without_decay(read: Reader, param: int, grad: int) -> tuple[int, float]:
    if read.is_a(grad, "add"):
        plain, decay = read.open(grad, "add")
        if read.scaled(decay)[0] == param:
            return plain, read.scaled(decay)[1]
    return grad, 0.0


def _rprop(read: Reader, param: int, term: int) -> Update:
    base, change = read.open(term, "add")
    amount, minus = read.scaled(change)
    read.require(base == param and minus == -1, "another tensor is added to")
    for one, other in (read.open(amount, "mul"), reversed(read.open(amount, "mul"))):
        if read.is_a(one, "sign") and read.is_a(other, "clamp"):
            new, step_size = read.open(one, "sign"), other
            break
    else:
        raise Mismatch("not a sign times a step size")
    product, low, high = read.open(step_size, "clamp")
    flipped, zero, grad = read.open(new, "where")
    factor, etaminus = read.open(flipped, "eq")
    old, _ = factors = read.open(product, "mul")
    old = factors[1] if old == factor else old

    terms = read.terms
    read.require(product == terms.mul(old, factor), "another factor")
    number = [read.open(x, "const") for x in (etaminus, low, high)]
    positive, etaplus, sign = _factor(read, factor, etaminus)
    plain, minus = read.scaled(grad)
    agreement = read.open(sign, "sign")
    inner, _ = read.scaled(agreement)
    prev = next((x for x in read.open(inner, "mul") if x not in (plain, grad)), plain)
    expected = terms.mul(grad, read.leaf(prev))
    read.require(agreement == expected, "another agreement")
    read.require(terms.const(0) == zero, "another gradient")
    read.require(number[0] < 1 < etaplus and number[0] > 0, "unusual etas")
    state = {"prevs": (prev, new), "step_sizes": (read.leaf(old), step_size)}
    hyper = {
        "etaminus": number[0], "etaplus": etaplus,
        "step_size_min": number[1], "step_size_max": number[2],
    }  # fmt: skip
    return Update("rprop_", plain if minus == -1 else grad, state, hyper, maximize=minus == -1)


def _factor(read: Reader, factor: int, etaminus: int) -> tuple[int, float, int]:
    """etaplus where the sign is positive, etaminus where it is negative, 1 where it is 0."""
    terms = read.terms
    zero = terms.const(0)
    none, one, below = read.open(factor, "where")
    read.require(terms.parts[one] == ("const", 1.0) and none == terms.make("eq", below, zero), "")
    negative, minus, above = read.open(below, "where")
    read.require(minus == etaminus and negative == terms.make("lt", above, zero), "")
    positive, etaplus, sign = read.open(above, "where")
    read.require(positive == terms.make("gt", sign, zero), "")
    return positive, read.open(etaplus, "const"), sign
