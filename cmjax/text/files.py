"""Files of a model folder that are text."""

import json
from pathlib import Path
from typing import Any, TypeAlias

from cmjax.errors import UserError

JsonObject: TypeAlias = dict[str, Any]  # an object of JSON, as `json` reads and writes it


def read_json(file: Path) -> JsonObject:
    """The JSON object in `file`; UserError where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot read this file: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found
