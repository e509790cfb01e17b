"""A model as a list of layers with what each costs: measured elsewhere, or as FLOPs and bytes.

name: OPT-350M
source: where the figures come from
tokens: 2048                            # per row; default: rows are no sequences
rows: 8                                 # of the global batch, unless --batch-size says otherwise
dtype: float32                          # in which it computes
layers:                                 # in order
  - name: block
    repeat: 24                          # layers alike, one after the other; default 1
    parameters: {1: 12596224, 4: 3153664}       # elements on one device, by split degree
    saved_bytes: {1: 360726528, 4: 109068288}   # per row: kept for the backward pass, input included, output not
    output_bytes: 8388608               # per row: handed to the next layer; a figure alone is that of the whole layer
    seconds:                            # on one device, exchanges of the split included
      GH200:                            # by type of device
        4: {rows: [1, 8], forward_s: [0.0015, 0.0027], backward_s: [0.0017, 0.0065], update_s: 0.0005}
  - name: head                          # where a type of device has no seconds: from FLOPs and bytes, the latter needed
    parameters: 51463168
    saved_bytes: 411705344
    flops: 2.1e+11                      # per row, of the products of the forward pass; backward: twice as many
    products: 1                         # operators that these are made of
    bytes: 1.2e+9                       # per row, that other operators read and write; backward: twice as many
    operators: 6
    exchanges: [{kind: all-reduce, bytes: 8388608}]  # per row, of a split; each again in the backward pass
    split: parts                        # parts (the default): a split cuts the layer, figures alone into equal parts;
                                        # whole: each of its devices does all of it; rows: they share its rows, and
                                        # reduce its gradients, as layers do beside experts that are cut
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from whalepy.errors import ClusterError, PlanError
from whalepy.hardware.checking import Loc, explained, load_file
from whalepy.hardware.devices import DeviceProfile, known_dtype
from whalepy.hardware.profiles import profile


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _no_truth(value: Any) -> Any:
    """YAML reads `yes` and `on` as true, which would count as 1."""
    if isinstance(value, bool):
        raise ValueError("write a figure")
    return value


def _by_degree(value: Any) -> Any:
    """A figure alone is that of the whole layer."""
    return value if isinstance(value, Mapping) else {0: value}


def _known_type(name: str) -> str:
    try:
        return profile(name).name
    except ClusterError as error:
        raise ValueError(error.fix) from None


def _known_dtype(name: str) -> str:
    try:
        return known_dtype(name)
    except ClusterError as error:
        raise ValueError(error.fix) from None


# Upper ends are far above any model: they keep products of figures finite.
Count = Annotated[int, BeforeValidator(_no_truth), Field(ge=1, le=10**18)]
Amount = Annotated[float, BeforeValidator(_no_truth), Field(ge=0, le=1e24)]
Degree = Annotated[int, BeforeValidator(_no_truth), Field(ge=1, le=10**6)]
Whole = Annotated[int, BeforeValidator(_no_truth), Field(ge=0, le=10**6)]
ByDegree = Annotated[dict[Whole, Amount], Field(min_length=1), BeforeValidator(_by_degree)]
"""By split degree, of one device; under 0 that of the whole layer."""


class SecondsEntry(_Entry):
    """Seconds of one layer on one device by rows of a microbatch, with the exchanges of its split."""

    rows: Annotated[tuple[Count, ...], Field(min_length=1)]
    forward_s: tuple[Amount, ...]
    backward_s: tuple[Amount, ...]
    update_s: Amount | None = None
    """Of the optimizer; None: from the bytes that it reads and writes."""

    @model_validator(mode="after")
    def _fitting(self) -> SecondsEntry:
        if any(after <= before for before, after in pairwise(self.rows)):
            raise ValueError("list `rows` in ascending order, each number once")
        if not len(self.rows) == len(self.forward_s) == len(self.backward_s):
            raise ValueError("give `forward_s` and `backward_s` one figure for each number of `rows`")
        return self


class ExchangeEntry(_Entry):
    """One collective of a split in the forward pass; the same again in the backward pass."""

    kind: Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]
    bytes: Amount
    """Per row, of the whole value, of which each device makes, has or gets a part."""


class LayerEntry(_Entry):
    """One layer, or several alike."""

    name: str
    repeat: Count = 1
    split: Literal["parts", "whole", "rows"] = "parts"
    """What the devices of a split do: each a part of it, each all of it, or each all of it on a part of the rows."""
    parameters: ByDegree = Field(default_factory=lambda: {0: 0.0})
    """Elements."""
    saved_bytes: ByDegree = Field(default_factory=lambda: {0: 0.0})
    output_bytes: ByDegree = Field(default_factory=lambda: {0: 0.0})
    working_bytes: ByDegree | None = None
    """Per row: gradients alive at most while its backward pass runs; None: as many bytes as it has saved."""
    flops: ByDegree | None = None
    products: Count = 1
    bytes: ByDegree | None = None
    operators: Count = 1
    backward_flops: ByDegree | None = None
    backward_bytes: ByDegree | None = None
    exchanges: tuple[ExchangeEntry, ...] = ()
    seconds: Mapping[Annotated[str, AfterValidator(_known_type)], Annotated[dict[Degree, SecondsEntry],
                                                                           Field(min_length=1)]] = Field(
        default_factory=dict[str, dict[int, SecondsEntry]]
    )  # fmt: skip

    @model_validator(mode="after")
    def _costed(self) -> LayerEntry:
        if not self.seconds and self.bytes is None:
            raise ValueError("say what it costs: `seconds:` by type of device, or `flops:` and `bytes:`")
        return self

    @property
    def has_operators(self) -> bool:
        """Whether FLOPs and bytes say what it costs where no seconds do; FLOPs alone are for the part of peaks."""
        return self.bytes is not None

    def parts(self, degree: int) -> int:
        """Into how many parts a split of a degree cuts the layer."""
        return degree if self.split == "parts" else 1

    def on(self, figure: Mapping[int, float] | None, degree: int) -> float | None:
        """A figure of one device at a split degree; None where the file does not say."""
        if figure is None:
            return 0.0
        if self.split != "parts":
            return figure.get(1, figure.get(0))
        whole = figure.get(0, figure.get(1) if degree == 1 else None)
        return figure.get(degree, None if whole is None else whole / degree)

    def seconds_on(self, device: DeviceProfile, degree: int) -> SecondsEntry | None:
        """What was measured on a type of device, or on the type that it refines."""
        found = self.seconds.get(device.name) or self.seconds.get(device.base)
        return None if found is None else found.get(self.parts(degree))


class LayerFile(_Entry):
    """A whole file."""

    name: str
    source: str = ""
    tokens: Count | None = None
    rows: Count = 8
    dtype: Annotated[str, AfterValidator(_known_dtype)] = "float32"
    master: bool = False
    """Whether parameters, their gradients as the optimizer reads them and its state are float32 beside `dtype`."""
    layers: Annotated[tuple[LayerEntry, ...], Field(min_length=1)]

    @property
    def parameters(self) -> int:
        """Elements of the whole model; at split degree 1 where each degree has figures of its own."""
        each = (layer.repeat * (layer.parameters.get(0, layer.parameters.get(1, 0.0))) for layer in self.layers)
        return round(sum(each))


def read_layers(path: Path) -> LayerFile:
    """The checked content of a file. Raises PlanError with the field, the value given, the fix and the file."""
    content = load_file(path, "layer file", PlanError, "give the path of a YAML or JSON file: layers:FILE")
    try:
        return LayerFile.model_validate(content)
    except ValidationError as error:
        detail = error.errors()[0]
        what, fix = explained({**detail, "loc": _as_written(detail["loc"])}, _known_fields, "the layer file")
        raise PlanError(what, at=str(path), fix=fix) from None


def _as_written(loc: Loc) -> Loc:
    """Without the degree that a figure alone is put under, and pydantic's mark of a key."""
    return tuple(
        part
        for before, part in zip(("", *loc), loc, strict=False)
        if part != "[key]" and (before, part) not in _UNWRITTEN
    )


_UNWRITTEN = {(name, 0) for name in LayerEntry.model_fields if name not in ("exchanges", "seconds")}


def _known_fields(loc: Loc) -> list[str]:
    """The fields that the table holding `loc` may have."""
    names = [part for part in loc[:-1] if isinstance(part, str)]
    models: dict[str, type[BaseModel]] = {"exchanges": ExchangeEntry, "seconds": SecondsEntry, "layers": LayerEntry}
    found = next((model for name, model in models.items() if name in names), LayerFile)
    return list(found.model_fields)
