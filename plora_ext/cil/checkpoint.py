"""A run on disk, so that one that was killed goes on as if it had not been.

`OUT/checkpoint/` holds `checkpoint.json` and the safetensors files that it names. A file is named by the hash of its
content, so files never change: what is new is written beside them, the JSON is renamed into place last, and only then
go the files that it no longer names. Whatever happens in between, the folder holds a whole checkpoint, the old or the
new one.

After every task it holds what the method has learned and the state of the random generators; after every epoch, in
addition, what training on the current task has reached. A resumed run starts the task anew from the former, which
brings back whatever training needs around it, and continues the epochs from the latter. The frozen backbone and the
images are not stored; a fingerprint makes sure that they and the settings are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

import plora_ext
from plora_ext import change
from plora_ext.cil.distributed import SINGLE, World
from plora_ext.cil.files import write_whole
from plora_ext.cil.packing import pack, rng_state, set_rng_state, unpack
from plora_ext.cil.registry import search_in
from plora_ext.cil.same_run import ELSEWHERE, ROUNDING, TEST_IMAGES, all_settings, refuse_other
from plora_ext.data.sets import NAMES

FORMAT, READS = 4, (2, 3, 4)  # written; and read: `_migrated`
MANIFEST = "checkpoint.json"
# What a finished run writes beside its checkpoint (plora_ext.report.files).
RESULTS = ("metrics.json", "settings.yaml", "accuracy.png", "task_matrix.png", "forgetting.png", "drift.png",
           "cost.png", "cost_of_tasks.png")  # fmt: skip
_OURS = re.compile(r".+-[0-9a-f]{16}\.safetensors|\..+\.part")


class Checkpoint:
    """The checkpoint of one run.

    Args:
        folder: The run's folder.
        resume: Continue what is there. Otherwise an unfinished run is refused, and a finished one replaced if it is the
            same run once more.
        world: The processes of the run; that of rank 0 alone reads and writes, and tells the others.
        overwrite: Replace a finished run whatever it was.

    Attributes:
        manifest: What `checkpoint.json` says; empty where there is none.
        changed: What `begin` found to be other than in the saved run, though the run may continue with it.

    Raises:
        ValueError: An unfinished run without `resume`, or a checkpoint that is damaged.
        OSError: It cannot be read.
    """

    def __init__(self, folder: Path, resume: bool = False, world: World = SINGLE, overwrite: bool = False):
        self.folder, self.world = folder / "checkpoint", world
        self._stamps: dict[str, tuple[Any, str]] = {}  # of the parts on disk: their entry, a fingerprint of the content
        self._run = ""  # what the run has measured, as JSON
        self.changed: list[str] = []
        self.manifest: dict[str, Any] = world.from_first(lambda: _read_manifest(self.folder))
        self._replaced: dict[str, Any] = {}  # a finished run stays until the first save
        self._overwrite = overwrite
        if self.manifest and not resume:
            done, of = len(self.manifest["run"]["curve"]), self.manifest["run"]["tasks"]
            if done < of:
                raise ValueError(
                    f"{folder} holds a run that has learned {done} of {of} tasks: continue it with --resume, "
                    f"choose another folder, or remove {self.folder}"
                )
            self._replaced, self.manifest = self.manifest, {}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the saved run; one that came later is as if there was none.

        Where it was begun in another folder, its relative paths are those from there, as far as they exist, and its
        plugins are looked for there, too.

        Raises:
            ValueError: There is one that this version does not have.
        """
        by = f"{self.folder}, written by plora_ext {self.manifest['plora_ext']}"
        begun = Path(self.manifest.get("cwd", "."))
        if self.manifest["settings"].get("plugins"):
            for folder in _folders(self.manifest):
                search_in(folder)
        saved = all_settings(self.manifest["settings"], by)
        names = {"data": NAMES, "data_root": (), "weights": (None, "random")}  # and values that are no paths
        for name in names if begun.absolute() != Path.cwd() else ():
            if saved[name] not in names[name] and (begun / saved[name]).exists():
                saved[name] = str(begun / saved[name])
        return saved

    # ------------------------------------------------------------------ tasks

    def begin(
        self, fingerprint: Mapping[str, Any], settings: Mapping[str, Any], run: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """Says which run this is; returns what `save_task` was last given, or None.

        Args:
            run: What it has measured before its first task.

        Raises:
            ValueError: The checkpoint is of another run (names every difference), or damaged; or another process of
                this run was started with something else.
        """
        if self.world.size > 1:
            whole = {**fingerprint, "settings": {k: v for k, v in settings.items() if k not in ELSEWHERE}}
            refuse_other(self.world.from_first(lambda: whole), whole, "the process of rank 0 is")
        if self._replaced and not self._overwrite:
            what = f"{self.folder.parent} holds the results"
            try:
                refuse_other(self._replaced["fingerprint"], fingerprint, what)
            except ValueError as error:
                raise ValueError(f"{error}; choose another folder, or --overwrite it") from error
        saved = self.manifest
        if saved:
            self.changed = self._changed(fingerprint, settings)
            self.world.from_first(self._sweep)
        self.manifest = {
            "format": FORMAT,
            "plora_ext": plora_ext.__version__,
            "torch": str(torch.__version__),
            "cwd": os.getcwd(),
            "folders": list(dict.fromkeys([*_folders(saved), os.getcwd()])),
            "fingerprint": dict(fingerprint),
            "settings": dict(settings),
            "run": saved["run"] if saved and saved["run"]["curve"] else {"curve": [], "tasks": 1, **(run or {})},
            "parts": saved.get("parts", {}),
        }
        return self.load() if saved and saved["run"]["curve"] else None

    def _changed(self, fingerprint: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
        """Refuses another run; says what else differs, and forgets epochs of a task that trains on others now."""
        saved, before = self.manifest, self.settings
        learned = len(saved["run"].get("curve", []))
        tasks = refuse_other(saved["fingerprint"], fingerprint, f"{self.folder} is the checkpoint", learned)
        changed = [f"{name} {before[name]} -> {settings[name]}" for name in ROUNDING if before[name] != settings[name]]
        for name, now in (("plora_ext", plora_ext.__version__), ("torch", str(torch.__version__))):
            changed += [f"{name} {saved[name]} -> {now}"] if saved[name] != now else []
        trains = [task for task, what in tasks.items() if what != TEST_IMAGES]
        if trains and "fit" in saved["parts"] and self._read("fit")["task"] in trains:
            saved["parts"] = {name: part for name, part in saved["parts"].items() if name != "fit"}
        for what in sorted(set(tasks.values())):
            changed.append(f"{what} of task {', '.join(str(t) for t, of in tasks.items() if of == what)}")
        return changed

    def load(self) -> dict[str, Any]:
        """What `save_task` was given: `run` and `state`; in it, as "rng", what `set_rng_state` takes.

        Raises:
            ValueError: A file is missing, cut short or altered.
        """
        state = {name: self._read(name) for name in self.manifest["parts"] if name != "fit"}
        return {"run": self.manifest["run"], "state": _migrated(state)}

    def reached(self) -> str:
        """How far the run was when it was saved, in words for its reader; "" at its start."""
        done, of = len(self.manifest["run"]["curve"]), self.manifest["run"].get("tasks", 1)
        fit = self.manifest["parts"].get("fit", {}).get("tree", {}).get("dict", {})
        if done == of:
            return f"all {of} tasks are learned already"
        begun = f"epoch {fit['epochs']['value']} of task {done + 1}" if fit and fit["task"]["value"] == done else ""
        whole = f"task {done} of {of}" if done else ""
        return f"continuing after {', '.join(filter(None, (whole, begun)))}" if whole or begun else ""

    def save_task(self, run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Saves the run after a task: `run` is JSON, `state` nested dicts and lists of tensors and plain values.

        Each entry of `state` is a file of its own, which is written only when it has changed.

        Raises:
            OSError: It cannot be written; the checkpoint of before is whole.
        """
        self._run = ""
        self._save(run, {**state, "rng": rng_state()}, keep={})

    # ------------------------------------------------------------------ epochs

    def enter_fit(
        self,
        task: int,
        tensors: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
    ) -> int:
        """The epoch to begin with: 0, or the one after the last saved, with everything set as it was after that."""
        if "fit" not in self.manifest["parts"]:
            return 0
        fit = self._read("fit")
        if fit["task"] != task:
            return 0
        with torch.no_grad():
            for tensor, value in zip(tensors, fit["tensors"], strict=True):
                tensor.copy_(value)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": {int(i): s for i, s in fit["optimizer"].items()}, "param_groups": groups})
        if scaler and fit.get("scaler"):
            scaler.load_state_dict(fit["scaler"])
        set_rng_state(fit["rng"])
        return fit["epochs"]

    def save_epoch(
        self,
        task: int,
        epoch: int,
        tensors: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Saves where training on a task stands after `epoch`; raises what `save_task` does."""
        state = optimizer.state_dict()["state"]
        fit = {"task": task, "epochs": epoch + 1, "tensors": list(tensors), "rng": rng_state()}
        fit["optimizer"] = {str(i): s for i, s in state.items()}
        fit["scaler"] = scaler.state_dict() if scaler else {}  # empty where it is idle
        self._save(self.manifest["run"], {"fit": fit}, keep=self.manifest["parts"])

    # ------------------------------------------------------------------ files

    def _save(self, run: Mapping[str, Any], state: Mapping[str, Any], keep: Mapping[str, Any]) -> None:
        """Writes `state` beside the parts to keep, then the manifest; each entry of `state` is a part."""
        self.world.from_first(lambda: self._save_here(run, state, keep))
        if not self.world.first:  # this process need not know where parts are
            self.manifest = {**self.manifest, "run": dict(run), "parts": {name: {} for name in (*keep, *state)}}

    def _save_here(self, run: Mapping[str, Any], state: Mapping[str, Any], keep: Mapping[str, Any]) -> None:
        parts = dict(keep)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, value in state.items():
                tensors: dict[str, Tensor] = {}
                tree = pack(value, "", tensors)
                stamp = change.fingerprint(json.dumps(tree, allow_nan=False), *tensors.values())
                parts[name] = self._kept(name, stamp)
                if parts[name] is None:
                    content = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
                    parts[name] = {"tree": tree, **(self._write(name, save(content)) if content else {})}
                    self._stamps[name] = parts[name], stamp
            measured = self._run or json.dumps(run, allow_nan=False)  # long, and the same for every epoch of a task
            rest = {name: value for name, value in {**self.manifest, "parts": parts}.items() if name != "run"}
            manifest, text = {"run": run, **rest}, f'{{"run": {measured}, {json.dumps(rest, allow_nan=False)[1:]}'
            digest = hashlib.sha256(text.encode()).hexdigest()
            write_whole(self.folder / MANIFEST, f'{{"sha256": "{digest}", "manifest": {text}}}\n'.encode())
        except OSError as error:
            why = error.strerror or str(error)
            raise OSError(
                f"cannot write the checkpoint in {self.folder} ({why}); what it held before is whole: make room, then "
                "continue with --resume"
            ) from error
        self.manifest, self._run = manifest, measured
        if self._replaced:  # what was written of that run goes with its checkpoint
            for name in RESULTS:
                (self.folder.parent / name).unlink(missing_ok=True)
            self._replaced = {}
        self._sweep()

    def _kept(self, name: str, stamp: str) -> dict[str, Any] | None:
        """The entry of part `name` if what is on disk has this fingerprint.

        So adapters of old tasks are read where they are, but neither copied nor written again.
        """
        part, before = self._stamps.get(name, (None, ""))
        there = part is not None and ("file" not in part or (self.folder / part["file"]).is_file())
        return part if there and before == stamp and part == self.manifest["parts"].get(name) else None

    def _write(self, name: str, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        path = self.folder / f"{name.replace(':', '-')}-{digest[:16]}.safetensors"
        if not (path.is_file() and path.stat().st_size == len(content)):
            write_whole(path, content)
        return {"file": path.name, "bytes": len(content), "sha256": digest}

    def _read(self, name: str) -> Any:
        return self.world.from_first(lambda: self._read_here(name))

    def _read_here(self, name: str) -> Any:
        part = self.manifest["parts"][name]
        if "file" not in part:
            return unpack(part["tree"], {})
        path = self.folder / part["file"]
        content = path.read_bytes() if path.is_file() else b""
        if len(content) != part["bytes"]:
            raise ValueError(f"{path} is cut short: it must hold {part['bytes']} bytes, got {len(content)}")
        if hashlib.sha256(content).hexdigest() != part["sha256"]:
            raise ValueError(f"{path} has been altered: its hash is not the one in {MANIFEST}")
        return unpack(part["tree"], load(content))

    def _sweep(self) -> None:
        """Removes what the manifest does not name: files of before, and of a write that was cut short."""
        named = {MANIFEST, *(part.get("file") for part in self.manifest.get("parts", {}).values())}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if _OURS.fullmatch(path.name) and path.name not in named:
                path.unlink(missing_ok=True)


def _folders(manifest: Mapping[str, Any]) -> list[str]:
    """Where the run was begun and continued, which is where its plugins may lie."""
    return list(manifest.get("folders", [manifest["cwd"]] if "cwd" in manifest else []))


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        sealed = json.loads(path.read_text("utf-8"))
        manifest = sealed["manifest"]
        form = manifest["format"]
        whole = hashlib.sha256(json.dumps(manifest, allow_nan=False).encode()).hexdigest() == sealed["sha256"]
    except (ValueError, KeyError, TypeError):
        whole, manifest, form = False, {}, FORMAT
    if form not in READS:
        by, reads = manifest.get("plora_ext", "an unknown version"), " and ".join(map(str, READS))
        raise ValueError(
            f"{path} has format {form}, of plora_ext {by}; this one, {plora_ext.__version__}, reads {reads}"
        )
    if not whole:
        raise ValueError(f"{path} is damaged: it is no checkpoint that plora-ext wrote whole")
    return manifest


def _migrated(state: dict[str, Any]) -> dict[str, Any]:
    """The parts of an older format by the names that they have now.

    2 had no digests of single tasks, and one part for a head; 3 had the ensemble's task_of_class beside the head's
    parts, and class means among those of head gaussian.
    """
    for name, value in state.pop("head", {}).items():
        state[f"head:{name}"] = value
    if "task_of_class" in state:
        state["head:task_of_class"] = state.pop("task_of_class")
    state.pop("head:means", None)
    return state
