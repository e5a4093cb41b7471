"""InfLoRA, SD-LoRA and CL-LoRA, real checkouts or stand-ins: their LoRA layers with and without the patch.

Each in a process of its own, since their modules have the same names. They move things to the GPU by name, which is
made to do nothing here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

START = """
import copy, sys, types
from functools import partial
import torch
from torch import nn
sys.path.insert(0, FOLDER)
torch.Tensor.cuda = nn.Module.cuda = lambda self, *args: self
sys.modules.setdefault("ipdb", types.ModuleType("ipdb"))  # a debugger that InfLoRA imports
from plora_ext.integrations import pilot
pilot._old_timm_names()
torch.manual_seed(0)
def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
"""
END = """
before = results()
with pilot.patch() as patch:
    after = results()
assert len(before) == len(after) and len(patch.report.replaced) == 1, patch
for a, b in zip(before, after):
    torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * max(1.0, float(a.abs().max())))
"""
CODE = {
    "INFLORA": """
        import models.vit_inflora as host
        attention = host.Attention_LoRA(32, 4, True, r=3, n_tasks=4)
        for name, parameter in attention.named_parameters():
            nn.init.normal_(parameter, std=0.3)
            parameter.requires_grad_(name.startswith(("lora_B_k.2", "lora_B_v.2")))
        def results():
            layer, x, found = copy.deepcopy(attention), draw(3, 5, 32).requires_grad_(), []
            for task in (-1, 0, 2):
                y = layer(x, task, get_feat=task == 0, get_cur_feat=True)
                found += [y.detach(), *torch.autograd.grad(y.square().sum(), x, retain_graph=True)]
            y.square().sum().backward()
            gradients = [p.grad for p in layer.parameters() if p.grad is not None]
            assert len(gradients) == 2  # those of the newest task
            return [*found, *gradients, layer.matrix, layer.cur_matrix]
    """,
    "SDLORA": """
        import backbone.lora as host
        d, r, tasks = 24, 3, 3
        def linear(i, o):
            return nn.Linear(i, o, bias=False)
        def magnitude(value):
            return host.ParameterWrapper(nn.Parameter(torch.tensor([value])))
        saved_A = {f"saved_A_{t}": [linear(d, r) for _ in range(4)] for t in range(tasks)}
        saved_B = {f"saved_B_{t}": [linear(r, d) for _ in range(4)] for t in range(tasks)}
        qkv = host._LoRA_qkv_timm_train(
            nn.Linear(d, 3 * d).requires_grad_(False), linear(d, r), linear(r, d), linear(d, r), linear(r, d), tasks,
            saved_A, saved_B, 1, r, nn.ModuleList([magnitude(0.8)]),
            nn.ModuleList([magnitude(v) for v in (0.8, 0.5, 0.3)]),
        )
        def results():
            layer, x = copy.deepcopy(qkv), draw(3, 5, d).requires_grad_()
            y = layer(x)
            y.square().sum().backward()
            gradients = [p.grad for p in layer.parameters() if p.grad is not None]
            assert len(gradients) == 8  # two pairs of factors, four magnitudes
            return [y.detach(), x.grad, *gradients]
    """,
    "CLLORA": """
        import backbone.vit_cllora as host
        class Config(dict):
            def __getattr__(self, name):
                return self.get(name, False)
        config = Config(
            ffn_adapt=True, ffn_option="parallel", ffn_adapter_layernorm_option="none", ffn_adapter_init_option="lora",
            ffn_adapter_scalar="0.1", ffn_num=3, d_model=32, _device="cpu", use_block_weight=True, general_pos=[0, 1],
            specfic_pos=[2, 3], msa=[1, 0, 1], msa_adapt=True,
        )
        vit = host.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=0, tuning_config=config,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        for task in range(3):
            for parameter in vit.cur_adapter.parameters():
                nn.init.normal_(parameter, std=0.3)
            if task < 2:
                vit.add_adapter_to_list()
        vit.eval()
        blocks, forward = [], host.Block.forward
        host.Block.forward = lambda self, *args, **kwargs: blocks.append(self) or forward(self, *args, **kwargs)
        def results():
            with torch.no_grad():
                found = vit.forward_test(draw(2, 3, 32, 32)) + vit.forward_test(draw(2, 3, 32, 32), True)
            print(len(blocks))
            blocks.clear()
            return found
    """,
}


@pytest.mark.parametrize("host", CODE)
def test_layers(host: str) -> None:
    folder = os.environ.get(f"PLORA_{host}") or str(Path(__file__).parent / "hosts" / host.lower())
    program = START.replace("FOLDER", repr(folder)) + textwrap.dedent(CODE[host]) + END
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=folder)
    if "No module named" in result.stderr and "plora_ext" not in result.stderr.splitlines()[-1]:
        pytest.skip(result.stderr.splitlines()[-1])
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    if host == "CLLORA":  # 3 x 4 blocks, and 4 of the frozen backbone; shared: 2 + 3 x 2
        assert [line for line in result.stdout.splitlines() if line.isdigit()] == ["28", "20"]


OTHERS = {
    "other": (
        "class _LoRA_qkv: pass",
        "ImportError: this is not WuYichen-97/SD-Lora-CL 8bacded (as tested), nothing of it",
    ),
    "newer": (
        """
        class _LoRA_qkv_timm_train:
            def forward(self, x, task): return x
        """,
        "TypeError: backbone.lora:_LoRA_qkv_timm_train.forward takes (self, x, task) here, and what would replace it "
        "was written for (self, x): use a version that this package is tested with (WuYichen-97/SD-Lora-CL 8bacded",
    ),
    "broken": ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_modules_of_the_same_name_that_are_others(case: str, tmp_path: Path) -> None:
    source, message = OTHERS[case]
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "lora.py").write_text(textwrap.dedent(source))
    program = """
        import sys
        from plora_ext.integrations import pilot
        names = set(sys.modules)
        try:
            pilot.patch()
        except (ImportError, TypeError) as error:
            print(f"{type(error).__name__}: {error}")
        assert not [name for name in set(sys.modules) - names if name.startswith("timm.models.layers.")]
        with_names = pilot._old_timm_names()
        assert sys.modules["timm.models.layers.helpers"] is sys.modules["timm.layers.helpers"]
        with_names()
        assert "timm.models.layers.helpers" not in sys.modules
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert message in result.stdout and result.stdout.count("\n") == 1
