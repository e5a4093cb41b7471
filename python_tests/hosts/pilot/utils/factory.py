"""PILOT's learners by name."""


def get_model(model_name, args):
    assert model_name.lower() == "ease"
    from models.ease import Learner

    return Learner(args)
