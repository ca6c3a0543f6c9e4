"""Live objects <-> state tree <-> typed JSON and leaves. No pickle, no loss of a bit."""

from unbroken.capture.codec.leaves import FileOf as FileOf
from unbroken.capture.codec.leaves import TensorLeaf as TensorLeaf
from unbroken.capture.codec.leaves import file_layout as file_layout
from unbroken.capture.codec.leaves import file_of as file_of
from unbroken.capture.codec.values import Encoded as Encoded
from unbroken.capture.codec.values import decode as decode
from unbroken.capture.codec.values import encode as encode
from unbroken.capture.codec.values import (
    refuse_what_cannot_be_stored as refuse_what_cannot_be_stored,
)
from unbroken.capture.fit_structure import PREPARE as PREPARE
from unbroken.capture.fit_structure import Growth as Growth
from unbroken.capture.fit_structure import Skip as Skip
from unbroken.capture.fit_structure import keep_skipped as keep_skipped
from unbroken.capture.fit_structure import structure_digest as structure_digest
from unbroken.capture.kinds.modules import capture_gradients as capture_gradients
from unbroken.capture.kinds.modules import check_gradients as check_gradients
from unbroken.capture.kinds.modules import files_of_processor as files_of_processor
from unbroken.capture.kinds.modules import named_buffers as named_buffers
from unbroken.capture.kinds.modules import named_modules as named_modules
from unbroken.capture.kinds.modules import named_parameters as named_parameters
from unbroken.capture.kinds.modules import pretrained_files as pretrained_files
from unbroken.capture.kinds.modules import restore_gradients as restore_gradients
from unbroken.capture.kinds.modules import unwrapped as unwrapped
from unbroken.capture.kinds.optimizers import ParameterNames as ParameterNames
from unbroken.capture.kinds.random_state import capture_rng as capture_rng
from unbroken.capture.kinds.random_state import check_rng as check_rng
from unbroken.capture.kinds.random_state import missing_devices as missing_devices
from unbroken.capture.kinds.random_state import of_devices_here as of_devices_here
from unbroken.capture.kinds.random_state import restore_rng as restore_rng
from unbroken.capture.objects import Stateful as Stateful
from unbroken.capture.objects import all_objects as all_objects
from unbroken.capture.objects import capture as capture
from unbroken.capture.objects import capture_unregistered as capture_unregistered
from unbroken.capture.objects import check as check
from unbroken.capture.objects import files_for as files_for
from unbroken.capture.objects import fill as fill
from unbroken.capture.objects import kind_of as kind_of
from unbroken.capture.objects import named_objects as named_objects
from unbroken.capture.objects import restore as restore
from unbroken.capture.objects import restore_unregistered as restore_unregistered
from unbroken.capture.state_taken_back import NotTakenBack as NotTakenBack
from unbroken.capture.state_tree import Captured as Captured
from unbroken.capture.state_tree import types_in as types_in
from unbroken.capture.stored_tensor import LeafSource as LeafSource
from unbroken.capture.stored_tensor import StoredTensor as StoredTensor
from unbroken.capture.stored_tensor import load_tensors as load_tensors
from unbroken.capture.tensor_distance import Distance as Distance
from unbroken.capture.tensor_distance import distance as distance
from unbroken.capture.tensor_distance import stored_distance as stored_distance
from unbroken.capture.tensors import byte_view as byte_view
from unbroken.capture.tensors import class_of as class_of
from unbroken.capture.tensors import classes_at_hand as classes_at_hand
from unbroken.capture.tensors import comes_apart as comes_apart
from unbroken.capture.tensors import how_cut as how_cut
from unbroken.capture.tensors import is_sharded as is_sharded
from unbroken.capture.tensors import raw as raw
from unbroken.store.format.typed_json import structure_from_bytes as structure_from_bytes
from unbroken.store.format.typed_json import structure_to_bytes as structure_to_bytes

__all__ = [
    "PREPARE",
    "Captured",
    "Distance",
    "Encoded",
    "FileOf",
    "Growth",
    "LeafSource",
    "NotTakenBack",
    "ParameterNames",
    "Skip",
    "Stateful",
    "StoredTensor",
    "TensorLeaf",
    "all_objects",
    "byte_view",
    "capture",
    "capture_gradients",
    "capture_rng",
    "capture_unregistered",
    "check",
    "check_gradients",
    "check_rng",
    "class_of",
    "classes_at_hand",
    "comes_apart",
    "decode",
    "distance",
    "encode",
    "file_layout",
    "file_of",
    "files_for",
    "files_of_processor",
    "fill",
    "how_cut",
    "is_sharded",
    "keep_skipped",
    "kind_of",
    "load_tensors",
    "missing_devices",
    "named_buffers",
    "named_modules",
    "named_objects",
    "named_parameters",
    "of_devices_here",
    "pretrained_files",
    "raw",
    "refuse_what_cannot_be_stored",
    "restore",
    "restore_gradients",
    "restore_rng",
    "restore_unregistered",
    "stored_distance",
    "structure_digest",
    "structure_from_bytes",
    "structure_to_bytes",
    "types_in",
    "unwrapped",
]
