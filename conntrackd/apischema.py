"""JSON Schemas of what commands print with `-o json`: made of the structs that are printed, so they say the same."""

from typing import Any, Final

import msgspec

from conntrackd import api

DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"

# What a command prints: one of these types.
OUTPUTS: Final[dict[str, tuple[Any, ...]]] = {
    "flows": (list[api.Flow],),
    "flows --by": (list[api.Group],),
    "flows --expected": (list[api.Expectation],),
    "flow": (api.FlowDetails,),
    "count": (api.Count,),
    "kill": (list[api.Flow],),
    "label": (list[api.Flow],),  # add, del
    "label list": (list[api.Label],),
    "events": (api.Event, api.Lost),  # each line
    "trace": (api.TraceBegin, api.TraceStep, api.TraceLost),  # each line
    "drops": (list[api.Drop],),
    "drops --by": (list[api.DropGroup],),
    "status": (api.Status,),
    "stats": (api.Stats,),
    "doctor": (list[api.Diagnosis],),
    "rules": (list[api.RuleRow],),
    "explain": (list[api.ExplainStep],),
    "set list": (list[api.SetRow],),
    "set list NAME": (list[api.SetEntry],),
    "history": (list[api.GenerationRow],),
    "check": (list[api.Finding],),
    "reload": (api.Change,),
    "apply": (api.Change,),
    "confirm": (api.Change,),
    "rollback": (api.Change,),
}


def schema(command: str) -> dict[str, Any]:
    """Make the schema of what a command of OUTPUTS prints."""
    types, definitions = msgspec.json.schema_components(OUTPUTS[command], ref_template="#/$defs/{name}")
    one = types[0] if len(types) == 1 else {"anyOf": list(types)}
    return {"$schema": DRAFT, "title": f"conntrackd {command} -o json"} | one | {"$defs": definitions}
