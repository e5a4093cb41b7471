from typing import Any

def build_info() -> dict[str, Any]: ...
def cpu_features() -> dict[str, bool]: ...
def cpu_isa() -> str: ...
def cpu_makes_base(M: int, in_features: int, out_features: int) -> bool: ...
def lora_plan(
    family: str,
    M: int,
    in_features: int,
    out_features: int,
    T: int,
    r: int,
    dtype: str = "bfloat16",
    *,
    weight: bool = True,
    relu: bool = False,
    bias: bool = False,
    backward: bool = False,
    keep: bool = False,
    rows_per_id: int = 1,
    slices: list[int] = ...,
    capability: int = 90,
    num_sms: int = 132,
    path: str = "auto",
) -> dict[str, Any]: ...
