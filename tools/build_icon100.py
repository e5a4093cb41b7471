"""Builds Icon-100, the embedded benchmark: 100 concepts as many icon designers drew them.

    npm pack @iconify/json@2.2.535
    python tools/build_icon100.py iconify-json-2.2.535.tgz          # or the unpacked package folder

A concept is an icon's name without its style words ("baseline-star", "star-16-filled" -> "star"). The classes are the
100 concepts that most designer families draw. A family is on the training or on the test side as a whole, so that the
test asks for the concept and not for a designer's hand. Only sets whose licence asks for no attribution in what is
built from them are read. A second run writes the same bytes. Needs numpy, pillow and resvg_py.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

NPM_PACKAGE, NPM_VERSION = "@iconify/json", "2.2.535"
HOW_TO_GET = f"get it with `npm pack {NPM_PACKAGE}@{NPM_VERSION}`"
SIZE, MARGIN = 64, 0.08  # pixels; blank border as a share of the picture
NUM_CLASSES, MAX_VARIANTS, TEST_PERCENT, BLANK_STD = 100, 3, 30, 8.0

LICENCES = {"MIT", "Apache-2.0", "ISC", "BSD-2-Clause", "BSD-3-Clause", "OFL-1.1", "Unlicense", "CC0-1.0"}

LEADING_STYLE = set("baseline round sharp outline twotone bx bxs bxl md ios".split())
TRAILING_STYLE = set(
    "outline outlined line linear filled fill solid bold thin light regular duotone twotone duo rounded round sharp "
    "stroke o f alt small medium large negative".split()
)
SIZE_WORD = re.compile(r"\d+(px)?")

# Sets of one designer (or a copy of another's drawings) whose names do not say so.
FAMILY_MEMBERS = {
    "material": "ic mdi zmdi eos",
    "boxicons": "bx bxs bxl",
    "lucide": "feather",
    "ion": "famicons",
    "heroicons": "sidekickicons",
    "icons": "la wpf",  # Icons8
    "unicons": "uil uim uit uis",
}
FAMILY_ALIAS = {member: family for family, members in FAMILY_MEMBERS.items() for member in members.split()}

# Pictures of particular things (brands, nations, faces), not designers' drawings of a common concept.
PICTURE_CATEGORIES = {"Logos", "Emoji", "Flags / Maps", "Programming"}
BRAND_SET = "bxl"  # a concept named as in this set of logos ("apple", "twitter") is a brand


DEFAULT_FRAME = {"left": 0, "top": 0, "width": 16, "height": 16}  # Iconify's, where an icon and its set name none


@dataclass(frozen=True)
class Drawing:
    """One icon of the package: where it comes from, what it shows, and its SVG text."""

    icon_set: str
    name: str
    concept: str
    body: str
    svg: str


class Package:
    """The npm package `@iconify/json` at the pinned version, from its .tgz file or its unpacked folder."""

    def __init__(self, path: str | Path) -> None:
        self._root = Path(path)
        if self._root.is_file():
            self._temporary = tempfile.TemporaryDirectory()
            with tarfile.open(self._root) as archive:
                safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Debian 12: not there
                archive.extractall(self._temporary.name, **safe)
            self._root = Path(self._temporary.name) / "package"
        manifest = self._root / "package.json"
        if not manifest.is_file():
            raise SystemExit(f"package: {path} holds no package.json; {HOW_TO_GET}")
        found = {key: json.loads(manifest.read_text()).get(key) for key in ("name", "version")}
        if found != {"name": NPM_PACKAGE, "version": NPM_VERSION}:
            got = f"{found['name']} {found['version']}"
            raise SystemExit(f"package: must be {NPM_PACKAGE} {NPM_VERSION}, got {got}; {HOW_TO_GET}")
        self.info: dict[str, dict[str, Any]] = json.loads((self._root / "collections.json").read_text())

    def sets(self, pictures: bool) -> list[str]:
        """Names of the permissively licensed sets: of logos, emoji and flags, or of all the other icons."""
        return sorted(
            name
            for name, info in self.info.items()
            if info["license"].get("spdx") in LICENCES
            and (info.get("category") in PICTURE_CATEGORIES or "emoji" in name) == pictures
        )

    def names(self, icon_set: str) -> set[str]:
        path = self._root / "json" / f"{icon_set}.json"
        return set(json.loads(path.read_text())["icons"]) if path.is_file() else set()

    def drawings(self, icon_set: str, concept: Callable[[str], str] | None = None) -> Iterator[Drawing]:
        """The visible icons of a set, plainest name first; `concept` (default `concept_of`) maps names to concepts."""
        data = json.loads((self._root / "json" / f"{icon_set}.json").read_text())
        for name in sorted(data["icons"], key=lambda name: (len(name), name)):
            icon = data["icons"][name]
            if not icon.get("hidden"):
                frame = {key: icon.get(key, data.get(key, default)) for key, default in DEFAULT_FRAME.items()}
                svg = svg_text(icon["body"], **frame)
                yield Drawing(icon_set, name, (concept or concept_of)(name), icon["body"], svg)


def concept_of(name: str, leading: set[str] = LEADING_STYLE, trailing: set[str] = TRAILING_STYLE) -> str:
    """The icon's name without style words and sizes; at least one word stays."""
    words = name.replace("two-tone", "twotone").split("-")
    while len(words) > 1 and words[0] in leading:
        words = words[1:]
    while len(words) > 1 and (words[-1] in trailing or SIZE_WORD.fullmatch(words[-1])):
        words = words[:-1]
    return "-".join(words)


