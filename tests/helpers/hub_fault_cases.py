"""What a Hub can do wrong, and what a run must make of it."""

from dataclasses import dataclass

ENDLESS_S = 6.0  # patience where all of it is used up; elsewhere it is only a bound


@dataclass(frozen=True)
class Case:
    """A fault, the publisher's patience (a request gets a quarter of it), and whether it helps."""

    route: str
    what: dict
    lands: bool = True
    patience: float = 90.0


FAULTS = {
    "commit answers 503": Case("commit", {"status": 503, "times": 2}),
    "commit answers 429": Case(
        "commit", {"status": 429, "times": 1, "headers": {"Retry-After": "1"}}
    ),
    "commit answers 412": Case("commit", {"status": 412, "times": 1}),
    "commit hangs once": Case("commit", {"hang": 600.0, "times": 1}, patience=12.0),
    "line cut before the commit": Case("commit", {"drop": True, "times": 1}),
    "line cut after the commit": Case("commit", {"drop": True, "after": True, "times": 1}),
    "every answer is 503": Case("any", {"status": 503}, lands=False, patience=ENDLESS_S),
    "every request hangs": Case("any", {"hang": 600.0}, lands=False, patience=ENDLESS_S),
    "login refused": Case("any", {"status": 401}, lands=False),
    "no permission": Case("commit", {"status": 403}, lands=False),
}


RARE_FAULTS = {
    "create answers 503": Case("create", {"status": 503, "times": 1}),
    "preupload answers 503": Case("preupload", {"status": 503, "times": 1}),
    "commit done but answered 503": Case("commit", {"status": 503, "after": True, "times": 1}),
    "commit done but never answered": Case(
        "commit", {"hang": 600.0, "after": True, "times": 1}, patience=12.0
    ),
    "upload cut": Case("storage.upload", {"drop": True, "times": 1}),
    "tag answers 503": Case("tag", {"status": 503, "times": 1}),
    "every answer is 429": Case(
        "any", {"status": 429, "headers": {"Retry-After": "600"}}, lands=False
    ),
    "every line is cut": Case("any", {"drop": True}, lands=False, patience=ENDLESS_S),
}
