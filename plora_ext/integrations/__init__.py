"""A faster backend for other codebases: `peft`, `pilot`, `mammoth` and `avalanche`, each a module of its own.

`patch()` replaces functions of the host by ones with the same results on this package's operators, and says which ones
and what it left to the host and why; `unpatch()` puts the host's own functions back. Importing a module here changes
nothing and imports no host, but for `avalanche`, whose classes derive from the host's.
"""
