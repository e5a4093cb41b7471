"""What a run was given is what it records: other images or weights are never averaged as seeds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_cil_checkpoint import arrays, backbone, cut_after, settings
from torch import nn

from plora_ext.cil import Images, Result, run
from plora_ext.cil.build import load_data
from plora_ext.data import Backbone
from plora_ext.report.files import load_results, write_folder
from plora_ext.report.runs import group


def measured(data: Images, given: Backbone | None = None, seed: int = 1993, **changes) -> Result:
    return run(settings(method="simplecil", seed=seed, **changes), data=data, backbone=given or backbone())


def darker() -> Images:
    return Images(**{name: value // 2 if "images" in name else value for name, value in arrays().items()})


def test_what_was_given_makes_the_protocol(tmp_path: Path) -> None:
    other = backbone()
    nn.init.zeros_(other.model.blocks[0].mlp.fc1.weight)
    runs = [
        measured(Images(**arrays())),
        measured(Images(**arrays()), seed=1994),
        measured(darker(), seed=1995),
        measured(Images(**arrays()), other, seed=1996),
    ]
    protocols = group(runs)
    assert [[len(g.results) for g in p.groups] for p in protocols] == [[2], [1], [1]]
    digests = [r.inputs["data_digest"] for r in runs]
    assert digests[0] == digests[1] == digests[3] != digests[2]
    for r, p in zip((runs[0], *runs[2:]), protocols):
        assert p.name.startswith(f"given images {r.inputs['data_digest']}, B0 Inc2, given VisionTransformer ")
    write_folder(tmp_path, runs[:1], settings().to_yaml())
    (read,) = load_results(tmp_path)
    assert read.inputs == runs[0].inputs


def test_what_settings_name_needs_no_word(tmp_path: Path) -> None:
    np.savez(tmp_path / "toy.npz", **arrays())
    named = settings(data=str(tmp_path / "toy.npz"))
    loaded, other = load_data(named), Images(**arrays())
    ours = [run(named, data=data, backbone=backbone()) for data in (loaded, None)]
    assert all("data" not in r.inputs for r in ours) and len(group(ours)) == 1
    assert run(named, data=other, backbone=backbone()).inputs["data"] == f"given images {other.digest()}"
    assert run(settings(), data=loaded, backbone=backbone()).inputs["data"].startswith("given images")  # icon100 named


def test_the_same_data_by_another_path_is_the_same_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("toy.npz", **arrays())
    paths = ("toy.npz", str(tmp_path / "toy.npz"))
    runs = [run(settings(data=path, seed=i), backbone=backbone()) for i, path in enumerate(paths)]
    (protocol,) = group(runs)
    assert protocol.name.startswith("toy.npz, B0 Inc2") and len(protocol.groups[0].results) == 2


def test_a_file_that_changed_under_its_name_is_another_protocol(tmp_path: Path) -> None:
    named = settings(method="simplecil", data=str(tmp_path / "toy.npz"))
    results = []
    for seed, images in enumerate((Images(**arrays()), darker())):
        np.savez(tmp_path / "toy.npz", **{name: getattr(images, name) for name in arrays()})
        results.append(run(settings(**{**named.as_dict(), "seed": seed}), backbone=backbone()))
    protocols = group(results)
    assert len(protocols) == 2 and len({p.name for p in protocols}) == 2


def test_random_weights_are_another_with_every_seed_and_one_protocol() -> None:
    tiny = {"backbone": "vit_tiny_patch16_224", "image_size": 32, "weights": "random", "method": "simplecil"}
    runs = [run(settings(seed=seed, **tiny), data=Images(**arrays())) for seed in (1, 2)]
    assert len(group(runs)) == 1


def test_an_unfinished_run_has_them_too(tmp_path: Path) -> None:
    cut_after(1, Images(**arrays()), tmp_path)
    (result,) = load_results(tmp_path)
    whole = run(settings(), data=Images(**arrays()), backbone=backbone())
    assert result.inputs == whole.inputs and json.dumps(result.inputs)
    (protocol,) = group([result, whole])
    assert [len(g.results) + len(g.unfinished) for g in protocol.groups] == [2]