def svg_text(body: str, left: float, top: float, width: float, height: float) -> str:
    """A whole SVG around an icon's body: SIZE pixels, black where the icon takes the text colour, with the margin."""
    pad = max(width, height) * MARGIN / (1 - 2 * MARGIN)
    box = f"{left - pad:.4f} {top - pad:.4f} {width + 2 * pad:.4f} {height + 2 * pad:.4f}"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} width="{SIZE}" height="{SIZE}" viewBox="{box}" color="#000">{body}</svg>'


def family_of(icon_set: str) -> str:
    """The designer family: the set's name up to the first dash or digit, aliases merged."""
    prefix = re.split(r"[-\d]", icon_set)[0]
    return FAMILY_ALIAS.get(prefix, prefix)


def is_test_family(family: str) -> bool:
    return int(hashlib.sha1(family.encode()).hexdigest(), 16) % 100 < TEST_PERCENT


def render(svg: str) -> np.ndarray | None:
    """Draws an SVG as RGB uint8 [SIZE, SIZE, 3] on white; None where the renderer fails or nearly nothing shows."""
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    except BaseException as error:  # the renderer's panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return None
    image = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
    return image if image.std() >= BLANK_STD else None


def distinct_images(
    drawings: Iterable[Drawing], others: Iterable[np.ndarray] = ()
) -> Iterator[tuple[Drawing, np.ndarray]]:
    """Renders the drawings in their order, without blanks and exact repetitions (of a body, of pixels, of `others`)."""
    seen = {hashlib.sha256(image.tobytes()).digest() for image in others}
    for drawing in drawings:
        body = hashlib.sha256(drawing.body.encode()).digest()
        if body in seen or (image := render(drawing.svg)) is None:
            continue
        pixels = hashlib.sha256(image.tobytes()).digest()
        if pixels not in seen:
            yield drawing, image
        seen |= {body, pixels}


def limit_variants(drawings: Iterable[Drawing], most: int) -> list[Drawing]:
    """The first `most` drawings of every set and concept."""
    count: Counter[tuple[str, str]] = Counter()
    kept = []
    for drawing in drawings:
        count[drawing.icon_set, drawing.concept] += 1
        if count[drawing.icon_set, drawing.concept] <= most:
            kept.append(drawing)
    return kept


