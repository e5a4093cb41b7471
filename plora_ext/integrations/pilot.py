"""LAMDA-PILOT (https://github.com/LAMDA-CL/LAMDA-PILOT): EASE and MOS on this package's operators, and PLoRA in it.

In a checkout of PILOT, `python -m plora_ext.integrations.pilot --config exps/ease.json` is its `python main.py --config
exps/ease.json`, patched. In code, with the checkout on `sys.path`:

    from plora_ext.integrations import pilot
    print(pilot.patch())

Predictions stay what they were. EASE's training steps are replayed as a CUDA graph. It runs all T subspaces of a batch
as one forward that shares the first block and computes the class token alone in the last, reads the training images
once for all subspaces' prototypes instead of once for each, completes the prototypes in one operator call, classifies
by one product, and remembers features of frozen adapters from one evaluation to the next. Old adapters become part of
`state_dict()`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from plora_ext.integrations import _patch, _pilot_ease
from plora_ext.integrations import _pilot_family as family
from plora_ext.integrations._patch import Original, Patch, instead
from plora_ext.integrations._pilot_vit import adapter_features, attention, kept

__all__ = ["adapter_features", "patch", "unpatch"]

# What the hooks were written for, by the module that tells whether a checkout is that project.
TESTED = {
    "backbone.vit_ease": "LAMDA-CL/LAMDA-PILOT 5240714",
    "backbone.vit_mos": "LAMDA-CL/LAMDA-PILOT 5240714",
    "models.vit_inflora": "liangyanshuo/InfLoRA e08b00e",
    "backbone.lora": "WuYichen-97/SD-Lora-CL 8bacded",
    "backbone.vit_cllora": "JiangpengHe/CL-LoRA df4e74e",
    "backbone.vit_tuna": "LAMDA-CL/ICCV2025-TUNA 77d4f10",
    "acmap.backbone.vit_acmap": "tf63/ACMap 8807d3d",
}

_TRAINING = {"adapters in training": "they drop activations between their projections"}
_LEFT = {  # to the host
    "backbone.vit_ease": {
        "SimpleCIL": "it has no training step, and its one pass over the images is the device's to do",
        "EASE with moni_adam or use_old_data": "their prototypes are made otherwise",
        "nn.DataParallel, VPT, sequential adapters, layer norm in adapters": "EASE does not use them",
    },
    "backbone.lora": {"compute_ortho_loss of SD-LoRA": "it reads every old adapter from disk in each step"},
    "backbone.vit_tuna": {
        **_TRAINING,
        "classifer_align of TUNA": "it draws features class by class from random numbers of its own",
    },
    "acmap.backbone.vit_acmap": {
        **_TRAINING,
        "merge of ACMap": "it runs once in a task, over the adapters' weights alone",
    },
}


def patch(mos: str = "as shipped", cache: bool = True, tuna: str = "as shipped", acmap: str = "as shipped") -> Patch:
    """Replace the slow parts of EASE and MOS, and register `plora` as a learner ("model_name": "plora").

    In a checkout of another codebase with PILOT's skeleton it replaces the LoRA layers of InfLoRA, SD-LoRA or CL-LoRA,
    or what TUNA or ACMap do with their adapters.

    Args:
        mos: PILOT's MOS changes its adapters whenever it looks at them: every block of every forward pass, also while
            testing, moves all of them towards the mean of their predecessors. "as shipped" keeps that, to the same
            numbers; "fixed" moves them where training asks for it (once after every step) and nowhere else.
        cache: keep the features of EASE's and TUNA's frozen adapters between evaluations, N T D float32 (614 MB for
            CIFAR-100 in 20 tasks) on the device, the host or in files, as there is room. Checked against the weights
            and the images every time.
        tuna: TUNA's general prediction comes from its newest adapter, as no id that it asks for reaches the merged one.
            "as shipped" keeps that; "fixed" takes the merged adapter.
        acmap: ACMap drops activations of its adapters also in prototypes and tests, as its merged adapters stay in
            training mode. "as shipped" keeps that (nothing but attention is replaced then, unless `dropout` is 0);
            "fixed" drops nothing there.

    Returns:
        What was replaced and what was left; also a context manager.

    Raises:
        ImportError: no checkout of PILOT or its family is on `sys.path`, or modules of the same names are others'.
        TypeError: the checkout's functions take other arguments; nothing is patched then.
        ValueError: `mos`, `tuna` or `acmap` is neither of the two.
    """
    for name, value in {"mos": mos, "tuna": tuna, "acmap": acmap}.items():
        if value not in ("as shipped", "fixed"):
            raise ValueError(f'{name} must be "as shipped" or "fixed", got {value!r}')
    known = _hooks(mos, cache, tuna, acmap)
    groups = {marker: hooks for marker, hooks in known.items() if _is_here(marker)}
    projects = ", ".join(sorted({TESTED[marker] for marker in groups}))
    if not groups:
        how = "run in a checkout of LAMDA-PILOT with its requirements, or put it on sys.path"
        raise ImportError(f"none of {', '.join(known)} can be imported: {how}")

    def build(patch: Patch) -> None:
        patch.report.host = f"{projects} (as tested)"
        patch.afterwards(_old_timm_names())
        for hooks in groups.values():
            for path, make in hooks.items():
                patch.replace(path, make)
        for marker in groups:
            for what, why in _LEFT.get(marker, {}).items():
                patch.leave(what, why)

    return _patch.apply("LAMDA-PILOT", build)


def _hooks(mos: str, cache: bool, tuna: str, acmap: str) -> dict[str, dict[str, Callable[[Any], Any]]]:
    """What is replaced by what, by the module that tells whether a checkout has the method."""
    vit, ease = "VisionTransformer", "models.ease:Learner"
    of_mos, of_tuna, of_acmap = (how == "as shipped" for how in (mos, tuna, acmap))
    hooks: dict[str, dict[str, Callable[[Any], Any]]] = {
        "backbone.vit_ease": {
            "backbone.vit_ease:Attention.forward": instead(attention),
            f"backbone.vit_ease:{vit}.forward_test": instead(_pilot_ease.forward_test),
            f"backbone.vit_ease:{vit}.forward_proto": instead(_pilot_ease.forward_proto),
            f"backbone.vit_ease:{vit}.forward": instead(_pilot_ease.forward),
            f"backbone.vit_ease:{vit}.add_adapter_to_list": instead(_pilot_ease.add_adapter_to_list),
            f"backbone.vit_ease:{vit}._load_from_state_dict": instead(_pilot_ease.load_from_state_dict),
            f"{ease}._init_train": instead(_pilot_ease.init_train),
            f"{ease}.replace_fc": instead(_pilot_ease.replace_fc),
            f"{ease}.solve_similarity": instead(_pilot_ease.solve, mode="last"),
            f"{ease}.solve_sim_reset": instead(_pilot_ease.solve, mode="reset"),
            f"{ease}._eval_cnn": instead(_pilot_ease.eval_cnn, cache=cache),
            "backbone.linears:EaseCosineLinear.forward_reweight": instead(_pilot_ease.reweight),
            "utils.factory:get_model": instead(_get_model),
        },
        "backbone.vit_mos": {
            "backbone.vit_mos:Attention.forward": instead(attention),
            "models.mos:Learner._eval_cnn": instead(family.mos_eval, as_shipped=of_mos),
        },
        "models.vit_inflora": {"models.vit_inflora:Attention_LoRA.forward": instead(family.inflora)},
        "backbone.lora": {"backbone.lora:_LoRA_qkv_timm_train.forward": instead(family.sd_lora)},
        "backbone.vit_cllora": {f"backbone.vit_cllora:{vit}.forward_test": instead(family.cl_lora)},
        "backbone.vit_tuna": {
            "backbone.vit_tuna:Attention.forward": instead(attention),
            f"backbone.vit_tuna:{vit}.forward_features": instead(family.tuna_features),
            f"backbone.vit_tuna:{vit}.merge": instead(family.tuna_merge),
            "models.tuna:Learner._eval_cnn": instead(family.tuna_eval, cache=cache, as_shipped=of_tuna),
            "models.tuna:Learner.orth_loss": instead(family.tuna_orth_loss),
            "models.tuna:AngularPenaltySMLoss.forward": instead(family.tuna_loss),
        },
        "acmap.backbone.vit_acmap": {
            "acmap.backbone.vit_acmap:Attention.forward": instead(attention),
            f"acmap.backbone.vit_acmap:{vit}.forward_test": instead(family.acmap_test, as_shipped=of_acmap),
            f"acmap.backbone.vit_acmap:{vit}.forward_proto": instead(family.acmap_proto, as_shipped=of_acmap),
            "acmap.utils.inc_net:ACMapNet.replace_fc": instead(family.acmap_replace_fc, as_shipped=of_acmap),
        },
    }
    if not of_mos:
        hooks["backbone.vit_mos"][f"backbone.vit_mos:{vit}.forward_features"] = instead(family.mos_features)
    return hooks


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _old_timm_names() -> Callable[[], None]:
    """PILOT imports two modules of timm 0.6 that timm 1 has elsewhere. Returns what takes these names away again."""
    names = {f"timm.models.layers.{name}": f"timm.layers.{name}" for name in ("helpers", "weight_init")}
    new = {old: importlib.import_module(name) for old, name in names.items() if old not in sys.modules}
    sys.modules.update(new)

    def undo() -> None:
        for name, module in new.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]

    return undo


def unpatch() -> None:
    """Put PILOT's own functions back. Old adapters that became part of a network's state stay there."""
    _patch.remove("LAMDA-PILOT")
    kept.clear()


def _get_model(original: Original, model_name: str, args: dict[str, Any]) -> Any:
    if model_name.lower() != "plora":
        return original(model_name, args)
    from plora_ext.integrations._pilot_learner import make_learner

    return make_learner()(args)


def main() -> None:
    """PILOT's own main.py, patched; arguments are PILOT's."""
    _patch.run_patched(patch, "run in a checkout of LAMDA-PILOT")


if __name__ == "__main__":
    main()
