"""TUNA's only learner."""


def get_model(model_name, args):
    assert model_name.lower() == "tuna"
    from models.tuna import Learner

    return Learner(args)
