"""Mammoth's registry of models."""

REGISTERED_MODELS = {"sgd": {"class": object, "parsable_args": {}}}
