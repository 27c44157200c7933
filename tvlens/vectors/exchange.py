"""Vectors to and from other programs: layers by number (steering-vectors, repeng), and the GGUF
files that llama.cpp adds as control vectors.

All of them know one thing: a vector that is added to what a block writes out, as a `TaskVector`
does. What acts in another way has no place in them and is refused. Layers are counted alike: a
vector of layer N acts behind block N, blocks counted from 0; llama.cpp calls it `direction.N`, and
has none behind block 0.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import NumericalError, ShapeError, VectorError
from tvlens.lens.edits import AddToResidual
from tvlens.lens.lens import Lens
from tvlens.runs.storage import reading, replacing
from tvlens.vectors.vector import TaskVector, Vector

ARCHITECTURE = "controlvector"
"""What GGUF files of control vectors are called in their own `general.architecture`."""

_DIRECTION = re.compile(r"direction\.(\d{1,6})")


def to_layers(vector: Vector) -> dict[int, Float[Tensor, " d_model"]]:
    """What a vector adds behind each of its layers, as `SteeringVector(layer_activations=...)` of
    steering-vectors and `ControlVector(directions=...)` of repeng take it.

    At which tokens it is added is up to what takes it: tvlens adds it at the query, and with
    `positions="all"` behind it, these add it at all tokens unless they are told to begin at one
    (`min_token_index`).

    Args:
        vector: a `TaskVector`, or a Learnable Task Vector of head means.

    Raises:
        VectorError: it does something else than to add the same to every prompt.
    """
    plain = _added(vector, "a dictionary of layers")
    return {layer: plain.vectors[layer].detach().cpu().clone() for layer in sorted(plain.layers)}


def of_layers(
    layers: Mapping[int, Float[Tensor, "*one_token d_model"]],
    lens: Lens,
    *,
    origin: str = "layers of another program",
) -> TaskVector:
    """The task vector that adds these at the query: `to_layers` backwards.

    Args:
        layers: vectors by number of the layer, which counts from the last one where it is
            negative; axes of length 1 are left out.
        lens: the model that they are for.
        origin: how they were made, in words.

    Raises:
        VectorError: there is none.
        ShapeError: the model has no such layer, or another d_model; or a layer comes twice.
        NumericalError: a number is not finite.
    """
    if not layers:
        raise VectorError(
            f"{origin} hold no vector; expected one for at least one of the {lens.n_layer} layers "
            f"of {lens.name!r}"
        )
    vectors = torch.zeros(lens.n_layer, lens.d_model)
    found: list[int] = []
    for number, given in layers.items():
        if not -lens.n_layer <= number < lens.n_layer:
            raise ShapeError(
                f"{origin} hold a vector of layer {number}, and {lens.name!r} has {lens.n_layer} "
                f"layers (0-{lens.n_layer - 1}); give vectors that were made on this model"
            )
        layer = range(lens.n_layer)[number]
        flat = given.detach().float().cpu().flatten()
        if given.shape[-1:] != (lens.d_model,) or len(flat) != lens.d_model:
            raise ShapeError(
                f"{origin}: the vector of layer {layer} has shape {tuple(given.shape)}; "
                f"{lens.name!r} has d_model {lens.d_model}: expected ({lens.d_model},)"
            )
        if layer in found:
            raise ShapeError(
                f"{origin} hold layer {layer} twice, as {number} and as {layer - lens.n_layer}; "
                "expected every layer once"
            )
        if not torch.isfinite(flat).all():
            raise NumericalError(
                f"{origin}: the vector of layer {layer} holds NaN or infinite numbers; expected "
                "finite ones"
            )
        vectors[layer] = flat
        found.append(layer)
    return TaskVector(vectors, tuple(sorted(found)), lens.name, origin)


def save_gguf(
    vector: Vector, path: Path | str, *, model_hint: str | None = None, everywhere: bool = False
) -> None:
    """Write a vector as a control vector of llama.cpp (`--control-vector FILE`).

    Example:
        >>> tvlens.vectors.save_gguf(ltv, "past.gguf", everywhere=True)  # doctest: +SKIP

    llama.cpp adds it at every token of prompt and answer. A vector that acts at the query alone
    does something else there, which `everywhere` says is meant. One with `positions="all"`, at the
    query and behind it, comes closest: only the tokens before the query are added to.

    Args:
        vector: a `TaskVector`, or a Learnable Task Vector of head means.
        path: the file, written whole or not at all.
        model_hint: the model's architecture, such as "llama"; the vector's model by default.
        everywhere: write a vector that acts at the query alone all the same.

    Raises:
        VectorError: it does something else than to add the same to every prompt, acts at the query
            alone, or adds something behind layer 0, or nothing at all.
        RunError: the file cannot be written.
    """
    plain = _added(vector, "a control vector")
    if plain.positions == "query" and not everywhere:
        raise VectorError(
            f"{plain.origin} acts at positions 'query' alone, and llama.cpp adds a control vector "
            "at every token; pass everywhere=True if that is meant"
        )
    directions = {n: x for n, x in to_layers(plain).items() if x.any()}
    if 0 in directions:
        raise VectorError(
            f"{plain.origin} adds a vector of norm {float(directions[0].norm()):.3g} behind layer "
            "0, where llama.cpp has no control vectors; expected layers from 1 on: "
            "dataclasses.replace(vector.plain, layers=...) leaves others out"
        )
    if not directions:
        raise VectorError(
            f"{plain.origin} adds nothing at any layer; expected a vector that is not zero, which "
            "is all that a control vector holds"
        )
    from gguf import GGUFWriter

    with replacing(Path(path)) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        try:
            writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint or plain.model or "unknown")
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
            for layer, direction in directions.items():
                writer.add_tensor(f"direction.{layer}", direction.float().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def load_gguf(path: Path | str, lens: Lens) -> TaskVector:
    """The control vector of a GGUF file, as `save_gguf`, llama.cpp and repeng write it.

    It acts at the query and behind it (`positions="all"`), which is as near as a task vector comes
    to every token.

    Args:
        path: the file.
        lens: the model that it is for.

    Raises:
        RunError: the file cannot be read, or holds something else.
        VectorError: it holds no direction.
        ShapeError: its layers or their size are not those of the model.
        NumericalError: a number is not finite.
    """
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize

    with reading(path, "a GGUF file of a control vector, as save_gguf writes it"):
        reader = GGUFReader(path)
        field = reader.get_field("general.architecture")
        kind = None if field is None else str(field.contents())
        if kind != ARCHITECTURE:
            raise ValueError(f"its general.architecture is {kind!r}, not {ARCHITECTURE!r}")
        layers = {}
        for tensor in reader.tensors:
            name = _DIRECTION.fullmatch(tensor.name)
            if name is None or not int(name[1]):
                raise ValueError(f"it holds {tensor.name[:30]!r}, not direction.1, direction.2, …")
            values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            layers[int(name[1])] = torch.from_numpy(values)
    made = of_layers(layers, lens, origin=f"control vector of {Path(path).name}")
    return TaskVector(made.vectors, made.layers, made.model, made.origin, "all")


def _added(vector: Vector, what: str) -> TaskVector:
    """The vector as one that adds the same to every prompt behind its layers.

    Raises:
        VectorError: it does something else.
    """
    plain = vector.plain
    if isinstance(plain, TaskVector) and plain.acts is AddToResidual:
        return plain
    does = {
        "StateVector": "replaces residual streams",
        "InContextVector": "turns residual streams, which keep their norm",
        "DonorState": "replaces residual streams by those of each prompt's donor",
        "HeadMixture": "is made anew for each prompt, of its donor's head outputs",
        "HeadBlend": "moves heads at hook_z",
    }.get(type(plain).__name__, "does something else")
    raise VectorError(
        f"{getattr(plain, 'origin', '')} ({type(plain).__name__}) {does}; {what} can only say what "
        "is added to what blocks write out: expected a TaskVector, or a Learnable Task Vector of "
        "head means"
    )
