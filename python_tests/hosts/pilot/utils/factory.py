"""PILOT's learners by name."""

import importlib


def get_model(model_name, args):
    assert model_name.lower() in ("ease", "mos")
    return importlib.import_module(f"models.{model_name.lower()}").Learner(args)
