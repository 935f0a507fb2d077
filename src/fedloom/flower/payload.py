"""Parcels in Flower's messages: the payloads as one opaque array of bytes, the facts beside it."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedloom.errors import SiteError
from fedloom.site.protocol import Parcel, cut_payloads, parse_sizes

ARRAYS, FACTS = "fedloom.payloads", "fedloom.facts"
STYPE = "fedloom.wire.v1"
SIZES = "sizes"


def pack_parcel(parcel: Parcel) -> RecordDict:
    """The content of a message. Facts that are None are left out: Flower has no such value."""
    content = b"".join(parcel.payloads)
    facts = {name: value for name, value in parcel.facts.items() if value is not None}
    records = RecordDict({FACTS: ConfigRecord({**facts, SIZES: [len(payload) for payload in parcel.payloads]})})
    if content:
        records[ARRAYS] = ArrayRecord({"bytes": Array("uint8", (len(content),), STYPE, content)})
    return records


def unpack_parcel(content: RecordDict) -> Parcel:
    """The parcel in a message's content. Raises SiteError where there is none, or its sizes do not fit."""
    try:
        facts = dict(content.config_records[FACTS])
    except KeyError:
        raise SiteError("the message is none of fedloom's") from None
    lengths = parse_sizes(facts.pop(SIZES, []))
    arrays = list(content.array_records.get(ARRAYS, {}).values())
    if any(array.stype != STYPE for array in arrays) or len(arrays) > 1:
        raise SiteError(f"the message's array is not of type {STYPE}: both sides need the same version of fedloom")
    return Parcel(
        {name: value for name, value in facts.items() if isinstance(value, str | int | float | bool)},
        cut_payloads(arrays[0].data if arrays else b"", lengths),
    )
