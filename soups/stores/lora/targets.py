"""Which tensor of the base each part of an adapter changes, and how; shapes are checked here."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cached_property

from soups.errors import StorageError, WeightsError
from soups.stores.folder import folder_of
from soups.stores.lora.changes import Change, Layout, LowRank, Replace, Rows, Shape, Shift
from soups.stores.lora.config import AdapterConfig
from soups.stores.lora.contents import Contents, Factors, Whole
from soups.stores.lora.experts import expert_changes
from soups.stores.lora.layout import Layouts
from soups.stores.names import Architecture, NameMatcher, architecture_of, mate, tie_groups
from soups.stores.names.rules import is_embedding, is_head
from soups.stores.store import Store, TensorMeta

# PEFT applies the product of `out_proj` in `nn.MultiheadAttention` twice, in training and in merging alike.
_OUT_PROJ_TIMES = 2


class Targets:
    """Matches an adapter with its base.

    Args:
        base: the base model.
        adapter: the adapter's tensors.
        contents: the same by module.
        config: the adapter's configuration.

    Attributes:
        changes: the steps for each tensor of the base that changes, in PEFT's order.
        own: names that the base ties to another tensor, or does not have, and that the adapter gives a tensor of their own.
        copies: names that the base leaves out, because they are tied to a tensor that the adapter takes out of the tie, and
            that tensor's name in the base.

    Raises:
        WeightsError: a tensor of the adapter has no place in the base, or another shape.
        StorageError: a part of the adapter is missing, or of a kind that is not supported.
    """

    def __init__(self, base: Store, adapter: Store, contents: Contents, config: AdapterConfig) -> None:
        self._base, self._adapter, self._config = base, adapter, config
        self._tied = base.tied()
        self._names = set(base)
        self._wanted = [*(one for module in _modules(contents) for one in self._tensors(module)), *contents.wholes]
        self._layouts = Layouts(base, recorded=config.fan_in_fan_out, architecture=lambda: self._architecture)
        self.changes: defaultdict[str, list[Change]] = defaultdict(list)
        self.own: set[str] = set()
        self.copies: dict[str, str] = {}
        self._unknown: list[str] = []
        # What is replaced comes first: products are added to the replaced tensor. Of tied modules PEFT merges the embedding
        # before the head.
        for name, whole in contents.wholes.items():
            self._replace(name, whole, contents)
        for factors in sorted(contents.factors.values(), key=lambda one: "lora_embedding_A" not in one.keys):
            self._multiply(factors, contents)
        for module, key in contents.rows.items():
            self._train_rows(module, key)
        self._check_vocabulary()
        if self._unknown:
            raise WeightsError(
                f"{adapter.location} changes {len(self._unknown)} tensors that {base.location} does not have, "
                f"{', '.join(map(repr, self._unknown[:4]))} among them. The adapter was trained on another model, or on one "
                f"with other names: name that one as the base, or map the names by rename."
            )

    @cached_property
    def _architecture(self) -> Architecture | None:
        return architecture_of(folder_of(self._base))

    @cached_property
    def _matcher(self) -> NameMatcher:
        return NameMatcher({name: self._base.meta(name).shape for name in self._base}, self._architecture)

    @cached_property
    def _matched(self) -> dict[str, str]:
        """The base's names of everything that is wanted, found through renames and prefixes."""
        return self._matcher.match(dict.fromkeys(self._wanted))

    @cached_property
    def _ties(self) -> list[set[str]]:
        return tie_groups([] if self._architecture is None else [self._architecture], self._matcher)

    def find(self, name: str) -> str | None:
        """Return the base's name of a tensor; of tied ones the first. None where the base does not have it."""
        if name not in self._names:
            if name not in self._matched:
                self._matched[name] = self._matcher.match({name: None}, prefixes=False).get(name, "")
            name = self._matched[name]
        return self._tied.get(name, name) if name in self._names else None

    def _find_tied(self, name: str, shape: Shape) -> str | None:
        found = self.find(name)
        if found is not None:
            return found
        found = mate(self._base, name, TensorMeta(shape, self._base.meta(self._base.keys()[0]).dtype), self._ties)
        return None if found is None else self._tied.get(found, found)

    def shape(self, target: str) -> Shape:
        """Return the shape of a tensor after the steps so far."""
        shape = self._base.meta(target).shape if target in self._names else ()
        for change in self.changes.get(target, ()):
            shape = change.shape(shape)
        return shape

    def _replace(self, name: str, whole: Whole, contents: Contents) -> None:
        module, _, leaf = name.rpartition(".")
        saved, shape = self._config.saves(module), self._adapter.meta(whole.key).shape
        exact = name if name in self._names else self._matched.get(name)
        if saved and not whole.wrapped:
            target = exact or name
            if self._tied.get(target) is not None or exact is None or target in self._tied.values():
                self.own.add(target)
            for group in self._ties if exact is not None and leaf == "weight" else []:
                # PEFT trains a copy: what the base would tie to the tensor, and leaves out, keeps the base's values.
                for mate in group - self._names - set(contents.wholes) if target in group else ():
                    if self._architecture and mate in self._architecture.names:
                        self.copies[mate] = self._tied.get(target, target)
        else:
            found = self._find_tied(name, shape)
            if found is None:
                self._unknown.append(name)
                return
            target = found
        if target in self._names and self._base.meta(target).shape != shape and not saved:
            self._check_resized(name, target, shape, leaf)
        self.changes[target].append(Replace(whole.key, shape))

    def _check_resized(self, name: str, target: str, shape: Shape, leaf: str) -> None:
        old = self._base.meta(target).shape
        vocabulary = is_embedding(target) or is_head(target) or is_head(name.replace(".bias", ".weight"))
        if vocabulary and leaf in ("weight", "bias") and len(shape) == len(old) and shape[1:] == old[1:]:
            return
        raise WeightsError(
            f"{self._adapter.location}: {name!r} has shape {shape}, but {target!r} of {self._base.location} has {old}, and "
            f"only vocabularies may be resized. The adapter belongs to another model."
        )

    def _train_rows(self, module: str, key: str) -> None:
        shape = self._adapter.meta(key).shape
        rows = self._config.tokens(module)
        if rows is None or len(rows) != shape[0]:
            raise WeightsError(
                f"{self._adapter.location}: {key!r} holds {shape[0]} trained rows, and trainable_token_indices of its "
                f"configuration names {0 if rows is None else len(rows)}. Copy the adapter again."
            )
        target = self._find_tied(f"{module}.weight", shape)
        if target is None:
            self._unknown.append(f"{module}.weight")
            return
        change = Rows(key, rows)
        width = change.shape(self.shape(target))[1]
        if width != shape[1]:
            raise self._misfit(key, shape, target)
        self.changes[target].append(change)

    def _multiply(self, factors: Factors, contents: Contents) -> None:
        keys, module = factors.keys, factors.module
        embedding = "lora_embedding_A" in keys or "lora_embedding_B" in keys
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        for kind, other in ((first, second), (second, first)):
            if kind not in keys:
                some = keys.get(other) or next(iter(keys.values()))
                raise WeightsError(f"{self._adapter.location} has {some!r} without its {kind}. Copy or make it again.")
        if self._config.use_dora and "lora_magnitude_vector" not in keys:
            raise WeightsError(
                f"{self._adapter.location} is a DoRA adapter and has no magnitude for {module!r}. Copy or make it again."
            )
        if not self._config.use_dora and "lora_magnitude_vector" in keys:
            raise StorageError(
                f"{self._adapter.location} holds magnitudes of DoRA, and its configuration does not set use_dora. One of the "
                f"two is from another adapter; copy both again."
            )
        if not embedding and self._of_parameter(factors, contents):
            return
        a, b = self._adapter.meta(keys[first]).shape, self._adapter.meta(keys[second]).shape
        target = self._target(module, a, b, embedding=embedding)
        if target is None:
            self._unknown.append(f"{module}.weight")
            return
        named = f"{module}.weight" if self._is_parameter(f"{module}.weight") else module
        rank, scale = self._config.rank(named), self._config.scale(named)
        if factors.path.endswith(".base_layer.out_proj"):
            scale *= _OUT_PROJ_TIMES
        blocks = self._blocks(module)
        self._check_rank(keys[first], a[0], rank)
        layout = self._layout(module, keys[first], a, b, target, embedding=embedding, blocks=blocks)
        if self._config.init and layout not in ("linear", "transposed"):
            raise StorageError(
                f"{self._adapter.location} applies {self._config.init} to {module!r}, which is no matrix. Merge it with PEFT."
            )
        if self._config.init == "olora" and layout == "transposed":
            raise StorageError(
                f"{self._adapter.location} applies OLoRA to {module!r}, a Conv1D, which PEFT decomposes untransposed. Merge it "
                f"with PEFT."
            )
        magnitude = keys.get("lora_magnitude_vector")
        change = LowRank(
            keys[first], keys[second], scale, layout, magnitude, self._config.init, rank=rank, blocks=blocks
        )
        self._check_magnitude(change, target)
        self.changes[target].append(change)
        if "lora_B.bias" in keys:
            bias = self.find(f"{module}.bias") or (
                target.removesuffix("weight") + "bias"
                if target.removesuffix("weight") + "bias" in self._names
                else None
            )
            if bias is None:
                raise WeightsError(
                    f"{self._adapter.location} shifts the bias of {module!r} (lora_bias), which {self._base.location} does "
                    f"not have. PEFT cannot merge this either; leave lora_bias out in training."
                )
            self.changes[bias].append(Shift(keys["lora_B.bias"], scale))

    def _target(self, module: str, a: Shape, b: Shape, *, embedding: bool) -> str | None:
        if embedding:
            return self._find_tied(f"{module}.weight", (a[1], b[0]))
        attention = self.find(f"{module}.in_proj_weight")
        if attention is not None and len(a) == 2 and (b[0], a[1]) == self._base.meta(attention).shape:
            return attention
        return self._find_tied(f"{module}.weight", (b[0], *a[1:]))

    def _parameters(self, module: str) -> list[str]:
        """Return the names of the module's adapted parameters that are no `weight`."""
        split = [one.rpartition(".") for one in self._config.target_parameters]
        return [
            leaf
            for parent, _, leaf in split
            if leaf != "weight" and (not parent or re.fullmatch(rf"(.*\.)?{re.escape(parent)}", module))
        ]

    def _tensors(self, module: str) -> list[str]:
        """Return the names that a module's tensors may have in the base."""
        named = [f"{module}.{leaf}" for leaf in self._parameters(module)]
        return [name for name in named if name in self._names] or [f"{module}.weight"]

    def _is_parameter(self, name: str) -> bool:
        return any(name == one or name.endswith(f".{one}") for one in self._config.target_parameters)

    def _of_parameter(self, factors: Factors, contents: Contents) -> bool:
        """Take on the factors of a bare parameter or of one expert; tell whether they are such."""
        wrapped = [one for one in contents.factors.values() if one.module == factors.module]
        found = expert_changes(
            self._base,
            self._adapter,
            self._config,
            factors,
            len(wrapped),
            self._parameters(factors.module),
            self.find,
            self._layouts,
        )
        for target, change in found:
            self.changes[target].append(change)
        return bool(found)

    def _check_vocabulary(self) -> None:
        """Refuse an embedding that grew beside a head that did not: PEFT leaves such a head's new rows out of the file."""
        for target in list(self.changes):
            old, new = self._base.meta(target).shape if target in self._names else (), self.shape(target)
            if not is_embedding(target) or len(old) != 2 or old == new:
                continue
            heads = [one for one in self._names if is_head(one) and one not in self._tied and one != target]
            for head in heads:
                if self._base.meta(head).shape == old == self.shape(head):
                    raise WeightsError(
                        f"{self._adapter.location} resizes {target!r} from {old[0]} to {new[0]} rows and holds no such "
                        f"{head!r}: PEFT saves an adapted embedding without the head's new rows. Train with "
                        f"modules_to_save=[{head.removesuffix('.weight')!r}], or merge the trained model with PEFT."
                    )

    def _blocks(self, module: str) -> tuple[int, int]:
        first, second, count = self._config.blocks
        return (
            count if any(part in module for part in first) else 1,
            count if any(part in module for part in second) else 1,
        )

    def _check_rank(self, key: str, found: int, rank: int) -> None:
        if found != rank:
            raise WeightsError(
                f"{self._adapter.location}: {key!r} has rank {found}, and the configuration says {rank}. The scale α/r would be "
                f"another; copy the adapter's two files again."
            )

    def _layout(
        self, module: str, key: str, a: Shape, b: Shape, target: str, *, embedding: bool, blocks: tuple[int, int]
    ) -> Layout:
        shape = self.shape(target)
        if embedding:
            if shape != (a[1], b[0]):
                raise self._misfit(key, (a[1], b[0]), target)
            return "embedding"
        rank, product = a[0], (b[0], a[1] * blocks[0], *a[2:])
        if len(a) > 2:
            inner = shape[1] if len(shape) == len(a) else 0
            grouped = inner > 0 and shape == (b[0], inner, *a[2:]) and a[1] % inner == 0
            if grouped and inner != a[1]:
                raise StorageError(
                    f"{self._adapter.location} adapts {module!r}, a grouped convolution, which PEFT cannot merge either."
                )
            if shape != product or b[1] != rank:
                raise self._misfit(key, product, target)
            return "conv"
        if product not in (shape, shape[::-1]) or b[1] * blocks[1] != rank:
            raise self._misfit(key, product, target)
        if shape == shape[::-1]:
            return "transposed" if target.endswith(".weight") and self._layouts.transposed(module) else "linear"
        transposed = product != shape
        self._layouts.see(module, transposed=transposed)
        return "transposed" if transposed else "linear"

    def _check_magnitude(self, change: LowRank, target: str) -> None:
        if change.magnitude is None:
            return
        shape = self.shape(target)
        outputs = shape[1] if change.layout in ("transposed", "embedding") else shape[0]
        if self._adapter.meta(change.magnitude).numel != outputs:
            raise self._misfit(change.magnitude, self._adapter.meta(change.magnitude).shape, target)

    def _misfit(self, key: str, shape: Shape, target: str) -> WeightsError:
        return WeightsError(
            f"{self._adapter.location}: {key!r} makes a change of shape {shape}, but {target!r} of {self._base.location} has "
            f"{self.shape(target)}. The adapter belongs to another model."
        )


def _modules(contents: Contents) -> list[str]:
    return list(dict.fromkeys([*(one.module for one in contents.factors.values()), *contents.rows]))
