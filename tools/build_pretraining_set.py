"""Builds the set on which the embedded backbone is pretrained: logos, national flags and emoji of the same package.

    python tools/build_icon100.py iconify-json-2.2.535.tgz
    python tools/build_pretraining_set.py iconify-json-2.2.535.tgz pretraining.npz

It is kept away from Icon-100, as ImageNet is from the benchmarks of class-incremental learning: other icon sets, no
concept that shares a word or a near synonym with one of the 100, and no picture that (nearly) equals one of Icon-100.
A class is a concept with at least three different drawings by at least two designer families; one drawing of each
class is held out. Only permissive licences, as in Icon-100. A second run writes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from build_icon100 import (
    LEADING_STYLE,
    MAX_VARIANTS,
    NPM_PACKAGE,
    NPM_VERSION,
    TRAILING_STYLE,
    Drawing,
    Package,
    concept_of,
    distinct_images,
    family_of,
    licence_entry,
    limit_variants,
    write_npz,
)

MIN_DRAWINGS, MIN_FAMILIES = 3, 2
NEAR = 6.0  # root mean square difference, in grey levels, of two 16x16 thumbnails that count as one picture

LEADING = LEADING_STYLE | set("file type".split())
TRAILING = TRAILING_STYLE | set("wordmark original plain dark background icon logo skin tone 1x1 4x3".split())

# Sets whose short names ("us", "ar") mean something only there; their classes stay apart from the others.
NAMESPACES = {
    "nation": "circle-flags flag flagpack cif",
    "coin": "token token-branded cryptocurrency cryptocurrency-color",
}
NAMESPACE = {icon_set: space for space, icon_sets in NAMESPACES.items() for icon_set in icon_sets.split()}
COPIES = {"thesvg": "simple"}  # a set that redistributes another one's drawings is no second family

# Words that mean what one of the 100 concepts means, or what its drawings show.
SYNONYMS = set(
    "house garage mail email envelope letter mailbox outbox photo picture frame framed padlock magnifier "
    "magnifying wastebasket litter garbage bin delete remove notification alert pen crayon writing memo nib "
    "write mobile smartphone cellular iphone bust silhouette people person account profile avatar earth world "
    "planet meridian watch time timer alarm oclock sand automobile vehicle taxi crescent lunar sunny sunrise "
    "sunset note notes melody song spaceship spacecraft present wrapped award medal prize cup parasol banner "
    "pennant love sparkle sparkles document page paper scroll date spiral abacus ledger library label price "
    "purse money floppy disk diskette sql host computer desktop ipad print mic karaoke location marker place "
    "suitcase luggage baggage package parcel cabinet insect beetle ladybug cross multiply x tick ballot add "
    "subtract sync reload rotate cycle repeat clockwise counterclockwise console shell bash prompt bracket "
    "wireless antenna signal vision view chain funnel information store shop readme instagram trolley basket "
    "movie film cinema projector camcorder button direction hamburger text type".split()
)


def forbidden(concept: str, classes: list[str]) -> bool:
    """Whether a concept shares a word with one of the classes, or has one inside a longer word, or a synonym.

    Words of four letters and more also count inside others ("starfish" holds "star"), which drops too much rather than
    too little; shorter ones ("car", "key") and synonyms count as whole words, singular or plural.
    """
    words = {word for name in classes for word in name.split("-")}
    inside = {word for word in words if len(word) >= 4}
    own = set(concept.split("-"))
    own |= {word.removesuffix("s") for word in own} | {word.removesuffix("es") for word in own}
    return bool(own & (words | SYNONYMS)) or any(word in concept for word in inside)


def family(icon_set: str) -> str:
    return COPIES.get(family_of(icon_set), family_of(icon_set))


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Grey 16x16 thumbnails as rows of float32."""
    side = images.shape[1] // 16
    grey = images.reshape(len(images), 16, side, 16, side, 3).mean(axis=(2, 4, 5), dtype=np.float32)
    return grey.reshape(len(images), -1)


def near_any(images: np.ndarray, others: np.ndarray, limit: float = NEAR) -> np.ndarray:
    """For every image, whether one of `others` is nearly the same picture; bool [N]."""
    b = thumbnails(others)
    near = []
    for start in range(0, len(images), 1024):
        a = thumbnails(images[start : start + 1024])
        squares = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
        near.append(squares.min(axis=1) < limit**2 * b.shape[1])
    return np.concatenate(near)


def build(package: Package, data: Path, out: Path) -> dict[str, Any]:
    """Writes the set to `out` (images, labels, held_out, info as JSON); returns the info."""
    classes = json.loads((data / "icon100.json").read_text())["class_names"]
    with np.load(data / "icon100.npz", allow_pickle=False) as file:
        icon100 = file["images"]

    drawings = []
    for icon_set in package.sets(pictures=True):
        for drawing in package.drawings(icon_set, lambda name: concept_of(name, LEADING, TRAILING)):
            if not forbidden(drawing.concept, classes):
                drawings.append(drawing)
    drawings = limit_variants(drawings, MAX_VARIANTS)

    def class_of(drawing: Drawing) -> str:
        return f"{NAMESPACE.get(drawing.icon_set, 'picture')}:{drawing.concept}"

    kept = list(distinct_images(drawings, icon100))
    far = ~near_any(np.stack([image for _, image in kept]), icon100)
    groups: dict[str, list[tuple[Drawing, np.ndarray]]] = defaultdict(list)
    for (drawing, image), is_far in zip(kept, far, strict=True):
        if is_far:
            groups[class_of(drawing)].append((drawing, image))
    groups = {
        name: groups[name]
        for name in sorted(groups)
        if len(groups[name]) >= MIN_DRAWINGS and len({family(d.icon_set) for d, _ in groups[name]}) >= MIN_FAMILIES
    }

    images: list[np.ndarray] = []
    labels: list[int] = []
    held_out: list[bool] = []
    count: Counter[str] = Counter()
    for label, group in enumerate(groups.values()):
        digests = [hashlib.sha256(f"{d.icon_set}/{d.name}".encode()).digest() for d, _ in group]
        for (drawing, image), digest in zip(group, digests, strict=True):
            images.append(image)
            labels.append(label)
            held_out.append(digest == min(digests))
            count[drawing.icon_set] += 1
    info = {
        "source": {"npm": NPM_PACKAGE, "version": NPM_VERSION},
        "near_icon100_dropped": int((~far).sum()),
        "class_names": list(groups),
        "sets": {name: licence_entry(package.info[name], count[name]) for name in sorted(count)},
    }
    write_npz(
        out,
        images=np.stack(images),
        labels=np.array(labels, dtype=np.int16),
        held_out=np.array(held_out),
        info=np.frombuffer(json.dumps(info).encode(), dtype=np.uint8),
    )
    return info


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Builds the pretraining set, disjoint from Icon-100.")
    parser.add_argument("package", help="@iconify/json: the .tgz of `npm pack`, or its unpacked folder")
    parser.add_argument("out", type=Path, help="the .npz file to write")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1] / "plora_ext" / "data", help="Icon-100")
    arguments = parser.parse_args(argv)
    info = build(Package(arguments.package), arguments.data, arguments.out)
    number = sum(entry["images"] for entry in info["sets"].values())
    size = arguments.out.stat().st_size / 1e6
    print(f"{number} images, {len(info['class_names'])} classes, {size:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
