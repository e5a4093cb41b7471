"""ACMap's settings: sections whose entries are attributes."""

from types import SimpleNamespace


class Config(SimpleNamespace):
    def __init__(self, **sections):
        super().__init__(**{k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in sections.items()})
