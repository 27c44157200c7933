"""Where in prompts something is looked at or patched: columns by number, or by role.

Positions of a prompt are counted from its first token, special tokens included, up to the *query
position*, the one at which the prompt is asked. What stands behind that is never a place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from tvlens.errors import ShapeError, TaskError
from tvlens.models.backend import Backend
from tvlens.models.batch import Batch
from tvlens.models.roles import Roles

Positions = int | str | Sequence[int] | Sequence[str]
"""The query position ("query"), all positions up to it ("all"), all roles ("roles"), or those
chosen: one or several numbers, or one or several roles by name. The roles of all demonstrations can
be taken together (`GROUPS`).

Negative numbers count from the query position, which is -1. Of prompts of a text task "query" alone
is the position at which they are asked, and `["query"]` the role, which is what they ask.
"""

GROUPS = {"inputs": "input", "answers": "answer", "xs": "x", "ys": "y"}
"""Names of the same role of every demonstration, taken together, and that role's own."""

_EXPECTED = (
    'expected "query", "all", "roles", a position, a role, or a list of positions or of roles'
)


@runtime_checkable
class Reader(Protocol):
    """What reads prompts: a lens."""

    @property
    def backend(self) -> Backend: ...

    @property
    def prefix(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Places:
    """Columns of a batch under names, the same names in all its prompts.

    Attributes:
        names: roles, or positions as numbers, or "query".
        columns: columns of the batch, padding included, in ascending order; where a prompt has
            fewer, -1 fills up.
        by: what the names are: roles, the query position, all positions, or some of them.
        all_roles: whether the roles are all that the prompts have.
    """

    names: tuple[str, ...]
    columns: Int[Tensor, "batch place at"]
    by: Literal["roles", "query", "all", "columns"]
    all_roles: bool = False

    def __post_init__(self) -> None:
        if self.columns.shape[1] != len(self.names):
            raise ShapeError(
                f"Places: {len(self.names)} names, {self.columns.shape[1]} places in the columns; "
                "give one name for each place"
            )

    def __len__(self) -> int:
        return self.columns.shape[0]

    @property
    def n_place(self) -> int:
        """Number of places."""
        return len(self.names)

    def chosen(self, index: Int[Tensor, " chosen"]) -> "Places":
        """The places at `index` only, in that order."""
        names = tuple(self.names[i] for i in index.tolist())
        columns = self.columns[:, index.to(self.columns.device)]
        return replace(self, names=names, columns=columns, all_roles=False)


def places(lens: Reader, prompts: Any, batch: Batch, positions: Positions) -> Places:
    """Where the chosen positions of prompts are.

    Example:
        >>> prompts = tvlens.tasks.load("antonym").prompts("test", shots=1)
        >>> places(lens, prompts, lens.encode(prompts), "roles").names
        ('input 1', 'answer 1', 'separators', 'query', 'answer prefix')

    Args:
        lens: reads the prompts.
        prompts: prompts of any modality.
        batch: the same, as the lens encodes them.
        positions: which positions, in numbers or words (see `Positions`). With "all", prompts that
            are shorter than others have no column at the last places.

    Raises:
        TaskError: no position is given, one lies beyond a prompt, or prompts have no such role, or
            no roles at all.
        ShapeError: the batch is not of these prompts.
    """
    if isinstance(positions, str):
        if positions == "query":
            return Places(("query",), batch.query[:, None, None], "query")
        if positions == "all":
            every = range(int(n_tokens(batch).max()))
            return Places(tuple(map(str, every)), _columns(batch, every), "all")
        roles = lens.backend.roles(prompts, prefix=lens.prefix)
        return _of_roles(roles, batch, None if positions == "roles" else [positions])
    chosen: list[Any] = [positions] if isinstance(positions, int) else _listed(positions)
    if all(isinstance(each, str) for each in chosen):
        roles = lens.backend.roles(prompts, prefix=lens.prefix)
        return _of_roles(roles, batch, chosen)
    _require_within(batch, chosen)
    return Places(tuple(map(str, chosen)), _columns(batch, chosen), "columns")


def spread(
    positions: Positions, roles: Callable[[], Sequence[str]]
) -> tuple[Positions, dict[str, list[str]]]:
    """The positions with every group replaced by its roles, and which roles each place is then of.

    Args:
        positions: what is asked for.
        roles: gives all roles of the prompts; asked only where there is a group.

    Returns:
        The positions, and the roles of every place by name; nothing where no group is asked for.
    """
    names = [positions] if isinstance(positions, str) else positions
    if isinstance(names, int) or not any(name in GROUPS for name in names):
        return positions, {}
    there, found = roles(), {}
    for name in map(str, names):
        own = GROUPS.get(name)
        several = [role for role in there if role.rpartition(" ")[0] == own and role[-1].isdigit()]
        found[name] = several or [name]
    return [role for several in found.values() for role in several], found


def shared(source: Places, target: Places) -> tuple[Places, Places]:
    """The places that two sets of prompts both have, in the order of the target's.

    All roles of one and all roles of the other come to those that both have; other places must have
    the same names.

    Raises:
        TaskError: a place is one of one set only, or the sets share no role.
    """
    both = [name for name in target.names if name in source.names]
    if source.all_roles and target.all_roles and both:
        where = [torch.tensor([each.names.index(n) for n in both]) for each in (source, target)]
        return source.chosen(where[0]), target.chosen(where[1])
    if source.by == target.by and source.names == target.names:
        return source, target
    lacking = [name for name in (*source.names, *target.names) if name not in both]
    if not both:
        first = "they share none"
    elif lacking:
        first = f"{lacking[0]!r} is of one only"
    else:
        first = f"they are in other order, or by {source.by} and by {target.by}"
    raise TaskError(
        f"places of source ({_few(source)}) and target ({_few(target)}) differ: {first}; expected "
        "the same positions of both; ask for those that both have"
    )


def matched(
    source: Places,
    target: Places,
    source_batch: Batch,
    target_batch: Batch,
    *,
    tokenizer: Any = None,
) -> tuple[Int[Tensor, "batch place at"], Int[Tensor, "batch place at"]]:
    """The columns of source and target prompts that belong together, token by token.

    Tokens of a role are matched from its last one backwards; those that only one of the two prompts
    has are left out. Other positions need prompts of the same number of tokens.

    Args:
        source: places of the prompts that activations are taken from.
        target: places of the prompts that they are put into, as many.
        source_batch: the source prompts.
        target_batch: the target prompts.
        tokenizer: shows in messages where two prompts part.

    Returns:
        Columns of the source and of the target at the places of `shared`; -1 in both fills up.

    Raises:
        ShapeError: there are not as many source as target prompts, or two of them differ in length.
        TaskError: the places differ.
    """
    if not len(source) == len(source_batch) == len(target) == len(target_batch):
        raise ShapeError(
            f"{len(source)} places of {len(source_batch)} source prompts and {len(target)} of "
            f"{len(target_batch)} target prompts; expected one source for each target"
        )
    if source.by == target.by and source.by in ("all", "columns"):
        _require_equal_lengths(source_batch, target_batch, tokenizer)
    source, target = shared(source, target)
    found = [(each.columns >= 0).sum(-1) for each in (source, target)]
    n = torch.minimum(*found)
    width = max(1, int(n.max()))
    last = [
        _last(each.columns, k, n, width) for each, k in zip((source, target), found, strict=True)
    ]
    return last[0], last[1]


def n_tokens(batch: Batch) -> Int[Tensor, " batch"]:
    """Number of tokens of every prompt, special tokens included, up to its query position."""
    return batch.query - _first(batch) + 1


def _first(batch: Batch) -> Int[Tensor, " batch"]:
    return batch.mask.int().argmax(dim=1)


def _columns(batch: Batch, positions: Sequence[int]) -> Int[Tensor, "batch place 1"]:
    at = torch.tensor(positions, device=batch.query.device)
    begin = torch.where(at < 0, batch.query[:, None] + 1, _first(batch)[:, None])
    columns = begin + at
    return torch.where(columns <= batch.query[:, None], columns, -1)[:, :, None]


def _listed(positions: Any) -> list[Any]:
    chosen = list(positions) if isinstance(positions, Sequence) else [positions]
    kinds = {type(each) for each in chosen}
    if not chosen:
        raise TaskError(f"positions is empty; {_EXPECTED}")
    if kinds not in ({int}, {str}):
        raise TaskError(f"positions={str(positions)[:60]}: {_EXPECTED}")
    return chosen


def _require_within(batch: Batch, positions: Sequence[int]) -> None:
    for i, n in enumerate(n_tokens(batch).tolist()):
        beyond = [at for at in positions if not -n <= at < n]
        if beyond:
            raise TaskError(
                f"position {beyond[0]} lies beyond prompt {i}, which has {n} tokens up to where it "
                f"is asked; expected 0 to {n - 1}, or -{n} to -1"
            )


def _of_roles(roles: Roles, batch: Batch, chosen: Sequence[str] | None) -> Places:
    lengths = batch.mask.sum(1).tolist()
    if [len(each) for each in roles] != lengths:
        raise ShapeError(
            f"the batch has prompts of {lengths[:5]} tokens, the prompts are {len(roles)} of "
            f"{[len(each) for each in roles[:5]]}; give the batch that encodes them"
        )
    columns: dict[str, list[list[int]]] = {name: [[] for _ in roles] for name in _names(roles)}
    for i, (first, query) in enumerate(
        zip(_first(batch).tolist(), batch.query.tolist(), strict=True)
    ):
        for column, role in enumerate(roles[i][: query - first + 1], start=first):
            columns[role][i].append(column)
    names = list(columns) if chosen is None else list(chosen)
    unknown = [name for name in names if name not in columns]
    if unknown:
        raise TaskError(
            f"the prompts have no role {unknown[0]!r}; expected one of "
            f"{', '.join(map(repr, columns))}"
        )
    at = max(len(each) for name in names for each in columns[name])
    filled = [[_filled(columns[name][i], at) for name in names] for i in range(len(roles))]
    tensor = torch.tensor(filled, device=batch.query.device)
    return Places(tuple(names), tensor, "roles", all_roles=chosen is None)


def _names(roles: Roles) -> list[str]:
    """All roles, in the order in which they end, as in the prompt that has most."""
    rows = [list(dict.fromkeys(reversed(row)))[::-1] for row in dict.fromkeys(roles)]
    return list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))


