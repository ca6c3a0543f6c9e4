"""The data and the position in it: order, randomness and state derived from (seed, position)."""

from __future__ import annotations

from unbroken.data.keyed_rng import KeyedRandom as KeyedRandom
from unbroken.data.keyed_rng import derive_key as derive_key
from unbroken.data.keyed_rng import keyed_random as keyed_random
from unbroken.data.order import BatchShape as BatchShape
from unbroken.data.order import GlobalOrder as GlobalOrder
from unbroken.data.order import MicroBatchSampler as MicroBatchSampler
from unbroken.data.order import Permutation as Permutation
from unbroken.data.order import SampleKey as SampleKey
from unbroken.data.sources.batch_digests import BatchDigest as BatchDigest
from unbroken.data.sources.batch_digests import EpochDigests as EpochDigests
from unbroken.data.sources.batch_digests import arrays_in as arrays_in
from unbroken.data.sources.batch_digests import drawn_from as drawn_from
from unbroken.data.sources.batch_digests import generators_in as generators_in
from unbroken.data.sources.factory import batch_source as batch_source
from unbroken.data.sources.factory import loop_source as loop_source
from unbroken.data.sources.iterable import Grouping as Grouping
from unbroken.data.sources.iterable import reason_against_its_state as reason_against_its_state
from unbroken.data.sources.loader import CountedSource as CountedSource
from unbroken.data.sources.loader import LoaderSource as LoaderSource
from unbroken.data.sources.loader import StatefulSource as StatefulSource
from unbroken.data.sources.map_style import KeyedDataset as KeyedDataset
from unbroken.data.sources.map_style import Loading as Loading
from unbroken.data.sources.map_style import MapSource as MapSource
from unbroken.data.sources.protocol import BatchSource as BatchSource
from unbroken.data.sources.protocol import EpochSource as EpochSource
from unbroken.data.sources.protocol import MicroBatch as MicroBatch
from unbroken.data.sources.protocol import Position as Position

__all__ = [
    "BatchDigest",
    "BatchShape",
    "BatchSource",
    "CountedSource",
    "EpochDigests",
    "EpochSource",
    "GlobalOrder",
    "Grouping",
    "KeyedDataset",
    "KeyedRandom",
    "LoaderSource",
    "Loading",
    "MapSource",
    "MicroBatch",
    "MicroBatchSampler",
    "Permutation",
    "Position",
    "SampleKey",
    "StatefulSource",
    "arrays_in",
    "batch_source",
    "derive_key",
    "drawn_from",
    "generators_in",
    "keyed_random",
    "loop_source",
    "reason_against_its_state",
]
