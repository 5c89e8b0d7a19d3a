"""What the scripts of this folder share. Each runs one library in an environment of its own: what to ask comes as JSON
on its command line, what the library made of the answers goes as JSON to standard output, for the test to judge."""

import json
import sys

ASKED = json.loads(sys.argv[1])
URL, MESSAGES, PROMPT, LONG = (ASKED[name] for name in ("url", "messages", "prompt", "long"))
MAX_TOKENS, STOP, CHAT_STOP = (ASKED[name] for name in ("max_tokens", "stop", "chat_stop"))
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}},
}


def answer(text, usage, finish):
    """A whole answer: its text, tokens in and out, and why it ended."""
    return {"text": text, "usage": list(usage), "finish": finish}


def stream(pieces, usage, finish):
    """A streamed answer, of texts as they came."""
    return {"pieces": list(pieces), **answer("".join(pieces), usage, finish)}


def error_of(call, *args, **more):
    """What the library raises, by the names of its classes and its text; None where it raises nothing."""
    try:
        call(*args, **more)
    except Exception as error:  # each package has its own; which it is, is what the test looks at
        return {"kinds": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
    return None


def report(**found):
    print(json.dumps(found))
