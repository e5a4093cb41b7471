"""The scripts that build the data set and pretrain the backbone, on a made-up icon package."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from plora_ext.data import load_icon100
from plora_ext.data.backbone import build_backbone

pytest.importorskip("resvg_py", reason="the tools draw with resvg_py")
pytest.importorskip("PIL", reason="the tools read pictures with pillow")

TOOLS = Path(__file__).parents[1] / "tools"
if not TOOLS.is_dir():
    pytest.skip("the tools are in the repository alone", allow_module_level=True)


def tool(name: str) -> ModuleType:
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    return importlib.import_module(name)


def square(x: int, y: int, side: int = 8, colour: str = "currentColor") -> dict[str, str]:
    return {"body": f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="{colour}"/>'}


BLANK = {"body": '<rect x="2" y="2" width="9" height="9" fill="#fff"/>'}
BROKEN = {"body": "<rect"}

# Icons, licence, category of every set. Positions differ, so that no two drawings are equal unless they should be.
SETS: dict[str, tuple[dict[str, dict], str, str]] = {
    "ic": (
        {
            "baseline-star": square(1, 1),
            "outline-star": square(1, 2),
            "round-star": square(1, 3),
            "sharp-star": square(1, 4),
            "moon": square(1, 5),
            "acme": square(1, 6),
        },
        "Apache-2.0",
        "Material",
    ),
    "mdi-light": ({"star": square(2, 1), "moon": BLANK, "acme": square(2, 3)}, "OFL-1.1", "Material"),
    "alpha": (
        {"star-16-filled": square(1, 3), "moon-two-tone": square(3, 2), "sun": BROKEN, "acme": square(3, 3)},
        "MIT",
        "UI",
    ),
    "beta-ui": ({"star": square(4, 1), "moon": {**square(4, 2), "hidden": True}, "sun": square(4, 3)}, "ISC", "UI"),
    "asked": ({"star": square(5, 1), "sun": square(5, 2)}, "CC-BY-4.0", "UI"),
    "bxl": ({"acme": square(6, 1)}, "MIT", "Logos"),
    "logos": (
        {
            "acme": square(7, 1, colour="#900"),
            "acme-wordmark": square(7, 2, colour="#090"),
            "acme-dark": square(1, 2),
            "starfish": square(7, 3),
            "weather-moons": square(7, 4),
        },
        "CC0-1.0",
        "Logos",
    ),
}


def write_package(folder: Path, version: str = "2.2.535") -> Path:
    (folder / "json").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "@iconify/json", "version": version}))
    info = {}
    for name, (icons, spdx, category) in SETS.items():
        licence = {"title": spdx, "spdx": spdx}
        info[name] = {"name": name.title(), "author": {"name": "A"}, "license": licence, "category": category}
        (folder / "json" / f"{name}.json").write_text(json.dumps({"icons": icons, "width": 16, "height": 16}))
    (folder / "collections.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("npm") / "package")


def build(package: Path, out: Path, classes: int = 2) -> tuple[dict, dict[str, np.ndarray]]:
    module = tool("build_icon100")
    info = module.build(module.Package(package), out, num_classes=classes)
    with np.load(out / "icon100.npz", allow_pickle=False) as file:
        return info, dict(file)


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("star", "star"),
        ("baseline-star", "star"),
        ("star-16-filled", "star"),
        ("star-two-tone", "star"),
        ("bxs-arrow-left-outline-24px", "arrow-left"),
        ("outline", "outline"),
        ("bold-duotone", "bold"),
        ("star-half", "star-half"),
    ],
)
def test_concept_is_the_name_without_style_words(name: str, concept: str) -> None:
    assert tool("build_icon100").concept_of(name) == concept


def test_families_merge_aliases_and_numbers() -> None:
    family_of = tool("build_icon100").family_of
    assert family_of("mdi-light") == family_of("ic") == family_of("material-symbols") == "material"
    assert family_of("heroicons-solid") == "heroicons" and family_of("fa6-solid") == "fa"


def test_icon100_rules(package: Path, tmp_path: Path) -> None:
    info, arrays = build(package, tmp_path)
    # "acme" is drawn by as many families, but it is a brand; the set that asks for attribution does not count.
    assert info["class_names"] == ["moon", "star"]
    assert set(info["sets"]) == {"alpha", "beta-ui", "ic", "mdi-light"}
    # star: three of ic's four variants, less the one that repeats alpha's, and one each of alpha, beta-ui, mdi-light;
    # moon: ic and alpha, as one is blank and one hidden.
    assert np.bincount(arrays["labels"]).tolist() == [2, 5]
    assert arrays["images"].shape[1:] == (64, 64, 3) and arrays["images"].dtype == np.uint8
    assert len(np.unique(arrays["images"], axis=0)) == len(arrays["images"])
    assert sum(entry["images"] for entry in info["sets"].values()) == 7
    assert "CC-BY" not in (tmp_path / "LICENSES.md").read_text()


def test_broken_icons_are_skipped(package: Path, tmp_path: Path) -> None:
    info, arrays = build(package, tmp_path, classes=3)
    assert info["class_names"] == ["moon", "star", "sun"]
    assert np.bincount(arrays["labels"])[2] == 1


def test_two_builds_write_the_same_bytes(package: Path, tmp_path: Path) -> None:
    for run in ("a", "b"):
        build(package, tmp_path / run)
    for name in ("icon100.npz", "icon100.json", "LICENSES.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_icon_is_drawn_black_on_white_inside_the_margin() -> None:
    module = tool("build_icon100")
    image = module.render(module.svg_text(square(0, 0, side=16)["body"], left=0, top=0, width=16, height=16))
    dark = np.argwhere(image.max(axis=-1) < 128)
    assert dark.min() == 5 and dark.max() == 58  # 8 % of 64 pixels


def test_other_versions_are_refused(tmp_path: Path) -> None:
    module = tool("build_icon100")
    with pytest.raises(SystemExit, match=r"must be @iconify/json 2\.2\.535, got @iconify/json 2\.2\.1; get it with"):
        module.Package(write_package(tmp_path / "package", version="2.2.1"))
    with pytest.raises(SystemExit, match=r"holds no package\.json"):
        module.Package(tmp_path)


def test_pretraining_set_stays_away_from_icon100(package: Path, tmp_path: Path) -> None:
    build(package, tmp_path)
    module = tool("build_pretraining_set")
    info = module.build(tool("build_icon100").Package(package), tmp_path, tmp_path / "pretraining.npz")
    # "starfish" and "weather-moons" hold a class's word; "acme-dark" is the very picture of a star in Icon-100.
    assert info["class_names"] == ["picture:acme"]
    with np.load(tmp_path / "pretraining.npz", allow_pickle=False) as file:
        assert len(file["images"]) == 3 and file["held_out"].sum() == 1
        assert json.loads(file["info"].tobytes()) == info


@pytest.mark.parametrize(
    ("concept", "expected"),
    [("starfish", True), ("car", True), ("cars", True), ("scarf", False), ("wastebasket", True), ("panda", False)],
)
def test_forbidden_concepts(concept: str, expected: bool) -> None:
    assert tool("build_pretraining_set").forbidden(concept, ["star", "car", "zoom-in"]) == expected


def test_embedded_pretraining_rules_hold_for_the_real_classes() -> None:
    forbidden, names = tool("build_pretraining_set").forbidden, load_icon100().class_names
    assert all(forbidden(name, names) for name in names)
    assert all(forbidden(f"{name}s", names) for name in names)


def test_pretraining_runs_and_writes_a_loadable_backbone(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "set.npz",
        images=random.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8),
        labels=np.arange(12, dtype=np.int16) % 4,
        held_out=np.arange(12) < 4,
        info=np.frombuffer(
            json.dumps({"class_names": list("abcd"), "sets": {"logos": {"spdx": "MIT"}}}).encode(), dtype=np.uint8
        ),
    )
    arguments = (
        "--img-size 16 --patch-size 8 --dim 16 --depth 1 --heads 2 --epochs 2 --batch-size 4 --log-every 1".split()
    )
    out = tmp_path / "out"
    metrics = tool("pretrain_backbone").main(
        [str(tmp_path / "set.npz"), "--out", str(out), "--device", "cpu", *arguments]
    )
    assert metrics["epochs"] == 2 and metrics["training_images"] == 8
    assert np.isfinite([entry["loss"] for entry in metrics["log"]]).all()
    assert sorted(path.name for path in out.iterdir()) == [
        "MODEL_CARD.md",
        "backbone.json",
        "backbone.safetensors",
        "backbone_metrics.json",
    ]
    from safetensors.torch import load_file

    config = json.loads((out / "backbone.json").read_text())
    model = build_backbone(config, load_file(out / "backbone.safetensors")).model
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 16)
    card = (out / "MODEL_CARD.md").read_text()
    assert "4 logos, national flags and emoji" in card and metrics["command"] in card


def test_augmentation_is_deterministic_and_in_range() -> None:
    augment = tool("pretrain_backbone").augment
    images = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    first, again = (augment(images, 32, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (8, 3, 32, 32) and torch.equal(first, again)
    assert first.min() >= -1 and first.max() <= 1 and first.isfinite().all()
