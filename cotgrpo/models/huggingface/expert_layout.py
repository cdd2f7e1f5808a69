"""Where a checkpoint keeps the experts of a layer: a tensor for each expert, or one tensor of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.family import ExpertNames
from cotgrpo.models.huggingface.safetensors_files import StoredTensor

if TYPE_CHECKING:
    from cotgrpo.models.layers.experts import Experts

WHOLE = slice(None)


@dataclasses.dataclass(frozen=True)
class ExpertSlot:
    """The place of one expert's part of a leaf, which is `[inputs, outputs]`, or `[outputs]` of a bias.

    Attributes:
        name: of the stored tensor.
        shape: of the stored tensor.
        expert: its index in the stored tensor's first dimension. None: the tensor is this expert's own.
        start: the first output there.
        step: from one output to the next.
        outputs: their number.
        inputs_first: the tensor is `[..., inputs, outputs]` and not `[..., outputs, inputs]`.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None
    start: int
    step: int
    outputs: int
    inputs_first: bool

    @property
    def is_bias(self) -> bool:
        """Return whether the part has no inputs."""
        return len(self.shape) == (1 if self.expert is None else 2)

    def index(self, inputs: slice, outputs: slice) -> tuple[slice, ...]:
        """Return the stored tensor's slices that hold these inputs and outputs, and what lies between them."""
        first, last, _ = outputs.indices(self.outputs)
        across = slice(self.start + self.step * first, self.start + self.step * (last - 1) + 1)
        own = (across,) if self.is_bias else (inputs, across) if self.inputs_first else (across, inputs)
        return own if self.expert is None else (slice(self.expert, self.expert + 1), *own)

    def read(self, stored: StoredTensor, inputs: slice = WHOLE, outputs: slice = WHOLE) -> np.ndarray:
        """Return a slice of the part as the decoder has it."""
        part = stored.read(self.index(inputs, outputs))
        part = part if self.expert is None else part[0]
        if self.is_bias:
            return part[:: self.step]
        return part[:, :: self.step] if self.inputs_first else part[:: self.step].T

    def write(self, whole: np.ndarray, part: np.ndarray) -> None:
        """Put the part into the stored tensor."""
        own = whole if self.expert is None else whole[self.expert]
        across = slice(self.start, self.start + self.step * (self.outputs - 1) + 1, self.step)
        if self.is_bias or not self.inputs_first:
            own[across] = part.T
        else:
            own[:, across] = part


@dataclasses.dataclass(frozen=True)
class ExpertTensors:
    """What the slots of all experts of a layer hold, read as one tensor `[E, inputs, outputs]` or `[E, outputs]`.

    The gate of the shared MLP, `[outputs]`, is that of one expert.
    """

    slots: Sequence[ExpertSlot]
    stored: Sequence[StoredTensor]
    shape: tuple[int, ...]

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Return a slice of the tensor, or all of it."""
        if len(self.shape) == 1:
            return self.slots[0].read(self.stored[0], WHOLE, *(index or (WHOLE,)))
        experts, *others = index or (WHOLE,) * len(self.shape)
        chosen = range(*experts.indices(self.shape[0]))
        bounds = (WHOLE, *others) if len(others) == 1 else tuple(others)
        return np.stack([self.slots[e].read(self.stored[e], *bounds) for e in chosen])


def expert_form(forms: Sequence[ExpertNames], prefix: str, names: Collection[str]) -> ExpertNames:
    """Return the form in which a checkpoint with these names has the experts of a layer; the first one if none fits."""
    return next((form for form in forms if f"{prefix}{form.first_name}" in names), forms[0])


def expert_slots(config: DecoderConfig, form: ExpertNames, prefix: str) -> dict[str, list[ExpertSlot]]:
    """Return {name in `Experts.shapes`: the place of each expert's part} of one layer, without the router's.

    `prefix` is that of the layer's names.
    """
    experts = config.experts
    assert experts is not None
    shapes = experts.shapes(config.width)
    slots = {name: part_slots(experts, form, name, prefix, shapes) for name in ("gate", "up", "down")}
    if experts.biases:
        slots |= {f"{name}_bias": part_slots(experts, form, f"{name}_bias", prefix, shapes) for name in tuple(slots)}
    return slots


def part_slots(
    experts: Experts, form: ExpertNames, name: str, prefix: str, shapes: Mapping[str, tuple[int, ...]]
) -> list[ExpertSlot]:
    """Return the place of each expert's part of a leaf in one layer."""
    part, suffix = name.removesuffix("_bias"), "_bias" if name.endswith("_bias") else ""
    _, *inputs, outputs = shapes[name]
    if form.each is not None:
        each = (outputs, *inputs)
        named = [f"{prefix}{form.each[part].format(e)}" for e in range(experts.number)]
        return [ExpertSlot(name_of_one, each, None, 0, 1, outputs, False) for name_of_one in named]
    fused = part in ("gate", "up")
    total = 2 * outputs if fused else outputs
    start, step = (("gate", "up").index(part), 2) if fused and form.interleaved else (0, 1)
    if fused and not form.interleaved:
        start = ("gate", "up").index(part) * outputs
    own = (*inputs, total) if form.inputs_first else (total, *inputs)
    stored = f"{prefix}{form.gate_up if fused else form.down}{suffix}"
    shape = (experts.number, *own)
    return [ExpertSlot(stored, shape, e, start, step, outputs, form.inputs_first) for e in range(experts.number)]


def joined_experts(parts: Sequence[tuple[ExpertSlot, Callable[[], np.ndarray]]]) -> np.ndarray:
    """Return a stored tensor from its parts."""
    whole = None
    for slot, read in parts:
        part = read()
        whole = np.empty(slot.shape, part.dtype) if whole is None else whole
        slot.write(whole, part)
    assert whole is not None
    return whole


def tensors_of_layers(
    leaf_shape: tuple[int, ...], slots: Sequence[ExpertSlot], tensors: Mapping[str, StoredTensor]
) -> list[ExpertTensors]:
    """Return what each layer of a stacked leaf `[L, E, ...]` (`[L, ...]` if it is of the first expert) holds."""
    each = len(slots) // leaf_shape[0]
    return [
        ExpertTensors(slots[at : at + each], [tensors[slot.name] for slot in slots[at : at + each]], leaf_shape[1:])
        for at in range(0, len(slots), each)
    ]
