"""What the sections of a recipe have in common."""

import re
from os.path import expanduser
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from rlbal.errors import nearest

# Reward names become metric names and part of override paths, where `/` and `.` have a meaning.
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


# A file or folder, where `~` is the user's home as in a shell, not a folder of that name.
UserPath = Annotated[str, AfterValidator(expanduser)]


class Section(BaseModel):
    """A part of a recipe. Unknown keys are refused with the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    hint = nearest(str(key), cls.model_fields)
                    raise PydanticCustomError("unknown_key", f"`{key}` is not a key here. {hint}".strip())
        return values
