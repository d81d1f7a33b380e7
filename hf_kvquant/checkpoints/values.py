"""From values as they lie in files to `LayerScales`: shapes, what counts as not set, and zeros in the units of x."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..checkpoint_scales import ScaleSource
from ..scales import LayerScales
from .found import Parts, Value

# Beyond these no activation of a model can have been measured; memory that was never written looks like this.
_PLAUSIBLE = (1e-8, 1e4)


@dataclass(frozen=True)
class LayerReader:
    """Reads the values of one attention module after another.

    Attributes:
        path: the checkpoint's directory, for errors.
        ranks: values are one per tensor-parallel rank.
        shaped: values are `[H, 1]` or `[H, D]` already.
        one_sided: a side without a scale is meant to be dynamic.
        unused: sides whose scales are left out (`k`, `v`, `q`).
        notes: what had to be decided; is added to.
        suspicious: those of the notes that deserve a warning.
    """

    path: str
    ranks: bool = False
    shaped: bool = False
    one_sided: bool = False
    unused: Collection[str] = ()
    notes: list[str] = field(default_factory=list)
    suspicious: list[str] = field(default_factory=list)

    def read(
        self, module: str, parts: Parts, num_kv_heads: int | None
    ) -> tuple[LayerScales, dict[str, ScaleSource]] | None:
        """The scales of a module and where they come from; None if neither K nor V has a usable one.

        Raises ValueError naming file and key for values that are NaN or infinite, or of a shape that does not fit.
        """

        def numbers(value: Value) -> torch.Tensor:
            return self._shaped(value, num_kv_heads)

        used: dict[str, Value] = {}
        scales: dict[str, torch.Tensor] = {}
        for side in "kv":
            value = parts.get(f"{side}_scale") or parts.get("kv_scale")
            if value is None or side in self.unused:
                continue
            scale = numbers(value)
            if bool((scale > 0).all()):
                scales[side], used[f"{side}_scale"] = scale, value
                self._check_plausible(value, scale)
        if not scales:
            return None
        for side, other in (("k", "v"), ("v", "k")):
            if side not in scales and side not in self.unused:
                message = f"{module} has a usable {other}_scale but no {side}_scale; {side.upper()} is dynamic there"
                self.notes.append(message)
                if not self.one_sided:
                    self.suspicious.append(message)
        zeros = {side: self._zero(side, parts, scale, numbers, used) for side, scale in scales.items()}
        q_scale = self._q_scale(parts, used) if "k" in scales and "q" not in self.unused else None
        try:
            layer = LayerScales(scales.get("k"), scales.get("v"), q_scale, zeros.get("k"), zeros.get("v"))
        except ValueError as error:  # a product of two numbers may be infinite
            raise ValueError(f"{module} in {self.path}: {error}") from error
        return layer, {part: source for part, (source, _) in used.items()}

    def _zero(
        self,
        side: str,
        parts: Parts,
        scale: torch.Tensor,
        numbers: Callable[[Value], torch.Tensor],
        used: dict[str, Value],
    ) -> torch.Tensor | None:
        """What is added, in the units of x; None if it is zero everywhere."""
        if steps := parts.get(f"{side}_zero_point"):
            value, counted = steps, -numbers(steps)
            try:
                zero = _times(counted, scale)
            except RuntimeError as error:
                raise ValueError(
                    f"{_where(steps[0], self.path)} has shape {list(counted.shape)}, its scale {list(scale.shape)}; "
                    "the checkpoint is broken, recalibrate it"
                ) from error
        elif added := parts.get(f"{side}_zero"):
            value, zero = added, numbers(added)
        else:
            return None
        if not bool((zero != 0).any()):
            return None
        used[f"{side}_zero"] = value
        return zero

    def _q_scale(self, parts: Parts, used: dict[str, Value]) -> torch.Tensor | None:
        value = parts.get("q_scale")
        if value is None:
            return None
        # Of query heads there are others than of key heads, and some tools leave memory here that was never written.
        q_scale = _to_float(value, self.path).flatten()
        low, high = _PLAUSIBLE
        if q_scale.numel() == 0 or not bool((q_scale.isfinite() & (q_scale > low) & (q_scale < high)).all()):
            self._suspect(f"{value[0].key} is no finite, positive and plausible number; it is ignored")
            return None
        used["q_scale"] = value
        return q_scale

    def _check_plausible(self, value: Value, scale: torch.Tensor) -> None:
        low, high = _PLAUSIBLE
        if bool(((scale < low) | (scale > high)).any()):
            worst = scale.max() if bool((scale > high).any()) else scale.min()
            self._suspect(f"{value[0].key} holds {worst.item():.3g}, which no activation can have led to")

    def _suspect(self, message: str) -> None:
        self.notes.append(message)
        self.suspicious.append(message)

    def _shaped(self, value: Value, num_kv_heads: int | None) -> torch.Tensor:
        """fp32 `[1]`, `[H]` or `[H, D]`. Files have any of these in other ranks, `[H * D]` head by head too."""
        where = _where(value[0], self.path)
        tensor = _to_float(value, self.path)
        if tensor.numel() == 0:
            raise ValueError(f"{where} is empty; the checkpoint is broken, recalibrate it")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{where} holds NaN or infinite values; the checkpoint is broken, recalibrate it")
        flat = tensor.flatten()
        if flat.numel() == 1 or (self.ranks and bool((flat == flat[0]).all())):
            return flat[:1]
        if self.ranks:
            shaped = _by_parallel_rank(flat, num_kv_heads)
        elif self.shaped:
            shaped = _by_shape(tensor, num_kv_heads)
        else:
            shaped = _by_number(tensor, num_kv_heads)
        if shaped is not None:
            return shaped
        shape = list(tensor.shape)
        if num_kv_heads is None:
            raise ValueError(f"{where} has shape {shape}; what that means depends on the KV heads, name the model")
        what = "tensor-parallel ranks" if self.ranks else "values"
        raise ValueError(
            f"{where} has {flat.numel()} {what}, shape {shape}, which does not fit {num_kv_heads} KV heads; were "
            "the scales made for another model?"
        )


# Values in the shapes of `LayerScales`, None where they do not fit the heads.


def _by_parallel_rank(flat: torch.Tensor, num_kv_heads: int | None) -> torch.Tensor | None:
    """One value per tensor-parallel rank."""
    if num_kv_heads is None:
        return None
    if num_kv_heads % flat.numel() == 0:
        return flat.repeat_interleave(num_kv_heads // flat.numel())
    if flat.numel() % num_kv_heads == 0:
        of_heads = flat.view(num_kv_heads, -1)  # ranks beyond the number of heads share them
        if bool((of_heads == of_heads[:, :1]).all()):
            return of_heads[:, 0]
    return None


def _by_shape(tensor: torch.Tensor, num_kv_heads: int | None) -> torch.Tensor | None:
    """`[H, 1]` or `[H, D]`."""
    if num_kv_heads not in (None, tensor.shape[0]):
        return None
    return tensor.flatten() if tensor.shape[1] == 1 else tensor


def _by_number(tensor: torch.Tensor, num_kv_heads: int | None) -> torch.Tensor | None:
    """As many as heads or channels, in whatever rank."""
    if num_kv_heads is None:
        squeezed = tensor.squeeze()
        # [H, 1, 1] or [H, D], [1, H, 1, D]; of [N] nobody knows what N is.
        return squeezed if tensor.ndim > 1 and squeezed.ndim <= 2 else None
    if tensor.numel() % num_kv_heads:
        return None
    return tensor.flatten() if tensor.numel() == num_kv_heads else tensor.reshape(num_kv_heads, -1)


def _to_float(value: Value, path: str) -> torch.Tensor:
    source, tensor = value
    try:
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError("a scale is a real number")
        return tensor.to(torch.float32)
    except (RuntimeError, TypeError) as error:  # packed dtypes have no conversion; torch raises one or the other
        raise ValueError(f"{_where(source, path)} has dtype {tensor.dtype}: {error}") from error


def _times(zero: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The product of any two granularities."""
    if zero.ndim == scale.ndim or 1 in (zero.numel(), scale.numel()):
        return zero * scale
    return zero * scale[:, None] if zero.ndim == 2 else zero[:, None] * scale


def _where(source: ScaleSource, path: str) -> str:
    return f"{source.key} in {Path(path) / source.file}"
