"""The recognisers that tests of long audio share with those of its commands."""

from tests.longform.recognisers import causal, kept, model, talk

__all__ = ["causal", "kept", "model", "talk"]
