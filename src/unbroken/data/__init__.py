"""The data and the position in it: order, randomness and state derived from (seed, position)."""

from __future__ import annotations

from unbroken.data.asking import has as has
from unbroken.data.factory import batch_source as batch_source
from unbroken.data.keyed_dataset import KeyedDataset as KeyedDataset
from unbroken.data.keys import derive_key as derive_key
from unbroken.data.loader_source import CountedSource as CountedSource
from unbroken.data.loader_source import LoaderSource as LoaderSource
from unbroken.data.loader_source import StatefulSource as StatefulSource
from unbroken.data.map_source import Loading as Loading
from unbroken.data.map_source import MapSource as MapSource
from unbroken.data.order import GlobalOrder as GlobalOrder
from unbroken.data.order import SampleKey as SampleKey
from unbroken.data.permutation import Permutation as Permutation
from unbroken.data.randomness import KeyedRandom as KeyedRandom
from unbroken.data.randomness import keyed_random as keyed_random
from unbroken.data.reading import Grouping as Grouping
from unbroken.data.replay import reason_against_its_state as reason_against_its_state
from unbroken.data.sampler import BatchShape as BatchShape
from unbroken.data.sampler import MicroBatchSampler as MicroBatchSampler
from unbroken.data.seen import Passed as Passed
from unbroken.data.seen import Seen as Seen
from unbroken.data.seen import drawn_from as drawn_from
from unbroken.data.source import BatchSource as BatchSource
from unbroken.data.source import MicroBatch as MicroBatch
from unbroken.data.source import Position as Position

__all__ = [
    "BatchShape",
    "BatchSource",
    "CountedSource",
    "GlobalOrder",
    "Grouping",
    "KeyedDataset",
    "KeyedRandom",
    "LoaderSource",
    "Loading",
    "MapSource",
    "MicroBatch",
    "MicroBatchSampler",
    "Passed",
    "Permutation",
    "Position",
    "SampleKey",
    "Seen",
    "StatefulSource",
    "batch_source",
    "derive_key",
    "drawn_from",
    "has",
    "keyed_random",
    "reason_against_its_state",
]
