"""Mammoth, a real checkout or a stand-in: its LoRA layer with and without the patch, and `--model plora` in main.py.

In a process of its own: Mammoth changes the working folder, and its modules have the names of LAMDA-PILOT's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REAL = os.environ.get("PLORA_MAMMOTH", "")  # a checkout of https://github.com/aimagelab/mammoth
CHECKOUT = REAL or str(Path(__file__).parent / "hosts" / "mammoth")

SETUP = f"""
import sys
from unittest.mock import MagicMock
sys.path.insert(0, {CHECKOUT!r})
try:
    import kornia
except ImportError:
    print("NO KORNIA")
sys.modules["open_clip"] = MagicMock()  # a data set of Mammoth's downloads a model with it on import
import numpy as np, torch
from plora_ext.integrations import mammoth
"""


def run(code: str, folder: Path) -> str:
    program = SETUP + textwrap.dedent(code).replace("FOLDER", str(folder))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280, cwd=folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def test_lora_layers_of_a_vit(tmp_path: Path) -> None:
    out = run(
        """
        from backbone.utils.lora_utils import LoRALinear
        from backbone.vit import VisionTransformer
        from plora_ext import ops
        torch.manual_seed(0)
        theirs = LoRALinear.forward
        size = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
        vit = VisionTransformer(use_lora=True, **size).eval()
        sizes = (("qkv", 48, 144), ("proj", 48, 48), ("fc1", 48, 192), ("fc2", 192, 48))
        AB = {
            layer: {n: {"A": torch.randn(3, 2, i) * 0.2, "B": torch.randn(3, o, 2) * 0.2} for n, i, o in sizes}
            for layer in range(2)
        }
        AB[1]["proj"] = torch.randn(3, 48, 48) * 0.1  # dense
        AB[1]["fc1"] = {"B": torch.randn(3, 192, 48) * 0.1}
        tensors = [
            t.requires_grad_() for layer in AB.values() for m in layer.values()
            for t in (m.values() if isinstance(m, dict) else [m])
        ]
        images, count, original = torch.randn(4, 3, 32, 32), [0], ops.lora_sum
        def counted(*args, **kwargs):
            count[0] += 1
            return original(*args, **kwargs)
        ops.lora_sum = counted
        def results():
            y = vit(images, AB=AB)
            return [y, *torch.autograd.grad(y.square().sum(), tensors), vit(images)]
        before = results()
        assert count == [0]
        with mammoth.patch() as patch:
            after = results()
        assert count == [6], count
        for a, b in zip(before, after):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * max(1.0, float(a.abs().max())))
        assert LoRALinear.forward is theirs
        layer = LoRALinear(4, 6)
        with mammoth.patch():
            for A in (torch.randn(2, 3, 2, 4), torch.randn(1, 2, 4)):  # one pair a sample; a shared A
                x, B = torch.randn(2, 5, 4), torch.randn(*A.shape[:-2], 6, 2) if A.dim() == 4 else torch.randn(3, 6, 2)
                torch.testing.assert_close(layer(x, {"A": A, "B": B}), theirs(layer, x, {"A": A, "B": B}))
            try:
                layer(torch.randn(2, 5, 4), {"A": torch.randn(3, 2, 4)})
            except AssertionError as error:
                assert "'B' key" in str(error)  # Mammoth's own words
            else:
                raise SystemExit("no error")
        print(patch)
        """,
        tmp_path,
    )
    assert "backbone.utils.lora_utils:LoRALinear.forward" in out


def test_plora_runs_through_main(tmp_path: Path) -> None:
    if not REAL:
        out = run(
            """
            print(mammoth.patch())
            sys.argv = "main.py --model plora --lora_targets fc1 fc2 --lora_r 4 --n_epochs 2 --batch_size 20".split()
            import main
            main.main()
            mammoth.unpatch()
            import models
            assert list(models.REGISTERED_MODELS) == ["sgd"]
            """,
            tmp_path,
        )
        assert accuracy(out) > 80
        return
    out = run(
        """
        print(mammoth.patch())
        import datasets.seq_mnist as seq_mnist
        from torchvision import transforms
        rng = np.random.default_rng(0)
        centres = rng.integers(0, 256, (10, 28, 28))
        def init(self, root, train=True, transform=None, target_transform=None, download=False):
            self.transform, self.target_transform, self.root, self.train = transform, target_transform, root, train
            self.not_aug_transform = transforms.ToTensor()
            labels = np.repeat(np.arange(10), 30 if train else 8)
            noise = rng.integers(-120, 120, (len(labels), 28, 28))
            self.data = torch.from_numpy((centres[labels] + noise).clip(0, 255).astype(np.uint8))
            self.targets = torch.from_numpy(labels)
        seq_mnist.MyMNIST.__init__ = seq_mnist.MNIST.__init__ = init
        sys.argv = (
            "main.py --model plora --dataset seq-mnist --backbone mnistmlp --lr 0.003 --n_epochs 2 --batch_size 20 "
            "--lora_targets fc1 fc2 --lora_r 4 --non_verbose 1 --num_workers 0 --base_path FOLDER/"
        ).split()
        import main
        main.main()
        """,
        tmp_path,
    )
    if "NO KORNIA" in out:
        pytest.skip("Mammoth's models need kornia")
    assert accuracy(out) > 40


def accuracy(out: str) -> float:
    last = next(line for line in out.splitlines()[::-1] if "Accuracy for 5 task(s)" in line)
    return float(last.split("[Class-IL]: ")[1].split("%")[0])
