"""Records of steps: a resumed run repeats the steps of the killed one, and compares them.

Every start writes, after each checkpoint, a small record of each step. The next start that goes on
from that checkpoint takes these steps again: where each has the same bits, these steps are
confirmed, whatever anybody forgot to save; where one has not, its record tells what differs first.
"""

from __future__ import annotations

from unbroken.step_records.compare import ComparedParts as ComparedParts
from unbroken.step_records.compare import ComparedStep as ComparedStep
from unbroken.step_records.compare import Part as Part
from unbroken.step_records.compare import SampleSum as SampleSum
from unbroken.step_records.compare import UnrepeatedStep as UnrepeatedStep
from unbroken.step_records.compare import compare_samples as compare_samples
from unbroken.step_records.compare import compare_steps as compare_steps
from unbroken.step_records.compare import compare_stops as compare_stops
from unbroken.step_records.compare import parts_to_compare as parts_to_compare
from unbroken.step_records.observer import StepObserver as StepObserver
from unbroken.step_records.records import Recorded as Recorded
from unbroken.step_records.records import RecordedRange as RecordedRange
from unbroken.step_records.records import RecordWriter as RecordWriter
from unbroken.step_records.records import StateAtStop as StateAtStop
from unbroken.step_records.records import StepRecord as StepRecord
from unbroken.step_records.records import read_recorded as read_recorded
from unbroken.step_records.records import read_recorded_by_ranks as read_recorded_by_ranks
from unbroken.step_records.records import remove_abandoned as remove_abandoned
