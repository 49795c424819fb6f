"""Which implementation of an op runs.

Each platform has an ordered list of implementations. It ends in "xla", which serves every call. An implementation
that cannot serve a call raises NotImplementedError, and the next one is tried; `reasons` tells why. Where `using`
names a single implementation, there is no fallback.

Under a mesh in context (`jax.set_mesh`) of more than one device every kernel runs on each device's part of the
arrays. Only the mesh in context counts, for a traced function does not see where its arguments live: arrays that are
spread over devices need their mesh in context, because XLA gathers them for a kernel otherwise.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax

from kvjax.errors import KvjaxError
from kvjax.ops.shards import by_tokens, per_shard
from pallas_kernels import causal_attention, packed_attention, quantize_pack, remat_attention

ORDER = {"gpu": ("triton", "xla"), "tpu": ("mosaic_tpu", "splash", "xla"), "cpu": ("native", "xla")}
OPS: Mapping[str, tuple[str, ...]] = {
    op.__name__.rpartition(".")[2]: op.IMPLEMENTATIONS
    for op in (packed_attention, remat_attention, quantize_pack, causal_attention)
}
Names = str | Sequence[str]
Result = TypeVar("Result")
MOST_REASONS = 256


class Reason(NamedTuple):
    """Why an implementation did not serve a call of an op."""

    op: str
    implementation: str
    text: str


_named: contextvars.ContextVar[Mapping[str, Names]] = contextvars.ContextVar("named", default=MappingProxyType({}))
_interpret: contextvars.ContextVar[bool] = contextvars.ContextVar("interpret", default=False)
_reasons: contextvars.ContextVar[dict[Reason, None]] = contextvars.ContextVar("reasons", default={})  # noqa: B039


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


def reasons() -> list[Reason]:
    """Why implementations did not serve calls, each reason once, the oldest first; at most `MOST_REASONS` are kept.

    A reason is noted when a function is traced: one that is compiled already gives none.
    """
    return list(_reasons.get())


@contextlib.contextmanager
def fresh_reasons() -> Iterator[None]:
    """Starts an empty list of reasons inside a `with` block; those from before come back after it."""
    token = _reasons.set({})
    try:
        yield
    finally:
        _reasons.reset(token)


def dispatch(
    op: str,
    kernel: Callable[..., Result],
    xla: Callable[..., Result],
    operands: tuple[Any, ...] = (),
    axes: tuple[Any, ...] = (),
    result: Any = None,
) -> Result:
    """Runs the first implementation that can serve the call.

    Args:
      op: name of the op.
      kernel: `kernel(name, interpret, *operands)` runs a kernel, under a mesh on each device's part of the operands;
        it raises NotImplementedError with the reason where it cannot serve the call.
      xla: `xla(*operands)` runs the op in XLA: on all devices as one, or where the mesh divides tokens likewise on
        each device's part.
      operands: all arrays that the kernel takes.
      axes: their logical axes, as `per_shard` takes them.
      result: the logical axes of what the kernel returns, likewise.

    Returns:
      What the implementation returns.

    Raises:
      NotImplementedError: `using` leaves no implementation that serves the call.
    """
    names = _several(_named.get().get(op) or order_of(op, jax.default_backend()))
    for name in names:
        if name == "xla":
            break
        try:
            return per_shard(functools.partial(kernel, name, _interpret.get()), operands, axes, result)
        except NotImplementedError as error:
            _note(Reason(op, name, str(error)))
            if name == names[-1]:
                raise
    return by_tokens(xla, operands, axes, result)


def order_of(op: str, platform: str) -> Sequence[str]:
    """The implementations of an op that are tried on a platform, where `using` names none."""
    return [name for name in ORDER.get(platform, ("xla",)) if name in (*OPS[op], "xla")]


def _note(reason: Reason) -> None:
    kept = _reasons.get()
    if reason not in kept and len(kept) == MOST_REASONS:
        del kept[next(iter(kept))]
    kept[reason] = None


def _several(names: Names) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names
