"""Which implementation of an op runs.

Each platform has an ordered list of implementations. It ends in "xla", which serves every call. An implementation
that cannot serve a call raises NotImplementedError, and the next one is tried. Where `using` names a single
implementation, there is no fallback. With more than one device the list is "xla" alone, which XLA can partition.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import jax

from kvjax.errors import KvjaxError
from pallas_kernels import packed_attention, quantize_pack, remat_attention

ORDER = {"gpu": ("triton", "xla"), "tpu": ("mosaic_tpu", "xla"), "cpu": ("native", "xla")}
OPS: Mapping[str, tuple[str, ...]] = {
    op.__name__.rpartition(".")[2]: op.IMPLEMENTATIONS for op in (packed_attention, remat_attention, quantize_pack)
}
Names = str | Sequence[str]
Result = TypeVar("Result")

_named: contextvars.ContextVar[Mapping[str, Names]] = contextvars.ContextVar("named", default=MappingProxyType({}))
_interpret: contextvars.ContextVar[bool] = contextvars.ContextVar("interpret", default=False)


@contextlib.contextmanager
def using(interpret: bool = False, **named: Names) -> Iterator[None]:
    """Chooses the implementations of ops inside a `with` block.

    For example, `using(packed_attention=("triton", "xla"), interpret=True)`. The choice takes effect when a function
    is traced: a function that is compiled already keeps its implementation.

    Args:
      interpret: runs kernels in Pallas' interpreter, on any platform.
      **named: for an op, one implementation or several in the order in which they are tried.

    Raises:
      KvjaxError: an op or an implementation that does not exist.
    """
    for op, names in named.items():
        if op not in OPS or not {*_several(names)} <= {*OPS[op], "xla"}:
            known = "; ".join(f"{op}={' or '.join(names)}" for op, names in OPS.items())
            raise KvjaxError(f"{op}={names}: expected xla, or {known}")
    tokens = _named.set({**_named.get(), **named}), _interpret.set(interpret)
    try:
        yield
    finally:
        _named.reset(tokens[0])
        _interpret.reset(tokens[1])


def dispatch(op: str, kernel: Callable[[str, bool], Result], xla: Callable[[], Result]) -> Result:
    """Runs the first implementation that can serve the call.

    Args:
      op: name of the op.
      kernel: `kernel(name, interpret)` runs a kernel; it raises NotImplementedError where it cannot serve the call.
      xla: runs the op in XLA.

    Returns:
      What the implementation returns.

    Raises:
      NotImplementedError: `using` leaves no implementation that serves the call.
    """
    names = _several(_named.get().get(op) or _default(op))
    for name in names:
        if name == "xla":
            break
        try:
            return kernel(name, _interpret.get())
        except NotImplementedError:
            if name == names[-1]:
                raise
    return xla()


def _default(op: str) -> Sequence[str]:
    if jax.device_count() > 1:
        return ("xla",)
    return [name for name in ORDER.get(jax.default_backend(), ("xla",)) if name in (*OPS[op], "xla")]


def _several(names: Names) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names
