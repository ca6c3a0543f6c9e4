"""What a run is made of, as plain values that a later start can compare: never its state."""

from unbroken.fingerprint.dataset import begin_data_facts as begin_data_facts
from unbroken.fingerprint.dataset import begin_source_facts as begin_source_facts
from unbroken.fingerprint.dataset import data_facts as data_facts
from unbroken.fingerprint.dataset import keeps_generators as keeps_generators
from unbroken.fingerprint.dataset import sampled_records as sampled_records
from unbroken.fingerprint.objects import ON_MODULES as ON_MODULES
from unbroken.fingerprint.objects import ON_OPTIMIZERS as ON_OPTIMIZERS
from unbroken.fingerprint.objects import ON_PARAMETERS as ON_PARAMETERS
from unbroken.fingerprint.objects import changed_by_reading as changed_by_reading
from unbroken.fingerprint.objects import hooks_on as hooks_on
from unbroken.fingerprint.objects import keeps_attributes as keeps_attributes
from unbroken.fingerprint.objects import model_facts as model_facts
from unbroken.fingerprint.objects import names_in_class as names_in_class
from unbroken.fingerprint.objects import names_stored_by as names_stored_by
from unbroken.fingerprint.objects import optimizer_facts as optimizer_facts
from unbroken.fingerprint.objects import own_attributes as own_attributes
from unbroken.fingerprint.objects import scheduler_facts as scheduler_facts
from unbroken.fingerprint.objects import subclass_facts as subclass_facts
from unbroken.fingerprint.source_code import COMPILED as COMPILED
from unbroken.fingerprint.source_code import MAX_REACHED as MAX_REACHED
from unbroken.fingerprint.source_code import MODULES as MODULES
from unbroken.fingerprint.source_code import cut_off as cut_off
from unbroken.fingerprint.source_code import functions_of as functions_of
from unbroken.fingerprint.source_code import is_user_code as is_user_code
from unbroken.fingerprint.source_code import is_user_module as is_user_module
from unbroken.fingerprint.source_code import names_in as names_in
from unbroken.fingerprint.source_code import qualified_name as qualified_name
from unbroken.fingerprint.source_code import reached as reached
from unbroken.fingerprint.source_code import source_digest as source_digest
from unbroken.fingerprint.values import NOT_COMPARED as NOT_COMPARED
from unbroken.fingerprint.values import Plain as Plain
from unbroken.fingerprint.values import callable_facts as callable_facts
from unbroken.fingerprint.values import facts_of as facts_of
from unbroken.fingerprint.values import object_facts as object_facts
from unbroken.fingerprint.values import plain_attributes as plain_attributes
from unbroken.fingerprint.values import plain_items as plain_items
from unbroken.fingerprint.values import plain_or_text as plain_or_text
from unbroken.fingerprint.values import record_digest as record_digest

__all__ = [
    "COMPILED",
    "MAX_REACHED",
    "MODULES",
    "NOT_COMPARED",
    "ON_MODULES",
    "ON_OPTIMIZERS",
    "ON_PARAMETERS",
    "Plain",
    "begin_data_facts",
    "begin_source_facts",
    "callable_facts",
    "changed_by_reading",
    "cut_off",
    "data_facts",
    "facts_of",
    "functions_of",
    "hooks_on",
    "is_user_code",
    "is_user_module",
    "keeps_attributes",
    "keeps_generators",
    "model_facts",
    "names_in",
    "names_in_class",
    "names_stored_by",
    "object_facts",
    "optimizer_facts",
    "own_attributes",
    "plain_attributes",
    "plain_items",
    "plain_or_text",
    "qualified_name",
    "reached",
    "record_digest",
    "sampled_records",
    "scheduler_facts",
    "source_digest",
    "subclass_facts",
]
