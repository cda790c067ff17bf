"""Code digest: what a cell computes, as two digests that its evidence record keeps.

| digest   | of |
| -------- | -- |
| `device` | the kernels of the backends that the plan used and what they call, and what was asked before |
|          | them: the order of backends on the architecture and the needs of those passed over; what no run |
|          | on one CPU enters (`ON_DEVICES` ...); of a refusal: the order and the needs of every kernel of |
|          | the op whose rule it quotes |
| `shared` | the rest of the way: request, plan, loader, layer, pipeline and run, with the names of the family |
|          | and of the model; with a stand-in also what writes it. Of a refusal: request and plan |

`definitions` says what counts in a definition. Families, models and kernels are found by their ids
while a plan is made, so nothing that is written in the common code leads to them: here they are
entries, and where the common code names one of theirs it counts for the cells of that family, model or
op alone. The way also ends at `EDGES`: what lies behind them is judged by its content.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from quantmatrix.proof.definitions import Package, hash_texts
from quantmatrix.proof.kernel_tables import KernelTables
from quantmatrix.proof.scopes import COMPILED, PUBLISHED, STAND_IN, TRUE_SIZE
from quantmatrix.proof.source_modules import Definition

REQUEST = ("request", "Request")
PLAN = (("api", "plan"), REQUEST)
RUN = (("api", "generate_all"), REQUEST)
WRITER = (("tiny.hub", "ensure"),)
STARTS = {
    COMPILED: (*PLAN, ("measure.compiled", "Builder")),
    STAND_IN: (*RUN, *WRITER),
    TRUE_SIZE: (("measure.true_size", "measure"), REQUEST),
    PUBLISHED: RUN,
}
"""Where the way of a record begins, by its scope: (module, name). That of a refusal begins at `PLAN`."""
ON_DEVICES = (("runtime.pipeline", "place"), ("runtime.pipeline", "make_current"))
ACCELERATED = (
    ("runtime.acceleration", "compile_blocks"),
    ("runtime.acceleration", "graph_forward"),
)
SEVERAL = (
    ("runtime.parallel", "generate_together"),
    ("runtime.parallel", "split"),  # the processes begin as programs of their own
    ("runtime.sharded_weights", "shard"),
)
"""Parts of the way that a run on one CPU never enters: they count as `device`, too."""
EDGES = (
    ("tables.read", "read"),  # rows are judged by the digests of the rows
    ("tables.read", "tables_folder"),
    ("tiny.hub", "default_folder"),  # a folder's name
    ("tiny.hub", "open_tiny_hub"),  # an entry of its own
    ("families", "IDS"),
    ("families", "written"),
    ("models", "IDS"),
    ("models.further", "IDS"),
    ("kernels", "OPS"),
)
"""Where the way ends, because what lies behind is an entry or is judged by its content."""
FURTHER = "models.further"
"""The package of models that have a stand-in and no model file."""
DOORS = ("families", "models", "kernels")
"""Packages whose modules are entries."""
PROTOCOLS = (
    *("families.protocol", "families.layouts", "families.unknown_quantization"),
    *("families.producers.modelopt_faults", "families.nunchaku_svdq.flags"),
    *("models.dialect", "kernels.number_formats", "kernels.choosing", "kernels.exchange_triton"),
)
"""Modules of these that belong to all; what common code of earlier revisions asked is among them."""
ROOMS = ("svdq_faults", "svdq_packing")
"""Modules of one family that lay elsewhere, in revisions from before `FORMER`."""
FORMER: Mapping[str, tuple[str, ...]] = {
    "api": ("runtime.plan.decide", "planning", "runtime.generate", "run"),
    "measure.compiled": ("compiled",),
    "measure.true_size": ("true_size",),
    "runtime.acceleration": ("acceleration",),
    "runtime.parallel": ("parallel",),
    "runtime.pipeline": ("pipeline",),
    "tables.read": ("matrix",),
    "tiny.hub": ("tiny", "sources"),
}
"""Where entries and edges lay in earlier revisions, whose code is asked too; an entry that moves adds
its former module here."""
FAMILY_PLANS = (
    *("ID", "detect", "schemes", "tensors", "check", "doubts", "caveat", "ignored", "layout"),
    *("after_gelu", "check_flags", "check_fit", "ALGORITHMS", "DIALECT", "CODE_LEAVES"),
    *("BIAS_LEAVES", "WRAPPERS", "ONLINE", "ONLINE_NAMES", "CPU_OFFLOAD", "plain_codes"),
)
FAMILY_LOADS = ("canonical", "find_fault", "UNUSED")
FAMILY_WRITES = ("SCHEMES", "quantize", "declare", "scheme_of", "WRITES_ON_CPU")
MODEL_PLANS = ("ID", "NAME", "REPO", "PIPELINE", "TRANSFORMER", "COMPONENTS", "DIALECTS", "BLOCKS")
MODEL_RUNS = ("call_arguments",)
MODEL_WRITES = ("FALLBACKS", "STAND_IN", "build_tiny")
DEFAULTS = ("DEFAULTS", "TINY_DEFAULTS")
MODEL_SIZES = ("FULL", "ONE_BLOCK", "STEP", "forward_inputs")
"""Names that a family and a model have, by the part of the way that asks for them; `build_tiny` and
`caveat` are of earlier revisions, whose models built their stand-ins themselves."""
OP_LOADS = ("take_rows",)
"""Names of an op's module that the loader asks for, beside its kernels."""


