"""Which implementation of an op runs: an argument of the op, never a silent fallback."""


def choose_backend(op: str, asked: str, available: tuple[str, ...]) -> str:
    """The backend that ``op`` runs with: the one asked for, or the fastest available for ``auto``.

    Raises ValueError for a backend that this op does not have.

    Example
    -------
    >>> choose_backend("ssd", "auto", ("naive", "torch"))
    'torch'
    """
    if asked == "auto":
        return "torch"
    if asked not in available:
        raise ValueError(
            f"backend: {op} expected one of {', '.join(('auto', *available))}, got {asked!r}. "
            "The torch backend runs on every device."
        )
    return asked