def most_drawn_concepts(drawings: Iterable[Drawing], brands: set[str], number: int) -> list[str]:
    """The concepts that most families draw, ties by name; returned in alphabetical order."""
    families = defaultdict(set)
    for drawing in drawings:
        if drawing.concept not in brands:
            families[drawing.concept].add(family_of(drawing.icon_set))
    return sorted(sorted(families, key=lambda concept: (-len(families[concept]), concept))[:number])


def write_file(path: Path, content: bytes) -> None:
    """Writes beside the target, then renames: no half-written file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_file(path, buffer.getvalue())


def licence_entry(info: dict[str, Any], images: int) -> dict[str, Any]:
    author, licence = info["author"], info["license"]
    return {
        "name": info["name"],
        "author": author["name"],
        "url": author.get("url", ""),
        "licence": licence["title"],
        "spdx": licence["spdx"],
        "licence_url": licence.get("url", ""),
        "images": images,
    }


def licence_text(title: str, sets: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"# {title}",
        "",
        f"Drawn from the npm package `{NPM_PACKAGE}` {NPM_VERSION}. Each set keeps its licence; the list is generated.",
        "",
        "| set | author | licence | images |",
        "|---|---|---|---|",
    ]
    for prefix, entry in sets.items():
        author = f"[{entry['author']}]({entry['url']})" if entry["url"] else entry["author"]
        licence = f"[{entry['spdx']}]({entry['licence_url']})" if entry["licence_url"] else entry["spdx"]
        lines.append(f"| {entry['name']} (`{prefix}`) | {author} | {licence} | {entry['images']} |")
    return "\n".join(lines) + "\n"


def build(package: Package, out: Path, num_classes: int = NUM_CLASSES) -> dict[str, Any]:
    """Writes icon100.npz, icon100.json and LICENSES.md into `out`; returns the content of icon100.json."""
    drawings = [drawing for name in package.sets(pictures=False) for drawing in package.drawings(name)]
    class_names = most_drawn_concepts(drawings, {concept_of(name) for name in package.names(BRAND_SET)}, num_classes)
    label_of = {concept: label for label, concept in enumerate(class_names)}
    drawings = limit_variants((drawing for drawing in drawings if drawing.concept in label_of), MAX_VARIANTS)
    drawings.sort(key=lambda drawing: label_of[drawing.concept])  # stable: set and name keep their order
    kept = list(distinct_images(drawings))

    sets = sorted({drawing.icon_set for drawing, _ in kept})
    labels = np.array([label_of[drawing.concept] for drawing, _ in kept], dtype=np.uint8)
    set_index = np.array([sets.index(drawing.icon_set) for drawing, _ in kept], dtype=np.uint8)
    test = np.array([is_test_family(family_of(drawing.icon_set)) for drawing, _ in kept])
    count = Counter(drawing.icon_set for drawing, _ in kept)
    images = np.stack([image for _, image in kept])
    info: dict[str, Any] = {
        "source": {"npm": NPM_PACKAGE, "version": NPM_VERSION},
        "counts": {"train": int((~test).sum()), "test": int(test.sum()), "sets": len(sets)},
        "class_names": class_names,
        "sets": {
            name: licence_entry(package.info[name], count[name])
            | {"family": family_of(name), "test": is_test_family(family_of(name))}
            for name in sets
        },
    }
    write_npz(out / "icon100.npz", images=images, labels=labels, test=test, sets=set_index)
    write_file(out / "icon100.json", (json.dumps(info, indent=1, ensure_ascii=False) + "\n").encode())
    write_file(out / "LICENSES.md", licence_text("Licences of the drawings in Icon-100", info["sets"]).encode())
    return info


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Builds Icon-100 from the npm package @iconify/json.")
    parser.add_argument("package", help=f"{NPM_PACKAGE} {NPM_VERSION}: the .tgz of `npm pack`, or its unpacked folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "plora_ext" / "data")
    arguments = parser.parse_args(argv)
    count = build(Package(arguments.package), arguments.out)["counts"]
    size = (arguments.out / "icon100.npz").stat().st_size / 1e6
    print(f"{count['train']} training and {count['test']} test images, {size:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
