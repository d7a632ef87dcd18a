"""From a row of named fields to a document: its id, text, date and the facts beside it, or why it is none.

Owns what a row must have. Knows nothing of the file or hub that the row is from.
"""

from typing import Any

from data_pipeline.sources.conversations import read_conversation, text_of
from data_pipeline.sources.dataset import DatasetConfig, layout_of
from data_pipeline.text.documents import Bad, BadText, Document, Place, iso_date, make_document, scalar_meta


def row_document(dataset: DatasetConfig, row: dict[str, Any], default_id: str, place: Place) -> Document | Bad:
    """The document in a row of named fields."""
    if dataset.rows == "text" and dataset.text_field not in row:
        return Bad(place, f"no field {dataset.text_field!r}", "fields: " + ", ".join(map(str, row))[:200])
    identity = default_id
    if dataset.id_field is not None:
        value = row.get(dataset.id_field)
        if not isinstance(value, (str, int)) or isinstance(value, bool) or value == "":
            return Bad(place, f"no usable id in {dataset.id_field!r}", repr(value)[:100])
        identity = str(value)
        if any("\ud800" <= letter <= "\udfff" for letter in identity):
            return Bad(place, f"no usable id in {dataset.id_field!r}", repr(value)[:100])
    content = (dataset.text_field,) if dataset.rows == "text" else tuple(layout_of(dataset).values())
    leave_out = {*content, *([dataset.id_field] if dataset.id_field else [])}
    meta = scalar_meta(row, dataset.meta_fields, leave_out)
    date = iso_date(row.get(dataset.date_field)) or iso_date(row.get("year"))
    if dataset.rows == "text":
        return make_document(identity, row[dataset.text_field], meta, place, date)
    assert dataset.layout is not None
    try:
        read = read_conversation(row, dataset.rows, dataset.layout, layout_of(dataset))
    except BadText as error:
        return Bad(place, str(error))
    return make_document(identity, text_of(read), {**meta, "turns": sum(map(len, read.sides))}, place,
                         date)


def bounded(dataset: DatasetConfig, item: Document | Bad) -> Document | Bad:
    """`item`, or a bad row when its text is over max_line_bytes."""
    if isinstance(item, Document) and len(item.encoded) > dataset.max_line_bytes:
        return Bad(item.place, "document over max_line_bytes", f"{len(item.encoded):,} bytes")
    return item