def _filled(columns: list[int], at: int) -> list[int]:
    return [*columns, *[-1] * (at - len(columns))]


def _last(
    columns: Int[Tensor, "batch place at"],
    found: Int[Tensor, "batch place"],
    n: Int[Tensor, "batch place"],
    width: int,
) -> Int[Tensor, "batch place width"]:
    """The last `n` of the `found` columns of each place."""
    at = torch.arange(width, device=columns.device)
    index = (found - n)[..., None] + at
    taken = columns.gather(-1, index.clamp(max=columns.shape[-1] - 1))
    return torch.where(at < n[..., None], taken, -1)


def _few(places: Places) -> str:
    shown = ", ".join(places.names[:6])
    return shown if places.n_place <= 6 else f"{shown}, … {places.n_place} in all"


def _require_equal_lengths(source: Batch, target: Batch, tokenizer: Any) -> None:
    lengths = zip(n_tokens(source).tolist(), n_tokens(target).tolist(), strict=True)
    for i, (n_source, n_target) in enumerate(lengths):
        if n_source != n_target:
            raise ShapeError(
                f"prompt {i} has {n_source} tokens as source and {n_target} as target"
                f"{_where_they_part(source, target, i, tokenizer)}; positions that are counted "
                f'need as many in both: give positions="roles" (or "query")'
            )


def _where_they_part(source: Batch, target: Batch, i: int, tokenizer: Any) -> str:
    """The first tokens at which prompt `i` of two batches differ, as text."""
    if tokenizer is None or source.inputs.is_floating_point():
        return ""
    rows = [each.inputs[i, each.mask[i]].tolist() for each in (source, target)]
    pairs = enumerate(zip(*rows, strict=False))
    start = next((at for at, (a, b) in pairs if a != b), min(map(len, rows)))
    shown = [
        " ".join(repr(tokenizer.decode([token])) for token in row[start : start + 2]) or "its end"
        for row in rows
    ]
    return f" (source … {shown[0]} …, target … {shown[1]} …)"
