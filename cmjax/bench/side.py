"""How a side of `cmjax bench peer` runs in an interpreter of its own: requests in, replies out, a JSON object a line.

A side is a file with a class `Side`, whose methods are the requests. This one imports nothing of cmjax either. Between
requests the process waits for its next line and computes nothing.
"""

import json
import os
import runpy
import sys
from typing import Any


def reply_to(side: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request: its value, or the error in one line."""
    try:
        name = request.pop("do")
        return {"value": getattr(side, name)(**request)}
    except Exception as error:  # whatever goes wrong here is told over there, in one line
        return {"error": one_line(error)}


def one_line(error: BaseException) -> str:
    """What went wrong, without its traceback."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def main(file: str) -> None:
    """Answer the requests on standard input; only replies go to standard output, whatever a library prints."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    side, failure = None, None
    try:
        side = runpy.run_path(file)["Side"]()
    except Exception as error:  # such as a package that is not there: the reply to whatever is asked
        failure = {"error": one_line(error)}
    for line in sys.stdin:
        replies.write(json.dumps(failure or reply_to(side, json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(sys.argv[1])
