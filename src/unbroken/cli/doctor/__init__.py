"""`unbroken doctor`: what this machine is, and what on it would break bit-exactness."""

from __future__ import annotations

from unbroken.cli.doctor.report import print_diagnosis as print_diagnosis

__all__ = ["print_diagnosis"]