@dataclass(frozen=True)
class Way:
    """What decides which code a cell runs through."""

    family: str
    model: str
    arch: str
    vendor: str
    backend: str = ""
    """The one that the row asks for; empty where the order decides."""
    backends: tuple[str, ...] = ()
    """Those that the plan used."""
    schemes: tuple[str, ...] = ()
    """Names of the schemes of the plan's layers."""
    scope: str = STAND_IN
    refused: bool = False
    rule: str = ""
    """The one that the refusal quotes."""
    online: bool = False
    """Layers are quantized while loading."""
    accelerated: bool = False
    """Blocks are compiled, or replayed from a CUDA graph."""
    several: bool = False
    """Several processes share a generation."""


@dataclass(frozen=True)
class Digests:
    """The two digests of a cell, `sha256:...`."""

    device: str
    shared: str


def find_way(
    cell: Mapping[str, Any], plan: Mapping[str, Any], hardware: tuple[str, str], scope: str
) -> Way:
    """The way of a record of a scope: its `cell` and `plan`, and (vendor, arch) of its hardware's row."""
    parts = list(plan.get("components", {}).values())
    machine = plan.get("machine") or {}
    precisions = {
        precision for part in parts for precision in str(part.get("precision") or "").split(" + ")
    }
    return Way(
        family=cell["family"],
        model=cell["model"],
        vendor=str(machine.get("vendor", hardware[0])),
        arch=str(machine.get("arch", hardware[1])),
        backend=cell["backend"],
        backends=tuple(sorted({name for part in parts for name in part["backends"]})),
        schemes=tuple(sorted(precisions - {""})),
        scope=scope,
        refused=cell["claim"] == "refused",
        rule=cell["rule"],
        online=any(part.get("online") for part in parts),
        accelerated=not {"--compile", "--cuda-graph"}.isdisjoint(cell["flags"]),
        several=plan.get("processes", 1) != 1,
    )


