"""Annotation files to records to batches: readers and splits, the prompt, the dataset, sampler and collator.

A record is one question and answer about one case. Names are imported when they are first asked for, so that a command
which only needs a patient's name does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slide_reports.batches import (
        LOADER_FLAGS,
        ReportDataset,
        check_input_kind,
        collate,
        default_num_visual_tokens,
        describe_encoder,
        make_loader,
        make_loaders,
        making_of,
        patch_budget,
    )
    from slide_reports.cases import case_of_slides, read_case, read_images, share_budget
    from slide_reports.inputs import describe_features, with_inputs
    from slide_reports.lengths import tell_cut_texts
    from slide_reports.prompt import (
        DEFAULT_QUESTIONS,
        Prompt,
    )
    from slide_reports.record import Record, patient_of, slide_id_of
    from slide_reports.record_batches import RecordBatches, SampleKey
    from slide_reports.records import (
        RECORD_FLAGS,
        add_data_arguments,
        add_record_arguments,
        digests,
        inputs_digest,
        read_records,
        read_training_records,
        records_digest,
    )
    from slide_reports.splits import split_by_patient
    from slide_reports.table import RecordTable

__all__ = [
    "check_input_kind",
    "default_num_visual_tokens",
    "making_of",
    "DEFAULT_QUESTIONS",
    "LOADER_FLAGS",
    "Prompt",
    "RECORD_FLAGS",
    "Record",
    "RecordBatches",
    "RecordTable",
    "ReportDataset",
    "SampleKey",
    "add_data_arguments",
    "add_record_arguments",
    "case_of_slides",
    "collate",
    "describe_encoder",
    "describe_features",
    "digests",
    "inputs_digest",
    "make_loader",
    "make_loaders",
    "patch_budget",
    "patient_of",
    "read_case",
    "read_images",
    "read_records",
    "read_training_records",
    "records_digest",
    "share_budget",
    "slide_id_of",
    "split_by_patient",
    "tell_cut_texts",
    "with_inputs",
]

_HOMES = {  # module -> what it offers here
    "batches": (
        "LOADER_FLAGS ReportDataset check_input_kind collate default_num_visual_tokens describe_encoder "
        "make_loader make_loaders making_of patch_budget"
    ),
    "cases": "case_of_slides read_case read_images share_budget",
    "inputs": "describe_features with_inputs",
    "lengths": "tell_cut_texts",
    "prompt": "DEFAULT_QUESTIONS Prompt",
    "record": "Record patient_of slide_id_of",
    "record_batches": "RecordBatches SampleKey",
    "records": (
        "RECORD_FLAGS add_data_arguments add_record_arguments digests inputs_digest read_records "
        "read_training_records records_digest"
    ),
    "splits": "split_by_patient",
    "table": "RecordTable",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
