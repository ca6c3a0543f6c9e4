"""Steps run twice and memory looked at twice, so that a flipped bit is found and named."""

from __future__ import annotations

from unbroken.verification.batches import cloned as cloned
from unbroken.verification.verifier import StepVerifier as StepVerifier
from unbroken.verification.verifier import Subject as Subject

__all__ = ["StepVerifier", "Subject", "cloned"]
