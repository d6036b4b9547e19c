"""Hadamard matrices, H H^T = n I with entries of 1 and -1: which sizes there are, and their blocks.

A size n = 2^m p is rotated by H_p (x) H_2 (x) ... (x) H_2, for the smallest p of `ORDERS`. A block
of order p comes from one of

    Paley I       p = q + 1,    q a prime, 3 mod 4          12, 20, 44, 60, 108, 140
    Paley II      p = 2 (q + 1), q a prime, 1 mod 4         28, 36
    Sylvester     twice the block of half the order         40
    Williamson    four symmetric circulants of order p / 4  52, 100, 172

(Paley 1933, J. Math. Phys. 12; Williamson 1944, Duke Math. J. 11). The first rows of Williamson's
circulants were found by search among those that are constant on orbits of a group of multipliers;
the tests check every block. Order 156 has none of these forms.
"""

from __future__ import annotations

from functools import cache

Matrix = tuple[tuple[int, ...], ...]

WILLIAMSON: dict[int, tuple[str, ...]] = {
    52: ("+++-+-", "+---+-", "+---+-", "---+-+"),
    100: ("+++++---+-+-", "++-+--+++--+", "+-+--++-+-++", "-+++--+--+++"),
    172: (
        "++++-++----+-++--++-+", "++---++--+-+-+-++----",
        "+-+-++++-+--+--+++--+", "-++-----++++-+-+++-++",
    ),
}  # fmt: skip
"""By order: entries 1 to (n - 1) / 2 of the first rows of its circulants of odd order n; entry 0 is
1, the others follow from symmetry."""
PALEY_I, PALEY_II = (12, 20, 44, 60, 108, 140), (28, 36)
ORDERS = tuple(sorted((1, 40, *PALEY_I, *PALEY_II, *WILLIAMSON)))
"""Orders of blocks."""


def factor(size: int) -> tuple[int, int] | None:
    """(p, 2^m) of a size whose rotation is a block of order p times a power of two; None where
    there is none.

    >>> factor(11008), factor(14336), factor(4096), factor(99)
    ((172, 64), (28, 512), (1, 4096), None)
    """
    for order in ORDERS:
        rest = size // order
        if size % order == 0 and rest > 0 and rest & (rest - 1) == 0:
            return order, rest
    return None


def near(size: int) -> tuple[int, int]:
    """The next smaller and larger size that have a rotation.

    >>> near(99)
    (96, 100)
    """
    below = next(n for n in range(size - 1, 0, -1) if factor(n))
    above = next(n for n in range(size + 1, 4 * size + 4) if factor(n))
    return below, above


@cache
def block(order: int) -> Matrix:
    """The block of an order: rows of 1 and -1."""
    if order == 1:
        return ((1,),)
    if order in PALEY_I:
        return _paley_first(order - 1)
    if order in PALEY_II:
        return _paley_second(order // 2 - 1)
    if order in WILLIAMSON:
        return _williamson(order)
    half = block(order // 2)
    return (*((*row, *row) for row in half), *((*row, *(-x for x in row)) for row in half))


def _character(prime: int) -> tuple[int, ...]:
    """Of each residue: 0 for 0, 1 for squares, -1 for others."""
    squares = {x * x % prime for x in range(1, prime)}
    return (0, *(1 if x in squares else -1 for x in range(1, prime)))


def _conference(prime: int, sign: int) -> list[list[int]]:
    """Jacobsthal's matrix of differences, bordered by ones: zero on the diagonal."""
    chi = _character(prime)
    rows = [[0] + [1] * prime]
    rows += [[sign] + [chi[(i - j) % prime] for j in range(prime)] for i in range(prime)]
    return rows


def _paley_first(prime: int) -> Matrix:
    """I + S with S skew."""
    rows = _conference(prime, -1)
    for i, row in enumerate(rows):
        row[i] += 1
    return tuple(map(tuple, rows))


def _paley_second(prime: int) -> Matrix:
    """Each entry s of the symmetric conference matrix as s [[1, 1], [1, -1]], zeros as
    [[1, -1], [-1, -1]]."""
    rows: list[tuple[int, ...]] = []
    for row in _conference(prime, 1):
        top = [x for s in row for x in ((s, s) if s else (1, -1))]
        bottom = [x for s in row for x in ((s, -s) if s else (-1, -1))]
        rows += [tuple(top), tuple(bottom)]
    return tuple(rows)


def _williamson(order: int) -> Matrix:
    """[[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]]."""
    n = order // 4
    firsts: list[list[int]] = []
    for text in WILLIAMSON[order]:
        half = [1 if sign == "+" else -1 for sign in text]
        firsts.append([1, *half, *reversed(half)])
    signs = ((1, 1, 1, 1), (-1, 1, -1, 1), (-1, 1, 1, -1), (-1, -1, 1, 1))
    places = ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0))
    return tuple(
        tuple(
            sign * firsts[place][(j - i) % n]
            for sign, place in zip(signs[part], places[part], strict=True)
            for j in range(n)
        )
        for part in range(4)
        for i in range(n)
    )