class Code:
    """The code of a package's folder, asked for the digests of cells."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet."""
        self.package = Package(folder, DOORS, PROTOCOLS, ROOMS)
        known = [self.locate(*edge) for edge in EDGES]
        self.package.edges = {self.package.find(*edge) for edge in known if self.package.has(*edge)}
        self._device: dict[Way, str] = {}
        self._shared: dict[Way, str] = {}
        self._owners: dict[Definition, set[str]] = {}
        self.tables = KernelTables(self.package)
        self._schemes: dict[str, dict[str, str]] = {}

    def prepare(self) -> None:
        """Read all that runs have in common now, not while the first of them is recorded."""
        entries = list(self.name_all("", "", (*RUN, *PLAN, *WRITER)))
        for _, entry in [*entries, *self.list_crossings(entries, self.parts)]:
            self.package.digest(entry)

    def digest(self, way: Way) -> Digests:
        """The digests of a way; CodeError where the code cannot be followed."""
        common = replace(
            way, arch="", vendor="", backend="", backends=(), accelerated=False, several=False
        )
        if common not in self._shared:
            self._shared[common] = self._sum(self.list_shared(common))
        if way not in self._device:
            self._device[way] = self._sum(self.list_device(way))
        return Digests(self._device[way], self._shared[common])

    def describe(
        self,
        cell: Mapping[str, Any],
        plan: Mapping[str, Any],
        hardware: tuple[str, str],
        scope: str,
    ) -> dict[str, str]:
        """The two digests as a record's `cell` holds them; arguments as of `find_way`."""
        found = self.digest(find_way(cell, plan, hardware, scope))
        return {"device_digest": found.device, "shared_digest": found.shared}

    def digest_stand_ins(self) -> str:
        """`sha256:...` of everything that writes stand-ins, of whichever family and model."""
        entries = list(self.name_all("", "", WRITER))
        for family in self.list_ids("families"):
            entries += self.name_all(family, module_of("families", family), FAMILY_WRITES)
        names = (*MODEL_PLANS, *MODEL_RUNS, *MODEL_WRITES, *MODEL_SIZES, "TINY_DEFAULTS")
        for model in (*self.list_ids("models"), *self.list_further()):
            entries += self.name_all(model, self.locate_model(model), names)
        return self._sum([*entries, *self.list_crossings(entries, self.parts)])

    def _sum(self, entries: Iterable[tuple[str, Definition | str]]) -> str:
        found = {
            f"{role}={one if isinstance(one, str) else self.package.digest(one)}"
            for role, one in entries
        }
        return f"sha256:{hash_texts(sorted(found))}"

    def list_ids(self, kind: str) -> tuple[str, ...]:
        """Ids of the families or models that have a module."""
        ids = self.package.evaluate(*self.package.open_constant(kind, "IDS"))
        return tuple(name for name in ids if self.package.find_module(module_of(kind, name)))

    def list_further(self) -> tuple[str, ...]:
        """Ids of the models that have a module of their stand-in alone; none in earlier revisions."""
        if not self.package.has(FURTHER, "IDS"):
            return ()
        return tuple(self.package.evaluate(*self.package.open_constant(FURTHER, "IDS")))

    def locate_model(self, model: str) -> str:
        """The module of a model, below the package."""
        return module_of(FURTHER if model in self.list_further() else "models", model)

    def find_own(self, model: str) -> str:
        """The model whose file describes the transformer of a further one, or itself."""
        if model not in self.list_further():
            return model
        named = (self.locate_model(model), "TRANSFORMER")
        wanted = self.package.evaluate(*self.package.open_constant(*named))
        for other in self.list_ids("models"):
            known = self.package.open_constant(module_of("models", other), "TRANSFORMER")
            if self.package.evaluate(*known) == wanted:
                return other
        return model

    def name_model(
        self, role: str, model: str, names: Collection[str]
    ) -> Iterator[tuple[str, Definition]]:
        """(role, definition) of a model's names, and of the model file that a further one leans on."""
        yield from self.name_all(role, self.locate_model(model), names)
        if (own := self.find_own(model)) != model:
            yield from self.name_all(f"{role}own ", module_of("models", own), names)

    def locate(self, module: str, name: str) -> tuple[str, str]:
        """(module, name) of an entry or edge where this package has it: today's, or a former one."""
        addresses = [(address, name) for address in (module, *FORMER.get(module, ()))]
        return next((address for address in addresses if self.package.has(*address)), addresses[0])

    def name_all(
        self, role: str, module: str, names: Iterable[str | tuple[str, str]]
    ) -> Iterator[tuple[str, Definition]]:
        """(role, definition) of the names that a module has; a pair must be there."""
        for name in names:
            address = self.locate(*name) if isinstance(name, tuple) else (module, name)
            if isinstance(name, str) and not self.package.has(module, name):
                continue
            found = self.package.find(*address)
            if isinstance(found, Definition):
                yield f"{role}{address[1] if isinstance(name, str) else ''}", found

    def list_shared(self, way: Way) -> list[tuple[str, Definition]]:
        """(role, definition) of the way that a cpu run has in common."""
        loads = not way.refused and way.scope != COMPILED
        writes = loads and way.scope in (STAND_IN, TRUE_SIZE)
        family = [*FAMILY_PLANS, *(FAMILY_LOADS if loads else ())]
        family += FAMILY_WRITES if writes else FAMILY_WRITES[:2] if way.online else ()
        model = [*MODEL_PLANS, "TINY_DEFAULTS" if way.scope == STAND_IN else "DEFAULTS"]
        model += [*(MODEL_RUNS if loads else ()), *(MODEL_WRITES if writes else ())]
        model += MODEL_SIZES if way.scope in (TRUE_SIZE, COMPILED) else ()
        ops = [] if way.refused else self.find_ops(way)
        entries = [
            *self.name_all("way ", "", PLAN if way.refused else STARTS[way.scope]),
            *self.name_all("family ", module_of("families", way.family), family),
            *self.name_model("model ", way.model, model),
        ]
        for op in ops:
            entries += self.name_all(f"{op} ", self.tables.ops[op], OP_LOADS)
        owners = {f"families {way.family}", f"models {way.model}"}
        owners |= {f"models {self.find_own(way.model)}"}
        owners |= {f"op {op}" for op in self.find_ops(way)}
        return [*entries, *self.list_crossings(entries, owners)]

    def list_crossings(
        self, entries: Iterable[tuple[str, Definition]], owners: Collection[str]
    ) -> list[tuple[str, Definition]]:
        """What common code on the way names behind the doors, and that is of these owners.

        A definition is of those families, models and ops of which it needs, or is, a part; of no owner
        it counts for every cell.
        """
        reached = self.package.list_reached(d for _, d in entries)
        crossed = {other for one in reached for other in self.package.list_crossed(one)}
        found = []
        for one in crossed:
            named = self.find_owners(one)
            if not named or not named.isdisjoint(owners):
                found.append(("", one))
        return found

    def find_owners(self, one: Definition) -> set[str]:
        """The families, models and ops of which a definition needs, or is, a part."""
        if one not in self._owners:
            needed = self.package.list_reached([one])
            self._owners[one] = {owner for owner, parts in self.parts.items() if needed & parts}
        return self._owners[one]

    @cached_property
    def parts(self) -> dict[str, set[Definition]]:
        """What every family, model and op consists of, behind the doors."""
        names = {
            "families": (*FAMILY_PLANS, *FAMILY_LOADS, *FAMILY_WRITES),
            "models": (*MODEL_PLANS, *MODEL_RUNS, *MODEL_WRITES, *MODEL_SIZES, *DEFAULTS),
        }
        entries = {
            f"{kind} {one}": self.name_all("", module_of(kind, one), names[kind])
            for kind in names
            for one in self.list_ids(kind)
        }
        for op, module in self.tables.ops.items():
            entries[f"op {op}"] = self.name_all("", module, ("KERNELS", *OP_LOADS))
        return {
            owner: set(filter(self.is_inside, self.package.list_reached(d for _, d in pairs)))
            for owner, pairs in entries.items()
        }

    def is_inside(self, definition: Definition) -> bool:
        """Whether a definition lies behind a door."""
        return self.package.is_inside(definition.module)

    def list_device(self, way: Way) -> Iterator[tuple[str, Definition | str]]:
        """(role, definition or digest) of what the hardware decides and runs."""
        if not way.refused and way.scope != COMPILED:
            parts = list(ON_DEVICES if way.vendor != "cpu" else ())
            parts += ACCELERATED if way.accelerated else ()
            yield from self.name_all("device ", "", parts)
            for module, name in SEVERAL if way.several else ():
                yield from self.name_all("device ", module, (name,))  # where a revision has it
        for op in self.find_ops(way):
            kernels = self.tables.find_kernels(op)
            order = self.tables.find_order(op, way.arch, way.vendor)
            passed = order if isinstance(order, tuple) else tuple(kernels)
            if not way.backend:
                yield f"{op} order", repr(passed) if isinstance(order, tuple) else order
            used = [name for name in kernels if name in way.backends]
            used += [""] if "" in kernels and set(way.backends) - set(kernels) else []
            asked = passed[: 1 + max([passed.index(n) for n in used if n in passed], default=-1)]
            if way.refused:
                used, asked = [], tuple(kernels)
            elif way.backend:
                asked = ()
            for name in used:
                yield f"{op} {name}", self.tables.digest_nodes(kernels[name])
            for name in {"" if name not in kernels else name for name in asked} & set(kernels):
                needs = self.tables.list_needs(kernels[name])
                yield f"{op} {name} needs", self.tables.digest_nodes(needs)

    def find_ops(self, way: Way) -> list[str]:
        """Ops of the plan's layers, or of the kernels that refused; every op of the family where the plan
        or the rule does not say."""
        known = self.list_schemes(way.family)
        named = {known[name] for name in way.schemes if name in known}
        if way.refused:
            named = {op for op in self.tables.ops if way.rule in self.tables.find_rules(op)}
        if set(way.schemes) - set(known) or (way.refused and not named & set(known.values())):
            named = set(known.values())
        return sorted(named & set(known.values()))

    def list_schemes(self, family: str) -> dict[str, str]:
        """The op of each scheme of a family, by the scheme's name."""
        if family not in self._schemes:
            module = module_of("families", family)
            entries = self.name_all("", module, (*FAMILY_PLANS, *FAMILY_WRITES))
            reached = self.package.list_reached(d for _, d in entries)
            found = [self.tables.find_schemes(d) for d in sorted(reached, key=str)]
            self._schemes[family] = {name: op for pairs in found for name, op in pairs}
        return self._schemes[family]


def module_of(kind: str, name: str) -> str:
    """The module of a family's or a model's id, below the package."""
    return f"{kind}.{name.replace('-', '_')}"


@cache
def own_code() -> Code:
    """The code of the package that runs here."""
    return Code(Path(__file__).parents[1])
