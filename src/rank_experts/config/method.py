"""The method's entry in PEFT's enum of methods, which every PEFT config names.

The enum offers no way to add one, so the member is added by hand. Where a later PEFT has a member of this name, that is
used.
"""

from __future__ import annotations

from peft import PeftType

PEFT_TYPE = "RANK_EXPERTS"
"""The method's name in PEFT's registry and in `adapter_config.json`."""


def peft_type() -> PeftType:
    """Return the member of PEFT's enum; the first call adds it.

    Example:
        >>> peft_type() is peft_type()
        True
    """
    if PEFT_TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, PEFT_TYPE)
        member._name_ = PEFT_TYPE
        member._value_ = PEFT_TYPE
        member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
        PeftType._member_names_.append(PEFT_TYPE)
        PeftType._member_map_[PEFT_TYPE] = member
        PeftType._value2member_map_[PEFT_TYPE] = member
        type.__setattr__(PeftType, PEFT_TYPE, member)
    return PeftType(PEFT_TYPE)
