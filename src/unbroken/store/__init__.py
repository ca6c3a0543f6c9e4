"""The format: checkpoints of bytes, their manifests, their commit, and the run's directory."""

from __future__ import annotations

from unbroken.store.checkpoint.reader import CheckpointReader as CheckpointReader
from unbroken.store.checkpoint.reader import Damage as Damage
from unbroken.store.checkpoint.reader import VerifiedCache as VerifiedCache
from unbroken.store.checkpoint.reader import split_verification as split_verification
from unbroken.store.checkpoint.writer import CheckpointWriter as CheckpointWriter
from unbroken.store.checkpoint.writer import offsets_in_files as offsets_in_files
from unbroken.store.checkpoint.writer import store_leaves as store_leaves
from unbroken.store.diff import Diff as Diff
from unbroken.store.diff import TensorDifference as TensorDifference
from unbroken.store.diff import ValueDifference as ValueDifference
from unbroken.store.diff import ValueGroup as ValueGroup
from unbroken.store.diff import diff_checkpoints as diff_checkpoints
from unbroken.store.diff import diff_facts as diff_facts
from unbroken.store.diff import tensor_types as tensor_types
from unbroken.store.export import Exported as Exported
from unbroken.store.export import export_weights as export_weights
from unbroken.store.format.canonical_json import Json as Json
from unbroken.store.format.manifest import Box as Box
from unbroken.store.format.manifest import FileEntry as FileEntry
from unbroken.store.format.manifest import Manifest as Manifest
from unbroken.store.format.manifest import Region as Region
from unbroken.store.format.manifest import Shard as Shard
from unbroken.store.format.manifest import TensorEntry as TensorEntry
from unbroken.store.format.safetensors_file import Leaf as Leaf
from unbroken.store.run.branches import branch as branch
from unbroken.store.run.branches import check_branch_name as check_branch_name
from unbroken.store.run.branches import has_branch as has_branch
from unbroken.store.run.catalog import Catalog as Catalog
from unbroken.store.run.catalog import KeepEvery as KeepEvery
from unbroken.store.run.catalog import KeepPolicy as KeepPolicy
from unbroken.store.run.catalog import Lineage as Lineage
from unbroken.store.run.catalog import Pruned as Pruned
from unbroken.store.run.catalog import Rejection as Rejection
from unbroken.store.run.catalog import prune as prune
from unbroken.store.run.directory import RunDirectory as RunDirectory
from unbroken.store.run.directory import this_machine as this_machine
from unbroken.store.run.journal import Journal as Journal

__all__ = [
    "Box",
    "Catalog",
    "CheckpointReader",
    "CheckpointWriter",
    "Damage",
    "Diff",
    "Exported",
    "FileEntry",
    "Journal",
    "Json",
    "KeepEvery",
    "KeepPolicy",
    "Leaf",
    "Lineage",
    "Manifest",
    "Pruned",
    "Region",
    "Rejection",
    "RunDirectory",
    "Shard",
    "TensorDifference",
    "TensorEntry",
    "ValueDifference",
    "ValueGroup",
    "VerifiedCache",
    "branch",
    "check_branch_name",
    "diff_checkpoints",
    "diff_facts",
    "export_weights",
    "has_branch",
    "offsets_in_files",
    "prune",
    "split_verification",
    "store_leaves",
    "tensor_types",
    "this_machine",
]
